"""Reader of OMBRIA: floods in Sentinel-1 and Sentinel-2 tiles, before and after, with masks of the water.

Paper: Drakonakis et al., "OmbriaNet - Supervised Flood Mapping via Convolutional Neural Networks Using Multitemporal
Sentinel-1 and Sentinel-2 Data Fusion", IEEE JSTARS 15, 2022. Masks: Copernicus Emergency Management Service.
Licence: none is stated; ask the authors before you publish anything made of the imagery.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.readers.listed_pairs import ListedPairs, require_folders, require_one_of
from fusmae_hf.vocabulary import SPLITS

SENSORS = {"sar": "S1", "optical": "S2"}
OFFICIAL_FOLDERS = ("train", "test")
TILE_PIXELS = 256

NOT_FLOODED, FLOODED = 0, 1

EVENTS = (
    (1, 17, "train"),
    (21, 31, "validation"),
    (32, 73, "test"),
    (74, 105, "train"),
    (106, 132, "validation"),
    (135, 257, "train"),
    (258, 270, "train"),
    (271, 312, "train"),
    (313, 341, "validation"),
    (342, 398, "train"),
    (399, 435, "test"),
    (436, 718, "train"),
    (721, 736, "test"),
    (737, 751, "validation"),
    (753, 758, "train"),
    (759, 9999, "test"),
)
"""First and last number of each event, and its split with `splits="events"`: see `OMBRIA`."""


class OMBRIA(ListedPairs):
    """Pairs of OMBRIA that are on disk.

    A pair is named after its official folder and number: `train_0042`. `sar` is uint8 (1, 256, 256), backscatter of
    one polarisation, which the files do not state: the band is called `backscatter`, not `VV` or `VH`. `optical` is
    uint8 (3, 256, 256), a composite of a short-wave infrared, a near infrared and a visible band, in this order
    (which Sentinel-2 bands they are is not stated). `label_map` (256, 256) uint8 is 1 where there is water of the
    flood, else 0; it is the mask of Sentinel-1, to which that of Sentinel-2 must be equal. There are no scene labels,
    places or times.

    What the 624 training tiles that were looked at are like (units are `"raw"` for both sensors therefore):

    - Each Sentinel-1 tile was stretched to 0..255 by itself: all reach both ends, and where two tiles share an edge
      the mean along it differs by more than 30 in 15 % of the cases. Their brightness cannot be compared. The optical
      tiles have one scale: at shared edges their means differ by about 1.
    - Outside of the mapped area (0.7 % of the pixels) the optical tile is 0 in all bands, which counts as no data, and
      the SAR tile holds a constant that is mostly 255 and often not. It is left as it is.
    - The two masks of a tile were equal in all 624.
    - Tiles are cut side by side and numbered row by row. Those whose edges continue each other (mean correlation of
      the edge pixels of both sensors above 0.9) join into 56 mosaics of 575 tiles, in which the numbers ascend without
      exception and numbers missing in `train/` are holes: if `test/` fills them (it was not at hand), its tiles lie
      among training tiles of the same flood, on the same day.

    `splits="events"` therefore splits by event. Its borders in `EVENTS` lie where no tile on one side continues one on
    the other and the imagery changes at sight: histograms of neighbouring numbers are 0.33 apart (total variation)
    within and 0.57 across the borders, as far as those of any two tiles (0.55). 21 to 31 and 313 to 341 may be one
    event, as may be 258 to 270 and 271 to 312: each two share a split. 436 to 718 holds at least two scenes of one
    flood. Of the 624 tiles 451 are for training, 71 for validation and 102 for test. Numbers above 787 were not at
    hand; they count as the last event, for test.

    Args:
        root: folder that holds `OmbriaS1/` and `OmbriaS2/`.
        time: `"after"` for the tiles that show the flood, `"before"` for those of the same places before it. The mask
            is that of the flood for both.
        splits: `"official"` for the folders `train` and `test`, or `"events"` for train, validation and test of which
            no two share an event. Numbers between events are then left out.

    Raises:
        FileNotFoundError: a folder is missing; says where it was searched.
        ValueError: no pair is complete, an option is unknown, or `splits="events"` cannot be used because the two
            official folders number their tiles independently.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        time: Literal["after", "before"] = "after",
        splits: Literal["official", "events"] = "official",
    ):
        super().__init__(root)
        require_one_of("time", time, ("after", "before"))
        require_one_of("splits", splits, ("official", "events"))
        self.time = time
        self.info = PairsInfo(
            name="ombria",
            source="OMBRIA, Sentinel-1 and Sentinel-2 composites as 8-bit PNG (Drakonakis et al. 2022, IEEE JSTARS)",
            license="none stated",
            sar_bands=("backscatter",),
            optical_bands=("SWIR", "NIR", "visible"),
            sar_units="raw",
            optical_units="raw",
            map_class_names=("not flooded", "flooded"),
            extra_columns={"number": "int64", "event": "int64"},
        )
        require_folders(self.root, ["OmbriaS1", "OmbriaS2"], "OMBRIA")
        pairs: list[tuple[str, str, int, str | None]] = []  # id, official folder, number, split
        for folder in self._official_folders():
            for name, number in self._complete(folder):
                split = folder if splits == "official" else split_of_event(number)
                if split is None:
                    self._left_out.append(
                        (name, f"number {number} lies between two events: which it shows is unknown")
                    )
                else:
                    pairs.append((name, folder, number, split))
        if splits == "events":
            self._require_one_numbering(pairs)
        self._pairs = sorted(pairs)
        self.ids = [name for name, *_ in self._pairs]
        self._splits = [split for *_, split in self._pairs]
        self._require_pairs(
            "OMBRIA",
            "",
            f"OmbriaS1/train/{time.upper()}/S1_{time}_<number>.png and MASK/S1_mask_<number>.png, and the same for S2",
        )
        counts = Counter(self._splits)
        found = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
        self.summary = f"Found {len(pairs):,} pairs ({time} the flood) in {self.root}: {found}."

    def _official_folders(self) -> list[str]:
        """Those of `OFFICIAL_FOLDERS` that either sensor has."""
        present = [
            folder
            for folder in OFFICIAL_FOLDERS
            if any((self.root / f"Ombria{sensor}" / folder).is_dir() for sensor in SENSORS.values())
        ]
        if not present:
            require_folders(self.root / "OmbriaS1", OFFICIAL_FOLDERS, "OMBRIA")
        return present

    def _complete(self, folder: str) -> Iterator[tuple[str, int]]:
        """Name and number of each tile of an official folder that has all four files; notes the others as left out."""
        kinds = [(sensor, kind) for sensor in SENSORS.values() for kind in (self.time, "mask")]
        found = {files: self._numbers(folder, *files) for files in kinds}
        for number in sorted(set().union(*found.values())):
            name = f"{folder}_{number}"
            missing = [self._path(folder, *files, number) for files in kinds if number not in found[files]]
            if missing:
                self._left_out.append((name, f"{', '.join(str(path) for path in missing)} missing"))
            else:
                yield name, int(number)

    def _numbers(self, folder: str, sensor: str, kind: str) -> set[str]:
        """Numbers, as four digits, of the files of one kind: `"after"`, `"before"` or `"mask"`."""
        above = self._path(folder, sensor, kind, "").parent
        pattern = re.compile(rf"{sensor}_{kind}_(\d{{4}})\.png")
        matches = map(pattern.fullmatch, os.listdir(above) if above.is_dir() else ())
        return {match[1] for match in matches if match}

    def _path(self, folder: str, sensor: str, kind: str, number: str) -> Path:
        return self.root / f"Ombria{sensor}" / folder / kind.upper() / f"{sensor}_{kind}_{number}.png"

    def _require_one_numbering(self, pairs: list[tuple[str, str, int, str | None]]) -> None:
        """Refuse official folders with tiles of the same number, to which `EVENTS` cannot apply."""
        in_folder = [{number for _, folder, number, _ in pairs if folder == name} for name in OFFICIAL_FOLDERS]
        common = set.intersection(*in_folder)
        if common:
            raise ValueError(
                f"OMBRIA: {len(common):,} numbers, such as {min(common):04d}, are in both official folders of "
                f"{self.root}, so that a number does not say which event a tile shows. Use splits='official'."
            )

    def _read(self, index: int) -> Pair:
        name, folder, number, split = self._pairs[index]
        digits = f"{number:04d}"
        sar = _read_png(self._path(folder, "S1", self.time, digits), "L")
        optical = _read_png(self._path(folder, "S2", self.time, digits), "RGB")
        masks = [self._path(folder, sensor, "mask", digits) for sensor in SENSORS.values()]
        label_map, other = (_read_mask(path) for path in masks)
        if (label_map != other).any():
            raise PairError(
                f"{masks[0]} and {masks[1]} differ in {int((label_map != other).sum()):,} pixels, but both sensors of "
                "a tile have the same mask. Unpack them again."
            )
        return Pair(
            id=name,
            sar=sar[None],
            optical=np.ascontiguousarray(optical.transpose(2, 0, 1)),
            label_map=label_map,
            split=split,
            extra={"number": number, "event": _event_of(number)},
        )


