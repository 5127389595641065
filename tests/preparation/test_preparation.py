import errno
from dataclasses import replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.data.plausibility import check_plausible
from fusmae_hf.errors import PairError
from fusmae_hf.preparation.plan import plan_preparation
from fusmae_hf.preparation.prepare import HOPELESS_AFTER, prepare
from fusmae_hf.preparation.work import GIVE_UP_AFTER, GIVE_UP_AT_END_AFTER
from fusmae_hf.shards.dataset_info import LeftOut, count_reasons, read_dataset_info, read_left_out

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
    summary = "Some pairs."

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


def test_another_seed_gives_another_order_limit_and_hold_out(tmp_path):
    reader = ListedPairs([make_pair(split=None) for _ in range(60)])
    drawn = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        prepare(reader, folder, limit=30, hold_out=0.2, seed=seed)
        drawn.append([stored_ids(folder, split) for split in ("train", "validation")])
    for of_seed, of_another in zip(*drawn, strict=True):
        assert len(of_seed) == len(of_another)
        assert set(of_seed) != set(of_another)


def test_a_plan_of_an_archive_of_full_size_is_made_at_once():
    class Large(ListedPairs):
        def __init__(self, number):
            self.ids = [f"S2A_MSIL2A_20170613T101031_{i}" for i in range(number)]

        def split_of(self, index):
            return ("train", "validation", "test")[index % 3]

        def left_out(self):
            return iter(())

    plan = plan_preparation(
        Large(600_000),
        limit=None,
        hold_out=0,
        seed=0,
        keep_order=False,
        rows_per_shard=1024,
        row_group_rows=32,
        max_no_data=1,
        require_both=False,
        reader_options={},
    )
    rows = [len(file.indices) for file in plan.files]
    assert len(rows) == 3 * 196
    assert (min(rows), max(rows)) == (1020, 1021)
    assert len(np.unique(np.concatenate([file.indices for file in plan.files]))) == 600_000


def test_pairs_left_out_are_reported_with_their_reasons(tmp_path):
    no_data = make_pair()
    no_data.sar[:] = np.nan
    no_data.optical[:] = 0
    pairs = [make_pair(), PairError("B03.tif: cannot be read"), no_data]
    report = prepare(ListedPairs(pairs, left_out=[("p009", "snow")]), tmp_path, keep_order=True)
    left_out = read_left_out(tmp_path)
    assert [pair.id for pair in left_out] == ["p009", "p001", "p002"]
    assert [pair.reason for pair in left_out][:2] == ["snow", "B03.tif: cannot be read"]
    assert "sar has no data" in left_out[2].reason
    assert [pair.file for pair in left_out] == ["", *["data/train-00000-of-00001.parquet"] * 2]
    assert tuple(left_out) == report.left_out
    assert report.dataset.num_left_out == 3
    assert "Left out: 3" in str(report)
    assert "1  snow, such as p009" in str(report)
    assert stored_ids(tmp_path, "train") == ["p000"]


def test_reasons_are_counted_by_kind():
    reasons = {
        "S2A_20170613T101031_87_48": "/a b/S2A_20170613T101031_87_48_B03.tif: expected 60x60, found 61x60.",
        "S2A_20170613T101031_87_49": "/a b/S2A_20170613T101031_87_49_B04.tif: expected 60x60, found 61x60.",
        "p1": "p1: 35.2% of the sar pixels hold no data",
        "p2": "p2: 98.0% of the sar pixels hold no data",
        "p3": "its partner S1B_IW_GRDH_1SDV_20170925T043256_35VPK_69_24 is missing in /data",
        "p4": "its partner S1B_IW_GRDH_1SDV_20170925T043256_35VPK_69_25 is missing in /data",
        "p5": "listed in patches_with_seasonal_snow",
    }
    assert count_reasons([LeftOut(*pair) for pair in reasons.items()]) == {
        "expected 60x60, found 61x60.": 2,
        "its partner ... is missing in ...": 2,
        "N% of the sar pixels hold no data": 2,
        "listed in patches_with_seasonal_snow": 1,
    }


def test_the_count_of_reasons_stays_small_however_many_there_are():
    counts = count_reasons([LeftOut(f"p{i}", f"code{i}") for i in range(299)])
    assert sum(counts.values()) == 299
    assert len(counts) == 101


@pytest.mark.parametrize(("max_no_data", "number"), [(0.0, 1), (0.25, 2), (0.5, 3), (1.0, 4)])
def test_pairs_with_too_much_no_data_in_either_sensor_can_be_left_out(tmp_path, max_no_data, number):
    pairs = [make_pair() for _ in range(4)]
    pairs[1].sar[:, :2] = np.nan
    pairs[2].optical[:, :4] = 0
    pairs[3].sar[0, :6] = np.nan
    report = prepare(ListedPairs(pairs), tmp_path, max_no_data=max_no_data, keep_order=True)
    assert stored_ids(tmp_path, "train") == ["p000", "p001", "p002", "p003"][:number]
    shares = [pair.reason.split(": ")[1].split()[0] for pair in report.left_out]
    assert shares == ["25.0%", "50.0%", "75.0%"][number - 1 :]


