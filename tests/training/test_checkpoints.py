"""Checkpoints are whole or absent, say what they are, and are refused where a run cannot go on from them exactly."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.shards.reading import ShardFile
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import PretrainingArguments
from fusmae_hf.training.loop import checkpoints
from fusmae_hf.training.loop.checkpoints import CheckpointNotWrittenError, problem_of, settle, surplus
from fusmae_hf.training.loop.resuming import checkpoint_to_resume
from fusmae_hf.training.run_pretrain import main

from .conftest import QUICK, SMALL


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


SETTINGS = {
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
}
"""Three steps an epoch of 30 pairs: two batches of 4 a step."""


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder that `run` fills once."""
    return tmp_path_factory.mktemp("first") / "run"


@pytest.fixture
def run(tmp_path, make_trainer, first_run):
    """Folder of a run of eight steps with checkpoints 2, 4, 6 and 8."""
    if not first_run.exists():
        make_trainer(first_run, **SETTINGS).train()
    return shutil.copytree(first_run, tmp_path / "run")


# --- writing -------------------------------------------------------------------------------------------------------


def test_the_manifest_describes_every_file_and_the_run(run):
    assert sorted(path.name for path in run.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    for step in (2, 8):
        checkpoint = run / f"checkpoint-{step}"
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != "manifest.json"}
        assert {name: record["bytes"] for name, record in manifest["files"].items()} == files
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= files.keys()
        assert (manifest["step"], manifest["processes"], manifest["global_batch_size"]) == (step, 1, 8)
        assert manifest["run"]["seed"] == 5
        assert problem_of(checkpoint) is None


OPERATIONS = ("rename", "fsync", "unlink", "rmdir", "mkdir")


def write_until_killed(folder, sound, operation):
    """Replace checkpoint-1 by 2 and write 2 once more, and be killed before one of the operations on files."""
    calls = 0

    def dying(function):
        def called(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return called

    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    for previous in ("checkpoint-1", None):
        checkpoint = folder / "checkpoint-2"
        written = checkpoints.begin(checkpoint) / checkpoint.name
        shutil.copytree(sound, written, ignore=shutil.ignore_patterns("manifest.json"))
        checkpoints.seal(written, {"step": 2, "run": {}})
        checkpoints.put_in_place(checkpoint)
        if previous:
            checkpoints.discard(folder / previous)


@pytest.mark.slow
def test_a_kill_at_any_operation_leaves_a_complete_checkpoint_and_nothing_that_only_looks_like_one(tmp_path, run):
    processes, operation = multiprocessing.get_context("fork"), 0
    sound = run / "checkpoint-4"
    for path in sound.iterdir():
        if path.suffix not in (".safetensors", ".pt", ".pth") and path.name not in (
            "trainer_state.json",
            "manifest.json",
        ):
            path.unlink()
    reseal(sound)
    while True:
        operation += 1
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder / "checkpoint-1")
        (folder / "incomplete-notes").mkdir()
        (folder / "incomplete-notes" / "mine.txt").touch()
        process = processes.Process(target=write_until_killed, args=(folder, sound, operation))
        process.start()
        process.join()
        left = list(folder.glob("checkpoint-*"))
        assert [problem_of(path) for path in left] == [None] * len(left)
        settle(folder)
        left = {path.name for path in folder.iterdir()} - {"incomplete-notes"}
        assert left
        assert left <= {"checkpoint-1", "checkpoint-2"}
        assert [problem_of(folder / name) for name in left] == [None] * len(left)
        assert (folder / "incomplete-notes" / "mine.txt").exists()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert left == {"checkpoint-2"}
    assert operation > 50


def test_a_folder_that_was_not_made_here_is_neither_removed_nor_written_into(tmp_path, make_trainer):
    mine = tmp_path / "incomplete-checkpoint-2"
    mine.mkdir()
    (mine / "mine.txt").write_text("keep")
    trainer = make_trainer(tmp_path, **SETTINGS)
    with pytest.raises(OSError, match=r"incomplete-checkpoint-2 is needed to write checkpoint-2.*move it elsewhere"):
        trainer.train()
    assert [path.name for path in mine.iterdir()] == ["mine.txt"]


