"""Reader of reBEN (BigEarthNet version 2): 549,488 pairs of Sentinel-1 and Sentinel-2 patches with land-cover maps.

Paper: Clasen et al., "reBEN: Refined BigEarthNet Dataset for Remote Sensing Image Analysis", IGARSS 2025
(arXiv 2407.03653). Licence: CDLA-Permissive-1.0.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, SAR_BANDS
from fusmae_hf.readers.bigearthnet_patches import CLASSES_19, OPTICAL_FACTORS, NativePairs, read_map, read_patches
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.listed_pairs import acquisition_time, require_folders, subfolders

OPTICAL_FOLDER = "BigEarthNet-S2"
SAR_FOLDER = "BigEarthNet-S1"
MAP_FOLDER = "Reference_Maps"
METADATA = "metadata.parquet"
SNOW_CLOUD_METADATA = "metadata_for_patches_with_snow_cloud_or_shadow.parquet"

_COLUMNS = ["patch_id", "s1_name", "labels", "split", "country"]


class ReBEN(NativePairs):
    """Pairs of reBEN that are on disk, out of those that its metadata list.

    A pair is named after its Sentinel-2 patch (`patch_id`). The partner is the `s1_name` of the same row and nothing
    else: the two names write row and column differently (`..._02_07` and `..._2_7`). `sar` is float32 dB, (VV, VH);
    `optical` is uint16 digital numbers of Level-2A, 12 bands, all on the 10 m grid of 120x120 pixels: the 20 m and
    60 m bands by repeating pixels. `labels` are names of the 19-class nomenclature. `label_map` (120, 120) uint16
    holds the CORINE Land Cover codes of the reference map as they are (111 to 523), where `Reference_Maps/` is there.

    Patches are found by listing the folders once, so a small part of the archive opens quickly beside the metadata of
    all of it. A patch of which nothing is on disk is not listed by `left_out`, only counted in `num_listed`.

    Args:
        root: folder that holds `BigEarthNet-S2/`, `BigEarthNet-S1/` and `metadata.parquet`.
        keep_snow_and_clouds: also give the patches of `metadata_for_patches_with_snow_cloud_or_shadow.parquet`.
        optical_offset: what must be subtracted from the optical values (0 in the official archive).

    Attributes:
        num_listed: number of pairs in the metadata that were asked for, on disk or not.

    Raises:
        FileNotFoundError: a folder or the metadata are missing; says where they were searched.
        ValueError: no listed pair is on disk, or the metadata lack a column.
        ImportError: rasterio is missing.
    """

    def __init__(self, root: str | Path, *, keep_snow_and_clouds: bool = False, optical_offset: float = 0.0):
        require_rasterio()
        super().__init__(root)
        optical_root, sar_root = require_folders(self.root, [OPTICAL_FOLDER, SAR_FOLDER], "reBEN")
        self.info = PairsInfo(
            name="reben",
            source="reBEN (BigEarthNet v2.0), Sentinel-1 and Sentinel-2 L2A (Clasen et al. 2025, arXiv 2407.03653)",
            license="CDLA-Permissive-1.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS,
            optical_offset=optical_offset,
            optical_factors=OPTICAL_FACTORS,
            statistics="reben",
            class_names=CLASSES_19,
            extra_columns={"sar_patch": "string", "country": "string"},
            pixel_size=10.0,
        )
        optical, sar = _patches_on_disk(optical_root), _patches_on_disk(sar_root)
        self._maps = _patches_on_disk(self.root / MAP_FOLDER) if (self.root / MAP_FOLDER).is_dir() else {}
        listed = _read_metadata(self.root / METADATA)
        unwanted = self.root / SNOW_CLOUD_METADATA
        if keep_snow_and_clouds:
            listed = pa.concat_tables([listed, _read_metadata(unwanted)])
        self.num_listed = listed.num_rows

        has_optical = pc.is_in(listed["patch_id"], pa.array(optical.keys(), pa.string()))
        has_sar = pc.is_in(listed["s1_name"], pa.array(sar.keys(), pa.string()))
        for row in listed.filter(pc.xor(has_optical, has_sar)).to_pylist():
            sensor, name = (
                ("Sentinel-1", row["s1_name"]) if row["patch_id"] in optical else ("Sentinel-2", row["patch_id"])
            )
            self._left_out.append((row["patch_id"], f"its {sensor} patch {name} is missing in {self.root}"))
        if not keep_snow_and_clouds and unwanted.is_file():
            snowy = _read_metadata(unwanted)["patch_id"]
            on_disk = snowy.filter(pc.is_in(snowy, pa.array(optical.keys(), pa.string())))
            self._left_out += [
                (name, f"snow, cloud or shadow: listed in {SNOW_CLOUD_METADATA}") for name in on_disk.to_pylist()
            ]

        table = listed.filter(pc.and_(has_optical, has_sar)).sort_by("patch_id").combine_chunks()
        self.ids = table["patch_id"].to_pylist()
        self._require_pairs(
            "reBEN",
            f"None of the {self.num_listed:,} pairs of {METADATA} is there: {len(optical):,} Sentinel-2 and "
            f"{len(sar):,} Sentinel-1 patch folders were found, ",
            f"{OPTICAL_FOLDER}/<tile>/<patch>/ and {SAR_FOLDER}/<scene>/<patch>/",
        )
        self.summary = (
            f"Found {len(self.ids):,} of the {self.num_listed:,} pairs that {METADATA} lists in {self.root}."
        )
        self._splits = table["split"].to_pylist()
        self._optical = [optical[name] for name in self.ids]
        self._sar = [sar[name] for name in table["s1_name"].to_pylist()]
        self._sar_names, self._labels, self._countries = table["s1_name"], table["labels"], table["country"]
        explained = set(self.ids).union(name for name, _ in self._left_out)
        self._left_out += [(name, f"not listed in {METADATA}") for name in sorted(optical.keys() - explained)]

    def _read(self, index: int) -> Pair:
        patch, sar_patch, country = self.ids[index], self._sar_names[index].as_py(), self._countries[index].as_py()
        labels = self._labels[index].as_py() or []
        unknown = [label for label in labels if label not in CLASSES_19]
        if unknown:
            raise PairError(f"{self.root / METADATA}: {patch} has labels {unknown}, none of the 19 classes.")
        pair = read_patches(patch, Path(self._sar[index], sar_patch), Path(self._optical[index], patch))
        pair.labels, pair.label_map = sorted(labels, key=CLASSES_19.index), self._read_map(patch)
        pair.split = self._splits[index]
        pair.sar_time, pair.optical_time = acquisition_time(sar_patch), acquisition_time(patch)
        pair.extra = {"sar_patch": sar_patch, "country": country}
        return pair

    def _read_map(self, patch: str) -> np.ndarray | None:
        if not self._maps:
            return None
        folder = Path(self._maps.get(patch, self.root / MAP_FOLDER / patch.rsplit("_", 2)[0]), patch)
        return read_map(folder / f"{patch}_reference_map.tif")


def _patches_on_disk(root: Path) -> dict[str, str]:
    """Folder above each patch in `<root>/<tile or scene>/<patch>/`, by the name of the patch: one scan a tile."""
    return {
        patch: above for above in (str(root / name) for name in subfolders(root)) for patch in subfolders(Path(above))
    }


def _read_metadata(path: Path) -> pa.Table:
    """The columns of a metadata file that are used here."""
    if not path.is_file():
        raise FileNotFoundError(f"reBEN: {path} is missing. Download it from the official archive into {path.parent}.")
    try:
        lacking = [name for name in _COLUMNS if name not in pq.read_schema(path).names]
        if lacking:
            raise ValueError(
                f"{path}: lacks the columns {lacking}; is it the metadata file of reBEN (BigEarthNet v2)?"
            )
        return pq.read_table(path, columns=_COLUMNS)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}). Download it again.") from error
