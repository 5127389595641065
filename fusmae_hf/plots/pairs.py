"""Pictures of pairs: composites of the optical bands, backscatter in grey."""

from collections.abc import Sequence
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
    axes.figure.colorbar(image, ax=axes, shrink=0.8, label="dB" if units == "db" else units)
    axes.set_title(band, fontsize=9)


def plot_pair(pair: Pair, info: PairsInfo) -> "Figure":
    """Draw one pair: the optical patch in true colour, then each SAR band.

    Args:
        pair: what to draw.
        info: band names and units of its dataset.

    Returns:
        A matplotlib figure; write it with `figure.savefig("pair.png")`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(3.4 * (1 + len(info.sar_bands)), 3.6)
    axes = figure.subplots(1, 1 + len(info.sar_bands))
    axes[0].imshow(composite(pair.optical, info.optical_bands, TRUE_COLOUR))
    axes[0].set_title(composite_title(info.optical_bands, TRUE_COLOUR), fontsize=9)
    for axis, band, backscatter in zip(axes[1:], info.sar_bands, pair.sar, strict=True):
        draw_sar(axis, backscatter, band, info.sar_units)
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle("\n".join(filter(None, [plain_text(pair.id), "; ".join(pair.labels or [])])), fontsize=8)
    return figure
