"""Fus-MAE for transformers: a masked autoencoder that fuses Sentinel-1 and Sentinel-2 with cross-attention.

Importing this package registers Fus-MAE with the Auto classes of transformers, before or after they are imported; all
else is loaded when asked for.
"""

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from fusmae_hf.registration import register_with_transformers

if TYPE_CHECKING:
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

__version__ = "0.1.0"

if importlib.util.find_spec("fusmae_hf.modeling") is None:  # a checkout on the path, not installed
    __path__.append(os.path.dirname(os.path.dirname(__file__)))

_LAZY = {
    "FineTuningCollator": "fusmae_hf.data.finetuning_collation",
    "FineTuningTask": "fusmae_hf.data.tasks",
    "FusMAEBackbone": "fusmae_hf.modeling.modeling_fusmae",
    "FusMAEConfig": "fusmae_hf.modeling.configuration_fusmae",
    "FusMAEForImageClassification": "fusmae_hf.modeling.modeling_fusmae",
    "FusMAEForPreTraining": "fusmae_hf.modeling.modeling_fusmae",
    "FusMAEForSemanticSegmentation": "fusmae_hf.modeling.modeling_fusmae",
    "FusMAEImageProcessor": "fusmae_hf.modeling.image_processing_fusmae",
    "FusMAEModel": "fusmae_hf.modeling.modeling_fusmae",
    "FusMAEPreTrainedModel": "fusmae_hf.modeling.modeling_fusmae",
    "MapOptions": "fusmae_hf.scenes.plan",
    "MapResult": "fusmae_hf.scenes.mapping",
    "OPTICAL_BANDS_L1C": "fusmae_hf.modeling.sensors_fusmae",
    "PRESETS": "fusmae_hf.modeling.configuration_fusmae",
    "Pair": "fusmae_hf.data.pairs",
    "PairAugmentation": "fusmae_hf.data.augmentation",
    "PairCollator": "fusmae_hf.data.collation",
    "PairError": "fusmae_hf.errors",
    "PairInputs": "fusmae_hf.data.inputs",
    "PairsInfo": "fusmae_hf.data.pairs",
    "RowCollator": "fusmae_hf.shards.rows",
    "SimulatedPairs": "fusmae_hf.simulation.pairs",
    "SimulationOptions": "fusmae_hf.simulation.pairs",
    "cross_attention_maps": "fusmae_hf.plots.model",
    "decode_row": "fusmae_hf.shards.rows",
    "embedding_colours": "fusmae_hf.plots.model",
    "example_pairs": "fusmae_hf.readers.archives",
    "extract_features": "fusmae_hf.evaluation.features",
    "inspect_shards": "fusmae_hf.preparation.inspection",
    "interpolate_visible": "fusmae_hf.modeling.patches_fusmae",
    "linear_probe": "fusmae_hf.evaluation.probes",
    "load_pairs": "fusmae_hf.shards.loading",
    "map_scenes": "fusmae_hf.scenes.mapping",
    "measure_quantisation": "fusmae_hf.embeddings.ranges",
    "open_archive": "fusmae_hf.readers.archives",
    "plot_backscatter": "fusmae_hf.plots.pairs",
    "plot_composite": "fusmae_hf.plots.pairs",
    "plot_cross_attention": "fusmae_hf.plots.model",
    "plot_embedding": "fusmae_hf.plots.model",
    "plot_errors": "fusmae_hf.plots.model",
    "plot_pair": "fusmae_hf.plots.pairs",
    "predict_visible_mean": "fusmae_hf.modeling.patches_fusmae",
    "prepare": "fusmae_hf.preparation.prepare",
    "push_model": "fusmae_hf.hub.push_model",
    "push_shards": "fusmae_hf.hub.push_shards",
    "reconstruct_images": "fusmae_hf.plots.model",
    "serve_app": "fusmae_hf.app.page",
    "stream_pairs": "fusmae_hf.shards.rows",
    "verify_shards": "fusmae_hf.preparation.verification",
    "visible_pixels": "fusmae_hf.modeling.patches_fusmae",
}
"""Where the public names are defined, which are loaded when asked for."""

__all__ = ["__version__", *_LAZY]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        if _LAZY[name] not in sys.modules:
            from fusmae_hf.requirements import require_libraries

            require_libraries()
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fusmae_hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
