"""Scores of maps, from sums that grow with the batches: a test set of maps never has to lie in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike


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
    names = [str(number) for number in range(len(table))] if class_names is None else list(class_names)
    if len(set(names)) != len(table) or len(names) != len(table):
        raise ValueError(f"{len(names)} class names, {len(set(names))} of them different, for {len(table)} classes.")
    right, total = np.diagonal(table), int(table.sum())
    union = table.sum(axis=0) + table.sum(axis=1) - right
    per_class = {
        name: float(both / either) if either else None for name, both, either in zip(names, right, union, strict=True)
    }
    measured = [value for value in per_class.values() if value is not None]
    left_out = [name for name, value in per_class.items() if value is None]
    return {
        "mean_iou": float(np.mean(measured)) if measured else None,
        "pixel_accuracy": float(right.sum() / total) if total else None,
        "iou_per_class": per_class,
        "classes_left_out": left_out,
        "num_classes_left_out": len(left_out),
        "num_pixels": total,
    }


class RegressionSums:
    """Sums from which errors of a quantity follow, of all batches so far.

    Attributes:
        num_missing: references that were NaN; they do not count.
    """

    def __init__(self) -> None:
        self.num_missing = 0
        self._batches: list[tuple[float, ...]] = []

    def add(self, predictions: ArrayLike, references: ArrayLike) -> None:
        """Add a batch of any shape.

        Raises:
            ValueError: shapes that differ, or values that are not finite where a reference is there.
        """
        predicted, truth = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
        if predicted.shape != truth.shape:
            raise ValueError(f"predictions of shape {predicted.shape} for references of shape {truth.shape}.")
        kept = ~np.isnan(truth)
        predicted, truth = predicted[kept], truth[kept]
        for what, values in (("predictions", predicted), ("references", truth)):
            if not np.isfinite(values).all():
                raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} {what} are NaN or infinite.")
        self.num_missing += kept.size - truth.size
        if truth.size:
            error, mean = predicted - truth, truth.mean()
            sums = (error.sum(), np.abs(error).sum(), np.square(error).sum(), mean, np.square(truth - mean).sum())
            self._batches.append((truth.size, *sums))

    def errors(self) -> dict[str, float | int | None]:
        """See `errors_of_sums`."""
        return errors_of_sums(np.array(self._batches).reshape(-1, 6))


def errors_of_sums(sums: ArrayLike) -> dict[str, float | int | None]:
    """Errors of a quantity from sums over groups of values, such as batches or maps.

    Args:
        sums: `(groups, 6)`: number of values, sums of prediction minus reference, of its absolute value and of its
            square, mean of the references, and sum of their squared deviations from it. Means are kept beside the
            deviations so that large values do not cancel.

    Returns:
        `rmse`, `mae` and `bias` (mean of prediction minus reference) in the units of the values, `r2`, and
        `num_values`. `r2` is the coefficient of determination, `1 - squared errors / spread of the references`; it is
        None where all references are the same, and everything is None without any value.
    """
    count, error, absolute, squared, mean, spread = np.asarray(sums, dtype=np.float64).T
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
