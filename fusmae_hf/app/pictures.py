"""What the demo computes and draws: a pair of which some is hidden, and what a model makes of it."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusmae_hf.data.inputs import PairInputs, image_size
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.files.plain_text import inline
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import FusMAEForPreTraining, FusMAEReconstruction
from fusmae_hf.modeling.patches_fusmae import interpolate_visible
from fusmae_hf.plots.model import plot_cross_attention, plot_errors
from fusmae_hf.plots.pairs import pair_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SIDE = 256
"""Px: attention maps grow with the fourth power of the side."""

SENSORS = {"optical": "", "sar": "_sar"}
"""Suffix of a sensor's inputs and outputs."""

NAMES = {"optical": "optical", "sar": "SAR"}
"""What the page calls a sensor."""


@dataclass
class Completion:
    """What a model made of one pair.

    Attributes:
        pictures: as `reconstruct_images` gives them: by sensor `original` and `reconstruction`
            `(1, bands, height, width)` in digital numbers or dB, and `visible` `(1, height, width)` bool. Pixels
            without data count as visible, since there is nothing to compare them with.
        rmse: by sensor, root mean squared error of the hidden pixels that hold data: that of the model and that of
            interpolation between the visible pixels. NaN where there are no such pixels.
        hidden: by sensor, share of the patches that were hidden.
        attention: by the sensor looked at, the weights of its patches `(rows, columns)` in the decoder of the other
            sensor for one patch to fill in; NaN where a patch was not visible. Empty where nobody looks across.
        patch: row and column of that patch.
        patch_size: of the model, in pixels.
        notes: sentences on what to mind, the processor's doubts among them.
    """

    pictures: dict[str, dict[str, np.ndarray]]
    rmse: dict[str, tuple[float, float]]
    hidden: dict[str, float]
    attention: dict[str, np.ndarray]
    patch: tuple[int, int]
    patch_size: int
    notes: list[str]


@torch.no_grad()
def complete(
    model: FusMAEForPreTraining,
    processor: FusMAEImageProcessor,
    pair: Pair,
    info: PairsInfo,
    mask_ratio: float,
    hide: str | None = None,
    seed: int = 0,
    patch: tuple[int, int] = (0, 0),
) -> Completion:
    """Hide some of a pair and have the model fill it in.

    Args:
        model: with eager attention, which alone gives maps.
        processor: that goes with it.
        pair: what to look at.
        info: its bands, units and offset.
        mask_ratio: share of the patches to hide of each sensor that is not hidden entirely, in [0, 1).
        hide: `"sar"` or `"optical"` to hide all of it, or None.
        seed: of the hidden patches.
        patch: row and column of the patch whose attention is kept.

    Raises:
        ValueError: the pair does not fit the model, nothing would be visible, or there is no such patch.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"Given: mask ratio {mask_ratio}. Expected: a number from 0 to below 1. Lower it.")
    height, width = pair.optical.shape[1:]
    if max(height, width) > LARGEST_SIDE:
        raise ValueError(
            f"Given: images of {height} x {width} px. Expected: at most {LARGEST_SIDE} px a side. Crop them."
        )
    inputs, notes = _inputs(processor, pair, info, model.config.patch_size)
    rows, columns = (side // model.config.patch_size for side in image_size(inputs))
    row, column = patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"Given: patch row {row}, column {column}. Expected: a row from 0 to {rows - 1} and a column from 0 to "
            f"{columns - 1}. Choose another patch."
        )
    masks = _masks(rows * columns, mask_ratio, hide, seed)
    with _decoders_weights(model) as weights:
        outputs = model.reconstruct(**inputs, mask=masks["optical"], mask_sar=masks["sar"])
    if outputs.assumed_levels:
        notes.append("The model predicts patches without brightness and contrast; those of the visible stand in.")
    if not weights:
        notes.append("There are no attention maps: the decoders of this checkpoint do not query the other sensor.")
    interpolated: dict[str, Any] = {
        f"pixel_values{suffix}": interpolate_visible(
            inputs[f"pixel_values{suffix}"], ~outputs[f"reconstructed{suffix}"], model.config.patch_size
        )
        for suffix in SENSORS.values()
    }
    given = {name: inputs[name] for name in interpolated}
    original, reconstruction, interpolation = (
        {sensor: images.numpy() for sensor, images in processor.post_process_reconstruction(images).items()}
        for images in (FusMAEReconstruction(**given), outputs, FusMAEReconstruction(**interpolated))
    )
    pictures, rmse, attention = {}, {}, {}
    for sensor, suffix in SENSORS.items():
        filled = outputs[f"reconstructed{suffix}"].numpy()
        valid = inputs[f"pixel_mask{suffix}"].numpy() if f"pixel_mask{suffix}" in inputs else np.ones_like(filled)
        images = {"original": original[sensor], "reconstruction": reconstruction[sensor], "visible": ~(filled & valid)}
        rmse[sensor] = _rmse(images, reconstruction[sensor]), _rmse(images, interpolation[sensor])
        pictures[sensor] = {name: values[..., :height, :width] for name, values in images.items()}
        valid = valid[:, :height, :width]
        if not valid.all():
            notes.append(f"{(~valid).mean():.0%} of the {NAMES[sensor]} pixels hold no data: filled in, not compared.")
        other = "sar" if sensor == "optical" else "optical"
        seen = _patches(~filled[0], model.config.patch_size)
        if other in weights and seen.any():
            looked = weights[other][row * columns + column, : seen.size].reshape(rows, columns)
            attention[sensor] = np.where(seen, looked, np.nan)
    hidden = {sensor: float(mask.float().mean()) for sensor, mask in masks.items()}
    return Completion(pictures, rmse, hidden, attention, (row, column), model.config.patch_size, notes)


def _inputs(
    processor: FusMAEImageProcessor, pair: Pair, info: PairsInfo, patch_size: int
) -> tuple[dict[str, Any], list[str]]:
    """The inputs of a model for one pair, padded to whole patches, and what the processor doubts about it."""
    batch = {"optical": torch.from_numpy(pair.optical)[None], "sar": torch.from_numpy(pair.sar)[None]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A copy, since a processor looks at its first batches alone, and warns once.
        inputs = PairInputs(copy.deepcopy(processor), info, patch_size=patch_size)(batch)
    return inputs, [str(warning.message) for warning in caught if warning.category is UserWarning]


def _masks(number: int, ratio: float, hide: str | None, seed: int) -> dict[str, torch.Tensor]:
    """By sensor, which of `number` patches are hidden: `(1, number)` bool."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for sensor in SENSORS:
        order = torch.rand(1, number, generator=generator).argsort(dim=1).argsort(dim=1)
        masks[sensor] = order < (number if sensor == hide else int(number * ratio + 1e-6))
    return masks


