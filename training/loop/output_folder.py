"""The folder that a run writes to, tried before anything is computed for it."""

import errno
import os
from pathlib import Path

from fusmae_hf.files.atomic import flush_to_disk, incomplete_path

ADVICE = {
    errno.EROFS: "It is mounted read-only.",
    errno.EACCES: "This user may not write there.",
    errno.EPERM: "This user may not write there.",
    errno.ENOSPC: "There is no space left.",
    errno.EDQUOT: "The quota is used up.",
    errno.ENOTDIR: "A file stands where a folder is needed.",
    errno.EEXIST: "A file stands where a folder is needed.",
    errno.ESTALE: "Its file system is gone: is it still mounted?",
    errno.EIO: "Its file system is gone: is it still mounted?",
}
"""What an error of the system means here."""

_TRIED_WITH = 4096
"""Bytes: a full disk takes an empty file."""


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Make the folder of a run, and see that a file can be written into it and put in place.

    Raises:
        OSError: it cannot; names the folder and says what to do. What was tried with is removed.
    """
    place = Path(folder)
    tried = incomplete_path(place / "try-to-write")
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            with tried.open("xb") as file:
                file.write(bytes(_TRIED_WITH))
                flush_to_disk(file)
        finally:
            tried.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Nothing can be written to the output folder {place} ({error.strerror or error}). "
            f"{ADVICE.get(error.errno or 0, 'Is its disk there?')} Name another with --output_dir.",
        ) from error
