"""What a fine-tuning run leaves: metrics by sensors, predictions, maps, pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import PreTrainedModel

from fusmae_hf.files.names import file_stem
from fusmae_hf.plots.scores import class_colours, plot_confusion, plot_scores_by_class, plot_segmentation
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.finetuning.metrics import confusion_of, counted
from fusmae_hf.training.finetuning.score_tables import SENSOR_NAMES
from fusmae_hf.training.finetuning.tasks import FineTuningTask
from fusmae_hf.training.finetuning.trainer import FineTuningTrainer
from fusmae_hf.training.sources import has_no_data, packed
from fusmae_hf.vocabulary import Sensors


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
    """Write the predictions of each pair that was read: `sensors`, `id`, and by task

    - classes of scenes: `labels` (list of class names) and `scores` (probabilities, in the order of the classes),
    - quantities of scenes: `label` and `score`,
    - classes of pixels: `confusion`, counts of `classes * classes` pixels, rows references,
    - quantities of pixels: `sums`, see `pixel_sums`.

    Class names are in the schema's metadata, as JSON under `class_names`.
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
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(task.outputs)}), path)


def scene_class_columns(task: FineTuningTask, predictions: np.ndarray, labels: np.ndarray) -> dict[str, list[Any]]:
    """Columns `labels` and `scores` of scenes, as `write_predictions` describes them."""
    held = labels > 0.5 if task.is_multi_label else labels[:, None] == np.arange(len(task.outputs))
    names = [[task.outputs[number] for number in np.flatnonzero(row)] for row in held]
    return {"labels": names, "scores": list(predictions)}


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
        maps = {"reference": labels.cpu().numpy(), "predicted": predicted.cpu().numpy()}
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


def draw_pictures(
    folder: Path,
    trainer: FineTuningTrainer,
    pairs: PairDataset,
    results: Mapping[str, Mapping[str, Any]],
    number: int,
) -> None:
    """Write `scores_by_class.png`, `confusion.png` and `segmentation.png`, those that the task has."""
    task = trainer.task
    kind = "simulated imagery" if pairs.info.simulated else pairs.info.name
    title = f"{task.name.replace('_', ' ')}, {pairs.split} split of {kind}"
    first = next(iter(results.values()))
    by_class = next((name for name, values in first["metrics"].items() if isinstance(values, dict)), None)
    if by_class:
        scores = {SENSOR_NAMES[name]: result["metrics"][by_class] for name, result in results.items()}
        measure = by_class.removesuffix("_per_class").replace("_", " ")
        plot_scores_by_class(scores, measure, title).savefig(folder / "scores_by_class.png", dpi=110)
    counts = confusion_of(task, first["predictions"], first["labels"])
    if counts is not None:
        named = f"{title}, {SENSOR_NAMES[next(iter(results))]}"
        plot_confusion(counts, task.outputs, named).savefig(folder / "confusion.png", dpi=110)
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
