import shutil
from pathlib import Path

import numpy as np
import pytest

from fusmae_hf.errors import PairError
from fusmae_hf.readers import sen12ms
from fusmae_hf.readers.sen12ms import IGBP_CLASSES, SEN12MS, SIMPLIFIED_CLASSES
from tests.readers.sen12ms_fixtures import (
    SEN12MS_PATCHES,
    VH_DB,
    VV_DB,
    backscatter,
    digital_numbers,
    land_cover,
    make_sen12ms,
    sen12ms_path,
    write_tif,
)

IDS = sorted(f"{season}_{scene}_p{patch}" for season, scene, patch in SEN12MS_PATCHES)
UNLISTED = "ROIs1158_spring_106_p4"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_sen12ms(tmp_path_factory.mktemp("sen12ms"))


def test_pairs_of_the_seasons_on_disk_are_given_in_order(archive):
    reader = SEN12MS(archive)
    assert reader.ids == IDS
    assert len(reader) == 4
    assert list(reader.left_out()) == []
    assert reader.summary == f"Found 4 of the 180,662 pairs of SEN12MS in {archive}, with land cover."


def test_bands_keep_their_order_dtype_and_decimals(archive):
    reader = SEN12MS(archive)
    pair = reader.read(0)
    assert pair.sar.dtype == np.float32
    np.testing.assert_allclose(pair.sar.mean(axis=(1, 2)), [VV_DB, VH_DB], atol=0.01)
    assert pair.optical.dtype == np.uint16
    bands = dict(zip(reader.info.optical_bands, pair.optical[:, 0, 0], strict=True))
    assert (bands["B02"], bands["B8A"], bands["B10"], bands["B12"]) == (500, 1200, 1400, 1600)
    np.testing.assert_array_equal(pair.optical, digital_numbers())


def test_backscatter_below_the_range_of_the_statistics_is_not_clipped(own_archive):
    values = backscatter() - 30
    write_tif(sen12ms_path(own_archive, IDS[0], "s1"), values)
    np.testing.assert_array_equal(SEN12MS(own_archive).read(0).sar, values)


def test_backscatter_in_float64_stays_as_it_is(own_archive):
    write_tif(sen12ms_path(own_archive, IDS[0], "s1"), backscatter().astype(np.float64))
    assert SEN12MS(own_archive).read(0).sar.dtype == np.float64


def test_a_pair_carries_place_season_and_scene(archive):
    pair = SEN12MS(archive).read(IDS.index("ROIs2017_winter_102_p512"))
    assert pair.extra == {"season": "winter", "scene": 102}
    assert (pair.crs, pair.transform) == ("EPSG:32633", (10, 0, 600_000, 0, -10, 5_800_000))
    assert (pair.sar_time, pair.optical_time) == (None, None)


@pytest.mark.parametrize(
    ("threshold", "labels"),
    [
        (0.1, ["Forest", "Croplands", "Water"]),
        (0.05, ["Forest", "Croplands", "Urban/Built-up", "Water"]),
        (0.125, ["Forest", "Croplands", "Water"]),  # exactly the share of water
        (0.2, ["Croplands"]),
        (1.0, []),
    ],
)
def test_labels_are_the_simplified_classes_with_the_share_asked_for(archive, threshold, labels):
    assert SEN12MS(archive, label_threshold=threshold).read(0).labels == labels


@pytest.mark.parametrize(
    ("label_map", "names", "of_rows"),
    [
        ("simplified", SIMPLIFIED_CLASSES, ["Croplands", "Croplands", "Urban/Built-up", "Water", None, "Forest"]),
        (
            "igbp",
            IGBP_CLASSES,
            [
                "Croplands",
                "Cropland/Natural Vegetation Mosaics",
                "Urban and Built-up Lands",
                "Water Bodies",
                None,
                "Mixed Forests",
            ],
        ),
    ],
)
def test_label_maps_hold_indices_of_the_named_classes(archive, label_map, names, of_rows):
    reader = SEN12MS(archive, label_map=label_map)
    found = reader.read(0).label_map
    assert (found.dtype, found.shape, reader.info.map_class_names) == (np.uint8, (256, 256), names)
    rows = [0, 64, 128, 148, 180, 206]
    named = [None if value == reader.info.map_no_data else names[value] for value in found[rows, 0]]
    assert named == of_rows


def test_labels_are_simplified_even_where_maps_are_not(archive):
    assert SEN12MS(archive, label_map="igbp").read(0).labels == SEN12MS(archive).read(0).labels


@pytest.mark.parametrize(
    ("codes", "simplified"),
    [
        (range(1, 6), "Forest"),
        ((6, 7), "Shrubland"),
        ((8, 9), "Savanna"),
        ((10,), "Grassland"),
        ((11,), "Wetlands"),
        ((12, 14), "Croplands"),
        ((13,), "Urban/Built-up"),
        ((15,), "Snow/Ice"),
        ((16,), "Barren"),
        ((17,), "Water"),
    ],
)
def test_igbp_codes_map_to_the_ten_classes(codes, simplified):
    indices = sen12ms.class_indices(np.array([list(codes)], np.uint16), sen12ms.SIMPLIFIED_OF_IGBP, Path("lc.tif"))
    assert {SIMPLIFIED_CLASSES[index] for index in indices[0]} == {simplified}


def test_without_any_land_cover_pairs_have_no_labels(own_archive):
    for folder in own_archive.glob("*/lc_*"):
        shutil.rmtree(folder)
    reader = SEN12MS(own_archive)
    assert (reader.read(0).labels, reader.read(0).label_map) == (None, None)
    assert reader.summary.endswith("without land cover.")


