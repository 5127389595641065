"""Writing files so that they appear complete and on the disk, or not at all."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file; one of that name is replaced.

    Raises:
        OSError: it cannot be written; names it and the next step. Nothing is left behind.
    """
    incomplete = incomplete_path(path)
    try:
        with explain_failed_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with incomplete.open("xb") as file:
                file.write(content)
                flush_to_disk(file)
            os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)


def incomplete_path(path: Path) -> Path:
    """A name beside `path` for it to have while it is written.

    It is never the same: of two processes that write one file, because the first was thought dead, none may write
    into what the other is about to put in place.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")


def sweep_incomplete(paths: list[Path]) -> None:
    """Delete what killed processes left where they were writing one of `paths`."""
    wanted = {
        path.parent: {of_folder.name for of_folder in paths if of_folder.parent == path.parent} for path in paths
    }
    for folder, names in wanted.items():
        if not folder.is_dir():
            continue
        for file in folder.glob(".*.incomplete"):
            if file.name.removeprefix(".").rsplit(".", 2)[0] in names:
                file.unlink(missing_ok=True)


def follow_umask(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors leaves what it writes to its owner alone."""
    new = incomplete_path(path)
    with new.open("xb"):
        pass
    path.chmod(stat.S_IMODE(new.stat().st_mode))
    new.unlink()


@contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """Name the file and the next step in an `OSError` raised while writing it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        advice = "Free space or choose another folder, then prepare again: files that were finished are kept"
        if isinstance(error, FileNotFoundError):
            advice = "Something deleted it while it was written: does another process prepare the same files?"
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror or error}), and nothing of it was kept. {advice}",
        ) from error


def flush_to_disk(file: IO[bytes]) -> None:
    """Return only when what was written to `file` is on the disk, so that renaming it cannot reveal a part of it."""
    file.flush()
    os.fsync(file.fileno())
