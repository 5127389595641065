"""What is kept of each held-out pair, and the metrics of a task from it."""

from functools import cache
from typing import Any

import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.evaluation.map_scores import confusion_counts, errors_of_sums
from fusmae_hf.evaluation.metrics import load_metric


def predictions_of(
    task: FineTuningTask,
    logits: torch.Tensor,
    labels: torch.Tensor,
    scale: tuple[float, float] = (0.0, 1.0),
    replaced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a batch: scores of scenes, sums over pixels of maps; never whole maps.

    Args:
        task: what the logits are for.
        logits: of the model, `(batch, outputs, ...)`.
        labels: as the model got them; a quantity divided by `scale`.
        scale: mean and deviation by which a quantity was normalised.
        replaced: `(batch,)` bool, pairs that stand in for damaged ones and must not count.

    Returns:
        Predictions and labels, one row a pair. Classes of scenes: probabilities `(batch, classes)`, and the labels.
        Quantities of scenes: values `(batch, 1)` in their units, twice. Classes of pixels: counts
        `(batch, classes, classes)`, rows references; quantities of pixels: `pixel_sums` `(batch, 6)`; both with labels
        of zeros `(batch, 1)`. Labels of replaced pairs are -100 or NaN, their sums zero.
    """
    logits = logits.float()
    mean, deviation = scale
    if task.dense:
        size = labels.shape[-2:]
        logits = torch.nn.functional.interpolate(logits, size, mode="bilinear")
        if task.is_regression:
            sums = pixel_sums(logits[:, 0] * deviation + mean, labels * deviation + mean)
        else:
            number, classes = logits.shape[1], logits.argmax(dim=1)
            of_maps = zip(classes, labels, strict=True)
            sums = torch.stack([confusion_counts(*maps, number, task.ignore_index) for maps in of_maps])
        if replaced is not None:
            sums[replaced.to(sums.device)] = 0
        return sums, torch.zeros(len(sums), 1, device=sums.device)
    if task.is_regression:
        predictions, labels = logits * deviation + mean, labels * deviation + mean
    else:
        predictions = logits.sigmoid() if task.is_multi_label else logits.softmax(dim=1)
    if replaced is not None:
        labels = labels.clone()
        labels[replaced.to(labels.device)] = float("nan") if labels.is_floating_point() else -100
    return predictions, labels


def pixel_sums(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each map `(batch, height, width)`, over pixels with a finite label: number, sum of errors, of their absolute
    values, of their squares, mean of the labels, and sum of their squared deviations from it; `(batch, 6)` float64."""
    predicted, truth = predicted.flatten(1).double().cpu(), labels.flatten(1).double().cpu()
    valid = truth.isfinite()
    error = torch.where(valid, predicted - torch.where(valid, truth, 0.0), 0.0)
    count = valid.sum(dim=1)
    mean = torch.where(valid, truth, 0.0).sum(dim=1) / count.clamp(min=1)
    spread = torch.where(valid, truth - mean[:, None], 0.0).square().sum(dim=1)
    sums = [count, error.sum(dim=1), error.abs().sum(dim=1), error.square().sum(dim=1), mean, spread]
    return torch.stack([values.double() for values in sums], dim=1).to(labels.device)


class TaskMetrics:
    """Metrics of a task from what `predictions_of` kept; `compute_metrics` of the Trainer.

    Args:
        task: which metrics.
        threshold: probability above which a class of several is predicted, for F1.
    """

    def __init__(self, task: FineTuningTask, threshold: float = 0.5):
        self.task, self.threshold = task, threshold

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The single numbers among `details`, NaN where one is undefined."""
        details = self.details(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))
        single = {name: value for name, value in details.items() if not isinstance(value, dict | list)}
        return {name: float("nan") if value is None else value for name, value in single.items()}

    def details(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """All metrics, those by class as dictionaries. See `fusmae_hf.evaluation.metrics`."""
        task, names = self.task, list(self.task.outputs)
        kept = counted(task, predictions, labels)
        predictions, labels = predictions[kept], labels[kept]
        if task.dense and task.is_regression:
            return errors_of_sums(predictions)
        if task.dense:
            metric = _metric("mean_iou")
            metric.add_counts(torch.from_numpy(predictions.sum(axis=0, dtype=np.int64).reshape(len(names), -1)))
            return metric.compute(class_names=names)
        if not len(labels):
            raise ValueError("No held-out pair could be read, so nothing can be measured.")
        if task.is_regression:
            return _metric("regression_errors").compute(predictions=predictions[:, 0], references=labels[:, 0])
        given = {"predictions": predictions, "references": labels, "class_names": names}
        if task.is_multi_label:
            precision = _metric("multilabel_average_precision").compute(**given)
            f1 = _metric("multilabel_f1").compute(**given, threshold=self.threshold)
            return f1 | precision  # of the classes left out, those without average precision
        if not np.isfinite(predictions).all():
            raise ValueError("Some scores are NaN or infinite: the model diverged. Lower the learning rate.")
        return _metric("classification_accuracy").compute(**given | {"predictions": predictions.argmax(axis=1)})


def counted(task: FineTuningTask, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which pairs count, `(pairs,)` bool: not those that stand in for damaged ones."""
    if task.dense:
        return np.asarray(predictions.reshape(len(predictions), -1).any(axis=1))
    if task.is_multi_label or task.is_regression:
        return ~np.isnan(labels).any(axis=1)
    return labels != -100


def confusion_of(task: FineTuningTask, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Confusion counts `(classes, classes)`, rows references; None where there is no single class to confuse."""
    if task.is_regression or task.is_multi_label:
        return None
    kept = counted(task, predictions, labels)
    if task.dense:
        return predictions[kept].sum(axis=0, dtype=np.int64)
    given = torch.from_numpy(predictions[kept].argmax(axis=1)), torch.from_numpy(labels[kept])
    return confusion_counts(*given, len(task.outputs)).numpy()


def headline(task: FineTuningTask) -> list[str]:
    """Metrics that stand in tables, the one that chooses the best checkpoint first."""
    return {
        "single_label_classification": ["accuracy", "accuracy_mean_per_class"],
        "multi_label_classification": ["average_precision_micro", "average_precision_macro", "f1_micro", "f1_macro"],
        "semantic_segmentation": ["mean_iou", "pixel_accuracy"],
        "regression": ["rmse", "mae", "r2", "bias"],
    }[task.name]


@cache
def _metric(name: str) -> evaluate.EvaluationModule:
    return load_metric(name, keep_in_memory=True)
