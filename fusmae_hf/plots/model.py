"""Pictures of what a model does: reconstructions, attention, embeddings.

Functions that draw raise an ImportError with the pip command where matplotlib is not installed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.plots.pairs import (
    FALSE_COLOUR,
    TRUE_COLOUR,
    UNIT_NAMES,
    composite,
    composite_title,
    draw_sar,
    new_figure,
    pair_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
    from fusmae_hf.modeling.modeling_fusmae import FusMAEForPreTraining, FusMAEPreTrainedModel


HIDDEN_GREY = 0.55
"""Brightness of masked patches in pictures."""


@contextmanager
def _evaluating(model: "FusMAEPreTrainedModel") -> Iterator[None]:
    """Without gradients and dropout; the mode of the model is as before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _draw_sensor(axis: "Axes", sensor: str, pair: Pair, info: PairsInfo) -> None:
    """The optical patch in true colour, or the first SAR band."""
    if sensor == "optical":
        axis.imshow(composite(pair.optical, info.optical_bands, TRUE_COLOUR))
        axis.set_title(composite_title(info.optical_bands, TRUE_COLOUR), fontsize=9)
    else:
        draw_sar(axis, pair.sar[0], info.sar_bands[0], info.sar_units)


def cross_attention_maps(
    model: "FusMAEPreTrainedModel", inputs: dict[str, torch.Tensor], row: int, column: int
) -> dict[str, np.ndarray]:
    """Where a patch of each sensor looks in the other one, in the early fusion; the mean over the heads.

    Args:
        model: any Fus-MAE model; attention is eager for this call and as it was afterwards.
        inputs: of one pair, both sensors, without `noise`.
        row, column: the patch, counted from the top left corner.

    Returns:
        `"optical"`: weights of the optical patches for the SAR patch, and `"sar"`: those of the SAR patches for the
        optical patch; `(rows, columns)` each, with a sum of 1.

    Raises:
        ValueError: the model has no early fusion, a sensor is missing, or there is no such patch.
    """
    if model.config.early_fusion != "cross_attention":
        raise ValueError(f"The model has no cross-attention: its early fusion is {model.config.early_fusion!r}.")
    if inputs.get("pixel_values") is None or inputs.get("pixel_values_sar") is None:
        raise ValueError("Cross-attention is between the sensors: `pixel_values` and `pixel_values_sar` are needed.")
    rows, columns = (side // model.config.patch_size for side in inputs["pixel_values"].shape[2:])
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"There is no patch {row},{column}: rows are 0 to {rows - 1}, columns 0 to {columns - 1}.")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with _evaluating(model):
            of_optical, of_sar = model.base_model(**inputs, output_attentions=True).cross_attentions
    finally:
        model.set_attn_implementation(before)
    weights = {"optical": of_sar, "sar": of_optical}
    number = row * columns + column
    return {
        name: maps[0, :, number].float().mean(dim=0).reshape(rows, columns).cpu().numpy()
        for name, maps in weights.items()
    }


def _draw_patches(axis: "Axes", values: np.ndarray, pair: Pair, patch_size: int | None, **options: Any) -> Any:
    """Values `(rows, columns, ...)` of patches over the ground of the pair, whose edges cut those that were padded."""
    height, width = pair.optical.shape[1:]
    side = patch_size or height // len(values)
    extent = (-0.5, values.shape[1] * side - 0.5, values.shape[0] * side - 0.5, -0.5)
    drawn = axis.imshow(values, extent=extent, **options)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return drawn


def plot_cross_attention(
    maps: dict[str, np.ndarray], pair: Pair, info: PairsInfo, row: int, column: int, patch_size: int | None = None
) -> "Figure":
    """Attention from the SAR patch to the optical image, and below it from the optical patch to the SAR image.

    Args:
        maps: what `cross_attention_maps` returns for this pair and patch; NaN where a patch was hidden.
        pair: what the model saw.
        info: band names and units of its dataset.
        row, column: the patch, framed on the left.
        patch_size: of the model, in pixels; needed where the pair was padded to whole patches.

    Returns:
        A figure; weights are in multiples of those of a patch that looks everywhere alike.
    """
    figure = new_figure(10.4, 7)
    from matplotlib.patches import Rectangle

    axes = figure.subplots(2, 3)
    for (queried, name), of_row in zip((("optical", "SAR"), ("sar", "optical")), axes, strict=True):
        weights = maps[queried] * maps[queried].size
        side = patch_size or pair.optical.shape[1] // len(weights)
        for axis, sensor in zip(of_row, ("sar" if queried == "optical" else "optical", queried), strict=False):
            _draw_sensor(axis, sensor, pair, info)
        corner = (column * side - 0.5, row * side - 0.5)
        of_row[0].add_patch(Rectangle(corner, side, side, fill=False, color="yellow", linewidth=1.8))
        of_row[0].set_title(f"{name} patch, row {row}, column {column}", fontsize=9)
        seen = bool(np.isfinite(weights).any())
        colours = {"cmap": "viridis", "vmin": 0, "vmax": None if seen else 1}
        drawn = _draw_patches(of_row[2], weights, pair, patch_size, **colours)
        if not seen:
            of_row[2].text(0.5, 0.5, "hidden entirely", ha="center", transform=of_row[2].transAxes, fontsize=9)
        figure.colorbar(drawn, ax=of_row[2], shrink=0.8, label="times the mean")
        of_row[2].set_title(f"attention to {'optical' if queried == 'optical' else 'SAR'} patches", fontsize=9)
        for axis in of_row:
            axis.set_axis_off()
    figure.suptitle(pair_title(pair, info), fontsize=10)
    return figure


