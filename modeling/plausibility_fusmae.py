"""The rules on values, which every door asks: where a pixel holds data, and what looks unlike the declaration.

The image processor, `prepare`, `verify` and the statistics call `has_data`; the first three also call `sar_findings`
and `optical_findings`, and decide for themselves whether a finding is refused or warned of. Each quantity has a
function of its own, which returns a `Finding` or None. Thresholds are physical limits with a margin, so that water,
snow, shadow, night and tiny crops pass without a word.
"""

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .sensors_fusmae import BASELINE_0400_OFFSET, REFLECTANCE_SCALE

SAMPLED_PIXELS = 4096
"""At most so many pixels of a batch are looked at, on a regular grid: a patch of 64x64 px is seen whole."""

ACCELERATOR_LOOKS = 4
"""Each look stalls an accelerator, so that only the first few batches of a declaration are looked at there."""

FEWEST_PIXELS = 256
"""Fewer pixels, as in tiny crops, say nothing about the spread of values or about how dark a scene is."""

SAR_RANGE = {"db": (-100.0, 60.0), "linear": (0.0, math.inf), "raw": (-math.inf, math.inf)}
"""A value outside of this comes from no radar: noise floors are some -40 dB, 10 log10(1e-10) is -100, corner
reflectors are some +40 dB. Power is never negative."""

MEAN_DB = (-60.0, 20.0)
"""Where the mean of many values in dB lies; single bright targets may exceed it."""

SWAPPED_DB = 1.0
"""VV exceeds VH by 6 to 7 dB in the mean; over calm water both are noise, and either may exceed the other by this."""

VISIBLE_BANDS = ("B02", "B03", "B04")


def has_data(
    pixels: Any, sensor: str, units: str = "raw", nodata: float | None = None, *, known_finite: bool = False
) -> Any:
    """Where pixels hold data.

    A pixel that is NaN or infinite in any band holds none. SAR: nor does one with the declared value in any band or,
    in linear power, one that is not positive in every band: the border of a scene is 0 there, and nothing else has a
    logarithm. Optical: nor does one with the declared value in all bands; 0 in a single band is a dark pixel.

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
        holds.append(~(marked.all(-3) if sensor == "optical" else marked.any(-3)))
    first = pixels[..., 0, :, :]
    return functools.reduce(operator.and_, holds) if holds else first == first


@dataclass(frozen=True)
class Declaration:
    """What is said of an array, or of a batch of them.

    Attributes:
        sensor: `"sar"` or `"optical"`.
        units: a member of `SAR_UNITS` or `OPTICAL_UNITS`.
        bands: names of the bands that the model takes, in its order.
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


@dataclass(frozen=True)
class Finding:
    """A sign that values are not what is declared; prints as a message.

    Attributes:
        topic: what was judged, such as `"sar units"`.
        seen: what is odd, in a sentence.
        advice: what to do about it.
        bands: names of the bands concerned.
        count: number of values concerned; 0 where it is about all together.
        impossible: no scene at all has such values in the declared units, so that a single batch is enough to tell.
    """

    topic: str
    seen: str
    advice: str
    bands: tuple[str, ...] = ()
    count: int = 0
    impossible: bool = False

    @property
    def contradicts_units(self) -> bool:
        """Whether the units are wrong, if these are the values of many pairs and not of one bright crop."""
        return self.topic.endswith(" units")

    def __str__(self) -> str:
        return f"{self.seen} {self.advice}"


class Plausibility:
    """Looks at batches and tells each kind of sign once for each declaration.

    On the CPU every batch is looked at. On an accelerator the first `ACCELERATOR_LOOKS` of each declaration are.
    """

    def __init__(self) -> None:
        self._looks: dict[Declaration, int] = {}
        self._told: set[tuple[Declaration, str]] = set()

    def look(self, pixels: torch.Tensor, valid: torch.Tensor, declared: Declaration) -> list[Finding]:
        """Findings not yet told, and those of values that are impossible, which are told each time.

        Args:
            pixels: `(batch, bands, height, width)` float32 in the declared units, bands as in `declared.bands`.
            valid: `(batch, height, width)` bool, where there is data.
            declared: what is said of the pixels.
        """
        if declared.units == "raw":
            return []
        if pixels.device.type != "cpu":
            looks = self._looks.get(declared, 0)
            if looks >= ACCELERATOR_LOOKS:
                return []
            self._looks[declared] = looks + 1
        values = _sampled(pixels, valid)
        if declared.sensor == "optical":
            found = optical_findings(values, declared)
        else:
            # On the CPU in all pixels, since a few marks that the sample misses would do harm.
            everywhere = pixels.device.type == "cpu"
            found = sar_findings(values, declared, outside_range(pixels, declared, valid) if everywhere else None)
        new = [finding for finding in found if finding.impossible or (declared, finding.topic) not in self._told]
        self._told.update((declared, finding.topic) for finding in new)
        return new


