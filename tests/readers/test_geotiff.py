import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine

from fusmae_hf.errors import PairError
from fusmae_hf.readers import geotiff, plain_tiff
from fusmae_hf.readers.geotiff import Patch, read_geotiff, read_pixels, require_same_footprint
from fusmae_hf.readers.listed_pairs import acquisition_time

NORTH_UP = Affine(20, 0, 600_000, 0, -20, 5_800_000)
TEXT_TAG = 34737
NO_CODE = "+proj=laea +lat_0=47 +lon_0=11 +x_0=0 +y_0=0 +ellps=GRS80 +units=m"
SIDECAR = """<PAMDataset>
  <SRS>EPSG:3035</SRS><GeoTransform>4000000, 20, 0, 3000000, 0, -20</GeoTransform>
</PAMDataset>"""

PLAIN = {
    "uint16": {},
    "uint8": {"dtype": "uint8"},
    "uint32": {"dtype": "uint32"},
    "int16": {"dtype": "int16"},
    "int32": {"dtype": "int32"},
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "one row a strip": {"blockysize": 1},
    "two strips": {"height": 16, "blockysize": 8, "dtype": "uint8"},
    "no-data value": {"nodata": 0},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(1e-4, 0, 11.5, 0, -2e-4, 47.25)},
    "Lambert": {"crs": "EPSG:3035"},
    "southern zone": {"crs": "EPSG:32733"},
    "CRS without a code": {"crs": NO_CODE},
    "wide": {"height": 3, "width": 200},
}
UNUSUAL = {
    "deflate": {"compress": "deflate"},
    "predictor": {"compress": "deflate", "predictor": 2},
    "lzw": {"compress": "lzw"},
    "zstd": {"compress": "zstd"},
    "tiles": {"tiled": True, "blockxsize": 16, "blockysize": 16},
    "BigTIFF": {"bigtiff": "YES"},
    "big-endian": {"endianness": "big"},
    "bands side by side": {"count": 3, "interleave": "pixel"},
    "bands one after another": {"count": 3, "interleave": "band"},
    "12 bits": {"nbits": 12},
    "64 bits": {"dtype": "int64"},
    "int8": {"dtype": "int8"},
    "complex": {"dtype": "complex64"},
    "white is zero": {"photometric": "MINISWHITE"},
    "no place": {"crs": None, "transform": None},
    "no CRS": {"crs": None},
    "rotated": {"transform": Affine(18.8, 6.8, 600_000, 6.8, -18.8, 5_800_000)},
    "south up": {"transform": Affine(20, 0, 600_000, 0, 20, 5_800_000)},
}


@pytest.fixture(autouse=True)
def no_crs_is_known(monkeypatch):
    monkeypatch.setattr(geotiff, "_known_crs", {})


def write(path, count=1, height=60, width=40, dtype="uint16", crs="EPSG:32633", transform=NORTH_UP, **options):
    """A GeoTIFF with values that fill their dtype (12 bits at most where GDAL must pack them)."""
    generator = np.random.default_rng(0)
    if np.dtype(dtype).kind in "fc":
        values = generator.normal(-12, 5, (count, height, width)).astype(dtype)
    else:
        top = 4095 if "nbits" in options else np.iinfo(dtype).max
        values = generator.integers(0, top, (count, height, width), dtype, endpoint=True)
    profile = {"count": count, "height": height, "width": width, "dtype": dtype, "crs": crs, "transform": transform}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", driver="GTiff", **profile, **options) as file:
            file.write(values)
    return path


