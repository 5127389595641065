"""Files of other kinds, one file a band, and windows: where they lie and in which order they are read."""

import argparse
from itertools import pairwise

import numpy as np
import pytest
from rasterio.shutil import copy
from rasterio.transform import from_origin

from fusmae_hf.errors import PairError
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.readers.archives import names
from fusmae_hf.readers.paired_geotiffs import PairedGeoTIFFs
from fusmae_hf.shards.dataset_info import read_left_out
from fusmae_hf.shards.loading import load_pairs
from tests.readers.test_paired_geotiffs import (
    BANDS,
    CORNER,
    PATTERNS,
    backscatter,
    open_pairs,
    reflectance,
    write_manifest,
    write_pair,
    write_raster,
)

# Files of other kinds


@pytest.mark.parametrize(
    ("ending", "driver", "options"),
    [("jp2", "JP2OpenJPEG", {"QUALITY": 100, "REVERSIBLE": "YES"}), ("vrt", "VRT", {}), ("img", "HFA", {}),
     ("TIFF", "GTiff", {"COMPRESS": "LZW"}), ("tif", "COG", {}), ("bsq", "ENVI", {})],
)  # fmt: skip
def test_whatever_rasterio_opens_is_read(ending, driver, options, tmp_path):
    write_pair(tmp_path)
    (tmp_path / "other").mkdir()
    copy(tmp_path / "s2/a.tif", tmp_path / f"other/a.{ending}", driver=driver, **options)
    pair = open_pairs(tmp_path, optical=f"other/{{id}}.{ending}").read(0)
    np.testing.assert_array_equal(pair.optical, reflectance(), strict=True)
    assert pair.crs == "EPSG:32632"


def test_a_file_that_names_others_must_be_called_so(tmp_path):
    write_pair(tmp_path)
    copy(tmp_path / "s2/a.tif", tmp_path / "s2/a.vrt", driver="VRT")
    (tmp_path / "s2/a.vrt").rename(tmp_path / "s2/a.png")
    with pytest.raises(PairError, match="it is VRT by what it holds, and names other files"):
        open_pairs(tmp_path, optical="s2/{id}.png").read(0)


# One file a band


def write_bands(root, ids=("a",), coarse=()):
    for name in ids:
        for band, values in zip(("VV", "VH"), backscatter(), strict=True):
            write_raster(root / f"{name}_{band}.tif", values[None])
        for band, values in zip(("B04", "B03", "B02"), reflectance(), strict=True):
            step, grid = (2, from_origin(500_000, 5_000_000, 20, 20)) if band in coarse else (1, CORNER)
            write_raster(root / f"{name}_{band}.tif", values[None, ::step, ::step], grid)


BY_BAND = {"sar": "{id}_{band}.tif", "optical": "{id}_{band}.tif"}


def test_one_file_a_band_is_read_by_the_names_of_the_bands(tmp_path):
    write_bands(tmp_path, ["a", "b_c"])
    reader = open_pairs(tmp_path, **BY_BAND)
    assert reader.ids == ["a", "b_c"]
    for index in range(2):
        np.testing.assert_array_equal(reader.read(index).sar, backscatter(), strict=True)
        np.testing.assert_array_equal(reader.read(index).optical, reflectance(), strict=True)
    some = open_pairs(tmp_path, **BY_BAND, optical_bands=["B02", "B04"])
    np.testing.assert_array_equal(some.read(0).optical, reflectance()[[2, 0]])


def test_a_manifest_may_list_one_file_a_band(tmp_path):
    write_bands(tmp_path)
    manifest = write_manifest(tmp_path, "id,sar,optical\nx,a_{band}.tif,a_{band}.tif\n")
    np.testing.assert_array_equal(open_pairs(tmp_path, manifest=manifest).read(0).optical, reflectance())


@pytest.mark.parametrize("patch_size", [None, 5, 12])
def test_coarser_bands_are_repeated_onto_the_finest_grid(tmp_path, patch_size):
    write_bands(tmp_path, coarse=["B03"])
    expected = reflectance()
    expected[1] = expected[1, ::2, ::2].repeat(2, 0).repeat(2, 1)
    reader = open_pairs(tmp_path, **BY_BAND, patch_size=patch_size)
    for index in range(len(reader)):
        pair = reader.read(index)
        row, column = (pair.extra["row"], pair.extra["col"]) if patch_size else (0, 0)
        _, height, width = pair.optical.shape
        np.testing.assert_array_equal(pair.optical, expected[:, row : row + height, column : column + width])


