"""What docs/frameworks.md shows is run where its framework is installed, and a framework that is missing is named."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from fusmae_hf import SimulatedPairs, prepare

ROOT = Path(__file__).resolve().parents[2]
MISSING = {name: f"pip install {name.replace('_', '-')}" for name in ("torchgeo", "terratorch", "torchgeo_bench")}
"""What installs each framework."""


@pytest.mark.parametrize("framework", MISSING)
def test_a_missing_framework_is_one_sentence_with_the_command(framework, monkeypatch):
    monkeypatch.setitem(sys.modules, framework, None)
    for name in [name for name in sys.modules if name.startswith(f"{framework}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, module := f"fusmae_hf.frameworks.{framework}", raising=False)
    with pytest.raises(ImportError, match=f"cannot be imported.*`{MISSING[framework]}"):
        importlib.import_module(module)


@pytest.mark.parametrize("framework", MISSING)
def test_the_example_of_a_framework_runs(framework, tmp_path, monkeypatch):
    pytest.importorskip(framework, reason=f"{framework} is not installed", exc_type=ImportError)
    prepare(SimulatedPairs(20), tmp_path / "shards" / "reben", progress=False)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "frameworks.md").read_text(), flags=re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if re.search(rf"fusmae_hf\.frameworks\.{framework}\b", snippet)]
    exec(compile(snippet, "frameworks.md", "exec"), {})
