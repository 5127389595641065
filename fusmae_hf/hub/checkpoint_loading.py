"""Checkpoints to read: the newest of a run and its manifest, model and processor of a folder or a Hub id."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import FusMAEForPreTraining, FusMAEModel

MANIFEST = "manifest.json"
"""Last file of a checkpoint to be written: names, sizes and checksums of all others, and of which run it is."""

FORMAT_VERSION = 1


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders `checkpoint-N`, complete or not, the one written last first.

    The time counts, not the step: where an older run went further, its checkpoints are not those to go on from.
    """
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    found = [path for path, step in steps.items() if re.fullmatch(r"\d+", step)]
    return sorted(found, key=lambda path: (_written(path), int(steps[path])), reverse=True)


def _written(checkpoint: Path) -> float:
    """Seconds since 1970, from the manifest, which copying does not change."""
    try:
        return float(read_manifest(checkpoint)["written"])
    except (OSError, ValueError, TypeError, KeyError):
        state = checkpoint / "trainer_state.json"
        return (state if state.is_file() else checkpoint).stat().st_mtime


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint's manifest.

    Raises:
        FileNotFoundError: there is none, as in checkpoints of transformers itself.
        ValueError: it is damaged, or of a newer format.
    """
    content = json.loads((checkpoint / MANIFEST).read_bytes())
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"it is not of the format version {FORMAT_VERSION}, which is read here")
    records = content["files"].values() if isinstance(content.get("files"), dict) else [None]
    if not all(isinstance(record, dict) and {"bytes", "xxh3_128"} <= record.keys() for record in records):
        raise ValueError("it does not give the size and the checksum of every file")
    if content.pop("xxh3_128", None) != checksum_of_content(content):
        raise ValueError("it is damaged: its checksum is not the one it was written with")
    return content


def checksum_of_content(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but this checksum."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def checksum_of_file(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def weights_hash(model: torch.nn.Module) -> str:
    """Hash over names, types, shapes and values of all weights, as 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


@contextmanager
def looked_up(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Say, where a checkpoint cannot be found, that there is no such folder: a mistyped one is looked up on the Hub.

    Raises:
        OSError: the one that was raised inside, with that in front.
    """
    try:
        yield
    except OSError as error:
        if Path(checkpoint).is_dir():
            raise
        raise OSError(f"There is no folder {checkpoint}, so it was looked up on the Hub: {error}") from error


def newest_model(checkpoint: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder that holds the model: the one given, or of a run that has not ended its newest `checkpoint-N`.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return checkpoint
    newest = next((path for path in checkpoints_in(folder) if (path / "config.json").is_file()), None)
    if newest is None:
        raise FileNotFoundError(f"{checkpoint} holds no model: there is no config.json in it or a checkpoint-*.")
    return newest


def load_checkpoint(
    checkpoint: str | os.PathLike[str], *, decoders: bool, **kwargs: Any
) -> tuple[Any, FusMAEImageProcessor]:
    """Model, in eval mode, and processor of a checkpoint.

    Args:
        checkpoint: a folder, or a Hub id. Of a run that has not ended, its newest `checkpoint-N` is taken.
        decoders: load a `FusMAEForPreTraining`, which can reconstruct; otherwise the encoder of whatever there is.
        kwargs: for `from_pretrained` of the model.

    Raises:
        FileNotFoundError: the folder holds no model.
        OSError: there is no such checkpoint, or it lacks a file.
        ValueError: it has no decoders, but they are wanted.
    """
    checkpoint = newest_model(checkpoint)
    with looked_up(checkpoint):
        architectures = FusMAEConfig.from_pretrained(checkpoint).architectures or []
    if decoders and "FusMAEForPreTraining" not in architectures:
        raise ValueError(
            f"{checkpoint} is a {', '.join(architectures) or 'model of unknown kind'} without decoders, so it cannot "
            "reconstruct. Give a pretraining checkpoint with --checkpoint."
        )
    model = (FusMAEForPreTraining if decoders else FusMAEModel).from_pretrained(checkpoint, **kwargs).eval()
    return model, FusMAEImageProcessor.from_pretrained(checkpoint)
