import re
import sys
from importlib import metadata

import pytest

import fusmae_hf
from fusmae_hf.cli import doctor
from fusmae_hf.cli.main import main


def test_the_report_names_versions_devices_folders_and_extras(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in ("python", metadata.version("torch"), "sdpa in bfloat16: ", "hub cache", "GiB free", "extra `train`"):
        assert text in printed
    assert "Everything required works." in printed


@pytest.fixture
def requirements(monkeypatch):
    """Sets what the package requires."""
    return lambda lines: monkeypatch.setattr(metadata, "requires", lambda _: lines)


@pytest.mark.parametrize("line", ["no-such-package>=1", "numpy<1"])
def test_a_required_package_that_is_not_met_is_an_error(requirements, capsys, line):
    requirements([line])
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"Broken: {line} (" in printed
    assert "pip install -e . in a clone of the repository\n" in printed


def test_a_missing_package_of_an_extra_is_shown_with_its_command_and_is_no_error(requirements, capsys):
    requirements(['no-such-package>=1; extra == "train"', 'other-package; python_version < "3"'])
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert 'extra `train`: no-such-package>=1 (not installed)\n  pip install -e ".[train]" in a clone' in printed
    assert "other-package" not in printed


UNFIT = ["transformers<5,>=4", "torch>=99", "tqdm>=99"]


def test_libraries_of_unfit_releases_are_one_sentence_at_import_and_of_each_command(requirements, monkeypatch, capsys):
    requirements(UNFIT)
    said = r"needs transformers<5,>=4 \(\S+ is installed\), torch>=99 \(\S+ is installed\)\. Install what fits: `pip"
    monkeypatch.delitem(sys.modules, "fusmae_hf.evaluation.probes", raising=False)
    with pytest.raises(ImportError, match=said):
        fusmae_hf.linear_probe  # noqa: B018
    assert main(["verify", "shards"]) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_doctor_reports_unfit_releases_that_cannot_be_imported(requirements, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert main(["doctor"]) == 1
    assert (
        "Broken: a library fails (ModuleNotFoundError: import of transformers.utils halted" in capsys.readouterr().out
    )
    requirements(UNFIT)
    assert main(["doctor"]) == 1
    assert "\nBroken: transformers<5,>=4 (" in capsys.readouterr().out


def test_example_pairs_that_are_not_there_are_shown_with_their_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "bigearthnet-common" else "99")
    main(["doctor"])
    assert "pip install --no-deps bigearthnet-common==2.8.0" in capsys.readouterr().out


def test_attention_that_does_not_run_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "attention_kernels", lambda _: {"float32": [], "bfloat16": []})
    assert main(["doctor"]) == 1
    assert "attention does not run on the CPU" in capsys.readouterr().out


def test_a_folder_that_is_not_there_yet_is_judged_by_its_parent(tmp_path):
    assert doctor.why_not_writable(tmp_path / "a" / "b") is None
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    assert doctor.why_not_writable(tmp_path / "file") is not None
