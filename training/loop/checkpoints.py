"""Checkpoints that are whole or absent: written aside and renamed, described by a manifest, deleted by renaming first.

transformers' Trainer writes into `checkpoint-N` itself, where a killed write looks like a checkpoint. Here it is made
to write into `incomplete-checkpoint-N/checkpoint-N`. Once every file of it is on the disk, `manifest.json` is added,
and the folder is renamed to `checkpoint-N`: the one moment at which the checkpoint comes into being.
"""

import json
import os
import pickle
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException
from transformers.trainer_pt_utils import safe_globals

from fusmae_hf.files.atomic import flush_to_disk, follow_umask
from fusmae_hf.hub.checkpoint_loading import (
    FORMAT_VERSION,
    MANIFEST,
    checkpoints_in,
    checksum_of_content,
    checksum_of_file,
    read_manifest,
)

_ASIDE = "incomplete-"
_MARKER = ".written-by-fusmae_hf"
_ALLOWANCE = threading.Lock()
"""What torch may load is a setting of the process: the first thread to be done would take it from the others."""

_TORCH_FILES = ("*.pt", "*.pth", "*.bin")
_PLACES_FOR = {
    "weights": ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
                "pytorch_model_fsdp_*", "pytorch_model_fsdp.bin"),
    "state of the optimiser": ("optimizer.pt", "optimizer.bin", "optimizer_*"),
    "learning-rate schedule": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
    "progress of the run": ("trainer_state.json",),
}  # fmt: skip


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written; the message says where, why, and what is there to go on from."""


# --- writing ---------------------------------------------------------------------------------------------------------


def place_aside(checkpoint: Path) -> Path:
    """Folder beside a checkpoint, in which it is written, or deleted."""
    return checkpoint.with_name(_ASIDE + checkpoint.name)


def begin(checkpoint: Path) -> Path:
    """Make the folder aside for a checkpoint anew.

    Raises:
        FileExistsError: a folder of that name was not made here, so it is left alone.
    """
    aside = place_aside(checkpoint)
    if aside.exists() and not _remove_aside(aside):
        raise FileExistsError(
            f"{aside} is needed to write {checkpoint.name}, but is no folder of such writing: move it elsewhere."
        )
    aside.mkdir(parents=True)
    (aside / _MARKER).touch()
    return aside


def share_weights(folder: Path, saved_here: bool) -> None:
    """Give weights and adapters that this process saved in a folder the permissions of any new file."""
    for weights in folder.glob("*.safetensors") if saved_here else ():
        follow_umask(weights)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose files are all there: their sizes and checksums, and some facts.

    Args:
        folder: the checkpoint, where it is written.
        facts: JSON values: `step`, `processes`, `global_batch_size`, `run`, what a run must have in common with this
            one to go on from here, and `progress`, what it then has to know.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": checksum_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, **facts, "written": time.time(), "files": files}
    manifest["xxh3_128"] = checksum_of_content(manifest)
    with (folder / MANIFEST).open("xb") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
        flush_to_disk(file)


def put_in_place(checkpoint: Path) -> None:
    """Rename a sealed checkpoint from its folder aside to its name; one that is there gives way.

    Two renames are not one. Should the process be killed between them, `settle` does the second.
    """
    aside = place_aside(checkpoint)
    for path in (*aside.rglob("*"), aside):
        _sync_entry(path)
    replaced = aside / f"replaced-{checkpoint.name}"
    if checkpoint.exists():
        os.rename(checkpoint, replaced)
    try:
        os.rename(aside / checkpoint.name, checkpoint)
    except OSError:
        if replaced.exists():
            os.rename(replaced, checkpoint)
        raise
    _sync_entry(checkpoint.parent)
    _remove_aside(aside)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first: deleting takes time, and half a checkpoint must not look like one."""
    try:
        aside = begin(checkpoint)
        os.rename(checkpoint, aside / f"discarded-{checkpoint.name}")
        _sync_entry(checkpoint.parent)
        _remove_aside(aside)
    except OSError as error:
        warnings.warn(f"{checkpoint} could not be deleted: {error}. Training goes on.", stacklevel=2)


def settle(folder: Path) -> None:
    """Finish or undo what killed processes left in the folder of a run: no other run may be writing there.

    Only folders that were made here are touched. A checkpoint that had been sealed is put in place; the rest goes.
    """
    for aside in sorted(folder.glob(f"{_ASIDE}checkpoint-*")):
        checkpoint = folder / aside.name.removeprefix(_ASIDE)
        sealed = (aside / _MARKER).is_file() and (aside / checkpoint.name / MANIFEST).is_file()
        if sealed and not checkpoint.exists() and problem_of(aside / checkpoint.name) is None:
            put_in_place(checkpoint)
        else:
            _remove_aside(aside)


@contextmanager
def explained_failure(checkpoint: Path) -> Iterator[None]:
    """Remove a checkpoint whose writing fails, and where the storage is at fault say what is left to go on from.

    Raises:
        CheckpointNotWrittenError: instead of what torch, safetensors or the system say of a full disk and the like.
    """
    try:
        yield
    except BaseException as error:
        _remove_aside(place_aside(checkpoint))
        if not _is_of_storage(error):
            raise
        folder = checkpoint.parent
        previous = newest_complete(folder)
        needed = ""
        if previous:
            size = sum(path.stat().st_size for path in previous.rglob("*") if path.is_file())
            needed = f", and {previous.name} takes {size / 1e6:,.1f} MB"
        raise CheckpointNotWrittenError(
            f"{checkpoint.name} could not be written to {folder}: {_cause(error)}. What was written of it has been "
            f"removed. {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there now{needed}. "
            + (f"{previous} is intact" if previous else f"There is no other complete checkpoint in {folder}")
            + ": free space, then start the same command with `--resume_from_checkpoint auto`."
        ) from error


