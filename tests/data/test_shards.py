"""Shards hold exactly what was given, appear complete or not at all, and describe themselves."""

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusmae_hf.data.decoding import decode_pairs
from fusmae_hf.data.pairs import Pair, PairError, PairsInfo
from fusmae_hf.data.shards import PIXEL_DTYPES, read_dataset_info, write_dataset_info, write_shards

SIDES = st.integers(1, 6)


@st.composite
def pair_lists(draw):
    """Pairs of one size and dtype, as a dataset has them."""
    count, height, width = draw(st.integers(1, 7)), draw(SIDES), draw(SIDES)
    sar_dtype, optical_dtype = draw(st.sampled_from(PIXEL_DTYPES)), draw(st.sampled_from(PIXEL_DTYPES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    has_map, has_times = draw(st.booleans()), draw(st.booleans())
    return [
        Pair(
            id=f"{draw(st.text(max_size=5))}-{number}",
            sar=generator.integers(0, 100, (2, height, width)).astype(sar_dtype),
            optical=generator.integers(1, 100, (3, height, width)).astype(optical_dtype),
            labels=draw(st.none() | st.lists(st.text(max_size=5), max_size=3)),
            label_map=generator.integers(0, 9, (height, width)).astype("uint8") if has_map else None,
            crs="EPSG:32633" if has_times else None,
            transform=(10.0, 0.0, 5e5, 0.0, -10.0, 6e6) if has_times else None,
            sar_time="2018-01-01T05:00:00Z" if has_times else None,
            optical_time="2018-01-02T10:00:00Z" if has_times else None,
            extra={"country": draw(st.none() | st.text(max_size=3)), "cloud": draw(st.floats(0, 1))},
        )
        for number in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(pairs=pair_lists(), rows_per_shard=st.integers(1, 8), row_group_rows=st.integers(1, 4))
def test_everything_written_is_read_back_in_order(pairs_info, pairs, rows_per_shard, row_group_rows):
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"rows_per_shard": rows_per_shard, "row_group_rows": row_group_rows}
        shards = write_shards(pairs, pairs_info, folder, "train", num_pairs=len(pairs), **sizes)
        table = pa.concat_tables([pq.read_table(Path(folder, shard.name)) for shard in shards])
    batch = decode_pairs(table, lambda position: "the shard")

    assert batch["id"] == [pair.id for pair in pairs]
    for name in ("sar", "optical", "label_map"):
        stored = [getattr(pair, name) for pair in pairs]
        if stored[0] is None:
            assert name not in batch
            continue
        assert batch[name].numpy().dtype == stored[0].dtype
        np.testing.assert_array_equal(batch[name].numpy(), np.stack(stored))
    assert batch.get("labels", [None] * len(pairs)) == [pair.labels for pair in pairs]
    for row, pair in zip(table.to_pylist(), pairs, strict=True):
        assert (row["country"], row["cloud"]) == (pair.extra["country"], pair.extra["cloud"])
        assert (row["crs"], row["sar_time"], row["optical_time"]) == (pair.crs, pair.sar_time, pair.optical_time)
        assert row["transform"] == (pair.transform and list(pair.transform))
    assert max(rows for shard in shards for rows in shard.row_group_rows) <= row_group_rows


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda pixels: pixels.astype(pixels.dtype.newbyteorder(">")), id="big-endian"),
        pytest.param(lambda pixels: np.asfortranarray(pixels), id="Fortran order"),
        pytest.param(lambda pixels: np.repeat(pixels, 2, axis=2)[:, :, ::2], id="strided"),
    ],
)
def test_pixels_are_stored_little_endian_in_c_order(tmp_path, pairs_info, make_pair, layout):
    plain = make_pair(0)
    pair = make_pair(0, sar=layout(plain.sar), optical=layout(plain.optical))
    (shard,) = write_shards([pair], pairs_info, tmp_path, "train", num_pairs=1)
    (row,) = pq.read_table(tmp_path / shard.name).to_pylist()
    assert row["optical"] == plain.optical.astype("<u2").tobytes()
    assert row["sar"] == plain.sar.astype("<f4").tobytes()


def test_plain_load_dataset_finds_the_splits(prepare):
    found = datasets.load_dataset(str(prepare(train=9, validation=5)))
    assert {split: rows["id"][:] for split, rows in found.items()} == {
        "train": [f"pair-{number:04d}" for number in range(9)],
        "validation": [f"pair-{number:04d}" for number in range(9, 14)],
    }


