"""Where pixels hold data, and which values only mark that there is none: of SAR, of optical bands, of maps.

One set of rules for each quantity, which every door asks: the image processor, `prepare`, `verify`, `inspect`, the
statistics. What each does with a finding stands in docs/datasets.md. `plausibility_fusmae` judges the other values.
"""

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .sensors_fusmae import BASELINE_0400_OFFSET, REFLECTANCE_SCALE

FEWEST_MARKED = 4
"""So many pixels with one and the same value, far from all others, are a mark where the value itself could be real."""

FAR = 1e9
"""Nothing that is measured is so large: files mark missing data with 1e20 or the lowest number of their dtype."""

RANGES = {
    "db": (-100.0, 60.0),
    "linear": (0.0, 1e6),
    "dn": (-1200.0, 32766.0),
    "reflectance": (-0.12, 3.2766),
    "quantity": (-FAR, FAR),
    "raw": (-math.inf, math.inf),
}
"""A value outside of this was not measured. SAR: noise floors are some -40 dB, 10 log10(1e-10) is -100, corner
reflectors are some +40 dB; power is never negative. Optical: subtracting the offset leaves -1000, and resampling a
little less; sun glint reaches a reflectance of 3."""

ZERO_SHARE = 0.01
"""0 dB is a bright target and may occur; exactly 0 in more than this share of the pixels is no backscatter."""

NEGATIVE_POWER = -0.5
"""Where noise is removed, power may be a little negative, but no more than this."""

WRAPPED = 2**16
"""Unsigned integers of 16 bits go on from the top where a negative number was put into them."""

_MARKS = (-9999.0, -32768.0, 32767.0, 65535.0, -999.0, -99.0)
_MARKS_OF = {
    "db": (*_MARKS, -100.0),
    "linear": _MARKS,
    "dn": (*_MARKS, -float(BASELINE_0400_OFFSET)),  # no data, after the offset was subtracted
    "reflectance": (*_MARKS, *(mark / REFLECTANCE_SCALE for mark in (*_MARKS, -float(BASELINE_0400_OFFSET)))),
    "quantity": _MARKS,
}


def has_data(
    pixels: Any, sensor: str, units: str = "raw", nodata: float | None = None, *, known_finite: bool = False
) -> Any:
    """Where pixels hold data.

    A pixel that is NaN or infinite in any band holds none. Nor does one with the declared value in any band; of an
    optical sensor whose value is 0, in all bands, since 0 in a single band is a dark pixel. In linear power a pixel
    holds none that is not positive in every band: the border of a scene is 0 there, and nothing else has a logarithm.

    Args:
        pixels: numpy array or torch tensor `(..., bands, height, width)`.
        sensor: `"sar"` or `"optical"`.
        units: of the SAR pixels, a member of `SAR_UNITS`.
        nodata: value that marks missing data, or None. Sentinel-2 products have 0.
        known_finite: the pixels were whole numbers.

    Returns:
        Bool, `(..., height, width)`, of the same library and device.
    """
    is_tensor = isinstance(pixels, torch.Tensor)
    is_float = pixels.is_floating_point() if is_tensor else pixels.dtype.kind == "f"
    holds = []
    if is_float and not known_finite:
        holds.append((torch if is_tensor else np).isfinite(pixels).all(-3))
    if units == "linear":
        holds.append((pixels > 0).all(-3))
    if nodata is not None:
        marked = pixels == nodata
        holds.append(~(marked.all(-3) if sensor == "optical" and nodata == 0 else marked.any(-3)))
    first = pixels[..., 0, :, :]
    return functools.reduce(operator.and_, holds) if holds else first == first


def looks_like_db(power: np.ndarray) -> bool:
    """Whether most values that are declared linear power are dB."""
    return power.size > 0 and float(((power < NEGATIVE_POWER) & (power >= RANGES["db"][0])).mean()) > 0.5


@dataclass(frozen=True)
class Declaration:
    """What is said of an array, or of a batch of them.

    Attributes:
        sensor: `"sar"`, `"optical"` or `"map"`.
        units: a member of `SAR_UNITS` or `OPTICAL_UNITS`; `"quantity"` of a map that holds one.
        bands: names of the bands that are judged, in their order.
        given_bands: names of the bands of the array, in its order.
        offset: in digital numbers.
        dtype: of the array.
    """

    sensor: str
    units: str
    bands: tuple[str, ...]
    given_bands: tuple[str, ...]
    offset: float
    dtype: torch.dtype

    @property
    def integer(self) -> bool:
        """Whether the array holds whole numbers."""
        return not self.dtype.is_floating_point

    @property
    def title(self) -> str:
        """The array and its units, as sentences begin."""
        names = {"sar": "SAR", "optical": "Optical", "map": "The map"}
        units = {"db": "dB", "linear": "linear", "dn": "digital numbers", "quantity": "a quantity"}
        return f"{names[self.sensor]} is declared {units.get(self.units, self.units)}"