def by_rasterio(path):
    """(values, crs, transform) that rasterio gives, or None where it refuses the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as file:
                crs = file.crs.to_string() if file.crs else None
                return file.read(), crs, tuple(file.transform)[:6] if crs else None
    except (rasterio.errors.RasterioError, ValueError):
        return None


def assert_equals_rasterio(path):
    expected = by_rasterio(path)
    for _ in range(2):  # the second time the CRS may be known
        if expected is None:
            with pytest.raises(PairError) as caught:
                read_geotiff(path)
            assert str(path) in str(caught.value)
            continue
        patch = read_geotiff(path)
        assert patch.values.dtype == expected[0].dtype
        assert patch.values.tobytes() == expected[0].tobytes()
        assert patch.values.shape == expected[0].shape
        assert (patch.crs, patch.transform) == expected[1:]


@pytest.fixture
def plain(tmp_path):
    return write(tmp_path / "plain.tif")


@pytest.fixture
def without_rasterio(monkeypatch):
    """Calling it forbids rasterio from then on."""
    return lambda: monkeypatch.setattr(geotiff, "_read_with_rasterio", lambda path, *_: pytest.fail(f"needs {path}"))


@pytest.mark.parametrize("options", (PLAIN | UNUSUAL).values(), ids=PLAIN | UNUSUAL)
def test_every_profile_is_read_as_rasterio_reads_it(tmp_path, options):
    assert_equals_rasterio(write(tmp_path / "a.tif", **options))


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_plain_files_need_rasterio_for_the_first_of_a_crs_alone(tmp_path, options, without_rasterio):
    path = write(tmp_path / "a.tif", **options)
    expected = by_rasterio(path)
    read_geotiff(path)
    without_rasterio()
    patch = read_geotiff(path)
    assert patch.values.tobytes() == expected[0].tobytes()
    assert (patch.crs, patch.transform) == expected[1:]


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_pixels_of_a_plain_file_need_no_rasterio(tmp_path, options, without_rasterio):
    path = write(tmp_path / "a.tif", **options)
    expected = by_rasterio(path)[0][0]
    without_rasterio()
    pixels = read_pixels(path, expected.shape, expected.dtype.name)
    assert pixels.tobytes() == expected.tobytes()
    assert pixels.dtype.isnative
    assert pixels.flags.owndata or pixels.base.flags.owndata
    assert pixels.flags.writeable


@pytest.mark.parametrize("options", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_files_are_left_to_rasterio(tmp_path, options):
    path = write(tmp_path / "a.tif", **options)
    assert plain_tiff.open_plain(path) is None
    expected = by_rasterio(path)[0]
    if len(expected) == 1:
        assert read_pixels(path, expected.shape[1:], expected.dtype.name).tobytes() == expected.tobytes()


def test_files_that_differ_in_crs_alone_are_told_apart(tmp_path):
    paths = [write(tmp_path / f"{code}.tif", crs=f"EPSG:{code}") for code in (32629, 32633, 3035)]
    for _ in range(2):
        assert [read_geotiff(path).crs for path in paths] == ["EPSG:32629", "EPSG:32633", "EPSG:3035"]


def test_a_known_crs_is_put_at_the_corner_of_each_file(tmp_path):
    for corner in (600_000, 601_200, 0):
        path = write(tmp_path / f"{corner}.tif", transform=Affine(10, 0, corner, 0, -10, 5_800_000))
        assert read_geotiff(path).transform == (10, 0, corner, 0, -10, 5_800_000)


def test_pixels_that_are_points_are_placed_as_rasterio_places_them(plain):
    with rasterio.open(plain, "r+") as file:
        file.update_tags(AREA_OR_POINT="Point")
    assert_equals_rasterio(plain)


def test_a_sidecar_overrules_the_file_as_with_rasterio(tmp_path):
    paths = [write(tmp_path / name) for name in ("a.tif", "b.tif")]
    (tmp_path / "a.tif.aux.xml").write_text(SIDECAR)
    for path, crs in zip(2 * paths, 2 * ["EPSG:3035", "EPSG:32633"], strict=True):
        assert_equals_rasterio(path)
        assert read_geotiff(path).crs == crs


def test_masks_overviews_and_metadata_change_nothing(plain):
    with rasterio.open(plain, "r+") as file:
        file.update_tags(COMMENT="made by a test", TIFFTAG_SOFTWARE="test")
        file.build_overviews([2])
        file.write_mask(np.ones((60, 40), bool))
    assert_equals_rasterio(plain)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda file: file.write_mask(np.tri(60, 40, dtype=bool)), r"declares 780 pixels without data by a mask"),
        (lambda file: setattr(file, "scales", (0.01,)), r"declares scale \[0.01\] and offset \[0.0\]"),
        (lambda file: setattr(file, "offsets", (-1000,)), r"declares scale \[1.0\] and offset \[-1000.0\]"),
    ],
)
def test_what_would_change_the_values_of_an_archive_is_refused_by_name(plain, declare, said, inside):
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(plain, "r+") as file:
        declare(file)
    with pytest.raises(PairError, match=said):
        read_geotiff(plain)


def test_a_file_with_holes_is_read_as_rasterio_reads_it(tmp_path):
    path = tmp_path / "holes.tif"
    profile = {"count": 1, "height": 60, "width": 40, "dtype": "uint16", "crs": "EPSG:32633", "transform": NORTH_UP}
    with rasterio.open(path, "w", driver="GTiff", sparse_ok=True, blockysize=10, **profile) as file:
        file.write(np.full((10, 40), 7, np.uint16), 1, window=((20, 30), (0, 40)))
    assert_equals_rasterio(path)
    assert read_geotiff(path).values.sum() == 7 * 400


def entry(content, tag):
    """Position of the directory entry of a tag."""
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    positions = range(start + 2, start + 2 + 12 * entries, 12)
    return next(position for position in positions if struct.unpack_from("<H", content, position)[0] == tag)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "small.tif", nodata=0, height=12, width=10, blockysize=4)


@pytest.mark.parametrize("tag", sorted(plain_tiff._TAGS - {plain_tiff._GEO_DOUBLES}))
@pytest.mark.parametrize(
    ("field", "value"),
    [(0, 50_000), (2, 1), (2, 13), (4, 0), (4, 2), (4, 2**32 - 1), (8, 0), (8, 3), (8, 600), (8, 0xFFFF0003)],
)
def test_a_hostile_directory_is_read_as_rasterio_reads_it_or_refused(tmp_path, small_file, tag, field, value):
    read_geotiff(small_file)  # from now on the CRS is known
    content = bytearray(small_file.read_bytes())
    struct.pack_into("<H" if field < 4 else "<I", content, entry(content, tag) + field, value)
    path = tmp_path / "hostile.tif"
    path.write_bytes(content)
    assert_equals_rasterio(path)


def test_strips_in_another_order_are_read_as_rasterio_reads_them(tmp_path, small_file):
    content = bytearray(small_file.read_bytes())
    (table,) = struct.unpack_from("<I", content, entry(content, 273) + 8)
    first, second, third = struct.unpack_from("<3I", content, table)
    struct.pack_into("<3I", content, table, second, first, third)
    path = tmp_path / "reordered.tif"
    path.write_bytes(content)
    read_geotiff(small_file)
    assert_equals_rasterio(path)
    assert read_geotiff(path).values.tobytes() != read_geotiff(small_file).values.tobytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=3))
def test_damage_is_read_as_rasterio_reads_it_or_refused(tmp_path, small_file, changes):
    read_geotiff(small_file)
    content = bytearray(small_file.read_bytes())
    samples = entry(content, 277)
    for position, value in changes:
        assume(position not in range(samples, samples + 12))  # rasterio takes minutes to refuse 65,535 bands
        content[position] = value
    path = tmp_path / "damaged.tif"
    path.write_bytes(content)
    assert_equals_rasterio(path)


@pytest.mark.parametrize("options", [{}, {"compress": "deflate"}, {"bigtiff": "YES"}], ids=str)
def test_no_beginning_of_a_file_passes_for_the_whole(tmp_path, options):
    path = write(tmp_path / "a.tif", **options)
    read_geotiff(path)  # from now on the CRS is known
    content = path.read_bytes()
    for length in {*range(0, len(content), 37), *range(len(content) - 9, len(content))}:
        path.write_bytes(content[:length])
        for read in (read_geotiff, lambda path: read_pixels(path, (60, 40), "uint16")):
            with pytest.raises(PairError, match="cannot be read as GeoTIFF") as caught:
                read(path)
            assert str(path) in str(caught.value)


def test_a_second_directory_is_left_to_rasterio(plain):
    content = bytearray(plain.read_bytes())
    (entries,) = struct.unpack_from("<H", content, 8)
    struct.pack_into("<I", content, 10 + 12 * entries, 8)
    plain.write_bytes(content)
    assert plain_tiff.open_plain(plain) is None


def test_text_that_is_none_is_an_error_that_names_the_file(tmp_path):
    plain = write(tmp_path / "plain.tif", crs=NO_CODE)  # its name is then taken from the text
    content = bytearray(plain.read_bytes())
    length, position = struct.unpack_from("<II", content, entry(content, TEXT_TAG) + 4)
    content[position : position + length - 1] = b"\xff" * (length - 1)
    plain.write_bytes(content)
    assert by_rasterio(plain) is None
    assert_equals_rasterio(plain)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"count": 2}, "expected 2 bands of 60x40 pixels in uint16, found 1 of 60x40 in uint16"),
        ({"size": (40, 60)}, "expected 1 band of 40x60 pixels in uint16, found 1 of 60x40 in uint16"),
        ({"dtype": "int16"}, "expected 1 band of 60x40 pixels in int16, found 1 of 60x40 in uint16"),
        (
            {"dtype": ("uint8", "int16")},
            "expected 1 band of 60x40 pixels in uint8 or int16, found 1 of 60x40 in uint16",
        ),
    ],
)
def test_what_is_not_as_expected_is_named(plain, known, expected, message):
    if known:
        read_geotiff(plain)
    with pytest.raises(PairError, match=message) as caught:
        read_geotiff(plain, **expected)
    assert str(plain) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.tif", "plain.tif/missing.tif"])
def test_a_missing_file_is_named_with_what_lies_beside_it(plain, name):
    with pytest.raises(PairError, match=r"no such file; .* holds") as caught:
        read_geotiff(plain.parent / name)
    assert str(plain.parent / name) in str(caught.value)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(PairError, match=r"cannot be read as GeoTIFF \(Is a directory\)") as caught:
        read_geotiff(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_one_may_not_read_is_named(plain, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(plain_tiff.os, "open", refuse)
    with pytest.raises(PairError, match=r"\(Permission denied\). Check who may read it") as caught:
        read_geotiff(plain)
    assert str(plain) in str(caught.value)


def test_a_file_of_another_format_is_not_opened(tmp_path, plain):
    path = tmp_path / "virtual.tif"
    path.write_text(
        '<VRTDataset rasterXSize="40" rasterYSize="60"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{plain}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    assert by_rasterio(path) is not None
    with pytest.raises(PairError, match="cannot be read as GeoTIFF"):
        read_geotiff(path)


def test_large_files_are_left_to_rasterio_without_reading_them_first(plain, monkeypatch):
    monkeypatch.setattr(plain_tiff, "_BYTES_LIMIT", plain.stat().st_size - 1)
    assert plain_tiff.open_plain(plain) is None
    assert_equals_rasterio(plain)


@pytest.mark.parametrize(("crs", "pixel"), [("EPSG:32633", 10.0), ("EPSG:4326", 9e-5)], ids=["metres", "degrees"])
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (-1, 0), (0, -1)], ids=str)
@pytest.mark.parametrize("allowed", [1, 26])
def test_patches_are_of_one_place_up_to_so_many_optical_pixels(crs, pixel, shift, allowed):
    def patch_at(pixels):
        return Patch(
            np.zeros((1, 4, 4)), crs, (pixel, 0, pixels * shift[0] * pixel, 0, -pixel, pixels * shift[1] * pixel)
        )

    paths = Path("s1.tif"), Path("s2.tif")
    require_same_footprint(paths[0], patch_at(allowed - 0.5), paths[1], patch_at(0), allowed)
    with pytest.raises(PairError, match=r"s1\.tif and s2\.tif are not the same place: upper left corners"):
        require_same_footprint(paths[0], patch_at(allowed + 0.5), paths[1], patch_at(0), allowed)


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48", "2017-06-13T16:50:43Z"),
        ("S2A_MSIL2A_20170230T101031_87_48", None),
        ("S2A_MSIL2A_20180204T94161_57_38", None),
    ],
)
def test_acquisition_times_come_from_names_that_hold_a_valid_one(name, time):
    assert acquisition_time(name) == time


@pytest.mark.real_data
@pytest.mark.parametrize("archive", ["reben", "bigearthnet_v1"])
def test_real_files_are_plain_and_read_as_rasterio_reads_them(archive):
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    files = sorted(Path(folder, archive).glob("**/*.tif"))
    assert len(files) in (6 * 14, 12 * 14)
    for path in files:
        assert plain_tiff.open_plain(path) is not None
        assert_equals_rasterio(path)
