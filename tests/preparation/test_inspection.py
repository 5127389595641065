import re
from collections import Counter
from dataclasses import replace

import fsspec
import numpy as np
import pytest
from PIL import Image

from fusmae_hf.preparation.inspection import band_histograms, contact_sheet, inspect_shards
from fusmae_hf.preparation.statistics import band_statistics
from tests.small_shards import INFO, SIZE, make_pair, run_command, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def variant(**fields):
    return INFO.__class__(**{**vars(INFO), **fields})


def test_bands_are_those_of_the_statistics_over_all_splits(tmp_path):
    folder = write_shards(tmp_path, train=[make_pair(number) for number in range(6)])
    assert inspect_shards(str(folder)).bands == band_statistics(folder).bands


def test_so_many_pairs_are_read_even_where_row_groups_are_short(shards):
    for most in (1, 3, 7, 16, 100):
        assert inspect_shards(str(shards), max_pairs=most).num_pairs == min(most, 16)


def test_pictured_pairs_have_their_pixels_labels_and_splits(tmp_path):
    info = variant(optical_factors=(1, 1, 1, 2))
    pairs = [make_pair(number, info) for number in range(6)]
    folder = write_shards(tmp_path, info, train=pairs[:4], test=pairs[4:])
    shown = inspect_shards(str(folder), num_pictured=6).pairs
    assert [pair.split for pair in shown] == ["train"] * 4 + ["test"] * 2
    for pair, original in zip(shown, pairs, strict=True):
        assert (pair.id, pair.labels) == (original.id, original.labels)
        assert np.array_equal(pair.sar, original.sar)
        assert np.array_equal(pair.optical, original.optical)


def test_classes_are_counted_over_all_pairs_by_split(shards):
    found = inspect_shards(str(shards), max_pairs=4)
    assert found.labels == {"train": Counter(water=6, forest=6), "test": Counter(water=2, forest=2)}
    printed = str(found)
    assert "Classes over 16 pairs (a pair may have several)" in printed
    assert re.search(r"water +6 +2 +50.00%", printed)
    assert "Never: town" in printed


def test_of_a_url_only_the_pairs_looked_at_are_counted(shards):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/inspect", recursive=True)
    try:
        found = inspect_shards("memory://inspect", max_pairs=4)
    finally:
        memory.rm("/inspect", recursive=True)
    assert sum(sum(of_split.values()) for of_split in found.labels.values()) == 4
    assert "Classes over 4 pairs" in str(found)


def test_a_folder_without_labels_has_no_table_of_classes(tmp_path):
    info = variant(class_names=())
    found = inspect_shards(str(write_shards(tmp_path, info, train=[make_pair(0, info)])))
    assert found.labels == {}
    assert "Classes over" not in str(found)


def test_the_share_of_pixels_without_data_is_shown_by_split(tmp_path):
    pair = make_pair(0)
    pair.sar[:, : SIZE // 2] = np.nan
    printed = str(inspect_shards(str(write_shards(tmp_path, train=[pair, make_pair(1)]))))
    assert re.search(r"train +2 +1 +1 +0\.0 +25\.00% +0\.00%", printed)


def test_a_damaged_column_of_labels_is_named(tmp_path):
    folder = write_shards(tmp_path)
    shard = folder / "data" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match=shard.name):
        inspect_shards(str(folder), max_pairs=1)


def test_histograms_have_a_panel_for_each_band_with_published_means(shards):
    found = inspect_shards(str(shards))
    figure = band_histograms(found.bands, found.dataset.info, found.num_pairs)
    titles = [
        axes.get_title(loc="left") for part in figure.subfigs for axes in part.axes if axes.get_title(loc="left")
    ]
    assert titles == ["VV", "VH", "B02 (490 nm)", "B03 (560 nm)", "B04 (665 nm)", "B05 (705 nm)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mean here", "published mean"]


def test_a_histogram_holds_all_values_but_its_tails(shards):
    found = inspect_shards(str(shards))
    for band in found.bands:
        low, high = band.distribution.percentile(1), band.distribution.percentile(99)
        assert np.diff(band.distribution.below([low, high])) == pytest.approx(0.98 * band.valid, rel=0.01)
        assert band.distribution.below([band.maximum + 1])[0] == band.valid


@pytest.mark.parametrize("statistics", [None, "sen12ms"])
def test_bands_without_published_figures_are_drawn_without(tmp_path, statistics):
    info = variant(statistics=statistics)
    found = inspect_shards(str(write_shards(tmp_path, info, train=[make_pair(0)])))
    figure = band_histograms(found.bands, info, 1)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["mean here"] + ["published mean"] * (statistics is not None)


def test_a_constant_band_is_drawn_too(tmp_path):
    pair = make_pair(0)
    pair.optical[:] = 7
    found = inspect_shards(str(write_shards(tmp_path, train=[pair])))
    band_histograms(found.bands, found.dataset.info, 1).savefig(tmp_path / "constant.png")


def test_nothing_to_draw_is_said(shards):
    with pytest.raises(ValueError, match="no band with data"):
        band_histograms([], INFO, 0)
    with pytest.raises(ValueError, match="no pair to draw"):
        contact_sheet([], INFO)


def test_inspect_draws_both_pictures(shards, tmp_path, capsys):
    files = ["--picture", tmp_path / "pairs.png", "--histograms", tmp_path / "histograms.png", "--pairs", "2"]
    assert run_command("inspect", shards, *files) == 0
    printed = capsys.readouterr().out
    assert "Picture of 2 pairs" in printed
    assert "Histograms of 6 bands" in printed
    for name in ("pairs.png", "histograms.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 500


def test_columns_stay_apart_and_aligned_for_wide_numbers(tmp_path):
    found = inspect_shards(str(write_shards(tmp_path / "shards")))
    bands = tuple(replace(band, minimum=-3.4e38, maximum=1234567890123.0, mean=-12345678.9) for band in found.bands)
    shards = tuple(replace(shard, bytes=10**15) for shard in found.dataset.splits["train"])
    wide = replace(found, bands=bands, dataset=replace(found.dataset, splits={"train": shards}))
    parts = str(wide).split("\n\n")
    splits, statistics = parts[1].splitlines(), parts[2].splitlines()[2:]
    for table, columns in ((splits, 7), (statistics, None)):
        cells = [re.split(r" {2,}", line.strip()) for line in table]
        assert len({len(row) for row in cells}) == 1
        assert columns in (None, len(cells[0]))
        assert len({len(line) for line in table}) == 1