def split_of_event(number: int) -> str | None:
    """Split, with `splits="events"`, of the tile with this number; None where it lies between two events."""
    return next((split for first, last, split in EVENTS if first <= number <= last), None)


def _event_of(number: int) -> int | None:
    return next((first for first, last, _ in EVENTS if first <= number <= last), None)


def _read_png(path: Path, mode: Literal["L", "RGB"]) -> np.ndarray:
    """Pixels of a tile: `(256, 256)` uint8, with `"RGB"` `(256, 256, 3)`.

    Raises:
        PairError: the file is missing or damaged, no PNG, or has another size or kind of pixel.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = (image.mode, image.size)
            if found != (mode, (TILE_PIXELS, TILE_PIXELS)):
                raise PairError(
                    f"{path}: expected {TILE_PIXELS}x{TILE_PIXELS} pixels of kind {mode!r}, found "
                    f"{image.width}x{image.height} of {image.mode!r}. Replace it by the file of the official archive."
                )
            return np.array(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise PairError(f"{path}: cannot be read as PNG ({error}). It is damaged: unpack it again.") from error
    except OSError as error:
        raise PairError(
            f"{path}: cannot be read as PNG ({error.strerror or error}). It is missing, damaged or not yours to read: "
            "unpack it again."
        ) from error


def _read_mask(path: Path) -> np.ndarray:
    """`(256, 256)` uint8: 255 in the file is flooded (1), 0 is not."""
    mask = _read_png(path, "L")
    unknown = np.setdiff1d(mask, (0, 255))
    if unknown.size:
        raise PairError(
            f"{path}: holds the values {unknown[:8].tolist()}, but a mask has 0 (not flooded) and 255 (flooded) alone."
        )
    return np.where(mask == 255, np.uint8(FLOODED), np.uint8(NOT_FLOODED))
