"""The order in which pairs are read: always a pure function of (seed, epoch), so that a cut run can be resumed.

Samplers run in the main process and yield `(epoch, row)`: the epoch travels with the index, and workers, persistent or
not, need no state. The epoch is that of the dataset at the moment the iteration starts.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler


class EpochDataset(Protocol):
    """A dataset that knows its epoch."""

    epoch: int

    def __len__(self) -> int: ...


class PairSampler(Sampler[tuple[int, int]]):
    """Base of the orders here.

    Attributes:
        dropped: number of rows left out of each epoch.
        depends_on: what the order depends on beside the rows, the seed and the epoch.
    """

    dropped: int
    depends_on: dict[str, int]

    @abstractmethod
    def __len__(self) -> int: ...


class SequentialPairSampler(PairSampler):
    """All rows in stored order, each once, always as of epoch 0: for evaluation.

    Exact whatever the number of workers and processes. In the streamed way of reading, a row group that spans several
    batches is decoded by each worker that gets one of them.
    """

    def __init__(self, dataset: EpochDataset):
        self.dataset, self.dropped, self.depends_on = dataset, 0, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, row) for row in range(len(self.dataset)))


class EpochSampler(PairSampler):
    """A permutation of all rows that is a pure function of (seed, epoch): for training on local shards.

    Exact: the order, whatever the number of workers; with the same global batch also the content of each global batch
    and their number, whatever the number of processes. The uneven tail is left out, a different one in each epoch.
    (numpy promises the same permutation for one of its versions, not for all.)

    Args:
        dataset: dataset whose `epoch` is read when an iteration starts.
        batch_size: pairs in a batch of one process.
        seed: non-negative integer.
        num_processes: training processes, which take batches in turn.
        accumulation: batches of each process in one optimiser step.

    Attributes:
        dropped: number of rows left out of each epoch, see `left_out`.
        depends_on: what the order depends on beside the rows, the seed and the epoch.

    Raises:
        ValueError: there are fewer rows than one batch for each process.
    """

    def __init__(
        self, dataset: EpochDataset, batch_size: int, *, seed: int = 0, num_processes: int = 1, accumulation: int = 1
    ):
        self.dataset, self.seed = dataset, seed
        self.dropped = left_out(len(dataset), batch_size, num_processes, accumulation)
        self.depends_on = {"global batch": batch_size * num_processes * accumulation}
        if not len(self):
            raise _too_few(len(dataset), batch_size, num_processes)

    def __len__(self) -> int:
        return len(self.dataset) - self.dropped

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))[: len(self)]
        return ((epoch, row) for row in order.tolist())


class LaneSampler(PairSampler):
    """An order for streaming that reads each row group about once an epoch: batch b comes from lane b mod `num_lanes`.

    Row groups are permuted by (seed, epoch) and laid end to end; lanes are equal stretches of that sequence, in which
    `mix` row groups at a time have their rows permuted together. Accelerate gives batch b to process b mod R, and
    torch's loader gives a process's batch j to worker j mod W. So where `num_lanes` is a multiple of R x W, each
    worker sees lanes that no other sees, and only a row group on the border of two lanes is read by two workers. What
    is left when every lane has given its whole batches, less than one batch for each, is dealt out the same way.

    Exact: the order is a pure function of (seed, epoch, position) for a given `batch_size`, `num_lanes` and `mix`,
    whatever the number of workers and processes; a resumed run starts later in it; no row comes twice. Not exact: rows
    are mixed within `mix` row groups only, not throughout the dataset. The uneven tail is left out, a different one in
    each epoch.

    Args:
        dataset: dataset whose `epoch` is read when an iteration starts.
        row_group_rows: rows in each row group, in row order.
        batch_size: pairs in a batch of one process.
        seed: non-negative integer.
        num_processes: training processes, which take batches in turn.
        num_lanes: number of lanes.
        mix: number of row groups whose rows are permuted together.
        accumulation: batches of each process in one optimiser step.

    Attributes:
        dropped: number of rows left out of each epoch, see `left_out`.
        depends_on: what the order depends on beside the rows, the seed and the epoch.

    Raises:
        ValueError: there are fewer rows than one batch for each process.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        row_group_rows: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        num_processes: int = 1,
        num_lanes: int = 1,
        mix: int = 8,
        accumulation: int = 1,
    ):
        self.dataset, self.batch_size, self.seed, self.num_lanes, self.mix = dataset, batch_size, seed, num_lanes, mix
        self._sizes = np.asarray(row_group_rows, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.dropped = left_out(int(self._sizes.sum()), batch_size, num_processes, accumulation)
        self.depends_on = {
            "global batch": batch_size * num_processes * accumulation,
            "batch of a process": batch_size,
            "processes x workers": num_lanes,
            "row groups mixed": mix,
        }
        if not len(self):
            raise _too_few(int(self._sizes.sum()), batch_size, num_processes)

    def __len__(self) -> int:
        return int(self._sizes.sum()) - self.dropped

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        return ((epoch, row) for row in islice(self._all_rows(epoch), len(self)))

    def _all_rows(self, epoch: int) -> Iterator[int]:
        *lanes, rest = [self._rows(epoch, lane, blocks) for lane, blocks in enumerate(self.blocks(epoch))]
        for _ in range(self._lane_rows // self.batch_size):
            for lane in lanes:
                yield from islice(lane, self.batch_size)
        yield from rest

    def blocks(self, epoch: int) -> list[list[dict[int, range]]]:
        """What is read together, for each lane in reading order, and last for what the lanes leave.

        A block holds, by row group, the rows that belong to the lane.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[order])
        borders = [lane * self._lane_rows for lane in range(self.num_lanes + 1)] + [int(self._sizes.sum())]
        lanes = []
        for first, last in pairwise(borders):
            begin, end = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left") + 1
            groups = order[begin:end] if last > first else order[:0]
            rows = {
                group: range(start + max(0, first - (stop - size)), start + min(size, last - (stop - size)))
                for group, start, stop, size in zip(
                    groups.tolist(),
                    self._starts[groups].tolist(),
                    ends[begin:end].tolist(),
                    self._sizes[groups].tolist(),
                    strict=last > first,
                )
            }
            in_order = list(rows.items())
            lanes.append([dict(in_order[start : start + self.mix]) for start in range(0, len(in_order), self.mix)])
        return lanes

    @property
    def _lane_rows(self) -> int:
        """Rows of a lane: whole batches."""
        return int(self._sizes.sum()) // (self.num_lanes * self.batch_size) * self.batch_size

    def _rows(self, epoch: int, lane: int, blocks: Sequence[dict[int, range]]) -> Iterator[int]:
        for number, block in enumerate(blocks):
            rows = np.concatenate([np.arange(rows.start, rows.stop) for rows in block.values()])
            yield from np.random.default_rng([self.seed, epoch, lane + 1, number]).permutation(rows).tolist()


def left_out(rows: int, batch_size: int, num_processes: int = 1, accumulation: int = 1) -> int:
    """Rows that an epoch leaves out, so that all its optimiser steps are of whole global batches.

    It depends on the global batch alone, so that a run can go on with another number of processes. Where there are
    fewer rows than one global batch, every process gets the same number of whole batches.
    """
    in_turn = batch_size * num_processes
    return rows % (in_turn * accumulation if rows >= in_turn * accumulation else in_turn)


def _too_few(rows: int, batch_size: int, num_processes: int) -> ValueError:
    return ValueError(
        f"{rows} pairs are fewer than one batch of {batch_size} for each of {num_processes} processes. Take a smaller "
        "batch."
    )