def test_ids_that_occur_twice_are_taken_once(tmp_path):
    reader = ListedPairs([make_pair() for _ in range(4)])
    reader.ids = ["a", "b", "a", "a"]
    report = prepare(reader, tmp_path, keep_order=True)
    assert stored_ids(tmp_path, "train") == ["a", "b"]
    assert [pair.id for pair in report.left_out] == ["a", "a"]
    assert "the id occurs 3 times" in report.left_out[0].reason


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/B02.tif"), r"/a/B02\.tif: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "p001: Input/output error"),
        (KeyError("B02"), "p001: the reader failed with KeyError: 'B02'.*report this"),
    ],
)
def test_whatever_a_reader_raises_concerns_one_pair(tmp_path, failure, reason):
    report = prepare(ListedPairs([make_pair(), failure, make_pair()]), tmp_path, keep_order=True)
    assert stored_ids(tmp_path, "train") == ["p000", "p002"]
    with pytest.raises(PairError, match=reason):
        raise PairError(report.left_out[0].reason)


def test_a_reader_that_gives_another_pair_is_found_out(tmp_path):
    class Confused(ListedPairs):
        def read(self, index):
            return super().read(0)

    report = prepare(Confused([make_pair(), make_pair()]), tmp_path, keep_order=True)
    assert report.left_out[0].reason == "p001: the reader gave another pair in its place, 'p000'."


def test_bands_are_taken_in_their_own_resolution_where_the_reader_has_them(tmp_path):
    class Native(ListedPairs):
        info = replace(INFO, optical_factors=(2, 1, 1))

        def read(self, index):
            raise AssertionError("expanded for nothing")

        def read_native(self, index):
            bands = [np.full((size, size), 400, np.uint16) for size in (4, 8, 8)]
            return replace(make_pair(self.ids[index]), optical=NativeBands(bands, (2, 1, 1)))

    report = prepare(Native([None] * 3), tmp_path)
    assert report.dataset.rows("train") == 3


def test_a_file_whose_pairs_all_fail_leaves_a_gap_that_load_dataset_copes_with(tmp_path):
    pairs = [make_pair(), make_pair(), PairError("gone"), PairError("gone"), make_pair(), make_pair()]
    report = prepare(ListedPairs(pairs), tmp_path / "out", keep_order=True, rows_per_shard=2)
    names = [f"data/train-{number:05d}-of-00003.parquet" for number in (0, 2)]
    assert [shard.name for shard in report.dataset.shards("train")] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "dataset_info.json", "left_out.csv"]
    found = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert found["id"][:] == ["p000", "p001", "p004", "p005"]
    assert str(prepare(ListedPairs(pairs), tmp_path / "out", keep_order=True, rows_per_shard=2)).splitlines()[2] == (
        f"Nothing to do: {tmp_path / 'out'} is complete."
    )


def test_where_the_folder_came_from_is_noted_in_it(tmp_path):
    reader = ListedPairs([make_pair() for _ in range(4)])
    prepare(reader, tmp_path, limit=3, seed=5, reader_options={"leave_out": ("snow",)})
    noted = read_dataset_info(tmp_path).preparation
    assert noted["arguments"]["limit"] == 3
    assert noted["arguments"]["seed"] == 5
    assert noted["arguments"]["reader"].endswith("test_preparation.ListedPairs")
    assert noted["arguments"]["reader.leave_out"] == ["snow"]
    assert noted["num_pairs"] == 4


def test_preparing_can_stop_at_a_failure_and_goes_on_from_there(tmp_path):
    pairs = [make_pair() for _ in range(40)] + [PairError("B03.tif: cannot be read")]
    options = {"rows_per_shard": 20, "keep_order": True, "on_error": "stop"}
    for tried, files in ((pairs[39:], 0), (pairs, 2)):
        with pytest.raises(PairError, match=r"B03\.tif: cannot be read"):
            prepare(ListedPairs(tried), tmp_path, overwrite=True, **options)
        assert len(list(tmp_path.rglob("*.parquet"))) == files
    pairs[-1] = make_pair()
    report = prepare(ListedPairs(pairs), tmp_path, **options)
    assert (report.files_kept, report.files_written) == (2, 1)
    assert report.dataset.rows("train") == 41


def test_an_archive_of_which_nothing_can_be_read_is_given_up_early(tmp_path):
    reader = ListedPairs([PairError(f"{i}.tif: cannot be read") for i in range(HOPELESS_AFTER + 30)])
    with pytest.raises(PairError, match=rf"The first {HOPELESS_AFTER} pairs all failed, so nothing was written"):
        prepare(reader, tmp_path)


