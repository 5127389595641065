"""From rows of a shard to a batch of tensors. Pixels never become Python objects: views over Arrow, then one copy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from .shards import PIXEL_DTYPES

_NEEDED = {"id": pa.string(), "sar": pa.large_binary(), "optical": pa.large_binary(), "label_map": pa.large_binary()}


def decode_pairs(table: pa.Table, origin: Callable[[int], str]) -> dict[str, Any]:
    """Decode rows of shards, from the local or the streamed way of reading, into a batch.

    Args:
        table: rows in the columns of a shard, in chunks of any size.
        origin: the file of the row at a position of `table`, for messages.

    Returns:
        `optical` and `sar`, tensors `(batch, bands, height, width)` in the raw dtype; `id`, a list of strings; where
        the dataset has them, `labels`, a list of lists of class names, and `label_map`, `(batch, height, width)`.

    Raises:
        ValueError: a row declares a dtype or shape that its bytes do not have, or the rows differ in shape or dtype.
    """
    for name, dtype in _NEEDED.items():
        if name not in table.column_names or table.schema.field(name).type != dtype:
            raise ValueError(
                f"{origin(0)} has no column {name!r} of type {dtype}, so it is no shard of pairs: prepare it again "
                "with `fusmae prepare`."
            )
    ids = table.column("id").to_pylist()
    batch: dict[str, Any] = {}
    for name in ("optical", "sar", "label_map"):
        column = table.column(name)
        if name == "label_map" and column.null_count == len(column):
            continue
        if column.null_count:
            missing = [id for id, valid in zip(ids, column.is_valid().to_pylist(), strict=True) if not valid]
            raise ValueError(f"These pairs have no {name}, while others of the batch have one: {missing}.")
        batch[name] = _stack(table, name, ids, origin)
    batch["id"] = ids
    labels = table.column("labels")
    if labels.null_count < len(labels):
        batch["labels"] = labels.to_pylist()
    return batch


def _stack(table: pa.Table, name: str, ids: list[str], origin: Callable[[int], str]) -> torch.Tensor:
    """Copy the arrays of one column into one tensor, having compared what is declared with what is there."""
    declared = [
        (dtype, tuple(shape or ()))
        for dtype, shape in zip(
            table.column(f"{name}_dtype").to_pylist(), table.column(f"{name}_shape").to_pylist(), strict=True
        )
    ]
    lengths = np.concatenate([np.diff(_offsets(chunk)) for chunk in table.column(name).chunks])
    expected = {described: _byte_length(*described) for described in dict.fromkeys(declared)}
    for position, described in enumerate(declared):
        if lengths[position] != expected[described]:
            raise ValueError(
                f"{origin(position)} is damaged: pair {ids[position]!r} declares {name} as {described[0]} "
                f"{described[1]}, but holds {lengths[position]} bytes. Delete it and prepare (or download) it again."
            )
    if len(expected) > 1:
        differing = {described: [ids[i] for i, d in enumerate(declared) if d == described] for described in expected}
        raise ValueError(
            f"{name} differs in dtype or shape within a batch: "
            + "; ".join(f"{dtype} {shape} in {pairs}" for (dtype, shape), pairs in differing.items())
            + ". Crop the pairs to one size when preparing, or use a batch size of 1."
        )
    (dtype, shape) = declared[0]
    stacked = np.empty((len(ids), *shape), dtype)
    rows_as_bytes = stacked.reshape(len(ids), -1).view(np.uint8)
    start = 0
    for chunk in table.column(name).chunks:
        offsets = _offsets(chunk)
        pixels = np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        rows_as_bytes[start : start + len(chunk)] = pixels.reshape(len(chunk), -1)
        start += len(chunk)
    return torch.from_numpy(stacked)


def _offsets(chunk: pa.LargeBinaryArray) -> np.ndarray:
    """Where the values of a chunk begin and end in its data buffer: one more than there are values."""
    return np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, chunk.offset * 8)


def _byte_length(dtype: str, shape: tuple[int, ...]) -> int:
    """Length of an array of the declared dtype and shape, or -1 where there can be none."""
    if dtype not in PIXEL_DTYPES or not shape or any(size is None or size < 1 for size in shape):
        return -1
    return math.prod(shape) * np.dtype(dtype).itemsize
