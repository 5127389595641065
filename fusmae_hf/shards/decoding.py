"""From rows of shards to a batch of tensors. Pixels never become Python objects: views over Arrow, then one copy."""

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import get_worker_info

from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.files.retries import retried
from fusmae_hf.shards.writing import PIXEL_DTYPES, pair_checksum, stored_size
from fusmae_hf.vocabulary import IMAGES

"""Arrays of a row, in the order of its checksum."""

SMALL_COLUMNS = {
    "id": pa.string(),
    "checksum": pa.uint64(),
    "labels": pa.list_(pa.string()),
    **{f"{name}_dtype": pa.string() for name in IMAGES},
    **{f"{name}_shape": pa.list_(pa.int32(), 2 if name == "label_map" else 3) for name in IMAGES},
}
"""Columns that are needed beside the arrays, with their types."""


class DamagedShardError(ValueError):
    """A shard, or a row of one, cannot be read; the message names the file."""


class MissingShardError(FileNotFoundError, DamagedShardError):
    """A shard is not there; the message names it."""


class ShardRows(ABC):
    """Consecutive rows of a shard: their small columns, and a way to their arrays.

    Args:
        rows: columns of a shard, at least `SMALL_COLUMNS`, in one chunk each.
        origin: the file, for messages.

    Raises:
        DamagedShardError: a column that every shard has is missing, has another type, or holds what that type cannot
            hold, such as bytes that are no text.
    """

    def __init__(self, rows: pa.RecordBatch, origin: str):
        self.origin = origin
        require_columns(rows, SMALL_COLUMNS, origin)
        try:
            rows.validate(full=True)  # text is UTF-8, offsets are in order; pixels are not looked at
        except pa.ArrowInvalid as error:
            raise DamagedShardError(
                f"{origin} is damaged: {error}. Delete it and prepare (or download) it again."
            ) from error
        self._rows = rows
        self._ids, self._labels = rows.column("id"), rows.column("labels")
        self._no_labels = self._labels.null_count == len(self._labels)
        self._checksums = rows.column("checksum").fill_null(0).to_numpy()

    def __len__(self) -> int:
        return self._rows.num_rows

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

    def declared(self, name: str, row: int) -> tuple[str, tuple[int, ...]] | None:
        """Dtype and shape that a row declares for an array; None where it has no such array."""
        kinds = self._kinds[name]
        return kinds[row] if len(kinds) > 1 else kinds[0]

    @abstractmethod
    def length(self, name: str, row: int) -> int:
        """Number of bytes of one array."""

    @abstractmethod
    def copy(self, name: str, row: int, target: np.ndarray) -> None:
        """Copy the bytes of one array into `target` (bytes,), of the same length.

        Raises:
            DamagedShardError: they cannot be read.
        """

    def _missing(self, name: str) -> Sequence[bool]:
        """For each row, whether it has no such array."""
        if name == "label_map":
            return self._rows.column("label_map_shape").is_null().to_pylist()
        return [False] * len(self)

    @cached_property
    def _kinds(self) -> dict[str, list[tuple[str, tuple[int, ...]] | None]]:
        """What `declared` gives for the rows; a single entry where it is the same for all."""
        kinds = {}
        for name in IMAGES:
            of_rows = [
                None if missing else (dtype or "", tuple(shape or ()))
                for missing, dtype, shape in zip(
                    self._missing(name),
                    self._rows.column(f"{name}_dtype").to_pylist(),
                    self._rows.column(f"{name}_shape").to_pylist(),
                    strict=True,
                )
            ]
            kinds[name] = of_rows[:1] if len(set(of_rows)) == 1 else of_rows
        return kinds


class RowsInMemory(ShardRows):
    """Rows whose arrays lie in an Arrow record batch."""

    def __init__(self, rows: pa.RecordBatch, origin: str):
        super().__init__(rows, origin)
        require_columns(rows, dict.fromkeys(IMAGES, pa.large_binary()), origin)
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

    def _missing(self, name: str) -> Sequence[bool]:
        return self._rows.column(name).is_null().to_pylist()


class RowsInFile(ShardRows):
    """Rows whose arrays lie at known places of a local file.

    Args:
        rows: small columns.
        origin: the shard that the rows come from, for messages.
        file: descriptor of the file, which may be another one.
        places: for each array, where it begins in the file and its length in bytes, `(rows,)` each.
        name: of the file, for messages.
        path: of the file, to open it again where the descriptor has become stale.
    """

    def __init__(
        self,
        rows: pa.RecordBatch,
        origin: str,
        file: int,
        places: dict[str, tuple[np.ndarray, np.ndarray]],
        name: str,
        path: str,
    ):
        super().__init__(rows, origin)
        self._file, self._places, self._name, self._path = file, places, name, path

    def length(self, name: str, row: int) -> int:  # noqa: D102
        return int(self._places[name][1][row])

    def copy(self, name: str, row: int, target: np.ndarray) -> None:  # noqa: D102
        place = int(self._places[name][0][row])
        try:
            count = os.preadv(self._file, [target.data], place)
        except OSError as error:
            count = self._read_again(target, place, error)
        if count != len(target):
            raise DamagedShardError(f"{self._name} is cut short. Delete it and prepare (or download) it again.")

    def _read_again(self, target: np.ndarray, place: int, first: OSError) -> int:
        """Number of bytes read after a first try failed; storage that stalls is waited for."""
        failed: list[OSError] = [first]

        def read() -> int:
            if failed:
                raise failed.pop()
            # A server that came back may know nothing of files opened before. Others share this descriptor.
            fresh = os.open(self._path, os.O_RDONLY)
            try:
                os.dup2(fresh, self._file, inheritable=False)
            finally:
                os.close(fresh)
            return os.preadv(self._file, [target.data], place)

        try:
            return retried(read, self._name, is_missing_for_now=lambda: True)
        except OSError as error:
            raise DamagedShardError(f"{self._name} cannot be read ({error.strerror}).") from error


