"""Bootstrap intervals of the main metrics of a task: the test pairs drawn again and again for one trained model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.training.finetuning.metrics import TaskMetrics, counted, headline

Score = Callable[[np.ndarray], float | None]
"""Of pairs drawn with replacement, given by their rows `(pairs,)`."""


def score_intervals(
    task: FineTuningTask,
    predictions: np.ndarray,
    labels: np.ndarray,
    resamples: int,
    *,
    threshold: float = 0.5,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """A 95 % interval of each main metric.

    Args:
        task: which metrics: those of `headline`.
        predictions: as `predictions_of` gives them, one row a pair.
        labels: likewise.
        resamples: number of resamples, at least 1.
        threshold: probability above which a class of several is predicted, for F1.
        seed: of the draws, which are the same for all metrics.

    Returns:
        By metric `low`, `high`, `confidence`, `covers` and `resamples`. Metrics that are undefined are left out.

    Raises:
        ValueError: fewer than two pairs, or a metric that some resample leaves undefined.
        ImportError: scipy is not installed; names the pip command.
    """
    from fusmae_hf.evaluation.confidence import bootstrap_interval

    kept = counted(task, predictions, labels)
    rows = np.arange(int(kept.sum()))
    intervals = {}
    for name, score in _scores(task, predictions[kept], labels[kept], threshold):
        if score(rows) is None:
            continue
        interval = bootstrap_interval(score, rows, resamples=resamples, seed=seed)
        intervals[name] = {
            "low": interval.low,
            "high": interval.high,
            "confidence": interval.confidence,
            "covers": interval.covers,
            "resamples": resamples,
        }
    return intervals


def _scores(
    task: FineTuningTask, predictions: np.ndarray, labels: np.ndarray, threshold: float
) -> Iterator[tuple[str, Score]]:
    """Each main metric, as a function of the rows drawn."""
    for name in headline(task):
        if task.is_multi_label and name.startswith("average_precision"):
            yield name, _average_precision(predictions, labels > 0.5, micro=name.endswith("micro"))
        elif task.is_multi_label:
            yield name, _f1(predictions > threshold, labels > 0.5, micro=name.endswith("micro"))
        elif task.dense or task.is_regression:
            yield name, _of_details(task, name, predictions, labels)
        else:
            yield name, _accuracy(predictions.argmax(axis=1), labels, by_class=name != "accuracy")


# Metrics of resamples, from how often each pair was drawn: scores are ranked once, not once a resample.


def _average_precision(scores: np.ndarray, truth: np.ndarray, micro: bool) -> Score:
    """As `classification_scores.average_precision`; the mean is over the classes that the resample has."""
    number, classes = scores.shape
    columns = [(scores.ravel(), truth.ravel())] if micro else list(zip(scores.T, truth.T, strict=True))
    ranked = []
    for values, held in columns:
        order = np.argsort(-values, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # equal scores share a threshold
        ranked.append((order // classes if micro else order, held[order], ends))

    def score(rows: np.ndarray) -> float | None:
        counts, found = np.bincount(rows, minlength=number), []
        for order, held, ends in ranked:
            drawn = counts[order]
            positive, total = np.cumsum(drawn * held)[ends], np.cumsum(drawn)[ends]
            if positive[-1]:
                found.append((np.diff(positive, prepend=0) * positive / np.maximum(total, 1)).sum() / positive[-1])
        return float(np.mean(found)) if found else None

    return score


def _f1(predicted: np.ndarray, truth: np.ndarray, micro: bool) -> Score:
    right, either = 2 * (predicted & truth), predicted.astype(np.int64) + truth

    def score(rows: np.ndarray) -> float | None:
        counts = np.bincount(rows, minlength=len(truth))
        both, any_ = counts @ right, counts @ either
        if micro:
            both, any_ = both.sum(keepdims=True), any_.sum(keepdims=True)
        return float((both[any_ > 0] / any_[any_ > 0]).mean()) if any_.any() else None

    return score


def _accuracy(predicted: np.ndarray, truth: np.ndarray, by_class: bool) -> Score:
    right = predicted == truth

    def score(rows: np.ndarray) -> float | None:
        if not by_class:
            return float(right[rows].mean())
        count = np.bincount(truth[rows])
        hits = np.bincount(truth[rows], weights=right[rows])
        return float((hits[count > 0] / count[count > 0]).mean())

    return score


def _of_details(task: FineTuningTask, name: str, predictions: np.ndarray, labels: np.ndarray) -> Score:
    metrics = TaskMetrics(task)
    return lambda rows: metrics.details(predictions[rows], labels[rows])[name]
