"""Where the demo takes its pairs from: the simulator, a folder of shards, or two uploaded files."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusmae_hf.app.pictures import LARGEST_SIDE
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions

SAMPLES_OFFERED = 12


@dataclass
class Samples:
    """Pairs to choose from.

    Attributes:
        names: shown to the user, in order.
        info: what holds for all of them.
        read: gives the pair at an index.
    """

    names: list[str]
    info: PairsInfo
    read: Callable[[int], Pair]


def simulated_samples(image_size: int) -> Samples:
    """Made-up pairs of as many places, `image_size` px a side."""
    pairs = SimulatedPairs(SAMPLES_OFFERED, 50, SimulationOptions(image_size=image_size, pairs_per_place=1))
    extras = [pairs.read(index).extra for index in range(len(pairs))]
    names = [f"{number}: {extra['landscape']}, {extra['season']}" for number, extra in enumerate(extras, 1)]
    return Samples(names, pairs.info, pairs.read)


def shard_samples(folder: str | os.PathLike[str], split: str) -> Samples:
    """Pairs spread evenly over one split of a prepared folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such split, or a shard is damaged.
    """
    dataset = load_pairs(folder, split, streaming=True)
    rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLES_OFFERED).round().astype(int)).tolist()

    def read(index: int) -> Pair:
        item = dataset[rows[index]]
        return Pair(item["id"], sar=item["sar"].numpy(), optical=item["optical"].numpy())

    return Samples([f"{split} {row}" for row in rows], dataset.info, read)


def read_upload(
    sar: str | None,
    optical: str | None,
    sar_bands: str,
    optical_bands: str,
    sar_units: str,
    optical_units: str,
    offset: str | None,
) -> tuple[Pair, PairsInfo]:
    """The pair in two uploaded files, as its user describes it: nothing is guessed.

    Args:
        sar: GeoTIFF or `.npy` `(bands, height, width)`.
        optical: the same.
        sar_bands: names of the bands in the order of the file, separated by commas.
        optical_bands: the same.
        sar_units, optical_units: as in `PairsInfo`.
        offset: what to subtract from the optical values, in digital numbers.

    Raises:
        ValueError: something is not given, or does not fit the files.
        ImportError: a GeoTIFF was given, but rasterio is not installed.
    """
    if not sar or not optical:
        given = " and ".join(name for name, path in (("SAR", sar), ("optical", optical)) if path) or "no"
        raise ValueError(f"Given: {given} file. Expected: a SAR and an optical file of the same place. Upload both.")
    if offset is None or not offset.strip():
        raise ValueError(
            "Given: no offset. Expected: what to subtract from the digital numbers, 1000 for products of processing "
            "baseline 04.00 and later that still carry it, otherwise 0. Fill in the field."
        )
    try:
        subtracted = float(offset)
    except ValueError:
        raise ValueError(f"Given: offset {offset!r}. Expected: a number such as 0 or 1000. Correct it.") from None
    names = {"SAR": _names(sar_bands), "optical": _names(optical_bands)}
    images, grids = {}, {}
    for sensor, path, no_data in (("SAR", sar, np.nan), ("optical", optical, 0)):
        images[sensor], grids[sensor] = _read_image(Path(path), no_data)
        if len(names[sensor]) != len(images[sensor]):
            raise ValueError(
                f"Given: {len(names[sensor])} names {list(names[sensor])} for the {sensor} file, which has "
                f"{len(images[sensor])} bands. Expected: one name a band, in the order of the file. Correct them."
            )
    if not _same_grid(grids["SAR"], grids["optical"]):
        raise ValueError(
            "Given: two GeoTIFFs whose coordinate systems or corners differ. Expected: the same place on the same "
            "grid. Resample one file to the other's grid."
        )
    info = PairsInfo(
        name="upload",
        source="uploaded",
        license="unknown",
        sar_bands=names["SAR"],
        optical_bands=names["optical"],
        sar_units=sar_units,
        optical_units=optical_units,
        optical_offset=subtracted,
    )
    return Pair(f"{Path(sar).name} and {Path(optical).name}", sar=images["SAR"], optical=images["optical"]), info


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _same_grid(one: tuple[Any, Any] | None, other: tuple[Any, Any] | None) -> bool:
    """Whether coordinate systems agree, and transforms but for float error. What has none may lie anywhere."""
    if one is None or other is None:
        return True
    return one[0] == other[0] and np.allclose(one[1], other[1], rtol=1e-9, atol=1e-9)


def _read_image(path: Path, no_data: float) -> tuple[np.ndarray, tuple[Any, Any] | None]:
    """Image `(bands, height, width)` of a file, and of a GeoTIFF its coordinate system and transform."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            image, grid = np.lib.format.open_memmap(path, mode="r"), None
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"Given: {path.name}, which is no sound .npy file ({error}). Save it anew.") from None
        _check_shape(path.name, image.shape)
        if image.dtype.kind not in "uif":
            raise ValueError(f"Given: {path.name} of {image.dtype}. Expected: real numbers. Save it as such.")
    elif suffix in (".tif", ".tiff"):
        rasterio = require_rasterio()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                # Of all drivers this alone: others follow what a file says to other files and hosts.
                with rasterio.open(path, driver="GTiff") as file:
                    _check_shape(path.name, (file.count, file.height, file.width))
                    image = file.read(masked=True)
                    grid = (file.crs, file.transform) if file.crs else None
        except rasterio.errors.RasterioError as error:
            raise ValueError(f"Given: {path.name}, which is no sound GeoTIFF ({error}). Save it anew.") from None
        image = (image.astype(np.float32) if np.isnan(no_data) else image).filled(no_data)
    else:
        raise ValueError(f"Given: {path.name}. Expected: a GeoTIFF (.tif, .tiff) or .npy file. Convert it.")
    # In the bytes of this machine, as tensors are. What holds integers stays so, since units are told by it.
    return np.array(image, dtype=np.float32 if image.dtype.kind == "f" else np.int64), grid


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Refuse before pixels are read."""
    if len(shape) != 3 or not all(1 <= side <= LARGEST_SIDE for side in shape):
        raise ValueError(
            f"Given: {name} of shape {shape}. Expected: (bands, height, width), at most {LARGEST_SIDE} px a side. "
            "Crop it, or move its bands to the front."
        )
