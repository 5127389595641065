"""The local way of reading: a memory-mapped Arrow copy that HF Datasets makes once, where any order is free."""

import os
import weakref
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from torch.utils.data import Sampler

from .dataset_info import DatasetInfo
from .decoding import PIXEL_COLUMNS, SMALL_COLUMNS, DamagedShardError, RowsInFile, require_columns
from .pair_dataset import Located, OnBadFiles, PairDataset
from .sampling import EpochSampler, SequentialPairSampler
from .shard_files import bad_pages, open_shard, read_footer


class MappedRows(RowsInFile):
    """Rows in a mapped Arrow file, whose arrays are read from the file.

    Small columns are views of the mapping. Pixels are not: to touch pages for the first time takes four times as long
    as to read them.

    Args:
        rows: a record batch of the file.
        file: descriptor of the file.
        address: where it is mapped.
        origin: the shard that the rows come from, for messages.
    """

    def __init__(self, rows: pa.RecordBatch, file: int, address: int, origin: str):
        places = {}
        require_columns(rows, dict.fromkeys(PIXEL_COLUMNS, pa.large_binary()), origin)
        for name in PIXEL_COLUMNS:
            column = rows.column(name)
            _, offsets, values = column.buffers()
            ends = np.frombuffer(offsets, np.int64, len(column) + 1, column.offset * 8)
            places[name] = (ends[:-1] + (values.address - address if values else 0), np.diff(ends))
        small = rows.select(list(SMALL_COLUMNS))
        super().__init__(small, origin, file, places, f"the local copy of {origin} in the cache of HF Datasets")


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
                with open_shard(root, shard) as file:
                    read_footer(file, shard, root)
        try:
            rows = self._arrow_copy(num_proc)
        except datasets.exceptions.DatasetGenerationError as error:
            bad_files = bad_pages(root, self._shards)
            if not bad_files:
                raise ValueError(
                    f"HF Datasets could not make its copy of split {split!r} of {root}: {error.__cause__}. The shards "
                    "are sound, so see that its cache (HF_HOME) can be written and has space, or read with "
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
        return datasets.load_dataset("parquet", data_files={self.split: files}, split=self.split, num_proc=processes)

    def _open_chunks(self) -> None:
        """Map the Arrow files and find their record batches; no pixel is read."""
        self._batches: list[tuple[pa.RecordBatch, int, int]] = []
        for name in self._arrow_files:
            mapped, file = pa.memory_map(name), os.open(name, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            address = mapped.read_buffer().address
            mapped.seek(0)
            self._batches += ((batch, file, address) for batch in pa.ipc.open_stream(mapped))
        self._chunk_ends = np.cumsum([batch.num_rows for batch, _, _ in self._batches])
        self._chunks: dict[int, MappedRows] = {}

    def sampler(  # noqa: D102
        self, batch_size: int, *, seed: int = 0, shuffle: bool = True, num_processes: int = 1, num_lanes: int = 1
    ) -> Sampler[tuple[int, int]]:
        if not shuffle:
            return SequentialPairSampler(self)
        return EpochSampler(self, batch_size, seed=seed, num_processes=num_processes)

    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[Located]:
        located: list[Located] = []
        chunks = np.searchsorted(self._chunk_ends, rows, side="right")
        for row, chunk in zip(rows.tolist(), chunks.tolist(), strict=True):
            if chunk not in self._chunks:
                if len(self._chunks) >= self.MOST_CHUNKS:
                    self._chunks.clear()
                shard = self._shards[np.searchsorted(self._shard_ends, row, side="right")]
                batch, file, address = self._batches[chunk]
                self._chunks[chunk] = MappedRows(batch, file, address, f"{self.root}/{shard.name}")
            located.append((self._chunks[chunk], row - int(self._chunk_ends[chunk]) + len(self._chunks[chunk])))
        return located

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_batches", "_chunks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open_chunks()
