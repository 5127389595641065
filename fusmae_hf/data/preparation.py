"""Preparing a dataset: reading every pair once and writing shards, with each pair that is left out accounted for."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from fusmae_hf.modeling.sensors_fusmae import BASELINE_0400_OFFSET

from .dataset_info import FILE_NAME, DatasetInfo, ShardRecord, write_dataset_info
from .pairs import Pair, PairError, PairReader, PairsInfo
from .shards import check_pair, write_shard

SPLITS = ("train", "validation", "test")

PLAUSIBILITY_PAIRS = 32
"""Number of pairs whose values are looked at before anything is written."""

HOPELESS_AFTER = 20
"""So many failures before the first success mean that the archive, not a pair, is at fault."""

_VISIBLE_BANDS = ("B02", "B03", "B04")


@dataclass(frozen=True)
class PreparationReport:
    """What `prepare` did.

    Attributes:
        folder: where the shards are.
        dataset: content of `dataset_info.json`: shards by split, and pairs left out with their reasons.
        seconds: how long it took.
    """

    folder: Path
    dataset: DatasetInfo
    seconds: float

    def __str__(self) -> str:
        shards = list(chain.from_iterable(self.dataset.splits.values()))
        pairs, size = sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards)
        lines = [
            f"Prepared {self.dataset.info.name}: {pairs:,} pairs, {size / 1e6:,.1f} MB, in {self.seconds:,.1f} s "
            f"({pairs / self.seconds:,.0f} pairs/s)"
        ]
        for split, of_split in self.dataset.splits.items():
            files = "1 shard" if len(of_split) == 1 else f"{len(of_split):,} shards"
            lines.append(f"  {split:<11}{self.dataset.rows(split):>9,} pairs in {files}")
        left_out = self.dataset.left_out
        if left_out:
            lines.append(f"Left out: {len(left_out):,} (all of them, with the reason, in {self.folder / FILE_NAME})")
            examples = {reason: name for name, reason in reversed(left_out)}
            reasons = Counter(reason for _, reason in left_out).most_common()
            lines += [f"  {count:>9,}  {reason}, such as {examples[reason]}" for reason, count in reasons[:5]]
            lines += [f"  and {len(reasons) - 5:,} more reasons"] * (len(reasons) > 5)
        return "\n".join(lines)


def prepare(
    reader: PairReader,
    out: str | Path,
    *,
    limit: int | None = None,
    rows_per_shard: int = 1024,
    row_group_rows: int = 32,
    on_error: Literal["skip", "stop"] = "skip",
    hold_out: float = 0.0,
    keep_order: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PreparationReport:
    """Write all pairs of a dataset as shards, each split apart, and `dataset_info.json` last.

    Pairs are written in a random order (always the same one), so that neighbouring patches do not share a row group
    and with it a batch when the shards are streamed. The first pairs are looked at before anything is written: see
    [`check_plausible`].

    Args:
        reader: the dataset. Pairs without a split go to `train`, but see `hold_out`.
        out: folder for the shards; made if need be.
        limit: write at most so many pairs, drawn over the whole dataset (the first ones with `keep_order`).
        rows_per_shard: most pairs in a file.
        row_group_rows: pairs in a row group, the unit that streaming reads.
        on_error: what to do with a pair that cannot be read or must not be stored: `"skip"` leaves it out and notes
            the reason in `dataset_info.json`, `"stop"` raises.
        hold_out: share of the pairs without a split that goes to `validation`, drawn at random (always the same way)
            and at least one; the others go to `train`. Neighbouring patches may fall on both sides: where a dataset
            has official splits, those are the fair ones.
        keep_order: write pairs in the order of the reader.
        overwrite: delete the shards that are in `out` first. Other files are left alone.
        progress: show a progress bar where the output is a terminal.

    Returns:
        A report that prints as a short summary.

    Raises:
        FileExistsError: `out` is not empty and `overwrite` is not set.
        PairError: a pair failed and `on_error` is `"stop"`, or the first 20 pairs failed and none succeeded.
        ValueError: no pair could be written, `limit` is below one, `hold_out` is no share, or the values contradict
            the declared units.
        OSError: the disk is full, or a file cannot be written. Only complete files stay behind, without
            `dataset_info.json`.
    """
    started, folder = time.monotonic(), Path(out)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but must be at least 1.")
    if on_error not in ("skip", "stop"):
        raise ValueError(f"on_error is {on_error!r}, but must be 'skip' or 'stop'.")
    if not 0 <= hold_out < 1:
        raise ValueError(f"hold_out is {hold_out}, but must be a share: at least 0 and below 1.")
    order = np.arange(len(reader)) if keep_order else np.random.default_rng(0).permutation(len(reader))
    chosen = _by_split(reader, order[:limit].tolist(), hold_out)
    _make_room(folder, overwrite)
    left_out, shards, outcome = list(reader.left_out()), list[ShardRecord](), Counter[str]()
    bar = tqdm(total=sum(map(len, chosen.values())), unit=" pairs", disable=None if progress else True)
    with bar:
        for split, indices in chosen.items():
            bar.set_description(split)
            pairs = _readable(reader, indices, on_error, left_out, outcome, bar)
            first = list(islice(pairs, PLAUSIBILITY_PAIRS))
            if not first:
                continue
            if not shards:
                check_plausible(first, reader.info)
            pairs, files = chain(first, pairs), math.ceil(len(indices) / rows_per_shard)
            for number in range(files):
                name = f"data/{split}-{number:05d}-of-{files:05d}.parquet"
                of_file = islice(pairs, math.ceil(len(indices) / files))
                shard = write_shard(of_file, reader.info, folder, name, row_group_rows=row_group_rows)
                shards += [shard] if shard else []
    if not shards:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out[-3:])
        raise ValueError(f"{reader.info.name}: no pair could be written. The last reasons: {reasons}")
    dataset = write_dataset_info(folder, reader.info, shards, left_out)
    return PreparationReport(folder, dataset, max(time.monotonic() - started, 1e-3))


def check_plausible(pairs: Sequence[Pair], info: PairsInfo) -> None:
    """Compare values with the declared units, offset and band order.

    Warns (`UserWarning`) where

    - the mean of VH is above the mean of VV: VV is some 6 to 7 dB brighter, so the bands look swapped;
    - 99 % of the blue, green and red digital numbers are 1000 or more although no offset is declared: the data look
      like processing baseline 04.00 or later, which adds 1000;
    - most of them are below the declared offset: it looks as if none had been added.

    Args:
        pairs: some pairs of the dataset.
        info: what is declared.

    Raises:
        ValueError: SAR is declared in dB but has no negative value, or as linear power but has negative ones.
    """
    over = f"over {len(pairs)} pairs of {info.name}"
    backscatter = {
        band: _finite(np.concatenate([pair.sar[index].ravel() for pair in pairs]))
        for index, band in enumerate(info.sar_bands)
    }
    lowest = min(values.min() for values in backscatter.values() if values.size)
    if info.sar_units == "db" and lowest >= 0:
        raise ValueError(
            f"SAR is declared in dB, but {over} no value is negative (lowest {lowest:g}): this looks like linear "
            "power. Convert the files with 10*log10(x), or declare `sar_units` as 'linear'."
        )
    if info.sar_units == "linear" and lowest < 0:
        raise ValueError(
            f"SAR is declared as linear power, but {over} there are negative values (lowest {lowest:g}): this looks "
            "like dB. Declare `sar_units` as 'db'."
        )
    vv, vh = (float(np.mean(backscatter[band])) if band in backscatter else np.nan for band in ("VV", "VH"))
    if vh > vv:
        warnings.warn(
            f"Bands swapped? VH (mean {vh:.2f} {over}) is brighter than VV (mean {vv:.2f}), but in nature VV is "
            "brighter almost everywhere. Check which file or band is which.",
            stacklevel=2,
        )
    visible = [info.optical_bands.index(band) for band in _VISIBLE_BANDS if band in info.optical_bands]
    if info.optical_units != "dn" or not visible:
        return
    values = np.concatenate([pair.optical[visible][:, (pair.optical != 0).any(axis=0)].ravel() for pair in pairs])
    low, middle = np.percentile(_finite(values), (1, 50))
    if info.optical_offset == 0 and low >= BASELINE_0400_OFFSET:
        warnings.warn(
            f"Offset forgotten? 99 % of the values of B02 to B04 {over} are {low:.0f} or more, as if "
            f"{BASELINE_0400_OFFSET} had been added (processing baseline 04.00 and later). If so, declare it with "
            f"`--optical-offset {BASELINE_0400_OFFSET}` (`optical_offset` in Python).",
            stacklevel=2,
        )
    if middle < info.optical_offset:
        warnings.warn(
            f"Offset declared in vain? Half of the values of B02 to B04 {over} are below {middle:.0f}, less than the "
            f"declared offset {info.optical_offset:g}. If none was added, drop `--optical-offset`.",
            stacklevel=2,
        )


def _by_split(reader: PairReader, order: Sequence[int], hold_out: float) -> dict[str, list[int]]:
    """Pairs of each split, in the given order."""
    split_of = {index: reader.split_of(index) for index in order}
    unassigned = [index for index in order if split_of[index] is None]
    if hold_out and unassigned:
        number = max(1, round(hold_out * len(unassigned)))
        split_of |= dict.fromkeys(
            np.random.default_rng(0).permutation(sorted(unassigned))[:number].tolist(), "validation"
        )
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index in order:
        split = split_of[index] or "train"
        if split not in chosen:
            raise ValueError(f"{reader.ids[index]} has the split {split!r}, but one of {list(SPLITS)} is needed.")
        chosen[split].append(index)
    return chosen


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _readable(
    reader: PairReader,
    indices: Sequence[int],
    on_error: str,
    left_out: list[tuple[str, str]],
    outcome: Counter[str],
    bar: tqdm,
) -> Iterator[Pair]:
    """Read pairs; those that fail are appended to `left_out` or raise."""
    for index in indices:
        try:
            pair = reader.read(index)
            check_pair(pair, reader.info)
        except PairError as error:
            if on_error == "stop":
                raise
            outcome["failed"] += 1
            left_out.append((reader.ids[index], str(error)))
            bar.set_postfix_str(f"{outcome['failed']:,} failed")
            if outcome["failed"] == HOPELESS_AFTER and not outcome["read"]:
                raise PairError(
                    f"The first {HOPELESS_AFTER} pairs all failed, so nothing was written. The last: {error}"
                ) from error
        else:
            outcome["read"] += 1
            yield pair
        bar.update()


def _make_room(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Give a folder for the shards.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty. Give a new folder, or `--overwrite` (`overwrite=True`) to replace its shards."
        )
    (folder / FILE_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for shard in folder.glob(f"data/{split}-*-of-*.parquet"):
            shard.unlink()
