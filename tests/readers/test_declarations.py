"""What files declare of themselves counts, and must agree with what is stated of them."""

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from fusmae_hf.data.checks import check_pair
from fusmae_hf.data.plausibility import check_plausible
from fusmae_hf.errors import PairError
from fusmae_hf.readers.declarations import band_named
from fusmae_hf.readers.paired_geotiffs import PairedGeoTIFFs
from tests.readers.test_paired_geotiffs import BANDS, CORNER, PATTERNS, UTM, backscatter, reflectance

SIZE = 24
WITHOUT = np.zeros((SIZE, SIZE), bool)
WITHOUT[:6] = True
"""A quarter without data."""


def write(path, values, mask=None, alpha=None, grid=CORNER, crs=UTM, inside=True, **tags):
    """A raster; a mask of the file (inside it or beside it) or an alpha band is 0 where `mask` or `alpha` is True."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count + (alpha is not None), "height": height, "width": width,
               "dtype": values.dtype, "crs": crs, "transform": grid, "nodata": tags.pop("nodata", None)}  # fmt: skip
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(path, "w", **profile) as file:
        file.write(values, list(range(1, count + 1)))
        if alpha is not None:
            file.write(np.where(alpha, 0, 255).astype(values.dtype), count + 1)
            file.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (count - 1), ColorInterp.alpha]
        if mask is not None:
            file.write_mask(~mask)
        for name, value in tags.items():
            setattr(file, name, value)


def pairs(root, *, sar=None, optical=None, label_map=None, **options):
    """A reader of one pair; each sensor is a dictionary of what `write` takes."""
    write(root / "s1/a.tif", **({"values": backscatter()} | (sar or {})))
    write(root / "s2/a.tif", **({"values": reflectance()} | (optical or {})))
    if label_map is not None:
        write(root / "lc/a.tif", **label_map)
        options = {"label_map": "lc/{id}.tif"} | options
    return PairedGeoTIFFs(root, **PATTERNS | BANDS | {"max_no_data": 1.0} | options)


# No data


@pytest.mark.parametrize("kind", ["sar", "optical", "map"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_never_finite_need_not_be_declared(kind, value, tmp_path):
    with pytest.raises(ValueError, match=f"--{kind}-no-data is {value}, but .* leave it out"):
        pairs(tmp_path, **{f"{kind}_no_data": value})


@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_db_declared_linear_power_is_told_and_not_taken_for_missing(dtype, warped, tmp_path):
    grid = {"grid": CORNER @ type(CORNER).translation(0.5, 0.5)} if warped else {}
    options = {"on_different_grids": "warp"} if warped else {}
    values = np.random.default_rng(0).normal([[[-12]], [[-19]]], 2, (2, SIZE, SIZE)).astype(dtype)
    reader = pairs(tmp_path, sar={"values": values} | grid, sar_units="linear", **options)
    with pytest.raises(ValueError, match=r"declared linear, but most values are negative.*--sar-units db"):
        check_plausible([reader.read(0)], reader.info)


@pytest.mark.parametrize("negative", [-1e-4, -9999, -32768])
def test_some_negative_power_is_no_data(negative, tmp_path):
    values = np.where(WITHOUT, negative, 10 ** (backscatter() / 10)).astype("float32")
    pair = pairs(tmp_path, sar={"values": values}, sar_units="linear").read(0)
    assert np.array_equal(np.isnan(pair.sar), np.broadcast_to(WITHOUT, values.shape))


DECLARATIONS = {
    "mask inside": lambda values: {"values": values, "mask": WITHOUT},
    "mask beside": lambda values: {"values": values, "mask": WITHOUT, "inside": False},
    "alpha": lambda values: {"values": values, "alpha": WITHOUT},
    "tag": lambda values: {"values": np.where(WITHOUT, values.dtype.type(77), values), "nodata": 77},
}


@pytest.mark.parametrize("patch_size", [None, 12])
@pytest.mark.parametrize("way", DECLARATIONS)
def test_all_ways_to_declare_no_data_give_the_same_pair(way, patch_size, tmp_path):
    sar, optical = (DECLARATIONS[way](values) for values in (backscatter(), reflectance()))
    reader = pairs(tmp_path, sar=sar, optical=optical, patch_size=patch_size)
    pair = reader.read(0)
    there = WITHOUT[:patch_size, :patch_size]
    np.testing.assert_array_equal(np.isnan(pair.sar).all(axis=0), there)
    np.testing.assert_array_equal((pair.optical == 0).all(axis=0), there)
    np.testing.assert_array_equal(pair.optical[:, ~there], reflectance()[:, :patch_size, :patch_size][:, ~there])
    assert len(reader.info.optical_bands) == 3  # alpha is no band
    check_pair(pair, reader.info)


@pytest.mark.parametrize("way", DECLARATIONS)
def test_no_data_is_declared_for_label_maps_alike(way, tmp_path):
    classes = np.full((1, SIZE, SIZE), 2, np.uint8)
    label_map = DECLARATIONS[way](classes)
    if way != "tag":
        with pytest.raises(PairError, match="give map_no_data"):
            pairs(tmp_path / "none", label_map=label_map).read(0)
        reader = pairs(tmp_path, label_map=label_map, map_no_data=255)
    else:
        reader = pairs(tmp_path, label_map=label_map, map_class_names=["a", "b", "c"])
        assert reader.info.map_no_data == 77
    expected = np.where(WITHOUT, reader.info.map_no_data, 2)
    np.testing.assert_array_equal(reader.read(0).label_map, expected)


@pytest.mark.parametrize("way", DECLARATIONS)
def test_no_data_of_maps_of_a_quantity_is_nan(way, tmp_path):
    values = np.full((1, SIZE, SIZE), 2.5, np.float32)
    pair = pairs(tmp_path, label_map=DECLARATIONS[way](values), map_units="t/ha").read(0)
    np.testing.assert_array_equal(np.isnan(pair.label_map), WITHOUT)


def test_masked_pixels_have_no_weight_when_a_file_is_warped(tmp_path):
    sar = np.full((2, SIZE, SIZE), -10, np.float32)
    sar[:, WITHOUT] = 60
    grid = from_origin(500_003, 5_000_003, 10, 10)
    pair = pairs(tmp_path, sar={"values": sar, "mask": WITHOUT, "grid": grid}, on_different_grids="warp").read(0)
    assert np.nanmax(pair.sar) < -9.9


@pytest.mark.parametrize(
    ("tag", "options", "message"),
    [
        (255, {"map_no_data": 0}, "tag says that 255 is no data, but --map-no-data is 0"),
        (1, {"map_class_names": ["a", "b", "c"]}, "tag says that 1 is no data, but map_class_names has a class 1"),
    ],
)
def test_a_tag_of_a_label_map_that_contradicts_is_an_error_with_both(tag, options, message, tmp_path):
    label_map = {"values": np.full((1, SIZE, SIZE), 2, np.uint8), "nodata": tag}
    with pytest.raises(PairError, match=message):
        pairs(tmp_path, label_map=label_map, **options).read(0)


# Names of bands


@pytest.mark.parametrize(
    ("description", "band"),
    [("B04", "B04"), ("b4", "B04"), ("B8a", "B8A"), ("Sigma0_VV_db", "VV"), ("B04 (665 nm)", "B04"), ("vh", "VH"),
     ("own", "own"), ("Band 1", None), ("Band1", None), ("band_4", None), ("VV/VH", None), ("", None), (None, None),
     ("red", None), ("1", None), ("B4 and B8", None)],
)  # fmt: skip
def test_descriptions_name_bands_or_say_nothing(description, band):
    assert band_named(description, ["own"]) == band


def test_bands_are_named_by_the_files_where_nothing_is_stated_whatever_their_order(tmp_path):
    described = {"values": reflectance(), "descriptions": ("B4", "B3", "B2")}
    pairs(tmp_path, sar={"values": backscatter(), "descriptions": ("VV", "VH")}, optical=described)
    write(tmp_path / "s1/b.tif", backscatter()[::-1], descriptions=("Sigma0_VH", "Sigma0_VV"))
    write(tmp_path / "s2/b.tif", reflectance()[[2, 0, 1]], descriptions=("B02", "B04", "B03"))
    options = BANDS | {"sar_bands": (), "optical_bands": ()}
    reader = PairedGeoTIFFs(tmp_path, **PATTERNS | options)
    assert (reader.info.sar_bands, reader.info.optical_bands) == (("VV", "VH"), ("B04", "B03", "B02"))
    for index in range(2):
        np.testing.assert_array_equal(reader.read(index).sar, backscatter())
        np.testing.assert_array_equal(reader.read(index).optical, reflectance())


def test_names_are_needed_where_the_files_do_not_say_them(tmp_path):
    with pytest.raises(ValueError, match=r"sar_bands \(--sar-bands\) is needed: .*does not name them all"):
        pairs(tmp_path, sar_bands=())


@pytest.mark.parametrize(
    ("sensor", "descriptions", "message"),
    [
        ("optical", ("B02", "B03", "B04"), "band 1 is described as 'B02', but --optical-bands calls it B04"),
        ("optical", ("B04", "B03", "B8A"), "band 3 is described as 'B8A', but --optical-bands calls it B02"),
        ("optical", (None, "B2", None), "band 2 is described as 'B2', but --optical-bands calls it B03"),
        ("sar", ("Sigma0_VH", "Sigma0_VV"), "band 1 is described as 'Sigma0_VH', but --sar-bands calls it VV"),
    ],
)
def test_descriptions_that_contradict_are_an_error_with_both(sensor, descriptions, message, tmp_path):
    values = reflectance() if sensor == "optical" else backscatter()
    with pytest.raises(PairError, match=message):
        pairs(tmp_path, **{sensor: {"values": values, "descriptions": descriptions}}).read(0)


@pytest.mark.parametrize("descriptions", [("B4", "b3", "B02"), ("Band 1", "Band 2", "Band 3"), ("red", "green", None)])
def test_descriptions_that_agree_or_say_nothing_are_no_error(descriptions, tmp_path):
    pairs(tmp_path, optical={"values": reflectance(), "descriptions": descriptions}).read(0)


def test_a_skipped_band_may_be_described_as_anything(tmp_path):
    optical = {"values": reflectance(), "descriptions": ("B04", "B03", "B12")}
    assert pairs(tmp_path, optical=optical, optical_bands=["B04", "B03", "-"]).read(0).optical.shape[0] == 2


def test_four_bands_of_8_bits_are_four_bands_but_transparency_is_none(tmp_path):
    """GDAL calls the fourth one alpha without being asked."""
    values = np.random.default_rng(0).integers(1, 250, (4, SIZE, SIZE)).astype(np.uint8)
    options = {"optical_bands": ["B02", "B03", "B04", "B08"], "optical_units": "raw"}
    np.testing.assert_array_equal(pairs(tmp_path, optical={"values": values}, **options).read(0).optical, values)
    values[3] = np.where(WITHOUT, 0, 255)
    with pytest.raises(PairError, match=r"band 4 is alpha .* but --optical-bands calls it B08"):
        pairs(tmp_path / "alpha", optical={"values": values}, **options).read(0)
    options["optical_bands"] = ["B02", "B03", "B04", "-"]
    pair = pairs(tmp_path / "skipped", optical={"values": values}, **options).read(0)
    np.testing.assert_array_equal((pair.optical == 0).all(axis=0), WITHOUT)


# Scale and offset


@pytest.mark.parametrize("units", ["db", "raw"])
def test_integers_with_a_scale_tag_are_scaled(units, tmp_path):
    stored = np.rint(backscatter() * 100).astype(np.int16)
    stored[:, 0, 0] = -32768
    sar = {"values": stored, "scales": (0.01, 0.01), "nodata": -32768}
    pair = pairs(tmp_path, sar=sar, sar_units=units).read(0)
    assert pair.sar.dtype == np.float32
    assert np.isnan(pair.sar[:, 0, 0]).all()
    np.testing.assert_allclose(pair.sar[:, 1:], backscatter()[:, 1:], atol=0.006)


def test_reflectance_is_scaled_and_what_was_not_measured_stays_zero(tmp_path):
    values = reflectance()
    values[:, 0, 0] = 0
    optical = {"values": values, "scales": (1e-4,) * 3, "offsets": (-0.1,) * 3}
    pair = pairs(tmp_path, optical=optical, optical_units="reflectance").read(0)
    assert (pair.optical[:, 0, 0] == 0).all()
    np.testing.assert_allclose(pair.optical[:, 1:], values[:, 1:] * 1e-4 - 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "offset", "implied"), [(1e-4, 0.0, 0), (1e-4, -0.1, 1000), (1.0, -1000.0, 1000), (1.0, 0.0, 0)]
)
def test_digital_numbers_stay_and_their_offset_is_taken_over(scale, offset, implied, tmp_path):
    optical = {"values": reflectance(), "scales": (scale,) * 3, "offsets": (offset,) * 3}
    reader = pairs(tmp_path, optical=optical)
    assert reader.info.optical_offset == implied
    np.testing.assert_array_equal(reader.read(0).optical, reflectance(), strict=True)
    agreeing = pairs(tmp_path / "agrees", optical=optical, optical_offset=implied)
    assert agreeing.info.optical_offset == implied
    agreeing.read(0)


@pytest.mark.parametrize(
    ("tags", "options", "message"),
    [
        ({"scales": (1e-4,) * 3, "offsets": (-0.1,) * 3}, {"optical_offset": 0.0}, "offset of 1000, but .* is 0"),
        (
            {"scales": (2.75e-5,) * 3, "offsets": (-0.2,) * 3},
            {},
            "scale 2.75e-05 and offset -0.2, which does not",
        ),
        ({"scales": (1e-4, 1e-4, 2e-4)}, {}, "scale 0.0001, 0.0002 and offset 0"),
        (
            {"scales": (1e-4,) * 3, "offsets": (-0.1,) * 3},
            {"optical_units": "reflectance", "optical_offset": 1000.0},
            "subtracted twice",
        ),
    ],
)
def test_tags_that_contradict_are_an_error_with_both(tags, options, message, tmp_path):
    with pytest.raises(PairError, match=message):
        pairs(tmp_path, optical={"values": reflectance()} | tags, **options).read(0)


def test_a_file_that_implies_another_offset_than_the_first_is_refused(tmp_path):
    pairs(tmp_path, optical={"values": reflectance(), "scales": (1e-4,) * 3, "offsets": (-0.1,) * 3})
    write(tmp_path / "s1/b.tif", backscatter())
    write(tmp_path / "s2/b.tif", reflectance())
    reader = PairedGeoTIFFs(tmp_path, **PATTERNS | BANDS)
    reader.read(0)
    with pytest.raises(PairError, match="imply no optical offset, but those of other files 1000"):
        reader.read(1)


def test_classes_are_not_scaled_but_a_quantity_is(tmp_path):
    label_map = {"values": np.full((1, SIZE, SIZE), 25, np.int16), "scales": (0.1,)}
    with pytest.raises(PairError, match=r"scale 0.1 and offset 0, but classes are not scaled"):
        pairs(tmp_path, label_map=label_map).read(0)
    assert pairs(tmp_path / "t", label_map=label_map, map_units="t/ha").read(0).label_map.mean() == np.float32(2.5)


def test_a_unit_tag_that_contradicts_is_an_error(tmp_path):
    with pytest.raises(PairError, match="its unit is dB by its tag, but --sar-units is linear"):
        pairs(tmp_path, sar={"values": -backscatter(), "units": ("dB", "dB")}, sar_units="linear").read(0)


# Size of pixels


@pytest.mark.parametrize(
    ("crs", "grid", "options", "metres"),
    [
        (UTM, CORNER, {}, 10.0),
        (UTM, from_origin(500_000, 5_000_000, 30, 30), {}, 30.0),
        (UTM, CORNER, {"on_different_grids": "warp", "resolution": 20.0}, 20.0),
        ("EPSG:4326", from_origin(9, 45, 1.2e-4, 8.993e-5), {}, 10.0),
        ("EPSG:2263", from_origin(1e6, 2e5, 32.8083333, 32.8083333), {}, 10.0),
        (None, from_origin(5, 5, 2, 2), {}, None),
    ],
)
def test_the_size_of_pixels_is_kept_in_metres(crs, grid, options, metres, tmp_path):
    file = {"crs": crs, "grid": grid}
    reader = pairs(tmp_path, sar={"values": backscatter()} | file, optical={"values": reflectance()} | file, **options)
    assert reader.info.pixel_size == metres
