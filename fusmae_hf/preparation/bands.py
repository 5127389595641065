"""Mean, spread, range and distribution of the bands of shards in one pass, which loses no digits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusmae_hf.data.checks import pixels_without_data
from fusmae_hf.data.native_resolution import NativeBands, expand_bands
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.modeling.no_data_fusmae import has_data
from fusmae_hf.modeling.sensors_fusmae import REFLECTANCE_SCALE
from fusmae_hf.shards.decoding import RowsInMemory, decode_pairs
from fusmae_hf.shards.moments import Moments
from fusmae_hf.vocabulary import IMAGES

if TYPE_CHECKING:
    from fusmae_hf.shards.loading import StreamedPairDataset

PERCENTILES = (1, 25, 50, 75, 99)
"""Percentiles in tables and files."""

DECODED_TOGETHER = 16
"""Pairs that are summed at once, at most."""

_SMALL_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16)
_LOWEST, _HIGHEST = -(2**15), 2**16 - 1
"""Range of all integers of up to 16 bits."""

Rows = tuple["StreamedPairDataset", int, int]
"""The first so many rows of a row group: dataset, number of the row group, rows."""


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


@dataclass(frozen=True)
class BandSummary:
    """Statistics of one band over its pixels with data, in the scale of the image processor.

    That is dB for SAR (linear power is converted) and, for the optical sensor, digital numbers from which the declared
    offset has been subtracted (reflectance is multiplied by 10,000); raw values stay what they are.

    Attributes:
        sensor: `"sar"` or `"optical"`.
        band: its name.
        pixels: number of pixels.
        valid: number of pixels with data.
        mean: mean.
        std: standard deviation (of these values, not an estimate for others).
        minimum: smallest value.
        maximum: largest value.
        percentiles: by percent, of `PERCENTILES`.
        distribution: how often values occur.
    """

    sensor: str
    band: str
    pixels: int
    valid: int
    mean: float
    std: float
    minimum: float
    maximum: float
    percentiles: dict[int, float]
    distribution: Distribution | None = field(default=None, repr=False, compare=False)

    @property
    def no_data(self) -> float:
        """Share of the pixels that hold no data, from 0 to 1."""
        return 1 - self.valid / self.pixels if self.pixels else 0.0


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
        return self._moments.merge(Moments.of((held + _LOWEST).astype(np.float64), self._integer_counts[held]))

    def distribution(self) -> Distribution:
        """Distribution of all values with data."""
        parts: list[tuple[np.ndarray, ...]] = [(np.empty(0), np.empty(0), np.empty(0, np.int64))]
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

    def summary(self, sensor: str, band: str, factor: float, offset: float) -> BandSummary:
        """Statistics of `factor * value - offset`, for a positive factor."""
        moments, found = self.moments(), self.distribution()
        minimum, maximum = (factor * end - offset for end in (moments.minimum, moments.maximum))
        distribution = Distribution(found.low * factor - offset, found.high * factor - offset, found.counts)
        return BandSummary(
            sensor,
            band,
            self.pixels,
            moments.number,
            moments.mean * factor - offset,
            moments._replace(deviations=moments.deviations * factor**2).std,
            minimum,
            maximum,
            {p: min(max(distribution.percentile(p), minimum), maximum) for p in PERCENTILES},
            distribution,
        )


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


class SensorBands:
    """Takes in batches of pairs and sums up each band.

    Pixels without data do not count: see `has_data`. A pixel of a coarser band counts as often as it covers pixels of
    the grid, as it would if all bands were on the grid.
    """

    def __init__(self, info: PairsInfo):
        self._info = info
        self._scenes: dict[tuple[Any, ...], _SceneBands] = {}

    def add(self, batch: dict[str, Any]) -> None:
        """Take in a batch as `read_batches` gives it, all of whose pairs are of one kind of scene."""
        scene = {name: batch[name][0] for name in self._info.per_scene}
        if "optical_offset" in scene:
            scene["optical_offset"] = float(scene["optical_offset"])
        of_scene = self._scenes.setdefault(tuple(scene.values()), _SceneBands(self._info.of_scene(scene)))
        of_scene.add(batch)

    def merge(self, other: "SensorBands") -> None:
        """Take in what another has seen."""
        for key, theirs in other._scenes.items():
            if key in self._scenes:
                self._scenes[key].merge(theirs)
            else:
                self._scenes[key] = theirs

    def summaries(self) -> tuple[BandSummary, ...]:
        """Statistics of each band in the scale of the image processor, SAR first."""
        scenes = [scene.summaries() for _, scene in sorted(self._scenes.items())] or [
            _SceneBands(self._info).summaries()
        ]
        return tuple(map(_together, zip(*scenes, strict=True)))


class _SceneBands:
    """`SensorBands` of scenes of one kind."""

    def __init__(self, info: PairsInfo):
        self._info = info
        self._factors = info.optical_factors or (1,) * len(info.optical_bands)
        self.sar, self.optical = ([BandValues() for _ in bands] for bands in (info.sar_bands, info.optical_bands))

    def add(self, batch: dict[str, Any]) -> None:
        """Take in a batch as `decode_pairs` gives it, packed or not, all of whose pairs have the same sensors."""
        optical = batch["optical"]
        shape = batch.get("optical_shape") or tuple(optical.shape[1:])
        factors = self._factors if "optical_shape" in batch else (1,) * shape[0]
        if there(batch, "sar"):
            self._add_sar(batch["sar"])
        if there(batch, "optical"):
            self._add_optical(optical.reshape(len(optical), -1), factors, *shape[1:])

    def _add_sar(self, pixels: torch.Tensor) -> None:
        """Take in `(batch, bands, height, width)`, linear power in dB."""
        units = self._info.sar_units
        if units != "linear" and pixels.dtype in _SMALL_INTEGERS:
            for number, band in enumerate(self.sar):
                band.count(pixels[:, number])
            return
        values = pixels.numpy()
        there = has_data(values, "sar", units)
        if units == "linear":
            with np.errstate(divide="ignore", invalid="ignore"):
                values = 10 * np.log10(values.astype(np.float64))
        _add_where(self.sar, values, there)

    def _add_optical(self, pixels: torch.Tensor, factors: Sequence[int], height: int, width: int) -> None:
        """Take in `(batch, values)`, band after band, each in its own resolution."""
        if pixels.dtype not in _SMALL_INTEGERS:
            on_grid = expand_bands(pixels, factors, height, width).numpy()
            _add_where(self.optical, on_grid, has_data(on_grid, "optical", nodata=0))
            return
        patches = (NativeBands.unpack(patch, factors, height, width) for patch in pixels.numpy())
        without_data = sum(pixels_without_data(patch, "optical", self._info.optical_units) for patch in patches)
        split = pixels.split([height * width // factor**2 for factor in factors], dim=1)
        for band, values, factor in zip(self.optical, split, factors, strict=True):
            band.count(values, factor**2, without_data)

    def merge(self, other: "_SceneBands") -> None:
        """Take in what another has seen."""
        for ours, theirs in zip((*self.sar, *self.optical), (*other.sar, *other.optical), strict=True):
            ours.merge(theirs)

    def summaries(self) -> tuple[BandSummary, ...]:
        """Statistics of each band in the scale of the image processor, SAR first."""
        info = self._info
        factor = REFLECTANCE_SCALE if info.optical_units == "reflectance" else 1.0
        sar = (values.summary("sar", band, 1.0, 0.0) for band, values in zip(info.sar_bands, self.sar, strict=True))
        optical = zip(info.optical_bands, self.optical, strict=True)
        return (*sar, *(values.summary("optical", band, factor, info.optical_offset) for band, values in optical))


def _together(summaries: Sequence[BandSummary]) -> BandSummary:
    """Statistics of one band over scenes of several kinds."""
    first, *others = summaries
    if not others:
        return first
    moments, pixels = Moments(), 0
    for each in summaries:
        held = Moments(each.valid, each.mean, each.std**2 * each.valid, each.minimum, each.maximum)
        moments, pixels = moments.merge(held), pixels + each.pixels
    parts = [each.distribution for each in summaries if each.distribution and each.distribution.counts.size]
    edges = np.unique(np.concatenate([ends for part in parts for ends in (part.low, part.high)] or [np.empty(0)]))
    counts = np.diff(sum((part.below(edges) for part in parts), np.zeros(len(edges)))) if parts else np.empty(0)
    held_bins = counts > 0
    distribution = Distribution(edges[:-1][held_bins], edges[1:][held_bins], counts[held_bins])
    percentiles = {
        p: min(max(distribution.percentile(p), moments.minimum), moments.maximum) for p in first.percentiles
    }
    figures = (moments.number, moments.mean, moments.std, moments.minimum, moments.maximum)
    return BandSummary(first.sensor, first.band, pixels, *figures, percentiles, distribution)


def there(batch: dict[str, Any], sensor: str) -> bool:
    """Whether the pairs of a batch have a sensor, all of them as `read_batches` has it."""
    available = batch.get(f"{sensor}_available")
    return available is None or bool(available.all())


def _add_where(bands: Sequence[BandValues], values: np.ndarray, there: np.ndarray) -> None:
    """Take in `values` (batch, bands, height, width) where there are data, (batch, height, width)."""
    complete = bool(there.all())
    for number, band in enumerate(bands):
        band.add(values[:, number] if complete else values[:, number][there], there.size)


def spread_rows(datasets: Sequence["StreamedPairDataset"], max_pairs: int | None = None) -> list[Rows]:
    """Row groups of all datasets, or as many as hold `max_pairs`, evenly spread."""
    groups = [
        (pairs, group, rows)
        for pairs in datasets
        for group, rows in enumerate(
            rows for shard in pairs.dataset_info.shards(pairs.split) for rows in shard.row_group_rows
        )
    ]
    total = sum(rows for _, _, rows in groups)
    if max_pairs is None or max_pairs >= total:
        return groups
    wanted = min(len(groups), -(-max_pairs * len(groups) // total))
    spread = np.linspace(0, len(groups) - 1, wanted).round().astype(int).tolist()
    chosen, remaining = [], max_pairs
    for index in (*spread, *sorted(set(range(len(groups))).difference(spread))):  # some may be short of rows
        pairs, group, rows = groups[index]
        if remaining:
            chosen.append((index, (pairs, group, min(rows, remaining))))
            remaining -= min(rows, remaining)
    return [rows for _, rows in sorted(chosen, key=lambda entry: entry[0])]


def read_batches(rows: Rows, most: int = DECODED_TOGETHER) -> Iterator[dict[str, Any]]:
    """Batches of pairs of one shape, dtype and kind of scene, of `most` at most, bands in their own resolution."""
    pairs, group, number = rows
    table = pairs.read_row_group(group).combine_chunks()
    (columns,) = table.to_batches()
    decoded = RowsInMemory(columns, f"{pairs.root}, split {pairs.split}, row group {group}")
    alike: dict[Any, list[int]] = {}
    for row in range(number):
        kind = tuple(decoded.declared(name, row) for name in IMAGES) + tuple(
            decoded.of_scene(name, row) for name in pairs.info.per_scene
        )
        alike.setdefault(kind, []).append(row)
    for of_kind in alike.values():
        for start in range(0, len(of_kind), most):
            yield decode_pairs([(decoded, row) for row in of_kind[start : start + most]], pairs.info, packed=True)
