import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusmae_hf.data.pairs import Pair, PairError, PairsInfo
from fusmae_hf.data.preparation import HOPELESS_AFTER, check_plausible, prepare
from fusmae_hf.data.shards import read_dataset_info

INFO = PairsInfo(
    name="made-up", source="these tests", license="none", sar_bands=("VV", "VH"), optical_bands=("B02", "B03", "B04")
)


def make_pair(name="a", vv=-12.0, vh=-19.0, dn=400, split=None):
    random = np.random.default_rng(0)
    sar = np.array([vv, vh], np.float32)[:, None, None] + random.normal(0, 0.5, (2, 8, 8)).astype(np.float32)
    optical = (dn + random.integers(0, 300, (3, 8, 8))).astype(np.uint16)
    return Pair(name, sar, optical, split=split)


class ListedPairs:
    """A reader of pairs in memory; an exception in place of a pair is raised when that is read."""

    info = INFO

    def __init__(self, pairs, left_out=()):
        self.pairs = pairs
        self.ids = [f"p{i:03d}" for i in range(len(pairs))]
        self._left_out = left_out

    def __len__(self):
        return len(self.pairs)

    def split_of(self, index):
        pair = self.pairs[index]
        return pair.split if isinstance(pair, Pair) else "train"

    def read(self, index):
        if isinstance(self.pairs[index], BaseException):
            raise self.pairs[index]
        return replace(self.pairs[index], id=self.ids[index])

    def left_out(self):
        return iter(self._left_out)


def stored_ids(folder, split):
    files = sorted(folder.glob(f"data/{split}-*.parquet"))
    return [name for file in files for name in pq.read_table(file, columns=["id"])["id"].to_pylist()]


def test_splits_are_kept_apart_and_pairs_without_one_go_to_train(tmp_path):
    reader = ListedPairs([make_pair(split=split) for split in ["train", None, "validation", "test", "test"]])
    report = prepare(reader, tmp_path)
    assert {split: sorted(stored_ids(tmp_path, split)) for split in ("train", "validation", "test")} == {
        "train": ["p000", "p001"],
        "validation": ["p002"],
        "test": ["p003", "p004"],
    }
    assert report.dataset == read_dataset_info(tmp_path)


@pytest.mark.parametrize(("hold_out", "number"), [(0.2, 4), (0.001, 1), (0.0, 0)])
def test_a_share_of_the_pairs_without_a_split_can_be_held_out(tmp_path, hold_out, number):
    reader = ListedPairs([make_pair(split=split) for split in [None] * 20 + ["train"] * 20])
    for folder, keep_order in (("a", False), ("b", True)):
        prepare(reader, tmp_path / folder, hold_out=hold_out, keep_order=keep_order)
    held_out = sorted(stored_ids(tmp_path / "a", "validation"))
    assert len(held_out) == number
    assert held_out == stored_ids(tmp_path / "b", "validation")
    assert all(name < "p020" for name in held_out)
    assert sorted(held_out + stored_ids(tmp_path / "a", "train")) == reader.ids


def test_pixels_are_stored_as_they_were_read(tmp_path):
    reader = ListedPairs([make_pair()])
    prepare(reader, tmp_path)
    (row,) = pq.read_table(next(tmp_path.glob("data/*.parquet"))).to_pylist()
    assert row["sar"] == reader.pairs[0].sar.tobytes()
    assert row["optical"] == reader.pairs[0].optical.tobytes()
    assert (row["sar_dtype"], row["optical_dtype"]) == ("float32", "uint16")


def test_neighbours_are_scattered_in_an_order_that_is_always_the_same(tmp_path):
    reader = ListedPairs([make_pair() for _ in range(40)])
    for name in ("a", "b"):
        prepare(reader, tmp_path / name)
    prepare(reader, tmp_path / "kept", keep_order=True)
    assert stored_ids(tmp_path / "a", "train") == stored_ids(tmp_path / "b", "train") != reader.ids
    assert sorted(stored_ids(tmp_path / "a", "train")) == reader.ids == stored_ids(tmp_path / "kept", "train")


def test_shards_and_row_groups_have_the_sizes_asked_for(tmp_path):
    report = prepare(ListedPairs([make_pair() for _ in range(10)]), tmp_path, rows_per_shard=4, row_group_rows=2)
    groups = [shard.row_group_rows for shard in report.dataset.shards("train")]
    assert max(map(sum, groups)) <= 4
    assert max(map(max, groups)) == 2


def test_a_limit_draws_from_the_whole_dataset(tmp_path):
    reader = ListedPairs([make_pair() for _ in range(100)])
    prepare(reader, tmp_path, limit=10)
    stored = sorted(stored_ids(tmp_path, "train"))
    assert len(stored) == 10
    assert stored[-1] > "p050"


def test_pairs_left_out_are_reported_with_their_reasons(tmp_path):
    no_data = make_pair()
    no_data.sar[:] = np.nan
    pairs = [make_pair(), PairError("B03.tif: cannot be read"), no_data]
    report = prepare(ListedPairs(pairs, left_out=[("p009", "snow")]), tmp_path, keep_order=True)
    left_out = json.loads((tmp_path / "dataset_info.json").read_text())["left_out"]
    assert [name for name, _ in left_out] == ["p009", "p001", "p002"]
    assert [reason for _, reason in left_out][:2] == ["snow", "B03.tif: cannot be read"]
    assert "sar has no data" in left_out[2][1]
    assert "Left out: 3" in str(report)
    assert "1  snow, such as p009" in str(report)
    assert stored_ids(tmp_path, "train") == ["p000"]


