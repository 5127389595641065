"""What becomes of a run that is told to end, by real signals to real processes."""

import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training import run_finetune, run_pretrain
from fusmae_hf.training.loop.signals import (
    EXIT_CODE,
    ORPHANED,
    Preempted,
    Preemption,
    ends_by_signal,
    held_back,
    ignore_signals_of_others,
)
from tests.chaos.disturbed_runs import alive, kill_groups

from .conftest import SMALL
from .started_programs import start, start_two, wait_for

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class At(TrainerCallback):
    """Sends this process a signal at one event, the `number`-th of its kind."""

    def __init__(self, event, number, sent=signal.SIGTERM):
        self.left, self.sent = number, sent
        setattr(self, event, self.count)

    def count(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.sent)


def preempted(trainer, event, number=1, sent=signal.SIGTERM, **options):
    """Train until told to end at an event; the message."""
    trainer.add_callback(At(event, number, sent))
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Preempted) as caught:
        trainer.train(**options)
    assert caught.value.code == EXIT_CODE == 75
    assert [signal.getsignal(each) for each in SIGNALS] == before
    return str(caught.value)


# --- where in a run the signal comes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "number", "step", "sent"),
    [
        ("on_step_begin", 2, 2, signal.SIGTERM),
        ("on_substep_end", 2, 2, signal.SIGUSR1),
        ("on_pre_optimizer_step", 2, 2, signal.SIGTERM),
        ("on_step_end", 2, 2, signal.SIGUSR1),
        ("on_step_end", 3, 3, signal.SIGTERM),  # the last of the first epoch
        ("on_epoch_end", 1, 3, signal.SIGTERM),
        ("on_step_end", 6, 6, signal.SIGTERM),  # the last of all
    ],
)
def test_the_step_in_progress_is_the_last_one(tmp_path, make_trainer, event, number, step, sent):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert preempted(trainer, event, number, sent) == (
        f"{sent.name}: checkpoint {checkpoint} written after step {step}; start the same command with "
        "--resume_from_checkpoint auto to go on"
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [checkpoint.name]


HELD_OUT = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
BY_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch"}


class Count(TrainerCallback):
    """Counts batches of held-out pairs."""

    seen = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seen += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategies", "moments"),
    [
        (HELD_OUT, [("on_step_end", 3), ("on_prediction_step", 2), ("on_evaluate", 1)]),
        (BY_EPOCH, [("on_step_end", 3), ("on_prediction_step", 2), ("on_epoch_begin", 2), ("on_prediction_step", 7)]),
    ],
    ids=["by steps", "by epochs"],
)
def test_no_evaluation_is_lost_nor_waited_for(tmp_path, make_trainer, shards, strategies, moments):
    """Told to end when one is due, in the first, after it, or in the last: all ends as in a whole run."""
    settings = strategies | {
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 1,
        "bf16": True,
        "emulate_bf16": True,
    }

    def make(name):
        return make_trainer(tmp_path / name, held_out=load_pairs(shards, "validation"), **settings)

    def evaluations(trainer):
        return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]

    whole = make("whole")
    whole.train()
    whole.save_model()
    assert [step for step, _ in evaluations(whole)] == [3, 6]
    for event, number in moments:
        output = tmp_path / f"{event}-{number}"
        first, count = make(output.name), Count()
        first.add_callback(count)
        step = re.search(r"after step (\d+)", preempted(first, event, number))[1]
        if event == "on_prediction_step":
            assert count.seen < number + 1
        torch.manual_seed(77)
        again = make(output.name)
        again.train(resume_from_checkpoint=str(output / f"checkpoint-{step}"))
        again.save_model()
        assert evaluations(again) == evaluations(whole)
        assert Path(again.state.best_model_checkpoint).name == Path(whole.state.best_model_checkpoint).name
        assert weights(output) == weights(tmp_path / "whole")
        assert (output / "checkpoint-6").is_dir()


def test_an_evaluation_that_is_made_up_for_can_be_cut_short_again(tmp_path, make_trainer, shards):
    def make():
        held_out = load_pairs(shards, "validation")
        return make_trainer(tmp_path, held_out=held_out, per_device_eval_batch_size=2, **HELD_OUT)

    preempted(make(), "on_step_end", 3)
    checkpoint = str(tmp_path / "checkpoint-3")
    message = preempted(make(), "on_prediction_step", 2, resume_from_checkpoint=checkpoint)
    assert "nothing new to save" in message
    last = make()
    last.train(resume_from_checkpoint=checkpoint)
    evaluated = [entry["step"] for entry in last.state.log_history if "eval_loss" in entry]
    assert evaluated == [3, 6, 9, 12, 14]