@dataclass(frozen=True)
class Finding:
    """A sign that values are not what is declared; prints as a message.

    Attributes:
        topic: what was judged, such as `"sar units"`.
        seen: what is odd, in a sentence.
        advice: what to do about it.
        option: the option of `fusmae prepare geotiffs` that mends it, or nothing.
        bands: names of the bands concerned.
        count: number of values or pixels concerned; 0 where it is about all together.
        impossible: no scene at all has such values in the declared units, so that a single batch is enough to tell.
    """

    topic: str
    seen: str
    advice: str
    option: str = ""
    bands: tuple[str, ...] = ()
    count: int = 0
    impossible: bool = False

    @property
    def contradicts_units(self) -> bool:
        """Whether the units are wrong, if these are the values of many pairs and not of one bright crop."""
        return self.topic.endswith(" units")

    def __str__(self) -> str:
        return f"{self.seen} {self.advice}"

    def for_commands(self) -> str:
        """The message with the option that mends it."""
        return f"{self} `fusmae prepare geotiffs` takes `{self.option}`." if self.option else str(self)


class Outside(NamedTuple):
    """Values outside of `RANGES` that are no known mark.

    Attributes:
        number: how many there are.
        lowest: the smallest of them.
        highest: the largest of them.
    """

    number: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def and_of(self, other: "Outside") -> "Outside":
        """Those of both."""
        return Outside(self.number + other.number, min(self.lowest, other.lowest), max(self.highest, other.highest))


NOTHING_OUTSIDE = Outside()


class OddValues(NamedTuple):
    """What is no measurement among some pixels.

    Attributes:
        findings: of marks, zeros and wrapped numbers.
        where: bool, pixels concerned in any band; None where there are none.
        outside: further values out of range.
    """

    findings: list[Finding]
    where: np.ndarray | None = None
    outside: Outside = NOTHING_OUTSIDE


def extremes(pixels: np.ndarray) -> tuple[float, float, bool]:
    """Smallest (0 of unsigned integers, whatever they hold) and largest value, NaN apart, and whether all are finite.

    (inf, -inf) where there is no number.
    """
    if not pixels.size:
        return math.inf, -math.inf, True
    low, high = 0.0 if pixels.dtype.kind == "u" else float(pixels.min()), float(pixels.max())
    if math.isfinite(low) and math.isfinite(high):
        return low, high, True
    if math.isnan(low):
        low, high = float(np.fmin.reduce(pixels, axis=None)), float(np.fmax.reduce(pixels, axis=None))
    return (math.inf, -math.inf, False) if math.isnan(low) else (low, high, False)


def are_quiet(lowest: float, highest: float, units: str) -> bool:
    """Whether nothing between two values can be a mark, so that no pixel need be looked at one by one."""
    low, high = RANGES[units]
    marks = _MARKS_OF.get(units, ())
    return low <= lowest and highest <= high and not any(lowest <= mark <= highest for mark in marks)


def odd_values(pixels: np.ndarray, declared: Declaration) -> OddValues:
    """Which pixels hold marks for missing data, exact zeros in dB, or numbers that were wrapped.

    Args:
        pixels: `(bands, ...)`, as they are stored; NaN and infinity are no data already.
        declared: what is said of them.
    """
    units = declared.units
    if units == "raw":
        return OddValues([])
    lowest, highest, _ = extremes(pixels)
    quiet = are_quiet(lowest, highest, units)
    if quiet and not (units == "db" and lowest <= 0 <= highest):
        return OddValues([])
    found, where, outside = [], np.zeros(pixels.shape, dtype=bool), NOTHING_OUTSIDE
    if not quiet:
        for sign, describe in ((_wrapped, _wrapped_finding), (_marked, _marks_finding)):
            if (odd := sign(pixels, declared)) is not None and (odd := odd & ~where).any():
                found.append(describe(pixels, odd, declared))
                where |= odd
        low, high = RANGES[units]
        beyond = ((pixels < low) | (pixels > high)) & ~where & np.isfinite(pixels)
        if beyond.any():
            values = pixels[beyond]
            outside = Outside(values.size, float(values.min()), float(values.max()))
    if units == "db" and (zeros := pixels == 0).any() and zeros.any(axis=0).mean() > ZERO_SHARE:
        found.append(_zero_finding(zeros, declared))
        where |= zeros
    return OddValues(found, np.asarray(where.any(axis=0)) if found else None, outside)


def _marked(pixels: np.ndarray, declared: Declaration) -> np.ndarray | None:
    """Where pixels hold a known mark; None where none does."""
    where = np.zeros(pixels.shape, dtype=bool)
    if pixels.dtype.itemsize > 2:
        where |= ((pixels >= FAR) | (pixels <= -FAR)) & np.isfinite(pixels)
    low, high = RANGES[declared.units]
    for mark in _MARKS_OF[declared.units]:
        if not _fits(mark, pixels.dtype):
            continue
        equal = pixels == np.asarray(mark, pixels.dtype)
        if not (number := int(np.count_nonzero(equal))):
            continue
        margin = abs(mark) / 2
        near = int(np.count_nonzero((pixels >= mark - margin) & (pixels <= mark + margin))) - number
        # Such a value may be measured among others like it, and is a mark where it stands alone.
        if number > 10 * near and (number >= FEWEST_MARKED or not low <= mark <= high):
            where |= equal
    return where if where.any() else None


