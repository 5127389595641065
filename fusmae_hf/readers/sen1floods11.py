"""Reader of Sen1Floods11 v1.1: 446 hand-labelled pairs of Sentinel-1 and Sentinel-2 chips of eleven floods.

Paper: Bonafilia et al., "Sen1Floods11: A Georeferenced Dataset to Train and Test Deep Learning Flood Algorithms for
Sentinel-1", CVPR Workshops 2020. Data and terms: https://github.com/cloudtostreet/Sen1Floods11.
"""

import os
from pathlib import Path
from typing import Literal

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.readers.geotiff import read_files, require_codes, require_rasterio
from fusmae_hf.readers.listed_pairs import ListedPairs, put_into_split, require_folders, require_one_of

CHIPS_FOLDER = "data/flood_events/HandLabeled"
LISTS_FOLDER = "splits/flood_handlabeled"
KINDS = ("S1Hand", "S2Hand", "LabelHand")
"""Folders in `CHIPS_FOLDER`, and how the names of the files in them end."""

SPLIT_LISTS = {
    "train": "flood_train_data.csv",
    "validation": "flood_valid_data.csv",
    "test": "flood_test_data.csv",
    "bolivia": "flood_bolivia_data.csv",
}
"""The official lists. Bolivia is a flood that none of the others holds, kept for tests in a region never seen."""

CHIP_PIXELS = 512
NO_DATA, NOT_WATER, WATER = -1, 0, 1


class Sen1Floods11(ListedPairs):
    """Hand-labelled chips of Sen1Floods11 that are on disk, out of those that its lists name.

    A chip is named after its flood and number, such as `Ghana_103272`. `sar` is float32 dB, (VV, VH), NaN where there
    is no data; `optical` is digital numbers of Level-1C in the dtype of the file (int16 or uint16), all 13 bands on
    the grid of 512x512 pixels of about 10 m (degrees, EPSG:4326), from before baseline 04.00: no offset. `label_map`
    (512, 512) int16 holds 0 (not water), 1 (water) and -1 (no data), as in the file. There are no scene labels.

    Args:
        root: folder that holds `v1.1/`, or the folder `v1.1` itself, which holds `data/` and `splits/`.
        bolivia: what to do with the 15 chips of Bolivia, the region held out: `"leave_out"`, or `"test"` to add them
            to the test split. `extra["event"]` tells them apart.

    Raises:
        FileNotFoundError: a folder or list is missing; says where it was searched.
        ValueError: no listed chip is complete, a list holds other lines, or `bolivia` is unknown.
        ImportError: rasterio is missing.
    """

    def __init__(self, root: str | Path, *, bolivia: Literal["leave_out", "test"] = "leave_out"):
        require_rasterio()
        super().__init__(root)
        require_one_of("bolivia", bolivia, ("leave_out", "test"))
        self.info = PairsInfo(
            name="sen1floods11",
            source="Sen1Floods11 v1.1, Sentinel-1 GRD and Sentinel-2 L1C (Bonafilia et al. 2020, CVPR Workshops)",
            license="see https://github.com/cloudtostreet/Sen1Floods11; imagery: Copernicus Sentinel, free and open",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS_L1C,
            map_class_names=("Not Water", "Water"),
            map_no_data=NO_DATA,
            extra_columns={"event": "string"},
            pixel_size=10.0,
        )
        version = next((folder for folder in (self.root, self.root / "v1.1") if (folder / "data").is_dir()), self.root)
        chips, lists = require_folders(version, [CHIPS_FOLDER, LISTS_FOLDER], "Sen1Floods11")
        self._folders = dict(zip(KINDS, require_folders(chips, KINDS, "Sen1Floods11"), strict=True))
        found = {kind: _chips_on_disk(folder, kind) for kind, folder in self._folders.items()}
        split_of = _read_splits(lists)
        for chip in sorted(set.union(*found.values())):
            missing = [kind for kind in KINDS if chip not in found[kind]]
            if missing:
                self._left_out.append((chip, f"its file is missing in {' and '.join(missing)}"))
            elif chip not in split_of:
                self._left_out.append((chip, f"in none of the lists in {lists}"))
            elif split_of[chip] == "bolivia" and bolivia == "leave_out":
                self._left_out.append((chip, "of Bolivia, the region held out (`bolivia`)"))
            else:
                self.ids.append(chip)
        self._require_pairs(
            "Sen1Floods11", "", "S1Hand/<EVENT>_<ID>_S1Hand.tif, and the same for S2Hand and LabelHand"
        )
        self._splits = ["test" if split_of[chip] == "bolivia" else split_of[chip] for chip in self.ids]
        self.summary = f"Found {len(self.ids):,} of the {len(split_of):,} chips that the lists name in {chips}."

    def _read(self, index: int) -> Pair:
        chip = self.ids[index]
        sar, optical, label_map = (folder / f"{chip}_{kind}.tif" for kind, folder in self._folders.items())
        dtypes = ("float32", ("int16", "uint16"), "int16")
        pair = read_files(
            chip, sar, optical, label_map, num_bands=len(OPTICAL_BANDS_L1C), dtypes=dtypes, sides=(CHIP_PIXELS,)
        )
        expected = "expected -1 (no data), 0 (not water) and 1 (water). Replace it by the file of the official archive"
        assert pair.label_map is not None
        require_codes(label_map, pair.label_map, (NO_DATA, NOT_WATER, WATER), expected)
        pair.split = self._splits[index]
        pair.extra = {"event": chip.rpartition("_")[0]}
        return pair


def _chips_on_disk(folder: Path, kind: str) -> set[str]:
    """Names of the chips of which there is a file of one kind."""
    ending = f"_{kind}.tif"
    return {name.removesuffix(ending) for name in os.listdir(folder) if name.endswith(ending)}


def _read_splits(folder: Path) -> dict[str, str]:
    """List (a key of `SPLIT_LISTS`) of each chip."""
    split_of: dict[str, str] = {}
    for split, file in SPLIT_LISTS.items():
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"Sen1Floods11: {path} is missing. Download it from the official archive.")
        for line in path.read_text(encoding="utf-8", errors="replace").split():
            chip = line.partition("_S1Hand.tif,")[0]
            if line != f"{chip}_S1Hand.tif,{chip}_LabelHand.tif":
                raise ValueError(
                    f"{path}: the line {line[:80]!r} is not <chip>_S1Hand.tif,<chip>_LabelHand.tif. Download it again."
                )
            put_into_split(split_of, chip, split, folder)
    return split_of
