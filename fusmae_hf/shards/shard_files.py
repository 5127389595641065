"""Opening shards, from a folder or any URL that fsspec knows, and saying which cannot be read."""

import io
import os
import reprlib
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusmae_hf.files.retries import retried
from fusmae_hf.files.strict_json import parse_json
from fusmae_hf.shards.dataset_info import FILE_NAME, ShardRecord
from fusmae_hf.shards.decoding import (
    SMALL_COLUMNS,
    DamagedShardError,
    MissingShardError,
    RowsInFile,
    RowsInMemory,
    ShardRows,
    declared_lengths,
    require_columns,
)
from fusmae_hf.shards.parquet_pages import byte_ranges, check_decoded_size
from fusmae_hf.shards.writing import METADATA_KEY
from fusmae_hf.vocabulary import IMAGES


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
    except Exception as error:  # every file system of fsspec raises its own
        raise unreadable(root, shard, error) from error


def read_footer(file: Any, shard: ShardRecord, root: str) -> pq.FileMetaData:
    """Footer of an open shard, checked against `dataset_info.json`.

    Raises:
        DamagedShardError: it cannot be read, or is that of another preparation.
    """
    try:
        footer = pq.read_metadata(file)
        described = parse_json((footer.metadata or {}).get(METADATA_KEY, b"{}"))
        hashed = described.get("content_hash") if isinstance(described, dict) else None
    except Exception as error:  # of Arrow, of the file system, of JSON
        raise unreadable(root, shard, error) from error
    rows = tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
    if rows != shard.row_group_rows or hashed != shard.content_hash:
        raise DamagedShardError(
            f"{root}/{shard.name} holds {sum(rows)} pairs in {len(rows)} row groups, hash {reprlib.repr(hashed)}, but "
            f"dataset_info.json says {shard.rows} in {len(shard.row_group_rows)}, hash {shard.content_hash}: they are "
            "not of the same preparation. Prepare the folder again."
        )
    return footer


def checked_footer(root: str, shard: ShardRecord) -> pq.FileMetaData:
    """Footer of a shard: see `read_footer`. Storage that stalls is waited for."""

    def read() -> pq.FileMetaData:
        with open_shard(root, shard) as file:
            return read_footer(file, shard, root)

    return retried(read, f"{root}/{shard.name}", is_missing_for_now=lambda: not _is_folder_there(root))


def read_row_group(
    root: str,
    shard: ShardRecord,
    number: int,
    footers: dict[str, pq.FileMetaData],
    columns: Collection[str] | None = None,
) -> pa.Table:
    """Read one row group of a shard. Storage that stalls is waited for: see `retried`.

    Args:
        root: folder or URL.
        shard: the file.
        number: which of its row groups.
        footers: those read before, by name of the file; that of this one is added.
        columns: names of columns; all where None.

    Raises:
        DamagedShardError: the file cannot be read, does not agree with `dataset_info.json`, or would take much more
            memory than it has bytes.
    """
    # pyarrow rather than `load_dataset(streaming=True).reshard().shard(n, g)`, which opens every shard for its footer
    # before the first batch; here a footer is read when its shard is first needed. Rows carry checksums of their own,
    # which cost a tenth of those of parquet's pages.
    names = None if columns is None else list(columns)

    def read() -> pa.Table:
        with open_shard(root, shard) as file:
            if shard.name not in footers:
                footers[shard.name] = read_footer(file, shard, root)
            footer = footers[shard.name]
            try:
                if "://" in root:  # at one go, then the headers of the pages are at hand
                    file = _PartsOfFile(file, byte_ranges(footer.row_group(number), columns))
                check_decoded_size(read_at(file), footer, number, columns)
                parquet = pq.ParquetFile(file, metadata=footer)
                table = parquet.read_row_group(number, columns=names, use_threads=False)
            except Exception as error:  # of Arrow, of the file system, of what is too large
                raise unreadable(root, shard, error) from error
        if len(table) != shard.row_group_rows[number]:
            raise DamagedShardError(
                f"{root}/{shard.name} is damaged: row group {number} holds {len(table)} rows, but declares "
                f"{shard.row_group_rows[number]}. Delete it and prepare (or download) it again."
            )
        if names is not None:
            known = {**SMALL_COLUMNS, **dict.fromkeys(IMAGES, pa.large_binary())}
            needed = {name: known.get(name) for name in names}
            require_columns(table, needed, f"{root}/{shard.name}")
        return table

    return retried(
        read,
        f"{root}/{shard.name}",
        is_missing_for_now=lambda: shard.name in footers or not _is_folder_there(root),
    )


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
        rows = _one_batch(read_row_group(root, shard, number, footers, SMALL_COLUMNS))
        in_place = _rows_in_place(rows, origin, footers[shard.name].row_group(number), optical_factors)
        if in_place is not None:
            return in_place
    needed = [*SMALL_COLUMNS, *IMAGES]
    return RowsInMemory(_one_batch(read_row_group(root, shard, number, footers, needed)), origin)


