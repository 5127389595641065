import os
import pickle
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.shutil import copy
from rasterio.transform import from_origin
from rasterio.warp import transform

from fusmae_hf.data.checks import check_pair
from fusmae_hf.errors import PairError
from fusmae_hf.readers.paired_geotiffs import PairedGeoTIFFs

UTM = "EPSG:32632"
CORNER = from_origin(500_000, 5_000_000, 10, 10)
PATTERNS = {"sar": "s1/{id}.tif", "optical": "s2/{id}.tif"}
BANDS = {
    "sar_bands": ["VV", "VH"],
    "optical_bands": ["B04", "B03", "B02"],
    "sar_units": "db",
    "optical_units": "dn",
}


def write_raster(path, values, grid=CORNER, crs=UTM, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values.shape
    profile |= {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", crs=crs, transform=grid, **profile) as file:
        file.write(values)


def backscatter(height=24, width=24):
    """VV of -12.7 dB and VH 7 dB below, with a decimal that tells pixels apart."""
    texture = np.arange(height * width, dtype=np.float32).reshape(height, width) / 1000
    return np.stack([texture - np.float32(12.7), texture - np.float32(19.7)])


def reflectance(height=24, width=24):
    """Digital numbers: 1000, 2000 and 3000 in bands 1 to 3, plus the number of the pixel."""
    pixel = np.arange(height * width, dtype=np.uint16).reshape(height, width)
    return np.stack([pixel + np.uint16(value) for value in (1000, 2000, 3000)])


def write_pair(root, name="a", sar=None, optical=None, sar_grid=CORNER, optical_grid=CORNER):
    write_raster(root / "s1" / f"{name}.tif", backscatter() if sar is None else sar, sar_grid)
    write_raster(root / "s2" / f"{name}.tif", reflectance() if optical is None else optical, optical_grid)


def open_pairs(root, **options):
    return PairedGeoTIFFs(root, **({} if "manifest" in options else PATTERNS) | BANDS | options)


# Which files are a pair


def test_files_whose_names_agree_are_a_pair_in_sorted_order(tmp_path):
    for name in ("b", "a", "c_1"):
        write_pair(tmp_path, name)
    reader = open_pairs(tmp_path)
    assert reader.ids == ["a", "b", "c_1"]
    assert len(reader) == 3
    assert reader.summary == f"Found 3 pairs of files in {tmp_path}."
    assert reader.split_of(0) is None
    for index in range(3):
        check_pair(reader.read(index), reader.info)


@pytest.mark.parametrize("sensor", ["s1", "s2"])
def test_a_file_without_partner_is_left_out_with_the_missing_name(tmp_path, sensor):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    (tmp_path / sensor / "b.tif").unlink()
    reader = open_pairs(tmp_path)
    assert reader.ids == ["a"]
    assert list(reader.left_out()) == [
        ("b", f"its {'sar' if sensor == 's1' else 'optical'} file {sensor}/b.tif is missing")
    ]


def test_further_fields_must_agree_and_become_columns_or_the_split(tmp_path):
    values = {"train/tile_1/s1_20200101.tif": backscatter(), "train/tile_1/s2_20200101.tif": reflectance()}
    values |= {"test/tile_2/s1_20200102.tif": backscatter(), "test/tile_2/s2_20200102.tif": reflectance()}
    values |= {"test/tile_2/s1_20200103.tif": backscatter(), "test/tile_2/s2_20200104.tif": reflectance()}
    for path, pixels in values.items():
        write_raster(tmp_path / path, pixels)
    reader = open_pairs(tmp_path, sar="{split}/{id}/s1_{date}.tif", optical="{split}/{id}/s2_{date}.tif")
    assert reader.ids == ["tile_1_20200101", "tile_2_20200102"]
    assert [reader.split_of(index) for index in range(2)] == ["train", "test"]
    assert reader.read(1).extra == {"date": "20200102"}
    assert reader.info.extra_columns == {"date": "string"}
    assert [name for name, _ in reader.left_out()] == ["tile_2_20200103", "tile_2_20200104"]
    check_pair(reader.read(1), reader.info)


def test_a_repeated_field_stands_for_the_same_text(tmp_path):
    write_raster(tmp_path / "a/a_s1.tif", backscatter())
    write_raster(tmp_path / "a/a_s2.tif", reflectance())
    write_raster(tmp_path / "b/a_s1.tif", backscatter())
    write_raster(tmp_path / "b/a_s2.tif", reflectance())
    assert open_pairs(tmp_path, sar="{id}/{id}_s1.tif", optical="{id}/{id}_s2.tif").ids == ["a"]


def test_characters_that_mean_something_in_regular_expressions_stand_for_themselves(tmp_path):
    write_raster(tmp_path / "s1+(x)/a.tif", backscatter())
    write_raster(tmp_path / "s2/a.tif", reflectance())
    write_raster(tmp_path / "s2/bXtif", reflectance())
    reader = open_pairs(tmp_path, sar="s1+(x)/{id}.tif")
    assert (reader.ids, list(reader.left_out())) == (["a"], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sar": "s1/a.tif"}, r"needs a field \{id\}"),
        ({"sar": "s1/{id}_{}.tif"}, "plain names"),
        ({"sar": "s1/{id.__class__}.tif"}, "plain names"),
        ({"sar": "s1/{id!r}.tif"}, "below the root"),
        ({"sar": "s1/{id:>4}.tif"}, "below the root"),
        ({"sar": "s1/{id.tif"}, "cannot be understood"),
        ({"sar": "../{id}.tif"}, "below the root"),
        ({"sar": "/s1/{id}.tif"}, "below the root"),
        ({"sar": "s1/{id}_{date}.tif"}, "must have the same fields"),
        ({"label_map": "lc/{id}_{date}.tif"}, "must have the same fields"),
        ({"sar": None}, "Give either the patterns"),
        ({"manifest": "pairs.csv", **PATTERNS}, "Give either the patterns"),
    ],
)
def test_wrong_patterns_are_refused(tmp_path, options, message):
    write_pair(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path, **options)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_pairs(tmp_path / "nowhere")
    write_pair(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"looked for \['s9'\] in .* holds \['s1', 's2'\]"):
        open_pairs(tmp_path, sar="s9/{id}.tif")


def test_no_complete_pair_is_an_error_that_gives_the_reasons(tmp_path):
    write_pair(tmp_path)
    (tmp_path / "s2/a.tif").unlink()
    with pytest.raises(ValueError, match=r"1 were left out, for example a: its optical file s2/a.tif is missing"):
        open_pairs(tmp_path)


def test_two_pairs_of_one_name_are_an_error(tmp_path):
    for split in ("train", "test"):
        write_raster(tmp_path / split / "s1/a.tif", backscatter())
        write_raster(tmp_path / split / "s2/a.tif", reflectance())
    with pytest.raises(ValueError, match=r"several pairs are named \['a'\]"):
        open_pairs(tmp_path, sar="{split}/s1/{id}.tif", optical="{split}/s2/{id}.tif")


# Manifests


def write_manifest(root, text, name="pairs.csv"):
    (root / name).write_text(text, encoding="utf-8")
    return name


def test_a_manifest_gives_splits_labels_times_and_typed_columns(tmp_path):
    write_pair(tmp_path / "data", "x")
    write_pair(tmp_path / "data", "y")
    manifest = write_manifest(
        tmp_path / "data",
        "\ufeffid,sar,optical,split,labels,sar_time,day,country,height,count,rural\n"
        "0002,s1/y.tif,s2/y.tif,,,,2020-05-01,NA,1.5,3,true\n"
        "0001,s1/x.tif,s2/x.tif,test, water ;forest,2020-05-01T05:00:00Z,2020-05-02,AT,,,\n",
    )
    reader = open_pairs(tmp_path, manifest=f"data/{manifest}", class_names=["forest", "water"])
    assert reader.ids == ["0001", "0002"]
    first, second = reader.read(0), reader.read(1)
    assert (first.split, second.split) == ("test", None)
    assert (first.labels, second.labels) == (["water", "forest"], None)
    assert (first.sar_time, first.optical_time) == ("2020-05-01T05:00:00Z", None)
    assert reader.info.extra_columns == {
        "day": "string", "country": "string", "height": "double", "count": "int64", "rural": "bool",
    }  # fmt: skip
    assert second.extra == {"day": "2020-05-01", "country": "NA", "height": 1.5, "count": 3, "rural": True}
    assert first.extra == {"day": "2020-05-02", "country": "AT", "height": None, "count": None, "rural": None}
    for pair in (first, second):
        check_pair(pair, reader.info)


def test_a_parquet_manifest_keeps_its_types(tmp_path):
    write_pair(tmp_path)
    columns = {
        "id": [7],
        "sar": ["s1/a.tif"],
        "optical": ["s2/a.tif"],
        "optical_time": pa.array([1_588_309_200], pa.timestamp("s")),
        "code": ["007"],
        "slope": pa.array([1.5], pa.float32()),
        "year": pa.array([2020], pa.uint16()),
        "kind": pa.array(["field"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    reader = open_pairs(tmp_path, manifest="pairs.parquet")
    pair = reader.read(0)
    assert (pair.id, pair.optical_time) == ("7", "2020-05-01T05:00:00")
    assert pair.extra == {"code": "007", "slope": 1.5, "year": 2020, "kind": "field"}
    assert reader.info.extra_columns == {"code": "string", "slope": "double", "year": "int64", "kind": "string"}
    check_pair(pair, reader.info)


def test_a_listed_file_that_is_missing_leaves_its_pair_out(tmp_path):
    write_pair(tmp_path)
    manifest = write_manifest(tmp_path, "id,sar,optical\na,s1/a.tif,s2/a.tif\nb,s1/b.tif,nowhere/b.tif\n")
    reader = open_pairs(tmp_path, manifest=manifest)
    assert reader.ids == ["a"]
    ((name, reason),) = reader.left_out()
    assert name == "b"
    assert str(tmp_path / "s1/b.tif") in reason
    assert str(tmp_path / "nowhere/b.tif") in reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,sar\na,s1/a.tif\n", r"lacks the columns \['optical'\]; it has \['id', 'sar'\]"),
        ("id;sar;optical\na;s1/a.tif;s2/a.tif\n", "A manifest is comma-separated"),
        ("", "cannot be read as .csv table"),
        ("id,sar,optical\na,s1/a.tif\n", "cannot be read as .csv table"),
        ("id,sar,optical\na,s1/a.tif,s2/a.tif\na,s1/a.tif,s2/a.tif\n", r"several pairs are named \['a'\]"),
        ("id,sar,optical,x,x\na,s1/a.tif,s2/a.tif,1,2\n", "several columns have the same name"),
        ("id,sar,optical\n,s1/a.tif,s2/a.tif\n", "'id' has empty cells"),
        ("id,sar,optical,split\na,s1/a.tif,s2/a.tif,val\n", "A split is called 'val'"),
        ("id,sar,optical,labels\na,s1/a.tif,s2/a.tif,lava\n", r"labels \['lava'\] are none of class_names"),
        ("id,sar,optical,sar_time\na,s1/a.tif,s2/a.tif,yesterday\n", "sar_time holds 'yesterday'"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, text, message):
    write_pair(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path, manifest=write_manifest(tmp_path, text), class_names=["water"])


def test_labels_need_class_names(tmp_path):
    write_pair(tmp_path)
    manifest = write_manifest(tmp_path, "id,sar,optical,labels\na,s1/a.tif,s2/a.tif,water\n")
    with pytest.raises(ValueError, match="give class_names"):
        open_pairs(tmp_path, manifest=manifest)


def test_a_parquet_column_of_lists_is_refused(tmp_path):
    table = pa.table({"id": ["a"], "sar": ["s1/a.tif"], "optical": ["s2/a.tif"], "box": [[1, 2]]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=r"column 'box' holds list<"):
        open_pairs(tmp_path, manifest="pairs.parquet")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pairs.csv: no such manifest"):
        open_pairs(tmp_path, manifest="pairs.csv")


# Pixels


def test_pixels_keep_band_order_dtype_and_decimals(tmp_path):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, optical_offset=1000)
    pair = reader.read(0)
    assert (pair.sar.dtype, pair.optical.dtype) == (np.float32, np.uint16)
    np.testing.assert_array_equal(pair.sar, backscatter())
    np.testing.assert_array_equal(pair.optical, reflectance())
    assert reader.info.optical_offset == 1000
    assert (pair.crs, pair.transform) == (UTM, (10, 0, 500_000, 0, -10, 5_000_000))


def test_skipped_bands_are_not_given(tmp_path):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, sar_bands=["-", "VH"], optical_bands=["B04", "-", "B02"])
    pair = reader.read(0)
    assert (reader.info.sar_bands, reader.info.optical_bands) == (("VH",), ("B04", "B02"))
    np.testing.assert_array_equal(pair.sar, backscatter()[1:])
    np.testing.assert_array_equal(pair.optical, reflectance()[::2])


def test_files_without_a_place_are_given_as_they_are(tmp_path):
    for sensor, values in (("s1", backscatter()), ("s2", reflectance())):
        write_raster(tmp_path / sensor / "a.tif", values, rasterio.Affine.identity(), None)
    pair = open_pairs(tmp_path).read(0)
    assert (pair.crs, pair.transform) == (None, None)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    ("sensor", "bands", "message"),
    [("s1", ["VV"], "has 2 bands, but the names of 1"), ("s2", ["B04", "B03"], "has 3 bands, but the names of 2")],
)
def test_another_number_of_bands_is_an_error_that_names_the_file(tmp_path, sensor, bands, message):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, **{"sar_bands" if sensor == "s1" else "optical_bands": bands})
    with pytest.raises(PairError, match=message) as caught:
        reader.read(0)
    assert str(tmp_path / sensor / "a.tif") in str(caught.value)


def test_only_geotiff_is_opened(tmp_path):
    write_pair(tmp_path)
    (tmp_path / "s1/a.tif").rename(tmp_path / "s1/elsewhere.tif")
    copy(tmp_path / "s1/elsewhere.tif", tmp_path / "s1/a.vrt", driver="VRT")
    (tmp_path / "s1/a.vrt").rename(tmp_path / "s1/a.tif")
    with rasterio.open(tmp_path / "s1/a.tif") as file:
        assert file.driver == "VRT"
    with pytest.raises(PairError, match="cannot be read as GeoTIFF"):
        open_pairs(tmp_path).read(0)


def test_complex_pixels_are_refused(tmp_path):
    write_pair(tmp_path, sar=backscatter().astype(np.complex64))
    with pytest.raises(PairError, match="must have one real dtype"):
        open_pairs(tmp_path).read(0)


@pytest.mark.parametrize(
    "options",
    [
        {"sar_bands": ()},
        {"sar_bands": ["VV", "VV"]},
        {"sar_bands": "VV"},
        {"optical_bands": ["-", "-", "-"]},
        {"sar_units": None},
        {"optical_units": "DN"},
        {"on_different_grids": "crop"},
        {"target": "s2"},
        {"resampling": "cubic"},
        {"resolution": 20.0},
        {"resolution": -1.0, "on_different_grids": "warp"},
        {"patch_size": 0},
        {"stride": 5},
        {"max_no_data": 20.0},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_wrong_options_are_named(tmp_path, options):
    write_pair(tmp_path)
    with pytest.raises(ValueError, match=next(iter(options))):
        open_pairs(tmp_path, **options)


# No data


def test_sar_without_data_by_tag_or_keyword_becomes_nan(tmp_path):
    sar = backscatter()
    sar[0, 0, 0] = -9999
    for options, profile in (({}, {"nodata": -9999}), ({"sar_no_data": -9999}, {})):
        write_pair(tmp_path)
        write_raster(tmp_path / "s1/a.tif", sar, **profile)
        pair = open_pairs(tmp_path, max_no_data=1.0, **options).read(0)
        assert np.isnan(pair.sar[0, 0, 0])
        assert np.isnan(pair.sar).sum() == 1
        assert pair.sar.dtype == np.float32


@pytest.mark.parametrize(
    ("tag", "said", "refused"),
    [(-9999, -32768, True), (0, -32768, True), (-32768, -32768, False), (float("nan"), -32768, False)],
)
def test_a_tag_that_contradicts_the_keyword_is_an_error_with_both(tmp_path, tag, said, refused):
    sar = backscatter()
    sar[0, 0, 0], sar[0, 0, 1] = -9999, -32768
    write_pair(tmp_path)
    write_raster(tmp_path / "s1/a.tif", sar, nodata=tag)
    reader = open_pairs(tmp_path, max_no_data=1.0, sar_no_data=said)
    if refused:
        with pytest.raises(PairError, match=f"tag says that {tag} is no data, but --sar-no-data is {said}"):
            reader.read(0)
    else:
        assert np.isnan(reader.read(0).sar[0, 0, :2]).tolist() == [False, True]


@pytest.mark.parametrize(("dtype", "expected"), [(np.uint16, np.float32), (np.int32, np.float64)])
def test_integer_sar_becomes_float_only_where_it_may_lack_data(tmp_path, dtype, expected):
    sar = np.full((2, 24, 24), 30_001, dtype)
    sar[:, 5, 5] = 0
    write_pair(tmp_path, sar=sar)
    assert open_pairs(tmp_path, sar_units="raw").read(0).sar.dtype == dtype
    pair = open_pairs(tmp_path, sar_units="raw", sar_no_data=0, max_no_data=0.1).read(0)
    assert pair.sar.dtype == expected
    assert np.isnan(pair.sar[:, 5, 5]).all()
    assert np.nanmin(pair.sar) == 30_001


def test_zero_power_is_no_data_in_linear_units_alone(tmp_path):
    sar = np.full((2, 24, 24), 0.05, np.float32)
    sar[:, 3, 3] = 0
    write_pair(tmp_path, sar=sar)
    assert np.isnan(open_pairs(tmp_path, sar_units="linear", max_no_data=1.0).read(0).sar).sum() == 2
    assert np.isnan(open_pairs(tmp_path, sar_units="db").read(0).sar).sum() == 0


def test_optical_pixels_without_data_become_zero_in_all_bands(tmp_path):
    optical = reflectance()
    optical[0, 0, 0] = 65535  # one band lacks data
    optical[0, 0, 1] = 0  # dark, but data in the others
    write_pair(tmp_path)
    write_raster(tmp_path / "s2/a.tif", optical, nodata=65535)
    pair = open_pairs(tmp_path, max_no_data=1.0).read(0)
    assert pair.optical[:, 0, 0].tolist() == [0, 0, 0]
    assert pair.optical[:, 0, 1].tolist() == [0, 2001, 3001]
    write_raster(tmp_path / "s2/a.tif", optical, nodata=0)
    pair = open_pairs(tmp_path, max_no_data=1.0).read(0)
    assert pair.optical[0, 0, :2].tolist() == [65535, 0]


def test_optical_nan_becomes_zero_in_all_bands(tmp_path):
    optical = np.full((3, 24, 24), 0.25, np.float32)
    optical[1, 2, 2] = np.nan
    write_pair(tmp_path, optical=optical)
    pair = open_pairs(tmp_path, optical_units="reflectance", max_no_data=1.0).read(0)
    assert pair.optical[:, 2, 2].tolist() == [0, 0, 0]
    assert pair.optical.dtype == np.float32


def test_too_many_pixels_without_data_in_either_sensor_are_refused_with_their_share(tmp_path):
    sar, optical = backscatter(), reflectance()
    sar[1, 0] = np.nan
    optical[:, 1] = 0
    write_pair(tmp_path, sar=sar, optical=optical)
    with pytest.raises(PairError, match=r"8.3% of 576 pixels have no data in SAR or optical, more than max_no_data=0"):
        open_pairs(tmp_path).read(0)
    assert open_pairs(tmp_path, max_no_data=48 / 576).read(0).id == "a"


# Grids


def test_different_grids_are_an_error_that_shows_both_and_says_what_to_pass(tmp_path):
    write_pair(tmp_path, sar_grid=from_origin(500_005, 5_000_000, 10, 10))
    with pytest.raises(PairError, match="on_different_grids='warp'") as caught:
        open_pairs(tmp_path).read(0)
    assert "24x24 px of 10 x 10 from (500005, 5000000) in EPSG:32632" in str(caught.value)
    assert "24x24 px of 10 x 10 from (500000, 5000000) in EPSG:32632" in str(caught.value)


@pytest.mark.parametrize(("shift", "same"), [(0.09, True), (0.11, False)])
def test_grids_are_the_same_within_a_hundredth_of_a_pixel(tmp_path, shift, same):
    write_pair(tmp_path, sar_grid=from_origin(500_000 + shift, 5_000_000, 10, 10))
    reader = open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0)
    assert (reader.read(0).sar == backscatter()).all() == same


def test_a_slightly_larger_pixel_is_another_grid_when_it_adds_up(tmp_path):
    write_pair(tmp_path, sar_grid=from_origin(500_000, 5_000_000, 10.01, 10.01))  # 0.24 px after 24 px
    with pytest.raises(PairError, match="is not on the grid"):
        open_pairs(tmp_path).read(0)


def test_a_shift_of_whole_pixels_is_undone_exactly_and_the_rest_has_no_data(tmp_path):
    write_pair(tmp_path, sar_grid=from_origin(500_030, 4_999_980, 10, 10))  # 3 px east, 2 px south
    reader = open_pairs(tmp_path, on_different_grids="warp", max_no_data=0.2)
    pair = reader.read(0)
    np.testing.assert_allclose(pair.sar[:, 2:, 3:], backscatter()[:, :-2, :-3], atol=1e-5)
    assert np.isnan(pair.sar[:, :2]).all()
    assert np.isnan(pair.sar[:, :, :3]).all()
    np.testing.assert_array_equal(pair.optical, reflectance())
    check_pair(pair, reader.info)


def test_half_a_pixel_of_shift_takes_the_mean_of_the_neighbours(tmp_path):
    ramp = np.broadcast_to(np.arange(24, dtype=np.float32), (2, 24, 24))
    write_pair(tmp_path, sar=ramp.copy(), sar_grid=from_origin(500_005, 5_000_000, 10, 10))
    pair = open_pairs(tmp_path, sar_units="raw", on_different_grids="warp", max_no_data=1.0).read(0)
    np.testing.assert_allclose(pair.sar[0, 5, 1:], np.arange(23) + 0.5, atol=1e-4)


def test_backscatter_in_db_is_averaged_as_power(tmp_path):
    checkerboard = np.where(np.indices((24, 24)).sum(axis=0) % 2, -5, -25).astype(np.float32)
    write_pair(tmp_path, sar=np.stack([checkerboard] * 2), sar_grid=from_origin(500_005, 4_999_995, 10, 10))
    pair = open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0).read(0)
    mean_power = 10 * np.log10((10**-0.5 + 10**-2.5) / 2)
    np.testing.assert_allclose(pair.sar[:, 2:-2, 2:-2], mean_power, atol=1e-3)
    assert mean_power == pytest.approx(-7.97, abs=0.01)  # the mean of the dB is -15
    nearest = open_pairs(tmp_path, on_different_grids="warp", resampling="nearest", max_no_data=1.0).read(0)
    assert set(np.unique(nearest.sar[:, 2:-2, 2:-2])) == {-5, -25}


def test_no_data_neither_spreads_nor_leaks_into_the_mean(tmp_path):
    sar = np.full((2, 24, 24), -10, np.float32)
    sar[0, 12, 12] = -9999
    write_pair(tmp_path)
    write_raster(tmp_path / "s1/a.tif", sar, from_origin(500_003, 4_999_997, 10, 10), nodata=-9999)
    pair = open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0).read(0)
    inner = pair.sar[:, 1:-1, 1:-1]
    assert np.isnan(inner[0]).sum() == 1
    assert np.isnan(inner[1]).sum() == 0
    np.testing.assert_allclose(inner[np.isfinite(inner)], -10, atol=1e-4)


