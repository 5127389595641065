"""Every example in the docstrings of the model and in its page runs and gives what it shows."""

import doctest
import inspect
import re

import pytest
import torch

from fusmae_hf.modeling import configuration_fusmae, image_processing_fusmae, modeling_fusmae, sensors_fusmae

MODULES = [configuration_fusmae, image_processing_fusmae, modeling_fusmae, sensors_fusmae]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def without_fences(text: str) -> str:
    """The text with the lines that open and close code blocks made empty, which doctest would take for output."""
    return re.sub(r"(?m)^\s*```.*$", "", text)


def examples() -> list:
    found = []
    for module in MODULES:
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            if ">>>" in test.docstring:
                found.append(pytest.param(test.name, test.docstring, id=test.name))
    return found


def run(name: str, text: str) -> None:
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(without_fences(text), {}, name, None, 0)
    assert test.examples
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize(("name", "docstring"), examples())
def test_examples_in_docstrings_run(name, docstring):
    run(name, docstring)


def test_the_page_on_the_model_runs(pytestconfig, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("modeling.md", (pytestconfig.rootpath / "docs" / "modeling.md").read_text())


@pytest.mark.parametrize("module", [modeling_fusmae, configuration_fusmae, image_processing_fusmae])
def test_every_public_class_has_an_example(module):
    without = [
        name
        for name in module.__all__
        if inspect.isclass(getattr(module, name)) and ">>>" not in (getattr(module, name).__doc__ or "")
    ]
    assert set(without) <= {"FusMAEPreTrainedModel"}  # abstract
