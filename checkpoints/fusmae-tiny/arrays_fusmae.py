"""What users hand to the image processor: numpy arrays, masked or read-only ones too, tensors, lists with gaps."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """The value, if it is one of those allowed; else a ValueError."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, not {value!r}.")
    return value


def nearest_names(unknown: Iterable[str], known: Sequence[str]) -> str:
    """A sentence for each unknown name that is near to a known one."""
    found = ((name, difflib.get_close_matches(name, known, n=1, cutoff=0.75)) for name in unknown)
    return "".join(f" {name!r}: did you mean {near[0]!r}?" for name, near in found if near)


def to_tensor(values: Any, sensor: str) -> torch.Tensor:
    """A tensor of numbers; a masked pixel of a numpy masked array becomes NaN, which is no data."""
    if isinstance(values, torch.Tensor):
        return values
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "uif":
        found = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
        raise ValueError(f"{sensor}: expected numpy arrays or torch tensors of numbers, got {found}.")
    if isinstance(values, np.ma.MaskedArray):
        kind = values.dtype if values.dtype.kind == "f" else np.float32 if values.dtype.itemsize <= 2 else np.float64
        values = np.ma.filled(values.astype(kind), np.nan) if np.ma.is_masked(values) else values.data
    # torch knows neither foreign byte orders nor negative strides, and warns of arrays that must not be written to.
    return torch.from_numpy(np.require(values, values.dtype.newbyteorder("="), ["C", "W"]))


def _refuse_empty(sensor: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if 0 in tensor.shape:
            raise ValueError(f"{sensor}: shape {tuple(tensor.shape)} holds no pixel. Leave an empty batch out.")


def to_batches(values: Any, sensor: str) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Tensors `(batch, bands, height, width)`, one where all patches have one shape, and which samples are there."""
    if not isinstance(values, list | tuple):
        tensor = to_tensor(values, sensor)
        if tensor.ndim not in (3, 4):
            raise ValueError(
                f"{sensor}: expected shape (bands, height, width) or (batch, bands, height, width), got "
                f"{tuple(tensor.shape)}."
            )
        _refuse_empty(sensor, tensor)
        return [tensor if tensor.ndim == 4 else tensor[None]], None
    available = torch.tensor([patch is not None for patch in values], dtype=torch.bool)
    if not available.any():
        raise ValueError(f"{sensor}: the list holds no patch at all. Pass None instead of the list.")
    patches = [to_tensor(patch, sensor) for patch in values if patch is not None]
    wrong = [tuple(patch.shape) for patch in patches if patch.ndim != 3]
    if wrong:
        raise ValueError(f"{sensor}: each patch of a list must have shape (bands, height, width), got {wrong[0]}.")
    _refuse_empty(sensor, *patches)
    if len({(patch.shape, patch.dtype) for patch in patches}) == 1:
        patches = [torch.stack(patches)]
    else:
        patches = [patch[None] for patch in patches]
    return patches, None if bool(available.all()) else available


def spread(values: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Rows of `values` in the places of the available samples, zero (False) elsewhere."""
    whole = values.new_zeros((available.shape[0], *values.shape[1:]))
    whole[available.to(values.device)] = values
    return whole


def resized(pixels: torch.Tensor, valid: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in another size, bilinear with antialiasing, in which those without data have no weight.

    Args:
        pixels: `(batch, bands, height, width)`.
        valid: `(batch, height, width)` bool, where there is data.
        size: (height, width).

    Returns:
        Both in that size; a pixel holds data where the nearest one did.
    """
    weights = valid[:, None].to(pixels.dtype)
    summed, weight = (
        torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True) for x in (pixels * weights, weights)
    )
    there = torch.nn.functional.interpolate(weights, size, mode="nearest-exact")[:, 0] > 0.5
    return summed / weight.clamp(min=torch.finfo(weight.dtype).eps), there


def offsets_of_batches(offset: Any, batches: list[torch.Tensor], available: torch.Tensor | None) -> list[Any]:
    """Offset of each of some batches: a number, or `(batch, 1, 1, 1)`, one for each sample of it that is there."""
    if isinstance(offset, int | float):
        return [float(offset)] * len(batches)
    given = torch.as_tensor(offset, dtype=torch.float32, device=batches[0].device).reshape(-1, 1, 1, 1)
    of_present = given if available is None else given[available.to(given.device)]
    if len(of_present) != sum(map(len, batches)):
        raise ValueError(f"`optical_offset` has {len(given)} values: give one number, or one for each sample.")
    return list(of_present.split([len(batch) for batch in batches]))
