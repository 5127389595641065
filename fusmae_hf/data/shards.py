"""Writing pairs into parquet shards: one row a pair, raw pixels in their own dtype, nothing converted.

Reading is in `loading` (pairs) and `dataset_info` (what a folder holds); `decoding` turns rows into tensors.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .dataset_info import (
    FORMAT_VERSION,
    DatasetInfo,
    ShardRecord,
    explain_failed_write,
    flush_to_disk,
    read_dataset_info,
    write_dataset_info,
)
from .pairs import Pair, PairError, PairsInfo

__all__ = [
    "PIXEL_DTYPES",
    "DatasetInfo",
    "ShardRecord",
    "check_pair",
    "no_data_pixels",
    "read_dataset_info",
    "write_dataset_info",
    "write_shards",
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
_EXTRA_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), type(None): pa.string()}


def no_data_pixels(pair: Pair) -> dict[str, int]:
    """Count the pixels without data, by sensor: non-finite in any band or, if optical, zero in all bands."""
    return {"sar": int((~_has_data(pair.sar)).sum()), "optical": int((~_has_optical_data(pair.optical)).sum())}


def check_pair(pair: Pair, info: PairsInfo) -> None:
    """Check that a pair may be stored; `write_shards` does so for every pair.

    Raises:
        PairError: the id is empty; a patch is not `(bands, height, width)` with the bands of `info`, or of no numeric
            dtype; a patch has no pixel with data; the label map fits neither patch or holds no integers; the transform
            is not six numbers; or an extra column has the name of another one or no plain value. Names the id.
    """
    if not isinstance(pair.id, str) or not pair.id:
        raise PairError(f"A pair needs a non-empty string as its id, but has {pair.id!r}.")
    for sensor, pixels, bands in (("sar", pair.sar, info.sar_bands), ("optical", pair.optical, info.optical_bands)):
        if pixels.ndim != 3 or pixels.shape[0] != len(bands) or 0 in pixels.shape:
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
        or pair.label_map.dtype.kind not in "iu"
    ):
        raise PairError(
            f"{pair.id}: label_map is {pair.label_map.dtype} {pair.label_map.shape}, but integers of the size of a "
            f"patch are needed, {pair.optical.shape[1:]}."
        )
    if pair.transform is not None and (len(pair.transform) != 6 or not np.isfinite(pair.transform).all()):
        raise PairError(
            f"{pair.id}: transform is {pair.transform}, but six finite numbers (a, b, c, d, e, f) are needed."
        )
    for name, value in pair.extra.items():
        if name in _COLUMNS.names:
            raise PairError(f"{pair.id}: extra column {name!r} has the name of a column that every shard has.")
        if type(value) not in _EXTRA_TYPES:
            raise PairError(f"{pair.id}: extra column {name!r} holds {value!r}, but a string or a number is needed.")


def write_shards(
    pairs: Iterable[Pair],
    info: PairsInfo,
    folder: str | os.PathLike[str],
    split: str,
    *,
    num_pairs: int,
    rows_per_shard: int = 1024,
    row_group_rows: int = 32,
) -> list[ShardRecord]:
    """Write the pairs of one split as `<folder>/data/<split>-00000-of-00003.parquet` and so on.

    All files of the split appear at once, complete, when the last of them is on the disk; until then they lie in a
    hidden folder, which is removed on any failure.

    Args:
        pairs: the pairs, each checked by `check_pair` before it is written. They may be fewer than `num_pairs`.
        info: what holds for all pairs.
        folder: the prepared folder; made if need be.
        split: `"train"`, `"validation"` or `"test"`.
        num_pairs: how many pairs are expected, so that files get about the same size.
        rows_per_shard: most pairs in a file. The default gives about 500 MB at 12 + 2 bands of 120x120 px.
        row_group_rows: pairs in a row group, the unit that streaming reads (about 15 MB by default).

    Returns:
        A record for each file, for `write_dataset_info`.

    Raises:
        PairError: a pair must not be stored: see `check_pair`; or its id, or its extra columns, disagree with those
            before. The message names the id.
        ValueError: `pairs` is empty, or a number is below one.
        FileExistsError: the folder already holds this split.
        OSError: a file cannot be written. Whatever the error, nothing of the split is left behind.
    """
    if min(num_pairs, rows_per_shard, row_group_rows) < 1:
        raise ValueError(f"{num_pairs=}, {rows_per_shard=} and {row_group_rows=} must be at least 1.")
    target = Path(folder, "data")
    if present := sorted(target.glob(f"{split}-*.parquet")):
        raise FileExistsError(f"{present[0]} is already there: delete the folder {folder} or choose another one.")
    groups_per_shard = math.ceil(num_pairs / math.ceil(num_pairs / rows_per_shard) / row_group_rows)
    staging = target / f".{split}-incomplete"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    row_groups = _row_groups(_checked(pairs, info), row_group_rows)
    schema: pa.Schema | None = None
    written: list[dict[str, Any]] = []
    published: list[Path] = []
    try:
        with explain_failed_write(target):
            staging.mkdir(parents=True)
        while (first := next(row_groups, None)) is not None:
            schema = schema or _schema(first)
            of_this_file = chain([first], islice(row_groups, groups_per_shard - 1))
            written.append(_write_file(of_this_file, schema, info, split, staging / f"{len(written):05d}"))
        if not written:
            raise ValueError(f"There is no pair to write for the split {split!r} of {info.name}.")
        names = [f"data/{split}-{number:05d}-of-{len(written):05d}.parquet" for number in range(len(written))]
        for number, name in enumerate(names):
            published.append(Path(folder, name))
            with explain_failed_write(published[-1]):
                os.replace(staging / f"{number:05d}", published[-1])
    except BaseException:
        for path in published:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [ShardRecord(name=name, **fields) for name, fields in zip(names, written, strict=True)]


def _has_data(pixels: np.ndarray) -> np.ndarray:
    """`(height, width)` bool: finite in every band."""
    if pixels.dtype.kind in "iu":
        return np.ones(pixels.shape[1:], dtype=bool)
    return np.isfinite(pixels).all(axis=0)


def _has_optical_data(pixels: np.ndarray) -> np.ndarray:
    """`(height, width)` bool: finite in every band and, since zero means no data in Sentinel-2, not zero in all."""
    return _has_data(pixels) & (pixels != 0).any(axis=0)


def _checked(pairs: Iterable[Pair], info: PairsInfo) -> Iterator[Pair]:
    """Pass on pairs that may be stored, each on its own and together with those before it."""
    seen: set[str] = set()
    extra_names: set[str] | None = None
    for pair in pairs:
        check_pair(pair, info)
        if pair.id in seen:
            raise PairError(f"{pair.id}: a second pair has this id, but ids must be unique.")
        seen.add(pair.id)
        extra_names = set(pair.extra) if extra_names is None else extra_names
        if set(pair.extra) != extra_names:
            raise PairError(f"{pair.id}: extra columns are {sorted(pair.extra)}, but {sorted(extra_names)} before.")
        yield pair


def _row_groups(pairs: Iterable[Pair], rows: int) -> Iterator[tuple[Pair, ...]]:
    pairs = iter(pairs)
    while group := tuple(islice(pairs, rows)):
        yield group


def _schema(pairs: tuple[Pair, ...]) -> pa.Schema:
    """Columns of all files of a split. The type of an extra column comes from its first value that is not None."""
    schema = _COLUMNS
    for name in pairs[0].extra:
        values = [pair.extra[name] for pair in pairs if pair.extra[name] is not None]
        schema = schema.append(pa.field(name, _EXTRA_TYPES[type(values[0] if values else None)]))
    return schema


def _write_file(
    row_groups: Iterable[tuple[Pair, ...]], schema: pa.Schema, info: PairsInfo, split: str, path: Path
) -> dict[str, Any]:
    """Write one file; returns the fields of its record, less the name."""
    row_group_rows: list[int] = []
    no_data = {"sar": 0, "optical": 0}
    content = hashlib.sha256()
    with explain_failed_write(path):
        file = path.open("wb")
    with file:
        # Pixels hardly compress and nobody filters by them: no compression, dictionaries or statistics.
        writer = pq.ParquetWriter(
            file, schema, compression="none", use_dictionary=False, write_statistics=["id"], write_page_checksum=True
        )
        try:
            for pairs in row_groups:
                rows = [_row(pair, split) for pair in pairs]
                table = _table(rows, schema)
                with explain_failed_write(path):
                    writer.write_table(table, row_group_size=len(rows))
                row_group_rows.append(len(rows))
                for pair, row in zip(pairs, rows, strict=True):
                    for part in (pair.id.encode(), row["sar"], row["optical"]):
                        content.update(part)
                    no_data = {sensor: no_data[sensor] + count for sensor, count in no_data_pixels(pair).items()}
            described = dataclasses.asdict(info) | {
                "format_version": FORMAT_VERSION,
                "split": split,
                "rows": sum(row_group_rows),
                "content_hash": content.hexdigest(),
            }
            writer.add_key_value_metadata({METADATA_KEY: json.dumps(described)})
        finally:
            with explain_failed_write(path):
                writer.close()
        with explain_failed_write(path):
            flush_to_disk(file)
    return {
        "rows": sum(row_group_rows),
        "row_group_rows": tuple(row_group_rows),
        "bytes": path.stat().st_size,
        "content_hash": content.hexdigest(),
        "no_data_pixels": no_data,
    }


def _row(pair: Pair, split: str) -> dict[str, Any]:
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
            row[name] = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
            row[f"{name}_dtype"] = values.dtype.name
            row[f"{name}_shape"] = values.shape
    return row


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        try:
            columns.append(pa.array([row.get(field.name) for row in rows], field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, OverflowError) as error:
            raise PairError(
                f"{rows[0]['id']} to {rows[-1]['id']}: column {field.name!r} does not hold {field.type} throughout, "
                f"the type of its first value: {error}"
            ) from error
    return pa.table(columns, schema=schema)
