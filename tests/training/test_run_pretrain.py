import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import fusmae_hf
from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.cli.main import main as run_fusmae
from fusmae_hf.hub.cards import results_table
from fusmae_hf.plots.scores import plot_losses
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    PairArguments,
    PretrainingArguments,
    parse_arguments,
)
from fusmae_hf.training.loop.records import fresh_processor
from fusmae_hf.training.run_pretrain import main

from .conftest import SMALL

CLASSES = (DataArguments, ModelArguments, PretrainingArguments)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    model = json.dumps({**SMALL, "image_size": 16})
    path.write_text(
        f"""
preset: tiny
config: {model}
num_train_epochs: 2
per_device_train_batch_size: 8
base_learning_rate: 1e-2
logging_steps: 1
num_reconstructions: 2
disable_tqdm: true
"""
    )
    return path


def test_the_program_leaves_a_checkpoint_that_loads_and_the_records_of_the_run(tmp_path, config, shards, capsys):
    output = tmp_path / "run"
    main([str(config), "--data", str(shards), "--output_dir", str(output), "--extra_eval", str(shards)])
    for file in ("loss.png", "reconstructions.png", "run.json", "README.md", "preprocessor_config.json"):
        assert (output / file).stat().st_size > 100, file
    printed = capsys.readouterr().out
    assert f"In {output}:" in printed
    assert "simulated imagery" in printed
    record = json.loads((output / "run.json").read_text())
    assert record["pairs"] == 30
    assert record["held_out"] == {
        "validation": 9,
        shards.name: 30,
        f"{shards.name}_validation": 9,
        f"{shards.name}_test": 9,
    }
    assert record["learning_rate"] == pytest.approx(1e-2 * 8 / 256)
    model, processor = AutoModel.from_pretrained(output), AutoImageProcessor.from_pretrained(output)
    pair = load_pairs(shards, "test")[0]
    features = model(**processor(sar=pair["sar"], optical=pair["optical"])).pooler_output
    assert features.shape == (1, 32)
    assert list((output / "runs").rglob("events.out.tfevents.*"))


def test_the_model_card_states_the_run_and_leaves_nothing_open(tmp_path, config, shards):
    output = tmp_path / "run"
    main([str(config), "--data", str(shards), "--output_dir", str(output), "--num_train_epochs", "1"])
    card = ModelCard.load(output / "README.md")
    card.data.to_dict()
    text = card.text
    assert "**The imagery is simulated.**" in text
    assert "reconstruction of it" in text
    assert not re.search(r"\{[a-z_]*\}|More information needed|TODO|None", text)
    metrics = json.loads((output / "run.json").read_text())["metrics"]
    assert f"{metrics['eval_validation_sar_loss']:.4f}" in text
    assert "VV, VH" in text
    assert card.data.eval_results[0].metric_value == pytest.approx(metrics["eval_validation_optical_loss"])
    assert card.data.datasets == ["simulated"]
    written = yaml.safe_load((output / ".eval_results" / "results.yaml").read_text())
    entries = {entry.notes: entry for entry in parse_eval_result_entries(written)}
    of_sar = entries["masked reconstruction, sar; simulated, held out: validation"]
    assert of_sar.value == pytest.approx(metrics["eval_validation_sar_loss"])


def test_auto_resumes_from_the_newest_checkpoint_of_the_output_folder(tmp_path, config, shards, capsys):
    output = tmp_path / "run"
    arguments = [str(config), "--data", str(shards), "--output_dir", str(output), "--save_strategy", "epoch"]
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert "starting from the beginning" in capsys.readouterr().out
    before = torch.load(output / "checkpoint-6" / "optimizer.pt", weights_only=True)
    main([*arguments, "--resume_from_checkpoint", "auto"])
    assert "Resuming from" in capsys.readouterr().out
    assert before["state"][0]["step"] == 6


def test_nothing_held_out_is_said_and_trains_all_the_same(tmp_path, config, shards, capsys):
    only = tmp_path / "only"
    (only / "data").mkdir(parents=True)
    info = json.loads((shards / "dataset_info.json").read_text())
    info["splits"] = {"train": info["splits"]["train"]}
    (only / "dataset_info.json").write_text(json.dumps(info))
    for file in (shards / "data").glob("train-*"):
        (only / "data" / file.name).symlink_to(file)
    main([str(config), "--data", str(only), "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1"])
    assert "no validation split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-folder"], "no folder no-such-folder"),
        (["--data", "{empty}"], "holds neither shards"),
        (["--data", "{shards}", "--config", '{"mask_ration": 0.5}'], "no field `mask_ration`"),
        (["--data", "{shards}", "--config", '{"patch_size": 5, "image_size": 16}'], "not a multiple of `patch_size`"),
        (["--data", "{shards}", "--config", "mask_ratio=0.5"], "must be JSON"),
        (
            ["--data", "{shards}", "--metric_for_best_model", "accuracy"],
            "choose one of validation_loss, validation_opt",
        ),
        (["--num_reconstructions", "-1"], "must not be negative"),
        (["--weights_dtype", "float16"], "must be one of"),
        (["--data", "{shards}", "--preset", "huge"], "Unknown preset 'huge'"),
        (["--data", "{shards}", "--statistics", "imagenet"], "Unknown statistics 'imagenet'"),
        (["--data", "{shards}", "--per_device_train_batch_size", "64"], "fewer than one batch of 64"),
    ],
)
def test_a_mistake_ends_with_a_message(tmp_path, shards, arguments, message):
    (tmp_path / "empty").mkdir()
    filled = [a.replace("{shards}", str(shards)).replace("{empty}", str(tmp_path / "empty")) for a in arguments]
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(["--preset", "tiny", "--report_to", "none", "--output_dir", str(tmp_path / "run"), *filled])


