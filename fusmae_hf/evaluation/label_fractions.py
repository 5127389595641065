"""Small labelled subsets of a dataset, for measuring what a model makes of few labels.

Without replacement and stratified: the classes are as frequent among the samples drawn as among all. Drawn with
replacement instead, as in widely used code, "100 %" would hold 63 % of the samples.

The samples that a seed draws are nested: those of 1 % are among those of 10 %. So results at two fractions differ by
what was added, not by another draw as well.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fusmae_hf.files.finished import read_record, write_record
from fusmae_hf.shards.dataset_info import DatasetInfo


def split_content_hash(dataset_info: DatasetInfo, split: str) -> str:
    """Hash over ids and pixels of a split, in order, as 32 hexadecimal digits; nothing is read for it.

    Raises:
        ValueError: there is no such split.
    """
    joined = "".join(shard.content_hash for shard in dataset_info.shards(split))
    return hashlib.sha256(joined.encode()).hexdigest()[:32]


def draw_label_fraction(
    ids: Sequence[str], labels: ArrayLike, fraction: float, seed: int, num_classes: int
) -> list[str]:
    """Draw a stratified share of the samples, without replacement.

    The number is `fraction * len(ids)`, rounded. Each class that any sample has is drawn at least once where that many
    samples are drawn. Which samples they are depends on ids, labels and seed, not on the order of the ids; numpy
    promises the same random numbers for one of its versions only, so keep what was drawn ([`kept_label_fraction`]).

    Args:
        ids: one a sample, all different.
        labels: `(samples,)` class indices where each sample has one class, or `(samples, num_classes)`, 1 where a
            class holds, else 0.
        fraction: share of the samples, above 0, at most 1.
        seed: non-negative integer.
        num_classes: classes are 0 to `num_classes - 1`.

    Returns:
        Ids, in the order given.

    Raises:
        ValueError: the fraction is out of range or gives no sample, ids come twice, or labels are out of range or do
            not fit the ids.

    Source: for several labels a sample, iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the
    stratification of multi-label data", ECML PKDD 2011): the rarest label is shared out first. Here all samples of a
    label are shared out at once, and the set is halved again and again, which makes the draws nested.
    """
    held = _class_matrix(labels, len(ids), num_classes)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, but must be a share: above 0, at most 1 (0.01 for 1 %).")
    wanted = round(fraction * len(ids))
    if not wanted:
        raise ValueError(
            f"A fraction of {fraction} of {len(ids)} samples gives none. One sample is a fraction of "
            f"{1 / len(ids) if ids else float('nan'):.3g}: ask for at least that."
        )
    by_id = np.argsort(np.asarray(ids, dtype=np.str_), kind="stable")
    in_order = [ids[row] for row in by_id]
    twice = next((first for first, second in itertools.pairwise(in_order) if first == second), None)
    if twice is not None:
        raise ValueError(f"The id {twice!r} comes more than once: draw from the samples of one split, each once.")
    held = held[by_id]
    cover = _one_of_each_class(held, np.random.default_rng([seed, 0]))
    if wanted <= len(cover):
        drawn = cover[:wanted]
    elif np.ndim(labels) == 1:
        drawn = _first_by_class(held.argmax(axis=1), cover, np.random.default_rng([seed, 1]))[:wanted]
    else:
        drawn = _first_by_halves(held, cover, wanted, np.random.SeedSequence([seed, 1]))
    return [ids[row] for row in np.sort(by_id[drawn])]


def _class_matrix(labels: ArrayLike, num_samples: int, num_classes: int) -> np.ndarray:
    """Which classes hold, `(samples, classes)` bool."""
    given = np.asarray(labels)
    if given.ndim == 1 and len(given) == num_samples and (given.dtype.kind in "iu" or not num_samples):
        if num_samples and not 0 <= given.min() <= given.max() < num_classes:
            raise ValueError(
                f"labels hold class indices from {given.min()} to {given.max()}, but {num_classes} classes are 0 to "
                f"{num_classes - 1}."
            )
        return given[:, None] == np.arange(num_classes)
    if given.shape != (num_samples, num_classes) or given.dtype.kind not in "fiub":
        raise ValueError(
            f"labels are {given.dtype} of shape {given.shape}, but must be class indices ({num_samples},) or 0 and 1 "
            f"({num_samples}, {num_classes}): one row for each id."
        )
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels hold other values than 1, where a class holds, and 0, where it does not.")
    return given.astype(bool)


def _one_of_each_class(held: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Few rows that have every class between them, those of rare classes first."""
    rows: list[int] = []
    covered = np.zeros(held.shape[1], dtype=bool)
    counts = held.sum(axis=0)
    for number in np.argsort(counts, kind="stable"):
        if counts[number] and not covered[number]:
            row = int(generator.choice(np.flatnonzero(held[:, number])))
            rows.append(row)
            covered |= held[row]
    return np.array(rows, dtype=np.int64)


