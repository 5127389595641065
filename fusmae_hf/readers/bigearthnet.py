"""Reader of BigEarthNet-MM version 1: 590,326 pairs of Sentinel-1 and Sentinel-2 patches over ten European countries.

Papers: Sumbul et al., "BigEarthNet-MM: A Large Scale Multi-Modal Multi-Label Benchmark Archive for Remote Sensing
Image Classification and Retrieval", IEEE GRSM 2021 (arXiv 2105.07921); Sumbul et al., "BigEarthNet: A Large-Scale
Benchmark Archive for Remote Sensing Image Understanding", IGARSS 2019 (arXiv 1902.06148).
Licence: CDLA-Permissive-1.0.
"""

import bz2
import importlib.util
import json
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, SAR_BANDS
from fusmae_hf.readers.bigearthnet_patches import CLASSES_19, OPTICAL_FACTORS, NativePairs, classes_19, read_patches
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.listed_pairs import put_into_split, require_folders, subfolders

OPTICAL_FOLDER = "BigEarthNet-v1.0"
SAR_FOLDER = "BigEarthNet-S1-v1.0"

LEAVE_OUT_LISTS = {
    "snow": "patches_with_seasonal_snow",
    "cloud": "patches_with_cloud_and_shadow",
    "unlabelled": "patches_with_no_19_class_targets",
}
"""What can be left out, and the official list (`.csv` or `.csv.bz2`) that names its patches."""

SPLIT_LISTS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


def official_lists_folder() -> Path:
    """Folder of the PyPI package bigearthnet-common, which holds the official split, snow and cloud lists.

    Raises:
        FileNotFoundError: the package is not installed; names the pip command.
    """
    specification = importlib.util.find_spec("bigearthnet_common")
    if specification is None or not specification.submodule_search_locations:
        raise FileNotFoundError(
            "The PyPI package bigearthnet-common, which carries six example pairs and the official lists of "
            "BigEarthNet v1, is not installed. Install it with `pip install --no-deps bigearthnet-common==2.8.0`."
        )
    return Path(next(iter(specification.submodule_search_locations)))