def test_files_describe_themselves(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(number) for number in range(5)]
    (shard,) = write_shards(pairs, pairs_info, tmp_path, "test", num_pairs=5, row_group_rows=2)
    described = json.loads(pq.read_metadata(tmp_path / shard.name).metadata[b"fusmae"])
    content = b"".join(pair.id.encode() + pair.sar.tobytes() + pair.optical.tobytes() for pair in pairs)

    assert shard.name == "data/test-00000-of-00001.parquet"
    assert (shard.split, shard.rows, shard.row_group_rows) == ("test", 5, (2, 2, 1))
    assert shard.bytes == (tmp_path / shard.name).stat().st_size
    assert described["content_hash"] == shard.content_hash == hashlib.sha256(content).hexdigest()
    assert (described["split"], described["rows"], described["sar_bands"]) == ("test", 5, ["VV", "VH"])


def test_dataset_info_is_read_back_as_written(tmp_path, pairs_info, make_pair):
    shards = write_shards([make_pair(number) for number in range(5)], pairs_info, tmp_path, "train", num_pairs=5)
    written = write_dataset_info(tmp_path, pairs_info, shards, left_out=[("snowy", "snow")])
    assert read_dataset_info(tmp_path) == read_dataset_info(f"file://{tmp_path}") == written
    assert written.info == pairs_info
    assert written.left_out == (("snowy", "snow"),)


def test_fewer_pairs_than_expected_number_the_files_by_what_came(tmp_path, pairs_info, make_pair):
    sizes = {"num_pairs": 12, "rows_per_shard": 4, "row_group_rows": 2}
    shards = write_shards([make_pair(number) for number in range(6)], pairs_info, tmp_path, "train", **sizes)
    names = [f"data/train-{number:05d}-of-00002.parquet" for number in range(2)]
    assert [shard.name for shard in shards] == names
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.parquet")) == names


def test_pixels_without_data_are_counted_by_sensor(tmp_path, pairs_info, make_pair):
    pair = make_pair(0)
    pair.sar[0, 0, :3] = np.nan  # in one band: three pixels without data
    pair.sar[1, 1, 0] = np.inf
    pair.optical[:, 2, :] = 0  # in all bands
    pair.optical[0, 3, :] = 0  # in one band: a dark pixel, not a missing one
    shards = write_shards([pair, make_pair(1)], pairs_info, tmp_path, "train", num_pairs=2)
    info = write_dataset_info(tmp_path, pairs_info, shards)
    assert info.no_data_pixels("train") == {"sar": 4, "optical": 8}


BAD_FIELDS = {
    "empty id": {"id": ""},
    "too few SAR bands": {"sar": np.ones((1, 8, 8), np.float32)},
    "no band axis": {"optical": np.ones((8, 8), np.uint16)},
    "no pixels": {"optical": np.ones((3, 0, 8), np.uint16)},
    "text for pixels": {"optical": np.full((3, 8, 8), "1")},
    "complex SAR": {"sar": np.ones((2, 8, 8), np.complex64)},
    "SAR all NaN": {"sar": np.full((2, 8, 8), np.nan, np.float32)},
    "SAR never finite in both bands": {"sar": np.stack([np.full((8, 8), v, np.float32) for v in (np.nan, 1)])},
    "optical all zero": {"optical": np.zeros((3, 8, 8), np.uint16)},
    "label map of another size": {"label_map": np.zeros((4, 4), np.uint8)},
    "label map of fractions": {"label_map": np.zeros((8, 8), np.float32)},
    "transform of four numbers": {"transform": (1.0, 2.0, 3.0, 4.0)},
    "extra column that hides another": {"extra": {"sar_dtype": "float32"}},
    "extra column with a list": {"extra": {"tiles": [1, 2]}},
    "extra column the others lack": {"extra": {"country": "Austria"}},
    "id seen before": {"id": "pair-0000"},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_pair_is_named_and_nothing_is_written(tmp_path, pairs_info, make_pair, fields):
    pairs = [make_pair(number) for number in range(5)] + [make_pair(5, **fields)]
    with pytest.raises(PairError, match=fields.get("id", "pair-0005") or "non-empty string"):
        write_shards(pairs, pairs_info, tmp_path, "train", num_pairs=6, rows_per_shard=2, row_group_rows=1)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_extra_column_keeps_one_type(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(0, extra={"cloud": 1}), make_pair(1, extra={"cloud": "clear"})]
    with pytest.raises(PairError, match=r"pair-0001.*'cloud'"):
        write_shards(pairs, pairs_info, tmp_path, "train", num_pairs=2, row_group_rows=1)


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at_second_call(function):
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        function(*args, **kwargs)
        if len(calls) == 2:
            disk_full()

    return called


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (os, "replace"), (pq.ParquetWriter, "write_table"), (pq.ParquetWriter, "close")],
    ids=["when flushing", "when renaming", "when writing pixels", "when writing the footer"],
)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    tmp_path, pairs_info, make_pair, monkeypatch, owner, name
):
    monkeypatch.setattr(owner, name, fail_at_second_call(getattr(owner, name)))
    pairs = [make_pair(number) for number in range(6)]
    with pytest.raises(OSError, match="prepare again") as caught:
        write_shards(pairs, pairs_info, tmp_path, "train", num_pairs=6, rows_per_shard=2, row_group_rows=2)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_dataset_info_is_written_whole_or_not_at_all(tmp_path, pairs_info, make_pair, monkeypatch, name):
    shards = write_shards([make_pair(0)], pairs_info, tmp_path, "train", num_pairs=1)
    monkeypatch.setattr(os, name, disk_full)
    with pytest.raises(OSError, match=r"dataset_info\.json could not be written.*prepare again"):
        write_dataset_info(tmp_path, pairs_info, shards)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_killed_run_left_is_swept_away(tmp_path, pairs_info, make_pair):
    left = tmp_path / "data" / ".train-incomplete" / "00007"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a shard")
    (shard,) = write_shards([make_pair(0)], pairs_info, tmp_path, "train", num_pairs=1)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [shard.name]


