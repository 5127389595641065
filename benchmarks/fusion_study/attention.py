"""What the cross-attention looks at: the place itself in the other sensor, its neighbours, or anything.

Chance is a uniform attention. Where a sensor is moved by a whole patch or more, `moved` tells whether the attention
follows the ground: the weight on the patch to which the ground of a query has gone.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import StudyData
from .pretraining import encoders_of
from .settings import Settings
from .variants import Variant

DIRECTIONS = ("optical on SAR", "SAR on optical")
BATCH_SIZE = 50


def attends(variant: Variant) -> bool:
    """Whether the encoder of a variant sees both sensors, and as tokens of their own."""
    return variant.streams == ("pair",)


@torch.no_grad()
def measure_attention(
    settings: Settings, variant: Variant, data: StudyData, seed: int, folder: Path
) -> dict[str, dict[str, dict[str, Any]]]:
    """Shares of attention by layer and direction, then by misregistration in px.

    Layers are `early fusion`, where there is one, and the joint ones. Of these, only the weights from one sensor to
    the other are taken, scaled to one; `mass` is how much of the attention they are.
    """
    encoder = encoders_of(settings, variant, data, seed, folder, attn_implementation="eager")["pair"]
    grid = data.settings.image_size // data.settings.patch_size
    pairs = min(settings.attention_pairs, len(data.splits["test"]))
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for px, shifted in data.shifted_sar.items():
        found: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
        for start in range(0, pairs, BATCH_SIZE):
            rows = slice(start, min(pairs, start + BATCH_SIZE))
            inputs = {
                "pixel_values": data.splits["test"].optical[rows].float(),
                "pixel_values_sar": shifted[rows].float(),
            }
            outputs = encoder(**inputs, output_attentions=True)
            moves = torch.from_numpy(np.rint(data.shifts[px][rows] / data.settings.patch_size).astype(int))
            for layer, direction, weights in _cross_weights(outputs, grid**2):
                # The ground that the optical sensor sees here lies `moves` further in the SAR image.
                sign = 1 if direction == DIRECTIONS[0] else -1
                found.setdefault((layer, direction), []).append(_shares(weights.cpu(), grid, sign * moves))
        for (layer, direction), parts in found.items():
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            of_heads = {name: values.mean(axis=0) for name, values in joined.items() if values.ndim == 2}
            shares = {name: float(values.mean()) for name, values in of_heads.items()}
            shares["colocated_best_head"] = float(of_heads["colocated"].max())
            moved = joined["moved"][~np.isnan(joined["moved"])]
            shares["moved"] = float(moved.mean()) if len(moved) else None
            shares |= chances(grid)
            record.setdefault(f"{layer}, {direction}", {})[str(px)] = shares
    return record


def chances(grid: int) -> dict[str, float]:
    """Shares of a uniform attention on a grid of `grid * grid` patches."""
    neighbours = _neighbours(grid).float().sum(dim=1).mean().item()
    return {"chance": 1 / grid**2, "chance_neighbours": neighbours / grid**2}


def _cross_weights(outputs, patches: int):
    """Layer, direction and weights `(batch, heads, queries, keys)` from one sensor to the other."""
    for direction, weights in zip(DIRECTIONS, outputs.cross_attentions or (), strict=False):
        yield "early fusion", direction, weights
    for number, weights in enumerate(outputs.attentions, start=1):
        optical, sar = slice(1, 1 + patches), slice(1 + patches, None)
        for direction, queries, keys in zip(DIRECTIONS, (optical, sar), (sar, optical), strict=True):
            yield f"joint layer {number}", direction, weights[:, :, queries, keys]


def _neighbours(grid: int) -> torch.Tensor:
    """`(patches, patches)` bool, which patches touch each other, corners included."""
    row, column = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
    distance = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    return distance == 1


def _shares(weights: torch.Tensor, grid: int, moves: torch.Tensor) -> dict[str, np.ndarray]:
    """Of each sample and head, the mean over queries, `(batch, heads)`; `moved` `(batch,)` is NaN without a target."""
    mass = weights.sum(dim=-1, keepdim=True)
    weights = weights / mass
    colocated = weights.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    neighbours = (weights * _neighbours(grid)).sum(dim=-1).mean(dim=-1)
    patch = torch.arange(grid**2)
    row, column = patch // grid + moves[:, :1], patch % grid + moves[:, 1:]
    inside = (row >= 0) & (row < grid) & (column >= 0) & (column < grid)
    target = (row.clamp(0, grid - 1) * grid + column.clamp(0, grid - 1))[..., None]
    on_target = weights.mean(dim=1).gather(2, target)[..., 0]
    moved = torch.where(inside, on_target, 0).sum(dim=1) / inside.sum(dim=1)
    moved = torch.where((moves != 0).any(dim=1), moved, torch.nan)
    found = {"colocated": colocated, "neighbours": neighbours, "mass": mass[..., 0].mean(dim=-1), "moved": moved}
    return {name: values.float().numpy() for name, values in found.items()}
