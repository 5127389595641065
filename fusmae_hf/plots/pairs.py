"""Pictures of pairs: composites of the optical bands, backscatter in grey, label maps in their classes' colours."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.files.plain_text import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOUR = ("B04", "B03", "B02")
"""Red, green and blue as the eye sees them."""

FALSE_COLOUR = ("B08", "B04", "B03")
"""Near infrared as red: vegetation is bright red, water black."""

UNIT_NAMES = {"db": "dB", "linear": "linear power", "dn": "digital numbers", "reflectance": "reflectance", "raw": ""}
"""Units as they are written beside a scale; raw values have none."""

CLASS_COLOURS = {
    "Evergreen Needleleaf Forests": "#05450a", "Evergreen Broadleaf Forests": "#086a10",
    "Deciduous Needleleaf Forests": "#54a708", "Deciduous Broadleaf Forests": "#78d203",
    "Mixed Forests": "#009900", "Closed Shrublands": "#c6b044", "Open Shrublands": "#dcd159",
    "Woody Savannas": "#dade48", "Savannas": "#fbff13", "Grasslands": "#b6ff05", "Permanent Wetlands": "#27ff87",
    "Croplands": "#c24f44", "Urban and Built-up Lands": "#a5a5a5",
    "Cropland/Natural Vegetation Mosaics": "#ff6d4c", "Permanent Snow and Ice": "#69fff8", "Barren": "#f9ffa4",
    "Water Bodies": "#1c0dff", "Forest": "#009900", "Shrubland": "#c6b044", "Savanna": "#fbff13",
    "Grassland": "#b6ff05", "Wetlands": "#27ff87", "Urban/Built-up": "#a5a5a5", "Snow/Ice": "#69fff8",
    "Water": "#1c0dff", "Not Water": "#d8c79c", "flooded": "#2166ac", "not flooded": "#d8c79c",
    "water": "#419bdf", "trees": "#397d49", "flooded vegetation": "#7a87c6", "crops": "#e49635",
    "built area": "#c4281b", "bare ground": "#a59b8f", "snow or ice": "#a8ebff", "clouds": "#616161",
    "rangeland": "#e3e2c3",
    "urban fabric": "#c8362f", "road": "#4d4d4d", "ploughed soil": "#8c5a2b", "smooth seedbed": "#d8a86a",
    "cereals": "#b8d432", "flowering rapeseed": "#f4e61e", "pasture": "#7fc97f", "dry grassland": "#e0d79c",
    "coniferous forest": "#14532d", "broad-leaved forest": "#2e8b57", "flooded forest": "#20b2aa",
    "moor and shrub": "#9a6fa8", "marsh": "#6f8fd0", "sand": "#fff0b3", "clear water": "#08306b",
    "turbid water": "#4292c6",
}  # fmt: skip
"""Colours of classes by name: of MODIS land cover, of Esri Land Cover, and of the simulator. Others are chosen."""


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches that belongs to no window and no global state.

    Names of pairs and classes show as they are: a dollar sign in them begins no formula.

    Raises:
        ImportError: matplotlib is not installed; names the pip command.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.text import Text
    except ImportError as error:
        raise ImportError(
            "Drawing pairs needs matplotlib, which is not installed. Install it "
            'with `pip install -e ".[train]"` in a clone of the repository.'
        ) from error

    class PlainFigure(Figure):
        def draw(self, renderer: Any) -> None:
            for text in self.findobj(Text):
                text.set_parse_math(False)
            with rc_context({"text.parse_math": False}):  # for labels of ticks, which are made while drawing
                super().draw(renderer)

    return PlainFigure(figsize=(width, height), layout="constrained")


def percentile_stretch(image: np.ndarray, *, together: bool = True) -> np.ndarray:
    """Stretch an image from its 2nd to its 98th percentile.

    Args:
        image: `(channels, height, width)`; non-finite pixels, and those that are zero in all channels, hold no data.
        together: use the percentiles over all channels, which keeps the hues; otherwise each channel has its own.

    Returns:
        `(height, width, channels)` float32 in [0, 1]; pixels without data are 0.
    """
    image = image.astype(np.float32)
    valid = np.isfinite(image).all(axis=0) & (image != 0).any(axis=0)
    if not valid.any():
        return np.zeros((*valid.shape, len(image)), dtype=np.float32)
    low, high = np.percentile(image[:, valid], (2, 98), axis=None if together else 1, keepdims=True)[..., None]
    stretched = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1)
    return np.where(valid, stretched, 0).transpose(1, 2, 0)


def composite(optical: np.ndarray, bands: Sequence[str], channels: Sequence[str]) -> np.ndarray:
    """Stretched three-channel image of the named bands.

    Args:
        optical: `(bands, height, width)`.
        bands: names of the bands of `optical`, in order.
        channels: names of the bands for red, green and blue. Where the sensor lacks one of them its first, middle and
            last band stand in.

    Returns:
        `(height, width, 3)` float32 in [0, 1].
    """
    indices = [list(bands).index(name) for name in channels_shown(bands, channels)]
    return percentile_stretch(optical[indices], together=tuple(channels) == TRUE_COLOUR)


def channels_shown(bands: Sequence[str], channels: Sequence[str]) -> tuple[str, ...]:
    """Bands that `composite` shows as red, green and blue."""
    if set(channels) <= set(bands):
        return tuple(channels)
    return bands[0], bands[len(bands) // 2], bands[-1]


def composite_title(bands: Sequence[str], channels: Sequence[str]) -> str:
    """What a composite shows, in words; the names of the bands where it is none that has a name."""
    shown = channels_shown(bands, channels)
    names: dict[tuple[str, ...], str] = {
        TRUE_COLOUR: "true colour",
        FALSE_COLOUR: "false colour, near infrared as red",
    }
    return names.get(shown, f"{', '.join(shown)} as red, green, blue")


def draw_sar(axes: "Axes", backscatter: np.ndarray, band: str, units: str) -> None:
    """Draw one SAR band in grey between its 2nd and 98th percentile, with a scale.

    Args:
        axes: where to draw.
        backscatter: `(height, width)`.
        band: its name.
        units: its units, for the scale.
    """
    finite = backscatter[np.isfinite(backscatter)]
    low, high = np.percentile(finite, (2, 98)) if finite.size else (0, 1)
    image = axes.imshow(backscatter, cmap="gray", vmin=low, vmax=high)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label=UNIT_NAMES[units])
    axes.set_title(band, fontsize=9)


def plot_pair(
    pair: Pair, info: PairsInfo, *, channels: Sequence[str] = TRUE_COLOUR, colours: Mapping[str, str] = CLASS_COLOURS
) -> "Figure":
    """Draw one pair: a composite of the optical bands, each SAR band and, if there is one, the label map.

    Classes have a legend, quantities a colour bar.

    Args:
        pair: what to draw.
        info: band names, units and map classes of its dataset: `info` of its reader.
        channels: names of the bands for red, green and blue.
        colours: colours of map classes by name; others are chosen here. Pixels without a class are black.

    Returns:
        A matplotlib figure; write it with `figure.savefig("pair.png")`.

    Raises:
        ImportError: matplotlib is not installed; names the pip command.
    """
    panels = 1 + len(info.sar_bands) + (pair.label_map is not None)
    figure = new_figure(3.4 * panels + 1.5 * (pair.label_map is not None), 3.6)
    axes = figure.subplots(1, panels)
    axes[0].imshow(composite(pair.optical, info.optical_bands, channels))
    axes[0].set_title(composite_title(info.optical_bands, channels), fontsize=9)
    for axis, band, backscatter in zip(axes[1:], info.sar_bands, pair.sar, strict=False):
        draw_sar(axis, backscatter, band, info.sar_units)
    if pair.label_map is not None:
        axes[-1].set_title("label map", fontsize=9)
        if info.map_units:
            _draw_quantity(axes[-1], pair.label_map, info.map_units)
        else:
            _draw_classes(axes[-1], pair.label_map, info, colours)
    for axis in axes:
        axis.set_axis_off()
    title = plain_text(pair.id) + (" (simulated imagery)" if info.simulated else "")
    figure.suptitle("\n".join(filter(None, [title, "; ".join(pair.labels or [])])), fontsize=8)
    return figure


def plot_composite(pair: Pair, info: PairsInfo, channels: Sequence[str] = TRUE_COLOUR) -> "Figure":
    """One optical patch with three bands as red, green and blue, from their 2nd to their 98th percentile.

    Args:
        pair: what to draw.
        info: band names of its dataset.
        channels: names of the bands for red, green and blue. True colour has one stretch for all three, which keeps
            the hues; anything else one for each band.

    Raises:
        ValueError: `channels` are not three bands of the dataset.
    """
    missing = [name for name in channels if name not in info.optical_bands]
    if missing or len(channels) != 3:
        raise ValueError(
            f"A composite takes three optical bands, but {', '.join(channels)} were asked for; "
            f"{info.name} has {', '.join(info.optical_bands)}."
        )
    figure = new_figure(4.4, 4.7)
    axis = figure.subplots()
    axis.imshow(composite(pair.optical, info.optical_bands, channels))
    axis.set_axis_off()
    named = ", ".join(channels) + (f"; {units}" if (units := UNIT_NAMES[info.optical_units]) else "")
    axis.set_title(f"{composite_title(info.optical_bands, channels)}\n({named})", fontsize=9)
    figure.suptitle(pair_title(pair, info), fontsize=9)
    return figure


def plot_backscatter(pair: Pair, info: PairsInfo) -> "Figure":
    """Each SAR band in dB, and VV over VH, which is their difference in dB.

    Linear power is converted to dB; raw values are drawn as they are, without a ratio.

    Args:
        pair: what to draw.
        info: band names and units of its dataset.
    """
    sar, units = pair.sar.astype(np.float32), info.sar_units
    if units == "linear":
        sar, units = 10 * np.log10(np.where(sar > 0, sar, np.nan)), "db"
    panels = dict(zip(info.sar_bands, sar, strict=True))
    if units == "db" and {"VV", "VH"} <= panels.keys():
        panels["VV / VH"] = panels["VV"] - panels["VH"]
    figure = new_figure(3.6 * len(panels), 3.7)
    for axis, (name, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        draw_sar(axis, values, name, units)
        axis.set_axis_off()
    figure.suptitle(pair_title(pair, info), fontsize=9)
    return figure


def pair_title(pair: Pair, info: PairsInfo) -> str:
    """Name of a pair and of its dataset, for the title of a picture; says where the imagery is simulated."""
    return f"{plain_text(pair.id)} ({'simulated imagery' if info.simulated else info.name})"


def _draw_quantity(axes: "Axes", label_map: np.ndarray, units: str) -> None:
    """Draw values from zero (or the smallest, if below) to their 98th percentile, with a scale."""
    finite = label_map[np.isfinite(label_map)]
    low, high = (min(0.0, float(finite.min())), float(np.percentile(finite, 98))) if finite.size else (0.0, 1.0)
    image = axes.imshow(label_map, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6))
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label=units)


def _draw_classes(axes: "Axes", label_map: np.ndarray, info: PairsInfo, colours: Mapping[str, str]) -> None:
    """Draw the classes that occur, each in its colour, with a legend."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch as Swatch

    picture = np.zeros((*label_map.shape, 3))
    swatches = []
    for value in np.unique(label_map).tolist():
        if value == info.map_no_data:
            swatches.append(Swatch(color="black", label="no data"))
            continue
        name = info.map_class_names[value] if 0 <= value < len(info.map_class_names) else str(value)
        colour = to_rgb(colours.get(name, colormaps["tab20"](value % 20)))
        picture[label_map == value] = colour
        swatches.append(Swatch(color=colour, label=name))
    axes.imshow(picture, interpolation="nearest")
    axes.legend(handles=swatches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
