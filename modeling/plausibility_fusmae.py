"""Signs that values or band names are not what is declared: other units, swapped bands, a wrong offset, a typing slip.

Thresholds are physical limits with a margin, so that water, snow, shadow, night and tiny crops pass without a word.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .sensors_fusmae import BASELINE_0400_OFFSET, OPTICAL_BANDS_L1C, REFLECTANCE_SCALE, SAR_BANDS, band_indices

SAMPLED_PIXELS = 4096
"""At most so many pixels of a batch are looked at, on a regular grid: a patch of 64x64 px is seen whole."""

ACCELERATOR_LOOKS = 4
"""Each look stalls an accelerator, so that only the first few batches of a declaration are looked at there."""

FEWEST_PIXELS = 256
"""Fewer pixels, as in tiny crops, say nothing about the spread of values or about how dark a scene is."""

LOWEST_DB = -200.0
"""Lower values are no backscatter but a mark, such as -9999, or scaled."""

DB_RANGE = (-60.0, 20.0)
"""Where the mean of a batch in dB lies; single bright targets may exceed it."""

KNOWN_BANDS = (*SAR_BANDS, *OPTICAL_BANDS_L1C)

NORMALISED = (
    "looks normalised already: load the processor with from_pretrained(..., do_normalize=False), or pass the tensors "
    "to the model."
)


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


class Plausibility:
    """Looks at batches and tells each kind of sign once for each declaration.

    On the CPU every batch is looked at. On an accelerator the first `ACCELERATOR_LOOKS` of each declaration are.
    """

    def __init__(self) -> None:
        self._looks: dict[Declaration, int] = {}
        self._told: set[tuple[Declaration, str]] = set()

    def look(self, pixels: torch.Tensor, valid: torch.Tensor, declared: Declaration) -> list[str]:
        """Signs not yet told, as messages.

        Args:
            pixels: `(batch, bands, height, width)` float32 in the declared units, bands as in `declared.bands`.
            valid: `(batch, height, width)` bool, where there is data.
            declared: what is said of the pixels.

        Raises:
            ValueError: the values cannot be in the declared units.
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
            found = optical_signs(values, declared) if values.numel() else {}
        else:
            found = sar_signs(values, declared, _marks(pixels, valid, values, declared))
        new = {topic: message for topic, message in found.items() if (declared, topic) not in self._told}
        self._told.update((declared, topic) for topic in new)
        return list(new.values())


