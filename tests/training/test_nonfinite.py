"""Losses and gradients that are not finite: what is said, what is kept, what does not change."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.shards.writing import write_dataset_info, write_shard
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import PretrainingArguments
from fusmae_hf.training.loop.nonfinite import MicroBatch, NonFiniteError, input_faults
from fusmae_hf.training.run_pretrain import main

from .conftest import SMALL
from .spoiling import spoil
from .started_programs import start_two


def watch_steps(trainer):
    """For each step of the optimiser, whether it changed weights or its own state; filled as training goes on."""
    changed = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.before = self.snapshot()

        def on_optimizer_step(self, args, state, control, **kwargs):
            after = self.snapshot()
            same = len(after) == len(self.before) and all(map(torch.equal, after, self.before))
            changed.append(not same)

        def snapshot(self):
            states = trainer.optimizer.state_dict()["state"].values()
            values = [value for state in states for value in state.values()]
            return [tensor.clone() for tensor in (*trainer.model.parameters(), *values)]

    trainer.add_callback(Watch())
    return changed


def test_by_default_a_run_stops_at_the_first_loss_that_is_not_finite(tmp_path, make_trainer):
    trainer = spoil(make_trainer(tmp_path, gradient_accumulation_steps=2), 5)  # second batch of the third step
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "The loss of step 3 is not finite." in message
    assert "micro-batch 1: optical_loss and sar_loss not finite" in message
    assert "Weights and inputs are finite" in message
    assert trainer.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_message_loads_the_batch_that_was_kept(tmp_path, make_trainer, shards):
    trainer = spoil(make_trainer(tmp_path), 2)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    folder = tmp_path / "nonfinite" / "step-3"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    record = json.loads(next(folder.glob("*.json")).read_text())
    kept = load_file(next(folder.glob("*.safetensors")))
    pairs = load_pairs(shards, "train")
    for position, (row, name) in enumerate(zip(record["rows"], record["ids"], strict=True)):
        assert pairs[row]["id"] == name
        assert name in str(caught.value)
        assert torch.equal(kept["sar"][position], pairs[row]["sar"])
    assert record["settings"]["learning_rate"] == 1e-3
    code = "\n".join(line.strip() for line in str(caught.value).splitlines() if line.startswith("    "))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'noise_sar': ((4, 16)" in printed


@pytest.mark.parametrize("by", ["sar_loss", "gradient", "loss"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_skipped_step_changes_neither_weights_nor_optimiser(tmp_path, make_trainer, by, bf16):
    trainer = make_trainer(
        tmp_path,
        gradient_accumulation_steps=2,
        on_nonfinite="skip",
        logging_steps=2,
        bf16=bf16,
        emulate_bf16=True,
        max_steps=6,
        warmup_steps=0,
    )
    changed = watch_steps(spoil(trainer, 4, by=by))  # in the third step
    trainer.train()
    assert changed == [True, True, False, True, True, True]
    assert trainer.nonfinite_steps == 1
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["nonfinite_steps"] for entry in logs] == [0, 1, 1]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    rates = [entry["learning_rate"] for entry in logs]
    assert rates == sorted(rates, reverse=True)
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["optical_loss"] + entry["sar_loss"], rel=1e-3)
    assert (tmp_path / "nonfinite" / "step-3").is_dir()


def test_the_mean_loss_is_over_the_steps_that_were_taken(tmp_path, make_trainer):
    trainer = spoil(make_trainer(tmp_path, on_nonfinite="skip", logging_steps=1, max_steps=4), 1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert math.isnan(losses[1])
    assert all(math.isfinite(losses[step]) for step in (0, 2, 3))


def test_no_more_steps_are_skipped_than_allowed_in_all(tmp_path, make_trainer):
    trainer = spoil(make_trainer(tmp_path, on_nonfinite="skip", max_nonfinite_steps=2), 1, 3, 5)
    with pytest.raises(NonFiniteError, match=r"of step 6 is not finite[\s\S]*`max_nonfinite_steps` \(2\) had been"):
        trainer.train()


def test_skipping_in_an_interrupted_run_ends_with_the_same_weights_and_counts(tmp_path, make_trainer):
    settings = {
        "on_nonfinite": "skip",
        "max_nonfinite_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": None,
    }
    whole = spoil(make_trainer(tmp_path / "whole", **settings), 1, 5)
    whole.train()
    whole.save_model()
    again = spoil(make_trainer(tmp_path / "again", **settings), 1)  # the sixth batch of the run
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    again.save_model()
    assert again.nonfinite_steps == whole.nonfinite_steps == 2
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    limited = spoil(make_trainer(tmp_path / "limited", **settings | {"max_nonfinite_steps": 1}), 1)
    with pytest.raises(NonFiniteError, match="of step 6"):
        limited.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_weights_that_are_not_finite_are_told_from_bad_pairs(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    name, parameter = next(iter(trainer.model.named_parameters()))
    with torch.no_grad():
        parameter.fill_(math.inf)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert f"The weights themselves are not finite (1 parameters, {name} the first)" in str(caught.value)


def test_values_far_out_of_range_are_told_from_divergence(tmp_path, make_trainer):
    reader = SimulatedPairs(8, options=SimulationOptions(image_size=16, pairs_per_place=1))
    pairs = [reader.read(index) for index in range(8)]
    pairs[5].sar[1, 3, 4] = -1e30
    shard = write_shard(pairs, reader.info, tmp_path / "bad", "data/train-00000-of-00001.parquet")
    write_dataset_info(tmp_path / "bad", reader.info, [shard])
    trainer = make_trainer(tmp_path, train_dataset=load_pairs(tmp_path / "bad"))
    with pytest.warns(UserWarning, match="marks missing data"), pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert re.search(r"sar_loss not finite .*sar [0-9.]+e\+29\).*wrong units", str(caught.value), re.DOTALL)


def test_the_sensor_whose_loss_is_not_finite_is_named():
    losses = {"loss": math.nan, "optical_loss": 0.3, "sar_loss": math.inf}
    assert MicroBatch(0, {}, losses).not_finite == ["sar_loss"]
    assert MicroBatch(0, {}, {"loss": math.nan}).not_finite == ["loss"]
    assert not MicroBatch(0, {}, {"loss": 1.0}).not_finite


def test_inputs_that_are_not_finite_are_named_unless_masked():
    images, mask = torch.zeros(3, 2, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool)
    images[1, 0, 2, 3] = math.nan
    images[2, :, 1, 1] = -math.inf
    images[0, 1, 0, 0] = -7
    mask[1, 2, 3] = False
    inputs = {"pixel_values_sar": images, "labels": torch.tensor([1.0, math.nan, 2.0])}
    faults, largest = input_faults(inputs, ["a", "b", "c"])
    assert faults == ["1 sar values of b", "2 sar values of c", "the label of b"]
    assert largest == {"sar": 7.0}
    assert input_faults({**inputs, "pixel_mask_sar": mask}, ["a", "b", "c"])[0] == ["2 sar values of c", faults[2]]


def test_fine_tuning_stops_and_skips_as_well(tmp_path, make_tuner):
    with pytest.raises(NonFiniteError, match=r"step 2 is not finite[\s\S]*micro-batch 0: loss not finite"):
        spoil(make_tuner(tmp_path), 1).train()
    trainer = spoil(make_tuner(tmp_path, on_nonfinite="skip", max_steps=6, warmup_steps=0), 1)
    changed = watch_steps(trainer)
    trainer.train()
    assert changed == [True, False, True, True, True, True]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["nonfinite_steps"] for entry in logs] == [1, 1]
    assert all(math.isfinite(entry["grad_norm"]) and entry["grad_norm"] > 0 for entry in logs)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_all_processes_decide_alike_on_what_one_of_them_saw(tmp_path, shards, policy, pytestconfig, monkeypatch):
    (tmp_path / "shards").symlink_to(shards)
    monkeypatch.chdir(pytestconfig.rootpath)
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = start_two([sys.executable, "-m", "tests.training.spoiling", str(tmp_path), policy], logs)
    try:
        assert [process.wait(120) for process in processes] == [0, 0], logs[0].read_text()
    finally:
        for process in processes:
            process.kill()
    first, second = (json.loads((tmp_path / f"{policy}-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert math.isfinite(first["weights"])
    if policy == "stop":
        assert first["steps"] == 2
        assert "micro-batch 0 of process 1: loss not finite (loss inf, optical_loss 1." in first["message"]
        assert "of process 0" not in first["message"]
        assert [path.name for path in (tmp_path / "stop/nonfinite/step-3").glob("*.json")] == [
            "process-1-micro-batch-0.json"
        ]
    else:
        assert (first["steps"], first["skipped"]) == (6, 1)


def test_the_program_ends_with_the_message(tmp_path, shards, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        "fusmae_hf.training.run_pretrain.PictureCallback.__init__",
        lambda self, trainer, *rest: made.append(spoil(trainer, 1)),
    )
    arguments = ["--data", str(shards), "--config", json.dumps(SMALL), "--report_to", "none", "--disable_tqdm", "1"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "4"]
    with pytest.raises(SystemExit, match=re.escape("Error: The loss of step 2 is not finite.")):
        main([*arguments, "--eval_strategy", "no"])
    assert made
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "value"), [("on_nonfinite", "ignore"), ("max_nonfinite_steps", -1)])
def test_impossible_settings_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        PretrainingArguments(output_dir=str(tmp_path), **{name: value})


# --- precision and seeds -------------------------------------------------------------------------------------------

TOLERANCE = 0.006
"""Between the losses of each step of the same run in bf16 and in fp32, relative to the latter.

The largest measured with five seeds was 0.0023, the smallest 0.0006.
"""


def losses_of(trainer):
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_bf16_and_fp32_agree(tmp_path, make_trainer):
    settings = {"num_train_epochs": 4, "logging_steps": 1, "learning_rate": 3e-3}
    full = losses_of(make_trainer(tmp_path, **settings))
    half = losses_of(make_trainer(tmp_path, bf16=True, emulate_bf16=True, **settings))
    assert len(full) == 28
    assert not torch.equal(full, half)
    assert full[-5:].mean() < 0.8 * full[:5].mean()  # something was learnt
    torch.testing.assert_close(half, full, rtol=TOLERANCE, atol=0)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path, shards):
    arguments = ["--data", str(shards), "--config", json.dumps(SMALL), "--report_to", "none", "--disable_tqdm", "1"]
    arguments += ["--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--num_reconstructions", "1"]
    for run, seed in (("first", "1"), ("second", "1"), ("other", "2")):
        main([*arguments, "--output_dir", str(tmp_path / run), "--seed", seed])
    first, second, other = (
        (tmp_path / run / "model.safetensors").read_bytes() for run in ("first", "second", "other")
    )
    assert first == second
    assert first != other
