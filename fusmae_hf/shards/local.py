"""The local way of reading, where any order is free: arrays are read from where they lie in the shards.

A random row of compressed or otherwise encoded Parquet would decode a row group. Of such shards HF Datasets makes a
memory-mapped Arrow copy once.
"""

import os
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from fusmae_hf.files.retries import retried
from fusmae_hf.shards.dataset import Located, OnBadFiles, PairDataset
from fusmae_hf.shards.dataset_info import DatasetInfo
from fusmae_hf.shards.decoding import RowsInFile, RowsInMemory, ShardRows, check_lengths, require_columns
from fusmae_hf.shards.order import EpochSampler, PairSampler, SequentialPairSampler
from fusmae_hf.shards.reading import ShardFile


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
        in_place = file.rows_in_place(numbers, self.info.optical_factors, self._open_files)
        if in_place is None:
            # Is it only laid out otherwise, or damaged? Then it is not worth a copy.
            groups = (file.rows([number], self.info.optical_factors, self._open_files) for number in numbers)
            check_lengths(next(rows for rows in groups if isinstance(rows, RowsInMemory)), self.info.optical_factors)
        return in_place

    def _arrow_copy(self, num_proc: int | None) -> datasets.Dataset:
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
    """Path of the copy of a file in the cache of the Hub or of HF Datasets."""
    config = datasets.DownloadConfig(
        cache_dir=os.path.join(datasets.config.HF_DATASETS_CACHE, "downloads"), use_etag=False
    )
    try:
        return datasets.DownloadManager(download_config=config, record_checksums=False).download(file.path)
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
