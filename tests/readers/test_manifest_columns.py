"""What the columns of a manifest may be called, and what they tell of scenes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusmae_hf.readers.pair_listing import list_by_manifest


@pytest.fixture
def manifest(tmp_path):
    for name in ("s1.tif", "s2.tif"):
        (tmp_path / name).touch()

    def write(more="", values="", row="a,s1.tif,s2.tif"):
        path = tmp_path / "m.csv"
        path.write_text(f"id,sar,optical{more}\n{row}{values}\n")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("sar_tyme", "sar_time"),
        ("SAR_time", "sar_time"),
        ("label", "labels"),
        ("optical-offset", "optical_offset"),
        ("procesing_baseline", "processing_baseline"),
        ("optical_unit", "optical_units"),
        ("lable_map", "label_map"),
    ],
)
def test_near_misses_are_refused(manifest, name, meant):
    with pytest.raises(ValueError, match=f"Did you mean .*{meant}"):
        list_by_manifest(manifest(f",{name}", ",x"), ())


@pytest.mark.parametrize("name", ["country", "optical_date", "sar_date", "optical_id", "cloud", "season", "index"])
def test_further_columns_are_kept(manifest, name):
    assert name in list_by_manifest(manifest(f",{name}", ",x"), ()).extra_columns


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_columns_without_a_name_are_left_out_with_a_warning(manifest, name):
    with pytest.warns(UserWarning, match="no name of their own"):
        assert list_by_manifest(manifest(f",{name}", ",0"), ()).extra_columns == {}


def test_the_index_of_pandas_in_parquet_is_left_out(tmp_path, manifest):
    manifest()
    table = {"id": ["a"], "sar": ["s1.tif"], "optical": ["s2.tif"], "__index_level_0__": [0]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    with pytest.warns(UserWarning, match="no name of their own"):
        assert list_by_manifest(tmp_path / "m.parquet", ()).extra_columns == {}


@pytest.mark.parametrize(
    ("baseline", "offset"),
    [("04.00", 1000), ("05.09", 1000), ("N0509", 1000), ("03.01", 0), ("N0214", 0), ("4.0", 1000), ("", None)],
)
def test_the_baseline_tells_the_offset(manifest, baseline, offset):
    listing = list_by_manifest(manifest(",processing_baseline", f",{baseline}"), ())
    assert listing.table["optical_offset"].to_pylist() == [offset]


def test_a_stated_offset_wins_over_the_baseline(manifest):
    listing = list_by_manifest(manifest(",processing_baseline,optical_offset", ",05.09,0"), ())
    assert listing.table["optical_offset"].to_pylist() == [0]


def test_a_stated_offset_of_zero_in_parquet_wins_over_the_baseline(tmp_path, manifest):
    manifest()
    row = {"id": "a", "sar": "s1.tif", "optical": "s2.tif", "processing_baseline": "05.09", "optical_offset": 0.0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "m.parquet")
    listing = list_by_manifest(tmp_path / "m.parquet", ())
    assert listing.table["optical_offset"].to_pylist() == [0]


def test_what_is_no_baseline_is_refused(manifest):
    with pytest.raises(ValueError, match=r"such as 04\.00"):
        list_by_manifest(manifest(",processing_baseline", ",new"), ())


@pytest.mark.parametrize("row", ["a,,s2.tif", "a,s1.tif,"])
def test_a_pair_may_lack_one_file(manifest, row):
    assert len(list_by_manifest(manifest(row=row), ()).table) == 1


def test_a_pair_without_any_file_is_refused(manifest):
    with pytest.raises(ValueError, match="neither a SAR nor an optical file"):
        list_by_manifest(manifest(row="a,,"), ())
