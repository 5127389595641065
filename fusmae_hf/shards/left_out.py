"""`left_out.csv`: every pair that preparing left out, with its reason."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import fsspec

from fusmae_hf.files.atomic import write_atomically

FILE_NAME = "left_out.csv"

MOST_KINDS = 100
"""Kinds of reasons that are counted one by one; `dataset_info.json` is read whenever a folder is opened."""

OTHER_REASONS = "other reasons"

_PLACE = re.compile(r"\S*[/\\].*?: ")
_SIZE = re.compile(r"\d+x\d+")
_NUMBER = re.compile(r"(?<![\w.-])\d[\d,.]*\d(?!\w)")


class LeftOut(NamedTuple):
    """A pair that is not in the shards.

    Attributes:
        id: name of the pair.
        reason: why it was left out.
        file: shard in which it would have been, or `""` where the reader did not list it as a pair.
    """

    id: str
    reason: str
    file: str = ""

    @property
    def kind(self) -> str:
        """The reason without what is particular to this pair: names of files and pairs, and numbers."""
        reason = re.sub(rf"(?<!\w){re.escape(self.id)}(?!\w)", "...", self.reason[:1000]) if self.id else self.reason
        if place := _PLACE.match(reason):
            reason = reason[place.end() :]
        words = ("..." if _is_name(word) else _NUMBER.sub("N", word) for word in reason.split())
        return " ".join(words).removeprefix("...: ")[:200]


def _is_name(word: str) -> bool:
    """True for names of files, and of patches and products, which have many digits."""
    return "/" in word or "\\" in word or (sum(map(str.isdigit, word)) >= 6 and not _SIZE.search(word))


def count_reasons(left_out: Sequence[LeftOut]) -> dict[str, int]:
    """Number of pairs by kind of reason, most frequent first; rare kinds beyond `MOST_KINDS` are taken together."""
    counts = Counter(pair.kind for pair in left_out)
    most = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    rest = sum(count for _, count in most[MOST_KINDS:])
    return dict(most[:MOST_KINDS]) | ({OTHER_REASONS: rest} if rest else {})


def write_left_out(folder: str | os.PathLike[str], left_out: Sequence[LeftOut]) -> None:
    """Write `left_out.csv` into a folder, atomically; no file where there is nothing to say.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(folder, FILE_NAME)
    if not left_out:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "file", "reason"))
    writer.writerows((pair.id, pair.file, pair.reason) for pair in left_out)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def read_left_out(folder_or_url: str | os.PathLike[str]) -> list[LeftOut]:
    """Read `left_out.csv` of a prepared folder; empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = f"{os.fspath(folder_or_url).rstrip('/')}/{FILE_NAME}"
    try:
        with fsspec.open(path, "r", encoding="utf-8", newline="") as file:
            return [LeftOut(row["id"], row["reason"], row["file"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Prepare the folder again.") from error
