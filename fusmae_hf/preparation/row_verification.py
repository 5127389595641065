"""Checks of the rows of shards: bytes, shapes, values, labels."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from fusmae_hf.data.checks import PIXEL_DTYPES
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.modeling.sensors_fusmae import BASELINE_0400_OFFSET
from fusmae_hf.preparation.band_moments import BandValues, add_optical, optical_without_data, split_bands
from fusmae_hf.shards.dataset_info import ShardRecord
from fusmae_hf.shards.decoding import RowsInMemory, decode_pairs
from fusmae_hf.shards.format import pair_checksum, stored_size
from fusmae_hf.vocabulary import IMAGES

DB_RANGE = (-100.0, 60.0)
"""Backscatter in dB outside of this comes from no radar: noise floors are some -40 dB, corner reflectors +40 dB."""

VISIBLE_BANDS = ("B02", "B03", "B04")

RowProblem = tuple[str, Literal["error", "warning"], str, str]
"""Check, severity, message and id of the pair."""


@dataclass
class CheckedRows:
    """What was found in a row group.

    Attributes:
        problems: what is wrong.
        ids: names of the pairs.
        checksums: as the rows state them.
        no_data: pixels without data, by sensor.
        complete: False where the pixels of some row could not be looked at.
    """

    problems: list[RowProblem] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    no_data: dict[str, int] = field(default_factory=lambda: {"sar": 0, "optical": 0})
    complete: bool = True


class RowVerification:
    """Checks row groups one after the other and keeps what is needed to judge the whole.

    Attributes:
        seen: number of pairs that had `"labels"` and `"label maps"`.
    """

    def __init__(self, info: PairsInfo):
        self.info, self.seen = info, Counter[str]()
        self._factors = info.optical_factors or (1,) * len(info.optical_bands)
        self._kinds: Counter[tuple[Any, Any]] = Counter()
        self._first_of_kind: dict[tuple[Any, Any], str] = {}
        self._sar_sums = np.zeros(len(info.sar_bands))
        self._sar_numbers, self._negative_values = np.zeros(len(info.sar_bands), np.int64), 0
        self._visible = BandValues()

    def check(self, group: pa.RecordBatch, shard: ShardRecord) -> CheckedRows:
        """Check one row group, whose columns are those of the format."""
        found = CheckedRows()
        rows = RowsInMemory(group, shard.name)
        found.ids = ["" if id is None else id for id in group.column("id").to_pylist()]
        found.checksums = [value or 0 for value in group.column("checksum").to_pylist()]
        alike: dict[Any, list[int]] = {}
        for row, id in enumerate(found.ids):
            if not id:
                found.problems.append(("ids", "error", f"row {row} of a row group has no id.", ""))
                continue
            kind = tuple(rows.declared(name, row) for name in IMAGES)
            wrong = self._wrong_arrays(rows, row, kind)
            found.problems += [("arrays", "error", message, id) for message in wrong]
            if wrong:
                continue
            self._kinds[kind[0], kind[1]] += 1
            self._first_of_kind.setdefault((kind[0], kind[1]), f"{shard.name}: {id}")
            if not self._intact(rows, row, id, kind, found.checksums[row]):
                found.problems.append(("checksums", "error", "is damaged: id or pixels are not those written.", id))
                continue
            alike.setdefault(kind, []).append(row)
        found.complete = sum(map(len, alike.values())) == len(found.ids)
        for of_kind in alike.values():
            batch = decode_pairs([(rows, row) for row in of_kind], self.info.optical_factors, packed=True)
            self._check_pixels(batch, found)
        self._check_small_columns(group, shard, found)
        return found

    def _wrong_arrays(self, rows: RowsInMemory, row: int, kind: Sequence[Any]) -> list[str]:
        """What a row declares that cannot be, or that its bytes are not."""
        messages, info = [], self.info
        bands = {"sar": len(info.sar_bands), "optical": len(info.optical_bands)}
        for name, declared in zip(IMAGES, kind, strict=True):
            if declared is None:
                if name != "label_map":
                    messages.append(f"has no {name} pixels.")
                continue
            dtype, shape = declared
            factors = info.optical_factors if name == "optical" else ()
            if dtype not in PIXEL_DTYPES or len(shape) != (2 if name == "label_map" else 3) or None in shape:
                messages.append(f"declares {name} as {dtype or 'nothing'} {shape}.")
            elif name in bands and shape[0] != bands[name]:
                messages.append(f"declares {shape[0]} bands of {name}, but there are {bands[name]}.")
            elif (values := stored_size(shape, factors)) < 0:
                messages.append(f"declares {name} as {shape}, which bands of several resolutions do not divide.")
            elif (length := len(rows.raw(name, row))) != values * np.dtype(dtype).itemsize:
                messages.append(f"declares {name} as {dtype} {shape}, but holds {length:,} bytes.")
        return messages

    @staticmethod
    def _intact(rows: RowsInMemory, row: int, id: str, kind: Sequence[Any], checksum: int) -> bool:
        names = IMAGES
        stored = [rows.raw(name, row) for name, declared in zip(names, kind, strict=True) if declared is not None]
        return pair_checksum(id, *stored) == checksum

    def _check_pixels(self, batch: dict[str, Any], found: CheckedRows) -> None:
        """Check the values of intact rows of one shape."""
        ids, sar = batch["id"], batch["sar"].numpy()
        shape = batch.get("optical_shape") or tuple(batch["optical"].shape[1:])
        packed = batch["optical"].reshape(len(ids), -1)
        factors = self._factors if "optical_shape" in batch else (1,) * shape[0]
        finite = np.isfinite(sar)
        without_sar = (~finite.all(axis=1)).sum(axis=(1, 2))
        without_optical = optical_without_data(packed, factors, shape)
        found.no_data["sar"] += int(without_sar.sum())
        found.no_data["optical"] += int(without_optical.sum())
        for index in np.flatnonzero(without_sar == math.prod(sar.shape[2:])).tolist():
            found.problems.append(("data", "error", "no pixel of sar is finite in all bands.", ids[index]))
        for index in np.flatnonzero(without_optical == math.prod(shape[1:])).tolist():
            message = "every optical pixel is zero in all bands, or not finite."
            found.problems.append(("data", "error", message, ids[index]))
        if sar.dtype.kind == "f":
            for index in np.flatnonzero(np.isinf(sar).any(axis=(1, 2, 3))).tolist():
                found.problems.append(("data", "warning", "sar holds infinite values: NaN means no data.", ids[index]))
        self._check_backscatter(sar, finite, ids, found)
        visible = [band for band, name in enumerate(self.info.optical_bands) if name in VISIBLE_BANDS]
        if self.info.optical_units == "dn":
            bands = split_bands(packed, factors, shape)
            for band in visible:
                add_optical([self._visible], bands[band], (1,), (1, 1, bands[band].shape[1]))
        if "label_map" in batch:
            self._check_maps(batch["label_map"].numpy(), (sar.shape[2:], shape[1:]), ids, found)

    def _check_backscatter(self, sar: np.ndarray, finite: np.ndarray, ids: Sequence[str], found: CheckedRows) -> None:
        units, bands = self.info.sar_units, self.info.sar_bands
        known = sar if finite.all() else np.where(finite, sar, 0)
        numbers = finite.sum(axis=(2, 3))
        with np.errstate(invalid="ignore"):
            sums = known.sum(axis=(2, 3), dtype=np.float64)
            means = sums / numbers
        self._sar_sums += sums.sum(axis=0)
        self._sar_numbers += numbers.sum(axis=0)
        self._negative_values += int((known < 0).sum())
        lowest, highest = (pick(known, axis=(1, 2, 3)) for pick in (np.min, np.max))
        low, high = {"db": DB_RANGE, "linear": (0, math.inf), "raw": (-math.inf, math.inf)}[units]
        for index in np.flatnonzero((lowest < low) | (highest > high)).tolist():
            message = f"{lowest[index]:g} to {highest[index]:g} is outside of what {units} can be."
            found.problems.append(("SAR values", "warning", message, ids[index]))
        if {"VV", "VH"} <= set(bands):
            vv, vh = (means[:, bands.index(band)] for band in ("VV", "VH"))
            for index in np.flatnonzero(vh > vv).tolist():
                message = f"VH (mean {vh[index]:.4g}) is brighter than VV ({vv[index]:.4g}): swapped?"
                found.problems.append(("VV above VH", "warning", message, ids[index]))

    def _check_maps(self, maps: np.ndarray, grids: Sequence[Any], ids: Sequence[str], found: CheckedRows) -> None:
        self.seen["label maps"] += len(maps)
        names, no_data = self.info.map_class_names, self.info.map_no_data
        kinds = "f" if self.info.map_units else "iu"
        if maps.shape[1:] not in grids or maps.dtype.kind not in kinds:
            message = f"label map is {maps.dtype} {maps.shape[1:]}, which does not fit the patch or its units."
            found.problems += [("label maps", "error", message, id) for id in ids]
        if not names or (maps.min() >= 0 and maps.max() < len(names)):
            return
        unknown = (maps < 0) | (maps >= len(names))
        if no_data is not None:
            unknown &= maps != no_data
        for index in np.flatnonzero(unknown.any(axis=(1, 2))).tolist():
            values = np.unique(maps[index][unknown[index]])[:5].tolist()
            message = f"label map holds {values}, but there are classes 0 to {len(names) - 1}, no data {no_data}."
            found.problems.append(("label maps", "error", message, ids[index]))

    def _check_small_columns(self, group: pa.RecordBatch, shard: ShardRecord, found: CheckedRows) -> None:
        classes = set(self.info.class_names)
        for id, labels in zip(found.ids, group.column("labels").to_pylist(), strict=True):
            self.seen["labels"] += labels is not None
            if classes and (unknown := sorted({str(name) for name in labels or ()} - classes)):
                found.problems.append(("labels", "error", f"labels {unknown} are none of the classes.", id))
        for id, transform in zip(found.ids, group.column("transform").to_pylist(), strict=True):
            if transform is not None and (
                len(transform) != 6 or not all(number is not None and math.isfinite(number) for number in transform)
            ):
                found.problems.append(("places", "error", f"transform is {transform}.", id))
        for id, split in zip(found.ids, group.column("split").to_pylist(), strict=True):
            if split != shard.split:
                found.problems.append(("places", "error", f"says split {split!r} in a file of {shard.split!r}.", id))

    def conclude(self) -> Iterator[tuple[str, Literal["error", "warning"], str]]:
        """What is wrong with all rows taken together."""
        if len(self._kinds) > 1:
            (common, count), *rest = self._kinds.most_common()
            others = (f"{_kind(kind)} in {number:,}, first {self._first_of_kind[kind]}" for kind, number in rest[:3])
            yield (
                "arrays",
                "warning",
                "pairs differ in shape or dtype, so that batches cannot hold them together: "
                f"{_kind(common)} in {count:,}; {'; '.join(others)}.",
            )
        if any(sar[1][1:] != optical[1][1:] for sar, optical in self._kinds):
            yield "arrays", "warning", "sar and optical patches are of different size: the processor wants one grid."
        if not self._sar_numbers.all():
            return
        if self.info.sar_units == "db" and not self._negative_values:
            yield (
                "SAR values",
                "error",
                "are declared in dB, but none is negative: this looks like linear power or 8-bit data.",
            )
        if self.info.sar_units == "linear" and self._negative_values > self._sar_numbers.sum() / 2:
            yield "SAR values", "error", "are declared as linear power, but most are negative: this looks like dB."
        yield from self._judge_bands()
        yield from self._judge_offset()

    def _judge_bands(self) -> Iterator[tuple[str, Literal["warning"], str]]:
        bands = self.info.sar_bands
        if not {"VV", "VH"} <= set(bands):
            return
        mean = self._sar_sums / self._sar_numbers
        vv, vh = (float(mean[bands.index(band)]) for band in ("VV", "VH"))
        if vh > vv:
            message = f"over all pairs VH (mean {vh:.2f}) is brighter than VV ({vv:.2f}): the bands look swapped."
            yield "VV above VH", "warning", message

    def _judge_offset(self) -> Iterator[tuple[str, Literal["warning"], str]]:
        values, offset = self._visible.distribution(), self.info.optical_offset
        darkest, middle = values.percentile(1), values.percentile(50)
        if offset == 0 and darkest >= BASELINE_0400_OFFSET:
            yield (
                "optical offset",
                "warning",
                f"99 % of the values of B02 to B04 are {darkest:.0f} or more, as if {BASELINE_0400_OFFSET} had been "
                "added (processing baseline 04.00 and later), but no offset is declared.",
            )
        if middle < offset:
            yield (
                "optical offset",
                "warning",
                f"half of the values of B02 to B04 are below {middle:.0f}, less than the declared offset {offset:g}.",
            )


def _kind(kind: tuple[Any, Any]) -> str:
    """Dtypes and shapes of the patches of a pair in words."""
    return ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in zip(("sar", "optical"), kind, strict=True))
