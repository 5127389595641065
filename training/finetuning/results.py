"""What runs leave: metrics by sensors, predictions, maps and pictures; tables of scores, and their means over seeds.

Scores are by row: a name such as `both` for the sensors that a fine-tuned model is shown, or `linear/both/mean` for a
probe, its sensors and how the tokens were pooled. `columns` names the parts of such a row.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import PreTrainedModel

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.files.finished import read_record, write_record
from fusmae_hf.files.plain_text import file_stem, inline
from fusmae_hf.plots.scores import class_colours, plot_confusion, plot_scores_by_class, plot_segmentation
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.finetuning.metrics import HEADLINE, confusion_of, counted
from fusmae_hf.training.finetuning.trainer import FineTuningTrainer
from fusmae_hf.training.sources import has_no_data, packed
from fusmae_hf.vocabulary import Sensors

SENSOR_NAMES = {"both": "both sensors", "sar": "SAR alone", "optical": "optical alone"}
"""How tables call the sensors that a model is shown."""

Scores = Mapping[str, Mapping[str, Any]]
"""Metrics by row, then by name."""


def evaluate_sensors(
    trainer: FineTuningTrainer, pairs: PairDataset, sensors: Sequence[Sensors]
) -> dict[str, dict[str, Any]]:
    """Predict a split with each choice of sensors; every process must call it.

    Returns:
        By sensors: `predictions`, `labels` (see `predictions_of`) and `metrics`, all of them, with `loss`.
    """
    trained_on, results = trainer.sensors, dict[str, dict[str, Any]]()
    trainer.inputs.pixel_masks = trainer.inputs.pixel_masks or has_no_data(pairs)
    for name in sensors:
        trainer.sensors = name
        if lacking := pairs.dataset_info.absent(pairs.split).get(name):
            print(f"{lacking:,} of {len(pairs):,} pairs of {pairs.split} lack {name} and do not count there.")
        output = trainer.predict(packed(pairs, trainer.info.optical_factors))
        predictions, labels = np.asarray(output.predictions), np.asarray(output.label_ids)
        metrics = trainer.metrics.details(predictions, labels)
        metrics["loss"] = (output.metrics or {}).get("test_loss")
        results[name] = {"predictions": predictions, "labels": labels, "metrics": metrics}
    trainer.sensors = trained_on
    return results


def write_predictions(
    path: Path, task: FineTuningTask, ids: Sequence[str], results: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the predictions of a fine-tuned model for each pair that was read: `sensors`, `id`, and by task

    - classes of scenes: see `scene_class_columns`,
    - quantities of scenes: `label` and `score`,
    - classes of pixels: `confusion`, counts of `classes * classes` pixels, rows references,
    - quantities of pixels: `sums`, see `error_sums`.
    """
    tables = []
    for sensors, result in results.items():
        kept = counted(task, result["predictions"], result["labels"])
        predictions, labels = result["predictions"][kept], result["labels"][kept]
        columns: dict[str, Any] = {
            "sensors": [sensors] * len(predictions),
            "id": [id for id, keep in zip(ids, kept, strict=True) if keep],
        }
        if task.dense:
            columns["sums" if task.is_regression else "confusion"] = list(predictions.reshape(len(predictions), -1))
        elif task.is_regression:
            columns |= {"label": labels[:, 0], "score": predictions[:, 0]}
        else:
            columns |= scene_class_columns(task, predictions, labels)
        tables.append(columns)
    write_columns(path, task, tables)


def scene_class_columns(task: FineTuningTask, predictions: np.ndarray, labels: np.ndarray) -> dict[str, list[Any]]:
    """Columns of scenes: `labels` (list of class names) and `scores` (probabilities, in the order of the classes)."""
    held = labels > 0.5 if task.is_multi_label else labels[:, None] == np.arange(len(task.outputs))
    names = [[task.outputs[number] for number in np.flatnonzero(row)] for row in held]
    return {"labels": names, "scores": list(predictions)}


def write_columns(path: Path, task: FineTuningTask, tables: Sequence[Mapping[str, Any]]) -> None:
    """Write tables of the same columns one below the other, with the class names as JSON in the schema's metadata."""
    table = pa.concat_tables([pa.table(dict(columns)) for columns in tables])
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(task.outputs)}), path)


