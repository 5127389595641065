"""An output folder that cannot be written to is found before a step is taken."""

import os

import pytest

from fusmae_hf.training.loop.records import require_writable
from fusmae_hf.training.run_finetune import main as finetune
from fusmae_hf.training.run_pretrain import main as pretrain
from fusmae_hf.training.run_probe import main as probe


@pytest.fixture
def full(mounted):
    """A folder on a file system without a free block."""
    folder = mounted("full", "rw,size=64k")
    with pytest.raises(OSError, match="No space"):
        (folder / "filled").write_bytes(bytes(2**20))
    return folder


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    require_writable(tmp_path / "a/b")
    assert os.listdir(tmp_path / "a/b") == []
    require_writable(tmp_path / "a/b")


@pytest.mark.parametrize("below", ["", "run"], ids=["itself", "a folder in it"])
def test_a_read_only_folder_is_named(mounted, below):
    with pytest.raises(OSError, match=r"output folder .*read-only.*mounted read-only.*--output_dir"):
        require_writable(mounted("read-only", "ro,size=64k") / below)


def test_a_full_disk_is_named_and_nothing_is_left_on_it(full):
    with pytest.raises(OSError, match=r"output folder .*full.*no space left"):
        require_writable(full)
    assert os.listdir(full) == ["filled"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(OSError, match="A file stands where a folder is needed"):
            require_writable(place)


@pytest.mark.parametrize("main", [pretrain, finetune, probe], ids=["pretrain", "finetune", "probe"])
def test_every_program_says_so_before_it_opens_any_data(main, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--data", str(tmp_path / "no-such-data"), "--output_dir", str(tmp_path / "file/run")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert "Nothing can be written to the output folder" in str(ended.value)
