"""Private names of transformers, accelerate and argparse that training relies on are listed, and are what they were.

A release that changes one breaks a test here, with what to look at, instead of a run.
"""

import ast
import inspect
import re
from pathlib import Path
from pydoc import locate

import accelerate
import pytest
import transformers
from transformers import Trainer

import fusmae_hf
import fusmae_hf.training
from fusmae_hf import modeling
from fusmae_hf.training.finetuning.trainer import FineTuningTrainer
from fusmae_hf.training.loop.trainer import PairTrainer
from fusmae_hf.training.loop.upstream import UPSTREAM
from fusmae_hf.training.run_pretrain import FusMAETrainer

LISTED = {name.rpartition(".")[2] for name in UPSTREAM}
INSTALLED = f"transformers {transformers.__version__}, accelerate {accelerate.__version__}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_installed_release_has_what_is_relied_on(name):
    owner, _, attribute = name.rpartition(".")
    cls = locate(owner)
    assert cls is not None, f"{INSTALLED}: there is no {owner} any more"
    if hasattr(cls, attribute):
        found = getattr(cls, attribute)
    else:  # of instances alone
        sources = [inspect.getsource(parent) for parent in cls.__mro__[:-1]]
        found = any(f"self.{attribute} = " in source for source in sources) or None
    assert found is not None, f"{INSTALLED}: {owner} has no {attribute} any more; see UPSTREAM for what needs it"
    if (relied_on := UPSTREAM[name]) is not None:
        parameters = tuple(inspect.signature(found).parameters)
        missing = [parameter for parameter in relied_on if parameter not in parameters]
        assert not missing, f"{INSTALLED}: {name} takes {parameters}, no {missing}"
        order = [parameter for parameter in parameters if parameter in relied_on]
        assert order == list(relied_on), f"{INSTALLED}: {name} takes {parameters} in another order than {relied_on}"


@pytest.mark.parametrize("trainer", [FusMAETrainer, FineTuningTrainer])
def test_every_private_method_that_is_overridden_is_listed(trainer):
    between = trainer.__mro__[: trainer.__mro__.index(Trainer)]
    assert between == (trainer, PairTrainer)
    source = "".join(map(inspect.getsource, between))
    own = {name for cls in between for name in vars(cls)} | set(re.findall(r"self\.(\w+)\b.*? = ", source))
    upstream = {*dir(Trainer), *re.findall(r"self\.(\w+)", inspect.getsource(Trainer))}
    overridden = {name for name in own & upstream if is_private(name)}
    assert overridden <= LISTED, f"not in UPSTREAM: {sorted(overridden - LISTED)}"


def test_every_private_name_of_others_that_is_used_is_listed():
    """What a file of `fusmae_hf.training` reads of an object and none of this package defines is somebody else's."""
    used, defined = {}, set()
    training, *others = (Path(package.__file__).parent for package in (fusmae_hf.training, fusmae_hf, modeling))
    for file in (file for folder in (training, *others) for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Load):
                    if file.is_relative_to(training) and ast.unparse(node) != "os._exit":
                        used.setdefault(node.attr, file.name)
                elif isinstance(node.value, ast.Name) and node.value.id == "self":
                    defined.add(node.attr)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
    foreign = {name: file for name, file in used.items() if is_private(name) and name not in defined}
    assert foreign.keys() <= LISTED, f"not in UPSTREAM: {foreign.keys() - LISTED}"
    overridden = LISTED & defined
    assert foreign.keys() | overridden >= LISTED, f"in UPSTREAM, but not used: {LISTED - foreign.keys() - overridden}"