def test_preparing_can_stop_at_the_first_failure_and_then_leaves_nothing(tmp_path):
    pairs = [make_pair(), PairError("B03.tif: cannot be read")]
    with pytest.raises(PairError, match=r"B03\.tif: cannot be read"):
        prepare(ListedPairs(pairs), tmp_path / "out", on_error="stop")
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_archive_of_which_nothing_can_be_read_is_given_up_early(tmp_path):
    reader = ListedPairs([PairError(f"{i}.tif: cannot be read") for i in range(HOPELESS_AFTER + 30)])
    with pytest.raises(PairError, match=rf"The first {HOPELESS_AFTER} pairs all failed, so nothing was written"):
        prepare(reader, tmp_path)


def test_a_later_run_of_failures_is_no_reason_to_give_up(tmp_path):
    failures = [PairError(f"{i}.tif: cannot be read") for i in range(HOPELESS_AFTER + 5)]
    report = prepare(ListedPairs([make_pair(), *failures]), tmp_path, keep_order=True)
    assert len(report.dataset.left_out) == HOPELESS_AFTER + 5


def test_no_readable_pair_at_all_is_an_error_with_the_last_reasons(tmp_path):
    with pytest.raises(ValueError, match=r"no pair could be written.*p000: a\.tif: gone"):
        prepare(ListedPairs([PairError("a.tif: gone")]), tmp_path)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_only_complete_files_and_no_dataset_info(tmp_path, interruption):
    reader = ListedPairs([make_pair(split="train"), make_pair(split="validation"), interruption])
    reader.split_of = lambda index: ["train", "validation", "validation"][index]
    with pytest.raises(type(interruption)):
        prepare(reader, tmp_path, keep_order=True)
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["data/train-00000-of-00001.parquet"]
    assert pq.read_table(tmp_path / files[0]).num_rows == 1


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty.*`--overwrite`"):
        prepare(ListedPairs([make_pair()]), tmp_path)


def test_overwriting_replaces_shards_and_keeps_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other.parquet").write_text("mine")
    old = ListedPairs([make_pair(split=split) for split in ("train", "test")])
    prepare(old, tmp_path, overwrite=True)
    prepare(ListedPairs([make_pair()] * 3), tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "dataset_info.json",
        "notes.txt",
        "other.parquet",
        "train-00000-of-00001.parquet",
    ]
    assert len(stored_ids(tmp_path, "train")) == 3


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        prepare(ListedPairs([make_pair()]), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"hold_out": 1.0}, r"hold_out is 1\.0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(ListedPairs([make_pair()]), tmp_path, **arguments)


def test_an_unknown_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="p000 has the split 'dev'"):
        prepare(ListedPairs([make_pair(split="dev")]), tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("pair", "info"),
    [
        (make_pair(), INFO),
        (make_pair(dn=1200), replace(INFO, optical_offset=1000)),
        (make_pair(vv=0.05, vh=0.02), replace(INFO, sar_units="raw")),
        (make_pair(dn=5000), replace(INFO, optical_units="raw")),
    ],
)
def test_plausible_values_pass_without_a_word(pair, info):
    check_plausible([pair], info)


@pytest.mark.parametrize(
    ("pair", "info", "message"),
    [
        (make_pair(vv=-19, vh=-12), INFO, r"Bands swapped\? VH \(mean -1[12]"),
        (make_pair(dn=1400), INFO, r"Offset forgotten\?.*`--optical-offset 1000`"),
        (make_pair(dn=200), replace(INFO, optical_offset=1000), r"Offset declared in vain\?"),
    ],
)
def test_implausible_values_are_warned_of(pair, info, message):
    with pytest.warns(UserWarning, match=message):
        check_plausible([pair], info)


def test_no_data_pixels_do_not_hide_a_forgotten_offset():
    pair = make_pair(dn=1400)
    pair.optical[:, :4] = 0
    with pytest.warns(UserWarning, match="Offset forgotten"):
        check_plausible([pair], INFO)


@pytest.mark.parametrize(
    ("pair", "info", "message"),
    [
        (make_pair(vv=3, vh=2), INFO, r"looks like linear power.*10\*log10"),
        (make_pair(), replace(INFO, sar_units="linear"), "looks like dB"),
    ],
)
def test_sar_values_that_contradict_their_units_stop_before_anything_is_written(tmp_path, pair, info, message):
    reader = ListedPairs([pair])
    reader.info = info
    with pytest.raises(ValueError, match=message):
        prepare(reader, tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_warning_comes_once_however_many_pairs_and_splits(tmp_path, recwarn):
    reader = ListedPairs([make_pair(vv=-19, vh=-12, split=split) for split in ["train", "test"] * 40])
    with pytest.warns(UserWarning, match="Bands swapped") as caught:
        prepare(reader, tmp_path)
    assert len(caught) == 1
