"""What needs no learning, beside which a model should be seen: reconstructions, and features of bands."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.patches_fusmae import patchify


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
