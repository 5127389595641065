"""Training programs to which something is done at a chosen moment, once, and which are then awaited."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from fusmae_hf.training.loop.checkpoints import problem_of
from tests.training.conftest import SMALL
from tests.training.started_programs import start

from .recorded_run import lines_of

ROOT = Path(__file__).parents[2]
LONGEST = 180
"""Seconds that one start of a program may take before it counts as hanging."""

SETTLED = 60
"""Seconds within which nothing of a run may be left once one of its processes was killed."""

MODEL = ["--preset", "tiny", "--config", json.dumps(SMALL)]
RUN = [
    *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2"),
    *(
        "--bf16",
        "1",
        "--emulate_bf16",
        "1",
        "--min_crop",
        "0.5",
        "--band_jitter",
        "0.1",
        "--learning_rate",
        "1e-3",
        "--seed",
        "5",
    ),
    *("--num_train_epochs", "4", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "3"),
    *("--report_to", "none", "--disable_tqdm", "1", "--resume_from_checkpoint", "auto"),
]
"""28 steps of the 30 pairs to pretrain on, 24 of the 24 labelled ones; 12 in two processes."""

Moment = Callable[[subprocess.Popen], bool]
Act = Callable[[subprocess.Popen], None]


@dataclass(frozen=True)
class Ended:
    """How a start of a program ended: its exit code, what it printed, and whether the moment to act came before."""

    code: int
    printed: str
    acted: bool


def module(name: str, *arguments: str | Path, processes: str = "") -> list[str]:
    """Command that runs a module, by itself or as the two processes of a configuration in training/accelerate."""
    configuration = str(ROOT / "training" / "accelerate" / processes)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", configuration, "--module"]
    return [sys.executable, *(launcher if processes else ["-m"]), name, *map(str, arguments)]


def run(command: Sequence[str], log: Path, moment: Moment | None = None, act: Act | None = None) -> Ended:
    """Start a command, act once when the moment has come, and wait for its end.

    Raises:
        AssertionError: it hangs, or processes of it are left when it has ended.
    """
    environment = {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "HF_DATASETS_CACHE": str(log.parent / "cache")}
    process = start(command, log, **environment)
    deadline, acted, groups = time.monotonic() + LONGEST, False, {process.pid}
    try:
        while process.poll() is None:
            if not acted and moment is not None and moment(process):
                groups |= groups_of(process)
                act(process)
                acted, deadline = True, min(deadline, time.monotonic() + SETTLED)
            if time.monotonic() > deadline:
                kill_groups(groups_of(process), signal.SIGABRT)  # the log then says where each thread was
                process.wait(10)
                raise AssertionError(f"hangs, {'though disturbed' if acted else 'by itself'}")
            time.sleep(0.002)
        while left := alive(groups):
            if time.monotonic() > deadline:
                names = describe(left)
                kill_groups(groups, signal.SIGABRT)
                time.sleep(1)  # in which each writes to the log where its threads were
                raise AssertionError(f"ended, but its processes {names} did not")
            time.sleep(0.05)
    finally:
        kill_groups(groups | groups_of(process))
        process.wait()
    return Ended(process.returncode, log.read_text(), acted)


def groups_of(process: subprocess.Popen) -> set[int]:
    """Process groups of a program: torch's launcher starts each process of a run in a session of its own."""
    groups = {process.pid}
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(ProcessLookupError):
                groups.add(os.getpgid(child.pid))
    return groups


def alive(groups: set[int]) -> list[int]:
    """Processes of these groups that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def describe(processes: list[int]) -> list[str]:
    """Number, parent, state and last words of the command line of each process that is still there."""
    found = []
    for number in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(number)
            found.append(f"{number} (of {process.ppid()}, {process.status()}): {' '.join(process.cmdline())[-80:]}")
    return found


def kill_groups(groups: set[int], by: signal.Signals = signal.SIGKILL) -> None:
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, by)


# --- acts ------------------------------------------------------------------------------------------------------------


def kill(process: subprocess.Popen) -> None:
    """Kill all processes of a program at once: workers, and those that a launcher started."""
    kill_groups(groups_of(process))


def kill_one_of_two(generator: random.Random) -> Act:
    """Kill one process of two that a launcher started."""

    def act(process: subprocess.Popen) -> None:
        children = sorted(child.pid for child in psutil.Process(process.pid).children())
        assert len(children) == 2, f"{len(children)} processes instead of 2"
        os.kill(generator.choice(children), signal.SIGKILL)

    return act


# --- moments ---------------------------------------------------------------------------------------------------------


def some_time(records: Path, generator: random.Random, first: int = 1, last: int = 28, processes: int = 1) -> Moment:
    """Some time after a random step of this start, `first` to `last`, counted from 1; those after it may begin."""
    before, steps, delay = len(lines_of(records)), generator.randint(first, last), generator.uniform(0, 0.2)
    begun = 0.0

    def moment(process: subprocess.Popen) -> bool:
        nonlocal begun
        if not begun and len(lines_of(records)) - before >= steps * processes:
            begun = time.monotonic()
        return bool(begun) and time.monotonic() > begun + delay

    return moment


def while_writing(output: Path, generator: random.Random) -> Moment:
    """Some time after one of the next checkpoints was begun, before it is in place."""
    to_pass_over, seen, begun, delay = generator.randrange(3), set[str](), 0.0, 0.0
    left = {path.name for path in output.glob("incomplete-checkpoint-*")}  # by an earlier kill

    def moment(process: subprocess.Popen) -> bool:
        nonlocal begun, delay
        now = {path.name for path in output.glob("incomplete-checkpoint-*")} - left
        if now - seen:
            seen.update(now)
            begun, delay = time.monotonic(), generator.uniform(0, 0.03)
        return bool(now) and len(seen) > to_pass_over and time.monotonic() >= begun + delay

    return moment


# --- what is promised ------------------------------------------------------------------------------------------------


def ends(ended: Ended, code: int, *messages: str) -> None:
    """Raise an AssertionError unless a start ended with this exit code, having said all of this."""
    assert ended.code == code, f"ended with exit code {ended.code} instead of {code}"
    missing = [message for message in messages if not re.search(message, ended.printed, re.IGNORECASE)]
    assert not missing, f"did not say {missing[0]!r}"


def killed(command: Sequence[str], output: Path, moment: Moment) -> None:
    """Kill a run that writes into `output`: no checkpoint may be there that is not complete."""
    assert run(command, output.parent / "log", moment, kill).acted, "had ended before it could be killed"
    for checkpoint in output.glob("checkpoint-*"):
        problem = problem_of(checkpoint)
        assert problem is None, f"{checkpoint.name} after a kill: {problem}"


def goes_on(command: Sequence[str], output: Path) -> Ended:
    """Start a run again; it must go on from a checkpoint if there is one, and end well."""
    begins = "Resuming from" if list(output.glob("checkpoint-*")) else "Resuming from|starting from the beginning"
    ended = run(command, output.parent / "log-again")
    ends(ended, 0, begins)
    return ended
