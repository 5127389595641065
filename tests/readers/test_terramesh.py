import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusmae_hf.data.checks import check_pair
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C
from fusmae_hf.readers.terramesh import TerraMesh
from tests.readers.terramesh_fixtures import (
    SAMPLES,
    VH_DB,
    VV_DB,
    backscatter,
    land_cover,
    make_terramesh,
    optical_value,
    reflectances,
    write_sample_file,
)

FIRST = f"{SAMPLES[0]}.tif"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_terramesh(tmp_path_factory.mktemp("terramesh"))


def test_ids_are_the_sorted_names_of_the_files(archive):
    reader = TerraMesh(archive)
    assert reader.ids == sorted(SAMPLES)
    assert len(reader) == 2
    assert list(reader.left_out()) == []
    assert reader.summary == f"Found 2 pairs of S1RTC and S2L2A in {archive}, with land cover."


def test_backscatter_keeps_its_dtype_decimals_order_and_gaps(archive):
    sar = TerraMesh(archive).read(0).sar
    assert sar.dtype == np.float64
    assert sar[:, 5, 5].tolist() == [VV_DB, VH_DB]
    assert np.argwhere(np.isnan(sar)).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(("optical", "bands"), [("S2L2A", OPTICAL_BANDS), ("S2L1C", OPTICAL_BANDS_L1C)])
def test_optical_values_are_those_of_the_file(archive, optical, bands):
    pixels = TerraMesh(archive, optical=optical).read(1).optical
    assert pixels.dtype == np.int16
    assert pixels[:, 5, 5].tolist() == [optical_value(band) for band in bands]


def test_whether_a_sample_carries_the_offset_shows_in_its_smallest_value(archive):
    reader = TerraMesh(archive)
    assert [reader.read(index).extra["optical_minimum"] for index in range(2)] == [1300, 300]


def test_the_offset_is_declared_and_not_applied(archive):
    reader = TerraMesh(archive, optical_offset=1000)
    assert reader.info.optical_offset == 1000
    assert reader.read(0).optical[0, 5, 5] == optical_value("B01") + 1000


def test_label_maps_name_the_classes_of_their_codes(archive):
    reader = TerraMesh(archive)
    label_map = reader.read(0).label_map
    assert label_map.dtype == np.uint8
    assert {reader.info.map_class_names[code] for code in np.unique(label_map)} == {"no data", "trees", "crops"}
    assert label_map[0, 0] == reader.info.map_no_data


def test_a_pair_carries_place_and_the_time_that_its_file_says(archive):
    reader = TerraMesh(archive)
    pair = reader.read(0)
    assert (pair.sar_time, pair.optical_time) == ("2020-04-11T23:43:09Z", None)
    assert pair.crs == "EPSG:32718"
    assert pair.transform == pytest.approx((10, 0, 717_729.835, 0, -10, 5_700_093.331))
    assert (pair.labels, pair.split, reader.split_of(0)) == (None, None, None)


def test_patches_may_have_the_size_of_the_full_dataset(tmp_path):
    pair = TerraMesh(make_terramesh(tmp_path, size=264)).read(0)
    assert pair.sar.shape[1:] == pair.optical.shape[1:] == pair.label_map.shape == (264, 264)


def test_land_cover_may_be_absent_altogether(own_archive):
    shutil.rmtree(own_archive / "LULC")
    reader = TerraMesh(own_archive)
    assert reader.read(0).label_map is None
    assert "without land cover" in reader.summary


@pytest.mark.parametrize("modality", ["S1RTC", "S2L2A", "LULC"])
def test_a_sample_without_one_of_its_files_is_left_out_with_the_reason(own_archive, modality):
    (own_archive / modality / FIRST).unlink()
    reader = TerraMesh(own_archive)
    assert reader.ids == [SAMPLES[1]]
    assert list(reader.left_out()) == [(SAMPLES[0], f"its file is missing in {modality}")]