def smooth(x, y):
    """A pattern on the ground with a gradient everywhere: sums of sines of 70 and 90 m by UTM coordinates."""
    return np.sin(x / 70) + np.cos(y / 90)


def ground(grid, height, width, crs):
    """UTM coordinates of the centre of each pixel."""
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    columns, rows = columns.ravel(), rows.ravel()
    x, y = grid.a * columns + grid.b * rows + grid.c, grid.d * columns + grid.e * rows + grid.f
    x, y = transform(crs, UTM, x, y)
    return np.reshape(x, (height, width)), np.reshape(y, (height, width))


@pytest.mark.parametrize("patch_size", [None, 64])
def test_sar_in_degrees_lands_on_the_optical_grid_within_a_tenth_of_a_pixel(tmp_path, patch_size):
    (longitude,), (latitude,) = transform(UTM, "EPSG:4326", [499_500], [5_000_500])
    degrees = from_origin(longitude, latitude, 1.1e-4, 0.9e-4)
    sar = smooth(*ground(degrees, 260, 260, "EPSG:4326")).astype(np.float32)
    write_raster(tmp_path / "s1/a.tif", np.stack([sar, sar]), degrees, "EPSG:4326")
    write_raster(tmp_path / "s2/a.tif", np.ones((3, 128, 128), np.uint16))
    reader = open_pairs(tmp_path, sar_units="raw", on_different_grids="warp", patch_size=patch_size)
    for index in range(len(reader)):
        pair = reader.read(index)
        x, y = ground(rasterio.Affine(*pair.transform), *pair.sar.shape[1:], UTM)
        expected = smooth(x, y)
        slope_y, slope_x = np.gradient(expected)
        slopes = np.stack([slope_x.ravel(), slope_y.ravel()], axis=1)
        shift, *_ = np.linalg.lstsq(slopes, (pair.sar[0] - expected).ravel(), rcond=None)
        assert np.abs(shift).max() < 0.1
        assert np.abs(pair.sar[0] - expected).max() < 0.05
        assert pair.crs == UTM


