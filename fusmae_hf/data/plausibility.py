"""Do the values look like the declared units, offset and band order? Asked before anything is written."""

import warnings
from collections.abc import Sequence

import numpy as np

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import BASELINE_0400_OFFSET

_VISIBLE_BANDS = ("B02", "B03", "B04")


def check_plausible(pairs: Sequence[Pair], info: PairsInfo) -> None:
    """Compare values with the declared units, offset and band order.

    Warns (`UserWarning`) where

    - the mean of VH is above the mean of VV: VV is some 6 to 7 dB brighter, so the bands look swapped;
    - 99 % of the blue, green and red digital numbers are 1000 or more although no offset is declared: the data look
      like processing baseline 04.00 or later, which adds 1000;
    - most of them are below the declared offset: it looks as if none had been added.

    Args:
        pairs: some pairs of the dataset.
        info: what is declared.

    Raises:
        ValueError: SAR is declared in dB but has no negative value, or as linear power but has negative ones.
    """
    over = f"over {len(pairs)} pairs of {info.name}"
    backscatter = {
        band: _finite(np.concatenate([pair.sar[index].ravel() for pair in pairs]))
        for index, band in enumerate(info.sar_bands)
    }
    lowest = min(values.min() for values in backscatter.values() if values.size)
    if info.sar_units == "db" and lowest >= 0:
        raise ValueError(
            f"SAR is declared in dB, but {over} no value is negative (lowest {lowest:g}): this looks like linear "
            "power. Convert the files with 10*log10(x), or declare `sar_units` as 'linear'."
        )
    if info.sar_units == "linear" and lowest < 0:
        raise ValueError(
            f"SAR is declared as linear power, but {over} there are negative values (lowest {lowest:g}): this looks "
            "like dB. Declare `sar_units` as 'db'."
        )
    vv, vh = (float(np.mean(backscatter[band])) if band in backscatter else np.nan for band in ("VV", "VH"))
    if vh > vv:
        warnings.warn(
            f"Bands swapped? VH (mean {vh:.2f} {over}) is brighter than VV (mean {vv:.2f}), but in nature VV is "
            "brighter almost everywhere. Check which file or band is which.",
            stacklevel=2,
        )
    visible = [info.optical_bands.index(band) for band in _VISIBLE_BANDS if band in info.optical_bands]
    if info.optical_units != "dn" or not visible:
        return
    values = np.concatenate([_values_with_data(pair)[visible].ravel() for pair in pairs])
    low, middle = np.percentile(_finite(values), (1, 50))
    if info.optical_offset == 0 and low >= BASELINE_0400_OFFSET:
        warnings.warn(
            f"Offset forgotten? 99 % of the values of B02 to B04 {over} are {low:.0f} or more, as if "
            f"{BASELINE_0400_OFFSET} had been added (processing baseline 04.00 and later). If so, declare it with "
            f"`--optical-offset {BASELINE_0400_OFFSET}` (`optical_offset` in Python).",
            stacklevel=2,
        )
    if middle < info.optical_offset:
        warnings.warn(
            f"Offset declared in vain? Half of the values of B02 to B04 {over} are below {middle:.0f}, less than the "
            f"declared offset {info.optical_offset:g}. If none was added, drop `--optical-offset`.",
            stacklevel=2,
        )


def _values_with_data(pair: Pair) -> np.ndarray:
    """`(bands, pixels)` of the optical patch, without the pixels that are zero in all bands."""
    optical = pair.optical.expand() if isinstance(pair.optical, NativeBands) else pair.optical
    return optical[:, (optical != 0).any(axis=0)]


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