def test_a_later_run_of_failures_is_no_reason_to_give_up(tmp_path):
    failures = [PairError(f"{i}.tif: cannot be read") for i in range(HOPELESS_AFTER + 5)]
    report = prepare(ListedPairs([make_pair(), *failures]), tmp_path, keep_order=True)
    assert len(report.left_out) == HOPELESS_AFTER + 5


@pytest.mark.parametrize(("after", "run"), [(110, GIVE_UP_AFTER), (150, 50), (180, GIVE_UP_AT_END_AFTER)])
def test_an_archive_that_disappears_is_noticed_and_the_file_is_not_taken_for_finished(tmp_path, after, run):
    reads, read = 0, ListedPairs.read

    def fail_after(self, index):
        nonlocal reads
        reads += 1
        if reads > 32 + after:
            raise PairError("no such file")
        return read(self, index)

    reader = ListedPairs([make_pair() for _ in range(300)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ListedPairs, "read", fail_after)
        with pytest.raises(PairError, match=f"{run} pairs in a row could not be read for data/train-00001"):
            prepare(reader, tmp_path, rows_per_shard=100)
    assert prepare(reader, tmp_path, rows_per_shard=100).dataset.rows("train") == 300


def test_no_readable_pair_at_all_is_an_error_with_the_last_reasons_and_a_later_try_starts_anew(tmp_path):
    with pytest.raises(ValueError, match=r"no pair could be written.*p000: a\.tif: gone"):
        prepare(ListedPairs([PairError("a.tif: gone")]), tmp_path)
    assert prepare(ListedPairs([make_pair()]), tmp_path).dataset.rows("train") == 1


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_an_interruption_leaves_only_complete_files_and_no_dataset_info(tmp_path, interruption):
    pairs = [make_pair(split="train") for _ in range(40)] + [make_pair(split="validation"), interruption]
    reader = ListedPairs(pairs)
    reader.split_of = lambda index: "train" if index < 40 else "validation"
    with pytest.raises(type(interruption)):
        prepare(reader, tmp_path, keep_order=True)
    files = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert files == ["data/train-00000-of-00001.parquet"]
    assert not (tmp_path / "dataset_info.json").exists()
    assert pq.read_table(tmp_path / files[0]).num_rows == 40


@pytest.mark.parametrize(
    ("out", "message"), [("", r"is not empty.*`--overwrite`"), ("notes.txt", "notes.txt is a file")]
)
def test_a_place_that_holds_something_else_is_refused(tmp_path, out, message):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=message):
        prepare(ListedPairs([make_pair()]), tmp_path / out)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"hold_out": 1.0}, r"hold_out is 1\.0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"seed": -1}, "seed is -1"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"row_group_rows": 0}, "row_group_rows is 0"),
        ({"max_no_data": 1.1}, r"max_no_data is 1\.1"),
        ({"part": (3, 2)}, "part is 3/2, but must be one of 1/2 to 2/2"),
        ({"part": (1, 2), "overwrite": True}, "A part must not overwrite"),
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
    check_plausible([pair] * 4, info)


@pytest.mark.parametrize(
    ("pair", "info", "message"),
    [
        (make_pair(vv=-19, vh=-12), INFO, r"made-up, over 4 pairs: SAR: mean VH \(-1[12].* bands swapped\?"),
        (make_pair(dn=1400), INFO, r"optical_offset=1000 if yours do.*`--optical-offset 1000`"),
        (make_pair(dn=200), replace(INFO, optical_offset=1000), "100% of the pixels lie below the declared offset"),
        (make_pair(vv=-1200, vh=-1900), INFO, "Were dB multiplied by 100"),
    ],
)
def test_implausible_values_are_warned_of(pair, info, message):
    with pytest.warns(UserWarning, match=message):
        check_plausible([pair] * 4, info)


def test_no_data_pixels_do_not_hide_a_forgotten_offset():
    pair = make_pair(dn=1400)
    pair.optical[:, :4] = 0
    with pytest.warns(UserWarning, match="optical_offset=1000"):
        check_plausible([pair] * 8, INFO)


@pytest.mark.parametrize(
    ("pair", "info", "message"),
    [
        (make_pair(vv=3, vh=2), INFO, r"looks like linear power.*10\*log10"),
        (make_pair(), replace(INFO, sar_units="linear"), "looks like dB"),
        (make_pair(), replace(INFO, optical_units="reflectance"), "looks like digital numbers"),
    ],
)
def test_values_that_contradict_their_units_stop_before_anything_is_written(tmp_path, pair, info, message):
    reader = ListedPairs([pair])
    reader.info = info
    with pytest.raises(ValueError, match=message):
        prepare(reader, tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_warning_comes_once_however_many_pairs_and_splits(tmp_path, recwarn):
    reader = ListedPairs([make_pair(vv=-19, vh=-12, split=split) for split in ["train", "test"] * 40])
    with pytest.warns(UserWarning, match="bands swapped") as caught:
        prepare(reader, tmp_path)
    assert len(caught) == 1