def test_optical_lands_on_the_sar_grid_on_request_and_keeps_its_dtype(tmp_path):
    write_pair(tmp_path, optical_grid=from_origin(500_050, 5_000_000, 10, 10))
    pair = open_pairs(tmp_path, on_different_grids="warp", target="sar", max_no_data=0.3).read(0)
    np.testing.assert_array_equal(pair.sar, backscatter())
    np.testing.assert_array_equal(pair.optical[:, :, 5:], reflectance()[:, :, :-5])
    assert (pair.optical[:, :, :5] == 0).all()
    assert pair.optical.dtype == np.uint16
    assert pair.transform[2] == 500_000


def test_resampled_digital_numbers_are_rounded(tmp_path):
    ramp = np.broadcast_to(np.arange(1, 25, dtype=np.uint16), (3, 24, 24))
    write_pair(tmp_path, optical=ramp.copy(), optical_grid=from_origin(500_002.5, 5_000_000, 10, 10))
    pair = open_pairs(tmp_path, on_different_grids="warp", target="sar", max_no_data=1.0).read(0)
    assert pair.optical[0, 5, 1:].tolist() == list(range(2, 25))  # 1.75, 2.75, ...


def test_another_resolution_of_the_target_grid_averages_into_larger_pixels(tmp_path):
    optical = np.stack([np.where(np.indices((24, 24)).sum(axis=0) % 2, 1000, 3000)] * 3).astype(np.uint16)
    write_pair(tmp_path, sar=np.full((2, 24, 24), -10, np.float32), optical=optical)
    reader = open_pairs(tmp_path, on_different_grids="warp", resolution=20)
    pair = reader.read(0)
    assert (pair.sar.shape, pair.optical.shape) == ((2, 12, 12), (3, 12, 12))
    assert np.unique(pair.optical[:, 1:-1, 1:-1]).tolist() == [2000]
    np.testing.assert_allclose(pair.sar, -10, atol=1e-4)
    assert pair.transform == (20, 0, 500_000, 0, -20, 5_000_000)


