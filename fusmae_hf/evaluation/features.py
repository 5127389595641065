"""Features of a frozen encoder for all pairs of a split, computed once and kept on the disk, and their labels."""

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import fusmae_hf
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import PairInputs
from fusmae_hf.evaluation.label_fractions import split_content_hash
from fusmae_hf.files.atomic import follow_umask, incomplete_path
from fusmae_hf.files.finished import read_record, settings_hash, write_record
from fusmae_hf.hub.checkpoint_loading import weights_hash
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.vocabulary import SENSOR_CHOICES, Sensors

Pooling = Literal["mean", "class", "sensors"]

Kind = Literal["features", "projected"]

_PIXELS = {"sar", "optical"}
_VOLATILE = ("_name_or_path", "transformers_version", "_commit_hash", "architectures", "id2label", "label2id", "dtype")
"""Fields of a configuration that features do not depend on (weights tell their dtype themselves)."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of some pairs, and their labels.

    Attributes:
        values: `(pairs, size)` float32.
        ids: of the pairs, in the order of the dataset.
        labels: `(pairs, classes)` bool, which classes hold, or None where the dataset has no labels.
        class_names: of the columns of `labels`.
    """

    values: np.ndarray
    ids: list[str]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, ids: list[str] | tuple[str, ...]) -> "Features":
        """Those of some pairs, such as a label fraction, in the order given.

        Raises:
            ValueError: an id is not among them.
        """
        row_of = {id: row for row, id in enumerate(self.ids)}
        missing = [id for id in ids if id not in row_of]
        if missing:
            raise ValueError(f"There are no features of {len(missing)} of {len(ids)} pairs, such as {missing[0]!r}.")
        return self.take([row_of[id] for id in ids])

    def take(self, rows: Sequence[int]) -> "Features":
        """Those of some rows, in the order given."""
        labels = None if self.labels is None else self.labels[rows]
        return Features(self.values[rows], [self.ids[row] for row in rows], labels, self.class_names)


def extract_features(
    model: PreTrainedModel,
    pairs: PairDataset,
    processor: FusMAEImageProcessor,
    *,
    sensors: Sensors = "both",
    pooling: Pooling = "mean",
    kind: Kind = "features",
    batch_size: int = 64,
    device: str | torch.device | None = None,
    cache: str | os.PathLike[str] | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> Features:
    """Features of every pair of a split. Nothing is masked, and a sensor that is left out is never made into tokens.
    Images that patches do not fill are padded; padding counts as without data.

    Args:
        model: [`FusMAEModel`], or a model with one inside, such as [`FusMAEForPreTraining`]; it is moved to `device`
            and its encoder is used as it is, in evaluation mode.
        pairs: what `load_pairs` opened. Pairs that stand in for damaged ones (`on_bad_files`) are left out, and those
            that lack the one sensor asked for; their number is printed.
        processor: the checkpoint's; it normalises on the device.
        sensors: what the encoder is given.
        pooling: `"mean"` of the patch tokens present, the `"class"` token, or `"sensors"`: the mean optical token and
            then the mean SAR token, twice as many numbers, for both sensors only. Tokens are of the depths
            `config.feature_layers`, side by side: `"mean"` gives `feature_output`, `config.feature_size` numbers, or
            `pooler_output` where the configuration names none.
        kind: `"features"`, or `"projected"`: each sensor alone, on the unit sphere that the contrastive loss has
            taught both to share, `contrastive_projection_size` numbers of unit length; for both sensors their mean,
            of unit length too. For [`FusMAEForPreTraining`] with `pooling="mean"` alone.
        batch_size: pairs at a time. It changes results only by rounding.
        device: that of the model where None.
        cache: folder where features are kept. They are found again for the same weights, configuration, pixels,
            split, sensors, pooling, kind, preprocessing and version of this package only; labels are read afresh.
        num_workers: processes that read pairs.
        progress: show a progress bar.

    Raises:
        ValueError: unknown sensors, pooling or kind, `"sensors"` with one sensor, `"projected"` of a model without
            projections, bands that the processor or the model
            does not know, features that are not finite, or a damaged file in the cache.
        DamagedShardError: a pair cannot be read.
    """
    if sensors not in SENSOR_CHOICES:
        raise ValueError(f"sensors is {sensors!r}, but must be one of {SENSOR_CHOICES}.")
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}, but must be one of {get_args(Pooling)}.")
    if pooling == "sensors" and sensors != "both":
        raise ValueError(f"pooling='sensors' joins the tokens of both sensors, but sensors is {sensors!r}.")
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}, but must be one of {get_args(Kind)}.")
    encoder: Any = model.base_model
    if kind == "projected":
        _check_projected(model, pooling)
        encoder = model
    ids, names = read_scene_labels(pairs)
    if len(ids) != len(pairs):
        raise ValueError(f"The files of split {pairs.split!r} hold {len(ids)} pairs, but {len(pairs)} were opened.")
    labels = None if names is None else label_matrix(names, pairs.info.class_names)
    key = {} if cache is None else _cache_key(encoder, pairs, processor, sensors, pooling, kind)
    record = None if cache is None else Path(cache, _record_name(key))
    found = None if record is None else _read_cache(record, key, len(pairs))
    if found is None:
        encoder = encoder.to(device or encoder.device)
        found = _compute(encoder, pairs, processor, sensors, pooling, kind, batch_size, num_workers, progress)
        if record is not None:
            _write_cache(record, key, *found)
    values, rows = found
    if sensors in pairs.lacking:
        print(
            f"{len(pairs) - len(rows):,} of {len(pairs):,} pairs of the split {pairs.split} lack {sensors}: left out."
        )
    return Features(
        values, [ids[row] for row in rows], None if labels is None else labels[rows], tuple(pairs.info.class_names)
    )