def _is_of_storage(error: BaseException) -> bool:
    # Of its own failed writes torch's zip writer says no more than "unexpected pos 576 vs 534".
    of_torch = isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error))
    return isinstance(error, OSError | SafetensorError | CheckpointException) or bool(of_torch)


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"a file could not be written to its end ({lines[0]})" if isinstance(error, RuntimeError) else lines[0]


def _sync_entry(path: Path) -> None:
    if path.is_file() or os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_aside(aside: Path) -> bool:
    """Remove a folder that `begin` made; whether nothing is there any more.

    The marker goes last, so that a removal that is cut short is known for what it is. A folder without it is removed
    only if it is empty, as of a process killed between the two lines that make it.
    """
    if (aside / _MARKER).is_file():
        for path in aside.iterdir():
            if path.name != _MARKER:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if all(path.name == _MARKER for path in aside.iterdir()):
            (aside / _MARKER).unlink(missing_ok=True)
    if aside.is_dir() and not any(aside.iterdir()):
        aside.rmdir()
    return not aside.exists()


# --- checking --------------------------------------------------------------------------------------------------------


def problem_of(checkpoint: Path, *, thorough: bool = True) -> str | None:
    """Why nothing can be resumed from a checkpoint; None where nothing speaks against it.

    Args:
        checkpoint: its folder.
        thorough: read every file and compare its checksum, and open those that a resume loads; otherwise look for the
            files and their sizes alone.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        recorded = read_manifest(checkpoint)["files"]
        problems = (_problem_of_file(checkpoint / name, record, thorough) for name, record in recorded.items())
    except FileNotFoundError:
        recorded = {path.relative_to(checkpoint).as_posix(): {} for path in checkpoint.rglob("*") if path.is_file()}
        problems = (f"{name} is empty" for name in recorded if not (checkpoint / name).stat().st_size)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be used: {error}"
    if (problem := next(filter(None, problems), None)) is not None:
        return problem
    top = {name.split("/")[0] for name in recorded}
    given = {part for part, places in _PLACES_FOR.items() for name in top for place in places if fnmatch(name, place)}
    if missing := [part for part in _PLACES_FOR if part not in given]:
        return f"it holds no {' and no '.join(missing)}"
    if not thorough:
        return None
    return next(filter(None, (_problem_of_loading(checkpoint, name) for name in recorded)), None)


def _problem_of_file(path: Path, record: Mapping[str, Any], thorough: bool) -> str | None:
    try:
        if (size := path.stat().st_size) != record["bytes"]:
            return f"{path.name} has {size:,} bytes instead of {record['bytes']:,}"
        if thorough and checksum_of_file(path) != record["xxh3_128"]:
            return f"{path.name} is damaged: its checksum is not the one it was written with"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"
    return None


def _problem_of_loading(checkpoint: Path, name: str) -> str | None:
    """Why a file does not load, found without reading its tensors."""
    path = checkpoint / name
    try:
        if fnmatch(path.name, "*.safetensors"):
            with safe_open(path, "pt"):
                pass
        elif "/" not in name and any(fnmatch(name, pattern) for pattern in _TORCH_FILES):
            if path.name == "training_args.bin":  # a pickle of the arguments that nothing reads
                return None
            with _ALLOWANCE, safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif name == "trainer_state.json":
            json.loads(path.read_bytes())["global_step"]
        elif path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_bytes())["weight_map"].values())
            absent = sorted(shard for shard in shards if not (path.parent / shard).is_file())
            return f"{absent[0]} is missing" if absent else None
    except pickle.UnpicklingError as error:
        return f"{name} holds more than tensors and plain values, which could run code when loaded ({_first(error)})"
    except Exception as error:  # damaged files fail in as many ways as there are parsers
        return f"{name} does not load ({type(error).__name__}: {_first(error)})"
    return None


def _first(error: Exception) -> str:
    """The line of a message that says what is wrong."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "global" in line.lower()), lines[0])


# --- choosing --------------------------------------------------------------------------------------------------------


def newest_complete(folder: Path, note: Callable[[str], Any] = lambda text: None) -> Path | None:
    """The checkpoint written last of those that can be resumed from; those passed over are noted with the reason."""
    for checkpoint in checkpoints_in(folder):
        if (problem := problem_of(checkpoint)) is None:
            return checkpoint
        note(f"Passing over {checkpoint}: {problem}.")
    return None


def surplus(folder: Path, limit: int | None, protected: Sequence[Path]) -> list[Path]:
    """Checkpoints to delete so that `limit` are left, or as many as are protected.

    Those that cannot be resumed from go first, then the ones written longest ago.
    """
    if limit is None or limit <= 0:
        return []
    kept = {path.resolve() for path in protected}
    newest_first = checkpoints_in(folder)
    free = [path for path in newest_first if path.resolve() not in kept]
    sound = [path for path in free if problem_of(path, thorough=False) is None]
    in_order = [path for path in free if path not in sound] + sound[::-1]
    return in_order[: max(0, len(newest_first) - limit)]
