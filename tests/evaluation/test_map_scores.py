"""Scores of maps from sums agree with scikit-learn on all pixels at once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    confusion_matrix,
    jaccard_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from fusmae_hf.evaluation.map_scores import RegressionSums, confusion_counts, intersection_over_union

pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn, of small cases

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_counts_of_batches_add_up_to_those_of_scikit_learn(seed, num_classes, num_batches):
    generator = np.random.default_rng(seed)
    maps = generator.integers(0, num_classes, (2, num_batches, 2, 5, 4))
    maps[1][generator.random(maps[1].shape) < 0.2] = 255
    counts = sum(
        confusion_counts(torch.from_numpy(predicted), torch.from_numpy(truth), num_classes, 255)
        for predicted, truth in zip(*maps, strict=True)
    )
    kept = maps[1] != 255
    expected = np.zeros_like(counts)
    if kept.any():
        expected = confusion_matrix(maps[1][kept], maps[0][kept], labels=range(num_classes))
    assert counts.tolist() == expected.tolist()


@given(seeds, st.integers(1, 5))
def test_intersection_over_union_agrees_with_scikit_learn(seed, num_classes):
    predictions, references = np.random.default_rng(seed).integers(0, num_classes, (2, 12))
    scores = intersection_over_union(confusion_matrix(references, predictions, labels=range(num_classes + 1)))
    seen = np.unique([predictions, references])
    expected = jaccard_score(references, predictions, average=None, labels=seen)
    assert [scores["iou_per_class"][str(number)] for number in seen] == pytest.approx(expected)
    assert scores["mean_iou"] == pytest.approx(expected.mean())
    assert scores["pixel_accuracy"] == pytest.approx((predictions == references).mean())
    assert scores["num_classes_left_out"] == num_classes + 1 - len(seen)


def test_a_class_that_is_only_predicted_counts_as_zero():
    scores = intersection_over_union([[3, 1, 0], [0, 0, 0], [0, 0, 0]], ["water", "forest", "town"])
    assert scores["iou_per_class"] == {"water": 0.75, "forest": 0.0, "town": None}
    assert scores["mean_iou"] == 0.375
    assert scores["classes_left_out"] == ["town"]


def test_maps_without_any_label_have_no_score():
    everywhere = torch.full((2, 4, 4), 255)
    counts = confusion_counts(torch.zeros_like(everywhere), everywhere, 3, ignore_index=255)
    scores = intersection_over_union(counts)
    assert scores["mean_iou"] is None
    assert scores["pixel_accuracy"] is None
    assert scores["num_pixels"] == 0
    assert scores["num_classes_left_out"] == 3


def test_a_prediction_out_of_range_matters_only_where_a_pixel_counts():
    references = torch.tensor([[0, 255]])
    assert confusion_counts(torch.tensor([[0, 9]]), references, 2, 255).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(ValueError, match="predictions hold classes from 9 to 9, but 2 classes are 0 to 1"):
        confusion_counts(torch.tensor([[9, 0]]), references, 2, 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int64])
def test_label_maps_of_every_integer_type_are_counted(dtype):
    references = torch.tensor([[0, 1], [1, 255]]).to(dtype)
    assert confusion_counts(torch.tensor([[0, 1], [0, 0]]), references, 2, 255).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), "size of the label maps"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), "argmax"),
        (torch.zeros(2, dtype=torch.long), torch.tensor([0, 7]), "references hold classes from 0 to 7"),
        (torch.zeros(2, dtype=torch.long), torch.tensor([0, -1]), "references hold classes from -1 to 0"),
    ],
)
def test_maps_that_cannot_be_counted_are_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        confusion_counts(predictions, references, 3, 255)


@given(seeds, st.integers(1, 4), st.sampled_from([0.0, 1e6]))
def test_errors_of_batches_agree_with_scikit_learn_on_everything(seed, num_batches, offset):
    generator = np.random.default_rng(seed)
    references = generator.normal(offset, 3, (num_batches, 6))
    predictions = references + generator.normal(1, 2, references.shape)
    sums = RegressionSums()
    for batch in zip(predictions, references, strict=True):
        sums.add(*batch)
    errors = sums.errors()
    truth, guess = references.ravel(), predictions.ravel()
    assert errors["rmse"] == pytest.approx(root_mean_squared_error(truth, guess))
    assert errors["mae"] == pytest.approx(mean_absolute_error(truth, guess))
    assert errors["r2"] == pytest.approx(r2_score(truth, guess), rel=1e-6)
    assert errors["bias"] == pytest.approx((guess - truth).mean(), rel=1e-6, abs=1e-8)
    assert errors["num_values"] == truth.size


def test_references_that_are_nan_do_not_count_whatever_was_predicted_there():
    sums = RegressionSums()
    sums.add([1.0, float("nan"), 5.0], [2.0, float("nan"), float("nan")])
    assert sums.errors() == {"rmse": 1.0, "mae": 1.0, "r2": None, "bias": -1.0, "num_values": 1}
    assert sums.num_missing == 2


def test_nothing_has_no_errors():
    assert set(RegressionSums().errors().values()) == {None, 0}


def test_quantities_that_cannot_be_compared_are_refused():
    sums = RegressionSums()
    with pytest.raises(ValueError, match="predictions are NaN or infinite"):
        sums.add([float("nan")], [1.0])
    with pytest.raises(ValueError, match="references are NaN or infinite"):
        sums.add([1.0], [float("inf")])
    with pytest.raises(ValueError, match="shape"):
        sums.add([1.0, 2.0], [1.0])
