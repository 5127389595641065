"""GeoTIFF pairs that cannot show one place, bands however they are spelt, maps of quantities with a no-data value."""

import numpy as np
import pytest
from rasterio.transform import from_origin

from fusmae_hf.errors import PairError
from tests.readers.test_paired_geotiffs import backscatter, open_pairs, reflectance, write_pair, write_raster

OPTICAL = from_origin(500_000, 5_000_000, 10, 10)


@pytest.mark.parametrize("times", [0.1, 5.5, 100])
@pytest.mark.parametrize("grids", ["warp", "error"])
def test_pixels_that_differ_more_than_five_times_are_refused_unless_allowed(tmp_path, times, grids):
    write_pair(tmp_path, sar_grid=from_origin(500_000, 5_000_000, 10 * times, 10 * times))
    with pytest.raises(PairError, match=r"have pixels that differ [\d.]+ times .*--max-pixel-ratio"):
        open_pairs(tmp_path, on_different_grids=grids, max_no_data=1.0).read(0)
    if grids == "warp":
        reader = open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0, max_pixel_ratio=100)
        assert reader.read(0).sar.shape == (2, 24, 24)


@pytest.mark.parametrize("times", [0.5, 2, 4.9])
def test_pixels_that_differ_less_are_warped(tmp_path, times):
    write_pair(tmp_path, sar_grid=from_origin(500_000, 5_000_000, 10 * times, 10 * times))
    assert open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0).read(0).sar.shape == (2, 24, 24)


def test_pixel_sizes_are_compared_on_the_ground(tmp_path):
    write_pair(tmp_path)
    degree = 111_320 * np.cos(np.deg2rad(45.15))
    write_raster(tmp_path / "s1/a.tif", backscatter(), from_origin(9, 45.155, 10 / degree, 10 / 111_195), "EPSG:4326")
    assert open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0).read(0).sar.shape == (2, 24, 24)


@pytest.mark.parametrize(("pixels", "refused"), [(0, False), (12, False), (23, True), (24, True), (-23, True)])
def test_extents_that_barely_meet_are_refused(tmp_path, pixels, refused):
    write_pair(tmp_path, sar_grid=from_origin(500_000 + 10 * pixels, 5_000_000, 10, 10))
    reader = open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0)
    if refused:
        with pytest.raises(PairError, match=r"barely meet: they share [\d.]+% of the smaller"):
            reader.read(0)
    else:
        assert np.isfinite(reader.read(0).sar).any()


@pytest.mark.parametrize(
    ("crs", "grid"),
    [
        ("EPSG:4326", from_origin(500_000, 5_000_000, 10, 10)),
        ("EPSG:4326", from_origin(9, 45, 10, 10)),
        ("EPSG:32632", from_origin(9, 45, 1e-4, 1e-4)),
        ("EPSG:3035", from_origin(9, 45, 1e-4, 1e-4)),
        ("EPSG:3857", from_origin(5e7, 5e6, 10, 10)),
    ],
)
def test_coordinates_that_cannot_be_of_their_crs_are_refused(tmp_path, crs, grid):
    for folder, values in (("s1", backscatter()), ("s2", reflectance())):
        write_raster(tmp_path / folder / "a.tif", values, grid, crs)
    with pytest.raises(PairError, match=r"a\.tif: x from .* cannot be of EPSG"):
        open_pairs(tmp_path).read(0)


def test_bands_may_be_spelt_otherwise_in_options_and_file_names(tmp_path):
    for name, band in zip(("vv", "VH"), backscatter(), strict=True):
        write_raster(tmp_path / f"a_{name}.tif", band[None])
    for name, band in zip(("B4", "b03", "B02"), reflectance(), strict=True):
        write_raster(tmp_path / f"a_{name}.tif", band[None])
    reader = open_pairs(
        tmp_path,
        sar="{id}_{band}.tif",
        optical="{id}_{band}.tif",
        sar_bands=["vv", "VH"],
        optical_bands=["B4", "b03", "B02"],
    )
    assert (reader.info.sar_bands, reader.info.optical_bands) == (("VV", "VH"), ("B04", "B03", "B02"))
    assert np.array_equal(reader.read(0).optical, reflectance())


def test_names_of_raw_bands_stay(tmp_path):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, optical_units="raw", optical_bands=["b4", "b3", "b2"])
    assert reader.info.optical_bands == ("b4", "b3", "b2")


@pytest.mark.parametrize("value", [-9999, 0.5, -3.4e38])
def test_a_map_of_a_quantity_has_a_value_without_data(tmp_path, value):
    write_pair(tmp_path)
    biomass = np.full((1, 24, 24), 120, "float32")
    biomass[:, :5] = value
    write_raster(tmp_path / "maps/a.tif", biomass)
    options = {"label_map": "maps/{id}.tif", "map_units": "t/ha"}
    reader = open_pairs(tmp_path, map_no_data=value, **options)
    assert np.array_equal(np.isnan(reader.read(0).label_map), biomass[0] == np.float32(value))
    assert reader.info.map_no_data is None
    assert not np.isnan(open_pairs(tmp_path, **options).read(0).label_map).any()
