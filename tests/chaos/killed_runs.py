"""Training programs that are killed at random moments and started again until they end.

`kill_until_done` takes any command that resumes by itself. The tests beside it kill each run once or twice; more kills
are a matter of its arguments.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusmae_hf.training.checkpoints import problem_of

LONGEST = 300
"""Seconds that one start of a program may take."""


@dataclass
class Attempts:
    """What became of the starts of a command.

    Attributes:
        kills: by kind, how many starts were killed.
        outputs: what each start printed.
    """

    kills: dict[str, int] = field(default_factory=lambda: {"writing": 0, "random": 0})
    outputs: list[str] = field(default_factory=list)


def program(name: str, *arguments: str | Path, launcher: Sequence[str] = ()) -> list[str]:
    """Command that runs a training program as a module, by itself or through a launcher."""
    start = [*launcher, "--module"] if launcher else [sys.executable, "-m"]
    return [*start, f"fusmae_hf.training.{name}", *map(str, arguments)]


def kill_until_done(command: Sequence[str], output: Path, kinds: Sequence[str], seed: int = 0) -> Attempts:
    """Start a command again and again, kill as many starts as there are kinds, and let the next one end.

    Args:
        command: resumes by itself (`--resume_from_checkpoint auto`).
        output: the output folder of the run.
        kinds: of each kill: `writing`, as soon as a checkpoint is being written after some random number of them;
            `random`, at a random moment after training began.
        seed: of what is random.

    Raises:
        AssertionError: a start failed by itself, or a kill left a checkpoint that is not complete.
    """
    generator, attempts = random.Random(seed), Attempts()
    for kind in [*kinds, None]:
        wanted = _moment(kind, output, generator) if kind else lambda: False
        killed, printed = _run(command, wanted)
        attempts.outputs.append(printed)
        if not killed:
            return attempts
        attempts.kills[str(kind)] += 1
        for checkpoint in output.glob("checkpoint-*"):
            assert problem_of(checkpoint) is None, (checkpoint, problem_of(checkpoint))
    return attempts


def _moment(kind: str, output: Path, generator: random.Random) -> Callable[[], bool]:
    """Says when it is time to kill."""
    if kind == "writing":
        # Names are new ones: what an earlier kill left is swept when the program starts.
        left, seen, after = _being_written(output), set[str](), generator.randrange(2)

        def writing() -> bool:
            nonlocal left
            now = _being_written(output)
            left &= now
            seen.update(now - left)
            return bool(now - left) and len(seen) > after

        return writing
    begun, delay, done = 0.0, generator.uniform(0, 1), set(output.glob("checkpoint-*"))

    def moment() -> bool:
        nonlocal begun
        begun = begun or (time.monotonic() if set(output.glob("checkpoint-*")) - done else 0.0)
        return bool(begun) and time.monotonic() > begun + delay

    return moment


def _being_written(output: Path) -> set[str]:
    return {path.name for path in output.glob("incomplete-checkpoint-*")}


def _run(command: Sequence[str], wanted: Callable[[], bool]) -> tuple[bool, str]:
    """Run a command until it ends or the moment has come; whether it was killed, and what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    deadline, killed = time.monotonic() + LONGEST, False
    try:
        while process.poll() is None and not killed:
            if wanted() or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)  # workers and other processes of the run, too
                killed = True
            else:
                try:
                    process.wait(0.002)
                except subprocess.TimeoutExpired:
                    continue
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        printed = process.communicate()[0]
    assert time.monotonic() < deadline, f"{command} took longer than {LONGEST} s:\n{printed}"
    assert killed or process.returncode == 0, f"{command} ended with {process.returncode}:\n{printed}"
    return killed, printed
