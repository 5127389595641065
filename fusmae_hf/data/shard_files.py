"""Opening shards, from a folder or any URL that fsspec knows, and saying which cannot be read."""

import json
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .dataset_info import ShardRecord
from .decoding import (
    PIXEL_COLUMNS,
    SMALL_COLUMNS,
    DamagedShardError,
    MissingShardError,
    RowsInFile,
    RowsInMemory,
    ShardRows,
    declared_lengths,
)
from .shards import METADATA_KEY


def open_shard(root: str, shard: ShardRecord) -> Any:
    """Open a file of a prepared folder or URL. A local one is opened natively, since a Python file costs a copy.

    Raises:
        MissingShardError: it is not there.
        DamagedShardError: it cannot be opened.
    """
    try:
        if "://" not in root:
            return pa.OSFile(f"{root}/{shard.name}")
        filesystem, folder = fsspec.url_to_fs(root)
        return filesystem.open(f"{folder}/{shard.name}", "rb", cache_type="none")
    except FileNotFoundError as error:
        raise MissingShardError(
            f"{root}/{shard.name} is missing, but dataset_info.json lists it. Prepare (or download) it again."
        ) from error
    except OSError as error:
        raise unreadable(root, shard, error) from error


def read_footer(file: Any, shard: ShardRecord, root: str) -> pq.FileMetaData:
    """Footer of an open shard, checked against `dataset_info.json`.

    Raises:
        DamagedShardError: it cannot be read, or is that of another preparation.
    """
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(root, shard, error) from error
    described = json.loads((footer.metadata or {}).get(METADATA_KEY, b"{}"))
    rows = tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
    if rows != shard.row_group_rows or described.get("content_hash") != shard.content_hash:
        raise DamagedShardError(
            f"{root}/{shard.name} holds {sum(rows)} pairs in {len(rows)} row groups, hash "
            f"{described.get('content_hash')}, but dataset_info.json says {shard.rows} in "
            f"{len(shard.row_group_rows)}, hash {shard.content_hash}: they are not of the same preparation. "
            "Prepare the folder again."
        )
    return footer


def read_row_group(root: str, shard: ShardRecord, number: int, footers: dict[str, pq.FileMetaData]) -> pa.Table:
    """Read one row group of a shard.

    Args:
        root: folder or URL.
        shard: the file.
        number: which of its row groups.
        footers: those read before, by name of the file; that of this one is added.

    Raises:
        DamagedShardError: the file cannot be read or does not agree with `dataset_info.json`.
    """
    # pyarrow rather than `load_dataset(streaming=True).reshard().shard(n, g)`, which opens every shard for its footer
    # before the first batch; here a footer is read when its shard is first needed. Rows carry checksums of their own,
    # which cost a tenth of those of parquet's pages.
    with open_shard(root, shard) as file:
        if shard.name not in footers:
            footers[shard.name] = read_footer(file, shard, root)
        try:
            parquet = pq.ParquetFile(file, metadata=footers[shard.name], pre_buffer="://" in root)
            return parquet.read_row_group(number, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(root, shard, error) from error


def read_rows(
    root: str,
    shard: ShardRecord,
    number: int,
    footers: dict[str, pq.FileMetaData],
    optical_factors: Sequence[int] = (),
) -> ShardRows:
    """Rows of one row group of a shard. Of a local file only the small columns are read at once, arrays when needed.

    Args:
        root: folder or URL.
        shard: the file.
        number: which of its row groups.
        footers: see `read_row_group`.
        optical_factors: those of `PairsInfo`.

    Raises:
        DamagedShardError: see `read_row_group`.
    """
    origin = f"{root}/{shard.name}"
    if "://" not in root:
        with open_shard(root, shard) as file:
            if shard.name not in footers:
                footers[shard.name] = read_footer(file, shard, root)
            try:
                parquet = pq.ParquetFile(file, metadata=footers[shard.name])
                small = parquet.read_row_group(number, columns=list(SMALL_COLUMNS), use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise unreadable(root, shard, error) from error
        (rows,) = small.combine_chunks().to_batches()
        in_place = _rows_in_place(rows, origin, footers[shard.name].row_group(number), optical_factors)
        if in_place is not None:
            return in_place
    (rows,) = read_row_group(root, shard, number, footers).combine_chunks().to_batches()
    return RowsInMemory(rows, origin)


def _rows_in_place(
    rows: pa.RecordBatch, origin: str, group: pq.RowGroupMetaData, optical_factors: Sequence[int]
) -> RowsInFile | None:
    """Rows whose arrays are read from where they lie in the parquet file, at half the cost of decoding them.

    Shards hold arrays plainly encoded and uncompressed: the one page of a column ends with the values, each after its
    length in four bytes (Parquet format, encoding PLAIN of BYTE_ARRAY). None where something else is found. Should it
    look so by chance, checksums tell.
    """
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    if not columns.keys() >= set(PIXEL_COLUMNS) or not set(SMALL_COLUMNS) <= set(rows.schema.names):
        return None
    file, places = os.open(origin, os.O_RDONLY), {}
    for name in PIXEL_COLUMNS:
        column = columns[name]
        lengths = declared_lengths(rows, name, optical_factors if name == "optical" else ())
        present = lengths > 0
        if column.compression != "UNCOMPRESSED" or (name != "label_map" and not present.all()):
            break
        end = column.data_page_offset + column.total_compressed_size
        begins = np.full(len(lengths), -1)
        begins[present] = end - np.cumsum(lengths[present][::-1] + 4)[::-1] + 4
        ends_of_column = np.flatnonzero(present)[[0, -1]].tolist() if present.any() else list[int]()
        if any(
            os.pread(file, 4, begins[row] - 4) != int(lengths[row]).to_bytes(4, "little") for row in ends_of_column
        ):
            break
        places[name] = begins, lengths
    if len(places) < len(PIXEL_COLUMNS):
        os.close(file)
        return None
    in_place = RowsInFile(rows, origin, file, places, origin)
    weakref.finalize(in_place, os.close, file)
    return in_place


def bad_footers(root: str, shards: Sequence[ShardRecord]) -> dict[str, str]:
    """Files that are missing, or whose footer cannot be read or is not the one expected, with the reason."""

    def problem(shard: ShardRecord) -> str | None:
        try:
            with open_shard(root, shard) as file:
                read_footer(file, shard, root)
        except DamagedShardError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=16) as threads:
        problems = zip(shards, threads.map(problem, shards), strict=True)
        return {shard.name: reason for shard, reason in problems if reason}


def bad_pages(root: str, shards: Sequence[ShardRecord]) -> dict[str, str]:
    """Files of which a row group cannot be read, with the reason. Reads everything."""
    bad_files = {}
    for shard in shards:
        try:
            for number in range(len(shard.row_group_rows)):
                read_row_group(root, shard, number, {})
        except DamagedShardError as error:
            bad_files[shard.name] = str(error)
    return bad_files


def unreadable(root: str, shard: ShardRecord, error: Exception) -> DamagedShardError:
    """The error for a file that is there but cannot be read."""
    return DamagedShardError(
        f"{root}/{shard.name} cannot be read: {error}. If it is damaged or truncated, delete it and prepare (or "
        "download) it again."
    )
