"""Scores of scenes and maps agree with their definitions and with scikit-learn, also at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from fusmae_hf.evaluation.scores import (
    accuracy,
    average_precision,
    confusion_counts,
    error_sums,
    errors_of_sums,
    f1,
    intersection_over_union,
)

pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn, of small cases


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores, many of them tied, and references with at least one positive."""
    samples, classes = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = generator.integers(0, draw(st.integers(1, 50)), (samples, classes)) / 50
    references = generator.random((samples, classes)) < draw(st.sampled_from([0.05, 0.3, 0.9]))
    references[generator.integers(samples), generator.integers(classes)] = True
    return scores, references.astype(int)


@given(scenes())
def test_average_precision_agrees_with_scikit_learn(case):
    scores, references = case
    measured = average_precision(scores, references)
    present = references.any(axis=0)
    for mean, classes in (("micro", slice(None)), ("macro", present)):
        expected = average_precision_score(references[:, classes], scores[:, classes], average=mean)
        assert measured[f"average_precision_{mean}"] == pytest.approx(expected)


@given(scenes(), st.sampled_from([0.0, 0.3, 0.5, 2.0]))
def test_f1_agrees_with_scikit_learn(case, threshold):
    scores, references = case
    measured, predicted = f1(scores, references, threshold), scores > threshold
    expected = [
        f1_score(truth, guess, zero_division=np.nan) for truth, guess in zip(references.T, predicted.T, strict=True)
    ]
    assert measured["f1_macro"] == pytest.approx(np.nanmean(expected))
    assert measured["f1_micro"] == pytest.approx(f1_score(references.ravel(), predicted.ravel()))
    assert measured["num_classes_left_out"] == (~(predicted | (references > 0)).any(axis=0)).sum()


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_accuracy_agrees_with_scikit_learn(samples, classes, seed):
    generator = np.random.default_rng(seed)
    references = generator.integers(0, classes, samples)
    # No class that is only predicted: scikit-learn warns of it.
    predictions = generator.choice(references, samples)
    measured = accuracy(predictions, references)
    assert measured["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    assert measured["accuracy_mean_per_class"] == pytest.approx(balanced_accuracy_score(references, predictions))


def test_micro_and_macro_are_not_the_same():
    scores = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.9]]
    references = [[1, 1], [1, 0], [1, 0]]
    measured = average_precision(scores, references)
    assert measured["average_precision_macro"] == pytest.approx((1 + 1 / 3) / 2)
    # Ranked 0.9 0.9 (one right) 0.8 0.7 (right) 0.2 0.1 (right): 1/2 + 2/3 + 3/4 + 4/6, each a quarter of the recall.
    assert measured["average_precision_micro"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4 + 4 / 6) / 4)


def test_a_class_absent_from_the_references_is_left_out_of_the_mean_and_named():
    scores, references = [[0.9, 0.8], [0.1, 0.7]], [[1, 0], [0, 0]]
    measured = average_precision(scores, references, ["water", "forest"])
    assert measured["average_precision_per_class"] == {"water": 1.0, "forest": None}
    assert measured["average_precision_macro"] == 1.0
    assert measured["classes_left_out"] == ["forest"]
    assert measured["num_classes_left_out"] == 1
    # Predicted but absent: F1 is 0 there, not unknown.
    assert f1(scores, references, class_names=["water", "forest"])["f1_per_class"] == {"water": 1.0, "forest": 0.0}


def test_all_negative_has_no_average_precision():
    measured = average_precision(np.full((5, 3), 0.4), np.zeros((5, 3)))
    assert measured["average_precision_micro"] is measured["average_precision_macro"] is None
    assert measured["num_classes_left_out"] == 3
    assert f1(np.full((5, 3), 0.4), np.zeros((5, 3)))["f1_micro"] is None


def test_a_score_at_the_threshold_is_no_prediction():
    assert f1([[0.5]], [[1]])["f1_micro"] == 0.0
    assert f1([[0.50001]], [[1]])["f1_micro"] == 1.0


