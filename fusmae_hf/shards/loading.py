"""Reading prepared pairs, from the disk or as a stream, for torch's `DataLoader` and transformers' `Trainer`.

Both ways give map-style datasets and the same batches; they differ in what lies on the disk and in the training order:

- local (default): arrays are read from where they lie in shards on the disk, where any order is free (`EpochSampler`).
  A random row of compressed or otherwise encoded Parquet would decode a row group: of such shards HF Datasets makes a
  memory-mapped Arrow copy once;
- streaming: nothing is stored, row groups are read from a folder, the Hub or any other URL (`LaneSampler`).
"""

import math
import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils.data import get_worker_info

from fusmae_hf.files.retries import retried
from fusmae_hf.shards.dataset import Located, OnBadFiles, PairDataset
from fusmae_hf.shards.dataset_info import DatasetInfo, read_dataset_info
from fusmae_hf.shards.decoding import (
    DamagedShardError,
    RowsInMemory,
    ShardRows,
    check_lengths,
    require_columns,
)
from fusmae_hf.shards.foreign import describe_foreign
from fusmae_hf.shards.order import EpochSampler, LaneSampler, PairSampler, SequentialPairSampler
from fusmae_hf.shards.reading import RowsInFile, ShardFile

if TYPE_CHECKING:
    import datasets  # where it is needed, so that shards in place are read without it


def load_pairs(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    streaming: bool = False,
    mix: int = 8,
    on_bad_files: OnBadFiles = "error",
    num_proc: int | None = None,
    like: str | os.PathLike[str] | None = None,
) -> PairDataset:
    """Open one split of a prepared folder.

    Args:
        path: a folder written by `fusmae prepare`, a dataset repository on the Hub (`<user>/<name>`), or a URL that
            fsspec knows (`hf://datasets/<user>/<name>`, also with `@<revision>`).
        split: `"train"`, `"validation"` or `"test"`.
        streaming: read row groups when they are needed instead of keeping shards on the disk. Without it shards of the
            Hub are downloaded, and of compressed or otherwise encoded ones HF Datasets makes an Arrow copy.
        mix: for streaming, the number of row groups whose rows are permuted together in training. From a URL a worker
            holds twice as many for each of its lanes (about 15 MB each as prepared by default).
        on_bad_files: what to do with what cannot be read. `"error"` raises, naming the file. `"warn"` and `"skip"`,
            with a warning and without, go on: files that cannot be opened are left out (`bad_files` of the dataset),
            a row found damaged later is replaced by the next sound one and marked in the batch as `replaced`.
        num_proc: processes that make the Arrow copy, where one is needed; one by default.
        like: the prepared folder from which `path` was made by others, by filtering with `datasets` for example.

    Raises:
        FileNotFoundError: there is no such folder or repository, or no shards or no `dataset_info.json` in it.
        ValueError: there is no such split, a shard is damaged, its rows disagree with `dataset_info.json`, or
            `on_bad_files` is unknown.
    """
    if on_bad_files not in (known := ("error", "warn", "skip")):
        raise ValueError(f"on_bad_files is {on_bad_files!r}, but must be one of {known}.")
    root = _root(os.fspath(path))
    dataset_info = read_dataset_info(root) if like is None else describe_foreign(root, _root(os.fspath(like)))
    if streaming:
        return StreamedPairDataset(root, dataset_info, split, mix, on_bad_files)
    return LocalPairDataset(root, dataset_info, split, on_bad_files, num_proc)


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


