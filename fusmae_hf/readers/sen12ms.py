"""Reader of SEN12MS: 180,662 pairs of Sentinel-1 and Sentinel-2 patches with land cover, from all over the world.

Papers: Schmitt et al., "SEN12MS - A Curated Dataset of Georeferenced Multi-Spectral Sentinel-1/2 Imagery for Deep
Learning and Data Fusion", ISPRS Annals 2019 (arXiv 1906.07789); Schmitt and Wu, "Remote Sensing Image Classification
with the SEN12MS Dataset", ISPRS Annals 2021 (arXiv 2104.00704). Data: https://mediatum.ub.tum.de/1474000. Split lists:
`splits/` of https://github.com/schmitt-muc/SEN12MS. Licence: CC-BY-4.0. Names and codes of IGBP: Sulla-Menashe and
Friedl, "User Guide to Collection 6 MODIS Land Cover (MCD12Q1 and MCD12C1) Product", 2018, table 3; the ten classes to
which SEN12MS and DFC2020 simplify it: Robinson et al., IEEE JSTARS 2021 (see `dfc2020`).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.readers.geotiff import read_files, require_codes, require_rasterio
from fusmae_hf.readers.listed_pairs import ListedPairs, put_into_split, require_folders, require_one_of, subfolders

SEASONS = ("ROIs1158_spring", "ROIs1868_summer", "ROIs1970_fall", "ROIs2017_winter")
"""Folders of the archive, one a (northern) season."""

SPLIT_LISTS = {"train": "train_list.txt", "test": "test_list.txt"}
"""Official lists: 162,555 patches for training and 18,106 for the test, which leaves one of all in neither."""

NUM_PAIRS = 180_662
PATCH_PIXELS = 256

MAP_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32")
"""Dtypes in which a file may hold codes of classes."""

_FILE = re.compile(r"(ROIs\d{4}_[a-z]+)_(s1|s2|lc)_(\d+)_(p\d+)(?:\.tif)?")
_SENSORS = {"s1": "Sentinel-1", "s2": "Sentinel-2"}
_KINDS = (*_SENSORS, "lc")

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


class SEN12MS(ListedPairs):
    """Pairs of SEN12MS that are on disk, whichever seasons these are.

    A pair is named as its files are, less the kind: `ROIs1158_spring_1_p30` is `ROIs1158_spring_s1_1_p30.tif`, and the
    same with `s2` and `lc`. `sar` is backscatter in dB, (VV, VH), in the dtype of the file (float32 in the archive):
    the published statistics are those of values clipped to [-25, 0], but nothing is clipped here. `optical` is uint16
    digital numbers of Level-1C, all 13 bands on the 10 m grid of 256x256 pixels, from before baseline 04.00, so
    without an offset.

    `labels` are those of the ten classes of simplified IGBP that cover at least `label_threshold` of the pixels of the
    land-cover patch. They are computed from that patch: the official repository ships the shares as a pickle, which
    can run any code when it is opened and which is therefore never opened. `label_map` (256, 256) uint8 holds indices
    of classes, 255 where there is none: MODIS land cover of 500 m on the 10 m grid. Without any `lc` folder pairs have
    neither; where some are there, a pair without its own is left out.

    Args:
        root: folder that holds `ROIs1158_spring/`, `ROIs1868_summer/`, `ROIs1970_fall/`, `ROIs2017_winter/`, or some.
        splits: folder of the official `train_list.txt` and `test_list.txt`, a file name of the s1, s2 or lc patch in a
            line. Without it pairs have no split; with it pairs on neither list are left out. There is no official
            validation split.
        label_threshold: share of the pixels, above 0 and up to 1, from which on a class is a label of the scene.
        label_map: classes of the label maps: `"simplified"` for the ten, `"igbp"` for the 17. `labels` are of the ten.

    Raises:
        FileNotFoundError: no season or no split list is there; says where they were searched.
        ValueError: no pair is left, a list holds other lines, or an argument is out of range.
        ImportError: rasterio is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        splits: str | Path | None = None,
        label_threshold: float = 0.1,
        label_map: Literal["simplified", "igbp"] = "simplified",
    ):
        require_rasterio()
        super().__init__(root)
        if not 0 < label_threshold <= 1:
            raise ValueError(f"label_threshold is {label_threshold}, but must be a share above 0 and up to 1.")
        require_one_of("label_map", label_map, ("simplified", "igbp"))
        self._threshold = label_threshold
        self._simplify_map = label_map == "simplified"
        self.info = PairsInfo(
            name="sen12ms",
            source="SEN12MS, Sentinel-1 GRD and Sentinel-2 L1C (Schmitt et al. 2019, arXiv 1906.07789)",
            license="CC-BY-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS_L1C,
            statistics="sen12ms",
            class_names=SIMPLIFIED_CLASSES,
            map_class_names=SIMPLIFIED_CLASSES if self._simplify_map else IGBP_CLASSES,
            map_no_data=NO_CLASS,
            extra_columns={"season": "string", "scene": "int64"},
            pixel_size=10.0,
        )
        found = _patches_on_disk(self.root)
        self._has_maps = bool(found["lc"])
        split_of = {} if splits is None else _read_splits(Path(splits))
        for name in sorted(found["s1"] | found["s2"]):
            missing = [sensor for kind, sensor in _SENSORS.items() if name not in found[kind]]
            if missing:
                self._left_out.append((name, f"its {missing[0]} file is missing"))
            elif self._has_maps and name not in found["lc"]:
                self._left_out.append((name, "its land-cover (lc) file is missing, although others are there"))
            elif split_of and name not in split_of:
                self._left_out.append((name, f"in none of the split lists in {splits}"))
            else:
                self.ids.append(name)
        self._require_pairs(
            "SEN12MS",
            f"{len(found['s1']):,} s1, {len(found['s2']):,} s2 and {len(found['lc']):,} lc files were found. ",
            "<season>/s1_<scene>/<season>_s1_<scene>_p<patch>.tif and the same for s2",
        )
        self._splits = [split_of.get(name) for name in self.ids]
        listed = f"that {' and '.join(SPLIT_LISTS.values())} list" if split_of else "of SEN12MS"
        self.summary = (
            f"Found {len(self.ids):,} of the {len(split_of) or NUM_PAIRS:,} pairs {listed} in {self.root}, "
            f"{'with' if self._has_maps else 'without'} land cover."
        )

    def _ground_of(self, name: str) -> str:
        return name.rpartition("_")[0]  # patches of a scene overlap by half

    def _read(self, index: int) -> Pair:
        name = self.ids[index]
        season, scene, patch = name.rsplit("_", 2)
        sar, optical, land_cover = (
            self.root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_{patch}.tif" for kind in _KINDS
        )
        pair = read_patches(name, sar, optical, land_cover if self._has_maps else None, map_bands=4)
        if pair.label_map is not None:
            simplified = class_indices(pair.label_map, SIMPLIFIED_OF_IGBP, land_cover)
            shares = np.bincount(simplified.ravel(), minlength=len(SIMPLIFIED_CLASSES)) / simplified.size
            pair.labels = [
                name for name, share in zip(SIMPLIFIED_CLASSES, shares, strict=False) if share >= self._threshold
            ]
            igbp = pair.label_map
            pair.label_map = simplified if self._simplify_map else class_indices(igbp, IGBP_OF_IGBP, land_cover)
        pair.split = self._splits[index]
        pair.extra = {"season": season.partition("_")[2], "scene": int(scene)}
        return pair


