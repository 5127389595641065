"""Reading prepared pairs, from the disk or as a stream, for torch's `DataLoader` and transformers' `Trainer`.

Both ways give map-style datasets and the same batches; they differ in what lies on the disk and in the training order:

- local (default): HF Datasets makes a memory-mapped Arrow copy once, where random access is free (`EpochSampler`);
- streaming: nothing is stored, row groups are read from a folder, the Hub or any other URL (`LaneSampler`).
"""

import json
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from operator import index as as_integer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils.data import Dataset, Sampler, get_worker_info

from .dataset_info import DatasetInfo, ShardRecord, read_dataset_info
from .decoding import ShardRows, decode_pairs
from .pairs import PairsInfo
from .sampling import EpochSampler, LaneSampler, SequentialPairSampler
from .shards import METADATA_KEY

Index = int | tuple[int, int]
"""A row, taken as of epoch 0, or `(epoch, row)`."""


class PairDataset(Dataset[dict[str, Any]], ABC):
    """Pairs of one split of a prepared folder. Open it with `load_pairs`.

    Items are dictionaries of `optical` and `sar` (tensors `(bands, height, width)` in the raw dtype and units), `id`,
    `row` and `epoch`, and `labels` and `label_map` where the dataset has them. `__getitems__` gives the whole batch at
    once: the same with a leading batch dimension, `id` and `labels` as lists.

    Attributes:
        root: folder or URL.
        dataset_info: what the folder holds.
        split: name of the split.
        epoch: read by the samplers when an iteration starts.
        packed: set it to leave optical bands in their own resolution, see `decode_pairs`.
    """

    def __init__(self, root: str, dataset_info: DatasetInfo, split: str):
        self.root, self.dataset_info, self.split, self.epoch, self.packed = root, dataset_info, split, 0, False
        self._shards = dataset_info.shards(split)
        self._shard_ends = np.cumsum([shard.rows for shard in self._shards])

    @property
    def info(self) -> PairsInfo:
        """Bands, units and classes of the pairs."""
        return self.dataset_info.info

    def __len__(self) -> int:
        return int(self._shard_ends[-1])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration takes. Call it in the main process."""
        self.epoch = epoch

    def __getitem__(self, index: Index) -> dict[str, Any]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[Index]) -> dict[str, Any]:
        pairs = [index if isinstance(index, tuple) else (0, as_integer(index)) for index in indices]
        epochs, rows = np.array(pairs, dtype=np.int64).T
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(
                f"rows are 0 to {len(self) - 1} in split {self.split!r}, but {rows.tolist()} were asked for"
            )
        batch = decode_pairs(self._locate(epochs, rows), self.info.optical_factors, packed=self.packed)
        return batch | {"row": torch.from_numpy(rows.copy()), "epoch": torch.from_numpy(epochs.copy())}

    @abstractmethod
    def sampler(
        self, batch_size: int, *, seed: int = 0, shuffle: bool = True, num_processes: int = 1, num_lanes: int = 1
    ) -> Sampler[tuple[int, int]]:
        """The order in which to read: pass it to a `DataLoader` with the same `batch_size`, before its workers start.

        Args:
            batch_size: pairs in a batch of one process.
            seed: non-negative integer.
            shuffle: False for evaluation: stored order, nothing left out.
            num_processes: training processes.
            num_lanes: for streaming, a multiple of processes x workers; local reading has no lanes, so any will do.

        Raises:
            ValueError: there are too few pairs for one batch, or `num_lanes` is no multiple of `num_processes`.
        """

    @abstractmethod
    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[tuple[ShardRows, int]]:
        """Where each row is, in the order asked for."""


class LocalPairDataset(PairDataset):
    """Pairs in a memory-mapped Arrow file, in any order at no cost."""

    def __init__(self, root: str, dataset_info: DatasetInfo, split: str):
        super().__init__(root, dataset_info, split)
        if "://" not in root:
            for shard in self._shards:
                with Path(root, shard.name).open("rb") as file:
                    _read_footer(file, shard, root)
        try:
            rows = datasets.load_dataset(
                "parquet",
                data_files={split: [f"{root}/{shard.name}" for shard in self._shards]},
                split=split,
            )
        except datasets.exceptions.DatasetGenerationError as error:
            shards = StreamedPairDataset(root, dataset_info, split)
            for group in range(shards.num_row_groups):
                shards.read_row_group(group)  # raises, naming the file, where one is damaged
            raise ValueError(
                f"HF Datasets could not make its copy of split {split!r} of {root}: {error.__cause__}. The shards "
                "are sound, so see that its cache (HF_HOME) can be written and has space, or read with streaming=True."
            ) from error
        if len(rows) != len(self):
            raise ValueError(
                f"The shards of split {split!r} in {root} hold {len(rows)} pairs, but dataset_info.json says "
                f"{len(self)}: they are not of the same preparation. Prepare the folder again."
            )
        # The mapped file itself: HF Datasets' row access costs more than copying a pair (benchmarks/data_pipeline.py).
        self._mapped = rows
        self._open_chunks()

    def _open_chunks(self) -> None:
        self._batches = self._mapped.data.table.to_batches()
        self._chunk_ends = np.cumsum([batch.num_rows for batch in self._batches])
        self._chunks: dict[int, ShardRows] = {}

    def sampler(  # noqa: D102
        self, batch_size: int, *, seed: int = 0, shuffle: bool = True, num_processes: int = 1, num_lanes: int = 1
    ) -> Sampler[tuple[int, int]]:
        if not shuffle:
            return SequentialPairSampler(self)
        return EpochSampler(self, batch_size, seed=seed, num_processes=num_processes)

    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[tuple[ShardRows, int]]:
        located = []
        for row, chunk in zip(
            rows.tolist(), np.searchsorted(self._chunk_ends, rows, side="right").tolist(), strict=True
        ):
            if chunk not in self._chunks:
                shard = self._shards[np.searchsorted(self._shard_ends, row, side="right")]
                self._chunks[chunk] = ShardRows(self._batches[chunk], f"{self.root}/{shard.name}")
            located.append((self._chunks[chunk], row - int(self._chunk_ends[chunk]) + len(self._chunks[chunk])))
        return located

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_chunks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open_chunks()


class StreamedPairDataset(PairDataset):
    """Pairs read from parquet row groups when they are asked for, from a folder or any URL that fsspec knows.

    Decoded row groups are kept until all their rows were served, `mix` for each lane of this worker and one more at
    most.

    Args:
        root: folder or URL.
        dataset_info: what the folder holds.
        split: name of the split.
        mix: number of row groups whose rows are permuted together in training.
    """

    def __init__(self, root: str, dataset_info: DatasetInfo, split: str, mix: int = 8):
        super().__init__(root, dataset_info, split)
        self.mix, self._num_lanes, self._num_processes = mix, 1, 1
        self._row_groups = [(shard, number) for shard in self._shards for number in range(len(shard.row_group_rows))]
        self._row_group_rows = np.array([rows for shard in self._shards for rows in shard.row_group_rows])
        self._row_group_starts = np.cumsum(self._row_group_rows) - self._row_group_rows
        self._footers: dict[str, pq.FileMetaData] = {}
        self._kept: OrderedDict[tuple[int, int], ShardRows] = OrderedDict()
        self._to_serve: dict[tuple[int, int], int] = {}

    def sampler(  # noqa: D102
        self, batch_size: int, *, seed: int = 0, shuffle: bool = True, num_processes: int = 1, num_lanes: int = 1
    ) -> Sampler[tuple[int, int]]:
        if not shuffle:
            return SequentialPairSampler(self)
        if num_lanes % num_processes:
            raise ValueError(
                f"{num_lanes=} is no multiple of {num_processes=}, so processes would read the same row groups: "
                "take a multiple of processes x workers."
            )
        self._num_lanes, self._num_processes = num_lanes, num_processes
        return LaneSampler(
            self, self._row_group_rows.tolist(), batch_size, seed=seed, num_lanes=num_lanes, mix=self.mix
        )

    @property
    def num_row_groups(self) -> int:
        """Number of row groups in all shards of the split, the most lanes there can be."""
        return len(self._row_groups)

    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[tuple[ShardRows, int]]:
        groups = np.searchsorted(self._row_group_starts, rows, side="right") - 1
        positions: dict[tuple[int, int], list[int]] = {}
        for position, key in enumerate(zip(epochs.tolist(), groups.tolist(), strict=True)):
            positions.setdefault(key, []).append(position)
        located: list[Any] = [None] * len(rows)
        # Those at hand first: they may be used up by this batch and make room.
        for key in sorted(positions, key=lambda key: key not in self._kept):
            at = self._row_group(key)
            for position in positions[key]:
                located[position] = (at, int(rows[position] - self._row_group_starts[key[1]]))
            self._to_serve[key] -= len(positions[key])
            if self._to_serve[key] <= 0:
                del self._kept[key], self._to_serve[key]
        return located

    def _row_group(self, key: tuple[int, int]) -> ShardRows:
        """A row group from those kept, or read, for `(epoch, row group)`."""
        if key not in self._kept:
            while len(self._kept) >= self._most_kept():
                oldest, _ = self._kept.popitem(last=False)
                del self._to_serve[oldest]
            (rows,) = self.read_row_group(key[1]).combine_chunks().to_batches()
            self._kept[key] = ShardRows(rows, f"{self.root}/{self._row_groups[key[1]][0].name}")
            self._to_serve[key] = int(self._row_group_rows[key[1]])
        self._kept.move_to_end(key)
        return self._kept[key]

    def _most_kept(self) -> int:
        worker = get_worker_info()
        turns = self._num_processes * (worker.num_workers if worker else 1)
        lanes_seen_here = self._num_lanes // math.gcd(self._num_lanes, turns)
        return self.mix * lanes_seen_here + 1

    def read_row_group(self, group: int) -> pa.Table:
        """Read one row group, numbered through all shards of the split, without keeping it.

        Raises:
            ValueError: the file is damaged or does not agree with `dataset_info.json`.
        """
        # pyarrow rather than `load_dataset(streaming=True).reshard().shard(n, g)`, which opens every shard for its
        # footer before the first batch; here a footer is read when its shard is first needed. Rows carry checksums
        # of their own, which cost a tenth of those of parquet's pages.
        shard, number = self._row_groups[group]
        filesystem, folder = fsspec.url_to_fs(self.root)
        with filesystem.open(f"{folder}/{shard.name}", "rb", cache_type="none") as file:
            if shard.name not in self._footers:
                self._footers[shard.name] = _read_footer(file, shard, self.root)
            try:
                parquet = pq.ParquetFile(file, metadata=self._footers[shard.name], pre_buffer=True)
                return parquet.read_row_group(number, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(_damaged(self.root, shard, error)) from error

    def __getstate__(self) -> dict[str, Any]:
        # Workers start without what the main process has read; fsspec itself renews its connections in a new process.
        return self.__dict__ | {"_footers": {}, "_kept": OrderedDict(), "_to_serve": {}}


def load_pairs(
    path: str | os.PathLike[str], split: str = "train", *, streaming: bool = False, mix: int = 8
) -> PairDataset:
    """Open one split of a prepared folder.

    Args:
        path: a folder written by `fusmae prepare`, a dataset repository on the Hub (`<user>/<name>`), or a URL that
            fsspec knows (`hf://datasets/<user>/<name>`).
        split: `"train"`, `"validation"` or `"test"`.
        streaming: read row groups when they are needed instead of keeping an Arrow copy on the disk.
        mix: for streaming, the number of row groups whose rows are permuted together in training. A worker holds as
            many for each of its lanes (about 15 MB each as prepared by default).

    Raises:
        FileNotFoundError: there is no such folder or repository, or no shards or no `dataset_info.json` in it.
        ValueError: there is no such split, a shard is damaged, or its rows disagree with `dataset_info.json`.
    """
    root = _root(os.fspath(path))
    dataset_info = read_dataset_info(root)
    if streaming:
        return StreamedPairDataset(root, dataset_info, split, mix)
    return LocalPairDataset(root, dataset_info, split)


def _root(path: str) -> str:
    """Absolute folder or URL for what the user gave."""
    if "://" in path:
        return path.rstrip("/")
    if Path(path).is_dir():
        if not any(Path(path).iterdir()):
            raise FileNotFoundError(f"The folder {path} is empty. Fill it with `fusmae prepare`, or give another one.")
        return os.path.abspath(path)
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise FileNotFoundError(f"There is no folder {path}. Write one with `fusmae prepare`.") from None
    if "/" not in path:
        raise FileNotFoundError(
            f"There is no folder {path}. Write one with `fusmae prepare`, or name a Hub repository as <user>/<name>."
        )
    return f"hf://datasets/{path}"


def _read_footer(file: Any, shard: ShardRecord, root: str) -> pq.FileMetaData:
    """Footer of an open shard, checked against `dataset_info.json`."""
    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_damaged(root, shard, error)) from error
    described = json.loads((footer.metadata or {}).get(METADATA_KEY, b"{}"))
    rows = tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
    if rows != shard.row_group_rows or described.get("content_hash") != shard.content_hash:
        raise ValueError(
            f"{root}/{shard.name} holds {sum(rows)} pairs in {len(rows)} row groups, hash "
            f"{described.get('content_hash')}, but dataset_info.json says {shard.rows} in "
            f"{len(shard.row_group_rows)}, hash {shard.content_hash}: they are not of the same preparation. "
            "Prepare the folder again."
        )
    return footer


def _damaged(root: str, shard: ShardRecord, error: Exception) -> str:
    return (
        f"{root}/{shard.name} cannot be read: {error}. If it is damaged or truncated, delete it and prepare (or "
        "download) it again."
    )