def test_either_product_of_sentinel_1_may_be_read(own_archive):
    (own_archive / "S1RTC").rename(own_archive / "S1GRD")
    assert TerraMesh(own_archive, sar="S1GRD").read(0).sar[0, 5, 5] == VV_DB


def test_files_without_a_crs_are_read(own_archive, recwarn):
    for modality, values in (("S1RTC", backscatter()), ("S2L2A", reflectances(OPTICAL_BANDS))):
        write_sample_file(own_archive / modality / FIRST, values, crs=None)
    recwarn.clear()
    pair = TerraMesh(own_archive).read(0)
    assert (pair.crs, pair.transform, pair.sar_time) == (None, None, None)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("modality", "values", "message"),
    [
        ("S2L2A", reflectances(OPTICAL_BANDS_L1C), "expected 12 bands .* found 13"),
        ("S2L2A", reflectances(OPTICAL_BANDS).astype(np.float32), "in int16, found .* in float32"),
        ("S2L2A", reflectances(OPTICAL_BANDS, size=120), "expected 224x224 or 264x264 pixels, found 120x120"),
        ("S1RTC", backscatter()[:1], "expected 2 bands .* found 1"),
        ("S1RTC", backscatter(264), "expected 2 bands of 224x224 .* found 2 of 264x264"),
        ("S1RTC", np.full((2, 224, 224), -13, np.int16), "in float32 or float64, found .* in int16"),
        ("LULC", land_cover().astype(np.int16), "in uint8, found .* in int16"),
        ("LULC", land_cover() + np.uint8(7), r"holds the codes \[11\], but classes are 0 to 9"),
    ],
)
def test_a_file_of_another_kind_raises_an_error_that_names_it(own_archive, modality, values, message):
    write_sample_file(own_archive / modality / FIRST, values)
    with pytest.raises(PairError, match=message) as caught:
        TerraMesh(own_archive).read(0)
    assert str(own_archive / modality / FIRST) in str(caught.value)


@pytest.mark.parametrize(("modality", "values"), [("S1RTC", backscatter()), ("LULC", land_cover())])
def test_patches_of_two_places_are_refused(own_archive, modality, values):
    write_sample_file(own_archive / modality / FIRST, values, east=30)
    with pytest.raises(PairError, match="not the same place"):
        TerraMesh(own_archive).read(0)


def test_missing_folders_are_named(archive):
    with pytest.raises(FileNotFoundError, match=r"looked for \['S1GRD'\]"):
        TerraMesh(archive, sar="S1GRD")


def test_no_common_name_is_an_error_that_says_what_is_there(own_archive):
    shutil.rmtree(own_archive / "LULC")
    (own_archive / "LULC").mkdir()
    with pytest.raises(ValueError, match=r"2 in S1RTC/, 2 in S2L2A/, 0 in LULC/"):
        TerraMesh(own_archive)


@pytest.mark.real_data
@pytest.mark.parametrize(("optical", "minima"), [("S2L2A", [969, 1]), ("S2L1C", [1011, 8])])
def test_the_real_sample_has_plausible_values_and_classes(optical, minima):
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    reader = TerraMesh(Path(folder, "terramesh"), optical=optical)
    pairs = [reader.read(index) for index in range(len(reader))]
    assert [pair.extra["optical_minimum"] for pair in pairs] == minima
    red, infrared = (reader.info.optical_bands.index(band) for band in ("B04", "B08"))
    for pair in pairs:
        check_pair(pair, reader.info)
        vv, vh = pair.sar.mean(axis=(1, 2))
        assert 4 < vv - vh < 10
        assert pair.sar_time is not None
        greenness = pair.optical[infrared].astype(float) - pair.optical[red]
        trees = pair.label_map == reader.info.map_class_names.index("trees")
        assert greenness[trees].mean() > 0
    water = pairs[0].label_map == reader.info.map_class_names.index("water")
    assert pairs[0].optical[infrared][water].mean() < pairs[0].optical[infrared][~water].mean()
