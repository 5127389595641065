"""What can happen to a run: each fault is a function of a folder for its trial and a seed, and says what became of it.

Beside the folder of the trial lie `shards` and, for each of `SETTINGS`, `whole-<settings>`: a run that was left alone.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from fusmae_hf.hub.checkpoint_loading import checkpoints_in
from fusmae_hf.training.loop.checkpoints import settle
from fusmae_hf.training.loop.signals import EXIT_CODE
from tests.training.started_programs import mount

from .disturbed_runs import (
    MODEL,
    RUN,
    Moment,
    ends,
    goes_on,
    kill_one_of_two,
    killed,
    module,
    run,
    some_time,
    while_writing,
)
from .recorded_run import trained_on

SETTINGS = {
    "local": ("", ()),
    "streaming": ("", ("--streaming", "true")),
    "ddp": ("cpu-ddp.yaml", ("--dataloader_num_workers", "1")),
    "fsdp2": ("cpu-fsdp2.yaml", ("--dataloader_num_workers", "1")),
}
"""Configuration of accelerate, none for one process, and further arguments of each kind of run."""

STEPS_OF_TWO = 12


@dataclass(frozen=True)
class Result:
    """What became of a trial.

    Attributes:
        outcome: what happened, in a few words.
        lost: pairs that the uncut run trained on and this one did not, each step counted by its last execution.
        equal: whether it ended with the weights of the uncut run, bit for bit.
        problem: what was not as promised, if anything beside.
    """

    outcome: str
    lost: int | None = None
    equal: bool | None = None
    problem: str = ""

    @property
    def as_promised(self) -> bool:
        return self.equal is True and self.lost == 0 and not self.problem


def command(folder: Path, settings: str, *more: str, shards: Path | None = None, spoilt: int | None = None):
    """Command of a run that writes into `folder / "run"` and is recorded in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    processes, arguments = SETTINGS[settings]
    record = (folder, "none" if spoilt is None else str(spoilt))
    data = ("--data", shards or folder.parent / "shards", "--output_dir", folder / "run", "--eval_strategy", "no")
    return module("tests.chaos.recorded_run", *record, *data, *MODEL, *RUN, *arguments, *more, processes=processes)


def uncut(folder: Path, settings: str) -> None:
    """Make the run that others of these settings are compared with."""
    whole = folder / f"whole-{settings}"
    assert run(command(whole, settings), whole / "log").code == 0, f"the uncut run failed: see {whole / 'log'}"


def judged(folder: Path, whole: Path, outcome: str, output: Path | None = None) -> Result:
    """Compare the run in a folder with an uncut one: the pairs of each step, and the weights at the end."""
    (pairs, _), (expected, _) = trained_on(folder), trained_on(whole)
    assert expected, "nothing was recorded of the uncut run"
    lost = sum((seen - pairs.get(step, type(seen)())).total() for step, seen in expected.items())
    surplus = sum((seen - expected.get(step, type(seen)())).total() for step, seen in pairs.items())
    equal = same_weights(output or folder / "run", whole / "run")
    return Result(outcome, lost, equal, f"{surplus} pairs too many" if surplus and not lost else "")


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- killed ----------------------------------------------------------------------------------------------------------


def _killed(folder: Path, settings: str, moment: Moment) -> Result:
    start = command(folder, settings)
    killed(start, folder / "run", moment)
    goes_on(start, folder / "run")
    return judged(folder, folder.parent / f"whole-{settings}", "killed; went on")


def killed_local(folder: Path, seed: int) -> Result:
    """SIGKILL at a random moment, local copy"""
    return _killed(folder, "local", some_time(folder, random.Random(seed)))


def killed_streaming(folder: Path, seed: int) -> Result:
    """SIGKILL at a random moment, streaming"""
    return _killed(folder, "streaming", some_time(folder, random.Random(seed)))


def killed_writing(folder: Path, seed: int) -> Result:
    """SIGKILL while a checkpoint is written"""
    return _killed(folder, "local", while_writing(folder / "run", random.Random(seed)))


