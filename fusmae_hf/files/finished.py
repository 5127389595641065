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
        f"{name} {content.get(name)!r:.80} instead of {value!r:.80}"
        for name, value in expected.items()
        if content.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} is of other settings or data: {', '.join(differing[:4])}. Give another folder, or delete it."
        )
    return content
