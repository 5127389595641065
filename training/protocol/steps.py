"""The steps of an evaluation protocol: programs that are run one after another, each in a folder of its own."""

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fusmae_hf.files.atomic import write_atomically

LOG, DESCRIPTION = "log.txt", "step.json"
TAIL = 20
"""Lines of the log that are shown where a step fails."""
QUIET_SECONDS = 30.0
"""How often the newest line is shown where the output is no terminal."""


class StepFailedError(RuntimeError):
    """A program ended with an error. The message has the step, the command and the end of the log."""


@dataclass(frozen=True)
class Step:
    """One training or probe.

    Attributes:
        name: of its folder and in messages.
        method: `linear`, `knn` or `finetune`.
        start: `checkpoint` or `scratch`.
        sensors: `both`, `sar` or `optical`.
        fraction: share of the training labels.
        pairs: how many training pairs that is.
        folder: where everything of it is written.
        command: as a user would type it, first word the program.
        settings: hash of everything that decides what it gives.
    """

    name: str
    method: str
    start: str
    sensors: str
    fraction: float
    pairs: int
    folder: Path
    command: tuple[str, ...]
    settings: str

    @property
    def row(self) -> str:
        """Of its scores in `metrics.json` and `summary.json`."""
        return self.sensors if self.method == "finetune" else f"{self.method}/{self.sensors}/mean"

    def scores(self) -> dict[str, dict[str, Any]] | None:
        """What it gave: by metric `value`, and `low`, `high`, `covers` where there is an interval. None: unfinished.

        With several seeds the value is their mean, and `values` are those of each.
        """
        if self._described() != self.settings:
            return None
        if (self.folder / "summary.json").is_file():
            summary = json.loads((self.folder / "summary.json").read_text())[self.row]
            return {name: {"value": found.pop("mean")} | found for name, found in summary.items()}
        if not (self.folder / "metrics.json").is_file():
            return None
        content = json.loads((self.folder / "metrics.json").read_text())
        if self.method == "finetune":
            metrics, intervals = content["sensors"][self.row], content["intervals"].get(self.row, {})
        else:
            metrics = content["probes"][self.row]["metrics"]
            intervals = content["probes"][self.row].get("intervals", {})
        single = {name: value for name, value in metrics.items() if isinstance(value, float)}
        return {name: {"value": value} | intervals.get(name, {}) for name, value in single.items()}

    def hyperparameters(self) -> dict[str, Any]:
        """Those that a finished probe chose, by seed; none for fine-tuning."""
        if self.method == "finetune":
            return {}
        found = sorted(self.folder.glob("seed-*/metrics.json")) or [self.folder / "metrics.json"]
        contents = [json.loads(path.read_text()) for path in found]
        return {str(content["seed"]): content["probes"][self.row]["hyperparameters"] for content in contents}

    def prepare(self) -> None:
        """Make the folder and note the settings.

        Raises:
            ValueError: it holds results, or checkpoints to go on from, of other settings.
        """
        if self._described() not in (None, self.settings) and self._begun():
            raise ValueError(
                f"{self.folder} holds results of other settings, data or another model. Give another `--output_dir`, "
                "or delete that folder."
            )
        described = {"settings": self.settings, "command": shlex.join(self.command)}
        write_atomically(self.folder / DESCRIPTION, (json.dumps(described, indent=1) + "\n").encode())

    def _described(self) -> str | None:
        path = self.folder / DESCRIPTION
        return json.loads(path.read_text())["settings"] if path.is_file() else None

    def _begun(self) -> bool:
        return any(next(self.folder.rglob(name), None) for name in ("metrics.json", "checkpoint-*"))


def settings_hash(*parts: Any) -> str:
    """Hash of what decides the outcome of a step, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_step(step: Step) -> None:
    """Run the program of a step; its output goes to `log.txt`, and the newest line is shown.

    Raises:
        StepFailedError: it ended with an error.
    """
    program, *arguments = step.command
    modules = {"accelerate": "accelerate.commands.accelerate_cli"}
    command = [sys.executable, *(["-m", modules[program]] if program in modules else []), *arguments]
    tail: deque[str] = deque(maxlen=TAIL)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (
        (step.folder / LOG).open("a", encoding="utf-8") as log,
        _running(command, environment) as process,
        _newest_line(step.name) as show,
    ):
        log.write(f"$ {shlex.join(step.command)}\n")
        assert process.stdout is not None
        for line in _lines(process.stdout):
            log.write(line + "\n")
            log.flush()
            tail.append(line)
            show(line)
        code = process.wait()
    if code:
        end = "\n".join(f"  | {line}" for line in tail)
        raise StepFailedError(
            f"The step {step.name} failed with exit code {code}.\n\n  {shlex.join(step.command)}\n\n{end}\n\n"
            f"Everything that it wrote is in {step.folder / LOG}. Finished steps are kept: run the same command again "
            "when the cause is removed."
        )


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive its reader."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as they come, those too that progress bars write over."""
    left = b""
    while chunk := os.read(stream.fileno(), 65536):
        *whole, left = (left + chunk).replace(b"\r", b"\n").split(b"\n")
        yield from (line.decode(errors="replace") for line in whole if line.strip())
    if left.strip():
        yield left.decode(errors="replace")


@contextlib.contextmanager
def _newest_line(name: str) -> Iterator[Any]:
    """A function that shows lines: in place on a terminal, otherwise one now and then."""
    terminal, shown = sys.stderr.isatty(), time.monotonic()

    def show(line: str) -> None:
        nonlocal shown
        text = f"  {name}: {line.strip()}"[:118]
        if terminal:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
        elif time.monotonic() - shown > QUIET_SECONDS:
            print(text, flush=True)
            shown = time.monotonic()

    try:
        yield show
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[2K")