def killed_fsdp2(folder: Path, seed: int) -> Result:
    """SIGKILL of both processes (FSDP2) while writing"""
    return _killed(folder, "fsdp2", while_writing(folder / "run", random.Random(seed)))


def killed_one_of_ddp(folder: Path, seed: int) -> Result:
    """SIGKILL of one of two processes (DDP)"""
    generator, start = random.Random(seed), command(folder, "ddp")
    moment = some_time(folder, generator, last=STEPS_OF_TWO - 1, processes=2)
    ended = run(start, folder / "log", moment, kill_one_of_two(generator))
    assert ended.acted, "had ended before it could be killed"
    ends(ended, 1, r"Signal 9 \(SIGKILL\)", "start the same command with .?--resume_from_checkpoint auto")
    goes_on(start, folder / "run")
    return judged(folder, folder.parent / "whole-ddp", "launcher ended by itself; went on")


def terminated(folder: Path, seed: int) -> Result:
    """SIGTERM at a random moment"""
    generator, start = random.Random(seed), command(folder, "local")
    send = generator.choice((os.kill, os.killpg))
    ended = run(start, folder / "log", some_time(folder, generator), lambda it: send(it.pid, signal.SIGTERM))
    ends(ended, EXIT_CODE, "SIGTERM: .*--resume_from_checkpoint auto")
    goes_on(start, folder / "run")
    return judged(folder, folder.parent / "whole-local", f"exit code {EXIT_CODE}; went on")


# --- shards ----------------------------------------------------------------------------------------------------------


def _damaged(folder: Path, seed: int, damage: Callable[[Path, random.Random], None]) -> Result:
    """Damage a shard before the run or in its first half, see it named, put it back, go on."""
    generator, shards = random.Random(seed), folder / "shards"
    settings, during = generator.choice((("local", False), ("streaming", False), ("streaming", True)))
    shutil.copytree(folder.parent / "shards", shards)
    shard = generator.choice(sorted(shards.glob("data/train-*")))
    start, log = command(folder, settings, shards=shards), folder / "log"
    if during:
        ended = run(start, log, some_time(folder, generator, last=14), lambda process: damage(shard, generator))
    else:
        damage(shard, generator)
        ended = run(start, log)
    ends(ended, 1, shard.name)
    shutil.copy2(folder.parent / "shards" / "data" / shard.name, shard)
    goes_on(start, folder / "run")
    return judged(folder, folder.parent / f"whole-{settings}", "file named; put back; went on")


def cut_shard(folder: Path, seed: int) -> Result:
    """Shard cut short at a random byte"""
    return _damaged(folder, seed, lambda shard, chance: os.truncate(shard, chance.randrange(shard.stat().st_size)))


def flipped_shard(folder: Path, seed: int) -> Result:
    """Shard with 64 random bytes flipped"""
    return _damaged(folder, seed, lambda shard, chance: flip(shard, chance, 64))


def flip(file: Path, generator: random.Random, number: int) -> None:
    """Change bytes of a file in place, each to any other value."""
    with file.open("r+b") as opened:
        for at in generator.sample(range(file.stat().st_size), number):
            opened.seek(at)
            (byte,) = opened.read(1)
            opened.seek(at)
            opened.write(bytes([byte ^ generator.randrange(1, 256)]))


def vanished_folder(folder: Path, seed: int) -> Result:
    """Shards gone for some seconds during the run"""
    generator, shards, away = random.Random(seed), folder / "shards", folder / "away"
    shutil.copytree(folder.parent / "shards", shards)

    def act(process: subprocess.Popen) -> None:
        shards.rename(away)
        time.sleep(generator.uniform(1, 4))
        away.rename(shards)

    ended = run(
        command(folder, "streaming", shards=shards), folder / "log", some_time(folder, generator, last=14), act
    )
    ends(ended, 0, "cannot be read at the moment")
    return judged(folder, folder.parent / "whole-streaming", "waited; went on by itself")


