"""Pretraining of one variant: masked autoencoding, contrastive, or both.

Seeds are paired: at step t of a seed every variant sees the same pairs, turned alike, under the same masking noise.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.modeling_fusmae import FusMAEForPreTraining, FusMAEModel
from fusmae_hf.training.arguments import spell_out_attention

from .data import StudyData
from .settings import Settings
from .variants import Stream, Variant, flops_per_pair, pretraining_steps, stream_config, stream_inputs

HIGHEST_SCALE = 100.0
"""Of the logits of the contrastive loss, as in CLIP (Radford et al. 2021, arXiv 2103.00020)."""


class ContrastiveHeads(nn.Module):
    """InfoNCE between the two sensors of a pair, both ways, on projected features.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), with the learned temperature of CLIP.
    """

    def __init__(self, hidden_size: int, projection_size: int):
        super().__init__()

        def head() -> nn.Module:
            return nn.Sequential(
                nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, projection_size)
            )

        self.optical, self.sar = head(), head()
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, optical: torch.Tensor, sar: torch.Tensor) -> torch.Tensor:
        """Loss of pooled features `(batch_size, hidden_size)` of the optical and of the SAR view of each pair."""
        one = functional.normalize(self.optical(optical).float(), dim=1)
        other = functional.normalize(self.sar(sar).float(), dim=1)
        similarity = self.log_scale.exp().clamp(max=HIGHEST_SCALE) * one @ other.T
        target = torch.arange(len(one), device=one.device)
        return (functional.cross_entropy(similarity, target) + functional.cross_entropy(similarity.T, target)) / 2


class Pretrainer(nn.Module):
    """A model with the loss of a variant's objective."""

    def __init__(self, settings: Settings, variant: Variant, config: FusMAEConfig):
        super().__init__()
        self.objective, self.options = variant.objective, settings.contrastive
        self.model = FusMAEForPreTraining(config)
        if settings.autocast:
            spell_out_attention(self.model, settings.device, (settings.image_size, settings.image_size))
        if self.objective != "mae":
            self.heads = ContrastiveHeads(config.hidden_size, self.options["projection_size"])

    def forward(self, inputs: dict[str, torch.Tensor], noise: torch.Tensor, noise_sar: torch.Tensor) -> torch.Tensor:
        """Loss of a batch; `noise` `(batch_size, patches)` decides the masks."""
        if self.objective == "contrastive":
            return self._agreement(inputs)
        loss = self.model(**inputs, noise=noise, noise_sar=noise_sar).loss
        if self.objective == "combined":
            # Each sensor is encoded alone here: tokens that have attended to the other sensor would give it away.
            kept = self.model.draw_masks(*noise.shape, noise, noise_sar)
            loss = loss + self.options["weight"] * self._agreement(inputs, *kept)
        return loss

    def _agreement(self, inputs, ids_keep=None, ids_keep_sar=None) -> torch.Tensor:
        optical = self.model.fusmae(pixel_values=inputs["pixel_values"], ids_keep=ids_keep)
        sar = self.model.fusmae(pixel_values_sar=inputs["pixel_values_sar"], ids_keep_sar=ids_keep_sar)
        return self.heads(optical.pooler_output, sar.pooler_output)


def autocast(settings: Settings) -> contextlib.AbstractContextManager:
    """Matrix products in bfloat16 where the study says so."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.autocast)


def batches(
    settings: Settings, variant: Variant, data: StudyData, seed: int, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Optical and SAR images, turned and cropped at random, and the masking noise of both sensors."""
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    pairs, batch_size = len(data.tiles[0]), data.settings.batch_size
    patches = (data.settings.image_size // data.settings.patch_size) ** 2
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        while len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(pairs)])
        rows, order = order[:batch_size], order[batch_size:]
        corners = rng.integers(0, data.tiles[0].shape[-1] - data.settings.image_size + 1, (batch_size, 2))
        optical, sar = (_crops(tiles, rows, corners, data.settings.image_size) for tiles in data.tiles)
        turns, flips = int(rng.integers(4)), rng.random() < 0.5
        optical, sar = (_turned(images, turns, flips) for images in (optical, sar))
        if variant.objective == "contrastive":
            optical, sar = _augmented(settings, optical, sar, seed, step, rows)
        noise, noise_sar = (torch.rand(batch_size, patches, generator=generator).to(settings.device) for _ in range(2))
        yield optical, sar, noise, noise_sar


