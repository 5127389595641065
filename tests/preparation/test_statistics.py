import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.preparation.bands import BandValues
from fusmae_hf.preparation.statistics import DatasetStatistics, band_statistics, format_share, write_processor
from fusmae_hf.shards.loading import load_pairs
from tests.small_shards import INFO, SIZE, make_pair, run_command, with_pixels, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def variant(**fields):
    return INFO.__class__(**{**vars(INFO), **fields})


def pixels(folder, sensor, split="train"):
    pairs = load_pairs(folder, split, streaming=True)
    return torch.stack([pairs[row][sensor] for row in range(len(pairs))]).numpy().astype(np.float64)


def cut(values, at):
    return np.split(values, sorted({min(place, len(values)) for place in at}))


@given(
    values=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-50, 50, width=32)),
    offset=st.sampled_from([0.0, -20.0, 1e4, 1e6]),
    at=st.lists(st.integers(0, 300), max_size=5),
)
def test_moments_of_floats_do_not_depend_on_how_they_are_cut_and_lose_no_digits(values, offset, at):
    values = values.astype(np.float64) + offset
    whole, parts = BandValues(), BandValues()
    whole.add(values, values.size)
    for part in cut(values, at):
        one = BandValues()
        one.add(part, part.size)
        parts.merge(one)
    for band in (whole, parts):
        found = band.moments()
        assert found.number == values.size
        assert found.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-9)
        assert found.std == pytest.approx(values.std(), rel=1e-9, abs=1e-8)
        assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert np.array_equal(whole.distribution().counts, parts.distribution().counts)


@given(
    values=st.sampled_from(["uint8", "int8", "uint16", "int16"]).flatmap(
        lambda dtype: hnp.arrays(dtype, st.integers(1, 300))
    ),
    at=st.lists(st.integers(0, 300), max_size=5),
    weight=st.sampled_from([1, 4, 36]),
)
def test_integers_are_summed_exactly_whatever_the_cut(values, at, weight):
    band = BandValues()
    for part in cut(values, at):
        one = BandValues()
        one.count(torch.from_numpy(part), weight)
        band.merge(one)
    found = band.moments()
    assert found.number == band.pixels == values.size * weight
    assert found.mean == int(values.sum(dtype=np.int64)) * weight / found.number
    assert found.std == pytest.approx(values.astype(np.float64).std(), rel=1e-12)
    assert (found.minimum, found.maximum) == (values.min(), values.max())


def test_no_values_have_no_moments():
    nothing = BandValues()
    assert nothing.moments().number == 0
    assert math.isnan(nothing.moments().std)
    assert math.isnan(nothing.distribution().percentile(50))


def test_integers_and_floats_of_one_band_go_together():
    band, values = BandValues(), np.arange(1, 101)
    band.count(torch.from_numpy(values[:40].astype(np.uint16)))
    band.add(values[40:].astype(np.float32), 60)
    assert band.moments().mean == 50.5
    assert band.moments().std == pytest.approx(values.std())
    assert band.distribution().percentile(50) == pytest.approx(50.5, abs=0.6)


@pytest.mark.parametrize("percent", [0, 1, 25, 50, 99, 100])
def test_percentiles_are_as_fine_as_the_bins(percent):
    generator = np.random.default_rng(0)
    backscatter, numbers = generator.normal(-12, 5, 20_000).astype(np.float32), generator.integers(1, 4000, 20_000)
    floats, integers = BandValues(), BandValues()
    floats.add(backscatter, backscatter.size)
    integers.count(torch.from_numpy(numbers.astype(np.uint16)))
    assert floats.distribution().percentile(percent) == pytest.approx(np.percentile(backscatter, percent), abs=0.13)
    assert integers.distribution().percentile(percent) == pytest.approx(np.percentile(numbers, percent), abs=1)


def test_statistics_of_shards_are_those_of_all_pixels_at_once(shards):
    found = band_statistics(shards)
    assert (found.num_pairs, found.total_pairs, found.split) == (12, 12, "train")
    assert [band.band for band in found.bands] == ["VV", "VH", "B02", "B03", "B04", "B05"]
    for sensor in ("sar", "optical"):
        values = pixels(shards, sensor)
        for index, band in enumerate(found.of_sensor(sensor)):
            of_band = values[:, index]
            assert band.mean == pytest.approx(of_band.mean(), rel=1e-12)
            assert band.std == pytest.approx(of_band.std(), rel=1e-12)
            assert (band.minimum, band.maximum) == (of_band.min(), of_band.max())
            assert (band.pixels, band.valid, band.no_data) == (of_band.size, of_band.size, 0)


