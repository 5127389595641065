"""Fus-MAE configuration."""

import copy
import difflib
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .sensors_fusmae import OPTICAL_BANDS, SAR_BANDS

logger = logging.get_logger(__name__)

PRESETS = {
    "nano": {
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 384,
        "patch_size": 16, "image_size": 128, "segmentation_hidden_size": 32, "segmentation_detail_size": 8,
        "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 256,
    },
    "tiny": {
        "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768,
        "decoder_hidden_size": 128, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 512,
    },
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 23},
}  # fmt: skip
"""Named sizes; every field not listed keeps its default. Depth counts the early fusion layer: 11 + 1, nano 3 + 1,
large 23 + 1."""

OBJECTIVES = {"fusmae": {"contrastive_loss_weight": 0.0}, "fusmae_contrastive": {"contrastive_loss_weight": 0.1}}
"""Named objectives of pretraining: `"fusmae"` is the paper's, masked reconstruction; `"fusmae_contrastive"` is ours,
which adds a tenth of the contrastive loss between the sensors."""

AUTO_MAP = {
    "AutoConfig": "configuration_fusmae.FusMAEConfig",
    "AutoModel": "modeling_fusmae.FusMAEModel",
    "AutoModelForPreTraining": "modeling_fusmae.FusMAEForPreTraining",
    "AutoModelForImageClassification": "modeling_fusmae.FusMAEForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_fusmae.FusMAEForSemanticSegmentation",
    "AutoBackbone": "modeling_fusmae.FusMAEBackbone",
    "AutoImageProcessor": "image_processing_fusmae.FusMAEImageProcessor",
}
"""What each Auto class takes from a saved folder (`trust_remote_code=True`)."""

CUSTOM_PIPELINES = {
    task: {"impl": f"modeling_fusmae.FusMAE{name}Pipeline", "pt": [model]}
    for task, name, model in (
        ("image-feature-extraction", "ImageFeatureExtraction", "AutoModel"),
        ("image-classification", "ImageClassification", "AutoModelForImageClassification"),
        ("image-segmentation", "ImageSegmentation", "AutoModelForSemanticSegmentation"),
    )
}
"""What `pipeline(<task>, trust_remote_code=True)` takes from a saved folder, and the class of model that it loads."""

# Keywords that transformers itself hands to a configuration besides its declared fields.
_TRANSFORMERS_KEYWORDS = {
    "num_labels", "torch_dtype", "name_or_path", "output_attentions", "attn_implementation", "experts_implementation",
    "model_type", "auto_map", "custom_pipelines", "quantization_config", "per_layer_config", "tie_last_hidden_states",
    "out_features", "out_indices", "stage_names", "transformers_weights", "use_cache", "tie_word_embeddings",
}  # fmt: skip


