"""Scores of scene classification: average precision and F1 of several labels a scene, accuracy of one.

What cannot be measured is None, never 0: a class without a positive has no average precision. Such classes are left
out of means over classes, and named, because a mean over fewer classes is another measure.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

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
    values, truth, names = _checked(scores, references, class_names)
    present = np.flatnonzero(truth.any(axis=0)).tolist()
    per_class = {
        name: float(average_precision_score(truth[:, number], values[:, number])) if number in present else None
        for number, name in enumerate(names)
    }
    micro = float(average_precision_score(truth.ravel(), values.ravel())) if present else None
    return {"average_precision_micro": micro, **_with_mean("average_precision", "macro", per_class)}


def f1(
    scores: ArrayLike, references: ArrayLike, threshold: float = 0.5, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """F1 of several labels a scene: harmonic mean of precision and recall.

    Args:
        scores: `(samples, classes)`; a class is predicted where its score exceeds `threshold`. For logits pass 0.
        references: `(samples, classes)`, 1 where a class holds, else 0.
        threshold: on the scale of the scores, the same for all classes.
        class_names: a name for each class; their numbers, as text, where None.

    Returns:
        `f1_micro`, over all decisions; `f1_macro`, mean over classes; `f1_per_class`, by name; `classes_left_out` and
        `num_classes_left_out`: those neither predicted nor present, whose F1 is None.

    Raises:
        ValueError: as for [`average_precision`].
    """
    values, truth, names = _checked(scores, references, class_names)
    predicted = values > threshold
    right = (predicted & truth).sum(axis=0)
    either = predicted.sum(axis=0) + truth.sum(axis=0)
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
    if not np.isfinite(values).all():
        samples = np.flatnonzero(~np.isfinite(values).all(axis=1))
        raise ValueError(
            f"{len(samples)} of {len(values)} samples have scores that are NaN or infinite, the first at row "
            f"{samples[0]}: {values[samples[0]].tolist()[:20]}. A model that diverged gives such scores."
        )
    if not np.isin(truth, (0, 1)).all():
        wrong = np.unique(truth[~np.isin(truth, (0, 1))])[:5].tolist()
        raise ValueError(f"references hold {wrong}, but must be 1 where a class holds and 0 elsewhere.")
    names = [str(number) for number in range(values.shape[1])] if class_names is None else list(class_names)
    if len(names) != values.shape[1] or len(set(names)) != len(names):
        raise ValueError(
            f"{len(names)} class names ({len(set(names))} different ones) for scores of {values.shape[1]} classes: "
            "give each class a name of its own, in the order of the columns."
        )
    return values, truth.astype(bool), names


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
