"""Writing pairs into parquet shards: one row a pair, raw pixels in their own dtype, nothing converted."""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusmae_hf.data.checks import pair_to_store
from fusmae_hf.data.findings import Seen, merge_seen
from fusmae_hf.data.native_resolution import NativeBands, native_bands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.files.atomic import explain_failed_write, flush_to_disk, incomplete_path, write_atomically
from fusmae_hf.files.plain_text import plain_text
from fusmae_hf.shards.dataset_info import LEFT_OUT_NAME, DatasetInfo, LeftOut, count_reasons
from fusmae_hf.shards.format import (
    FILE_NAME,
    FORMAT_VERSION,
    METADATA_KEY,
    ShardRecord,
    content_hash,
    pair_checksum,
    shard_schema,
)
from fusmae_hf.shards.moments import BandSums
from fusmae_hf.vocabulary import IMAGES, OF_SCENES, SENSORS

MOSTLY = 0.5
"""Share of missing pixels from which on a pair is told of, unless something says that they are missing."""


class ShardWriter:
    """Writes one file, pair by pair. It appears under its name when it is complete and on the disk, or not at all.

    Use it as a context manager: leaving it with an exception removes what was written.

    Args:
        info: what holds for all pairs.
        folder: the prepared folder.
        name: path below it, `data/<split>-00000-of-00003.parquet`. A file of that name is replaced.
        row_group_rows: pairs in a row group, the unit that streaming reads (about 9 MB at the 12 + 2 bands of
            BigEarthNet, 15 MB where all bands are of 10 m).
        max_no_data: largest share of the pixels of either sensor that may be without data.
        require_both: whether a pair must have both sensors: see `pair_to_store`.

    Attributes:
        record: describes the file once it is there; None before, and where no pair was added.
        mostly_missing: the pairs of which more than half of the pixels of a sensor hold no data, by sensor.

    Raises:
        ValueError: `row_group_rows` is below one, or the name is not that of a shard.
        OSError: the file cannot be written. Whatever the error, nothing is left behind.
    """

    def __init__(
        self,
        info: PairsInfo,
        folder: str | os.PathLike[str],
        name: str,
        *,
        row_group_rows: int = 32,
        max_no_data: float = 1.0,
        require_both: bool = False,
    ):
        if row_group_rows < 1:
            raise ValueError(f"{row_group_rows=} must be at least 1.")
        self.record: ShardRecord | None = None
        self._info, self._name, self._path = info, name, Path(folder, name)
        self._split, self._schema = ShardRecord.split_of(name), shard_schema(info)
        self._row_group_rows, self._max_no_data = row_group_rows, max_no_data
        self._ids: set[str] = set()
        self._checksums: list[int] = []
        self._group_rows: list[int] = []
        self._require_both = require_both
        self.mostly_missing: dict[str, Seen] = {}
        self._no_data, self._absent = dict.fromkeys(SENSORS, 0), dict.fromkeys(SENSORS, 0)
        # Where none are published; summing takes a fifth of the time of writing.
        self._sums = BandSums() if self._split == "train" and info.statistics is None else None
        self._rows: list[dict[str, Any]] = []
        self._pixels = {name: _PixelColumn() for name in IMAGES}
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._incomplete = incomplete_path(self._path)
        with explain_failed_write(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._incomplete.open("xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._writer:
                self._writer.is_open = False  # or its destructor would write to the closed file
            with suppress(OSError):
                self._file.close()
            self._incomplete.unlink(missing_ok=True)

    def add(self, pair: Pair) -> Pair:
        """Take in one pair, and give it as it is stored.

        Raises:
            PairError: the pair must not be stored: see `pair_to_store`; its id was added before; more than
                `max_no_data` of a sensor's pixels hold no data; or pixels of a coarser band are not repeated. Nothing
                was taken in.
            OSError: the file cannot be written.
        """
        pair, no_data = pair_to_store(pair, self._info, require_both=self._require_both)
        if pair.id in self._ids:
            raise PairError(f"{pair.id}: a second pair has this id, but ids must be unique.")
        for sensor in SENSORS:
            share = no_data[sensor] / math.prod(pair.size)
            if share > self._max_no_data:
                raise PairError(
                    f"{pair.id}: {share:.1%} of the {sensor} pixels hold no data, but at most {self._max_no_data:.1%} "
                    "may."
                )
            if share > MOSTLY:
                message = (
                    f"more than half of the {sensor} pixels hold no data; `--max-no-data {MOSTLY}` leaves it out."
                )
                seen = Seen(1, no_data[sensor], plain_text(pair.id), message)
                merge_seen(self.mostly_missing, {f"{sensor} missing": seen})
        arrays = stored_arrays(pair, self._info)
        stored = [self._pixels[name].append(arrays.get(name)) for name in IMAGES]
        of_scene = self._info.of_scene(pair)
        row = _small_values(pair, self._split, of_scene)
        row["checksum"] = pair_checksum(pair.id, *(pixels for pixels in stored if pixels is not None))
        self._rows.append(row)
        self._ids.add(pair.id)
        self._checksums.append(row["checksum"])
        for sensor, count in no_data.items():
            self._no_data[sensor] += count
            self._absent[sensor] += getattr(pair, sensor) is None
        if self._sums:
            self._sums.add(pair, of_scene, no_data)
        if len(self._rows) == self._row_group_rows:
            self._write_row_group()
        return pair

    def _write_row_group(self) -> None:
        columns = [
            self._pixels[field.name].to_arrow()
            if field.name in self._pixels
            else pa.array([row.get(field.name) for row in self._rows], field.type)
            for field in self._schema
        ]
        with explain_failed_write(self._path):
            # Pixels hardly compress and nobody filters by them: no compression, dictionaries or statistics.
            self._writer = self._writer or pq.ParquetWriter(
                self._file, self._schema, compression="none", use_dictionary=False, write_statistics=["id"]
            )
            self._writer.write_table(pa.table(columns, schema=self._schema), row_group_size=len(self._rows))
        self._group_rows.append(len(self._rows))
        self._rows.clear()
        for column in self._pixels.values():
            column.clear()

    def _finish(self) -> None:
        if self._rows:
            self._write_row_group()
        if self._writer is None:
            return
        rows, hashed = sum(self._group_rows), content_hash(self._checksums)
        described = {"format_version": FORMAT_VERSION, "split": self._split, "rows": rows, "content_hash": hashed}
        with explain_failed_write(self._path):
            self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(dataclasses.asdict(self._info) | described)})
            self._writer.close()
            flush_to_disk(self._file)
            size = self._incomplete.stat().st_size
            os.replace(self._incomplete, self._path)
        statistics = self._sums.by_band() if self._sums else {}
        groups = tuple(self._group_rows)
        self.record = ShardRecord(
            self._name, rows, groups, size, hashed, self._no_data, absent=self._absent, statistics=statistics
        )


