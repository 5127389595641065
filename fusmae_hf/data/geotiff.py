"""GeoTIFFs for the dataset readers: their pixels, their place, and the folders they lie in.

Archives of Sentinel patches hold millions of small files, and a general library takes several times longer to open one
than to read its bytes. Nearly all are of one plain kind: a single band, uncompressed, in strips that follow one
another. `read_geotiff` and `read_pixels` take that kind apart themselves and leave every other file to rasterio, so
that they always give what rasterio gives. `benchmarks/tiff_reading.py` measures what this saves.

Sources: TIFF Revision 6.0 (Adobe, 1992), sections 2 and 8; OGC GeoTIFF 1.1 (19-008r4), section 7.1 and annex B.
"""

import math
import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from .pairs import PairError

GRID_METRES = 10
"""Pixel of the finest Sentinel-2 bands, and of the grid on which datasets give both sensors."""

_PLAIN_LIMIT, _STRIPS_LIMIT = 1 << 24, 4096
"""Files of more bytes or strips are left to rasterio: beside their pixels, opening them costs little."""

_SHORT, _LONG, _DOUBLE, _TEXT = 3, 4, 12, 2
_TYPE_BYTES = {_TEXT: 1, _SHORT: 2, _LONG: 4, _DOUBLE: 8}
_TYPE_CODES = {_SHORT: "H", _LONG: "I"}

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIP_OFFSETS = 256, 257, 258, 259, 262, 273
_SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR, _SAMPLE_FORMAT = 277, 278, 279, 284, 339
_PIXEL_SCALE, _TIEPOINT, _GEO_KEYS, _GEO_DOUBLES, _GEO_TEXT, _NO_DATA = 33550, 33922, 34735, 34736, 34737, 42113

_NUMBERS = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _STRIP_ROWS, _PLANAR, _SAMPLE_FORMAT}
_TABLES = {_STRIP_OFFSETS, _STRIP_BYTES}
_GEO_TYPES = {_PIXEL_SCALE: _DOUBLE, _TIEPOINT: _DOUBLE, _GEO_KEYS: _SHORT, _GEO_DOUBLES: _DOUBLE, _GEO_TEXT: _TEXT}
_PLAIN_TAGS = _NUMBERS | _TABLES | _GEO_TYPES.keys() | {_NO_DATA}
"""Tags of a plain file. Any other might change what the pixels mean or where they lie."""

_PLAIN_DTYPES = {
    (1, 8): "uint8", (1, 16): "uint16", (1, 32): "uint32", (2, 16): "int16", (2, 32): "int32",
    (3, 32): "float32", (3, 64): "float64",
}  # fmt: skip
"""Numpy dtype by SampleFormat and BitsPerSample."""

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


@dataclass(frozen=True)
class _Layout:
    """What the directory of a plain file says. Positions count from the start of the file.

    Attributes:
        dtype: of the pixels, which are little-endian.
        shape: `(height, width)`.
        strip_bytes: size that each strip must have.
        tables: struct format and position of the offsets, then of the sizes of the strips.
        pixel_scale: position of three float64.
        tiepoint: position of six float64.
        geo_keys: first byte and end of each part of the GeoKeys.
        end: the file holds at least so many bytes.
    """

    dtype: str
    shape: tuple[int, int]
    strip_bytes: tuple[int, ...]
    tables: tuple[tuple[str, int], tuple[str, int]]
    pixel_scale: int
    tiepoint: int
    geo_keys: tuple[tuple[int, int], ...]
    end: int


