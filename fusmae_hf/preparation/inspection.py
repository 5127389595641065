"""Looking into a folder of shards: what it holds, statistics of each band, classes, pictures and histograms."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from fusmae_hf.data.findings import recorded_findings
from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.data.plausibility import PairSample
from fusmae_hf.files.plain_text import plain_text
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_WAVELENGTH, STATISTICS
from fusmae_hf.plots.pairs import FALSE_COLOUR, TRUE_COLOUR, composite, composite_title, draw_sar, new_figure
from fusmae_hf.preparation.bands import BandSummary, SensorBands, read_batches, spread_rows, there
from fusmae_hf.preparation.statistics import dataset_title, format_share, published_figures, scale_in_words
from fusmae_hf.shards.dataset_info import DatasetInfo, read_dataset_info
from fusmae_hf.shards.loading import StreamedPairDataset
from fusmae_hf.vocabulary import SENSORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 12
MOST_REASONS = 5

COLUMNS = 4
BINS = 80

TAIL = 1.0
"""Percent of the values of a band that may lie beyond either end of the horizontal axis."""

_COLOURS = {"sar": "#5b6b8c", "optical": "#4c8c5b"}
_UNITS = {"db": "dB", "linear": "dB", "dn": "DN", "reflectance": "DN", "raw": ""}


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shards` found; prints as a table.

    Attributes:
        folder: the folder or URL.
        dataset: content of its `dataset_info.json`.
        columns: names and types of the columns.
        bands: statistics of each band, SAR first, in the scale of the image processor: see `BandSummary`.
        num_pairs: number of pairs that the statistics cover.
        pairs: some of them, spread over the dataset, for the picture.
        labels: number of pairs of each class by split; of the whole folder, of a URL over the pairs looked at. Empty
            where there are no labels.
        labels_complete: True where `labels` counts all pairs.
        odd: what does not look as declared: in all pairs where `prepare` recorded it, else in those looked at.
    """

    folder: str
    dataset: DatasetInfo
    columns: dict[str, str]
    bands: tuple[BandSummary, ...]
    num_pairs: int
    pairs: tuple[Pair, ...]
    labels: dict[str, Counter[str]]
    labels_complete: bool
    odd: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self._facts(), self._splits(), self._statistics(), *([self._classes()] if self.labels else [])]
        return "\n\n".join("\n".join(part) for part in parts)

    def _facts(self) -> Iterator[str]:
        info, left_out = self.dataset.info, self.dataset.num_left_out
        sar, optical = (
            next((pixels for pair in self.pairs if (pixels := getattr(pair, sensor)) is not None), None)
            for sensor in SENSORS
        )
        facts = {
            "folder": self.folder,
            "dataset": dataset_title(info),
            "source": info.source,
            "licence": info.license,
            "SAR": f"{' '.join(info.sar_bands)}: {_size(sar)}, {info.sar_units}",
            "optical": f"{' '.join(info.optical_bands)}: {_size(optical)}, {info.optical_units}, "
            f"offset {info.optical_offset:g}",
            **({"by scene": f"{', '.join(info.per_scene)}: the rows tell"} if info.per_scene else {}),
            "classes": f"{len(info.class_names)}: {shorten(info.class_names)}" if info.class_names else "none",
            "schema": ", ".join(f"{name} {_short_type(kind)}" for name, kind in self.columns.items()),
            "left out": f"{left_out:,} pairs, listed in left_out.csv" if left_out else "nothing",
        }
        for name, value in facts.items():
            yield textwrap.fill(
                value, 110, initial_indent=f"{name:<10}", subsequent_indent=" " * 10, break_long_words=False
            )
        for reason, count in islice(self.dataset.left_out_reasons.items(), MOST_REASONS):
            yield f"{count:>17,}  {reason}"
        for found in self.odd:
            yield textwrap.fill(f"warning: {found}", 110, subsequent_indent=" " * 10, break_long_words=False)

    def _splits(self) -> Iterator[str]:
        lacking = any(any(self.dataset.absent(split).values()) for split in self.dataset.splits)
        lines = [
            ["split", "pairs", "shards", "row groups", "MB", "no data: SAR", "optical", "without: SAR", "optical"]
        ]
        height, width = self.pairs[0].size
        for split, shards in self.dataset.splits.items():
            groups, size = sum(len(shard.row_group_rows) for shard in shards), sum(shard.bytes for shard in shards)
            rows, without = self.dataset.rows(split), self.dataset.no_data_pixels(split)
            absent = self.dataset.absent(split)
            areas = {sensor: max(rows - absent[sensor], 1) * height * width for sensor in SENSORS}
            shares = [format_share(min(without[sensor] / areas[sensor], 1)) for sensor in SENSORS]
            counts = [f"{number:,}" for number in (rows, len(shards), groups)]
            lines.append([split, *counts, f"{size / 1e6:,.1f}", *shares, *(f"{absent[s]:,}" for s in SENSORS)])
        yield from _aligned(lines if lacking else [line[:7] for line in lines])

    def _statistics(self) -> Iterator[str]:
        yield f"Bands over {self.num_pairs:,} of {_num_pairs(self.dataset):,} pairs"
        yield scale_in_words(self.dataset.info)
        info = self.dataset.info
        published = [published_figures(info, band.sensor, band.band) for band in self.bands]
        rows = [["band", "mean", "std", "min", "median", "max", "no data", "published mean", "std"]]
        for band, figures in zip(self.bands, published, strict=True):
            shown = (band.mean, band.std, band.minimum, band.percentiles[50], band.maximum)
            rows.append([band.band, *map(_figure, shown), format_share(band.no_data), *map(_figure, figures or ())])
        yield from _aligned(rows if any(published) else [row[:7] for row in rows])

    def _classes(self) -> Iterator[str]:
        total = sum(self.labels.values(), Counter[str]())
        pairs = _num_pairs(self.dataset) if self.labels_complete else self.num_pairs
        splits = list(self.dataset.splits)
        shown = {name: textwrap.shorten(name, 48, placeholder=" ...") for name, _ in total.most_common(MOST_CLASSES)}
        yield f"Classes over {pairs:,} pairs (a pair may have several)"
        rows = [["class", *splits, "share"]]
        for name, short in shown.items():
            counts = (f"{self.labels[split][name]:,}" for split in splits)
            rows.append([short, *counts, format_share(total[name] / pairs)])
        yield from _aligned(rows)
        if len(total) > MOST_CLASSES:
            yield f"and {len(total) - MOST_CLASSES:,} rarer ones"
        if never := [name for name in self.dataset.info.class_names if name not in total]:
            yield textwrap.fill(f"Never: {shorten(never, 400)}", 110)


