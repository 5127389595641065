"""JSON from files that somebody else wrote: nothing that readers of JSON disagree on, and no more than fits."""

import json
import math
from typing import Any


def parse_json(content: bytes | str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON, names a key twice (readers differ in which one they take), holds numbers that are
            not finite, or is nested too deeply.
    """
    try:
        return json.loads(
            content, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_count(value: Any) -> bool:
    """True for integers from 0 on that 64 bits hold; `True` and `2.0` are none."""
    return type(value) is int and 0 <= value < 2**63


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:100]!r} stands twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits[:100]} is too large")
    return value