def test_pixels_without_data_in_any_sar_band_or_in_all_optical_bands_do_not_count(tmp_path):
    pair = make_pair(0)
    pair.sar[0, 0, :3] = np.nan
    pair.optical[:, 1] = 0
    pair.optical[0, 2] = 0  # zero in one band alone is a value
    vv, vh, b02, b03, *_ = band_statistics(write_shards(tmp_path, train=[pair])).bands
    assert (vv.valid, vh.valid) == (SIZE**2 - 3, SIZE**2 - 3)
    assert vh.mean == pytest.approx(pair.sar[1, np.isfinite(pair.sar[0])].mean(dtype=np.float64))
    assert (b02.valid, b03.valid) == (SIZE**2 - SIZE, SIZE**2 - SIZE)
    kept = np.delete(pair.optical, 1, axis=1).astype(np.float64)
    assert (b02.mean, b03.mean) == (pytest.approx(kept[0].mean()), pytest.approx(kept[1].mean()))
    assert (b02.minimum, b03.minimum) == (0, kept[1].min())
    assert b02.no_data == 1 / SIZE


def test_a_pixel_of_a_coarser_band_counts_as_often_as_it_covers_the_grid(tmp_path):
    info = variant(optical_factors=(1, 1, 1, 4))
    pairs = [make_pair(number, info) for number in range(5)]
    pairs[1].optical[:, :4, :4] = 0
    found = band_statistics(write_shards(tmp_path, info, train=pairs)).of_sensor("optical")
    values = np.stack([pair.optical for pair in pairs]).astype(np.float64)
    has_data = (values != 0).any(axis=1)
    for index, band in enumerate(found):
        assert (band.pixels, band.valid) == (has_data.size, has_data.sum())
        assert band.mean == pytest.approx(values[:, index][has_data].mean(), rel=1e-12)
        assert band.std == pytest.approx(values[:, index][has_data].std(), rel=1e-12)


def test_linear_power_is_summed_in_db_and_zero_power_is_no_data(tmp_path):
    pair = make_pair(0)
    power = (10 ** (pair.sar / 10)).astype(np.float32)
    power[1, 0, 0] = 0
    info = variant(sar_units="linear")
    vv, vh, *_ = band_statistics(write_shards(tmp_path, info, train=[with_pixels(pair, sar=power)])).bands
    assert vv.valid == vh.valid == SIZE**2 - 1
    assert vv.mean == pytest.approx(pair.sar[0].ravel()[1:].mean(), abs=1e-4)


def test_the_offset_is_subtracted_and_reflectance_scaled(tmp_path):
    pair = make_pair(0)
    moved = with_pixels(pair, optical=pair.optical + 1000)
    offset = band_statistics(write_shards(tmp_path / "a", variant(optical_offset=1000.0), train=[moved]))
    scaled = with_pixels(pair, optical=(pair.optical / 10_000).astype(np.float32))
    reflectance = band_statistics(write_shards(tmp_path / "b", variant(optical_units="reflectance"), train=[scaled]))
    for index, (with_offset, of_reflectance) in enumerate(
        zip(offset.of_sensor("optical"), reflectance.of_sensor("optical"), strict=True)
    ):
        assert with_offset.mean == pytest.approx(pair.optical[index].mean(), rel=1e-12)
        assert with_offset.minimum == pair.optical[index].min()
        assert of_reflectance.mean == pytest.approx(pair.optical[index].mean(), rel=1e-6)
    assert "after subtracting the offset of 1000" in str(offset)


def test_only_the_training_split_is_read_unless_told_otherwise(shards, tmp_path):
    folder = write_shards(tmp_path)
    next(folder.glob("data/test-*")).unlink()
    assert band_statistics(folder).bands == band_statistics(shards).bands
    assert band_statistics(shards, "test").num_pairs == 4


def test_at_most_so_many_pairs_are_read_from_row_groups_all_over_the_split(shards):
    found = band_statistics(shards, max_pairs=5)
    assert (found.num_pairs, found.total_pairs) == (5, 12)
    first_five = pixels(shards, "optical")[:5, 0]
    assert found.of_sensor("optical")[0].mean != pytest.approx(first_five.mean())


def test_reading_row_groups_at_the_same_time_changes_nothing(shards):
    one, three = band_statistics(shards), band_statistics(shards, num_proc=3)
    assert one.of_sensor("optical") == three.of_sensor("optical")
    for left, right in zip(one.of_sensor("sar"), three.of_sensor("sar"), strict=True):
        assert (left.mean, left.std) == (pytest.approx(right.mean, rel=1e-12), pytest.approx(right.std, rel=1e-12))
    assert band_statistics(shards, num_proc=3) == three


def test_pairs_of_several_sizes_are_summed_together(tmp_path):
    small = make_pair(1)
    small = with_pixels(small, sar=small.sar[:, :4, :4], optical=small.optical[:, :4, :4])
    found = band_statistics(write_shards(tmp_path, train=[make_pair(0), small, make_pair(2)]))
    assert {band.pixels for band in found.bands} == {2 * SIZE**2 + 16}


def test_a_damaged_shard_is_named(tmp_path):
    shard = write_shards(tmp_path) / "data" / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ValueError, match=shard.name):
        band_statistics(tmp_path, num_proc=2)