def read_patches(name: str, sar: Path, optical: Path, land_cover: Path | None, map_bands: int) -> Pair:
    """Read a pair in the format of SEN12MS, which DFC2020 shares; `label_map` holds the codes of the file."""
    dtypes = (("float32", "float64"), "uint16", MAP_DTYPES)
    bands = len(OPTICAL_BANDS_L1C)
    return read_files(
        name, sar, optical, land_cover, num_bands=bands, dtypes=dtypes, sides=(PATCH_PIXELS,), map_bands=map_bands
    )


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
    classes = sorted(code for code, index in index_of.items() if index != NO_CLASS)
    expected = f"land cover has the codes {classes[0]} to {classes[-1]}, and 0 or 255 without a class"
    require_codes(path, codes, index_of, f"{expected}. Is it another product? Unpack it again")
    table = np.empty(256, dtype=np.uint8)
    table[list(index_of)] = list(index_of.values())
    return table[codes]


def _patches_on_disk(root: Path) -> dict[str, set[str]]:
    """Names of the pairs of which there is an s1, s2 and lc file: one directory scan a scene and kind."""
    seasons = [season for season in SEASONS if (root / season).is_dir()]
    if not seasons:
        require_folders(root, SEASONS, "SEN12MS")
    found: dict[str, set[str]] = {"s1": set(), "s2": set(), "lc": set()}
    for season in seasons:
        for folder in subfolders(root / season):
            for file in os.listdir(root / season / folder) if folder.partition("_")[0] in found else ():
                match = _FILE.fullmatch(file)
                if match and file == f"{season}_{folder}_{match[4]}.tif":
                    found[match[2]].add(f"{season}_{match[3]}_{match[4]}")
    return found


def _read_splits(folder: Path) -> dict[str, str]:
    """Split of each pair that the official lists name."""
    missing = [name for name in SPLIT_LISTS.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"SEN12MS: {missing} not found in {folder}. Download both lists from splits/ of "
            "https://github.com/schmitt-muc/SEN12MS, or leave splits out."
        )
    split_of: dict[str, str] = {}
    for split, file in SPLIT_LISTS.items():
        lines = (folder / file).read_text(encoding="utf-8", errors="replace").split()
        for line in lines:
            match = _FILE.fullmatch(line)
            if match is None:
                raise ValueError(
                    f"{folder / file}: the line {line[:80]!r} is no file name such as ROIs1158_spring_s2_1_p30.tif. "
                    "Download the official list again."
                )
            name = f"{match[1]}_{match[3]}_{match[4]}"
            put_into_split(split_of, name, split, folder)
        if not lines:
            raise ValueError(f"{folder / file}: the list is empty. Download the official list again.")
    return split_of