def _sampled(pixels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Valid pixels on a regular grid through the batch, `(bands, pixels)`, on the CPU."""
    batch, _, height, width = pixels.shape
    every = math.ceil(batch / SAMPLED_PIXELS)
    step = max(1, math.ceil(math.sqrt(batch * height * width / (every * SAMPLED_PIXELS))))
    sample, there = pixels[::every, :, ::step, ::step].cpu(), valid[::every, ::step, ::step].cpu()
    values = sample.transpose(0, 1)
    return values.flatten(1) if bool(there.all()) else values[:, there]


def _marks(pixels: torch.Tensor, valid: torch.Tensor, values: torch.Tensor, declared: Declaration) -> torch.Tensor:
    """Values in dB below `LOWEST_DB`; on the CPU all of them, since a few that the sample misses would do harm."""
    if declared.units != "db":
        return values.new_empty(0)
    if pixels.device.type != "cpu":
        return values[values < LOWEST_DB]
    below = pixels < LOWEST_DB
    return pixels[below & valid[:, None]] if bool(below.any()) else values.new_empty(0)


def sar_signs(values: torch.Tensor, declared: Declaration, marks: torch.Tensor) -> dict[str, str]:
    """Messages by topic about SAR `values` `(bands, pixels)` in linear power or dB, and `marks` below `LOWEST_DB`."""
    whole = values[:, (values >= LOWEST_DB).all(dim=0)]
    if declared.units == "linear":
        if whole.numel() and (whole < 0).float().mean() > 0.5:
            raise ValueError(
                "SAR is declared linear, but most values are negative: this looks like dB. Pass sar_units='db'."
            )
        whole = 10 * torch.log10(whole[:, (whole > 0).all(dim=0)])
    signs = {}
    if marks.numel():
        lowest = float(marks.min())
        one_mark = lowest == float(marks.max())
        if not one_mark and (whole.numel() == 0 or whole.mean() < DB_RANGE[0]):
            return {"sar scale": _scaled(values if values.numel() else marks)}
        signs["sar no data"] = (
            f"SAR is declared dB, but some values are as low as {lowest:.9g}, which is a mark for missing data and no "
            f"backscatter. Load the processor with from_pretrained(<your checkpoint>, sar_nodata={lowest:.9g})"
            + (", or set these pixels to NaN." if one_mark else ", and set the other such pixels to NaN.")
        )
    if whole.numel() == 0:
        return signs
    mean, std, spread = whole.mean(dim=1), whole.std(dim=1, correction=0), whole.std(correction=0)
    if declared.units == "db" and whole.min() >= 0:
        signs["sar units"] = (
            f"SAR is declared dB, but no value is negative (mean {whole.mean():.4g}): this looks like linear power or "
            "8-bit data. Pass sar_units='linear' or 'raw'."
        )
        return signs
    if not DB_RANGE[0] <= whole.mean() <= DB_RANGE[1]:
        return signs | {"sar scale": _scaled(whole)}
    many, both_signs = whole.shape[1] >= FEWEST_PIXELS, whole.min() < 0 < whole.max()
    if many and whole.mean().abs() < 1 and 0 < spread < 0.1:
        signs["sar scale"] = (
            f"SAR is declared dB, but all values are nearly the same (mean {whole.mean():.4g}, standard deviation "
            f"{spread:.2g}). Were they divided by {REFLECTANCE_SCALE:,.0f} like digital numbers? Pass dB."
        )
    elif many and both_signs and mean.abs().max() < 3 and std.min() >= 0.1 and std.max() < 2:
        signs["sar normalised"] = f"SAR (mean {whole.mean():.2f}, standard deviation {spread:.2f}) {NORMALISED}"
    else:
        if declared.integer and declared.units == "db":
            signs["sar integers"] = (
                f"SAR is declared dB, but comes in {str(declared.dtype).removeprefix('torch.')}: the fraction of each "
                "dB is lost. Keep backscatter in floating point from the file on."
            )
        signs |= _swapped(mean.tolist(), declared.bands)
    return signs


def _scaled(values: torch.Tensor) -> str:
    return (
        f"SAR has a mean of {values.mean():.5g} dB, but backscatter lies between {DB_RANGE[0]:g} and {DB_RANGE[1]:g} "
        "dB. Were dB multiplied by 100 to store them as integers, or were digital numbers never calibrated? Undo the "
        "scaling in floating point before the processor; linear power needs sar_units='linear'."
    )


def _swapped(mean: Sequence[float], bands: Sequence[str]) -> dict[str, str]:
    """VV exceeds VH by 6 to 7 dB in the mean; 1 dB is left for the noise floor over calm water."""
    if "VV" not in bands or "VH" not in bands:
        return {}
    co, cross = mean[bands.index("VV")], mean[bands.index("VH")]
    if cross <= co + 1:
        return {}
    return {
        "sar bands": f"SAR: mean VH ({cross:.1f} dB) exceeds mean VV ({co:.1f} dB), which hardly ever happens. Are "
        "the bands swapped? Pass sar_bands=[...] in the order of your array."
    }


def optical_signs(values: torch.Tensor, declared: Declaration) -> dict[str, str]:
    """Messages by topic about optical `values` `(bands, pixels)`, reflectance or digital numbers."""
    mean, spread, largest = values.mean(), values.std(correction=0), values.max()
    # Reflectance goes down to -0.1 where an offset was subtracted; normalised values of dark pixels lie below -0.5.
    if not declared.integer and values.min() < -0.15 and mean.abs() < 5 and spread < 5:
        return {"optical normalised": f"Optical (mean {mean:.2f}, standard deviation {spread:.2f}) {NORMALISED}"}
    if declared.units == "reflectance":
        if declared.integer or mean > 10:
            raise ValueError(
                f"Optical is declared reflectance, but the values are {'integers' if declared.integer else 'large'} "
                f"(mean {mean:.4g}): this looks like digital numbers. Pass optical_units='dn'."
            )
        return _offset_signs(values * REFLECTANCE_SCALE, declared)
    if not declared.integer and largest < 5:
        return {
            "optical units": f"Optical is declared digital numbers, but no value exceeds {largest:.3g}: this looks "
            "like reflectance. Pass optical_units='reflectance'."
        }
    # A lake is as dark as a picture of 8 bits, but even.
    dark = values.shape[1] >= FEWEST_PIXELS and largest < 300 and values.std(dim=1, correction=0).mean() > 20
    if declared.dtype == torch.uint8 or dark:
        return {
            "optical 8 bits": "Optical is declared digital numbers (reflectance x 10,000), but "
            + ("comes in uint8" if declared.dtype == torch.uint8 else f"no value exceeds {largest:.4g}")
            + ": this looks like an 8-bit picture. Read the bands of the product; for 8-bit data, make a processor "
            "with optical_units='raw' and the mean and std of your data."
        }
    return _offset_signs(values, declared)


def _offset_signs(values: torch.Tensor, declared: Declaration) -> dict[str, str]:
    """Whether an offset looks forgotten or declared in vain; values in digital numbers with offset."""
    offset, margin = declared.offset, 0.9 * BASELINE_0400_OFFSET
    visible = [declared.bands.index(band) for band in ("B02", "B03", "B04") if band in declared.bands]
    if not visible:
        return {}
    # Snow is dark in the short-wave infrared; thick cloud and salt are bright everywhere, which tells nothing.
    many = values.shape[1] >= FEWEST_PIXELS
    if many and offset < BASELINE_0400_OFFSET and (values < offset + margin).float().mean(dim=1).max() <= 0.01:
        darkest = torch.quantile(values[visible].flatten(), 0.01)
        if darkest < offset + 1.6 * BASELINE_0400_OFFSET:
            return {
                "optical offset forgotten": f"Optical: with an offset of {offset:g}, even the darkest 1 % of B02, B03 "
                f"and B04 is at {darkest:.0f}. Products of processing baseline 04.00 and later carry "
                f"+{BASELINE_0400_OFFSET}: pass optical_offset={BASELINE_0400_OFFSET} if yours do."
            }
    # Atmospheric correction takes deep shadow and water a little below zero reflectance.
    below = float((values[visible] < 0.9 * offset).float().mean(dim=1).max()) if offset > 0 else 0.0
    if below > 0.05:
        return {
            "optical offset in vain": f"Optical: in a visible band, {below:.0%} of the pixels lie below the declared "
            f"offset of {offset:g}. Was the offset subtracted already, or does the product not carry it? Then pass "
            "optical_offset=0."
        }
    return {}


def band_positions(wanted: Sequence[str], given: Sequence[str], what: str) -> list[int]:
    """`sensors_fusmae.band_indices`, whose error also says which band an unknown name may mean."""
    try:
        return band_indices(wanted, given, what)
    except ValueError as error:
        missing = [name for name in wanted if name not in given]
        raise ValueError(f"{error}{did_you_mean(given, missing)}") from None


def did_you_mean(names: Sequence[str], needed: Sequence[str] = KNOWN_BANDS) -> str:
    """A sentence for each name that is no known band but near to one that is needed."""
    known = {_plain(name): name for name in (*KNOWN_BANDS, *needed) if isinstance(name, str)}
    sentences = []
    for name in (name for name in names if isinstance(name, str)):
        near = difflib.get_close_matches(_plain(name), known, n=1) if name not in known.values() else []
        if near and known[near[0]] in needed:
            sentences.append(f" {name!r}: did you mean {known[near[0]]!r}?")
    return "".join(sentences)


def _plain(name: str) -> str:
    """A band name in small letters, without leading zeros: `B1` and `b01` are one."""
    return re.sub(r"^b(and)?[ _-]?0*(?=\d)", "b", name.casefold())
