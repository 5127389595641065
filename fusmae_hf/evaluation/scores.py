"""Scores of scenes and maps: average precision, F1, accuracy, intersection over union, errors of a quantity.

What cannot be measured is None, never 0: a class without a positive has no average precision. Such classes are left
out of means over classes, and named, because a mean over fewer classes is another measure. Scores of maps come from
sums that grow with the batches: a test set of maps never has to lie in memory.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

IGNORED_LABEL = -100
"""Class index of a sample that is left out, as in the loss of the models."""


def average_precision(
    scores: ArrayLike, references: ArrayLike, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Average precision of several labels a scene, micro and macro: on BigEarthNet they differ by many points.

    Args:
        scores: `(samples, classes)`, higher where a class is more likely. Probabilities or logits: only the order
            counts, across classes too for the micro average.
        references: `(samples, classes)`, 1 where a class holds, else 0.
        class_names: a name for each class; their numbers, as text, where None.

    Returns:
        `average_precision_micro`: of all (sample, class) decisions ranked together;
        `average_precision_macro`: mean over the classes that have a positive;
        `average_precision_per_class`: by name, None where a class has no positive;
        `classes_left_out`: names of those, and `num_classes_left_out`. Both averages are None where nothing is
        positive.

    Raises:
        ValueError: no samples, shapes that differ, scores that are not finite, references other than 0 and 1.

    Source: `sklearn.metrics.average_precision_score`, the sum of precisions weighted by steps of recall, without
    interpolation.
    """
    from sklearn.metrics import average_precision_score

    values, truth, names = _checked(scores, references, class_names)
    per_class = {
        name: float(average_precision_score(held, ranked)) if held.any() else None
        for name, held, ranked in zip(names, truth.T, values.T, strict=True)
    }
    micro = float(average_precision_score(truth.ravel(), values.ravel())) if truth.any() else None
    return {"average_precision_micro": micro, **_with_mean("average_precision", "macro", per_class)}


def f1(
    scores: ArrayLike,
    references: ArrayLike,
    threshold: float = 0.5,
    class_names: Sequence[str] | None = None,
    sample_weight: ArrayLike | None = None,
) -> dict[str, Any]:
    """F1 of several labels a scene: harmonic mean of precision and recall.

    Args:
        scores: `(samples, classes)`; a class is predicted where its score exceeds `threshold`. For logits pass 0.
        references: `(samples, classes)`, 1 where a class holds, else 0.
        threshold: on the scale of the scores, the same for all classes.
        class_names: a name for each class; their numbers, as text, where None.
        sample_weight: `(samples,)`, how often each counts; once where None.

    Returns:
        `f1_micro`, over all decisions; `f1_macro`, mean over classes; `f1_per_class`, by name; `classes_left_out` and
        `num_classes_left_out`: those neither predicted nor present, whose F1 is None.

    Raises:
        ValueError: as for [`average_precision`].
    """
    values, truth, names = _checked(scores, references, class_names)
    predicted = values.astype(np.float64) > threshold  # NumPy would round the threshold to the type of the scores
    counts = np.ones(len(truth), dtype=np.int64) if sample_weight is None else np.asarray(sample_weight)
    right = counts @ (predicted & truth)
    either = counts @ predicted + counts @ truth
    per_class = {name: _share(2 * n, of) for name, n, of in zip(names, right, either, strict=True)}
    return {"f1_micro": _share(2 * right.sum(), either.sum()), **_with_mean("f1", "macro", per_class)}


