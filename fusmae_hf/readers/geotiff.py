"""GeoTIFFs for the dataset readers: their pixels and their place.

`read_geotiff` and `read_pixels` take the many files of one plain kind apart themselves (`plain_tiff`) and leave every
other file to rasterio, so that they always give what rasterio gives.
"""

import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fusmae_hf.data.pairs import Pair
from fusmae_hf.errors import PairError
from fusmae_hf.readers.plain_tiff import PlainFile, open_plain

_known_crs: dict[tuple[bytes, ...], str] = {}
"""CRS that rasterio gave, by the bytes of the GeoKeys it came from: see `read_geotiff`."""

_KNOWN_CRS_LIMIT = 1024


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
            "Reading GeoTIFF needs rasterio, which is not installed. Install it "
            'with `pip install -e ".[data]"` in a clone of the repository.'
        ) from error
    return rasterio


def read_geotiff(
    path: str | Path,
    *,
    count: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: str | tuple[str, ...] | None = None,
) -> Patch:
    """Read all bands of a GeoTIFF, and its place; nothing is converted.

    The CRS of a plain file follows from its GeoKeys alone. rasterio makes it of those of the first file that has them
    and, where it finds the same transform in that file, the result stands for later files with the same bytes.

    Args:
        path: the file.
        count: expected number of bands; None takes any.
        size: expected (height, width) in pixels; None takes any.
        dtype: expected numpy dtype, or several that will do; None takes any.

    Returns:
        `Patch` whose `values` are `(bands, height, width)`.

    Raises:
        PairError: the file is missing, unreadable or incomplete, or is not what is expected; names it.
    """
    file = _plain_file(path)
    if file is None:
        return _read_with_rasterio(path, count, size, dtype)
    keys, transform = file.geo_keys(), file.transform()
    # GDAL lets them overrule the file.
    has_sidecar = os.path.exists(f"{path}.aux.xml") or os.path.exists(f"{path}.msk")
    crs = None if has_sidecar or transform is None else _known_crs.get(keys)
    if crs is None:
        patch = _read_with_rasterio(path, count, size, dtype)
        if patch.crs and patch.transform == transform and not has_sidecar and len(_known_crs) < _KNOWN_CRS_LIMIT:
            _known_crs[keys] = patch.crs
        return patch
    _require_expected(path, (1, file.layout.shape, file.layout.dtype), count, size, dtype)
    return Patch(file.pixels()[None], crs, transform)


def read_pixels(path: str | Path, size: tuple[int, int], dtype: str) -> np.ndarray:
    """Read a GeoTIFF of one band without its place.

    Args:
        path: the file.
        size: expected (height, width) in pixels.
        dtype: expected numpy dtype.

    Returns:
        `(height, width)` in that dtype.

    Raises:
        PairError: as `read_geotiff`.
    """
    file = _plain_file(path)
    if file is None:
        return _read_with_rasterio(path, 1, size, dtype).values[0]
    _require_expected(path, (1, file.layout.shape, file.layout.dtype), 1, size, dtype)
    return file.pixels()


