"""What checking a folder of shards found, as a table and for a file."""

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

Severity = Literal["error", "warning"]

CHECKS = {
    "dataset_info.json": "present, readable, and in agreement with left_out.csv",
    "files": "every shard is there, of the recorded size, and no other",
    "footers": "rows, row groups, split and description as recorded",
    "columns": "names and types as the format says",
    "row groups": "can be read",
    "ids": "present, and unique over all splits",
    "checksums": "every pair can be read and is as it was written, id and pixels",
    "content hash": "the pairs of a shard are those recorded, in their order",
    "arrays": "dtype, shape and bands as described, and the same in all pairs",
    "data": "both sensors have pixels with data; no infinite backscatter",
    "no-data counts": "pixels without data are as many as recorded",
    "labels": "scene labels are names of classes",
    "label maps": "fit the patch and hold known classes",
    "places": "transforms are six finite numbers; rows are of their file's split",
    "SAR values": "in the range of the declared units",
    "VV above VH": "in the mean of each pair",
    "optical values": "in the range of the declared units",
    "optical offset": "the darkest pixels fit the declared offset",
}
"""What is checked, in order, by name."""

QUICK = ("dataset_info.json", "files", "footers", "columns")
"""Checks that need no more than the footers."""

EXAMPLES = 3
"""Most problems of a check that the table names."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        check: which of `CHECKS`.
        severity: `"error"` where the shards must not be used as they are, `"warning"` where someone should look.
        message: what is wrong, in a sentence.
        file: shard, path below the folder; empty where it concerns all.
        pair: id of the pair; empty where it concerns a whole file.
    """

    check: str
    severity: Severity
    message: str
    file: str = ""
    pair: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.pair, self.message)))


@dataclasses.dataclass
class VerificationReport:
    """What `verify_shards` found; prints as a table.

    Attributes:
        folder: folder or URL.
        checked: the checks made, with what each looked at (`"3 files"`).
        problems: all of them, in the order found.
    """

    folder: str
    checked: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        """Problems because of which the shards must not be used as they are."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def sound(self) -> bool:
        """True without errors; warnings may remain."""
        return not self.errors

    @property
    def bad_files(self) -> list[str]:
        """Shards in which errors were found, in order of their names."""
        return sorted({problem.file for problem in self.errors if problem.file})

    def __str__(self) -> str:
        lines = [f"{self.folder}", "", f"{'check':<19}{'result':<13}{'looked at':<16}what holds"]
        for check, extent in self.checked.items():
            found = [problem for problem in self.problems if problem.check == check]
            lines.append(f"{check:<19}{_result(found):<13}{extent:<16}{CHECKS[check]}")
            for problem in found[:EXAMPLES]:
                lines.append(
                    textwrap.fill(
                        f"{problem.severity}: {problem}",
                        116,
                        initial_indent=" " * 6,
                        subsequent_indent=" " * 8,
                        break_long_words=False,
                        break_on_hyphens=False,
                    )
                )
            if len(found) > EXAMPLES:
                lines.append(f"      and {len(found) - EXAMPLES:,} more")
        left = [check for check in CHECKS if check not in self.checked]
        if left:
            lines += ["", textwrap.fill(f"Not checked: {', '.join(left)}.", 116)]
        lines += ["", self.verdict]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """One sentence for the whole."""
        errors, warnings = len(self.errors), len(self.problems) - len(self.errors)
        if not self.problems:
            return "Sound: no problem was found."
        counted = " and ".join(
            f"{number:,} {kind}{'s' * (number > 1)}"
            for number, kind in ((errors, "error"), (warnings, "warning"))
            if number
        )
        if not errors:
            return f"Sound, with {counted} to look at."
        files = f" in {len(self.bad_files):,} of the files: {_listed(self.bad_files)}" if self.bad_files else ""
        return f"NOT sound: {counted}{files}. Prepare (or download) what is damaged again."

    def to_json(self) -> dict[str, Any]:
        """Everything, with every problem, for a file."""
        return {
            "folder": self.folder,
            "sound": self.sound,
            "checked": self.checked,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
        }


def _result(found: Sequence[Problem]) -> str:
    if not found:
        return "ok"
    counts = Counter(problem.severity for problem in found)
    kind: Severity = "error" if counts["error"] else "warning"
    return count_of(counts[kind], kind)


def count_of(count: int, noun: str) -> str:
    """A number and its noun, in the plural where it is not one."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