@contextmanager
def _decoders_weights(model: FusMAEForPreTraining) -> Iterator[dict[str, np.ndarray]]:
    """By sensor `(queries, keys)`: the weights of its decoder's cross-attention, the mean over the heads, once the
    model has run. Queries are the patches of the whole grid; the patches of the other sensor are the first keys."""
    weights: dict[str, np.ndarray] = {}

    def keep(sensor: str) -> Any:
        def hook(module: torch.nn.Module, arguments: Any, outputs: Any) -> None:
            weights[sensor] = outputs[1][0].float().mean(dim=0).numpy()

        return hook

    hooks = []
    if model.config.feature_fusion == "query":
        decoders = {"optical": model.optical_decoder, "sar": model.sar_decoder}
        hooks = [decoder.fusion_attention.register_forward_hook(keep(sensor)) for sensor, decoder in decoders.items()]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _rmse(images: dict[str, np.ndarray], made: np.ndarray) -> float:
    """Root mean squared error where the original was hidden."""
    hidden = ~images["visible"][0]
    if not hidden.any():
        return float("nan")
    return float(np.sqrt(np.square((made - images["original"])[0][:, hidden]).mean()))


def _patches(pixels: np.ndarray, size: int) -> np.ndarray:
    """Which patches `(rows, columns)` hold any of the `pixels` `(height, width)`."""
    height, width = pixels.shape
    return np.any(pixels.reshape(height // size, size, width // size, size), axis=(1, 3))


def summary(completion: Completion, processor: FusMAEImageProcessor, info: PairsInfo) -> str:
    """Markdown: how far the reconstruction is from what was hidden, and what to mind."""
    units = {
        "optical": "" if processor.optical_units == "raw" else " digital numbers",
        "sar": "" if processor.sar_units == "raw" else " dB",
    }
    lines = ["| | hidden | error of the model (RMSE) | of interpolation |", "|---|---|---|---|"]
    for sensor, share in completion.hidden.items():
        cells = [
            "nothing to compare" if np.isnan(error) else f"{error:.3g}{units[sensor]}"
            for error in completion.rmse[sensor]
        ]
        lines.append(" | ".join(["", f"**{NAMES[sensor]}**", f"{share:.0%}", *cells, ""]).strip())
    simulated = ["The pair is simulated: made-up scenes, no satellite data."] if info.simulated else []
    return "\n".join([*lines, "", *(f"- {inline(note)}" for note in simulated + completion.notes)])


def draw(
    completion: Completion, processor: FusMAEImageProcessor, pair: Pair, info: PairsInfo
) -> "tuple[Figure, Figure, Figure | None]":
    """Input, masked input, reconstruction and error of the optical image, the same of SAR, and the attention."""
    title = pair_title(pair, info)
    optical, sar = (
        plot_errors({sensor: images}, processor, f"{title}: {NAMES[sensor]}")
        for sensor, images in completion.pictures.items()
    )
    if not completion.attention:
        return optical, sar, None
    row, column = completion.patch
    blank = np.full_like(next(iter(completion.attention.values())), np.nan)
    maps = {sensor: completion.attention.get(sensor, blank) for sensor in SENSORS}
    return optical, sar, plot_cross_attention(maps, pair, info, row, column, completion.patch_size)