def test_files_that_do_not_overlap_are_an_error_that_shows_both_grids(tmp_path):
    write_pair(tmp_path, sar_grid=from_origin(510_000, 5_000_000, 10, 10))
    with pytest.raises(PairError, match=r"barely meet: they share 0.0% .*\(510000, 5000000\).*\(500000, 5000000\)"):
        open_pairs(tmp_path, on_different_grids="warp", max_no_data=1.0).read(0)


def test_a_file_without_a_crs_cannot_be_resampled(tmp_path):
    write_pair(tmp_path)
    write_raster(tmp_path / "s1/a.tif", backscatter(), from_origin(5, 5, 1, 1), None)
    with pytest.raises(PairError, match="cannot be resampled without a CRS"):
        open_pairs(tmp_path, on_different_grids="warp").read(0)


# Label maps


def write_classes(root, values, grid=CORNER, **profile):
    write_pair(root)
    write_raster(root / "lc/a.tif", values[None], grid, **profile)


def test_label_maps_are_given_and_unknown_codes_refused(tmp_path):
    classes = np.zeros((24, 24), np.uint8)
    classes[0, 0], classes[1, 1] = 1, 255
    write_classes(tmp_path, classes)
    options = {"label_map": "lc/{id}.tif", "map_class_names": ["land", "water"]}
    reader = open_pairs(tmp_path, map_no_data=255, **options)
    pair = reader.read(0)
    np.testing.assert_array_equal(pair.label_map, classes)
    check_pair(pair, reader.info)
    with pytest.raises(PairError, match=r"lc/a.tif: holds the codes \[255\], but the classes are 0 to 1"):
        open_pairs(tmp_path, **options).read(0)


