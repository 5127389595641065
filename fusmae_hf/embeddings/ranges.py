"""What range the vectors of a checkpoint have, measured on pairs of many scenes."""

import copy
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import PairInputs
from fusmae_hf.embeddings.encoder import COLUMNS, vectors_of
from fusmae_hf.embeddings.quantisation import quantisation_of, write_quantisation
from fusmae_hf.hub.checkpoint_loading import load_checkpoint, newest_model, weights_hash
from fusmae_hf.shards.loading import load_pairs

_MOST_TOKENS_A_PAIR = 64


@torch.inference_mode()
def measure_quantisation(
    checkpoint: str | os.PathLike[str],
    shards: str | os.PathLike[str],
    split: str = "train",
    *,
    max_pairs: int | None = None,
    batch_size: int = 16,
) -> Path:
    """Measure the range of the vectors of a checkpoint, so that maps of embeddings can be in eight bits.

    Args:
        checkpoint: a folder; the record is written beside the weights.
        shards: pairs of many scenes, as `load_pairs` takes them.
        split: of the shards.
        max_pairs: read at most so many, 2048 by default.
        batch_size: pairs at once.

    Returns:
        The record.

    Raises:
        ValueError: the checkpoint is no folder, or pairs are too few to tell a range.
    """
    folder = Path(newest_model(checkpoint))
    if not folder.is_dir():
        raise ValueError(f"{checkpoint} must be a folder, since the ranges are written beside its weights.")
    encoder, processor = load_checkpoint(folder, decoders=False)
    pairs = copy.copy(load_pairs(shards, split))
    pairs.packed = True
    prepare = PairInputs(processor, pairs.info, True, patch_size=encoder.config.patch_size)
    loader = DataLoader(
        pairs,
        batch_size=batch_size,
        sampler=pairs.sampler(batch_size),
        collate_fn=PairCollator(encoder.config.patch_size, masking=False),
    )
    left, generator = min(max_pairs or 2048, len(pairs)), torch.Generator().manual_seed(0)
    vectors: dict[str, dict[str, list[np.ndarray]]] = {
        unit: {name: [] for name in COLUMNS} for unit in ("patch", "window")
    }
    for batch in loader:
        inputs = prepare(batch)
        inputs.pop("label_map", None)
        for column, of_patches, of_windows in zip(
            COLUMNS, *(vectors_of(encoder, inputs, COLUMNS, unit) for unit in ("patch", "window")), strict=True
        ):
            tokens = of_patches.flatten(2).permute(0, 2, 1)
            chosen = tokens[:, torch.randperm(tokens.shape[1], generator=generator)[:_MOST_TOKENS_A_PAIR]]
            for unit, values in (("patch", chosen.flatten(0, 1)), ("window", of_windows)):
                values = values[(values != 0).any(dim=-1)]  # where there was no data all are zero
                vectors[unit][column].append(values.numpy())
        left -= batch_size
        if left <= 0:
            break
    found = {
        unit: {name: quantisation_of(np.concatenate(parts)) for name, parts in of_unit.items()}
        for unit, of_unit in vectors.items()
    }
    return write_quantisation(folder, weights_hash(encoder), found, dataset=pairs.info.name, split=split)
