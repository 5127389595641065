"""Reader of Sen1Floods11 v1.1: 446 hand-labelled pairs of Sentinel-1 and Sentinel-2 chips of eleven floods.

Paper: Bonafilia et al., "Sen1Floods11: A Georeferenced Dataset to Train and Test Deep Learning Flood Algorithms for
Sentinel-1", CVPR Workshops 2020. Data and terms: https://github.com/cloudtostreet/Sen1Floods11.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.plots.maps import plot_with_label_map
from fusmae_hf.readers.geotiff import read_geotiff, require_folders, require_rasterio, require_same_footprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class Sen1Floods11:
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
        if bolivia not in ("leave_out", "test"):
            raise ValueError(f"bolivia is {bolivia!r}, but must be 'leave_out' or 'test'.")
        self.root = Path(root)
        self.info = PairsInfo(
            name="sen1floods11",
            source="Sen1Floods11 v1.1, Sentinel-1 GRD and Sentinel-2 L1C (Bonafilia et al. 2020, CVPR Workshops)",
            license="see https://github.com/cloudtostreet/Sen1Floods11; imagery: Copernicus Sentinel, free and open",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS_L1C,
            map_class_names=("Not Water", "Water"),
            map_no_data=NO_DATA,
            extra_columns={"event": "string"},
        )
        version = next((folder for folder in (self.root, self.root / "v1.1") if (folder / "data").is_dir()), self.root)
        chips, lists = require_folders(version, [CHIPS_FOLDER, LISTS_FOLDER], "Sen1Floods11")
        self._folders = dict(zip(KINDS, require_folders(chips, KINDS, "Sen1Floods11"), strict=True))
        found = {kind: _chips_on_disk(folder, kind) for kind, folder in self._folders.items()}
        split_of = _read_splits(lists)
        self.ids: list[str] = []
        self._left_out: list[tuple[str, str]] = []
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
        if not self.ids:
            reasons = "; ".join(f"{chip}: {reason}" for chip, reason in self._left_out[:3])
            raise ValueError(
                f"Sen1Floods11: no chip to read in {chips}. {len(self._left_out):,} were left out"
                f"{f', for example {reasons}' if reasons else ''}. Expected S1Hand/<EVENT>_<ID>_S1Hand.tif, and the "
                "same for S2Hand and LabelHand."
            )
        self._splits = ["test" if split_of[chip] == "bolivia" else split_of[chip] for chip in self.ids]
        self.summary = f"Found {len(self.ids):,} of the {len(split_of):,} chips that the lists name in {chips}."

    def __len__(self) -> int:
        return len(self.ids)

    def split_of(self, index: int) -> str | None:
        """`"train"`, `"validation"` or `"test"`, as the lists say."""
        return self._splits[index]

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Chips of which something is on disk but which are not among the pairs, with the reason."""
        return iter(self._left_out)

    def read(self, index: int) -> Pair:
        """Read one chip, whole.

        Returns:
            `sar` (2, 512, 512) float32 dB, `optical` (13, 512, 512) int16 or uint16 digital numbers, `label_map`
            (512, 512) int16, place and flood. The files carry no acquisition time.

        Raises:
            PairError: a file is missing or unreadable, has a wrong size, dtype or code, or the files lie apart.
        """
        chip = self.ids[index]
        paths = {kind: folder / f"{chip}_{kind}.tif" for kind, folder in self._folders.items()}
        size, count = (CHIP_PIXELS, CHIP_PIXELS), len(OPTICAL_BANDS_L1C)
        sar = read_geotiff(paths["S1Hand"], count=len(SAR_BANDS), size=size, dtype="float32")
        optical = read_geotiff(paths["S2Hand"], count=count, size=size, dtype=("int16", "uint16"))
        label_map = read_geotiff(paths["LabelHand"], count=1, size=size, dtype="int16")
        require_same_footprint(paths["S1Hand"], sar, paths["S2Hand"], optical)
        require_same_footprint(paths["LabelHand"], label_map, paths["S2Hand"], optical)
        unknown = sorted(set(np.unique(label_map.values).tolist()) - {NO_DATA, NOT_WATER, WATER})
        if unknown:
            raise PairError(
                f"{paths['LabelHand']}: holds the codes {unknown[:8]}, but expected -1 (no data), 0 (not water) and 1 "
                "(water). Replace the file by the one of the official archive."
            )
        return Pair(
            id=chip,
            sar=sar.values,
            optical=optical.values,
            label_map=label_map.values[0],
            split=self._splits[index],
            crs=optical.crs,
            transform=optical.transform,
            extra={"event": chip.rpartition("_")[0]},
        )

    def plot(self, pair: Pair) -> "Figure":
        """Draw a pair: true colour, VV and VH in dB, and the hand-drawn water. Needs matplotlib."""
        return plot_with_label_map(pair, self.info, colours=("#d8c79c", "#2166ac"))


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
            if split_of.setdefault(chip, split) != split:
                raise ValueError(f"{folder}: {chip} is listed for both {split_of[chip]} and {split}.")
    return split_of
