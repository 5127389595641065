import shutil

import numpy as np
import pytest

from fusmae_hf.errors import PairError
from fusmae_hf.readers.dfc2020 import DFC2020
from fusmae_hf.readers.sen12ms import SIMPLIFIED_CLASSES
from tests.readers.sen12ms_fixtures import (
    backscatter,
    dfc2020_path,
    dfc_rows,
    digital_numbers,
    land_cover,
    make_dfc2020,
    write_tif,
)

IDS = [
    "ROIs0000_validation_validation_p0",
    "ROIs0000_validation_validation_p12",
    "ROIs0000_test_0_p3",
    "ROIs0000_test_0_p5127",
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_dfc2020(tmp_path_factory.mktemp("dfc2020"))


def test_pairs_are_given_in_order_with_the_split_of_their_folder(archive):
    reader = DFC2020(archive)
    assert reader.ids == IDS
    assert [reader.split_of(index) for index in range(len(reader))] == ["validation", "validation", "test", "test"]
    assert list(reader.left_out()) == []


def test_the_summary_counts_pairs_and_maps(own_archive):
    dfc2020_path(own_archive, "test", 3, "dfc").unlink()
    assert DFC2020(own_archive).summary == (
        f"Found 2 of the 986 validation pairs and 2 of the 5,128 test pairs in {own_archive}, "
        "3 of them with a dfc label map."
    )


def test_indices_of_the_map_of_10_m_name_its_classes(archive):
    reader = DFC2020(archive)
    found = reader.read(0).label_map
    assert (found.dtype, found.shape) == (np.uint8, (256, 256))
    assert [reader.info.map_class_names[index] for index in found[[0, 100], 0]] == ["Forest", "Water"]
    assert (found[200:] == reader.info.map_no_data).all()


@pytest.mark.parametrize(("code", "name"), list(enumerate(SIMPLIFIED_CLASSES, start=1)))
def test_each_code_is_the_class_of_that_number(own_archive, code, name):
    write_tif(dfc2020_path(own_archive, "test", 3, "dfc"), np.full((1, 256, 256), code, np.uint8))
    reader = DFC2020(own_archive)
    (index,) = np.unique(reader.read(2).label_map)
    assert reader.info.map_class_names[index] == name


def test_the_map_of_500_m_is_igbp_in_the_same_classes(archive):
    reader = DFC2020(archive, label_map="lc")
    rows = reader.read(0).label_map[[0, 64, 128, 148, 180, 206], 0]
    named = [None if value == reader.info.map_no_data else reader.info.map_class_names[value] for value in rows]
    assert named == ["Croplands", "Croplands", "Urban/Built-up", "Water", None, "Forest"]
    assert reader.info == DFC2020(archive).info


def test_a_pair_whose_map_was_withheld_has_none(own_archive):
    dfc2020_path(own_archive, "test", 3, "dfc").unlink()
    reader = DFC2020(own_archive)
    assert reader.ids == IDS
    assert reader.read(2).label_map is None
    assert reader.read(3).label_map is not None


def test_maps_may_be_absent_altogether(own_archive):
    shutil.rmtree(own_archive / "ROIs0000_test" / "dfc_0")
    assert DFC2020(own_archive).read(2).label_map is None


@pytest.mark.parametrize(("folder", "split"), [("ROIs0000_test", "validation"), ("ROIs0000_validation", "test")])
def test_one_of_the_two_splits_is_enough(own_archive, folder, split):
    shutil.rmtree(own_archive / folder)
    reader = DFC2020(own_archive)
    assert [reader.split_of(index) for index in range(len(reader))] == [split, split]


def test_the_scene_in_the_file_names_may_differ_from_that_of_the_folder(own_archive):
    for path in (own_archive / "ROIs0000_validation").glob("*/*.tif"):
        path.rename(path.with_name(path.name.replace("_validation_p", "_0_p")))
    reader = DFC2020(own_archive)
    assert reader.ids[0] == "ROIs0000_validation_0_p0"
    assert reader.read(0).label_map is not None


@pytest.mark.parametrize(
    ("kind", "reason"), [("s1", "its Sentinel-1 file is missing"), ("s2", "its Sentinel-2 file is missing")]
)
def test_a_patch_of_one_sensor_alone_is_left_out_with_the_reason(own_archive, kind, reason):
    dfc2020_path(own_archive, "validation", 12, kind).unlink()
    reader = DFC2020(own_archive)
    assert reader.ids == [IDS[0], *IDS[2:]]
    assert list(reader.left_out()) == [(IDS[1], reason)]


def test_other_files_are_ignored(own_archive):
    folder = dfc2020_path(own_archive, "test", 3, "s1").parent
    for name in ("ROIs0000_test_s1_0_p3.tif.aux.xml", "._ROIs0000_test_s1_0_p4.tif", "ROIs0000_test_s2_0_p9.tif"):
        (folder / name).touch()
    reader = DFC2020(own_archive)
    assert (reader.ids, list(reader.left_out())) == (IDS, [])


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("s1", backscatter().astype(np.int16), "in float32 or float64, found 2 of 256x256 in int16"),
        ("s1", backscatter(128), "expected 2 bands of 256x256 pixels in float32 or float64, found 2 of 128x128"),
        ("s2", digital_numbers()[:12], "expected 13 bands of 256x256 pixels in uint16, found 12"),
        ("s2", digital_numbers().astype(np.int32), "in uint16, found 13 of 256x256 in int32"),
        ("dfc", dfc_rows().repeat(2, axis=0), "expected 1 band of 256x256 pixels in uint8 or .*, found 2"),
        ("dfc", dfc_rows().astype(np.float32), "in uint8 or .*, found 1 of 256x256 in float32"),
        ("dfc", dfc_rows() + np.uint8(1), r"holds the codes \[11\], but land cover has the codes 1 to 10"),
    ],
)
def test_a_wrong_file_raises_an_error_that_names_it(own_archive, kind, values, message):
    path = dfc2020_path(own_archive, "validation", 0, kind)
    write_tif(path, values)
    with pytest.raises(PairError, match=message) as caught:
        DFC2020(own_archive).read(0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "values"), [("s1", backscatter()), ("dfc", dfc_rows()), ("lc", land_cover())])
def test_files_of_different_places_are_no_pair(own_archive, kind, values):
    write_tif(dfc2020_path(own_archive, "test", 3, kind), values, corner=(700_000, 5_800_000))
    with pytest.raises(PairError, match="not the same place"):
        DFC2020(own_archive, label_map="lc" if kind == "lc" else "dfc").read(2)


def test_missing_folders_are_named(own_archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for \['ROIs0000_validation', 'ROIs0000_test'\]"):
        DFC2020(tmp_path)
    with pytest.raises(FileNotFoundError, match="Give the folder above it"):
        DFC2020(own_archive / "ROIs0000_test")
    shutil.rmtree(own_archive / "ROIs0000_test" / "s2_0")
    with pytest.raises(FileNotFoundError, match=r"looked for \['s2_0'\] in .*ROIs0000_test"):
        DFC2020(own_archive)