def write_shard(
    pairs: Iterable[Pair], info: PairsInfo, folder: str | os.PathLike[str], name: str, *, row_group_rows: int = 32
) -> ShardRecord | None:
    """Write one file of pairs, all of which must be fit to be stored: see `ShardWriter`, which takes them one by one.

    Returns:
        A record of the file, for `write_dataset_info`; None, and no file, where there was no pair.

    Raises:
        PairError: a pair must not be stored: see `ShardWriter.add`.
        ValueError: `row_group_rows` is below one.
        OSError: the file cannot be written. Whatever the error, nothing is left behind.
    """
    with ShardWriter(info, folder, name, row_group_rows=row_group_rows) as shard:
        for pair in pairs:
            shard.add(pair)
    return shard.record


def write_dataset_info(
    folder: str | os.PathLike[str],
    info: PairsInfo,
    shards: Iterable[ShardRecord],
    left_out: Sequence[LeftOut] = (),
    *,
    preparation: Mapping[str, Any] | None = None,
) -> DatasetInfo:
    """Write `dataset_info.json`, atomically, and `left_out.csv` before it; the last step of preparing a folder.

    Args:
        folder: the prepared folder, which already holds the shards.
        info: what holds for all pairs.
        shards: what `write_shard` returned, for all splits.
        left_out: pairs that were left out.
        preparation: how the folder was made. Whoever gives it vouches that no pair is in two splits; otherwise the
            ids of all shards are read to see.

    Raises:
        ValueError: no shard was given; an id is in two splits; or the columns of two shards differ.
        OSError: a file cannot be written; nothing half-written is left behind.
    """
    splits: dict[str, tuple[ShardRecord, ...]] = {}
    for shard in shards:
        splits[shard.split] = (*splits.get(shard.split, ()), shard)
    if not splits:
        raise ValueError(f"There is no shard to describe in {folder}: every pair was left out, or none was found.")
    if preparation is None:
        _check_consistent(Path(folder), splits)
    described = DatasetInfo(info, splits, count_reasons(left_out), dict(preparation or {}))
    write_left_out(folder, left_out)
    write_atomically(Path(folder, FILE_NAME), json.dumps(described.to_json(), indent=1).encode())
    return described


