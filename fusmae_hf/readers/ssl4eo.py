"""Reader of SSL4EO-S12 version 1.0: Sentinel-1 and Sentinel-2 patches of 251,079 locations in four seasons, GeoTIFF.

Paper: Wang et al., "SSL4EO-S12: A Large-Scale Multi-Modal, Multi-Temporal Dataset for Self-Supervised Learning in
Earth Observation", IEEE GRSM 2023 (arXiv 2211.07044). Licence: CC-BY-4.0. Version 1.1 is read by `ssl4eo_zarr`.
"""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C, OPTICAL_RESOLUTION, SAR_BANDS
from fusmae_hf.readers.geotiff import Patch, read_geotiff, require_rasterio, require_same_footprint
from fusmae_hf.readers.listed_pairs import ListedPairs, acquisition_time, require_folders, require_one_of, subfolders

SAR_FOLDER = "s1"

LEVELS = {"l2a": ("s2a", OPTICAL_BANDS), "l1c": ("s2c", OPTICAL_BANDS_L1C)}
"""Folder and bands of each Sentinel-2 product level."""

PATCH_PIXELS = 264
"""Side of a patch on the 10 m grid, in both versions of the dataset."""

MAX_DAYS_APART = 45.0
"""Half of the 91 days between two seasons: a scene that is further away belongs to another season."""

MAX_PIXELS_APART = PATCH_PIXELS // 10
"""A tenth of a patch: the known misalignment is a few pixels, while another location is kilometres away."""

EXTRA_COLUMNS = {"location": "string", "sar_scene": "string", "optical_scene": "string", "days_apart": "double"}

_SECONDS_A_DAY = 86_400