class LocalPairDataset(PairDataset):
    """Pairs on a disk of the machine, in any order at no cost. Shards behind a URL are downloaded first.

    Args:
        root: folder or URL.
        dataset_info: what the folder holds.
        split: name of the split.
        on_bad_files: see `load_pairs`.
        num_proc: processes that make the Arrow copy, if one is needed.
    """

    def __init__(
        self,
        root: str,
        dataset_info: DatasetInfo,
        split: str,
        on_bad_files: OnBadFiles = "error",
        num_proc: int | None = None,
    ):
        super().__init__(root, dataset_info, split, on_bad_files)
        in_place = self._look_at_files(self._rows_in_place)
        self._copy: datasets.Dataset | None = None
        self._copy_sizes: dict[str, int] = {}
        self._parts: dict[int, ShardRows] = {number: rows for number, rows in enumerate(in_place) if rows}
        self._part_rows = [file.record.rows for file in self._files]
        if len(self._parts) < len(self._files):
            self._copy = self._arrow_copy(num_proc)
            self._map_copy()
        self._part_ends = np.cumsum(self._part_rows)

    def _rows_in_place(self, file: ShardFile) -> RowsInFile | None:
        if not file.is_local:
            file.path = retried(lambda: _download(file), file.path)
        numbers = range(len(file.record.row_group_rows))
        in_place = file.rows_in_place(numbers, self.info, self._open_files)
        if in_place is None:
            # Is it only laid out otherwise, or damaged? Then it is not worth a copy.
            groups = (file.rows([number], self.info, self._open_files) for number in numbers)
            check_lengths(next(rows for rows in groups if isinstance(rows, RowsInMemory)), self.info.optical_factors)
        return in_place

    def _arrow_copy(self, num_proc: int | None) -> "datasets.Dataset":
        import datasets

        files = [file.path for file in self._files]
        processes = min(num_proc, len(files)) if num_proc and len(files) > 1 else None
        builder = datasets.load_dataset_builder("parquet", data_files={self.split: files})
        try:
            retried(lambda: builder.download_and_prepare(num_proc=processes), self.root)
        except datasets.exceptions.DatasetGenerationError as error:
            self._look_at_files(_read_through)
            if len(self._files) == len(files):
                raise ValueError(
                    f"HF Datasets could not make its copy of split {self.split!r} of {self.root}: "
                    f"{error.__cause__ or error}. The shards are sound, so see that its cache (HF_HOME) can be "
                    "written and has space, or read with streaming=True."
                ) from error
            return self._arrow_copy(num_proc)
        try:
            copy = builder.as_dataset(split=self.split)
        except (pa.ArrowException, OSError) as error:
            raise _damaged_copy(os.path.join(builder.cache_dir, "*.arrow"), str(error)) from error
        if len(copy) != len(self):
            problem = f"it holds {len(copy):,} pairs, the shards {len(self):,}"
            raise _damaged_copy(os.path.join(builder.cache_dir, "*.arrow"), problem)
        return copy

    def _map_copy(self) -> None:
        """Find the record batches of the copy; no pixel is read."""
        if self._copy is not None:
            self._copy_sizes = {file["filename"]: os.path.getsize(file["filename"]) for file in self._copy.cache_files}
            self._batches = self._copy.data.to_batches()
            self._part_rows, self._parts = [batch.num_rows for batch in self._batches], {}

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
        return EpochSampler(self, batch_size, seed=seed, num_processes=num_processes, accumulation=accumulation)

    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[Located]:
        for name, size in self._copy_sizes.items():
            # The kernel ends a process that touches what was cut off a mapped file.
            if os.path.getsize(name) < size:
                raise _damaged_copy(name, "it was cut while in use")
        located: list[Located] = []
        for row, part in zip(
            rows.tolist(), np.searchsorted(self._part_ends, rows, side="right").tolist(), strict=True
        ):
            if part not in self._parts:
                self._parts[part] = RowsInMemory(self._batches[part], self._file_of(row).path)
            located.append((self._parts[part], row - int(self._part_ends[part]) + self._part_rows[part]))
        return located

    def _file_of(self, row: int) -> ShardFile:
        ends = np.cumsum([file.record.rows for file in self._files])
        return self._files[np.searchsorted(ends, row, side="right")]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_batches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map_copy()


def _download(file: ShardFile) -> str:
    """Path of the copy of a file in the cache of the Hub, or, from other places, in that of HF Datasets."""
    import datasets

    try:
        if file.path.startswith("hf://"):
            return datasets.DownloadManager(record_checksums=False).download(file.path)
        folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "downloads")
        return fsspec.open_local(f"filecache::{file.path}", filecache={"cache_storage": folder})
    except FileNotFoundError as error:
        raise file.missing() from error


def _read_through(file: ShardFile) -> None:
    for number in range(len(file.record.row_group_rows)):
        require_columns(file.read([number]), RowsInMemory.needed_columns, file.path)


def _damaged_copy(name: str, problem: str) -> ValueError:
    return ValueError(
        f"The local copy {name} in the cache of HF Datasets is damaged: {problem}. Delete {os.path.dirname(name)} and "
        "start again: it is made anew from the shards."
    )


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
        return file.rows([number], self.info, self._open_files)

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