def _sampled(pixels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Valid pixels on a regular grid through the batch, `(bands, pixels)`, on the CPU."""
    batch, _, height, width = pixels.shape
    every = math.ceil(batch / SAMPLED_PIXELS)
    step = max(1, math.ceil(math.sqrt(batch * height * width / (every * SAMPLED_PIXELS))))
    sample, there = pixels[::every, :, ::step, ::step].cpu(), valid[::every, ::step, ::step].cpu()
    values = sample.transpose(0, 1)
    return values.flatten(1) if bool(there.all()) else values[:, there]


# --- SAR -------------------------------------------------------------------------------------------------------------


class Outside(NamedTuple):
    """Values that come from no radar.

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


def outside_range(pixels: torch.Tensor, declared: Declaration, valid: torch.Tensor | None = None) -> Outside:
    """Values outside of `SAR_RANGE`, of `(bands, pixels)`, or of `(batch, bands, height, width)` where `valid`."""
    low, high = SAR_RANGE[declared.units]
    outside = (pixels < low) | (pixels > high) if high < math.inf else pixels < low
    if not bool(outside.any()):
        return Outside()
    values = pixels[outside if valid is None else outside & valid[:, None]]
    return Outside(values.numel(), float(values.min()), float(values.max())) if values.numel() else Outside()


def sar_findings(values: torch.Tensor, declared: Declaration, outside: Outside | None = None) -> list[Finding]:
    """What looks odd in SAR.

    Args:
        values: `(bands, pixels)` on the CPU, finite, in the declared units.
        declared: what is said of them.
        outside: `outside_range` of these pixels and more.
    """
    if declared.units == "raw":  # nobody knows what they mean: bands of a picture may each be stretched for themselves
        return []
    outside = outside_range(values, declared) if outside is None else outside
    if declared.units == "linear":
        if values.numel() and (values < 0).float().mean() > 0.5:
            seen = "SAR is declared linear, but most values are negative: this looks like dB."
            return [Finding("sar units", seen, "Pass sar_units='db'.", impossible=True)]
        backscatter = 10 * torch.log10(values[:, (values > 0).all(dim=0)])
    else:
        low, high = SAR_RANGE[declared.units]
        backscatter = values[:, ((values >= low) & (values <= high)).all(dim=0)] if outside.number else values
        scattered = outside.number and outside.lowest < outside.highest
        if scattered and (backscatter.numel() == 0 or backscatter.mean() < MEAN_DB[0]):
            return [_sar_scaled(float(values.mean()) if values.numel() else (outside.lowest + outside.highest) / 2)]
    found = [sar_range(outside, declared)] if outside.number else []
    if backscatter.numel() == 0:
        return found
    for judge in (sar_units, sar_scale, sar_normalised):
        if finding := judge(backscatter, declared):
            return [*found, finding]
    return found + [finding for judge in (sar_integers, sar_bands) if (finding := judge(backscatter, declared))]


def sar_range(outside: Outside, declared: Declaration) -> Finding:
    """Some values come from no radar: marks for missing data, or negative power."""
    count, lowest, highest = outside
    low, high = SAR_RANGE[declared.units]
    if declared.units == "linear":
        seen = f"SAR is declared linear, but {count:,} values are negative, to {lowest:.4g}: they count as no data."
        return Finding("sar range", seen, "Did noise removal make them, or are some files in dB?", count=count)
    mark = lowest if lowest < low else highest
    return Finding(
        "sar range",
        f"SAR is declared dB, but {count:,} values, such as {mark:.9g}, are outside of {low:g} to {high:g} dB, which "
        "is a mark for missing data and no backscatter.",
        f"Load the processor with from_pretrained(<your checkpoint>, sar_nodata={mark:.9g}), or set "
        + ("these pixels to NaN." if lowest == highest else "these and the other such pixels to NaN."),
        count=count,
    )


def sar_units(backscatter: torch.Tensor, declared: Declaration) -> Finding | None:
    """No value in dB is negative. A single crop of a bright town may be so; many pairs are not."""
    if declared.units != "db" or backscatter.min() < 0:
        return None
    return Finding(
        "sar units",
        f"SAR is declared dB, but no value is negative (mean {backscatter.mean():.4g}): this looks like linear power "
        "or 8-bit data.",
        "Convert with 10*log10(x), or pass sar_units='linear' or 'raw'.",
    )


def sar_scale(backscatter: torch.Tensor, declared: Declaration) -> Finding | None:
    """The mean is out of reach of backscatter, or dB were divided like digital numbers."""
    mean = backscatter.mean()
    if not MEAN_DB[0] <= mean <= MEAN_DB[1]:
        return _sar_scaled(float(mean))
    if backscatter.shape[1] < FEWEST_PIXELS or mean.abs() >= 1:
        return None
    if 0 < (spread := backscatter.std(correction=0)) < 0.1:
        seen = f"all values are nearly the same (mean {mean:.4g}, standard deviation {spread:.2g})."
        advice = f"Were they divided by {REFLECTANCE_SCALE:,.0f} like digital numbers? Pass dB."
        return Finding("sar scale", f"SAR is declared dB, but {seen}", advice)
    return None


def _sar_scaled(mean: float) -> Finding:
    return Finding(
        "sar scale",
        f"SAR has a mean of {mean:.5g} dB, but backscatter lies between {MEAN_DB[0]:g} and {MEAN_DB[1]:g} dB. "
        "Were dB multiplied by 100 to store them as integers, or were digital numbers never calibrated?",
        "Undo the scaling in floating point before the processor; linear power needs sar_units='linear'.",
    )


def sar_normalised(backscatter: torch.Tensor, declared: Declaration) -> Finding | None:
    """Both signs, means near 0 and deviations near 1."""
    if backscatter.shape[1] < FEWEST_PIXELS or backscatter.mean(dim=1).abs().max() >= 3:
        return None
    std = backscatter.std(dim=1, correction=0)
    if std.min() < 0.1 or std.max() >= 2 or not backscatter.min() < 0 < backscatter.max():
        return None
    spread = backscatter.std(correction=0)
    return _normalised("SAR", "sar normalised", float(backscatter.mean()), float(spread))


def _normalised(name: str, topic: str, mean: float, spread: float) -> Finding:
    seen = f"{name} (mean {mean:.2f}, standard deviation {spread:.2f}) looks normalised already:"
    advice = "load the processor with from_pretrained(..., do_normalize=False), or pass the tensors to the model."
    return Finding(topic, seen, advice)


def sar_integers(backscatter: torch.Tensor, declared: Declaration) -> Finding | None:
    """Decibels in whole numbers have lost what textures are made of."""
    if not (declared.integer and declared.units == "db"):
        return None
    name = str(declared.dtype).removeprefix("torch.")
    seen = f"SAR is declared dB, but comes in {name}: the fraction of each dB is lost."
    return Finding("sar integers", seen, "Keep backscatter in floating point from the file on.")


def sar_bands(backscatter: torch.Tensor, declared: Declaration) -> Finding | None:
    """The mean of VH exceeds that of VV by more than noise does."""
    if not {"VV", "VH"} <= set(declared.bands):
        return None
    co, cross = (float(backscatter[declared.bands.index(band)].mean()) for band in ("VV", "VH"))
    if cross <= co + SWAPPED_DB:
        return None
    seen = f"SAR: mean VH ({cross:.1f} dB) exceeds mean VV ({co:.1f} dB), which hardly ever happens."
    advice = "Are the bands swapped? Pass sar_bands=[...] in the order of your array."
    return Finding("sar bands", seen, advice, bands=("VV", "VH"))


# --- optical ---------------------------------------------------------------------------------------------------------


def optical_findings(values: torch.Tensor, declared: Declaration) -> list[Finding]:
    """What looks odd in optical `values` `(bands, pixels)`, on the CPU, finite, in the declared units."""
    if declared.units == "raw" or values.numel() == 0:
        return []
    for judge in (optical_normalised, optical_units, optical_8_bits, optical_offset):
        if finding := judge(values, declared):
            return [finding]
    return []


def optical_normalised(values: torch.Tensor, declared: Declaration) -> Finding | None:
    """Reflectance goes down to -0.1 where an offset was subtracted; normalised dark pixels lie below -0.5."""
    mean, spread = values.mean(), values.std(correction=0)
    if declared.integer or values.min() >= -0.15 or mean.abs() >= 5 or spread >= 5:
        return None
    return _normalised("Optical", "optical normalised", float(mean), float(spread))


def optical_units(values: torch.Tensor, declared: Declaration) -> Finding | None:
    """Digital numbers are declared reflectance, or the other way round."""
    mean, largest = values.mean(), values.max()
    if declared.units == "reflectance" and (declared.integer or mean > 10):
        kind = "integers" if declared.integer else "large"
        seen = (
            f"Optical is declared reflectance, but the values are {kind} (mean {mean:.4g}): this looks like digital "
        )
        return Finding("optical units", f"{seen}numbers.", "Pass optical_units='dn'.", impossible=True)
    if declared.units == "dn" and not declared.integer and largest < 5:
        seen = f"Optical is declared digital numbers, but no value exceeds {largest:.3g}: this looks like reflectance."
        return Finding("optical units", seen, "Pass optical_units='reflectance'.")
    return None


def optical_8_bits(values: torch.Tensor, declared: Declaration) -> Finding | None:
    """A picture is declared digital numbers. A lake is as dark, but even."""
    if declared.units != "dn":
        return None
    largest, varied = values.max(), values.std(dim=1, correction=0).mean() > 20
    is_byte = declared.dtype == torch.uint8
    if not is_byte and (values.shape[1] < FEWEST_PIXELS or largest >= 300 or not varied):
        return None
    why = "comes in uint8" if is_byte else f"no value exceeds {largest:.4g}"
    return Finding(
        "optical 8 bits",
        f"Optical is declared digital numbers (reflectance x 10,000), but {why}: this looks like an 8-bit picture.",
        "Read the bands of the product; for 8-bit data, make a processor with optical_units='raw' and the mean and "
        "std of your data.",
    )


def optical_offset(values: torch.Tensor, declared: Declaration) -> Finding | None:
    """An offset looks forgotten, or declared in vain."""
    numbers = values * REFLECTANCE_SCALE if declared.units == "reflectance" else values
    offset, margin = declared.offset, 0.9 * BASELINE_0400_OFFSET
    bands = tuple(band for band in VISIBLE_BANDS if band in declared.bands)
    if not bands:
        return None
    visible = numbers[[declared.bands.index(band) for band in bands]]
    # Snow is dark in the short-wave infrared; thick cloud and salt are bright everywhere, which tells nothing.
    many = numbers.shape[1] >= FEWEST_PIXELS
    if many and offset < BASELINE_0400_OFFSET and (numbers < offset + margin).float().mean(dim=1).max() <= 0.01:
        darkest = np.percentile(visible.numpy(), 1)  # torch's quantile takes 16 million values at most
        if darkest < offset + 1.6 * BASELINE_0400_OFFSET:
            return Finding(
                "optical offset",
                f"Optical: with an offset of {offset:g}, even the darkest 1 % of B02, B03 and B04 is at "
                f"{darkest:.0f}. Products of processing baseline 04.00 and later carry +{BASELINE_0400_OFFSET}:",
                f"pass optical_offset={BASELINE_0400_OFFSET} if yours do.",
                bands,
            )
    # Atmospheric correction takes deep shadow and water a little below zero reflectance.
    below = (visible < 0.9 * offset).float().mean(dim=1) if offset > 0 else visible.new_zeros(1)
    if below.max() > 0.05:
        return Finding(
            "optical offset",
            f"Optical: in a visible band, {float(below.max()):.0%} of the pixels lie below the declared offset of "
            f"{offset:g}. Was the offset subtracted already, or does the product not carry it?",
            "Then pass optical_offset=0.",
            bands,
        )
    return None


# --- names of bands --------------------------------------------------------------------------------------------------
