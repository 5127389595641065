"""Probes: what simple classifiers make of frozen features, a linear one and one of nearest neighbours.

The linear probe is scikit-learn's `LogisticRegression` (L-BFGS, float32), the classifier that the field calls linear
probing, fitted to its optimum: no learning rate and no number of epochs can favour a method. Several labels a scene
are as many classifiers, one against the rest. It scales linearly with samples, size of the features, classes and
length of the sweep. Newton's method took over ten times as long for 20,000 made-up features of 768 numbers; ridge
regression, though faster still, gives no probabilities.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, StratifiedKFold
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise ImportError(
        "Probes need scikit-learn, which is not installed. Install it "
        'with `pip install -e ".[train]"` in a clone of the repository.'
    ) from error

from fusmae_hf.evaluation.features import Features, class_indices
from fusmae_hf.evaluation.scores import accuracy, average_precision, f1

Task = Literal["single_label_classification", "multi_label_classification"]

SWEEP = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths of regularisation, `C` of scikit-learn, that are tried unless others are given."""

SELECTED_BY = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "average_precision_micro",
}
"""The metric by which regularisation is chosen, by task."""

MOST_FOLDS = 5
MOST_ITERATIONS = 2000


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe gives.

    Attributes:
        scores: `(test samples, classes)` float32 in [0, 1]: probabilities, or shares of the neighbours' votes.
        metrics: of the test samples, by `fusmae_hf.evaluation.scores`.
        hyperparameters: what was chosen or given; of the linear probe also by which metric, on what, and whether the
            final fit converged.
        sweep: the selection metric for each value that was tried; empty for neighbours.
        at_edge_of_sweep: whether the best value is the first or the last of several: then try further ones.
        untrained_classes: names of classes of which no training sample, or every one, is positive: their scores say
            nothing.
    """

    scores: np.ndarray
    metrics: dict[str, Any]
    hyperparameters: dict[str, Any]
    sweep: dict[float, float]
    at_edge_of_sweep: bool
    untrained_classes: list[str]


def linear_probe(
    train: Features,
    validation: Features | None,
    test: Features,
    task: Task,
    sweep: Sequence[float] = SWEEP,
    seed: int = 0,
) -> ProbeResult:
    """Fit a linear classifier on frozen features.

    Features are standardised by the mean and deviation of the training samples alone. The regularisation is chosen on
    the validation samples, which no classifier is fitted on, or by cross-validation on the training samples where
    there are none; the classifier is then fitted on all training samples.

    Args:
        train: with labels.
        validation: with labels, or None.
        test: with labels.
        task: kind of the labels.
        sweep: values of `C` to try, positive: the smaller, the stronger the regularisation.
        seed: non-negative integer, of the folds.

    Raises:
        ValueError: an unknown task, features or classes that do not fit together, no labels, labels that are not of
            the task, an empty or negative sweep, or only one class to train on.
    """
    _check(task, train, validation, test)
    values = sorted(set(sweep))
    if not values or values[0] <= 0:
        raise ValueError(f"sweep is {list(sweep)}, but must hold at least one value, all positive.")
    targets = _targets(train, task)
    if task == "single_label_classification" and len(np.unique(targets)) < 2:
        raise ValueError("All training samples have the same class: there is nothing to learn. Draw more of them.")
    chosen, tried = values[0], dict[float, float]()
    if len(values) > 1:
        folds = [(train, validation)] if validation else _folds(train, task, seed)
        of_folds = [_held_out(*fold, task, values) for fold in folds]
        tried = dict(zip(values, np.mean(of_folds, axis=0).tolist(), strict=True))
        chosen = max(tried, key=lambda value: tried[value])  # the stronger regularisation of equals
    scores, converged = _fit_and_score(*_standardised(train, test), targets, len(train.class_names), chosen)
    return ProbeResult(
        scores,
        _metrics(scores, test, task),
        {
            "C": chosen,
            "converged": converged,
            "selected_by": SELECTED_BY[task],
            "selected_on": ("validation" if validation else f"{len(folds)}-fold cross-validation") if tried else None,
        },
        tried,
        bool(tried) and chosen in (values[0], values[-1]),
        _untrained(train, task),
    )


def knn_probe(
    train: Features,
    test: Features,
    task: Task,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
    device: str | torch.device = "cpu",
) -> ProbeResult:
    """Classify by the nearest neighbours in cosine similarity, each weighted by `exp(similarity / temperature)`.

    Args:
        train: with labels.
        test: with labels.
        task: kind of the labels.
        k: number of neighbours.
        temperature: positive; the smaller, the more the nearest counts.
        chunk: test samples at a time; `chunk` times the training samples are the similarities in memory.
        device: where similarities are computed.

    Raises:
        ValueError: an unknown task, features or classes that do not fit together, no labels, labels that are not of
            the task, more neighbours than training samples, or a temperature that is not positive.

    Source: Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, with the
    values of Caron et al. (DINO, ICCV 2021). For several labels a sample each class is voted on for itself.
    """
    _check(task, train, None, test)
    if not 1 <= k <= len(train):
        raise ValueError(f"k is {k}, but must be from 1 to {len(train)}, the number of training samples.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be positive.")
    known = functional.normalize(torch.as_tensor(train.values, device=device), dim=1)
    labels = torch.as_tensor(np.asarray(train.labels, dtype=np.float32), device=device)
    scores = []
    for start in range(0, len(test), chunk):
        queries = torch.as_tensor(test.values[start : start + chunk], device=device)
        similarity, neighbours = (functional.normalize(queries, dim=1) @ known.T).topk(k, dim=1)
        weights = (similarity / temperature).softmax(dim=1)  # of the neighbours alone, so that votes add up to 1
        scores.append(torch.einsum("nk,nkc->nc", weights, labels[neighbours]).clamp(max=1).cpu().numpy())
    of_test = np.concatenate(scores)
    hyperparameters = {"k": k, "temperature": temperature}
    return ProbeResult(of_test, _metrics(of_test, test, task), hyperparameters, {}, False, _untrained(train, task))


def _check(task: str, train: Features, validation: Features | None, test: Features) -> None:
    """Raise a ValueError unless the features are of one kind and their labels of the task."""
    if task not in SELECTED_BY:
        raise ValueError(f"task is {task!r}, but must be one of {list(SELECTED_BY)}.")
    for name, features in (("train", train), ("validation", validation), ("test", test)):
        if features is None:
            continue
        if not len(features) or features.labels is None:
            raise ValueError(f"The {name} features are of {len(features)} pairs, with labels: {features.labels!r}.")
        if features.values.shape[1] != train.values.shape[1] or features.class_names != train.class_names:
            raise ValueError(
                f"The {name} features have {features.values.shape[1]} numbers and {len(features.class_names)} "
                f"classes, those of train {train.values.shape[1]} and {len(train.class_names)}, or the classes differ "
                "in name or order: extract them with the same model from the same dataset."
            )
        _targets(features, task)


def _targets(features: Features, task: str) -> np.ndarray:
    """Class indices `(samples,)`, or 0 and 1 `(samples, classes)`."""
    labels = np.asarray(features.labels)
    return class_indices(labels) if task == "single_label_classification" else labels.astype(int)


def _untrained(train: Features, task: str) -> list[str]:
    """Names of the classes that no training sample tells from others."""
    held = np.asarray(train.labels)
    counts = held.sum(axis=0).tolist()
    useless = (0, len(held)) if task == "multi_label_classification" else (0,)
    return [name for name, count in zip(train.class_names, counts, strict=True) if count in useless]


def _folds(train: Features, task: str, seed: int) -> list[tuple[Features, Features]]:
    """Parts to fit on and to hold out."""
    targets = _targets(train, task)
    number = min(MOST_FOLDS, len(train))
    if number < 2:
        raise ValueError(
            "One training sample cannot be split to choose the regularisation: give a sweep of one value."
        )
    splitter: KFold | StratifiedKFold = KFold(number, shuffle=True, random_state=seed)
    if task == "single_label_classification" and np.bincount(targets).max() >= number:
        splitter = StratifiedKFold(number, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # such a class is not in every fold
        return [(train.take(fit), train.take(held)) for fit, held in splitter.split(train.values, targets)]


def _held_out(train: Features, held_out: Features, task: str, values: Sequence[float]) -> list[float]:
    """The selection metric for each value; 0 where the held-out part has nothing to measure it by."""
    known, unknown = _standardised(train, held_out)
    targets, num_classes = _targets(train, task), len(train.class_names)
    measured = []
    for value in values:
        scores, _ = _fit_and_score(known, unknown, targets, num_classes, value)
        measured.append(_metrics(scores, held_out, task)[SELECTED_BY[task]] or 0.0)
    return measured


def _standardised(train: Features, test: Features) -> tuple[np.ndarray, np.ndarray]:
    """Both in standard deviations of the training samples, float32."""
    scaler = StandardScaler().fit(train.values)
    return scaler.transform(train.values).astype(np.float32), scaler.transform(test.values).astype(np.float32)


def _fit_and_score(
    known: np.ndarray, unknown: np.ndarray, targets: np.ndarray, num_classes: int, value: float
) -> tuple[np.ndarray, bool]:
    """Probabilities `(unknown samples, classes)` float32, and whether every fit reached its optimum."""
    scores = np.zeros((len(unknown), num_classes), dtype=np.float32)
    if targets.ndim == 1:
        return scores, _fit_columns(known, targets, unknown, scores, value)
    converged = True
    for number, column in enumerate(targets.T):
        without_and_with = np.zeros((len(unknown), 2), dtype=np.float32)
        converged &= _fit_columns(known, column, unknown, without_and_with, value)
        scores[:, number] = without_and_with[:, 1]
    return scores, converged


def _fit_columns(
    known: np.ndarray, classes: np.ndarray, unknown: np.ndarray, scores: np.ndarray, value: float
) -> bool:
    """Fill the columns of the classes that occur with their probabilities; whether the fit reached its optimum."""
    present = np.unique(classes)
    if len(present) == 1:
        scores[:, present] = 1.0
        return True
    model = LogisticRegression(C=value, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says so
        scores[:, present] = model.fit(known, classes).predict_proba(unknown)
    return bool(max(model.n_iter_) < MOST_ITERATIONS)


def _metrics(scores: np.ndarray, features: Features, task: str) -> dict[str, Any]:
    """The metrics of the task."""
    targets, names = _targets(features, task), features.class_names
    if task == "single_label_classification":
        return accuracy(scores.argmax(axis=1), targets, names)
    results: dict[str, Any] = {}
    for measure, of_metric in (
        ("average_precision", average_precision(scores, targets, names)),
        ("f1", f1(scores, targets, class_names=names)),
    ):
        # Both name classes that they leave out, and for different reasons.
        results |= {key if measure in key else f"{measure}_{key}": value for key, value in of_metric.items()}
    return results
