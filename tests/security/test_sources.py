"""What the package never does, found in its sources: run what came with data or weights."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("fusmae_hf", "modeling", "training") for path in (ROOT / folder).rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "pty"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {"os.system", "os.popen", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}

ALLOWED = {
    # Catches `pickle.UnpicklingError`, with which torch refuses what `weights_only=True` forbids.
    "training/loop/checkpoints.py": {"pickle"},
    # Sends our own readers and pairs between processes that we started, through pipes that nobody else holds.
    "fusmae_hf/preparation/work.py": {"multiprocessing.reduction"},
}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute, or the name of a name; empty for anything else."""
    if isinstance(node, ast.Attribute):
        outer = dotted(node.value)
        return f"{outer}.{node.attr}" if outer else f"?.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((given.value for given in call.keywords if given.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def problems_of(source: str) -> set[str]:
    """What a source must not do, as far as a parser can tell."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES}
            found |= {name for name in names if name == "multiprocessing.reduction"}
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        if called in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS or called.partition(".")[0] in FORBIDDEN_MODULES:
            found.add(called)
        if called == "torch.load" and not is_constant(keyword(node, "weights_only"), True):
            found.add("torch.load without weights_only=True")
        for name in ("trust_remote_code", "shell", "allow_pickle"):
            if (value := keyword(node, name)) is not None and not is_constant(value, False):
                found.add(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_package_runs_what_came_with_data_or_weights(path):
    name = str(path.relative_to(ROOT))
    assert problems_of(path.read_text(encoding="utf-8")) == ALLOWED.get(name, set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from multiprocessing.reduction import ForkingPickler",
        "eval(text)",
        "__import__(name)",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=arguments.trust)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scan_would_find(source):
    assert problems_of(source)


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "torch.load(path, weights_only=True)", "yaml.safe_load(text)", "json.load(f)", "re.compile(x)"],
)
def test_the_scan_does_not_mind(source):
    assert not problems_of(source)


def test_every_dependency_has_a_lower_and_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    unbounded = [
        requirement
        for group in groups
        for requirement in group
        if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?>=[\d.]+(,!=[\d.*]+)?,<[\d.]+", requirement)
    ]
    assert not unbounded
