"""What the readers of datasets share: the list of pairs, the folders that it comes from, messages about both."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fusmae_hf.data.pairs import Pair, PairsInfo, Place


class ListedPairs(ABC):
    """Pairs that were listed when their dataset was opened: what is the same in every `PairReader`.

    A reader fills `ids`, `_splits` and `_left_out` when it is opened, sets `info` and `summary`, and defines `_read`.

    Args:
        root: folder of the dataset.
    """

    info: PairsInfo
    summary: str

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.ids: list[str] = []
        self._splits: Sequence[str | None] = ()  # one a pair, or none at all where the dataset has no splits
        self._left_out: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.ids)

    def split_of(self, index: int) -> str | None:
        """Split of the pair at `index`, without reading its pixels; None where the dataset has none."""
        return self._splits[index] if self._splits else None

    def places(self, indices: Sequence[int]) -> Iterator[Place | None]:
        """Where pairs lie, as far as their names tell: those of one ground are never split."""
        for index in indices:
            ground = self._ground_of(self.ids[index])
            yield None if ground is None else Place(ground, None, (0.0, 0.0, 1.0, 1.0))

    def _ground_of(self, name: str) -> str | None:
        """What pairs that show the same ground, or overlap, have in common in their names; None where none do."""
        return None

    def left_out(self) -> Iterator[tuple[str, str]]:
        """What is on disk but not among the pairs, as (id, reason)."""
        return iter(self._left_out)

    def read(self, index: int) -> Pair:
        """Read one pair, as the class describes it.

        Raises:
            PairError: a file is missing, unreadable or not as described, or the two patches lie apart; names it.
        """
        return self._read(index)

    @abstractmethod
    def _read(self, index: int) -> Pair:
        """`read` of the dataset."""

    def _require_pairs(self, dataset: str, found: str, expected: str) -> None:
        """Refuse a dataset without any pair."""
        if not self.ids:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._left_out[:3])
            raise ValueError(
                f"{dataset}: no pair to read in {self.root}. {found}{len(self._left_out):,} were left out"
                f"{f', for example {reasons}' if reasons else ''}. Expected {expected}."
            )


def require_one_of(keyword: str, value: Any, known: Collection[str]) -> None:
    """Refuse a value that an option does not have.

    Raises:
        ValueError: names the option, what was given and what is possible.
    """
    if value not in known:
        raise ValueError(f"{keyword} is {value!r}, but must be one of {list(known)}.")


def put_into_split(split_of: dict[str, str], name: str, split: str, lists: Path) -> None:
    """Note the split of a pair as a list says it.

    Raises:
        ValueError: another list says another one.
    """
    if split_of.setdefault(name, split) != split:
        raise ValueError(f"{lists}: {name} is listed for both {split_of[name]} and {split}.")


def require_folders(root: Path, names: Sequence[str], dataset: str) -> list[Path]:
    """The named sub-folders of `root`.

    Raises:
        FileNotFoundError: one is missing; says what was searched, what is there and what to give instead.
    """
    missing = [name for name in names if not (root / name).is_dir()]
    if not missing:
        return [root / name for name in names]
    if not root.is_dir():
        found = "no such folder"
    else:
        inside = sorted(entry.name for entry in root.iterdir())
        found = (
            f"the folder holds {inside[:8]}{' ...' if len(inside) > 8 else ''}" if inside else "the folder is empty"
        )
    hint = "the folder above it" if root.name in names else f"the folder that holds {' and '.join(names)}"
    raise FileNotFoundError(f"{dataset}: looked for {missing} in {root}, but {found}. Give {hint}.")


def subfolders(folder: Path) -> Iterator[str]:
    """Names of the folders in `folder`, in no order, with one directory scan (no call for each entry)."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if entry.is_dir())


def acquisition_time(name: str) -> str | None:
    """Acquisition time (UTC, ISO 8601) in a Sentinel product or patch name, or None where it holds no valid one."""
    match = re.search(r"_(\d{8}T\d{6})_", name)
    if match is None:
        return None
    try:
        return datetime.fromisoformat(match.group(1)).isoformat() + "Z"
    except ValueError:
        return None
