"""From rows of shards to a batch of tensors. Pixels never become Python objects: views or reads, then one copy."""

import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import get_worker_info

from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.shards.format import ARRAY_COLUMNS, SMALL_COLUMNS, pair_checksum, stored_bytes
from fusmae_hf.vocabulary import IMAGES, OF_SCENES, SENSORS

if TYPE_CHECKING:
    from fusmae_hf.data.pairs import PairsInfo

Declared = tuple[str, tuple[int, ...]]
"""Dtype and shape."""


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

    needed_columns: Mapping[str, tuple[pa.DataType, ...]] = SMALL_COLUMNS

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
        self._of_scenes = {name: rows.column(name).to_pylist() for name in OF_SCENES if name in rows.schema.names}

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

    def of_scene(self, name: str, row: int) -> Any:
        """What a row says of one of `OF_SCENES`; None where it says nothing."""
        values = self._of_scenes.get(name)
        return None if values is None else values[row]

    def usual_dtype(self, name: str) -> str:
        """Dtype of an array in the rows that have one; float32 where none has."""
        return next((declared[0] for declared in self._declared[name] if declared), "float32")

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
        missing = rows.column(name).is_null()
        if name in SENSORS:  # what is declared but not there is damage
            missing = pc.and_(missing, rows.column(f"{name}_shape").is_null())
        return missing.to_pylist()

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


def require_columns(
    rows: pa.RecordBatch | pa.Table, columns: Mapping[str, tuple[pa.DataType, ...]], origin: str
) -> None:
    """Raise a DamagedShardError unless rows have these columns once each, of one of these types; none is any type."""
    for name, dtypes in columns.items():
        if rows.schema.names.count(name) != 1 or (dtypes and rows.schema.field(name).type not in dtypes):
            raise DamagedShardError(
                f"{origin} has no column {name!r} of type {dtypes[0] if dtypes else 'any'}, so it is no shard of "
                "pairs: prepare it again with `fusmae prepare`."
            )


def decode_pairs(
    rows: Sequence[tuple[ShardRows, int]],
    info: "PairsInfo",
    *,
    packed: bool = False,
    absent: Sequence[str] = (),
) -> dict[str, Any]:
    """Decode rows of shards, from the local or the streamed way of reading, into a batch.

    Args:
        rows: where each row is: the rows read together with it, and its position among them.
        info: what holds for all pairs.
        packed: leave optical bands in their own resolution, `(batch, values)`, for `expand_bands` on a device; the
            batch then has `optical_shape`, (bands, height, width). Nothing changes where all bands are of one.
        absent: sensors that pairs of the dataset may lack, so that every batch says which are there.

    Returns:
        `optical` and `sar`, tensors `(batch, bands, height, width)` in the raw dtype, NaN or zero where a pair lacks
        the sensor; for sensors that can be absent `optical_available` and `sar_available`, `(batch,)` bool; `id`, a
        list of strings; `optical_offset`, `(batch,)` float32, and, where they differ from scene to scene, `sar_units`
        and `optical_units`, lists of strings; where the dataset has them, `labels`, a list of lists of class names,
        and `label_map`, `(batch, height, width)`.

    Raises:
        DamagedShardError: a row declares a dtype or shape that its bytes do not have, or its checksum is wrong.
        ValueError: the rows differ in shape or dtype, or only some have a label map.
    """
    ids = [at.id(row) for at, row in rows]
    factors = info.optical_factors
    kinds = {name: _common_kind(rows, name, factors if name == "optical" else ()) for name in IMAGES}
    for name, other in (SENSORS, SENSORS[::-1]):
        if kinds[name] is None:
            kinds[name] = _kind_of_absent(rows, name, kinds[other], info)
    stacked = {name: _batch_memory(len(rows), kind.length) for name, kind in kinds.items() if kind}
    targets = [(name, tensor.numpy()) for name, tensor in stacked.items()]
    lacking = {name: kind.lacking for name, kind in kinds.items() if kind and kind.lacking}
    for position, (at, row) in enumerate(rows):
        filled = []
        for name, target in targets:
            if lacking and position in lacking.get(name, ()):
                _fill_absent(target[position], kinds[name])
            else:
                at.copy(name, row, target[position])
                filled.append(target[position])
        # Of the copy, which is in the processor's cache.
        if pair_checksum(ids[position], *filled) != at.checksum(row):
            raise DamagedShardError(
                f"{at.origin} is damaged: the checksum of pair {ids[position]!r} is not that of its pixels. Delete "
                "the file and prepare (or download) it again."
            )
    batch: dict[str, Any] = {"id": ids}
    for name, kind in kinds.items():
        if kind is None:
            continue
        values = stacked[name].view(getattr(torch, kind.dtype))
        if name != "optical" or not factors:
            batch[name] = values.view(-1, *kind.shape)
        elif packed:
            batch[name], batch["optical_shape"] = values, kind.shape
        else:
            batch[name] = expand_bands(values, factors, *kind.shape[1:])
        if name in absent or kind.lacking:
            batch[f"{name}_available"] = torch.tensor([row not in kind.lacking for row in range(len(rows))])
    batch |= _of_scenes(rows, info)
    labels = [at.labels(row) for at, row in rows]
    if any(of_pair is not None for of_pair in labels):
        batch["labels"] = labels
    return batch