def test_a_label_map_may_stand_for_several_dates(tmp_path):
    for date in ("1", "2"):
        write_raster(tmp_path / f"s1/a_{date}.tif", backscatter())
        write_raster(tmp_path / f"s2/a_{date}.tif", reflectance())
    write_raster(tmp_path / "lc/a.tif", np.ones((1, 24, 24), np.uint8))
    reader = open_pairs(tmp_path, sar="s1/{id}_{date}.tif", optical="s2/{id}_{date}.tif", label_map="lc/{id}.tif")
    assert reader.ids == ["a_1", "a_2"]
    assert reader.read(1).label_map.max() == 1


def test_a_pair_without_its_label_map_is_left_out(tmp_path):
    write_classes(tmp_path, np.zeros((24, 24), np.uint8))
    write_pair(tmp_path, "b")
    reader = open_pairs(tmp_path, label_map="lc/{id}.tif")
    assert list(reader.left_out()) == [("b", "its label map lc/b.tif is missing")]


def test_label_maps_are_resampled_to_the_nearest_pixel_and_marked_outside(tmp_path):
    classes = np.where(np.arange(12) % 2, 7, 3).astype(np.uint8) * np.ones((12, 1), np.uint8)
    write_classes(tmp_path, classes, from_origin(500_000, 5_000_000, 18, 20))  # ends 24 m before the patch does
    options = {"label_map": "lc/{id}.tif", "on_different_grids": "warp"}
    label_map = open_pairs(tmp_path, map_no_data=255, **options).read(0).label_map
    assert label_map.dtype == np.uint8
    assert set(np.unique(label_map[:, :21])) == {3, 7}
    assert np.unique(label_map[:, 22:]).tolist() == [255]
    with pytest.raises(PairError, match="does not cover the whole patch: give map_no_data"):
        open_pairs(tmp_path, **options).read(0)