def test_a_band_on_another_grid_is_an_error_with_both(tmp_path):
    write_bands(tmp_path)
    write_raster(tmp_path / "a_B03.tif", reflectance()[:1], from_origin(500_005, 5_000_000, 10, 10))
    with pytest.raises(PairError, match=r"a_B03.tif does not lie on the grid of .*\(500005.*\(500000"):
        open_pairs(tmp_path, **BY_BAND).read(0)


def test_a_pair_whose_band_is_missing_is_left_out_with_its_name(tmp_path):
    write_bands(tmp_path, ["a", "b"])
    (tmp_path / "b_VH.tif").unlink()
    assert list(open_pairs(tmp_path, **BY_BAND).left_out()) == [("b", "its sar file b_VH.tif is missing")]


def test_one_file_a_band_needs_their_names(tmp_path):
    write_bands(tmp_path)
    with pytest.raises(ValueError, match=r"needs the names of the bands: --sar-bands"):
        open_pairs(tmp_path, **BY_BAND, sar_bands=())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("VV,VH", ["VV", "VH"]),
        (" VV , VH ,", ["VV", "VH"]),
        ('"Moors, heath",Water', ["Moors, heath", "Water"]),
        ('Water, "Moors, heath"', ["Water", "Moors, heath"]),
        ("", []),
    ],
)
def test_names_may_hold_commas(text, expected, tmp_path):
    assert names(text) == expected
    (tmp_path / "names.txt").write_text("\ufeff" + "\n".join(expected) + "\n\n", encoding="utf-8")
    assert names(f"@{tmp_path / 'names.txt'}") == expected


@pytest.mark.parametrize("text", ['"Moors, heath', "@nowhere.txt"])
def test_names_that_cannot_be_read_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be read"):
        names(text)


# Edges


@pytest.mark.parametrize(
    ("edges", "stride", "starts"),
    [("drop", None, [0, 10]), ("shift", None, [0, 10, 14]), ("pad", None, [0, 10, 20]),
     ("drop", 5, [0, 5, 10]), ("shift", 5, [0, 5, 10, 14]), ("pad", 5, [0, 5, 10, 15]),
     ("drop", 13, [0, 13]), ("shift", 13, [0, 13, 14]), ("pad", 13, [0, 13])],
)  # fmt: skip
def test_edges_decide_what_becomes_of_the_remainder(edges, stride, starts, tmp_path):
    write_pair(tmp_path)
    reader = open_pairs(tmp_path, patch_size=10, stride=stride, edges=edges, max_no_data=1.0)
    read = [reader.read(index) for index in range(len(reader))]
    assert [(pair.extra["row"], pair.extra["col"]) for pair in read] == [(r, c) for r in starts for c in starts]
    for pair in read:
        row, column = pair.extra["row"], pair.extra["col"]
        inside = np.s_[:, row : row + 10, column : column + 10]
        height, width = backscatter()[inside].shape[1:]
        np.testing.assert_array_equal(pair.sar[:, :height, :width], backscatter()[inside])
        np.testing.assert_array_equal(pair.optical[:, :height, :width], reflectance()[inside])
        assert np.isnan(pair.sar[:, height:]).all()
        assert (pair.optical[:, :, width:] == 0).all()
    assert ("in no window" in reader.summary) == (starts[-1] + 10 < 24)


def test_what_no_window_covers_is_told_in_pixels_and_percent(tmp_path):
    write_pair(tmp_path)
    assert f"{24 * 24 - 20 * 20} px at right and lower edges (30.6%)" in open_pairs(tmp_path, patch_size=10).summary
    assert "in no window" not in open_pairs(tmp_path, patch_size=12).summary


def test_a_scene_smaller_than_a_window_is_padded_if_asked(tmp_path):
    write_pair(tmp_path)
    write_raster(tmp_path / "lc/a.tif", np.ones((1, 24, 24), np.uint8))
    options = {"patch_size": 32, "edges": "pad", "max_no_data": 1.0, "label_map": "lc/{id}.tif"}
    with pytest.raises(ValueError, match="needs map_no_data"):
        open_pairs(tmp_path, **options)
    (pair,) = [open_pairs(tmp_path, **options, map_no_data=9).read(0)]
    assert np.unique(pair.label_map[24:]).tolist() == np.unique(pair.label_map[:, 24:]).tolist() == [9]
    assert (pair.label_map[:24, :24] == 1).all()


