"""The metrics load from the package without a network, and give the same in batches as at once."""

import os
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from fusmae_hf.evaluation.metrics import METRICS, load_metric, metric_folder

GENERATOR = np.random.default_rng(0)
CASES = {
    "multilabel_average_precision": (GENERATOR.random((9, 3)), GENERATOR.integers(0, 2, (9, 3)), {}),
    "multilabel_f1": (GENERATOR.random((9, 3)), GENERATOR.integers(0, 2, (9, 3)), {"threshold": 0.3}),
    "classification_accuracy": (GENERATOR.integers(0, 3, 9), GENERATOR.integers(0, 3, 9), {}),
    "mean_iou": (GENERATOR.integers(0, 3, (9, 4, 4)), GENERATOR.integers(0, 3, (9, 4, 4)), {}),
    "regression_errors": (GENERATOR.integers(0, 8, 9) / 4, GENERATOR.integers(0, 8, 9) / 4, {}),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_the_same_in_batches_as_at_once(name):
    predictions, references, options = CASES[name]
    metric = load_metric(name)
    at_once = metric.compute(predictions=predictions, references=references, **options)
    for rows in (slice(0, 4), slice(4, 8)):
        metric.add_batch(predictions=predictions[rows], references=references[rows])
    metric.add(prediction=predictions[8], reference=references[8])
    in_batches = metric.compute(**options)
    assert in_batches == (pytest.approx(at_once) if name == "regression_errors" else at_once)
    assert metric.compute(predictions=predictions, references=references, **options) == at_once


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_takes_arrays_tensors_and_lists(name):
    predictions, references, options = CASES[name]
    metric = evaluate.load(str(metric_folder(name)), keep_in_memory=True)
    of_arrays = metric.compute(predictions=predictions, references=references, **options)
    for convert in (torch.from_numpy, np.ndarray.tolist):
        converted = {"predictions": convert(predictions), "references": convert(references)}
        assert metric.compute(**converted, **options) == of_arrays


@pytest.mark.parametrize("name", ["multilabel_average_precision", "multilabel_f1"])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_references_of_several_labels_may_be_of_any_type(name, dtype):
    scores, references, _ = CASES[name]
    metric = load_metric(name, keep_in_memory=True)
    expected = metric.compute(predictions=scores, references=references)
    assert metric.compute(predictions=scores, references=references.astype(dtype)) == expected


def test_results_are_by_class_name_where_names_are_given():
    names = ["water", "forest", "town"]
    for name, (predictions, references, _) in CASES.items():
        if name != "regression_errors":
            scores = load_metric(name).compute(predictions=predictions, references=references, class_names=names)
            (of_classes,) = (value for value in scores.values() if isinstance(value, dict))
            assert list(of_classes) == names


def test_errors_reach_the_user_of_a_metric():
    metric = load_metric("multilabel_average_precision", keep_in_memory=True)
    with pytest.raises(ValueError, match="NaN"):
        metric.compute(predictions=[[float("nan")]], references=[[1]])
    metric = load_metric("multilabel_f1", keep_in_memory=True)
    with pytest.raises(ValueError, match="do not fit"):
        metric.compute(predictions=np.zeros((2, 3)), references=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="no metric 'map'"):
        load_metric("map")


def test_maps_are_not_kept():
    metric = load_metric("mean_iou", num_classes=2, ignore_index=7)
    for _ in range(3):
        metric.add_batch(predictions=np.zeros((2, 8, 8), int), references=np.full((2, 8, 8), 7))
    metric.add_counts([[1, 1], [0, 2]])
    assert metric.counts.tolist() == [[1, 1], [0, 2]]
    scores = metric.compute()
    assert scores["num_pixels"] == 4
    assert scores["mean_iou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metric.counts.sum() == 0


def test_maps_grow_with_the_classes_seen_unless_their_number_is_given():
    metric = load_metric("mean_iou")
    metric.add_batch(predictions=[[0, 0]], references=[[0, 255]])
    metric.add_batch(predictions=[[4, 0]], references=[[1, 0]])
    assert metric.compute(class_names=list("abcdefg"))["classes_left_out"] == ["c", "d", "f", "g"]
    with pytest.raises(ValueError, match="2 classes are 0 to 1"):
        load_metric("mean_iou", num_classes=2).compute(predictions=[[4]], references=[[1]])
    with pytest.raises(ValueError, match=r"counts have shape \(3, 3\)"):
        load_metric("mean_iou", num_classes=2).add_counts(np.zeros((3, 3)))


@pytest.mark.parametrize("name", ["mean_iou", "regression_errors"])
def test_nothing_added_is_an_error(name):
    with pytest.raises(ValueError, match="Nothing was"):
        load_metric(name).compute()


def test_missing_references_are_refused_unless_they_are_to_be_ignored():
    values = {"predictions": [1.0, 2.0], "references": [1.5, float("nan")]}
    with pytest.raises(ValueError, match=r"1 references are NaN.*ignore_nan=True"):
        load_metric("regression_errors").compute(**values)
    assert load_metric("regression_errors", ignore_nan=True).compute(**values)["rmse"] == 0.5


def test_every_metric_loads_in_a_fresh_process_without_a_network(tmp_path):
    script = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "import evaluate\n"
        "from fusmae_hf.evaluation.metrics import METRICS, metric_folder\n"
        "for name in METRICS: print(evaluate.load(str(metric_folder(name))).name)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_MODULES_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(METRICS)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([float("nan")], [1.0], "predictions are NaN or infinite"),
        ([1.0], [float("inf")], "references are NaN or infinite"),
        ([1.0, 2.0], [1.0], "shape"),
    ],
)
def test_quantities_that_cannot_be_compared_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load_metric("regression_errors", ignore_nan=True).compute(predictions=predictions, references=references)