def accuracy(
    predictions: ArrayLike,
    references: ArrayLike,
    class_names: Sequence[str] | None = None,
    ignore_index: int = IGNORED_LABEL,
) -> dict[str, Any]:
    """Accuracy of one class a scene.

    Args:
        predictions: `(samples,)` class indices.
        references: `(samples,)` class indices, or `ignore_index` for samples to leave out.
        class_names: a name for each class; where None, classes are as many as the highest index says.
        ignore_index: a negative number.

    Returns:
        `accuracy`: share of the samples that are right; `accuracy_mean_per_class`: mean of the recalls of the classes
        in the references; `accuracy_per_class`: those recalls by name; `classes_left_out` and `num_classes_left_out`:
        those without a sample, whose recall is None; `num_samples`. Averages are None where no sample is left.

    Raises:
        ValueError: no samples, shapes that differ, or something that is no class index.
    """
    predicted, truth = (_class_indices(*given) for given in (("predictions", predictions), ("references", references)))
    if predicted.shape != truth.shape or not len(truth):
        raise ValueError(
            f"predictions of shape {predicted.shape} and references of shape {truth.shape} do not fit: give one class "
            "index for each sample, at least one."
        )
    kept = truth != ignore_index
    predicted, truth = predicted[kept], truth[kept]
    highest = int(max(predicted.max(initial=-1), truth.max(initial=-1)))
    names = [str(number) for number in range(highest + 1)] if class_names is None else list(class_names)
    for what, values in (("predictions", predicted), ("references", truth)):
        wrong = np.unique(values[(values < 0) | (values >= len(names))])
        if len(wrong):
            raise ValueError(
                f"{what} hold {wrong[:5].tolist()}, but class indices are 0 to {len(names) - 1}; {ignore_index} in "
                "the references leaves a sample out."
            )
    right = np.bincount(truth[predicted == truth], minlength=len(names))
    count = np.bincount(truth, minlength=len(names))
    per_class = {name: _share(n, of) for name, n, of in zip(names, right, count, strict=True)}
    overall = _share(right.sum(), count.sum())
    return {"accuracy": overall, **_with_mean("accuracy", "mean_per_class", per_class), "num_samples": len(truth)}


