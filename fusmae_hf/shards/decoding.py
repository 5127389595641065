"""From rows of shards to a batch of tensors. Pixels never become Python objects: views or reads, then one copy."""

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import get_worker_info

from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.files.retries import retried
from fusmae_hf.shards.format import ARRAY_COLUMNS, SMALL_COLUMNS, pair_checksum, stored_bytes
from fusmae_hf.vocabulary import IMAGES

Declared = tuple[str, tuple[int, ...]]
"""Dtype and shape."""

MOST_OPEN_FILES = 256


class DamagedShardError(ValueError):
    """A shard, or a row of one, cannot be read; the message names the file."""


class MissingShardError(FileNotFoundError, DamagedShardError):
    """A shard is not there; the message names it."""


class ShardRows(ABC):
    """Consecutive rows of a shard: what their small columns say, and a way to their arrays.

    Args:
        rows: columns of a shard, at least `SMALL_COLUMNS`, in one chunk each.
        origin: the file, for messages.

    Raises:
        DamagedShardError: a column that every shard has is missing, has another type, or holds what that type cannot
            hold, such as bytes that are no text.
    """

    needed_columns: Mapping[str, pa.DataType] = SMALL_COLUMNS

    def __init__(self, rows: pa.RecordBatch, origin: str):
        self.origin = origin
        require_columns(rows, self.needed_columns, origin)
        try:
            rows.validate(full=True)  # text is UTF-8, offsets are in order; pixels are not looked at
        except pa.ArrowInvalid as error:
            raise DamagedShardError(
                f"{origin} is damaged: {error}. Delete it and prepare (or download) it again."
            ) from error
        self._ids, self._labels = rows.column("id"), rows.column("labels")
        self._no_labels = self._labels.null_count == len(self._labels)
        self._checksums = rows.column("checksum").fill_null(0).to_numpy()
        self._declared = {name: self._of_rows(rows, name) for name in IMAGES}

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, row: int) -> str:
        """Id of one row. Raises DamagedShardError where it has none."""
        id = self._ids[row].as_py()
        if id is None:
            raise DamagedShardError(f"{self.origin} is damaged: a row has no id. Prepare (or download) it again.")
        return id

    def labels(self, row: int) -> list[str] | None:
        """Labels of one row."""
        return None if self._no_labels else self._labels[row].as_py()

    def checksum(self, row: int) -> int:
        """Checksum of one row, as written."""
        return int(self._checksums[row])

    def declared(self, name: str, row: int) -> Declared | None:
        """Dtype and shape that a row declares for an array; None where it has no such array."""
        declared = self._declared[name]
        return declared[row] if len(declared) > 1 else declared[0]

    @abstractmethod
    def length(self, name: str, row: int) -> int:
        """Number of bytes of one array."""

    @abstractmethod
    def copy(self, name: str, row: int, target: np.ndarray) -> None:
        """Copy the bytes of one array into `target` (bytes,), of the same length.

        Raises:
            DamagedShardError: they cannot be read.
        """

    def _is_missing(self, rows: pa.RecordBatch, name: str) -> Sequence[bool]:
        """For each row, whether it has no such array."""
        return rows.column(name).is_null().to_pylist()

    def _of_rows(self, rows: pa.RecordBatch, name: str) -> list[Declared | None]:
        """What `declared` gives for the rows; a single entry where it is the same for all."""
        dtypes, shapes = (rows.column(f"{name}_{what}").to_pylist() for what in ("dtype", "shape"))
        declared = [
            None if missing else (dtype or "", tuple(shape or ()))
            for missing, dtype, shape in zip(self._is_missing(rows, name), dtypes, shapes, strict=True)
        ]
        return declared[:1] if len(set(declared)) == 1 else declared


class RowsInMemory(ShardRows):
    """Rows whose arrays lie in an Arrow record batch."""

    needed_columns = SMALL_COLUMNS | ARRAY_COLUMNS

    def __init__(self, rows: pa.RecordBatch, origin: str):
        super().__init__(rows, origin)
        self._ends: dict[str, np.ndarray] = {}
        self._values: dict[str, pa.Buffer | None] = {}
        for name in IMAGES:
            column = rows.column(name)
            _, offsets, self._values[name] = column.buffers()
            self._ends[name] = np.frombuffer(offsets, np.int64, len(column) + 1, column.offset * 8)

    def length(self, name: str, row: int) -> int:  # noqa: D102
        ends = self._ends[name]
        return int(ends[row + 1] - ends[row])

    def raw(self, name: str, row: int) -> np.ndarray:
        """Bytes of one array as a view."""
        return np.frombuffer(self._values[name] or b"", np.uint8, self.length(name, row), int(self._ends[name][row]))

    def copy(self, name: str, row: int, target: np.ndarray) -> None:  # noqa: D102
        target[:] = self.raw(name, row)


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
        if name == "label_map":
            return rows.column("label_map_shape").is_null().to_pylist()
        return [False] * len(rows)


def require_columns(rows: pa.RecordBatch | pa.Table, columns: Mapping[str, pa.DataType | None], origin: str) -> None:
    """Raise a DamagedShardError unless rows have these columns once each, of these types; None is any type."""
    for name, dtype in columns.items():
        if rows.schema.names.count(name) != 1 or dtype not in (None, rows.schema.field(name).type):
            raise DamagedShardError(
                f"{origin} has no column {name!r} of type {dtype or 'any'}, so it is no shard of pairs: prepare it "
                "again with `fusmae prepare`."
            )