def require_columns(rows: pa.RecordBatch | pa.Table, columns: Mapping[str, pa.DataType | None], origin: str) -> None:
    """Raise a DamagedShardError unless rows have these columns once each, of these types; None is any type."""
    for name, dtype in columns.items():
        if rows.schema.names.count(name) != 1 or dtype not in (None, rows.schema.field(name).type):
            raise DamagedShardError(
                f"{origin} has no column {name!r} of type {dtype or 'any'}, so it is no shard of pairs: prepare it "
                "again with `fusmae prepare`."
            )


class BatchMemory:
    """Memory for batches: that of a batch which nobody holds any more is used again.

    The kernel clears fresh memory, which takes about as long as copying a batch into it. In a worker of a `DataLoader`
    batches lie in shared memory instead, as torch's own collation has them, so that sending them copies nothing.
    """

    def __init__(self) -> None:
        self._used: deque[np.ndarray] = deque(maxlen=8)

    def take(self, rows: int, length: int) -> torch.Tensor:
        """Bytes `(rows, length)` of any content."""
        if get_worker_info() is not None:
            storage = torch.UntypedStorage._new_shared(rows * length, device="cpu")
            return torch.empty(0, dtype=torch.uint8).set_(storage).view(rows, length)
        for memory in self._used:
            # Held by the deque, by this loop and by the call itself: no tensor holds it.
            if memory.shape == (rows, length) and sys.getrefcount(memory) == 3:
                return torch.from_numpy(memory)
        self._used.append(np.empty((rows, length), np.uint8))
        return torch.from_numpy(self._used[-1])

    def __reduce__(self) -> tuple[type["BatchMemory"], tuple[()]]:
        return BatchMemory, ()  # each process has its own


def decode_pairs(
    rows: Sequence[tuple[ShardRows, int]],
    optical_factors: Sequence[int] = (),
    *,
    packed: bool = False,
    memory: BatchMemory | None = None,
) -> dict[str, Any]:
    """Decode rows of shards, from the local or the streamed way of reading, into a batch.

    Args:
        rows: where each row is: the rows read together with it, and its position among them.
        optical_factors: those of `PairsInfo`: by how much each optical band is coarser than the grid.
        packed: leave optical bands in their own resolution, `(batch, values)`, for `expand_bands` on a device; the
            batch then has `optical_shape`, (bands, height, width). Nothing changes where all bands are of one.
        memory: where batches lie; a fresh one each time if None.

    Returns:
        `optical` and `sar`, tensors `(batch, bands, height, width)` in the raw dtype; `id`, a list of strings; where
        the dataset has them, `labels`, a list of lists of class names, and `label_map`, `(batch, height, width)`.

    Raises:
        DamagedShardError: a row declares a dtype or shape that its bytes do not have, or its checksum is wrong.
        ValueError: the rows differ in shape or dtype, or only some have a label map.
    """
    ids = [at.id(row) for at, row in rows]
    kinds = {name: _common_kind(rows, name, optical_factors if name == "optical" else ()) for name in IMAGES}
    memory = memory or BatchMemory()
    stacked = {name: memory.take(len(rows), kind.length) for name, kind in kinds.items() if kind}
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
    expected = {kind: _byte_length(*kind, factors) for kind in dict.fromkeys(present)}
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


def declared_lengths(rows: pa.RecordBatch, name: str, factors: Sequence[int]) -> np.ndarray:
    """Bytes of the arrays of a column by dtype and shape, `(rows,)`; not positive where there can be none."""
    kinds = [
        (dtype or "", tuple(shape or ()))
        for dtype, shape in zip(
            rows.column(f"{name}_dtype").to_pylist(), rows.column(f"{name}_shape").to_pylist(), strict=True
        )
    ]
    length = {kind: _byte_length(*kind, factors) for kind in set(kinds)}
    return np.array([length[kind] for kind in kinds], dtype=np.int64)


def _byte_length(dtype: str, shape: tuple[int, ...], factors: Sequence[int]) -> int:
    """Length of an array of the declared dtype and shape, or -1 where there can be none."""
    values = stored_size(shape, factors)
    # No file holds more, and numpy has no integers for it.
    return values * np.dtype(dtype).itemsize if dtype in PIXEL_DTYPES and 0 < values < 2**48 else -1
