import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio

from fusmae_hf.data.checks import check_pair
from fusmae_hf.errors import PairError
from fusmae_hf.plots.pairs import plot_pair
from fusmae_hf.readers import biomassters
from fusmae_hf.readers.biomassters import OPTICAL_BANDS, BioMassters

VV_ASCENDING, VH_ASCENDING, VV_DESCENDING, VH_DESCENDING = -10.25, -16.5, -11.75, -17.25
MISSING = -9999.0
CLOUDY_ROWS = 64  # of 256: a quarter of the pixels


def write_chip(path, values):
    """Write (bands, 256, 256) without a CRS, as the dataset does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": 256, "width": 256, "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", compress="deflate", **profile) as file:
            file.write(values)


def sar_file(*decibels):
    values = np.empty((4, 256, 256), np.float32)
    values[:] = np.reshape(decibels, (4, 1, 1))
    values[:, 0, 0] = MISSING
    return values


def optical_file(cloud_rows=0):
    """Band number `n` (from 0) holds 100 * (n + 1); the last band is the cloud probability."""
    values = np.empty((11, 256, 256), np.uint16)
    values[:] = (100 * np.arange(1, 12, dtype=np.uint16)).reshape(11, 1, 1)
    values[10] = 50
    values[10, :cloud_rows] = 51
    return values


def write_month(folder, chip, month, cloud_rows=0, sar=(VV_ASCENDING, VH_ASCENDING, VV_DESCENDING, VH_DESCENDING)):
    write_chip(folder / f"{chip}_S1_{month}.tif", sar_file(*sar))
    write_chip(folder / f"{chip}_S2_{month}.tif", optical_file(cloud_rows))


def write_biomass(folder, chip, value):
    write_chip(folder / f"{chip}_agbm.tif", np.full((1, 256, 256), value, np.float32))


def make_biomassters(root):
    """Two training chips (the second lacks the optical file of month 03), one test chip without biomass."""
    write_month(root / "train_features", "b0a1c2d3", "00")
    write_month(root / "train_features", "b0a1c2d3", "11", cloud_rows=CLOUDY_ROWS)
    write_month(root / "train_features", "0060c0a5", "03")
    write_month(root / "train_features", "0060c0a5", "04", sar=(MISSING, MISSING, VV_DESCENDING, VH_DESCENDING))
    (root / "train_features" / "0060c0a5_S2_03.tif").unlink()
    write_biomass(root / "train_agbm", "b0a1c2d3", 76.5)
    write_biomass(root / "train_agbm", "0060c0a5", 12.25)
    write_month(root / "test_features", "ffff0000", "05")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("biomassters")
    make_biomassters(root)
    return root


def read(reader, name):
    return reader.read(reader.ids.index(name))


def test_a_pair_is_a_chip_and_month_of_which_both_sensors_are_on_disk(archive):
    reader = BioMassters(archive)
    assert reader.ids == ["0060c0a5_04", "b0a1c2d3_00", "b0a1c2d3_11", "ffff0000_05"]
    assert len(reader) == 4
    assert reader.summary == f"Found 4 pairs of 3 chips in {archive}."


def test_the_split_is_that_of_the_folder(archive):
    reader = BioMassters(archive)
    assert [reader.split_of(index) for index in range(4)] == ["train", "train", "train", "test"]
    assert [reader.read(index).split for index in range(4)] == ["train", "train", "train", "test"]


def test_a_month_of_one_sensor_alone_is_left_out_with_the_missing_file(archive):
    assert list(BioMassters(archive).left_out()) == [("0060c0a5_03", "0060c0a5_S2_03.tif is missing")]


@pytest.mark.parametrize(
    ("orbit", "expected"),
    [("ascending", (VV_ASCENDING, VH_ASCENDING)), ("descending", (VV_DESCENDING, VH_DESCENDING))],
)
def test_the_orbit_decides_which_bands_are_vv_and_vh(archive, orbit, expected):
    pair = read(BioMassters(archive, orbit=orbit), "b0a1c2d3_00")
    assert pair.sar.dtype == np.float32
    assert pair.sar[:, 10, 10].tolist() == list(expected)
    assert pair.extra["orbit"] == orbit


def test_missing_backscatter_becomes_nan(archive):
    sar = read(BioMassters(archive), "b0a1c2d3_00").sar
    assert np.isnan(sar[:, 0, 0]).all()
    assert np.isnan(sar).sum() == 2


def test_a_month_without_a_pass_in_the_orbit_has_no_data(archive):
    reader = BioMassters(archive, orbit="ascending")
    with pytest.raises(PairError, match="sar has no data"):
        check_pair(read(reader, "0060c0a5_04"), reader.info)


def test_optical_bands_lie_in_the_order_of_their_names_without_the_cloud_probability(archive):
    reader = BioMassters(archive)
    pair = read(reader, "b0a1c2d3_00")
    assert " ".join(reader.info.optical_bands) == "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12"
    assert pair.optical.dtype == np.uint16
    assert pair.optical[:, 5, 5].tolist() == list(range(100, 1001, 100))


def test_biomass_is_the_label_map_and_may_be_absent_from_a_split(archive):
    reader = BioMassters(archive)
    assert reader.info.map_units == "t/ha"
    biomass = read(reader, "b0a1c2d3_00").label_map
    assert (biomass.dtype, np.unique(biomass).tolist()) == (np.float32, [76.5])
    assert read(reader, "ffff0000_05").label_map is None


def test_a_chip_without_biomass_among_others_is_left_out_with_the_reason(own_archive):
    (own_archive / "train_agbm" / "0060c0a5_agbm.tif").unlink()
    reasons = dict(BioMassters(own_archive).left_out())
    assert reasons["0060c0a5_04"] == "its biomass map 0060c0a5_agbm.tif is missing"


def test_extra_columns_say_chip_month_and_cloud_share(archive):
    reader = BioMassters(archive)
    extra = read(reader, "b0a1c2d3_11").extra
    assert extra == {"chip": "b0a1c2d3", "month": 11, "orbit": "ascending", "cloud_share": 0.25}
    assert extra.keys() == reader.info.extra_columns.keys()


def test_a_cloud_probability_of_50_percent_is_not_cloudy(archive):
    assert read(BioMassters(archive), "b0a1c2d3_00").extra["cloud_share"] == 0


def test_pixels_without_a_cloud_probability_do_not_count(own_archive):
    values = optical_file(CLOUDY_ROWS)
    values[10, 128:] = 255
    write_chip(own_archive / "train_features" / "b0a1c2d3_S2_11.tif", values)
    assert read(BioMassters(own_archive), "b0a1c2d3_11").extra["cloud_share"] == 0.5


def test_max_cloud_refuses_cloudier_pairs_and_says_how_cloudy_they_are(archive):
    with pytest.raises(PairError, match=r"b0a1c2d3_S2_11.tif: 25.0% are cloudy, but at most 24.0%"):
        read(BioMassters(archive, max_cloud=0.24), "b0a1c2d3_11")
    assert read(BioMassters(archive, max_cloud=0.25), "b0a1c2d3_11").extra["cloud_share"] == 0.25


def test_unknown_clouds_are_refused_with_max_cloud_and_given_as_none_without(own_archive):
    values = optical_file()
    values[10] = 255
    write_chip(own_archive / "train_features" / "b0a1c2d3_S2_11.tif", values)
    assert read(BioMassters(own_archive), "b0a1c2d3_11").extra["cloud_share"] is None
    with pytest.raises(PairError, match="no pixel has a cloud probability"):
        read(BioMassters(own_archive, max_cloud=0.9), "b0a1c2d3_11")


def test_an_impossible_cloud_probability_is_an_error(own_archive):
    write_chip(own_archive / "train_features" / "b0a1c2d3_S2_11.tif", optical_file()[::-1].copy() + np.uint16(1))
    with pytest.raises(PairError, match=r"b0a1c2d3_S2_11.tif: holds 101 as cloud probability"):
        read(BioMassters(own_archive), "b0a1c2d3_11")


def test_a_folder_for_each_chip_is_read_too_without_splits(tmp_path):
    for chip in ("0060c0a5", "b0a1c2d3"):
        write_month(tmp_path / chip, chip, "07")
        write_biomass(tmp_path / chip, chip, 10.0)
    write_month(tmp_path / "0060c0a5", "eeeeeeee", "07")  # not its folder
    reader = BioMassters(tmp_path)
    assert reader.ids == ["0060c0a5_07", "b0a1c2d3_07"]
    assert list(reader.left_out()) == []
    assert reader.split_of(0) is None
    assert reader.read(1).label_map.max() == 10


@pytest.mark.parametrize("name", biomassters.METADATA)
def test_metadata_say_how_many_pairs_there_are_and_whether_a_missing_file_exists(own_archive, name):
    (own_archive / "train_features" / "b0a1c2d3_S2_00.tif").unlink()
    files = [path.name for path in own_archive.glob("*_features/*")] + [
        "b0a1c2d3_S2_00.tif",
        "x_S1_00.tif",
        "x_S2_00.tif",
    ]
    (own_archive / name).write_text("filename,split\n" + "".join(f"{file},train\n" for file in files))
    reader = BioMassters(own_archive)
    assert reader.num_listed == 5
    assert "Found 3 of the 5 listed pairs" in reader.summary
    assert dict(reader.left_out()) == {
        "0060c0a5_03": "0060c0a5_S2_03.tif is missing; the dataset has none",
        "b0a1c2d3_00": "b0a1c2d3_S2_00.tif is missing, although the metadata list it: download it again",
    }


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"filename\n\xff\xfe\n"], ids=["empty", "columns", "bytes"])
def test_wrong_metadata_are_named(own_archive, content):
    (own_archive / "features_metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"features_metadata.csv: is no CSV file with a column `filename`"):
        BioMassters(own_archive)


def test_a_chip_in_both_splits_is_an_error(own_archive):
    write_month(own_archive / "test_features", "b0a1c2d3", "00")
    with pytest.raises(ValueError, match="b0a1c2d3_00 is in both"):
        BioMassters(own_archive)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_features/.*it holds no folder"):
        BioMassters(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        BioMassters(tmp_path / "nowhere")


@pytest.mark.parametrize(("options", "message"), [({"max_cloud": 60}, "max_cloud is 60")])
def test_wrong_options_are_named(archive, options, message):
    with pytest.raises(ValueError, match=message):
        BioMassters(archive, **options)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("train_features/b0a1c2d3_S1_00.tif", np.zeros((2, 256, 256), np.float32), "expected 4 bands .* found 2"),
        ("train_features/b0a1c2d3_S1_00.tif", np.zeros((4, 256, 256), np.int16), "in float32, found .* in int16"),
        ("train_features/b0a1c2d3_S2_00.tif", np.zeros((10, 256, 256), np.uint16), "expected 11 bands"),
        ("train_agbm/b0a1c2d3_agbm.tif", np.zeros((1, 256, 256), np.uint16), "in float32, found .* in uint16"),
    ],
)
def test_a_file_of_another_kind_is_named(own_archive, file, values, message):
    write_chip(own_archive / file, values)
    with pytest.raises(PairError, match=message) as caught:
        read(BioMassters(own_archive), "b0a1c2d3_00")
    assert str(own_archive / file) in str(caught.value)


def test_the_picture_shows_both_sensors_and_biomass_with_its_units(archive):
    reader = BioMassters(archive)
    titles = [axes.get_title() for axes in plot_pair(read(reader, "b0a1c2d3_00"), reader.info).axes]
    assert titles[:4] == ["true colour", "VV", "VH", "label map"]
    labels = {axes.get_ylabel() for axes in plot_pair(read(reader, "b0a1c2d3_00"), reader.info).axes}
    assert {"dB", "t/ha"} <= labels
    assert len(plot_pair(read(reader, "ffff0000_05"), reader.info).axes) == 3 + 2  # two colour bars


@pytest.mark.real_data
def test_the_real_chip_has_twelve_plausible_months():
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    for orbit in ("ascending", "descending"):
        reader = BioMassters(Path(folder, "biomassters"), orbit=orbit)
        assert reader.ids == [f"0060c0a5_{month:02d}" for month in range(12)]
        for index in range(12):
            pair = reader.read(index)
            check_pair(pair, reader.info)
            vv, vh = pair.sar.mean(axis=(1, 2))
            assert 4 < vv - vh < 9
            assert 0 <= pair.label_map.min() < pair.label_map.mean() < 200
        summer = reader.read(9).optical.mean(axis=(1, 2))  # June: near infrared well above red
        assert summer[OPTICAL_BANDS.index("B08")] > 4 * summer[OPTICAL_BANDS.index("B04")]
    with pytest.raises(PairError, match=r"0060c0a5_S2_03.tif: 52\.\d% are cloudy"):
        BioMassters(Path(folder, "biomassters"), max_cloud=0.5).read(3)
