import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusmae_hf.data.checks import check_pair
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS
from fusmae_hf.readers import ssl4eo_zarr
from fusmae_hf.readers.ssl4eo_zarr import SSL4EOS12Zarr
from tests.readers.ssl4eo_fixtures import (
    LOCATIONS,
    SAR_SEASONS,
    SAR_TIMES,
    edit_json,
    edit_member,
    make_ssl4eo_zarr,
    seasonal_pixels,
    write_seasonal_file,
)

TRAIN_FILE = "ssl4eos12_train_seasonal_data_000012.zarr.zip"
SAR = Path("train", "S1GRD", TRAIN_FILE)
OPTICAL = Path("train", "S2L2A", TRAIN_FILE)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_ssl4eo_zarr(tmp_path_factory.mktemp("ssl4eo_zarr"))


def test_ids_are_location_and_season_in_the_order_of_the_files(archive):
    reader = SSL4EOS12Zarr(archive)
    locations = [*LOCATIONS, "0000001"]
    assert reader.ids == [f"{location}_{season}" for location in locations for season in range(4)]
    assert len(reader) == 16
    assert list(reader.left_out()) == []
    assert "16 pairs of scenes within 45 days in 4 of the 246,144 locations" in reader.summary


def test_the_folders_are_the_splits(archive):
    reader = SSL4EOS12Zarr(archive)
    splits = ["train"] * 12 + ["validation"] * 4
    assert [reader.split_of(index) for index in range(16)] == splits
    assert [reader.read(index).split for index in range(16)] == splits


@pytest.mark.parametrize("folder", ["train", "val"])
def test_one_split_suffices(own_archive, folder):
    shutil.rmtree(own_archive / {"train": "val", "val": "train"}[folder])
    assert len(SSL4EOS12Zarr(own_archive)) == {"train": 12, "val": 4}[folder]


def test_seasons_are_paired_by_time_and_not_by_index(archive):
    reader = SSL4EOS12Zarr(archive)
    sar = seasonal_pixels("S1GRD", ("vv", "vh"))
    optical = seasonal_pixels("S2L2A", OPTICAL_BANDS)
    for index, name in enumerate(reader.ids[:12]):
        location, season = LOCATIONS.index(name[:7]), int(name[-1])
        pair = reader.read(index)
        np.testing.assert_array_equal(pair.sar, sar[location, SAR_SEASONS.index(season)])
        np.testing.assert_array_equal(pair.optical, optical[location, season])


def test_a_pair_carries_location_scenes_times_and_place(archive):
    pair = SSL4EOS12Zarr(archive).read(5)
    assert (pair.sar_time, pair.optical_time) == ("2020-04-06T22:00:00Z", "2020-04-05T10:00:00Z")
    assert pair.extra == {
        "location": "0024410",
        "sar_scene": "S1A_IW_GRDH_1SDV_2020-04-06T22:00:00",
        "optical_scene": "S2A_MSIL2A_2020-04-05T10:00:00",
        "days_apart": 1.5,
    }
    assert pair.crs == "EPSG:32633"
    assert pair.transform == (10, 0, 530_000, 0, -10, 532_640)
    assert (pair.labels, pair.label_map) == (None, None)


def test_bands_are_put_in_order_by_their_names(archive, own_archive):
    write_seasonal_file(own_archive / SAR, bands=("vh", "vv"))
    write_seasonal_file(own_archive / OPTICAL, bands=OPTICAL_BANDS[::-1])
    expected, pair = SSL4EOS12Zarr(archive).read(3), SSL4EOS12Zarr(own_archive).read(3)
    np.testing.assert_array_equal(pair.sar, expected.sar)
    np.testing.assert_array_equal(pair.optical, expected.optical)


