"""What both sensors of a pair have in common: projections onto one sphere, and the contrastive loss between them."""

import contextlib
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_fusmae import FusMAEConfig

HIGHEST_SCALE = 100.0
"""Of the similarities, as in CLIP: a temperature of 0.01."""


class FusMAEProjection(nn.Module):
    """Pooled tokens of one sensor onto the unit sphere that both sensors share."""

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.hidden_size, config.contrastive_projection_size)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit vectors `(batch_size, contrastive_projection_size)` float32 of `(batch_size, hidden_size)`."""
        return functional.normalize(self.down_proj(self.act_fn(self.up_proj(pooled))).float(), dim=-1)


class FusMAEContrast(nn.Module):
    """InfoNCE between the two sensors of a pair, both ways, with a learned temperature.

    Source: van den Oord et al. 2018 (arXiv 1807.03748); the temperature is that of CLIP, Radford et al. 2021
    (arXiv 2103.00020).
    """

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        self.optical = FusMAEProjection(config)
        self.sar = FusMAEProjection(config)
        self.log_scale = nn.Parameter(torch.empty(1))  # not a scalar, which FSDP2 cannot shard

    def init_scale(self, config: FusMAEConfig) -> None:
        """Set the temperature of the start."""
        init.constant_(self.log_scale, -math.log(config.contrastive_temperature))

    def forward(self, optical: torch.Tensor, sar: torch.Tensor, complete: torch.Tensor | None) -> torch.Tensor:
        """Loss of the pairs of a batch, in training of the batches of all processes together.

        The mean over the complete pairs; each is told from the other complete ones alone, so that it is 0 where there
        are fewer than two. All processes must call this with as many pairs in training.

        Args:
            optical: `(batch_size, hidden_size)`, pooled visible tokens of the optical patches, encoded alone.
            sar: the same of SAR.
            complete: `(batch_size,)` bool, pairs that have visible tokens of both sensors; None: all.

        Returns:
            float32, of shape `()`.
        """
        embeds: Any = [self.optical(optical), self.sar(sar)]
        if complete is None:
            complete = optical.new_ones(len(optical), dtype=torch.bool)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Every process computes the loss of all pairs: averaged, its gradients are those of one process.
            from torch.distributed.nn.functional import all_gather  # some builds of torch lack it

            embeds = [torch.cat(all_gather(each)) for each in embeds]
            complete = torch.cat(all_gather(complete.to(torch.uint8))).bool()
        device = optical.device.type
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else contextlib.nullcontext():
            scale = self.log_scale.float().exp().clamp(max=HIGHEST_SCALE)
            similarity = scale * embeds[0] @ embeds[1].T
            # Neither counted nor told from: finite, so that no gradient is NaN.
            least = torch.finfo(similarity.dtype).min
            target = torch.where(complete, torch.arange(len(complete), device=complete.device), -100)
            loss = similarity.new_zeros(())
            for logits in (similarity, similarity.T):
                logits = logits.masked_fill(~complete, least)
                loss = loss + functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
            return loss / (2 * complete.sum().clamp(min=1))
