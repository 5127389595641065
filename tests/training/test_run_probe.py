"""The probes' program: what it leaves, the same few labels as fine-tuning, intervals, mistakes."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor, FusMAEModel
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.evaluation import probes
from fusmae_hf.evaluation.baselines import BandStatistics
from fusmae_hf.evaluation.scores import accuracy, average_precision, f1
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training import run_probe
from fusmae_hf.training.finetuning.arguments import ProbeArguments
from fusmae_hf.training.finetuning.metrics import HEADLINE, TaskMetrics, score_intervals, scores_of_draws
from fusmae_hf.vocabulary import TASKS

from .labelled_pairs import CLASSES, write_labelled


@pytest.fixture
def probe(tmp_path, checkpoint, labelled):
    """Runs the program on a task, by default on the small checkpoint, with 5 neighbours, into `run`."""

    def run(task, *arguments, data=None, model=checkpoint, output="run"):
        named = ["--data", str(data or labelled(task)), "--output_dir", str(tmp_path / output), "--k", "5"]
        start = ["--model", str(model)] if model else []
        run_probe.main([*named, *start, *map(str, arguments)])
        return tmp_path / output

    return run


def probes_of(folder):
    return json.loads((folder / "metrics.json").read_text())["probes"]


def ids_of(folder):
    return json.loads((folder / "label_fraction.json").read_text())["ids"]


# --- what it leaves ------------------------------------------------------------------------------------------------


def test_the_depths_at_which_features_are_read_may_be_named(probe):
    folder = probe(TASKS[0], "--task", TASKS[0], "--config", '{"feature_layers": [0, 1]}', "--probes", "knn")
    assert json.loads((folder / "run.json").read_text())["features"]["feature_layers"] == [0, 1]


def test_every_probe_of_every_view_is_measured_and_written(probe, labelled, capsys):
    task = "multi_label_classification"
    folder = probe(task, "--task", task, "--pooling", "mean,class,sensors", "--sensors", "both,sar")
    rows = probes_of(folder)
    views = ["both/mean", "both/class", "both/sensors", "sar/mean", "sar/class"]
    assert list(rows) == [f"{name}/{view}" for name in ("linear", "knn") for view in views]
    assert rows["linear/both/mean"]["hyperparameters"]["selected_on"] == "validation"
    assert len(rows["linear/both/mean"]["sweep"]) == 7
    assert rows["knn/sar/class"]["hyperparameters"] == {"k": 5, "temperature": 0.07}
    printed, table = capsys.readouterr().out, (folder / "metrics.md").read_text()
    shown = rows["knn/sar/mean"]["metrics"]["average_precision_micro"]
    for text in (printed, table):
        assert f"| knn | SAR alone | mean | {shown:.4f} |" in text
    kept = pq.read_table(folder / "predictions.parquet")
    assert json.loads(kept.schema.metadata[b"class_names"]) == list(CLASSES)
    found = [
        row for row in kept.to_pylist() if (row["probe"], row["sensors"], row["pooling"]) == ("knn", "sar", "mean")
    ]
    assert [row["id"] for row in found] == [pair["id"] for pair in load_pairs(labelled(task), "test")]
    truth = np.array([[name in row["labels"] for name in CLASSES] for row in found], dtype=int)
    expected = average_precision(np.array([row["scores"] for row in found]), truth)
    assert shown == pytest.approx(expected["average_precision_micro"])
    record = json.loads((folder / "run.json").read_text())
    assert (record["pairs"], record["measured"], record["split"], record["trained_on"]) == (24, 6, "test", 24)
    assert (folder / "scores_by_class.png").stat().st_size > 1000


def test_an_encoder_whose_patches_do_not_fill_the_images_is_measured(probe, checkpoint, tmp_path):
    config = FusMAEConfig.from_pretrained(checkpoint)
    config.patch_size, config.image_size = 5, 20
    FusMAEModel(config).save_pretrained(tmp_path / "coarse")
    FusMAEImageProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "coarse")
    folder = probe(TASKS[0], "--task", TASKS[0], model=tmp_path / "coarse")
    assert len(probes_of(folder)) == 6


def test_nothing_goes_through_the_encoder_twice(probe, tmp_path, monkeypatch):
    arguments = ("--task", TASKS[0], "--sensors", "both", "--label_fraction", 0.5)
    first = probe(TASKS[0], *arguments)
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3  # a file for each split

    def forbidden(*args, **kwargs):
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr("fusmae_hf.modeling.modeling_fusmae.FusMAEModel.forward", forbidden)
    second = probe(TASKS[0], *arguments, "--seeds", 2, output="second")
    assert probes_of(second / "seed-42") == probes_of(first)


def test_several_seeds_are_summed_up_and_finished_ones_kept(probe, capsys):
    arguments = ("--task", TASKS[0], "--sensors", "both,sar", "--label_fraction", 0.25, "--seeds", 2, "--seed", 7)
    folder = probe(TASKS[0], *arguments)
    summary = json.loads((folder / "summary.json").read_text())
    row = "linear/sar/mean"
    values = [probes_of(folder / f"seed-{seed}")[row]["metrics"]["accuracy"] for seed in (7, 8)]
    assert summary[row]["accuracy"]["values"] == dict(zip("78", values, strict=True))
    assert summary[row]["accuracy"]["mean"] == pytest.approx(np.mean(values))
    assert "| linear | SAR alone | mean | " in (folder / "summary.md").read_text()
    (folder / "seed-8" / "metrics.json").unlink()
    capsys.readouterr()
    probe(TASKS[0], *arguments)
    printed = capsys.readouterr().out
    assert "seed-7, which is finished" in printed
    assert "seed-8, which is finished" not in printed
    assert json.loads((folder / "summary.json").read_text()) == summary
    with pytest.raises(SystemExit, match="other settings"):
        probe(TASKS[0], *arguments, "--k", 3)


def test_a_fresh_encoder_and_bands_without_any_are_floors(probe):
    small = json.dumps({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4})
    fresh = ("--from_scratch", "true", "--preset", "tiny", "--config", small)
    one = probe(TASKS[0], "--task", TASKS[0], "--probes", "knn", *fresh, model=None, output="one")
    same = probe(TASKS[0], "--task", TASKS[0], "--probes", "knn", *fresh, model=None, output="same")
    assert probes_of(one) == probes_of(same)
    assert json.loads((one / "run.json").read_text())["features"]["encoder"] is None
    bands = probe(TASKS[0], "--task", TASKS[0], "--features", "bands", model=None, output="bands")
    assert probes_of(bands)["linear/both/mean"]["metrics"]["accuracy"] == 1.0  # brightness tells the class


def test_statistics_of_bands_leave_out_pixels_without_data():
    torch.manual_seed(0)
    optical, sar = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = False
    optical[:, :, :2] = float("nan")
    found = BandStatistics(FusMAEConfig())(optical, sar, pixel_mask=mask).pooler_output
    seen = optical[:, :, 2:].flatten(2)
    expected = [seen.mean(2), sar.mean((2, 3)), seen.std(2, correction=0), sar.flatten(2).std(2, correction=0)]
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


def test_a_fine_tuned_checkpoint_can_be_probed(probe, finetune):
    tuned = finetune(TASKS[0], "--task", TASKS[0], "--num_pictures", 0, output="tuned")
    assert "linear/both/mean" in probes_of(probe(TASKS[0], "--task", TASKS[0], "--sensors", "both", model=tuned))


# --- few labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS[:2])
def test_probes_and_fine_tuning_learn_from_the_same_few_labels(probe, finetune, task):
    arguments = ("--task", task, "--label_fraction", 0.5, "--seed", 11)
    probed = probe(task, *arguments, "--sensors", "both", output="probed")
    tuned = finetune(task, *arguments, "--num_pictures", 0, "--eval_sensors", "both", output="tuned")
    other = probe(task, *arguments[:-1], 12, "--sensors", "both", output="other")
    assert ids_of(probed) == ids_of(tuned)
    assert len(ids_of(probed)) == 12
    assert ids_of(other) != ids_of(probed)


def test_the_probes_see_the_drawn_labels_alone(probe, monkeypatch):
    seen, fit = [], probes.linear_probe
    monkeypatch.setattr(probes, "linear_probe", lambda train, *rest: seen.append(train.ids) or fit(train, *rest))
    folder = probe(TASKS[0], "--task", TASKS[0], "--sensors", "sar", "--label_fraction", 0.5, "--probes", "linear")
    assert seen == [ids_of(folder)]


# --- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS[:2])
def test_metrics_of_resamples_are_those_of_the_metrics_on_the_pairs_drawn(name):
    generator = np.random.default_rng(3)
    task = FineTuningTask(name, CLASSES)
    scores = generator.integers(0, 5, (40, 3)) / 5.0  # many ties
    held = generator.integers(0, 2, (40, 3))
    labels = held.astype(np.float32) if task.is_multi_label else generator.integers(0, 3, 40)
    rows = generator.integers(0, 40, 40)
    for drawn in (np.arange(40), rows):
        if task.is_multi_label:
            expected = average_precision(scores[drawn], held[drawn]) | f1(scores[drawn], held[drawn])
        else:
            expected = accuracy(scores[drawn].argmax(axis=1), labels[drawn])
        found = scores_of_draws(task, scores, labels, 0.5)(drawn)
        for metric in HEADLINE[name]:
            assert found[metric] == pytest.approx(expected[metric])


def test_intervals_of_maps_are_over_maps():
    generator = np.random.default_rng(0)
    task = FineTuningTask(TASKS[2], CLASSES, dense=True)
    counts = generator.integers(0, 30, (25, 3, 3))
    whole = TaskMetrics(task).details(counts, np.zeros((25, 1)))
    found = score_intervals(task, counts, np.zeros((25, 1)), 50)
    assert list(found) == HEADLINE[task.name]
    for metric, interval in found.items():
        assert interval["low"] < whole[metric] < interval["high"]
        assert "25 test samples" in interval["covers"]


def test_one_flag_gives_intervals_to_probes_and_to_fine_tuning(probe, finetune):
    task = TASKS[1]
    probed = probe(task, "--task", task, "--sensors", "both", "--bootstrap", 30, output="probed")
    tuned = finetune(task, "--task", task, "--eval_sensors", "both", "--bootstrap", 30, output="tuned")
    of_probe = probes_of(probed)["knn/both/mean"]["intervals"]["f1_macro"]
    of_tuned = json.loads((tuned / "metrics.json").read_text())["intervals"]["both"]["average_precision_micro"]
    for folder, interval in ((probed, of_probe), (tuned, of_tuned)):
        assert interval["resamples"] == 30
        assert f"[{interval['low']:.4f}, {interval['high']:.4f}]" in (folder / "metrics.md").read_text()


# --- warnings and mistakes -----------------------------------------------------------------------------------------


def test_an_edge_of_the_sweep_and_a_class_without_samples_are_told(tmp_path, probe, capsys):
    change = lambda pair: replace(pair, labels=["dark"] if pair.labels == ["grey"] else pair.labels)  # noqa: E731
    data = write_labelled(tmp_path / "empty", TASKS[0], change)
    folder = probe(TASKS[0], "--task", TASKS[0], "--sweep", "1,2", "--probes", "linear", data=data)
    printed = capsys.readouterr().out
    assert "linear/both/mean: the best C, 1, lies on the edge of `--sweep`" in printed
    assert "No training sample tells the classes ['grey'] from others" in printed
    assert probes_of(folder)["linear/both/mean"]["untrained_classes"] == ["grey"]


def test_without_a_test_split_the_regularisation_is_not_chosen_on_what_is_measured(tmp_path, probe):
    data = write_labelled(tmp_path / "data", TASKS[0], test=0)
    folder = probe(TASKS[0], "--task", TASKS[0], "--probes", "linear", "--sensors", "both", data=data)
    assert json.loads((folder / "metrics.json").read_text())["split"] == "validation"
    chosen_on = probes_of(folder)["linear/both/mean"]["hyperparameters"]["selected_on"]
    assert chosen_on == "5-fold cross-validation"


def test_values_of_the_sweep_are_those_of_the_probe_unless_given():
    assert tuple(ProbeArguments().values) == probes.SWEEP


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("unlabelled", [], "made-up has no labels"),
        (TASKS[0], [], "allows several tasks"),
        ("regression", [], "not for regression: fine-tune for that, with run_finetune.py"),
        (TASKS[2], [], "not for semantic_segmentation: fine-tune for that, with run_finetune.py"),
        (TASKS[1], ["--task", TASKS[0]], "has 2 labels (['dark', 'grey']), but a single-label problem"),
        (TASKS[0], ["--task", TASKS[0], "--sensors", "lidar"], "`sensors` must be among"),
        (TASKS[0], ["--task", TASKS[0], "--probes", "linear,svm"], "`probes` must be among"),
        (TASKS[0], ["--task", TASKS[0], "--sensors", "sar", "--pooling", "sensors"], "add both to `sensors`"),
        (TASKS[0], ["--task", TASKS[0], "--sweep", "1,much"], "`sweep` must be numbers"),
        (TASKS[0], ["--task", TASKS[0], "--sweep", "0"], "`sweep` must be positive numbers"),
        (TASKS[0], ["--task", TASKS[0], "--label_fraction", "0"], "`label_fraction` must be a share"),
        (TASKS[0], ["--task", TASKS[0], "--label_fraction", "0.01"], "gives none"),
        (TASKS[0], ["--task", TASKS[0], "--k", "25"], "only 24 training samples: give a smaller `--k`"),
        (TASKS[0], ["--task", TASKS[0], "--from_scratch", "true"], "one of the two"),
        (TASKS[0], ["--task", TASKS[0], "--features", "bands"], "need no model"),
        (TASKS[0], ["--task", TASKS[0], "--bootstrap", "-1"], "`bootstrap` must be at least 0"),
    ],
)
def test_a_mistake_ends_with_a_message(probe, task, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        probe(task, *arguments)


def test_several_processes_are_refused(probe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"2 were started: use `python training/run_probe\.py`"):
        probe(TASKS[0], "--task", TASKS[0])


def test_nothing_held_out_is_a_mistake(tmp_path, probe):
    data = write_labelled(tmp_path / "only", TASKS[0], validation=0, test=0)
    with pytest.raises(SystemExit, match="neither a test nor a validation split"):
        probe(TASKS[0], "--task", TASKS[0], data=data)


_WITHOUT_EXTRAS = """
import sys
sys.modules |= dict.fromkeys({missing})
from fusmae_hf.training import run_finetune, run_probe
for program in (run_finetune, run_probe):
    try:
        program.main(["--help"])
    except SystemExit as end:
        assert end.code == 0
import pytest
for name in ("probes", "intervals"):
    with pytest.raises(ImportError, match="pip install"):
        __import__("fusmae_hf.evaluation." + name)
"""


def test_help_needs_none_of_the_extras():
    missing = {"sklearn", "scipy", "matplotlib", "peft", "tensorboard"}
    program = _WITHOUT_EXTRAS.replace("{missing}", repr(missing))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--label_fraction" in done.stdout
