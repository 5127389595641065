"""What a batch of pairs still needs before the model: the noise that decides which patches are masked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

_SENSORS = {"optical": "noise", "sar": "noise_sar"}


class PairCollator:
    """Adds masking noise to a batch of pairs, the same for a pair whatever the batch, the worker or the process.

    The noise of a pair is a pure function of (seed, epoch, row, sensor): a counter-based generator (Philox) is set to
    the pair's own counter, so nothing is drawn in sequence and nothing has to be saved to resume.

    Args:
        patch_size: side of a patch in pixels.
        seed: non-negative integer below 2**64.
        masking: False leaves the noise out, for everything but pretraining.
    """

    def __init__(self, patch_size: int, seed: int = 0, masking: bool = True):
        self.patch_size, self.seed, self.masking = patch_size, seed, masking

    def __call__(self, batch: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Complete a batch.

        Args:
            batch: what `__getitems__` of a dataset of pairs returns, or a list of what `__getitem__` returns.

        Returns:
            The batch, everything in it kept, with `noise` (optical) and `noise_sar`: float32 in [0, 1), of shape
            `(batch, tokens)` where `tokens = (height // patch_size) * (width // patch_size)`.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        batch = dict(batch) if isinstance(batch, dict) else _stack_items(batch)
        if self.masking:
            for sensor, noise in _SENSORS.items():
                batch[noise] = self._noise(sensor, batch)
        return batch

    def _noise(self, sensor: str, batch: dict[str, Any]) -> torch.Tensor:
        height, width = batch[sensor].shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{sensor} patches of {height}x{width} px cannot be cut into tokens of {self.patch_size}x"
                f"{self.patch_size} px: choose a patch_size that divides both, or crop the pairs when preparing."
            )
        tokens = (height // self.patch_size) * (width // self.patch_size)
        drawn = np.empty((len(batch["row"]), tokens), dtype=np.float32)
        bits = np.random.Philox(key=[self.seed, list(_SENSORS).index(sensor)])
        generator, state = np.random.Generator(bits), bits.state
        for sample, epoch, row in zip(drawn, batch["epoch"].tolist(), batch["row"].tolist(), strict=True):
            state["state"]["counter"][:] = (0, 0, epoch, row)
            bits.state = state
            generator.random(out=sample, dtype=np.float32)
        return torch.from_numpy(drawn)


def _stack_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch single pairs; identifiers and labels stay lists."""
    return {
        key: [item[key] for item in items]
        if key in ("id", "labels")
        else default_collate([item[key] for item in items])
        for key in items[0]
    }
