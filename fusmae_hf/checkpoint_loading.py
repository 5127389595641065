"""Models for pictures and the demo: from the folder of a checkpoint, of a run that goes on still, or a Hub id."""

import os
from pathlib import Path
from typing import Any

from .modeling.configuration_fusmae import FusMAEConfig
from .modeling.image_processing_fusmae import FusMAEImageProcessor
from .modeling.modeling_fusmae import FusMAEForPreTraining, FusMAEModel


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
        from .training.checkpoints import checkpoints_in

        newest = next((path for path in checkpoints_in(folder) if (path / "config.json").is_file()), None)
        if newest is None:
            raise FileNotFoundError(f"{checkpoint} holds no model: there is no config.json in it or a checkpoint-*.")
        checkpoint = newest
    architectures = FusMAEConfig.from_pretrained(checkpoint).architectures or []
    if decoders and "FusMAEForPreTraining" not in architectures:
        raise ValueError(
            f"{checkpoint} is a {', '.join(architectures) or 'model of unknown kind'} without decoders, so it cannot "
            "reconstruct. Give a pretraining checkpoint with --checkpoint."
        )
    model = (FusMAEForPreTraining if decoders else FusMAEModel).from_pretrained(checkpoint, **kwargs).eval()
    return model, FusMAEImageProcessor.from_pretrained(checkpoint)
