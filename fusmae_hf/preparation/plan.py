"""What preparing a dataset will write: which pairs go into which file, in which order. Decided before a pixel is read.

A plan is a function of the reader's pairs and splits and of the arguments alone. Each file is a fixed slice of the
order of its split, so files can be written in any order, by any number of processes, on any number of machines, and
again after an interruption: a pair that is left out makes its own file shorter and moves nothing else.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fusmae_hf.data.pairs import PairReader, PairsInfo
from fusmae_hf.preparation.hold_out import HeldOut, draw_held_out
from fusmae_hf.shards.dataset_info import LeftOut, pairs_info_from_json
from fusmae_hf.shards.format import FORMAT_VERSION, ShardRecord
from fusmae_hf.vocabulary import SPLITS


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """One file of a plan.

    Attributes:
        number: running number over all splits.
        name: path below the prepared folder.
        indices: pairs of the reader, in the order of the rows.
    """

    number: int
    name: str
    indices: np.ndarray


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """What is kept of a plan on the disk: enough to see whether another one is the same, and to merge its parts.

    Attributes:
        info: what holds for all pairs.
        arguments: what led to the plan.
        num_pairs: number of pairs that the reader found.
        digest: hash of their names, and of the pairs of each split in their order.
        files: number of pairs planned for each file, in order.
        first_pairs: checksums of some pairs, which tell whether the same pixels are read again.
    """

    info: PairsInfo
    arguments: dict[str, Any]
    num_pairs: int
    digest: str
    files: dict[str, int]
    first_pairs: dict[str, int] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what the files hold, but for the pixels."""
        content = self.to_json() | {"first_pairs": None, "format_version": FORMAT_VERSION}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """The summary as `from_json` takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PlanSummary":
        """The summary in its JSON form; `TypeError`, `KeyError` or `ValueError` where that is damaged."""
        summary = cls(**{**content, "info": pairs_info_from_json(content["info"])})
        for name in summary.files:
            ShardRecord.split_of(name)
        return summary

    def differences(self, other: "PlanSummary") -> list[str]:
        """In which arguments, facts of the dataset or pairs `other` differs from this plan, for the user."""
        pieces = [
            (f"`{name}`", self.arguments.get(name), other.arguments.get(name))
            for name in {**self.arguments, **other.arguments}
        ]
        pieces += [
            (field.name, getattr(self.info, field.name), getattr(other.info, field.name))
            for field in dataclasses.fields(PairsInfo)
        ]
        pieces.append(("number of pairs found", self.num_pairs, other.num_pairs))
        found = [f"{name} was {then!r} and is {now!r} now" for name, now, then in pieces if now != then]
        if not found and self.fingerprint != other.fingerprint:
            found = ["the pairs found, or their splits, are not the same"]
        changed = [
            id for id in self.first_pairs.keys() & other.first_pairs if self.first_pairs[id] != other.first_pairs[id]
        ]
        if not found and changed:
            found = [f"the pixels of {sorted(changed)[0]} are not the same, so the archive or an option changed"]
        return found


@dataclasses.dataclass(frozen=True)
class PreparationPlan:
    """What will be written.

    Attributes:
        summary: what is kept of it on the disk.
        files: the files with their pairs.
        left_out: pairs that are left out before any is read, as the reader says, for ids that occur twice, and where
            they lie in both splits.
        held_out: how much was held out, in words.
    """

    summary: PlanSummary
    files: tuple[PlannedFile, ...]
    left_out: tuple[LeftOut, ...]
    held_out: str = ""


def plan_preparation(
    reader: PairReader,
    *,
    limit: int | None,
    hold_out: float,
    split_by: str = "place",
    select: Collection[str] | None = None,
    seed: int,
    keep_order: bool,
    rows_per_shard: int,
    row_group_rows: int,
    max_no_data: float,
    require_both: bool,
    reader_options: Mapping[str, Any],
) -> PreparationPlan:
    """Decide which pairs go where: see `prepare` for the arguments.

    Raises:
        ValueError: an argument is out of range, there is no pair, or the reader gives a split of unknown name.
    """
    rules = (
        ("limit", limit, limit is None or limit >= 1, "at least 1"),
        ("hold_out", hold_out, 0 <= hold_out < 1, "a share: at least 0 and below 1"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("rows_per_shard", rows_per_shard, rows_per_shard >= 1, "at least 1"),
        ("row_group_rows", row_group_rows, row_group_rows >= 1, "at least 1"),
        ("max_no_data", max_no_data, 0 <= max_no_data <= 1, "a share from 0 to 1"),
    )
    for name, value, holds, expected in rules:
        if not holds:
            raise ValueError(f"{name} is {value}, but must be {expected}.")
    ids = reader.ids
    left_out = [LeftOut(id, reason) for id, reason in reader.left_out()]
    candidates = np.arange(len(ids))
    if len(set(ids)) < len(ids):
        candidates, repeated = _without_repeated(ids)
        left_out += repeated
    if select is not None:
        candidates = _selected(ids, candidates, select)
    order = candidates if keep_order else np.random.default_rng(seed).permutation(candidates)
    by_split, held_out = _by_split(reader, order[:limit], hold_out, split_by, seed)
    if held_out:
        left_out += [LeftOut(ids[index], "astride the border of the validation split") for index in held_out.dropped]
    files: list[PlannedFile] = []
    digest = hashlib.sha256("\n".join(ids).encode(errors="surrogatepass"))
    for split, indices in by_split.items():
        if not keep_order:
            indices = _read_together(reader, indices, rows_per_shard, seed)
        digest.update(f"\n{split} {len(indices)}\n".encode() + indices.astype("<i8").tobytes())
        count = -(-len(indices) // rows_per_shard)
        files += [
            PlannedFile(
                len(files) + number,
                f"data/{split}-{number:05d}-of-{count:05d}.parquet",
                indices[len(indices) * number // count : len(indices) * (number + 1) // count],
            )
            for number in range(count)
        ]
    arguments = {
        "reader": f"{type(reader).__module__}.{type(reader).__qualname__}",
        **{f"reader.{name}": value for name, value in sorted(reader_options.items())},
        "limit": limit,
        "hold_out": hold_out,
        "split_by": split_by if hold_out else None,
        "select": None if select is None else hashlib.sha256("\n".join(sorted(select)).encode()).hexdigest()[:16],
        "seed": seed,
        "keep_order": keep_order,
        "rows_per_shard": rows_per_shard,
        "row_group_rows": row_group_rows,
        "max_no_data": max_no_data,
        "require_both": require_both,
    }
    summary = PlanSummary(
        info=reader.info,
        arguments=json.loads(json.dumps(arguments)),
        num_pairs=len(ids),
        digest=digest.hexdigest()[:32],
        files={file.name: len(file.indices) for file in files},
    )
    return PreparationPlan(summary, tuple(files), tuple(left_out), held_out.summary if held_out else "")


def _read_together(reader: Any, indices: np.ndarray, rows_per_shard: int, seed: int) -> np.ndarray:
    """Bring pairs together that are best read one after the other: see `in_order_of_reading` in work.py.

    Groups keep the random order in which their first pairs come. Within the blocks of a file that wait in memory to
    be written, the order of the pairs is random.
    """
    groups = getattr(reader, "reading_groups", None)
    if groups is None or not len(indices):
        return indices
    _, first, group = np.unique(groups[indices], return_index=True, return_inverse=True)
    together = indices[np.argsort(first[group], kind="stable")]
    count = -(-len(indices) // rows_per_shard)
    drawn = np.random.default_rng(seed)
    for number in range(count):
        file = together[len(indices) * number // count : len(indices) * (number + 1) // count]
        for start in range(0, len(file), reader.rows_read_together):
            drawn.shuffle(file[start : start + reader.rows_read_together])
    return together


def _without_repeated(ids: list[str]) -> tuple[np.ndarray, list[LeftOut]]:
    """Pairs whose id is met for the first time; and the others."""
    times, seen = Counter(ids), set[str]()
    first, repeated = [], []
    for index, id in enumerate(ids):
        if id in seen:
            repeated.append(LeftOut(id, f"the id occurs {times[id]} times in the dataset: only the first was taken"))
        else:
            seen.add(id)
            first.append(index)
    return np.array(first), repeated


def _selected(ids: list[str], candidates: np.ndarray, select: Collection[str]) -> np.ndarray:
    """Those of the candidates whose ids were chosen."""
    wanted = set(select)
    chosen = np.array([index for index in candidates.tolist() if ids[index] in wanted], dtype=np.int64)
    if missing := wanted.difference(ids):
        raise ValueError(
            f"{len(missing):,} of the {len(wanted):,} selected ids are not in the dataset, such as "
            f"{sorted(missing)[:3]}; its ids look like {ids[:3]}."
        )
    return chosen


def _by_split(
    reader: PairReader, order: np.ndarray, hold_out: float, split_by: str, seed: int
) -> tuple[dict[str, np.ndarray], HeldOut | None]:
    """Pairs of each split that has some, in the given order, and what was held out."""
    codes: dict[str | None, int] = {None: -1} | {split: code for code, split in enumerate(SPLITS)}
    given = [reader.split_of(index) for index in order.tolist()]
    if unknown := set(given).difference(codes):
        position = next(position for position, split in enumerate(given) if split in unknown)
        raise ValueError(
            f"{reader.ids[order[position]]} has the split {given[position]!r}, but one of {list(SPLITS)} is needed."
        )
    split = np.array([codes[name] for name in given], dtype=np.int64)
    unassigned = np.sort(order[split == -1])
    split[split == -1] = SPLITS.index("train")
    drawn = None
    if hold_out and len(unassigned):
        tell = getattr(reader, "places", None)
        places = [None] * len(unassigned) if tell is None else [*tell(unassigned.tolist())]
        drawn = draw_held_out(places, hold_out, seed, split_by)
        drawn = drawn._replace(held_out=unassigned[drawn.held_out], dropped=unassigned[drawn.dropped])
        split[np.isin(order, drawn.held_out)] = SPLITS.index("validation")
        split[np.isin(order, drawn.dropped)] = len(SPLITS)
    by_split = {name: order[split == code] for code, name in enumerate(SPLITS)}
    return {name: indices for name, indices in by_split.items() if len(indices)}, drawn
