"""Patches of images: cut, put back together, placed, chosen, joined, compared."""

from collections.abc import Sequence

import torch
from torch.nn import functional


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into patches, row by row.

    Args:
        images: `(batch_size, channels, height, width)`.
        patch_size: side of a patch in pixels; divides height and width.

    Returns:
        `(batch_size, patches, channels, patch_size ** 2)`, a copy.
    """
    batch_size, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch_size, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch_size, rows * columns, channels, patch_size**2)


def unpatchify(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Put patches back together; the inverse of [`patchify`].

    Args:
        patches: `(batch_size, patches, channels, patch_size ** 2)`, the last two possibly flattened into one.
        patch_size: side of a patch in pixels.
        height, width: size of the image in pixels.

    Returns:
        `(batch_size, channels, height, width)`.
    """
    batch_size, rows, columns = patches.shape[0], height // patch_size, width // patch_size
    patches = patches.reshape(batch_size, rows, columns, -1, patch_size, patch_size)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, -1, height, width)


def position_embeddings(
    rows: int,
    columns: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> torch.Tensor:
    """Fixed sine-cosine positions of a grid of patches, `(rows * columns, dim)`, computed for whatever grid comes.

    A quarter of the channels each for sine and cosine of the row and of the column, with wavelengths from 2 pi to
    20,000 pi patches (Vaswani et al. 2017, applied to each axis). `scale` is the distance between neighbouring
    patches, in patches of the training images.
    """
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    row = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * scale * frequencies
    column = torch.arange(columns, device=device, dtype=torch.float32)[:, None] * scale * frequencies
    row = torch.cat([row.sin(), row.cos()], dim=-1)[:, None].expand(rows, columns, -1)
    column = torch.cat([column.sin(), column.cos()], dim=-1)[None].expand(rows, columns, -1)
    return torch.cat([row, column], dim=-1).reshape(rows * columns, dim).to(dtype)


def take_tokens(tokens: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Tokens (any trailing shape) of the patches `ids` `(batch_size, kept)`, or all of them where `ids` is None."""
    if ids is None:
        return tokens
    index = ids.reshape(*ids.shape, *([1] * (tokens.ndim - 2))).expand(*ids.shape, *tokens.shape[2:])
    return tokens.gather(1, index)


def masked_patches(ids_keep: torch.Tensor, num_patches: int) -> torch.Tensor:
    """1 for every patch not among `ids_keep` `(batch_size, kept)`, else 0; int64 `(batch_size, num_patches)`."""
    mask = torch.ones((ids_keep.shape[0], num_patches), dtype=torch.long, device=ids_keep.device)
    return mask.scatter(1, ids_keep, 0)


def reconstruction_error(
    predicted: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    valid: torch.Tensor | None,
    norm_pix_loss: bool,
) -> torch.Tensor:
    """Mean squared error over the masked, valid pixels of each sample; zero for a sample without any.

    Args:
        predicted: `(batch_size, N, bands * pixels)`.
        target: `(batch_size, N, bands, pixels)`, [`patchify`] of the images.
        mask: `(batch_size, N)`, 1 where the patch was hidden, 0 where it was seen.
        valid: `(batch_size, N, pixels)` bool, True where there is data, or None where there is everywhere.
        norm_pix_loss: normalise each target patch by the mean and variance of its valid pixels.

    Returns:
        `(batch_size,)` float32.
    """
    target = target.float()
    bands = target.shape[2]
    if valid is not None:
        target = torch.where(valid[:, :, None], target, 0.0)
    if norm_pix_loss:
        if valid is None:
            variance, mean = torch.var_mean(target, dim=(2, 3), correction=0, keepdim=True)
        else:
            count = (valid.sum(dim=-1) * bands).clamp(min=1)[..., None, None]
            mean = target.sum(dim=(2, 3), keepdim=True) / count
            variance = ((target - mean).square() * valid[:, :, None]).sum(dim=(2, 3), keepdim=True) / count
        target = (target - mean) * (variance + 1e-6).rsqrt()
    error = (predicted.float().view_as(target) - target).square()
    if valid is None:
        weight = mask.float()
        per_patch = error.mean(dim=(2, 3))
    else:
        weight = mask * valid.sum(dim=-1).float()
        per_patch = (error.mean(dim=2) * valid).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)
    return (per_patch * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def visible_pixels(mask: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """Which pixels were visible, `(batch_size, height, width)` bool.

    Args:
        mask: `(batch_size, patches)`, 1 where a patch was hidden.
        height, width: size of the image in pixels.
        patch_size: side of a patch in pixels.
    """
    grid = mask.reshape(-1, height // patch_size, width // patch_size) == 0
    return grid.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2)


def predict_visible_mean(images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The mean of the visible pixels of each band, everywhere.

    Args:
        images: `(batch_size, bands, height, width)`.
        visible: `(batch_size, height, width)` bool.

    Returns:
        The shape of `images`.
    """
    weight = visible[:, None].float()
    mean = (images * weight).sum(dim=(2, 3), keepdim=True) / weight.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    return mean.expand_as(images)


def interpolate_visible(images: torch.Tensor, visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Each pixel as the mean of the visible ones, weighted by a Gaussian of their distance.

    Normalised convolution (Knutsson and Westin, "Normalized and differential convolution", CVPR 1993) with a standard
    deviation of one patch, widened four times and again where nothing visible is near.

    Args:
        images: `(batch_size, bands, height, width)`.
        visible: `(batch_size, height, width)` bool.
        patch_size: side of a patch in pixels.

    Returns:
        The shape of `images`.
    """
    weight = visible[:, None].float()
    images = torch.where(visible[:, None], images.float(), 0.0)
    filled = predict_visible_mean(images, visible)
    for sigma in (16 * patch_size, 4 * patch_size, patch_size):
        rows = _gaussian(images.shape[2], sigma, images)
        columns = _gaussian(images.shape[3], sigma, images)
        near = rows @ weight @ columns
        smooth = (rows @ (images * weight) @ columns) / near.clamp(min=1e-12)
        confidence = near / (near + 1e-3)
        filled = confidence * smooth + (1 - confidence) * filled
    return filled


def _gaussian(length: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    """Matrix that smooths `length` pixels with a Gaussian of `sigma` pixels; symmetric."""
    distance = torch.arange(length, device=like.device, dtype=torch.float32)
    return torch.exp(-0.5 * ((distance[:, None] - distance) / sigma) ** 2) / (sigma * 2.5066)


def join_streams(
    streams: list[tuple[torch.Tensor | None, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put token streams in a row, leaving out those that are None.

    Args:
        streams: (tokens `(batch_size, n, dim)` or None, which of them are present `(batch_size, n)` bool or None).

    Returns:
        Tokens `(batch_size, sum of n, dim)` and their presence, None where every token is present.
    """
    given = [(tokens, present) for tokens, present in streams if tokens is not None]
    tokens = torch.cat([tokens for tokens, _ in given], dim=1)
    if all(present is None for _, present in given):
        return tokens, None
    return tokens, torch.cat(
        [
            stream.new_ones(stream.shape[:2], dtype=torch.bool) if present is None else present
            for stream, present in given
        ],
        dim=1,
    )


def fuse_map(hidden_states: torch.Tensor, grid: tuple[int, int], present: list[torch.Tensor | None]) -> torch.Tensor:
    """Map of the tokens at each place of the grid: their mean over the sensors that are present there.

    Args:
        hidden_states: `(batch_size, 1 + sensors * rows * columns, dim)`, the class token first.
        grid: (rows, columns) of patches.
        present: of each sensor, `(batch_size, rows * columns)` bool, or None where it is present everywhere.

    Returns:
        `(batch_size, rows, columns, dim)`; zero where no sensor is present.
    """
    tokens = hidden_states[:, 1:].unflatten(1, (len(present), grid[0] * grid[1]))
    if all(mask is None for mask in present):
        fused = tokens.mean(dim=1)
    else:
        everywhere = tokens.new_ones((tokens.shape[0], tokens.shape[2]), dtype=torch.bool)
        masks = torch.stack([everywhere if mask is None else mask for mask in present], dim=1)[..., None]
        fused = torch.where(masks, tokens, 0.0).sum(dim=1) / masks.sum(dim=1).clamp(min=1)
    return fused.to(tokens.dtype).unflatten(1, grid)


def valid_pixels(
    mask: torch.Tensor | None, available: torch.Tensor | None, images: torch.Tensor | None
) -> torch.Tensor | None:
    """Pixels `(batch_size, height, width)` bool of a sensor that hold data; None where all do.

    Args:
        mask: `(batch_size, height, width)` bool, or None.
        available: `(batch_size,)` bool, samples that have the sensor, or None.
        images: `(batch_size, bands, height, width)`, or None where no sample has the sensor.
    """
    if images is None or (mask is None and available is None):
        return None
    valid = images.new_ones((images.shape[0], *images.shape[2:]), dtype=torch.bool)
    if mask is not None:
        valid = valid & mask.to(images.device)
    return valid if available is None else valid & available.to(images.device)[:, None, None]


def sensor_mean(maps: Sequence[torch.Tensor], valid: Sequence[torch.Tensor | None], scale: int) -> torch.Tensor:
    """Mean of the sensors' maps at each place over those that have data there; zero where none has.

    Args:
        maps: of each sensor, `(batch_size, channels, rows, columns)`.
        valid: of each, `(batch_size, height, width)` bool, or None where there is data everywhere. A place has data if
            any of its pixels has.
        scale: pixels to the side of a place.
    """
    if all(mask is None for mask in valid):
        return torch.stack(list(maps)).mean(dim=0)
    places = []
    for values, mask in zip(maps, valid, strict=True):
        if mask is None:
            places.append(values.new_ones((values.shape[0], 1, *values.shape[2:])))
        else:
            places.append(functional.max_pool2d(mask[:, None].to(values.dtype), scale, ceil_mode=True))
    present = torch.stack(places)
    summed = torch.where(present > 0, torch.stack(list(maps)), 0.0).sum(dim=0)
    return summed / present.sum(dim=0).clamp(min=1)
