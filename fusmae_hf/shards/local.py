"""The local way of reading: a memory-mapped Arrow copy that HF Datasets makes once, where any order is free."""

import os
import weakref
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from fusmae_hf.files.retries import retried
from fusmae_hf.shards.dataset import Located, OnBadFiles, PairDataset
from fusmae_hf.shards.dataset_info import DatasetInfo
from fusmae_hf.shards.decoding import SMALL_COLUMNS, DamagedShardError, RowsInFile, require_columns
from fusmae_hf.shards.order import EpochSampler, PairSampler, SequentialPairSampler
from fusmae_hf.shards.shard_files import bad_pages, check_pages, checked_footer
from fusmae_hf.vocabulary import IMAGES

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""With this a file of Arrow's streaming format ends: no message follows."""


class _CheckingDownloads(datasets.DownloadManager):
    """Gives HF Datasets the shards when it makes its copy, those alone that fit into memory."""

    def download(self, url_or_urls: Any) -> Any:
        paths = super().download(url_or_urls)
        for path in [path for of_split in paths.values() for path in of_split]:
            check_pages(path)
        return paths


class MappedRows(RowsInFile):
    """Rows in a mapped Arrow file, whose arrays are read from the file.

    Small columns are views of the mapping. Pixels are not: to touch pages for the first time takes four times as long
    as to read them.

    Args:
        rows: a record batch of the file.
        file: descriptor of the file.
        address: where it is mapped.
        origin: the shard that the rows come from, for messages.
        path: of the file.
    """

    def __init__(self, rows: pa.RecordBatch, file: int, address: int, origin: str, path: str):
        places = {}
        require_columns(rows, dict.fromkeys(IMAGES, pa.large_binary()), origin)
        for name in IMAGES:
            column = rows.column(name)
            _, offsets, values = column.buffers()
            ends = np.frombuffer(offsets, np.int64, len(column) + 1, column.offset * 8)
            places[name] = (ends[:-1] + (values.address - address if values else 0), np.diff(ends))
        small = rows.select(list(SMALL_COLUMNS))
        name = f"the local copy of {origin} in the cache of HF Datasets ({path})"
        super().__init__(small, origin, file, places, name, path)


class LocalPairDataset(PairDataset):
    """Pairs in a memory-mapped Arrow file, in any order at no cost."""

    MOST_CHUNKS = 32_768
    """Chunks of the file, of a row group each, whose columns are kept at hand: a million pairs, some 100 MB."""

    def __init__(
        self,
        root: str,
        dataset_info: DatasetInfo,
        split: str,
        on_bad_files: OnBadFiles = "error",
        num_proc: int | None = None,
    ):
        super().__init__(root, dataset_info, split, on_bad_files)
        if "://" not in root and on_bad_files == "error":
            for shard in self._shards:
                checked_footer(root, shard)
        try:
            rows = retried(lambda: self._arrow_copy(num_proc), root)
        except (datasets.exceptions.DatasetGenerationError, DamagedShardError) as error:
            bad_files = bad_pages(root, self._shards)
            if not bad_files:
                raise ValueError(
                    f"HF Datasets could not make its copy of split {split!r} of {root}: {error.__cause__ or error}. "
                    "The shards are sound, so see that its cache (HF_HOME) can be written and has space, or read with "
                    "streaming=True."
                ) from error
            if on_bad_files == "error":
                raise DamagedShardError(next(iter(bad_files.values()))) from error
            self._leave_out(bad_files)
            self._shard_ends = np.cumsum([shard.rows for shard in self._shards])
            rows = self._arrow_copy(num_proc)
        if len(rows) != len(self):
            raise ValueError(
                f"The shards of split {split!r} in {root} hold {len(rows)} pairs, but dataset_info.json says "
                f"{len(self)}: they are not of the same preparation. Prepare the folder again."
            )
        # The files themselves: HF Datasets' row access costs more than copying a pair (benchmarks/data_pipeline.py).
        self._arrow_files = [file["filename"] for file in rows.cache_files]
        self._open_chunks()

    def _arrow_copy(self, num_proc: int | None) -> datasets.Dataset:
        files = [f"{self.root}/{shard.name}" for shard in self._shards]
        processes = min(num_proc, len(files)) if num_proc and len(files) > 1 else None
        builder = datasets.load_dataset_builder("parquet", data_files={self.split: files})
        manager = _CheckingDownloads(download_config=datasets.DownloadConfig(use_etag=False, num_proc=processes))
        builder.download_and_prepare(dl_manager=manager, num_proc=processes)
        try:
            return builder.as_dataset(split=self.split)
        except (pa.ArrowException, OSError) as error:
            raise _damaged_copy(os.path.join(builder.cache_dir, "*.arrow"), str(error)) from error

    def _open_chunks(self) -> None:
        """Map the Arrow files and find their record batches; no pixel is read.

        Raises:
            ValueError: a file is damaged or cut short.
        """
        self._batches: list[tuple[pa.RecordBatch, int, int, str]] = []
        self._arrow_sizes: dict[int, int] = {}
        for name in self._arrow_files:
            try:
                mapped, file = pa.memory_map(name), os.open(name, os.O_RDONLY)
                weakref.finalize(self, os.close, file)
                self._arrow_sizes[file] = mapped.size()
                if mapped.read_at(len(_END_OF_STREAM), max(0, mapped.size() - len(_END_OF_STREAM))) != _END_OF_STREAM:
                    raise ValueError("its end is missing")
                address = mapped.read_buffer().address
                mapped.seek(0)
                self._batches += ((batch, file, address, name) for batch in pa.ipc.open_stream(mapped))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _damaged_copy(name, str(error)) from error
        self._chunk_ends = np.cumsum([batch.num_rows for batch, *_ in self._batches])
        self._chunks: dict[int, MappedRows] = {}

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
        located: list[Located] = []
        chunks = np.searchsorted(self._chunk_ends, rows, side="right")
        # The kernel ends a process that touches what was cut off a mapped file.
        for file, name in {self._batches[chunk][1::2] for chunk in chunks}:
            if os.fstat(file).st_size < self._arrow_sizes[file]:
                raise _damaged_copy(name, "it was cut while in use")
        for row, chunk in zip(rows.tolist(), chunks.tolist(), strict=True):
            if chunk not in self._chunks:
                if len(self._chunks) >= self.MOST_CHUNKS:
                    self._chunks.clear()
                shard = self._shards[np.searchsorted(self._shard_ends, row, side="right")]
                batch, file, address, name = self._batches[chunk]
                self._chunks[chunk] = MappedRows(batch, file, address, f"{self.root}/{shard.name}", name)
            located.append((self._chunks[chunk], row - int(self._chunk_ends[chunk]) + len(self._chunks[chunk])))
        return located

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_chunks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open_chunks()


def _damaged_copy(name: str, problem: str) -> ValueError:
    return ValueError(
        f"The local copy {name} in the cache of HF Datasets is damaged: {problem}. Delete {os.path.dirname(name)} and "
        "start again: it is made anew from the shards."
    )
