"""Starting programs, alone or as the processes of one run, waiting for what they do, and disks for them to fill."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def start(arguments: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
    """Start a program in a process group of its own; what it says goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    with log.open("w") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, env=environment, start_new_session=True)


def free_port() -> str:
    """A port at which the processes of a run can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two(arguments: Sequence[str], logs: Sequence[Path]) -> list[subprocess.Popen]:
    """Start the two processes of a run without a launcher, as the cluster templates do."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(arguments, log, RANK=str(r), LOCAL_RANK=str(r), **together) for r, log in enumerate(logs)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Wait until something holds; fail with what the program said if it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


class NotPossibleHere(Exception):
    """A fault cannot be injected on this machine; the message says why."""


def mount(folder: Path, *options: str) -> None:
    """Mount a file system, or mount it anew with other options."""
    try:
        done = subprocess.run(["mount", *options, "none", folder], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotPossibleHere("there is no program `mount`") from None
    if done.returncode:
        raise NotPossibleHere(f"mounting is not allowed here ({done.stderr.strip().splitlines()[0]})")
