"""Shards hold exactly what was given, appear complete or not at all, and describe themselves."""

import errno
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fusmae_hf.data.checks import check_pair
from fusmae_hf.data.native_resolution import PIXEL_DTYPES
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.shards.dataset_info import LeftOut, read_dataset_info, read_left_out
from fusmae_hf.shards.decoding import RowsInMemory, decode_pairs
from fusmae_hf.shards.format import pair_checksum, shard_schema
from fusmae_hf.shards.writing import ShardWriter, write_dataset_info, write_shard

NAME = "data/train-00000-of-00001.parquet"
SIDES = st.integers(1, 6)
EXTRA = {"country": "string", "cloud": "double"}


def all_rows(path, origin="the shard"):
    """Rows of a shard as `decode_pairs` takes them."""
    return [
        (RowsInMemory(batch, origin), row)
        for batch in pq.read_table(path).to_batches()
        for row in range(batch.num_rows)
    ]


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@st.composite
def pair_lists(draw):
    """Pairs of one size and dtype, as a dataset has them."""
    count, height, width = draw(st.integers(1, 7)), draw(SIDES), draw(SIDES)
    sar_dtype, optical_dtype = draw(st.sampled_from(PIXEL_DTYPES)), draw(st.sampled_from(PIXEL_DTYPES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    has_map, has_times = draw(st.booleans()), draw(st.booleans())
    return [
        Pair(
            id=f"{draw(st.text(st.characters(exclude_categories=['Cs']), max_size=5))}-{number}",
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
@given(pairs=pair_lists(), row_group_rows=st.integers(1, 4))
def test_everything_written_is_read_back_in_order(pairs_info, pairs, row_group_rows):
    info = replace(pairs_info, extra_columns=EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(pairs, info, folder, NAME, row_group_rows=row_group_rows)
        table = pq.read_table(Path(folder, NAME))
        batch = decode_pairs(all_rows(Path(folder, NAME)), info)

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
    assert max(shard.row_group_rows) <= row_group_rows


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
    write_shard([pair], pairs_info, tmp_path, NAME)
    (row,) = pq.read_table(tmp_path / NAME).to_pylist()
    assert row["optical"] == plain.optical.astype("<u2").tobytes()
    assert row["sar"] == plain.sar.astype("<f4").tobytes()
    assert row["checksum"] == pair_checksum(plain.id, row["sar"], row["optical"])


def test_plain_load_dataset_finds_the_splits(prepare):
    found = datasets.load_dataset(str(prepare(train=9, validation=5)))
    assert {split: rows["id"][:] for split, rows in found.items()} == {
        "train": [f"pair-{number:04d}" for number in range(9)],
        "validation": [f"pair-{number:04d}" for number in range(9, 14)],
    }


def test_files_describe_themselves(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(number) for number in range(5)]
    shard = write_shard(pairs, pairs_info, tmp_path, "data/test-00000-of-00001.parquet", row_group_rows=2)
    described = json.loads(pq.read_metadata(tmp_path / shard.name).metadata[b"fusmae"])
    checksums = [xxhash.xxh3_64(p.id.encode() + p.sar.tobytes() + p.optical.tobytes()).intdigest() for p in pairs]

    assert (shard.split, shard.rows, shard.row_group_rows) == ("test", 5, (2, 2, 1))
    assert shard.bytes == (tmp_path / shard.name).stat().st_size
    assert pq.read_table(tmp_path / shard.name)["checksum"].to_pylist() == checksums
    expected = xxhash.xxh3_128(np.array(checksums, "<u8").tobytes()).hexdigest()
    assert described["content_hash"] == shard.content_hash == expected
    assert (described["split"], described["rows"], described["sar_bands"]) == ("test", 5, ["VV", "VH"])


def test_a_flipped_bit_is_found_and_named(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(number) for number in range(3)]
    write_shard(pairs, pairs_info, tmp_path, NAME)
    content = bytearray((tmp_path / NAME).read_bytes())
    content[content.index(pairs[1].sar.tobytes()) + 100] ^= 1
    (tmp_path / NAME).write_bytes(content)
    rows = all_rows(tmp_path / NAME, "bad.parquet")
    decode_pairs([rows[0], rows[2]], pairs_info)
    with pytest.raises(ValueError, match=r"bad\.parquet is damaged: the checksum of pair 'pair-0001'"):
        decode_pairs(rows, pairs_info)


def test_the_same_pairs_give_the_same_bytes(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(number, label_map=np.ones((8, 8), np.uint8)) for number in range(5)]
    for folder in ("a", "b"):
        write_shard(pairs, pairs_info, tmp_path / folder, NAME, row_group_rows=2)
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_pairs_of_any_size_share_a_row_group(tmp_path, pairs_info, make_pair):
    pairs = [
        make_pair(n, sar=np.full((2, size, size), n + 1.0), optical=np.full((3, size, size), n + 1, np.uint16))
        for n, size in enumerate([3, 40, 8])
    ]
    pairs[1].label_map = np.arange(1600, dtype=np.int32).reshape(40, 40)
    write_shard(pairs, pairs_info, tmp_path, NAME)
    for at, pair in zip(all_rows(tmp_path / NAME), pairs, strict=True):
        batch = decode_pairs([at], pairs_info)
        np.testing.assert_array_equal(batch["sar"][0], pair.sar)
        np.testing.assert_array_equal(batch["optical"][0], pair.optical)
        assert ("label_map" in batch) == (pair.label_map is not None)


def test_dataset_info_is_read_back_as_written(tmp_path, pairs_info, make_pair):
    shard = write_shard([make_pair(number) for number in range(5)], pairs_info, tmp_path, NAME)
    left_out = [LeftOut("snowy", "snow"), LeftOut('s\u00e9, "b"', "S2/a b.tif: is\ncut", NAME), LeftOut("c", "snow")]
    written = write_dataset_info(tmp_path, pairs_info, [shard], left_out)
    assert read_dataset_info(tmp_path) == read_dataset_info(f"file://{tmp_path}") == written
    assert written.info == pairs_info
    assert read_left_out(tmp_path) == read_left_out(f"file://{tmp_path}") == left_out
    assert written.left_out_reasons == {"snow": 2, "is cut": 1}
    assert written.num_left_out == 3


def test_pixels_without_data_are_counted_by_sensor(tmp_path, pairs_info, make_pair):
    pair = make_pair(0)
    pair.sar[0, 0, :3] = np.nan  # in one band: three pixels without data
    pair.sar[1, 1, 0] = np.inf
    pair.optical[:, 2, :] = 0  # in all bands
    pair.optical[0, 3, :] = 0  # in one band: a dark pixel, not a missing one
    shard = write_shard([pair, make_pair(1)], pairs_info, tmp_path, NAME)
    info = write_dataset_info(tmp_path, pairs_info, [shard])
    assert info.no_data_pixels("train") == {"sar": 4, "optical": 8}
    assert check_pair(pair, pairs_info) == {"sar": 4, "optical": 8}


def test_pairs_with_too_little_data_are_refused_with_the_figure(tmp_path, pairs_info, make_pair):
    pair = make_pair(0)
    pair.sar[:, :3] = np.nan
    with ShardWriter(pairs_info, tmp_path, NAME, max_no_data=0.3) as shard:
        with pytest.raises(PairError, match=r"pair-0000: 37\.5% of the sar pixels hold no data, but at most 30\.0%"):
            shard.add(pair)
        pair.sar[:, 2] = 0
        pair.optical[:, :2] = 0
        shard.add(pair)
    assert shard.record.rows == 1


BAD_FIELDS = {
    "empty id": {"id": ""},
    "too few SAR bands": {"sar": np.ones((1, 8, 8), np.float32)},
    "no band axis": {"optical": np.ones((8, 8), np.uint16)},
    "no pixels": {"optical": np.ones((3, 0, 8), np.uint16)},
    "text for pixels": {"optical": np.full((3, 8, 8), "1")},
    "complex SAR": {"sar": np.ones((2, 8, 8), np.complex64)},
    "nothing in either sensor": {
        "sar": np.full((2, 8, 8), np.nan, np.float32),
        "optical": np.zeros((3, 8, 8), np.uint16),
    },
    "neither sensor": {"sar": None, "optical": None},
    "SAR never finite in both bands": {"sar": np.stack([np.full((8, 8), v, np.float32) for v in (np.nan, 1)])},
    "optical never finite": {"optical": np.full((3, 8, 8), np.inf, np.float32), "sar": None},
    "label map of another size": {"label_map": np.zeros((4, 4), np.uint8)},
    "label map of fractions": {"label_map": np.zeros((8, 8), np.float32)},
    "transform of four numbers": {"transform": (1.0, 2.0, 3.0, 4.0)},
    "transform with a hole": {"transform": (1.0, 2.0, 3.0, 4.0, 5.0, np.nan)},
    "transform of text": {"transform": ("1", "2", "3", "4", "5", "6")},
    "labels that are no list": {"labels": "Pastures"},
    "labels that are no text": {"labels": [1]},
    "CRS that is no text": {"crs": 32633},
    "text that UTF-8 cannot hold": {"sar_time": "\ud800"},
    "extra column nobody declared": {"extra": {"country": "Austria", "cloud": 0.5, "tiles": 1}},
    "extra column that is missing": {"extra": {"country": "Austria"}},
    "extra column of another type": {"extra": {"country": "Austria", "cloud": "clear"}},
    "id that UTF-8 cannot hold": {"id": "pair-0005\udcff"},
    "id seen before": {"id": "pair-0000"},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_pair_is_named_and_nothing_is_written(tmp_path, pairs_info, make_pair, fields):
    info, extra = replace(pairs_info, extra_columns=EXTRA), {"country": "Austria", "cloud": 0.5}
    pairs = [make_pair(number, extra=extra) for number in range(5)] + [make_pair(5, **{"extra": extra} | fields)]
    message = {"": "non-empty string", "pair-0000": "pair-0000"}.get(fields.get("id", "pair-0005"), "pair-0005")
    with pytest.raises(PairError, match=message):
        write_shard(pairs, info, tmp_path, NAME, row_group_rows=1)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_pair_that_is_passed_over_leaves_no_trace(tmp_path, pairs_info, make_pair, fields):
    info, extra = replace(pairs_info, extra_columns=EXTRA), {"country": None, "cloud": 0.5}
    good = [make_pair(number, extra=extra) for number in range(3)]
    bad = make_pair(5, **{"extra": extra} | fields)
    with ShardWriter(info, tmp_path / "a", NAME, row_group_rows=2) as shard:
        shard.add(good[0])
        with pytest.raises(PairError):
            shard.add(bad)
        shard.add(good[1])
        shard.add(good[2])
    write_shard(good, info, tmp_path / "b", NAME, row_group_rows=2)
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_a_label_that_is_no_class_is_named(pairs_info, make_pair):
    info = replace(pairs_info, class_names=("Pastures", "Peatbogs"))
    check_pair(make_pair(0, labels=["Pastures"]), info)
    with pytest.raises(PairError, match=r"pair-0001: labels \['Ocean'\] are none of the classes"):
        check_pair(make_pair(1, labels=["Pastures", "Ocean"]), info)


def test_maps_of_a_quantity_are_floats_and_maps_of_classes_integers(pairs_info, make_pair):
    floats, integers = np.ones((8, 8), np.float32), np.ones((8, 8), np.uint8)
    check_pair(make_pair(0, label_map=floats), replace(pairs_info, map_units="t/ha"))
    with pytest.raises(PairError, match="label_map is uint8"):
        check_pair(make_pair(0, label_map=integers), replace(pairs_info, map_units="t/ha"))


@pytest.mark.parametrize("columns", [{"sar": "string"}, {"tiles": "list"}])
def test_extra_columns_need_names_and_types_of_their_own(pairs_info, columns):
    with pytest.raises(ValueError, match=f"extra column '{next(iter(columns))}'"):
        shard_schema(replace(pairs_info, extra_columns=columns))


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (os, "replace"), (pq.ParquetWriter, "write_table"), (pq.ParquetWriter, "close")],
    ids=["when flushing", "when renaming", "when writing pixels", "when writing the footer"],
)
def test_a_full_disk_is_named_and_leaves_nothing_half_written(
    tmp_path, pairs_info, make_pair, monkeypatch, owner, name
):
    monkeypatch.setattr(owner, name, disk_full)
    with pytest.raises(OSError, match="prepare again") as caught:
        write_shard([make_pair(number) for number in range(6)], pairs_info, tmp_path, NAME, row_group_rows=2)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_dataset_info_is_written_whole_or_not_at_all(tmp_path, pairs_info, make_pair, monkeypatch, name):
    shard = write_shard([make_pair(0)], pairs_info, tmp_path, NAME)
    monkeypatch.setattr(os, name, disk_full)
    with pytest.raises(OSError, match=r"dataset_info\.json could not be written.*prepare again"):
        write_dataset_info(tmp_path, pairs_info, [shard])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_file_that_cannot_be_read_on_is_no_row(tmp_path, pairs_info, make_pair):
    def pairs():
        yield make_pair(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(pairs(), pairs_info, tmp_path, NAME, row_group_rows=1)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("validation", "columns", "message"),
    [
        pytest.param({"id": "pair-0000"}, {}, "pair-0000 is in the split 'train' and again in", id="same pair"),
        pytest.param({"extra": {"cloud": 0.5}}, {"cloud": "double"}, "same type in every split", id="another column"),
    ],
)
def test_splits_that_do_not_fit_together_are_refused(tmp_path, pairs_info, make_pair, validation, columns, message):
    other = replace(pairs_info, extra_columns=columns)
    shards = [
        write_shard([make_pair(0)], pairs_info, tmp_path, NAME),
        write_shard([make_pair(1, **validation)], other, tmp_path, NAME.replace("train", "validation")),
    ]
    with pytest.raises(ValueError, match=message):
        write_dataset_info(tmp_path, pairs_info, shards)
    assert not (tmp_path / "dataset_info.json").exists()


def test_no_pair_at_all_is_no_file(tmp_path, pairs_info):
    assert write_shard([], pairs_info, tmp_path, NAME) is None
    assert files_in(tmp_path) == []
    with pytest.raises(ValueError, match="no shard to describe"):
        write_dataset_info(tmp_path, pairs_info, [])


@pytest.mark.parametrize("name", ["train.parquet", "data/../../train-00000-of-00001.parquet"])
def test_a_name_that_no_shard_has_is_refused(tmp_path, pairs_info, make_pair, name):
    with pytest.raises(ValueError, match="is not of the form"):
        write_shard([make_pair(0)], pairs_info, tmp_path, name)


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "another format version": lambda text: text.replace('"format_version": 3', '"format_version": 1'),
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
def one_row(tmp_path, pairs_info: PairsInfo, make_pair) -> pa.RecordBatch:
    write_shard([make_pair(0)], pairs_info, tmp_path, NAME)
    return pq.read_table(tmp_path / NAME).to_batches()[0]


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
def test_a_shape_or_dtype_that_the_bytes_do_not_have_is_refused(one_row, pairs_info, column, value):
    index = one_row.schema.get_field_index(column)
    field = one_row.schema.field(index).with_nullable(True)
    hostile = one_row.set_column(index, field, pa.array([value], field.type))
    with pytest.raises(ValueError, match=r"bad\.parquet is damaged: pair 'pair-0000' declares.*prepare"):
        decode_pairs([(RowsInMemory(hostile, "bad.parquet"), 0)], pairs_info)


def test_a_file_that_is_no_shard_is_named():
    with pytest.raises(ValueError, match=r"other\.parquet has no column 'id'"):
        RowsInMemory(pa.record_batch({"image": [b""]}), "other.parquet")


def test_label_maps_in_part_of_a_batch_are_refused(tmp_path, pairs_info, make_pair):
    pairs = [make_pair(0, label_map=np.zeros((8, 8), np.uint8)), make_pair(1)]
    write_shard(pairs, pairs_info, tmp_path, NAME)
    with pytest.raises(ValueError, match=r"no label_map.*pair-0001"):
        decode_pairs(all_rows(tmp_path / NAME), pairs_info)
