import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

from fusmae_hf.errors import PairError
from fusmae_hf.readers.sen1floods11 import Sen1Floods11
from tests.readers.sen12ms_fixtures import VH_DB, VV_DB, backscatter, digital_numbers

PIXEL_DEGREES = 8.983152841195215e-05  # 10 m at the equator
CORNER = (-2.1, 10.4)
LISTS = {
    "train": ["Ghana_103272", "USA_1010394", "India_900498"],  # the last one is not on disk
    "valid": ["Sri-Lanka_101973"],
    "test": ["Spain_3976284"],
    "bolivia": ["Bolivia_103757"],
}
ON_DISK = ["Bolivia_103757", "Ghana_103272", "Spain_3976284", "Sri-Lanka_101973", "USA_1010394"]
IDS = ON_DISK[1:]


def chip_path(root: Path, chip: str, kind: str) -> Path:
    return root / "v1.1" / "data" / "flood_events" / "HandLabeled" / kind / f"{chip}_{kind}.tif"


def list_path(root: Path, name: str) -> Path:
    return root / "v1.1" / "splits" / "flood_handlabeled" / f"flood_{name}_data.csv"


def write_chip(path: Path, values: np.ndarray, corner: tuple[float, float] = CORNER) -> None:
    """Write (bands, height, width) as one GeoTIFF in degrees."""
    count, height, width = values.shape
    transform = rasterio.Affine(PIXEL_DEGREES, 0, corner[0], 0, -PIXEL_DEGREES, corner[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", crs="EPSG:4326", transform=transform, compress="deflate", **profile) as file:
        file.write(values)


def water() -> np.ndarray:
    """(1, 512, 512) int16: 100 rows without data, 200 of water, 212 of land."""
    return np.repeat(np.repeat([-1, 1, 0], [100, 200, 212])[:, None], 512, axis=1).astype(np.int16)[None]


def make_sen1floods11(root: Path) -> Path:
    """Sen1Floods11 v1.1 with the chips `ON_DISK` and lists that name one more."""
    sar = backscatter(512)
    sar[:, :, :10] = np.nan  # beyond the edge of the swath
    files = {"S1Hand": sar, "S2Hand": digital_numbers(512).astype(np.int16), "LabelHand": water()}
    first = ON_DISK[0]
    for kind, values in files.items():
        write_chip(chip_path(root, first, kind), values)
        for chip in ON_DISK[1:]:
            shutil.copy(chip_path(root, first, kind), chip_path(root, chip, kind))
    for name, chips in LISTS.items():
        path = list_path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(f"{chip}_S1Hand.tif,{chip}_LabelHand.tif\r\n" for chip in chips).encode())
    return root


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_sen1floods11(tmp_path_factory.mktemp("sen1floods11"))


@pytest.mark.parametrize("above", ["", "v1.1"], ids=["holds v1.1", "is v1.1"])
def test_the_root_may_be_the_version_or_the_folder_above(archive, above):
    reader = Sen1Floods11(archive / above)
    assert reader.ids == IDS
    assert reader.read(0).id == IDS[0]


def test_chips_have_the_split_of_the_list_that_names_them(archive):
    reader = Sen1Floods11(archive)
    splits = {chip: reader.split_of(index) for index, chip in enumerate(reader.ids)}
    assert splits == {
        "Ghana_103272": "train",
        "Spain_3976284": "test",
        "Sri-Lanka_101973": "validation",
        "USA_1010394": "train",
    }


def test_the_summary_says_how_many_of_the_listed_chips_were_found(archive):
    assert Sen1Floods11(archive).summary.startswith("Found 4 of the 6 chips that the lists name in ")


def test_bolivia_is_left_out_with_the_reason_unless_asked_for(archive):
    ((chip, reason),) = Sen1Floods11(archive).left_out()
    assert chip == "Bolivia_103757"
    assert "the region held out" in reason
    reader = Sen1Floods11(archive, bolivia="test")
    assert reader.ids == ON_DISK
    assert reader.split_of(0) == "test"
    assert list(reader.left_out()) == []


@pytest.mark.parametrize("kind", ["S1Hand", "S2Hand", "LabelHand"])
def test_a_chip_with_a_missing_file_is_left_out_with_the_reason(own_archive, kind):
    chip_path(own_archive, IDS[0], kind).unlink()
    reader = Sen1Floods11(own_archive, bolivia="test")
    assert IDS[0] not in reader.ids
    assert list(reader.left_out()) == [(IDS[0], f"its file is missing in {kind}")]


def test_a_chip_on_no_list_is_left_out_with_the_reason(own_archive):
    list_path(own_archive, "test").write_text("")
    assert "in none of the lists" in dict(Sen1Floods11(own_archive).left_out())["Spain_3976284"]


def test_bands_keep_their_order_decimals_and_missing_values(archive):
    reader = Sen1Floods11(archive)
    pair = reader.read(0)
    assert (pair.sar.dtype, pair.sar.shape) == (np.float32, (2, 512, 512))
    np.testing.assert_allclose(pair.sar[:, :, 10:].mean(axis=(1, 2)), [VV_DB, VH_DB], atol=0.01)
    assert np.isnan(pair.sar[:, :, :10]).all()
    bands = dict(zip(reader.info.optical_bands, pair.optical[:, 0, 0], strict=True))
    assert (bands["B02"], bands["B8A"], bands["B10"], bands["B12"]) == (500, 1200, 1400, 1600)


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_digital_numbers_keep_the_dtype_of_the_file(own_archive, dtype):
    write_chip(chip_path(own_archive, IDS[0], "S2Hand"), digital_numbers(512).astype(dtype))
    pair = Sen1Floods11(own_archive).read(0)
    assert pair.optical.dtype == dtype
    np.testing.assert_array_equal(pair.optical, digital_numbers(512))


def test_a_pair_carries_the_flood_and_the_place(archive):
    reader = Sen1Floods11(archive)
    pair = reader.read(reader.ids.index("Sri-Lanka_101973"))
    assert pair.extra == {"event": "Sri-Lanka"}
    assert (pair.crs, pair.transform) == ("EPSG:4326", (PIXEL_DEGREES, 0, CORNER[0], 0, -PIXEL_DEGREES, CORNER[1]))


def test_label_maps_tell_water_land_and_no_data_apart(archive):
    reader = Sen1Floods11(archive)
    found = reader.read(0).label_map
    assert (found.dtype, found.shape) == (np.int16, (512, 512))
    assert (found[:100] == reader.info.map_no_data).all()
    assert [reader.info.map_class_names[index] for index in found[[100, 300], 0]] == ["Water", "Not Water"]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("S1Hand", backscatter(512)[:1], "expected 2 bands of 512x512 pixels in float32, found 1"),
        ("S1Hand", backscatter(256), "found 2 of 256x256"),
        ("S1Hand", backscatter(512).astype(np.int16), "in float32, found 2 of 512x512 in int16"),
        ("S2Hand", digital_numbers(512)[:12], "expected 13 bands of 512x512 pixels in int16 or uint16, found 12"),
        ("S2Hand", digital_numbers(512).astype(np.float32), "in int16 or uint16, found 13 of 512x512 in float32"),
        ("LabelHand", water().astype(np.float32), "in int16, found 1 of 512x512 in float32"),
        ("LabelHand", water() * 2, r"holds the codes \[-2, 2\], but expected -1"),
    ],
)
def test_a_wrong_file_raises_an_error_that_names_it(own_archive, kind, values, message):
    path = chip_path(own_archive, IDS[0], kind)
    write_chip(path, values)
    with pytest.raises(PairError, match=message) as caught:
        Sen1Floods11(own_archive).read(0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("kind", "values"), [("S1Hand", backscatter(512)), ("LabelHand", water())])
