"""The benchmark scripts run from end to end and write the figures they promise; how large these are is not asked."""

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor, FusMAEModel

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_num_hidden_layers": 1,
}

pytestmark = pytest.mark.slow


@pytest.fixture
def load(monkeypatch):
    """Loads a script as a module that sees no GPU."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module


@pytest.fixture
def run_main(monkeypatch):
    """Runs the main function of a loaded script with a command line."""

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
        script.main()

    return run


def assert_positive(figures, *names):
    for name in names:
        assert math.isfinite(figures[name]), name
        assert figures[name] > 0, name


def test_train_step_compares_both_models(tmp_path, monkeypatch, capsys, load, run_main):
    script = load("train_step")
    monkeypatch.setitem(script.PEAK_SIZE, "cpu", 64)
    options = ["--size", "tiny", "--image_size", 16, "--batch_size", 2, "--rounds", 1, "--config", json.dumps(TINY)]
    run_main(script, *options, "--json", tmp_path / "step.json")
    record = json.loads((tmp_path / "step.json").read_text())
    assert {"device", "machine", "torch", "transformers", "settings"} <= set(record)
    printed = capsys.readouterr().out
    for model in ("FusMAE", "ViTMAE"):
        assert f"| {model} |" in printed
        figures = record["results"][model]
        assert_positive(figures, "pairs_per_second", "gflop_per_pair", "share_of_peak", "fusmae_is_faster")


def test_inference_measures_every_input_in_every_precision_and_loading(tmp_path, capsys, load, run_main):
    options = ["--preset", "tiny", "--image_size", 16, "--batch_size", 2, "--rounds", 1, "--load_rounds", 1]
    run_main(load("inference"), *options, "--config", json.dumps(TINY), "--json", tmp_path / "inference.json")
    results = json.loads((tmp_path / "inference.json").read_text())["results"]
    measured = {(row["model"], row["inputs"], row["precision"]) for row in results["features"]}
    precisions = ("fp32", "bf16 autocast", "bf16 weights")
    inputs = ("both sensors", "optical alone", "SAR alone")
    assert measured == {
        *(("FusMAE", given, precision) for given in inputs for precision in precisions),
        *(("ViT, 14 bands", "both sensors", precision) for precision in precisions),
    }
    for row in results["features"]:
        assert_positive(row, "latency_ms", "pairs_per_second", "latency_to_both", "rate_to_both")
        if row["model"] == "FusMAE" and row["inputs"] == "both sensors":
            assert row["latency_to_both"] == row["rate_to_both"] == 1
    assert {row["model"] for row in results["loading"]} == {"FusMAE", "ViT, 14 bands"}
    for row in results["loading"]:
        assert_positive(row, "seconds", "bytes_on_disk")
    assert "| ViT, 14 bands | both sensors | bf16 weights | eager |" in capsys.readouterr().out


def test_scaling_measures_each_axis_and_processes_and_draws_them(tmp_path, monkeypatch, load, run_main):
    script = load("scaling")
    monkeypatch.setitem(
        script.AXES, "quick", {"image_size": [16, 24], "patch_size": [4, 8], "preset": ["tiny"], "batch_size": [1, 2]}
    )
    centre = ["--image_size", 16, "--batch_size", 2, "--rounds", 1, "--processes", 1, 2]
    run_main(script, "--quick", "--out", tmp_path, *centre)
    results = json.loads((tmp_path / "scaling.json").read_text())["results"]
    values = {axis: [row["value"] for row in rows] for axis, rows in results["axes"].items()}
    assert values == {
        "image_size": [16, 24],
        "patch_size": [4, 8],
        "preset": ["tiny"],
        "batch_size": [1, 2],
        "processes": [1, 2],
    }
    for axis, rows in results["axes"].items():
        for row in rows:
            assert_positive(row, "seconds", "predicted_seconds", "measured_to_predicted", "gflop")
            if row["value"] == results["centre"].get(axis):
                assert row["measured_to_predicted"] == pytest.approx(1)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def gpu(load):
    return load("gpu")


def quick_settings(gpu, **changes):
    quick = {"image_size": 16, "config": json.dumps(TINY), "pairs": 8, "training_steps": 2, "batch_sizes": (2,)}
    return gpu.Settings("cpu", **{**gpu.TINY, **quick, **changes})


def test_the_gpu_script_measures_every_piece_or_says_why_not(tmp_path, gpu, monkeypatch):
    unhurried = [dataclasses.replace(piece, seconds=600) for piece in gpu.make_pieces(quick_settings(gpu))]
    monkeypatch.setattr(gpu, "make_pieces", lambda settings: unhurried)  # no limit that a busy machine reaches
    record = gpu.run(quick_settings(gpu), tmp_path, minutes=30)
    assert json.loads((tmp_path / "gpu.json").read_text())["pieces"] == json.loads(json.dumps(record["pieces"]))
    pieces = record["pieces"]
    assert "GPU" in pieces["lever compiled loss, CUDA graphs"]["error"]
    steps = [name for name, found in pieces.items() if name.startswith(("step", "lever")) and "error" not in found]
    assert len(steps) >= 8
    for name in steps:
        assert_positive(pieces[name], "pairs_per_second", "gflop_per_pair", "tflop_per_second", "mfu")
        assert pieces[name]["recompiles"] == 0, name
    assert pieces["lever compiled loss"]["graphs"] == 1
    assert pieces["step tiny FusMAE compiled"]["graphs"] > 1  # of the fusion, of a layer of the encoder, of a decoder
    for way in ("step alone", "raw, in line", "float32, in line"):
        assert_positive(pieces["transfers"]["ways"][way], "pairs_per_second", "to_step")
    assert pieces["transfers"]["bytes_per_pair"] == {"raw": 16 * 16 * (12 * 2 + 2 * 4), "float32": 16 * 16 * 14 * 4}
    assert {"pairs_per_second", "data_wait_share"} <= set(pieces["training run"])
    assert len(pieces["inference"]["features"]) == 12
    report = gpu.markdown(record)
    assert "These are figures of a CPU, not of a GPU." in report
    assert "| compiled loss, CUDA graphs | not measured |" in report


def test_pieces_without_time_are_stopped_and_reported_as_not_measured(tmp_path, gpu):
    record = gpu.run(quick_settings(gpu), tmp_path, minutes=0, only="^peak|^step.*eager")
    assert list(record["pieces"]) == ["peak", "step tiny FusMAE eager", "step tiny ViTMAE eager"]
    assert all(found["stopped"] == "the time was over" for found in record["pieces"].values())
    report = (tmp_path / "gpu.md").read_text()
    assert re.search(r"\| tiny \| FusMAE \| eager \|( not measured \|){6}", report)
    assert "- step tiny FusMAE eager: the time was over" in report


def test_a_batch_that_does_not_fit_ends_the_search_with_the_best_one_that_did(monkeypatch, gpu):
    rates = {2: 10.0, 4: 20.0}

    def time_step(step, settings, batch, rounds, until):
        if batch not in rates:
            raise torch.OutOfMemoryError("no memory")
        return {"batch": batch, "pairs_per_second": rates[batch], "peak_tflop_per_second": 1.0}

    monkeypatch.setattr(gpu, "time_step", time_step)
    settings = quick_settings(gpu)
    found = {}
    for figures in gpu.measure_step(settings, math.inf, (2, 4, 8, 16), gpu.Variant("tiny")):
        found |= figures
    assert found["out_of_memory_at"] == 8
    assert found["batch"] == 4
    assert found["tried"] == {"2": 10.0, "4": 20.0}


def test_an_unknown_piece_is_refused_with_the_names_there_are(tmp_path, gpu):
    with pytest.raises(ValueError, match="training run"):
        gpu.run(quick_settings(gpu), tmp_path, minutes=1, only="nothing like it")


def test_levers_compare_each_way_with_the_model_as_it_is(tmp_path, monkeypatch, load, run_main):
    monkeypatch.setitem(load("train_step").PEAK_SIZE, "cpu", 64)
    script = load("levers")
    run_main(script, "--preset", "tiny", "--batch_size", 1, "--rounds", 1, "--json", tmp_path / "levers.json")
    record = json.loads((tmp_path / "levers.json").read_text())
    assert set(record["results"]["ways"]) == set(script.ways(compiled=False))
    for figures in record["results"]["ways"].values():
        assert_positive(figures, "pairs_per_second", "time_against_as_it_is")


def test_levers_refuse_a_way_that_changes_the_loss(monkeypatch, load, run_main):
    script = load("levers")
    worse = script.partial(script.patch.object, script.modeling, "cast_once", lambda values: values * 2)
    monkeypatch.setattr(script, "ways", lambda compiled: {"as it is": script.Way(), "wrong": script.Way(worse)})
    with pytest.raises(SystemExit, match="wrong: the loss is"):
        run_main(script, "--preset", "tiny", "--batch_size", 1, "--rounds", 1)


@pytest.fixture
def maps(tmp_path):
    """A file of 12 patches of 40x40 px, the first half bright and of one class, and features of a peer that knows."""
    rng = np.random.default_rng(0)
    bright = np.arange(12) < 6
    ids = np.array([f"patch-{number}" for number in range(12)])
    np.savez(
        tmp_path / "patches.npz",
        sar=rng.normal(-15, 2, (12, 2, 40, 40)).astype(np.float32),
        optical=(rng.integers(300, 900, (12, 4, 40, 40)) + 3000 * bright[:, None, None, None]).astype(np.uint16),
        labels=np.stack([bright, ~bright], axis=1),
        clc=np.broadcast_to(np.where(bright, 111, 512)[:, None, None], (12, 40, 40)),
        patch_id=ids,
    )
    order = rng.permutation(12)
    told = np.eye(2)[bright.astype(int)][order].astype(np.float32)
    cells = np.repeat(told[:, None], 25, axis=1)
    np.savez(tmp_path / "peer.npz", scene=told, cells=cells, patch_id=ids[order])
    return tmp_path


def test_features_are_compared_on_patches_that_no_probe_has_seen(maps, load, run_main, capsys):
    torch.manual_seed(0)
    fields = {**TINY, "image_size": 40, "patch_size": 8, "intermediate_size": 32}
    FusMAEModel(FusMAEConfig.from_preset("tiny", **fields)).save_pretrained(maps / "model")
    FusMAEImageProcessor().save_pretrained(maps / "model")
    model = str(maps / "model")
    options = ["--model", model, "--model", f"{model}@0,1", "--maps", maps / "patches.npz"]
    options += ["--peer", f"told={maps / 'peer.npz'}", "--simulated", 0, "--repeats", 1, "--resamples", 20]
    run_main(load("features"), *options, "--output", maps / "rows.json")
    rows = json.loads((maps / "rows.json").read_text())
    values = {(r["score"], r["sensors"], r["labels"], r["method"]): r["draws"] for r in rows}
    for score in ("AP of scenes", "F1 of cells"):
        assert values[score, "both", "all", "told"] == [100.0] * 21
        assert values[score, "optical", "all", "statistics of bands"][0] == 100
        assert values[score, "sar", "all", "statistics of bands"][0] < 95
        assert ("told", "sar") not in {(method, sensors) for _, sensors, _, method in values}
    assert len(rows) == 2 * 3 * (3 * 3 + 1)
    assert "| told | 100.0 [100.0, 100.0] |" in capsys.readouterr().out


def test_average_precision_of_drawn_samples_is_that_of_scikit_learn(load):
    from sklearn.metrics import average_precision_score

    rng, script = np.random.default_rng(0), load("features")
    scores, truth = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4
    weights = script.draws(np.arange(30) // 2, 5)
    expected = [average_precision_score(truth, scores, sample_weight=drawn) for drawn in weights]
    np.testing.assert_allclose(script.weighted_average_precision(scores, truth, weights), expected)
    assert (weights[:, ::2] == weights[:, 1::2]).all()  # those of a group are drawn together
    assert (weights.sum(axis=1) == 30).all()


def test_simulated_pairs_of_one_place_are_never_on_both_sides(monkeypatch, load):
    script = load("features")
    monkeypatch.setattr(script, "FRACTIONS", (0.1, 1.0))
    patches = script.simulated_patches(40, 2)
    for splits in patches.splits.values():
        for (split,) in splits:
            assert not set(patches.groups[split.fitted]) & set(patches.groups[split.scored])
    assert [len(patches.splits[share][0][0].fitted) for share in ("10 %", "100 %")] == [2, 24]
