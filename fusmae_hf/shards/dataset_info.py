"""`dataset_info.json`: what a prepared folder holds, down to the row groups, so that no footer is needed to plan.

Beside it, `left_out.csv` lists every pair that preparing left out, with its reason.
"""

import csv
import dataclasses
import os
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import fsspec

from fusmae_hf.data.findings import recorded_findings
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.files.plain_text import plain_text
from fusmae_hf.files.strict_json import is_count, parse_json
from fusmae_hf.shards.format import FILE_NAME, FORMAT_VERSION, READABLE_VERSIONS, ShardRecord
from fusmae_hf.shards.moments import Moments

LEFT_OUT_NAME = "left_out.csv"

MOST_BYTES = 64 * 2**20
"""Size up to which the file is read: a thousand times that of the half million pairs of BigEarthNet."""

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


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Content of `dataset_info.json`.

    Attributes:
        info: bands, units, classes, source and licence, which hold for all pairs.
        splits: the shards of each split, in row order.
        left_out_reasons: number of pairs that preparing left out, by kind of reason; `left_out.csv` beside it has
            every one with its own reason (`read_left_out`).
        preparation: how the folder was made, to make it again: the arguments, the fingerprint of what they led to,
            and the version of this package. Empty where shards were written by other means than `prepare`.
        format_version: version of the shard format.
        places: where shards lie that others wrote anew (`describe_foreign`), by name; the file does not hold it.
    """

    info: PairsInfo
    splits: dict[str, tuple[ShardRecord, ...]]
    left_out_reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    preparation: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    places: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def num_left_out(self) -> int:
        """Number of pairs that preparing left out."""
        return sum(self.left_out_reasons.values())

    def rows(self, split: str) -> int:
        """Number of pairs in a split."""
        return sum(shard.rows for shard in self.shards(split))

    def no_data_pixels(self, split: str) -> dict[str, int]:
        """Number of pixels without data in a split, by sensor."""
        shards = self.shards(split)
        return {sensor: sum(shard.no_data_pixels[sensor] for shard in shards) for sensor in ("sar", "optical")}

    def odd_values(self, split: str | None = None) -> list[str]:
        """What `prepare` saw of values that do not look as declared, a sentence a topic, of a split or of all."""
        shards = self.shards(split) if split else [shard for of_split in self.splits.values() for shard in of_split]
        return [plain_text(found, 1000) for found in recorded_findings(shard.plausibility for shard in shards)]

    def absent(self, split: str) -> dict[str, int]:
        """Number of pairs of a split that lack a sensor, by sensor."""
        shards = self.shards(split)
        return {sensor: sum(shard.absent[sensor] for shard in shards) for sensor in ("sar", "optical")}

    @property
    def statistics(self) -> dict[str, tuple[int, float, float]]:
        """Number of pixels with data, mean and standard deviation of each band over the pairs to train on.

        In the scale of the image processor: dB, and digital numbers without offset. Measured while the shards were
        written; empty where they were not. The same to the last digit however they were written, since the sums of
        the files are merged in their order.
        """
        found: dict[str, Moments] = {}
        for shard in self.splits.get("train", ()):
            for band, (number, mean, deviations) in shard.statistics.items():
                found[band] = found.get(band, Moments()).merge(Moments(number, mean, deviations))
        return {band: (moments.number, moments.mean, moments.std) for band, moments in found.items()}

    def warn_of_odd_values(self, split: str | None = None) -> None:
        """Say what `odd_values` holds, as warnings."""
        for found in self.odd_values(split):
            warnings.warn(f"{self.info.name}: {found}", stacklevel=2)

    def shards(self, split: str) -> tuple[ShardRecord, ...]:
        """Shards of a split, in row order.

        Raises:
            ValueError: there is no such split; the message names those that exist.
        """
        if split not in self.splits:
            raise ValueError(f"There is no split {split!r} in {self.info.name}; there are {sorted(self.splits)}.")
        return self.splits[split]

    def to_json(self) -> dict[str, Any]:
        """The content of the file. Totals for each split are repeated there for those who read it by eye."""
        return {
            "format_version": self.format_version,
            "info": dataclasses.asdict(self.info),
            "splits": {
                split: {
                    "rows": self.rows(split),
                    "no_data_pixels": self.no_data_pixels(split),
                    "absent": self.absent(split),
                    "shards": [dataclasses.asdict(shard) for shard in shards],
                }
                for split, shards in self.splits.items()
            },
            "statistics": {
                band: {"pixels": number, "mean": mean, "std": std}
                for band, (number, mean, std) in self.statistics.items()
            },
            "left_out": {"pairs": self.num_left_out, "reasons": self.left_out_reasons},
            "preparation": self.preparation,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "DatasetInfo":
        """Check and take over the content of the file; `ValueError`, `TypeError` or `KeyError` where it is wrong."""
        if (version := content["format_version"]) not in READABLE_VERSIONS:
            raise ValueError(f"format version {version!r} is none of {READABLE_VERSIONS}, which are read here")
        splits = {}
        for split, described in content["splits"].items():
            shards = tuple(map(ShardRecord.from_json, described["shards"]))
            if not shards or {shard.split for shard in shards} != {split}:
                raise ValueError(f"split {split!r} lists {reprlib.repr([shard.name for shard in shards])}")
            if len({shard.name for shard in shards}) < len(shards):
                raise ValueError(f"split {split!r} lists a file twice")
            splits[split] = shards
        if not splits:
            raise ValueError("it lists no split")
        reasons = content["left_out"]["reasons"]
        if not all(map(is_count, reasons.values())):
            raise ValueError("the numbers of pairs left out are no counts")
        left_out_reasons = {plain_text(reason, 500): count for reason, count in reasons.items()}
        info, preparation = pairs_info_from_json(content["info"]), dict(content["preparation"])
        return cls(info, splits, left_out_reasons, preparation, version)


def pairs_info_from_json(content: dict[str, Any]) -> PairsInfo:
    """`PairsInfo` from its JSON form, where tuples are lists."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
    }
    return PairsInfo(**fields)


