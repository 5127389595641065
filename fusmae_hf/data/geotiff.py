"""What the BigEarthNet readers share: per-band GeoTIFFs of one footprint, brought to one 10 m grid."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType

import numpy as np

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION, SAR_BANDS

from .pairs import PairError

PATCH_METRES = 1200
"""Side of a BigEarthNet patch on the ground; its 10 m bands are therefore 120x120 pixels."""

PATCH_PIXELS = PATCH_METRES // 10
"""Side of a patch on the 10 m grid to which every band is brought."""


@dataclass(frozen=True)
class Patch:
    """The bands of one sensor on one grid.

    Attributes:
        values: `(bands, height, width)`, dtype of the files.
        crs: `EPSG:<code>` or WKT, None where the files carry none.
        transform: (a, b, c, d, e, f) of the affine pixel-to-map transform in rasterio's order, or None.
    """

    values: np.ndarray
    crs: str | None
    transform: tuple[float, ...] | None


def require_rasterio() -> ModuleType:
    """Import rasterio.

    Raises:
        ImportError: it is not installed; names the pip command.
    """
    try:
        import rasterio
    except ImportError as error:
        raise ImportError(
            "Reading GeoTIFF needs rasterio, which is not installed. Install it with `pip install fusmae_hf[data]`."
        ) from error
    return rasterio


def read_geotiff(
    path: Path, *, count: int | None = None, size: tuple[int, int] | None = None, dtype: str | None = None
) -> Patch:
    """Read all bands of a GeoTIFF; nothing is converted.

    Args:
        path: the file.
        count: expected number of bands; None takes any.
        size: expected (height, width) in pixels; None takes any.
        dtype: expected numpy dtype; None takes any.

    Returns:
        `Patch` whose `values` are `(bands, height, width)`.

    Raises:
        PairError: the file is missing or unreadable, or is not what is expected.
    """
    rasterio = require_rasterio()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # `crs` is then None
            with rasterio.open(path) as file:
                found = (file.count, (file.height, file.width), file.dtypes[0])
                expected = (count or found[0], size or found[1], dtype or found[2])
                if found != expected:
                    raise PairError(
                        f"{path}: expected {expected[0]} {'band' if expected[0] == 1 else 'bands'} of "
                        f"{expected[1][0]}x{expected[1][1]} pixels in {expected[2]}, found {found[0]} of "
                        f"{found[1][0]}x{found[1][1]} in {found[2]}. Replace the file by the one of the official "
                        "archive."
                    )
                crs = file.crs.to_string() if file.crs else None
                return Patch(file.read(), crs, tuple(file.transform)[:6] if crs else None)
    except rasterio.errors.RasterioError as error:
        if not path.exists():
            beside = sorted(file.name for file in path.parent.glob("*.tif"))
            more = f" and {len(beside) - 16:,} more" if len(beside) > 16 else ""
            raise PairError(
                f"{path}: no such file; {path.parent} holds {beside[:16] or 'no .tif file'}{more}."
            ) from error
        raise PairError(
            f"{path}: cannot be read as GeoTIFF ({error}). The file is damaged or incomplete: unpack it again."
        ) from error


def read_band(path: Path, pixels: int, dtype: str) -> Patch:
    """Read a GeoTIFF of one band with `pixels` x `pixels` pixels: see `read_geotiff`."""
    return read_geotiff(path, count=1, size=(pixels, pixels), dtype=dtype)


def read_sar(folder: Path) -> Patch:
    """Read `<folder>/<folder name>_VV.tif` and `_VH.tif`: float32 backscatter in dB, `(2, 120, 120)`, VV first."""
    bands = [read_band(folder / f"{folder.name}_{band}.tif", PATCH_PIXELS, "float32") for band in SAR_BANDS]
    return Patch(np.concatenate([band.values for band in bands]), bands[0].crs, bands[0].transform)


def read_optical(folder: Path) -> Patch:
    """Read the 12 Level-2A bands `<folder>/<folder name>_<band>.tif` onto the 10 m grid.

    The files of the 20 m bands have 60x60 and those of the 60 m bands 20x20 pixels. Each of their pixels is repeated
    2x2 or 6x6 times (nearest neighbour), so that every value is a digital number of the source and nothing is
    interpolated.

    Returns:
        `Patch` with `(12, 120, 120)` uint16 digital numbers in the order of `sensors_fusmae.OPTICAL_BANDS`.

    Raises:
        PairError: a band is missing, unreadable, or has another size or dtype.
    """
    values = np.empty((len(OPTICAL_BANDS), PATCH_PIXELS, PATCH_PIXELS), dtype=np.uint16)
    crs, transform = None, None
    for index, band in enumerate(OPTICAL_BANDS):
        pixels = PATCH_METRES // OPTICAL_RESOLUTION[band]
        patch = read_band(folder / f"{folder.name}_{band}.tif", pixels, "uint16")
        repeats = PATCH_PIXELS // pixels
        values[index] = patch.values[0].repeat(repeats, axis=0).repeat(repeats, axis=1)
        if repeats == 1:
            crs, transform = patch.crs, patch.transform
    return Patch(values, crs, transform)


def require_same_footprint(sar_folder: Path, sar: Patch, optical_folder: Path, optical: Patch) -> None:
    """Refuse a pair whose patches lie in different places (more than one 10 m pixel apart, or in another CRS).

    Raises:
        PairError: names both folders and their upper left corners. Patches without a CRS are not compared.
    """
    if sar.transform is None or optical.transform is None:
        return
    corners = [(patch.transform[2], patch.transform[5]) for patch in (sar, optical) if patch.transform]
    apart = max(abs(a - b) for a, b in zip(*corners, strict=True))
    if sar.crs != optical.crs or apart > PATCH_METRES / PATCH_PIXELS:
        raise PairError(
            f"{sar_folder} and {optical_folder} are not the same place: upper left corners {corners[0]} in {sar.crs} "
            f"and {corners[1]} in {optical.crs}. They are no partners: check the metadata that pairs them."
        )


def require_folders(root: Path, names: Sequence[str], dataset: str) -> list[Path]:
    """The named sub-folders of `root`.

    Raises:
        FileNotFoundError: one is missing; says what was searched, what is there and what to give instead.
    """
    missing = [name for name in names if not (root / name).is_dir()]
    if not missing:
        return [root / name for name in names]
    if not root.is_dir():
        found = "no such folder"
    else:
        inside = sorted(entry.name for entry in root.iterdir())
        found = (
            f"the folder holds {inside[:8]}{' ...' if len(inside) > 8 else ''}" if inside else "the folder is empty"
        )
    hint = "the folder above it" if root.name in names else f"the folder that holds {' and '.join(names)}"
    raise FileNotFoundError(f"{dataset}: looked for {missing} in {root}, but {found}. Give {hint}.")


def subfolders(folder: Path) -> Iterator[str]:
    """Names of the folders in `folder`, in no order, with one directory scan (no call for each entry)."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if entry.is_dir())


def acquisition_time(name: str) -> str | None:
    """Acquisition time (UTC, ISO 8601) in a Sentinel product or patch name, or None where it holds no valid one."""
    match = re.search(r"_(\d{8}T\d{6})_", name)
    if match is None:
        return None
    try:
        return datetime.strptime(match.group(1), "%Y%m%dT%H%M%S").isoformat() + "Z"
    except ValueError:
        return None