def _check_projected(model: Any, pooling: Pooling) -> None:
    """Raise a ValueError unless the model has projections and pooling is theirs."""
    if pooling != "mean":
        raise ValueError(f"kind='projected' projects the mean of the tokens: pooling must be 'mean', not {pooling!r}.")
    if getattr(model, "contrast", None) is None:
        raise ValueError(
            f"kind='projected' needs the projections of a contrastive pretraining, which this {type(model).__name__} "
            "does not have. Load the pretraining checkpoint with FusMAEForPreTraining.from_pretrained; if there are "
            "none, its pretraining was without the contrastive loss (`contrastive_loss_weight` 0)."
        )


@torch.inference_mode()
def _compute(
    encoder: Any,
    pairs: PairDataset,
    processor: FusMAEImageProcessor,
    sensors: Sensors,
    pooling: Pooling,
    kind: Kind,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Features `(rows, size)` float32 and the rows that they are of."""
    has_no_data = any(pairs.dataset_info.no_data_pixels(pairs.split).values())
    prepare = PairInputs(processor, pairs.info, has_no_data, patch_size=encoder.config.patch_size)
    packed = copy.copy(pairs)
    packed.packed = True  # coarse bands are brought onto one grid on the device
    loader = DataLoader(
        packed,
        batch_size=batch_size,
        sampler=packed.sampler(batch_size, shuffle=False),
        collate_fn=PairCollator(encoder.config.patch_size, masking=False),
        num_workers=num_workers,
        pin_memory=encoder.device.type == "cuda",
    )
    was_training = encoder.training
    encoder.eval()
    values, rows = [], []
    try:
        with tqdm(total=len(pairs), unit="pair", desc="features", disable=not progress) as bar:
            for batch in loader:
                raw = {name: batch[name].to(encoder.device, non_blocking=True) for name in _PIXELS & batch.keys()}
                inputs = prepare(batch | raw, sensors=sensors)
                inputs.pop("label_map", None)
                if kind == "projected":
                    pooled = encoder.embed(**inputs).embeds.cpu()
                else:
                    pooled = _pool(encoder(**inputs), inputs, pooling, encoder.config.patch_size).float().cpu()
                sound = ~batch["replaced"] if "replaced" in batch else torch.ones(len(pooled), dtype=torch.bool)
                sound &= batch.get(f"{sensors}_available", sound)
                values.append(pooled[sound].numpy())
                rows.append(batch["row"][sound].numpy())
                bar.update(len(pooled))
    finally:
        encoder.train(was_training)
    found = np.concatenate(values)
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found).all(axis=1))
        raise ValueError(
            f"{len(bad)} of {len(found)} pairs have features that are NaN or infinite, the first in row "
            f"{np.concatenate(rows)[bad[0]]} of split {pairs.split!r}: the weights of the model diverged, or do not "
            "bear its precision."
        )
    return found, np.concatenate(rows)


def _pool(outputs: Any, inputs: dict[str, torch.Tensor], pooling: Pooling, patch_size: int) -> torch.Tensor:
    """One vector a pair, `(batch, size)`."""
    several = getattr(outputs, "feature_output", None) is not None
    if pooling == "mean":
        return outputs.feature_output if several else outputs.pooler_output
    hidden_states = outputs.feature_hidden_state if several else outputs.last_hidden_state
    if pooling == "class":
        return hidden_states[:, 0]
    means = []
    of_sensors = hidden_states[:, 1:].chunk(2, dim=1)
    for tokens, name in zip(of_sensors, ("pixel_mask", "pixel_mask_sar"), strict=True):
        mask = inputs.get(name)
        if mask is None:
            means.append(tokens.mean(dim=1))
            continue
        # Tokens without a pixel of data are zero, and do not count.
        present = functional.max_pool2d(mask[:, None].float(), patch_size).flatten(1).sum(dim=1, keepdim=True)
        means.append(tokens.sum(dim=1) / present.clamp(min=1))
    return torch.cat(means, dim=1)


def _cache_key(
    encoder: Any,
    pairs: PairDataset,
    processor: FusMAEImageProcessor,
    sensors: Sensors,
    pooling: Pooling,
    kind: Kind,
) -> dict[str, Any]:
    """Everything that features depend on."""
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in _VOLATILE}
    info = dataclasses.asdict(pairs.info)
    key = {
        "weights": weights_hash(encoder),
        "config": config,
        "content": split_content_hash(pairs.dataset_info, pairs.split),
        "dataset": pairs.info.name,
        "split": pairs.split,
        "left_out": sorted(pairs.bad_files),
        "on_bad_files": "error" if pairs.on_bad_files == "error" else "replace",
        "pairs": {name: info[name] for name in info if name.startswith(("sar_", "optical_"))},
        "processor": processor.to_dict(),
        "sensors": sensors,
        "pooling": pooling,
        "kind": kind,
        "version": fusmae_hf.__version__,
    }
    return json.loads(json.dumps(key, sort_keys=True, default=str))


def _record_name(key: dict[str, Any]) -> str:
    """Name of the record of some features; the features lie beside it."""
    return f"{key['dataset']}-{key['split']}-{key['sensors']}-{key['pooling']}-{key['kind']}-{settings_hash(key)}.json"


def _read_cache(record: Path, key: dict[str, Any], num_pairs: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Features and rows that were kept for this key; None where there are none."""
    tensors = record.with_suffix(".safetensors")
    if not tensors.is_file():
        return None
    try:
        if read_record(record, key) is None:
            return None
        kept = load_file(tensors)
        values, rows = kept["features"], kept["rows"]
        if len(values) != len(rows) or len(rows) > num_pairs or (len(rows) and rows.max() >= num_pairs):
            raise ValueError(f"it holds {len(values)} features of {len(rows)} rows, of {num_pairs} pairs")
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"{tensors} or {record.name} is damaged ({error}). Delete both.") from error
    return values, rows