@strict
class FusMAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`FusMAEModel`] and its heads. The defaults give the base size on 120x120 pixel pairs at 10 m.

    Args:
        optical_bands (`list[str]`): names of the optical bands, in the order of the channels of `pixel_values`.
        sar_bands (`list[str]`): names of the SAR bands, in the order of the channels of `pixel_values_sar`.
        hidden_size (`int`): width of the encoder; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`): joint self-attention layers. The early fusion layer comes on top of them.
        num_attention_heads (`int`): attention heads of each encoder layer.
        intermediate_size (`int`): width of the encoder's MLPs.
        hidden_act (`str`): activation of the MLPs.
        initializer_range (`float`): standard deviation with which class and mask tokens are drawn.
        layer_norm_eps (`float`): epsilon of the layer norms.
        qkv_bias (`bool`): whether query, key and value projections have a bias.
        image_size (`int` or `(height, width)`): size in pixels of the training patches; any other size that the patch
            size divides works too.
        patch_size (`int`): side of a square patch in pixels.
        gsd (`float`): ground sampling distance of the training images in metres; see the `gsd` of the models.
        early_fusion (`str`): `"cross_attention"` for the layer in which the patch tokens of each sensor attend to
            those of the other, or `"none"`.
        feature_fusion (`str`): cross-attention in the decoder. `"query"`: the full grid of a sensor attends to the
            encoder's output; `"latent"`: the encoder's output of a sensor attends to that of the other before mask
            tokens are inserted; `"none"`.
        decoder_context (`str`): what the `"query"` fusion attends to: the `"other"` sensor's tokens, or `"all"`.
        decoder_hidden_size (`int`): width of each of the two decoders; a multiple of 4 and of its attention heads.
        decoder_num_hidden_layers (`int`): self-attention layers of each decoder, after the fusion.
        decoder_num_attention_heads (`int`): attention heads of each decoder layer.
        decoder_intermediate_size (`int`): width of the decoders' MLPs.
        mask_ratio (`float` or `dict`): share of the patches hidden in pretraining, in [0, 1], one number or
            `{"optical": ..., "sar": ...}`.
        mask_strategy (`str`): `"independent"` draws each sensor's mask for itself, `"consistent"` hides the same
            places in both (nested where the ratios differ), `"complementary"` shows each place in one sensor at most.
        modality_dropout (`float` or `dict`): in pretraining, share of each training batch of which the encoder does
            not see a sensor at all, which it must reconstruct from the other: one number that holds for each sensor,
            or `{"optical": ..., "sar": ...}`. The first samples of a batch lose optical, the last ones SAR; shares are
            rounded down to whole samples of each process' micro-batch. Batches must come shuffled.
        norm_pix_loss (`bool`): whether targets are normalised by the mean and variance of their patch. Features are
            better for it, but reconstructions know no brightness: False for those.
        predict_residual (`bool`): whether the decoders predict what an interpolation of the visible pixels leaves,
            instead of the pixels themselves. Needs `norm_pix_loss=False`.
        optical_loss_weight (`float`): weight of the optical reconstruction loss.
        sar_loss_weight (`float`): weight of the SAR reconstruction loss.
        contrastive_loss_weight (`float`): weight of the contrastive loss between the visible patches of each sensor,
            encoded alone. 0 is the paper's objective, without the projections that this loss needs.
        contrastive_projection_size (`int`): width of the projections that the contrastive loss compares.
        contrastive_temperature (`float`): temperature of the contrastive loss at the start, in [0.01, 1]; it is
            learned.
        feature_layers (`list[int]`): depths whose pooled tokens make the features of a scene side by side, 0 (after
            the early fusion) to `num_hidden_layers`, increasing: what probes, `extract_features` and classifiers read.
            None: the last, `pooler_output`.
        classifier_norm (`bool`): whether a layer norm stands between the pooled features and the classifier.
        segmentation_indices (`list[int]`): stages that the dense head joins, 0 (the input of the joint layers) to
            `num_hidden_layers`, increasing. None: four, evenly spaced up to the last.
        segmentation_hidden_size (`int`): width of the dense head where it joins the tokens; half of it at half and a
            quarter at full resolution.
        segmentation_detail_size (`int`): channels of the dense head's detail path at full resolution; twice as many at
            half and four times at quarter resolution.
        semantic_loss_ignore_index (`int`): value of a label map where there is no label.
        drop_path_rate (`float`): stochastic depth in training, in [0, 1): with what probability a sample skips each
            branch of the last joint layer. It grows linearly from 0 at the early fusion.
        class_weights (`list[float]`): how much each class counts in the classification loss of a head; with several
            labels a sample, how much its positives count (`pos_weight`). None: all alike.
        focal_gamma (`float`): exponent of the focal loss of the classification heads, 0 for the plain cross-entropy.
        out_features, out_indices: stages whose feature maps the backbone gives.

    Raises:
        ValueError: a keyword is unknown, or fields contradict each other.

    Source: Chan-To-Hing and Veeravalli, "Fus-MAE: A cross-attention-based data fusion approach for Masked
    Autoencoders in remote sensing", arXiv 2401.02764. This is a reconstruction: details that the paper leaves open
    are fields here.

    Example:

    ```python
    >>> from fusmae_hf import FusMAEConfig, FusMAEModel

    >>> config = FusMAEConfig.from_preset("tiny", mask_ratio={"optical": 0.75, "sar": 0.5})
    >>> model = FusMAEModel(config)
    >>> config.num_patches
    225
    ```"""

    model_type = "fusmae"
    base_model_fsdp_plan = {  # noqa: RUF012 - declared like this by every transformers configuration
        "fusion": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }

    optical_bands: list[str] | tuple[str, ...] = OPTICAL_BANDS
    sar_bands: list[str] | tuple[str, ...] = SAR_BANDS
    hidden_size: int = 768
    num_hidden_layers: int = 11
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    image_size: int | list[int] | tuple[int, int] = 120
    patch_size: int = 8
    gsd: float | int = 10.0
    early_fusion: Literal["cross_attention", "none"] = "cross_attention"
    feature_fusion: Literal["query", "latent", "none"] = "query"
    decoder_context: Literal["other", "all"] = "other"
    decoder_hidden_size: int = 256
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int = 8
    decoder_intermediate_size: int = 1024
    mask_ratio: float | int | dict[str, float | int] = 0.75
    mask_strategy: Literal["independent", "consistent", "complementary"] = "independent"
    modality_dropout: float | int | dict[str, float | int] = 0.0
    norm_pix_loss: bool = True
    predict_residual: bool = False
    optical_loss_weight: float | int = 1.0
    sar_loss_weight: float | int = 1.0
    contrastive_loss_weight: float | int = 0.0
    contrastive_projection_size: int = 128
    contrastive_temperature: float | int = 0.1
    feature_layers: list[int] | tuple[int, ...] | None = None
    classifier_norm: bool = True
    segmentation_indices: list[int] | tuple[int, ...] | None = None
    segmentation_hidden_size: int = 64
    segmentation_detail_size: int = 16
    semantic_loss_ignore_index: int = 255
    drop_path_rate: float | int = 0.0
    class_weights: list[float | int] | tuple[float | int, ...] | None = None
    focal_gamma: float | int = 0.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        self.optical_bands = list(self.optical_bands)
        self.sar_bands = list(self.sar_bands)
        kwargs.pop("stage_names", None)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        kwargs.setdefault("custom_pipelines", copy.deepcopy(CUSTOM_PIPELINES))
        super().__post_init__(**kwargs)

    @classmethod
    def _own_fields(cls) -> set[str]:
        """Fields that this class adds to those of every configuration."""
        return {name for name in cls.__annotations__ if not name.startswith("_")}

    @classmethod
    def _is_unknown(cls, key: str) -> bool:
        known = key in cls.__dataclass_fields__ or key in _TRANSFORMERS_KEYWORDS
        return not known and not key.startswith("_")

    def _refuse_unknown(self, kwargs):
        # transformers would take a misspelt field silently and train with the default.
        for key in filter(self._is_unknown, kwargs):
            own = sorted(self._own_fields())
            close = difflib.get_close_matches(key, own + sorted(_TRANSFORMERS_KEYWORDS), n=1)
            hint = f"Did you mean `{close[0]}`?" if close else f"Known fields: {own}."
            raise ValueError(f"FusMAEConfig has no field `{key}` (given {kwargs[key]!r}). {hint}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Configuration of a dictionary, such as a saved one, with fields replaced by `kwargs`.

        Keys of the dictionary that this version does not know, a newer version's perhaps, are kept with a warning.
        """
        config_dict = dict(config_dict)
        if "num_hidden_layers" in kwargs:
            for key in ("out_features", "out_indices", "segmentation_indices", "feature_layers"):  # of the old depth
                config_dict.pop(key, None)
        # As part of the dictionary, replaced fields are validated together with the others.
        config_dict.update({key: kwargs.pop(key) for key in cls._own_fields() & set(kwargs)})
        foreign = {key: config_dict.pop(key) for key in list(config_dict) if cls._is_unknown(key)}
        loaded = super().from_dict(config_dict, **kwargs)
        if foreign:
            logger.warning(f"The saved configuration has keys that FusMAEConfig does not know: {sorted(foreign)}.")
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            for key, value in foreign.items():
                setattr(config, key, value)
        return loaded

    def validate_bands(self):
        """Each sensor has bands, and no name stands twice."""
        for name in ("optical_bands", "sar_bands"):
            bands = list(getattr(self, name))
            if not bands:
                raise ValueError(f"`{name}` is empty: the model needs at least one band of each sensor.")
            if len(set(bands)) != len(bands):
                raise ValueError(f"`{name}` repeats a name: {bands}. Each band must be named once.")

    def validate_sizes(self):
        """Widths suit the heads and the two-dimensional positions; the patch size divides the image."""
        for prefix, label in (("", "encoder"), ("decoder_", "decoder")):
            width = getattr(self, f"{prefix}hidden_size")
            heads = getattr(self, f"{prefix}num_attention_heads")
            if heads < 1 or width % heads:
                raise ValueError(f"{label}: `{prefix}num_attention_heads` ({heads}) must divide its width ({width}).")
            if width < 4 or width % 4:
                raise ValueError(
                    f"{label}: `{prefix}hidden_size` must be a multiple of 4 (sine, cosine, two axes), not {width}."
                )
        for name in (
            "num_hidden_layers",
            "intermediate_size",
            "decoder_intermediate_size",
            "patch_size",
            "segmentation_hidden_size",
            "segmentation_detail_size",
            "contrastive_projection_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        if not self.gsd > 0:
            raise ValueError(f"`gsd` must be a positive distance in metres, not {self.gsd}.")
        if self.decoder_num_hidden_layers < 0:
            raise ValueError(
                f"`decoder_num_hidden_layers` must not be negative, not {self.decoder_num_hidden_layers}."
            )
        height, width = self.image_height_width
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"`image_size` {height}x{width} px is not a multiple of `patch_size` {self.patch_size} px. "
                f"Choose a patch size that divides both sides."
            )

    def validate_fine_tuning(self):
        """Stochastic depth leaves something, weights are weights."""
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), not {self.drop_path_rate}.")
        if not 0 <= self.focal_gamma < float("inf"):
            raise ValueError(f"`focal_gamma` must be zero or a positive number, not {self.focal_gamma}.")
        wrong = [weight for weight in self.class_weights or () if not 0 <= weight < float("inf")]
        if wrong:
            raise ValueError(f"`class_weights` must be finite and not negative, but hold {wrong}.")

    def validate_stages(self):
        """Stages of the dense head and of the features exist and increase."""
        for name, stages in (
            ("segmentation_indices", self.segmentation_stages),
            ("feature_layers", self.feature_stages),
        ):
            if getattr(self, name) is None:
                continue
            if not stages or stages != sorted(set(stages)) or stages[0] < 0 or stages[-1] > self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must increase from 0 at least to {self.num_hidden_layers} (the number of joint layers) "
                    f"at most, not {stages}."
                )

    def validate_contrast(self):
        """The contrastive loss has something to compare of both sensors."""
        if not 0 <= self.contrastive_loss_weight < float("inf"):
            raise ValueError(
                f"`contrastive_loss_weight` must be zero or a positive number, not {self.contrastive_loss_weight}."
            )
        if not 0.01 <= self.contrastive_temperature <= 1:
            raise ValueError(
                f"`contrastive_temperature` must lie in [0.01, 1], not {self.contrastive_temperature}: 0.1 is usual."
            )
        blind = [sensor for sensor, ratio in self.mask_ratios.items() if ratio == 1]
        if self.contrastive_loss_weight and blind:
            raise ValueError(
                f"`contrastive_loss_weight` is {self.contrastive_loss_weight}, but `mask_ratio` hides every "
                f"{blind[0]} patch: the loss compares visible patches of both sensors. Lower the ratio, or set the "
                "weight to 0."
            )

    def validate_masking(self):
        """Ratios lie in [0, 1], leave something visible, and suit the strategy."""
        ratios = self.mask_ratios
        for sensor, ratio in ratios.items():
            if not 0 <= ratio <= 1:
                raise ValueError(f"`mask_ratio` of {sensor} must lie in [0, 1], not {ratio}.")
        if ratios["optical"] == 1 and ratios["sar"] == 1:
            raise ValueError(
                "`mask_ratio` hides every patch of both sensors; leave at least one sensor partly visible."
            )
        share = sum(1 - ratio for ratio in ratios.values())
        if self.mask_strategy == "complementary" and share > 1 + 1e-9:
            raise ValueError(
                f"`mask_strategy='complementary'` shows each place in one sensor at most, but the mask "
                f"ratios {ratios} show {share:.2f} of the places in all (at most 1). Raise the ratios or change "
                f"the strategy."
            )
        dropouts = self.modality_dropouts
        if min(dropouts.values()) < 0 or sum(dropouts.values()) > 1:
            raise ValueError(
                f"`modality_dropout` must not be negative, nor exceed 1 for both sensors together, but is {dropouts}."
            )
        for hidden, shown in (("optical", "sar"), ("sar", "optical")):
            if dropouts[hidden] > 0 and ratios[shown] == 1:
                raise ValueError(
                    f"`modality_dropout` hides {hidden} of some samples, of which `mask_ratio` hides all {shown} "
                    "patches: nothing would be visible. Lower either."
                )
        if self.predict_residual and self.norm_pix_loss:
            raise ValueError(
                "`predict_residual` adds an interpolation of pixels, but `norm_pix_loss` removes the level of each "
                "patch. Set `norm_pix_loss=False` with it."
            )
        for name in ("optical_loss_weight", "sar_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, not {getattr(self, name)}.")

    @property
    def segmentation_stages(self) -> list[int]:
        """Stages that the dense head joins: `segmentation_indices`, or four evenly spaced ones."""
        if self.segmentation_indices is not None:
            return list(self.segmentation_indices)
        depth = self.num_hidden_layers
        return sorted({max(1, (depth * quarter + 2) // 4) for quarter in range(1, 5)})

    @property
    def feature_stages(self) -> list[int]:
        """Depths that features are read at: `feature_layers`, or the last."""
        return [self.num_hidden_layers] if self.feature_layers is None else list(self.feature_layers)

    @property
    def feature_size(self) -> int:
        """Numbers in the features of a scene."""
        return len(self.feature_stages) * self.hidden_size

    @property
    def mask_ratios(self) -> dict[str, float]:
        """Mask ratio by sensor, `{"optical": ..., "sar": ...}`."""
        return self._by_sensor("mask_ratio")

    @property
    def modality_dropouts(self) -> dict[str, float]:
        """Share of samples that lose a sensor in pretraining, `{"optical": ..., "sar": ...}`."""
        return self._by_sensor("modality_dropout")

    def _by_sensor(self, name: str) -> dict[str, float]:
        value = getattr(self, name)
        if isinstance(value, dict):
            if set(value) != {"optical", "sar"}:
                raise ValueError(f"`{name}` by sensor needs the keys 'optical' and 'sar' alone, not {sorted(value)}.")
            return {sensor: float(value[sensor]) for sensor in ("optical", "sar")}
        return {"optical": float(value), "sar": float(value)}

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        if len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be one number or (height, width), not {self.image_size}.")
        return int(self.image_size[0]), int(self.image_size[1])

    @property
    def num_patches(self) -> int:
        """Patches of each sensor at `image_size`."""
        height, width = self.image_height_width
        return (height // self.patch_size) * (width // self.patch_size)

    @classmethod
    def from_preset(cls, name: str, objective: str | None = None, **kwargs) -> "FusMAEConfig":
        """Configuration of a named size, and of a named objective of pretraining.

        Args:
            name: `"nano"` (96 wide, 3 layers, patches of 16 px: for a CPU and few labels), `"tiny"` (192 wide),
                `"small"` (384), `"base"` (768) or `"large"` (1024).
            objective: `"fusmae"` (the paper's: masked reconstruction), `"fusmae_contrastive"` (ours: with a
                contrastive loss between the sensors), or None for the default.
            kwargs: fields that differ from the preset.

        Raises:
            ValueError: there is no such preset or objective.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; known: {list(PRESETS)}.")
        if objective is not None and objective not in OBJECTIVES:
            raise ValueError(f"Unknown objective {objective!r}; known: {list(OBJECTIVES)}.")
        return cls(**{**PRESETS[name], **OBJECTIVES.get(objective or "", {}), **kwargs})


FusMAEConfig.register_for_auto_class()

__all__ = ["OBJECTIVES", "PRESETS", "FusMAEConfig"]
