import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.errors import PairError
from fusmae_hf.readers import listed_pairs
from fusmae_hf.readers.bigearthnet_patches import CLASSES_19, OPTICAL_FACTORS
from fusmae_hf.readers.reben import ReBEN
from tests.readers.bigearthnet_fixtures import REBEN_PAIRS, SPLITS, VH_DB, VV_DB, make_reben

OPTICAL_IDS = sorted(optical for _, optical in REBEN_PAIRS)
SAR_OF = {optical: sar for sar, optical in REBEN_PAIRS}
SNOWY = "S2B_MSIL2A_20170924T093019_N9999_R136_T35UMA_11_12"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_reben(tmp_path_factory.mktemp("reben"))


def optical_folder(root, name):
    return root / "BigEarthNet-S2" / name.rsplit("_", 2)[0] / name


def sar_folder(root, name):
    return root / "BigEarthNet-S1" / SAR_OF[name].rsplit("_", 3)[0] / SAR_OF[name]


def test_only_the_pairs_on_disk_are_given_and_the_others_counted(archive):
    reader = ReBEN(archive)
    assert reader.ids == OPTICAL_IDS
    assert (len(reader), reader.num_listed) == (3, 53)


def test_partners_come_from_the_metadata_where_the_names_differ(archive):
    reader = ReBEN(archive)
    index = reader.ids.index("S2B_MSIL2A_20170924T093019_N9999_R136_T35UMA_02_07")
    assert reader.read(index).extra["sar_patch"] == "S1A_IW_GRDH_1SDV_20170923T160313_35UMA_2_7"


def test_looking_for_patches_takes_one_directory_scan_for_each_tile(archive, monkeypatch):
    scanned = []
    scan = os.scandir
    monkeypatch.setattr(listed_pairs.os, "scandir", lambda folder: scanned.append(Path(folder)) or scan(folder))
    monkeypatch.setattr(Path, "exists", lambda path: pytest.fail(f"a call for {path} alone"))
    ReBEN(archive)
    assert len(scanned) == len(set(scanned)) == 3 + 3 * 3  # three sensors' roots, three tiles or scenes in each


def test_vv_comes_first_and_backscatter_keeps_its_decimals(archive):
    pair = ReBEN(archive).read(0)
    assert pair.sar.dtype == np.float32
    np.testing.assert_allclose(pair.sar.mean(axis=(1, 2)), [VV_DB, VH_DB], atol=0.01)


def test_a_pair_carries_labels_map_split_country_place_and_times(archive):
    reader = ReBEN(archive)
    pairs = {name: reader.read(index) for index, name in enumerate(reader.ids)}
    assert [pairs[optical].split for _, optical in REBEN_PAIRS] == SPLITS
    assert [reader.split_of(reader.ids.index(optical)) for _, optical in REBEN_PAIRS] == SPLITS
    pair = pairs["S2B_MSIL2A_20170924T093019_N9999_R136_T35UMA_02_07"]
    assert pair.labels == ["Arable land", "Pastures"]
    assert pair.label_map.dtype == np.uint16
    assert np.unique(pair.label_map[0]) == [523]
    assert np.unique(pair.label_map[1:]) == [311]
    assert pair.extra["country"] == "Serbia"
    assert (pair.crs, pair.transform) == ("EPSG:32633", (10, 0, 600_000, 0, -10, 5_800_000))
    assert (pair.sar_time, pair.optical_time) == ("2017-09-23T16:03:13Z", "2017-09-24T09:30:19Z")


def test_native_bands_have_the_sizes_of_the_files_and_expand_to_what_read_gives(archive):
    reader = ReBEN(archive)
    assert reader.info.optical_factors == OPTICAL_FACTORS
    for index in range(len(reader)):
        pair, native = reader.read(index), reader.read_native(index)
        assert isinstance(native.optical, NativeBands)
        np.testing.assert_array_equal(native.optical.expand(), pair.optical)
        np.testing.assert_array_equal(native.label_map, pair.label_map)
        empty = {"sar": 0, "optical": 0, "label_map": 0}
        assert replace(native, **empty) == replace(pair, **empty)


def test_snow_and_clouds_are_left_out_with_the_reason_unless_asked_for(archive):
    ((name, reason),) = ReBEN(archive).left_out()
    assert name == SNOWY
    assert "snow, cloud or shadow" in reason
    reader = ReBEN(archive, keep_snow_and_clouds=True)
    assert SNOWY in reader.ids
    assert list(reader.left_out()) == []


