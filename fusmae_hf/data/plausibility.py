"""Do values of pairs look like the declared units, offset and band order? The rules are in `plausibility_fusmae`."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.plausibility_fusmae import (
    SAMPLED_PIXELS,
    Declaration,
    Finding,
    Outside,
    has_data,
    optical_findings,
    outside_range,
    sar_findings,
)

OF_ONE_PAIR = ("sar range", "sar scale", "sar bands")
"""Topics that a single pair tells something about, however small or odd the scene is."""


def check_plausible(pairs: Sequence[Pair], info: PairsInfo) -> None:
    """Compare values with the declared units, offset and band order.

    Warns (`UserWarning`) of each sign that something is not as declared: see `sar_findings` and `optical_findings`.

    Args:
        pairs: some pairs of the dataset.
        info: what is declared.

    Raises:
        ValueError: the values contradict the declared units.
    """
    sample = PairSample(info)
    for pair in pairs:
        sample.add(pair)
    for finding in sample.findings():
        message = f"{info.name}, over {len(pairs)} pairs: {finding}"
        if finding.topic == "optical offset":
            message += " The option of `fusmae prepare` is `--optical-offset`."
        if finding.contradicts_units:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


class PairSample:
    """Pixels of pairs, evenly drawn, to be judged together.

    Args:
        info: what is declared.
        pixels_a_pair: at most so many are kept of each.
    """

    def __init__(self, info: PairsInfo, pixels_a_pair: int = SAMPLED_PIXELS):
        self._info, self._most = info, pixels_a_pair
        self._values: dict[str, list[np.ndarray]] = {"sar": [], "optical": []}
        self._outside = Outside()

    def add(self, pair: Pair) -> list[Finding]:
        """Take in a pair that may be stored, and say what looks odd in it by itself, out of `OF_ONE_PAIR`."""
        for sensor, pixels in (("sar", pair.sar), ("optical", pair.optical)):
            _, height, width = pixels.shape
            step = max(1, math.ceil(math.sqrt(height * width / self._most)))
            sampled = pixels.sampled(step) if isinstance(pixels, NativeBands) else pixels[:, ::step, ::step]
            self._values[sensor].append(_with_data(sampled, sensor))
        values, declared = _tensor(_with_data(pair.sar, "sar")), self._declared("sar", pair.sar.dtype)
        outside = outside_range(values, declared)
        self._outside = self._outside.and_of(outside)
        return [finding for finding in sar_findings(values, declared, outside) if finding.topic in OF_ONE_PAIR]

    def findings(self) -> list[Finding]:
        """What looks odd in all of them together."""
        together = {sensor: np.concatenate(values, axis=1) for sensor, values in self._values.items() if values}
        if not together:
            return []
        sar, optical = (self._declared(sensor, values.dtype) for sensor, values in together.items())
        return sar_findings(_tensor(together["sar"]), sar, self._outside) + optical_findings(
            _tensor(together["optical"]), optical
        )

    def _declared(self, sensor: str, dtype: np.dtype) -> Declaration:
        bands, units = getattr(self._info, f"{sensor}_bands"), getattr(self._info, f"{sensor}_units")
        return Declaration(sensor, units, bands, bands, self._info.optical_offset, getattr(torch, dtype.name))


def _with_data(pixels: np.ndarray, sensor: str) -> np.ndarray:
    """`(bands, pixels)` with data. Linear power that is not positive stays, since it is judged."""
    there = has_data(pixels, sensor, nodata=0 if sensor == "optical" else None)
    return pixels.reshape(len(pixels), -1) if there.all() else pixels[:, there]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
