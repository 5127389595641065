"""The fusion study compares at equal compute, keeps places apart, and goes on where it was stopped."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fusion_study import units as units_module
from benchmarks.fusion_study.__main__ import main
from benchmarks.fusion_study.attention import _shares, chances
from benchmarks.fusion_study.data import SPLITS, load_data, prepare_data
from benchmarks.fusion_study.evaluation import describe, joined, shown_images
from benchmarks.fusion_study.pretraining import Pretrainer, batches
from benchmarks.fusion_study.report import difference, read_results, reference_of, with_average, write_tables
from benchmarks.fusion_study.settings import DatasetSettings, read_settings
from benchmarks.fusion_study.units import all_units, needs, run_study, undone
from benchmarks.fusion_study.variants import (
    all_variants,
    flops_per_pair,
    pretraining_steps,
    stream_config,
    stream_inputs,
)
from fusmae_hf import FusMAEModel

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "benchmarks" / "fusion_study"
SMOKE = STUDY / "smoke.yaml"
SETTINGS = read_settings(SMOKE)
VARIANTS = all_variants(SETTINGS)
PRETRAINED = [name for name, variant in VARIANTS.items() if variant.is_pretrained]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "data" / "simulated"
    prepare_data(SETTINGS.datasets["simulated"], tuple(SETTINGS.shifts), folder)
    return folder


@pytest.fixture(scope="module")
def data(data_folder):
    return load_data(SETTINGS.datasets["simulated"], tuple(SETTINGS.shifts), data_folder, "cpu")


@pytest.mark.parametrize("config", ["cpu.yaml", "gpu.yaml", "smoke.yaml"])
def test_every_configuration_names_known_variants_and_puts_pretraining_first(config):
    settings = read_settings(STUDY / config)
    units = all_units(settings)
    assert len(units) == len(set(units))
    for place, unit in enumerate(units):
        before = needs(settings, unit)
        assert before is None or before in units[:place]


@pytest.mark.parametrize("name", PRETRAINED)
def test_counted_operations_are_those_of_a_training_step(name, data):
    variant, batch_size = VARIANTS[name], data.settings.batch_size
    for stream in variant.streams:
        config = stream_config(SETTINGS, variant, data, stream)
        config._attn_implementation = "eager"
        pretrainer = Pretrainer(SETTINGS, variant, config)
        optical, sar, noise, noise_sar = next(batches(SETTINGS, variant, data, 0, 1))
        with FlopCounterMode(display=False) as counter:
            pretrainer(stream_inputs(stream, data, optical, sar), noise, noise_sar).backward()
        expected = flops_per_pair(SETTINGS, variant, data, stream) * batch_size
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", PRETRAINED)
def test_all_variants_take_the_same_budget_and_depth(name, data):
    large = dataclasses.replace(data, settings=dataclasses.replace(data.settings, budget_tflops=0.1))
    variant, total = VARIANTS[name], 0.0
    for stream, steps in pretraining_steps(SETTINGS, variant, large).items():
        total += steps * flops_per_pair(SETTINGS, variant, large, stream) * large.settings.batch_size
        config = stream_config(SETTINGS, variant, data, stream)
        depth = config.num_hidden_layers + (config.early_fusion == "cross_attention")
        assert depth == SETTINGS.model["num_hidden_layers"]
    assert total == pytest.approx(0.1e12, rel=0.01)


def test_seeds_are_paired_between_variants(data):
    one, other = (next(batches(SETTINGS, VARIANTS[name], data, 3, 1)) for name in ("both-independent", "stacked"))
    another_seed = next(batches(SETTINGS, VARIANTS["stacked"], data, 4, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[2], another_seed[2])


def test_a_stack_of_bands_gets_zeros_for_a_missing_sensor(data):
    optical, sar = torch.ones(2, 12, 24, 24), torch.ones(2, 2, 24, 24)
    stack = stream_inputs("stacked", data, optical, None)["pixel_values"]
    assert stack[:, :12].min() == 1
    assert stack[:, 12:].abs().max() == 0
    assert stream_inputs("stacked", data, None, sar)["pixel_values"][:, :12].abs().max() == 0
    assert set(stream_inputs("pair", data, None, sar)) == {"pixel_values_sar"}
    assert stream_inputs("optical", data, None, sar) is None


def test_a_stream_that_was_shown_nothing_is_filled_with_the_mean_of_training():
    like = [np.full((3, 2), 1.0), np.array([[0.0], [1.0], [5.0]])]
    assert joined([np.zeros((2, 2)), None], like=like).tolist() == [[0.0, 0.0, 2.0]] * 2
    assert joined([np.zeros((2, 2)), None]).shape == (2, 2)


def test_places_of_the_simulator_are_in_one_split_each(data):
    places = [set(data.splits[split].places.tolist()) for split in SPLITS]
    assert all(places)
    assert sum(map(len, places)) == len(set().union(*places))


def test_moved_sar_images_are_those_of_the_same_test_pairs(data):
    assert torch.equal(data.shifted_sar[0], data.splits["test"].sar)
    assert not torch.equal(data.shifted_sar[8], data.splits["test"].sar)
    assert np.allclose(np.hypot(*data.shifts[8].T), 8)


@pytest.mark.real_data
def test_events_of_ombria_are_in_one_split_each(tmp_path):
    if "FUSMAE_REAL_DATA" not in os.environ:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    settings = DatasetSettings("ombria", 128, 16, 1, 4, (), (), (0,), max_tiles=6)
    prepare_data(settings, (0, 8), tmp_path)
    found = load_data(settings, (0, 8), tmp_path, "cpu")
    events = [set(found.splits[split].places.tolist()) for split in SPLITS]
    assert sum(map(len, events)) == len(set().union(*events))
    # Content moves against the window: 8 px to the south means that row 8 shows what row 0 showed.
    south = int(found.shifts[8][0, 0])
    moved, still = found.shifted_sar[8][0, 0], found.splits["test"].sar[0, 0]
    assert torch.equal(moved[:south] if south < 0 else moved[south:], still[-south:] if south < 0 else still[:-south])


def test_shares_of_attention_tell_the_place_its_neighbours_and_where_the_ground_went():
    own = torch.eye(9)[None, None]
    shares = _shares(own, 3, torch.tensor([[0, 0]]))
    assert shares["colocated"].item() == 1
    assert shares["neighbours"].item() == 0
    assert np.isnan(shares["moved"]).all()
    to_the_east = torch.zeros(9, 9)
    to_the_east[torch.arange(8), torch.arange(1, 9)] = 1
    to_the_east[8, 0] = 1
    shares = _shares(to_the_east[None, None], 3, torch.tensor([[0, 1]]))
    assert shares["colocated"].item() == 0
    assert shares["moved"].item() == 1
    uniform = _shares(torch.full((1, 2, 9, 9), 1 / 9), 3, torch.tensor([[1, 0]]))
    assert uniform["colocated"].mean() == pytest.approx(chances(3)["chance"])
    assert uniform["neighbours"].mean() == pytest.approx(chances(3)["chance_neighbours"])


def test_differences_are_paired_by_seed():
    scores = {"a": {0: 10.0, 1: 20.0}, "b": {1: 15.0, 0: 5.0, 2: 99.0}}
    assert difference(scores, "a", "b").startswith("+5.0 [+5.0, +5.0]")
    assert reference_of("both-latent-complementary") == "none-complementary"
    assert reference_of("stacked") == "none-independent"


def test_fusions_are_averaged_in_each_seed_that_all_of_them_have():
    masks = ("independent", "consistent", "complementary")
    scores = {f"early-{name}": {0: 1.0, 1: 2.0} for name in masks} | {f"none-{name}": {0: 3.0} for name in masks}
    averaged = with_average(scores, ["early", "none"])
    assert averaged["average-consistent"] == {0: 2.0}
    assert averaged["early-consistent"] == scores["early-consistent"]


def test_kept_tables_are_those_of_the_kept_results(tmp_path):
    results = ROOT / "benchmarks" / "results"
    assert main(["restore", "--output_dir", str(tmp_path), "--file", str(results / "fusion-study.jsonl")]) == 0
    write_tables(tmp_path, tmp_path / "report")
    made, kept = (
        {path.name: path.read_text() for path in folder.glob("*.md")}
        for folder in (tmp_path / "report", results / "fusion-study")
    )
    assert made == kept


def test_scores_of_the_page_are_in_the_kept_tables():
    def scores(path):
        rows = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("|")]
        return {cell for row in rows for cell in map(str.strip, row.split("|")) if re.fullmatch(r"\d.* \[.*\]", cell)}

    on_page = scores("docs/study.md")
    assert len(on_page) > 300
    assert on_page <= scores("benchmarks/results/fusion-study/tables.md")


@pytest.mark.slow
def test_the_study_runs_and_continues_where_it_was_stopped(tmp_path, data_folder, monkeypatch):
    (tmp_path / "data").symlink_to(data_folder.parent)
    done = []
    run_unit = units_module.run_unit

    def stopped_after_three(settings, unit, folder):
        if len(done) == 3:
            raise KeyboardInterrupt
        run_unit(settings, unit, folder)
        done.append(unit)

    monkeypatch.setattr(units_module, "run_unit", stopped_after_three)
    with pytest.raises(KeyboardInterrupt):
        run_study(SETTINGS, tmp_path, workers=0)
    times = {unit: unit.result(tmp_path).stat().st_mtime_ns for unit in done}

    monkeypatch.setattr(units_module, "run_unit", run_unit)
    units = all_units(SETTINGS)
    killed = next(unit for unit in units if unit not in done)
    assert not killed.result(tmp_path).exists()
    assert main(["run", "--config", str(SMOKE), "--output_dir", str(tmp_path), "--workers", "0"]) == 0
    assert all(unit.result(tmp_path).stat().st_mtime_ns == time for unit, time in times.items())
    assert all(unit.result(tmp_path).is_file() for unit in units)

    archive, elsewhere = tmp_path / "kept.jsonl", tmp_path / "elsewhere"
    assert main(["save", "--output_dir", str(tmp_path), "--file", str(archive)]) == 0
    assert main(["restore", "--output_dir", str(elsewhere), "--file", str(archive)]) == 0
    assert read_results(elsewhere) == read_results(tmp_path)
    assert (elsewhere / "settings.json").read_text() == (tmp_path / "settings.json").read_text()
    assert undone(SETTINGS, units, elsewhere) == []

    report = tmp_path / "report"
    assert main(["tables", "--output_dir", str(tmp_path), "--report_dir", str(report)]) == 0
    assert main(["plots", "--output_dir", str(tmp_path), "--report_dir", str(report)]) == 0
    tables = (report / "tables.md").read_text()
    assert all(f"| {unit.variant} |" in tables for unit in units)
    assert {path.name for path in report.glob("*.png")} == {
        f"simulated-{name}.png"
        for name in (
            "bars",
            "pretraining",
            "label-fractions",
            "gains-by-class",
            "misregistration",
            "missing-sensor",
            "attention",
        )
    }
    assert "| Fus-MAE: early fusion, query fusion |" in (report / "short-simulated.md").read_text()
    records = read_results(tmp_path)
    assert len(records) == len(units)
    steps = {r["variant"]: r["steps"] for r in records if r["stage"] == "pretrain"}
    assert steps["combined"]["pair"] < steps["both-independent"]["pair"]


def test_encoders_that_are_gone_are_made_again_if_something_needs_them(tmp_path):
    units = all_units(SETTINGS)
    for unit in units:
        unit.result(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        unit.result(tmp_path).write_text("{}")
    assert undone(SETTINGS, units, tmp_path) == []
    probe = next(unit for unit in units if needs(SETTINGS, unit))
    probe.result(tmp_path).unlink()
    assert undone(SETTINGS, units, tmp_path) == [needs(SETTINGS, probe), probe]
    assert needs(SETTINGS, probe).result(tmp_path).is_file()  # in case that it never ends
    needs(SETTINGS, probe).checkpoint(tmp_path).mkdir(parents=True)
    needs(SETTINGS, probe).result(tmp_path).write_text("{}")
    assert undone(SETTINGS, units, tmp_path) == [probe]


def test_a_second_study_in_one_folder_is_refused(tmp_path):
    with units_module._alone(tmp_path), pytest.raises(RuntimeError, match="Another process"):
        run_study(SETTINGS, tmp_path, workers=0)


def test_units_are_done_in_the_order_of_the_patterns(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(units_module, "prepare_data", lambda *arguments: None)
    monkeypatch.setattr(units_module, "_run_here", lambda settings, units, folder, bar: done.extend(units) or [])
    units = all_units(SETTINGS)
    first = next(unit for unit in units[::-1] if needs(SETTINGS, unit))
    run_study(SETTINGS, tmp_path, workers=0, only=(str(first), "simulated/*"))
    before = [needs(SETTINGS, first), first]  # what it needs comes before it, whatever the patterns say
    assert done == before + [unit for unit in units if unit not in before]


def test_a_pattern_that_fits_no_unit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fits \['simulatd/\*'\]; units are called like simulated/pretrain/"):
        run_study(SETTINGS, tmp_path, workers=0, only=("simulatd/*",))


def test_results_of_other_settings_are_not_mixed(tmp_path):
    simulated = SETTINGS.datasets["simulated"]

    def run(**changes):
        changed = dataclasses.replace(SETTINGS, datasets={"simulated": dataclasses.replace(simulated, **changes)})
        return run_study(changed, tmp_path, workers=0, only=())

    run()
    run(seeds=(0, 1, 2))
    with pytest.raises(ValueError, match="other settings"):
        run(budget_tflops=7.0)


def test_contrastive_encoders_are_shown_a_sensor_at_a_time(data):
    variant = VARIANTS["contrastive"]
    encoders = {"pair": FusMAEModel(stream_config(SETTINGS, variant, data, "pair")).eval()}
    test, rows = data.splits["test"], np.arange(2)
    found = {
        shown: describe(SETTINGS, data, encoders, shown_images(test, shown), rows, alone=True)
        for shown in ("both", "sar", "optical")
    }
    for kind in ("scenes", "patches"):
        both, sar, optical = (getattr(found[shown], kind)[0] for shown in found)
        np.testing.assert_allclose(both, (sar + optical) / 2, rtol=1e-3, atol=1e-3)
    joint = describe(SETTINGS, data, encoders, shown_images(test, "both"), rows)
    assert not np.allclose(joint.scenes[0], found["both"].scenes[0], rtol=1e-2, atol=1e-2)
