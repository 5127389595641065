"""Reader of BioMassters: monthly Sentinel-1 and Sentinel-2 chips of Finnish forest with above-ground biomass.

Paper: Nascetti et al., "BioMassters: A Benchmark Dataset for Forest Biomass Estimation using Multi-modal Satellite
Time-series", NeurIPS 2023 Datasets and Benchmarks. Layout, bands and missing values: the data page of the challenge
(DrivenData, "The BioMassters", 2022-2023). Licence: CC-BY-4.0.
"""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import SAR_BANDS
from fusmae_hf.readers.geotiff import read_geotiff, require_rasterio
from fusmae_hf.readers.listed_pairs import ListedPairs, require_one_of, subfolders

OPTICAL_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""The spectral bands of a Sentinel-2 file in its order; an eleventh one holds the cloud probability."""

SPLIT_FOLDERS = {"train": ("train_features", "train_agbm"), "test": ("test_features", "test_agbm")}
"""Folders of the images and of the biomass maps of each split of the official archive."""

METADATA = ("features_metadata.csv", "The_BioMassters_-_features_metadata.csv.csv")
"""Names under which the list of all image files is published."""

CHIP_PIXELS = 256

SAR_MISSING = -9999.0
CLOUD_MISSING = 255
CLOUDY_ABOVE = 50
"""Cloud probability in percent above which a pixel counts as cloudy."""

_FIRST_BAND = {"ascending": 0, "descending": 2}
_IMAGE = re.compile(r"(?P<chip>[A-Za-z0-9]+)_(?P<sensor>S1|S2)_(?P<month>0\d|1[01])\.tif")
_BIOMASS = re.compile(r"(?P<chip>[A-Za-z0-9]+)_agbm\.tif")


class BioMassters(ListedPairs):
    """Pairs of BioMassters that are on disk: one for each chip and month of which both sensors have a file.

    A pair is named after chip and month, such as `0060c0a5_07`; month 00 is September, 11 is August. `sar` is float32
    dB, (VV, VH), of one orbit: a Sentinel-1 file holds the two bands of ascending and the two of descending passes of
    the month, -9999 where there is none, which becomes NaN here. `optical` is uint16 digital numbers of Level-2A, ten
    bands on the 10 m grid of 256x256 pixels, without any offset. `label_map` (256, 256) float32 is the above-ground
    biomass of the chip in t/ha, the same for all its months. There are no scene labels, places or times: chips carry
    no coordinates.

    Orbits are never mixed: VV and VH of one pair come from the same passes, and those of all pairs from the same
    direction, since slopes look different from the other side. A month without a pass in that direction has no data.

    Two layouts are read: the official archive (`train_features/`, `train_agbm/`, `test_features/`, `test_agbm/`, each
    with all chips), whose folders give the split, and, where neither `train_features/` nor `test_features/` is there,
    one folder a chip with all its files, without a split. Biomass maps may be absent from a folder altogether; where
    some are there, chips without one are left out.

    Args:
        root: folder that holds `train_features/` or `test_features/`, or the folders of single chips.
        orbit: passes of which VV and VH are given: `"ascending"` or `"descending"`.
        max_cloud: `read` refuses a pair with a larger share of cloudy pixels: those whose cloud probability exceeds
            50 %, among the pixels that have one. 1 keeps every pair.

    Attributes:
        num_listed: number of pairs that the metadata list, or None without metadata.

    Raises:
        FileNotFoundError: no folder with chips; says where they were searched.
        ValueError: no pair is complete, an option is out of range, or the metadata cannot be read.
        ImportError: rasterio is missing.
    """

    def __init__(
        self, root: str | Path, *, orbit: Literal["ascending", "descending"] = "ascending", max_cloud: float = 1.0
    ):
        require_rasterio()
        super().__init__(root)
        require_one_of("orbit", orbit, _FIRST_BAND)
        if not 0 <= max_cloud <= 1:
            raise ValueError(f"max_cloud is {max_cloud}, but must be a share between 0 and 1.")
        self.orbit, self.max_cloud = orbit, max_cloud
        self.info = PairsInfo(
            name="biomassters",
            source="BioMassters, Sentinel-1 GRD and Sentinel-2 L2A (Nascetti et al. 2023, NeurIPS Datasets and "
            "Benchmarks)",
            license="CC-BY-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS,
            map_units="t/ha",
            extra_columns={"chip": "string", "month": "int64", "orbit": "string", "cloud_share": "double"},
            pixel_size=10.0,
        )
        listed = _listed_files(self.root)
        pairs: list[tuple[str, str | None, Path, Path | None]] = []
        for split, images, maps in _parts(self.root):
            for name, reason, biomass in _find_pairs(images, maps, listed):
                if reason:
                    self._left_out.append((name, reason))
                else:
                    pairs.append((name, split, images / name.split("_")[0] if split is None else images, biomass))
        pairs.sort(key=lambda pair: pair[0])
        repeated = [name for (name, *_), (other, *_) in pairwise(pairs) if name == other]
        if repeated:
            raise ValueError(f"BioMassters: {repeated[0]} is in both the training and the test folder of {self.root}.")
        self.ids = [name for name, *_ in pairs]
        self._splits = [split for _, split, *_ in pairs]
        self._require_pairs("BioMassters", "", "train_features/<chip>_S1_<month>.tif and <chip>_S2_<month>.tif")
        self._pairs = pairs
        self.num_listed = None if listed is None else len(_both_sensors(listed))
        of_listed = "" if self.num_listed is None else f" of the {self.num_listed:,} listed"
        self.summary = (
            f"Found {len(pairs):,}{of_listed} pairs of {len({name.split('_')[0] for name in self.ids}):,} chips in "
            f"{self.root}."
        )

    def _ground_of(self, name: str) -> str:
        return name.partition("_")[0]  # months of a chip

    def _read(self, index: int) -> Pair:
        name, split, folder, biomass = self._pairs[index]
        chip, month = name.split("_")
        size = (CHIP_PIXELS, CHIP_PIXELS)
        passes = read_geotiff(folder / f"{chip}_S1_{month}.tif", count=4, size=size, dtype="float32").values
        first = _FIRST_BAND[self.orbit]
        sar = passes[first : first + 2]
        optical_path = folder / f"{chip}_S2_{month}.tif"
        optical = read_geotiff(optical_path, count=11, size=size, dtype="uint16").values
        cloud_share = _cloud_share(optical[-1], optical_path)
        if self.max_cloud < 1 and (cloud_share is None or cloud_share > self.max_cloud):
            found = "no pixel has a cloud probability" if cloud_share is None else f"{cloud_share:.1%} are cloudy"
            raise PairError(
                f"{optical_path}: {found}, but at most {self.max_cloud:.1%} of the pixels may have a cloud "
                f"probability above {CLOUDY_ABOVE} %. Raise max_cloud to keep it."
            )
        return Pair(
            id=name,
            sar=np.where(sar == SAR_MISSING, np.float32(np.nan), sar),
            optical=optical[:-1],
            label_map=read_geotiff(biomass, count=1, size=size, dtype="float32").values[0] if biomass else None,
            split=split,
            extra={"chip": chip, "month": int(month), "orbit": self.orbit, "cloud_share": cloud_share},
        )


def _parts(root: Path) -> Sequence[tuple[str | None, Path, Path]]:
    """Split, folder of the images and folder of the biomass maps of each part of the dataset on disk.

    Raises:
        FileNotFoundError: there is none.
    """
    official = [
        (split, root / images, root / maps)
        for split, (images, maps) in SPLIT_FOLDERS.items()
        if (root / images).is_dir()
    ]
    if official:
        return official
    if not root.is_dir() or not any(subfolders(root)):
        found = "but there is no such folder" if not root.is_dir() else "but it holds no folder"
        raise FileNotFoundError(
            f"BioMassters: looked for train_features/, test_features/ or a folder for each chip in {root}, {found}."
        )
    return [(None, root, root)]


def _find_pairs(images: Path, maps: Path, listed: set[str] | None) -> Iterator[tuple[str, str | None, Path | None]]:
    """Name, reason to leave it out or None, and biomass map of each pair of which something is on disk.

    Args:
        images: folder of the images; the same as `maps` where each chip has a folder of its own in it.
        maps: folder of the biomass maps.
        listed: names of all image files as the metadata list them, or None.
    """
    if images == maps:
        names = [(chip, file) for chip in subfolders(images) for file in os.listdir(images / chip)]
        files = {file: images / chip for chip, file in names if file.startswith(f"{chip}_")}
        map_files = files
    else:
        files = dict.fromkeys(os.listdir(images), images)
        map_files = dict.fromkeys(os.listdir(maps), maps) if maps.is_dir() else {}
    biomass = {match["chip"]: map_files[match[0]] / match[0] for match in map(_BIOMASS.fullmatch, map_files) if match}
    months: dict[str, set[str]] = {"S1": set(), "S2": set()}
    for match in map(_IMAGE.fullmatch, files):
        if match:
            months[match["sensor"]].add(f"{match['chip']}_{match['month']}")
    sar, optical = months["S1"], months["S2"]
    for name in sorted(sar | optical):
        chip, month = name.split("_")
        if name in sar and name in optical:
            reason = f"its biomass map {chip}_agbm.tif is missing" if biomass and chip not in biomass else None
            yield name, reason, biomass.get(chip)
        else:
            missing = f"{chip}_{'S2' if name in sar else 'S1'}_{month}.tif"
            reason = f"{missing} is missing"
            if listed is not None:
                reason += (
                    ", although the metadata list it: download it again"
                    if missing in listed
                    else "; the dataset has none"
                )
            yield name, reason, None


def _listed_files(root: Path) -> set[str] | None:
    """Names of all image files that the metadata list, or None without metadata."""
    path = next((root / name for name in METADATA if (root / name).is_file()), None)
    if path is None:
        return None
    try:
        options = pv.ConvertOptions(include_columns=["filename"], column_types={"filename": pa.string()})
        return set(pv.read_csv(path, convert_options=options)["filename"].to_pylist())
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(f"{path}: is no CSV file with a column `filename` ({error}). Download it again.") from error


def _both_sensors(files: set[str]) -> set[str]:
    """Names of the pairs whose two files are among `files`."""
    return {name for name in files if "_S1_" in name and name.replace("_S1_", "_S2_") in files}


def _cloud_share(probability: np.ndarray, path: Path) -> float | None:
    """Share of cloudy pixels among those with a cloud probability, or None where no pixel has one."""
    known = probability != CLOUD_MISSING
    largest = probability.max(where=known, initial=0)
    if largest > 100:
        raise PairError(
            f"{path}: holds {largest} as cloud probability (band 11), but 0 to 100, or 255 where it is missing, is "
            "expected. Are its bands in the official order?"
        )
    return float(np.mean(probability[known] > CLOUDY_ABOVE)) if known.any() else None