@pytest.mark.parametrize("compressor", ["blosc", "zstd", None])
@pytest.mark.parametrize("chunks", [(1, 1, 12, 264, 264), (3, 4, 1, 264, 264), (2, 3, 5, 100, 264)])
def test_any_chunks_and_known_compressors_give_the_same_pixels(own_archive, chunks, compressor):
    write_seasonal_file(own_archive / OPTICAL, chunks=chunks, compressor=compressor)
    reader = SSL4EOS12Zarr(own_archive)
    pixels = seasonal_pixels("S2L2A", OPTICAL_BANDS)
    for index in (11, 0, 6):
        np.testing.assert_array_equal(reader.read(index).optical, pixels[index // 4, index % 4])


@pytest.mark.parametrize(
    "units",
    ["nanoseconds since 1970-01-01", "seconds since 2019-01-05 10:00:00", "hours since 2018-12-31T22:00", None],
)
def test_times_may_be_datetimes_or_integers_with_units(own_archive, units):
    write_seasonal_file(own_archive / SAR, time_units=units)
    pair = SSL4EOS12Zarr(own_archive).read(0)
    assert (pair.sar_time, pair.extra["days_apart"]) == ("2020-01-06T22:00:00Z", 1.5)


def test_times_may_be_whole_days(own_archive):
    write_seasonal_file(own_archive / SAR, time_units="days since 2019-12-01")
    assert SSL4EOS12Zarr(own_archive).read(0).sar_time == "2020-01-06T00:00:00Z"


@pytest.mark.parametrize("units", ["fortnights since 1970-01-01", "days since 2020-13-01", "days", None])
def test_other_units_of_time_are_named(own_archive, units):
    edit_json(own_archive / SAR, "time/.zattrs", units=units)
    ((file, reason),) = SSL4EOS12Zarr(own_archive).left_out()
    assert file == f"train/{TRAIN_FILE}"
    assert f"`time` holds integers with the units {units!r}" in reason


def test_seasons_too_far_apart_or_without_a_time_are_left_out_with_the_reason(own_archive):
    times = np.tile(SAR_TIMES, (3, 1))
    times[0, SAR_SEASONS.index(2)] += np.timedelta64(60, "D")
    times[1, SAR_SEASONS.index(0)] = np.datetime64("NaT")
    write_seasonal_file(own_archive / SAR, times=times, time_units=None)
    reader = SSL4EOS12Zarr(own_archive)
    gone = {"0194630_2", "0024410_0"}
    assert len(reader) == 14
    assert not gone & set(reader.ids)
    left_out = dict(reader.left_out())
    for name in gone:
        assert left_out.pop(name) == "no Sentinel-1 scene of its location is left within 45 days"
    assert set(left_out) == {"0194630_S1GRD_0", "0024410_S1GRD_1"}


def test_locations_are_matched_by_name(archive, own_archive):
    write_seasonal_file(own_archive / SAR, locations=("0100003", "0024410", "9999999"))
    reader = SSL4EOS12Zarr(own_archive)
    assert reader.ids[:8] == [f"{location}_{season}" for location in LOCATIONS[1:] for season in range(4)]
    sar = seasonal_pixels("S1GRD", ("vv", "vh"))
    np.testing.assert_array_equal(reader.read(4).sar, sar[0, SAR_SEASONS.index(0)])
    assert set(dict(reader.left_out())) == {"9999999", "0194630"}


def test_a_location_in_two_files_is_given_once(own_archive):
    for modality in ("S1GRD", "S2L2A"):
        write_seasonal_file(
            own_archive / "val" / modality / "ssl4eos12_val_seasonal_data_000001.zarr.zip", locations=("0024410",)
        )
    reader = SSL4EOS12Zarr(own_archive)
    assert len(reader.ids) == len(set(reader.ids)) == 12
    assert f"already in train/{TRAIN_FILE}" in dict(reader.left_out())["0024410"]


@pytest.mark.parametrize(("gone", "sensor"), [(SAR, "S1GRD"), (OPTICAL, "S2L2A")])
def test_a_file_of_one_sensor_alone_is_left_out_with_the_reason(own_archive, gone, sensor):
    (own_archive / gone).unlink()
    reader = SSL4EOS12Zarr(own_archive)
    assert list(reader.left_out()) == [(f"train/{TRAIN_FILE}", f"{sensor} lacks this file")]
    assert len(reader) == 4


def test_place_and_scenes_are_none_where_a_file_lacks_them(own_archive):
    for name in ("crs/.zarray", "file_id/.zarray"):
        edit_member(own_archive / OPTICAL, name, lambda content: None)
    pair = SSL4EOS12Zarr(own_archive).read(0)
    assert (pair.crs, pair.transform, pair.extra["optical_scene"]) == (None, None, None)
    assert pair.extra["sar_scene"] is not None


def declare(name, **changes):
    return lambda path: edit_json(path, f"{name}/.zarray", **changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "the file cannot be read"),
        (lambda path: path.write_bytes(b"nonsense"), "the file cannot be read"),
        (lambda path: edit_member(path, "sample/.zarray", lambda content: None), "`sample` cannot be read"),
        (lambda path: edit_member(path, "sample/0", lambda content: None), "does not name every location once"),
        (lambda path: edit_member(path, "sample/0", lambda content: content[:20]), "`sample` cannot be read"),
        (lambda path: edit_member(path, "band/.zarray", lambda content: b"{"), "`band` cannot be read"),
        (declare("bands", shape=[10**6, 4, 12, 264, 264]), r"`bands` is declared with .*1000000"),
        (declare("bands", shape=[3, 4, 12, 10**6, 10**6]), r"`bands` is declared with .*1000000"),
        (declare("bands", shape=[3, 4, 13, 264, 264]), r"shape \['1 to 64', 4, 12, 264, 264\]"),
        (declare("bands", chunks=[1, 4, 12, 264, 10**6]), "chunks within it"),
        (declare("bands", chunks=[0, 4, 12, 264, 264]), "`bands` "),
        (declare("bands", dtype="<f4"), r"`bands` is declared with .*<f4"),
        (declare("bands", dtype="|O"), "`bands` "),
        (declare("bands", filters=[{"id": "pickle"}]), "`bands` cannot be read"),
        (declare("bands", filters=[{"id": "delta", "dtype": "<i2"}]), "no filters"),
        (declare("bands", compressor={"id": "lzma"}), "compressor blosc, zstd or none"),
        (declare("bands", compressor={"id": "pickle"}), "`bands` cannot be read"),
        (declare("bands", zarr_format=3), "`bands` cannot be read"),
        (declare("sample", shape=[4], chunks=[4]), r"`sample` is declared with"),
        (declare("time", dtype="<f8"), r"`time` is declared with .*<f8"),
        (lambda path: write_seasonal_file(path, zarr_format=3), "cannot be read"),
        (lambda path: write_seasonal_file(path, locations=("1", "1")), "does not name every location once"),
        (
            lambda path: write_seasonal_file(path, bands=(*OPTICAL_BANDS[:-1], "B10")),
            r"expected the bands .*'B12'.*, found .*'B10'",
        ),
    ],
    ids=[
        "cut", "no zip", "array missing", "chunk missing", "chunk cut", "no JSON", "too many samples",
        "huge patches", "band too many", "huge chunks", "empty chunks", "other dtype", "objects", "pickles", "filters",
        "other compressor", "pickled chunks", "other format declared", "other number of names", "float times",
        "other format", "names twice", "other bands",
    ],
)  # fmt: skip
def test_a_bad_file_is_left_out_with_a_reason_that_names_it(own_archive, damage, message):
    damage(own_archive / OPTICAL)
    reader = SSL4EOS12Zarr(own_archive)
    assert len(reader) == 4
    ((file, reason),) = reader.left_out()
    assert file == f"train/{TRAIN_FILE}"
    assert reason.startswith(str(own_archive / OPTICAL))
    with pytest.raises(PairError, match=message):
        raise PairError(reason)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: edit_member(path, "bands/0.0.0.0.0", lambda content: content[:999]), "`bands` cannot be read"),
        (lambda path: edit_member(path, "bands/0.0.0.0.0", lambda content: bytes(10**7)), "`bands` cannot be read"),
    ],
    ids=["chunk cut", "chunk too large"],
)
def test_damage_after_opening_raises_an_error_that_names_the_file(own_archive, damage, message):
    reader = SSL4EOS12Zarr(own_archive)
    damage(own_archive / OPTICAL)
    with pytest.raises(PairError, match=message) as caught:
        reader.read(0)
    assert str(own_archive / OPTICAL) in str(caught.value)


