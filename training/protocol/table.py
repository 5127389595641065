"""The one table and the one JSON file of an evaluation protocol."""

import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fusmae_hf import __version__
from fusmae_hf.files.atomic import write_atomically
from fusmae_hf.training.finetuning.results import SENSOR_NAMES, number_cell
from fusmae_hf.training.protocol.steps import Step

if TYPE_CHECKING:
    from fusmae_hf.training.protocol.experiment import Protocol

METHOD_NAMES = {"linear": "linear probe", "knn": "k-NN probe", "finetune": "fine-tuning"}
STATEMENT = (
    "Measured by fusmae_hf with a reconstruction of the protocol of Fus-MAE (arXiv 2401.02764), as far as it is "
    "public. These are not the numbers of the paper."
)


def write_protocol(folder: Path, protocol: "Protocol", record: dict[str, Any], steps: Sequence[Step]) -> Path:
    """Write `protocol.json` and `protocol.md`, each atomically, with what is finished so far.

    Args:
        folder: where to.
        protocol: what is measured.
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
    write_atomically(folder / "protocol.json", (json.dumps(content, indent=1) + "\n").encode())
    path = folder / "protocol.md"
    write_atomically(path, _markdown(protocol, record, rows).encode())
    return path


def _markdown(protocol: "Protocol", record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    names = protocol.metrics
    lines = [
        f"| method | start | sensors | labels | training pairs | {' | '.join(names)} |",
        "|---" * (5 + len(names)) + "|",
    ]
    for row in rows:
        found = row["scores"]
        cells = [_cell(found.get(name)) if row["finished"] else "not finished" for name in names]
        start = _start_name(row, record)
        parts = [
            METHOD_NAMES[row["method"]],
            start,
            SENSOR_NAMES[row["sensors"]],
            f"{100 * row['label_fraction']:g} %",
            f"{row['training_pairs']:,}",
        ]
        lines.append(f"| {' | '.join([*parts, *cells])} |")
    table = "\n".join(lines)
    notes = "\n".join(f"- {note}" for note in _notes(protocol, record, rows))
    commands = "\n".join(row["command"] for row in rows)
    return f"# {protocol.title}\n\n{STATEMENT}\n\n{table}\n\n{notes}\n\nCommands:\n\n```bash\n{commands}\n```\n"


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return number_cell(score["value"], score if "low" in score else None)


def _start_name(row: dict[str, Any], record: dict[str, Any]) -> str:
    if row["start"] == "checkpoint":
        return f"`{record['model']}`"
    return "from scratch" if row["method"] == "finetune" else "random encoder"


def _notes(protocol: "Protocol", record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    data, seeds, methods = record["data"], record["seeds"], {row["method"] for row in rows}
    sizes = ", ".join(
        f"{split} {number:,} pairs (content {data['content'][split]})" for split, number in data["pairs"].items()
    )
    notes = [
        f"Data: {data['name']}, {len(data['classes'])} classes, {protocol.task.replace('_', ' ')}; {sizes}."
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
