"""Writing pairs into parquet shards: one row a pair, raw pixels in their own dtype, nothing converted.

Reading is in `loading` (pairs) and `dataset_info` (what a folder holds); `decoding` turns rows into tensors.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fusmae_hf.data.checks import PIXEL_DTYPES, check_pair, no_data_pixels
from fusmae_hf.data.native_resolution import NativeBands, native_bands, native_size
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.files.atomic import explain_failed_write, flush_to_disk, incomplete_path
from fusmae_hf.shards.dataset_info import (
    FORMAT_VERSION,
    DatasetInfo,
    ShardRecord,
    read_dataset_info,
    write_dataset_info,
)
from fusmae_hf.vocabulary import IMAGES

__all__ = [
    "PIXEL_DTYPES",
    "DatasetInfo",
    "ShardRecord",
    "ShardWriter",
    "check_pair",
    "content_hash",
    "no_data_pixels",
    "pair_checksum",
    "read_dataset_info",
    "shard_schema",
    "write_dataset_info",
    "write_shard",
]

METADATA_KEY = b"fusmae"
"""Key of the file metadata (in the parquet footer) under which each file describes itself."""

_SHAPE = pa.list_(pa.int32(), 3)
_COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("checksum", pa.uint64(), nullable=False),
        pa.field("sar", pa.large_binary(), nullable=False),
        pa.field("sar_dtype", pa.string(), nullable=False),
        pa.field("sar_shape", _SHAPE, nullable=False),
        pa.field("optical", pa.large_binary(), nullable=False),
        pa.field("optical_dtype", pa.string(), nullable=False),
        pa.field("optical_shape", _SHAPE, nullable=False),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("label_map", pa.large_binary()),
        pa.field("label_map_dtype", pa.string()),
        pa.field("label_map_shape", pa.list_(pa.int32(), 2)),
        pa.field("crs", pa.string()),
        pa.field("transform", pa.list_(pa.float64())),
        pa.field("sar_time", pa.string()),
        pa.field("optical_time", pa.string()),
        pa.field("split", pa.string()),
    ]
)
_EXTRA_TYPES = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}


def shard_schema(info: PairsInfo) -> pa.Schema:
    """Columns of the shards of a dataset: those that all have, then the dataset's own.

    Raises:
        ValueError: an extra column has the name of one that every shard has, or an unknown type.
    """
    schema = _COLUMNS
    for name, kind in info.extra_columns.items():
        if name in schema.names or kind not in _EXTRA_TYPES:
            raise ValueError(
                f"{info.name}: extra column {name!r} of type {kind!r} needs a name other than {_COLUMNS.names} and a "
                f"type out of {sorted(_EXTRA_TYPES)}."
            )
        schema = schema.append(pa.field(name, _EXTRA_TYPES[kind]))
    return schema


def pair_checksum(id: str, *pixels: Any) -> int:
    """Checksum (xxh3, 64 bits) of a row: its id, then the bytes of sar, optical and label map, where there is one."""
    digest = xxhash.xxh3_64(id.encode())
    for buffer in pixels:
        digest.update(buffer)
    return digest.intdigest()


def content_hash(checksums: Iterable[int]) -> str:
    """Hash (xxh3, 128 bits, hexadecimal) of a shard, from the checksums of its rows in order."""
    return xxhash.xxh3_128(np.fromiter(checksums, "<u8").tobytes()).hexdigest()


class ShardWriter:
    """Writes one file, pair by pair. It appears under its name when it is complete and on the disk, or not at all.

    Use it as a context manager: leaving it with an exception removes what was written.

    Args:
        info: what holds for all pairs.
        folder: the prepared folder.
        name: path below it, `data/<split>-00000-of-00003.parquet`. A file of that name is replaced.
        row_group_rows: pairs in a row group, the unit that streaming reads (about 9 MB at the 12 + 2 bands of
            BigEarthNet, 15 MB where all bands are of 10 m).
        max_no_data: largest share of the pixels of either sensor that may be without data.

    Attributes:
        record: describes the file once it is there; None before, and where no pair was added.

    Raises:
        ValueError: `row_group_rows` is below one, or the name is not that of a shard.
        OSError: the file cannot be written. Whatever the error, nothing is left behind.
    """

    def __init__(
        self,
        info: PairsInfo,
        folder: str | os.PathLike[str],
        name: str,
        *,
        row_group_rows: int = 32,
        max_no_data: float = 1.0,
    ):
        if row_group_rows < 1:
            raise ValueError(f"{row_group_rows=} must be at least 1.")
        self.record: ShardRecord | None = None
        self._info, self._name, self._path = info, name, Path(folder, name)
        self._split, self._schema = ShardRecord.split_of(name), shard_schema(info)
        self._row_group_rows, self._max_no_data = row_group_rows, max_no_data
        self._ids: set[str] = set()
        self._checksums: list[int] = []
        self._group_rows: list[int] = []
        self._no_data = {"sar": 0, "optical": 0}
        self._rows: list[dict[str, Any]] = []
        self._pixels = {name: _PixelColumn() for name in IMAGES}
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._incomplete = incomplete_path(self._path)
        with explain_failed_write(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._incomplete.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._writer:
                self._writer.is_open = False  # or its destructor would write to the closed file
            with suppress(OSError):
                self._file.close()
            self._incomplete.unlink(missing_ok=True)

    def add(self, pair: Pair) -> None:
        """Take in one pair.

        Raises:
            PairError: the pair must not be stored: see `check_pair`; its id was added before; more than `max_no_data`
                of a sensor's pixels hold no data; or pixels of a coarser band are not repeated. Nothing was taken in.
            OSError: the file cannot be written.
        """
        no_data = check_pair(pair, self._info)
        if pair.id in self._ids:
            raise PairError(f"{pair.id}: a second pair has this id, but ids must be unique.")
        for sensor, size in (("sar", pair.sar.shape[1:]), ("optical", pair.optical.shape[1:])):
            share = no_data[sensor] / math.prod(size)
            if share > self._max_no_data:
                raise PairError(
                    f"{pair.id}: {share:.1%} of the {sensor} pixels hold no data, but at most {self._max_no_data:.1%} "
                    "may."
                )
        arrays = stored_arrays(pair, self._info)
        stored = [self._pixels[name].append(arrays.get(name)) for name in IMAGES]
        row = _small_values(pair, self._split)
        row["checksum"] = pair_checksum(pair.id, *(pixels for pixels in stored if pixels is not None))
        self._rows.append(row)
        self._ids.add(pair.id)
        self._checksums.append(row["checksum"])
        self._no_data = {sensor: count + no_data[sensor] for sensor, count in self._no_data.items()}
        if len(self._rows) == self._row_group_rows:
            self._write_row_group()

    def _write_row_group(self) -> None:
        columns = [
            self._pixels[field.name].to_arrow()
            if field.name in self._pixels
            else pa.array([row.get(field.name) for row in self._rows], field.type)
            for field in self._schema
        ]
        with explain_failed_write(self._path):
            # Pixels hardly compress and nobody filters by them: no compression, dictionaries or statistics.
            self._writer = self._writer or pq.ParquetWriter(
                self._file, self._schema, compression="none", use_dictionary=False, write_statistics=["id"]
            )
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._rows))
        self._group_rows.append(len(self._rows))
        self._rows.clear()
        for column in self._pixels.values():
            column.clear()

    def _finish(self) -> None:
        if self._rows:
            self._write_row_group()
        if self._writer is None:
            return
        rows, hashed = sum(self._group_rows), content_hash(self._checksums)
        described = {"format_version": FORMAT_VERSION, "split": self._split, "rows": rows, "content_hash": hashed}
        with explain_failed_write(self._path):
            self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(dataclasses.asdict(self._info) | described)})
            self._writer.close()
            flush_to_disk(self._file)
            size = self._incomplete.stat().st_size
            os.replace(self._incomplete, self._path)
        self.record = ShardRecord(self._name, rows, tuple(self._group_rows), size, hashed, self._no_data)


def write_shard(
    pairs: Iterable[Pair], info: PairsInfo, folder: str | os.PathLike[str], name: str, *, row_group_rows: int = 32
) -> ShardRecord | None:
    """Write one file of pairs, all of which must be fit to be stored: see `ShardWriter`, which takes them one by one.

    Returns:
        A record of the file, for `write_dataset_info`; None, and no file, where there was no pair.

    Raises:
        PairError: a pair must not be stored: see `ShardWriter.add`.
        ValueError: `row_group_rows` is below one.
        OSError: the file cannot be written. Whatever the error, nothing is left behind.
    """
    with ShardWriter(info, folder, name, row_group_rows=row_group_rows) as shard:
        for pair in pairs:
            shard.add(pair)
    return shard.record


def stored_arrays(pair: Pair, info: PairsInfo) -> dict[str, list[np.ndarray]]:
    """The arrays whose bytes, one after the other, a shard holds as `sar`, `optical` and `label_map`.

    Raises:
        PairError: pixels of a coarser band are not repeated. Names the id.
    """
    arrays = {"sar": [pair.sar]}
    if isinstance(pair.optical, NativeBands):
        arrays["optical"] = list(pair.optical.bands)
    elif info.optical_factors:
        try:
            arrays["optical"] = list(native_bands(pair.optical, info.optical_factors).bands)
        except ValueError as error:
            raise PairError(f"{pair.id}: optical {error}.") from error
    else:
        arrays["optical"] = [pair.optical]
    if pair.label_map is not None:
        arrays["label_map"] = [pair.label_map]
    return arrays


def row_checksum(pair: Pair, info: PairsInfo) -> int:
    """Checksum that a pair will have in a shard. Raises `PairError` like `stored_arrays`."""
    arrays = stored_arrays(pair, info)
    little_endian = (
        array.astype(array.dtype.newbyteorder("<")).tobytes() for name in IMAGES for array in arrays.get(name, ())
    )
    return pair_checksum(pair.id, *little_endian)


def stored_size(shape: Sequence[int], factors: Sequence[int] = ()) -> int:
    """Number of values that a shard holds for pixels of the declared shape, or -1 where there can be none."""
    if not shape or any(size is None or size < 1 for size in shape):
        return -1
    return native_size(shape, factors) if factors else math.prod(shape)


def _small_values(pair: Pair, split: str) -> dict[str, Any]:
    """Values of all columns of a row but the pixels and the checksum."""
    row = {
        "id": pair.id,
        "labels": pair.labels,
        "crs": pair.crs,
        "transform": pair.transform,
        "sar_time": pair.sar_time,
        "optical_time": pair.optical_time,
        "split": split,
        **pair.extra,
    }
    for name in IMAGES:
        if (pixels := getattr(pair, name)) is not None:
            row[f"{name}_dtype"], row[f"{name}_shape"] = pixels.dtype.name, pixels.shape
    return row


class _PixelColumn:
    """Pixels of the rows of one row group as they lie in the file: C order, little endian.

    The memory is used again for the next row group: fresh memory would cost as much as all the rest of writing.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self.clear()

    def clear(self) -> None:
        self._ends, self._valid = [0], list[bool]()

    def append(self, arrays: Sequence[np.ndarray] | None) -> np.ndarray | None:
        """Append one value, the bytes of `arrays` one after the other, or a missing one; returns a view of it."""
        start = end = self._ends[-1]
        self._valid.append(arrays is not None)
        needed = end + sum(array.nbytes for array in arrays or ())
        if needed > len(self._bytes):
            larger = np.empty(max(needed, 2 * len(self._bytes)), np.uint8)
            larger[:start] = self._bytes[:start]
            self._bytes = larger
        for array in arrays or ():
            place = self._bytes[end : end + array.nbytes]
            place.view(array.dtype.newbyteorder("<")).reshape(array.shape)[...] = array
            end += array.nbytes
        self._ends.append(end)
        return None if arrays is None else self._bytes[start:end]

    def to_arrow(self) -> pa.LargeBinaryArray:
        """All values, as a view."""
        missing = None
        if not all(self._valid):
            missing = pa.py_buffer(np.packbits(self._valid, bitorder="little"))
        ends = pa.py_buffer(np.array(self._ends, np.int64))
        return pa.Array.from_buffers(
            pa.large_binary(), len(self._valid), [missing, ends, pa.py_buffer(self._bytes[: self._ends[-1]])]
        )
