import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusmae_hf.data.checks import check_pair
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C
from fusmae_hf.readers import listed_pairs
from fusmae_hf.readers.ssl4eo import SSL4EOS12, pair_by_time
from tests.readers.ssl4eo_fixtures import (
    CORNER,
    EARLY,
    LATE,
    PIXEL,
    SAR_EARLY,
    SAR_LATE,
    SAR_PIXEL,
    VH_DB,
    VV_DB,
    band_value,
    make_ssl4eo,
    write_band,
    write_sar_scene,
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_ssl4eo(tmp_path_factory.mktemp("ssl4eo"))


def test_ids_are_location_and_sentinel_2_scene_in_order(archive):
    reader = SSL4EOS12(archive)
    assert reader.ids == [f"0000007_{LATE}", f"0000200_{EARLY}", f"0000200_{LATE}"]
    assert len(reader) == 3
    assert list(reader.left_out()) == []
    assert "3 pairs of scenes within 45 days in 2 of the 251,079 locations" in reader.summary


def test_scenes_are_paired_by_time_and_not_by_order(archive):
    reader = SSL4EOS12(archive)
    partners = {name: reader.read(index).extra["sar_scene"] for index, name in enumerate(reader.ids)}
    assert partners[f"0000200_{EARLY}"] == SAR_EARLY
    assert partners[f"0000200_{LATE}"] == SAR_LATE


def test_a_pair_carries_location_scenes_times_and_place(archive):
    reader = SSL4EOS12(archive)
    pair = reader.read(2)
    assert (pair.sar_time, pair.optical_time) == ("2020-09-03T13:12:12Z", "2020-08-13T05:46:39Z")
    assert pair.extra.pop("days_apart") == pytest.approx(21.309, abs=0.001)
    assert pair.extra == {"location": "0000200", "sar_scene": SAR_LATE, "optical_scene": LATE}
    assert pair.crs == "EPSG:4326"
    assert pair.transform == pytest.approx((PIXEL[0], 0, CORNER[0], 0, PIXEL[1], CORNER[1]))
    assert (pair.labels, pair.label_map, pair.split, reader.split_of(2)) == (None, None, None, None)


def test_vv_comes_first_and_backscatter_keeps_its_decimals(archive):
    sar = SSL4EOS12(archive).read(0).sar
    assert sar.dtype == np.float32
    assert sar[:, 0, 0].tolist() == [VV_DB, VH_DB]


@pytest.mark.parametrize(("level", "bands"), [("l2a", OPTICAL_BANDS), ("l1c", OPTICAL_BANDS_L1C)])
def test_optical_bands_are_in_the_order_of_their_names(archive, level, bands):
    reader = SSL4EOS12(archive, level=level)
    optical = reader.read(0).optical
    assert optical.dtype == np.uint16
    assert reader.info.optical_bands == bands
    assert optical[:, 0, 0].tolist() == [band_value(band) for band in bands]


@pytest.mark.parametrize(("band", "factor"), [("B02", 1), ("B8A", 2), ("B01", 6)])
def test_pixels_of_coarse_bands_are_repeated_by_whole_factors(archive, band, factor):
    reader = SSL4EOS12(archive)
    index = reader.info.optical_bands.index(band)
    expected = np.tile(band_value(band) + np.arange(264) // factor, (264, 1))
    np.testing.assert_array_equal(reader.read(0).optical[index], expected)
    assert reader.info.optical_factors[index] == factor


def test_archives_with_all_bands_on_one_grid_are_read_as_they_are(tmp_path):
    reader = SSL4EOS12(make_ssl4eo(tmp_path, resampled=True))
    assert reader.info.optical_factors == ()
    np.testing.assert_array_equal(reader.read(0).optical[0], np.tile(band_value("B01") + np.arange(264), (264, 1)))


def test_scenes_too_far_apart_are_left_out_with_the_reason(archive):
    reader = SSL4EOS12(archive, max_days_apart=10)
    assert reader.ids == [f"0000200_{EARLY}"]
    left_out = dict(reader.left_out())
    assert left_out[f"0000007_{LATE}"] == "no Sentinel-1 scene of its location is left within 10 days"
    assert left_out[f"0000200_{SAR_LATE}"] == "no Sentinel-2 scene of its location is left within 10 days"
    assert len(left_out) == 4


def test_a_location_of_one_sensor_alone_is_left_out_with_the_reason(archive):
    reader = SSL4EOS12(archive, level="l1c")
    assert reader.ids == [f"0000200_{EARLY}"]
    assert f"0000007_{SAR_LATE}" in dict(reader.left_out())


def test_a_scene_without_a_time_in_its_name_is_left_out_with_the_reason(own_archive):
    (own_archive / "s1" / "0000007" / "scene").mkdir()
    assert dict(SSL4EOS12(own_archive).left_out()) == {"0000007_scene": "its name holds no acquisition time"}


def test_folders_that_are_no_location_are_ignored(own_archive):
    (own_archive / "s1" / ".ipynb_checkpoints").mkdir()
    assert len(SSL4EOS12(own_archive)) == 3


def test_listing_takes_one_scan_for_each_location_and_sensor(archive, monkeypatch):
    scanned = []
    scan = os.scandir
    monkeypatch.setattr(listed_pairs.os, "scandir", lambda folder: scanned.append(Path(folder)) or scan(folder))
    SSL4EOS12(archive)
    assert len(scanned) == len(set(scanned)) == 2 + 2 * 2


def optical_file(root, name):
    return root / "s2a" / "0000007" / LATE / name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: optical_file(root, "B11.tif").unlink(), r"B11\.tif: no such file"),
        (lambda root: optical_file(root, "B4.tif").write_bytes(b"II*\0"), r"B4\.tif: cannot be read as GeoTIFF"),
        (
            lambda root: write_band(optical_file(root, "B9.tif"), np.ones((132, 132), np.uint16), PIXEL, CORNER),
            r"B9\.tif: expected 1 band of 44x44 pixels in uint16, found 1 of 132x132",
        ),
        (
            lambda root: write_band(optical_file(root, "B2.tif"), np.ones((264, 264), np.int16), PIXEL, CORNER),
            r"B2\.tif: expected .* in uint16, found .* in int16",
        ),
        (
            lambda root: write_band(
                root / "s1" / "0000007" / SAR_LATE / "VH.tif", np.ones((264, 264), np.int16), SAR_PIXEL, CORNER
            ),
            r"VH\.tif: expected .* in float32, found .* in int16",
        ),
        (lambda root: shutil.rmtree(root / "s1" / "0000007" / SAR_LATE), r"VV\.tif: no such file"),
    ],
    ids=["missing", "damaged", "wrong size", "wrong dtype", "integer backscatter", "scene gone"],
)
def test_a_bad_file_raises_an_error_that_names_it(own_archive, damage, message):
    reader = SSL4EOS12(own_archive)
    damage(own_archive)
    with pytest.raises(PairError, match=message):
        reader.read(0)