def test_early_stopping_that_follows_from_a_made_up_evaluation_stops(tmp_path, make_tuner, labelled):
    from transformers import EarlyStoppingCallback

    name = "single_label_classification"
    settings = HELD_OUT | {
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the loss falls, so that no evaluation is better than the first
        "save_total_limit": None,
    }

    def make(output):
        trainer = make_tuner(tmp_path / output, eval_dataset=load_pairs(labelled(name), "validation"), **settings)
        trainer.add_callback(EarlyStoppingCallback(2))
        return trainer

    whole = make("whole")
    whole.train()
    assert whole.state.global_step == 3
    preempted(make("cut"), "on_step_end", 3)
    again = make("cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert again.state.global_step == 3


def test_a_second_signal_changes_nothing(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At("on_step_end", 2, signal.SIGUSR1))
    trainer.add_callback(At("on_save", 1, signal.SIGTERM))
    assert preempted(trainer, "on_step_begin", 2).startswith("SIGTERM: checkpoint")


def test_a_signal_before_the_first_step_has_nothing_to_save(tmp_path, make_trainer, shards):
    trainer = make_trainer(tmp_path, held_out=load_pairs(shards, "validation"), eval_on_start=True)
    assert "nothing new to save" in preempted(trainer, "on_prediction_step")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_who_does_not_want_a_checkpoint_keeps_the_handlers_there_were(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, enable_jit_checkpoint=False)
    trainer.add_callback(At("on_step_end", 2))
    with ends_by_signal(), pytest.raises(Preempted, match="ended at once, with no further checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_interrupting_from_the_keyboard_stays_what_it_was(tmp_path, make_trainer, ctrl_c_as_in_a_terminal):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At("on_step_end", 2, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize(("context", "dies"), [(ends_by_signal, True), (Preemption(None).watching, False)])
def test_forked_processes_die_of_the_signal_unless_training_goes_on(context, dies):
    with context():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == (signal.SIGTERM if dies else 0)


def test_a_signal_to_a_worker_that_is_just_starting_is_forgotten():
    with ends_by_signal(), held_back():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            ignore_signals_of_others(0)
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_workers_of_loaders_outlive_the_signal(tmp_path, make_trainer, shards, kind):
    held_out = load_pairs(shards, "validation")
    trainer = make_trainer(tmp_path, held_out=held_out, per_device_eval_batch_size=1, dataloader_num_workers=2)
    batches = iter(getattr(trainer, f"get_{kind}_dataloader")())
    next(batches)  # from here on they have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    signals = "".join(f"os.kill({worker.pid}, {number:d});" for worker in workers for number in SIGNALS)
    subprocess.run([sys.executable, "-c", f"import os;{signals}"], check=True)
    assert not multiprocessing.connection.wait([worker.sentinel for worker in workers], 0.5)
    assert len(list(batches)) == (6 if kind == "train" else 8)


def test_workers_of_loaders_end_when_the_process_that_started_them_says_so():
    """As torch and multiprocessing do with workers that a program leaves at its end."""
    fork = multiprocessing.get_context("fork")
    begun, never = fork.Event(), fork.Event()

    def work():
        ignore_signals_of_others(0)
        begun.set()
        never.wait()

    worker = fork.Process(target=work)
    worker.start()
    assert begun.wait(60)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == EXIT_CODE


# --- programs --------------------------------------------------------------------------------------------------------


def command(module, output, *arguments):
    return [
        *(sys.executable, "-m", f"fusmae_hf.training.{module}", "--output_dir", str(output)),
        *("--report_to", "none", "--disable_tqdm", "1", "--resume_from_checkpoint", "auto"),
        *map(str, arguments),
    ]


def logged_step(log):
    """Number of losses in what a program said so far."""
    return log.read_text().count("'grad_norm'")


@pytest.mark.slow
@pytest.mark.parametrize(("streaming", "signals"), [(False, SIGNALS), (True, SIGNALS[:1])], ids=["local", "streaming"])
def test_a_program_whose_whole_job_is_told_to_end_goes_on_to_the_same_weights(tmp_path, shards, streaming, signals):
    """Every process of the job gets the signal, workers of the loader included, as Slurm sends it."""
    arguments = [
        *("--data", shards, "--config", json.dumps(SMALL), "--streaming", streaming, "--min_crop", 0.5),
        *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--num_train_epochs", 15),
        *(
            "--dataloader_num_workers",
            2,
            "--bf16",
            1,
            "--emulate_bf16",
            1,
            "--logging_steps",
            1,
            "--eval_strategy",
            "no",
        ),
        *("--save_strategy", "no", "--num_reconstructions", 1),
    ]
    whole, cut, log, steps = tmp_path / "whole", tmp_path / "cut", tmp_path / "log", []
    run_pretrain.main(command("run_pretrain", whole, *arguments)[3:])
    for sent in signals:
        process = start(command("run_pretrain", cut, *arguments), log)
        wait_for(lambda: logged_step(log) >= 4, process, log)
        os.killpg(process.pid, sent)
        assert process.wait(60) == EXIT_CODE, log.read_text()
        said = re.search(rf"{sent.name}: checkpoint (\S+) written after step (\d+); start the same", log.read_text())
        assert Path(said[1]) == cut / f"checkpoint-{said[2]}"
        steps.append(int(said[2]))
        assert not (cut / "run.json").exists()
        assert not (cut / "model.safetensors").exists()
    assert steps == sorted(steps)
    assert 4 <= steps[0] <= steps[-1] < 45
    run_pretrain.main(command("run_pretrain", cut, *arguments)[3:])
    assert json.loads((cut / "run.json").read_text())["steps"] == 45
    assert weights(cut) == weights(whole)


@pytest.mark.slow
def test_ctrl_c_ends_a_program_with_a_sentence(tmp_path, shards, ctrl_c_as_in_a_terminal):
    log = tmp_path / "log"
    arguments = ["--data", shards, "--config", json.dumps(SMALL), "--num_train_epochs", 500, "--logging_steps", 1]
    process = start(command("run_pretrain", tmp_path / "run", *arguments), log)
    wait_for(lambda: logged_step(log) >= 2, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert "Interrupted. Start the same command with `--resume_from_checkpoint auto`" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_fine_tuning_told_to_end_goes_on_to_the_same_figures(tmp_path, labelled, checkpoint):
    """Told to end while the second of two seeds learns."""
    arguments = [
        *("--data", labelled("single_label_classification"), "--task", "single_label_classification"),
        *("--model", checkpoint, "--num_train_epochs", 10, "--per_device_train_batch_size", 8),
        *("--logging_steps", 1, "--seeds", 2, "--eval_sensors", "both", "--num_pictures", 0),
    ]
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    run_finetune.main(command("run_finetune", whole, *arguments)[3:])
    process = start(command("run_finetune", cut, *arguments), log)
    wait_for((cut / "seed-42" / "metrics.json").exists, process, log)
    said = logged_step(log)
    wait_for(lambda: logged_step(log) > said + 5, process, log)
    process.terminate()
    assert process.wait(60) == EXIT_CODE, log.read_text()
    assert not (cut / "summary.json").exists()
    run_finetune.main(command("run_finetune", cut, *arguments)[3:])
    for seed in ("seed-42", "seed-43"):
        assert weights(cut / seed) == weights(whole / seed)
        found, expected = (json.loads((each / seed / "metrics.json").read_text()) for each in (cut, whole))
        assert found["sensors"] == expected["sensors"]


def test_a_program_told_to_end_before_training_says_so(tmp_path, shards):
    log = tmp_path / "log"
    code = """
import os, signal
from fusmae_hf.training import run_pretrain
run_pretrain.open_datasets = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)
run_pretrain.main()
"""
    arguments = [sys.executable, "-c", code, "--data", str(shards), "--output_dir", str(tmp_path / "run")]
    assert start(arguments, log).wait(120) == EXIT_CODE
    assert "SIGTERM: ended at once, with no further checkpoint. Start the same command" in log.read_text()


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_process_that_is_told_to_end_takes_the_others_along(tmp_path, shards):
    """Started as the cluster templates do, without a launcher between; only the second process gets the signal."""
    arguments = [
        *("--data", shards, "--config", json.dumps(SMALL), "--per_device_train_batch_size", 4),
        *("--num_train_epochs", 60, "--logging_steps", 1, "--eval_strategy", "epoch", "--save_strategy", "no"),
        *("--num_reconstructions", 1),
    ]
    output = tmp_path / "run"
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    processes = start_two(command("run_pretrain", output, *arguments), logs)
    try:
        wait_for(lambda: logged_step(logs[0]) >= 5, processes[0], logs[0])
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [EXIT_CODE, EXIT_CODE], logs[0].read_text()
    finally:
        for process in processes:
            process.kill()
    said = re.search(r"SIGTERM: checkpoint (\S+) written after step (\d+)", logs[0].read_text())
    assert len(list(Path(said[1]).glob("rng_state_*.pth"))) == 2
    assert load_file(Path(said[1]) / "model.safetensors")
    assert not (output / "run.json").exists()


STUCK_WORKER = """
import os, sys, time
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
from fusmae_hf.training.loop.signals import ignore_signals_of_others

class Stuck(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(600)

if __name__ == "__main__":
    arguments = {"num_workers": 1, "multiprocessing_context": sys.argv[2]}
    next(iter(DataLoader(Stuck(), worker_init_fn=ignore_signals_of_others, **arguments)))
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_busy_worker_ends_when_the_process_that_started_it_was_killed(tmp_path, method):
    begun, log, script = tmp_path / "begun", tmp_path / "log", tmp_path / "stuck.py"
    script.write_text(STUCK_WORKER)
    process = start([sys.executable, str(script), str(begun), method], log)
    try:
        wait_for(begun.exists, process, log)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 4 * ORPHANED
        while alive({process.pid}):
            assert time.monotonic() < deadline, "the worker is still there"
            time.sleep(0.1)
    finally:
        kill_groups({process.pid})