def confusion_counts(
    predictions: torch.Tensor, references: torch.Tensor, num_classes: int, ignore_index: int | None = None
) -> torch.Tensor:
    """Count pixels by class, on the device where they lie.

    Args:
        predictions: integers of any shape, such as `(batch, height, width)`.
        references: integers of the same shape.
        num_classes: classes are 0 to `num_classes - 1`.
        ignore_index: value in the references of pixels that are left out; None: all count.

    Returns:
        `(num_classes, num_classes)` int64: rows are references, columns predictions. Counts of batches add up.

    Raises:
        ValueError: shapes that differ, values that are no integers, or classes out of range where a pixel counts.
    """
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions of shape {tuple(predictions.shape)} and references of shape {tuple(references.shape)} do "
            "not fit: bring predictions to the size of the label maps first."
        )
    for what, values in (("predictions", predictions), ("references", references)):
        if values.is_floating_point():
            raise ValueError(f"{what} are {values.dtype}, but must be integers. Of logits take `argmax(dim=1)`.")
    predicted, truth = predictions.reshape(-1).long(), references.reshape(-1).long()
    if ignore_index is not None:
        kept = truth != ignore_index
        predicted, truth = predicted[kept], truth[kept]
    for what, values in (("predictions", predicted), ("references", truth)):
        if values.numel() and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(
                f"{what} hold classes from {int(values.min())} to {int(values.max())}, but {num_classes} classes are "
                f"0 to {num_classes - 1}, and the value that is left out is {ignore_index}."
            )
    counts = torch.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def intersection_over_union(counts: ArrayLike, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Intersection over union (Jaccard index) of each class, over all pixels together, and its mean.

    Args:
        counts: `(classes, classes)`, rows references, columns predictions: a sum of [`confusion_counts`].
        class_names: a name for each class; their numbers, as text, where None.

    Returns:
        `mean_iou`, mean over the classes in the references or the predictions; `iou_per_class` by name, None for the
        others, which `classes_left_out` names and `num_classes_left_out` counts; `pixel_accuracy`, share of the
        pixels that are right; `num_pixels`. Without any pixel, averages are None.

    Raises:
        ValueError: counts are not square, or there is not one name for each class.
    """
    table = np.asarray(counts, dtype=np.int64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"counts have shape {table.shape}, but must be (classes, classes).")
    names = _named(class_names, len(table))
    right, total = np.diagonal(table), table.sum()
    union = table.sum(axis=0) + table.sum(axis=1) - right
    of_classes = {name: _share(both, either) for name, both, either in zip(names, right, union, strict=True)}
    with_mean = _with_mean("iou", "mean", of_classes)
    return {
        "mean_iou": with_mean.pop("iou_mean"),
        "pixel_accuracy": _share(right.sum(), total),
        **with_mean,
        "num_pixels": int(total),
    }


def error_sums(predictions: np.ndarray, references: np.ndarray) -> tuple[float, ...]:
    """Sums from which [`errors_of_sums`] follow, over the values with a reference: one that is NaN does not count.

    Returns:
        Number of values, sums of prediction minus reference, of its absolute value and of its square, mean of the
        references, and sum of their squared deviations from it.
    """
    kept = np.isfinite(references)
    truth = references[kept].astype(np.float64)
    if not truth.size:
        return (0.0,) * 6
    error, mean = predictions[kept] - truth, truth.mean()
    return truth.size, error.sum(), np.abs(error).sum(), (error**2).sum(), mean, ((truth - mean) ** 2).sum()


def errors_of_sums(sums: ArrayLike) -> dict[str, float | int | None]:
    """Errors of a quantity from sums over groups of values, such as batches or maps.

    Args:
        sums: `(groups, 6)`, each of [`error_sums`]. Means are kept beside the deviations so that large values do not
            cancel.

    Returns:
        `rmse`, `mae` and `bias` (mean of prediction minus reference) in the units of the values, `r2`, and
        `num_values`. `r2` is the coefficient of determination, `1 - squared errors / spread of the references`; it is
        None where all references are the same, and everything is None without any value.
    """
    count, error, absolute, squared, mean, spread = np.asarray(sums, dtype=np.float64).reshape(-1, 6).T
    total = count.sum()
    if not total:
        return {"rmse": None, "mae": None, "r2": None, "bias": None, "num_values": 0}
    overall = (mean * count).sum() / total
    variation = spread.sum() + (count * (mean - overall) ** 2).sum()
    return {
        "rmse": float(np.sqrt(squared.sum() / total)),
        "mae": float(absolute.sum() / total),
        "r2": float(1 - squared.sum() / variation) if variation > 0 else None,
        "bias": float(error.sum() / total),
        "num_values": int(total),
    }


def _checked(
    scores: ArrayLike, references: ArrayLike, class_names: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores as numbers, references as bool, both `(samples, classes)`, and a name for each class."""
    values, truth = _matrix("scores", scores), _matrix("references", references)
    if values.shape != truth.shape or not values.size:
        raise ValueError(
            f"scores of shape {values.shape} and references of shape {truth.shape} do not fit: both must be "
            "(samples, classes), with at least one of each."
        )
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        first = int(finite.argmin())
        raise ValueError(
            f"{(~finite).sum()} of {len(values)} samples have scores that are NaN or infinite, the first at row "
            f"{first}: {values[first].tolist()[:20]}. A model that diverged gives such scores."
        )
    held = truth.astype(bool)
    if not (held == truth).all():
        wrong = np.unique(truth[held != truth])[:5].tolist()
        raise ValueError(f"references hold {wrong}, but must be 1 where a class holds and 0 elsewhere.")
    return values, held, _named(class_names, values.shape[1])


def _matrix(what: str, values: ArrayLike) -> np.ndarray:
    try:
        matrix = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} have rows of different lengths: give one value a class in each row.") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiub":
        raise ValueError(f"{what} must be numbers (samples, classes), not {matrix.dtype} of shape {matrix.shape}.")
    return matrix


def _class_indices(what: str, values: ArrayLike) -> np.ndarray:
    indices = np.asarray(values)
    if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
        raise ValueError(
            f"{what} must be class indices (samples,), not {indices.dtype} of shape {indices.shape}. Of scores "
            "(samples, classes) take the `argmax(axis=1)`."
        )
    return indices.astype(np.int64)


def _named(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    names = [str(number) for number in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes or len(set(names)) != len(names):
        raise ValueError(
            f"{len(names)} class names ({len(set(names))} different ones) for {num_classes} classes: give each class "
            "a name of its own, in their order."
        )
    return names


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _with_mean(measure: str, mean: str, per_class: dict[str, float | None]) -> dict[str, Any]:
    """A measure by class, its mean over the classes that have it, and those that do not."""
    measured = [value for value in per_class.values() if value is not None]
    left_out = [name for name, value in per_class.items() if value is None]
    return {
        f"{measure}_{mean}": float(np.mean(measured)) if measured else None,
        f"{measure}_per_class": per_class,
        "classes_left_out": left_out,
        "num_classes_left_out": len(left_out),
    }
