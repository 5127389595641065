"""Histograms of the bands of a dataset, against published statistics where there are any."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_WAVELENGTH, STATISTICS
from fusmae_hf.plots.pairs import new_figure
from fusmae_hf.preparation.statistics import BandSummary, dataset_title, published_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
BINS = 80

TAIL = 1.0
"""Percent of the values of a band that may lie beyond either end of the horizontal axis."""

_COLOURS = {"sar": "#5b6b8c", "optical": "#4c8c5b"}
_UNITS = {"db": "dB", "linear": "dB", "dn": "DN", "reflectance": "DN", "raw": ""}


def band_histograms(bands: Sequence[BandSummary], info: PairsInfo, num_pairs: int) -> "Figure":
    """Draw how the values of each band are distributed, a panel a band, SAR bands in a row of their own.

    The panels of a sensor share their horizontal axis, so that bands can be compared; up to `TAIL` percent of the
    values of a band lie beyond either end. The vertical axis is the share of the pixels with data, and each panel has
    its own.

    Args:
        bands: what `inspect_shards` or `band_statistics` found.
        info: of their dataset.
        num_pairs: number of pairs that they cover.

    Returns:
        A matplotlib figure; write it with `figure.savefig("histograms.png")`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no band has any data.
    """
    drawn = [
        (sensor, of_sensor)
        for sensor in ("sar", "optical")
        if (of_sensor := [band for band in bands if band.sensor == sensor and band.valid and band.distribution])
    ]
    if not drawn:
        raise ValueError("There is no band with data to draw.")
    rows_of = [-(-len(of_sensor) // COLUMNS) for _, of_sensor in drawn]
    columns = min(COLUMNS, max(len(of_sensor) for _, of_sensor in drawn))
    figure = new_figure(3.1 * columns, 1.9 * sum(rows_of) + 1.0)
    handles: dict[str, Any] = {}
    parts = figure.subfigures(len(drawn), 1, squeeze=False, height_ratios=rows_of)[:, 0]
    for part, rows, (sensor, of_sensor) in zip(parts, rows_of, drawn, strict=True):
        edges = _edges(of_sensor)
        panels = part.subplots(rows, columns, squeeze=False).ravel()
        for panel, band in zip(panels, of_sensor, strict=False):
            handles |= _draw(panel, band, edges, published_figures(info, sensor, band.band))
        for panel in panels[len(of_sensor) :]:
            panel.set_axis_off()
        units = _UNITS[info.sar_units if sensor == "sar" else info.optical_units]
        offset = info.optical_offset if sensor == "optical" else 0
        subtracted = f", offset {offset:g} subtracted" if offset else ""
        for panel in panels[max(0, len(of_sensor) - columns) : len(of_sensor)]:
            panel.set_xlabel(f"{units or 'value'}{subtracted}", fontsize=8)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    title = f"{dataset_title(info)}: share of pixels by value, over {num_pairs:,} pairs"
    if info.statistics and "published mean" in handles:
        title += f"; published: {STATISTICS[info.statistics].source}"
    figure.suptitle(title, fontsize=9)
    return figure


def _edges(bands: Sequence[BandSummary]) -> np.ndarray:
    """Edges of the bins that the bands of a sensor share."""
    low = min(band.distribution.percentile(TAIL) for band in bands if band.distribution)
    high = max(band.distribution.percentile(100 - TAIL) for band in bands if band.distribution)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1)


def _draw(
    panel: "Axes", band: BandSummary, edges: np.ndarray, published: tuple[float, float] | None
) -> dict[str, Any]:
    """Draw one band; its legend entries by name."""
    assert band.distribution
    shares = 100 * np.diff(band.distribution.below(edges)) / band.valid
    panel.stairs(shares, edges, fill=True, color=_COLOURS[band.sensor], alpha=0.85)
    handles = {"mean here": panel.axvline(band.mean, color="black", linewidth=1.2)}
    if published is not None:
        handles["published mean"] = panel.axvline(published[0], color="#d1495b", linewidth=1.4, linestyle="--")
    wavelength = f" ({OPTICAL_WAVELENGTH[band.band]} nm)" if band.band in OPTICAL_WAVELENGTH else ""
    panel.set_title(f"{band.band}{wavelength}", fontsize=9, loc="left")
    decimals = 1 if band.sensor == "sar" else 0
    figures = f"mean {band.mean:.{decimals}f}\nstd {band.std:.{decimals}f}"
    if published is not None:
        figures += f"\npublished {published[0]:.{decimals}f}\nstd {published[1]:.{decimals}f}"
    third = BINS // 3
    x, side = (0.02, "left") if shares[:third].max() < shares[-third:].max() else (0.98, "right")  # the emptier one
    panel.text(x, 0.97, figures, transform=panel.transAxes, ha=side, va="top", fontsize=7)
    panel.set_xlim(edges[0], edges[-1])
    panel.set_ylim(0, max(shares.max() * 1.08, 1e-9))
    panel.tick_params(labelsize=7)
    panel.yaxis.set_major_formatter("{x:g} %")
    panel.locator_params(axis="y", nbins=3)
    panel.locator_params(axis="x", nbins=6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return handles