def test_splits_come_from_the_official_lists_by_s1_or_s2_name(archive):
    reader = SEN12MS(archive, splits=archive / "splits")
    splits = {name: reader.split_of(index) for index, name in enumerate(reader.ids)}
    assert splits == {
        "ROIs1158_spring_1_p30": "train",
        "ROIs1868_summer_22_p7": "train",
        "ROIs2017_winter_102_p512": "test",
    }
    assert [reader.read(index).split for index in range(3)] == list(splits.values())
    assert reader.summary.startswith("Found 3 of the 4 pairs that train_list.txt and test_list.txt list")


def test_a_patch_on_neither_list_is_left_out_with_the_reason(archive):
    ((name, reason),) = SEN12MS(archive, splits=str(archive / "splits")).left_out()
    assert name == UNLISTED
    assert "none of the split lists" in reason


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("s1", "its Sentinel-1 file is missing"),
        ("s2", "its Sentinel-2 file is missing"),
        ("lc", "its land-cover (lc) file is missing, although others are there"),
    ],
)
def test_a_patch_with_a_missing_partner_is_left_out_with_the_reason(own_archive, kind, reason):
    sen12ms_path(own_archive, IDS[1], kind).unlink()
    reader = SEN12MS(own_archive)
    assert IDS[1] not in reader.ids
    assert list(reader.left_out()) == [(IDS[1], reason)]


def test_other_files_are_ignored(own_archive):
    folder = sen12ms_path(own_archive, IDS[0], "s1").parent
    for name in ("s1_106_p4.tif.aux.xml", "s1_106_p5", "s1_2_p1.tif", "s2_106_p9.tif"):
        (folder / f"ROIs1158_spring_{name}").touch()
    reader = SEN12MS(own_archive)
    assert (reader.ids, list(reader.left_out())) == (IDS, [])


def test_the_description_fits_level_1c_without_an_offset(archive):
    info = SEN12MS(archive).info
    assert (info.sar_bands, len(info.optical_bands), info.optical_offset) == (("VV", "VH"), 13, 0)
    assert (info.statistics, info.class_names) == ("sen12ms", SIMPLIFIED_CLASSES)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("s1", backscatter()[:1], "expected 2 bands of 256x256 pixels in float32 or float64, found 1 of 256x256"),
        ("s1", backscatter().astype(np.int16), "in float32 or float64, found 2 of 256x256 in int16"),
        ("s2", digital_numbers()[:12], "expected 13 bands of 256x256 pixels in uint16, found 12"),
        ("s2", digital_numbers(128), "found 128x128"),
        ("s2", digital_numbers().astype(np.float32), "in uint16, found 13 of 256x256 in float32"),
        ("lc", land_cover()[:1], "expected 4 bands of 256x256 pixels in uint8 or .*, found 1"),
        ("lc", land_cover().astype(np.float32), "in uint8 or .*, found 4 of 256x256 in float32"),
        ("lc", np.where(land_cover() == 17, 18, land_cover()).astype(np.uint16), r"holds the codes \[18\], but"),
        (
            "lc",
            np.full((4, 256, 256), 300, np.uint16),
            r"the codes \[300\], but land cover has the codes 1 to 17",
        ),
        ("lc", np.full((4, 256, 256), -1, np.int16), r"holds the codes \[-1\]"),
    ],
)
def test_a_wrong_file_raises_an_error_that_names_it(own_archive, kind, values, message):
    path = sen12ms_path(own_archive, IDS[0], kind)
    write_tif(path, values)
    with pytest.raises(PairError, match=message) as caught:
        SEN12MS(own_archive).read(0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "values"), [("s1", backscatter()), ("lc", land_cover())])
def test_files_of_different_places_are_no_pair(own_archive, kind, values):
    write_tif(sen12ms_path(own_archive, IDS[0], kind), values, corner=(700_000, 5_800_000))
    with pytest.raises(PairError, match="not the same place"):
        SEN12MS(own_archive).read(0)


def test_files_without_a_place_are_read_all_the_same(own_archive):
    for kind, values in (("s1", backscatter()), ("s2", digital_numbers()), ("lc", land_cover())):
        write_tif(sen12ms_path(own_archive, IDS[0], kind), values, crs=None)
    pair = SEN12MS(own_archive).read(0)
    assert (pair.crs, pair.transform) == (None, None)


def test_a_folder_without_any_season_is_an_error_that_says_what_is_there(archive, tmp_path):
    (tmp_path / "sen12ms").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for \['ROIs1158_spring', .*the folder holds \['sen12ms'\]"):
        SEN12MS(tmp_path)
    with pytest.raises(FileNotFoundError, match="Give the folder above it"):
        SEN12MS(archive / "ROIs1158_spring")


@pytest.mark.parametrize("file", ["train_list.txt", "test_list.txt"])
def test_a_missing_list_is_named(own_archive, file):
    (own_archive / "splits" / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"\['{file}'\] not found in .*splits\. Download"):
        SEN12MS(own_archive, splits=own_archive / "splits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"test_list\.txt: the list is empty"),
        ("<html>", r"test_list\.txt: the line '<html>' is no file name such as"),
        ("../../ROIs1158_spring_s2_1_p30.tif", "is no file name such as"),
        ("ROIs1158_spring_s1_1_p30.tif", "ROIs1158_spring_1_p30 is listed for both train and test"),
    ],
)
def test_a_wrong_list_is_named(own_archive, text, message):
    (own_archive / "splits" / "test_list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        SEN12MS(own_archive, splits=own_archive / "splits")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"label_threshold": 0}, "label_threshold is 0, but must be a share"),
        ({"label_threshold": 10}, "label_threshold is 10, but must be a share"),
    ],
)
def test_arguments_out_of_range_are_refused(archive, keywords, message):
    with pytest.raises(ValueError, match=message):
        SEN12MS(archive, **keywords)
