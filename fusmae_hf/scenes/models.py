"""What predicts the windows of a scene: a checkpoint with its processor, or any function in its place."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fusmae_hf.embeddings.encoder import COLUMNS, vectors_of
from fusmae_hf.files.finished import settings_hash
from fusmae_hf.hub.checkpoint_loading import load_checkpoint, looked_up, newest_model, weights_hash
from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import FusMAEForImageClassification, FusMAEForSemanticSegmentation
from fusmae_hf.modeling.plausibility_fusmae import Plausibility

Inputs = dict[str, torch.Tensor]
"""`pixel_values` and `pixel_mask` of the optical sensor, `pixel_values_sar` and `pixel_mask_sar`, or one of both."""

Kind = Literal["classes", "values", "scores", "tokens", "vectors"]

_NAMES = {"optical": ("pixel_values", "pixel_mask"), "sar": ("pixel_values_sar", "pixel_mask_sar")}


_NOT_CONTENT = ("_name_or_path", "transformers_version")


@dataclass
class SceneModel:
    """A model for windows.

    Attributes:
        name: of the checkpoint.
        content_hash: of weights, configuration and processor.
        kind: what `predict` gives: probabilities of the `"classes"` of each pixel, `"values"` of each pixel,
            `"scores"` of a window, vectors of `"tokens"`, or `"vectors"` of a window.
        labels: names of the classes or of the quantities.
        window: height and width of the windows it was trained on, in pixels.
        patch: side of a patch in pixels.
        gsd: size of a pixel in metres that it was trained on; None where any will do.
        processor: normalises the images of each sensor.
        predict: from normalised windows with masks, all `(batch, ...)`, to `(batch, labels, height, width)` float32,
            of tokens with the size of the patch grid, or `(batch, labels)` of scores and vectors.
            What it gives for a window must not depend on the others.
        device: where `predict` wants its inputs.
        columns: of vectors, which share `labels` out among them in this order.
        quantisation: `Quantisation` of each column, where vectors shall be in eight bits.
    """

    name: str
    content_hash: str
    kind: Kind
    labels: tuple[str, ...]
    window: tuple[int, int]
    patch: int
    gsd: float | None
    processor: FusMAEImageProcessor
    predict: Callable[[Inputs], torch.Tensor]
    device: str = "cpu"
    columns: tuple[str, ...] = ()
    quantisation: Mapping[str, Any] | None = None

    def normalised(self, images: Mapping[str, np.ndarray], declared: Mapping[str, Any], look: bool = False) -> Inputs:
        """Images of one place, `(bands, height, width)` by sensor, as `predict` takes them, without a batch axis.

        Args:
            images: as `SceneReader` gives them.
            declared: `optical_bands`, `optical_units`, `optical_offset`, `sar_bands`, `sar_units`.
            look: whether to judge if the values can be what is declared.

        Raises:
            ValueError: a band is missing, or with `look` values are impossible.
        """
        processor = self.processor
        if not look:
            processor = copy.copy(processor)
            processor._plausibility = _Trusting()
        found = processor(**{name: _tensor(image) for name, image in images.items()}, **declared,
                          return_pixel_mask=True)  # fmt: skip
        return {name: values[0] for name, values in found.items()}

    def run(self, windows: list[Inputs], batch_size: int, symmetries: bool = False) -> np.ndarray:
        """Predict windows of one size and of the same sensors, in one batch that is filled up to `batch_size`.

        With a fixed size of batches what a window gets does not depend on its neighbours in the batch.

        Args:
            windows: at most `batch_size`.
            batch_size: of the batch that the model sees.
            symmetries: the mean over the eight symmetries of the square, instead of one look.

        Returns:
            `(windows, labels, height, width)` float32 or, of scores, `(windows, labels)`.
        """
        batch = {}
        for name in windows[0]:
            stacked = torch.stack([window[name] for window in windows])
            if len(windows) < batch_size:
                blank = stacked.new_ones if stacked.dtype == torch.bool else stacked.new_zeros
                stacked = torch.cat([stacked, blank((batch_size - len(windows), *stacked.shape[1:]))])
            batch[name] = stacked.to(self.device)
        with torch.inference_mode():
            result = self._predict(batch) if not symmetries else self._over_symmetries(batch)
        return result[: len(windows)].float().cpu().numpy()

    def _over_symmetries(self, batch: Inputs) -> torch.Tensor:
        total: torch.Tensor | None = None
        for flipped in (False, True):
            for turns in range(4):
                turned = {name: _turned(values, turns, flipped) for name, values in batch.items()}
                result = self._predict(turned)
                result = _turned_back(result, turns, flipped) if result.ndim == 4 else result
                total = result if total is None else total + result
        assert total is not None
        return total / 8

    def _predict(self, batch: Inputs) -> torch.Tensor:
        """`predict`, in halves where the memory of a GPU does not suffice."""
        try:
            return self.predict(batch)
        except torch.OutOfMemoryError:
            size = len(next(iter(batch.values())))
            if size == 1:
                raise
            torch.cuda.empty_cache()
        halves = ({name: values[part] for name, values in batch.items()}
                  for part in (slice(None, size // 2), slice(size // 2, None)))  # fmt: skip
        return torch.cat([self._predict(half) for half in halves])


class _Trusting(Plausibility):
    """Values were judged before, over the whole scene."""

    def look(self, *_: Any, **__: Any) -> list[Any]:
        """Nothing is odd."""
        return []


def window_of(inputs: Inputs, rows: slice, columns: slice, sensors: tuple[str, ...]) -> Inputs:
    """A window of some sensors."""
    return {name: inputs[name][..., rows, columns] for sensor in sensors for name in _NAMES[sensor]}


def valid_of(inputs: Inputs, sensor: str) -> torch.Tensor | None:
    """Where a sensor has data, `(height, width)` bool; None where it was not given."""
    return inputs.get(_NAMES[sensor][1])


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image))[None]


def _turned(values: torch.Tensor, turns: int, flipped: bool) -> torch.Tensor:
    values = torch.rot90(values, turns, (-2, -1))
    return values.flip(-1) if flipped else values


def _turned_back(values: torch.Tensor, turns: int, flipped: bool) -> torch.Tensor:
    return torch.rot90(values.flip(-1) if flipped else values, -turns, (-2, -1))


def load_scene_model(checkpoint: str | os.PathLike[str], device: str | None = None) -> SceneModel:
    """The model of a checkpoint that was fine-tuned.

    Args:
        checkpoint: a folder, or a Hub id; of a run that has not ended, its newest checkpoint.
        device: such as `"cuda"`; a GPU where there is one by default.

    Raises:
        FileNotFoundError, OSError: there is no such checkpoint.
        ValueError: it has no head that predicts something, or its processor resizes images.
    """
    source = newest_model(checkpoint)
    with looked_up(checkpoint):
        config = FusMAEConfig.from_pretrained(source)
        processor = FusMAEImageProcessor.from_pretrained(source, do_pad=False)
    heads = (FusMAEForSemanticSegmentation, FusMAEForImageClassification)
    head = next((each for each in heads if each.__name__ in (config.architectures or [])), None)
    if head is None:
        raise ValueError(
            f"{checkpoint} is a {', '.join(config.architectures or []) or 'model of unknown kind'}, which predicts "
            "nothing that a map can show. Fine-tune it first (`fusmae finetune`), and give that checkpoint."
        )
    _require_no_resizing(checkpoint, processor)
    device = _usable(device)
    model = head.from_pretrained(source).eval().to(device)
    regression = config.problem_type == "regression" or (head is heads[0] and config.num_labels == 1)
    kind: Kind = "scores" if head is heads[1] else "values" if regression else "classes"
    several = config.problem_type == "multi_label_classification"

    def predict(inputs: Inputs) -> torch.Tensor:
        logits = model(**inputs).logits.float()
        if kind != "scores" and logits.shape[-2:] != (size := next(iter(inputs.values())).shape[-2:]):
            logits = torch.nn.functional.interpolate(logits, size, mode="bilinear")
        if regression:
            return logits
        return logits.sigmoid() if several else logits.softmax(dim=1)

    named: dict[int, str] = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    labels = tuple(named[index] for index in sorted(named))
    return _model_of(checkpoint, model, processor, kind, labels, predict, device)


def load_embedding_model(
    checkpoint: str | os.PathLike[str],
    unit: Literal["patch", "window"],
    columns: Sequence[str],
    device: str | None = None,
) -> SceneModel:
    """The encoder of a checkpoint of any kind, for vectors of tokens or windows.

    Args:
        checkpoint: a folder, or a Hub id; of a run that has not ended, its newest checkpoint.
        unit: what a vector is of.
        columns: some of `COLUMNS`.
        device: such as `"cuda"`; a GPU where there is one by default.

    Raises:
        FileNotFoundError, OSError: there is no such checkpoint.
        ValueError: a column is unknown, or the processor resizes images.
    """
    if not columns or len({*columns}) < len(columns) or not {*columns} <= {*COLUMNS}:
        raise ValueError(f"--embedding-sensors are {', '.join(columns)}, but must be some of {', '.join(COLUMNS)}.")
    encoder, processor = load_checkpoint(checkpoint, decoders=False)
    _require_no_resizing(checkpoint, processor)
    processor.do_pad = False
    device = _usable(device)
    encoder = encoder.to(device)

    def predict(inputs: Inputs) -> torch.Tensor:
        return torch.cat(vectors_of(encoder, inputs, columns, unit), dim=1)

    labels = tuple(f"{column} {index}" for column in columns for index in range(encoder.config.feature_size))
    kind: Kind = "tokens" if unit == "patch" else "vectors"
    model = _model_of(checkpoint, encoder, processor, kind, labels, predict, device)
    return replace(model, columns=tuple(columns))


def _require_no_resizing(checkpoint: str | os.PathLike[str], processor: FusMAEImageProcessor) -> None:
    if processor.do_resize:
        raise ValueError(f"The processor of {checkpoint} resizes images (do_resize), and a map cannot. Turn it off.")


def _model_of(
    checkpoint: str | os.PathLike[str],
    model: Any,
    processor: FusMAEImageProcessor,
    kind: Kind,
    labels: tuple[str, ...],
    predict: Callable[[Inputs], torch.Tensor],
    device: str,
) -> SceneModel:
    config = model.config
    size = config.image_size
    saved = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in ("_name_or_path", "transformers_version")
    }
    made_of = {"config": saved, "processor": processor.to_dict()}
    return SceneModel(
        str(Path(checkpoint).name if Path(checkpoint).is_dir() else checkpoint),
        f"{weights_hash(model)}-{settings_hash(made_of)}",
        kind,
        labels,
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        config.patch_size,
        float(config.gsd),
        processor,
        predict,
        device,
    )


def _usable(device: str | None) -> str:
    """A device that computes; a GPU where there is one, if none is named."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}). Leave it out, or give cpu.") from error
    return device
