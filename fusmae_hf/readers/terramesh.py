"""Reader of TerraMesh samples: Sentinel-1 and Sentinel-2 patches with land cover from all over the world, as GeoTIFF.

Paper: Blumenstiel et al., "TerraMesh: A Planetary Mosaic of Multimodal Earth Observation Data", CVPR workshops 2025
(arXiv 2504.11172). Land cover: Karra et al., "Global land use/land cover with Sentinel 2 and deep learning", IGARSS
2021 (Esri, Impact Observatory). Licence: CC-BY-SA-4.0.
"""

import os
import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C, SAR_BANDS
from fusmae_hf.readers.geotiff import read_files, require_codes, require_rasterio
from fusmae_hf.readers.listed_pairs import ListedPairs, require_folders, require_one_of

OPTICAL_FOLDERS = {"S2L2A": OPTICAL_BANDS, "S2L1C": OPTICAL_BANDS_L1C}
SAR_FOLDERS = ("S1RTC", "S1GRD")
MAP_FOLDER = "LULC"

SIZES = (224, 264)
"""Sides of a patch in pixels: of the published sample, and of the dataset itself."""

LAND_COVER = (
    "no data", "water", "trees", "flooded vegetation", "crops", "built area", "bare ground", "snow or ice", "clouds",
    "rangeland",
)  # fmt: skip
"""Classes of the land-cover maps by index: those of Esri Land Cover, numbered without its gaps."""

NO_DATA = 0


class TerraMesh(ListedPairs):
    """Pairs of TerraMesh in the layout of its published sample: `<modality>/<name>.tif`.

    The file of the same name in `S2L2A/` (or `S2L1C/`), `S1RTC/` (or `S1GRD/`) and `LULC/` shows the same place. The
    full dataset is published as tar files with a zarr file for each sample, which is not read: write those that you
    need as GeoTIFF, one file of all bands for each modality.

    `sar` is backscatter in dB, (VV, VH), float64 as in the sample (or float32), NaN where it is missing. `optical` is
    int16 digital numbers of 12 (Level-2A) or 13 bands (Level-1C, B10 after B09), all on the 10 m grid of 224x224 or
    264x264 pixels. `label_map` is uint8 land cover where `LULC/` is there; a pair without its own map is then left
    out. There are neither scene labels nor splits. Of the files of the sample, those of Sentinel-1 alone say when
    they were acquired.

    The optical values are no uniform product: some samples carry the 1000 that processing baseline 04.00 adds, others
    do not (of the two published ones, one of each), and no file says which. Nothing is guessed here. The column
    `optical_minimum` holds the smallest value of each patch, which tells most of them apart: about 1000 where it was
    added, near 0 where not (clearest on Level-1C, whose B10 is dark wherever there is no high cloud).

    Args:
        root: folder that holds the folders of the modalities.
        optical: Sentinel-2 product: `"S2L2A"` (surface reflectance) or `"S2L1C"` (top of atmosphere).
        sar: Sentinel-1 product: `"S1RTC"` (terrain-corrected) or `"S1GRD"`.
        optical_offset: what must be subtracted from every optical value: see above.

    Raises:
        FileNotFoundError: a folder is missing; says where it was searched.
        ValueError: there is no pair, or an argument is none of its values.
        ImportError: rasterio is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        optical: Literal["S2L2A", "S2L1C"] = "S2L2A",
        sar: Literal["S1RTC", "S1GRD"] = "S1RTC",
        optical_offset: float = 0.0,
    ):
        require_rasterio()
        super().__init__(root)
        require_one_of("optical", optical, OPTICAL_FOLDERS)
        require_one_of("sar", sar, SAR_FOLDERS)
        self._sar_folder, self._optical_folder = require_folders(self.root, [sar, optical], "TerraMesh")
        self._map_folder = self.root / MAP_FOLDER if (self.root / MAP_FOLDER).is_dir() else None
        self.info = PairsInfo(
            name="terramesh",
            source=f"TerraMesh, {sar} and {optical} (Blumenstiel et al. 2025, arXiv 2504.11172)",
            license="CC-BY-SA-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_FOLDERS[optical],
            optical_offset=optical_offset,
            map_class_names=LAND_COVER,
            map_no_data=NO_DATA,
            extra_columns={"optical_minimum": "int64"},
            pixel_size=10.0,
        )
        folders = [folder for folder in (self._sar_folder, self._optical_folder, self._map_folder) if folder]
        found = {folder.name: _samples_on_disk(folder) for folder in folders}
        self.ids = sorted(set.intersection(*found.values()))
        self._left_out = [
            (name, f"its file is missing in {', '.join(folder for folder in found if name not in found[folder])}")
            for name in sorted((found[sar] | found[optical]) - set(self.ids))
        ]
        counts = ", ".join(f"{len(names):,} in {modality}/" for modality, names in found.items())
        self._require_pairs("TerraMesh", f"Found {counts}. ", "<modality>/<name>.tif, one file of all bands for each")
        self.summary = (
            f"Found {len(self.ids):,} pairs of {sar} and {optical} in {self.root}, "
            f"{'with' if self._map_folder else 'without'} land cover."
        )

    def _read(self, index: int) -> Pair:
        name = self.ids[index]
        sar, optical = self._sar_folder / f"{name}.tif", self._optical_folder / f"{name}.tif"
        label_map = self._map_folder / f"{name}.tif" if self._map_folder else None
        dtypes = (("float32", "float64"), "int16", "uint8")
        pair = read_files(
            name, sar, optical, label_map, num_bands=len(self.info.optical_bands), dtypes=dtypes, sides=SIZES
        )
        if label_map and pair.label_map is not None:
            require_codes(label_map, pair.label_map, range(len(LAND_COVER)), f"classes are 0 to {len(LAND_COVER) - 1}")
        pair.sar_time, pair.optical_time = _time_in_tags(sar), _time_in_tags(optical)
        pair.extra = {"optical_minimum": _minimum(pair.optical)}
        return pair


def _samples_on_disk(folder: Path) -> set[str]:
    return {name.removesuffix(".tif") for name in os.listdir(folder) if name.endswith(".tif")}


def _time_in_tags(path: Path) -> str | None:
    """Acquisition time in the tag `datetime` of a file, or None where it has none. The sample writes them in UTC."""
    rasterio = require_rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, driver="GTiff") as file:
            match = re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", file.tags().get("datetime", ""))
    return f"{match[0]}Z" if match else None


def _minimum(optical: np.ndarray) -> int | None:
    """Smallest value of the pixels with data; None where all are zero in all bands."""
    valid = optical.any(axis=0)
    return int(optical[:, valid].min()) if valid.any() else None
