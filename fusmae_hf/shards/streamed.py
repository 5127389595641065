"""The streaming way of reading: row groups of parquet shards, read when they are needed, stored nowhere."""

import math
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import get_worker_info

from fusmae_hf.shards.dataset import Located, OnBadFiles, PairDataset
from fusmae_hf.shards.dataset_info import DatasetInfo
from fusmae_hf.shards.decoding import DamagedShardError, ShardRows
from fusmae_hf.shards.order import LaneSampler, PairSampler, SequentialPairSampler


class StreamedPairDataset(PairDataset):
    """Pairs read from parquet row groups when they are asked for, from a folder or any URL that fsspec knows.

    A row group is kept until its rows were served: of each lane of this worker `mix` of them, and from a URL as many
    again, which a thread fetches while the others are used. Of a local file only small columns are kept, and pixels
    are read when they are asked for.

    Args:
        root: folder or URL.
        dataset_info: what the folder holds.
        split: name of the split.
        mix: number of row groups whose rows are permuted together in training.
        on_bad_files: see `load_pairs`.
    """

    def __init__(
        self,
        root: str,
        dataset_info: DatasetInfo,
        split: str,
        mix: int = 8,
        on_bad_files: OnBadFiles = "error",
    ):
        super().__init__(root, dataset_info, split, on_bad_files)
        if on_bad_files != "error":
            self._look_at_files(lambda file: file.footer())
        self.mix = mix
        self._lanes: LaneSampler | None = None
        self.prefetch = "://" in root
        self._turns = 1
        sizes = [
            (file, number, rows) for file in self._files for number, rows in enumerate(file.record.row_group_rows)
        ]
        self._row_groups = [(file, number) for file, number, _ in sizes]
        self._row_group_rows = np.array([rows for _, _, rows in sizes])
        self._row_group_starts = np.cumsum(self._row_group_rows) - self._row_group_rows
        self._forget()

    def _forget(self) -> None:
        """Start without anything that was read."""
        self._kept: OrderedDict[tuple[int, int, int], ShardRows] = OrderedDict()
        self._to_serve: dict[tuple[int, int, int], int] = {}
        self._coming: dict[tuple[int, int, int], Future[ShardRows]] = {}
        self._fetcher: ThreadPoolExecutor | None = None
        self._blocks: tuple[int, list[list[dict[int, range]]]] | None = None
        self._lane_of: dict[int, list[tuple[range, int, int]]] = {}

    def sampler(  # noqa: D102
        self,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_processes: int = 1,
        num_lanes: int = 1,
        accumulation: int = 1,
    ) -> PairSampler:
        if not shuffle:
            return SequentialPairSampler(self)
        if num_lanes % num_processes:
            raise ValueError(
                f"{num_lanes=} is no multiple of {num_processes=}, so processes would read the same row groups: "
                "take a multiple of processes x workers."
            )
        self._turns = num_processes
        self._lanes = LaneSampler(
            self,
            self._row_group_rows.tolist(),
            batch_size,
            seed=seed,
            num_processes=num_processes,
            num_lanes=num_lanes,
            mix=self.mix,
            accumulation=accumulation,
        )
        return self._lanes

    @property
    def num_row_groups(self) -> int:
        """Number of row groups in all shards of the split."""
        return len(self._row_groups)

    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[Located]:
        groups = np.searchsorted(self._row_group_starts, rows, side="right") - 1
        positions: dict[tuple[int, int, int], list[int]] = {}
        for position, (epoch, group, row) in enumerate(
            zip(epochs.tolist(), groups.tolist(), rows.tolist(), strict=True)
        ):
            positions.setdefault((epoch, group, self._lane(epoch, group, row)), []).append(position)
        located: list[Any] = [None] * len(rows)
        # Those at hand first: they may be used up by this batch and make room.
        for key in sorted(positions, key=lambda key: key not in self._kept):
            try:
                at = self._row_group(key)
            except DamagedShardError as error:
                for position in positions[key]:
                    located[position] = error
                continue
            for position in positions[key]:
                located[position] = (at, int(rows[position] - self._row_group_starts[key[1]]))
            self._to_serve[key] -= len(positions[key])
            if self._to_serve[key] <= 0:
                del self._kept[key], self._to_serve[key]
        return located

    def _lane(self, epoch: int, group: int, row: int) -> int:
        """Lane that gives a row in training; 0 where there are none."""
        if self._lanes is None:
            return 0
        if self._blocks is None or self._blocks[0] != epoch:
            self._blocks = epoch, self._lanes.blocks(epoch)
            self._lane_of = {}
            for lane, blocks in enumerate(self._blocks[1]):
                for number, block in enumerate(blocks):
                    for of_block, of_lane in block.items():
                        self._lane_of.setdefault(of_block, []).append((of_lane, lane, number))
        return next(lane for of_lane, lane, _ in self._lane_of[group] if row in of_lane)

    def _row_group(self, key: tuple[int, int, int]) -> ShardRows:
        """A row group from those kept, or read, for `(epoch, row group, lane)`."""
        if key not in self._kept:
            while len(self._kept) >= self._most_kept():
                oldest, _ = self._kept.popitem(last=False)
                del self._to_serve[oldest]
            coming = self._coming.pop(key, None)
            self._kept[key] = coming.result() if coming else self._rows_of(key[1])
            self._to_serve[key] = int(self._row_group_rows[key[1]])
            if self._lanes is not None:
                self._plan(key)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _plan(self, key: tuple[int, int, int]) -> None:
        """Note how many rows of a row group its lane needs; begin to fetch the block after it."""
        epoch, group, lane = key
        of_lane, number = next((rows, number) for rows, of_group, number in self._lane_of[group] if of_group == lane)
        self._to_serve[key] = len(of_lane)
        blocks = self._blocks[1][lane] if self._blocks else []
        left_over = self._lanes is None or lane == self._lanes.num_lanes
        if not self.prefetch or left_over or number + 1 >= len(blocks):
            return
        self._fetcher = self._fetcher or ThreadPoolExecutor(max_workers=1)
        for following in blocks[number + 1]:
            if (coming := (epoch, following, lane)) not in self._coming and coming not in self._kept:
                self._coming[coming] = self._fetcher.submit(self._rows_of, following)

    def _rows_of(self, group: int) -> ShardRows:
        file, number = self._row_groups[group]
        return file.rows([number], self.info.optical_factors, self._open_files)

    def _most_kept(self) -> int:
        """Row groups to keep: those that this worker's lanes mix, and one more for a batch across two blocks."""
        worker = get_worker_info()
        turns = self._turns * (worker.num_workers if worker else 1)
        lanes = self._lanes.num_lanes if self._lanes else 1
        return self.mix * (lanes // math.gcd(lanes, turns)) + 1

    def read_row_group(self, group: int) -> pa.Table:
        """Read one row group, numbered through all shards of the split, without keeping it.

        Raises:
            DamagedShardError: the file cannot be read or does not agree with `dataset_info.json`.
        """
        file, number = self._row_groups[group]
        return file.read([number])

    def __getstate__(self) -> dict[str, Any]:
        # Workers start without what the main process has read; fsspec itself renews its connections in a new process.
        read = ("_kept", "_to_serve", "_coming", "_fetcher", "_blocks", "_lane_of")
        return {name: value for name, value in self.__dict__.items() if name not in read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()