def embedding_colours(
    model: "FusMAEPreTrainedModel", inputs: dict[str, torch.Tensor]
) -> dict[str, tuple[np.ndarray, float]]:
    """Patch tokens of one pair as colours: their first three principal components as red, green and blue.

    Args:
        model: any Fus-MAE model.
        inputs: of one pair, without `noise`.

    Returns:
        By sensor: `(rows, columns, 3)` in [0, 1], each component stretched from its 2nd to its 98th percentile, black
        where a patch holds no data; and the share of the variance in the three. Colours of sensors do not compare.
    """
    with _evaluating(model):
        outputs = model.base_model(**inputs)
    colours = {}
    for sensor, suffix in (("optical", ""), ("sar", "_sar")):
        if outputs.get(f"{sensor}_hidden_state") is None:
            continue
        tokens = outputs[f"{sensor}_hidden_state"][0].double().cpu().numpy()
        present = tokens.any(axis=1)
        components, share = _principal_components(tokens[present])
        low, high = np.percentile(components, (2, 98), axis=0) if len(components) else (0.0, 1.0)
        picture = np.zeros((len(tokens), 3))
        picture[present] = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
        rows = inputs[f"pixel_values{suffix}"].shape[2] // model.config.patch_size
        colours[sensor] = picture.reshape(rows, -1, 3), share
    return colours


