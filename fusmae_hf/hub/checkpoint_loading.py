"""Models for pictures and the demo: from the folder of a checkpoint, of a run that goes on still, or a Hub id."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import FusMAEForPreTraining, FusMAEModel


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
    folder = Path(checkpoint)
    if folder.is_dir() and not (folder / "config.json").is_file():
        from fusmae_hf.hub.checkpoints import checkpoints_in

        newest = next((path for path in checkpoints_in(folder) if (path / "config.json").is_file()), None)
        if newest is None:
            raise FileNotFoundError(f"{checkpoint} holds no model: there is no config.json in it or a checkpoint-*.")
        checkpoint = newest
    with looked_up(checkpoint):
        architectures = FusMAEConfig.from_pretrained(checkpoint).architectures or []
    if decoders and "FusMAEForPreTraining" not in architectures:
        raise ValueError(
            f"{checkpoint} is a {', '.join(architectures) or 'model of unknown kind'} without decoders, so it cannot "
            "reconstruct. Give a pretraining checkpoint with --checkpoint."
        )
    model = (FusMAEForPreTraining if decoders else FusMAEModel).from_pretrained(checkpoint, **kwargs).eval()
    return model, FusMAEImageProcessor.from_pretrained(checkpoint)
