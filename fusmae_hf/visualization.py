"""Pictures of what a model does: reconstructions and loss curves."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data.plotting import FALSE_COLOUR, TRUE_COLOUR, new_figure
from .evaluation.interpolation import visible_pixels
from .modeling.modeling_fusmae import unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from .modeling.image_processing_fusmae import FusMAEImageProcessor
    from .modeling.modeling_fusmae import FusMAEForPreTraining

_HELD_OUT = re.compile(
    r"eval_(?:(?P<source>.+?)_)??(?P<key>optical_loss|sar_loss|loss)(?:_(?P<kind>visible_mean|interpolation))?"
)

HIDDEN_GREY = 0.55
"""Brightness of masked patches in pictures."""


@torch.no_grad()
def reconstruct_images(
    model: "FusMAEForPreTraining", inputs: dict[str, torch.Tensor], processor: "FusMAEImageProcessor"
) -> dict[str, dict[str, np.ndarray]]:
    """What a model sees of a batch and what it makes of it, in physical units.

    Args:
        model: pretraining model.
        inputs: its inputs, with `noise` and `noise_sar`.
        processor: whose normalisation to undo.

    Returns:
        By sensor (`"optical"` in digital numbers, `"sar"` in dB): `original`, `reconstruction` with visible patches
        kept, both `(batch_size, bands, height, width)`, and `visible` `(batch_size, height, width)` bool.
    """
    training = model.training
    model.eval()
    outputs = model(**inputs)
    model.train(training)
    pictures = {}
    for sensor, suffix in (("optical", ""), ("sar", "_sar")):
        images = inputs.get(f"pixel_values{suffix}")
        if images is None:
            continue
        size = model.config.patch_size
        height, width = images.shape[2:]
        predicted = unpatchify(outputs[f"logits{suffix}"].float(), size, height, width)
        if model.config.norm_pix_loss:
            predicted = _undo_patch_normalisation(predicted, images, size)
        visible = visible_pixels(outputs[f"mask{suffix}"], height, width, size)
        kept = torch.where(visible[:, None], images, predicted)
        pictures[sensor] = {
            "original": processor.denormalize(images, sensor).cpu().numpy(),
            "reconstruction": processor.denormalize(kept, sensor).cpu().numpy(),
            "visible": visible.cpu().numpy(),
        }
    return pictures


def _undo_patch_normalisation(predicted: torch.Tensor, images: torch.Tensor, size: int) -> torch.Tensor:
    """Give predicted patches the mean and spread of the true ones, which they were trained without."""
    height, width = images.shape[2:]
    kernel = torch.nn.functional.avg_pool2d
    mean = kernel(images.mean(dim=1, keepdim=True), size)
    spread = (kernel(images.square().mean(dim=1, keepdim=True), size) - mean.square()).clamp(min=0).add(1e-6).sqrt()
    mean, spread = (torch.nn.functional.interpolate(x, (height, width), mode="nearest") for x in (mean, spread))
    return predicted * spread + mean


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

    Raises:
        ImportError: matplotlib is not installed; names the pip command.
    """
    views = _views(pictures, processor)
    number = len(next(iter(pictures.values()))["original"])
    figure = new_figure(1.75 * 3 * len(views), 1.95 * number + 0.5)
    axes = figure.subplots(number, 3 * len(views), squeeze=False)
    for pair in range(number):
        for column, (name, sensor, indices) in enumerate(views):
            images = pictures[sensor]
            original, reconstruction = (images[key][pair][indices] for key in ("original", "reconstruction"))
            low = np.percentile(original, 2, axis=(1, 2), keepdims=True)
            high = np.percentile(original, 98, axis=(1, 2), keepdims=True)
            if name == "true colour":  # one stretch for the three bands keeps the hues
                low, high = low.min(), high.max()
            shown = [np.clip((x - low) / np.maximum(high - low, 1e-6), 0, 1) for x in (original, reconstruction)]
            masked = np.where(images["visible"][pair], shown[0], HIDDEN_GREY)
            for axis, image, label in zip(
                axes[pair, 3 * column :],
                (shown[0], masked, shown[1]),
                ("input", "masked", "reconstruction"),
                strict=False,
            ):
                axis.imshow(image.transpose(1, 2, 0) if len(image) == 3 else image[0], cmap="gray", vmin=0, vmax=1)
                axis.set_xticks([])
                axis.set_yticks([])
                if pair == 0:
                    axis.set_title(f"{name}\n{label}", fontsize=8)
        if ids:
            axes[pair, 0].set_ylabel(ids[pair][-26:], fontsize=6)
    figure.suptitle(title, fontsize=10)
    return figure


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


def plot_losses(log_history: Sequence[dict[str, float]], title: str) -> "Figure":
    """Losses of training and of held-out pairs against the step, a panel for each sensor and one for their sum.

    Args:
        log_history: `trainer.state.log_history`.
        title: written above.

    Raises:
        ImportError: matplotlib is not installed; names the pip command.
    """
    panels = {"loss": "both sensors", "optical_loss": "optical", "sar_loss": "SAR"}
    figure = new_figure(4.2 * len(panels), 4.4)
    colours: dict[str, str] = {}
    shown: dict[str, Line2D] = {}
    for axis, (key, name) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, points in _curves(log_history, key).items():
            source, _, kind = label.partition(", ")
            steps, values = zip(*points, strict=True)
            (line,) = axis.plot(
                steps,
                values,
                label=label,
                color=colours.setdefault(source, f"C{len(colours)}"),
                linestyle={"": "-", "mean of the visible": ":", "interpolated": "--"}[kind],
                linewidth=1.2 if not kind else 0.9,
                marker="o" if not kind and source != "training" else None,
                markersize=3,
            )
            shown.setdefault(label, line)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("mean squared error (normalised units)", fontsize=8)
        axis.grid(alpha=0.3)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def _curves(log_history: Sequence[dict[str, float]], key: str) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of every logged series of the loss `key`, by the name to show."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for logged, value in entry.items():
            if logged == key:
                curves.setdefault("training", []).append((entry["step"], value))
            elif (match := _HELD_OUT.fullmatch(logged)) and match["key"] == key:
                kind = {None: "", "visible_mean": ", mean of the visible", "interpolation": ", interpolated"}
                label = f"held out {match['source'] or ''}".strip() + kind[match["kind"]]
                curves.setdefault(label, []).append((entry["step"], value))
    return curves
