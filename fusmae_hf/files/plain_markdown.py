"""Words of others in a card: they show as what they are, and cannot become links, pictures, HTML or headings."""

import re

_MARKS = re.compile(r"([\\`*\[\]|<>&!~$#])")


def inline(text: object) -> str:
    """Text that reads the same in a line or a table cell of Markdown.

    Underscores and dots stay, since names are full of them and within a word they mean nothing; so does a plain URL.
    """
    return _MARKS.sub(r"\\\1", " ".join(str(text).split())).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def code(text: object) -> str:
    """Text as code within a line, whatever backticks it holds."""
    text = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"