def test_shards_are_never_mixed_with_older_ones(tmp_path, pairs_info, make_pair):
    write_shards([make_pair(0)], pairs_info, tmp_path, "train", num_pairs=1)
    with pytest.raises(FileExistsError, match="delete the folder"):
        write_shards([make_pair(1)], pairs_info, tmp_path, "train", num_pairs=1)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        pytest.param({"id": "pair-0000"}, "pair-0000 is in the split 'train' and again in", id="same pair"),
        pytest.param({"extra": {"cloud": 0.5}}, "same type in every split", id="another column"),
    ],
)
def test_splits_that_do_not_fit_together_are_refused(tmp_path, pairs_info, make_pair, validation, message):
    shards = write_shards([make_pair(0)], pairs_info, tmp_path, "train", num_pairs=1)
    shards += write_shards([make_pair(1, **validation)], pairs_info, tmp_path, "validation", num_pairs=1)
    with pytest.raises(ValueError, match=message):
        write_dataset_info(tmp_path, pairs_info, shards)
    assert not (tmp_path / "dataset_info.json").exists()


def test_no_pair_at_all_is_an_error(tmp_path, pairs_info):
    with pytest.raises(ValueError, match="no pair to write for the split 'train'"):
        write_shards([], pairs_info, tmp_path, "train", num_pairs=1)


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "another format version": lambda text: text.replace('"format_version": 1', '"format_version": 2'),
    "a shard outside the folder": lambda text: text.replace('"data/train-', '"data/../../train-'),
    "row groups that do not add up": lambda text: text.replace('"row_group_rows": [', '"row_group_rows": [7,'),
    "a field nobody knows": lambda text: text.replace('"license"', '"licence"'),
    "a list at the top": lambda text: "[]",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_dataset_info_is_refused(prepare, damage):
    path = prepare(train=4) / "dataset_info.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=r"dataset_info\.json cannot be used.*Prepare the folder again"):
        read_dataset_info(path.parent)


@pytest.fixture
def one_row(tmp_path, pairs_info: PairsInfo, make_pair) -> pa.Table:
    (shard,) = write_shards([make_pair(0)], pairs_info, tmp_path, "train", num_pairs=1)
    return pq.read_table(tmp_path / shard.name)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("sar_shape", [2**31 - 1, 2**31 - 1, 2**31 - 1]),
        ("sar_shape", [-2, -8, 8]),
        ("sar_shape", [0, 8, 8]),
        ("optical_shape", [3, 8, 9]),
        ("optical_shape", None),
        ("optical_dtype", "float64"),
        ("optical_dtype", "object"),
        ("optical_dtype", "(1000000,)f8"),
        ("sar_dtype", None),
    ],
)
def test_a_shape_or_dtype_that_the_bytes_do_not_have_is_refused(one_row, column, value):
    index = one_row.schema.get_field_index(column)
    field = one_row.schema.field(index).with_nullable(True)
    hostile = one_row.set_column(index, field, pa.array([value], field.type))
    with pytest.raises(ValueError, match=r"bad\.parquet is damaged: pair 'pair-0000' declares.*prepare"):
        decode_pairs(hostile, lambda position: "bad.parquet")


def test_a_file_that_is_no_shard_is_named():
    with pytest.raises(ValueError, match=r"other\.parquet has no column 'id'"):
        decode_pairs(pa.table({"image": [b""]}), lambda position: "other.parquet")


def test_label_maps_in_part_of_a_batch_are_refused(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(0, label_map=np.zeros((8, 8), np.uint8)), make_pair(1)]
    (shard,) = write_shards(pairs, pairs_info, tmp_path, "train", num_pairs=2)
    with pytest.raises(ValueError, match=r"no label_map.*pair-0001"):
        decode_pairs(pq.read_table(tmp_path / shard.name), lambda position: shard.name)
