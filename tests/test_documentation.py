"""What the README and the pages in docs/ show is run."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, SimulatedPairs, prepare
from fusmae_hf.cli.main import build_parser
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

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "model_card.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if not page.is_symlink()),
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages take for granted: shards, and checkpoints with the patches of `make pretrain`."""
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, decoder_num_hidden_layers=1, patch_size=12)
    FusMAEForPreTraining(config).save_pretrained(tmp_path / "outputs" / "pretrain")
    FusMAEImageProcessor().save_pretrained(tmp_path / "outputs" / "pretrain")
    prepare(SimulatedPairs(20), tmp_path / "shards" / "reben", progress=False)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# That of docs/finetuning.md trains a model, those of docs/frameworks.md need the frameworks, that of docs/scenes.md
# reads the embeddings of a map. Other tests run them: tests/training/test_run_finetune.py,
# tests/frameworks/test_pages.py, tests/scenes/test_embeddings.py.
ELSEWHERE = ("finetuning.md", "frameworks.md", "scenes.md")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.name)
def test_every_python_snippet_of_a_page_runs(page, workplace):
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    names = {}
    if page.name == "model_card.md":  # it describes arrays of the reader's own
        pair = SimulatedPairs(1).read(0)
        names = {"sar": pair.sar, "optical": pair.optical}
    for snippet in snippets:
        if snippet.startswith(">>>"):  # sessions are run with their output, by tests/modeling/test_documentation.py
            continue
        exec(compile(snippet, page.name, "exec"), names)
    if page.name == "README.md":
        assert names["features"].shape == (6, 192)
        assert names["inputs"]["sar_available"].tolist() == [True, False]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for path in set(re.findall(r"(?<![\w/])training/[\w./-]+\.(?:py|yaml)\b", text)):
        assert (ROOT / path).is_file(), path
    targets = set(re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    targets = {target for line in targets for target in line.split()}
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_commands_shown_have_the_options_they_are_shown_with():
    parser = build_parser()
    text = "\n".join(page.read_text() for page in PAGES)
    lines = re.findall(r"^fusmae ((?:\\\n|[^\n#])*)", text, flags=re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        arguments = shlex.split(re.sub("[<>]", "", line.replace("\\\n", " ")))
        parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)


PROGRAMS = {
    "run_pretrain": (DataArguments, ModelArguments, PretrainingArguments),
    "run_finetune": (PairArguments, FineTuningModelArguments, TaskArguments, FineTuningArguments),
    "run_probe": (SourceArguments, CheckpointArguments, ProbeArguments),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_shown_have_the_options_they_are_shown_with(program):
    known = set(HfArgumentParser(PROGRAMS[program])._option_string_actions)
    lines = re.findall(
        rf"^[^\n#`]*{program}(?:\.py)? ((?:\\\n|[^\n#`])*)",
        "\n".join(page.read_text() for page in PAGES),
        flags=re.MULTILINE,
    )
    assert lines
    for line in lines:
        assert set(re.findall(r"(?<!\S)--\w+", line)) <= known, line


def test_the_fusmae_script_is_installed():
    assert (Path(sys.executable).parent / "fusmae").is_file()


NOTEBOOKS = [*sorted((ROOT / "notebooks").glob("*.ipynb")), ROOT / "app" / "app.py"]


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_a_page_imports_from_the_package_alone(page):
    assert not re.findall(r"(?:from|import) fusmae_hf\.(?!frameworks\.)[\w.]+", page.read_text())