def _principal_components(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores `(tokens, 3)` on the first three components, each turned so that its largest is positive; their share
    of the variance. Zero where there are fewer components."""
    left, sizes, _ = np.linalg.svd(tokens - tokens.mean(axis=0, keepdims=True), full_matrices=False)
    scores = np.zeros((len(tokens), 3))
    scores[:, : min(3, len(sizes))] = (left * sizes)[:, :3]
    largest = np.abs(scores).argmax(axis=0)
    scores *= np.where(scores[largest, range(3)] < 0, -1, 1)
    return scores, float((sizes[:3] ** 2).sum() / max((sizes**2).sum(), 1e-30))


def plot_embedding(
    colours: dict[str, tuple[np.ndarray, float]], pair: Pair, info: PairsInfo, patch_size: int | None = None
) -> "Figure":
    """Each sensor of a pair with the colours of its patch tokens beside it.

    Args:
        colours: what `embedding_colours` returns for this pair.
        pair: what the model saw.
        info: band names and units of its dataset.
        patch_size: of the model, in pixels; needed where the pair was padded to whole patches.
    """
    figure = new_figure(7.4, 3.5 * len(colours) + 0.4)
    for of_row, (sensor, (picture, share)) in zip(
        figure.subplots(len(colours), 2, squeeze=False), colours.items(), strict=True
    ):
        _draw_sensor(of_row[0], sensor, pair, info)
        _draw_patches(of_row[1], picture, pair, patch_size, interpolation="nearest")
        name = "optical" if sensor == "optical" else "SAR"
        of_row[1].set_title(f"{name} tokens\n3 components: {share:.0%} of the variance", fontsize=9)
        for axis in of_row:
            axis.set_axis_off()
    figure.suptitle(pair_title(pair, info), fontsize=10)
    return figure


def reconstruct_images(
    model: "FusMAEForPreTraining",
    inputs: dict[str, torch.Tensor],
    processor: "FusMAEImageProcessor",
    size: tuple[int, int] | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """What a model sees of a batch and what it makes of it, in physical units; see `FusMAEForPreTraining.reconstruct`.

    Args:
        model: pretraining model.
        inputs: its inputs, with `noise` and `noise_sar`.
        processor: whose normalisation to undo.
        size: (height, width) to cut the pictures to, where the images were padded.

    Returns:
        By sensor (`"optical"` in digital numbers, `"sar"` in dB): `original`, `reconstruction` with visible patches
        kept, both `(batch_size, bands, height, width)`, and `visible` `(batch_size, height, width)` bool.
    """
    given: dict[str, Any] = {name: values for name, values in inputs.items() if not name.startswith("noise")}
    with _evaluating(model):
        masks = model(**inputs)
        outputs = model.reconstruct(**given, mask=masks.mask, mask_sar=masks.mask_sar)
    pictures = {}
    for sensor, suffix in (("optical", ""), ("sar", "_sar")):
        if inputs.get(f"pixel_values{suffix}") is not None:
            images = {"original": inputs[f"pixel_values{suffix}"], "reconstruction": outputs[f"pixel_values{suffix}"]}
            pictures[sensor] = {name: processor.denormalize(x, sensor).cpu().numpy() for name, x in images.items()}
            pictures[sensor]["visible"] = ~outputs[f"reconstructed{suffix}"].cpu().numpy()
    height, width = size or (None, None)
    return {
        sensor: {name: values[..., :height, :width] for name, values in images.items()}
        for sensor, images in pictures.items()
    }


def plot_reconstructions(
    pictures: dict[str, dict[str, np.ndarray]], processor: "FusMAEImageProcessor", title: str, ids: Sequence[str] = ()
) -> "Figure":
    """Input, masked input and reconstruction of each pair, in true and false colour and each SAR band.

    Args:
        pictures: what `reconstruct_images` returns.
        processor: its band names.
        title: written above; say what the data is.
        ids: name of each pair.

    Returns:
        A matplotlib figure with one row a pair. All pictures of a view share one stretch, that of the input.
    """
    views = _views(pictures, processor)
    number = len(next(iter(pictures.values()))["original"])
    figure = new_figure(1.75 * 3 * len(views), 1.95 * number + 0.5)
    axes = figure.subplots(number, 3 * len(views), squeeze=False)
    for pair in range(number):
        for column, (name, sensor, indices) in enumerate(views):
            shown, masked = _stretched(pictures[sensor], pair, name, indices)
            for axis, image, label in zip(
                axes[pair, 3 * column :],
                (shown[0], masked, shown[1]),
                ("input", "masked", "reconstruction"),
                strict=False,
            ):
                _draw(axis, image)
                if pair == 0:
                    axis.set_title(f"{name}\n{label}", fontsize=8)
        if ids:
            axes[pair, 0].set_ylabel(ids[pair][-26:], fontsize=6)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_errors(
    pictures: dict[str, dict[str, np.ndarray]], processor: "FusMAEImageProcessor", title: str, pair: int = 0
) -> "Figure":
    """Input, masked input, reconstruction and error of one pair, a row for each view of `plot_reconstructions`.

    The error is reconstruction minus input, in dB for SAR; of composites its magnitude, the mean over their three
    bands, in digital numbers. Visible patches have none and stay empty.

    Args:
        pictures: what `reconstruct_images` returns.
        processor: its band names.
        title: written above; say what the data is.
        pair: which pair of the batch.
    """
    views = _views(pictures, processor)
    figure = new_figure(10, 2.35 * len(views) + 0.5)
    for row, (name, sensor, indices) in zip(figure.subplots(len(views), 4, squeeze=False), views, strict=True):
        images = pictures[sensor]
        shown, masked = _stretched(images, pair, name, indices)
        for axis, image in zip(row, (shown[0], masked, shown[1]), strict=False):
            _draw(axis, image)
        error = images["reconstruction"][pair][indices] - images["original"][pair][indices]
        error = (error if len(error) == 1 else np.abs(error)).mean(axis=0)
        hidden = ~images["visible"][pair]
        largest = max(np.percentile(np.abs(error[hidden]), 98), 1e-6) if hidden.any() else 1.0
        low, colours = (-largest, "RdBu_r") if len(indices) == 1 else (0.0, "magma")
        drawn = row[3].imshow(np.where(hidden, error, np.nan), cmap=colours, vmin=low, vmax=largest)
        raw = getattr(processor, f"{sensor}_units") == "raw"
        units = UNIT_NAMES["raw" if raw else "dn" if sensor == "optical" else "db"]
        figure.colorbar(drawn, ax=row[3], shrink=0.85, label=units)
        row[3].set_facecolor(str(HIDDEN_GREY))
        row[3].set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
        if name == views[0][0]:
            for axis, label in zip(row, ("input", "masked", "reconstruction", "error"), strict=True):
                axis.set_title(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _stretched(
    images: dict[str, np.ndarray], pair: int, view: str, indices: list[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Input and reconstruction in the stretch of the input, `(channels, height, width)` in [0, 1]; masked input."""
    original, reconstruction = (images[key][pair][indices] for key in ("original", "reconstruction"))
    low = np.percentile(original, 2, axis=(1, 2), keepdims=True)
    high = np.percentile(original, 98, axis=(1, 2), keepdims=True)
    if view == "true colour":  # one stretch for the three bands keeps the hues
        low, high = low.min(), high.max()
    shown = [np.clip((x - low) / np.maximum(high - low, 1e-6), 0, 1) for x in (original, reconstruction)]
    return shown, np.where(images["visible"][pair], shown[0], HIDDEN_GREY)


def _draw(axis: "Axes", image: np.ndarray) -> None:
    axis.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def _views(pictures: dict[str, Any], processor: "FusMAEImageProcessor") -> list[tuple[str, str, list[int]]]:
    """Name, sensor and band indices of each view that the bands allow."""
    views = []
    if "optical" in pictures:
        bands = processor.optical_bands
        for name, channels in (("true colour", TRUE_COLOUR), ("false colour", FALSE_COLOUR)):
            if set(channels) <= set(bands):
                views.append((name, "optical", [bands.index(channel) for channel in channels]))
        if not views:
            views.append((f"optical {bands[0]}", "optical", [0]))
    if "sar" in pictures:
        views += [(f"SAR {band}", "sar", [index]) for index, band in enumerate(processor.sar_bands)]
    return views
