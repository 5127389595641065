"""Reader of DFC2020: 6,114 pairs of Sentinel-1 and Sentinel-2 patches of seven places with land-cover maps of 10 m.

The data of the IEEE GRSS Data Fusion Contest 2020, in the format of SEN12MS. Papers: Yokoya et al., "2020 Data Fusion
Contest", IEEE GRSM 2020; Robinson et al., "Global Land-Cover Mapping With Weak Supervision: Outcome of the 2020 IEEE
GRSS Data Fusion Contest", IEEE JSTARS 2021. Data: https://doi.org/10.21227/rha7-m332. Licence: CC-BY-4.0.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.plots.maps import plot_with_label_map
from fusmae_hf.readers.geotiff import read_geotiff, require_folders, require_rasterio, require_same_footprint
from fusmae_hf.readers.igbp import (
    NO_CLASS,
    SIMPLIFIED_CLASSES,
    SIMPLIFIED_COLOURS,
    SIMPLIFIED_OF_DFC,
    SIMPLIFIED_OF_IGBP,
    class_indices,
)
from fusmae_hf.readers.sen12ms import MAP_DTYPES, PATCH_SIZE, read_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLIT_FOLDERS = {"validation": ("ROIs0000_validation", "validation"), "test": ("ROIs0000_test", "0")}
"""Folder of each split, and how the names of the folders in it end: `s1_validation`, but `s1_0`."""

NUM_PAIRS = {"validation": 986, "test": 5_128}

_MAPS = {"dfc": (1, SIMPLIFIED_OF_DFC), "lc": (4, SIMPLIFIED_OF_IGBP)}
"""Number of bands of a label file, and index of the class of each code in its first one."""


class DFC2020:
    """Pairs of DFC2020 that are on disk.

    A pair is named as its files are, less the kind: `ROIs0000_test_0_p7` is `ROIs0000_test_s1_0_p7.tif`, and the same
    with `s2`, `lc` and `dfc`. `sar` is backscatter in dB, (VV, VH), in the dtype of the file (float32 in the archive);
    `optical` is uint16 digital numbers of Level-1C, all 13 bands on the 10 m grid of 256x256 pixels, from before
    baseline 04.00: no offset. There are no scene labels.

    `label_map` (256, 256) uint8 holds indices into the ten classes in the official order: 0 is Forest (code 1 in the
    files), 9 is Water (code 10), 255 is no class (codes 0 and 255). Savanna and Snow/Ice do not occur in the maps of
    10 m. Pairs whose label file is not there have none: the contest first withheld those of the test.

    Args:
        root: folder that holds `ROIs0000_validation/` and `ROIs0000_test/`, or one of them.
        label_map: `"dfc"` for the land cover of 10 m made for the contest, `"lc"` for MODIS land cover of 500 m, its
            IGBP classes mapped to the same ten.

    Raises:
        FileNotFoundError: a folder is missing; says where it was searched.
        ValueError: no pair is complete, or `label_map` is unknown.
        ImportError: rasterio is missing.
    """

    def __init__(self, root: str | Path, *, label_map: Literal["dfc", "lc"] = "dfc"):
        require_rasterio()
        if label_map not in _MAPS:
            raise ValueError(f"label_map is {label_map!r}, but must be 'dfc' or 'lc'.")
        self.root = Path(root)
        self._map_kind = label_map
        self.info = PairsInfo(
            name="dfc2020",
            source="DFC2020, Sentinel-1 GRD and Sentinel-2 L1C (Robinson et al. 2021, doi 10.21227/rha7-m332)",
            license="CC-BY-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS_L1C,
            map_class_names=SIMPLIFIED_CLASSES,
            map_no_data=NO_CLASS,
        )
        self.ids: list[str] = []
        self._splits: list[str] = []
        self._left_out: list[tuple[str, str]] = []
        self._with_map: set[str] = set()
        present = [split for split, (folder, _) in SPLIT_FOLDERS.items() if (self.root / folder).is_dir()]
        if not present:
            require_folders(self.root, [folder for folder, _ in SPLIT_FOLDERS.values()], "DFC2020")
        for split in present:
            folder, ending = SPLIT_FOLDERS[split]
            require_folders(self.root / folder, [f"s1_{ending}", f"s2_{ending}"], "DFC2020")
            sar, optical = self._names(split, "s1"), self._names(split, "s2")
            self._left_out += [(name, "its Sentinel-2 file is missing") for name in sorted(sar - optical)]
            self._left_out += [(name, "its Sentinel-1 file is missing") for name in sorted(optical - sar)]
            pairs = sorted(sar & optical)
            self.ids += pairs
            self._splits += [split] * len(pairs)
            self._with_map |= self._names(split, label_map).intersection(pairs)
        if not self.ids:
            raise ValueError(
                f"DFC2020: no pair to read in {self.root}, {len(self._left_out):,} patches of one sensor alone were "
                "found. Expected ROIs0000_test/s1_0/ROIs0000_test_s1_0_p<patch>.tif, and the same for s2, as in the "
                "official archive."
            )
        counts = Counter(self._splits)
        found = " and ".join(f"{counts[split]:,} of the {NUM_PAIRS[split]:,} {split} pairs" for split in present)
        self.summary = f"Found {found} in {self.root}, {len(self._with_map):,} of them with a {label_map} label map."

    def _names(self, split: str, kind: str) -> set[str]:
        """Names of the pairs of a split of which there is a file of one kind (s1, s2, lc or dfc)."""
        folder, ending = SPLIT_FOLDERS[split]
        above = self.root / folder / f"{kind}_{ending}"
        pattern = re.compile(rf"{folder}_{kind}_([a-z0-9]+_p\d+)\.tif")
        matches = map(pattern.fullmatch, os.listdir(above) if above.is_dir() else ())
        return {f"{folder}_{match[1]}" for match in matches if match}

    def __len__(self) -> int:
        return len(self.ids)

    def split_of(self, index: int) -> str | None:
        """`"validation"` or `"test"`: the folder of the pair. Nothing of DFC2020 is for training."""
        return self._splits[index]

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Patches of one sensor whose partner is missing, with the reason."""
        return iter(self._left_out)

    def read(self, index: int) -> Pair:
        """Read one pair.

        Returns:
            `sar` (2, 256, 256) float dB, `optical` (13, 256, 256) uint16 digital numbers, `label_map` (256, 256) uint8
            or None, and place. The files carry no acquisition time.

        Raises:
            PairError: a file is missing or unreadable, has a wrong size, dtype or code, or the patches lie apart.
        """
        name = self.ids[index]
        sar_path, optical_path = self._path(index, "s1"), self._path(index, "s2")
        sar, optical = read_patches(sar_path, optical_path)
        label_map: np.ndarray | None = None
        if name in self._with_map:
            path, (count, index_of) = self._path(index, self._map_kind), _MAPS[self._map_kind]
            codes = read_geotiff(path, count=count, size=PATCH_SIZE, dtype=MAP_DTYPES)
            require_same_footprint(path, codes, optical_path, optical)
            label_map = class_indices(codes.values[0], index_of, path)
        return Pair(
            id=name,
            sar=sar.values,
            optical=optical.values,
            label_map=label_map,
            split=self._splits[index],
            crs=optical.crs,
            transform=optical.transform,
        )

    def _path(self, index: int, kind: str) -> Path:
        folder, ending = SPLIT_FOLDERS[self._splits[index]]
        patch = self.ids[index].removeprefix(f"{folder}_")
        return self.root / folder / f"{kind}_{ending}" / f"{folder}_{kind}_{patch}.tif"

    def plot(self, pair: Pair) -> "Figure":
        """Draw a pair: true colour, VV and VH in dB, and its land cover if it has any. Needs matplotlib."""
        return plot_with_label_map(pair, self.info, colours=SIMPLIFIED_COLOURS)