@dataclass(frozen=True)
class _PlainFile:
    """A plain file in memory, its strips known to be whole.

    Attributes:
        content: all bytes.
        layout: where things lie.
        start: position of the first pixel.
    """

    content: bytes
    layout: _Layout
    start: int

    def pixels(self) -> np.ndarray:
        """`(height, width)` in native byte order; memory of its own."""
        little_endian = np.dtype(self.layout.dtype).newbyteorder("<")
        stored = np.frombuffer(self.content, little_endian, math.prod(self.layout.shape), self.start)
        return stored.astype(self.layout.dtype).reshape(self.layout.shape)

    def geo_keys(self) -> tuple[bytes, ...]:
        """The bytes that say the CRS."""
        return tuple(self.content[first:end] for first, end in self.layout.geo_keys)

    def transform(self) -> tuple[float, ...] | None:
        """(a, b, c, d, e, f) of a north-up grid whose upper left corner is the tiepoint, or None for any other."""
        width, height, _ = struct.unpack_from("<3d", self.content, self.layout.pixel_scale)
        column, row, _, x, y, _ = struct.unpack_from("<6d", self.content, self.layout.tiepoint)
        if not (width > 0 and height > 0 and column == row == 0 and math.isfinite(width + height + x + y)):
            return None
        return (width, 0.0, x, 0.0, -height, y)


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
    path: str | Path, *, count: int | None = None, size: tuple[int, int] | None = None, dtype: str | None = None
) -> Patch:
    """Read all bands of a GeoTIFF, and its place; nothing is converted.

    The CRS of a plain file follows from its GeoKeys alone. rasterio makes it of those of the first file that has them
    and, where it finds the same transform in that file, the result stands for later files with the same bytes.

    Args:
        path: the file.
        count: expected number of bands; None takes any.
        size: expected (height, width) in pixels; None takes any.
        dtype: expected numpy dtype; None takes any.

    Returns:
        `Patch` whose `values` are `(bands, height, width)`.

    Raises:
        PairError: the file is missing, unreadable or incomplete, or is not what is expected; names it.
    """
    file = _open_plain(path)
    if file is None:
        return _read_with_rasterio(path, count, size, dtype)
    keys, transform = file.geo_keys(), file.transform()
    has_sidecar = os.path.exists(f"{path}.aux.xml")  # GDAL lets it overrule the file
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
    file = _open_plain(path)
    if file is None:
        return _read_with_rasterio(path, 1, size, dtype).values[0]
    _require_expected(path, (1, file.layout.shape, file.layout.dtype), 1, size, dtype)
    return file.pixels()


