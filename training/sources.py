"""What a user names as data: opened, prepared first where it is an archive, compared, and identified."""

import copy
import hashlib
import inspect
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel

from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.inputs import fitting_size
from fusmae_hf.data.pairs import PairReader, PairsInfo
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.readers.bigearthnet import BigEarthNet, example_pairs_root
from fusmae_hf.readers.reben import ReBEN
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.format import FILE_NAME
from fusmae_hf.shards.loading import StreamedPairDataset, load_pairs
from fusmae_hf.shards.order import EpochSampler
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import DataArguments, PairArguments, SourceArguments
from fusmae_hf.training.finetuning.labels import PairSubset, read_columns
from fusmae_hf.vocabulary import Sensors

EMBEDDED_DEFAULT = SimulationOptions(cloud_probability=0.3, cloud_share=0.4)
"""More clouds than there are in BigEarthNet: a model that never saw anything bright cannot reconstruct it."""

BUFFER = 256
"""Pairs of a stream of HF Datasets that are mixed: about as many as `load_pairs` mixes with `streaming=True`."""

HOLD_OUT = 0.2
"""Share of an archive without official splits that is held out when it is prepared here."""


def open_datasets(arguments: DataArguments, shards: Path) -> tuple[PairDataset, dict[str, PairDataset]]:
    """Training pairs and held-out pairs by name.

    Args:
        arguments: what the user named.
        shards: folder for shards that have to be written first. Those that are there are used again.

    Returns:
        The split `train`, and the split `validation` where there is one, followed by each extra dataset.

    Raises:
        FileNotFoundError, ValueError: the data is missing or damaged; the message says what to do.
    """
    if arguments.loading not in (known := ("fusmae", "hf")):
        raise ValueError(f"`loading` must be one of {known}, not {arguments.loading!r}.")
    extra: dict[str, str | Path] = {Path(folder).name: folder for folder in arguments.extra_eval}
    splits = open_splits(arguments, shards, ["validation"])
    if arguments.loading == "hf":
        splits["train"] = PlainPairs(splits["train"], arguments.streaming, arguments.like)
    if arguments.data is None:
        extra["real"] = _prepared(BigEarthNet(example_pairs_root(shards / "archives")), shards / "bigearthnet-six")
    held_out = {}
    if "validation" in splits:
        held_out["simulated" if arguments.data is None else "validation"] = splits["validation"]
    for label, path in extra.items():
        for split in read_dataset_info(path).splits:
            name = label if split == "train" else f"{label}_{split}"
            held_out[name] = load_pairs(path, split, on_bad_files=cast(Any, arguments.on_bad_files))
    return splits["train"], held_out


def open_splits(
    arguments: SourceArguments, shards: Path, wanted: Collection[str] | None = None
) -> dict[str, PairDataset]:
    """Splits of what the user named, `train` first.

    Args:
        arguments: what the user named; simulated pairs where that is nothing.
        shards: folder for shards that have to be written first. Those that are there are used again.
        wanted: splits to open besides, where they exist; all of them by default.

    Raises:
        FileNotFoundError, ValueError: the data is missing or damaged; the message says what to do.
    """
    folder = _shards_of(arguments, shards)
    streaming = arguments.streaming or getattr(arguments, "loading", None) == "hf"  # which makes a copy of its own
    options: dict[str, Any] = {"streaming": streaming, "on_bad_files": arguments.on_bad_files}
    options["like"] = arguments.like
    train = load_pairs(folder, "train", **options)
    arguments.measured = train.dataset_info.statistics  # type: ignore[misc]
    if os.environ.get("RANK", "0") == "0":
        train.dataset_info.warn_of_odd_values()
    others = [split for split in train.dataset_info.splits if split != "train" and split in (wanted or [split])]
    return {"train": train} | {split: load_pairs(folder, split, **options) for split in others}


class PlainPairs(StreamedPairDataset):
    """The pairs of a dataset, which training gets from HF Datasets: a stream of `stream_pairs`, or rows on the disk.

    Args:
        pairs: the split; it gives everything but the pairs to train on.
        streamed: whether HF Datasets streams; otherwise it keeps its copy on the disk.
        like: see `load_pairs`.

    Raises:
        ValueError: damaged files are to be passed over, which HF Datasets does not do by pairs.
    """

    def __init__(self, pairs: PairDataset, streamed: bool, like: str | None):
        import datasets as hf  # not needed to train on shards in place

        from fusmae_hf.shards.rows import stream_pairs

        if pairs.on_bad_files != "error":
            raise ValueError("`--loading hf` stops at files that cannot be read: leave `--on_bad_files` out.")
        super().__init__(pairs.root, pairs.dataset_info, pairs.split)
        places = [file.path for file in self._files]
        self.plain: Any = (
            stream_pairs(self.root, self.split, like=like)
            if streamed
            else hf.load_dataset("parquet", data_files={self.split: places}, split=self.split)
        )

    def sampler(self, batch_size: int, *, shuffle: bool = True, **options: Any) -> Any:
        """See `PairDataset`; `Passes` to train on."""
        return Passes(self, batch_size, **options) if shuffle else super().sampler(batch_size, shuffle=False)


