"""Bands, units and band statistics of Sentinel-1 and Sentinel-2: the single source of truth of this package."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

SAR_BANDS = ("VV", "VH")
"""Sentinel-1 interferometric wide swath, dual polarisation: co-polarised, then cross-polarised."""

OPTICAL_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
"""Sentinel-2 Level-2A (surface reflectance): 12 bands. B10 (cirrus) exists in Level-1C alone."""

OPTICAL_BANDS_L1C = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
"""Sentinel-2 Level-1C (top-of-atmosphere reflectance): 13 bands."""

OPTICAL_RESOLUTION = {
    "B01": 60, "B02": 10, "B03": 10, "B04": 10, "B05": 20, "B06": 20, "B07": 20,
    "B08": 10, "B8A": 20, "B09": 60, "B10": 60, "B11": 20, "B12": 20,
}  # fmt: skip
"""Native ground sampling distance of each Sentinel-2 band in metres (ESA, Sentinel-2 MSI user guide)."""

OPTICAL_WAVELENGTH = {
    "B01": 443, "B02": 490, "B03": 560, "B04": 665, "B05": 705, "B06": 740, "B07": 783,
    "B08": 842, "B8A": 865, "B09": 945, "B10": 1375, "B11": 1610, "B12": 2190,
}  # fmt: skip
"""Nominal central wavelength of each Sentinel-2 band in nanometres (ESA, Sentinel-2 MSI user guide)."""

REFLECTANCE_SCALE = 10_000.0
"""Sentinel-2 digital numbers per unit of reflectance (quantification value of the product metadata)."""

BASELINE_0400_OFFSET = 1000
"""Digital numbers added to every band since processing baseline 04.00 (2022-01-25); declare it as `optical_offset`."""

SAR_UNITS = ("db", "linear", "raw")
OPTICAL_UNITS = ("dn", "reflectance", "raw")


@dataclass(frozen=True)
class BandStatistics:
    """Mean and standard deviation of each band of a dataset.

    Attributes:
        sar: `(mean, std)` by band name, in dB.
        optical: `(mean, std)` by band name, in digital numbers (reflectance x 10,000) without any offset.
        source: where the figures come from.
    """

    sar: dict[str, tuple[float, float]]
    optical: dict[str, tuple[float, float]]
    source: str


_BIGEARTHNET_V1_OPTICAL = dict(
    zip(
        OPTICAL_BANDS,
        zip(
            (340.8, 429.9, 614.2, 590.2, 950.7, 1792.5, 2075.5, 2218.9, 2266.5, 2246.1, 1594.4, 1009.3),
            (554.8, 572.4, 582.9, 675.9, 729.9, 1096.0, 1273.5, 1365.5, 1356.1, 1302.3, 1079.2, 818.9),
            strict=True,
        ),
        strict=True,
    )
)

STATISTICS = {
    "bigearthnet": BandStatistics(
        sar={"VV": (-12.620, 5.116), "VH": (-19.290, 5.464)},
        optical=_BIGEARTHNET_V1_OPTICAL,
        source="BigEarthNet v1 (BigEarthNet-MM), L2A",
    ),
    "reben": BandStatistics(
        sar={"VV": (-12.644, 5.133), "VH": (-19.353, 5.591)},
        optical=_BIGEARTHNET_V1_OPTICAL,
        source="SAR: reBEN (BigEarthNet v2); optical: BigEarthNet v1, L2A, to which reBEN is close (B02 438.4)",
    ),
    "ssl4eo-s12-v1.0": BandStatistics(
        sar={"VV": (-12.548, 5.257), "VH": (-20.192, 5.912)}, optical={}, source="SSL4EO-S12 v1.0 (SAR only)"
    ),
    "ssl4eo-s12-v1.1": BandStatistics(
        sar={"VV": (-12.577, 5.179), "VH": (-20.265, 5.872)}, optical={}, source="SSL4EO-S12 v1.1 (SAR only)"
    ),
    "sen12ms": BandStatistics(
        sar={"VV": (-11.769, 4.525), "VH": (-18.295, 4.359)},
        optical={},
        source="SEN12MS, SAR clipped to [-25, 0] dB (SAR only)",
    ),
}
"""Published statistics by dataset name. An empty sensor means that no figure is known: none is guessed."""


def band_indices(wanted: Sequence[str], given: Sequence[str], sensor: str) -> list[int]:
    """Position of each wanted band among the given ones.

    Args:
        wanted: band names in the order in which they are needed.
        given: band names in the order in which they lie in the array.
        sensor: `"sar"` or `"optical"`, for the message.

    Raises:
        ValueError: a name is repeated, or a wanted band is not among the given ones.
    """
    for role, names in (("wanted", wanted), ("given", given)):
        repeated = sorted({name for name in names if list(names).count(name) > 1})
        if repeated:
            raise ValueError(f"{sensor}: band names must be unique, but {role} bands repeat {repeated}: {list(names)}")
    missing = [name for name in wanted if name not in given]
    if missing:
        raise ValueError(
            f"{sensor}: bands {missing} are needed but were not given. Needed, in this order: {list(wanted)}; "
            f"given: {list(given)}. Name the bands of your array in the order in which they lie in it."
        )
    return [list(given).index(name) for name in wanted]


def statistics_for(dataset: str, sensor: str, bands: Sequence[str]) -> tuple[list[float], list[float]]:
    """Means and standard deviations of `bands` of one sensor, in the order given.

    Args:
        dataset: a key of [`STATISTICS`].
        sensor: `"sar"` (dB) or `"optical"` (digital numbers without offset).
        bands: band names.

    Raises:
        ValueError: the dataset is unknown or has no figure for a band.
    """
    if dataset not in STATISTICS:
        raise ValueError(
            f"Unknown statistics {dataset!r}; known: {sorted(STATISTICS)}. Or pass the mean and std yourself."
        )
    known = getattr(STATISTICS[dataset], sensor)
    missing = [band for band in bands if band not in known]
    if missing:
        raise ValueError(
            f"The statistics {dataset!r} hold no {sensor} figure for {missing} (known: {sorted(known) or 'none'}). "
            f"Pass `{sensor}_mean` and `{sensor}_std`, one value a band, computed on your data."
        )
    return [known[band][0] for band in bands], [known[band][1] for band in bands]


KNOWN_BANDS = (*SAR_BANDS, *OPTICAL_BANDS_L1C)


def band_positions(wanted: Sequence[str], given: Sequence[str], what: str) -> list[int]:
    """`band_indices`, whose error also says which band an unknown name may mean."""
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


def sentinel_bands(names: Sequence[str], units: str) -> list[str]:
    """Band names as Sentinel's products spell them: `B2`, `b02` and `B8a` are `B02` and `B8A`, `vv` is `VV`.

    Args:
        names: of the bands of one sensor.
        units: of that sensor; with `"raw"` names are free and stay as they are.
    """
    known = {} if units == "raw" else {_plain(band): band for band in KNOWN_BANDS}
    return [known.get(_plain(name), name) if isinstance(name, str) else name for name in names]


def _plain(name: str) -> str:
    """A band name in small letters, without leading zeros: `B1` and `b01` are one."""
    return re.sub(r"^b(and)?[ _-]?0*(?=\d)", "b", name.casefold())


def offset_problem(offset: float, units: str) -> str:
    """What is wrong with a declared optical offset; empty where nothing is. Raw values may have any."""
    if units == "raw" or offset == 0 or offset >= 1:
        return ""
    return (
        f"the optical offset is {offset:g}, but must say what was added to every value, in digital numbers: 0, or "
        f"{BASELINE_0400_OFFSET} for processing baseline 04.00 and later. Metadata write it with the other sign "
        f"(-1000), or as reflectance (-0.1); state what was added: "
        f"{abs(offset) * (1 if abs(offset) >= 1 else REFLECTANCE_SCALE):g}."
    )
