"""Names of files made from the ids of pairs, which may be anything."""

import re

import xxhash

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,119}")
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")


def file_stem(id: str) -> str:
    """Name of a file without its ending, within its folder whatever the id, another one for another id.

    Ids of letters, digits, `_`, `.` and `-` stay what they are; in others all else becomes `_`, and a hash follows.
    """
    if _PLAIN.fullmatch(id):
        return id
    shown = _OTHER.sub("_", id)[:80].strip("_-")
    return f"{shown or 'pair'}-{xxhash.xxh3_64(id.encode()).hexdigest()}"
