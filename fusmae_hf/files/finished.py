"""Results on the disk that a repeated command goes on from, each with a JSON record of what it was made of.

Features, lists of drawn labels, runs of several seeds and steps of a protocol are kept this way. Write the record
last: a result without one is not finished.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusmae_hf.files.atomic import write_atomically


def settings_hash(settings: Any) -> str:
    """Hash of everything that decides a result, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_record(path: Path, content: Mapping[str, Any], indent: int = 1, sort_keys: bool = False) -> None:
    """Write a record atomically.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(path, (json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n").encode())


def read_record(path: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a record holds; None where there is none.

    Args:
        path: of the record.
        expected: what a result must have been made of to be taken, by name.

    Raises:
        ValueError: it is damaged, or of a result that was made of something else; says what differs.
    """
    if not path.is_file():
        return None
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Delete it, and what it describes is made again.") from error
    differing = [
        _difference(name, content.get(name), value) for name, value in expected.items() if content.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} is of other settings or data: {', '.join(differing[:4])}. Give another folder, or delete it."
        )
    return content


def _difference(name: str, found: Any, expected: Any) -> str:
    """The first place at which two settings differ, and what they are there."""
    if isinstance(found, dict) and isinstance(expected, dict):
        if set(found) != set(expected):
            return f"{name} of {', '.join(sorted(found)) or 'none'} instead of {', '.join(sorted(expected)) or 'none'}"
        key = next(key for key in expected if found[key] != expected[key])
        return _difference(f"{name} {key}", found[key], expected[key])
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected) and repr(found)[80:]:
        pair = next(pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1])
        return _difference(name, *pair)
    return f"{name} {found!r:.80} instead of {expected!r:.80}"