def _open_plain(path: str | Path) -> _PlainFile | None:
    """Read the bytes of a file if it is plain and whole, else None: rasterio shall say what it is.

    Raises:
        PairError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # a file object takes half as long again
        try:
            size = os.fstat(descriptor).st_size
            content = os.read(descriptor, size) if size <= _PLAIN_LIMIT else b""
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_such_file(Path(path)) from error
    except OSError as error:
        raise PairError(
            f"{path}: cannot be read as GeoTIFF ({error.strerror}). Check who may read it, and the disk."
        ) from error
    if content[:4] != b"II*\0" or len(content) < 8:
        return None  # big-endian, BigTIFF or no TIFF
    (start,) = struct.unpack_from("<I", content, 4)
    entries = int.from_bytes(content[start : start + 2], "little")
    directory = content[start + 2 : start + 2 + 12 * entries + 4]
    layout = _plain_layout(directory, start + 2) if len(directory) == 12 * entries + 4 else None
    if layout is None or len(content) < layout.end:
        return None
    offsets, sizes = (struct.unpack_from(code, content, position) for code, position in layout.tables)
    end = offsets[0]
    for offset, stored, size in zip(offsets, sizes, layout.strip_bytes, strict=True):
        if offset != end or stored != size:
            return None
        end += size
    return _PlainFile(content, layout, offsets[0]) if end <= len(content) else None


@lru_cache(maxsize=256)  # the files of an archive have few distinct directories: a band's differ in nothing
def _plain_layout(directory: bytes, start: int) -> _Layout | None:
    """Understand the directory of a plain file; None where anything in it is unusual.

    Args:
        directory: its entries (tag, type, number of values, value or position) and the position of the next directory.
        start: position of the first entry.
    """
    numbers: dict[int, int] = {_SAMPLES: 1, _PLANAR: 1, _SAMPLE_FORMAT: 1}
    places: dict[int, tuple[int, int, int]] = {}  # type, number of values and position by tag
    previous = 0
    for index, (tag, kind, count, value) in enumerate(struct.iter_unpack("<HHII", directory[:-4])):
        value_bytes = count * _TYPE_BYTES.get(kind, 0)
        if tag <= previous or tag not in _PLAIN_TAGS or not value_bytes:
            return None
        places[tag] = (kind, count, value if value_bytes > 4 else start + 12 * index + 8)
        if tag in _NUMBERS:
            if count != 1 or kind not in _TYPE_CODES:
                return None
            numbers[tag] = value & 0xFFFF if kind == _SHORT else value
        previous = tag
    required = (_NUMBERS | _TABLES | _GEO_TYPES.keys()) - {_SAMPLES, _PLANAR, _SAMPLE_FORMAT, _GEO_DOUBLES, _GEO_TEXT}
    if directory[-4:] != bytes(4) or not required <= places.keys():
        return None
    if any(places[tag][0] != kind for tag, kind in _GEO_TYPES.items() if tag in places):
        return None
    if (places[_PIXEL_SCALE][1], places[_TIEPOINT][1]) != (3, 6) or places.get(_NO_DATA, (_TEXT,))[0] != _TEXT:
        return None
    dtype = _PLAIN_DTYPES.get((numbers[_SAMPLE_FORMAT], numbers[_BITS]))
    # Uncompressed, one band, black is zero.
    meaning = (numbers[_COMPRESSION], numbers[_SAMPLES], numbers[_PHOTOMETRIC])
    if dtype is None or meaning != (1, 1, 1) or numbers[_PLANAR] not in (1, 2):
        return None
    height, width, rows = numbers[_HEIGHT], numbers[_WIDTH], numbers[_STRIP_ROWS]
    row_bytes = width * np.dtype(dtype).itemsize
    if not 0 < height * row_bytes <= _PLAIN_LIMIT or not 0 < height <= rows * _STRIPS_LIMIT:
        return None
    strip_bytes = tuple(min(rows, height - row) * row_bytes for row in range(0, height, rows))
    tables = []
    for kind, count, position in (places[_STRIP_OFFSETS], places[_STRIP_BYTES]):
        if kind not in _TYPE_CODES or count != len(strip_bytes):
            return None
        tables.append((f"<{count}{_TYPE_CODES[kind]}", position))
    ends = {tag: position + count * _TYPE_BYTES[kind] for tag, (kind, count, position) in places.items()}
    return _Layout(
        dtype=dtype,
        shape=(height, width),
        strip_bytes=strip_bytes,
        tables=(tables[0], tables[1]),
        pixel_scale=places[_PIXEL_SCALE][2],
        tiepoint=places[_TIEPOINT][2],
        geo_keys=tuple(
            (places[tag][2], ends[tag]) if tag in places else (0, 0) for tag in (_GEO_KEYS, _GEO_DOUBLES, _GEO_TEXT)
        ),
        end=max(ends.values()),
    )


def _read_with_rasterio(path: str | Path, count: int | None, size: tuple[int, int] | None, dtype: str | None) -> Patch:
    """What `read_geotiff` does, for any GeoTIFF."""
    rasterio = require_rasterio()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)  # `crs` is then None
            # Of all drivers this alone: others follow what a file says to other files and hosts.
            with rasterio.open(path, driver="GTiff") as file:
                _require_expected(path, (file.count, (file.height, file.width), file.dtypes[0]), count, size, dtype)
                crs = file.crs.to_string() if file.crs else None
                return Patch(file.read(), crs, tuple(file.transform)[:6] if crs else None)
    except (rasterio.errors.RasterioError, ValueError, MemoryError) as error:  # text or sizes that make no sense
        if not Path(path).exists():
            raise _no_such_file(Path(path)) from error
        raise PairError(
            f"{path}: cannot be read as GeoTIFF ({error}). The file is damaged or incomplete: unpack it again."
        ) from error


def _require_expected(
    path: str | Path,
    found: tuple[int, tuple[int, int], str],
    count: int | None,
    size: tuple[int, int] | None,
    dtype: str | None,
) -> None:
    expected = (count or found[0], size or found[1], dtype or found[2])
    if found != expected:
        raise PairError(
            f"{path}: expected {expected[0]} {'band' if expected[0] == 1 else 'bands'} of "
            f"{expected[1][0]}x{expected[1][1]} pixels in {expected[2]}, found {found[0]} of "
            f"{found[1][0]}x{found[1][1]} in {found[2]}. Replace the file by the one of the official archive."
        )


def _no_such_file(path: Path) -> PairError:
    beside = sorted(file.name for file in path.parent.glob("*.tif"))
    more = f" and {len(beside) - 16:,} more" if len(beside) > 16 else ""
    return PairError(f"{path}: no such file; {path.parent} holds {beside[:16] or 'no .tif file'}{more}.")


def require_same_footprint(sar_folder: Path, sar: Patch, optical_folder: Path, optical: Patch) -> None:
    """Refuse a pair whose patches lie in different places (more than one 10 m pixel apart, or in another CRS).

    Raises:
        PairError: names both folders and their upper left corners. Patches without a CRS are not compared.
    """
    if sar.transform is None or optical.transform is None:
        return
    corners = [(patch.transform[2], patch.transform[5]) for patch in (sar, optical) if patch.transform]
    apart = max(abs(a - b) for a, b in zip(*corners, strict=True))
    if sar.crs != optical.crs or apart > GRID_METRES:
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
        return datetime.fromisoformat(match.group(1)).isoformat() + "Z"
    except ValueError:
        return None
