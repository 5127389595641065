"""State of a folder that is being prepared: its plan, and a record of each file that is finished.

Until all files are there, `preparation/` holds `plan.json`, `left_out.csv` (pairs that the reader left out) and a
record of each file that is finished, written after the file itself. Then `left_out.csv` and `dataset_info.json` are
written and `preparation/` is removed: what it said is in those two.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusmae_hf import __version__
from fusmae_hf.files.atomic import explain_failed_write, incomplete_path, write_atomically
from fusmae_hf.files.strict_json import parse_json
from fusmae_hf.preparation.plan import PlanSummary
from fusmae_hf.shards.dataset_info import LEFT_OUT_NAME, DatasetInfo, LeftOut, read_dataset_info, read_left_out
from fusmae_hf.shards.format import FILE_NAME, FORMAT_VERSION, ShardRecord
from fusmae_hf.shards.writing import write_dataset_info, write_left_out
from fusmae_hf.vocabulary import OF_SCENES, SPLITS

STATE_FOLDER = "preparation"
_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class FinishedFile:
    """Record of a planned file that is finished.

    Attributes:
        name: path below the prepared folder.
        shard: what it holds; None where all its pairs were left out, so that there is no file.
        left_out: pairs that are not in it.
        part: part of the preparation that wrote it, such as `"1/3"`.
    """

    name: str
    shard: ShardRecord | None
    left_out: tuple[LeftOut, ...]
    part: str

    def is_there(self, folder: Path) -> bool:
        """True where the file lies in the folder, as long as it was."""
        try:
            return self.shard is None or (folder / self.name).stat().st_size == self.shard.bytes
        except FileNotFoundError:
            return False


def record_path(folder: Path, name: str) -> Path:
    """Where the record of the file `name` is."""
    return folder / STATE_FOLDER / f"{Path(name).stem}.json"


def write_record(folder: Path, finished: FinishedFile, fingerprint: str) -> None:
    """Note that a file is finished, in a plan of the given fingerprint."""
    content = {
        "fingerprint": fingerprint,
        "part": finished.part,
        "shard": finished.shard and dataclasses.asdict(finished.shard),
        "left_out": [[pair.id, pair.reason] for pair in finished.left_out],
    }
    write_atomically(record_path(folder, finished.name), json.dumps(content).encode())


def read_summary(folder: Path) -> PlanSummary | None:
    """Plan of a folder, finished or not; None where it has none.

    Raises:
        ValueError: `plan.json` or `dataset_info.json` is damaged.
    """
    try:
        plan = (folder / STATE_FOLDER / _PLAN).read_bytes()
    except FileNotFoundError:
        if not (folder / FILE_NAME).is_file():
            return None
        dataset = read_dataset_info(folder)
        if not dataset.preparation:
            return None
        plan = None
    try:
        if plan is not None:
            content = parse_json(plan)
        else:
            content = {name: dataset.preparation[name] for name in _PLAN_FIELDS} | {
                "info": json.loads(json.dumps(dataclasses.asdict(dataset.info)))
            }
        return PlanSummary.from_json(content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds the plan of a preparation that this version cannot read ({error!r}). Prepare anew with "
            "`--overwrite` (`overwrite=True`)."
        ) from error


_PLAN_FIELDS = ("arguments", "num_pairs", "digest", "files", "first_pairs")


def write_summary(folder: Path, summary: PlanSummary, left_out: Sequence[LeftOut]) -> None:
    """Write `plan.json`, and before it what the reader left out."""
    write_left_out(folder / STATE_FOLDER, left_out)
    write_atomically(folder / STATE_FOLDER / _PLAN, json.dumps(summary.to_json(), indent=1).encode())


def open_folder(folder: Path, summary: PlanSummary, *, overwrite: bool) -> PlanSummary | None:
    """Make sure that a plan may be carried out in a folder.

    Returns:
        The summary that is already there, of the same plan; None where nothing was begun.

    Raises:
        FileExistsError: the folder is a file, or holds something else or the files of another plan, and `overwrite` is
            not set. Says how the plans differ.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Give a folder for the shards.")
    if overwrite:
        _clear(folder)
        return None
    if not folder.exists():
        return None
    there = read_summary(folder)
    if there is None and any(_is_foreign(entry) for entry in folder.iterdir()):
        there = read_summary(folder)  # another part may have begun in between
        if there is None:
            raise FileExistsError(
                f"{folder} is not empty. Give a new folder, or `--overwrite` (`overwrite=True`) to replace its shards."
            )
    if there is not None and (differences := summary.differences(there)):
        raise FileExistsError(
            f"{folder} was begun with other arguments: {'; '.join(differences)}. Give the same arguments to go on, "
            "another folder, or `--overwrite` (`overwrite=True`) to start anew."
        )
    return there


