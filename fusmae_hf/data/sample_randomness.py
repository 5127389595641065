"""Random numbers that belong to a pair: a pure function of (seed, purpose, epoch, row)."""

import numpy as np
import torch

PURPOSES = ("optical", "sar", "augmentation")
"""What numbers are drawn for: masking noise of each sensor, random views."""


class SampleRandomness:
    """Uniform numbers for each pair of a batch, the same whatever the batch, the worker or the process.

    A counter-based generator (Philox) is set to the pair's own counter, so nothing is drawn in sequence and nothing
    has to be saved to resume.

    Args:
        seed: non-negative integer below 2**64.
        purpose: one of `PURPOSES`.
    """

    def __init__(self, seed: int, purpose: str):
        self._bits = np.random.Philox(key=[seed, PURPOSES.index(purpose)])
        self._generator, self._state = np.random.Generator(self._bits), self._bits.state

    def fill(self, drawn: np.ndarray, epochs: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill `drawn` (batch, numbers) float32 with numbers in [0, 1), for pairs given by `(batch,)` integers."""
        for sample, epoch, row in zip(drawn, epochs.tolist(), rows.tolist(), strict=True):
            self._state["state"]["counter"][:] = (0, 0, epoch, row)
            self._bits.state = self._state
            self._generator.random(out=sample, dtype=np.float32)
