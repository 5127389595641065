"""Words of others in lines, cards and names of files: they show as what they are, and become nothing else there."""

import re
import unicodedata
from typing import Any

import xxhash

_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKS = re.compile(r"([\\`*\[\]|<>&!~$#])")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,119}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")


def is_plain_text(value: Any, most_characters: int = 200) -> bool:
    """True for text of one line that shows what it is: no control characters, no reversed writing.

    Control characters can rewrite what a terminal shows, line breaks can begin a heading in a card.
    """
    return isinstance(value, str) and len(value) <= most_characters and not any(map(_is_hidden, value))


def plain_text(value: Any, most_characters: int = 200) -> str:
    """`value` as plain text: see `is_plain_text`. What does not fit is cut, what is hidden becomes a question mark."""
    return "".join("?" if _is_hidden(character) else character for character in str(value)[:most_characters])


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL


def inline(text: object) -> str:
    """Text that reads the same in a line or a table cell of Markdown: no links, pictures, HTML or headings.

    Underscores and dots stay, since names are full of them and within a word they mean nothing; so does a plain URL.
    """
    return _MARKS.sub(r"\\\1", " ".join(str(text).split())).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def code(text: object) -> str:
    """Text as code within a line, whatever backticks it holds."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def file_stem(id: str) -> str:
    """Name of a file without its ending, within its folder whatever the id, another one for another id.

    Ids of letters, digits, `_`, `.` and `-` stay what they are; in others all else becomes `_`, and a hash follows.
    """
    if _PLAIN_NAME.fullmatch(id):
        return id
    shown = _NOT_IN_NAMES.sub("_", id)[:80].strip("_-")
    return f"{shown or 'pair'}-{xxhash.xxh3_64(id.encode()).hexdigest()}"
