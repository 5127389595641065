"""What importing the package does: little, in any order, on every platform."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusmae_hf.shards.reading import OpenFiles
from fusmae_hf.training import short_help
from fusmae_hf.training.arguments import (
    CheckpointArguments,
    DataArguments,
    ModelArguments,
    PairArguments,
    PretrainingArguments,
    SourceArguments,
)
from fusmae_hf.training.finetuning.arguments import (
    FineTuningArguments,
    FineTuningModelArguments,
    ProbeArguments,
    TaskArguments,
)

HEAVY = ("torch", "transformers", "datasets", "pyarrow")


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["prepare", "--help"],
        ["prepare", "geotiffs", "--help"],
        ["finetune", "--help"],
        *(
            [name, "--help"]
            for name in ("merge", "inspect", "stats", "verify", "push", "show", "map", "protocol", "doctor", "app")
        ),
    ],
    ids=" ".join,
)
def test_help_loads_no_heavy_library(arguments):
    code = (
        "import sys\nfrom fusmae_hf.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    )
    printed = run(f"{code}print('loaded', [name for name in {HEAVY} if name in sys.modules])", *arguments)
    assert "usage: fusmae" in printed
    assert printed.endswith("loaded []\n")


PROGRAMS = {
    "run_pretrain": (short_help.PRETRAIN, (DataArguments, ModelArguments, PretrainingArguments)),
    "run_finetune": (
        short_help.FINETUNE,
        (PairArguments, FineTuningModelArguments, TaskArguments, FineTuningArguments),
    ),
    "run_probe": (short_help.PROBE, (SourceArguments, CheckpointArguments, ProbeArguments)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_a_program_loads_no_heavy_library(program):
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("loaded", [name for name in {HEAVY} if name in sys.modules]))
sys.argv = ["{program}.py", "--help"]
runpy.run_module("fusmae_hf.training.{program}", run_name="__main__")
"""
    printed = run(code)
    assert printed.startswith(f"usage: {program}.py ")
    assert printed.endswith("loaded []\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_short_help_names_arguments_that_are_there(program):
    listed, classes = PROGRAMS[program]
    known = {field.name for arguments in classes for field in dataclasses.fields(arguments)}
    named = {name for line in (*listed, *listed.values()) for name in re.findall(r"--(\w+)", line)}
    assert len(named) >= 12
    assert named <= known


def test_importing_the_package_loads_no_library():
    assert run(f"import sys, fusmae_hf\nprint([n for n in {(*HEAVY, 'numpy')} if n in sys.modules])") == "[]\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import fusmae_hf\nimport transformers",
        "import transformers\nimport fusmae_hf",
        "import transformers.models.auto.modeling_auto\nimport fusmae_hf",
        "import transformers.models.auto.configuration_auto\nimport fusmae_hf\nimport transformers.modeling_utils",
        "import fusmae_hf\nimport transformers.modeling_utils",
        "import fusmae_hf\nfrom transformers import pipeline",
        "import fusmae_hf\nfrom transformers import ViTModel",
        "import fusmae_hf\nimport transformers.modeling_layers",
        "import fusmae_hf\nfrom transformers import Trainer",
        "from fusmae_hf import FusMAEImageProcessor",
        "import fusmae_hf.modeling.modeling_fusmae\nimport transformers",
    ],
    ids=lambda lines: lines.replace("\n", ", "),
)
def test_auto_classes_know_the_model_in_any_order_of_imports(imports):
    code = f"""
{imports}
from fusmae_hf import FusMAEConfig
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)
config = AutoConfig.for_model("fusmae", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
assert isinstance(config, FusMAEConfig)
classes = (AutoBackbone, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining,
           AutoModelForSemanticSegmentation)
print(*(type(auto.from_config(config)).__name__ for auto in classes))
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
print(IMAGE_PROCESSOR_MAPPING[FusMAEConfig])
"""
    models, processor = run(code).splitlines()
    assert models == (
        "FusMAEBackbone FusMAEModel FusMAEForImageClassification FusMAEForPreTraining FusMAEForSemanticSegmentation"
    )
    assert "FusMAEImageProcessor" in processor


def test_the_hook_leaves_no_trace():
    code = """
import sys
import fusmae_hf
import transformers.models.auto.image_processing_auto
import transformers.models.auto.modeling_auto as auto
print(any("AfterImport" in type(finder).__name__ for finder in sys.meta_path))
print(type(auto.__loader__).__name__, type(auto.__spec__.loader).__name__)
"""
    assert run(code).splitlines() == ["False", "SourceFileLoader SourceFileLoader"]


TOO_OLD = """
import sys
from importlib import metadata
import fusmae_hf
if sys.argv[1] == "too old":
    metadata.requires = lambda _: ["transformers<5,>=4"]
sys.modules["fusmae_hf.modeling.configuration_fusmae"] = None  # as if it imported what that release lacks
try:
    from transformers import AutoConfig
    print("imported")
    fusmae_hf.FusMAEModel
except ImportError as error:
    print(error)
"""


def test_transformers_that_is_too_old_is_imported_and_named_when_a_class_is_asked_for():
    imported, said = run(TOO_OLD, "too old").splitlines()
    assert imported == "imported"
    assert said.startswith("fusmae_hf needs transformers<5,>=4 (")


def test_what_cannot_be_imported_for_another_reason_is_not_hidden():
    said = run(TOO_OLD, "new enough").splitlines()[-1]
    assert "import of fusmae_hf.modeling.configuration_fusmae halted" in said


MISSING = """
import os, signal, sys
import torch.distributed.run, transformers.trainer, datasets, psutil  # what they need of the system is theirs
sys.modules["resource"] = None
for name in ("preadv", "posix_fadvise", "fork"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGKILL", "sigtimedwait", "pthread_sigmask"):
    delattr(signal, name)
"""


def test_every_module_imports_where_the_system_lacks_what_windows_lacks():
    code = """
import importlib, pkgutil, fusmae_hf
import fusmae_hf.modeling, fusmae_hf.training
names = [m.name for m in pkgutil.walk_packages(fusmae_hf.__path__, "fusmae_hf.")]
for package in (fusmae_hf.modeling, fusmae_hf.training):
    names += [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
names = [name for name in set(names) if ".metrics." not in name and ".frameworks." not in name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    assert int(run(MISSING + code)) > 100


def test_a_checkout_that_is_not_installed_is_importable_from_the_path():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
import fusmae_hf.modeling.sensors_fusmae
import fusmae_hf.training
print(fusmae_hf.training.__file__)
"""
    root = Path(__file__).parents[1]
    assert run(code, str(root)).strip() == str(root / "training" / "__init__.py")


def test_pretraining_on_shards_in_place_needs_no_hf_datasets():
    """Machines without a network have what is there: benchmarks/gpu.py."""
    assert run('import sys; sys.modules["datasets"] = None; import fusmae_hf.training.run_pretrain') == ""


def test_files_are_read_alike_without_preadv(tmp_path, monkeypatch):
    stored = np.arange(1000, dtype=np.uint8)
    (tmp_path / "file").write_bytes(stored.tobytes())
    monkeypatch.delattr(os, "preadv")
    target = np.zeros(100, np.uint8)
    assert OpenFiles().read_into(str(tmp_path / "file"), target, 950) == 50
    assert target[:50].tolist() == stored[950:].tolist()
    assert OpenFiles().read_into(str(tmp_path / "file"), target, 300) == 100
    assert target.tolist() == stored[300:400].tolist()
