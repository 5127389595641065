"""Looking into a folder of shards: what it holds, statistics of each band, and a picture of some pairs."""

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fusmae_hf.data.dataset_info import DatasetInfo, read_dataset_info
from fusmae_hf.data.loading import StreamedPairDataset
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.data.plotting import FALSE_COLOUR, TRUE_COLOUR, composite, draw_sar, new_figure
from fusmae_hf.modeling.sensors_fusmae import STATISTICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class BandSummary:
    """Statistics of one band over the pairs looked at, in the units of the shards.

    Pixels without data do not count: non-finite ones and, for the optical sensor, those that are zero in all bands.

    Attributes:
        sensor: `"sar"` or `"optical"`.
        band: its name.
        pixels: number of pixels.
        valid: number of pixels with data.
        minimum: smallest value.
        maximum: largest value.
    """

    sensor: str
    band: str
    pixels: int = 0
    valid: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)

    def add(self, band: np.ndarray, has_data: np.ndarray) -> None:
        """Take in one patch: `band` (height, width) and where it has data, `(height, width)` bool."""
        values = band[has_data & np.isfinite(band)].astype(np.float64)
        self.pixels += band.size
        if values.size:
            self.valid += values.size
            self._sum += float(values.sum())
            self._squares += float(np.square(values).sum())
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))

    @property
    def mean(self) -> float:
        """Mean over the pixels with data; no offset is subtracted. NaN where there are none."""
        return self._sum / self.valid if self.valid else math.nan

    @property
    def std(self) -> float:
        """Standard deviation over the pixels with data."""
        return math.sqrt(max(self._squares / self.valid - self.mean**2, 0)) if self.valid else math.nan

    @property
    def no_data(self) -> float:
        """Share of the pixels that hold no data, from 0 to 1."""
        return 1 - self.valid / self.pixels


@dataclass(frozen=True)
class Inspection:
    """What `inspect_shards` found; prints as a table.

    Attributes:
        folder: the folder or URL.
        dataset: content of its `dataset_info.json`.
        columns: names and types of the columns.
        bands: statistics of each band, SAR first.
        num_pairs: number of pairs that the statistics cover.
        pairs: some of them, spread over the dataset, for the picture.
    """

    folder: str
    dataset: DatasetInfo
    columns: dict[str, str]
    bands: tuple[BandSummary, ...]
    num_pairs: int
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        return "\n\n".join(("\n".join(self._facts()), "\n".join(self._splits()), "\n".join(self._statistics())))

    def _facts(self) -> Iterator[str]:
        info, left_out = self.dataset.info, len(self.dataset.left_out)
        sar, optical = self.pairs[0].sar, self.pairs[0].optical
        facts = {
            "folder": self.folder,
            "dataset": _title(info),
            "source": info.source,
            "licence": info.license,
            "SAR": f"{' '.join(info.sar_bands)}: {_size(sar)}, {info.sar_units}",
            "optical": f"{' '.join(info.optical_bands)}: {_size(optical)}, {info.optical_units}, "
            f"offset {info.optical_offset:g}",
            "classes": f"{len(info.class_names)}: {shorten(info.class_names)}" if info.class_names else "none",
            "schema": ", ".join(f"{name} {_short_type(kind)}" for name, kind in self.columns.items()),
            "left out": f"{left_out:,} pairs, listed in dataset_info.json" if left_out else "nothing",
        }
        for name, value in facts.items():
            yield textwrap.fill(
                value, 110, initial_indent=f"{name:<10}", subsequent_indent=" " * 10, break_long_words=False
            )

    def _splits(self) -> Iterator[str]:
        yield f"{'split':<12}{'pairs':>9}{'shards':>9}{'row groups':>12}{'MB':>11}"
        for split, shards in self.dataset.splits.items():
            groups, size = sum(len(shard.row_group_rows) for shard in shards), sum(shard.bytes for shard in shards)
            yield f"{split:<12}{self.dataset.rows(split):>9,}{len(shards):>9,}{groups:>12,}{size / 1e6:>11,.1f}"

    def _statistics(self) -> Iterator[str]:
        yield f"Bands over {self.num_pairs:,} of {_num_pairs(self.dataset):,} pairs, in the units of the files"
        known = STATISTICS.get(self.dataset.info.statistics or "")
        published = f"{'published mean':>18}{'std':>10}" if known else ""
        yield f"{'band':<8}{'mean':>10}{'std':>10}{'min':>10}{'max':>10}{'no data':>10}{published}"
        for band in self.bands:
            figures = getattr(known, band.sensor).get(band.band) if known else None
            yield (
                f"{band.band:<8}{band.mean:>10.2f}{band.std:>10.2f}{band.minimum:>10.2f}{band.maximum:>10.2f}"
                f"{band.no_data:>10.2%}" + (f"{figures[0]:>18.2f}{figures[1]:>10.2f}" if figures else "")
            )