def decode_pairs(
    rows: Sequence[tuple[ShardRows, int]],
    optical_factors: Sequence[int] = (),
    *,
    packed: bool = False,
) -> dict[str, Any]:
    """Decode rows of shards, from the local or the streamed way of reading, into a batch.

    Args:
        rows: where each row is: the rows read together with it, and its position among them.
        optical_factors: those of `PairsInfo`: by how much each optical band is coarser than the grid.
        packed: leave optical bands in their own resolution, `(batch, values)`, for `expand_bands` on a device; the
            batch then has `optical_shape`, (bands, height, width). Nothing changes where all bands are of one.

    Returns:
        `optical` and `sar`, tensors `(batch, bands, height, width)` in the raw dtype; `id`, a list of strings; where
        the dataset has them, `labels`, a list of lists of class names, and `label_map`, `(batch, height, width)`.

    Raises:
        DamagedShardError: a row declares a dtype or shape that its bytes do not have, or its checksum is wrong.
        ValueError: the rows differ in shape or dtype, or only some have a label map.
    """
    ids = [at.id(row) for at, row in rows]
    kinds = {name: _common_kind(rows, name, optical_factors if name == "optical" else ()) for name in IMAGES}
    stacked = {name: _batch_memory(len(rows), kind.length) for name, kind in kinds.items() if kind}
    targets = [(name, tensor.numpy()) for name, tensor in stacked.items()]
    for position, (at, row) in enumerate(rows):
        for name, target in targets:
            at.copy(name, row, target[position])
        # Of the copy, which is in the processor's cache.
        if pair_checksum(ids[position], *(target[position] for _, target in targets)) != at.checksum(row):
            raise DamagedShardError(
                f"{at.origin} is damaged: the checksum of pair {ids[position]!r} is not that of its pixels. Delete "
                "the file and prepare (or download) it again."
            )
    batch: dict[str, Any] = {"id": ids}
    for name, kind in kinds.items():
        if kind is None:
            continue
        values = stacked[name].view(getattr(torch, kind.dtype))
        if name != "optical" or not optical_factors:
            batch[name] = values.view(-1, *kind.shape)
        elif packed:
            batch[name], batch["optical_shape"] = values, kind.shape
        else:
            batch[name] = expand_bands(values, optical_factors, *kind.shape[1:])
    labels = [at.labels(row) for at, row in rows]
    if any(of_pair is not None for of_pair in labels):
        batch["labels"] = labels
    return batch


def check_lengths(rows: ShardRows, optical_factors: Sequence[int]) -> None:
    """Raise a DamagedShardError unless the arrays of rows have the lengths that are declared."""
    for row in range(len(rows)):
        for name in IMAGES:
            _common_kind([(rows, row)], name, optical_factors if name == "optical" else ())


_spare_memory: dict[tuple[int, int], deque[np.ndarray]] = {}
"""Memory of batches that are gone, by rows and bytes of a row."""

_MOST_SIZES = 16


def _batch_memory(rows: int, length: int) -> torch.Tensor:
    """Bytes `(rows, length)` of any content: memory of a batch that is gone, where there is some of this size.

    The kernel clears fresh memory, which costs a sixth of the rate of reading (benchmarks/data_pipeline.py). In a
    worker of a `DataLoader` batches lie in shared memory instead, as torch's own collation has them, so that sending
    them copies nothing.
    """
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(rows * length, device="cpu")
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(rows, length)
    if len(_spare_memory) > _MOST_SIZES:
        _spare_memory.clear()
    spare = _spare_memory.setdefault((rows, length), deque(maxlen=4))
    try:
        memory = spare.pop()
    except IndexError:
        memory = np.empty((rows, length), np.uint8)
    lent = memory.view()
    # Every tensor, view or array made of the batch holds `lent`, so the memory comes back when all of them are gone.
    weakref.finalize(lent, spare.append, memory).atexit = False
    return torch.from_numpy(lent)


class _Kind(NamedTuple):
    """What the arrays of one column have in common."""

    dtype: str
    shape: tuple[int, ...]
    length: int
    """Bytes."""


def _common_kind(rows: Sequence[tuple[ShardRows, int]], name: str, factors: Sequence[int]) -> _Kind | None:
    """What all rows declare for an array, compared with what is there; None where no row has one."""
    declared = [at.declared(name, row) for at, row in rows]
    if name == "label_map" and not any(declared):
        return None
    if None in declared:
        missing = [at.id(row) for (at, row), kind in zip(rows, declared, strict=True) if kind is None]
        if name != "label_map":
            origin = next(at.origin for (at, _), kind in zip(rows, declared, strict=True) if kind is None)
            raise DamagedShardError(f"{origin} is damaged: pair {missing[0]!r} has no {name}. Prepare it again.")
        raise ValueError(f"These pairs have no {name}, while others of the batch have one: {missing}.")
    present = [kind for kind in declared if kind is not None]
    expected = {kind: stored_bytes(*kind, tuple(factors)) for kind in dict.fromkeys(present)}
    for (at, row), kind in zip(rows, present, strict=True):
        if at.length(name, row) != expected[kind]:
            raise DamagedShardError(
                f"{at.origin} is damaged: pair {at.id(row)!r} declares {name} as {kind[0]} {kind[1]}, but holds "
                f"{at.length(name, row)} bytes. Delete it and prepare (or download) it again."
            )
    if len(expected) > 1:
        differing = {
            kind: [at.id(row) for (at, row), other in zip(rows, declared, strict=True) if other == kind]
            for kind in expected
        }
        raise ValueError(
            f"{name} differs in dtype or shape within a batch: "
            + "; ".join(f"{dtype} {shape} in {pairs}" for (dtype, shape), pairs in differing.items())
            + ". Crop the pairs to one size when preparing, or use a batch size of 1."
        )
    (((dtype, shape), length),) = expected.items()
    return _Kind(dtype, shape, length)