def inspect_shards(folder: str, *, max_pairs: int = 256, num_pictured: int = 6, progress: bool = False) -> Inspection:
    """Read some pairs, spread evenly over all row groups, and summarise them.

    Args:
        folder: a folder written by `fusmae prepare`, or a URL that fsspec knows.
        max_pairs: most pairs to read.
        num_pictured: number of pairs to keep for `contact_sheet`, at least one.
        progress: show a progress bar where the output is a terminal.

    Raises:
        FileNotFoundError: the folder holds no `dataset_info.json`, or a shard is missing.
        ValueError: a shard is truncated or damaged, or a number is below one.
    """
    if min(max_pairs, num_pictured) < 1:
        raise ValueError(f"{max_pairs=} and {num_pictured=} must be at least 1.")
    dataset = read_dataset_info(folder)
    opened = {split: StreamedPairDataset(folder, dataset, split, mix=1) for split in dataset.splits}
    rows = spread_rows(list(opened.values()), max_pairs)
    total = sum(number for _, _, number in rows)
    pictured_at = set(np.linspace(0, total - 1, num_pictured).round().astype(int).tolist())
    bands, pictured, count, values = SensorBands(dataset.info), list[Pair](), 0, PairSample(dataset.info, 0)
    recorded = all(shard.plausibility for split in dataset.splits for shard in dataset.shards(split))
    labels: dict[str, Counter[str]] = {split: Counter() for split in dataset.splits}
    with tqdm(total=total, unit=" pairs", desc="reading", disable=None if progress else True) as bar:
        for of_group in rows:
            split = of_group[0].split
            for batch in read_batches(of_group):
                bands.add(batch)
                size = len(batch["id"])
                for at in () if recorded else range(size):
                    values.add(_pair(batch, at, split, dataset.info))
                for at in sorted(pictured_at.intersection(range(count, count + size))):
                    pictured.append(_pair(batch, at - count, split, dataset.info))
                for names in batch.get("labels", ()):
                    labels[split].update(set(names or ()))
                count += size
                bar.update(size)
    complete = "://" not in folder
    if complete:
        labels = {split: _count_labels(pairs) for split, pairs in opened.items()}
    return Inspection(
        folder,
        dataset,
        {column.name: str(column.type) for column in rows[0][0].read_row_group(rows[0][1]).schema},
        bands.summaries(),
        count,
        tuple(pictured),
        labels if any(labels.values()) else {},
        complete,
        tuple(dataset.odd_values() if recorded else recorded_findings([values.record()])),
    )


def _count_labels(pairs: StreamedPairDataset) -> Counter[str]:
    """Number of pairs of each class in a split; only the column of labels is read."""
    counts: Counter[str] = Counter()
    for rows in pairs.read_columns(["labels"]):
        names = pc.list_flatten(rows.column("labels"))
        counts.update({entry["values"]: entry["counts"] for entry in pc.value_counts(names).to_pylist()})
    return counts


