"""TerraTorch: `fusmae_nano` ... `fusmae_large` in its registry of backbones.

Importing this module registers them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

try:
    from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
except ImportError as error:
    raise ImportError(
        f"TerraTorch cannot be imported ({error}): install it with `pip install terratorch`, on Python 3.12 or later."
    ) from error

from fusmae_hf.modeling.configuration_fusmae import PRESETS, FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import FusMAEBackbone

MODALITIES = {"S1GRD": "sar", "S2L2A": "optical"}
"""Sensors by TerraTorch's names of modalities."""


class FusMAETerraTorch(nn.Module):
    """Feature maps of a Fus-MAE encoder for TerraTorch's necks and decoders, from raw values.

    Args:
        backbone: gives the maps.
        processor: picks bands and normalises, in the forward pass.
        modalities: which are given, of `MODALITIES`. A plain tensor is the one that is named alone.
        bands: names of the bands of each modality in the order of its tensor; where it is not listed, those of the
            processor.
        units: of each modality, as the processor knows them; where it is not listed, those of the processor.
        optical_offset: what was added to every optical value; that of the processor where None.

    Attributes:
        out_channels: channels of each map that `forward` gives.
    """

    def __init__(
        self,
        backbone: FusMAEBackbone,
        processor: FusMAEImageProcessor,
        modalities: Sequence[str] = tuple(MODALITIES),
        bands: Mapping[str, Sequence[str]] | None = None,
        units: Mapping[str, str] | None = None,
        optical_offset: float | None = None,
    ):
        super().__init__()
        if unknown := {*modalities, *(bands or {}), *(units or {})} - set(MODALITIES):
            raise ValueError(f"Fus-MAE takes the modalities {list(MODALITIES)}, not {sorted(unknown)}.")
        self.backbone, self.processor, self.modalities = backbone, processor, tuple(modalities)
        self.declared: dict[str, Any] = {"optical_offset": optical_offset}
        self.declared |= {f"{MODALITIES[name]}_bands": list(names) for name, names in (bands or {}).items()}
        self.declared |= {f"{MODALITIES[name]}_units": unit for name, unit in (units or {}).items()}
        self.patch_size = backbone.config.patch_size
        self.out_channels = list(backbone.channels)

    def forward(self, x: Mapping[str, torch.Tensor] | torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
        """Feature maps, `(batch, hidden_size, rows, columns)` for each stage.

        Args:
            x: raw images `(batch, bands, height, width)` by modality, or of the only one. NaN marks missing data.
            kwargs: what TerraTorch's tasks add, such as `image_size`; nothing is made of it.

        Raises:
            ValueError: a modality is unknown, none is given, or the processor refuses the values. It warns of those
                that look normalised already.
        """
        if isinstance(x, torch.Tensor):
            if len(self.modalities) != 1:
                raise ValueError(
                    f"One tensor was given for {list(self.modalities)}. Give a dictionary of modalities, or name the "
                    "one that it is, in `backbone_modalities`."
                )
            x = {self.modalities[0]: x}
        if not x or set(x) - set(self.modalities):
            raise ValueError(
                f"The modalities {list(x)} were given, but the backbone takes {list(self.modalities)}. Name them in "
                "`modalities` of the data module and in `backbone_modalities`."
            )
        images = {MODALITIES[name]: values for name, values in x.items()}
        inputs = self.processor(**images, **self.declared, return_pixel_mask=True)
        return list(self.backbone(**inputs).feature_maps)


def _register(preset: str) -> None:
    def build(
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> FusMAETerraTorch:
        """A backbone of this size; `kwargs` are those of `FusMAETerraTorch`.

        Args:
            pretrained: load the weights of `checkpoint`.
            checkpoint: a folder or a Hub id. Its processor is used with or without its weights; where None, that of
                BigEarthNet.
            out_indices: stages to give: 0 is the early fusion, 1 the first layer after it. All where None.
            kwargs: of `FusMAETerraTorch`.

        Raises:
            ValueError: `pretrained` without `checkpoint`, a checkpoint of another size, or no such stage.
        """
        if pretrained and checkpoint is None:
            raise ValueError("`pretrained` needs `backbone_checkpoint`: a folder or a Hub id of a Fus-MAE checkpoint.")
        plain = FusMAEConfig.from_preset(preset)
        known = plain if checkpoint is None else FusMAEConfig.from_pretrained(checkpoint)
        if known.hidden_size != plain.hidden_size:
            raise ValueError(
                f"{checkpoint} has the hidden size {known.hidden_size}, but fusmae_{preset} has {plain.hidden_size}: "
                "take the name of its size."
            )
        depth = known.num_hidden_layers + 1
        stages = range(depth) if out_indices is None else out_indices
        chosen: dict[str, Any] = {"out_indices": [stage + depth if stage < 0 else stage for stage in stages]}
        if pretrained:
            backbone = FusMAEBackbone.from_pretrained(checkpoint, **chosen)
        elif checkpoint is None:
            backbone = FusMAEBackbone(FusMAEConfig.from_preset(preset, **chosen))
        else:
            backbone = FusMAEBackbone(FusMAEConfig.from_pretrained(checkpoint, **chosen))
        processor = FusMAEImageProcessor() if checkpoint is None else FusMAEImageProcessor.from_pretrained(checkpoint)
        return FusMAETerraTorch(backbone, processor, **kwargs)

    build.__name__ = f"fusmae_{preset}"
    TERRATORCH_BACKBONE_REGISTRY.register(build)


for _preset in PRESETS:
    _register(_preset)
