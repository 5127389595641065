"""The program: what it leaves, few labels, several seeds, mistakes."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSemanticSegmentation
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fusmae_hf import FusMAEConfig, FusMAEForImageClassification, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.cli.main import main as fusmae
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.evaluation.scores import average_precision
from fusmae_hf.plots.scores import plot_confusion, plot_scores_by_class
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training.arguments import PairArguments, parse_arguments
from fusmae_hf.training.finetuning.arguments import FineTuningArguments, FineTuningModelArguments, TaskArguments
from fusmae_hf.training.finetuning.labels import (
    PairSubset,
    balanced_weights,
    class_counts,
    quantity_scale,
    read_columns,
)
from fusmae_hf.training.finetuning.metrics import SMALLER_IS_BETTER, choosable
from fusmae_hf.training.finetuning.recipes import recipe_for
from fusmae_hf.training.run_finetune import main
from fusmae_hf.vocabulary import TASKS

from .conftest import QUICK, SMALL
from .labelled_pairs import CLASSES, INFO, INFOS, write_labelled

CLASSES_OF_ARGUMENTS = (PairArguments, FineTuningModelArguments, TaskArguments, FineTuningArguments)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())["sensors"]


# --- what it leaves ------------------------------------------------------------------------------------------------


def test_scene_classes_leave_a_checkpoint_that_loads_and_figures_that_agree(finetune, labelled, capsys):
    folder = finetune(
        "multi_label_classification", "--task", "multi_label_classification", "--early_stopping_patience", 2
    )
    printed = capsys.readouterr().out
    metrics = metrics_of(folder)
    assert list(metrics) == ["both", "sar", "optical"]
    for name in ("both sensors", "SAR alone", "optical alone"):
        assert f"| {name} | " in printed
        assert f"| {name} | " in (folder / "metrics.md").read_text()
    table = pq.read_table(folder / "predictions.parquet")
    assert json.loads(table.schema.metadata[b"class_names"]) == list(CLASSES)
    rows = [row for row in table.to_pylist() if row["sensors"] == "sar"]
    pairs = load_pairs(labelled("multi_label_classification"), "test")
    assert [row["id"] for row in rows] == [pair["id"] for pair in pairs]
    truth = [[name in row["labels"] for name in CLASSES] for row in rows]
    scores = np.array([row["scores"] for row in rows])
    expected = average_precision(scores, np.array(truth, dtype=int))
    assert metrics["sar"]["average_precision_micro"] == pytest.approx(expected["average_precision_micro"])
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.problem_type == "multi_label_classification"
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        again = model(**processor(sar=pairs[0]["sar"])).logits.sigmoid()
    np.testing.assert_allclose(again[0], scores[0], atol=1e-5)
    record = json.loads((folder / "run.json").read_text())
    assert (record["pairs"], record["measured"], record["split"]) == (24, 6, "test")
    assert record["best"]["metric"] == "average_precision_micro"


def test_the_card_of_a_fine_tuned_model_leaves_nothing_open(finetune):
    folder = finetune(
        "single_label_classification", "--task", "single_label_classification", "--eval_sensors", "sar,both"
    )
    card = ModelCard.load(folder / "README.md")
    assert not re.search(r"\{[a-z_]*\}|More information needed|TODO|\bNone\b", card.text)
    assert "**The imagery is simulated.**" in card.text
    assert "dark, grey, bright" in card.text
    accuracy = metrics_of(folder)["sar"]["accuracy"]
    assert f"| SAR alone | {accuracy:.4f} |" in card.text
    first = next(result for result in card.data.eval_results if result.metric_name == "accuracy, sar")
    assert first.metric_value == pytest.approx(accuracy)
    written = yaml.safe_load((folder / ".eval_results" / "results.yaml").read_text())
    assert {entry["notes"]: entry["value"] for entry in written}["accuracy, sar; made-up, test"] == accuracy


def test_maps_leave_counts_pictures_and_predicted_maps(finetune, labelled):
    folder = finetune(
        "semantic_segmentation", "--save_maps", "true", "--class_weights", "balanced", "--focal_gamma", 1
    )
    counts = [row["confusion"] for row in pq.read_table(folder / "predictions.parquet").to_pylist()]
    assert len(counts) == 3 * 6
    assert {sum(of_map) for of_map in counts} == {15 * 16}
    for picture in ("segmentation", "confusion", "scores_by_class"):
        assert (folder / f"{picture}.png").stat().st_size > 1000
    maps = sorted((folder / "maps").glob("*.png"))
    pairs = load_pairs(labelled("semantic_segmentation"), "test")
    assert [path.stem for path in maps] == [pair["id"] for pair in pairs]
    predicted, truth = np.asarray(Image.open(maps[0])), pairs[0]["label_map"].numpy()
    kept = truth != 9
    counted = np.bincount(truth[kept] * 3 + predicted[kept], minlength=9)
    assert counted.tolist() == counts[0]  # with both sensors
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    assert len(model.config.class_weights) == 3


@pytest.mark.parametrize(("task", "target"), [("regression", []), (TASKS[0], ["--target", "height"])])
def test_a_saved_model_gives_the_quantity_in_its_units(finetune, labelled, task, target):
    folder = finetune(task, *target, "--num_train_epochs", 8, "--learning_rate", "3e-3", "--eval_sensors", "both")
    metrics = metrics_of(folder)["both"]
    auto_class = AutoModelForImageClassification if target else AutoModelForSemanticSegmentation
    model, processor = auto_class.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    pairs = load_pairs(labelled(task), "test")
    batch = pairs.__getitems__(range(6))
    with torch.no_grad():
        logits = model(**processor(sar=batch["sar"], optical=batch["optical"])).logits
    if target:
        values = torch.tensor([float(value) for value in read_columns(pairs, ["height"])["height"]])
        errors = logits[:, 0] - values
    else:
        values = batch["label_map"]
        errors = (torch.nn.functional.interpolate(logits, (16, 16), mode="bilinear")[:, 0] - values)[values.isfinite()]
    assert errors.square().mean().sqrt().item() == pytest.approx(metrics["rmse"], rel=1e-3)
    assert metrics["rmse"] < 0.9 * values[values.isfinite()].std(correction=0)


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_adapters_are_saved_merged_or_alone(finetune, checkpoint, labelled, save):
    peft = pytest.importorskip("peft")
    name = "single_label_classification"
    folder = finetune(name, "--task", name, "--lora_rank", 2, "--lora_save", save, "--eval_sensors", "both")
    if save == "merged":
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert not any("lora" in key for key in model.state_dict())
    else:
        assert not (folder / "model.safetensors").exists()
        config = FusMAEForImageClassification.config_class.from_pretrained(folder)
        model = FusMAEForImageClassification.from_pretrained(checkpoint, config=config)
        model = peft.PeftModel.from_pretrained(model, folder)
    processor, pairs = AutoImageProcessor.from_pretrained(folder), load_pairs(labelled(name), "test")
    batch = pairs.__getitems__(range(6))
    with torch.no_grad():
        scores = model.eval()(**processor(sar=batch["sar"], optical=batch["optical"])).logits.softmax(dim=1)
    rows = pq.read_table(folder / "predictions.parquet").column("scores").to_pylist()
    np.testing.assert_allclose(scores.numpy(), rows, atol=1e-5)
    assert not re.search(r"\{[a-z_]*\}|More information needed", (folder / "README.md").read_text())


def test_a_fine_tuned_checkpoint_is_gone_on_from_with_its_head(finetune, capsys):
    first = finetune("regression", "--num_train_epochs", 4, "--learning_rate", "3e-3")
    again = finetune("regression", "--learning_rate", "1e-9", model=first, output="again")
    assert metrics_of(again)["both"]["rmse"] == pytest.approx(metrics_of(first)["both"]["rmse"], rel=1e-3)


def test_bands_that_the_pairs_lack_are_left_out_by_name(tmp_path, finetune, capsys):
    info = replace(INFOS[TASKS[0]], optical_bands=("B04", "B03"), class_names=CLASSES)
    data = write_labelled(tmp_path / "few", TASKS[0], lambda pair: replace(pair, optical=pair.optical[:2]), info)
    folder = finetune(TASKS[0], "--task", TASKS[0], data=data)
    assert "the model takes ['B03', 'B04'] alone" in capsys.readouterr().out
    assert AutoModelForImageClassification.from_pretrained(folder).config.optical_bands == ["B03", "B04"]


# --- few labels and several seeds ----------------------------------------------------------------------------------


def test_few_labels_are_the_same_again_and_written_down(finetune, labelled, capsys):
    name = "single_label_classification"
    arguments = ("--task", name, "--label_fraction", 0.5, "--label_seed", 3, "--num_pictures", 0)
    first, second = (finetune(name, *arguments, output=output) for output in ("first", "second"))
    drawn = [json.loads((folder / "label_fraction.json").read_text())["ids"] for folder in (first, second)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 12
    assert json.loads((first / "run.json").read_text())["pairs"] == 12
    assert "Training on 12 of 24 labelled pairs" in capsys.readouterr().out
    ids = read_columns(load_pairs(labelled(name), "train"), ["id"])["id"]
    assert sorted(int(id[-3:]) % 3 for id in drawn[0]) == [0] * 4 + [1] * 4 + [2] * 4
    kept = [*drawn[0][:-1], next(id for id in ids if id not in drawn[0])]
    content = json.loads((first / "label_fraction.json").read_text()) | {"ids": kept}
    (first / "label_fraction.json").write_text(json.dumps(content))
    finetune(name, *arguments, output="first")
    assert json.loads((first / "label_fraction.json").read_text())["ids"] == kept  # read, not drawn anew
    with pytest.raises(SystemExit, match=r"fraction 0\.5 instead of 0\.25, seed 3 instead of"):
        finetune(name, "--task", name, "--label_fraction", 0.25, output="first")


def test_a_subset_reads_its_own_pairs_and_keeps_their_rows(labelled):
    pairs = load_pairs(labelled("single_label_classification"), "train")
    subset = PairSubset(pairs, [7, 2, 11])
    batch = subset.__getitems__([(4, 2), (4, 0)])
    assert batch["id"] == [pairs[11]["id"], pairs[2]["id"]]
    assert batch["row"].tolist() == [11, 2]
    assert batch["epoch"].tolist() == [4, 4]
    assert sorted(row for _, row in subset.sampler(1, seed=1)) == [0, 1, 2]
    assert read_columns(subset, ["id"])["id"] == [pairs[row]["id"] for row in (2, 7, 11)]
    subset.packed = True
    assert not pairs.packed
    with pytest.raises(ValueError, match="--streaming false"):
        PairSubset(load_pairs(labelled("single_label_classification"), "train", streaming=True), [1])


def test_several_seeds_are_summed_up_and_finished_ones_kept(finetune, capsys):
    name = "single_label_classification"
    arguments = ("--task", name, "--seeds", 2, "--seed", 7, "--num_pictures", 0)
    folder = finetune(name, *arguments)
    summary = json.loads((folder / "summary.json").read_text())
    values = [metrics_of(folder / f"seed-{seed}")["sar"]["accuracy"] for seed in (7, 8)]
    got = summary["sar"]["accuracy"]
    assert list(got["values"].values()) == values
    assert got["mean"] == pytest.approx(np.mean(values))
    assert got["low"] <= got["mean"] <= got["high"]
    assert "| SAR alone | " in (folder / "summary.md").read_text()
    before = (folder / "seed-7" / "model.safetensors").stat().st_mtime_ns
    (folder / "seed-8" / "metrics.json").unlink()
    capsys.readouterr()
    finetune(name, *arguments)
    printed = capsys.readouterr().out
    assert "seed-7, which is finished" in printed
    assert "seed-8, which is finished" not in printed
    assert (folder / "seed-7" / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((folder / "summary.json").read_text()) == summary
    with pytest.raises(SystemExit, match="other settings"):
        finetune(name, *arguments, "--layer_decay", 0.5)


# --- labels --------------------------------------------------------------------------------------------------------


def test_balanced_weights_by_hand():
    single = FineTuningTask("single_label_classification", CLASSES)
    assert balanced_weights(np.array([6, 3, 1]), 10, single) == pytest.approx([10 / 18, 10 / 9, 10 / 3], abs=1e-5)
    several = FineTuningTask("multi_label_classification", CLASSES)
    assert balanced_weights(np.array([6, 2, 10]), 10, several) == pytest.approx([4 / 6, 4, 1], abs=1e-5)
    with pytest.raises(ValueError, match=r"without a training sample: \['grey'\]"):
        balanced_weights(np.array([6, 0, 1]), 7, single)


@pytest.mark.parametrize("name", TASKS[:3])
def test_classes_are_counted_in_the_pairs_that_are_trained_on(labelled, name):
    pairs = load_pairs(labelled(name), "train")
    task = FineTuningTask.of_pairs(pairs.info, name)
    counts, total = class_counts(PairSubset(pairs, [0, 1, 3]), task)  # of classes 0, 1, 0; the left half 1, 2, 1
    expected = {
        TASKS[0]: ([2, 1, 0], 3),
        TASKS[1]: ([2, 3, 1], 3),
        TASKS[2]: ([2 * 120, 3 * 120, 120], 3 * 240),
    }
    assert (counts.tolist(), total) == expected[name]


def test_mean_and_deviation_of_a_quantity_are_those_of_all_pixels(labelled):
    pairs = load_pairs(labelled("regression"), "train")
    values = np.stack([pair["label_map"].numpy() for pair in pairs])
    mean, deviation = quantity_scale(pairs, FineTuningTask.of_pairs(pairs.info))
    assert (mean, deviation) == pytest.approx((np.nanmean(values), np.nanstd(values)), rel=1e-5)


@pytest.mark.parametrize("name", TASKS[1:])
def test_the_task_is_inferred_where_the_data_allows_one_alone(name):
    info = INFOS[name]
    if name == TASKS[1]:
        with pytest.raises(ValueError, match="allows several tasks"):
            FineTuningTask.of_pairs(info)
    else:
        assert FineTuningTask.of_pairs(info).name == name


# --- documentation, arguments, pictures ----------------------------------------------------------------------------


def test_the_documented_example_needs_nothing_but_transformers_trainer(
    tmp_path, labelled, checkpoint, monkeypatch, pytestconfig, capsys
):
    text = (pytestconfig.rootpath / "docs" / "finetuning.md").read_text()
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(program.splitlines()) <= 27
    (tmp_path / "shards").symlink_to(labelled("multi_label_classification"))
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/finetuning.md", "exec"), {})
    assert float(capsys.readouterr().out.splitlines()[-1]) < 0.9
    model = AutoModelForImageClassification.from_pretrained("outputs/finetune")
    assert model.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize("name", ["classification", "segmentation", "regression", "smoke"])
def test_shipped_configurations_parse(name, pytestconfig):
    path = pytestconfig.rootpath / "training" / "configs" / f"finetune-{name}.yaml"
    _, _, learning, arguments = parse_arguments(CLASSES_OF_ARGUMENTS, [str(path)])
    assert learning.task in (*TASKS, None)
    assert arguments.load_best_model_at_end


def test_a_class_without_a_score_is_marked_and_one_without_a_reference_has_an_empty_row():
    figure = plot_scores_by_class({"both": {"a": 0.5, "b": None}, "sar": {"a": 0.2, "b": 0.1}}, "iou", "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["none"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5, 0, 0.2, 0.1]
    shown = plot_confusion(np.array([[3, 1], [0, 0]]), ["a", "b"], "title").axes[0].images[0].get_array()
    assert np.ma.filled(shown, np.nan)[0].tolist() == [0.75, 0.25]
    assert np.isnan(np.ma.filled(shown, np.nan)[1]).all()


def test_the_embedded_default_is_simulated(tmp_path, monkeypatch):
    assert INFO.simulated
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 40}
    model = ["--from_scratch", "true", "--preset", "tiny", "--config", json.dumps(small), "--simulated_pairs", "48"]
    task = ["--task", TASKS[1], "--num_pictures", "0", "--output_dir", str(tmp_path / "run")]
    main([*QUICK, *model, *task])
    assert (tmp_path / "run" / "metrics.json").is_file()


# --- checkpoints that do not suit at once ----------------------------------------------------------------------------


SINGLE = "single_label_classification"


@pytest.fixture(scope="session")
def coarse_checkpoint(tmp_path_factory):
    """A bfloat16 checkpoint whose patches of 5 px do not fill the 16 px of the labelled pairs."""
    folder = tmp_path_factory.mktemp("coarse")
    bands = {"optical_bands": INFO.optical_bands, "sar_bands": INFO.sar_bands}
    config = FusMAEConfig(**SMALL | bands | {"patch_size": 5, "image_size": 20})
    FusMAEForPreTraining(config).to(torch.bfloat16).save_pretrained(folder)
    FusMAEImageProcessor(**bands).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_other_patches_learns_on_windows_and_is_measured_on_whole_images(
    finetune, coarse_checkpoint, task, capsys
):
    options = ["--save_maps", "1"] if task == "semantic_segmentation" else []
    folder = finetune(task, "--task", task, *options, model=coarse_checkpoint)
    printed = capsys.readouterr().out
    assert printed.count("windows of 15x15 px of the images of 16x16 px") == 1
    counted = metrics_of(folder)["both"]
    if task == "semantic_segmentation":
        assert counted["num_pixels"] == 6 * 15 * 16  # every labelled one
        assert {Image.open(path).size for path in (folder / "maps").glob("*.png")} == {(16, 16)}
    if task == "regression":
        assert counted["num_values"] == 6 * 15 * 16


@pytest.mark.parametrize("options", [(), ("--lora_rank", 2), ("--freeze", "encoder")], ids=["whole", "lora", "frozen"])
def test_weights_of_half_precision_learn_in_single_precision(finetune, coarse_checkpoint, options):
    folder = finetune(SINGLE, "--task", SINGLE, *options, model=coarse_checkpoint)
    assert {values.dtype for values in load_file(folder / "model.safetensors").values()} == {torch.float32}
    record = json.loads((folder / "run.json").read_text())
    assert (record["precision"], record["weights_dtype"]) == ("fp32", "float32")
    assert "fp32, weights in float32" in (folder / "README.md").read_text()


@pytest.mark.parametrize("options", [(), ("--bf16", "1", "--emulate_bf16", "1")], ids=["bf16 alone", "autocast"])
def test_weights_learn_in_half_precision_where_that_is_asked_for(finetune, checkpoint, options):
    folder = finetune(SINGLE, "--task", SINGLE, "--weights_dtype", "bfloat16", *options)
    assert {values.dtype for values in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    record = json.loads((folder / "run.json").read_text())
    assert (record["precision"], record["weights_dtype"]) == ("bf16", "bfloat16")


# --- the metric of the best checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "metric", "known"),
    [
        ("single_label_classification", "mean_iou", "accuracy, accuracy_mean_per_class, loss"),
        ("multi_label_classification", "accuracy", "average_precision_micro, average_precision_macro, f1_micro"),
        ("semantic_segmentation", "no_such_metric", "mean_iou, pixel_accuracy, loss"),
        ("regression", "eval_bias", "rmse, mae, r2, loss"),
    ],
)
def test_a_metric_that_the_task_has_not_is_refused_before_training(finetune, task, metric, known, tmp_path):
    with pytest.raises(SystemExit, match=f"`metric_for_best_model` is .*{known}"):
        finetune(task, "--task", task, "--metric_for_best_model", metric)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("given", "options", "greater"),
    [
        (None, {}, False),
        ("mae", {}, False),
        ("r2", {}, True),
        ("eval_loss", {}, False),
        ("r2", {"greater_is_better": False}, False),
    ],
)
def test_the_direction_of_a_metric_is_known(tmp_path, given, options, greater):
    arguments = FineTuningArguments(str(tmp_path), metric_for_best_model=given, use_cpu=True, **options)
    arguments.choose_best_by(choosable(FineTuningTask("regression", ("t/ha",), dense=True)), SMALLER_IS_BETTER)
    assert arguments.metric_for_best_model == (given or "rmse").removeprefix("eval_")
    assert arguments.greater_is_better is greater


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_gives_every_metric_to_choose_by(tmp_path, make_tuner, labelled, task):
    tuner = make_tuner(tmp_path, task, eval_dataset=load_pairs(labelled(task), "validation"))
    assert {f"eval_{name}" for name in choosable(tuner.task)} <= set(tuner.evaluate())


def test_inputs_in_metrics_are_refused_before_training(finetune):
    with pytest.raises(SystemExit, match="`include_for_metrics` inputs"):
        finetune(SINGLE, "--task", SINGLE, "--include_for_metrics", "inputs")


# --- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels", "size", "options", "expected"),
    [
        (
            "semantic_segmentation",
            451,
            (256, 256),
            {},
            {"max_steps": 2255, "preset": "nano", "patch": 16, "window": None},
        ),
        ("semantic_segmentation", 9, (512, 512), {}, {"max_steps": 600, "patch": 16, "window": 256}),
        ("semantic_segmentation", 9, (120, 120), {}, {"patch": 15, "window": None}),
        ("semantic_segmentation", 9, (512, 300), {"model": "x"}, {"patch": None, "window": 252, "preset": None}),
        ("multi_label_classification", 10**6, (120, 120), {}, {"max_steps": 20_000, "preset": "tiny", "patch": 8}),
        ("regression", 9, (256, 256), {"preset": "base"}, {"patch": 8, "window": None}),
    ],
)
def test_a_recipe_follows_task_labels_and_size(name, labels, size, options, expected):
    task = FineTuningTask.of_pairs(INFOS[name], name)
    model = FineTuningModelArguments(model=options.get("model"))
    patch_size = 12 if model.model else None
    values, said = recipe_for(task, labels, size, model, patch_size=patch_size, preset=options.get("preset"))
    assert "window" not in recipe_for(task, labels, size, model, patch_size=patch_size, windows=False)[0]
    found = values | {"patch": values.get("config", {}).get("patch_size")}
    assert {key: found.get(key) for key in expected} == expected
    assert f"{values['max_steps']:,} steps" in said
    assert values.get("from_scratch", False) == (model.model is None)


def test_one_line_fine_tunes_with_the_recipe_and_arguments_win(labelled, tmp_path, capsys):
    shards = str(labelled("semantic_segmentation"))
    config = '{"segmentation_hidden_size": 16}'
    given = ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--report_to", "none", "--seed", "3"]
    assert (
        fusmae(["finetune", shards, str(tmp_path / "out"), "--preset", "nano", "--", *given, "--config", config]) == 0
    )
    printed = capsys.readouterr().out
    assert "Recipe finetune-segmentation: 600 steps" in printed
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["steps"], record["seed"], record["from_scratch"]) == (2, 3, True)
    saved = FusMAEConfig.from_pretrained(tmp_path / "out")
    assert (saved.segmentation_hidden_size, saved.patch_size) == (16, 16)
    assert "SAR alone" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "steps", "rate"),
    [([], 5, 1e-3), (["--num_train_epochs", "2"], -1, 1e-3), (["--base-learning-rate=0.1"], 5, 0.0)],
)
def test_what_a_command_line_names_undoes_what_stands_for_the_same(tmp_path, given, steps, rate):
    values = {"max_steps": 5, "learning_rate": 1e-3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for first, defaults in (([], values), ([str(tmp_path / "run.yaml")], {})):
        *_, arguments = parse_arguments(CLASSES_OF_ARGUMENTS, [*first, *given], defaults=defaults)
        assert (arguments.max_steps, arguments.learning_rate) == (steps, rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modality_dropout", "0.7"], "must lie in"),
        (["--modality_dropout", "0.2", "--sensors", "sar"], "hides one of two sensors"),
        (["--window", "4096"], "at most the"),
        (["--window", "7"], "multiple of the model's patches"),
    ],
)
def test_impossible_windows_and_dropouts_are_refused_before_training(finetune, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        finetune("semantic_segmentation", "--task", "semantic_segmentation", *options)
    assert message in f"{ended.value} {capsys.readouterr().err}"