def test_maps_of_a_quantity_need_units_and_may_hold_nan(tmp_path):
    write_classes(tmp_path, np.where(np.eye(24) > 0, -1, 12.5).astype(np.float32), nodata=-1)
    reader = open_pairs(tmp_path, label_map="lc/{id}.tif", map_units="t/ha")
    pair = reader.read(0)
    assert np.isnan(pair.label_map).sum() == 24
    assert np.nanmax(pair.label_map) == 12.5
    check_pair(pair, reader.info)
    with pytest.raises(PairError, match="need map_units"):
        open_pairs(tmp_path, label_map="lc/{id}.tif").read(0)


# Windows


def test_windows_are_named_after_their_corner_and_cut_all_rasters_alike(tmp_path):
    classes = np.arange(24 * 24, dtype=np.uint16).reshape(24, 24)
    write_classes(tmp_path, classes)
    reader = open_pairs(tmp_path, label_map="lc/{id}.tif", patch_size=12)
    assert reader.ids == ["a_00000_00000", "a_00000_00012", "a_00012_00000", "a_00012_00012"]
    assert "1 pairs of files" in reader.summary
    assert "4 windows of 12x12 px every 12 px" in reader.summary
    pair = reader.read(2)
    np.testing.assert_array_equal(pair.sar, backscatter()[:, 12:, :12])
    np.testing.assert_array_equal(pair.optical, reflectance()[:, 12:, :12])
    np.testing.assert_array_equal(pair.label_map, classes[12:, :12])
    assert pair.extra == {"scene": "a", "row": 12, "col": 0}
    assert pair.transform == (10, 0, 500_000, 0, -10, 5_000_000 - 120)
    check_pair(pair, reader.info)