def finished_files(folder: Path, summary: PlanSummary) -> dict[str, FinishedFile]:
    """Records of the files of a plan that are finished and lie in the folder, by name, in the order of the plan."""
    found = {name: _read_record(folder, name, summary.fingerprint) for name in summary.files}
    # Only now, since another part that finishes writes this file and then removes the records.
    if None in found.values() and (folder / FILE_NAME).is_file():
        dataset = read_dataset_info(folder)
        if dataset.preparation.get("fingerprint") == summary.fingerprint:
            found = _from_dataset_info(folder, dataset, summary)
    return {name: finished for name, finished in found.items() if finished and finished.is_there(folder)}


def finish(folder: Path, summary: PlanSummary, listed: Sequence[LeftOut]) -> tuple[DatasetInfo | None, list[LeftOut]]:
    """Write `dataset_info.json` if all files of the plan are finished.

    Args:
        folder: the prepared folder.
        summary: its plan.
        listed: pairs that were left out before any was read.

    Returns:
        Content of `dataset_info.json`, or None where files are missing; and the pairs left out as far as is known.

    Raises:
        ValueError: all files are finished, but none holds a pair.
        OSError: a file cannot be written.
    """
    finished = finished_files(folder, summary)
    left_out = [*listed, *(pair for file in finished.values() for pair in file.left_out)]
    if len(finished) < len(summary.files):
        return None, left_out
    shards = [file.shard for file in finished.values() if file.shard]
    if not shards:
        reasons = "; ".join(f"{pair.id}: {pair.reason}" for pair in left_out[-3:])
        remove_state(folder)  # so that the same command tries again
        raise ValueError(f"{summary.info.name}: no pair could be written. The last reasons: {reasons}")
    kept = {name: value for name, value in summary.to_json().items() if name in _PLAN_FIELDS}
    preparation = {"package_version": __version__, "fingerprint": summary.fingerprint, **kept}
    dataset = write_dataset_info(folder, summary.info, shards, left_out, preparation=preparation)
    remove_state(folder)
    return dataset, left_out


def remove_state(folder: Path) -> None:
    """Remove what is kept only until the folder is finished. Another part may be doing so at the same time."""
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)


def merge_parts(out: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]]) -> DatasetInfo:
    """Bring the files together that parts of one preparation wrote into folders of their own.

    Files are linked where the file system can (no space is taken), otherwise copied. The parts stay as they are.

    Args:
        out: the folder to make; new, empty, one of the parts, or where this was begun before.
        parts: folders written with `part`, of the same plan.

    Returns:
        Content of the `dataset_info.json` that was written last.

    Raises:
        FileNotFoundError: a folder holds nothing prepared.
        FileExistsError: `out` holds something else.
        ValueError: a part is missing or unfinished, parts are of different plans, or the same file differs between
            two.
        OSError: a file cannot be written.
    """
    folders, summary = [Path(part) for part in parts], None
    for folder in folders:
        of_part = read_summary(folder) if folder.is_dir() else None
        if of_part is None:
            raise FileNotFoundError(
                f"{folder} holds no part of a preparation: `fusmae prepare --part i/n` writes one."
            )
        summary = summary or of_part
        if differences := of_part.differences(summary):
            raise ValueError(
                f"{folder} and {folders[0]} are not parts of one preparation: {'; '.join(differences)} (there, and in "
                f"{folder}). Prepare the parts with the same arguments from the same archive."
            )
    if summary is None:
        raise ValueError("No part was given to merge.")
    out = Path(out)
    begun = open_folder(out, summary, overwrite=False)
    finished = {folder: finished_files(folder, summary) for folder in ([out] if begun else []) + folders}
    chosen: dict[str, Path] = {}
    for folder, files in finished.items():
        for name, file in files.items():
            there = finished[chosen.setdefault(name, folder)][name]
            if there.shard != file.shard:
                raise ValueError(
                    f"{name} is not the same in {chosen[name]} and in {folder}: prepare one of them anew."
                )
    if missing := [name for name in summary.files if name not in chosen]:
        raise ValueError(
            describe_missing(summary, missing, (file for files in finished.values() for file in files.values()))
        )
    listed = [pair for pair in _listed_left_out(folders[0]) if not pair.file]
    if not begun:
        write_summary(out, summary, listed)
    for name, folder in chosen.items():
        if folder != out:
            file = finished[folder][name]
            if file.shard:
                _link_or_copy(folder / name, out / name)
            write_record(out, file, summary.fingerprint)
    dataset, _ = finish(out, summary, listed)
    if dataset is None:
        raise ValueError(f"Files in {out} disappeared while they were merged. Run the same command again.")
    return dataset