def _plain_file(path: str | Path) -> PlainFile | None:
    """The file if it is plain, else None; `PairError` where it cannot be opened."""
    try:
        return open_plain(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_such_file(Path(path)) from error
    except OSError as error:
        raise PairError(
            f"{path}: cannot be read as GeoTIFF ({error.strerror}). Check who may read it, and the disk."
        ) from error


def _read_with_rasterio(
    path: str | Path, count: int | None, size: tuple[int, int] | None, dtype: str | tuple[str, ...] | None
) -> Patch:
    """What `read_geotiff` does, for any GeoTIFF."""
    rasterio = require_rasterio()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # `crs` is then None
            # Of all drivers this alone: others follow what a file says to other files and hosts.
            with rasterio.open(path, driver="GTiff") as file:
                _require_expected(path, (file.count, (file.height, file.width), file.dtypes[0]), count, size, dtype)
                _require_as_stored(path, file)
                crs = file.crs.to_string() if file.crs else None
                return Patch(file.read(), crs, tuple(file.transform)[:6] if crs else None)
    except (rasterio.errors.RasterioError, ValueError, MemoryError) as error:  # text or sizes that make no sense
        if not Path(path).exists():
            raise _no_such_file(Path(path)) from error
        raise PairError(
            f"{path}: cannot be read as GeoTIFF ({error}). The file is damaged or incomplete: unpack it again."
        ) from error


def _require_as_stored(path: str | Path, file: Any) -> None:
    """Refuse a file whose values are not those of its pixels, by its own word; no archive has such files."""
    scales, offsets = sorted({*file.scales}), sorted({*file.offsets})
    declared = f"scale {scales} and offset {offsets}" if (scales, offsets) != ([1], [0]) else ""
    flags = [{flag.name for flag in of_band} for of_band in file.mask_flag_enums]
    if any("per_dataset" in of_band and "nodata" not in of_band for of_band in flags):
        without = int((file.dataset_mask() == 0).sum())
        declared = declared or (f"{without:,} pixels without data by a mask" if without else "")
    if declared:
        raise PairError(
            f"{path}: declares {declared}, which the files of the official archive do not. Replace it, or read such "
            "files with `fusmae prepare geotiffs`, which heeds them."
        )


def _require_expected(
    path: str | Path,
    found: tuple[int, tuple[int, int], str],
    count: int | None,
    size: tuple[int, int] | None,
    dtype: str | tuple[str, ...] | None,
) -> None:
    count, size, dtypes = count or found[0], size or found[1], (dtype,) if isinstance(dtype, str) else dtype
    if found[:2] != (count, size) or (dtypes and found[2] not in dtypes):
        raise PairError(
            f"{path}: expected {count} {'band' if count == 1 else 'bands'} of {size[0]}x{size[1]} pixels in "
            f"{' or '.join(dtypes or found[2:])}, found {found[0]} of {found[1][0]}x{found[1][1]} in {found[2]}. "
            "Replace the file by the one of the official archive."
        )


def _no_such_file(path: Path) -> PairError:
    beside = sorted(file.name for file in path.parent.glob("*.tif"))
    more = f" and {len(beside) - 16:,} more" if len(beside) > 16 else ""
    return PairError(f"{path}: no such file; {path.parent} holds {beside[:16] or 'no .tif file'}{more}.")


def require_same_footprint(path: Path, patch: Patch, optical_path: Path, optical: Patch, max_pixels: int = 1) -> None:
    """Refuse patches that lie in different places: in another CRS, or more than `max_pixels` optical pixels apart.

    Raises:
        PairError: names both files or folders and their upper left corners. Patches without a CRS are not compared.
    """
    if patch.transform is None or optical.transform is None:
        return
    width, _, x, _, height, y = optical.transform
    corner = (patch.transform[2], patch.transform[5])
    apart = abs(corner[0] - x) > max_pixels * abs(width) or abs(corner[1] - y) > max_pixels * abs(height)
    if patch.crs != optical.crs or apart:
        raise PairError(
            f"{path} and {optical_path} are not the same place: upper left corners {corner} in {patch.crs} and "
            f"{(x, y)} in {optical.crs}. They are no partners: unpack both again from the official archive, and check "
            "the lists or metadata that pair them."
        )


def require_codes(path: Path | str, codes: np.ndarray, known: Collection[int | None], expected: str) -> None:
    """Refuse a label map that holds other codes than the known ones.

    Raises:
        PairError: names the file, the codes, and what is expected.
    """
    unknown = sorted(set(np.unique(codes).tolist()).difference(known))
    if unknown:
        raise PairError(f"{path}: holds the codes {unknown[:8]}{' ...' if len(unknown) > 8 else ''}, but {expected}.")


def read_files(
    name: str,
    sar: Path,
    optical: Path,
    label_map: Path | None = None,
    *,
    num_bands: int,
    dtypes: tuple[str | tuple[str, ...], str | tuple[str, ...], str | tuple[str, ...]],
    sides: tuple[int, ...],
    map_bands: int = 1,
) -> Pair:
    """Read a pair of two files, VV and VH in the one and all optical bands in the other, and its label map.

    Args:
        name: id of the pair.
        sar: the file of Sentinel-1.
        optical: the file of Sentinel-2.
        label_map: the file whose first band is the label map, if there is one.
        num_bands: expected number of optical bands.
        dtypes: what will do for the SAR, the optical and the label map file.
        sides: sides in pixels that the square patches of a pair may have, the same in all its files.
        map_bands: expected number of bands of the label map file.

    Returns:
        The pair with pixels and place.

    Raises:
        PairError: a file is missing, unreadable or not as expected, or lies elsewhere.
    """
    seen = read_geotiff(optical, count=num_bands, dtype=dtypes[1])
    size = height, width = seen.values.shape[1:]
    if size not in [(side, side) for side in sides]:
        raise PairError(
            f"{optical}: expected {' or '.join(f'{side}x{side}' for side in sides)} pixels, found {height}x{width}. "
            "Replace the file by the one of the official archive."
        )
    backscatter = read_geotiff(sar, count=2, size=size, dtype=dtypes[0])
    require_same_footprint(sar, backscatter, optical, seen)
    pair = Pair(name, backscatter.values, seen.values, crs=seen.crs, transform=seen.transform)
    if label_map is not None:
        codes = read_geotiff(label_map, count=map_bands, size=size, dtype=dtypes[2])
        require_same_footprint(label_map, codes, optical, seen)
        pair.label_map = codes.values[0]
    return pair