@pytest.mark.slow
def test_an_archive_is_prepared_first(tmp_path, config, capsys):
    pytest.importorskip("rasterio")
    from fusmae_hf.readers.bigearthnet import example_pairs_root

    archive = example_pairs_root(tmp_path / "archive")
    output = tmp_path / "run"
    arguments = ["--config", '{"num_hidden_layers": 1, "image_size": 120}', "--per_device_train_batch_size", "2"]
    main([str(config), "--data", str(archive), "--output_dir", str(output), *arguments, "--num_train_epochs", "1"])
    assert "Prepared" in capsys.readouterr().out
    assert json.loads((output / "run.json").read_text())["held_out"] == {"validation": 1}


# --- arguments -----------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file(config):
    _, model, arguments = parse_arguments(CLASSES, [str(config), "--num_train_epochs", "7"])
    assert arguments.num_train_epochs == 7
    assert arguments.per_device_train_batch_size == 8
    assert arguments.base_learning_rate == pytest.approx(1e-2)
    assert model.config_fields["patch_size"] == 4


def test_defaults_are_those_of_masked_autoencoder_pretraining():
    _, _, arguments = parse_arguments(CLASSES, [])
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.95, 0.05)
    assert not arguments.remove_unused_columns
    assert not arguments.logging_nan_inf_filter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_train_epoch_s", "3"], "no argument --num_train_epoch_s. Did you mean `num_train_epochs`"),
        (["missing.yaml"], "no configuration file missing.yaml"),
    ],
)
def test_unknown_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(CLASSES, arguments)
    assert message in capsys.readouterr().err


def test_unknown_names_in_the_file_are_refused(tmp_path, capsys):
    path = tmp_path / "typo.yaml"
    path.write_text("mask_ration: 0.5\nlogging_step: 3\n")
    with pytest.raises(SystemExit):
        parse_arguments(CLASSES, [str(path)])
    assert "there is no argument `mask_ration`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smoke", "few-pairs", "bigearthnet-mm-small", "bigearthnet-mm-base"])
def test_shipped_configurations_parse(name, pytestconfig):
    path = pytestconfig.rootpath / "training" / "configs" / f"{name}.yaml"
    _, model, arguments = parse_arguments(CLASSES, [str(path), "--tf32", "false"])
    fusmae_hf.FusMAEConfig.from_preset(model.preset, **model.config_fields)
    assert arguments.adam_beta2 == 0.95