def _write_cache(record: Path, key: dict[str, Any], values: np.ndarray, rows: np.ndarray) -> None:
    """Keep features; the record comes last, so that there is none without its features."""
    tensors = record.with_suffix(".safetensors")
    record.parent.mkdir(parents=True, exist_ok=True)
    incomplete = incomplete_path(tensors)
    try:
        save_file({"features": values, "rows": rows}, incomplete)
        follow_umask(incomplete)
        os.replace(incomplete, tensors)
    finally:
        incomplete.unlink(missing_ok=True)
    write_record(record, key, sort_keys=True)


def read_scene_labels(pairs: PairDataset) -> tuple[list[str], list[list[str]] | None]:
    """Ids and class names of all pairs of an open split, in the order of its rows. No pixels are read.

    Args:
        pairs: what `load_pairs` opened.

    Returns:
        Ids, and a list of class names for each; None instead of these where no pair has labels.

    Raises:
        DamagedShardError: a file cannot be read.
        ValueError: only some pairs have labels.
    """
    ids: list[str] = []
    labels: list[list[str] | None] = []
    for rows in pairs.read_columns(["id", "labels"]):
        ids += rows.column("id").to_pylist()
        labels += rows.column("labels").to_pylist()
    of_pairs = [names for names in labels if names is not None]
    if of_pairs and len(of_pairs) < len(labels):
        without = next(id for id, names in zip(ids, labels, strict=True) if names is None)
        raise ValueError(
            f"{len(labels) - len(of_pairs)} of {len(labels)} pairs in split {pairs.split!r} of {pairs.root} have no "
            f"labels, such as {without!r}. Prepare it from a source that labels every pair, or none."
        )
    return ids, of_pairs or None


def label_matrix(labels: Sequence[Sequence[str]], class_names: Sequence[str]) -> np.ndarray:
    """Which classes hold, `(samples, classes)` bool.

    Args:
        labels: class names of each sample.
        class_names: of the dataset, in the order of the columns: `PairsInfo.class_names`.

    Raises:
        ValueError: a label is none of the classes.
    """
    number = {name: index for index, name in enumerate(class_names)}
    unknown = sorted({label for of_sample in labels for label in of_sample} - set(number))
    if unknown:
        raise ValueError(f"labels {unknown[:5]} are none of the {len(number)} classes {list(class_names)}.")
    matrix = np.zeros((len(labels), len(number)), dtype=bool)
    for row, of_sample in enumerate(labels):
        matrix[row, [number[label] for label in of_sample]] = True
    return matrix


def class_indices(matrix: np.ndarray) -> np.ndarray:
    """The one class of each sample, `(samples,)` int64, of which classes hold, `(samples, classes)`.

    Raises:
        ValueError: a sample has no class or several.
    """
    counts = np.asarray(matrix).sum(axis=1)
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(counts)} samples do not have exactly one class, the first, number {wrong[0]}, has "
            f"{counts[wrong[0]]}: these are data for multi_label_classification."
        )
    return np.asarray(matrix).argmax(axis=1)
