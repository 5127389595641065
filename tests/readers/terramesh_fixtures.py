"""A tiny TerraMesh in the layout of its published sample, made at test time."""

from pathlib import Path

import numpy as np
import rasterio

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C

VV_DB, VH_DB = -12.703125, -19.296875
SAMPLES = ("433D_629L_3_1", "637U_59R_1_3")
SAR_TIME = "2020-04-11T23:43:09.000000000"


def optical_value(band: str) -> int:
    """Digital number of a band; tells the bands apart."""
    return 300 + 100 * OPTICAL_BANDS_L1C.index(band)


def write_sample_file(
    path: Path, values: np.ndarray, *, east: float = 0, crs: str | None = "EPSG:32718", **tags: str
) -> None:
    """Write (bands, height, width) as GeoTIFF, `east` metres from the place of the fixture."""
    count, height, width = values.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    if crs:
        profile |= {"crs": crs, "transform": rasterio.Affine(10, 0, 717_729.835 + east, 0, -10, 5_700_093.331)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", compress="deflate", **profile) as file:
        file.write(values)
        file.update_tags(**tags)


def backscatter(size: int = 224) -> np.ndarray:
    """(2, size, size) float64 dB; one pixel of VH is missing."""
    values = np.broadcast_to(np.array([VV_DB, VH_DB])[:, None, None], (2, size, size)).copy()
    values[1, 0, 1] = np.nan
    return values


def reflectances(bands: tuple[str, ...], offset: int = 0, size: int = 224) -> np.ndarray:
    """(bands, size, size) int16; one pixel has no data."""
    values = np.array([optical_value(band) + offset for band in bands], np.int16)
    patch = np.broadcast_to(values[:, None, None], (len(bands), size, size)).copy()
    patch[:, 0, 0] = 0
    return patch


def land_cover(size: int = 224) -> np.ndarray:
    """(1, size, size) uint8: trees above crops, and a corner without data."""
    values = np.full((1, size, size), 2, np.uint8)
    values[0, size // 2 :] = 4
    values[0, 0, 0] = 0
    return values


def make_terramesh(root: Path, size: int = 224) -> Path:
    """Two samples in all modalities; the first carries the 1000 of baseline 04.00."""
    for name, offset in zip(SAMPLES, (1000, 0), strict=True):
        file = f"{name}.tif"
        write_sample_file(root / "S1RTC" / file, backscatter(size), datetime=SAR_TIME)
        write_sample_file(root / "S2L2A" / file, reflectances(OPTICAL_BANDS, offset, size))
        write_sample_file(root / "S2L1C" / file, reflectances(OPTICAL_BANDS_L1C, offset, size))
        write_sample_file(root / "LULC" / file, land_cover(size))
    return root
