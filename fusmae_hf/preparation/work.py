"""Writing the files of a plan: one after the other in this process, or several at a time in processes of their own."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fusmae_hf.cluster import connected, require_same_everywhere, run_tasks
from fusmae_hf.data.findings import merge_seen
from fusmae_hf.data.pairs import Pair, PairReader
from fusmae_hf.data.plausibility import PairSample
from fusmae_hf.errors import PairError
from fusmae_hf.preparation.plan import PlannedFile
from fusmae_hf.preparation.state import FinishedFile, write_record
from fusmae_hf.shards.dataset_info import LeftOut
from fusmae_hf.shards.writing import ShardWriter, row_checksum

GIVE_UP_AFTER = 64
"""So many pairs in a row that cannot be read, in random order, mean that the archive is at fault: a disk that was
unmounted, say. Going on would leave out all the rest."""

GIVE_UP_AT_END_AFTER = 20
"""The same for the last pairs of a file, which is not taken for finished then."""

Progress = Callable[[int, int], None]
"""Called with the number of pairs that were looked at since the last call, and how many of them were left out."""

_LOOK_EVERY = 0.1
"""Seconds after which the main process looks how far the workers are."""

_FAULTS_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EROFS)
"""Numbers of `OSError` that say nothing about the pair that was being read."""


@dataclasses.dataclass(frozen=True)
class WritingOptions:
    """What holds for all files of a plan: see `prepare`."""

    folder: Path
    fingerprint: str
    part: str
    row_group_rows: int
    max_no_data: float
    keep_order: bool
    on_error: str
    require_both: bool


def read_pair(reader: PairReader, index: int) -> Pair:
    """Read a pair, with bands in their own resolution where the reader can (`read_native`).

    Raises:
        PairError: the pair cannot be read: whatever the reader raises, unless it says nothing about the pair.
    """
    try:
        pair = getattr(reader, "read_native", reader.read)(index)
    except (PairError, MemoryError):
        raise
    except OSError as error:
        if error.errno in _FAULTS_OF_THE_MACHINE:
            raise
        raise PairError(f"{error.filename or reader.ids[index]}: {error.strerror or error}.") from error
    except Exception as error:
        raise PairError(
            f"{reader.ids[index]}: the reader failed with {type(error).__name__}: {error}. It should name the "
            "file and what is wrong with it in a PairError: please report this."
        ) from error
    if pair.id != reader.ids[index]:
        raise PairError(f"{reader.ids[index]}: the reader gave another pair in its place, {pair.id!r}.")
    return pair


def in_order_of_reading(
    reader: Any, indices: np.ndarray, keep_order: bool
) -> Iterator[tuple[int, Callable[[], Pair]]]:
    """Pairs in the order in which they are written, each with a function that gives it or raises what reading raised.

    Where a reader has `reading_groups`, blocks of `rows_read_together` pairs are read in ascending order first: a
    striped, compressed scene, whose windows are read at random, would be decoded many times.
    """
    if keep_order or getattr(reader, "reading_groups", None) is None:
        for index in indices.tolist():
            yield index, partial(read_pair, reader, index)
        return
    for start in range(0, len(indices), reader.rows_read_together):
        block = indices[start : start + reader.rows_read_together].tolist()
        found: dict[int, Pair | PairError] = {}
        for index in sorted(block):
            try:
                found[index] = read_pair(reader, index)
            except PairError as error:
                found[index] = error
        for index in block:
            yield index, partial(_given, found.pop(index))


def _given(found: Pair | PairError) -> Pair:
    if isinstance(found, PairError):
        raise found
    return found


def write_file(reader: PairReader, file: PlannedFile, options: WritingOptions, progress: Progress) -> FinishedFile:
    """Write one file of a plan, then its record.

    Raises:
        PairError: a pair cannot be read or must not be stored and `options.on_error` is `"stop"`, or so many failed in
            a row that the archive must be at fault. The file is not written then.
        OSError: the file cannot be written.
    """
    left_out: list[LeftOut] = []
    groups, unread = getattr(reader, "reading_groups", None), set[int]()
    values = PairSample(reader.info, 0)
    with ShardWriter(
        reader.info,
        options.folder,
        file.name,
        row_group_rows=options.row_group_rows,
        max_no_data=options.max_no_data,
        require_both=options.require_both,
    ) as shard:
        for index, read in in_order_of_reading(reader, file.indices, options.keep_order):
            try:
                unread.add(index if groups is None else int(groups[index]))
                pair = read()
                unread.clear()
                values.add(shard.add(pair))
            except PairError as error:
                if options.on_error == "stop":
                    raise
                at_end = index == file.indices[-1]
                if len(unread) >= (GIVE_UP_AT_END_AFTER if at_end else GIVE_UP_AFTER) and not options.keep_order:
                    raise PairError(
                        f"{len(unread)} pairs in a row could not be read for {file.name}, so the archive must be at "
                        f"fault: is its disk still there? The last: {error}"
                    ) from error
                left_out.append(LeftOut(reader.ids[index], str(error), file.name))
                progress(1, 1)
            else:
                progress(1, 0)
    if options.max_no_data == 1:  # nobody chose how much may be missing
        declared = getattr(reader, "declares_no_data", ())
        undeclared = {topic: seen for topic, seen in shard.mostly_missing.items() if topic.split()[0] not in declared}
        merge_seen(values.seen, undeclared)
    record = shard.record and dataclasses.replace(shard.record, plausibility=values.record())
    finished = FinishedFile(file.name, record, tuple(left_out), options.part)
    write_record(options.folder, finished, options.fingerprint)
    return finished


def write_files(
    reader: PairReader, files: Sequence[PlannedFile], options: WritingOptions, num_proc: int, progress: Progress
) -> Generator[FinishedFile, None, None]:
    """Write files of a plan and give the record of each when it is finished.

    Args:
        reader: the dataset; must be possible to pickle where there is more than one process.
        files: what to write.
        options: how.
        num_proc: number of worker processes; up to 1, everything happens in this one.
        progress: called in this process.

    Raises:
        ChildProcessError: a worker process ended without a word, killed for lack of memory for example.
        PairError, OSError: see `write_file`.
        ValueError: the reader cannot be sent to another process.
    """
    if num_proc <= 1 or len(files) <= 1:
        for file in files:
            yield write_file(reader, file, options, progress)
        return
    work = _pickled(reader, options, "with one: `--num-proc 1` (`num_proc=1`)")
    yield from _write_in_workers(work, files, min(num_proc, len(files)), progress)


def write_files_on_ray(
    reader: PairReader,
    files: Sequence[PlannedFile],
    options: WritingOptions,
    address: str | None,
    progress: Progress,
) -> Generator[FinishedFile, None, None]:
    """`write_files` by the nodes of a Ray cluster, as many files at a time as it has CPUs.

    Every node must see the archive and `options.folder` under the same names, which is tried first.

    Args:
        reader, files, options, progress: as there; progress is called when a file is finished.
        address: of the cluster, see `connected`.

    Raises:
        ImportError: Ray is missing.
        ConnectionError: there is no cluster at the address.
        OSError: a node does not see what this machine sees, or a file cannot be written.
        PairError, ValueError: as there.
    """
    work = _pickled(reader, options, "without Ray: `--engine local` (`engine='local'`)")
    if not files:
        return
    with connected(address) as ray:
        require_same_everywhere(ray, options.folder, partial(_first_pair, work, int(files[0].indices[0])))
        sizes = {file.name: len(file.indices) for file in files}
        in_flight = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        for finished in run_tasks(ray, partial(_write_on_node, work), files, in_flight):
            progress(sizes[finished.name], len(finished.left_out))
            yield finished


def _pickled(reader: PairReader, options: WritingOptions, instead: str) -> bytes:
    try:
        return bytes(ForkingPickler.dumps((reader, options)))
    except Exception as error:
        raise ValueError(
            f"The reader {type(reader).__qualname__} cannot be sent to other processes ({error}), so prepare "
            f"{instead}."
        ) from error


@lru_cache(maxsize=1)
def _unpickled(work: bytes) -> tuple[PairReader, WritingOptions]:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    return ForkingPickler.loads(work)


def _write_on_node(work: bytes, file: PlannedFile) -> FinishedFile:
    reader, options = _unpickled(work)
    return write_file(reader, file, options, lambda *_: None)


def _first_pair(work: bytes, index: int) -> int:
    """Checksum of a pair."""
    reader, _ = _unpickled(work)
    return row_checksum(read_pair(reader, index), reader.info)


def _write_in_workers(
    work: bytes, files: Sequence[PlannedFile], processes: int, progress: Progress
) -> Iterator[FinishedFile]:
    """Write files in so many processes, all of which have ended afterwards, whatever happens."""
    # Never by `fork` from this process, whose threads (torch, GDAL, pyarrow) a child would not have.
    has_forkserver = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_forkserver else "spawn")
    if has_forkserver:
        context.set_forkserver_preload([__name__])  # imports the package once, not once a worker
    board = context.RawArray("q", 3 * len(files))
    others, workers, pending, seen = multiprocessing.active_children(), list[Any](), set[Any](), (0, 0)
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (work, board))
    try:
        pending |= {pool.submit(_write_in_worker, file, place) for place, file in enumerate(files)}
        workers += (process for process in multiprocessing.active_children() if process not in others)
        while pending:
            done, pending = wait(pending, _LOOK_EVERY, FIRST_COMPLETED)
            now = sum(board[1::3]), sum(board[2::3])
            if now != seen:
                progress(now[0] - seen[0], now[1] - seen[1])
                seen = now
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        pool.shutdown()
        raise _died(workers, {pid: file for file, pid in zip(files, board[::3], strict=True) if pid}) from error
    finally:
        for process in workers if pending else ():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _died(workers: Sequence[Any], writing: dict[int, PlannedFile]) -> ChildProcessError:
    """The error for a worker that ended without a word, whereupon the pool terminated the others."""
    ended = [worker for worker in workers if worker.exitcode not in (None, 0, -signal.SIGTERM)] or [*workers]
    code, file = (ended[0].exitcode, writing.get(ended[0].pid)) if ended else (None, None)
    how = f"exit code {code}" if code is None or code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"
    hint = ""
    if code == -getattr(signal, "SIGKILL", 9):
        hint = " It may have run out of memory: then take fewer processes."
    elif file is None:
        hint = " A script that prepares with several processes must do so under `if __name__ == '__main__':`."
    return ChildProcessError(
        f"The worker process that {f'was writing {file.name}' if file else 'was starting'} ended without a word "
        f"({how}).{hint} Finished files are kept: run the same command again to go on."
    )


_work: tuple[PairReader, WritingOptions]
_board: Any
"""Of a worker. The board has three numbers a file, which the main process reads: the worker that is writing it, the
pairs that were looked at, and how many of them were left out."""


def _begin_worker(work: bytes, board: Any) -> None:
    global _work, _board
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the main one ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    _work, _board = ForkingPickler.loads(work), board


def _end_with_parent() -> None:
    """End this process when the main one is gone, so that nobody writes any more when preparing is begun again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_in_worker(file: PlannedFile, place: int) -> FinishedFile:
    def progress(pairs: int, left_out: int) -> None:
        _board[3 * place + 1] += pairs
        _board[3 * place + 2] += left_out

    reader, options = _work
    _board[3 * place] = os.getpid()
    finished = write_file(reader, file, options, progress)
    _board[3 * place] = 0
    return finished
