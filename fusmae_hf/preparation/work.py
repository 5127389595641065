"""Writing the files of a plan: one after the other in this process, or several at a time in processes of their own."""

import dataclasses
import errno
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch

from fusmae_hf.data.pairs import Pair, PairReader
from fusmae_hf.errors import PairError
from fusmae_hf.preparation.plan import PlannedFile
from fusmae_hf.preparation.state import FinishedFile, write_record
from fusmae_hf.shards.dataset_info import LeftOut
from fusmae_hf.shards.writing import ShardWriter

GIVE_UP_AFTER = 64
"""So many pairs in a row that cannot be read, in random order, mean that the archive is at fault: a disk that was
unmounted, say. Going on would leave out all the rest."""

GIVE_UP_AT_END_AFTER = 20
"""The same for the last pairs of a file, which is not taken for finished then."""

Progress = Callable[[int, int], None]
"""Called with the number of pairs that were looked at since the last call, and how many of them were left out."""

_REPORT_EVERY = 0.1
"""Seconds between two reports of a worker."""

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


def write_file(reader: PairReader, file: PlannedFile, options: WritingOptions, progress: Progress) -> FinishedFile:
    """Write one file of a plan, then its record.

    Raises:
        PairError: a pair cannot be read or must not be stored and `options.on_error` is `"stop"`, or so many failed in
            a row that the archive must be at fault. The file is not written then.
        OSError: the file cannot be written.
    """
    left_out: list[LeftOut] = []
    unread = 0
    with ShardWriter(
        reader.info,
        options.folder,
        file.name,
        row_group_rows=options.row_group_rows,
        max_no_data=options.max_no_data,
    ) as shard:
        for index in file.indices.tolist():
            try:
                unread += 1
                pair = read_pair(reader, index)
                unread = 0
                shard.add(pair)
            except PairError as error:
                if options.on_error == "stop":
                    raise
                at_end = index == file.indices[-1]
                if unread >= (GIVE_UP_AT_END_AFTER if at_end else GIVE_UP_AFTER) and not options.keep_order:
                    raise PairError(
                        f"{unread} pairs in a row could not be read for {file.name}, so the archive must be at fault: "
                        f"is its disk still there? The last: {error}"
                    ) from error
                left_out.append(LeftOut(reader.ids[index], str(error), file.name))
                progress(1, 1)
            else:
                progress(1, 0)
    finished = FinishedFile(file.name, shard.record, tuple(left_out), options.part)
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
    try:
        work = bytes(ForkingPickler.dumps((reader, options)))
    except Exception as error:
        raise ValueError(
            f"The reader {type(reader).__qualname__} cannot be sent to other processes ({error}), so prepare with "
            "one: `--num-proc 1` (`num_proc=1`)."
        ) from error
    yield from _Workers(work).run(files, min(num_proc, len(files)), progress)


class _Workers:
    """Processes that write files. `run` ends them all, whatever happens."""

    def __init__(self, work: bytes):
        self._work = work
        self._processes: dict[Connection, Any] = {}
        self._writing: dict[Connection, PlannedFile] = {}

    def run(self, files: Sequence[PlannedFile], number: int, progress: Progress) -> Iterator[FinishedFile]:
        waiting = deque(files)
        try:
            self._start(number)
            for connection in self._processes:
                self._send(connection, self._work)
                self._assign(connection, waiting)
            while self._writing:
                for ready in cast(list[Connection], wait(list(self._writing))):
                    kind, content = self._receive(ready)
                    if kind == "progress":
                        progress(*content)
                    elif kind == "finished":
                        self._assign(ready, waiting)
                        yield content
                    else:
                        error, trace = content
                        error.add_note(trace)
                        raise error
        finally:
            self._end()

    def _start(self, number: int) -> None:
        # Never by `fork` from this process, whose threads (torch, GDAL, pyarrow) a child would not have.
        has_forkserver = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if has_forkserver else "spawn")
        if has_forkserver:
            context.set_forkserver_preload([__name__])  # imports the package once, not once a worker
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def _assign(self, connection: Connection, waiting: deque[PlannedFile]) -> None:
        self._writing.pop(connection, None)
        if waiting:
            self._writing[connection] = waiting.popleft()
            self._send(connection, bytes(ForkingPickler.dumps(self._writing[connection])))

    def _send(self, connection: Connection, content: bytes) -> None:
        try:
            connection.send_bytes(content)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            return connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died(connection) from error

    def _died(self, connection: Connection) -> ChildProcessError:
        process = self._processes[connection]
        process.join(5)
        code = process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"
        file = self._writing.get(connection)
        doing = f"was writing {file.name}" if file else "was starting"
        hint = ""
        if code == -signal.SIGKILL:
            hint = " It may have run out of memory: then take fewer processes."
        elif file is None:
            hint = " A script that prepares with several processes must do so under `if __name__ == '__main__':`."
        return ChildProcessError(
            f"The worker process that {doing} ended without a word ({how}).{hint} Finished files are kept: run the "
            "same command again to go on."
        )

    def _end(self) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.join(5)
            if process.exitcode is None:
                process.kill()
                process.join()


def _work(connection: Connection) -> None:
    """Main function of a worker: receives the reader and options, then file after file, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the main one ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    reader, options = ForkingPickler.loads(connection.recv_bytes())
    report = _Reports(connection)
    while True:
        try:
            file = ForkingPickler.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            finished = write_file(reader, file, options, report)
        except Exception as error:
            trace = traceback.format_exc()
            connection.send(("failed", (_picklable(error), trace)))
            return
        report.send()
        connection.send(("finished", finished))


def _end_with_parent() -> None:
    """End this process when the main one is gone, so that nobody writes any more when preparing is begun again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Reports:
    """`Progress` that is sent to the main process, but not pair by pair."""

    def __init__(self, connection: Connection):
        self._connection, self._pairs, self._left_out, self._sent = connection, 0, 0, time.monotonic()

    def __call__(self, pairs: int, left_out: int) -> None:
        self._pairs, self._left_out = self._pairs + pairs, self._left_out + left_out
        if time.monotonic() - self._sent >= _REPORT_EVERY:
            self.send()

    def send(self) -> None:
        self._connection.send(("progress", (self._pairs, self._left_out)))
        self._pairs, self._left_out, self._sent = 0, 0, time.monotonic()


def _picklable(error: Exception) -> Exception:
    """The error if it survives the way to another process, or one that says the same."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:  # pickling runs code of the error's own class, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
