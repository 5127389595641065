"""Metrics as modules of `evaluate`, which load from this folder without a network.

Each is a folder that `evaluate.load(<folder>)` takes as well. The arithmetic is in `fusmae_hf.evaluation.scores`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import datasets
import evaluate

METRICS = (
    "classification_accuracy",
    "mean_iou",
    "multilabel_average_precision",
    "multilabel_f1",
    "regression_errors",
)
"""Names for [`load_metric`]."""


def metric_folder(name: str) -> Path:
    """Folder of a metric.

    Raises:
        ValueError: there is none of that name; those that exist are listed.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}. There are {', '.join(METRICS)}.")
    return Path(__file__).parent / name


def load_metric(name: str, **options: Any) -> evaluate.EvaluationModule:
    """Load a metric of this package.

    Args:
        name: one of [`METRICS`].
        options: as for `evaluate.load`, such as `experiment_id`, or `keep_in_memory=True` to write no files.

    Raises:
        ValueError: there is no metric of that name.
        ImportError: scikit-learn is missing.
    """
    folder = metric_folder(name)
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError('Metrics need scikit-learn: `pip install -e ".[train]"` in a clone of the repository')
    return evaluate.load(str(folder), **options)


def metric_info(description: str, inputs: str, values: Any) -> evaluate.MetricInfo:
    """What a metric is and takes: predictions and references, both of the type `values` for each sample."""
    features = datasets.Features({"predictions": values, "references": values})
    return evaluate.MetricInfo(description=description, citation="", inputs_description=inputs, features=features)
