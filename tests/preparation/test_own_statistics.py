"""Statistics that `prepare` measures while it writes."""

import pytest

from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.preparation.state import merge_parts
from fusmae_hf.shards.dataset_info import read_dataset_info
from tests.small_shards import INFO, make_pair


class Reader:
    """Forty pairs without published statistics, one that lacks a sensor, and a held-out split."""

    def __init__(self):
        from dataclasses import replace

        self.info, self.summary = replace(INFO, statistics=None), ""
        self.ids = [f"pair-{number:03d}" for number in range(40)]

    def __len__(self):
        return len(self.ids)

    def split_of(self, index):
        return "test" if index % 5 == 0 else "train"

    def left_out(self):
        return iter(())

    def read(self, index):
        return make_pair(index, self.info, **({"sar": None} if index == 7 else {}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare(Reader(), folder, rows_per_shard=8, progress=False)
    return read_dataset_info(folder).statistics


def test_it_is_of_the_training_split_alone(whole):
    number, _, _ = whole["sar/VV"]
    assert number == 31 * 64


def test_parts_give_the_same_digits(whole, tmp_path):
    parts = [tmp_path / f"part-{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(parts, 1):
        prepare(Reader(), folder, rows_per_shard=8, part=(number, 3), progress=False)
    assert merge_parts(tmp_path / "out", parts).statistics == whole


def test_processes_give_the_same_digits(whole, tmp_path):
    prepare(Reader(), tmp_path / "out", rows_per_shard=8, num_proc=2, progress=False)
    assert read_dataset_info(tmp_path / "out").statistics == whole


def test_an_interruption_gives_the_same_digits(whole, tmp_path):
    reader, calls = Reader(), []
    read = reader.read

    def interrupted(index):
        calls.append(index)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return read(index)

    reader.read = interrupted
    with pytest.raises(KeyboardInterrupt):
        prepare(reader, tmp_path / "out", rows_per_shard=8, progress=False)
    prepare(Reader(), tmp_path / "out", rows_per_shard=8, progress=False)
    assert read_dataset_info(tmp_path / "out").statistics == whole


def test_a_file_that_is_written_again_gives_the_same_digits(whole, tmp_path):
    prepare(Reader(), tmp_path, rows_per_shard=8, progress=False)
    next((tmp_path / "data").glob("train-00001*")).unlink()
    prepare(Reader(), tmp_path, rows_per_shard=8, progress=False)
    assert read_dataset_info(tmp_path).statistics == whole
