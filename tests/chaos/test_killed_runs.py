"""However often a run is killed, it ends with the weights of one that was left alone, bit for bit."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from fusmae_hf.training import run_finetune, run_pretrain
from tests.training.conftest import SMALL

from .killed_runs import kill_until_done, program

MODEL = ["--preset", "tiny", "--config", json.dumps(SMALL)]
RUN = [
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"),
    *("--bf16", "1", "--min_crop", "0.5", "--band_jitter", "0.1", "--learning_rate", "1e-3", "--seed", "5"),
    *("--num_train_epochs", "4", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3"),
    *("--report_to", "none", "--disable_tqdm", "1"),
]
"""Seven steps an epoch of the 30 pairs to pretrain on, six of the 24 labelled ones."""


def assert_same_weights(first, second):
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "kinds"), [("false", ("writing", "random")), ("true", ("random",))])
def test_a_pretraining_run_that_is_killed_ends_with_the_weights_of_an_uncut_one(tmp_path, shards, streaming, kinds):
    arguments = ["--data", str(shards), *MODEL, *RUN, "--streaming", streaming, "--eval_strategy", "no"]
    run_pretrain.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    output = tmp_path / "killed"
    command = program("run_pretrain", *arguments, "--output_dir", output, "--resume_from_checkpoint", "auto")
    attempts = kill_until_done(command, output, kinds)
    assert sum(attempts.kills.values()) == len(kinds)
    assert "Resuming from" in attempts.outputs[-1]
    assert_same_weights(output, tmp_path / "whole")
    assert not list(output.glob("incomplete-*"))


@pytest.mark.slow
def test_a_sharded_run_of_two_processes_that_is_killed_while_writing_ends_as_an_uncut_one(
    tmp_path, shards, pytestconfig
):
    """FSDP2: each process writes files of its own into a checkpoint."""
    configuration = pytestconfig.rootpath / "training" / "accelerate" / "cpu-fsdp2.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    arguments = ["--data", str(shards), *MODEL, *RUN, "--eval_strategy", "no", "--num_train_epochs", "1"]
    arguments += ["--dataloader_num_workers", "0", "--resume_from_checkpoint", "auto"]
    folders = [tmp_path / "whole", tmp_path / "killed"]
    commands = [program("run_pretrain", *arguments, "--output_dir", folder, launcher=launcher) for folder in folders]
    kill_until_done(commands[0], folders[0], ())
    attempts = kill_until_done(commands[1], folders[1], ("writing",))
    assert attempts.kills["writing"] == 1
    assert_same_weights(*folders)
    manifest = json.loads((folders[1] / "checkpoint-2" / "manifest.json").read_text())
    assert (manifest["processes"], manifest["global_batch_size"]) == (2, 8)
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.bin"} <= manifest["files"].keys()


@pytest.mark.slow
def test_a_fine_tuning_run_that_is_killed_ends_with_the_weights_of_an_uncut_one(tmp_path, labelled, checkpoint):
    task = "single_label_classification"
    arguments = ["--data", str(labelled(task)), "--model", str(checkpoint), "--task", task, *RUN]
    arguments += ["--drop_path_rate", "0.3", "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3"]
    run_finetune.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    output = tmp_path / "killed"
    command = program("run_finetune", *arguments, "--output_dir", output, "--resume_from_checkpoint", "auto")
    attempts = kill_until_done(command, output, ("writing",))
    assert attempts.kills["writing"] == 1
    assert_same_weights(output, tmp_path / "whole")
    figures = [json.loads((folder / "metrics.json").read_text())["sensors"] for folder in (output, tmp_path / "whole")]
    assert figures[0] == figures[1]