def inspect_shards(folder: str, *, max_pairs: int = 256, num_pictured: int = 6) -> Inspection:
    """Read some pairs, spread evenly over all row groups, and summarise them.

    Args:
        folder: a folder written by `fusmae prepare`, or a URL that fsspec knows.
        max_pairs: most pairs to read.
        num_pictured: number of pairs to keep for `contact_sheet`, at least one.

    Raises:
        FileNotFoundError: the folder holds no `dataset_info.json`, or a shard is missing.
        ValueError: a shard is truncated or damaged, or a number is below one.
    """
    if min(max_pairs, num_pictured) < 1:
        raise ValueError(f"{max_pairs=} and {num_pictured=} must be at least 1.")
    dataset = read_dataset_info(folder)
    info = dataset.info
    sar_bands = [BandSummary("sar", band) for band in info.sar_bands]
    optical_bands = [BandSummary("optical", band) for band in info.optical_bands]
    pairs = [StreamedPairDataset(folder, dataset, split, mix=1) for split in dataset.splits]
    pictured_at = set(np.linspace(0, min(max_pairs, _num_pairs(dataset)) - 1, num_pictured).round().tolist())
    pictured, count = [], 0
    for pair in _spread_pairs(pairs, max_pairs):
        for bands, patch, has_data in (
            (sar_bands, pair.sar, np.isfinite(pair.sar).all(axis=0)),
            (optical_bands, pair.optical, (pair.optical != 0).any(axis=0)),
        ):
            for summary, values in zip(bands, patch, strict=True):
                summary.add(values, has_data)
        if count in pictured_at:
            pictured.append(pair)
        count += 1
    columns = {column.name: str(column.type) for column in pairs[0].read_row_group(0).schema}
    return Inspection(folder, dataset, columns, (*sar_bands, *optical_bands), count, tuple(pictured))


def contact_sheet(pairs: Sequence[Pair], info: PairsInfo) -> "Figure":
    """Draw pairs below each other: true colour, false colour (near infrared as red), then each SAR band.

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
    columns = 2 + len(info.sar_bands)
    height = 2.9 * len(pairs) + 0.6
    figure = new_figure(2.8 * columns, height)
    # Captions hang below the axes and take no part in the layout: leave room between rows and at the bottom.
    figure.set_layout_engine("constrained", hspace=0.16, rect=(0, 0.35 / height, 1, 1 - 0.35 / height))
    for row, pair in zip(figure.subplots(len(pairs), columns, squeeze=False), pairs, strict=True):
        row[0].imshow(composite(pair.optical, info.optical_bands, TRUE_COLOUR))
        row[0].set_title("true colour", fontsize=8)
        row[1].imshow(composite(pair.optical, info.optical_bands, FALSE_COLOUR))
        row[1].set_title("false colour, near infrared as red", fontsize=8)
        for axes, band, backscatter in zip(row[2:], info.sar_bands, pair.sar, strict=True):
            draw_sar(axes, backscatter, band, info.sar_units)
        for axes in row:
            axes.set_axis_off()
        caption = "\n".join(filter(None, [f"{pair.id} ({pair.split})", shorten(pair.labels or [], 130)]))
        row[0].text(0, -0.04, caption, transform=row[0].transAxes, fontsize=7, va="top").set_in_layout(False)
    figure.suptitle(_title(info), fontsize=10)
    return figure


def shorten(names: Iterable[str], characters: int = 160) -> str:
    """Join names by `"; "`, leaving out the last ones where the text would get too long."""
    text = "; ".join(names)
    return text if len(text) <= characters else text[:characters].rsplit(";", 1)[0] + "; ..."


def _title(info: PairsInfo) -> str:
    """Name of the dataset; made-up imagery is always called so."""
    return f"{info.name} (simulated)" if info.simulated and "simulated" not in info.name else info.name


def _num_pairs(dataset: DatasetInfo) -> int:
    return sum(map(dataset.rows, dataset.splits))


def _short_type(kind: str) -> str:
    """Arrow's name of a list type as `element[length]`."""
    return re.sub(r"(?:fixed_size_)?list<\w+: (\w+)>(?:\[(\d+)\])?", r"\1[\2]", kind)


def _size(patch: np.ndarray) -> str:
    return f"{patch.shape[1]}x{patch.shape[2]} {patch.dtype}"


def _spread_pairs(datasets: Sequence[StreamedPairDataset], max_pairs: int) -> Iterator[Pair]:
    """At most `max_pairs` pairs out of row groups that are spread evenly over all splits."""
    groups: list[tuple[StreamedPairDataset, range]] = []
    for pairs in datasets:
        sizes = [rows for shard in pairs.dataset_info.shards(pairs.split) for rows in shard.row_group_rows]
        ends = np.cumsum(sizes).tolist()
        groups += [(pairs, range(end - rows, end)) for end, rows in zip(ends, sizes, strict=True)]
    wanted = min(len(groups), math.ceil(max_pairs * len(groups) / sum(map(len, datasets))))
    remaining = max_pairs
    for index in np.linspace(0, len(groups) - 1, wanted).round().astype(int):
        pairs, rows = groups[index]
        for row in rows[:remaining]:
            item = pairs[row]
            sar, optical = item["sar"].numpy(), item["optical"].numpy()
            yield Pair(item["id"], sar, optical, labels=item.get("labels"), split=pairs.split)
        remaining -= len(rows[:remaining])