@pytest.mark.slow
def test_the_script_and_the_module_are_the_same_program(pytestconfig, tmp_path):
    commands = [
        [str(pytestconfig.rootpath / "training" / "run_pretrain.py"), "--help-all"],
        ["-m", "fusmae_hf.training.run_pretrain", "--help-all"],
    ]
    helps = [
        subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    assert "--base_learning_rate" in helps[0]
    assert "--data" in helps[0]
    assert helps[0] == helps[1]


# --- pictures ------------------------------------------------------------------------------------------------------


def test_the_loss_curves_tell_sensors_sources_and_baselines_apart():
    history = [
        {"step": 1, "loss": 2.0, "optical_loss": 0.5, "sar_loss": 1.5},
        {"step": 1, "eval_real_loss": 1.9, "eval_real_sar_loss": 1.2, "eval_real_sar_loss_visible_mean": 1.1},
        {"step": 2, "eval_loss": 1.8, "eval_optical_loss": 0.4, "eval_optical_loss_interpolation": 0.3},
    ]
    figure = plot_losses(history, "title")
    labels = [[line.get_label() for line in axis.lines] for axis in figure.axes]
    assert labels == [
        ["training", "held out real", "held out"],
        ["training", "held out", "held out, interpolated"],
        ["training", "held out real", "held out real, mean of the visible"],
    ]


def test_statistics_may_come_from_a_processor_that_stats_wrote(tmp_path, shards):
    info = load_pairs(shards, "train").info
    assert run_fusmae(["stats", str(shards), "--processor", str(tmp_path)]) == 0
    measured = FusMAEImageProcessor.from_pretrained(tmp_path)
    config = FusMAEConfig.from_preset("tiny", optical_bands=["B04", "B02"], sar_bands=["VH"])
    processor = fresh_processor(PairArguments(statistics=str(tmp_path)), info, config)
    assert processor.optical_bands == ["B04", "B02"]
    assert all(processor.optical_mean[band] == measured.optical_mean[band] for band in ("B04", "B02"))
    assert processor.sar_std["VH"] == measured.sar_std["VH"] != measured.sar_std["VV"]


def test_pairs_without_statistics_ask_for_them(shards):
    info = dataclasses.replace(load_pairs(shards, "train").info, statistics=None)
    with pytest.raises(ValueError, match="fusmae stats"):
        fresh_processor(PairArguments(), info, FusMAEConfig.from_preset("tiny"))


def test_a_table_has_no_columns_of_what_was_not_measured():
    table = results_table({"eval_loss": 0.75, "eval_some_optical_loss": 0.5, "eval_some_sar_loss": 0.25}, {"some": 3})
    assert table.splitlines() == [
        "| held out | pairs | sensor | model |",
        "|---|---|---|---|",
        "| some | 3 | optical | 0.5000 |",
        "| some | 3 | sar | 0.2500 |",
    ]


# --- going on from a checkpoint, pictures, logs ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_a_checkpoint_of_half_precision_and_other_patches_goes_on(tmp_path, config, shards, dtype, chosen, capsys):
    model = FusMAEForPreTraining(FusMAEConfig(**SMALL | {"patch_size": 5, "image_size": 20}))
    model.to(dtype).save_pretrained(tmp_path / "model")
    FusMAEImageProcessor().save_pretrained(tmp_path / "model")
    output, options = tmp_path / "run", [] if chosen == "float32" else ["--weights_dtype", chosen]
    main(
        ["--model", str(tmp_path / "model"), "--data", str(shards), "--output_dir", str(output), "--max_steps", "2",
         "--per_device_train_batch_size", "8", "--report_to", "none", *options]
    )  # fmt: skip
    assert "windows of 15x15 px of the images of 16x16 px" in capsys.readouterr().out
    kinds = {str(values.dtype).removeprefix("torch.") for values in load_file(output / "model.safetensors").values()}
    record = json.loads((output / "run.json").read_text())
    assert kinds == {chosen} == {record["weights_dtype"]}
    precision = {"float32": "fp32", "bfloat16": "bf16"}[chosen]
    assert f"{precision}, weights in {chosen}" in (output / "README.md").read_text()
    assert record["metrics"]["eval_validation_loss"] > 0


def test_a_fresh_model_is_of_the_size_of_the_windows_that_its_patches_fill(tmp_path, shards):
    fields = json.dumps({name: value for name, value in (SMALL | {"patch_size": 5}).items() if name != "image_size"})
    main(["--config", fields, "--data", str(shards), "--output_dir", str(tmp_path), "--max_steps", "1", "--report_to",
          "none", "--per_device_train_batch_size", "8", "--preset", "tiny"])  # fmt: skip
    assert list(FusMAEConfig.from_pretrained(tmp_path).image_size) == [15, 15]


@pytest.mark.parametrize("number", [0, 1])
def test_pictures_are_drawn_of_as_many_pairs_as_asked_for(tmp_path, config, shards, number):
    main([str(config), "--data", str(shards), "--output_dir", str(tmp_path), "--num_reconstructions", str(number)])
    assert (tmp_path / "reconstructions.png").is_file() == bool(number)
    assert (tmp_path / "run.json").is_file()


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_logs_are_pointed_to_where_there_are_some(tmp_path, config, shards, tracker, capsys):
    main([str(config), "--data", str(shards), "--output_dir", str(tmp_path / "run"), "--report_to", tracker])
    printed = capsys.readouterr().out
    assert ("runs/" in printed) == ("--logdir" in printed) == (tmp_path / "run" / "runs").is_dir()
    assert (tmp_path / "run" / "runs").is_dir() == (tracker == "tensorboard")


def test_the_best_checkpoint_is_chosen_by_a_held_out_loss(tmp_path, config, shards):
    options = ["--load_best_model_at_end", "1", "--report_to", "none", "--output_dir", str(tmp_path / "run")]
    main([str(config), "--data", str(shards), *options])
    state = json.loads(next((tmp_path / "run").glob("checkpoint-*/trainer_state.json")).read_text())
    losses = [entry["eval_validation_loss"] for entry in state["log_history"] if "eval_validation_loss" in entry]
    assert state["best_metric"] in losses


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_shards_of_the_former_format_can_be_trained_on(tmp_path, streaming):
    shards = Path(__file__).parents[1] / "shards" / "format_2"
    fields = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "patch_size": 4}
    arguments = [
        *("--data", str(shards), "--streaming", streaming, "--preset", "tiny", "--config", json.dumps(fields)),
        *("--statistics", str(tmp_path / "statistics"), "--output_dir", str(tmp_path / "run"), "--max_steps", "2"),
        *("--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "true"),
    ]
    assert run_fusmae(["stats", str(shards), "--processor", str(tmp_path / "statistics")]) == 0
    main(arguments)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 2
    assert record["metrics"]["eval_validation_loss"] > 0