def test_an_upload_in_the_background_finds_the_checkpoint_in_place(tmp_path, make_trainer, monkeypatch):
    pushed = []
    trainer = make_trainer(tmp_path, **SETTINGS | {"max_steps": 4})
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, problem_of(Path(folder))))
    )
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (2, 4)]


# --- best and last -------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path, make_tuner, labelled):
    """Makes a trainer that keeps the best checkpoint besides the last; of six epochs the second is the best."""

    def make(folder="run", **changes):
        tuner = make_tuner(
            tmp_path / folder,
            eval_dataset=load_pairs(labelled("single_label_classification"), "validation"),
            num_train_epochs=6,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_chosen",
            greater_is_better=True,
            restore_callback_states_from_checkpoint=True,
            **changes,
        )
        plain = tuner.compute_metrics
        tuner.compute_metrics = lambda prediction: plain(prediction) | {"chosen": float(tuner.state.global_step == 6)}
        return tuner

    return make


def test_the_best_and_the_last_checkpoint_stay_and_are_known_by_their_final_names(tmp_path, tuned):
    tuner = tuned()
    tuner.train()
    folder = tmp_path / "run"
    assert {path.name for path in folder.glob("*checkpoint*")} == {"checkpoint-6", "checkpoint-18"}
    for name in ("checkpoint-6", "checkpoint-18"):
        state = json.loads((folder / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(folder / "checkpoint-6")
    best = weights(folder / "checkpoint-6")
    assert all(torch.equal(parameter, best[name]) for name, parameter in tuner.model.state_dict().items())


def test_the_best_checkpoint_is_found_after_the_folder_has_moved(tmp_path, tuned):
    tuned().train()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = tuned("moved")
    again.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-18"))
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-6")
    best = weights(tmp_path / "moved" / "checkpoint-6")
    assert all(torch.equal(parameter, best[name]) for name, parameter in again.model.state_dict().items())


def test_damaged_checkpoints_go_before_sound_ones_however_new_and_protected_ones_never(run):
    (run / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    folders = {step: run / f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    assert surplus(run, 3, []) == [folders[8]]
    assert surplus(run, 2, [folders[2]]) == [folders[8], folders[4]]
    assert surplus(run, 1, [folders[2], folders[8]]) == [folders[4], folders[6]]
    assert surplus(run, None, []) == surplus(run, 0, []) == []


def test_a_resumed_run_keeps_what_it_writes_though_damaged_checkpoints_have_higher_numbers(run, make_trainer):
    for step in (6, 8):
        (run / f"checkpoint-{step}" / "scheduler.pt").unlink()
    (run / "checkpoint-8").rename(run / "checkpoint-800")
    trainer = make_trainer(run, **SETTINGS | {"save_total_limit": 2, "max_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in run.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert problem_of(run / "checkpoint-4") is problem_of(run / "checkpoint-6") is None


# --- choosing ------------------------------------------------------------------------------------------------------


def cut(checkpoint):
    os.truncate(checkpoint / "optimizer.pt", 100)


def flip(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def without_manifest(checkpoint, *names):
    for name in ("manifest.json", *names):
        (checkpoint / name).unlink()


def cut_without_manifest(checkpoint):
    without_manifest(checkpoint)
    os.truncate(checkpoint / "model.safetensors", (checkpoint / "model.safetensors").stat().st_size - 4)


def reseal(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    facts = ("step", "processes", "global_batch_size", "run", "progress")
    checkpoints.seal(checkpoint, {name: manifest[name] for name in facts})


def change_recorded_seed(checkpoint):
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 5', '"seed": 7'))


def save_weights_alone(checkpoint):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    reseal(checkpoint)


DAMAGES = {
    "cut": (cut, "optimizer.pt has 100 bytes instead of"),
    "flipped": (flip, "model.safetensors is damaged"),
    "lost": (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "manifest cut": (lambda folder: os.truncate(folder / "manifest.json", 500), "manifest.json cannot be used"),
    "manifest changed": (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "not of the format"),
    "another run by damage": (change_recorded_seed, "it is damaged: its checksum is not"),
    "half written": (lambda folder: without_manifest(folder, "optimizer.pt"), "no state of the optimiser"),
    "half written, too": (cut_without_manifest, "model.safetensors does not load"),
    "weights alone": (
        save_weights_alone,
        "no state of the optimiser and no learning-rate schedule and no random state",
    ),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "no weights"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_passed_over_and_refused_with_the_reason(run, damage, reason, capsys):
    damage(run / "checkpoint-8")
    arguments = PretrainingArguments(output_dir=str(run), resume_from_checkpoint="auto")
    assert checkpoint_to_resume(arguments) == str(run / "checkpoint-6")
    printed = capsys.readouterr().out
    assert f"Passing over {run / 'checkpoint-8'}: " in printed
    assert reason in printed
    assert f"Resuming from {run / 'checkpoint-6'}, the newest complete checkpoint in {run}." in printed
    arguments.resume_from_checkpoint = str(run / "checkpoint-8")
    with pytest.raises(ValueError, match=r"Cannot resume from .*checkpoint-8: ") as error:
        checkpoint_to_resume(arguments)
    assert reason in str(error.value)


def test_a_checkpoint_without_manifest_is_taken_if_everything_is_there_and_loads(run, capsys):
    without_manifest(run / "checkpoint-8")
    arguments = PretrainingArguments(output_dir=str(run), resume_from_checkpoint="auto")
    assert checkpoint_to_resume(arguments) == str(run / "checkpoint-8")
    assert "It has no manifest.json, so it was taken because all files" in capsys.readouterr().out


def test_the_newest_is_the_one_written_last_not_the_one_of_the_highest_step(run, make_trainer):
    """As where a finished run is begun again with another learning rate, in the same folder, and is cut."""
    trainer = make_trainer(run, **SETTINGS | {"max_steps": 2})
    trainer.train()
    arguments = PretrainingArguments(output_dir=str(run), resume_from_checkpoint="auto")
    assert checkpoint_to_resume(arguments) == str(run / "checkpoint-2")


def test_nothing_complete_means_from_the_beginning(run, capsys):
    for checkpoint in run.glob("checkpoint-*"):
        cut(checkpoint)
    arguments = PretrainingArguments(output_dir=str(run), resume_from_checkpoint="auto")
    assert checkpoint_to_resume(arguments) is None
    assert f"No complete checkpoint in {run}: starting from the beginning." in capsys.readouterr().out


# --- the same run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(shards, tmp_path_factory):
    """The program's arguments, and the folder of a run of it that is finished."""
    folder = tmp_path_factory.mktemp("command") / "run"
    model = ["--preset", "tiny", "--config", json.dumps(SMALL), "--num_reconstructions", "1"]
    arguments = ["--data", str(shards), *model, *QUICK, "--learning_rate", "1e-3", "--seed", "5"]
    main([*arguments, "--output_dir", str(folder)])
    return arguments, folder


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    options = SimulationOptions(image_size=16, pairs_per_place=2)
    prepare(SimulatedPairs(48, options=options), folder, rows_per_shard=12, row_group_rows=2, progress=False)
    return folder


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--seed", "6"], "`seed` was 5 and is 6 now"),
        (["--data_seed", "6"], "`data_seed` was None and is 6 now"),
        (["--flips", "false"], "`augmentation.flips` was True and is False now"),
        (
            ["--flips", "false", "--rotations", "false"],
            "`augmentation.flips` was True and is None now",
        ),
        (["--min_crop", "0.5"], "`augmentation.min_crop` was 1.0 and is 0.5 now"),
        (["--per_device_train_batch_size", "4"], "global batch 8, this one has global batch 4"),
        (["--gradient_accumulation_steps", "2"], "global batch 8, this one has global batch 16"),
        (["--data", "{other}"], "`data` was '[0-9a-f]{16}' and is '[0-9a-f]{16}' now"),
    ],
)
def test_resuming_with_what_would_see_other_pairs_is_refused(command, other_shards, change, difference):
    arguments, folder = command
    changed = [part.replace("{other}", str(other_shards)) for part in change]
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(SystemExit, match=difference):
        main([*arguments, "--output_dir", str(folder), "--resume_from_checkpoint", "auto", *changed])
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_subset_of_other_pairs_is_another_run(tmp_path, make_tuner, labelled):
    from fusmae_hf.training.finetuning.labels import PairSubset

    pairs = load_pairs(labelled("single_label_classification"))
    settings = {"save_strategy": "epoch", "num_train_epochs": 1}
    make_tuner(tmp_path, train_dataset=PairSubset(pairs, range(0, 24, 2)), **settings).train()
    other = make_tuner(tmp_path, train_dataset=PairSubset(pairs, range(1, 24, 2)), **settings)
    with pytest.raises(ValueError, match="checkpoint-1 is of another run: `subset` was"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# --- a run that has finished ---------------------------------------------------------------------------------------


def count_steps(trainer):
    """Count the training batches from now on."""
    plain, counted = trainer.training_step, []
    trainer.training_step = lambda *arguments, **options: (counted.append(1), plain(*arguments, **options))[1]
    return counted


@pytest.mark.parametrize("max_steps", [6, 8], ids=["at the end of an epoch", "within an epoch"])
def test_a_finished_run_is_not_trained_further(tmp_path, make_trainer, max_steps, capsys):
    for attempt in range(2):
        trainer = make_trainer(tmp_path, **SETTINGS | {"max_steps": max_steps})
        counted = count_steps(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{max_steps}") if attempt else None)
        trainer.save_model(str(tmp_path / str(attempt)))
        assert trainer.state.global_step == max_steps
        assert bool(counted) == (attempt == 0)
    assert (
        f"Nothing is left to train: the checkpoint is of step {max_steps} of {max_steps}." in capsys.readouterr().out
    )
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1"))


def test_a_run_that_stopped_early_is_not_trained_further(tmp_path, tuned, capsys):
    for attempt in range(2):
        tuner = tuned()
        tuner.add_callback(EarlyStoppingCallback(2))
        counted = count_steps(tuner)
        tuner.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12") if attempt else None)
        assert tuner.state.global_step == 12
        assert bool(counted) == (attempt == 0)
        best = weights(tmp_path / "run" / "checkpoint-6")
        assert all(torch.equal(parameter, best[name]) for name, parameter in tuner.model.state_dict().items())
    assert "Nothing is left to train: its run was stopped early, at step 12." in capsys.readouterr().out


def test_the_program_ends_well_when_it_resumes_a_finished_run(command, capsys):
    arguments, folder = command
    before, record = weights(folder), json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()
    main([*arguments, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"])
    assert "Nothing is left to train: the checkpoint is of step 3 of 3." in capsys.readouterr().out
    assert same(weights(folder), before)
    again = json.loads((folder / "run.json").read_text())
    losses = {name: value for name, value in record["metrics"].items() if "loss" in name}
    assert losses
    assert losses.items() <= again["metrics"].items()


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_ends_the_run_with_what_to_do_and_then_it_goes_on_exactly(
    tmp_path, command, mounted, capsys
):
    arguments, _ = command
    arguments = [*arguments, "--num_train_epochs", "3", "--save_total_limit", "5", "--eval_strategy", "no"]
    main([*arguments, "--output_dir", str(tmp_path / "whole")])
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) + 4096 * len(list(checkpoint.iterdir()))
    disk = mounted("disk", f"size={int(1.7 * size)}")
    output = disk / "run"
    command_line = [*arguments, "--output_dir", str(output)]
    with pytest.raises(SystemExit) as ended:
        main(command_line)
    message = str(ended.value.code)  # text as exit code: printed, and 1 to the shell
    assert message.startswith(f"Error: checkpoint-6 could not be written to {output}: ")
    assert " MB are free there now, and checkpoint-3 takes " in message
    assert f"{output / 'checkpoint-3'} is intact: free space" in message
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-3"]
    assert problem_of(output / "checkpoint-3") is None
    mounted("disk", f"size={20 * size}")
    main([*command_line, "--resume_from_checkpoint", "auto"])
    assert f"Resuming from {output / 'checkpoint-3'}" in capsys.readouterr().out
    assert same(weights(output), weights(tmp_path / "whole"))


class SmallFiles(TrainerCallback):
    """After the first checkpoint no file may grow beyond a limit, as on a disk that is full, whoever writes it."""

    def __init__(self, limit):
        self.limit = limit

    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(
    ("limit", "writer"), [(50_000, "safetensors"), (200_000, "torch"), (10_000, "json")], ids=lambda value: str(value)
)
def test_a_file_that_cannot_be_written_to_its_end_leaves_only_complete_checkpoints(
    tmp_path, make_trainer, limit, writer
):
    trainer = make_trainer(tmp_path, **SETTINGS)
    trainer.add_callback(SmallFiles(limit))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            CheckpointNotWrittenError, match=r"checkpoint-4 could not be written.*checkpoint-2 is intact"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert problem_of(tmp_path / "checkpoint-2") is None


def test_other_errors_while_writing_stay_what_they_are(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path, **SETTINGS)
    monkeypatch.setattr(trainer, "_save_scaler", lambda folder: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        trainer.train()
    assert not list(tmp_path.glob("*checkpoint*"))


# --- pickles -------------------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("manifest", ["as it was", "made anew", "none"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, run, make_trainer, name, manifest):
    checkpoint, made = run / "checkpoint-6", tmp_path / "made-by-the-pickle"
    torch.save({"state": Hostile(made)}, checkpoint / name)
    if manifest == "made anew":
        reseal(checkpoint)
    elif manifest == "none":
        without_manifest(checkpoint)
    arguments = PretrainingArguments(output_dir=str(run), resume_from_checkpoint=str(checkpoint))
    reason = f"{name} has .* bytes instead of" if manifest == "as it was" else f"{name} holds more than tensors"
    with pytest.raises(ValueError, match=reason):
        checkpoint_to_resume(arguments)
    if manifest != "as it was":  # and whoever does without that check relies on transformers
        trainer = make_trainer(run, **SETTINGS)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not made.exists()


# --- the cost of resuming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])
def test_resuming_reads_no_more_rows_however_far_the_run_had_come(tmp_path, make_trainer, streaming, monkeypatch):
    settings = SETTINGS | {"max_steps": 16, "save_steps": 5, "streaming": streaming}
    make_trainer(tmp_path, **settings).train()
    rows, row_groups, before_first_step = [], [], {}
    monkeypatch.setattr(
        PairDataset, "_decode", noting(PairDataset._decode, lambda self, located: rows.extend(located))
    )
    monkeypatch.setattr(ShardFile, "rows", noting(ShardFile.rows, lambda *of_groups: row_groups.append(of_groups)))
    for step in (5, 10, 15):  # of three steps an epoch: after two, one and none
        trainer = make_trainer(tmp_path, **settings | {"max_steps": step + 1, "save_strategy": "no"})
        rows.clear()
        row_groups.clear()
        monkeypatch.setattr(
            trainer,
            "training_step",
            noting(
                trainer.training_step,
                lambda *_, step=step: before_first_step.setdefault(step, (len(rows), len(row_groups))),
            ),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    batches = 2 + 1  # those of a step, and the one that the loader holds ready
    for read, opened in before_first_step.values():
        assert 8 <= read <= 4 * batches, before_first_step
        assert opened <= read, before_first_step
    assert len(before_first_step) == 3


def noting(function, note):
    """The function, called after `note` was called with the same arguments."""

    def noted(*arguments):
        note(*arguments)
        return function(*arguments)

    return noted


def test_several_threads_may_look_at_checkpoints_at_once(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    for name, content in (("optimizer", {}), ("scheduler", {}), ("rng_state", {"numpy": np.zeros(3, np.uint32)})):
        torch.save(content, tmp_path / f"{name}.{'pth' if name == 'rng_state' else 'pt'}")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(problem_of, [tmp_path] * 400)) == {None}
