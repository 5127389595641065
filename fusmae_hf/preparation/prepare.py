"""Preparing a dataset: reading every pair once and writing shards, with each pair that is left out accounted for."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from fusmae_hf.cluster import require_ray
from fusmae_hf.data.checks import pair_to_store
from fusmae_hf.data.findings import recorded_findings
from fusmae_hf.data.pairs import Pair, PairReader
from fusmae_hf.data.plausibility import check_plausible
from fusmae_hf.errors import PairError
from fusmae_hf.files.atomic import sweep_incomplete
from fusmae_hf.preparation.plan import PlannedFile, PlanSummary, PreparationPlan, plan_preparation
from fusmae_hf.preparation.state import (
    FinishedFile,
    describe_missing,
    finish,
    finished_files,
    open_folder,
    record_path,
    remove_state,
    write_summary,
)
from fusmae_hf.preparation.work import WritingOptions, read_pair, write_files, write_files_on_ray
from fusmae_hf.shards.dataset_info import LEFT_OUT_NAME, DatasetInfo, LeftOut, read_dataset_info, read_left_out
from fusmae_hf.shards.format import FILE_NAME as DATASET_INFO
from fusmae_hf.shards.writing import row_checksum

PLAUSIBILITY_PAIRS = 32
"""Number of pairs whose values are looked at before anything is written."""

HOPELESS_AFTER = 20
"""So many failures before the first success mean that the archive, not a pair, is at fault."""

RECOGNISED_BY = 4
"""Number of pairs whose pixels are compared with those of an earlier run that is gone on with."""


@dataclasses.dataclass(frozen=True)
class PreparationReport:
    """What `prepare` did; prints as a short summary.

    Attributes:
        folder: where the shards are.
        dataset: content of `dataset_info.json`; None where other parts are not finished yet.
        left_out: the pairs left out, as far as their files are finished.
        num_pairs: number of pairs written by this run.
        files_written: number of files written by this run.
        files_kept: number of files that an earlier run had finished.
        missing: what other parts have to do, in words; empty where nothing is missing.
        seconds: how long it took.
        held_out: how much was held out, in words.
    """

    folder: Path
    dataset: DatasetInfo | None
    left_out: tuple[LeftOut, ...]
    num_pairs: int
    files_written: int
    files_kept: int
    missing: str
    seconds: float
    held_out: str = ""

    def __str__(self) -> str:
        lines = [] if self.dataset is None else describe_dataset(self.dataset)
        lines += [] if self.dataset is None else [f"warning: {found}" for found in self.dataset.odd_values()]
        if self.files_written:
            rate = f"{self.num_pairs / self.seconds:,.0f} pairs/s"
            kept = f"; {self.files_kept:,} files were finished before" if self.files_kept else ""
            lines.append(f"Wrote {self.num_pairs:,} pairs in {self.seconds:,.1f} s ({rate}){kept}")
        else:
            lines.append(
                f"Nothing to do: {self.folder} is complete." if self.dataset else "Nothing to do in this part."
            )
        lines += filter(None, (self.held_out, self.missing))
        return "\n".join(lines + self._left_out())

    def _left_out(self) -> list[str]:
        if not self.left_out:
            return []
        where = self.folder / LEFT_OUT_NAME
        all_of_them = f" (all of them, with the reason, in {where})" if self.dataset else ""
        examples = {pair.kind: pair for pair in reversed(self.left_out)}
        kinds = Counter(pair.kind for pair in self.left_out).most_common()
        lines = [f"Left out: {len(self.left_out):,}{all_of_them}"]
        lines += [f"  {count:>9,}  {kind}, such as {examples[kind].id}" for kind, count in kinds[:5]]
        return lines + [f"  and {len(kinds) - 5:,} more reasons"] * (len(kinds) > 5)


def prepare(
    reader: PairReader,
    out: str | Path,
    *,
    limit: int | None = None,
    rows_per_shard: int = 1024,
    row_group_rows: int = 32,
    max_no_data: float = 1.0,
    require_both: bool = False,
    on_error: Literal["skip", "stop"] = "skip",
    hold_out: float = 0.0,
    split_by: str = "place",
    select: Collection[str] | None = None,
    seed: int = 0,
    keep_order: bool = False,
    num_proc: int = 1,
    part: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    strict: bool = False,
    progress: bool = True,
    reader_options: Mapping[str, Any] | None = None,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
) -> PreparationReport:
    """Write all pairs of a dataset as shards, each split apart, and `dataset_info.json` last.

    Pairs are written in a random order (the same one for the same seed), so that neighbouring patches do not share a
    row group and with it a batch when the shards are streamed. The first pairs are looked at before anything is
    written: see [`check_plausible`]. Every pair is while it is written; what looks odd is counted in
    `dataset_info.json`.

    Whatever interrupts it, call it again with the same arguments: files that are finished are kept, the others are
    written. The result is the same to the byte, however often it was interrupted and by however many processes and
    parts it was written. A file that was damaged later is written again too, once it is deleted.

    Args:
        reader: the dataset. Pairs without a split go to `train`, but see `hold_out`. Where it has `read_native`, that
            is used: it gives `NativeBands`, so that coarse bands need not be expanded and packed again.
        out: folder for the shards; made if need be.
        limit: write at most so many pairs, drawn over the whole dataset (the first ones with `keep_order`).
        rows_per_shard: most pairs in a file. A file is what one process writes at a time.
        row_group_rows: pairs in a row group, the unit that streaming reads.
        max_no_data: leave out pairs that have a larger share of pixels without data in either sensor.
        require_both: leave out pairs that lack a sensor; otherwise those whose SAR is NaN throughout, or whose optical
            image is zero throughout, are kept with the other sensor alone.
        on_error: what to do with a pair that cannot be read or must not be stored: `"skip"` leaves it out and notes
            the reason in `left_out.csv`, `"stop"` raises.
        hold_out: share of the pairs without a split that goes to `validation`, drawn at random (the same way for the
            same seed) and at least one; the others go to `train`. Pairs whose footprints share area stay together,
            as far as the reader tells footprints (`places`): see `draw_held_out`. Neighbours may fall on both sides:
            where a dataset has official splits, those are the fair ones.
        split_by: what is held out together: `"place"`, `"scene"` or `"block:SIZE"`.
        select: ids of the pairs to write; all by default.
        seed: of the order, and of what `limit` and `hold_out` draw.
        keep_order: write pairs in the order of the reader.
        num_proc: number of worker processes; 1 (or 0) writes in this process. Starting them takes some seconds, since
            the package is imported once more, and a script must then call this under `if __name__ == "__main__":`.
        part: `(i, n)` with i from 1 to n: write only every n-th file, so that n machines share the work. Parts may
            write into the same folder, which is complete when the last one is, or into folders of their own, which
            `merge_parts` brings together.
        overwrite: delete the shards that are in `out` first. Other files are left alone.
        strict: values that look odd are an error: before anything is written where the first pairs show it, otherwise
            at the end, without `dataset_info.json`.
        progress: show a progress bar where the output is a terminal.
        reader_options: with which arguments the reader was made, to be noted in `dataset_info.json`.
        engine: `"local"`, or `"ray"`: the nodes of a Ray cluster write, as many files at a time as it has CPUs. Each
            must see archive and `out` under the same names. A file that fails for want of disk, memory or its node is
            tried again.
        ray_address: of the cluster, host and port or `"auto"`; by default one is started on this machine.

    Returns:
        A report that prints as a short summary.

    Raises:
        FileExistsError: `out` holds something else, or was begun with other arguments, and `overwrite` is not set.
        PairError: a pair failed and `on_error` is `"stop"`; the first 20 pairs failed and none succeeded; or 64 in a
            row could not be read.
        ChildProcessError: a worker process ended without a word. Finished files stay.
        ValueError: no pair could be written, an argument is out of range, the values contradict the declared units, or
            with `strict` look odd.
        OSError: the disk is full, or a file cannot be written. Finished files stay, without `dataset_info.json`.
    """
    started, folder = time.monotonic(), Path(out)
    if on_error not in ("skip", "stop"):
        raise ValueError(f"on_error is {on_error!r}, but must be 'skip' or 'stop'.")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine is {engine!r}, but must be 'local' or 'ray'.")
    if engine == "ray":
        require_ray()
        if num_proc > 1:
            raise ValueError(
                f"num_proc is {num_proc}, but with engine='ray' all CPUs of the cluster work: leave it out."
            )
    elif ray_address is not None:
        raise ValueError("ray_address is given, but engine is 'local': give --engine ray (engine='ray') as well.")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part is {part[0]}/{part[1]}, but must be one of 1/{part[1]} to {part[1]}/{part[1]}.")
    if overwrite and part[1] > 1:
        raise ValueError("A part must not overwrite: it would delete what the others wrote. Delete the folder first.")
    plan = plan_preparation(
        reader,
        limit=limit,
        hold_out=hold_out,
        split_by=split_by,
        select=select,
        seed=seed,
        keep_order=keep_order,
        rows_per_shard=rows_per_shard,
        row_group_rows=row_group_rows,
        max_no_data=max_no_data,
        require_both=require_both,
        reader_options=reader_options or {},
    )
    there = open_folder(folder, plan.summary, overwrite=overwrite)
    kept = finished_files(folder, plan.summary) if there else {}
    mine = [file for file in plan.files if file.number % part[1] == part[0] - 1]
    todo = [file for file in mine if file.name not in kept]
    if part[1] == 1:  # otherwise another part may be writing them
        sweep_incomplete([folder / DATASET_INFO, folder / LEFT_OUT_NAME])
    if there and len(kept) == len(plan.files) and (folder / DATASET_INFO).is_file():
        remove_state(folder)
        left_out = tuple(read_left_out(folder))
        return PreparationReport(
            folder, read_dataset_info(folder), left_out, 0, 0, len(kept), "", time.monotonic() - started
        )
    if todo or there is None:
        there = _begin(reader, plan, folder, there, on_error, strict, require_both)
    written = _write(
        reader,
        todo,
        WritingOptions(
            folder,
            there.fingerprint,
            f"{part[0]}/{part[1]}",
            row_group_rows,
            max_no_data,
            keep_order,
            on_error,
            require_both,
        ),
        partial(write_files_on_ray, address=ray_address)
        if engine == "ray"
        else partial(write_files, num_proc=num_proc),
        tqdm(
            total=sum(len(file.indices) for file in mine),
            initial=sum(len(file.indices) for file in mine if file.name in kept),
            unit=" pairs",
            disable=None if progress else True,
        ),
    )
    checked = finished_files(folder, there) if strict else {}
    records = (file.shard.plausibility if file.shard else None for file in checked.values())
    if odd := recorded_findings(records):
        raise ValueError(f"Values look odd, which --strict (strict=True) does not allow: {' '.join(odd)}")
    dataset, all_left_out = finish(folder, there, plan.left_out)
    finished = {} if dataset else finished_files(folder, there)
    missing = [] if dataset else [file.name for file in plan.files if file.name not in finished]
    return PreparationReport(
        folder,
        dataset,
        tuple(all_left_out),
        num_pairs=sum(file.shard.rows for file in written if file.shard),
        files_written=len(written),
        files_kept=len(mine) - len(todo),
        missing=describe_missing(there, missing, finished.values()) if missing else "",
        held_out=plan.held_out,
        seconds=max(time.monotonic() - started, 1e-3),
    )


def _begin(
    reader: PairReader,
    plan: PreparationPlan,
    folder: Path,
    there: PlanSummary | None,
    on_error: str,
    strict: bool,
    require_both: bool,
) -> PlanSummary:
    """Look at the first pairs; then write the plan, or see that an earlier run read the same pixels."""
    indices = [index for file in plan.files for index in file.indices[:PLAUSIBILITY_PAIRS].tolist()]
    pairs: list[Pair] = []
    checksums: dict[str, int] = {}
    failed = 0
    for index in indices[:PLAUSIBILITY_PAIRS]:
        if there and len(pairs) == RECOGNISED_BY:
            break
        try:
            pair, _ = pair_to_store(read_pair(reader, index), reader.info, require_both=require_both)
            if len(pairs) < RECOGNISED_BY:
                checksums[pair.id] = row_checksum(pair, reader.info)
            pairs.append(pair)
        except PairError as error:
            if on_error == "stop":
                raise
            failed += 1
            if failed == HOPELESS_AFTER and not pairs:
                raise PairError(
                    f"The first {HOPELESS_AFTER} pairs all failed, so nothing was written. The last: {error}"
                ) from error
    summary = dataclasses.replace(plan.summary, first_pairs=checksums)
    if there is None:
        if pairs:
            check_plausible(pairs, reader.info, strict=strict)
        write_summary(folder, summary, plan.left_out)
    return open_folder(folder, summary, overwrite=False) or summary


def _write(
    reader: PairReader,
    files: Sequence[PlannedFile],
    options: WritingOptions,
    writes: Callable[..., Generator[FinishedFile, None, None]],
    bar: tqdm,
) -> list[FinishedFile]:
    """Write files, with a progress bar; what is unfinished when it is interrupted is swept away."""
    left_out = 0

    def progress(pairs: int, of_them_left_out: int) -> None:
        nonlocal left_out
        left_out += of_them_left_out
        if of_them_left_out:
            bar.set_postfix_str(f"{left_out:,} left out", refresh=False)
        bar.update(pairs)

    paths = [path for file in files for path in (options.folder / file.name, record_path(options.folder, file.name))]
    sweep_incomplete(paths)
    try:
        with bar, closing(writes(reader, files, options, progress=progress)) as finished:
            return list(finished)
    finally:
        sweep_incomplete(paths)


def describe_dataset(dataset: DatasetInfo) -> list[str]:
    """Pairs, shards and size of a prepared folder, in lines."""
    shards = [shard for of_split in dataset.splits.values() for shard in of_split]
    pairs, size = sum(shard.rows for shard in shards), sum(shard.bytes for shard in shards)
    lines = [f"Prepared {dataset.info.name}: {pairs:,} pairs, {size / 1e6:,.1f} MB"]
    for split, of_split in dataset.splits.items():
        files = "1 shard" if len(of_split) == 1 else f"{len(of_split):,} shards"
        lines.append(f"  {split:<11}{dataset.rows(split):>9,} pairs in {files}")
    return lines
