"""Reading files of a prepared folder or of any URL that fsspec knows: footers, columns, rows."""

import os
import reprlib
import threading
import weakref
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusmae_hf.files.retries import retried
from fusmae_hf.files.strict_json import parse_json
from fusmae_hf.shards.decoding import (
    DamagedShardError,
    MissingShardError,
    RowsInMemory,
    ShardRows,
    require_columns,
)
from fusmae_hf.shards.format import ARRAY_COLUMNS, FILE_NAME, METADATA_KEY, SMALL_COLUMNS, ShardRecord, stored_bytes
from fusmae_hf.vocabulary import IMAGES, OF_SCENES

if TYPE_CHECKING:
    from fusmae_hf.data.pairs import PairsInfo

MOST_OPEN_FILES = 256

FREE_BYTES = 64 * 2**20
"""A row group may always decode to this much."""

MOST_EXPANSION = 64
"""Beyond that, to so many times its bytes in the file. Images compress ten times at most where they show anything."""

_OVERHEAD = 16
"""Bytes of memory for a value beside its own: offset, validity and levels."""

_PLAIN = {"PLAIN", "RLE", "BIT_PACKED"}
"""Encodings of values, and of the levels beside them, that no dictionary is needed for."""


def check_decoded_size(footer: pq.FileMetaData, number: int) -> None:
    """Raise a ValueError unless a row group decodes into memory in proportion to its bytes in the file.

    Compression, a dictionary whose one long value stands in every row, and missing values can make terabytes of a few
    bytes. This goes by what the footer says; that the pages are as it says is not checked.

    Args:
        footer: of the file.
        number: which row group.
    """
    group, stored, decoded = footer.row_group(number), 0, 0
    for column in map(group.column, range(group.num_columns)):
        name, size = column.path_in_schema, max(column.total_compressed_size, column.total_uncompressed_size)
        stored += column.total_compressed_size
        # A value of a dictionary, or with what it shares with the one before it, may be as long as the column.
        decoded += size + column.num_values * (_OVERHEAD + (0 if _is_plain(column) else size))
        if decoded > max(FREE_BYTES, MOST_EXPANSION * stored):
            raise ValueError(
                f"{stored:,} bytes of row group {number}, up to column {name}, would decode to "
                f"{decoded:,} or more; at most {MOST_EXPANSION} times as many are read"
            )


def _is_plain(column: pq.ColumnChunkMetaData) -> bool:
    return not column.has_dictionary_page and set(column.encodings) <= _PLAIN


class OpenFiles:
    """Reads bytes of files by path; those used last stay open."""

    def __init__(self) -> None:
        self._opened = lru_cache(MOST_OPEN_FILES)(_OpenFile)

    def read_into(self, path: str, target: np.ndarray, place: int) -> int:
        """Fill `target` with bytes of a file from a place on; their number."""
        file = self._opened(path)
        if hasattr(os, "preadv"):
            return os.preadv(file.descriptor, [target.data], place)
        with file.lock:  # Windows: a descriptor has one place, which threads share
            os.lseek(file.descriptor, place, os.SEEK_SET)
            got = os.read(file.descriptor, target.nbytes)
        target[: len(got)] = np.frombuffer(got, np.uint8)
        return len(got)

    def forget(self) -> None:
        """Open every file anew from now on."""
        self._opened.cache_clear()

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[()]]:
        return OpenFiles, ()  # each process has its own


class _OpenFile:
    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.lock = threading.Lock()
        weakref.finalize(self, os.close, self.descriptor)


class RowsInFile(ShardRows):
    """Rows whose arrays lie at known places of a local file.

    Args:
        rows: small columns.
        path: of the file.
        optical_factors: those of `PairsInfo`.
        files: reads the file.

    Attributes:
        begins: for each array, where it begins in the file, `(rows,)`; filled in by who knows.
    """

    def __init__(self, rows: pa.RecordBatch, path: str, optical_factors: Sequence[int], files: OpenFiles):
        super().__init__(rows, path)
        self._factors, self._files = tuple(optical_factors), files
        self.begins = {name: np.full(len(self), -1) for name in IMAGES}

    def length(self, name: str, row: int) -> int:  # noqa: D102
        declared = self.declared(name, row)
        return stored_bytes(*declared, self._factors if name == "optical" else ()) if declared else -1

    def copy(self, name: str, row: int, target: np.ndarray) -> None:  # noqa: D102
        if self.read_into(target, int(self.begins[name][row])) != len(target):
            raise DamagedShardError(f"{self.origin} is cut short. Delete it and prepare (or download) it again.")

    def read_into(self, target: np.ndarray, place: int) -> int:
        """Fill `target` with bytes of the file from a place on; their number. Storage that stalls is waited for.

        Raises:
            DamagedShardError: they cannot be read.
        """
        try:
            return self._files.read_into(self.origin, target, place)
        except OSError as error:
            failed: list[OSError] = [error]

        def read() -> int:
            if failed:
                raise failed.pop()
            self._files.forget()  # a server that came back may know nothing of files opened before
            return self._files.read_into(self.origin, target, place)

        try:
            return retried(read, self.origin, is_missing_for_now=lambda: True)
        except OSError as error:
            raise DamagedShardError(f"{self.origin} cannot be read ({error.strerror}).") from error

    def _is_missing(self, rows: pa.RecordBatch, name: str) -> Sequence[bool]:
        return rows.column(f"{name}_shape").is_null().to_pylist()


