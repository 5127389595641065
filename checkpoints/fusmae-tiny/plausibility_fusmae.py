"""Do values look like what is declared: units, offset, order of the bands, for SAR and for optical bands?

`judge` looks at an array for every door, after `no_data_fusmae` has found the values that are no measurement. Each
sign has a function of its own, which returns a `Finding` or None. Thresholds are physical limits with a margin, so
that water, snow, shadow, night and tiny crops pass without a word.
"""

import math

import numpy as np
import torch

from .no_data_fusmae import NOTHING_OUTSIDE, RANGES, Declaration, Finding, Outside, looks_like_db, odd_values
from .sensors_fusmae import BASELINE_0400_OFFSET, REFLECTANCE_SCALE

SAMPLED_PIXELS = 4096
"""At most so many pixels of a batch are looked at, on a regular grid: a patch of 64x64 px is seen whole."""

ACCELERATOR_LOOKS = 4
"""Each look stalls an accelerator, so that only the first few batches of a declaration are looked at there."""

FEWEST_PIXELS = 256
"""Fewer pixels, as in tiny crops, say nothing about the spread of values or about how dark a scene is."""

MEAN_DB = (-60.0, 20.0)
"""Where the mean of many values in dB lies; single bright targets may exceed it."""

SWAPPED_DB = 1.0
"""VV exceeds VH by 6 to 7 dB in the mean; over calm water both are noise, and either may exceed the other by this."""

VISIBLE_BANDS = ("B02", "B03", "B04")

PERCENT = 130.0
"""Reflectance in percent does not exceed this but where the sun glints."""

_READ_OR_RAW = (
    "Read the bands of the product; for 8-bit data, make a processor with optical_units='raw' and the mean and std of "
    "your data."
)


class Plausibility:
    """Looks at batches and tells each kind of sign once for each declaration.

    On the CPU every batch is looked at. On an accelerator the first `ACCELERATOR_LOOKS` of each declaration are, in a
    sample. What was told is no part of its state: a copy tells it again.
    """

    def __init__(self) -> None:
        self._looks: dict[Declaration, int] = {}
        self._told: set[tuple[Declaration, str]] = set()

    def __reduce__(self) -> tuple[type["Plausibility"], tuple[()]]:
        return Plausibility, ()

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
            odd = odd_values(values.numpy(), declared)
            found = odd.findings + judge(values if odd.where is None else values[:, ~odd.where], declared, odd.outside)
        else:  # in all pixels, since a few marks that the sample misses would do harm
            every = pixels if bool(valid.all()) else torch.where(valid[:, None], pixels, torch.nan)
            odd = odd_values(every.transpose(0, 1).numpy(), declared)
            there = valid if odd.where is None else valid & ~torch.from_numpy(odd.where)
            found = odd.findings + judge(_sampled(pixels, there), declared, odd.outside)
        new = [finding for finding in found if finding.impossible or (declared, finding.topic) not in self._told]
        self._told.update((declared, finding.topic) for finding in new)
        return new


def is_ordinary(values: np.ndarray, highest: float, declared: Declaration) -> bool:
    """Whether nothing that `judge` finds can contradict the units or the order of the bands; quicker than judging.

    Args:
        values: `(bands, pixels)` of a pair, none of them out of range.
        highest: of all values of the pair.
        declared: what is said of them.
    """
    if not values.size:
        return True
    if declared.sensor == "optical":
        return highest >= 5 if declared.units == "dn" else not declared.integer
    if declared.units == "linear":
        if values.min() <= 0:
            return False
        values = 10 * np.log10(values)
    means = np.add.reduce(values, axis=1).tolist()
    bands, number = declared.bands, values.shape[1]
    swapped = "VV" in bands and "VH" in bands and means[bands.index("VH")] > means[bands.index("VV")]
    return not swapped and min(means) > -45 * number and max(means) < -3.5 * number


def judge(values: torch.Tensor, declared: Declaration, outside: Outside = NOTHING_OUTSIDE) -> list[Finding]:
    """What looks odd in values that are neither marks nor missing.

    Args:
        values: `(bands, pixels)` on the CPU, finite, in the declared units.
        declared: what is said of them.
        outside: what `odd_values` found out of range in these pixels and others.
    """
    if declared.units == "raw":  # nobody knows what they mean: bands of a picture may each be stretched for themselves
        return []
    return (sar_findings if declared.sensor == "sar" else optical_findings)(values, declared, outside)