def test_a_damaged_first_pair_does_not_keep_the_others_from_being_read(own_archive):
    optical_file(own_archive, "B1.tif").write_bytes(b"nonsense")
    reader = SSL4EOS12(own_archive)
    assert reader.read(1).optical.shape == (12, 264, 264)
    with pytest.raises(PairError, match=r"B1\.tif"):
        reader.read(0)


@pytest.mark.parametrize("pixels", [27, -27])
def test_patches_of_two_places_are_refused(own_archive, pixels):
    folder = own_archive / "s1" / "0000007" / SAR_LATE
    shutil.rmtree(folder)
    write_sar_scene(folder, (CORNER[0], CORNER[1] + pixels * PIXEL[1]))
    with pytest.raises(PairError, match="not the same place"):
        SSL4EOS12(own_archive).read(0)


def test_missing_folders_are_named(archive, own_archive):
    shutil.rmtree(own_archive / "s2c")
    with pytest.raises(FileNotFoundError, match=r"looked for \['s2c'\]"):
        SSL4EOS12(own_archive, level="l1c")


def test_no_pair_is_an_error_that_says_what_is_there(archive):
    with pytest.raises(ValueError, match=r"2 locations .* without a partner within 1 days, 6 were left out"):
        SSL4EOS12(archive, max_days_apart=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_days_apart": -1}, "max_days_apart is -1")],
)
def test_wrong_options_are_named(archive, options, message):
    with pytest.raises(ValueError, match=message):
        SSL4EOS12(archive, **options)


def test_the_offset_is_declared_and_not_applied(archive):
    reader = SSL4EOS12(archive, optical_offset=1000)
    assert reader.info.optical_offset == 1000
    assert reader.read(0).optical[0, 0, 0] == band_value("B01")


def test_the_closest_scenes_are_paired_first():
    assert pair_by_time([0, 10], [9, 1], 45) == [(1, 0), (0, 1)]
    assert pair_by_time([0, 40], [38, 90], 45) == [(1, 0)]
    assert pair_by_time([5], [0, 10], 45) == [(0, 0)]
    assert pair_by_time([np.nan, 1], [np.nan, 2], 45) == [(1, 1)]


@given(st.lists(st.floats(0, 400), max_size=4), st.lists(st.floats(0, 400), max_size=4), st.floats(0, 100))
def test_no_scene_is_used_twice_and_no_two_that_would_fit_are_left(sar, optical, most):
    pairs = pair_by_time(sar, optical, most)
    sar_used, optical_used = {i for i, _ in pairs}, {j for _, j in pairs}
    assert len(sar_used) == len(optical_used) == len(pairs)
    assert all(abs(sar[i] - optical[j]) <= most for i, j in pairs)
    left = [(i, j) for i in set(range(len(sar))) - sar_used for j in set(range(len(optical))) - optical_used]
    assert all(abs(sar[i] - optical[j]) > most for i, j in left)


@pytest.mark.real_data
@pytest.mark.parametrize(("level", "days"), [("l2a", [2.8, 21.3]), ("l1c", [2.8, 11.3])])
def test_the_real_sample_shows_one_place_in_two_seasons(level, days):
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    reader = SSL4EOS12(Path(folder, "ssl4eo_s12"), level=level)
    pairs = [reader.read(index) for index in range(len(reader))]
    assert [pair.extra["days_apart"] for pair in pairs] == pytest.approx(days, abs=0.1)
    for pair in pairs:
        check_pair(pair, reader.info)
        vv, vh = pair.sar.mean(axis=(1, 2))
        assert 4 < vv - vh < 10
