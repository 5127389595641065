"""Arrays of zarr version 2 in a zip file, as archives of patches publish them.

The few features of zarr that such archives use are read here, and anything else is refused before it is unpacked:
names of members are made here, sizes are checked against those that are expected, and no filter is run (in zarr one of
them unpickles).

Source: the zarr storage specification, version 2 (https://zarr-specs.readthedocs.io).
"""

import json
import math
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusmae_hf.errors import PairError

MAX_METADATA_BYTES = 65_536
"""Larger members `.zarray` and `.zattrs` are refused."""

_ZIP_ERRORS = (OSError, EOFError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ZarrArray:
    """What `.zarray` declares of an array, checked."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    codec: str | None
    separator: str


class ZarrZip:
    """An open `.zarr.zip` file. The chunks behind the last values that were read by index are kept.

    Args:
        path: the file.
        max_rows: largest first axis of an array whose size is not known beforehand.

    Raises:
        PairError: the file is missing or no zip file.
        ImportError: numcodecs is missing.
    """

    def __init__(self, path: Path, max_rows: int):
        self.path, self._max_rows = path, max_rows
        try:
            self._zip = zipfile.ZipFile(path)
        except _ZIP_ERRORS as error:
            raise PairError(f"{path}: cannot be opened as a zip file ({error}). Download it again.") from error
        self._kept: dict[tuple[int, ...], np.ndarray] = {}
        self._kept_of: tuple[ZarrArray, tuple[int, ...]] | None = None

    def describe(self, name: str, shape: tuple[int | None, ...], dtypes: str) -> ZarrArray:
        """Check what `.zarray` declares of an array.

        Args:
            name: of the array.
            shape: that it must have; None for an axis of 1 to `max_rows`, which may be the first.
            dtypes: regular expression for its dtype.

        Raises:
            PairError: there is no such array, or it is declared otherwise.
        """
        found = self.json(f"{name}/.zarray")
        size, chunks, compressor = found.get("shape"), found.get("chunks"), found.get("compressor")
        codec = compressor.get("id") if isinstance(compressor, dict) else compressor
        fits = (
            found.get("zarr_format") == 2
            and found.get("order") == "C"
            and not found.get("filters")
            and codec in (None, *decompressors())
            and found.get("dimension_separator", ".") in (".", "/")
            and re.fullmatch(dtypes, str(found.get("dtype")))
            and isinstance(size, list)
            and isinstance(chunks, list)
            and len(size) == len(chunks) == len(shape)
            and all(type(n) is int and n >= 1 and e in (n, None) for n, e in zip(size, shape, strict=True))
            and size[0] <= (shape[0] or self._max_rows)
            and all(type(c) is int and 1 <= c <= n for c, n in zip(chunks, size, strict=True))
        )
        if not fits:
            expected = [f"1 to {self._max_rows}" if n is None else n for n in shape]
            raise PairError(
                f"{self.path}: the array `{name}` is declared as {str(found)[:400]}, but zarr format 2, shape "
                f"{expected}, dtype {dtypes}, order C, chunks within the shape, no filters and the compressor "
                f"{', '.join(decompressors())} or none are expected. Download the file again."
            )
        separator = found.get("dimension_separator", ".")
        return ZarrArray(
            name, tuple(found["shape"]), tuple(found["chunks"]), np.dtype(found["dtype"]), codec, separator
        )

    def read(self, array: ZarrArray, *lead: int) -> np.ndarray:
        """Values of an array at its leading indices, put together from the chunks that hold them.

        Raises:
            PairError: a chunk is missing or damaged.
        """
        shape, chunks = array.shape[len(lead) :], array.chunks[len(lead) :]
        outer = tuple(index // size for index, size in zip(lead, array.chunks, strict=False))
        inner = tuple(index % size for index, size in zip(lead, array.chunks, strict=False))
        if lead and self._kept_of != (array, outer):
            self._kept, self._kept_of = {}, (array, outer)
        values = np.empty(shape, array.dtype)
        for place in np.ndindex(*(math.ceil(n / size) for n, size in zip(shape, chunks, strict=True))):
            chunk = self._kept.get(place) if lead else None
            if chunk is None:
                chunk = self._chunk(array, (*outer, *place))
                if lead:
                    self._kept[place] = chunk
            part = values[tuple(slice(i * size, (i + 1) * size) for i, size in zip(place, chunks, strict=True))]
            part[...] = chunk[inner][tuple(slice(n) for n in part.shape)]  # chunks at the border are padded
        return values

    def _chunk(self, array: ZarrArray, position: tuple[int, ...]) -> np.ndarray:
        """One chunk, decompressed."""
        name = f"{array.name}/{array.separator.join(map(str, position))}"
        size = math.prod(array.chunks) * array.dtype.itemsize
        data = self._member(name, size + size // 64 + 1024)
        buffer = np.zeros(size, np.uint8)
        try:
            if array.codec is None:
                buffer[:] = np.frombuffer(data, np.uint8)
            else:
                decompressors()[array.codec](data, buffer)  # refuses to unpack more than `buffer` holds
            if array.dtype.kind == "U" and buffer.view(np.uint32).max() > sys.maxunicode:
                raise ValueError("it holds no text")
        except (RuntimeError, ValueError) as error:
            raise PairError(f"{self.path}: {name} cannot be decompressed ({error}). Download it again.") from error
        return buffer.view(array.dtype).reshape(array.chunks)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON member; empty where it holds something else. `PairError` where it is no JSON."""
        try:
            content = json.loads(self._member(name, MAX_METADATA_BYTES))
        except (ValueError, RecursionError) as error:
            raise PairError(f"{self.path}: {name} is no JSON ({error}). Download it again.") from error
        return content if isinstance(content, dict) else {}

    def _member(self, name: str, limit: int) -> bytes:
        """Content of a member of the zip file, of at most `limit` bytes."""
        try:
            member = self._zip.getinfo(name)
            if member.file_size > limit:
                raise PairError(
                    f"{self.path}: {name} has {member.file_size:,} bytes, but at most {limit:,} are expected."
                )
            return self._zip.read(member)
        except KeyError as error:
            raise PairError(f"{self.path}: holds no {name}. Download it again.") from error
        except _ZIP_ERRORS as error:
            raise PairError(f"{self.path}: {name} cannot be read ({error}). Download it again.") from error


def decompressors() -> dict[str, Callable]:
    """The compressors of zarr that are read, by name.

    Raises:
        ImportError: numcodecs is missing; names the pip command.
    """
    try:
        from numcodecs import blosc, zstd
    except ImportError as error:
        raise ImportError(
            "Reading .zarr.zip needs numcodecs, which is not installed. Install it "
            'with `pip install -e ".[data]"` in a clone of the repository.'
        ) from error
    return {"blosc": blosc.decompress, "zstd": zstd.decompress}
