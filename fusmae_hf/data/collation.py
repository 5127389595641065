"""What a batch of pairs still needs before the model: masking noise, and what its random views are to be."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import default_collate

from fusmae_hf.data.augmentation import PairAugmentation, SampleRandomness

_NOISE = {"optical": "noise", "sar": "noise_sar"}


class PairCollator:
    """Adds masking noise to a batch of pairs, the same for a pair whatever the batch, the worker or the process.

    The noise of a pair is a pure function of (seed, epoch, row, sensor): see `SampleRandomness`.

    Args:
        patch_size: side of a patch in pixels.
        seed: non-negative integer below 2**64.
        masking: False leaves the noise out, for everything but pretraining.
        augmentation: adds `augmentation`, the parameters of each pair's random view, for `PairAugmentation.apply` on
            the device.
    """

    def __init__(
        self, patch_size: int, seed: int = 0, masking: bool = True, augmentation: PairAugmentation | None = None
    ):
        self.patch_size, self.seed, self.masking, self.augmentation = patch_size, seed, masking, augmentation

    def __call__(self, batch: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Complete a batch.

        Args:
            batch: what `__getitems__` of a dataset of pairs returns, or a list of what `__getitem__` returns.

        Returns:
            The batch, everything in it kept, with `noise` (optical) and `noise_sar`: float32 in [0, 1), of shape
            `(batch, tokens)`, a number for each patch of the image or, where patches do not fill it, of the padded
            one; and `augmentation`.
        """
        columns = batch if isinstance(batch, dict) else getattr(batch, "columns", None)
        batch = dict(columns) if columns is not None else _stack_items(cast(Sequence[dict[str, Any]], batch))
        if self.masking:
            for sensor, noise in _NOISE.items():
                batch[noise] = self._noise(sensor, batch)
        if self.augmentation:
            num_bands = sum(_shape(sensor, batch)[0] for sensor in _NOISE)
            batch["augmentation"] = self.augmentation.draw(batch, num_bands)
        return batch

    def _noise(self, sensor: str, batch: dict[str, Any]) -> torch.Tensor:
        _, height, width = _shape(sensor, batch)
        tokens = -(-height // self.patch_size) * -(-width // self.patch_size)
        drawn = np.empty((len(batch["row"]), tokens), dtype=np.float32)
        SampleRandomness(self.seed, sensor).fill(drawn, batch["epoch"], batch["row"])
        return torch.from_numpy(drawn)


def _shape(sensor: str, batch: dict[str, Any]) -> tuple[int, ...]:
    """(bands, height, width) of a sensor's patches, also where bands are in their own resolution."""
    if sensor == "optical" and "optical_shape" in batch:
        return batch["optical_shape"]
    return tuple(batch[sensor].shape[1:])


def _stack_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch single pairs; identifiers and labels stay lists."""
    return {
        key: items[0][key]
        if key == "optical_shape"
        else [item[key] for item in items]
        if key in ("id", "labels", "sar_units", "optical_units")
        else default_collate([item[key] for item in items])
        for key in items[0]
    }