@pytest.mark.parametrize("resolution", [None, 1.0, 40.0])
def test_windows_of_resampled_scenes_equal_the_scene_cut_afterwards(tmp_path, resolution):
    write_pair(tmp_path, sar_grid=from_origin(499_996, 5_000_007, 9, 11))
    options = {"on_different_grids": "warp", "max_no_data": 1.0, "resolution": resolution}
    whole = open_pairs(tmp_path, **options).read(0)
    size = whole.sar.shape[1] // 3
    reader = open_pairs(tmp_path, patch_size=size, **options)
    assert len(reader) == 9
    for index in range(9):
        pair = reader.read(index)
        row, column = pair.extra["row"], pair.extra["col"]
        expected = whole.sar[:, row : row + size, column : column + size]
        np.testing.assert_allclose(pair.sar, expected, atol=5e-4)  # GDAL's kernel depends on the window a little


def test_a_stride_below_the_window_size_makes_windows_overlap_and_drops_the_remainder(tmp_path):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, patch_size=10, stride=5)
    corners = [(reader.read(index).extra["row"], reader.read(index).extra["col"]) for index in range(len(reader))]
    assert corners == [(row, column) for row in (0, 5, 10) for column in (0, 5, 10)]  # 24 px: 4 remain
    np.testing.assert_array_equal(reader.read(1).sar[:, :, :5], reader.read(0).sar[:, :, 5:])


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), size=st.integers(1, 9), blocks=st.sampled_from([None, 16]))
@settings(max_examples=20, deadline=None)
def test_windows_tile_a_scene_without_loss_where_their_size_divides_it(rows, columns, size, blocks):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sar, optical = backscatter(rows * size, columns * size), reflectance(rows * size, columns * size)
        profile = {} if blocks is None else {"tiled": True, "blockxsize": blocks, "blockysize": blocks}
        write_raster(root / "s1/a.tif", sar, **profile)
        write_raster(root / "s2/a.tif", optical, **profile)
        reader = open_pairs(root, patch_size=size)
        assert len(reader) == len(set(reader.ids)) == rows * columns
        joined = np.full_like(sar, np.nan)
        for index in range(len(reader)):
            pair = reader.read(index)
            row, column = pair.extra["row"], pair.extra["col"]
            joined[:, row : row + size, column : column + size] = pair.sar
            assert (pair.optical == optical[:, row : row + size, column : column + size]).all()
        np.testing.assert_array_equal(joined, sar)


def test_windows_of_several_scenes_belong_to_their_scene(tmp_path):
    manifest = "id,sar,optical,split,tile\n"
    for name, side, split in (("b", 24, "train"), ("small", 8, "train"), ("a", 12, "test")):
        write_pair(tmp_path, name, backscatter(side, side), reflectance(side, side))
        manifest += f"{name},s1/{name}.tif,s2/{name}.tif,{split},T{name}\n"
    reader = open_pairs(tmp_path, manifest=write_manifest(tmp_path, manifest), patch_size=12)
    assert [reader.split_of(index) for index in range(len(reader))] == ["test"] + ["train"] * 4
    pairs = [reader.read(index) for index in (4, 0, 3)]
    assert [pair.id for pair in pairs] == ["b_00012_00012", "a_00000_00000", "b_00012_00000"]
    assert [pair.extra["tile"] for pair in pairs] == ["Tb", "Ta", "Tb"]
    assert list(reader.left_out()) == [("small", "8x8 px are less than a window of 12 px")]
    assert reader.read(-1).id == reader.ids[-1]
    with pytest.raises(IndexError):
        reader.read(5)


