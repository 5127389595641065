"""Mean and spread of values that are taken in bit by bit, without losing digits."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.modeling.no_data_fusmae import has_data
from fusmae_hf.modeling.sensors_fusmae import REFLECTANCE_SCALE
from fusmae_hf.vocabulary import SENSORS

if TYPE_CHECKING:
    from fusmae_hf.data.pairs import Pair, PairsInfo

_EXACT = 2**21
"""So many squares of 16 bits add up in float64 without rounding."""


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


class BandSums:
    """Takes in pairs one by one and sums up each band over its pixels with data, in the scale of the image processor.

    Integers of up to 16 bits are summed exactly, all else in float64. A pixel of a coarser band counts as often as it
    covers pixels of the grid.
    """

    def __init__(self) -> None:
        self._integers: dict[tuple[Any, ...], list[int]] = {}
        self._others: dict[tuple[Any, ...], Moments] = {}

    def add(self, pair: "Pair", info: "PairsInfo", no_data: dict[str, int]) -> None:
        """Take in one pair.

        Args:
            pair: the pair.
            info: what holds for its scene.
            no_data: number of its pixels without data, by sensor.
        """
        for sensor in SENSORS:
            pixels = getattr(pair, sensor)
            if pixels is None:
                continue
            units = getattr(info, f"{sensor}_units")
            names = getattr(info, f"{sensor}_bands")
            scene = (sensor, units, info.optical_offset if sensor == "optical" else 0.0)
            _, height, width = pixels.shape
            if pixels.dtype.kind in "iu" and pixels.dtype.itemsize <= 2 and units != "linear":
                # What holds no data is zero in all bands, which adds nothing.
                bands = pixels.bands if isinstance(pixels, NativeBands) else pixels
                for name, band in zip(names, bands, strict=True):
                    self._add_integers((*scene, name), band, height * width // band.size, no_data[sensor])
                continue
            if isinstance(pixels, NativeBands) and not no_data[sensor]:
                for name, band, factor in zip(names, pixels.bands, pixels.factors, strict=True):
                    self._add_others((*scene, name), Moments.of(band.ravel().astype(np.float64)).repeated(factor**2))
                continue
            values = pixels.expand() if isinstance(pixels, NativeBands) else pixels
            there = has_data(values, sensor, units, 0 if sensor == "optical" else None) if no_data[sensor] else ...
            for name, band in zip(names, values, strict=True):
                held = band[there].ravel().astype(np.float64)
                self._add_others((*scene, name), Moments.of(10 * np.log10(held) if units == "linear" else held))

    def _add_integers(self, key: tuple[Any, ...], band: np.ndarray, times: int, without: int) -> None:
        sums = self._integers.setdefault(key, [0, 0, 0])
        values = band.ravel().astype(np.float64)
        sums[0] += times * len(values) - without
        for start in range(0, len(values), _EXACT):
            part = values[start : start + _EXACT]
            sums[1] += times * int(part.sum())
            sums[2] += times * int(part @ part)

    def _add_others(self, key: tuple[Any, ...], moments: Moments) -> None:
        self._others[key] = self._others.get(key, Moments()).merge(moments)

    def by_band(self) -> dict[str, tuple[int, float, float]]:
        """Number, mean and sum of squared deviations by `sensor/band`, as `ShardRecord.statistics` holds them."""
        found: dict[str, Moments] = {}
        whole = {
            key: Moments(number, total / number, (squares * number - total**2) / number)
            for key, (number, total, squares) in self._integers.items()
            if number
        }
        for kinds in (whole, self._others):
            for (sensor, units, offset, name), moments in sorted(kinds.items()):
                scaled = moments.scaled(REFLECTANCE_SCALE if units == "reflectance" else 1.0, offset)
                found[f"{sensor}/{name}"] = found.get(f"{sensor}/{name}", Moments()).merge(scaled)
        return {name: moments[:3] for name, moments in found.items() if moments.number}
