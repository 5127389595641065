"""The land-cover classes of BigEarthNet: 43 of CORINE Land Cover, and the 19 that both versions are evaluated on.

Source: Sumbul et al., "BigEarthNet-MM", IEEE GRSM 2021 (arXiv 2105.07921), and the `label_indices.json` of the
authors' 19-class models.
"""

from collections.abc import Collection

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
