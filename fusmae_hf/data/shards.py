"""Writing pairs into parquet shards: one row a pair, raw pixels in their own dtype, nothing converted.

Reading is in `loading` (pairs) and `dataset_info` (what a folder holds); `decoding` turns rows into tensors.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from .dataset_info import (
    FORMAT_VERSION,
    DatasetInfo,
    ShardRecord,
    explain_failed_write,
    flush_to_disk,
    read_dataset_info,
    write_dataset_info,
)
from .native_resolution import NativeBands, native_bands, native_size
from .pairs import Pair, PairError, PairsInfo

__all__ = [
    "PIXEL_DTYPES",
    "DatasetInfo",
    "ShardRecord",
    "check_pair",
    "content_hash",
    "no_data_pixels",
    "pair_checksum",
    "read_dataset_info",
    "shard_schema",
    "write_dataset_info",
    "write_shard",
]

PIXEL_DTYPES = tuple(
    np.dtype(name).name for name in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
)
"""Dtypes of pixels that a shard may hold: those that numpy and torch share."""

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
_EXTRA_TYPES = {
    "string": (pa.string(), str),
    "int64": (pa.int64(), int),
    "double": (pa.float64(), float),
    "bool": (pa.bool_(), bool),
}
"""Arrow type and type in `Pair.extra` of each type in `PairsInfo.extra_columns`."""


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
        schema = schema.append(pa.field(name, _EXTRA_TYPES[kind][0]))
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


def no_data_pixels(pair: Pair) -> dict[str, int]:
    """Count the pixels without data, by sensor: non-finite in any band or, if optical, zero in all bands."""
    return {"sar": int((~_has_data(pair.sar)).sum()), "optical": int((~_has_optical_data(pair.optical)).sum())}


def check_pair(pair: Pair, info: PairsInfo) -> None:
    """Check that a pair may be stored; `write_shards` does so for every pair.

    Raises:
        PairError: the id is empty; a patch is not `(bands, height, width)` with the bands of `info`, or of no numeric
            dtype; a patch has no pixel with data; the label map fits neither patch or holds neither integers nor, with
            `info.map_units`, floats; a label is none of `info.class_names`; the transform is not six numbers; the
            extra columns are not those of `info`; or pixels of a coarser band are not repeated. Names the id.
    """
    if not isinstance(pair.id, str) or not pair.id:
        raise PairError(f"A pair needs a non-empty string as its id, but has {pair.id!r}.")
    for sensor, pixels, bands in (("sar", pair.sar, info.sar_bands), ("optical", pair.optical, info.optical_bands)):
        if len(pixels.shape) != 3 or pixels.shape[0] != len(bands) or 0 in pixels.shape:
            raise PairError(
                f"{pair.id}: {sensor} has shape {pixels.shape}, but (bands, height, width) with the bands "
                f"{list(bands)} is needed."
            )
        if pixels.dtype.name not in PIXEL_DTYPES:
            raise PairError(f"{pair.id}: {sensor} has dtype {pixels.dtype}, but one of {PIXEL_DTYPES} is needed.")
    if not _has_data(pair.sar).any():
        raise PairError(f"{pair.id}: sar has no data: no pixel is finite in all bands.")
    if not _has_optical_data(pair.optical).any():
        raise PairError(f"{pair.id}: optical has no data: every pixel is zero in all bands, or not finite.")
    if pair.label_map is not None and (
        pair.label_map.shape not in (pair.sar.shape[1:], pair.optical.shape[1:])
        or pair.label_map.dtype.name not in PIXEL_DTYPES
        or pair.label_map.dtype.kind not in ("f" if info.map_units else "iu")
    ):
        raise PairError(
            f"{pair.id}: label_map is {pair.label_map.dtype} {pair.label_map.shape}, but "
            f"{f'floats ({info.map_units})' if info.map_units else 'integers'} of the size of a patch are needed, "
            f"{pair.optical.shape[1:]}."
        )
    if info.class_names and (unknown := sorted(set(pair.labels or ()).difference(info.class_names))):
        raise PairError(f"{pair.id}: labels {unknown} are none of the classes {list(info.class_names)}.")
    if pair.transform is not None and (len(pair.transform) != 6 or not np.isfinite(pair.transform).all()):
        raise PairError(
            f"{pair.id}: transform is {pair.transform}, but six finite numbers (a, b, c, d, e, f) are needed."
        )
    if pair.extra.keys() != info.extra_columns.keys():
        raise PairError(
            f"{pair.id}: extra columns are {sorted(pair.extra)}, but {sorted(info.extra_columns)} are declared."
        )
    for name, value in pair.extra.items():
        if value is not None and type(value) is not _EXTRA_TYPES[info.extra_columns[name]][1]:
            raise PairError(
                f"{pair.id}: extra column {name!r} holds {value!r}, but {info.extra_columns[name]} is declared."
            )


def write_shard(
    pairs: Iterable[Pair], info: PairsInfo, folder: str | os.PathLike[str], name: str, *, row_group_rows: int = 32
) -> ShardRecord | None:
    """Write one file. It appears under its name when it is complete and on the disk, or not at all.

    Args:
        pairs: the pairs, each checked by `check_pair` before it is written.
        info: what holds for all pairs.
        folder: the prepared folder.
        name: path below it, `data/<split>-00000-of-00003.parquet`. A file of that name is replaced.
        row_group_rows: pairs in a row group, the unit that streaming reads (about 15 MB at 12 + 2 bands of 120x120).

    Returns:
        A record of the file, for `write_dataset_info`; None, and no file, where there was no pair.

    Raises:
        PairError: a pair must not be stored: see `check_pair`; or two have the same id. The message names the id.
        ValueError: `row_group_rows` is below one.
        OSError: the file cannot be written. Whatever the error, nothing is left behind.
    """
    if row_group_rows < 1:
        raise ValueError(f"{row_group_rows=} must be at least 1.")
    path = Path(folder, name)
    split, schema = ShardRecord.split_of(name), shard_schema(info)
    incomplete = path.with_name(f".{path.name}.incomplete")
    group_rows: list[int] = []
    checksums: list[int] = []
    no_data = {"sar": 0, "optical": 0}
    writer = None
    try:
        with explain_failed_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = incomplete.open("wb")
        with file:
            for group in _row_groups(_checked(pairs, info), row_group_rows):
                rows = [_row(pair, info, split) for pair in group]
                table = pa.table(
                    [pa.array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema
                )
                with explain_failed_write(path):
                    # Pixels hardly compress and nobody filters by them: no compression, dictionaries or statistics.
                    writer = writer or pq.ParquetWriter(
                        file, schema, compression="none", use_dictionary=False, write_statistics=["id"]
                    )
                    writer.write_table(table, row_group_size=len(rows))
                group_rows.append(len(rows))
                checksums += (row["checksum"] for row in rows)
                for pair in group:
                    no_data = {sensor: no_data[sensor] + count for sensor, count in no_data_pixels(pair).items()}
            if writer is None:
                return None
            described = {"rows": sum(group_rows), "content_hash": content_hash(checksums)}
            file_metadata = {"format_version": FORMAT_VERSION, "split": split, **described}
            with explain_failed_write(path):
                writer.add_key_value_metadata({METADATA_KEY: json.dumps(dataclasses.asdict(info) | file_metadata)})
                writer.close()
                flush_to_disk(file)
        size = incomplete.stat().st_size
        with explain_failed_write(path):
            os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)
    return ShardRecord(name, row_group_rows=tuple(group_rows), bytes=size, no_data_pixels=no_data, **described)


def stored_size(shape: Sequence[int], factors: Sequence[int] = ()) -> int:
    """Number of values that a shard holds for pixels of the declared shape, or -1 where there can be none."""
    if not shape or any(size is None or size < 1 for size in shape):
        return -1
    return native_size(shape, factors) if factors else math.prod(shape)


def _has_data(pixels: np.ndarray) -> np.ndarray:
    """`(height, width)` bool: finite in every band."""
    if pixels.dtype.kind in "iu":
        return np.ones(pixels.shape[1:], dtype=bool)
    return np.isfinite(pixels).all(axis=0)


def _has_optical_data(pixels: np.ndarray | NativeBands) -> np.ndarray:
    """`(height, width)` bool: finite in every band and, since zero means no data in Sentinel-2, not zero in all."""
    if isinstance(pixels, NativeBands):
        fine = next(band for band, factor in zip(pixels.bands, pixels.factors, strict=True) if factor == 1)
        if fine.dtype.kind in "iu" and fine.all():
            return np.ones(fine.shape, dtype=bool)
        pixels = pixels.expand()
    return _has_data(pixels) & (pixels != 0).any(axis=0)


def _checked(pairs: Iterable[Pair], info: PairsInfo) -> Iterator[Pair]:
    """Pass on pairs that may be stored, each on its own and together with those before it."""
    seen: set[str] = set()
    for pair in pairs:
        check_pair(pair, info)
        if pair.id in seen:
            raise PairError(f"{pair.id}: a second pair has this id, but ids must be unique.")
        seen.add(pair.id)
        yield pair


def _row_groups(pairs: Iterable[Pair], rows: int) -> Iterator[tuple[Pair, ...]]:
    pairs = iter(pairs)
    while group := tuple(islice(pairs, rows)):
        yield group


def _row(pair: Pair, info: PairsInfo, split: str) -> dict[str, Any]:
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
    for name, values in (("sar", pair.sar), ("optical", pair.optical), ("label_map", pair.label_map)):
        if values is not None:
            row[name] = _stored_bytes(values, pair.id, info.optical_factors if name == "optical" else ())
            row[f"{name}_dtype"] = values.dtype.name
            row[f"{name}_shape"] = values.shape
    row["checksum"] = pair_checksum(*(row[name] for name in ("id", "sar", "optical", "label_map") if name in row))
    return row


def _stored_bytes(pixels: np.ndarray | NativeBands, id: str, factors: Sequence[int]) -> bytes:
    """Pixels as a shard holds them: C order, little endian, bands in their own resolution where factors are given."""
    little_endian = pixels.dtype.newbyteorder("<")
    if not factors and not isinstance(pixels, NativeBands):
        return pixels.astype(little_endian, copy=False).tobytes()
    try:
        native = pixels if isinstance(pixels, NativeBands) else native_bands(pixels, factors)
    except ValueError as error:
        raise PairError(f"{id}: optical {error}.") from error
    if tuple(native.factors) != tuple(factors):
        raise PairError(f"{id}: optical has bands {native.factors} times coarser, but {factors} is declared.")
    return b"".join(band.astype(little_endian, copy=False).tobytes() for band in native.bands)
