"""Vectors that an encoder gives for patches and for windows."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional

from fusmae_hf.modeling.patches_fusmae import fuse_map

Unit = Literal["patch", "window"]

COLUMNS = ("fused", "sar", "optical")
"""What a vector is made from: all sensors that are there, or one of them alone."""

_ENDINGS = {"optical": "", "sar": "_sar"}
"""Of the names of inputs, in the order of the encoder's tokens."""


def vectors_of(
    encoder: Any, inputs: dict[str, torch.Tensor], columns: Sequence[str], unit: Unit
) -> list[torch.Tensor]:
    """Features that the configuration names (`feature_layers`, or the last), as `extract_features` gives them.

    Args:
        encoder: [`FusMAEModel`].
        inputs: of it.
        columns: some of `COLUMNS`.
        unit: `"patch"`: of each patch, the mean over the sensors that are there; `"window"`: the mean of its patches.

    Returns:
        For each column `(batch, size, rows, columns)`, or `(batch, size)` of windows; zero where no sensor of the
        column has data.
    """
    found: dict[tuple[str, ...], torch.Tensor] = {}
    vectors = []
    for column in columns:
        chosen = {sensor: ending for sensor, ending in _ENDINGS.items() if column in ("fused", sensor)}
        given = {sensor: ending for sensor, ending in chosen.items() if f"pixel_values{ending}" in inputs}
        key = tuple(given)
        if given and key not in found:
            found[key] = _encoded(encoder, inputs, given, unit, column == "fused")
        vectors.append(found.get(key))
    if any(vector is None for vector in vectors):
        shape = next((vector.shape for vector in vectors if vector is not None), None) or _shape(encoder, inputs, unit)
        nothing = next(iter(inputs.values())).new_zeros(shape, dtype=torch.float32)
        vectors = [nothing if vector is None else vector for vector in vectors]
    return [vector.float() for vector in vectors if vector is not None]


def _encoded(
    encoder: Any, inputs: dict[str, torch.Tensor], given: dict[str, str], unit: Unit, availability: bool
) -> torch.Tensor:
    names = [f"{name}{ending}" for ending in given.values() for name in ("pixel_values", "pixel_mask")]
    names += [f"{sensor}_available" for sensor in given] if availability else []
    chosen = {name: inputs[name] for name in names if name in inputs}
    outputs = encoder(**chosen)
    several = outputs.feature_output is not None
    if unit == "window":
        return outputs.feature_output if several else outputs.pooler_output
    height, width = _size(chosen)
    patch = encoder.config.patch_size
    present = [_present(chosen, sensor, ending, patch) for sensor, ending in given.items()]
    hidden_states = outputs.feature_hidden_state if several else outputs.last_hidden_state
    return fuse_map(hidden_states, (height // patch, width // patch), present).permute(0, 3, 1, 2)


def _present(inputs: dict[str, torch.Tensor], sensor: str, ending: str, patch: int) -> torch.Tensor | None:
    """Which patches of a sensor hold data, `(batch, patches)` bool; None where all do."""
    mask, available = inputs.get(f"pixel_mask{ending}"), inputs.get(f"{sensor}_available")
    present = None if mask is None else (functional.max_pool2d(mask[:, None].float(), patch) > 0).flatten(1)
    if available is None:
        return present
    return available[:, None].expand(-1, _patches(inputs, patch)) if present is None else present & available[:, None]


def _patches(inputs: dict[str, torch.Tensor], patch: int) -> int:
    height, width = _size(inputs)
    return (height // patch) * (width // patch)


def _shape(encoder: Any, inputs: dict[str, torch.Tensor], unit: Unit) -> tuple[int, ...]:
    height, width = _size(inputs)
    patch, size = encoder.config.patch_size, encoder.config.feature_size
    batch = len(next(iter(inputs.values())))
    return (batch, size) if unit == "window" else (batch, size, height // patch, width // patch)


def _size(inputs: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    height, width = next(inputs[name] for name in ("pixel_values", "pixel_values_sar") if name in inputs).shape[-2:]
    return height, width