def read_dataset_info(folder_or_url: str | os.PathLike[str], **storage: Any) -> DatasetInfo:
    """Read `dataset_info.json` of a prepared folder.

    Args:
        folder_or_url: a folder, or a URL that fsspec knows, such as `hf://datasets/<user>/<name>`.
        storage: options of fsspec's file system, such as `token`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a newer format version.
    """
    path = f"{os.fspath(folder_or_url).rstrip('/')}/{FILE_NAME}"
    try:
        with fsspec.open(path, "rb", **storage) as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        if is_no_folder(folder_or_url):
            raise FileNotFoundError(f"There is no folder {folder_or_url}. Write one with `fusmae prepare`.") from None
        raise FileNotFoundError(
            f"There is no {path}. `fusmae prepare` writes it as its last step, so either this is not a folder of "
            "shards or preparing it did not finish: run `fusmae prepare` (again). Shards that `datasets` wrote, of "
            "filtered pairs for example, lack it: name the folder they come from with `--like FOLDER` (`like=`)."
        ) from error
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES:,} bytes")
        return DatasetInfo.from_json(parse_json(content))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be used: {type(error).__name__}: {error}. Prepare the folder again with `fusmae prepare`."
        ) from error


def is_no_folder(folder_or_url: str | os.PathLike[str]) -> bool:
    """True for a place on this machine where there is no folder; whether a URL leads anywhere is not looked up."""
    return "://" not in os.fspath(folder_or_url) and not os.path.isdir(folder_or_url)


def _is_name(word: str) -> bool:
    """True for names of files, and of patches and products, which have many digits."""
    return "/" in word or "\\" in word or (sum(map(str.isdigit, word)) >= 6 and not _SIZE.search(word))


def count_reasons(left_out: Sequence[LeftOut]) -> dict[str, int]:
    """Number of pairs by kind of reason, most frequent first; rare kinds beyond `MOST_KINDS` are taken together."""
    counts = Counter(pair.kind for pair in left_out)
    most = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    rest = sum(count for _, count in most[MOST_KINDS:])
    return dict(most[:MOST_KINDS]) | ({OTHER_REASONS: rest} if rest else {})


def read_left_out(folder_or_url: str | os.PathLike[str]) -> list[LeftOut]:
    """Read `left_out.csv` of a prepared folder; empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = f"{os.fspath(folder_or_url).rstrip('/')}/{LEFT_OUT_NAME}"
    try:
        with fsspec.open(path, "r", encoding="utf-8", newline="") as file:
            return [LeftOut(row["id"], row["reason"], row["file"]) for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Prepare the folder again.") from error
