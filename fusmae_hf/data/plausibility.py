"""Do values of pairs look like what is declared? One look for every door; the rules are in `modeling`.

`PairSample` looks at pairs one by one, quickly where nothing is odd, and at all of them together. `prepare` keeps what
it saw of a file in its record in `dataset_info.json`, which `findings` puts in words for whoever comes later.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from fusmae_hf.data.findings import Seen, merge_seen
from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.files.plain_text import plain_text
from fusmae_hf.modeling.no_data_fusmae import (
    NOTHING_OUTSIDE,
    Declaration,
    Finding,
    are_quiet,
    extremes,
    has_data,
    map_findings,
    odd_values,
)
from fusmae_hf.modeling.plausibility_fusmae import (
    DARKNESS,
    FEWEST_PIXELS,
    SAMPLED_PIXELS,
    darkness,
    is_ordinary,
    judge,
    offsets_mixed,
)

OF_PAIR = 900
"""About so many pixels of a pair are judged by their distribution; marks are looked for in all of them."""

OF_ONE_PAIR = (
    "sar range",
    "sar zero",
    "sar wrapped",
    "sar scale",
    "sar bands",
    "sar units",
    "optical range",
    "optical wrapped",
    "optical units",
    "map range",
)
"""Topics that a single pair tells something about, however small or odd the scene is."""


def check_plausible(pairs: Sequence[Pair], info: PairsInfo, *, strict: bool = False) -> None:
    """Compare values with the declared units, offset and band order.

    Warns (`UserWarning`) of each sign that something is not as declared: see `judge` and `odd_values`.

    Args:
        pairs: some pairs of the dataset.
        info: what is declared.
        strict: raise instead of warning.

    Raises:
        ValueError: the values contradict the declared units, or with `strict` look odd at all.
    """
    sample = PairSample(info)
    for pair in pairs:
        sample.add(pair)
    together = sample.findings()
    topics = [finding.topic for finding in together]
    alone = {topic: seen for topic, seen in sample.seen.items() if topic not in topics}
    for finding in together:
        if finding.contradicts_units or finding.impossible:
            raise ValueError(f"{info.name}, over {len(pairs)} pairs: {finding.for_commands()}")
    for message in [*(finding.for_commands() for finding in together), *map(str, alone.values())]:
        message = f"{info.name}, over {len(pairs)} pairs: {message}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


class PairSample:
    """Looks at pairs, one by one and together.

    Args:
        info: what is declared.
        pixels_a_pair: at most so many pixels of each are kept, evenly drawn, to judge all pairs together.

    Attributes:
        seen: findings of single pairs by topic.
        darkness: number of pairs by where their darkest pixels lie: see `DARKNESS`.
    """

    def __init__(self, info: PairsInfo, pixels_a_pair: int = SAMPLED_PIXELS):
        self._info, self._pixels_a_pair = info, pixels_a_pair
        self._kept: dict[str, list[np.ndarray]] = {"sar": [], "optical": []}
        self._outside = dict.fromkeys(self._kept, NOTHING_OUTSIDE)
        self._scenes: dict[tuple[Any, ...], PairSample] = {}
        self._declarations: dict[tuple[str, np.dtype], Declaration] = {}
        self.seen: dict[str, Seen] = {}
        self.darkness: Counter[str] = Counter()

    def add(self, pair: Pair) -> list[Finding]:
        """Take in a pair that may be stored, and say what looks odd in it by itself, out of `OF_ONE_PAIR`."""
        scene = self._info.of_scene(pair)
        if scene is not self._info:  # judged with its like
            key = (scene.optical_offset, scene.sar_units, scene.optical_units)
            if key not in self._scenes:
                self._scenes[key] = PairSample(scene, self._pixels_a_pair)
            found = self._scenes[key].add(pair)
        else:
            found = [*self._look("sar", pair.sar), *self._look("optical", pair.optical)]
        if pair.label_map is not None and scene is self._info:
            found += map_findings(pair.label_map, self._info.map_units)
        for finding in found:
            of_pair = Seen(1, finding.count, plain_text(pair.id), finding.for_commands())
            merge_seen(self.seen, {finding.topic: of_pair})
        return found

    def _look(self, sensor: str, pixels: Any) -> list[Finding]:
        """What looks odd in one array of a pair, out of `OF_ONE_PAIR`; a sample of it is kept."""
        declared = None if pixels is None else self._declared(sensor, pixels.dtype)
        if declared is None or declared.units == "raw":
            return []
        # One array of all bands, since numpy takes as long to begin as to look at a band.
        flat = np.concatenate([band.ravel() for band in pixels.bands]) if isinstance(pixels, NativeBands) else pixels
        lowest, highest, finite = extremes(flat)
        found: list[Finding] = []
        outside = NOTHING_OUTSIDE
        zeros = declared.units == "db" and highest >= 0 and np.count_nonzero(flat) < flat.size
        if are_quiet(lowest, highest, declared.units) and not zeros:
            values = _sampled(pixels)
            values = values.reshape(len(values), -1) if finite and sensor == "sar" else _with_data(values, sensor)
        else:
            whole = pixels.expand() if isinstance(pixels, NativeBands) else pixels
            found, where, outside = odd_values(whole, declared)
            if where is not None:
                whole = np.where(where, 0 if sensor == "optical" else np.nan, whole)
            values = _with_data(_sampled(whole), sensor)
            self._outside[sensor] = self._outside[sensor].and_of(outside)
        if sensor == "optical" and (where_darkest := darkness(values, declared.units)):
            self.darkness[where_darkest] += 1
        if self._pixels_a_pair:
            self._kept[sensor].append(values[:, :: max(1, -(-values.shape[1] // self._pixels_a_pair))])
        if not outside.number and is_ordinary(values, highest, declared):
            return found
        enough = values.shape[1] >= FEWEST_PIXELS
        for finding in judge(_tensor(values), declared, outside):
            if finding.topic in OF_ONE_PAIR and (enough or finding.impossible or not finding.contradicts_units):
                found.append(finding)
        return found

    def findings(self) -> list[Finding]:
        """What looks odd in all of them together."""
        found = []
        for sensor, kept in self._kept.items():
            if kept:
                values = np.concatenate(kept, axis=1)
                found += judge(_tensor(values), self._declared(sensor, values.dtype), self._outside[sensor])
        for _, scenes in sorted(self._scenes.items()):
            found += scenes.findings()
        mixed = offsets_mixed(self.darkness)
        return found if mixed is None else [*found, mixed]

    def record(self) -> dict[str, Any]:
        """What was seen, for `dataset_info.json`; `recorded_findings` puts it in words."""
        seen = {topic: asdict(self.seen[topic]) for topic in sorted(self.seen)}
        dark = {name: self.darkness[name] for name in DARKNESS if self.darkness[name]}
        return {"findings": seen, "darkness": dark, "offset": self._info.optical_offset}

    def _declared(self, sensor: str, dtype: np.dtype) -> Declaration:
        if (declared := self._declarations.get((sensor, dtype))) is None:
            bands, units = getattr(self._info, f"{sensor}_bands"), getattr(self._info, f"{sensor}_units")
            declared = Declaration(sensor, units, bands, bands, self._info.optical_offset, getattr(torch, dtype.name))
            self._declarations[sensor, dtype] = declared
        return declared


def _sampled(pixels: np.ndarray | NativeBands) -> np.ndarray:
    """`(bands, rows, columns)`: pixels on a regular grid, about `OF_PAIR` of them."""
    _, height, width = pixels.shape
    step = max(1, round(math.sqrt(height * width / OF_PAIR)))
    if isinstance(pixels, np.ndarray):
        return pixels[:, ::step, ::step]
    coarsest = max(pixels.factors)
    step = -(-step // coarsest) * coarsest
    if any(coarsest % factor for factor in pixels.factors):
        return pixels.sampled(step)
    bands = zip(pixels.bands, pixels.factors, strict=True)
    return np.array([band[:: step // factor, :: step // factor] for band, factor in bands])


def _with_data(pixels: np.ndarray, sensor: str) -> np.ndarray:
    """`(bands, pixels)` with data. Linear power that is not positive stays, since it is judged."""
    there = has_data(pixels, sensor, nodata=0 if sensor == "optical" else None)
    return pixels.reshape(len(pixels), -1) if there.all() else pixels[:, there]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