class ShardFile:
    """A file of a prepared folder or URL. Storage that stalls is waited for: see `retried`.

    Args:
        root: folder or URL.
        record: what `dataset_info.json` says of the file.
        place: where it is, of a file that others wrote anew, which does not describe itself.

    Attributes:
        path: where it is; of a file that was downloaded, where its copy is.
    """

    def __init__(self, root: str, record: ShardRecord, place: str | None = None):
        self.root, self.record, self.path = root, record, place or f"{root}/{record.name}"
        self._describes_itself = place is None
        self._footer: pq.FileMetaData | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_footer": None}

    @property
    def is_local(self) -> bool:
        """Whether it can be opened by its path."""
        return "://" not in self.path

    def open(self) -> Any:
        """Open it. A local file is opened natively, since a Python file costs a copy.

        Raises:
            MissingShardError: it is not there.
            DamagedShardError: it cannot be opened.
        """
        try:
            if self.is_local:
                return pa.OSFile(self.path)
            filesystem, path = fsspec.url_to_fs(self.path)
            return filesystem.open(path, "rb", cache_type="none")
        except FileNotFoundError as error:
            raise self.missing() from error
        except Exception as error:  # every file system of fsspec raises its own
            raise self.unreadable(error) from error

    def missing(self) -> MissingShardError:
        """The error for a file that is not there."""
        return MissingShardError(
            f"{self.path} is missing, but dataset_info.json lists it. Prepare (or download) it again."
        )

    def unreadable(self, error: Exception) -> DamagedShardError:
        """The error for a file that is there but cannot be read."""
        return DamagedShardError(
            f"{self.path} cannot be read: {error}. If it is damaged or truncated, delete it and prepare (or "
            "download) it again."
        )

    def footer(self) -> pq.FileMetaData:
        """Its footer, read once, checked against `dataset_info.json` and `check_decoded_size`.

        Raises:
            DamagedShardError: it cannot be read, is that of another preparation, or tells of much more memory than
                the file has bytes.
        """

        def read() -> pq.FileMetaData:
            with self.open() as file:
                return self._read_footer(file)

        if self._footer is None:
            self._footer = retried(read, self.path, is_missing_for_now=self._is_missing_for_now)
        return self._footer

    def _read_footer(self, file: Any) -> pq.FileMetaData:
        try:
            footer = pq.read_metadata(file)
            described = parse_json((footer.metadata or {}).get(METADATA_KEY, b"{}"))
            hashed = described.get("content_hash") if isinstance(described, dict) else None
        except Exception as error:  # of Arrow, of the file system, of JSON
            raise self.unreadable(error) from error
        rows = tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
        expected = self.record
        if rows != expected.row_group_rows or (self._describes_itself and hashed != expected.content_hash):
            raise DamagedShardError(
                f"{self.path} holds {sum(rows)} pairs in {len(rows)} row groups, hash {reprlib.repr(hashed)}, but "
                f"dataset_info.json says {expected.rows} in {len(expected.row_group_rows)}, hash "
                f"{expected.content_hash}: they are not of the same preparation. Prepare the folder again."
            )
        try:
            for number in range(len(rows)):
                check_decoded_size(footer, number)
        except ValueError as error:
            raise self.unreadable(error) from error
        return footer

    def forget_footer(self) -> None:
        """Free the memory of the footer, about a megabyte for a thousand pairs."""
        self._footer = None

    def read(
        self, numbers: Sequence[int], columns: Collection[str] | None = None, optional: Collection[str] = ()
    ) -> pa.Table:
        """Read row groups.

        Args:
            numbers: which row groups.
            columns: names of columns; all where None.
            optional: of them, those that the file may lack.

        Raises:
            DamagedShardError: the file cannot be read, does not agree with `dataset_info.json`, or would take much
                more memory than it has bytes.
        """
        # pyarrow rather than `load_dataset(streaming=True).reshard().shard(n, g)`, which opens every shard for its
        # footer before the first batch; here a footer is read when its shard is first needed. Rows carry checksums of
        # their own, which cost a tenth of those of parquet's pages.
        names = None if columns is None else list(columns)

        def read() -> pa.Table:
            with self.open() as file:
                self._footer = self._footer or self._read_footer(file)
                try:
                    parquet = pq.ParquetFile(file, metadata=self._footer, pre_buffer=not self.is_local)
                    return parquet.read_row_groups(numbers, columns=names, use_threads=False)
                except Exception as error:  # of Arrow, of the file system
                    raise self.unreadable(error) from error

        table = retried(read, self.path, is_missing_for_now=self._is_missing_for_now)
        declared = sum(self.record.row_group_rows[number] for number in numbers)
        if len(table) != declared:
            raise DamagedShardError(
                f"{self.path} is damaged: row groups {reprlib.repr(list(numbers))} hold {len(table)} rows, but "
                f"declare {declared}. Delete it and prepare (or download) it again."
            )
        if names is not None:
            known = SMALL_COLUMNS | ARRAY_COLUMNS
            require_columns(table, {name: known.get(name, ()) for name in names if name not in optional}, self.path)
        return table

    def rows(self, numbers: Sequence[int], info: "PairsInfo", files: OpenFiles) -> ShardRows:
        """Rows of row groups. Of a local file the arrays are read when they are needed, if `rows_in_place` can.

        Args:
            numbers: which row groups.
            info: what holds for all pairs.
            files: reads arrays.

        Raises:
            DamagedShardError: see `read`.
        """
        in_place = self.rows_in_place(numbers, info, files) if self.is_local else None
        columns = [*SMALL_COLUMNS, *info.per_scene, *IMAGES]
        return in_place or RowsInMemory(_one_batch(self.read(numbers, columns, OF_SCENES)), self.path)

    def rows_in_place(self, numbers: Sequence[int], info: "PairsInfo", files: OpenFiles) -> RowsInFile | None:
        """Rows of row groups whose arrays are read from where they lie in the local file: half the cost of decoding.

        Shards hold arrays plainly encoded and uncompressed: the one page of a column ends with the values, each after
        its length in four bytes (Parquet format, encoding PLAIN of BYTE_ARRAY). None where something else is found.
        Should it look so by chance, checksums tell.
        """
        footer = self.footer()
        groups = [_array_columns(footer.row_group(number)) for number in numbers]
        if None in groups:
            return None
        small = _one_batch(self.read(numbers, [*SMALL_COLUMNS, *info.per_scene], OF_SCENES))
        rows = RowsInFile(small, self.path, info.optical_factors, files)
        first = 0
        for number, columns in zip(numbers, groups, strict=True):
            group = range(first, first := first + self.record.row_group_rows[number])
            for name, column in (columns or {}).items():
                begins = _places(rows, group, name, column)
                if begins is None:
                    return None
                rows.begins[name][group.start : group.stop] = begins
        return rows

    def _is_missing_for_now(self) -> bool:
        """Whether the file may come back: it was read before, or storage as a whole is gone."""
        if self._footer is not None:
            return True
        try:
            filesystem, folder = fsspec.url_to_fs(self.root)
            return not filesystem.exists(f"{folder}/{FILE_NAME}")
        except Exception:  # every file system of fsspec raises its own
            return True


