"""A fine-tuning run that is killed ends as one that was left alone. For pretraining see `python -m tests.chaos`."""

import json
import random

import pytest

from fusmae_hf.training import run_finetune

from .disturbed_runs import RUN, goes_on, killed, module, while_writing
from .faults import same_weights


@pytest.mark.slow
def test_a_fine_tuning_run_that_is_killed_ends_with_the_weights_of_an_uncut_one(tmp_path, labelled, checkpoint):
    task = "single_label_classification"
    arguments = ["--data", str(labelled(task)), "--model", str(checkpoint), "--task", task, *RUN]
    arguments += ["--drop_path_rate", "0.3", "--eval_strategy", "steps", "--eval_steps", "3", "--save_steps", "3"]
    folders = whole, output = tmp_path / "whole", tmp_path / "killed"
    run_finetune.main([*arguments, "--output_dir", str(whole)])
    command = module("fusmae_hf.training.run_finetune", *arguments, "--output_dir", output)
    killed(command, output, while_writing(output, random.Random(0)))
    goes_on(command, output)
    assert same_weights(*folders)
    figures = [json.loads((folder / "metrics.json").read_text())["sensors"] for folder in folders]
    assert figures[0] == figures[1]
