"""Pictures of pairs with their label map: classes in a legend, quantities with a colour bar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.files.plain_text import plain_text
from fusmae_hf.plots.pairs import TRUE_COLOUR, composite, composite_title, draw_sar, new_figure, plot_pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_with_label_map(
    pair: Pair,
    info: PairsInfo,
    *,
    channels: Sequence[str] = TRUE_COLOUR,
    colours: Sequence[str] = (),
) -> "Figure":
    """Draw one pair: a composite of the optical bands, each SAR band, and the label map.

    Args:
        pair: what to draw. Without a label map it is drawn by `plot_pair`.
        info: band names, units and map classes of its dataset.
        channels: names of the bands for red, green and blue.
        colours: colour of each of `info.map_class_names`; chosen here where empty.

    Returns:
        A matplotlib figure; write it with `figure.savefig("pair.png")`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if pair.label_map is None:
        return plot_pair(pair, info)
    figure = new_figure(3.4 * (2 + len(info.sar_bands)) + 1.5, 3.6)
    axes = figure.subplots(1, 2 + len(info.sar_bands))
    axes[0].imshow(composite(pair.optical, info.optical_bands, channels))
    axes[0].set_title(composite_title(info.optical_bands, channels), fontsize=9)
    for axis, band, backscatter in zip(axes[1:-1], info.sar_bands, pair.sar, strict=True):
        draw_sar(axis, backscatter, band, info.sar_units)
    if info.map_units:
        _draw_quantity(axes[-1], pair.label_map, info.map_units)
    else:
        _draw_classes(axes[-1], pair.label_map, info, colours)
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle("\n".join(filter(None, [plain_text(pair.id), "; ".join(pair.labels or [])])), fontsize=8)
    return figure


def _draw_quantity(axes: "Axes", label_map: np.ndarray, units: str) -> None:
    """Draw values from zero (or the smallest, if below) to their 98th percentile, with a scale."""
    finite = label_map[np.isfinite(label_map)]
    low, high = (min(0.0, float(finite.min())), float(np.percentile(finite, 98))) if finite.size else (0.0, 1.0)
    image = axes.imshow(label_map, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6))
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label=units)
    axes.set_title("label map", fontsize=9)


def _draw_classes(axes: "Axes", label_map: np.ndarray, info: PairsInfo, colours: Sequence[str]) -> None:
    """Draw the classes that occur, each in its colour, with a legend; pixels without a class are black."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch as Swatch

    picture = np.zeros((*label_map.shape, 3))
    swatches = []
    for value in np.unique(label_map).tolist():
        if value == info.map_no_data:
            swatches.append(Swatch(color="black", label="no data"))
            continue
        colour = to_rgb(colours[value] if value < len(colours) else colormaps["tab20"](value % 20))
        picture[label_map == value] = colour
        named = 0 <= value < len(info.map_class_names)
        swatches.append(Swatch(color=colour, label=info.map_class_names[value] if named else str(value)))
    axes.imshow(picture, interpolation="nearest")
    axes.set_title("label map", fontsize=9)
    axes.legend(handles=swatches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
