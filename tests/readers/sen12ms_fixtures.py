"""Tiny archives of SEN12MS and DFC2020 in their exact layouts, made at test time."""

import warnings
from pathlib import Path

import numpy as np
import rasterio

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C

PIXELS = 256
# Backscatter with decimals, VV 7 dB above VH: an integer or swapped band shows.
VV_DB, VH_DB = -9.7, -16.3

# Season, scene, patch; one on the train list by its s2 name, one by its s1 name, one on the test list, one on none.
SEN12MS_PATCHES = [
    ("ROIs1158_spring", 1, 30),
    ("ROIs1158_spring", 106, 4),
    ("ROIs1868_summer", 22, 7),
    ("ROIs2017_winter", 102, 512),
]
SEN12MS_LISTS = {
    "train_list.txt": ["ROIs1158_spring_s2_1_p30.tif", "ROIs1868_summer_s1_22_p7.tif", "ROIs1970_fall_s2_3_p9.tif"],
    "test_list.txt": ["ROIs2017_winter_s2_102_p512.tif"],
}

DFC2020_PATCHES = [("validation", 0), ("validation", 12), ("test", 3), ("test", 5127)]
# The folders of the two splits end in different words, and so do the files in them.
DFC2020_ENDINGS = {"validation": "validation", "test": "0"}


def write_tif(
    path: Path, values: np.ndarray, corner: tuple[float, float] = (600_000, 5_800_000), crs: str | None = "EPSG:32633"
) -> None:
    """Write (bands, height, width) as one GeoTIFF of 10 m pixels, without a place where `crs` is None."""
    count, height, width = values.shape
    place = {"crs": crs, "transform": rasterio.Affine(10, 0, corner[0], 0, -10, corner[1])} if crs else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", compress="deflate", **profile, **place) as file:
            file.write(values)


def backscatter(pixels: int = PIXELS) -> np.ndarray:
    """(2, pixels, pixels) float32 dB."""
    texture = np.sin(np.arange(pixels * pixels, dtype=np.float32)).reshape(pixels, pixels)
    return np.stack([np.float32(VV_DB) + texture, np.float32(VH_DB) + texture])


def digital_numbers(pixels: int = PIXELS) -> np.ndarray:
    """(13, pixels, pixels) uint16: 400, 500, 600 and so on in the official order of the bands."""
    rows, columns = np.indices((pixels, pixels))
    return np.stack([400 + 100 * i + (rows + columns) % 50 for i in range(len(OPTICAL_BANDS_L1C))]).astype(np.uint16)


def igbp_rows() -> np.ndarray:
    """(256, 256) IGBP codes in rows: 128 of cropland (two codes), 20 town, 32 water, 26 none, 50 forest."""
    rows = np.repeat([12, 14, 13, 17, 0, 5], [64, 64, 20, 32, 26, 50])
    return np.repeat(rows[:, None], PIXELS, axis=1).astype(np.uint16)


def land_cover() -> np.ndarray:
    """(4, 256, 256) uint16: IGBP, and the three LCCS layers, whose codes mean something else."""
    return np.stack([igbp_rows(), *(np.full((PIXELS, PIXELS), code, np.uint16) for code in (11, 30, 1))])


def dfc_rows() -> np.ndarray:
    """(1, 256, 256) uint8: codes of DFC2020 in rows: 100 of forest, 100 of water, 56 of none."""
    rows = np.repeat([1, 10, 0], [100, 100, 56])
    return np.repeat(rows[:, None], PIXELS, axis=1).astype(np.uint8)[None]


def sen12ms_path(root: Path, name: str, kind: str) -> Path:
    """Where the file of a kind (s1, s2, lc) of a pair lies: `ROIs1158_spring_1_p30` and so on."""
    season, scene, patch = name.rsplit("_", 2)
    return root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_{patch}.tif"


def make_sen12ms(root: Path) -> Path:
    """SEN12MS with `SEN12MS_PATCHES`, and the official lists (with a patch not on disk) in `<root>/splits`."""
    for season, scene, patch in SEN12MS_PATCHES:
        for kind, values in (("s1", backscatter()), ("s2", digital_numbers()), ("lc", land_cover())):
            write_tif(sen12ms_path(root, f"{season}_{scene}_p{patch}", kind), values)
    (root / "splits").mkdir()
    for file, lines in SEN12MS_LISTS.items():
        (root / "splits" / file).write_text("\n".join(lines) + "\n")
    return root


def dfc2020_path(root: Path, split: str, patch: int, kind: str) -> Path:
    """Where the file of a kind (s1, s2, lc, dfc) of a pair lies."""
    folder, ending = f"ROIs0000_{split}", DFC2020_ENDINGS[split]
    return root / folder / f"{kind}_{ending}" / f"{folder}_{kind}_{ending}_p{patch}.tif"


def make_dfc2020(root: Path) -> Path:
    """DFC2020 with `DFC2020_PATCHES`."""
    files = {"s1": backscatter(), "s2": digital_numbers(), "lc": land_cover(), "dfc": dfc_rows()}
    for split, patch in DFC2020_PATCHES:
        for kind, values in files.items():
            write_tif(dfc2020_path(root, split, patch, kind), values)
    return root
