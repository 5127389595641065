"""What both versions of BigEarthNet share: the layout of their patches, one GeoTIFF a band, and their classes.

Source of the classes: Sumbul et al., "BigEarthNet-MM", IEEE GRSM 2021 (arXiv 2105.07921), and the `label_indices.json`
of the authors' 19-class models.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION, SAR_BANDS
from fusmae_hf.readers.geotiff import Patch, read_geotiff, read_pixels, require_same_footprint
from fusmae_hf.readers.listed_pairs import ListedPairs

GRID_METRES = 10
"""Pixel of the finest Sentinel-2 bands, and of the grid on which both sensors are given."""

PATCH_METRES = 1200
"""Side of a BigEarthNet patch on the ground."""

PATCH_PIXELS = PATCH_METRES // GRID_METRES
"""Side of a patch on the grid of its 10 m bands: 120."""

OPTICAL_FACTORS = tuple(OPTICAL_RESOLUTION[band] // GRID_METRES for band in OPTICAL_BANDS)
"""By how much each of `OPTICAL_BANDS` is coarser than that grid."""


CLASSES_43 = (
    "Continuous urban fabric",
    "Discontinuous urban fabric",
    "Industrial or commercial units",
    "Road and rail networks and associated land",
    "Port areas",
    "Airports",
    "Mineral extraction sites",
    "Dump sites",
    "Construction sites",
    "Green urban areas",
    "Sport and leisure facilities",
    "Non-irrigated arable land",
    "Permanently irrigated land",
    "Rice fields",
    "Vineyards",
    "Fruit trees and berry plantations",
    "Olive groves",
    "Pastures",
    "Annual crops associated with permanent crops",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland",
    "Moors and heathland",
    "Sclerophyllous vegetation",
    "Transitional woodland/shrub",
    "Beaches, dunes, sands",
    "Bare rock",
    "Sparsely vegetated areas",
    "Burnt areas",
    "Inland marshes",
    "Peatbogs",
    "Salt marshes",
    "Salines",
    "Intertidal flats",
    "Water courses",
    "Water bodies",
    "Coastal lagoons",
    "Estuaries",
    "Sea and ocean",
)
"""CORINE Land Cover level 3 as BigEarthNet v1 labels it, in the official order."""

CLASSES_19 = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)
"""The 19-class nomenclature, in the official order (not alphabetical)."""

_MEMBERS = (
    (0, 1), (2,), (11, 12, 13), (14, 15, 16, 18), (17,), (19,), (20,), (21,), (22,), (23,), (24,), (25, 31), (26, 27),
    (28,), (29,), (33, 34), (35, 36), (38, 39), (40, 41, 42),
)  # fmt: skip

CLASS_19_OF_43: dict[str, str | None] = dict.fromkeys(CLASSES_43) | {
    CLASSES_43[member]: CLASSES_19[target] for target, members in enumerate(_MEMBERS) for member in members
}
"""The 19-class name of each of the 43 classes; None for the eleven that the nomenclature drops."""


class NativePairs(ListedPairs):
    """Pairs whose optical bands are read in their own resolution: `NativeBands`."""

    def read(self, index: int) -> Pair:
        """Read one pair with all bands on the 10 m grid, the pixels of the coarser ones repeated: see the class.

        Raises:
            PairError: a file is missing, unreadable or not as described, or the two patches lie apart; names it.
        """
        pair = self._read(index)
        assert isinstance(pair.optical, NativeBands)
        return replace(pair, optical=pair.optical.expand())

    def read_native(self, index: int) -> Pair:
        """As `read`, but `optical` is `NativeBands`: each band in its own resolution, as files and shards hold it."""
        return self._read(index)


def read_map(path: Path) -> np.ndarray:
    """Read a reference map: `(120, 120)` uint16."""
    return read_pixels(path, (PATCH_PIXELS, PATCH_PIXELS), "uint16")


def read_patches(name: str, sar_folder: Path, optical_folder: Path) -> Pair:
    """Read both patches of a pair, `<folder>/<folder name>_<band>.tif` for each band: pixels and place.

    Returns:
        Pair `name`: `sar` (2, 120, 120) float32 backscatter in dB, VV first; `optical` the 12 bands of Level-2A as
        `NativeBands`, uint16 digital numbers.

    Raises:
        PairError: a band is missing, unreadable, or has another size or dtype; or the two patches lie apart.
    """
    backscatter, sar = _read_bands(sar_folder, SAR_BANDS, (1,) * len(SAR_BANDS), "float32")
    numbers, optical = _read_bands(optical_folder, OPTICAL_BANDS, OPTICAL_FACTORS, "uint16")
    require_same_footprint(sar_folder, sar, optical_folder, optical)
    bands = NativeBands(numbers, OPTICAL_FACTORS)
    return Pair(name, np.stack(backscatter), bands, crs=optical.crs, transform=optical.transform)


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


def classes_19(labels: Collection[str]) -> list[str]:
    """Map 43-class labels to the 19 classes.

    Args:
        labels: names out of [`CLASSES_43`].

    Returns:
        Names out of [`CLASSES_19`], each once, in the official order; empty where all are dropped.

    Raises:
        ValueError: a label is none of the 43.
    """
    unknown = [label for label in labels if label not in CLASS_19_OF_43]
    if unknown:
        raise ValueError(f"labels {unknown} are none of the 43 classes of BigEarthNet v1 (see `CLASSES_43`)")
    kept = {CLASS_19_OF_43[label] for label in labels}
    return [name for name in CLASSES_19 if name in kept]
