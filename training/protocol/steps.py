"""The steps of an evaluation protocol: programs run one after another, each in its folder, and the table of them."""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import transformers

from fusmae_hf import __version__
from fusmae_hf.files.atomic import write_atomically
from fusmae_hf.files.finished import read_record, write_record
from fusmae_hf.training.finetuning.results import SENSOR_NAMES, markdown_table, number_cell

LOG, DESCRIPTION = "log.txt", "step.json"
TAIL = 20
"""Lines of the log that are shown where a step fails."""
QUIET_SECONDS = 30.0
"""How often the newest line is shown where the output is no terminal."""
METHOD_NAMES = {"linear": "linear probe", "knn": "k-NN probe", "finetune": "fine-tuning"}
STATEMENT = (
    "Measured by fusmae_hf with a reconstruction of the protocol of Fus-MAE (arXiv 2401.02764), as far as it is "
    "public. These are not the numbers of the paper."
)


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
        if summary := read_record(self.folder / "summary.json", {}):
            return {name: {"value": found.pop("mean")} | found for name, found in summary[self.row].items()}
        content = read_record(self.folder / "metrics.json", {})
        if content is None:
            return None
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
        write_record(self.folder / DESCRIPTION, {"settings": self.settings, "command": shlex.join(self.command)})

    def _described(self) -> str | None:
        """Hash of the settings that its folder was made for; None where nothing was."""
        return (read_record(self.folder / DESCRIPTION, {}) or {}).get("settings")

    def _begun(self) -> bool:
        return any(next(self.folder.rglob(name), None) for name in ("metrics.json", "checkpoint-*"))


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


def write_protocol(
    folder: Path, title: str, metrics: Sequence[str], record: dict[str, Any], steps: Sequence[Step]
) -> Path:
    """Write `protocol.json` and `protocol.md`, each atomically, with what is finished so far.

    Args:
        folder: where to.
        title: of the table.
        metrics: those in the table.
        record: what holds for all rows.
        steps: all steps, in the order of the rows.

    Returns:
        Path of the table.
    """
    rows = []
    for step in steps:
        scores = step.scores()
        rows.append(
            {
                "method": step.method,
                "start": step.start,
                "sensors": step.sensors,
                "label_fraction": step.fraction,
                "training_pairs": step.pairs,
                "finished": scores is not None,
                "scores": scores or {},
                "hyperparameters": step.hyperparameters() if scores is not None else {},
                "folder": step.name,
                "command": shlex.join(step.command),
            }
        )
    versions = {
        "fusmae_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    content = {"statement": STATEMENT, **record, "versions": versions, "rows": rows}
    write_record(folder / "protocol.json", content)
    cells = [_cells(row, metrics, record["model"]) for row in rows]
    table = markdown_table(["method", "start", "sensors", "labels", "training pairs", *metrics], cells)
    notes = "\n".join(f"- {note}" for note in _notes(record, rows))
    commands = "\n".join(str(row["command"]) for row in rows)
    page = f"# {title}\n\n{STATEMENT}\n\n{table}\n\n{notes}\n\nCommands:\n\n```bash\n{commands}\n```\n"
    path = folder / "protocol.md"
    write_atomically(path, page.encode())
    return path


def _cells(row: dict[str, Any], metrics: Sequence[str], model: str | None) -> list[str]:
    """Cells of a row of the table."""
    scratch = "from scratch" if row["method"] == "finetune" else "random encoder"
    scores = (row["scores"].get(name, {}) for name in metrics)
    shown = (number_cell(score.get("value"), score if "low" in score else None) for score in scores)
    return [
        METHOD_NAMES[row["method"]],
        f"`{model}`" if row["start"] == "checkpoint" else scratch,
        SENSOR_NAMES[row["sensors"]],
        f"{100 * row['label_fraction']:g} %",
        f"{row['training_pairs']:,}",
        *(shown if row["finished"] else ["not finished"] * len(metrics)),
    ]


def _notes(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know of the table."""
    data, seeds, methods = record["data"], record["seeds"], {row["method"] for row in rows}
    sizes = ", ".join(
        f"{split} {number:,} pairs (content {data['content'][split]})" for split, number in data["pairs"].items()
    )
    notes = [
        f"Data: {data['name']}, {len(data['classes'])} classes, {record['task'].replace('_', ' ')}; {sizes}."
        + (" **The imagery is simulated.**" if data["simulated"] else ""),
        f"Measured on the whole split `{record['measured_on']}`. Labels are drawn from the training split alone, "
        "anew for each seed, and the same for all methods.",
    ]
    if "validation" in data["pairs"]:
        notes.append(
            "All labels of the validation split choose the regularisation of the probe and the checkpoint of "
            "fine-tuning, whatever the share of training labels."
        )
    else:
        notes.append(
            "There is no validation split: the probe chooses its regularisation by cross-validation, and fine-tuning "
            "keeps its last checkpoint."
        )
    if len(seeds) > 1:
        notes.append(
            f"Mean of the seeds {seeds[0]} to {seeds[-1]} [95 % t interval over these runs; it does not cover the "
            "sampling of the test split]."
        )
    else:
        covered = f" [95 % interval of {record['bootstrap']:,} bootstrap resamples of the test split]"
        notes.append(f"One run, seed {seeds[0]}{covered if record['bootstrap'] else ''}.")
    if "linear" in methods or "knn" in methods:
        notes.append(
            "Probes see the mean of the patch tokens of a frozen encoder. Linear: logistic regression on standardised "
            "features, C chosen by a sweep. A random encoder is one draw of weights, the same for all seeds."
        )
        if len(seeds) > 1 and any(row["label_fraction"] == 1 for row in rows):
            notes.append("With all labels a probe has nothing left to chance: its interval has no width.")
    if "knn" in methods:
        neighbours = sorted({found["k"] for row in rows for found in row["hyperparameters"].values() if "k" in found})
        notes.append(f"k-NN: k = {', '.join(map(str, neighbours)) or 20}, cosine similarity, temperature 0.07.")
    if "finetune" in methods:
        config = dict(record["finetune_config"])
        file = config.pop("file")
        fields = ", ".join(f"{name} {value}" for name, value in config.items() if name not in ("task", "output_dir"))
        changed = shlex.join(record["finetune_arguments"])
        notes.append(
            f"Fine-tuning: training/configs/{file} ({fields}){f', changed by `{changed}`' if changed else ''}; a "
            "batch is never larger than the labels drawn."
        )
    return notes
