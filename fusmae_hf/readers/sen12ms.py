"""Reader of SEN12MS: 180,662 pairs of Sentinel-1 and Sentinel-2 patches with land cover, from all over the world.

Papers: Schmitt et al., "SEN12MS - A Curated Dataset of Georeferenced Multi-Spectral Sentinel-1/2 Imagery for Deep
Learning and Data Fusion", ISPRS Annals 2019 (arXiv 1906.07789); Schmitt and Wu, "Remote Sensing Image Classification
with the SEN12MS Dataset", ISPRS Annals 2021 (arXiv 2104.00704). Data: https://mediatum.ub.tum.de/1474000. Split lists:
`splits/` of https://github.com/schmitt-muc/SEN12MS. Licence: CC-BY-4.0.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.plots.maps import plot_with_label_map
from fusmae_hf.readers.geotiff import (
    Patch,
    read_geotiff,
    require_folders,
    require_rasterio,
    require_same_footprint,
    subfolders,
)
from fusmae_hf.readers.igbp import (
    IGBP_CLASSES,
    IGBP_COLOURS,
    IGBP_OF_IGBP,
    NO_CLASS,
    SIMPLIFIED_CLASSES,
    SIMPLIFIED_COLOURS,
    SIMPLIFIED_OF_IGBP,
    class_indices,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEASONS = ("ROIs1158_spring", "ROIs1868_summer", "ROIs1970_fall", "ROIs2017_winter")
"""Folders of the archive, one a (northern) season."""

SPLIT_LISTS = {"train": "train_list.txt", "test": "test_list.txt"}
"""Official lists: 162,555 patches for training and 18,106 for the test, which leaves one of all in neither."""

NUM_PAIRS = 180_662
PATCH_SIZE = (256, 256)
"""Height and width of a patch in pixels."""

MAP_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32")
"""Dtypes in which a file may hold codes of classes."""

_FILE = re.compile(r"(ROIs\d{4}_[a-z]+)_(s1|s2|lc)_(\d+)_(p\d+)(?:\.tif)?")
_SENSORS = {"s1": "Sentinel-1", "s2": "Sentinel-2"}


class SEN12MS:
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
        if not 0 < label_threshold <= 1:
            raise ValueError(f"label_threshold is {label_threshold}, but must be a share above 0 and up to 1.")
        if label_map not in ("simplified", "igbp"):
            raise ValueError(f"label_map is {label_map!r}, but must be 'simplified' or 'igbp'.")
        self.root = Path(root)
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
        )
        found = _patches_on_disk(self.root)
        self._has_maps = bool(found["lc"])
        split_of = {} if splits is None else _read_splits(Path(splits))
        self.ids: list[str] = []
        self._left_out: list[tuple[str, str]] = []
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
        if not self.ids:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._left_out[:3])
            raise ValueError(
                f"SEN12MS: no pair to read in {self.root} ({len(found['s1']):,} s1, {len(found['s2']):,} s2 and "
                f"{len(found['lc']):,} lc files were found{f', for example {reasons}' if reasons else ''}). Expected "
                "<season>/s1_<scene>/<season>_s1_<scene>_p<patch>.tif and the same for s2, as in the official archive."
            )
        self._splits = [split_of.get(name) for name in self.ids]
        listed = f"that {' and '.join(SPLIT_LISTS.values())} list" if split_of else "of SEN12MS"
        self.summary = (
            f"Found {len(self.ids):,} of the {len(split_of) or NUM_PAIRS:,} pairs {listed} in {self.root}, "
            f"{'with' if self._has_maps else 'without'} land cover."
        )

    def __len__(self) -> int:
        return len(self.ids)

    def split_of(self, index: int) -> str | None:
        """`"train"` or `"test"`, or None without split lists."""
        return self._splits[index]

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Patches of which something is on disk but which are not among the pairs, with the reason."""
        return iter(self._left_out)

    def read(self, index: int) -> Pair:
        """Read one pair.

        Returns:
            `sar` (2, 256, 256) float dB, `optical` (13, 256, 256) uint16 digital numbers, `labels` and `label_map`
            (256, 256) uint8 or None for both, place, season and scene. The files carry no acquisition time.

        Raises:
            PairError: a file is missing or unreadable, has a wrong size, dtype or code, or the patches lie apart.
        """
        name = self.ids[index]
        season, scene, patch = name.rsplit("_", 2)
        paths = {
            kind: self.root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_{patch}.tif"
            for kind in ("s1", "s2", "lc")
        }
        sar, optical = read_patches(paths["s1"], paths["s2"])
        labels, label_map = None, None
        if self._has_maps:
            land_cover = read_geotiff(paths["lc"], count=4, size=PATCH_SIZE, dtype=MAP_DTYPES)
            require_same_footprint(paths["lc"], land_cover, paths["s2"], optical)
            igbp = land_cover.values[0]
            label_map = simplified = class_indices(igbp, SIMPLIFIED_OF_IGBP, paths["lc"])
            if not self._simplify_map:
                label_map = class_indices(igbp, IGBP_OF_IGBP, paths["lc"])
            shares = np.bincount(simplified.ravel(), minlength=len(SIMPLIFIED_CLASSES)) / simplified.size
            labels = [SIMPLIFIED_CLASSES[i] for i in range(len(SIMPLIFIED_CLASSES)) if shares[i] >= self._threshold]
        return Pair(
            id=name,
            sar=sar.values,
            optical=optical.values,
            labels=labels,
            label_map=label_map,
            split=self._splits[index],
            crs=optical.crs,
            transform=optical.transform,
            extra={"season": season.split("_")[1], "scene": int(scene)},
        )

    def plot(self, pair: Pair) -> "Figure":
        """Draw a pair: true colour, VV and VH in dB, and its land cover if it has any. Needs matplotlib."""
        return plot_with_label_map(pair, self.info, colours=SIMPLIFIED_COLOURS if self._simplify_map else IGBP_COLOURS)


def read_patches(sar_path: Path, optical_path: Path) -> tuple[Patch, Patch]:
    """Read the two patches of a pair in the format of SEN12MS, which DFC2020 shares.

    Returns:
        Backscatter in dB, `(2, 256, 256)` float32 or float64, VV first; and Level-1C digital numbers,
        `(13, 256, 256)` uint16 in the order of `sensors_fusmae.OPTICAL_BANDS_L1C`.

    Raises:
        PairError: a file is missing or unreadable, has another size, band count or dtype, or the two lie apart.
    """
    sar = read_geotiff(sar_path, count=len(SAR_BANDS), size=PATCH_SIZE, dtype=("float32", "float64"))
    optical = read_geotiff(optical_path, count=len(OPTICAL_BANDS_L1C), size=PATCH_SIZE, dtype="uint16")
    require_same_footprint(sar_path, sar, optical_path, optical)
    return sar, optical


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
            if split_of.setdefault(name, split) != split:
                raise ValueError(f"{folder}: {name} is listed for both {split_of[name]} and {split}.")
        if not lines:
            raise ValueError(f"{folder / file}: the list is empty. Download the official list again.")
    return split_of
