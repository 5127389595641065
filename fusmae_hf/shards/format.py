"""What shards look like: their columns, checksums and sizes. Writers and readers go by this."""

import dataclasses
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from fusmae_hf.data.native_resolution import PIXEL_DTYPES, native_size
from fusmae_hf.files.plain_text import is_plain_text
from fusmae_hf.files.strict_json import is_count
from fusmae_hf.vocabulary import IMAGES

if TYPE_CHECKING:
    from fusmae_hf.data.pairs import PairsInfo

FILE_NAME = "dataset_info.json"

FORMAT_VERSION = 3
"""Version of the shard format; raised when older code can no longer read what is written."""

READABLE_VERSIONS = (2, 3)
"""Version 2 had both sensors in every row, shapes of fixed length, and no columns of scenes."""

METADATA_KEY = b"fusmae"
"""Key of the file metadata (in the parquet footer) under which each file describes itself."""

MOST_ROWS_PER_GROUP = 1_000_000
"""Rows of a row group that are believed. They are mixed in memory before any is read."""

_SHARD_NAME = re.compile(r"data/(?P<split>\w{1,100})-[0-9]{5,9}-of-[0-9]{5,9}\.parquet")
_SHAPE = pa.list_(pa.int32())
_COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("checksum", pa.uint64(), nullable=False),
        pa.field("sar", pa.large_binary()),
        pa.field("sar_dtype", pa.string()),
        pa.field("sar_shape", _SHAPE),
        pa.field("optical", pa.large_binary()),
        pa.field("optical_dtype", pa.string()),
        pa.field("optical_shape", _SHAPE),
        pa.field("labels", pa.list_(pa.string())),
        pa.field("label_map", pa.large_binary()),
        pa.field("label_map_dtype", pa.string()),
        pa.field("label_map_shape", _SHAPE),
        pa.field("crs", pa.string()),
        pa.field("transform", pa.list_(pa.float64())),
        pa.field("sar_time", pa.string()),
        pa.field("optical_time", pa.string()),
        pa.field("split", pa.string()),
        pa.field("optical_offset", pa.float64()),
        pa.field("sar_units", pa.string()),
        pa.field("optical_units", pa.string()),
        pa.field("processing_baseline", pa.string()),
    ]
)
_SCENE_COLUMNS = ("optical_offset", "sar_units", "optical_units", "processing_baseline")
"""Columns that version 2 had not."""
_EXTRA_TYPES = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}

ARRAY_COLUMNS = {name: (pa.large_binary(),) for name in IMAGES}
"""Columns that hold the bytes of arrays, in the order of a row's checksum, with their type."""

SMALL_COLUMNS: dict[str, tuple[pa.DataType, ...]] = {
    name: (_COLUMNS.field(name).type,) for name in ("id", "checksum", "labels", *(f"{i}_dtype" for i in IMAGES))
} | {f"{name}_shape": (_SHAPE, pa.list_(pa.int32(), 2 if name == "label_map" else 3)) for name in IMAGES}
"""Columns that are needed to read arrays, with their types in each version of the format."""


def shard_schema(info: "PairsInfo", version: int = FORMAT_VERSION) -> pa.Schema:
    """Columns of the shards of a dataset: those that all have, then the dataset's own.

    Args:
        info: what holds for all pairs.
        version: of the format.

    Raises:
        ValueError: an extra column has the name of one that every shard has, or an unknown type.
    """
    schema = _COLUMNS
    if version == 2:
        fields = [field for field in _COLUMNS if field.name not in _SCENE_COLUMNS]
        lengths = {f"{name}_shape": 2 if name == "label_map" else 3 for name in IMAGES}
        schema = pa.schema(
            [
                pa.field(field.name, pa.list_(pa.int32(), lengths[field.name])) if field.name in lengths else field
                for field in fields
            ]
        )
    for name, kind in info.extra_columns.items():
        if name in schema.names or kind not in _EXTRA_TYPES:
            raise ValueError(
                f"{info.name}: extra column {name!r} of type {kind!r} needs a name other than {_COLUMNS.names} and a "
                f"type out of {sorted(_EXTRA_TYPES)}."
            )
        schema = schema.append(pa.field(name, _EXTRA_TYPES[kind]))
    return schema


def pair_checksum(id: str, *pixels: Any) -> int:
    """Checksum (xxh3, 64 bits) of a row: its id, then the bytes of sar, optical and label map, where there is one."""
    digest = xxhash.xxh3_64(id.encode())
    for buffer in pixels:
        digest.update(buffer)
    return digest.intdigest()


def content_hash(checksums: Iterable[int]) -> str:
    """Hash (xxh3, 128 bits, hexadecimal) of a shard, from the checksums of its rows in order."""
    return xxhash.xxh3_128(np.fromiter(checksums, "<u8").tobytes()).hexdigest()


def stored_size(shape: Sequence[int], factors: Sequence[int] = ()) -> int:
    """Number of values that a shard holds for pixels of the declared shape, or -1 where there can be none."""
    if not shape or any(size is None or size < 1 for size in shape):
        return -1
    return native_size(shape, factors) if factors else math.prod(shape)


