"""What both ways of reading prepared pairs share: items, batches, and going on around damage."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index as as_integer
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.shards.dataset_info import DatasetInfo
from fusmae_hf.shards.decoding import DamagedShardError, ShardRows, decode_pairs
from fusmae_hf.shards.order import PairSampler
from fusmae_hf.shards.reading import OpenFiles, ShardFile

Index = int | tuple[int, int]
"""A row, taken as of epoch 0, or `(epoch, row)`."""

OnBadFiles = Literal["error", "warn", "skip"]
"""What to do with a file or a row that cannot be read: see `load_pairs`."""

Located = tuple[ShardRows, int] | DamagedShardError
"""Where a row is, or why it cannot be read."""

SUBSTITUTES_TRIED = 10_000
"""So many rows are tried in place of a damaged one before the dataset counts as lost."""

OPENED_TOGETHER = 16
"""Files that are looked at at the same time when a split is opened."""

T = TypeVar("T")


class Labels(list[str]):
    """Class names of one pair. torch's own collation makes a list of them, however many each pair has."""


default_collate_fn_map[Labels] = lambda batch, **_: batch


class PairBatch(Sequence[dict[str, Any]]):
    """A batch as a sequence of its pairs, as torch's `DataLoader` expects, whose columns are there whole, too.

    `batch[3]` is the fourth pair, `batch["optical"]` the optical images of all. A collator that takes the columns
    copies nothing.

    Attributes:
        columns: tensors with a leading batch dimension, and lists.
    """

    def __init__(self, columns: dict[str, Any]):
        self.columns = columns
        self.keys, self.values, self.items, self.get = columns.keys, columns.values, columns.items, columns.get

    def __len__(self) -> int:
        return len(self.columns["row"])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(len(self)))]
        item = {
            name: values if name == "optical_shape" else values[range(len(self))[key]]
            for name, values in self.columns.items()
        }
        if item.get("labels") is not None:
            item["labels"] = Labels(item["labels"])
        return item

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __or__(self, more: dict[str, Any]) -> dict[str, Any]:
        return self.columns | more


