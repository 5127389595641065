"""Tables of scores, and their means over several seeds.

Scores are by row: a name such as `both` for the sensors that a fine-tuned model is shown, or `linear/both/mean` for a
probe, its sensors and how the tokens were pooled. `columns` names the parts of such a row.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.files.plain_markdown import inline
from fusmae_hf.training.finetuning.metrics import headline

SENSOR_NAMES = {"both": "both sensors", "sar": "SAR alone", "optical": "optical alone"}
"""How tables call the sensors that a model is shown."""

Scores = Mapping[str, Mapping[str, Any]]
"""Metrics by row, then by name."""


def score_table(
    task: FineTuningTask, metrics: Scores, intervals: Scores | None = None, columns: Sequence[str] = ("sensors",)
) -> str:
    """Markdown table of the main metrics of each row, with the interval where there is one."""
    of_rows = {
        row: [number_cell(values[name], (intervals or {}).get(row, {}).get(name)) for name in headline(task)]
        for row, values in metrics.items()
    }
    return markdown_table(columns, headline(task), of_rows)


def class_table(metrics: Mapping[str, Any]) -> str:
    """Markdown table of the metrics by class; empty where there are none."""
    columns = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    if not columns:
        return ""
    titles = [name.removesuffix("_per_class") for name in columns]
    lines = ["| class | " + " | ".join(titles) + " |", "|---|" + "---|" * len(columns)]
    for label in next(iter(columns.values())):
        cells = " | ".join(number_cell(values[label]) for values in columns.values())
        lines.append(f"| {inline(label)} | {cells} |")
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], names: Sequence[str], of_rows: Mapping[str, Sequence[str]]) -> str:
    """Markdown table: the parts of each row, then its cells."""
    lines = [f"| {' | '.join([*columns, *names])} |", "|---" * (len(columns) + len(names)) + "|"]
    for row, cells in of_rows.items():
        parts = [SENSOR_NAMES.get(part, part) for part in row.split("/")]
        lines.append(f"| {' | '.join([*parts, *cells])} |")
    return "\n".join(lines)


def number_cell(value: float | None, interval: Mapping[str, Any] | None = None) -> str:
    """A number as tables show it, with its interval `{"low", "high"}`; `-` where there is none."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" + (f" [{interval['low']:.4f}, {interval['high']:.4f}]" if interval else "")


def finished_run(folder: Path, settings: str, bootstrap: int) -> dict[str, Any] | None:
    """The content of `metrics.json` of a run that finished; None where there is none.

    Args:
        folder: of the run.
        settings: fingerprint that the run must have.
        bootstrap: resamples that it must have.

    Raises:
        ValueError: it is of other settings.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if (content["settings"], content.get("bootstrap", 0)) != (settings, bootstrap):
        raise ValueError(f"{path} is of a run with other settings. Give another `--output_dir`, or delete it.")
    print(f"Keeping {folder}, which is finished.")
    return content


def seeds_summary(task: FineTuningTask, by_seed: Mapping[int, Scores]) -> dict[str, Any]:
    """Mean over seeds with a 95 % interval of each main metric, by row.

    Args:
        task: what was learnt.
        by_seed: metrics by seed, then by row.

    Raises:
        ImportError: scipy is not installed; names the pip command.
    """
    from fusmae_hf.evaluation.confidence import mean_and_interval

    summary: dict[str, Any] = {}
    for row in next(iter(by_seed.values())):
        for name in headline(task):
            values = [metrics[row][name] for metrics in by_seed.values()]
            if any(value is None for value in values):
                continue
            interval = mean_and_interval(values)
            summary.setdefault(row, {})[name] = {
                "mean": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "confidence": interval.confidence,
                "covers": interval.covers,
                "values": dict(zip(map(str, by_seed), values, strict=True)),
            }
    return summary


def write_summary(
    folder: Path,
    task: FineTuningTask,
    by_seed: Mapping[int, Scores],
    split: str,
    columns: Sequence[str] = ("sensors",),
) -> None:
    """Write `summary.json` and `summary.md`, mean [low, high] over the seeds, and print the table."""
    summary = seeds_summary(task, by_seed)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    of_rows = {
        row: [number_cell(metrics[name]["mean"], metrics[name]) if name in metrics else "-" for name in headline(task)]
        for row, metrics in summary.items()
    }
    table = markdown_table(columns, headline(task), of_rows)
    note = f"Mean of {len(by_seed)} seeds with a 95 % interval, split {split}."
    (folder / "summary.md").write_text(f"{note}\n\n{table}\n")
    print(f"\n{note}\n\n{table}")
