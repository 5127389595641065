"""Average precision, F1 and accuracy agree with their definitions and with scikit-learn, also at the edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
)

from fusmae_hf.evaluation.classification_scores import accuracy, average_precision, f1

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


def average_precision_by_definition(scores: np.ndarray, references: np.ndarray) -> float:
    """Sum over thresholds of precision times the step in recall."""
    total, recall_before = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        recall = references[chosen].sum() / references.sum()
        total += references[chosen].mean() * (recall - recall_before)
        recall_before = recall
    return total


@given(scenes())
def test_average_precision_is_that_of_its_definition(case):
    scores, references = case
    measured = average_precision(scores, references)
    assert measured["average_precision_micro"] == pytest.approx(
        average_precision_by_definition(scores.ravel(), references.ravel())
    )
    present = references.any(axis=0)
    of_classes = [average_precision_by_definition(scores[:, k], references[:, k]) for k in np.flatnonzero(present)]
    assert measured["average_precision_macro"] == pytest.approx(np.mean(of_classes))
    assert measured["num_classes_left_out"] == (~present).sum()


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


def test_all_positive_is_perfect_whatever_the_scores():
    measured = average_precision(np.random.default_rng(0).random((5, 3)), np.ones((5, 3)))
    assert measured["average_precision_micro"] == measured["average_precision_macro"] == 1.0


def test_all_negative_has_no_average_precision():
    measured = average_precision(np.full((5, 3), 0.4), np.zeros((5, 3)))
    assert measured["average_precision_micro"] is measured["average_precision_macro"] is None
    assert measured["num_classes_left_out"] == 3
    assert f1(np.full((5, 3), 0.4), np.zeros((5, 3)))["f1_micro"] is None


def test_one_sample_is_enough():
    measured = average_precision([[0.2, 0.7, 0.1]], [[0, 1, 0]])
    assert measured["average_precision_micro"] == 1.0
    assert accuracy([2], [2])["accuracy"] == 1.0


def test_a_score_at_the_threshold_is_no_prediction():
    assert f1([[0.5]], [[1]])["f1_micro"] == 0.0
    assert f1([[0.50001]], [[1]])["f1_micro"] == 1.0


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