def _of_scenes(rows: Sequence[tuple[ShardRows, int]], info: "PairsInfo") -> dict[str, Any]:
    """What differs from scene to scene, for a batch."""
    offsets = torch.full((len(rows),), float(info.optical_offset))
    if not info.per_scene:
        return {"optical_offset": offsets}
    said = {name: [at.of_scene(name, row) for at, row in rows] for name in info.per_scene}
    said = {
        name: [getattr(info, name) if value is None else value for value in values] for name, values in said.items()
    }
    offsets = torch.tensor(said.pop("optical_offset"), dtype=torch.float32) if "optical_offset" in said else offsets
    return {"optical_offset": offsets, **said}


def check_lengths(rows: ShardRows, optical_factors: Sequence[int]) -> None:
    """Raise a DamagedShardError unless the arrays of rows have the lengths that are declared."""
    for row in range(len(rows)):
        for name in IMAGES:
            _common_kind([(rows, row)], name, optical_factors if name == "optical" else ())


_lent_memory: dict[tuple[int, int], deque[tuple[np.ndarray, weakref.ref[np.ndarray]]]] = {}
"""Memory of batches with what each holds as long as it is there, by rows and bytes of a row."""

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
    if len(_lent_memory) > _MOST_SIZES:
        _lent_memory.clear()
    lent = _lent_memory.setdefault((rows, length), deque(maxlen=8))
    memory = None
    for _ in range(len(lent)):
        try:
            known, borrower = lent.pop()
        except IndexError:  # another thread has it
            break
        if borrower() is None:
            memory = known
            break
        lent.appendleft((known, borrower))
    if memory is None:
        memory = np.empty((rows, length), np.uint8)
    view = memory.view()
    # Every tensor, view or array made of the batch holds `view`: when all are gone, so is it. Nothing is called then:
    # of what comes while Python calls something that way, such as Ctrl-C, it says no more than that it ignored it.
    lent.append((memory, weakref.ref(view)))
    return torch.from_numpy(view)


class _Kind(NamedTuple):
    """What the arrays of one column have in common."""

    dtype: str
    shape: tuple[int, ...]
    length: int
    """Bytes."""
    lacking: frozenset[int] = frozenset()
    """Positions of the rows that have no such array."""


def _kind_of_absent(
    rows: Sequence[tuple[ShardRows, int]], name: str, other: _Kind | None, info: "PairsInfo"
) -> _Kind | None:
    """Kind of a sensor that all rows lack: of the size of the other one."""
    if other is None:
        at, row = rows[0]
        raise DamagedShardError(
            f"{at.origin} is damaged: pair {at.id(row)!r} has neither sar nor optical. Prepare it again."
        )
    dtype = next((dtype for at, _ in rows if (dtype := at.usual_dtype(name)) != "float32"), "float32")
    shape = (len(getattr(info, f"{name}_bands")), *other.shape[1:])
    length = stored_bytes(dtype, shape, info.optical_factors if name == "optical" else ())
    if length < 0:
        raise DamagedShardError(
            f"{rows[0][0].origin}: {name} is absent, and of the size of the other sensor, {other.shape[1:]}, there "
            f"can be none with bands {info.optical_factors} times coarser. Prepare it again."
        )
    return _Kind(dtype, shape, length, frozenset(range(len(rows))))


def _fill_absent(target: np.ndarray, kind: _Kind | None) -> None:
    """Fill the bytes of a patch that is absent with NaN, or with zero where integers have none."""
    dtype = np.dtype(kind.dtype if kind else "uint8")
    target.view(dtype)[:] = np.nan if dtype.kind == "f" else 0


def _common_kind(rows: Sequence[tuple[ShardRows, int]], name: str, factors: Sequence[int]) -> _Kind | None:
    """What all rows declare for an array, compared with what is there; None where no row has one."""
    declared = [at.declared(name, row) for at, row in rows]
    lacking: list[int] = []
    if None in declared:
        lacking = [row for row, kind in enumerate(declared) if kind is None]
        if len(lacking) == len(rows):
            return None
        if name == "label_map":
            missing = [at.id(row) for (at, row), kind in zip(rows, declared, strict=True) if kind is None]
            raise ValueError(f"These pairs have no {name}, while others of the batch have one: {missing}.")
        rows = [at for at, kind in zip(rows, declared, strict=True) if kind is not None]
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
            kind: [at.id(row) for (at, row), other in zip(rows, present, strict=True) if other == kind]
            for kind in expected
        }
        raise ValueError(
            f"{name} differs in dtype or shape within a batch: "
            + "; ".join(f"{dtype} {shape} in {pairs}" for (dtype, shape), pairs in differing.items())
            + ". Crop the pairs to one size when preparing, or use a batch size of 1."
        )
    (((dtype, shape), length),) = expected.items()
    return _Kind(dtype, shape, length, frozenset(lacking))