def test_files_more_than_a_pixel_apart_are_no_pair(own_archive, kind, values):
    path = chip_path(own_archive, IDS[0], kind)
    write_chip(path, values, corner=(CORNER[0] + 2 * PIXEL_DEGREES, CORNER[1]))
    with pytest.raises(PairError, match="not the same place") as caught:
        Sen1Floods11(own_archive).read(0)
    assert str(path) in str(caught.value)


def test_a_shift_of_half_a_pixel_is_taken(own_archive):
    path = chip_path(own_archive, IDS[0], "S1Hand")
    write_chip(path, backscatter(512), corner=(CORNER[0] + 0.5 * PIXEL_DEGREES, CORNER[1]))
    assert Sen1Floods11(own_archive).read(0).transform[2] == CORNER[0]


def test_missing_folders_are_named(own_archive, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for \['data/flood_events/HandLabeled', 'splits/flood_hand"):
        Sen1Floods11(tmp_path / "elsewhere")
    shutil.rmtree(chip_path(own_archive, IDS[0], "S2Hand").parent)
    with pytest.raises(FileNotFoundError, match=r"looked for \['S2Hand'\] in .*HandLabeled"):
        Sen1Floods11(own_archive)


@pytest.mark.parametrize("name", LISTS)
def test_a_missing_list_is_named(own_archive, name):
    list_path(own_archive, name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"flood_{name}_data\.csv is missing"):
        Sen1Floods11(own_archive)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "Ghana_1_S1Hand.tif,Ghana_2_LabelHand.tif",
            r"flood_test_data\.csv: the line 'Ghana_1_S1Hand.* is not <chip>",
        ),
        ("Ghana_1_S2Hand.tif,Ghana_1_LabelHand.tif", "is not <chip>_S1Hand.tif,<chip>_LabelHand.tif"),
        ("Ghana_103272_S1Hand.tif,Ghana_103272_LabelHand.tif", "Ghana_103272 is listed for both train and test"),
    ],
)
def test_a_wrong_list_is_named(own_archive, line, message):
    list_path(own_archive, "test").write_text(line)
    with pytest.raises(ValueError, match=message):
        Sen1Floods11(own_archive)
