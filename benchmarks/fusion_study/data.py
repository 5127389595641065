"""The pairs of the study: made or read once, normalised by the package's processor, kept as memory-mapped arrays.

Simulated pairs are split by place, OMBRIA by flood event, so that no place is in two splits. Arrays are float16, which
keeps three digits of a normalised value; every worker maps the same files.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fusmae_hf.data.pairs import Pair
from fusmae_hf.files.atomic import write_atomically
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.patches_fusmae import patchify
from fusmae_hf.readers.ombria import OMBRIA
from fusmae_hf.simulation.land_cover import CLASS_NAMES
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions

from .settings import DatasetSettings

SPLITS = ("train", "validation", "test")

NEED_BOTH = {"simulated": ("broad-leaved forest", "flooded forest"), "ombria": ()}
"""Classes that need both sensors: optically alike, and each like another class to the radar (`LAND_COVER`)."""

DATA_SEED = 0


@dataclasses.dataclass(frozen=True)
class Split:
    """Pairs of one split, on the device of the study.

    Attributes:
        optical: `(pairs, bands, height, width)` float16, normalised.
        sar: the same for SAR.
        label_map: `(pairs, height, width)` uint8.
        labels: `(pairs, classes)` bool, which classes a scene has; of OMBRIA, whether there is any flood.
        places: `(pairs,)` integers: place, or flood event.
    """

    optical: torch.Tensor
    sar: torch.Tensor
    label_map: torch.Tensor
    labels: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.optical)

    def rows(self, rows: np.ndarray | slice) -> "Split":
        """Some of the pairs."""
        return Split(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def token_classes(self, patch_size: int, num_classes: int) -> np.ndarray:
        """Most frequent class of each patch, `(pairs, patches)`; of two that are equally frequent, the first."""
        patches = patchify(self.label_map[:, None], patch_size)[:, :, 0].long()
        counts = torch.nn.functional.one_hot(patches, num_classes).sum(dim=2)
        return counts.argmax(dim=-1).cpu().numpy()


@dataclasses.dataclass(frozen=True)
class StudyData:
    """A data set of the study.

    Attributes:
        settings: of the data set.
        optical_bands, sar_bands: names.
        class_names: of the label maps.
        splits: what is evaluated; `train` holds the labels.
        tiles: optical and SAR images of the training split that pretraining draws from: the same as `train`, or
            larger ones, to be cropped.
        shifted_sar: by misregistration in px, SAR images of the test split.
        shifts: by misregistration, `(test pairs, 2)`: px by which they are moved to the south and to the east.
    """

    settings: DatasetSettings
    optical_bands: tuple[str, ...]
    sar_bands: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    tiles: tuple[torch.Tensor, torch.Tensor]
    shifted_sar: dict[int, torch.Tensor]
    shifts: dict[int, np.ndarray]

    @property
    def scene_names(self) -> tuple[str, ...]:
        """Classes of whole scenes; OMBRIA has none."""
        return self.class_names if self.settings.kind == "simulated" else ()

    @property
    def need_both(self) -> tuple[str, ...]:
        """Names of the classes that need both sensors."""
        return NEED_BOTH[self.settings.kind]


def prepare_data(settings: DatasetSettings, shifts: tuple[int, ...], folder: Path, workers: int = 0) -> None:
    """Write the arrays of a data set, unless they are there; pairs are simulated by `workers` processes (0: this one).

    Raises:
        ValueError: the folder holds arrays of other settings.
    """
    made_of = {name: getattr(settings, name) for name in ("kind", "image_size", "pairs", "max_tiles")} | {
        "shifts": list(shifts)
    }
    done = folder / "made_of.json"
    if done.is_file():
        if json.loads(done.read_text()) != made_of:
            raise ValueError(f"{folder} was made with other settings; name another --output_dir, or delete it.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if settings.kind == "simulated":
        _write_simulated(settings, shifts, folder, workers)
    else:
        _write_ombria(settings, shifts, folder)
    write_atomically(done, json.dumps(made_of).encode())


def load_data(settings: DatasetSettings, shifts: tuple[int, ...], folder: Path, device: str) -> StudyData:
    """Map the arrays that `prepare_data` has written; on a GPU they lie in its memory."""

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")).to(device)

    def array(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy")

    splits = {
        split: Split(
            tensor(f"{split}-optical"),
            tensor(f"{split}-sar"),
            tensor(f"{split}-label_map"),
            array(f"{split}-labels"),
            array(f"{split}-places"),
        )
        for split in SPLITS
    }
    bands = json.loads((folder / "bands.json").read_text())
    has_tiles = (folder / "tiles-optical.npy").is_file()
    return StudyData(
        settings,
        tuple(bands["optical"]),
        tuple(bands["sar"]),
        tuple(bands["classes"]),
        splits,
        (tensor("tiles-optical"), tensor("tiles-sar"))
        if has_tiles
        else (splits["train"].optical, splits["train"].sar),
        {px: tensor(f"shifted-sar-{px}") for px in shifts},
        {px: array(f"shifts-{px}") for px in shifts},
    )


def _normalised(processor: FusMAEImageProcessor, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Optical and SAR images, float16."""
    inputs = processor(
        sar=np.stack([pair.sar for pair in pairs]),
        optical=np.stack([pair.optical for pair in pairs]),
        return_pixel_mask=False,
        return_tensors="np",
    )
    return inputs["pixel_values"].astype(np.float16), inputs["pixel_values_sar"].astype(np.float16)