def _sampled(pixels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Valid pixels on a regular grid through the batch, `(bands, pixels)`, on the CPU."""
    batch, _, height, width = pixels.shape
    every = math.ceil(batch / SAMPLED_PIXELS)
    step = max(1, math.ceil(math.sqrt(batch * height * width / (every * SAMPLED_PIXELS))))
    sample, there = pixels[::every, :, ::step, ::step].cpu(), valid[::every, ::step, ::step].cpu()
    values = sample.transpose(0, 1)
    return values.flatten(1) if bool(there.all()) else values[:, there]


# --- SAR -------------------------------------------------------------------------------------------------------------


def sar_findings(values: torch.Tensor, declared: Declaration, outside: Outside) -> list[Finding]:
    """What looks odd in SAR: see `judge`."""
    if declared.units == "linear":
        if looks_like_db(values.numpy()):
            seen = "SAR is declared linear, but most values are negative: this looks like dB."
            return [Finding("sar units", seen, "Pass sar_units='db'.", "--sar-units db", impossible=True)]
        backscatter = 10 * torch.log10(values[:, (values > 0).all(dim=0)])
    else:
        backscatter = _in_range(values, declared, outside)
        scattered = outside.number and outside.lowest < outside.highest
        if scattered and (backscatter.numel() == 0 or backscatter.mean() < MEAN_DB[0]):
            return [_sar_scaled(float(values.mean()) if values.numel() else (outside.lowest + outside.highest) / 2)]
    found = [sar_range(outside, declared)] if outside.number else []
    if backscatter.numel() == 0:
        return found
    for sign in (sar_units, sar_scale, sar_normalised):
        if finding := sign(backscatter, declared):
            return [*found, finding]
    return found + [finding for sign in (sar_integers, sar_bands) if (finding := sign(backscatter, declared))]


def _in_range(values: torch.Tensor, declared: Declaration, outside: Outside) -> torch.Tensor:
    """`(bands, pixels)`: the pixels of which no band is outside of `RANGES`."""
    low, high = RANGES[declared.units]
    return values[:, ((values >= low) & (values <= high)).all(dim=0)] if outside.number else values


def sar_range(outside: Outside, declared: Declaration) -> Finding:
    """Some values come from no radar: marks for missing data that nobody knows, or negative power."""
    count, lowest, highest = outside
    low, high = RANGES[declared.units]
    if declared.units == "linear" and highest < low:
        seen = f"SAR is declared linear, but {count:,} values are negative, to {lowest:.4g}: they count as no data."
        return Finding("sar range", seen, "Did noise removal make them, or are some files in dB?", count=count)
    mark = lowest if lowest < low else highest
    units = "dB" if declared.units == "db" else "in linear power"
    return Finding(
        "sar range",
        f"{declared.title}, but {count:,} values, such as {mark:.9g}, are outside of {low:g} to {high:g} {units}, "
        "which is a mark for missing data and no backscatter.",
        f"Load the processor with from_pretrained(<your checkpoint>, sar_nodata={mark:.9g}), or set "
        + ("these pixels to NaN." if lowest == highest else "these and the other such pixels to NaN."),
        f"--sar-no-data={mark:.9g}",
        count=count,
    )


def sar_units(backscatter: torch.Tensor, declared: Declaration) -> Finding | None:
    """Hardly a value in dB is negative. A single crop of a bright town may be so; many pairs are not."""
    if declared.units != "db" or (backscatter < 0).float().mean() > 1e-3:
        return None
    return Finding(
        "sar units",
        f"SAR is declared dB, but no value is negative (mean {backscatter.mean():.4g}): this looks like linear power, "
        "amplitude or 8-bit data.",
        "Power: convert with 10*log10(x), or pass sar_units='linear'. Amplitude: convert with 20*log10(x). 8 bits: "
        "pass sar_units='raw'.",
        "--sar-units linear",
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
    return Finding("sar bands", seen, advice, "--sar-bands", ("VV", "VH"))


# --- optical ---------------------------------------------------------------------------------------------------------


def optical_findings(values: torch.Tensor, declared: Declaration, outside: Outside) -> list[Finding]:
    """What looks odd in optical values: see `judge`."""
    found = [optical_range(outside, declared)] if outside.number else []
    if values.numel() == 0:
        return found
    for contradiction in (optical_normalised, optical_units):
        if finding := contradiction(values, declared):
            return [finding]
    values = _in_range(values, declared, outside)
    for sign in (optical_8_bits, optical_offset) if values.numel() else ():
        if finding := sign(values, declared):
            return [*found, finding]
    return found


def optical_range(outside: Outside, declared: Declaration) -> Finding:
    """Some values come from no sun: marks for missing data that nobody knows, saturated or wrapped numbers."""
    count, lowest, highest = outside
    low, high = RANGES[declared.units]
    mark = lowest if lowest < low else highest
    return Finding(
        "optical range",
        f"{declared.title}, but {count:,} values, such as {mark:.9g}, are outside of {low:g} to {high:g}: they are "
        "a mark for missing data, saturated, or no such units.",
        f"Load the processor with from_pretrained(<your checkpoint>, optical_nodata={mark:.9g}), or mend the files.",
        f"--optical-no-data={mark:.9g}",
        count=count,
    )


def optical_normalised(values: torch.Tensor, declared: Declaration) -> Finding | None:
    """Reflectance goes down to -0.1 where an offset was subtracted; normalised dark pixels lie below -0.5."""
    mean, spread = values.mean(), values.std(correction=0)
    if declared.integer or values.min() >= -0.15 or mean.abs() >= 5 or spread >= 5:
        return None
    return _normalised("Optical", "optical normalised", float(mean), float(spread))


def optical_units(values: torch.Tensor, declared: Declaration) -> Finding | None:
    """Digital numbers, 8 bits or percent are declared reflectance, or reflectance or percent digital numbers."""
    median, largest = values.median(), values.max()
    whole = declared.integer or bool((values == values.round()).all())
    if declared.units == "reflectance":
        too_large = median > 2 or (values > RANGES["reflectance"][1]).float().mean() > 0.25
        if not declared.integer and not too_large:
            return None
        kind = "integers" if declared.integer else "large"
        seen = f"Optical is declared reflectance, but the values are {kind} (median {median:.4g}): this looks like "
        if too_large and largest <= 255 and (whole or largest > PERCENT):
            return Finding("optical units", f"{seen}an 8-bit picture.", _READ_OR_RAW, impossible=True)
        if too_large and largest <= PERCENT:
            return Finding("optical units", f"{seen}percent.", "Divide by 100.", impossible=True)
        return Finding(
            "optical units",
            f"{seen}digital numbers.",
            "Pass optical_units='dn'.",
            "--optical-units dn",
            impossible=True,
        )
    seen = f"Optical is declared digital numbers, but no value exceeds {largest:.3g}: this looks like "
    if not declared.integer and largest < 5:
        advice = "Pass optical_units='reflectance'."
        return Finding("optical units", f"{seen}reflectance.", advice, "--optical-units reflectance")
    if not whole and largest <= PERCENT and values.shape[1] >= FEWEST_PIXELS and not declared.offset:
        advice = "Divide by 100 and pass optical_units='reflectance'."
        return Finding("optical percent", f"{seen}reflectance in percent.", advice)
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
        _READ_OR_RAW,
        "--optical-units raw",
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
                f"--optical-offset {BASELINE_0400_OFFSET}",
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
            "--optical-offset 0",
            bands,
        )
    return None


# --- several scenes together -----------------------------------------------------------------------------------------

DARKNESS = ("dark", "between", "offset", "bright")
"""Where the darkest pixels of a pair lie, in digital numbers as they are stored: below 600, as without an offset;
below 950; up to 1,600, as with one; above that, as under clouds."""


OF_DARKNESS = 200
"""About so many pixels of a pair tell how dark the darkest percent is."""


def darkness(values: np.ndarray, units: str) -> str | None:
    """Where the darkest percent of the pixels lies, `(bands, pixels)`, in the darkest band: one of `DARKNESS`."""
    if units == "raw" or values.shape[1] < FEWEST_PIXELS // 4:
        return None
    values = values[:, :: max(1, values.shape[1] // OF_DARKNESS)]
    at = values.shape[1] // 100
    darkest = float(np.partition(values, at, axis=1)[:, at].min())
    if units == "reflectance":
        darkest *= REFLECTANCE_SCALE
    return DARKNESS[int(np.searchsorted((600, 950, 1600), darkest, side="right"))]


def offsets_mixed(pairs: dict[str, int]) -> Finding | None:
    """The darkest pixels of pairs form two groups, 1,000 digital numbers apart, with hardly a pair in between.

    Args:
        pairs: number of pairs by `DARKNESS`.
    """
    dark, between, offset, bright = (pairs.get(name, 0) for name in DARKNESS)
    total, fewer = dark + between + offset + bright, min(dark, offset)
    if fewer < max(2, 0.1 * total) or 4 * between > fewer or 2 * bright > offset:
        return None
    seen = (
        f"Optical: the darkest pixels form two groups, near 0 in {dark:,} pairs and near {BASELINE_0400_OFFSET} in "
        f"{offset:,}: some scenes seem to carry the offset of processing baseline 04.00, mixed with others without it."
    )
    advice = "Declare it scene by scene (column optical_offset of a manifest), or prepare the two apart."
    return Finding("optical offsets", seen, advice, "--manifest")