def predicted_maps(trainer: FineTuningTrainer, pairs: PairDataset, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Raw patches, reference and predicted classes of some pairs, for pictures, with what the model trained on."""
    shown, model = [], cast(PreTrainedModel, trainer.model).eval()
    for row in rows:
        inputs = trainer.model_inputs(
            trainer.collator(packed(pairs, trainer.info.optical_factors).__getitems__([row]))
        )
        with torch.no_grad():
            logits = model(**inputs).logits.float()
        labels = inputs["labels"][0]
        predicted = torch.nn.functional.interpolate(logits, labels.shape, mode="bilinear")[0].argmax(dim=0)
        pair = pairs[row]
        height, width = pair["label_map"].shape  # padding is cut off
        maps = {
            name: values[:height, :width].cpu().numpy()
            for name, values in (("reference", labels), ("predicted", predicted))
        }
        shown.append({"id": pair["id"], "optical": pair["optical"].numpy(), "sar": pair["sar"].numpy()} | maps)
    return shown


def write_maps(trainer: FineTuningTrainer, pairs: PairDataset, folder: Path) -> None:
    """Write the predicted map of each pair as a PNG with a palette: pixel values are class numbers.

    Ids that are no names of files are changed: see `file_stem`.
    """
    folder.mkdir(exist_ok=True)
    palette = (255 * class_colours(len(trainer.task.outputs))).astype(np.uint8).ravel().tolist()
    for row in range(len(pairs)):
        (shown,) = predicted_maps(trainer, pairs, [row])
        image = Image.fromarray(shown["predicted"].astype(np.uint8), mode="P")
        image.putpalette(palette)
        image.save(folder / f"{file_stem(shown['id'])}.png")


def draw_scores_by_class(folder: Path, metrics: Scores, title: str, columns: Sequence[str] = ("sensors",)) -> None:
    """Write `scores_by_class.png` with the first metric by class of each row, unless there is none."""
    by_class = next((name for name, values in next(iter(metrics.values())).items() if isinstance(values, dict)), None)
    if by_class:
        sensors = columns.index("sensors")
        scores = {SENSOR_NAMES[row.split("/")[sensors]]: values[by_class] for row, values in metrics.items()}
        measure = by_class.removesuffix("_per_class").replace("_", " ")
        plot_scores_by_class(scores, measure, title).savefig(folder / "scores_by_class.png", dpi=110)


def draw_pictures(
    folder: Path,
    trainer: FineTuningTrainer,
    pairs: PairDataset,
    results: Mapping[str, Mapping[str, Any]],
    number: int,
) -> None:
    """Write `scores_by_class.png`, `confusion.png` and `segmentation.png`, those that the task has."""
    task = trainer.task
    title = f"{task.name.replace('_', ' ')}, {of_split(pairs.info, str(pairs.split))}"
    draw_scores_by_class(folder, {name: result["metrics"] for name, result in results.items()}, title)
    sensors, first = next(iter(results.items()))
    counts = confusion_of(task, first["predictions"], first["labels"])
    if counts is not None:
        plot_confusion(counts, task.outputs, f"{title}, {SENSOR_NAMES[sensors]}").savefig(
            folder / "confusion.png", dpi=110
        )
    if task.name == "semantic_segmentation" and number:
        shown = predicted_maps(trainer, pairs, range(min(number, len(pairs))))
        plot_segmentation(
            shown,
            pairs.info,
            task.outputs,
            title,
            ids=[pair["id"] for pair in shown],
            ignore_index=task.ignore_index,
        ).savefig(folder / "segmentation.png", dpi=110)


def of_split(info: PairsInfo, split: str) -> str:
    """What a picture is of, for its title."""
    return f"{split} split of {'simulated imagery' if info.simulated else info.name}"


def score_table(
    task: FineTuningTask, metrics: Scores, intervals: Scores | None = None, columns: Sequence[str] = ("sensors",)
) -> str:
    """Markdown table of the main metrics of each row, with the interval where there is one."""
    names, rows = HEADLINE[task.name], list[list[str]]()
    for row, values in metrics.items():
        of_row = (intervals or {}).get(row, {})
        parts = (SENSOR_NAMES.get(part, part) for part in row.split("/"))
        rows.append([*parts, *(number_cell(values.get(name), of_row.get(name)) for name in names)])
    return markdown_table([*columns, *names], rows)


def class_table(metrics: Mapping[str, Any]) -> str:
    """Markdown table of the metrics by class; empty where there are none."""
    columns = {name.removesuffix("_per_class"): values for name, values in metrics.items() if isinstance(values, dict)}
    if not columns:
        return ""
    labels = next(iter(columns.values()))
    rows = ([inline(label), *(number_cell(values[label]) for values in columns.values())] for label in labels)
    return markdown_table(["class", *columns], rows)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table of plain cells."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


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
    content = read_record(folder / "metrics.json", {"settings": settings, "bootstrap": bootstrap})
    if content is not None:
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
    from fusmae_hf.evaluation.intervals import mean_and_interval

    summary: dict[str, Any] = {}
    for row in next(iter(by_seed.values())):
        for name in HEADLINE[task.name]:
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
    write_record(folder / "summary.json", summary, indent=2)
    means = {row: {name: found["mean"] for name, found in metrics.items()} for row, metrics in summary.items()}
    table = score_table(task, means, summary, columns)
    note = f"Mean of {len(by_seed)} seeds with a 95 % interval, split {split}."
    (folder / "summary.md").write_text(f"{note}\n\n{table}\n")
    print(f"\n{note}\n\n{table}")
