"""Reconstructions that need no learning, beside which a model's should be seen."""

import torch

from fusmae_hf.modeling.patches_fusmae import patchify


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


def as_logits(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images in the shape of a model's `logits`, `(batch_size, patches, bands * patch_size ** 2)`."""
    return patchify(images, patch_size).flatten(2)
