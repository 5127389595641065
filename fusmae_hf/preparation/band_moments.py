"""Mean, spread, range and distribution of the bands of a sensor, taken in batch by batch without losing digits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.modeling.sensors_fusmae import REFLECTANCE_SCALE

_SMALL_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16)
_LOWEST, _HIGHEST = -(2**15), 2**16 - 1
"""Range of all integers of up to 16 bits."""


@dataclass
class Moments:
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

    def scaled(self, factor: float, offset: float) -> "Moments":
        """Moments of `factor * value - offset`, for a positive factor."""
        shifted = (factor * value - offset for value in (self.minimum, self.maximum))
        return Moments(self.number, self.mean * factor - offset, self.deviations * factor**2, *shifted)

    @property
    def std(self) -> float:
        """Standard deviation of all these values (not an estimate for others); NaN where there are none."""
        return math.sqrt(self.deviations / self.number) if self.number else math.nan


@dataclass(frozen=True)
class Distribution:
    """How often values occur, in bins narrow enough for percentiles and pictures.

    Integers of up to 16 bits have a bin each. Other values have 128 bins from each power of two to the next: they are
    0.06 wide from 8 to 16 (dB, say) and 0.125 from 16 to 32.

    Attributes:
        low: lower edges `(bins,)` of those bins that hold something, ascending.
        high: their upper edges.
        counts: number of values in each.
    """

    low: np.ndarray
    high: np.ndarray
    counts: np.ndarray

    def below(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Number of values below each of `values`, as if those of a bin were spread over it evenly."""
        if not self.counts.size:
            return np.zeros(len(values))
        ends = np.cumsum(self.counts)
        edges = np.stack([self.low, self.high], axis=1).ravel()
        return np.interp(values, edges, np.stack([ends - self.counts, ends], axis=1).ravel())

    def percentile(self, percent: float) -> float:
        """Value below which `percent` % of the values lie; NaN where there are none."""
        if not self.counts.size:
            return math.nan
        ends = np.cumsum(self.counts)
        wanted = percent / 100 * ends[-1]
        at = min(int(np.searchsorted(ends, wanted)), len(ends) - 1)
        share = 1 - (ends[at] - wanted) / self.counts[at]
        return float(self.low[at] + share * (self.high[at] - self.low[at]))

    def scaled(self, factor: float, offset: float) -> "Distribution":
        """The distribution of `factor * value - offset`, for a positive factor."""
        return Distribution(self.low * factor - offset, self.high * factor - offset, self.counts)


class BandValues:
    """Values of one band: integers of up to 16 bits are counted, which is exact; of others the moments are kept.

    Attributes:
        pixels: number of pixels seen, with and without data.
    """

    def __init__(self) -> None:
        self.pixels = 0
        self._moments = Moments()
        self._float_counts: np.ndarray | None = None
        self._integer_counts: np.ndarray | None = None

    def count(self, values: torch.Tensor, weight: int = 1, zeros_without_data: int = 0) -> None:
        """Take in integers of up to 16 bits.

        Args:
            values: all of a batch, of any shape.
            weight: number of pixels that each stands for.
            zeros_without_data: how many of those pixels are zero for lack of data.
        """
        if self._integer_counts is None:
            self._integer_counts = np.zeros(_HIGHEST - _LOWEST + 1, np.int64)
        lowest, counts = _count(values)
        counted = self._integer_counts[lowest - _LOWEST :]
        counted[: len(counts)] += counts * weight
        self._integer_counts[-_LOWEST] -= zeros_without_data
        self.pixels += values.numel() * weight

    def add(self, values: np.ndarray, pixels: int) -> None:
        """Take in any numbers: `values` of the pixels with data, all finite, and how many `pixels` were seen."""
        self.pixels += pixels
        if not values.size:
            return
        if self._float_counts is None:
            self._float_counts = np.zeros(2**16, np.int64)
        values = values.ravel()
        self._moments = self._moments.merge(Moments.of(values.astype(np.float64)))
        with np.errstate(over="ignore"):
            bits = torch.from_numpy(values.astype(np.float32)).view(torch.int32)
        counts = torch.bincount((bits >> 16) & 0xFFFF).numpy()
        self._float_counts[: len(counts)] += counts

    def merge(self, other: "BandValues") -> None:
        """Take in what another has seen, as if after one's own."""
        self.pixels += other.pixels
        self._moments = self._moments.merge(other._moments)
        for name in ("_float_counts", "_integer_counts"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if theirs is not None:
                setattr(self, name, theirs.copy() if ours is None else ours + theirs)

    def moments(self) -> Moments:
        """Moments of all values with data."""
        if self._integer_counts is None:
            return self._moments
        held = self._integer_counts.nonzero()[0]
        counted = Moments.of((held + _LOWEST).astype(np.float64), self._integer_counts[held])
        return self._moments.merge(counted)

    def distribution(self) -> Distribution:
        """Distribution of all values with data."""
        nothing: np.ndarray = np.empty(0)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(nothing, nothing, nothing.astype(np.int64))]
        if self._integer_counts is not None:
            held = self._integer_counts.nonzero()[0]
            parts.append((held + _LOWEST - 0.5, held + _LOWEST + 0.5, self._integer_counts[held]))
        if self._float_counts is not None:
            held = self._float_counts.nonzero()[0].astype(np.uint32)
            edges = np.sort([(held << 16).view(np.float32), ((held << 16) + 0xFFFF).view(np.float32)], axis=0)
            edges = np.nan_to_num(edges.astype(np.float64), nan=np.inf, posinf=np.inf)
            low, high = np.clip(edges, self._moments.minimum, self._moments.maximum)
            parts.append((low, high, self._float_counts[held]))
        low, high, counts = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(low, kind="stable")
        return Distribution(low[order], high[order], counts[order])