def example_pairs_root(folder: str | Path) -> Path:
    """Unpack the six real pairs inside the PyPI package bigearthnet-common into the official layout.

    Args:
        folder: where to put `BigEarthNet-v1.0/` and `BigEarthNet-S1-v1.0/`; made if need be. What was unpacked there
            before is used as it is.

    Returns:
        `folder`, ready for [`BigEarthNet`].

    Raises:
        FileNotFoundError: the package, or one of its two archives, is missing; names the pip command.
    """
    package, folder = official_lists_folder(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for sensor, official in (("S1", SAR_FOLDER), ("S2", OPTICAL_FOLDER)):
        archive = package / f"BigEarthNet-{sensor}-Example.tar.bz2"
        if not archive.is_file():
            raise FileNotFoundError(
                f"{archive} is missing: the installed bigearthnet-common is another version. "
                "Install the right one with `pip install --no-deps bigearthnet-common==2.8.0`."
            )
        if not (folder / official).is_dir():
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
            (folder / f"BigEarthNet-{sensor}-Example").rename(folder / official)
    return folder


class BigEarthNet(NativePairs):
    """Pairs of BigEarthNet-MM v1, read from the two official folders.

    A pair is named after its Sentinel-2 patch. The partner is the Sentinel-1 patch whose
    `<patch>_labels_metadata.json` names it as `corresponding_s2_patch` (or that the split lists name, which spares
    opening all metadata; `read` then checks it against the metadata). `sar` is float32 dB, (VV, VH); `optical` is
    uint16 digital numbers of Level-2A, 12 bands, all on the 10 m grid of 120x120 pixels: the 20 m and 60 m bands by
    repeating pixels. `labels` are names of the 19-class nomenclature; `extra["clc_labels"]` keeps the original ones
    of the 43, joined by `"; "`.

    Args:
        root: folder that holds `BigEarthNet-v1.0/` and `BigEarthNet-S1-v1.0/`.
        splits: folder of the official lists `train`, `val` and `test`, `.csv` or `.csv.bz2`, one `s2,s1` or just
            `s2` in a line; `"official"` means `official_lists_folder()`. Without it pairs have no split.
        leave_out: any of `"snow"`, `"cloud"`, `"unlabelled"`; the lists that name them must be in `splits`.
        keep_unlisted: keep patches that none of the split lists names, without a split. The official lists hold
            neither snow nor clouds nor patches without a label.
        optical_offset: what must be subtracted from the optical values (0 in the official archive).
        progress: show a progress bar while the metadata are read.

    Raises:
        FileNotFoundError: a folder or list is missing; says where it was searched.
        ValueError: no pair is left, or `leave_out` is unknown.
        ImportError: rasterio is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        splits: str | Path | None = None,
        leave_out: Collection[str] = (),
        keep_unlisted: bool = False,
        optical_offset: float = 0.0,
        progress: bool = False,
    ):
        require_rasterio()
        super().__init__(root)
        self._optical, self._sar = require_folders(self.root, [OPTICAL_FOLDER, SAR_FOLDER], "BigEarthNet v1")
        self.info = PairsInfo(
            name="bigearthnet",
            source="BigEarthNet-MM v1.0, Sentinel-1 and Sentinel-2 L2A (Sumbul et al. 2021, arXiv 2105.07921)",
            license="CDLA-Permissive-1.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS,
            optical_offset=optical_offset,
            optical_factors=OPTICAL_FACTORS,
            statistics="bigearthnet",
            class_names=CLASSES_19,
            extra_columns={"sar_patch": "string", "clc_labels": "string"},
            pixel_size=10.0,
        )
        lists = official_lists_folder() if splits == "official" else Path(splits) if splits is not None else None
        split_of, listed_partner = _read_splits(lists) if lists else ({}, {})
        unwanted = _read_unwanted(lists, leave_out)
        partner = self._pair_up(listed_partner, progress)
        for patch in sorted(partner):
            if patch in unwanted:
                self._left_out.append((patch, unwanted[patch]))
            elif split_of and patch not in split_of and not keep_unlisted:
                self._left_out.append((patch, f"in none of the split lists in {lists}"))
            else:
                self.ids.append(patch)
        self._require_pairs("BigEarthNet v1", "", "both folders unpacked completely")
        self._partner = [partner[patch] for patch in self.ids]
        self._splits = [split_of.get(patch) for patch in self.ids]
        listed = f" of the {len(split_of):,} pairs that the split lists name" if split_of else " pairs"
        self.summary = f"Found {len(self.ids):,}{listed} in {self.root}."

    def _pair_up(self, listed_partner: dict[str, str], progress: bool) -> dict[str, str]:
        """Sentinel-1 partner of each Sentinel-2 patch on disk; patches without one are noted as left out."""
        optical = set(subfolders(self._optical))
        listed = {sar: patch for patch, sar in listed_partner.items()}
        partner: dict[str, str] = {}
        for sar in tqdm(sorted(subfolders(self._sar)), "Pairing", unit=" patches", disable=not progress, delay=2):
            try:
                patch = listed.get(sar) or _partner_in_metadata(self._sar / sar)
            except PairError as error:
                self._left_out.append((sar, str(error)))
                continue
            if patch not in optical:
                self._left_out.append((sar, f"its Sentinel-2 partner {self._optical / patch} is missing"))
            elif patch in partner:
                self._left_out.append((sar, f"{patch} is already the partner of {partner[patch]}"))
            else:
                partner[patch] = sar
        for patch in sorted(optical - partner.keys()):
            self._left_out.append((patch, f"no patch in {self._sar} names it as its Sentinel-2 partner"))
        return partner

    def _read(self, index: int) -> Pair:
        optical_folder, sar_folder = self._optical / self.ids[index], self._sar / self._partner[index]
        sar_metadata = _read_metadata(sar_folder)
        named = _partner_in_metadata(sar_folder, sar_metadata)
        if named != self.ids[index]:
            raise PairError(
                f"{sar_folder}: its metadata name {named} as the Sentinel-2 partner, the split lists name "
                f"{self.ids[index]}. One of the two is wrong: use the official lists."
            )
        optical_metadata = _read_metadata(optical_folder)
        original = [str(label) for label in optical_metadata.get("labels") or []]
        pair = read_patches(self.ids[index], sar_folder, optical_folder)
        try:
            pair.labels = classes_19(original)
        except ValueError as error:
            raise PairError(f"{optical_folder}: {error}") from error
        pair.split = self._splits[index]
        pair.sar_time = _utc(sar_metadata.get("acquisition_time"))
        pair.optical_time = _utc(optical_metadata.get("acquisition_date"))
        pair.extra = {"sar_patch": sar_folder.name, "clc_labels": "; ".join(original)}
        return pair


_METADATA_TYPES: dict[str, type] = {
    "labels": list,
    "corresponding_s2_patch": str,
    "acquisition_time": str,
    "acquisition_date": str,
}


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = f"{folder / folder.name}_labels_metadata.json"
    try:
        with open(path, "rb", buffering=0) as file:
            metadata = json.loads(file.read())
    except FileNotFoundError as error:
        raise PairError(f"{path}: no such file. Unpack the patch again from the official archive.") from error
    except OSError as error:
        raise PairError(f"{path}: cannot be read ({error.strerror}). Check who may read it, and the disk.") from error
    except (ValueError, RecursionError) as error:
        raise PairError(f"{path}: cannot be read as JSON ({error}). Unpack the patch again.") from error
    if not isinstance(metadata, dict):
        raise PairError(f"{path}: holds no JSON object. Unpack the patch again from the official archive.")
    for name, kind in _METADATA_TYPES.items():
        if not isinstance(metadata.get(name), kind | None):
            raise PairError(f"{path}: `{name}` is {metadata[name]!r:.80}, no {kind.__name__}. Unpack the patch again.")
    return metadata


def _partner_in_metadata(folder: Path, metadata: dict[str, Any] | None = None) -> str:
    name = (_read_metadata(folder) if metadata is None else metadata).get("corresponding_s2_patch")
    if not name:
        raise PairError(f"{folder / folder.name}_labels_metadata.json: names no `corresponding_s2_patch`.")
    return name


def _utc(time: str | None) -> str | None:
    return f"{time.replace(' ', 'T')}Z" if time else None


def _read_list(folder: Path, names: Collection[str]) -> list[list[str]] | None:
    """Rows of the first of `<name>.csv` and `<name>.csv.bz2` that exists, or None."""
    for path in (folder / f"{name}{suffix}" for name in names for suffix in (".csv", ".csv.bz2")):
        if path.is_file():
            content = path.read_bytes()
            try:
                text = (bz2.decompress(content) if path.suffix == ".bz2" else content).decode("utf-8-sig")
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: cannot be read as a list ({error}). Download it again.") from error
            return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return None


def _read_splits(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Split and, where the lists carry it, Sentinel-1 partner of each listed Sentinel-2 patch."""
    split_of: dict[str, str] = {}
    partner: dict[str, str] = {}
    for split, names in SPLIT_LISTS.items():
        for patch, *rest in _read_list(folder, names) or []:
            if not patch.startswith("S2"):
                continue  # a header line
            put_into_split(split_of, patch, split, folder)
            if rest and rest[0]:
                partner[patch] = rest[0]
    if not split_of:
        raise FileNotFoundError(
            f"No split list with Sentinel-2 patch names in {folder}: expected train.csv, val.csv or test.csv (also "
            ".csv.bz2), one `s2,s1` or `s2` in a line. Give their folder, or leave splits out."
        )
    return split_of, partner


def _read_unwanted(folder: Path | None, leave_out: Collection[str]) -> dict[str, str]:
    """Reason for each patch to leave out."""
    unknown = sorted(set(leave_out) - LEAVE_OUT_LISTS.keys())
    if unknown:
        raise ValueError(f"leave_out: {unknown} is unknown; known: {sorted(LEAVE_OUT_LISTS)}.")
    if folder is None:
        if leave_out:
            raise ValueError(f"leave_out={list(leave_out)} needs `splits`: the folder that holds the lists.")
        return {}
    reasons: dict[str, str] = {}
    for name in (LEAVE_OUT_LISTS[what] for what in leave_out):
        rows = _read_list(folder, [name])
        if rows is None:
            raise FileNotFoundError(f"{folder / name}.csv (or .csv.bz2), the list of what to leave out, is missing.")
        reasons |= {row[0]: f"listed in {name}" for row in rows}
    return reasons