def test_padding_and_warping_agree(tmp_path):
    write_pair(tmp_path, sar_grid=from_origin(500_020, 4_999_980, 10, 10))
    reader = open_pairs(tmp_path, patch_size=20, edges="pad", on_different_grids="warp", max_no_data=1.0)
    pair = reader.read(0)
    np.testing.assert_allclose(pair.sar[:, 2:, 2:], backscatter()[:, :18, :18], atol=1e-4)
    assert np.isnan(reader.read(3).sar[:, 6:]).all()


def test_edges_are_for_windows(tmp_path):
    write_pair(tmp_path)
    with pytest.raises(ValueError, match="edges='shift' is for windows"):
        open_pairs(tmp_path, edges="shift")


# The order of reading

RAW = {"sar_units": "raw", "optical_units": "raw"}


class Noting(PairedGeoTIFFs):
    """Notes in which order pairs are read."""

    def read(self, index):
        self.noted.append(index)
        return super().read(index)


def test_windows_of_a_row_are_read_together_but_written_in_random_order(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_pair(tmp_path, name, backscatter(96, 96), reflectance(96, 96))
    monkeypatch.setattr(Noting, "rows_read_together", 24)
    reader = Noting(tmp_path, **PATTERNS | BANDS | RAW, patch_size=12)
    reader.noted = []
    prepare(reader, tmp_path / "out", rows_per_shard=64, progress=False)
    noted = np.array(reader.noted[-128:])
    rows = reader.reading_groups[noted]
    assert sorted(noted.tolist()) == list(range(128))
    assert np.count_nonzero(np.diff(rows)) + 1 == 16  # 8 rows of each scene, none begun twice
    written = [row["id"] for row in load_pairs(tmp_path / "out", "train")]
    assert sorted(written) == sorted(reader.ids)
    scenes = [name[0] for name in written]
    assert sum(one != other for one, other in pairwise(scenes)) > 16  # mixed within blocks
    assert read_left_out(tmp_path / "out") == []


@pytest.mark.parametrize("num_proc", [1, 2])
def test_what_is_written_does_not_depend_on_processes(num_proc, tmp_path):
    write_pair(tmp_path, "a", backscatter(48, 48), reflectance(48, 48))
    reader = open_pairs(tmp_path, **RAW, patch_size=8)
    prepare(reader, tmp_path / "out", rows_per_shard=12, num_proc=num_proc, progress=False)
    prepare(reader, tmp_path / "one", rows_per_shard=12, progress=False)
    for file in sorted((tmp_path / "one/data").iterdir()):
        assert (tmp_path / "out/data" / file.name).read_bytes() == file.read_bytes()


def test_one_damaged_scene_does_not_stop_preparation(tmp_path):
    for name in ("a", "b", "c"):
        write_pair(tmp_path, name, backscatter(120, 120), reflectance(120, 120))
    reader = open_pairs(tmp_path, **RAW, patch_size=12)
    with open(tmp_path / "s2/b.tif", "r+b") as file:
        file.truncate(600)
    report = prepare(reader, tmp_path / "out", progress=False)
    assert (report.num_pairs, len(report.left_out)) == (200, 100)


# Pairs of which much is missing


@pytest.mark.parametrize(
    ("share", "declared", "options", "told"),
    [
        (0.6, False, {}, True),
        (0.4, False, {}, False),
        (0.6, True, {}, False),
        (0.6, False, {"max_no_data": 0.7}, False),
    ],
)
@pytest.mark.parametrize("sensor", ["sar", "optical"])
def test_pairs_that_mostly_lack_a_sensor_are_told_unless_that_is_declared(
    sensor, share, declared, options, told, tmp_path
):
    rows = round(share * 24)
    sar, optical = backscatter(), reflectance().astype(np.float32)
    (sar if sensor == "sar" else optical)[:, :rows] = np.nan
    write_pair(tmp_path)
    write_raster(tmp_path / "s1/a.tif", sar, **({"nodata": np.nan} if declared else {}))
    write_raster(tmp_path / "s2/a.tif", optical, **({"nodata": np.nan} if declared else {}))
    report = prepare(open_pairs(tmp_path, **RAW, max_no_data=1.0), tmp_path / "out", progress=False, **options)
    line = (
        f"warning: {sensor} missing: 1 pair, {rows * 24} pixels; the first, a: more than half of the {sensor} pixels"
    )
    assert (line in str(report)) == told
    assert ("--max-no-data 0.5" in str(report)) == told
