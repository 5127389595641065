"""Rows of shards, read by people who have `datasets` or pandas alone, as arrays."""

from dataclasses import replace

import datasets
import numpy as np
import pytest

import fusmae_hf
from tests.small_shards import INFO, make_pair, write_shards

NATIVE = replace(INFO, optical_factors=(1, 1, 1, 2))
CLASSES = np.arange(64, dtype=np.int16).reshape(8, 8)


def shards(folder, info=NATIVE):
    return write_shards(folder / "shards", info, train=[make_pair(n, info, label_map=CLASSES) for n in range(3)])


def rows_by(reader, folder, cache):
    files = str(folder / "data/*.parquet")
    if reader == "datasets":
        return list(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache)))
    if reader == "streamed":
        return list(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True))
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache)).data.table
    return table.to_pylist() if reader == "pyarrow" else table.to_pandas().to_dict("records")


@pytest.mark.parametrize("reader", ["datasets", "streamed", "pyarrow", "pandas"])
@pytest.mark.parametrize("info", [INFO, NATIVE], ids=["one resolution", "native resolution"])
def test_a_row_comes_back_as_the_arrays_that_were_written(reader, info, tmp_path):
    folder = shards(tmp_path, info)
    for number, row in enumerate(rows_by(reader, folder, tmp_path / "cache")):
        pair, written = fusmae_hf.decode_row(row, folder), make_pair(number, info)
        np.testing.assert_array_equal(pair["sar"], written.sar, strict=True)
        np.testing.assert_array_equal(pair["optical"], written.optical, strict=True)
        np.testing.assert_array_equal(pair["label_map"], CLASSES, strict=True)
        assert pair["id"] == written.id
        assert not {"sar_dtype", "optical_shape"} & pair.keys()


def test_the_description_may_be_given_instead_of_the_folder(tmp_path):
    folder = shards(tmp_path)
    row = rows_by("pyarrow", folder, tmp_path)[0]
    info = fusmae_hf.load_pairs(folder, "train").info
    np.testing.assert_array_equal(fusmae_hf.decode_row(row, info)["optical"], make_pair(0, NATIVE).optical)


def test_some_columns_will_do(tmp_path):
    row = rows_by("pyarrow", folder := shards(tmp_path), tmp_path)[0]
    some = {name: row[name] for name in ("id", "sar", "sar_dtype", "sar_shape")}
    assert fusmae_hf.decode_row(some, folder).keys() == {"id", "sar"}
    with pytest.raises(ValueError, match=r"has sar, but not \['sar_shape'\]"):
        fusmae_hf.decode_row({name: row[name] for name in ("id", "sar", "sar_dtype")}, folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: row | {"optical": row["optical"][:-2]}, "declares optical as uint16"),
        (lambda row: row | {"sar": bytes(len(row["sar"]))}, "its checksum is not that of its pixels"),
        (lambda row: row | {"sar_dtype": "float64"}, "declares sar as float64"),
    ],
)
def test_damage_is_told(damage, message, tmp_path):
    row = rows_by("pyarrow", folder := shards(tmp_path), tmp_path)[0]
    with pytest.raises(ValueError, match=message):
        fusmae_hf.decode_row(damage(row), folder)


def test_the_wrong_description_is_told(tmp_path):
    row = rows_by("pyarrow", shards(tmp_path), tmp_path)[0]
    with pytest.raises(ValueError, match="or not of small"):
        fusmae_hf.decode_row(row, INFO)