def add_sar(bands: Sequence[BandValues], pixels: torch.Tensor, units: str) -> None:
    """Take in SAR patches, linear power in dB.

    Args:
        bands: what to add to, one a band.
        pixels: `(batch, bands, height, width)`. A pixel that is not finite in any band holds no data, nor does one
            that is zero or negative in any band of linear power.
        units: `"db"`, `"linear"` or `"raw"`.
    """
    if units != "linear" and pixels.dtype in _SMALL_INTEGERS:
        for number, band in enumerate(bands):
            band.count(pixels[:, number])
        return
    values = pixels.numpy()
    if units == "linear":
        with np.errstate(divide="ignore", invalid="ignore"):
            values = 10 * np.log10(values.astype(np.float64))
    _add_where(bands, values, np.isfinite(values).all(axis=1))


def add_optical(
    bands: Sequence[BandValues], pixels: torch.Tensor, factors: Sequence[int], shape: Sequence[int]
) -> None:
    """Take in optical patches, as they are.

    A pixel that is zero in all bands, or not finite in any, holds no data. A pixel of a coarser band counts as often
    as it covers pixels of the grid, as it would if all bands were on the grid.

    Args:
        bands: what to add to, one a band.
        pixels: `(batch, values)`, band after band, each in its own resolution.
        factors: by how much each band is coarser than the grid.
        shape: (bands, height, width) of a patch on the grid.
    """
    if pixels.dtype not in _SMALL_INTEGERS:
        on_grid = expand_bands(pixels, factors, *shape[1:]).numpy()
        _add_where(bands, on_grid, np.isfinite(on_grid).all(axis=1) & (on_grid != 0).any(axis=1))
        return
    without_data = int(optical_without_data(pixels, factors, shape).sum())
    for band, values, factor in zip(bands, split_bands(pixels, factors, shape), factors, strict=True):
        band.count(values, factor**2, without_data)


def stored_scale(sensor: str, units: str, offset: float) -> tuple[float, float]:
    """Factor and subtrahend from what `add_sar` and `add_optical` take in to what the image processor normalises."""
    if sensor == "sar":
        return 1.0, 0.0
    return (REFLECTANCE_SCALE if units == "reflectance" else 1.0), offset


def optical_without_data(pixels: torch.Tensor, factors: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Number of pixels without data on the grid in each optical patch: see `add_optical` for the arguments.

    Returns:
        `(batch,)` integers.
    """
    height, width = shape[1:]
    counts = np.zeros(len(pixels), np.int64)
    doubtful = np.arange(len(pixels))
    for values in split_bands(pixels, factors, shape):
        if pixels.dtype in _SMALL_INTEGERS and len(doubtful):  # a band without a zero, as nearly all are, settles it
            doubtful = doubtful[~values.numpy()[doubtful].all(axis=1)]
    if len(doubtful):
        on_grid = expand_bands(pixels[torch.from_numpy(doubtful)], factors, height, width).numpy()
        has_data = (on_grid != 0).any(axis=1) & np.isfinite(on_grid).all(axis=1)
        counts[doubtful] = (~has_data).sum(axis=(1, 2))
    return counts


def split_bands(pixels: torch.Tensor, factors: Sequence[int], shape: Sequence[int]) -> list[torch.Tensor]:
    """Each band of packed optical patches in its own resolution, `(batch, values)`: see `add_optical`."""
    return list(pixels.split([shape[1] * shape[2] // factor**2 for factor in factors], dim=1))


def _add_where(bands: Sequence[BandValues], values: np.ndarray, has_data: np.ndarray) -> None:
    """Take in `values` (batch, bands, height, width) where there are data, (batch, height, width)."""
    complete = bool(has_data.all())
    for number, band in enumerate(bands):
        band.add(values[:, number] if complete else values[:, number][has_data], has_data.size)


def _count(values: torch.Tensor) -> tuple[int, np.ndarray]:
    """Lowest value that is counted, and how often it and each of those above it occur."""
    values = values.reshape(-1)
    if not values.numel():
        return 0, np.zeros(0, np.int64)
    lowest, highest = int(values.numpy().min()), int(values.numpy().max())
    if lowest >= 0 and highest < 2**15:
        # torch counts small integers as they are, where numpy would widen each to 64 bits first.
        as_signed = values.view(torch.int16) if values.dtype == torch.uint16 else values
        return 0, torch.bincount(as_signed).numpy()
    return lowest, torch.bincount(values.to(torch.int32) - lowest).numpy()