def _first_by_class(classes: np.ndarray, cover: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """All rows, `cover` first, in an order of which each beginning has the classes as often as the whole."""
    order = generator.permutation(len(classes))
    order = np.concatenate([cover, order[~np.isin(order, cover)]])
    by_class = order[np.argsort(classes[order], kind="stable")]
    counts = np.bincount(classes)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(classes))
    place[by_class] = (np.arange(len(classes)) - first + 0.5) / np.repeat(counts, counts)
    place[cover] = -1
    return order[np.argsort(place[order], kind="stable")]


def _first_by_halves(held: np.ndarray, cover: np.ndarray, wanted: int, seed: np.random.SeedSequence) -> np.ndarray:
    """The first `wanted` rows of an order, `cover` first, in which each half, and each half of a half, is stratified.

    Only the halves in which the order is cut are halved on.
    """
    drawn: list[np.ndarray] = []
    block, forced = np.arange(len(held)), np.isin(np.arange(len(held)), cover)
    while wanted:
        # The same numbers for the same block, whatever is wanted of it: that is what nests the draws.
        here, if_first, if_second = seed.spawn(3)
        generator = np.random.default_rng(here)
        if wanted == len(block) or len(block) < 2 or len(block) // 2 < forced.sum():
            order = generator.permutation(len(block))
            order = np.concatenate([np.flatnonzero(forced), order[~forced[order]]])
            drawn.append(block[order[:wanted]])
            break
        first = _stratified_half(held[block], forced, generator)
        if wanted <= first.sum():
            block, forced, seed = block[first], forced[first], if_first
        else:
            drawn.append(block[first])
            wanted -= int(first.sum())
            block, forced, seed = block[~first], forced[~first], if_second
    return np.concatenate(drawn)


def _stratified_half(held: np.ndarray, forced: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Which rows are in the first half, `(rows,)` bool: half of them, the forced ones among them, and half of a class.

    Iterative stratification into two parts: of the classes that rows not shared out yet have, the rarest is next, and
    its rows go where they are missing.
    """
    first, open_rows = forced.copy(), ~forced
    missing = held.sum(axis=0) / 2 - held[forced].sum(axis=0)
    size = len(held) // 2
    left = held[open_rows].sum(axis=0)
    while left.any():
        rarest = int(np.where(left > 0, left, len(held) + 1).argmin())
        rows = generator.permutation(np.flatnonzero(open_rows & held[:, rarest]))
        take = np.floor(missing[rarest] + generator.random())  # rounded up or down, by chance where it is in between
        chosen = rows[: int(np.clip(take, 0, min(len(rows), size - first.sum())))]
        first[chosen], open_rows[rows] = True, False
        missing -= held[chosen].sum(axis=0)
        left -= held[rows].sum(axis=0)
    rest = generator.permutation(np.flatnonzero(open_rows))
    first[rest[: size - first.sum()]] = True
    return first


def kept_label_fraction(
    path: str | os.PathLike[str],
    draw: Callable[[], Sequence[str]],
    fraction: float,
    seed: int,
    dataset_info: DatasetInfo,
    split: str = "train",
) -> list[str]:
    """Ids of a label fraction: those that a file holds, or what is drawn now and written to it, atomically.

    Args:
        path: JSON file of the ids and of what they were drawn from.
        draw: gives the ids, as [`draw_label_fraction`] does.
        fraction: share of the split.
        seed: of the draw.
        dataset_info: of the dataset.
        split: of the dataset.

    Raises:
        ValueError: the file is damaged, or of another fraction, seed, dataset, split or preparation; says what
            differs.
        OSError: the file cannot be written.
    """
    drawn_from = {
        "fraction": fraction,
        "seed": seed,
        "dataset": dataset_info.info.name,
        "split": split,
        "content_hash": split_content_hash(dataset_info, split),
    }
    kept = read_record(Path(path), drawn_from)
    if kept is None or "ids" not in kept:
        kept = {"ids": list(draw()), **drawn_from}
        write_record(Path(path), kept)
    return kept["ids"]
