"""How much memory a parquet file takes when it is decoded, found before it is.

A few bytes of parquet can decode to terabytes: by compression, by a dictionary whose one long value stands in every
row, by missing values. What the footer says of sizes is a claim that Arrow does not check. The header of each page is
what Arrow goes by, so these are read here: they are Thrift structs in the compact protocol (Parquet format,
PageHeader).
"""

from collections.abc import Callable, Collection
from typing import Any

import pyarrow.parquet as pq

FREE_BYTES = 64 * 2**20
"""A row group may always decode to this much."""

MOST_EXPANSION = 64
"""Beyond that, to so many times its bytes in the file. Images compress ten times at most where they show anything."""

_DICTIONARY_PAGE, _DATA_PAGE, _DATA_PAGE_V2 = 2, 0, 3
_PLAIN = 0
_OVERHEAD = 16
"""Bytes of memory for a value beside its own: offset, validity and levels."""

_HEADER_BYTES = 65_536
"""Longest header of a page; those with statistics of long texts have some hundred bytes."""

_WORTH_READING = 2**16
"""So many bytes between two columns are read with them rather than asked for around."""

_NO_PLACE = "its footer places columns where no file can have them"

Read = Callable[[int, int], bytes]
"""Gives bytes of a file: from where, how many at most."""


def check_decoded_size(
    read: Read, footer: pq.FileMetaData, number: int, columns: Collection[str] | None = None
) -> None:
    """Raise a ValueError unless a row group decodes into memory in proportion to its bytes in the file.

    Args:
        read: gives bytes of the file.
        footer: of the file.
        number: which row group.
        columns: those that will be read; all where None.
    """
    if (footer.created_by or "").lower().startswith("parquet-mr"):
        raise ValueError("it was written by parquet-mr, of which Arrow reads more bytes than the footer says")
    group, stored, decoded = footer.row_group(number), 0, 0
    for index in range(group.num_columns):
        column = group.column(index)
        if _is_wanted(column, columns):
            stored += column.total_compressed_size
            decoded += _decoded_bytes(read, column)
            if decoded > max(FREE_BYTES, MOST_EXPANSION * stored):
                raise ValueError(
                    f"{stored:,} bytes of row group {number}, up to column {column.path_in_schema}, would decode to "
                    f"{decoded:,} or more; at most {MOST_EXPANSION} times as many are read"
                )


def byte_ranges(group: pq.RowGroupMetaData, columns: Collection[str] | None = None) -> list[tuple[int, int]]:
    """Where the bytes of columns of a row group begin and end in the file, near ones taken together.

    Raises:
        ValueError: no file can have them there.
    """
    ranges: list[tuple[int, int]] = []
    chunks = [chunk for chunk in map(group.column, range(group.num_columns)) if _is_wanted(chunk, columns)]
    for start, size in sorted((_start(chunk), chunk.total_compressed_size) for chunk in chunks):
        if min(start, size) < 0:
            raise ValueError(_NO_PLACE)
        if ranges and start - ranges[-1][1] <= _WORTH_READING:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], start + size))
        else:
            ranges.append((start, start + size))
    return ranges


def _is_wanted(column: pq.ColumnChunkMetaData, columns: Collection[str] | None) -> bool:
    return columns is None or column.path_in_schema.partition(".")[0] in columns


def _start(column: pq.ColumnChunkMetaData) -> int:
    """Where Arrow begins to read a column."""
    dictionary = column.dictionary_page_offset
    return dictionary if dictionary and 0 < dictionary < column.data_page_offset else column.data_page_offset


def _decoded_bytes(read: Read, column: pq.ColumnChunkMetaData) -> int:
    """Most bytes that a column takes in memory."""
    at, decoded, dictionary = _start(column), 0, 0
    end = at + column.total_compressed_size
    if at < 0 or column.total_compressed_size < 0:
        raise ValueError(_NO_PLACE)
    while at < end:
        header, length = _page_header(read, at, end)
        stored, size = header.get(3, -1), header.get(2, -1)
        if min(stored, size) < 0:
            raise ValueError(f"a page of column {column.path_in_schema} has no size")
        kind = header.get(1, -1)
        decoded += max(stored, size)
        if kind == _DICTIONARY_PAGE:
            dictionary = max(dictionary, size)
        elif kind in (_DATA_PAGE, _DATA_PAGE_V2):
            values = header.get((5, 1) if kind == _DATA_PAGE else (8, 1), -1)
            encoding = header.get((5, 2) if kind == _DATA_PAGE else (8, 4), -1)
            if values < 0:
                raise ValueError(f"a page of column {column.path_in_schema} has no number of values")
            # A value of a dictionary, or with what it shares with the one before it, may be as long as a page.
            decoded += values * (_OVERHEAD + (0 if encoding == _PLAIN else max(dictionary, size)))
        at += length + stored
    return decoded


def _page_header(read: Read, at: int, end: int) -> tuple[dict[Any, int], int]:
    """Whole numbers in the header of a page by number of the field, those of structs as pairs; and its length."""
    for most in (128, _HEADER_BYTES):
        content = read(at, min(most, end - at))
        try:
            return _Struct(content).fields()
        except IndexError:
            continue
    raise ValueError(f"there is no header of a page at byte {at:,}")


class _Struct:
    """Reads the outermost struct of some bytes; `IndexError` where they end before it does."""

    _MOST_NESTED = 8

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def fields(self) -> tuple[dict[Any, int], int]:
        numbers: dict[Any, int] = {}
        self._struct(numbers, ())
        return numbers, self._at

    def _struct(self, numbers: dict[Any, int], outer: tuple[int, ...]) -> None:
        if len(outer) > self._MOST_NESTED:
            raise IndexError
        field = 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._signed()
            self._value(kind & 15, numbers, (*outer, field))

    def _value(self, kind: int, numbers: dict[Any, int], place: tuple[int, ...]) -> None:
        if kind in (4, 5, 6):
            numbers[place if len(place) > 1 else place[0]] = self._signed()
        elif kind == 3:
            self._skip(1)
        elif kind == 7:
            self._skip(8)
        elif kind == 8:
            self._skip(self._unsigned())
        elif kind == 12:
            self._struct(numbers, place)
        elif kind not in (1, 2):  # the two truths take no bytes; headers of pages hold no lists or maps
            raise IndexError

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise IndexError

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
