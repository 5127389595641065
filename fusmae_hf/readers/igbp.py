"""The land-cover classes of SEN12MS and DFC2020: IGBP, and the ten classes to which both simplify it.

Names and codes of IGBP: Sulla-Menashe and Friedl, "User Guide to Collection 6 MODIS Land Cover (MCD12Q1 and MCD12C1)
Product", 2018, table 3. The ten classes and their members: Robinson et al., "Global Land-Cover Mapping With Weak
Supervision: Outcome of the 2020 IEEE GRSS Data Fusion Contest", IEEE JSTARS 2021; Schmitt and Wu, "Remote Sensing
Image Classification with the SEN12MS Dataset", ISPRS Annals 2021 (arXiv 2104.00704). Colours: those of the MODIS
product, as the contest uses them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fusmae_hf.errors import PairError

IGBP_CLASSES = (
    "Evergreen Needleleaf Forests",
    "Evergreen Broadleaf Forests",
    "Deciduous Needleleaf Forests",
    "Deciduous Broadleaf Forests",
    "Mixed Forests",
    "Closed Shrublands",
    "Open Shrublands",
    "Woody Savannas",
    "Savannas",
    "Grasslands",
    "Permanent Wetlands",
    "Croplands",
    "Urban and Built-up Lands",
    "Cropland/Natural Vegetation Mosaics",
    "Permanent Snow and Ice",
    "Barren",
    "Water Bodies",
)
"""The 17 classes of IGBP in the order of their codes, which start at 1."""

SIMPLIFIED_CLASSES = (
    "Forest",
    "Shrubland",
    "Savanna",
    "Grassland",
    "Wetlands",
    "Croplands",
    "Urban/Built-up",
    "Snow/Ice",
    "Barren",
    "Water",
)
"""The ten classes of simplified IGBP and of DFC2020 in the order of their codes, which start at 1."""

IGBP_COLOURS = (
    "#05450a", "#086a10", "#54a708", "#78d203", "#009900", "#c6b044", "#dcd159", "#dade48", "#fbff13", "#b6ff05",
    "#27ff87", "#c24f44", "#a5a5a5", "#ff6d4c", "#69fff8", "#f9ffa4", "#1c0dff",
)  # fmt: skip
"""Colour of each of `IGBP_CLASSES`."""

SIMPLIFIED_COLOURS = (
    "#009900", "#c6b044", "#fbff13", "#b6ff05", "#27ff87", "#c24f44", "#a5a5a5", "#69fff8", "#f9ffa4", "#1c0dff",
)  # fmt: skip
"""Colour of each of `SIMPLIFIED_CLASSES`."""

NO_CLASS = 255
"""Marks pixels without a class in the maps that [`class_indices`] makes."""

_SIMPLIFIED_CODES = (1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10)  # of the IGBP codes 1 to 17
_UNLABELLED = {0: NO_CLASS, 255: NO_CLASS}  # 255 is "unclassified" in the MODIS product

IGBP_OF_IGBP = {code: code - 1 for code in range(1, 18)} | _UNLABELLED
"""Index into `IGBP_CLASSES` of each IGBP code."""

SIMPLIFIED_OF_IGBP = {code: simple - 1 for code, simple in enumerate(_SIMPLIFIED_CODES, start=1)} | _UNLABELLED
"""Index into `SIMPLIFIED_CLASSES` of each IGBP code."""

SIMPLIFIED_OF_DFC = {code: code - 1 for code in range(1, 11)} | _UNLABELLED
"""Index into `SIMPLIFIED_CLASSES` of each code of a DFC2020 label map."""


def class_indices(codes: np.ndarray, index_of: Mapping[int, int], path: Path) -> np.ndarray:
    """Turn the codes of a label file into indices of classes, which start at 0.

    Args:
        codes: `(height, width)` integers.
        index_of: index of each code, such as `SIMPLIFIED_OF_IGBP`; all at most 255.
        path: the file, for the message.

    Returns:
        `(height, width)` uint8; `NO_CLASS` where the file holds no class (codes 0 and 255).

    Raises:
        PairError: the file holds other codes; names them.
    """
    unknown = sorted(set(np.unique(codes).tolist()) - index_of.keys())
    if unknown:
        classes = sorted(code for code, index in index_of.items() if index != NO_CLASS)
        raise PairError(
            f"{path}: holds the codes {unknown[:8]}{' ...' if len(unknown) > 8 else ''}, but land cover has the codes "
            f"{classes[0]} to {classes[-1]}, and 0 or 255 without a class. Is it another product? Unpack it again."
        )
    table = np.empty(256, dtype=np.uint8)
    table[list(index_of)] = list(index_of.values())
    return table[codes]