def _array_columns(group: pq.RowGroupMetaData) -> dict[str, pq.ColumnChunkMetaData] | None:
    """The columns of arrays of a row group; None unless all are there, plainly encoded and not compressed."""
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    arrays = {name: columns[name] for name in IMAGES if name in columns}
    for column in arrays.values():
        sizes = {column.total_compressed_size, column.total_uncompressed_size}
        if column.compression != "UNCOMPRESSED" or not _is_plain(column) or len(sizes) > 1:
            return None
    return arrays if len(arrays) == len(IMAGES) else None


def _places(rows: RowsInFile, group: range, name: str, column: pq.ColumnChunkMetaData) -> list[int] | None:
    """Where the arrays of a row group begin, -1 where a row has none; None where they are not where they should be."""
    place = column.data_page_offset + column.total_compressed_size
    present = [row for row in group if rows.declared(name, row)]
    lengths = {row: rows.length(name, row) for row in present}
    if min(lengths.values(), default=1) < 1 or sum(lengths.values()) + 4 * len(present) > column.total_compressed_size:
        return None
    begins = dict.fromkeys(group, -1)
    for row in reversed(present):
        place -= lengths[row]
        begins[row] = place
        place -= 4
    if present and not 0 <= place < 2**62:
        return None
    unaccounted = place - column.data_page_offset  # the header and the levels of the page: some tens of bytes
    if present and len(present) < len(group) and unaccounted >= 4 + min(lengths.values()):
        return None  # a row that declares no array has one: places before it would be wrong
    for row in {*present[:1], *present[-1:]}:
        marked = np.zeros(4, np.uint8)
        rows.read_into(marked, begins[row] - 4)
        if marked.tobytes() != lengths[row].to_bytes(4, "little"):
            return None
    return list(begins.values())


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    (rows,) = table.combine_chunks().to_batches()
    return rows
