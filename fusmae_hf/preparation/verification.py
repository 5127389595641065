"""Checking a folder of shards: that it is whole and unchanged, and that its values are what they are said to be."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from fusmae_hf.files.strict_json import parse_json
from fusmae_hf.preparation.row_verification import VISIBLE_BANDS, RowVerification
from fusmae_hf.preparation.verification_report import CHECKS, QUICK, Problem, Severity, VerificationReport, count_of
from fusmae_hf.shards.dataset_info import DatasetInfo, ShardRecord, read_dataset_info, read_left_out
from fusmae_hf.shards.format import FORMAT_VERSION, METADATA_KEY, content_hash, shard_schema
from fusmae_hf.shards.reading import ShardFile, check_decoded_size

__all__ = ["CHECKS", "Problem", "VerificationReport", "verify_shards"]


def verify_shards(
    folder: str | os.PathLike[str], split: str | None = None, *, quick: bool = False, progress: bool = False
) -> VerificationReport:
    """Check a folder of shards and name everything that is wrong with it, by file and pair.

    A bad file does not end it: all others are still looked at.

    Args:
        folder: a folder written by `prepare`, or its URL as fsspec knows it (`hf://datasets/<user>/<name>`).
        split: check this one only; ids are still compared with those of the other splits.
        quick: check only what the footers tell, see `QUICK`: pixels are not read.
        progress: show a progress bar where the output is a terminal.

    Returns:
        A report; `sound` tells whether there were errors.

    Raises:
        ValueError: there is no such split.
    """
    root = os.fspath(folder).rstrip("/")
    report = VerificationReport(root, {"dataset_info.json": "1 file"})
    try:
        dataset = read_dataset_info(root)
    except (OSError, ValueError) as error:
        report.problems.append(Problem("dataset_info.json", "error", str(error)))
        return report
    everything = tuple(shard for of_split in dataset.splits.values() for shard in of_split)
    chosen = everything if split is None else dataset.shards(split)
    verification = _Verification(root, dataset, report)
    verification.check_left_out()
    sound = verification.check_files(chosen)
    if quick:
        return report
    verification.check_rows(sound, progress)
    verification.check_ids([shard for shard in everything if shard not in chosen])
    return report


UNREADABLE = (pa.ArrowException, OSError, ValueError)
"""What reading a damaged file raises."""


class _Verification:
    """The state of one run over a folder."""

    def __init__(self, root: str, dataset: DatasetInfo, report: VerificationReport):
        self.root, self.dataset, self.report = root, dataset, report
        self.filesystem, self.folder = fsspec.url_to_fs(root)
        self.ids: list[tuple[str, list[str]]] = []

    def note(self, check: str, severity: Severity, message: str, file: str = "", pair: str = "") -> None:
        """Add a problem to the report."""
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
        for name in self._present():
            if name not in recorded:
                self.note(
                    "files",
                    "warning",
                    "dataset_info.json does not list it, but plain `datasets.load_dataset` would read it.",
                    name,
                )
        return [shard for shard in shards if self._check_size(shard) and self._check_footer(shard)]

    def _present(self) -> list[str]:
        try:
            files = self.filesystem.ls(f"{self.folder}/data", detail=False)
        except OSError:
            return []
        names = (f"data/{os.path.basename(file)}" for file in files)
        return sorted(name for name in names if name.endswith(".parquet"))

    def _check_size(self, shard: ShardRecord) -> bool:
        try:
            size = self.filesystem.info(f"{self.folder}/{shard.name}")["size"]
        except FileNotFoundError:
            self.note("files", "error", "is missing.", shard.name)
            return False
        except OSError as error:
            self.note("files", "error", f"cannot be reached: {error}.", shard.name)
            return False
        if size != shard.bytes:
            self.note("files", "error", f"has {size:,} bytes, but {shard.bytes:,} were written.", shard.name)
        return True

    def _check_footer(self, shard: ShardRecord) -> bool:
        """Compare the footer with dataset_info.json; whether the rows can be looked at."""
        try:
            with self.filesystem.open(f"{self.folder}/{shard.name}", "rb") as file:
                footer = pq.read_metadata(file)
        except UNREADABLE as error:
            self.note("footers", "error", f"cannot be read ({error}): the file is damaged or cut off.", shard.name)
            return False
        rows = tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))
        if rows != shard.row_group_rows:
            self.note(
                "footers",
                "error",
                f"holds {count_of(sum(rows), 'pair')} in {count_of(len(rows), 'row group')}, but "
                f"{count_of(shard.rows, 'pair')} in {count_of(len(shard.row_group_rows), 'row group')} are recorded.",
                shard.name,
            )
        for message in _differences(footer, shard, self.dataset):
            self.note("footers", "error", message, shard.name)
        return self._check_columns(footer.schema.to_arrow_schema(), shard)

    def _check_columns(self, found: pa.Schema, shard: ShardRecord) -> bool:
        wanted, sound = shard_schema(self.dataset.info), True
        for field in wanted:
            if field.name not in found.names:
                self.note("columns", "error", f"has no column {field.name!r}.", shard.name)
            elif found.field(field.name).type != field.type:
                kind = found.field(field.name).type
                self.note("columns", "error", f"column {field.name!r} is {kind}, not {field.type}.", shard.name)
            else:
                continue
            sound = False
        for name in found.names:
            if name not in wanted.names:
                self.note("columns", "error", f"has a column {name!r}, which is not declared.", shard.name)
        return sound

    def check_rows(self, shards: Sequence[ShardRecord], progress: bool) -> None:
        """Read every row of the files and check it; then what can be said only of all together."""
        info, total = self.dataset.info, sum(shard.rows for shard in shards)
        rows = RowVerification(info)
        with tqdm(total=total, unit=" pairs", desc="verifying", disable=None if progress else True) as bar:
            for shard in shards:
                bar.set_postfix_str(f"{len(self.report.problems):,} problems" if self.report.problems else "")
                complete, checksums, ids = True, list[int](), list[str]()
                no_data = {"sar": 0, "optical": 0}
                for group in self._row_groups(shard):
                    if group is None:
                        complete = False
                        continue
                    of_group = rows.check(group, shard)
                    for check, severity, message, pair in of_group.problems:
                        self.note(check, severity, message, shard.name, pair)
                    ids += of_group.ids
                    checksums += of_group.checksums
                    complete &= of_group.complete
                    no_data = {sensor: no_data[sensor] + count for sensor, count in of_group.no_data.items()}
                    bar.update(group.num_rows)
                self.ids.append((shard.name, ids))
                if len(checksums) == shard.rows and content_hash(checksums) != shard.content_hash:
                    self.note(
                        "content hash",
                        "error",
                        f"is {content_hash(checksums)} by its rows, but {shard.content_hash} is recorded: these are "
                        "other pairs, or in another order.",
                        shard.name,
                    )
                if complete and no_data != shard.no_data_pixels:
                    self.note(
                        "no-data counts", "error", f"are {no_data}, recorded {shard.no_data_pixels}.", shard.name
                    )
        for check, severity, message in rows.conclude():
            self.note(check, severity, message)
        pairs = count_of(total, "pair")
        self.report.checked |= {check: pairs for check in CHECKS if check not in self.report.checked}
        self.report.checked |= dict.fromkeys(("content hash", "no-data counts"), count_of(len(shards), "file"))
        self.report.checked["row groups"] = count_of(sum(len(shard.row_group_rows) for shard in shards), "row group")
        for check in ("labels", "label maps"):
            if not rows.seen[check]:
                del self.report.checked[check]
        if not {"VV", "VH"} <= set(info.sar_bands):
            del self.report.checked["VV above VH"]
        if info.optical_units != "dn" or not set(VISIBLE_BANDS) & set(info.optical_bands):
            del self.report.checked["optical offset"]
        self.report.checked = {check: self.report.checked[check] for check in CHECKS if check in self.report.checked}

    def _row_groups(self, shard: ShardRecord) -> Iterator[pa.RecordBatch | None]:
        """Each row group of a file; None, with a note, for one that cannot be read."""
        try:
            with ShardFile(self.root, shard).open() as opened:
                file = pq.ParquetFile(opened, pre_buffer="://" in self.root)
                for number in range(file.num_row_groups):
                    try:
                        check_decoded_size(file.metadata, number)
                        (group,) = file.read_row_group(number, use_threads=False).combine_chunks().to_batches()
                        group.validate(full=True)
                    except UNREADABLE as error:
                        self.note("row groups", "error", f"row group {number} cannot be read: {error}.", shard.name)
                        group = None
                    yield group
        except UNREADABLE as error:
            self.note("row groups", "error", f"cannot be read: {error}.", shard.name)
            yield None

    def check_ids(self, others: Sequence[ShardRecord]) -> None:
        """Check that no two pairs have the same id, also in splits whose rows were not looked at."""
        for shard in others:
            try:
                with self.filesystem.open(f"{self.folder}/{shard.name}", "rb") as file:
                    parquet = pq.ParquetFile(file)
                    for number in range(parquet.num_row_groups):
                        check_decoded_size(parquet.metadata, number)
                    self.ids.append((shard.name, parquet.read(["id"]).column("id").to_pylist()))
            except UNREADABLE as error:
                self.note("ids", "error", f"cannot be read, so ids are not compared with it: {error}.", shard.name)
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
        "format_version": FORMAT_VERSION,
        "split": shard.split,
        "rows": shard.rows,
        "content_hash": shard.content_hash,
    }
    for key, value in expected.items():
        if described.get(key) != value:
            yield f"says {key} {described.get(key)!r}, but dataset_info.json says {value!r}: of another preparation?"