def _save(folder: Path, split: str, arrays: dict[str, np.ndarray]) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{split}-{name}.npy", values)


def _write_bands(folder: Path, optical: tuple[str, ...], sar: tuple[str, ...], classes: tuple[str, ...]) -> None:
    (folder / "bands.json").write_text(json.dumps({"optical": optical, "sar": sar, "classes": classes}))


def _write_simulated(settings: DatasetSettings, shifts: tuple[int, ...], folder: Path, workers: int) -> None:
    processor = FusMAEImageProcessor()

    def pairs_of(split: str, shift: int) -> list[Pair]:
        options = SimulationOptions(image_size=settings.image_size, misregistration_px=shift)
        source = SimulatedPairs(10 * max(settings.pairs.values()) + 100, seed=DATA_SEED, options=options)
        rows = [row for row in range(len(source)) if source.split_of(row) == split][: settings.pairs[split]]
        with contextlib.ExitStack() as stack:
            made: Iterable[Pair] = map(source.read, rows)
            if workers:
                pool = stack.enter_context(get_context("spawn").Pool(workers))
                made = pool.imap(source.read, rows, chunksize=50)
            return list(tqdm(made, f"simulating {split}, moved by {shift} px", len(rows), leave=False))

    for split in SPLITS:
        pairs = pairs_of(split, 0)
        optical, sar = _normalised(processor, pairs)
        labels = np.array([[name in pair.labels for name in CLASS_NAMES] for pair in pairs])
        arrays = {"optical": optical, "sar": sar, "labels": labels}
        arrays["label_map"] = np.stack([pair.label_map for pair in pairs])
        arrays["places"] = np.array([pair.extra["place"] for pair in pairs])
        _save(folder, split, arrays)
    for shift in shifts:
        pairs = pairs_of("test", shift)
        moved = np.array([[pair.extra["sar_shift_south"], pair.extra["sar_shift_east"]] for pair in pairs])
        np.save(folder / f"shifted-sar-{shift}.npy", _normalised(processor, pairs)[1])
        np.save(folder / f"shifts-{shift}.npy", moved)
    _write_bands(folder, tuple(processor.optical_bands), tuple(processor.sar_bands), CLASS_NAMES)


def _write_ombria(settings: DatasetSettings, shifts: tuple[int, ...], folder: Path) -> None:
    root = settings.root or Path(os.environ.get("FUSMAE_REAL_DATA", "FUSMAE_REAL_DATA"), "ombria")
    source = OMBRIA(root, splits="events")
    rows = {split: [row for row in range(len(source)) if source.split_of(row) == split] for split in SPLITS}
    tiles = {
        split: [source.read(row) for row in _spread(of_split, settings.max_tiles)] for split, of_split in rows.items()
    }
    train = tiles["train"]
    statistics = {}
    for sensor in ("sar", "optical"):
        values = (
            np.stack([getattr(pair, sensor) for pair in train])
            .swapaxes(0, 1)
            .reshape(len(getattr(train[0], sensor)), -1)
        )
        statistics |= {f"{sensor}_mean": values.mean(axis=1).tolist(), f"{sensor}_std": values.std(axis=1).tolist()}
    processor = FusMAEImageProcessor(
        sar_bands=source.info.sar_bands,
        optical_bands=source.info.optical_bands,
        statistics=None,
        sar_units="raw",
        optical_units="raw",
        **statistics,
    )
    size = settings.image_size
    for split, pairs in tiles.items():
        optical, sar = _normalised(processor, pairs)
        label_map = np.stack([pair.label_map for pair in pairs])
        corners = [(top, left) for top in range(0, 257 - size, size) for left in range(0, 257 - size, size)]
        windows = {
            name: np.concatenate([values[..., top : top + size, left : left + size] for top, left in corners])
            for name, values in (("optical", optical), ("sar", sar), ("label_map", label_map))
        }
        windows["places"] = np.tile([pair.extra["event"] for pair in pairs], len(corners))
        windows["labels"] = windows["label_map"].any(axis=(1, 2))[:, None]
        _save(folder, split, windows)
        if split == "train":
            _save(folder, "tiles", {"optical": optical, "sar": sar})
        for shift in shifts if split == "test" else ():
            # Towards the middle of the tile, so that there is imagery under the moved window.
            moves = [shift if top + size + shift <= 256 else -shift for top, _ in corners]
            moved = [
                sar[..., top + move : top + move + size, left : left + size]
                for (top, left), move in zip(corners, moves, strict=True)
            ]
            np.save(folder / f"shifted-sar-{shift}.npy", np.concatenate(moved))
            south = -np.repeat(moves, len(pairs)).astype(
                float
            )  # a window further south shows its ground further north
            np.save(folder / f"shifts-{shift}.npy", np.stack([south, np.zeros_like(south)], axis=1))
    _write_bands(folder, source.info.optical_bands, source.info.sar_bands, source.info.map_class_names)


def _spread(rows: list[int], most: int | None) -> list[int]:
    """At most so many rows, evenly spread."""
    return rows if most is None or most >= len(rows) else [rows[i * len(rows) // most] for i in range(most)]
