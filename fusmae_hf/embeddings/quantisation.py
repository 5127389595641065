"""Vectors in eight bits, with a scale and an offset for each dimension that belong to a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fusmae_hf.files.finished import settings_hash, write_record
from fusmae_hf.files.strict_json import parse_json

FILE = "embedding_quantisation.json"
"""Record beside the weights of a checkpoint."""

LEVELS = 256

PERCENTILES = (0.1, 99.9)
"""Of the values of each dimension: what lies outside is clipped."""


@dataclass(frozen=True)
class Quantisation:
    """Eight bits for each dimension of a vector: `value = offset + scale * level`, with levels from 0 to 255.

    Attributes:
        scale: `(size,)` float32, positive.
        offset: `(size,)` float32.
    """

    scale: np.ndarray
    offset: np.ndarray

    def levels(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """Nearest levels of vectors.

        Args:
            values: `(places, size)` float32.

        Returns:
            `(places, size)` uint8, and how many of the values lay outside of what can be said and were clipped.
        """
        steps = np.rint((values - self.offset) / self.scale)
        outside = (steps < 0) | (steps >= LEVELS)
        return np.clip(steps, 0, LEVELS - 1).astype(np.uint8), int(outside.sum())

    def to_json(self) -> dict[str, list[float]]:
        """Scale and offset as JSON has them."""
        return {"scale": self.scale.tolist(), "offset": self.offset.tolist()}


@dataclass(frozen=True)
class VectorColumns:
    """How vectors of places are written.

    Attributes:
        columns: of vectors, each of as many numbers.
        dtype: `"float32"`, `"float16"` or `"uint8"`.
        quantisation: by column, for uint8.
        times: acquisition time of each sensor in ISO 8601, where it is known.
        scene: its name.
    """

    columns: tuple[str, ...]
    dtype: str = "float32"
    quantisation: Mapping[str, Quantisation] | None = None
    times: Mapping[str, str | None] | None = None
    scene: str = ""

    def __post_init__(self) -> None:
        for name, text in (self.times or {}).items():
            try:
                _ = text is None or datetime.fromisoformat(text)
            except ValueError as error:
                raise ValueError(f"--{name}-time is {text}, but must be like 2026-05-31T10:20:31Z.") from error

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers, as JSON has it."""
        ranges = {name: each.to_json() for name, each in (self.quantisation or {}).items()}
        return {
            "columns": list(self.columns),
            "dtype": self.dtype,
            "quantisation": settings_hash(ranges),
            "times": dict(self.times or {}),
        }


def quantisation_of(values: np.ndarray) -> Quantisation:
    """Scale and offset with which some vectors, and others like them, are best said in eight bits.

    Args:
        values: `(places, size)` float32, from many scenes.

    Raises:
        ValueError: there are too few vectors for the percentiles to mean something.
    """
    if len(values) < 100:
        raise ValueError(f"The range of vectors cannot be told from {len(values)} of them: give at least 100.")
    low, high = np.percentile(values, PERCENTILES, axis=0)
    scale = np.maximum((high - low) / (LEVELS - 1), np.finfo(np.float32).tiny)
    return Quantisation(scale.astype(np.float32), low.astype(np.float32))


def write_quantisation(
    folder: Path, weights: str, found: Mapping[str, Mapping[str, Quantisation]], **source: Any
) -> Path:
    """Write the record of a checkpoint.

    Args:
        folder: of the checkpoint.
        weights: `weights_hash` of the encoder.
        found: by unit (`"patch"`, `"window"`), then by column.
        source: of what vectors, to be noted.

    Raises:
        OSError: it cannot be written.
    """
    ranges = {unit: {name: each.to_json() for name, each in of_unit.items()} for unit, of_unit in found.items()}
    write_record(folder / FILE, {"weights": weights, "percentiles": list(PERCENTILES), **source, "ranges": ranges})
    return folder / FILE


def read_quantisation(folder: Path, weights: str, unit: str, columns: list[str]) -> dict[str, Quantisation]:
    """What the record of a checkpoint says, by column.

    Args:
        folder: of the checkpoint.
        weights: `weights_hash` of the encoder, of which the record must be.
        unit: `"patch"` or `"window"`.
        columns: that are needed.

    Raises:
        ValueError: there is no record, it is damaged, of other weights, or does not have the columns.
    """
    path = folder / FILE
    remedy = f"Make it from shards of many scenes: `fusmae stats SHARDS --embeddings {folder}`."
    if not path.is_file():
        raise ValueError(
            "Embeddings in uint8 need a scale and an offset for each dimension that belong to the checkpoint, but "
            f"there is no {path}. {remedy} Or take --embedding-dtype float16."
        )
    try:
        content = parse_json(path.read_bytes())
        ranges = {
            name: Quantisation(*(np.array(of_unit[key], np.float32) for key in ("scale", "offset")))
            for name, of_unit in content["ranges"][unit].items()
        }
        of_weights = content["weights"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {remedy}") from error
    if of_weights != weights:
        raise ValueError(f"{path} was made with other weights than {folder} has now. {remedy}")
    if missing := [name for name in columns if name not in ranges]:
        raise ValueError(f"{path} says nothing of {', '.join(missing)}, only of {', '.join(ranges)}. {remedy}")
    return {name: ranges[name] for name in columns}