def _check_consistent(folder: Path, splits: dict[str, tuple[ShardRecord, ...]]) -> None:
    """Check what no split knows of the others: that no pair is in two of them, and that all have the same columns."""
    split_of: dict[str, str] = {}
    schema = None
    for shard in chain.from_iterable(splits.values()):
        with pq.ParquetFile(folder / shard.name) as file:
            schema = schema or file.schema_arrow
            if not file.schema_arrow.equals(schema):
                raise ValueError(
                    f"{folder / shard.name} has the columns {file.schema_arrow.to_string()}, but those before it "
                    f"{schema.to_string()}. Give extra columns the same type in every split and prepare again."
                )
            ids = file.read(["id"]).column("id").to_pylist()
        twice = next((id for id in ids if id in split_of), None)
        if twice is not None:
            raise ValueError(
                f"{twice} is in the split {split_of[twice]!r} and again in {folder / shard.name}: a pair may be in "
                "one split only. Correct the splits and prepare again."
            )
        split_of |= dict.fromkeys(ids, shard.split)


def write_left_out(folder: str | os.PathLike[str], left_out: Sequence[LeftOut]) -> None:
    """Write `left_out.csv` into a folder, atomically; no file where there is nothing to say.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(folder, LEFT_OUT_NAME)
    if not left_out:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("id", "file", "reason"))
    writer.writerows((pair.id, pair.file, pair.reason) for pair in left_out)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def stored_arrays(pair: Pair, info: PairsInfo) -> dict[str, list[np.ndarray]]:
    """The arrays whose bytes, one after the other, a shard holds as `sar`, `optical` and `label_map`.

    Raises:
        PairError: pixels of a coarser band are not repeated. Names the id.
    """
    arrays = {} if pair.sar is None else {"sar": [pair.sar]}
    if pair.optical is None:
        pass
    elif isinstance(pair.optical, NativeBands):
        arrays["optical"] = list(pair.optical.bands)
    elif info.optical_factors:
        try:
            arrays["optical"] = list(native_bands(pair.optical, info.optical_factors).bands)
        except ValueError as error:
            raise PairError(f"{pair.id}: optical {error}.") from error
    else:
        arrays["optical"] = [pair.optical]
    if pair.label_map is not None:
        arrays["label_map"] = [pair.label_map]
    return arrays


def row_checksum(pair: Pair, info: PairsInfo) -> int:
    """Checksum that a pair will have in a shard. Raises `PairError` like `stored_arrays`."""
    arrays = stored_arrays(pair, info)
    little_endian = (
        array.astype(array.dtype.newbyteorder("<")).tobytes() for name in IMAGES for array in arrays.get(name, ())
    )
    return pair_checksum(pair.id, *little_endian)


def _small_values(pair: Pair, split: str, of_scene: PairsInfo) -> dict[str, Any]:
    """Values of all columns of a row but the pixels and the checksum."""
    row = {
        "id": pair.id,
        "labels": pair.labels,
        "crs": pair.crs,
        "transform": pair.transform,
        "sar_time": pair.sar_time,
        "optical_time": pair.optical_time,
        "split": split,
        **{name: getattr(of_scene, name) for name in OF_SCENES},
        "processing_baseline": pair.processing_baseline,
        **pair.extra,
    }
    for name in IMAGES:
        if (pixels := getattr(pair, name)) is not None:
            row[f"{name}_dtype"], row[f"{name}_shape"] = pixels.dtype.name, pixels.shape
    return row


class _PixelColumn:
    """Pixels of the rows of one row group as they lie in the file: C order, little endian.

    The memory is used again for the next row group: fresh memory would cost as much as all the rest of writing.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self.clear()

    def clear(self) -> None:
        self._ends, self._valid = [0], list[bool]()

    def append(self, arrays: Sequence[np.ndarray] | None) -> np.ndarray | None:
        """Append one value, the bytes of `arrays` one after the other, or a missing one; returns a view of it."""
        start = end = self._ends[-1]
        self._valid.append(arrays is not None)
        needed = end + sum(array.nbytes for array in arrays or ())
        if needed > len(self._bytes):
            larger = np.empty(max(needed, 2 * len(self._bytes)), np.uint8)
            larger[:start] = self._bytes[:start]
            self._bytes = larger
        for array in arrays or ():
            place = self._bytes[end : end + array.nbytes]
            place.view(array.dtype.newbyteorder("<")).reshape(array.shape)[...] = array
            end += array.nbytes
        self._ends.append(end)
        return None if arrays is None else self._bytes[start:end]

    def to_arrow(self) -> pa.LargeBinaryArray:
        """All values, as a view."""
        missing = None
        if not all(self._valid):
            missing = pa.py_buffer(np.packbits(self._valid, bitorder="little"))
        ends = pa.py_buffer(np.array(self._ends, np.int64))
        return pa.Array.from_buffers(
            pa.large_binary(), len(self._valid), [missing, ends, pa.py_buffer(self._bytes[: self._ends[-1]])]
        )