@lru_cache(1024)
def stored_bytes(dtype: str, shape: tuple[int, ...], factors: tuple[int, ...] = ()) -> int:
    """Length of an array of the declared dtype and shape, or -1 where there can be none."""
    values = stored_size(shape, factors)
    # No file holds more, and numpy has no integers for it.
    return values * np.dtype(dtype).itemsize if dtype in PIXEL_DTYPES and 0 < values < 2**48 else -1


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """One parquet file of a prepared folder.

    Attributes:
        name: path below the folder, `data/<split>-00000-of-00003.parquet`.
        rows: number of pairs.
        row_group_rows: number of pairs in each row group, in file order.
        bytes: size of the file.
        content_hash: xxh3 of 128 bits over the checksums of the rows, in order, as hexadecimal digits. A checksum
            covers id and pixels.
        no_data_pixels: by sensor (`"sar"`, `"optical"`), the pixels without data: non-finite in any band, or, for the
            optical sensor, zero in all bands.
        plausibility: what looks odd in the values of its pairs, as `PairSample.record` gives it; None where nobody
            looked.
        absent: by sensor, the pairs that have none of it.
        statistics: of pairs to train on, by band: number of pixels with data, mean, and sum of squared deviations from
            it, in the scale of the image processor. Empty where they were not measured.
    """

    name: str
    rows: int
    row_group_rows: tuple[int, ...]
    bytes: int
    content_hash: str
    no_data_pixels: dict[str, int]
    plausibility: dict[str, Any] | None = None
    absent: dict[str, int] = dataclasses.field(default_factory=lambda: {"sar": 0, "optical": 0})
    statistics: dict[str, tuple[int, float, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.split_of(self.name)
        for name, kind in (("rows", "a count"), ("bytes", "a count")):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{self.name}: {name} is {getattr(self, name)!r}, but must be {kind}")
        if not all(type(rows) is int and rows <= MOST_ROWS_PER_GROUP for rows in self.row_group_rows):
            raise ValueError(
                f"{self.name}: row_group_rows must be whole numbers of at most {MOST_ROWS_PER_GROUP:,}, not "
                f"{reprlib.repr(list(self.row_group_rows))}"
            )
        if not (isinstance(self.content_hash, str) and re.fullmatch("[0-9a-f]{1,64}", self.content_hash)):
            raise ValueError(f"{self.name}: content_hash must be hexadecimal digits, not {self.content_hash!r:.100}")
        for counts, of in ((self.no_data_pixels, "no_data_pixels"), (self.absent, "absent")):
            if not (
                isinstance(counts, dict)
                and counts.keys() == {"sar", "optical"}
                and all(map(is_count, counts.values()))
            ):
                raise ValueError(
                    f"{self.name}: {of} must hold counts of 'sar' and 'optical', not {reprlib.repr(counts)}"
                )
        if not isinstance(self.statistics, dict) or not all(map(_are_moments, self.statistics.values())):
            raise ValueError(
                f"{self.name}: statistics must be a count, a mean and a sum of squares by band, not "
                f"{reprlib.repr(self.statistics)}"
            )
        if not _is_record(self.plausibility):
            raise ValueError(f"{self.name}: plausibility is {reprlib.repr(self.plausibility)}, which is no record")
        if not self.row_group_rows or min(self.row_group_rows) < 1 or sum(self.row_group_rows) != self.rows:
            raise ValueError(f"{self.name}: row groups {list(self.row_group_rows)} do not add up to {self.rows} rows")

    @property
    def split(self) -> str:
        """Split to which the shard belongs, from its name."""
        return self.split_of(self.name)

    @staticmethod
    def split_of(name: str) -> str:
        """Split in the name of a shard.

        Raises:
            ValueError: the name is not of the form `data/<split>-00000-of-00001.parquet`.
        """
        if not isinstance(name, str) or not (match := _SHARD_NAME.fullmatch(name)):
            raise ValueError(f"shard name {reprlib.repr(name)} is not of the form data/<split>-00000-of-00001.parquet")
        return match["split"]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ShardRecord":
        """The record in its JSON form; `TypeError`, `KeyError` or `ValueError` where that is damaged."""
        statistics = {band: tuple(moments) for band, moments in content.get("statistics", {}).items()}
        return cls(**{**content, "row_group_rows": tuple(content["row_group_rows"]), "statistics": statistics})


def _are_moments(moments: Any) -> bool:
    return (
        isinstance(moments, tuple)
        and len(moments) == 3
        and is_count(moments[0])
        and all(type(value) in (int, float) and math.isfinite(value) for value in moments[1:])
        and moments[2] >= 0
    )


def _is_record(record: Any) -> bool:
    """Whether this is what `PairSample.record` gives, or None."""
    if record is None:
        return True
    try:
        counts, offset = [*record["darkness"].values()], record["offset"]
        for seen in record["findings"].values():
            texts, numbers = [seen["first"], seen["message"]], [seen["pairs"], seen["pixels"]]
            if len(seen) != 4 or not all(is_plain_text(text, 2000) for text in texts):
                return False
            counts += numbers
    except (AttributeError, KeyError, TypeError):
        return False
    return len(record) == 3 and type(offset) in (int, float) and all(map(is_count, counts))
