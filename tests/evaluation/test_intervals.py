"""Intervals hold what they say, are repeatable, and refuse what tells nothing."""

import numpy as np
import pytest
from scipy import stats

from fusmae_hf.evaluation.intervals import bootstrap_interval, mean_and_interval, paired_comparison
from fusmae_hf.evaluation.scores import average_precision


def micro(scores, references):
    return average_precision(scores, references)["average_precision_micro"]


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    references = generator.random((60, 3)) < 0.4
    return references + generator.normal(0, 1, references.shape), references


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_bootstrap_gives_the_score_of_all_samples_inside_its_interval(predictions, method):
    interval = bootstrap_interval(micro, *predictions, resamples=100, method=method)
    assert interval.estimate == micro(*predictions)
    assert interval.low < interval.estimate < interval.high
    assert interval.standard_error > 0
    assert "60 test samples" in interval.covers


def test_bootstrap_is_a_function_of_its_seed(predictions):
    first, same, other = (bootstrap_interval(micro, *predictions, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert (first.low, first.high) != (other.low, other.high)


def test_bootstrap_of_a_mean_is_about_the_interval_of_theory():
    values = np.random.default_rng(0).normal(3, 1, 400)
    interval = bootstrap_interval(np.mean, values, resamples=2000)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.02)
    assert interval.standard_error == pytest.approx(stats.sem(values), rel=0.1)


def test_bootstrap_draws_rows_of_all_arrays_together():
    rows = np.arange(30.0)
    interval = bootstrap_interval(lambda first, second: np.abs(first - second).max(), rows, rows, resamples=20)
    assert interval.high == 0.0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # in scipy, before it gives up
def test_a_score_that_never_varies_has_an_interval_without_width():
    interval = bootstrap_interval(lambda rows: 1.0, np.arange(5), resamples=20)
    assert (interval.low, interval.estimate, interval.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"no BCa interval for scores from 1.0 to 1.0"):
        bootstrap_interval(lambda rows: 1.0, np.arange(5), resamples=20, method="BCa")


def test_bootstrap_refuses_scores_that_some_draws_do_not_have():
    references = np.zeros((20, 1), dtype=int)
    references[0] = 1
    with pytest.raises(ValueError, match=r"The score is None for .* of 20 samples"):
        bootstrap_interval(micro, np.random.default_rng(0).random((20, 1)), references, resamples=100)


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (([1.0, 2.0], [1.0]), {}, r"not of \[1, 2\]"),
        (([1.0],), {}, "at least two"),
        (([1.0, 2.0],), {"confidence": 95}, "confidence is 95"),
    ],
)
def test_bootstrap_refuses_what_cannot_be_resampled(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(lambda *values: 0.0, *arrays, **options)


def test_interval_over_seeds_is_that_of_student():
    values = [0.70, 0.74, 0.72, 0.69]
    interval = mean_and_interval(values)
    assert interval.estimate == pytest.approx(np.mean(values))
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert "4 training runs" in interval.covers
    assert str(interval) == "0.7125 [0.6772, 0.7478]"


def test_equal_runs_have_an_interval_without_width():
    interval = mean_and_interval([0.1, 0.1, 0.1])
    assert interval.low == interval.high == interval.estimate


@pytest.mark.parametrize("values", [[0.7], [], [0.7, float("nan")]])
def test_one_run_tells_nothing_of_how_much_runs_differ(values):
    with pytest.raises(ValueError, match="at least two runs"):
        mean_and_interval(values)


def test_pairs_of_runs_show_a_difference_that_the_spread_over_seeds_hides():
    of_seed = np.array([0.5, 0.6, 0.7, 0.8])
    gain = np.array([0.010, 0.011, 0.009, 0.010])
    compared = paired_comparison(of_seed + gain, of_seed)
    assert compared.difference.estimate == pytest.approx(0.01)
    assert compared.difference.low > 0
    assert compared.p_value == pytest.approx(stats.ttest_rel(of_seed + gain, of_seed).pvalue)
    assert compared.differences == pytest.approx(gain)


def test_comparing_a_method_with_itself_finds_nothing():
    compared = paired_comparison([0.5, 0.6], [0.5, 0.6])
    assert compared.p_value == 1.0
    assert compared.difference.estimate == 0.0


def test_runs_of_different_seeds_cannot_be_paired():
    with pytest.raises(ValueError, match="3 and 2 scores cannot be paired"):
        paired_comparison([0.1, 0.2, 0.3], [0.1, 0.2])
