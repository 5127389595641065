"""Mean and spread of values that are taken in bit by bit, without losing digits."""

import math
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Number, mean, sum of squared deviations from the mean, and range of some values.

    Batches are merged by the formula of Chan, Golub and LeVeque (1979). Unlike sums of squares this loses no digits
    where the mean is large against the spread, and how the values are cut into batches does not matter.
    """

    number: int = 0
    mean: float = math.nan
    deviations: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None = None) -> "Moments":
        """Moments of float64 values `(number,)`, each counted once or as often as the integer `weights` say."""
        if not values.size:
            return cls()
        if weights is None:
            number, mean = values.size, float(values.mean())
            distances = values - mean
            deviations = float(distances @ distances)
        else:
            number = int(weights.sum())
            mean = math.fsum(values * weights) / number
            deviations = math.fsum((values - mean) ** 2 * weights)
        return cls(number, mean, deviations, float(values.min()), float(values.max()))

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the values of both."""
        if not self.number or not other.number:
            return self if self.number else other
        number, distance = self.number + other.number, other.mean - self.mean
        return Moments(
            number,
            self.mean + distance * other.number / number,
            self.deviations + other.deviations + distance**2 * self.number * other.number / number,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    @property
    def std(self) -> float:
        """Standard deviation of all these values (not an estimate for others); NaN where there are none."""
        return math.sqrt(self.deviations / self.number) if self.number else math.nan

    def scaled(self, factor: float, offset: float) -> "Moments":
        """Moments of `factor * value - offset`, for a positive factor."""
        ends = (factor * end - offset for end in (self.minimum, self.maximum))
        return Moments(self.number, self.mean * factor - offset, self.deviations * factor**2, *ends)

    def repeated(self, times: int) -> "Moments":
        """Moments where each value occurs so many times."""
        return self._replace(number=self.number * times, deviations=self.deviations * times)