def check_pages(path: str) -> None:
    """Raise a DamagedShardError where a row group of a local file would take much more memory than it has bytes."""
    try:
        with pa.OSFile(path) as file:
            footer = pq.read_metadata(file)
            for number in range(footer.num_row_groups):
                check_decoded_size(read_at(file), footer, number)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedShardError(f"{path} cannot be read: {error}. Prepare (or download) it again.") from error


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    (rows,) = table.combine_chunks().to_batches()
    return rows


def _is_folder_there(root: str) -> bool:
    """False where storage as a whole is gone, as against a file that was deleted or never there."""
    try:
        filesystem, folder = fsspec.url_to_fs(root)
        return filesystem.exists(f"{folder}/{FILE_NAME}")
    except Exception:  # every file system of fsspec raises its own
        return False


def read_at(file: Any) -> Callable[[int, int], bytes]:
    """Bytes of an open file from a place on, as `check_decoded_size` asks for them."""
    if isinstance(file, pa.NativeFile):
        return lambda at, count: file.read_at(count, at)

    def read(at: int, count: int) -> bytes:
        file.seek(at)
        return file.read(count)

    return read


class _PartsOfFile(io.RawIOBase):
    """Some bytes of a file, read at one go, at the places where they are in it."""

    def __init__(self, file: Any, ranges: Sequence[tuple[int, int]]):
        super().__init__()
        self._size, self._at, self._parts = file.seek(0, os.SEEK_END), 0, list[tuple[int, memoryview]]()
        for start, end in ranges:
            if end > self._size:
                raise EOFError(f"columns end at byte {end:,}, but the file has {self._size:,}")
            file.seek(start)
            self._parts.append((start, memoryview(file.read(end - start))))
            if len(self._parts[-1][1]) < end - start:
                raise EOFError(f"of bytes {start:,} to {end:,} only {len(self._parts[-1][1]):,} arrived")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        for start, content in self._parts:
            if start <= self._at <= start + len(content):
                first = self._at - start
                found = bytes(content[first : None if count < 0 else first + count])
                self._at += len(found)
                return found
        raise EOFError(f"byte {self._at:,} was not read")


def _rows_in_place(
    rows: pa.RecordBatch, origin: str, group: pq.RowGroupMetaData, optical_factors: Sequence[int]
) -> RowsInFile | None:
    """Rows whose arrays are read from where they lie in the parquet file, at half the cost of decoding them.

    Shards hold arrays plainly encoded and uncompressed: the one page of a column ends with the values, each after its
    length in four bytes (Parquet format, encoding PLAIN of BYTE_ARRAY). None where something else is found. Should it
    look so by chance, checksums tell.
    """
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    if not columns.keys() >= set(IMAGES) or not set(SMALL_COLUMNS) <= set(rows.schema.names):
        return None
    file = retried(lambda: os.open(origin, os.O_RDONLY), origin, is_missing_for_now=lambda: True)
    places = {}
    for name in IMAGES:
        column = columns[name]
        lengths = declared_lengths(rows, name, optical_factors if name == "optical" else ())
        present = lengths > 0
        if column.compression != "UNCOMPRESSED" or (name != "label_map" and not present.all()):
            break
        end = column.data_page_offset + column.total_compressed_size
        begins = np.full(len(lengths), -1)
        if sum(lengths[present].tolist()) + 4 * int(present.sum()) > column.total_compressed_size:
            break  # in Python's integers, which hold any size that a row may declare
        begins[present] = end - np.cumsum(lengths[present][::-1] + 4)[::-1] + 4
        ends_of_column = np.flatnonzero(present)[[0, -1]].tolist() if present.any() else list[int]()
        if any(
            os.pread(file, 4, begins[row] - 4) != int(lengths[row]).to_bytes(4, "little") for row in ends_of_column
        ):
            break
        places[name] = begins, lengths
    if len(places) < len(IMAGES):
        os.close(file)
        return None
    in_place = RowsInFile(rows, origin, file, places, origin, origin)
    weakref.finalize(in_place, os.close, file)
    return in_place


def bad_footers(root: str, shards: Sequence[ShardRecord]) -> dict[str, str]:
    """Files that are missing, or whose footer cannot be read or is not the one expected, with the reason."""

    def problem(shard: ShardRecord) -> str | None:
        try:
            checked_footer(root, shard)
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
                rows = read_row_group(root, shard, number, {})
                require_columns(rows, SMALL_COLUMNS, f"{root}/{shard.name}")
        except DamagedShardError as error:
            bad_files[shard.name] = str(error)
    return bad_files


def unreadable(root: str, shard: ShardRecord, error: Exception) -> DamagedShardError:
    """The error for a file that is there but cannot be read."""
    return DamagedShardError(
        f"{root}/{shard.name} cannot be read: {error}. If it is damaged or truncated, delete it and prepare (or "
        "download) it again."
    )