def test_the_share_without_data_is_that_of_the_window(tmp_path):
    sar = backscatter()
    sar[:, :12, :6] = np.nan
    write_pair(tmp_path, sar=sar)
    reader = open_pairs(tmp_path, patch_size=12)
    with pytest.raises(PairError, match=r"50.0% of 144 pixels"):
        reader.read(0)
    assert reader.read(1).id == "a_00000_00012"


def test_a_scene_whose_header_cannot_be_read_is_left_out_with_the_reason(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    (tmp_path / "s2/b.tif").write_bytes(b"nonsense")
    reader = open_pairs(tmp_path, patch_size=24)
    assert reader.ids == ["a_00000_00000"]
    ((name, reason),) = reader.left_out()
    assert name == "b"
    assert "cannot be read as GeoTIFF" in reason


def test_listing_windows_reads_no_pixels_and_one_header_a_scene(tmp_path, monkeypatch):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    opened = []
    original = rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda path, **options: opened.append(path) or original(path, **options))
    reader = open_pairs(tmp_path, patch_size=6)
    assert [path.name for path in opened] == ["a.tif", "a.tif", "a.tif", "b.tif"]  # the first two: what they declare
    opened.clear()
    for index in range(len(reader)):
        reader.read(index)
    assert len(opened) == 4  # two files of each scene, though each has 16 windows
    opened.clear()
    whole = open_pairs(tmp_path)
    assert len(opened) == 2
    opened.clear()
    whole.read(0)
    assert len(opened) == 2


def test_manifest_columns_that_windows_need_are_refused(tmp_path):
    write_pair(tmp_path)
    manifest = write_manifest(tmp_path, "id,sar,optical,row\na,s1/a.tif,s2/a.tif,1\n")
    with pytest.raises(ValueError, match=r"extra columns \['row'\]"):
        open_pairs(tmp_path, manifest=manifest, patch_size=12)


@pytest.mark.parametrize("patch_size", [None, 12])
def test_a_reader_survives_pickling_even_with_open_files(tmp_path, patch_size):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, patch_size=patch_size)
    before = reader.read(0)
    again = pickle.loads(pickle.dumps(reader)).read(0)
    np.testing.assert_array_equal(again.sar, before.sar)


def test_each_thread_keeps_files_of_its_own_open(tmp_path, monkeypatch):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")
    reader = open_pairs(tmp_path, patch_size=24)
    reader.read(0)
    other = threading.Thread(target=reader.read, args=[1])
    other.start()
    other.join()
    monkeypatch.setattr(rasterio, "open", lambda path, **options: pytest.fail(f"{path} was opened again"))
    assert reader.read(0).id == "a_00000_00000"


def test_a_process_does_not_use_files_that_another_one_opened(tmp_path, monkeypatch):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, patch_size=12)
    reader.read(0)
    opened = []
    original = rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda path, **options: opened.append(path) or original(path, **options))
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as after a fork
    reader.read(1)
    assert len(opened) == 2


# Real imagery


@pytest.fixture(scope="module")
def real_data():
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    return Path(folder)


@pytest.mark.real_data
def test_terramesh_files_lie_on_one_grid_and_are_plausible(real_data):
    reader = PairedGeoTIFFs(
        real_data / "terramesh",
        sar="S1RTC/{id}.tif",
        optical="S2L2A/{id}.tif",
        label_map="LULC/{id}.tif",
        sar_bands=["VV", "VH"],
        optical_bands=["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"],
        sar_units="db",
        optical_units="dn",
        patch_size=112,
    )
    assert len(reader) == 8
    assert list(reader.left_out()) == []
    for index in range(8):
        pair = reader.read(index)
        check_pair(pair, reader.info)
        assert (pair.sar.dtype, pair.optical.dtype) == (np.float64, np.int16)
        vv, vh = pair.sar.mean(axis=(1, 2))
        assert 4 < vv - vh < 12


@pytest.mark.real_data
def test_real_sar_lands_on_the_grid_of_the_optical_bands(real_data, tmp_path):
    """SSL4EO-S12 v1.0, in whose files the pixels of the two sensors differ by 0.7 %."""
    folders = {"s1": (("VV", "VH"), "S1A_IW_GRDH_1SDV_20200607*"), "s2": (("B4", "B3", "B2", "B8"), "20200604*")}
    for sensor, (bands, scene) in folders.items():
        (folder,) = (real_data / "ssl4eo_s12" / ("s1" if sensor == "s1" else "s2a") / "0000200").glob(scene)
        files = [rasterio.open(folder / f"{band}.tif") for band in bands]
        write_raster(
            tmp_path / sensor / "a.tif", np.stack([file.read(1) for file in files]), files[0].transform, files[0].crs
        )
    options = {"optical_bands": ["B04", "B03", "B02", "B08"], "max_no_data": 0.1}
    with pytest.raises(PairError, match="is not on the grid"):
        open_pairs(tmp_path, **options).read(0)
    reader = open_pairs(tmp_path, on_different_grids="warp", **options)
    pair = reader.read(0)
    check_pair(pair, reader.info)
    assert pair.sar.shape[1:] == pair.optical.shape[1:] == (264, 264)
    with rasterio.open(tmp_path / "s1/a.tif") as file:
        original = file.read()
    finite = np.isfinite(pair.sar).all(axis=0)
    assert finite.mean() > 0.95
    difference = pair.sar[:, finite].mean(axis=1) - original.mean(axis=(1, 2))
    assert np.abs(difference).max() < 0.3  # dB