def test_flipped_bits_in_a_chunk_are_noticed(own_archive):
    path = own_archive / OPTICAL
    content = bytearray(path.read_bytes())
    start = content.index(b"bands/0.0.0.0.0") + 500
    content[start : start + 4] = bytes(255 - byte for byte in content[start : start + 4])
    path.write_bytes(content)
    with pytest.raises(PairError, match="Bad CRC-32"):
        SSL4EOS12Zarr(own_archive).read(0)


def test_a_chunk_that_unpacks_to_more_than_declared_is_refused(own_archive):
    from numcodecs import Blosc

    bomb = Blosc("zstd", 9).encode(np.zeros(10**8, np.uint8))
    edit_member(own_archive / OPTICAL, "bands/0.0.0.0.0", lambda content: bomb)
    with pytest.raises(PairError, match="`bands` cannot be read"):
        SSL4EOS12Zarr(own_archive).read(0)


def test_a_member_larger_than_all_pixels_is_refused_before_it_is_unpacked(own_archive, monkeypatch):
    monkeypatch.setattr(ssl4eo_zarr, "MAX_MEMBER_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes unpacked"):
        SSL4EOS12Zarr(own_archive)


def test_a_chunk_that_was_not_written_holds_no_data(own_archive):
    edit_member(own_archive / OPTICAL, "bands/0.0.0.0.0", lambda content: None)
    reader = SSL4EOS12Zarr(own_archive)
    with pytest.raises(PairError, match="optical has no data"):
        check_pair(reader.read(0), reader.info)