def merge_sets(out: str | os.PathLike[str], sets: Sequence[str | os.PathLike[str]]) -> DatasetInfo:
    """Bring whole sets of different preparations together that differ in nothing but `OF_SCENES`, if at all.

    Files are linked where the file system can, otherwise copied, under new names. What differs is told by the rows
    from then on.

    Args:
        out: the folder to make; new or empty.
        sets: folders with `dataset_info.json`, in the order that the rows will have.

    Returns:
        Content of the `dataset_info.json` that was written last.

    Raises:
        FileExistsError: `out` holds something.
        ValueError: the sets differ in more, one is of an older format, or a pair is in two.
        OSError: a file cannot be written.
    """
    folders, out = [Path(folder) for folder in sets], Path(out)
    datasets = [read_dataset_info(folder) for folder in folders]
    first, left_out = datasets[0].info, list[LeftOut]()
    differing = set(first.per_scene)
    for folder, dataset in zip(folders, datasets, strict=True):
        if dataset.format_version != FORMAT_VERSION:
            raise ValueError(f"{folder} is of format {dataset.format_version}: prepare it again to merge it.")
        names = {field.name for field in dataclasses.fields(first)} - {"per_scene"}
        unlike = sorted(name for name in names if getattr(dataset.info, name) != getattr(first, name))
        if foreign := [name for name in unlike if name not in OF_SCENES]:
            raise ValueError(
                f"{folder} and {folders[0]} differ in {foreign[0]}: {getattr(dataset.info, foreign[0])!r} and "
                f"{getattr(first, foreign[0])!r}. Sets to merge may differ in {list(OF_SCENES)} alone; parts of one "
                "preparation need the same arguments."
            )
        differing |= {*unlike, *dataset.info.per_scene}
        left_out += read_left_out(folder)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty. Give a new folder for the merged set.")
    shards = []
    for split in dict.fromkeys(split for dataset in datasets for split in dataset.splits):
        files = [
            (folder, shard)
            for folder, dataset in zip(folders, datasets, strict=True)
            for shard in dataset.splits.get(split, ())
        ]
        for number, (folder, shard) in enumerate(files):
            name = f"data/{split}-{number:05d}-of-{len(files):05d}.parquet"
            _link_or_copy(folder / shard.name, out / name)
            shards.append(dataclasses.replace(shard, name=name))
    info = dataclasses.replace(first, per_scene=tuple(name for name in OF_SCENES if name in differing))
    return write_dataset_info(out, info, shards, [pair._replace(file="") for pair in left_out])


def describe_missing(summary: PlanSummary, missing: Sequence[str], finished: Iterable[FinishedFile]) -> str:
    """Which files of a plan are missing and, where that can be told, which parts."""
    text = f"{len(missing):,} of the {len(summary.files):,} files are missing: {', '.join(missing[:3])}"
    text += " and others" if len(missing) > 3 else ""
    counts = {int(file.part.split("/")[1]) for file in finished}
    if len(counts) == 1 and (count := counts.pop()) > 1:
        numbers = {name: number for number, name in enumerate(summary.files)}
        parts = sorted({numbers[name] % count + 1 for name in missing})
        text += f" (part {', '.join(f'{part}/{count}' for part in parts)})"
    return f"{text}. Run what prepares them, to its end."


def _read_record(folder: Path, name: str, fingerprint: str) -> FinishedFile | None:
    """Record of one file; None where there is none, or one of another plan, or a damaged one."""
    try:
        content = parse_json(record_path(folder, name).read_bytes())
        if content["fingerprint"] != fingerprint:
            return None
        shard = content["shard"] and ShardRecord.from_json(content["shard"])
        left_out = tuple(LeftOut(id, reason, name) for id, reason in content["left_out"])
        return FinishedFile(name, shard, left_out, content["part"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _from_dataset_info(folder: Path, dataset: DatasetInfo, summary: PlanSummary) -> dict[str, FinishedFile | None]:
    """Records of all files, which were removed when the folder was finished."""
    shards = {shard.name: shard for of_split in dataset.splits.values() for shard in of_split}
    left_out: dict[str, list[LeftOut]] = {}
    for pair in read_left_out(folder):
        left_out.setdefault(pair.file, []).append(pair)
    return {name: FinishedFile(name, shards.get(name), tuple(left_out.get(name, ())), "1/1") for name in summary.files}


def _listed_left_out(folder: Path) -> list[LeftOut]:
    """Pairs left out before any was read, of an unfinished or a finished folder."""
    return read_left_out(folder / STATE_FOLDER if (folder / STATE_FOLDER / _PLAN).is_file() else folder)


def _link_or_copy(source: Path, target: Path) -> None:
    incomplete = incomplete_path(target)
    try:
        with explain_failed_write(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, incomplete)
            except OSError:  # another disk, or a file system without links
                with source.open("rb") as read, incomplete.open("xb") as written:
                    shutil.copyfileobj(read, written, 1 << 20)
                    written.flush()
                    os.fsync(written.fileno())
            os.replace(incomplete, target)
    finally:
        incomplete.unlink(missing_ok=True)


def _is_foreign(entry: Path) -> bool:
    """True for what a run that was killed before it wrote its plan cannot have left behind."""
    if entry.name.endswith(".incomplete"):
        return False
    if entry.name in (STATE_FOLDER, "data") and entry.is_dir():
        return any(_is_foreign(below) and below.name != LEFT_OUT_NAME for below in entry.iterdir())
    return True


def _clear(folder: Path) -> None:
    """Delete the shards in a folder and what describes them; other files are left alone."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    remove_state(folder)
    (folder / LEFT_OUT_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for shard in (*folder.glob(f"data/{split}-*-of-*.parquet"), *folder.glob(f"data/.{split}-*.incomplete")):
            shard.unlink(missing_ok=True)
