"""How sure a score is: over the samples of a test set, over training seeds, and between two methods.

The intervals answer different questions and are not exchangeable. One over samples says what another test set of the
same kind would give the same trained model. One over seeds says what training again would give on the same test set.
Neither tells of places, seasons or sensors that the data does not hold.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

try:
    from scipy import stats
except ImportError as error:
    raise ImportError(
        "Intervals need scipy, which is not installed. Install it "
        'with `pip install -e ".[train]"` in a clone of the repository.'
    ) from error


@dataclass(frozen=True)
class Interval:
    """A score and an interval for it.

    Attributes:
        estimate: of the whole sample: the score, the mean, or the mean difference.
        low: lower end.
        high: upper end.
        standard_error: standard deviation of the estimate.
        confidence: share of such intervals that hold the true value, if the assumptions hold.
        covers: what varies, and so what the interval is of, in words.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    confidence: float
    covers: str

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class PairedComparison:
    """What one method gains over another, seed by seed.

    Attributes:
        difference: mean of first minus second, with its interval.
        p_value: of the two-sided paired t test that there is no difference.
        differences: of each seed.
    """

    difference: Interval
    p_value: float
    differences: tuple[float, ...]


def bootstrap_interval(
    score: Callable[..., float | None],
    *arrays: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 1000,
    method: Literal["percentile", "BCa"] = "percentile",
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a score over samples: for one trained model, the test set drawn again and again.

    It covers the sampling of the test set, for samples that are independent: neighbouring patches are not, so on
    tiled scenes it is too narrow. It does not cover training.

    Args:
        score: takes the arrays, rows drawn with replacement, and gives a number: micro average precision is
            `lambda s, r: average_precision(s, r)["average_precision_micro"]`. It is called once a resample.
        arrays: one row a sample each, `(samples, ...)`: of scores and references, say.
        confidence: share, in (0, 1).
        resamples: number of resamples.
        method: `"percentile"`, or `"BCa"`, which corrects for bias and skewness and calls `score` once more for each
            sample: for small test sets.
        seed: non-negative integer.

    Raises:
        ValueError: fewer than two samples, arrays of different lengths, a confidence out of range, or a score that is
            not a number for all samples or for a resample (a rare class that some do not have), or never varies
            (BCa only).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), by `scipy.stats.bootstrap`.
    """
    values = [np.asarray(array) for array in arrays]
    lengths = sorted({len(array) for array in values})
    if len(lengths) != 1:
        raise ValueError(f"Give arrays of the same number of samples, at least two, not of {lengths}.")

    def of_rows(rows: np.ndarray) -> dict[str, float | None]:
        return {"score": score(*(array[rows] for array in values))}

    intervals = bootstrap_intervals(
        of_rows, lengths[0], confidence=confidence, resamples=resamples, method=method, seed=seed
    )
    return intervals["score"]


def bootstrap_intervals(
    scores: Callable[[np.ndarray], Mapping[str, float | None]],
    num_samples: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    method: Literal["percentile", "BCa"] = "percentile",
    seed: int = 0,
) -> dict[str, Interval]:
    """As [`bootstrap_interval`], of several scores at once, from the same draws.

    Args:
        scores: gives them by name for the rows drawn, `(num_samples,)` int64.
        num_samples: number of rows.
        confidence, resamples, method, seed: see there.

    Raises:
        ValueError: see there.
    """
    _check_confidence(confidence)
    if num_samples < 2:
        raise ValueError(f"Give arrays of the same number of samples, at least two, not of [{num_samples}].")
    everything = np.arange(num_samples)

    def of_rows(rows: np.ndarray) -> np.ndarray:
        found = scores(rows.astype(np.int64))
        for name, value in found.items():
            if value is None or not np.isfinite(value):
                raise ValueError(
                    f"The {name} is {value} for {len(np.unique(rows))} of {num_samples} samples, drawn with "
                    "replacement, but must be a number for each draw. Take a score that is defined where a rare class "
                    "is missing, such as a micro average."
                )
        return np.array(list(found.values()))

    estimates = dict(zip(scores(everything), of_rows(everything).tolist(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # that is an error below
        drawn = stats.bootstrap(
            (everything,),
            of_rows,
            n_resamples=resamples,
            batch=1,  # indices of one resample at a time
            vectorized=False,
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        )
    intervals = {}
    for number, (name, estimate) in enumerate(estimates.items()):
        low, high = (float(ends[number]) for ends in drawn.confidence_interval)
        if not np.isfinite([low, high]).all():
            of_resamples = drawn.bootstrap_distribution[number]
            raise ValueError(
                f"There is no {method} interval for scores from {of_resamples.min()} to {of_resamples.max()} of "
                f"{resamples} resamples: take method='percentile'."
            )
        covers = f"sampling of the {num_samples} test samples, for one trained model; not training again"
        intervals[name] = Interval(estimate, low, high, float(drawn.standard_error[number]), confidence, covers)
    return intervals


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean over training seeds, with Student's t interval.

    It covers what differs between the runs (initial weights, order, and the label fraction where that was drawn with
    the seed too) on one test set, for scores that are about normal. It does not cover the sampling of the test set.

    Args:
        values: the score of each run, at least two.
        confidence: share, in (0, 1).

    Raises:
        ValueError: fewer than two values, one that is not finite, or a confidence out of range.
    """
    scores = _finite_scores("values", values)
    return _t_interval(scores, confidence, f"{len(scores)} training runs on one test set; not its sampling")


def paired_comparison(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> PairedComparison:
    """Whether one method beats another, over runs with the same seeds (and so the same label fractions).

    Paired, because what a seed does to both cancels. The interval covers what differs between the runs, on one test
    set. With few seeds it is wide, and an interval that holds 0 does not show that the methods are equal.

    Args:
        first: the score of each seed, at least two seeds.
        second: the scores of the other method, in the same order of seeds.
        confidence: share, in (0, 1).

    Raises:
        ValueError: the lists differ in length or have fewer than two scores, one of which is not finite, or a
            confidence out of range.
    """
    one, other = _finite_scores("first", first), _finite_scores("second", second)
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} scores cannot be paired: give one of each seed to both.")
    differences = one - other
    interval = _t_interval(differences, confidence, f"{len(one)} pairs of training runs on one test set")
    if interval.standard_error:
        p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    else:
        p_value = 0.0 if interval.estimate else 1.0
    return PairedComparison(interval, p_value, tuple(differences.tolist()))


def _t_interval(scores: np.ndarray, confidence: float, covers: str) -> Interval:
    _check_confidence(confidence)
    mean, error = float(scores.mean()), float(stats.sem(scores)) if np.ptp(scores) else 0.0
    half = float(stats.t.ppf((1 + confidence) / 2, len(scores) - 1)) * error
    return Interval(mean, mean - half, mean + half, error, confidence, covers)


def _finite_scores(name: str, values: Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) < 2 or not np.isfinite(scores).all():
        raise ValueError(
            f"{name} are {scores.tolist()}, but must be the scores of at least two runs: one run tells nothing of how "
            "much runs differ."
        )
    return scores


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must be a share between 0 and 1, such as 0.95.")