def test_weights_say_how_often_a_sample_counts():
    generator = np.random.default_rng(0)
    scores, references, weights = (
        generator.random((9, 3)),
        generator.integers(0, 2, (9, 3)),
        generator.integers(0, 4, 9),
    )
    repeated = (np.repeat(values, weights, axis=0) for values in (scores, references))
    assert f1(scores, references, sample_weight=weights) == f1(*repeated)


def test_ignored_samples_do_not_count():
    measured = accuracy([0, 1, 1], [0, -100, 0], ["water", "forest"])
    assert measured["accuracy"] == 0.5
    assert measured["num_samples"] == 2
    assert measured["classes_left_out"] == ["forest"]
    nothing = accuracy([0, 1], [-100, -100], ["water", "forest"])
    assert nothing["accuracy"] is None
    assert nothing["num_samples"] == 0


@pytest.mark.parametrize("measure", [average_precision, f1])
@pytest.mark.parametrize(
    ("scores", "references", "message"),
    [
        ([[0.1, float("nan")]], [[1, 0]], "1 of 1 samples have scores that are NaN or infinite, the first at row 0"),
        ([[0.1, float("inf")]], [[1, 0]], "NaN or infinite"),
        ([[0.1, 0.2]], [[1, 0, 0]], r"\(1, 2\).*\(1, 3\) do not fit"),
        ([[0.1, 0.2]], [[1, 0], [1, 0]], "do not fit"),
        ([0.1, 0.2], [1, 0], r"scores must be numbers \(samples, classes\)"),
        ([[0.1, 0.2], [0.3]], [[1, 0], [1]], "rows of different lengths"),
        (np.empty((0, 3)), np.empty((0, 3)), "at least one"),
        ([[0.1, 0.2]], [[1, 2]], r"references hold \[2\]"),
        ([[0.1, 0.2]], [[0.5, 0]], r"references hold \[0.5\]"),
    ],
)
def test_what_cannot_be_scored_is_refused(measure, scores, references, message):
    with pytest.raises(ValueError, match=message):
        measure(scores, references)


def test_class_names_must_be_one_for_each_class():
    with pytest.raises(ValueError, match="2 class names"):
        average_precision([[0.1]], [[1]], class_names=["water", "forest"])
    with pytest.raises(ValueError, match="1 different"):
        f1([[0.1, 0.2]], [[1, 0]], class_names=["water", "water"])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0], "do not fit"),
        ([], [], "at least one"),
        ([0, 3], [0, 1], r"predictions hold \[3\]"),
        ([0, 1], [0, -1], r"references hold \[-1\]"),
        ([[0.1, 0.9]], [1], "argmax"),
        ([0.0, 1.0], [0, 1], "argmax"),
    ],
)
def test_what_is_no_class_index_is_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        accuracy(predictions, references, class_names=["water", "forest"])


# --- maps and quantities --------------------------------------------------------------------------------------------

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
    errors = errors_of_sums([error_sums(*batch) for batch in zip(predictions, references, strict=True)])
    truth, guess = references.ravel(), predictions.ravel()
    assert errors["rmse"] == pytest.approx(root_mean_squared_error(truth, guess))
    assert errors["mae"] == pytest.approx(mean_absolute_error(truth, guess))
    assert errors["r2"] == pytest.approx(r2_score(truth, guess), rel=1e-6)
    assert errors["bias"] == pytest.approx((guess - truth).mean(), rel=1e-6, abs=1e-8)
    assert errors["num_values"] == truth.size


def test_references_that_are_nan_do_not_count_whatever_was_predicted_there():
    sums = error_sums(np.array([1.0, np.nan, 5.0]), np.array([2.0, np.nan, np.nan]))
    assert errors_of_sums(sums) == {"rmse": 1.0, "mae": 1.0, "r2": None, "bias": -1.0, "num_values": 1}


def test_nothing_has_no_errors():
    nothing = error_sums(np.zeros(2), np.full(2, np.nan))
    assert set(errors_of_sums(nothing).values()) == set(errors_of_sums([]).values()) == {None, 0}