@pytest.mark.parametrize("sensor", ["Sentinel-1", "Sentinel-2"])
def test_a_patch_of_one_sensor_alone_is_left_out_with_the_reason(own_archive, sensor):
    gone = OPTICAL_IDS[0]
    shutil.rmtree((sar_folder if sensor == "Sentinel-1" else optical_folder)(own_archive, gone))
    reader = ReBEN(own_archive)
    assert gone not in reader.ids
    assert f"its {sensor} patch" in dict(reader.left_out())[gone]


def test_a_patch_that_the_metadata_do_not_list_is_left_out_with_the_reason(own_archive):
    table = pq.read_table(own_archive / "metadata.parquet")
    pq.write_table(table.slice(1), own_archive / "metadata.parquet")
    assert dict(ReBEN(own_archive).left_out())[REBEN_PAIRS[0][1]] == "not listed in metadata.parquet"


def test_maps_may_be_absent_altogether(own_archive):
    shutil.rmtree(own_archive / "Reference_Maps")
    assert ReBEN(own_archive).read(0).label_map is None


def test_a_missing_map_among_others_is_an_error(own_archive):
    reader = ReBEN(own_archive)
    name = reader.ids[0]
    shutil.rmtree(own_archive / "Reference_Maps" / name.rsplit("_", 2)[0] / name)
    with pytest.raises(PairError, match=f"{name}_reference_map.tif: no such file"):
        reader.read(0)


def test_no_pair_on_disk_is_an_error_that_says_how_many_were_looked_for(own_archive):
    shutil.rmtree(own_archive / "BigEarthNet-S1")
    (own_archive / "BigEarthNet-S1").mkdir()
    with pytest.raises(ValueError, match=r"None of the 53 pairs .* 4 Sentinel-2 and 0 Sentinel-1 patch folders"):
        ReBEN(own_archive)


def test_missing_folders_and_metadata_are_named(own_archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for \['BigEarthNet-S2', 'BigEarthNet-S1'\]"):
        ReBEN(tmp_path)
    (own_archive / "metadata.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.parquet is missing"):
        ReBEN(own_archive)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read as parquet"),
        (lambda path: pq.write_table(pa.table({"patch_id": ["a"]}), path), r"lacks the columns \['s1_name', 'labels'"),
    ],
    ids=["not parquet", "other columns"],
)
def test_wrong_metadata_are_named(own_archive, write, message):
    write(own_archive / "metadata.parquet")
    with pytest.raises(ValueError, match=message) as caught:
        ReBEN(own_archive)
    assert str(own_archive / "metadata.parquet") in str(caught.value)


def test_a_pair_without_labels_has_none(own_archive):
    rows = pq.read_table(own_archive / "metadata.parquet").to_pylist()
    table = pa.Table.from_pylist(rows)
    table = table.set_column(
        table.schema.get_field_index("labels"), "labels", pa.nulls(len(rows), pa.list_(pa.string()))
    )
    pq.write_table(table, own_archive / "metadata.parquet")
    assert ReBEN(own_archive).read(0).labels == []


def test_an_unknown_label_is_an_error(own_archive):
    rows = pq.read_table(own_archive / "metadata.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([row | {"labels": ["Lava"]} for row in rows]), own_archive / "metadata.parquet"
    )
    with pytest.raises(PairError, match=r"labels \['Lava'\], none of the 19 classes"):
        ReBEN(own_archive).read(0)


@pytest.mark.real_data
def test_the_real_sample_is_found_among_all_metadata():
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    reader = ReBEN(Path(folder, "reben"))
    assert (len(reader), reader.num_listed) == (12, 480_038)
    assert sorted({reader.split_of(index) for index in range(12)}) == ["test", "train", "validation"]
    metadata = pq.read_table(Path(folder, "reben", "metadata.parquet"), columns=["labels"])
    assert set(pa.compute.list_flatten(metadata["labels"]).unique().to_pylist()) == set(CLASSES_19)
    for index in range(12):
        pair = reader.read(index)
        vv, vh = pair.sar.mean(axis=(1, 2))
        assert 4 < vv - vh < 10
        assert pair.optical.shape == (12, 120, 120)
        assert pair.label_map is None