class PairDataset(Dataset[dict[str, Any]], ABC):
    """Pairs of one split of a prepared folder. Open it with `load_pairs`.

    Items are dictionaries of `optical` and `sar` (tensors `(bands, height, width)` in the raw dtype and units), `id`,
    `row`, `epoch` and `optical_offset`, and `labels` and `label_map` where the dataset has them. Where pairs lack a
    sensor, its pixels are NaN or zero there and `sar_available` or `optical_available` is False. `__getitems__` gives
    a whole batch at once: see `PairBatch`; its columns have a leading batch dimension, `id` and `labels` are lists.
    Unless `on_bad_files` is `"error"`, it also has `replaced` (batch,) bool: a damaged row stood there, and the pair
    is another one. Any loader, subset or sampler of torch takes the dataset as it is.

    Attributes:
        root: folder or URL.
        dataset_info: what the folder holds.
        split: name of the split.
        on_bad_files: what to do with files and rows that cannot be read.
        bad_files: files that were left out when the split was opened, with the reason.
        lacking: sensors that some pairs lack.
        epoch: read by the samplers when an iteration starts.
        packed: set it to leave optical bands in their own resolution, see `decode_pairs`.
    """

    def __init__(self, root: str, dataset_info: DatasetInfo, split: str, on_bad_files: OnBadFiles = "error"):
        self.root, self.dataset_info, self.split, self.epoch, self.packed = root, dataset_info, split, 0, False
        self.on_bad_files, self.bad_files = on_bad_files, dict[str, str]()
        self._files = [
            ShardFile(root, record, dataset_info.places.get(record.name)) for record in dataset_info.shards(split)
        ]
        self._num_rows = dataset_info.rows(split)
        self._open_files = OpenFiles()
        self.lacking = tuple(sensor for sensor, pairs in dataset_info.absent(split).items() if pairs)

    @property
    def info(self) -> PairsInfo:
        """Bands, units and classes of the pairs."""
        return self.dataset_info.info

    def __len__(self) -> int:
        return self._num_rows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration takes. Call it in the main process."""
        self.epoch = epoch

    def __getitem__(self, index: Index) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> PairBatch:
        pairs = [index if isinstance(index, tuple) else (0, as_integer(index)) for index in indices]
        epochs, rows = np.array(pairs, dtype=np.int64).T
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(
                f"rows are 0 to {len(self) - 1} in split {self.split!r}, but {rows.tolist()} were asked for"
            )
        located = self._locate(epochs, rows)
        try:
            batch = self._decode(located)
        except DamagedShardError:
            if self.on_bad_files == "error":
                raise
            batch, rows, replaced = self._decode_around_damage(located, epochs, rows)
        else:
            replaced = np.zeros(len(rows), dtype=bool)
        if self.on_bad_files != "error":
            batch["replaced"] = torch.from_numpy(replaced)
        return PairBatch(batch | {"row": torch.from_numpy(rows.copy()), "epoch": torch.from_numpy(epochs.copy())})

    def _decode(self, located: Sequence[Located]) -> dict[str, Any]:
        rows = []
        for at in located:
            if isinstance(at, DamagedShardError):
                raise at
            rows.append(at)
        return decode_pairs(rows, self.info, packed=self.packed, absent=self.lacking)

    def _decode_around_damage(
        self, located: list[Located], epochs: np.ndarray, rows: np.ndarray
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """The batch with each damaged row replaced by the next sound one, so that its size stays; and which those are.

        Which row that is does not depend on the batch, so neither do masks and resumed runs.
        """
        rows, replaced = rows.copy(), np.zeros(len(rows), dtype=bool)
        for position, epoch in enumerate(epochs):
            at, error = located[position], None
            for tried in range(min(SUBSTITUTES_TRIED, len(self))):
                row = (rows[position] + tried) % len(self)
                at = at if not tried else self._locate(epoch[None], row[None])[0]
                try:
                    self._decode([at])
                    break
                except DamagedShardError as failure:
                    error = error or failure
            else:
                raise DamagedShardError(f"{tried + 1:,} rows in turn cannot be read. The first: {error}") from error
            if error:
                self._report(error)
            located[position], rows[position], replaced[position] = at, row, error is not None
        return self._decode(located), rows, replaced

    def read_columns(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of each row group in turn, in the order of the rows.

        Raises:
            DamagedShardError: a file cannot be read.
        """
        for file in self._files:
            for number in range(len(file.record.row_group_rows)):
                yield file.read([number], columns)
            file.forget_footer()

    def _look_at_files(self, look: Callable[[ShardFile], T]) -> list[T]:
        """What `look` finds in each file, several at a time; damaged files are left out where that is allowed."""

        def result(file: ShardFile) -> T | DamagedShardError:
            try:
                return look(file)
            except DamagedShardError as error:
                if self.on_bad_files == "error":
                    raise
                return error
            finally:
                file.forget_footer()

        with ThreadPoolExecutor(OPENED_TOGETHER) as threads:
            found = dict(zip(self._files, threads.map(result, self._files), strict=True))
        bad_files = {file.record.name: str(error) for file, error in found.items() if isinstance(error, Exception)}
        self._files = [file for file in self._files if file.record.name not in bad_files]
        self._num_rows = sum(file.record.rows for file in self._files)
        self.bad_files |= bad_files
        if not self._files:
            raise DamagedShardError(
                f"No file of split {self.split!r} of {self.root} can be read. The first: "
                f"{next(iter(bad_files.values()))}"
            )
        for reason in bad_files.values():
            self._report(f"Left out: {reason}")
        return [value for value in found.values() if not isinstance(value, DamagedShardError)]

    def _report(self, problem: object) -> None:
        if self.on_bad_files == "warn":
            warnings.warn(str(problem), stacklevel=3)

    @abstractmethod
    def sampler(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_processes: int = 1,
        num_lanes: int = 1,
        accumulation: int = 1,
    ) -> PairSampler:
        """The order in which to read: pass it to a `DataLoader` with the same `batch_size`, before its workers start.

        Args:
            batch_size: pairs in a batch of one process.
            seed: non-negative integer.
            shuffle: False for evaluation: stored order, nothing left out.
            num_processes: training processes.
            num_lanes: for streaming, a multiple of processes x workers; local reading has no lanes, so any will do.
            accumulation: batches of each process in one optimiser step.

        Raises:
            ValueError: there are too few pairs for one batch, or `num_lanes` is no multiple of `num_processes`.
        """

    @abstractmethod
    def _locate(self, epochs: np.ndarray, rows: np.ndarray) -> list[Located]:
        """Where each row is, in the order asked for; for rows in a file that cannot be read, the error."""