def contact_sheet(pairs: Sequence[Pair], info: PairsInfo) -> "Figure":
    """Draw pairs below each other: true colour, false colour (near infrared as red), then each SAR band.

    Where bands for a composite are missing, others stand in, and the title names them.

    Args:
        pairs: what to draw, one row each.
        info: band names and units of their dataset.

    Returns:
        A matplotlib figure; write it with `figure.savefig("pairs.png")`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no pair.
    """
    if not pairs:
        raise ValueError("There is no pair to draw.")
    titles = {composite_title(info.optical_bands, channels): channels for channels in (TRUE_COLOUR, FALSE_COLOUR)}
    columns = len(titles) + len(info.sar_bands)
    height = 2.9 * len(pairs) + 0.6
    figure = new_figure(2.8 * columns, height)
    # Captions hang below the axes and take no part in the layout: leave room between rows and at the bottom.
    figure.set_layout_engine("constrained", hspace=0.16, rect=(0, 0.35 / height, 1, 1 - 0.35 / height))
    for row, pair in zip(figure.subplots(len(pairs), columns, squeeze=False), pairs, strict=True):
        for axes, (title, channels) in zip(row, titles.items(), strict=False):
            if pair.optical is not None:
                axes.imshow(composite(pair.optical, info.optical_bands, channels))
            axes.set_title(title if pair.optical is not None else "no optical image", fontsize=8)
        for axes, band, number in zip(row[len(titles) :], info.sar_bands, range(len(info.sar_bands)), strict=True):
            if pair.sar is not None:
                draw_sar(axes, pair.sar[number], band, info.sar_units)
            else:
                axes.set_title("no SAR image", fontsize=8)
        for axes in row:
            axes.set_axis_off()
        caption = "\n".join(filter(None, [f"{plain_text(pair.id)} ({pair.split})", shorten(pair.labels or [], 130)]))
        row[0].text(0, -0.04, caption, transform=row[0].transAxes, fontsize=7, va="top").set_in_layout(False)
    figure.suptitle(dataset_title(info), fontsize=10)
    return figure


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
        edges = _edges_of_bins(of_sensor)
        panels = part.subplots(rows, columns, squeeze=False).ravel()
        for panel, band in zip(panels, of_sensor, strict=False):
            handles |= _draw_histogram(panel, band, edges, published_figures(info, sensor, band.band))
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


def _edges_of_bins(bands: Sequence[BandSummary]) -> np.ndarray:
    """Edges of the bins that the bands of a sensor share."""
    low = min(band.distribution.percentile(TAIL) for band in bands if band.distribution)
    high = max(band.distribution.percentile(100 - TAIL) for band in bands if band.distribution)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, BINS + 1)


def _draw_histogram(
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


def shorten(names: Iterable[str], characters: int = 160) -> str:
    """Join names by `"; "`, leaving out the last ones where the text would get too long."""
    text = "; ".join(names)
    return text if len(text) <= characters else text[:characters].rsplit(";", 1)[0] + "; ..."


def _pair(batch: dict, index: int, split: str, info: PairsInfo) -> Pair:
    """One pair of a batch, its optical bands on one grid."""
    sar, optical = (batch[sensor][index] if there(batch, sensor) else None for sensor in SENSORS)
    if optical is not None and "optical_shape" in batch:
        optical = expand_bands(optical[None], info.optical_factors, *batch["optical_shape"][1:])[0]
    labels = batch["labels"][index] if "labels" in batch else None
    sar, optical = (None if pixels is None else pixels.numpy() for pixels in (sar, optical))
    label_map = batch["label_map"][index].numpy() if "label_map" in batch else None
    return Pair(batch["id"][index], sar, optical, labels, label_map, split)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: the first column to the left, the others to the right, two spaces or more between them."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.ljust(widths[0]) if not column else cell for column, cell in enumerate(row))
        yield first + "".join(cell.rjust(max(width, 8) + 2) for cell, width in zip(others, widths[1:], strict=False))


def _figure(value: float) -> str:
    """A number with two decimals; one of more than eight digits by its power of ten."""
    return f"{value:.2f}" if not abs(value) >= 1e8 else f"{value:.3e}"


def _num_pairs(dataset: DatasetInfo) -> int:
    return sum(map(dataset.rows, dataset.splits))


def _short_type(kind: str) -> str:
    """Arrow's name of a list type as `element[length]`."""
    return re.sub(r"(?:fixed_size_)?list<\w+: (\w+)>(?:\[(\d+)\])?", r"\1[\2]", kind)


def _size(patch: np.ndarray | None) -> str:
    if patch is None:
        return "in none of these pairs"
    return f"{patch.shape[1]}x{patch.shape[2]} {patch.dtype}"
