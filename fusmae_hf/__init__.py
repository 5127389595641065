"""Fus-MAE for transformers: a masked autoencoder that fuses Sentinel-1 and Sentinel-2 with cross-attention.

Importing this package registers Fus-MAE with the Auto classes of transformers; the rest is loaded when asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from fusmae_hf.modeling.configuration_fusmae import PRESETS, FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import (
    FusMAEBackbone,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEModel,
    FusMAEPreTrainedModel,
)

if TYPE_CHECKING:
    from fusmae_hf.hub.push_model import push_model
    from fusmae_hf.shards.loading import load_pairs

__version__ = "0.1.0"

_LAZY = {"load_pairs": "fusmae_hf.shards.loading", "push_model": "fusmae_hf.hub.push_model"}

__all__ = [
    "PRESETS",
    "FusMAEBackbone",
    "FusMAEConfig",
    "FusMAEForImageClassification",
    "FusMAEForPreTraining",
    "FusMAEForSemanticSegmentation",
    "FusMAEImageProcessor",
    "FusMAEModel",
    "FusMAEPreTrainedModel",
    "__version__",
    "load_pairs",
    "push_model",
]

AutoConfig.register("fusmae", FusMAEConfig, exist_ok=True)
AutoModel.register(FusMAEConfig, FusMAEModel, exist_ok=True)
AutoModelForPreTraining.register(FusMAEConfig, FusMAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(FusMAEConfig, FusMAEForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(FusMAEConfig, FusMAEForSemanticSegmentation, exist_ok=True)
AutoBackbone.register(FusMAEConfig, FusMAEBackbone, exist_ok=True)
AutoImageProcessor.register(FusMAEConfig, FusMAEImageProcessor, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fusmae_hf' has no attribute {name!r}")