def test_patches_of_two_places_are_refused(own_archive):
    edit_json(own_archive / SAR, "crs/.zarray", compressor=None)
    edit_member(own_archive / SAR, "crs/0", lambda content: np.full(3, 32634).tobytes())
    with pytest.raises(PairError, match="not the same place"):
        SSL4EOS12Zarr(own_archive).read(0)


def test_no_usable_file_is_an_error_that_gives_the_reason(own_archive):
    shutil.rmtree(own_archive / "val")
    (own_archive / SAR).write_bytes(b"nonsense")
    with pytest.raises(
        ValueError, match=r"no pair to read .* 1 files .* left out, for example .*the file cannot be read"
    ):
        SSL4EOS12Zarr(own_archive)


def test_missing_folders_are_named(own_archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for \['train', 'val'\]"):
        SSL4EOS12Zarr(tmp_path / "elsewhere")
    shutil.rmtree(own_archive / "val" / "S2L1C")
    with pytest.raises(FileNotFoundError, match=r"looked for \['S2L1C'\]"):
        SSL4EOS12Zarr(own_archive, level="l1c")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_days_apart": float("nan")}, "max_days_apart is nan")],
)
def test_wrong_options_are_named(archive, options, message):
    with pytest.raises(ValueError, match=message):
        SSL4EOS12Zarr(archive, **options)


def test_the_offset_of_baseline_0400_is_declared_and_not_applied(archive):
    reader = SSL4EOS12Zarr(archive)
    assert reader.info.optical_offset == 1000
    assert SSL4EOS12Zarr(archive, optical_offset=0).info.optical_offset == 0
    assert reader.read(0).optical[0, 0, 0] == seasonal_pixels("S2L2A", OPTICAL_BANDS)[0, 0, 0, 0, 0]


def test_neighbouring_pairs_share_open_files_and_chunks(archive, monkeypatch):
    reader = SSL4EOS12Zarr(archive)
    reader.read(0)
    kept = {modality: (file, file._kept[1]) for modality, file in reader._held.items()}
    for index in range(1, 4):
        reader.read(index)
    assert len(kept) == 2
    for modality, (file, chunk) in kept.items():
        assert reader._held[modality] is file
        assert file._kept[1] is chunk  # the four seasons of a location are one chunk
    reader.read(4)
    assert all(reader._held[modality]._kept[1] is not chunk for modality, (_, chunk) in kept.items())


def test_a_forked_process_opens_its_own_files(archive, monkeypatch):
    reader = SSL4EOS12Zarr(archive)
    reader.read(0)
    held = dict(reader._held)
    monkeypatch.setattr(ssl4eo_zarr.os, "getpid", lambda: -1)
    reader.read(1)
    assert all(reader._held[modality] is not file for modality, file in held.items())


def test_folders_are_listed_once(archive, monkeypatch):
    listed = []
    listdir = os.listdir
    monkeypatch.setattr(ssl4eo_zarr.os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    SSL4EOS12Zarr(archive)
    assert len(listed) == len(set(listed)) == 4
