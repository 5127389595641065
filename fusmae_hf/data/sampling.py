"""The order in which pairs are read: always a pure function of (seed, epoch), so that a cut run can be resumed.

Samplers run in the main process and yield `(epoch, row)`: the epoch travels with the index, and workers, persistent or
not, need no state. The epoch is that of the dataset at the moment the iteration starts.
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler


class EpochDataset(Protocol):
    """A dataset that knows its epoch."""

    epoch: int

    def __len__(self) -> int: ...


class SequentialPairSampler(Sampler[tuple[int, int]]):
    """All rows in stored order, each once, always as of epoch 0: for evaluation.

    Exact whatever the number of workers and processes. In the streamed way of reading, a row group that spans several
    batches is decoded by each worker that gets one of them.
    """

    dropped = 0

    def __init__(self, dataset: EpochDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, row) for row in range(len(self.dataset)))


class EpochSampler(Sampler[tuple[int, int]]):
    """A permutation of all rows that is a pure function of (seed, epoch): for training on local shards.

    Exact: the order, whatever the number of workers; with the same global batch also the content of each global batch,
    whatever the number of processes. The uneven tail is left out, a different one in each epoch. (numpy promises the
    same permutation for one of its versions, not for all.)

    Args:
        dataset: dataset whose `epoch` is read when an iteration starts.
        batch_size: pairs in a batch of one process.
        seed: non-negative integer.
        num_processes: training processes, which take batches in turn.

    Attributes:
        dropped: number of rows left out of each epoch, so that every process gets the same number of whole batches.

    Raises:
        ValueError: there are fewer rows than one batch for each process.
    """

    def __init__(self, dataset: EpochDataset, batch_size: int, *, seed: int = 0, num_processes: int = 1):
        self.dataset, self.seed = dataset, seed
        self.dropped = len(dataset) % (batch_size * num_processes)
        if not len(self):
            raise ValueError(
                f"{len(dataset)} pairs are fewer than one batch of {batch_size} for each of {num_processes} "
                "processes. Take a smaller batch."
            )

    def __len__(self) -> int:
        return len(self.dataset) - self.dropped

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))[: len(self)]
        return ((epoch, row) for row in order.tolist())


class LaneSampler(Sampler[tuple[int, int]]):
    """An order for streaming that reads each row group once an epoch: batch b is drawn from lane b mod `num_lanes`.

    Row groups are permuted by (seed, epoch) and dealt to the lanes, disjoint sets of about equal size; inside a lane,
    `mix` row groups at a time have their rows permuted together. Accelerate gives batch b to process b mod R, and
    torch's loader gives a process's batch j to worker j mod W. So where `num_lanes` is a multiple of R x W, each
    worker sees lanes that no other sees, and each row group is decoded by one worker, once an epoch.

    Exact: the order is a pure function of (seed, epoch, position) for a given `batch_size`, `num_lanes` and `mix`,
    whatever the number of workers and processes; a resumed run starts later in it. Not exact: rows are mixed within
    `mix` row groups only, not throughout the dataset; and lanes of unequal length leave out a tail, a different one in
    each epoch.

    Args:
        dataset: dataset whose `epoch` is read when an iteration starts.
        row_group_rows: rows in each row group, in row order.
        batch_size: pairs in a batch of one process.
        seed: non-negative integer.
        num_lanes: number of lanes.
        mix: number of row groups whose rows are permuted together.

    Attributes:
        dropped: number of rows left out of each epoch, so that every lane gives the same number of whole batches.

    Raises:
        ValueError: the shortest lane cannot fill a batch.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        row_group_rows: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        num_lanes: int = 1,
        mix: int = 8,
    ):
        self.dataset, self.batch_size, self.seed, self.num_lanes, self.mix = dataset, batch_size, seed, num_lanes, mix
        self._sizes = np.asarray(row_group_rows)
        self._starts = np.cumsum(self._sizes) - self._sizes
        # Each lane gets the same sizes of row groups in every epoch, the largest dealt first, always to the emptiest
        # lane: lanes are even, and the length of an epoch does not depend on the permutation.
        lanes = [(0, lane) for lane in range(num_lanes)]
        self._lane_of_rank = np.empty(len(self._sizes), dtype=np.int64)
        for rank, size in enumerate(sorted(self._sizes.tolist(), reverse=True)):
            rows, lane = lanes[0]
            self._lane_of_rank[rank] = lane
            heapq.heapreplace(lanes, (rows + size, lane))
        self._rounds = min(lanes)[0] // batch_size
        if not self._rounds:
            raise ValueError(
                f"{len(self._sizes)} row groups with {self._sizes.sum()} pairs cannot give each of {num_lanes} lanes "
                f"a batch of {batch_size}. Take a smaller batch, fewer lanes (fewer workers), or smaller row groups."
            )
        self.dropped = int(self._sizes.sum()) - len(self)

    def __len__(self) -> int:
        return self._rounds * self.num_lanes * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        lanes = [self._rows(epoch, lane, groups) for lane, groups in enumerate(self._deal(epoch))]
        for _ in range(self._rounds):
            for lane in lanes:
                yield from ((epoch, row) for row in islice(lane, self.batch_size))

    def _deal(self, epoch: int) -> list[np.ndarray]:
        """Row groups of each lane, in reading order: permuted among those of equal size, then within the lane."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self._sizes))
        order = order[np.argsort(-self._sizes[order], kind="stable")]
        return [generator.permutation(order[self._lane_of_rank == lane]) for lane in range(self.num_lanes)]

    def _rows(self, epoch: int, lane: int, groups: np.ndarray) -> Iterator[int]:
        for first in range(0, len(groups), self.mix):
            mixed = groups[first : first + self.mix]
            rows = np.concatenate([np.arange(self._starts[g], self._starts[g] + self._sizes[g]) for g in mixed])
            yield from np.random.default_rng([self.seed, epoch, lane + 1, first]).permutation(rows).tolist()
