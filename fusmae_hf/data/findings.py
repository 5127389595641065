"""What was odd in the values of many pairs: counted by kind, recorded, and put in words."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fusmae_hf.modeling.plausibility_fusmae import offsets_mixed


@dataclass
class Seen:
    """How many pairs a kind of finding concerns, and the first of them.

    Attributes:
        pairs: number of pairs.
        pixels: number of pixels or values in all of them.
        first: id of the first pair.
        message: what was found there, with the advice.
    """

    pairs: int
    pixels: int
    first: str
    message: str

    def __str__(self) -> str:
        pixels = f", {self.pixels:,} pixels" if self.pixels else ""
        count = f"{self.pairs:,} pair{'s' * (self.pairs != 1)}"
        return f"{count}{pixels}; the first, {self.first}: {self.message}"


def merge_seen(into: dict[str, Seen], more: dict[str, Seen]) -> None:
    """Add what was seen later, by topic."""
    for topic, seen in more.items():
        if topic in into:
            into[topic].pairs += seen.pairs
            into[topic].pixels += seen.pixels
        else:
            into[topic] = replace(seen)


def recorded_findings(records: Iterable[dict[str, Any] | None]) -> list[str]:
    """What `prepare` saw in files, in a sentence a topic; nothing of files whose values nobody looked at.

    Args:
        records: of each file, as `PairSample.record` gives it.
    """
    seen, dark_by_offset = dict[str, Seen](), dict[float, Counter[str]]()
    for record in filter(None, records):
        merge_seen(seen, {topic: Seen(**fields) for topic, fields in record["findings"].items()})
        dark_by_offset.setdefault(record["offset"], Counter()).update(record["darkness"])
    mixed = filter(None, map(offsets_mixed, dark_by_offset.values()))  # sets that declare others are no mix
    return [f"{topic}: {of_topic}" for topic, of_topic in seen.items()] + [
        f"{finding.topic}: {finding.for_commands()}" for finding in mixed
    ]