def _fits(mark: float, dtype: np.dtype) -> bool:
    if dtype.kind == "f":
        return abs(mark) < np.finfo(dtype).max
    return mark == int(mark) and np.iinfo(dtype).min <= mark <= np.iinfo(dtype).max


def _wrapped(pixels: np.ndarray, declared: Declaration) -> np.ndarray | None:
    """Where unsigned numbers stand for negative ones; None where there is no sign of it."""
    if declared.sensor == "map" or pixels.dtype == np.int16:
        return None
    scale = REFLECTANCE_SCALE if declared.units == "reflectance" else 1.0
    if declared.sensor == "sar":
        top, below = (256, 60) if declared.dtype == torch.uint8 else (WRAPPED, 100)
        where = (pixels >= top - below) & (pixels < top)
        return where if where.mean() > 0.3 and np.unique(pixels[where]).size >= FEWEST_MARKED else None
    where = (pixels >= (WRAPPED - BASELINE_0400_OFFSET) / scale) & (pixels < (WRAPPED - 1.5) / scale)
    return where if np.unique(pixels[where]).size >= 2 else None


def _bands(where: np.ndarray, declared: Declaration) -> tuple[str, ...]:
    """Names of the bands that hold something."""
    holds = np.asarray(where.reshape(len(where), -1).any(axis=1))
    return tuple(band for band, held in zip(declared.bands, holds, strict=False) if held)


def _in_bands(bands: tuple[str, ...], declared: Declaration) -> str:
    return f" in {', '.join(bands)}" if bands and declared.sensor != "map" else ""


def _wrapped_finding(pixels: np.ndarray, where: np.ndarray, declared: Declaration) -> Finding:
    """Negative numbers were put into an unsigned dtype."""
    count, bands = int(where.any(axis=0).sum()), _bands(where, declared)
    values = pixels[where]
    what = f"{count:,} pixels hold values from {float(values.min()):,.6g} to {float(values.max()):,.6g}"
    seen = f"{declared.title}, but {what}{_in_bands(bands, declared)}: negative numbers were put into unsigned ones."
    if declared.sensor == "sar":
        advice = "Keep dB in floating point from the file on; an 8-bit picture has sar_units='raw'."
        return Finding("sar wrapped", seen, advice, "", bands, count, impossible=True)
    advice = f"Do not subtract the offset from unsigned integers: pass optical_offset={BASELINE_0400_OFFSET} instead."
    return Finding("optical wrapped", seen, advice, f"--optical-offset {BASELINE_0400_OFFSET}", bands, count)


def _marks_finding(pixels: np.ndarray, where: np.ndarray, declared: Declaration) -> Finding:
    values, counts = np.unique(pixels[where], return_counts=True)
    marks = [str(value).removesuffix(".0") for value in values[np.argsort(-counts)][:3]]
    count, bands = int(where.any(axis=0).sum()), _bands(where, declared)
    seen = (
        f"{declared.title}, but {count:,} pixels hold {' or '.join(marks)}{_in_bands(bands, declared)}, which marks "
        "missing data and is no measurement"
    )
    if declared.sensor != "map" and marks[0] == "65535":
        seen += " (or a saturated one)"
    these = "these" if len(marks) == 1 else "these and the other such"
    if declared.sensor == "map":
        advice = "Set these pixels to NaN, or declare the value."
    else:
        advice = (
            f"Load the processor with from_pretrained(<your checkpoint>, {declared.sensor}_nodata={marks[0]}), or set "
            f"{these} pixels to {'NaN' if declared.sensor == 'sar' or not declared.integer else '0 in all bands'}."
        )
    option = f"--{declared.sensor}-no-data={marks[0]}"
    return Finding(f"{declared.sensor} range", f"{seen}.", advice, option, bands, count)


def _zero_finding(zeros: np.ndarray, declared: Declaration) -> Finding:
    count, bands = int(zeros.any(axis=0).sum()), _bands(zeros, declared)
    seen = (
        f"SAR is declared dB, but {count:,} pixels ({count / zeros[0].size:.0%}) are exactly 0 dB"
        f"{_in_bands(bands, declared)}, which is a mark for missing data."
    )
    advice = "Load the processor with from_pretrained(<your checkpoint>, sar_nodata=0), or set these pixels to NaN."
    return Finding("sar zero", seen, advice, "--sar-no-data=0", bands, count)


def map_findings(values: np.ndarray, units: str | None) -> list[Finding]:
    """What is no measurement in a map `(height, width)` of a quantity in some units. NaN means no data."""
    if not units or values.dtype.kind != "f" or are_quiet(*extremes(values)[:2], "quantity"):
        return []
    dtype = getattr(torch, values.dtype.name)
    found = odd_values(values[None], Declaration("map", "quantity", (units,), (units,), 0.0, dtype)).findings
    infinite = int(np.isinf(values).sum())
    if infinite:
        seen = f"The map is declared a quantity, but {infinite:,} pixels are infinite."
        found.append(Finding("map range", seen, "NaN means no data.", "", (), infinite))
    return found
