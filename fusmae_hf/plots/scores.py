"""Pictures of training and of what a fine-tuned model gets right: losses, scores by class, confusion, segmented maps.

Functions that draw raise an ImportError with the pip command where matplotlib is not installed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusmae_hf.plots.pairs import TRUE_COLOUR, composite, draw_sar, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from fusmae_hf.data.pairs import PairsInfo


_HELD_OUT = re.compile(
    r"eval_(?:(?P<source>.+?)_)??(?P<key>optical_loss|sar_loss|contrastive_loss|loss)(?:_(?P<kind>visible_mean|interpolation))?"
)


def plot_losses(log_history: Sequence[dict[str, float]], title: str) -> "Figure":
    """Losses of training and of held-out pairs against the step, a panel for each sensor and one for their sum.

    Args:
        log_history: `trainer.state.log_history`.
        title: written above.
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


def plot_scores_by_class(scores: Mapping[str, Mapping[str, float | None]], measure: str, title: str) -> "Figure":
    """Bars of a score of each class, side by side for each series, such as the sensors that a model saw.

    Args:
        scores: by series, then by class; None where it is undefined, which leaves a gap marked "none".
        measure: what the score is, for the axis.
        title: written above; say what the data is.

    Returns:
        A matplotlib figure.
    """
    classes = list(next(iter(scores.values())))
    figure = new_figure(8, 1.4 + 0.16 * len(classes) * (len(scores) + 1))
    axis = figure.subplots()
    height = 0.8 / len(scores)
    for position, (series, by_class) in enumerate(scores.items()):
        places = np.arange(len(classes)) + (position - (len(scores) - 1) / 2) * height
        values = [by_class[name] for name in classes]
        axis.barh(places, [value or 0 for value in values], height, label=series, color=f"C{position}")
        for place, value in zip(places, values, strict=True):
            axis.text(0.005, place, "none", va="center", fontsize=6) if value is None else None
    axis.set_yticks(np.arange(len(classes)), classes, fontsize=7)
    axis.set_ylim(len(classes) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xlabel(measure, fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    if len(scores) > 1:
        figure.legend(loc="outside lower center", ncols=len(scores), fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], title: str) -> "Figure":
    """Confusion matrix, each row as shares of the references of its class.

    Args:
        counts: `(classes, classes)`, rows references, columns predictions.
        class_names: one a class.
        title: written above.

    Returns:
        A matplotlib figure. A class without a reference has an empty row.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    side = 2.6 + 0.4 * len(class_names)
    figure = new_figure(side + 0.8, side)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the references")
    for row, column in np.argwhere(shares > 0.005):
        dark = shares[row, column] > 0.6
        axis.text(
            column, row, f"{shares[row, column]:.2f}", ha="center", va="center", fontsize=6, color="w" if dark else "k"
        )
    axis.set_xticks(range(len(class_names)), class_names, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(class_names)), class_names, fontsize=7)
    axis.set_xlabel("predicted", fontsize=8)
    axis.set_ylabel("reference", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_segmentation(
    pairs: Sequence[Mapping[str, np.ndarray]],
    info: "PairsInfo",
    class_names: Sequence[str],
    title: str,
    *,
    ids: Sequence[str] = (),
    ignore_index: int | None = None,
    colours: Sequence[str] = (),
    opacity: float = 0.6,
) -> "Figure":
    """Reference and predicted classes over the optical patch, with the SAR patch beside it and a legend.

    Args:
        pairs: of each pair `optical` `(bands, height, width)` and `sar` `(bands, height, width)` in raw units, and
            `reference` and `predicted`, `(height, width)` class numbers.
        info: bands of the pairs.
        class_names: one a class.
        title: written above; say what the data is.
        ids: name of each pair.
        ignore_index: value of references without a class, which stay transparent.
        colours: one a class; chosen here where empty.
        opacity: of the classes over the patch.

    Returns:
        A matplotlib figure with one row a pair.
    """
    figure = new_figure(10.5, 2.5 * len(pairs) + 0.9)
    from matplotlib.patches import Patch as Swatch

    palette = class_colours(len(class_names), colours)
    axes = figure.subplots(len(pairs), 4, squeeze=False)
    shown: set[int] = set()
    for row, (of_row, pair) in enumerate(zip(axes, pairs, strict=True)):
        picture = composite(pair["optical"], info.optical_bands, TRUE_COLOUR)
        of_row[0].imshow(picture)
        draw_sar(of_row[1], pair["sar"][0], info.sar_bands[0], info.sar_units)
        for axis, name in zip(of_row[2:], ("reference", "predicted"), strict=True):
            classes = pair[name]
            known = (classes != ignore_index) if ignore_index is not None else np.ones(classes.shape, dtype=bool)
            overlay = np.zeros((*classes.shape, 4))
            overlay[known, :3], overlay[known, 3] = palette[classes[known]], opacity
            extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
            axis.imshow(picture)
            axis.imshow(overlay, interpolation="nearest", extent=extent)
            shown |= set(np.unique(classes[known]).tolist())
        for axis, name in zip(of_row, ("optical", info.sar_bands[0], "reference", "predicted"), strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(name if row == 0 else "", fontsize=8)
        if ids:
            of_row[0].set_ylabel(ids[row][-26:], fontsize=6)
    swatches = [Swatch(color=palette[number], label=class_names[number]) for number in sorted(shown)]
    figure.legend(handles=swatches, loc="outside lower center", ncols=5, fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure


def class_colours(number: int, colours: Sequence[str] = ()) -> np.ndarray:
    """Red, green and blue in [0, 1] of each class, `(number, 3)`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(colours[n] if n < len(colours) else colormaps["tab20"](n % 20)) for n in range(number)])