# --- checkpoints and disks -------------------------------------------------------------------------------------------


def damaged_checkpoint(folder: Path, seed: int) -> Result:
    """Newest checkpoint with a random byte flipped"""
    generator, start = random.Random(seed), command(folder, "local")
    killed(start, folder / "run", some_time(folder, generator, first=6))
    settle(folder / "run")  # as the next start would: the one being written may have been whole already
    newest, before, *_ = checkpoints_in(folder / "run")
    flip(generator.choice(sorted(newest.iterdir())), generator, 1)
    ends(goes_on(start, folder / "run"), 0, rf"Passing over \S+/{newest.name}:", rf"Resuming from \S+/{before.name},")
    return judged(folder, folder.parent / "whole-local", "passed over; went on from the one before")


def full_disk(folder: Path, seed: int) -> Result:
    """Full disk"""
    disk, checkpoint = folder / "disk", folder.parent / "whole-local" / "run" / "checkpoint-28"
    one = sum(path.stat().st_size + 4096 for path in checkpoint.iterdir())
    disk.mkdir(parents=True)
    start = command(folder, "local", "--output_dir", str(disk / "run"))
    try:
        mount(disk, "-t", "tmpfs", "-o", f"size={int(random.Random(seed).uniform(0.5, 2.9) * one)}")
        ends(run(start, folder / "log"), 1, "Error: checkpoint-.* could not be written .*free space, then start")
        mount(disk, "-o", f"remount,size={20 * one}")
        goes_on(start, disk / "run")
        return judged(folder, folder.parent / "whole-local", "said so; space freed; went on", disk / "run")
    finally:
        if os.path.ismount(disk):
            subprocess.run(["umount", "--lazy", disk], check=True)


# --- numbers ---------------------------------------------------------------------------------------------------------


def nan_stop(folder: Path, seed: int) -> Result:
    """NaN batch"""
    spoilt = random.Random(seed).randrange(56)
    step = spoilt // 2 + 1
    ended = run(command(folder, "local", spoilt=spoilt), folder / "log")
    ends(ended, 1, f"Error: The loss of step {step} is not finite")
    assert list(folder.glob(f"run/nonfinite/step-{step}/*.safetensors")), "the batch was not kept"
    goes_on(command(folder, "local"), folder / "run")
    return judged(folder, folder.parent / "whole-local", "stopped, batch kept; went on without it")


def nan_skip(folder: Path, seed: int) -> Result:
    """NaN batch, --on_nonfinite skip, and SIGKILL"""
    generator, whole = random.Random(seed), folder / "whole"
    spoilt = generator.randrange(56)
    options = {"spoilt": spoilt, "shards": folder.parent / "shards"}
    left_alone = command(whole, "local", "--on_nonfinite", "skip", **options)
    ends(run(left_alone, whole / "log"), 0, f"step {spoilt // 2 + 1} is not finite")
    start = command(folder, "local", "--on_nonfinite", "skip", **options)
    killed(start, folder / "run", some_time(folder, generator))
    goes_on(start, folder / "run")
    skipped = trained_on(folder)[1]
    assert skipped == {spoilt // 2 + 1}, f"steps {sorted(skipped)} were skipped instead of {spoilt // 2 + 1}"
    return judged(folder, whole, "1 step skipped, as asked; killed; went on")


FAULTS: dict[Callable[[Path, int], Result], tuple[str, ...]] = {
    killed_local: ("local",),
    killed_streaming: ("streaming",),
    killed_writing: ("local",),
    terminated: ("local",),
    cut_shard: ("local", "streaming"),
    flipped_shard: ("local", "streaming"),
    vanished_folder: ("streaming",),
    damaged_checkpoint: ("local",),
    full_disk: ("local",),
    nan_stop: ("local",),
    nan_skip: ("local",),
    killed_one_of_ddp: ("ddp",),
    killed_fsdp2: ("fsdp2",),
}
"""Every fault, with the settings of the uncut runs that it is compared with."""