@pytest.mark.parametrize(("options", "message"), [({"max_pairs": 0}, "max_pairs=0"), ({"num_proc": 0}, "num_proc=0")])
def test_numbers_below_one_are_refused(shards, options, message):
    with pytest.raises(ValueError, match=message):
        band_statistics(shards, **options)


@pytest.mark.parametrize("units", ["dn", "reflectance"])
def test_a_new_processor_normalises_the_training_pairs_to_mean_0_and_std_1(tmp_path, units):
    info = variant(optical_offset=1000.0, optical_units=units, optical_factors=())
    pairs = [make_pair(number) for number in range(6)]
    scale = 1 if units == "dn" else 10_000
    pairs = [with_pixels(p, optical=((p.optical + 1000.0) / scale).astype(np.float32)) for p in pairs]
    folder = write_shards(tmp_path / "shards", info, train=pairs)
    path = write_processor(band_statistics(folder), info, tmp_path / "processor")
    processor = FusMAEImageProcessor.from_pretrained(path.parent)
    assert processor.statistics is None
    assert (processor.optical_offset, processor.optical_units) == (1000, units)
    inputs = processor(sar=[p.sar for p in pairs], optical=[p.optical for p in pairs])
    for values in (inputs["pixel_values"], inputs["pixel_values_sar"]):
        assert torch.allclose(values.double().mean((0, 2, 3)), torch.zeros(values.shape[1]).double(), atol=1e-4)
        assert torch.allclose(values.double().std((0, 2, 3), correction=0), torch.ones(values.shape[1]).double(), 1e-4)


def test_an_existing_processor_keeps_its_bands_and_other_fields(shards, tmp_path):
    processor = FusMAEImageProcessor(
        sar_bands=["VH", "VV"], optical_bands=["B04", "B02"], do_pad=True, size_divisor=4, sar_nodata=-99.0
    )
    processor.save_pretrained(tmp_path)
    found = band_statistics(shards)
    write_processor(found, INFO, tmp_path)
    changed = FusMAEImageProcessor.from_pretrained(tmp_path)
    means = {band.band: band.mean for band in found.bands}
    assert changed.sar_mean == {band: means[band] for band in ("VH", "VV")}
    assert changed.optical_mean == {band: means[band] for band in ("B04", "B02")}
    ours = {"sar_mean", "sar_std", "optical_mean", "optical_std", "statistics"}
    before, after = processor.to_dict(), changed.to_dict()
    assert {key: before[key] for key in before if key not in ours} == {
        key: after[key] for key in before if key not in ours
    }


def test_another_offset_of_the_processor_is_kept_with_a_warning(shards, tmp_path):
    FusMAEImageProcessor(optical_bands=["B02"], optical_offset=1000).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="subtracts an offset of 1000"):
        write_processor(band_statistics(shards), INFO, tmp_path)
    assert FusMAEImageProcessor.from_pretrained(tmp_path).optical_offset == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optical_bands": ["B02", "B12"]}, r"the shards have no \['B12'\]"),
        ({"optical_bands": ["B02"], "sar_units": "raw"}, "declares sar_units 'raw' and the shards 'db'"),
        ("no json", "is no image processor"),
        ("[]", "is no image processor"),
        ('{"image_processor_type": "ViTImageProcessor"}', "is a ViTImageProcessor"),
    ],
)
def test_a_processor_that_does_not_fit_is_left_alone(shards, tmp_path, content, message):
    path = tmp_path / "preprocessor_config.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        FusMAEImageProcessor(**content).save_pretrained(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_processor(band_statistics(shards), INFO, tmp_path)
    assert path.read_bytes() == before


def test_a_band_of_one_value_cannot_be_normalised_by(tmp_path):
    pair = make_pair(0)
    pair.optical[2] = 7
    folder = write_shards(tmp_path / "shards", train=[pair])
    with pytest.raises(ValueError, match=r"optical_std.*B04"):
        write_processor(band_statistics(folder), INFO, tmp_path / "processor")
    assert not (tmp_path / "processor").exists()


def test_figures_survive_a_file(shards):
    found = band_statistics(shards)
    assert DatasetStatistics.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_stats_prints_a_table_and_writes_figures_and_processor(shards, tmp_path, capsys):
    files = ["--json", tmp_path / "s.json", "--processor", tmp_path / "processor", "--num-proc", "2"]
    assert run_command("stats", shards, *files) == 0
    printed = capsys.readouterr().out
    assert "small, train: 12 of 12 pairs" in printed
    assert "SAR in dB, optical in digital numbers; pixels without data do not count" in printed
    vv = band_statistics(shards).bands[0]
    assert f"VV    {vv.mean:>10.2f}{vv.std:>10.2f}" in printed
    assert json.loads((tmp_path / "s.json").read_text())["bands"][0]["band"] == "VV"
    assert (tmp_path / "processor" / "preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.00%"), (1, "100.00%"), (1e-9, ">0%"), (1 - 1e-9, "<100%"), (0.25, "25.00%")]
)
def test_all_and_nothing_are_said_only_where_it_is_so(share, text):
    assert format_share(share) == text
