"""Reader of DFC2020: 6,114 pairs of Sentinel-1 and Sentinel-2 patches of seven places with land-cover maps of 10 m.

The data of the IEEE GRSS Data Fusion Contest 2020, in the format of SEN12MS. Papers: Yokoya et al., "2020 Data Fusion
Contest", IEEE GRSM 2020; Robinson et al., "Global Land-Cover Mapping With Weak Supervision: Outcome of the 2020 IEEE
GRSS Data Fusion Contest", IEEE JSTARS 2021. Data: https://doi.org/10.21227/rha7-m332. Licence: CC-BY-4.0.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Literal

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.listed_pairs import ListedPairs, require_folders, require_one_of
from fusmae_hf.readers.sen12ms import (
    NO_CLASS,
    SIMPLIFIED_CLASSES,
    SIMPLIFIED_OF_DFC,
    SIMPLIFIED_OF_IGBP,
    class_indices,
    read_patches,
)

SPLIT_FOLDERS = {"validation": ("ROIs0000_validation", "validation"), "test": ("ROIs0000_test", "0")}
"""Folder of each split, and how the names of the folders in it end: `s1_validation`, but `s1_0`."""

NUM_PAIRS = {"validation": 986, "test": 5_128}

_MAPS = {"dfc": (1, SIMPLIFIED_OF_DFC), "lc": (4, SIMPLIFIED_OF_IGBP)}
"""Number of bands of a label file, and index of the class of each code in its first one."""


class DFC2020(ListedPairs):
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
        super().__init__(root)
        require_one_of("label_map", label_map, _MAPS)
        self._map_kind = label_map
        self.info = PairsInfo(
            name="dfc2020",
            source="DFC2020, Sentinel-1 GRD and Sentinel-2 L1C (Robinson et al. 2021, doi 10.21227/rha7-m332)",
            license="CC-BY-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS_L1C,
            map_class_names=SIMPLIFIED_CLASSES,
            map_no_data=NO_CLASS,
            pixel_size=10.0,
        )
        self._splits: list[str] = []
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
        self._require_pairs("DFC2020", "", "ROIs0000_test/s1_0/ROIs0000_test_s1_0_p<patch>.tif, and the same for s2")
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

    def _read(self, index: int) -> Pair:
        name, (map_bands, index_of) = self.ids[index], _MAPS[self._map_kind]
        sar, optical, land_cover = (self._path(index, kind) for kind in ("s1", "s2", self._map_kind))
        pair = read_patches(name, sar, optical, land_cover if name in self._with_map else None, map_bands)
        if pair.label_map is not None:
            pair.label_map = class_indices(pair.label_map, index_of, land_cover)
        pair.split = self._splits[index]
        return pair

    def _path(self, index: int, kind: str) -> Path:
        folder, ending = SPLIT_FOLDERS[self._splits[index]]
        patch = self.ids[index].removeprefix(f"{folder}_")
        return self.root / folder / f"{kind}_{ending}" / f"{folder}_{kind}_{patch}.tif"
