"""Looking into a folder of shards: what it holds, statistics of each band, classes, and pictures."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.files.plain_text import plain_text
from fusmae_hf.plots.pairs import FALSE_COLOUR, TRUE_COLOUR, composite, composite_title, draw_sar, new_figure
from fusmae_hf.preparation.statistics import (
    BandSummary,
    SensorBands,
    dataset_title,
    format_share,
    published_figures,
    read_batches,
    scale_in_words,
    spread_rows,
)
from fusmae_hf.shards.dataset_info import DatasetInfo, read_dataset_info
from fusmae_hf.shards.loading import StreamedPairDataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 12
MOST_REASONS = 5


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
    """

    folder: str
    dataset: DatasetInfo
    columns: dict[str, str]
    bands: tuple[BandSummary, ...]
    num_pairs: int
    pairs: tuple[Pair, ...]
    labels: dict[str, Counter[str]]
    labels_complete: bool

    def __str__(self) -> str:
        parts = [self._facts(), self._splits(), self._statistics(), *([self._classes()] if self.labels else [])]
        return "\n\n".join("\n".join(part) for part in parts)

    def _facts(self) -> Iterator[str]:
        info, left_out = self.dataset.info, self.dataset.num_left_out
        sar, optical = self.pairs[0].sar, self.pairs[0].optical
        facts = {
            "folder": self.folder,
            "dataset": dataset_title(info),
            "source": info.source,
            "licence": info.license,
            "SAR": f"{' '.join(info.sar_bands)}: {_size(sar)}, {info.sar_units}",
            "optical": f"{' '.join(info.optical_bands)}: {_size(optical)}, {info.optical_units}, "
            f"offset {info.optical_offset:g}",
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

    def _splits(self) -> Iterator[str]:
        yield f"{'split':<12}{'pairs':>9}{'shards':>9}{'row groups':>12}{'MB':>11}{'no data: SAR':>15}{'optical':>10}"
        area = self.pairs[0].sar[0].size
        for split, shards in self.dataset.splits.items():
            groups, size = sum(len(shard.row_group_rows) for shard in shards), sum(shard.bytes for shard in shards)
            rows, without = self.dataset.rows(split), self.dataset.no_data_pixels(split)
            shares = (format_share(min(without[sensor] / (rows * area), 1)) for sensor in ("sar", "optical"))
            yield (
                f"{split:<12}{rows:>9,}{len(shards):>9,}{groups:>12,}{size / 1e6:>11,.1f}{{:>15}}{{:>10}}".format(
                    *shares
                )
            )

    def _statistics(self) -> Iterator[str]:
        yield f"Bands over {self.num_pairs:,} of {_num_pairs(self.dataset):,} pairs"
        yield scale_in_words(self.dataset.info)
        info = self.dataset.info
        published = [published_figures(info, band.sensor, band.band) for band in self.bands]
        header = f"{'published mean':>18}{'std':>10}" if any(published) else ""
        yield f"{'band':<8}{'mean':>10}{'std':>10}{'min':>10}{'median':>10}{'max':>10}{'no data':>10}{header}"
        for band, figures in zip(self.bands, published, strict=True):
            shown = (band.mean, band.std, band.minimum, band.percentiles[50], band.maximum)
            yield (
                f"{band.band:<8}{''.join(f'{value:>10.2f}' for value in shown)}{format_share(band.no_data):>10}"
                + (f"{figures[0]:>18.2f}{figures[1]:>10.2f}" if figures else "")
            )

    def _classes(self) -> Iterator[str]:
        total = sum(self.labels.values(), Counter[str]())
        pairs = _num_pairs(self.dataset) if self.labels_complete else self.num_pairs
        splits = list(self.dataset.splits)
        shown = {name: textwrap.shorten(name, 48, placeholder=" ...") for name, _ in total.most_common(MOST_CLASSES)}
        width = max(map(len, [*shown.values(), "class"]))
        yield f"Classes over {pairs:,} pairs (a pair may have several)"
        yield f"{'class':<{width}}{''.join(f'{split:>12}' for split in splits)}{'share':>10}"
        for name, short in shown.items():
            counts = "".join(f"{self.labels[split][name]:>12,}" for split in splits)
            yield f"{short:<{width}}{counts}{format_share(total[name] / pairs):>10}"
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
    bands, pictured, count = SensorBands(dataset.info), list[Pair](), 0
    labels: dict[str, Counter[str]] = {split: Counter() for split in dataset.splits}
    with tqdm(total=total, unit=" pairs", desc="reading", disable=None if progress else True) as bar:
        for of_group in rows:
            split = of_group[0].split
            for batch in read_batches(of_group):
                bands.add(batch)
                size = len(batch["id"])
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
        tuple(bands.summaries()),
        count,
        tuple(pictured),
        labels if any(labels.values()) else {},
        complete,
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
            axes.imshow(composite(pair.optical, info.optical_bands, channels))
            axes.set_title(title, fontsize=8)
        for axes, band, backscatter in zip(row[len(titles) :], info.sar_bands, pair.sar, strict=True):
            draw_sar(axes, backscatter, band, info.sar_units)
        for axes in row:
            axes.set_axis_off()
        caption = "\n".join(filter(None, [f"{plain_text(pair.id)} ({pair.split})", shorten(pair.labels or [], 130)]))
        row[0].text(0, -0.04, caption, transform=row[0].transAxes, fontsize=7, va="top").set_in_layout(False)
    figure.suptitle(dataset_title(info), fontsize=10)
    return figure


def shorten(names: Iterable[str], characters: int = 160) -> str:
    """Join names by `"; "`, leaving out the last ones where the text would get too long."""
    text = "; ".join(names)
    return text if len(text) <= characters else text[:characters].rsplit(";", 1)[0] + "; ..."


def _pair(batch: dict, index: int, split: str, info: PairsInfo) -> Pair:
    """One pair of a batch, its optical bands on one grid."""
    optical = batch["optical"][index]
    if "optical_shape" in batch:
        optical = expand_bands(optical[None], info.optical_factors, *batch["optical_shape"][1:])[0]
    labels = batch["labels"][index] if "labels" in batch else None
    return Pair(batch["id"][index], batch["sar"][index].numpy(), optical.numpy(), labels=labels, split=split)


def _num_pairs(dataset: DatasetInfo) -> int:
    return sum(map(dataset.rows, dataset.splits))


def _short_type(kind: str) -> str:
    """Arrow's name of a list type as `element[length]`."""
    return re.sub(r"(?:fixed_size_)?list<\w+: (\w+)>(?:\[(\d+)\])?", r"\1[\2]", kind)


def _size(patch: np.ndarray) -> str:
    return f"{patch.shape[1]}x{patch.shape[2]} {patch.dtype}"
