"""Labels of whole splits, read without their pixels: to check them, to weigh classes, to learn from a few."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from fusmae_hf.data.native_resolution import PIXEL_DTYPES
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.evaluation.label_fractions import draw_label_fraction, kept_label_fraction
from fusmae_hf.shards.dataset import PairBatch, PairDataset
from fusmae_hf.shards.decoding import DamagedShardError
from fusmae_hf.shards.loading import LocalPairDataset
from fusmae_hf.shards.order import EpochSampler, SequentialPairSampler

_MAP = ("label_map", "label_map_dtype", "label_map_shape")


class PairSubset(Dataset[dict[str, Any]]):
    """Some pairs of a split, read at random: for training on few labels.

    Random views stay those that the pairs have in the whole split.

    Args:
        pairs: the split, local: a stream is read in whole row groups, so that few pairs would cost as much as all.
        rows: which of its rows.

    Raises:
        ValueError: the split is streamed, or there are no rows.
    """

    def __init__(self, pairs: PairDataset, rows: Sequence[int]):
        if not isinstance(pairs, LocalPairDataset):
            raise ValueError("Some pairs of a stream cannot be read alone: pass `--streaming false`.")
        if not len(rows):
            raise ValueError(f"No pair of {pairs.root} was chosen.")
        self.pairs, self.rows, self.epoch = pairs, np.sort(np.asarray(rows, dtype=np.int64)), 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "pairs":
            raise AttributeError(name)
        return getattr(self.pairs, name)  # info, root, split and so on are those of the whole split

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "packed":
            self.pairs = copy.copy(self.pairs)
            self.pairs.packed = value
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """See `PairDataset`."""
        self.epoch = epoch

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = index if isinstance(index, tuple) else (0, index)
        return self.pairs[epoch, int(self.rows[row])]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> PairBatch:
        pairs = [index if isinstance(index, tuple) else (0, index) for index in indices]
        return self.pairs.__getitems__([(epoch, int(self.rows[row])) for epoch, row in pairs])

    def sampler(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_processes: int = 1,
        num_lanes: int = 1,
        accumulation: int = 1,
    ) -> EpochSampler | SequentialPairSampler:
        """See `PairDataset`."""
        if not shuffle:
            return SequentialPairSampler(self)
        return EpochSampler(self, batch_size, seed=seed, num_processes=num_processes, accumulation=accumulation)


def read_columns(pairs: PairDataset | PairSubset, names: Sequence[str]) -> dict[str, list[Any]]:
    """Small columns of the pairs of a split, in its order; no pixel is read.

    Raises:
        DamagedShardError: a shard cannot be read.
    """
    table = pa.concat_tables(pairs.read_columns(names))
    if isinstance(pairs, PairSubset):
        table = table.take(pa.array(pairs.rows))
    return {name: table.column(name).to_pylist() for name in names}


def label_maps(pairs: PairDataset | PairSubset) -> Iterator[np.ndarray]:
    """The label map of each pair, in order, a row group in memory at a time."""
    wanted = set(pairs.rows.tolist()) if isinstance(pairs, PairSubset) else None
    first = 0
    for table in pairs.read_columns(_MAP):
        content, dtypes, shapes = (table.column(name) for name in _MAP)
        for row in range(len(table)):
            if wanted is None or first + row in wanted:
                dtype, pixels = dtypes[row].as_py(), content[row].as_py()
                if dtype not in PIXEL_DTYPES or pixels is None:
                    raise DamagedShardError(f"{pairs.root}: row {first + row} has no label map of a known dtype.")
                yield np.frombuffer(pixels, dtype).reshape(shapes[row].as_py())
        first += len(table)


def read_targets(pairs: PairDataset | PairSubset, column: str) -> dict[str, float]:
    """Quantity of each scene, by id."""
    columns = read_columns(pairs, ["id", column])
    values = (float("nan") if value is None else float(value) for value in columns[column])
    return dict(zip(columns["id"], values, strict=True))


def check_labels(pairs: PairDataset | PairSubset, task: FineTuningTask) -> None:
    """Raise a ValueError unless each pair of a split has labels for the task; no map is read."""
    if task.dense:
        columns = read_columns(pairs, ["id", "label_map_dtype"])
        missing = [id for id, dtype in zip(*columns.values(), strict=True) if dtype is None]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(pairs)} pairs of the split {pairs.split!r} have no label map, the first "
                f"{missing[0]}. Leave them out when preparing the shards."
            )
    else:
        read_scene_labels(pairs, task)


def read_scene_labels(pairs: PairDataset | PairSubset, task: FineTuningTask) -> np.ndarray:
    """Labels of all scenes of a split, as `FineTuningTask.scene_labels` gives them."""
    if task.is_regression:
        targets = read_targets(pairs, str(task.target))
        return task.scene_labels(list(targets), None, targets).numpy()
    columns = read_columns(pairs, ["id", "labels"])
    if all(names is None for names in columns["labels"]):
        raise ValueError(f"No pair of the split {pairs.split!r} of {pairs.root} has labels, which {task.name} needs.")
    return task.scene_labels(columns["id"], columns["labels"], None).numpy()


def class_matrix(pairs: PairDataset | PairSubset, task: FineTuningTask) -> np.ndarray:
    """Which classes each pair has: `(pairs,)` class numbers where there is one each, or `(pairs, classes)` of 0 and 1.

    A quantity has no classes: all pairs are of class 0.
    """
    if task.is_regression:
        return np.zeros(len(pairs), dtype=np.int64)
    if not task.dense:
        return read_scene_labels(pairs, task).astype(np.int64)
    return (map_class_counts(pairs, task) > 0).astype(np.int64)


def map_class_counts(pairs: PairDataset | PairSubset, task: FineTuningTask) -> np.ndarray:
    """Pixels of each class in each label map, `(pairs, classes)`.

    Raises:
        ValueError: a map holds a value that is no class.
    """
    number = len(task.outputs)
    counts = np.zeros((len(pairs), number), dtype=np.int64)
    for of_map, label_map in zip(counts, label_maps(pairs), strict=True):
        values = label_map if task.no_data is None else label_map[label_map != task.no_data]
        if values.size and (values.min() < 0 or values.max() >= number):
            raise ValueError(
                f"Label maps of the split {pairs.split!r} hold values from {values.min()} to {values.max()}, but the "
                f"{number} classes are 0 to {number - 1}, and {task.no_data} is no data."
            )
        of_map += np.bincount(values.ravel().astype(np.int64), minlength=number)
    return counts


def class_counts(pairs: PairDataset | PairSubset, task: FineTuningTask) -> tuple[np.ndarray, int]:
    """How often each class holds, `(classes,)`, and of how many scenes or pixels."""
    if task.dense:
        counts = map_class_counts(pairs, task).sum(axis=0)
        return counts, int(counts.sum())
    labels = read_scene_labels(pairs, task)
    if task.is_multi_label:
        return labels.sum(axis=0).astype(np.int64), len(labels)
    return np.bincount(labels, minlength=len(task.outputs)), len(labels)


def balanced_weights(counts: np.ndarray, total: int, task: FineTuningTask) -> list[float]:
    """Weights that make up for classes that are rare.

    One class each: total / (classes * count), of mean 1 over the samples (King and Zeng, 2001, as in scikit-learn).
    Several: negatives / positives, so that both sides of each class weigh the same.

    Raises:
        ValueError: a class has no sample at all; says which.
    """
    empty = [name for name, count in zip(task.outputs, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"Balanced weights are undefined for classes without a training sample: {empty}. Train on more labels, "
            "prepare the shards without these classes, or leave `--class_weights` out."
        )
    weights = (total - counts) / counts if task.is_multi_label else total / (len(counts) * counts)
    weights[weights == 0] = 1  # a class that every scene has
    return [round(float(weight), 6) for weight in weights]


def quantity_scale(pairs: PairDataset | PairSubset, task: FineTuningTask) -> tuple[float, float]:
    """Mean and standard deviation of the quantity in the training pairs.

    Raises:
        ValueError: no value is there.
    """
    number, mean, spread = 0, 0.0, 0.0
    maps = label_maps(pairs) if task.dense else iter([read_scene_labels(pairs, task)])
    for values in maps:
        kept = values[np.isfinite(values) & (values != task.no_data if task.no_data is not None else True)]
        if kept.size:
            shift, total = float(kept.mean(dtype=np.float64)) - mean, number + kept.size
            spread += float(kept.var(dtype=np.float64)) * kept.size + shift**2 * number * kept.size / total
            mean, number = mean + shift * kept.size / total, total
    if not number:
        raise ValueError(f"No training pair has a value of {task.outputs[0]!r}.")
    return mean, max((spread / number) ** 0.5, 1e-6)


def drawn_ids(
    train: PairDataset, task: FineTuningTask, fraction: float, seed: int, folder: str | Path
) -> list[str] | None:
    """Ids of the training pairs to learn from, in their order, the same for probes and fine-tuning; None for all.

    They depend on data, task, fraction and seed alone. They are written to `label_fraction.json` of the folder, and
    read from there where that file is there already.

    Raises:
        ValueError: the file is of another draw, or the fraction gives no pair.
    """
    path = Path(folder, "label_fraction.json")
    if fraction == 1 and not path.is_file():
        return None

    def draw() -> list[str]:
        ids = read_columns(train, ["id"])["id"]
        return draw_label_fraction(ids, class_matrix(train, task), fraction, seed, len(task.outputs))

    ids = kept_label_fraction(path, draw, fraction, seed, train.dataset_info)
    print(f"Training on {len(ids):,} of {len(train):,} labelled pairs, listed in {path}.")
    return ids


def few_labels(
    train: PairDataset, task: FineTuningTask, fraction: float, seed: int, folder: str | Path
) -> PairDataset | PairSubset:
    """The training pairs, or those of `drawn_ids` among them."""
    drawn = drawn_ids(train, task, fraction, seed, folder)
    if drawn is None:
        return train
    wanted = set(drawn)
    return PairSubset(train, [row for row, id in enumerate(read_columns(train, ["id"])["id"]) if id in wanted])