class SSL4EOS12(ListedPairs):
    """Pairs of SSL4EO-S12 v1.0: scenes of one location that lie close in time.

    A location has up to four scenes of each sensor, in `s1/<location>/<scene>/<band>.tif` and `s2a/` (Level-2A) or
    `s2c/` (Level-1C), where a location is seven digits. The scenes are not listed in pairs, and their order says
    nothing: the two whose acquisition times (in their names) are closest become the first pair, then the closest of
    those that remain, and so on; each scene is used once. Scenes without a partner are left out. A pair is named
    `<location>_<Sentinel-2 scene>`.

    `sar` is float32 dB, (VV, VH); `optical` is uint16 digital numbers of 12 or 13 bands, all on the 10 m grid of
    264x264 pixels. The files of the 20 m and 60 m bands have 132x132 and 44x44 pixels, which are repeated by whole
    factors: nothing is interpolated. These files may start half a 10 m pixel (20 m) or 2.5 (60 m) further north and
    west; that is not corrected. Archives whose bands all have 264x264 pixels are read as they are: which of the two
    is the case is seen in the first pair, and then expected of every other.

    The two patches of a pair are not exactly aligned. Both are in degrees (EPSG:4326) with slightly different pixel
    sizes, and Sentinel-1 is known to lie 2 to 3 pixels off; `crs` and `transform` are those of Sentinel-2. There are
    neither labels nor splits.

    Args:
        root: folder that holds `s1/` and `s2a/` or `s2c/`.
        level: Sentinel-2 product: `"l2a"` (surface reflectance, 12 bands) or `"l1c"` (top of atmosphere, 13 bands).
        max_days_apart: most days between the two scenes of a pair. The default is half the distance of two seasons.
        optical_offset: what must be subtracted from the optical values (0: the scenes of 2020 and 2021 are from
            before baseline 04.00).
        progress: show a progress bar while the folders of the locations are listed.

    Raises:
        FileNotFoundError: a folder is missing; says where it was searched.
        ValueError: there is no pair, or an argument is none of its values.
        ImportError: rasterio is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        level: Literal["l2a", "l1c"] = "l2a",
        max_days_apart: float = MAX_DAYS_APART,
        optical_offset: float = 0.0,
        progress: bool = False,
    ):
        require_rasterio()
        super().__init__(root)
        check_options(level, max_days_apart)
        folder, bands = LEVELS[level]
        self._sar_root, self._optical_root = require_folders(self.root, [SAR_FOLDER, folder], "SSL4EO-S12 v1.0")
        self._sar: list[str] = []  # scene; location and Sentinel-2 scene are in the id: there may be a million
        sar_locations, optical_locations = set(subfolders(self._sar_root)), set(subfolders(self._optical_root))
        locations = sorted(name for name in sar_locations | optical_locations if re.fullmatch(r"\d{7}", name))
        for location in tqdm(locations, "Pairing", unit=" locations", disable=not progress, delay=2):
            sar = self._dated_scenes(self._sar_root, location) if location in sar_locations else {}
            optical = self._dated_scenes(self._optical_root, location) if location in optical_locations else {}
            self._pair_up(location, sar, optical, max_days_apart)
        self._require_pairs(
            "SSL4EO-S12 v1.0",
            f"{SAR_FOLDER}/ and {folder}/ hold {len(locations):,} locations (folders of seven digits); of their "
            f"scenes, without a partner within {max_days_apart:g} days, ",
            f"{SAR_FOLDER}/<location>/<scene>/VV.tif and {folder}/<location>/<scene>/B2.tif",
        )
        self.info = PairsInfo(
            name="ssl4eo-s12-v1.0",
            source=f"SSL4EO-S12 v1.0, Sentinel-1 GRD and Sentinel-2 {level.upper()} (Wang et al. 2023, "
            "arXiv 2211.07044)",
            license="CC-BY-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=bands,
            optical_offset=optical_offset,
            optical_factors=() if self._is_resampled() else tuple(OPTICAL_RESOLUTION[band] // 10 for band in bands),
            statistics="ssl4eo-s12-v1.0",
            extra_columns=EXTRA_COLUMNS,
            pixel_size=10.0,
        )
        self.summary = (
            f"Found {len(self.ids):,} pairs of scenes within {max_days_apart:g} days in "
            f"{len({name.partition('_')[0] for name in self.ids}):,} of the 251,079 locations in {self.root}."
        )

    def _dated_scenes(self, root: Path, location: str) -> dict[str, float]:
        """Acquisition time in days of each scene of a location; scenes whose name holds none are left out."""
        scenes = {}
        for scene in sorted(subfolders(root / location)):
            days = _scene_days(scene)
            if math.isnan(days):
                self._left_out.append((f"{location}_{scene}", "its name holds no acquisition time"))
            else:
                scenes[scene] = days
        return scenes

    def _pair_up(self, location: str, sar: dict[str, float], optical: dict[str, float], max_days: float) -> None:
        """Append the pairs of one location, and what is left of its scenes."""
        sar_scenes, optical_scenes = list(sar), list(optical)
        pairs = pair_by_time(list(sar.values()), list(optical.values()), max_days)
        for sar_index, optical_index in pairs:
            self.ids.append(f"{location}_{optical_scenes[optical_index]}")
            self._sar.append(sar_scenes[sar_index])
        paired = ({optical_scenes[index] for _, index in pairs}, {sar_scenes[index] for index, _ in pairs})
        for scenes, used, other in ((optical, paired[0], "Sentinel-1"), (sar, paired[1], "Sentinel-2")):
            reason = f"no {other} scene of its location is left within {max_days:g} days"
            self._left_out += [(f"{location}_{scene}", reason) for scene in scenes if scene not in used]

    def _is_resampled(self) -> bool:
        """Whether the coarse bands of the first pair are on the 10 m grid. `read` checks each file against that."""
        try:
            return read_geotiff(self._folders(0)[1] / "B1.tif").values.shape[1] == PATCH_PIXELS
        except PairError:
            return False  # as in the official archive; `read` will name this file

    def _folders(self, index: int) -> tuple[Path, Path]:
        """Folders of the Sentinel-1 and the Sentinel-2 scene of a pair."""
        location, optical_scene = self.ids[index].split("_", 1)
        return self._sar_root / location / self._sar[index], self._optical_root / location / optical_scene

    def _ground_of(self, name: str) -> str:
        return name.partition("_")[0]  # seasons of a location

    def _read(self, index: int) -> Pair:
        sar_folder, optical_folder = self._folders(index)
        sar, optical = _read_sar(sar_folder), self._read_optical(optical_folder)
        require_same_footprint(sar_folder, sar, optical_folder, optical, MAX_PIXELS_APART)
        return Pair(
            id=self.ids[index],
            sar=sar.values,
            optical=optical.values,
            crs=optical.crs,
            transform=optical.transform,
            sar_time=_scene_time(sar_folder.name),
            optical_time=_scene_time(optical_folder.name),
            extra={
                "location": optical_folder.parent.name,
                "sar_scene": sar_folder.name,
                "optical_scene": optical_folder.name,
                "days_apart": abs(_scene_days(sar_folder.name) - _scene_days(optical_folder.name)),
            },
        )

    def _read_optical(self, folder: Path) -> Patch:
        bands = self.info.optical_bands
        values = np.empty((len(bands), PATCH_PIXELS, PATCH_PIXELS), dtype=np.uint16)
        crs, transform = None, None
        for target, band, factor in zip(values, bands, self.info.optical_factors or [1] * len(bands), strict=True):
            patch = _read_band(folder / f"{band.replace('B0', 'B')}.tif", PATCH_PIXELS // factor, "uint16")
            target[:] = patch.values[0].repeat(factor, axis=0).repeat(factor, axis=1)
            if factor == 1:
                crs, transform = patch.crs, patch.transform
        return Patch(values, crs, transform)


def check_options(level: str, max_days_apart: float) -> None:
    """Check the options that the readers of both versions of SSL4EO-S12 share.

    Raises:
        ValueError: names the option, what was given and what is possible.
    """
    require_one_of("level", level, LEVELS)
    if not max_days_apart >= 0:
        raise ValueError(f"max_days_apart is {max_days_apart}, but must be a number of days, at least 0.")


def pair_by_time(
    sar_days: Sequence[float], optical_days: Sequence[float], max_days_apart: float
) -> list[tuple[int, int]]:
    """Pair the scenes of one location by acquisition time: the two closest first, each scene at most once.

    Args:
        sar_days: time of each Sentinel-1 scene in days, in any order; NaN where it is unknown.
        optical_days: the same of the Sentinel-2 scenes.
        max_days_apart: most days between two scenes of a pair.

    Returns:
        (index of the Sentinel-1 scene, index of the Sentinel-2 scene) of each pair, in the order of the latter. Of
        equally close scenes the first ones are taken.
    """
    candidates = sorted(
        (abs(sar - optical), optical_index, sar_index)
        for sar_index, sar in enumerate(sar_days)
        for optical_index, optical in enumerate(optical_days)
        if abs(sar - optical) <= max_days_apart
    )
    partner: dict[int, int] = {}
    for _, optical_index, sar_index in candidates:
        if optical_index not in partner and sar_index not in partner.values():
            partner[optical_index] = sar_index
    return [(sar_index, optical_index) for optical_index, sar_index in sorted(partner.items())]


def _scene_time(scene: str) -> str | None:
    """Acquisition time in the name of a scene: the first time in it.

    Names of Sentinel-2 scenes start with it; the second time is that of the product.
    """
    return acquisition_time(f"_{scene}")


def _scene_days(scene: str) -> float:
    """The same in days since 1970; NaN where there is none."""
    time = _scene_time(scene)
    return math.nan if time is None else datetime.fromisoformat(time).timestamp() / _SECONDS_A_DAY


def _read_band(path: Path, pixels: int, dtype: str) -> Patch:
    return read_geotiff(path, count=1, size=(pixels, pixels), dtype=dtype)


def _read_sar(folder: Path) -> Patch:
    bands = [_read_band(folder / f"{band}.tif", PATCH_PIXELS, "float32") for band in SAR_BANDS]
    return Patch(np.concatenate([band.values for band in bands]), bands[0].crs, bands[0].transform)
