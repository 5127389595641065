"""Tiny models and inputs."""

from collections.abc import Callable

import pytest
import torch

from fusmae_hf import (
    FusMAEBackbone,
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEModel,
)

HEADS = [FusMAEModel, FusMAEForImageClassification, FusMAEForSemanticSegmentation, FusMAEBackbone]
CLASSES = [*HEADS, FusMAEForPreTraining]

TINY = {
    "optical_bands": ["B02", "B03", "B04"],
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 24,
    "segmentation_hidden_size": 16,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., FusMAEConfig]:
    """Makes a configuration of 3 optical and 2 SAR bands on 16x16 px in patches of 4 px."""
    return lambda **fields: FusMAEConfig(**TINY | fields)


@pytest.fixture
def images() -> dict[str, torch.Tensor]:
    """Four pairs."""
    return {"pixel_values": torch.randn(4, 3, 16, 16), "pixel_values_sar": torch.randn(4, 2, 16, 16)}
