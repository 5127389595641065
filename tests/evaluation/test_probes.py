"""Probes find classes that can be told apart, choose on what they may see, and repeat."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fusmae_hf.evaluation import probes as probes_module
from fusmae_hf.evaluation.features import Features
from fusmae_hf.evaluation.probes import knn_probe, linear_probe

NAMES = ("water", "forest", "town")
SINGLE, MULTI = "single_label_classification", "multi_label_classification"
TASKS = [SINGLE, MULTI]


def made_up(samples: int, task: str, seed: int, noise: float = 0.3, size: int = 6) -> Features:
    """Features in which each class has a direction of its own."""
    generator = np.random.default_rng(seed)
    if task == SINGLE:
        labels = np.eye(3, dtype=bool)[generator.integers(0, 3, samples)]
    else:
        labels = generator.random((samples, 3)) < 0.4
    directions = np.random.default_rng(99).normal(0, 1, (3, size))
    values = labels @ directions * 3 + 10 + generator.normal(0, noise, (samples, size))
    return Features(values.astype(np.float32), [f"{seed}-{n}" for n in range(samples)], labels, NAMES)


def headline(result) -> float:
    return result.metrics.get("accuracy", result.metrics.get("average_precision_micro"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("with_validation", [True, False])
def test_the_linear_probe_tells_separable_classes_apart(task, with_validation):
    train, validation, test = (made_up(60, task, seed) for seed in range(3))
    result = linear_probe(train, validation if with_validation else None, test, task)
    assert headline(result) > 0.97
    assert result.scores.shape == (60, 3)
    assert result.hyperparameters["selected_on"] == ("validation" if with_validation else "5-fold cross-validation")
    assert result.hyperparameters["converged"]
    assert result.untrained_classes == []


@pytest.mark.parametrize("task", TASKS)
def test_neighbours_tell_separable_classes_apart(task):
    train, test = made_up(80, task, 0), made_up(40, task, 1)
    train, test = (dataclasses.replace(part, values=part.values - 10) for part in (train, test))
    result = knn_probe(train, test, task, k=5)
    assert headline(result) > 0.95
    assert result.scores.min() >= 0
    assert result.scores.max() <= 1


@pytest.mark.parametrize("task", TASKS)
def test_probes_find_nothing_where_there_is_nothing(task):
    train, test = made_up(200, task, 0), made_up(400, task, 1)
    noise = np.random.default_rng(0).normal(size=(600, 6)).astype(np.float32)
    train, test = (
        dataclasses.replace(part, values=values) for part, values in ((train, noise[:200]), (test, noise[200:]))
    )
    for result in (linear_probe(train, None, test, task), knn_probe(train, test, task)):
        assert headline(result) < 0.52


@pytest.mark.parametrize("task", TASKS)
def test_probes_are_deterministic(task):
    train, test = made_up(40, task, 0, noise=2), made_up(30, task, 1, noise=2)
    for probe in (lambda: linear_probe(train, None, test, task), lambda: knn_probe(train, test, task)):
        first, second = probe(), probe()
        np.testing.assert_array_equal(first.scores, second.scores)
        assert first.metrics == second.metrics
        assert first.sweep == second.sweep


@pytest.mark.parametrize("task", TASKS)
def test_the_fit_is_that_of_scikit_learn_on_training_samples_standardised_by_their_own_statistics(task):
    train, validation, test = (made_up(50, task, seed, noise=2) for seed in range(3))
    result = linear_probe(train, validation, test, task, sweep=[0.01, 0.1])
    scaler = StandardScaler().fit(train.values)
    chosen, known, unknown = result.hyperparameters["C"], *map(scaler.transform, (train.values, test.values))
    targets = [train.labels.argmax(1)] if task == SINGLE else train.labels.T
    fits = [LogisticRegression(C=chosen, max_iter=1000).fit(known, of_class) for of_class in targets]
    expected = [fit.predict_proba(unknown) for fit in fits]
    expected = expected[0] if task == SINGLE else np.stack([of_class[:, 1] for of_class in expected], axis=1)
    np.testing.assert_allclose(result.scores, expected, atol=2e-3)


def test_the_test_samples_choose_nothing(monkeypatch):
    train, validation, test = (made_up(50, SINGLE, seed, noise=4) for seed in range(3))
    result = linear_probe(train, validation, test, SINGLE)
    shuffled = dataclasses.replace(test, labels=np.roll(test.labels, 7, axis=0))
    other = linear_probe(train, validation, shuffled, SINGLE)
    assert other.hyperparameters == result.hyperparameters
    np.testing.assert_array_equal(other.scores, result.scores)


def test_the_best_value_on_validation_is_chosen_and_the_edge_of_the_sweep_told(monkeypatch):
    train, validation, test = (made_up(30, SINGLE, seed) for seed in range(3))
    quality = {0.1: 0.2, 1.0: 0.9, 10.0: 0.9, 100.0: 0.3}
    monkeypatch.setattr(probes_module, "_held_out", lambda *fold: [quality[value] for value in fold[-1]])
    result = linear_probe(train, validation, test, SINGLE, sweep=[100.0, 10.0, 1.0, 0.1])
    assert result.hyperparameters["C"] == 1.0
    assert result.sweep == quality
    assert not result.at_edge_of_sweep
    assert linear_probe(train, validation, test, SINGLE, sweep=[1.0, 100.0]).at_edge_of_sweep


def test_one_value_is_not_chosen():
    train, test = made_up(30, MULTI, 0), made_up(30, MULTI, 1)
    result = linear_probe(train, None, test, MULTI, sweep=[0.5])
    assert result.hyperparameters["C"] == 0.5
    assert result.hyperparameters["selected_on"] is None
    assert not result.at_edge_of_sweep


@pytest.mark.parametrize("task", TASKS)
def test_a_class_without_training_samples_gets_no_score_and_is_named(task):
    train, test = made_up(60, task, 0), made_up(40, task, 1)
    rows = np.flatnonzero(~train.labels[:, 2])
    train = train.select([train.ids[row] for row in rows])
    for result in (linear_probe(train, None, test, task), knn_probe(train, test, task, k=3)):
        assert result.untrained_classes == ["town"]
        assert (result.scores[:, 2] == 0).all()


def test_few_training_samples_are_enough():
    train, test = made_up(30, SINGLE, 0), made_up(30, SINGLE, 1)
    one_of_each = [train.ids[row] for row in train.labels.argmax(axis=0)]
    assert headline(linear_probe(train.select(one_of_each), None, test, SINGLE)) > 0.6
    multi = made_up(30, MULTI, 0)
    few = multi.select([multi.ids[row] for row in multi.labels.argmax(axis=0)[:2]])
    linear_probe(few, None, made_up(30, MULTI, 1), MULTI)


def test_votes_of_neighbours_are_weighted_by_similarity():
    values = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    train = Features(values, ["a", "b", "c"], np.eye(3, dtype=bool), NAMES)
    test = Features(values[:1] * 5, ["d"], np.eye(3, dtype=bool)[:1], NAMES)
    result = knn_probe(train, test, SINGLE, k=2, temperature=0.5)
    weights = np.exp(np.array([1, 0.8]) / 0.5)
    np.testing.assert_allclose(result.scores, [[*weights / weights.sum(), 0]], rtol=1e-5)
    assert result.hyperparameters == {"k": 2, "temperature": 0.5}


def test_neighbours_are_the_same_in_chunks():
    train, test = made_up(50, MULTI, 0), made_up(23, MULTI, 1)
    whole, parts = (knn_probe(train, test, MULTI, chunk=chunk) for chunk in (1000, 7))
    np.testing.assert_allclose(whole.scores, parts.scores, atol=1e-5)


def test_metrics_are_by_class_name():
    train, test = made_up(40, MULTI, 0), made_up(40, MULTI, 1)
    metrics = linear_probe(train, None, test, MULTI).metrics
    assert list(metrics["average_precision_per_class"]) == list(metrics["f1_per_class"]) == list(NAMES)
    assert metrics["average_precision_classes_left_out"] == metrics["f1_classes_left_out"] == []


def without(features: Features, **changes) -> Features:
    return dataclasses.replace(features, **changes)


GOOD = made_up(20, SINGLE, 0)


@pytest.mark.parametrize(
    ("train", "test", "task", "message"),
    [
        (GOOD, GOOD, "regression", "task is 'regression'"),
        (without(GOOD, labels=None), GOOD, SINGLE, "train features are of 20 pairs, with labels: None"),
        (GOOD, without(GOOD, values=np.ones((20, 4), np.float32)), SINGLE, "test features have 4 numbers"),
        (GOOD, without(GOOD, class_names=("water", "town", "forest")), SINGLE, "differ in name or order"),
        (made_up(20, MULTI, 0), GOOD, SINGLE, "do not have exactly one class"),
        (GOOD.select(GOOD.ids[:0]), GOOD, SINGLE, "train features are of 0 pairs"),
    ],
)
@pytest.mark.parametrize("probe", [lambda train, *rest: linear_probe(train, None, *rest), knn_probe])
def test_features_that_do_not_fit_are_refused(probe, train, test, task, message):
    with pytest.raises(ValueError, match=message):
        probe(train, test, task)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="k is 21, but must be from 1 to 20"):
        knn_probe(GOOD, GOOD, SINGLE, k=21)
    with pytest.raises(ValueError, match="temperature is 0"):
        knn_probe(GOOD, GOOD, SINGLE, temperature=0)
    for sweep in ([], [0.0, 1.0]):
        with pytest.raises(ValueError, match="sweep is"):
            linear_probe(GOOD, None, GOOD, SINGLE, sweep=sweep)
    same = without(GOOD, labels=np.eye(3, dtype=bool)[np.zeros(20, int)])
    with pytest.raises(ValueError, match="All training samples have the same class"):
        linear_probe(same, None, GOOD, SINGLE)
    with pytest.raises(ValueError, match="One training sample"):
        linear_probe(made_up(1, MULTI, 0), None, made_up(5, MULTI, 1), MULTI)
