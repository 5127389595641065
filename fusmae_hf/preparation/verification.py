"""Checking a folder of shards: that it is whole and unchanged, and that its values are what they are said to be."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from fusmae_hf.data.checks import problems_of_pair
from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.data.plausibility import PairSample
from fusmae_hf.files.strict_json import parse_json
from fusmae_hf.modeling.plausibility_fusmae import VISIBLE_BANDS, Finding
from fusmae_hf.preparation.verification_report import CHECKS, QUICK, Problem, Severity, VerificationReport, count_of
from fusmae_hf.shards.dataset_info import DatasetInfo, is_no_folder, read_dataset_info, read_left_out
from fusmae_hf.shards.decoding import DamagedShardError, RowsInMemory, decode_pairs
from fusmae_hf.shards.format import METADATA_KEY, ShardRecord, content_hash, shard_schema
from fusmae_hf.shards.reading import ShardFile
from fusmae_hf.vocabulary import IMAGES, SENSORS

SAMPLE = 2**18
"""Number of pixels by which a whole dataset is judged, or one of each pair."""

DECODED_TOGETHER = 16
"""Pairs that are read back at once, at most."""

_SMALL = {field.name for field in dataclasses.fields(Pair)} - {*IMAGES, "extra"}
"""Columns that are fields of a pair."""

_CHECK_OF_TOPIC = {
    "sar bands": "VV above VH",
    "optical offset": "optical offset",
    "optical offsets": "optical offset",
    "map range": "label maps",
}
"""Check that a finding of some topic belongs to; otherwise that on the values of its sensor."""


def verify_shards(
    folder: str | os.PathLike[str],
    split: str | None = None,
    *,
    quick: bool = False,
    strict: bool = False,
    progress: bool = False,
) -> VerificationReport:
    """Check a folder of shards and name everything that is wrong with it, by file and pair.

    A bad file does not end it: all others are still looked at.

    Args:
        folder: a folder written by `prepare`, or its URL as fsspec knows it (`hf://datasets/<user>/<name>`).
        split: check this one only; ids are still compared with those of the other splits.
        quick: check only what the footers tell, see `QUICK`: pixels are not read.
        strict: what would be a warning is an error.
        progress: show a progress bar where the output is a terminal.

    Returns:
        A report; `sound` tells whether there were errors.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such split.
    """
    root = os.fspath(folder).rstrip("/")
    report = VerificationReport(root, {"dataset_info.json": "1 file"})
    try:
        dataset = read_dataset_info(root)
    except (OSError, ValueError) as error:
        if is_no_folder(root):
            raise
        report.problems.append(Problem("dataset_info.json", "error", str(error)))
        return report
    everything = tuple(shard for of_split in dataset.splits.values() for shard in of_split)
    chosen = everything if split is None else dataset.shards(split)
    verification = _Verification(root, dataset, report, strict)
    verification.check_left_out()
    sound = verification.check_files(chosen)
    if quick:
        return report
    verification.check_rows(sound, progress)
    verification.check_ids([shard for shard in everything if shard not in chosen])
    return report


class _Verification:
    """The state of one run over a folder."""

    def __init__(self, root: str, dataset: DatasetInfo, report: VerificationReport, strict: bool):
        self.root, self.dataset, self.report, self.strict = root, dataset, report, strict
        self.filesystem, self.folder = fsspec.url_to_fs(root)
        self.ids: list[tuple[str, list[str]]] = []
        self._seen: set[str] = set()
        self._kinds: Counter[tuple[Any, ...]] = Counter()
        self._first_of_kind: dict[tuple[Any, ...], str] = {}

    def note(self, check: str, severity: Severity, message: str, file: str = "", pair: str = "") -> None:
        """Add a problem to the report; with `strict` every one is an error."""
        severity = "error" if self.strict else severity
        self.report.problems.append(Problem(check, severity, message, file, pair))

    def check_left_out(self) -> None:
        """Compare the list of pairs left out with their number."""
        try:
            listed = len(read_left_out(self.root))
        except (OSError, ValueError) as error:
            self.note("dataset_info.json", "warning", str(error))
            return
        if listed != self.dataset.num_left_out:
            self.note(
                "dataset_info.json",
                "warning",
                f"says that {self.dataset.num_left_out:,} pairs were left out, but left_out.csv lists {listed:,}.",
            )

    def check_files(self, shards: Sequence[ShardRecord]) -> list[ShardRecord]:
        """Check that files are there with the footer that they should have; those whose rows can be looked at."""
        self.report.checked |= dict.fromkeys(QUICK[1:], count_of(len(shards), "file"))
        recorded = {shard.name for of_split in self.dataset.splits.values() for shard in of_split}
        present = {f"data/{os.path.basename(file)}" for file in self.filesystem.glob(f"{self.folder}/data/*.parquet")}
        for name in sorted(present - recorded):
            message = "dataset_info.json does not list it, but plain `datasets.load_dataset` would read it."
            self.note("files", "warning", message, name)
        return [shard for shard in shards if self._check_file(shard)]

    def _check_file(self, shard: ShardRecord) -> bool:
        """Compare size and footer with dataset_info.json; whether the rows can be looked at."""
        try:
            size = self.filesystem.info(f"{self.folder}/{shard.name}")["size"]
            if size != shard.bytes:
                self.note("files", "error", f"has {size:,} bytes, but {shard.bytes:,} were written.", shard.name)
            footer = ShardFile(self.root, shard).footer()
        except FileNotFoundError:
            self.note("files", "error", "is missing.", shard.name)
            return False
        except DamagedShardError as error:
            self.note("footers", "error", self._of_file(error, shard), shard.name)
            return False
        except OSError as error:
            self.note("files", "error", f"cannot be reached: {error}.", shard.name)
            return False
        for message in _differences(footer, shard, self.dataset):
            self.note("footers", "error", message, shard.name)
        return self._check_columns(footer.schema.to_arrow_schema(), shard)

    def _of_file(self, error: Exception, shard: ShardRecord) -> str:
        """What an error of reading says, without the name of the file, which stands beside it."""
        return str(error).removeprefix(f"{self.root}/").removeprefix(f"{shard.name} ")

    def _check_columns(self, found: pa.Schema, shard: ShardRecord) -> bool:
        wanted, sound = shard_schema(self.dataset.info, self.dataset.format_version), True
        for name in dict.fromkeys((*wanted.names, *found.names)):
            if name not in wanted.names:
                self.note("columns", "error", f"has a column {name!r}, which is not declared.", shard.name)
                continue
            kind, needed = found.field(name).type if name in found.names else None, wanted.field(name).type
            if kind != needed:
                message = f"column {name!r} is {kind}, not {needed}." if kind else f"has no column {name!r}."
                self.note("columns", "error", message, shard.name)
                sound = False
        return sound

    def check_rows(self, shards: Sequence[ShardRecord], progress: bool) -> None:
        """Read every row as the loader does and check it as the writer does; then what all together tell."""
        info, total = self.dataset.info, sum(shard.rows for shard in shards)
        self._sample = PairSample(info, max(1, SAMPLE // max(1, total)))
        with tqdm(total=total, unit=" pairs", desc="verifying", disable=None if progress else True) as bar:
            for shard in shards:
                bar.set_postfix_str(f"{len(self.report.problems):,} problems" if self.report.problems else "")
                self._check_rows_of(shard, bar)
        self._check_all_together()
        checked = self.report.checked
        checked |= {check: count_of(total, "pair") for check in CHECKS if check not in checked}
        checked |= dict.fromkeys(("content hash", "no-data counts"), count_of(len(shards), "file"))
        checked["row groups"] = count_of(sum(len(shard.row_group_rows) for shard in shards), "row group")
        judged = {
            "labels": "labels" in self._seen,
            "label maps": "label maps" in self._seen,
            "SAR values": info.sar_units != "raw",
            "VV above VH": info.sar_units != "raw" and {"VV", "VH"} <= set(info.sar_bands),
            "optical values": info.optical_units != "raw",
            "optical offset": info.optical_units != "raw" and not set(VISIBLE_BANDS).isdisjoint(info.optical_bands),
        }
        self.report.checked = {
            check: checked[check] for check in CHECKS if check in checked and judged.get(check, True)
        }

    def _check_rows_of(self, shard: ShardRecord, bar: tqdm) -> None:
        complete, checksums, ids, no_data = True, list[int](), list[str](), dict.fromkeys(SENSORS, 0)
        self._absent = dict.fromkeys(SENSORS, 0)
        for group in self._row_groups(shard):
            if group is None:
                complete = False
                continue
            rows, small = group
            ids += (values["id"] or "" for values in small)
            checksums += (values["checksum"] or 0 for values in small)
            named = [row for row, values in enumerate(small) if values["id"]]
            for row in sorted(set(range(len(small))).difference(named)):
                self.note("ids", "error", f"row {row} of a row group has no id.", shard.name)
                complete = False
            for start in range(0, len(named), DECODED_TOGETHER):
                together = named[start : start + DECODED_TOGETHER]
                for pair in self._read_back(rows, together, small, shard):
                    if pair is None:
                        complete = False
                    else:
                        self._check_pair(pair, shard, no_data)
            bar.update(len(rows))
        self.ids.append((shard.name, ids))
        if len(checksums) == shard.rows and content_hash(checksums) != shard.content_hash:
            self.note(
                "content hash",
                "error",
                f"is {content_hash(checksums)} by its rows, but {shard.content_hash} is recorded: these are other "
                "pairs, or in another order.",
                shard.name,
            )
        if complete and no_data != shard.no_data_pixels:
            self.note("no-data counts", "error", f"are {no_data}, recorded {shard.no_data_pixels}.", shard.name)
        if complete and self._absent != shard.absent:
            message = f"pairs without a sensor are {self._absent}, recorded {shard.absent}."
            self.note("no-data counts", "error", message, shard.name)

    def _read_back(
        self, rows: RowsInMemory, numbers: Sequence[int], small: Sequence[dict[str, Any]], shard: ShardRecord
    ) -> Sequence[Pair | None]:
        """The pairs of some rows, decoded as for training; None, with a note, for one that is not as written."""
        try:
            return _pairs(rows, numbers, small, self.dataset.info)
        except DamagedShardError as error:
            if len(numbers) == 1:
                message = str(error).removeprefix(f"{shard.name} ")
                self.note("checksums", "error", message, shard.name, small[numbers[0]]["id"])
                return [None]
        except ValueError:  # they differ in shape or dtype
            if len(numbers) == 1:
                raise
        return [pair for number in numbers for pair in self._read_back(rows, [number], small, shard)]

    def _check_pair(self, pair: Pair, shard: ShardRecord, no_data: dict[str, int]) -> None:
        found: dict[str, int] = {}
        problems = [*problems_of_pair(pair, self.dataset.info, found)]
        for sensor, count in found.items():
            no_data[sensor] += count
        if pair.split != shard.split:
            problems.append(("places", f"says split {pair.split!r} in a file of {shard.split!r}."))
        if pair.labels is not None:
            self._seen.add("labels")
        if pair.label_map is not None:
            self._seen.add("label maps")
            problems += _unknown_classes(pair.label_map, self.dataset.info)
        for check, message in problems:
            self.note(check, "error", message, shard.name, pair.id)
        if not found:
            return
        for sensor in SENSORS:
            self._absent[sensor] += getattr(pair, sensor) is None
        if pair.sar is None or pair.optical is None:
            for finding in self._sample.add(pair):
                self._note_finding(finding, "warning", shard.name, pair.id)
            return
        kind = tuple((pixels.dtype.name, pixels.shape) for pixels in (pair.sar, pair.optical))
        self._kinds[kind] += 1
        self._first_of_kind.setdefault(kind, f"{shard.name}: {pair.id}")
        if pair.sar.dtype.kind == "f" and np.isinf(pair.sar).any():
            self.note("data", "warning", "sar holds infinite values: NaN means no data.", shard.name, pair.id)
        for finding in self._sample.add(pair):
            self._note_finding(finding, "warning", shard.name, pair.id)

    def _note_finding(self, finding: Finding, severity: Severity, file: str = "", pair: str = "") -> None:
        values = "SAR values" if finding.topic.startswith("sar") else "optical values"
        self.note(_CHECK_OF_TOPIC.get(finding.topic, values), severity, finding.for_commands(), file, pair)

    def _check_all_together(self) -> None:
        if len(self._kinds) > 1:
            (common, count), *rest = self._kinds.most_common()
            others = (f"{_kind(kind)} in {number:,}, first {self._first_of_kind[kind]}" for kind, number in rest[:3])
            self.note(
                "arrays",
                "warning",
                "pairs differ in shape or dtype, so that batches cannot hold them together: "
                f"{_kind(common)} in {count:,}; {'; '.join(others)}.",
            )
        if any(sar[1][1:] != optical[1][1:] for sar, optical in self._kinds):
            message = "sar and optical patches are of different size: the processor wants one grid."
            self.note("arrays", "warning", message)
        for finding in self._sample.findings():
            severity: Severity = "error" if finding.contradicts_units or finding.impossible else "warning"
            self._note_finding(dataclasses.replace(finding, seen=f"over all pairs: {finding.seen}"), severity)

    def _row_groups(self, shard: ShardRecord) -> Iterator[tuple[RowsInMemory, list[dict[str, Any]]] | None]:
        """Rows of each row group of a file and their values but for pixels; None, with a note, where unreadable."""
        file = ShardFile(self.root, shard)
        for number in range(len(shard.row_group_rows)):
            try:
                (group,) = file.read([number]).combine_chunks().to_batches()
                small = group.select([name for name in group.schema.names if name not in IMAGES])
                found = RowsInMemory(group, shard.name), small.to_pylist()
            except DamagedShardError as error:
                message = f"row group {number}: {self._of_file(error, shard)}"
                self.note("row groups", "error", message, shard.name)
                found = None
            yield found

    def check_ids(self, others: Sequence[ShardRecord]) -> None:
        """Check that no two pairs have the same id, also in splits whose rows were not looked at."""
        for shard in others:
            try:
                table = ShardFile(self.root, shard).read(range(len(shard.row_group_rows)), ["id"])
                self.ids.append((shard.name, table.column("id").to_pylist()))
            except DamagedShardError as error:
                message = f"cannot be compared with it: {self._of_file(error, shard)}"
                self.note("ids", "error", message, shard.name)
        first: dict[str, str] = {}
        for name, ids in self.ids:
            for id in filter(None, ids):
                if id in first:
                    again = "twice" if first[id] == name else f"also in {first[id]}"
                    self.note("ids", "error", f"is {again}, but a pair may be in one place only.", name, id)
                first.setdefault(id, name)
        if others:
            self.report.checked["ids"] = count_of(len(first), "pair")


def _differences(footer: pq.FileMetaData, shard: ShardRecord, dataset: DatasetInfo) -> Iterator[str]:
    """What a file says of itself that is not what dataset_info.json says."""
    try:
        described = parse_json((footer.metadata or {})[METADATA_KEY])
        if not isinstance(described, dict):
            raise ValueError
    except (KeyError, ValueError):
        yield "does not describe itself, so it was not written by `fusmae prepare`."
        return
    expected = json.loads(json.dumps(dataclasses.asdict(dataset.info))) | {
        "format_version": dataset.format_version,
        "split": shard.split,
        "rows": shard.rows,
        "content_hash": shard.content_hash,
    }
    # What differs from scene to scene may be one value in all pairs of a file that came from another set.
    for key in ("per_scene", *dataset.info.per_scene):
        del expected[key]
    for key, value in expected.items():
        if described.get(key) != value:
            yield f"says {key} {described.get(key)!r}, but dataset_info.json says {value!r}: of another preparation?"


def _pairs(rows: RowsInMemory, numbers: Sequence[int], small: Sequence[dict[str, Any]], info: PairsInfo) -> list[Pair]:
    """The pairs of some rows of one shape and dtype. Raises DamagedShardError where one is not what was written."""
    batch = decode_pairs([(rows, number) for number in numbers], info, packed=True)
    arrays = {name: batch[name].numpy() for name in IMAGES if name in batch}
    pairs = []
    for place, values in enumerate(small[number] for number in numbers):
        images: dict[str, Any] = {
            name: array[place] if f"{name}_available" not in batch or batch[f"{name}_available"][place] else None
            for name, array in arrays.items()
        }
        if images["optical"] is not None and "optical_shape" in batch:
            images["optical"] = NativeBands.unpack(
                images["optical"], info.optical_factors, *batch["optical_shape"][1:]
            )
        columns = {name: value for name, value in values.items() if name in _SMALL}
        pairs.append(Pair(**columns, **images, extra={name: values[name] for name in info.extra_columns}))
    return pairs


def _unknown_classes(label_map: np.ndarray, info: PairsInfo) -> Iterator[tuple[str, str]]:
    names, no_data = info.map_class_names, info.map_no_data
    if not names or (label_map.min() >= 0 and label_map.max() < len(names)):
        return
    unknown = (label_map < 0) | (label_map >= len(names))
    if no_data is not None:
        unknown &= label_map != no_data
    if unknown.any():
        values = np.unique(label_map[unknown])[:5].tolist()
        yield (
            "label maps",
            f"label map holds {values}, but there are classes 0 to {len(names) - 1}, no data {no_data}.",
        )


def _kind(kind: tuple[Any, Any]) -> str:
    """Dtypes and shapes of the patches of a pair in words."""
    return ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in zip(SENSORS, kind, strict=True))
