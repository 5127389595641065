"""TIFF files of one plain kind, taken apart without a library: a single band, uncompressed, in consecutive strips.

Why own code: archives of Sentinel patches hold millions of small files of this kind, and a general library takes
several times longer to open one than to read its bytes. `benchmarks/tiff_reading.py`, pairs of BigEarthNet, one core:
rasterio reads 0.04 to 0.08 of the pairs a second that this reads. imagecodecs reads 0.92 without any place; with
rasterio for the place of one band a patch, 0.16. It gives no tags: they would have to be taken apart here anyway.

Sources: TIFF Revision 6.0 (Adobe, 1992), sections 2 and 8; OGC GeoTIFF 1.1 (19-008r4), section 7.1 and annex B.
"""

import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

_BYTES_LIMIT, _STRIPS_LIMIT = 1 << 24, 4096
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
_TAGS = _NUMBERS | _TABLES | _GEO_TYPES.keys() | {_NO_DATA}
"""Tags of a plain file. Any other might change what the pixels mean or where they lie."""

_DTYPES = {
    (1, 8): "uint8", (1, 16): "uint16", (1, 32): "uint32", (2, 16): "int16", (2, 32): "int32",
    (3, 32): "float32", (3, 64): "float64",
}  # fmt: skip
"""Numpy dtype by SampleFormat and BitsPerSample."""


@dataclass(frozen=True)
class Layout:
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
class PlainFile:
    """A plain file in memory, its strips known to be whole.

    Attributes:
        content: all bytes.
        layout: where things lie.
        start: position of the first pixel.
    """

    content: bytes
    layout: Layout
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


def open_plain(path: str | Path) -> PlainFile | None:
    """Read the bytes of a file if it is plain and whole, else None: rasterio shall say what it is.

    Raises:
        OSError: the file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # a file object takes half as long again
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size) if size <= _BYTES_LIMIT else b""
    finally:
        os.close(descriptor)
    if content[:4] != b"II*\0" or len(content) < 8:
        return None  # big-endian, BigTIFF or no TIFF
    (start,) = struct.unpack_from("<I", content, 4)
    entries = int.from_bytes(content[start : start + 2], "little")
    directory = content[start + 2 : start + 2 + 12 * entries + 4]
    layout = _read_directory(directory, start + 2) if len(directory) == 12 * entries + 4 else None
    if layout is None or len(content) < layout.end:
        return None
    offsets, sizes = (struct.unpack_from(code, content, position) for code, position in layout.tables)
    end = offsets[0]
    for offset, stored, size in zip(offsets, sizes, layout.strip_bytes, strict=True):
        if offset != end or stored != size:
            return None
        end += size
    return PlainFile(content, layout, offsets[0]) if end <= len(content) else None


@lru_cache(maxsize=256)  # the files of an archive have few distinct directories: a band's differ in nothing
def _read_directory(directory: bytes, start: int) -> Layout | None:
    """What the directory of a plain file says; None where anything in it is unusual.

    Args:
        directory: its entries (tag, type, number of values, value or position) and the position of the next directory.
        start: position of the first entry.
    """
    numbers: dict[int, int] = {_SAMPLES: 1, _PLANAR: 1, _SAMPLE_FORMAT: 1}
    places: dict[int, tuple[int, int, int]] = {}  # type, number of values and position by tag
    previous = 0
    for index, (tag, kind, count, value) in enumerate(struct.iter_unpack("<HHII", directory[:-4])):
        value_bytes = count * _TYPE_BYTES.get(kind, 0)
        if tag <= previous or tag not in _TAGS or not value_bytes:
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
    dtype = _DTYPES.get((numbers[_SAMPLE_FORMAT], numbers[_BITS]))
    # Uncompressed, one band, black is zero.
    meaning = (numbers[_COMPRESSION], numbers[_SAMPLES], numbers[_PHOTOMETRIC])
    if dtype is None or meaning != (1, 1, 1) or numbers[_PLANAR] not in (1, 2):
        return None
    height, width, rows = numbers[_HEIGHT], numbers[_WIDTH], numbers[_STRIP_ROWS]
    row_bytes = width * np.dtype(dtype).itemsize
    if not 0 < height * row_bytes <= _BYTES_LIMIT or not 0 < height <= rows * _STRIPS_LIMIT:
        return None
    strip_bytes = tuple(min(rows, height - row) * row_bytes for row in range(0, height, rows))
    tables = []
    for kind, count, position in (places[_STRIP_OFFSETS], places[_STRIP_BYTES]):
        if kind not in _TYPE_CODES or count != len(strip_bytes):
            return None
        tables.append((f"<{count}{_TYPE_CODES[kind]}", position))
    ends = {tag: position + count * _TYPE_BYTES[kind] for tag, (kind, count, position) in places.items()}
    return Layout(
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
