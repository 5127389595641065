"""The patches of both versions of BigEarthNet: one folder a sensor, one GeoTIFF a band, each in its own resolution."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION, SAR_BANDS
from fusmae_hf.readers.geotiff import Patch, read_geotiff, read_pixels, require_same_footprint

GRID_METRES = 10
"""Pixel of the finest Sentinel-2 bands, and of the grid on which both sensors are given."""

PATCH_METRES = 1200
"""Side of a BigEarthNet patch on the ground."""

PATCH_PIXELS = PATCH_METRES // GRID_METRES
"""Side of a patch on the grid of its 10 m bands: 120."""

OPTICAL_FACTORS = tuple(OPTICAL_RESOLUTION[band] // GRID_METRES for band in OPTICAL_BANDS)
"""By how much each of `OPTICAL_BANDS` is coarser than that grid."""


@dataclass(frozen=True)
class PatchPair:
    """The pixels of a pair, and where they lie.

    Attributes:
        sar: `(2, 120, 120)` float32 backscatter in dB, VV first.
        optical: the 12 Level-2A bands in the order of `OPTICAL_BANDS`, uint16 digital numbers: `(120, 120)`,
            `(60, 60)` or `(20, 20)`.
        crs: `EPSG:<code>` or WKT, None where the files carry none.
        transform: (a, b, c, d, e, f) of the 10 m grid in rasterio's order, or None.
    """

    sar: np.ndarray
    optical: NativeBands
    crs: str | None
    transform: tuple[float, ...] | None


def read_map(path: Path) -> np.ndarray:
    """Read a reference map: `(120, 120)` uint16."""
    return read_pixels(path, (PATCH_PIXELS, PATCH_PIXELS), "uint16")


def read_patches(sar_folder: Path, optical_folder: Path) -> PatchPair:
    """Read both patches of a pair: `<folder>/<folder name>_<band>.tif` for each band.

    Raises:
        PairError: a band is missing, unreadable, or has another size or dtype; or the two patches lie apart.
    """
    backscatter, sar = _read_bands(sar_folder, SAR_BANDS, (1,) * len(SAR_BANDS), "float32")
    numbers, optical = _read_bands(optical_folder, OPTICAL_BANDS, OPTICAL_FACTORS, "uint16")
    require_same_footprint(sar_folder, sar, optical_folder, optical)
    return PatchPair(np.stack(backscatter), NativeBands(numbers, OPTICAL_FACTORS), optical.crs, optical.transform)


def expanded(pair: Pair) -> Pair:
    """The same pair, its `NativeBands` brought onto the finest grid."""
    return replace(pair, optical=pair.optical.expand()) if isinstance(pair.optical, NativeBands) else pair


def _read_bands(
    folder: Path, bands: Sequence[str], factors: Sequence[int], dtype: str
) -> tuple[list[np.ndarray], Patch]:
    """The bands of a patch, and the first 10 m band among them with its place, which is that of all."""
    stem = folder / folder.name
    paths = [f"{stem}_{band}.tif" for band in bands]
    sizes = [(PATCH_PIXELS // factor, PATCH_PIXELS // factor) for factor in factors]
    finest = list(factors).index(1)
    placed = read_geotiff(paths[finest], count=1, size=sizes[finest], dtype=dtype)
    values = [
        placed.values[0] if number == finest else read_pixels(path, size, dtype)
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
    return values, placed