def _crops(tiles: torch.Tensor, rows: np.ndarray, corners: np.ndarray, size: int) -> torch.Tensor:
    if tiles.shape[-1] == size:
        return tiles[rows].float()
    places = zip(rows, corners, strict=True)
    return torch.stack([tiles[row, :, top : top + size, left : left + size] for row, (top, left) in places]).float()


def _turned(images: torch.Tensor, turns: int, flips: bool) -> torch.Tensor:
    turned = torch.rot90(images, turns, dims=(2, 3))
    return (turned.flip(-1) if flips else turned).contiguous()


def _augmented(
    settings: Settings, optical: torch.Tensor, sar: torch.Tensor, seed: int, step: int, rows: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random views for the contrastive loss: turns, crops, gains and offsets of bands, and noise like speckle."""
    options = settings.contrastive
    independent = options["geometry"] == "independent"
    batch = {"epoch": torch.full((len(rows),), step), "row": torch.from_numpy(rows)}
    views, bands = [], optical.shape[1] + sar.shape[1]
    for number in range(2 if independent else 1):
        augmentation = PairAugmentation(
            min_crop=options["min_crop"], band_jitter=options["band_jitter"], seed=2 * seed + number
        )
        parameters = augmentation.draw(batch, bands).to(optical.device)
        views.append(augmentation.apply({"pixel_values": optical, "pixel_values_sar": sar}, parameters))
    sar = views[-1]["pixel_values_sar"]
    # Speckle multiplies power, so it adds to decibels.
    return views[0]["pixel_values"], sar + options["sar_noise"] * torch.randn_like(sar)


def pretrain(
    settings: Settings,
    variant: Variant,
    data: StudyData,
    seed: int,
    folder: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Train a variant and keep its encoders in `folder`, one a stream.

    Args:
        settings: of the study.
        variant: what to train.
        data: what to train on.
        seed: of weights, order and masks.
        folder: where encoders are kept.
        progress: told the share of the work that is done, now and then.

    Returns:
        Steps, operations, seconds and losses by stream.
    """
    record: dict[str, Any] = {}
    steps = pretraining_steps(settings, variant, data)
    for stream in variant.streams:
        flops = flops_per_pair(settings, variant, data, stream) * data.settings.batch_size * steps[stream]
        started = time.perf_counter()
        model, losses = _train(settings, variant, data, seed, stream, steps[stream], progress)
        model.save_pretrained(folder / stream)
        record[stream] = {
            "steps": steps[stream],
            "tflops": flops / 1e12,
            "seconds": time.perf_counter() - started,
            "parameters": model.num_parameters(),
            "loss_curve": [float(part.mean()) for part in np.array_split(losses, min(20, len(losses)))],
        }
    return {"streams": record, "tflops": sum(of_stream["tflops"] for of_stream in record.values())}


def _train(
    settings: Settings,
    variant: Variant,
    data: StudyData,
    seed: int,
    stream: Stream,
    steps: int,
    progress: Callable[[float], None],
) -> tuple[FusMAEModel, np.ndarray]:
    torch.manual_seed(seed)
    pretrainer = Pretrainer(settings, variant, stream_config(settings, variant, data, stream)).to(settings.device)
    optimizer, schedule = optimizer_of(pretrainer, settings, settings.learning_rate[variant.objective], steps)
    losses = torch.zeros(steps, device=settings.device)
    for step, (optical, sar, noise, noise_sar) in enumerate(batches(settings, variant, data, seed, steps)):
        inputs = stream_inputs(stream, data, optical, sar)
        with autocast(settings):
            loss = pretrainer(inputs, noise, noise_sar)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = loss.detach()
        if step % 50 == 0:
            progress(step / steps)
    return pretrainer.model.fusmae, losses.cpu().numpy()


def optimizer_of(
    model: nn.Module, settings: Settings, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, without decay of biases and norms, whose rate rises for a tenth of the steps and falls as a cosine."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, schedule


def encoders_of(
    settings: Settings, variant: Variant, data: StudyData, seed: int, folder: Path, **kwargs: Any
) -> dict[Stream, FusMAEModel]:
    """The pretrained encoders of a variant, or those with initial weights, by stream."""
    encoders = {}
    for stream in variant.streams:
        torch.manual_seed(seed)
        if variant.is_pretrained:
            encoder = FusMAEModel.from_pretrained(folder / stream, **kwargs)
        else:
            encoder = FusMAEModel._from_config(stream_config(settings, variant, data, stream), **kwargs)
        encoders[stream] = encoder.to(settings.device).eval()
    return encoders