class Passes(IterableDataset[dict[str, Any]]):
    """What one process trains on of `PlainPairs`: in each epoch as many whole batches as every other process.

    Rows on the disk come in a permutation by seed and epoch, dealt out to processes and workers. Of a stream each
    worker of each process has files of its own, in an order by seed and epoch, `BUFFER` pairs mixed; one that runs out
    of pairs before the others begins its own again.

    Attributes:
        depends_on: what the order depends on beside the rows, the seed and the epoch.

    Raises:
        ValueError: there are too few pairs for a batch, or too few files for processes and workers.
    """

    def __init__(
        self,
        pairs: PlainPairs,
        batch_size: int,
        *,
        seed: int = 0,
        num_processes: int = 1,
        num_lanes: int = 1,
        accumulation: int = 1,
    ):
        from datasets import IterableDataset
        from datasets.distributed import split_dataset_by_node

        self.rows, self.seed, self.batch_size, self.num_processes = pairs.plain, seed, batch_size, num_processes
        self.process = PartialState().process_index
        whole = EpochSampler(pairs, batch_size, num_processes=num_processes, accumulation=accumulation)
        self.batches = len(whole) // batch_size // num_processes
        self.streamed = isinstance(self.rows, IterableDataset)
        if self.streamed:
            if (files := self.rows.num_shards) < num_lanes:
                raise ValueError(
                    f"{pairs.root} has {files} files of split {pairs.split!r}, too few for {num_processes} processes "
                    f"x {num_lanes // num_processes} workers: take fewer, leave `--loading hf` out, or write more "
                    f"files with `fusmae prepare --rows-per-shard {max(1, len(pairs) // num_lanes)}`."
                )
            once = {"max_buffer_input_shards"} & inspect.signature(self.rows.shuffle).parameters.keys()
            self.rows = self.rows.shuffle(seed=seed, buffer_size=BUFFER, **dict.fromkeys(once, 1))
            self.rows = split_dataset_by_node(self.rows, self.process, num_processes)
        self.depends_on: dict[str, Any] = {
            "loading": "hf",
            "global batch": batch_size * num_processes * accumulation,
            "batch of a process": batch_size,
            "processes x workers": num_lanes,
        }
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration takes."""
        self._epoch.fill_(epoch)

    def prepare(self, loader: DataLoader) -> DataLoader:
        """The loader as accelerate prepares it, but not divided among the processes once more."""
        device = PartialState().device
        return prepare_data_loader(loader, device, 1, 0, put_on_device=True, dispatch_batches=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, epoch = get_worker_info(), int(self._epoch)
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        wanted = len(range(number, self.batches, workers)) * self.batch_size
        while wanted:
            before = wanted
            for row in islice(self._pass(epoch, number, workers), wanted):
                yield row | {"epoch": epoch}
                wanted -= 1
            if wanted == before:
                raise ValueError(f"Process {self.process}, worker {number} gets no pairs of the stream.")

    def _pass(self, epoch: int, number: int, workers: int) -> Iterator[dict[str, Any]]:
        """The rows of a worker, which a stream deals out itself."""
        if self.streamed:
            self.rows.set_epoch(epoch)
            return iter(self.rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        part = order[self.process * workers + number :: self.num_processes * workers]
        return (self.rows[row] for row in part.tolist())


def augmentation_of(
    arguments: PairArguments, seed: int, size: tuple[int, int], patch_size: int
) -> PairAugmentation | None:
    """The random views that the user asked for, of windows that patches fill where they do not fill the images; None
    where whole images are to be seen as they are.

    Args:
        arguments: what the user asked for.
        seed: of the views.
        size: (height, width) of the images in pixels.
        patch_size: of the model.

    Raises:
        ValueError: the window asked for is larger than the images, or patches do not fill it.
    """
    side = arguments.window
    if side < 0 or side > max(size) or side % patch_size:
        raise ValueError(
            f"`window` is {side} px, but must be a multiple of the model's patches of {patch_size} px, at most the "
            f"{size[0]}x{size[1]} px of the images, or 0 for whole images."
        )
    seen = fitting_size(size, patch_size)
    window = patch_size if seen != size and min(size) >= patch_size else 1
    if window > 1 and not side:
        print(
            f"Training sees windows of {seen[0]}x{seen[1]} px of the images of {size[0]}x{size[1]} px, since the "
            f"patches of the model are {patch_size} px; whole images are evaluated."
        )
    augmentation = PairAugmentation(
        arguments.flips, arguments.rotations, arguments.min_crop, arguments.band_jitter, seed, window, side
    )
    return None if augmentation == PairAugmentation(False, False, seed=seed) else augmentation


def _shards_of(arguments: SourceArguments, shards: Path) -> str | Path:
    """The folder itself where it holds shards, the shards prepared of the archive in it, or the embedded default."""
    if arguments.data is None:
        number = arguments.simulated_pairs
        return _prepared(SimulatedPairs(number, options=EMBEDDED_DEFAULT), shards / f"simulated-{number}")
    root = Path(arguments.data)
    if arguments.like is not None or not root.is_dir() or (root / FILE_NAME).is_file():
        return arguments.data
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    if (root / "metadata.parquet").is_file():
        return _prepared(ReBEN(root), shards / f"reben-{digest}")
    if any(root.glob("BigEarthNet-S1-v1.0*")):
        return _prepared(BigEarthNet(root), shards / f"bigearthnet-{digest}", hold_out=HOLD_OUT)
    raise FileNotFoundError(
        f"{root} holds neither shards ({FILE_NAME}) nor a BigEarthNet v1 (BigEarthNet-S1-v1.0) or reBEN "
        f"(metadata.parquet) archive. Prepare it with `fusmae prepare`, or name another folder. It holds: "
        f"{sorted(path.name for path in root.iterdir())[:8]}."
    )


def _prepared(reader: PairReader, folder: Path, hold_out: float = 0.0) -> Path:
    """Shards of all pairs of a reader, written unless they are there."""
    if (folder / FILE_NAME).is_file():
        print(f"Using the shards in {folder}.")
    else:
        print(prepare(reader, folder, hold_out=hold_out))
    return folder


def packed(datasets: Any, factors: Sequence[int]) -> Any:
    """The same datasets, optical bands left in their own resolution: they are brought onto one grid on the device.

    Datasets that are not stored with the resolutions of training, `factors`, give their bands on one grid already.
    """
    if isinstance(datasets, dict):
        return {name: packed(dataset, factors) for name, dataset in datasets.items()}
    if datasets is not None:
        datasets = copy.copy(datasets)
        datasets.packed = tuple(datasets.info.optical_factors) == tuple(factors)
    return datasets


def having(pairs: Any, sensors: Sensors) -> Any:
    """The pairs that have the one sensor that is shown; all of them where both are."""
    if sensors == "both" or sensors not in pairs.lacking:
        return pairs
    shapes = read_columns(pairs, [f"{sensors}_shape"])[f"{sensors}_shape"]
    rows = [row for row, shape in enumerate(shapes) if shape is not None]
    print(f"{len(shapes) - len(rows):,} of {len(shapes):,} pairs of {pairs.split} lack {sensors}: left out.")
    if isinstance(pairs, PairSubset):
        return PairSubset(pairs.pairs, [pairs.rows[row] for row in rows])
    return PairSubset(pairs, rows)


def has_no_data(dataset: PairDataset) -> bool:
    """Whether pixels of the dataset lack data."""
    return any(dataset.dataset_info.no_data_pixels(dataset.split).values())


def check_same_sensors(datasets: Sequence[PairDataset]) -> None:
    """Raise a ValueError unless all datasets agree in bands, units and offset, which one processor then undoes."""
    first = datasets[0].info
    for dataset in datasets[1:]:
        for name in ("sar_bands", "optical_bands", "sar_units", "optical_units", "optical_offset", "per_scene"):
            if getattr(dataset.info, name) != getattr(first, name):
                raise ValueError(
                    f"{datasets[0].root} and {dataset.root} differ in {name}: {getattr(first, name)} and "
                    f"{getattr(dataset.info, name)}. Prepare them alike, or train on one of them."
                )


SAME_PIXEL_SIZE = 1.1
"""Ratio up to which pixels are of one size: grids in degrees and in metres differ a little."""


def pixel_size_of(info: PairsInfo) -> dict[str, float]:
    """The field `gsd` of the configuration of a fresh model; none where the data does not say its size of pixels."""
    return {} if info.pixel_size is None else {"gsd": info.pixel_size}


def take_pixel_size(model: PreTrainedModel, info: PairsInfo) -> None:
    """Tell if a checkpoint was trained on pixels of another size, and note the new one in its configuration."""
    before, now = model.config.gsd, info.pixel_size
    if now is None or 1 / SAME_PIXEL_SIZE < now / before < SAME_PIXEL_SIZE:
        return
    warnings.warn(
        f"The checkpoint was trained on pixels of {before:g} m, those of {info.name} are of {now:g} m: what it learnt "
        f"of sizes and textures may not hold. Resample the data to {before:g} m if you can (`fusmae prepare geotiffs "
        f"--resolution`). The configuration of the new model says gsd {now:g}.",
        stacklevel=2,
    )
    model.config.gsd = now


def content_of(pairs: PairDataset) -> str:
    """Hash of the pairs of a split, as 16 hexadecimal digits."""
    shards = pairs.dataset_info.shards(pairs.split)
    return hashlib.sha256("".join(shard.content_hash for shard in shards).encode()).hexdigest()[:16]


def what_is_read(dataset: PairDataset, name: str) -> dict[str, Any]:
    """What must be the same in all processes that read the same pairs for `name`."""
    of = f"split {dataset.split} for {name}"
    return {
        f"the files left out of {of}": sorted(dataset.bad_files),
        f"the number of pairs in {of}": len(dataset),
        f"the content of {of}": content_of(dataset),
    }
