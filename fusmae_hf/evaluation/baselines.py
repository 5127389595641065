"""What needs no learning, beside which a model should be seen: reconstructions, and features of bands."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
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


@dataclass
class BandFeatures:
    """`pooler_output` `(batch, 2 * bands)`: the means of the bands given, optical first, then their deviations."""

    pooler_output: torch.Tensor


class BandStatistics(PreTrainedModel):
    """Mean and deviation of each band, in place of an encoder in `extract_features`.

    What a scene tells without a model. It has no weights; pixels without data do not count.
    """

    config_class = FusMAEConfig
    base_model_prefix = "bands"

    place: torch.Tensor

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it was moved; without weights nothing else tells."""
        return self.place.device

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
    ) -> BandFeatures:
        """Statistics of the normalised bands `(batch, bands, height, width)` of the sensors given."""
        means, deviations = [], []
        for pixels, mask in ((pixel_values, pixel_mask), (pixel_values_sar, pixel_mask_sar)):
            if pixels is None:
                continue
            there = torch.ones_like(pixels[:, :1]) if mask is None else mask[:, None].to(pixels.dtype)
            number = there.sum(dim=(2, 3)).clamp(min=1)
            pixels = torch.where(there > 0, pixels, 0.0)
            mean = pixels.sum(dim=(2, 3)) / number
            spread = (there * (pixels - mean[..., None, None]).square()).sum(dim=(2, 3)) / number
            means.append(mean)
            deviations.append(spread.sqrt())
        return BandFeatures(torch.cat(means + deviations, dim=1))
