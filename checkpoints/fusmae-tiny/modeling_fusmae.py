"""Fus-MAE: a masked autoencoder that fuses SAR and optical patches with cross-attention.

From top to bottom: outputs, embeddings, attention, layers, encoder, decoder, masking and loss, heads.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .bands_fusmae import BandSelectionMixin
from .configuration_fusmae import FusMAEConfig
from .contrast_fusmae import FusMAEContrast
from .dense_head_fusmae import FusMAESegmentationDecoder
from .keywords_fusmae import known_keywords
from .labels_fusmae import check_labels, count_labels, dense_loss, scene_loss
from .patches_fusmae import (
    fuse_map,
    interpolate_visible,
    join_streams,
    masked_patches,
    patchify,
    position_embeddings,
    reconstruction_error,
    take_tokens,
    unpatchify,
    valid_pixels,
    visible_pixels,
)

logger = logging.get_logger(__name__)

SENSORS = {"optical": "", "sar": "_sar"}
"""How the names of the inputs and outputs of each sensor end."""

OTHER = {"optical": "sar", "sar": "optical"}


@dataclass
class FusMAEModelOutput(ModelOutput):
    r"""
    Features of a batch of pairs. `optical` and `sar` are the numbers of patches of each sensor that were encoded.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, 1 + optical + sar, hidden_size)`):
            Class token, optical tokens, SAR tokens after the last layer norm. A sensor that is None has no tokens.
        sar_hidden_state (`torch.FloatTensor` of shape `(batch_size, sar, hidden_size)`):
            The SAR tokens, or None. Tokens of a sample without SAR, or without data in their patch, are zero.
        optical_hidden_state (`torch.FloatTensor` of shape `(batch_size, optical, hidden_size)`):
            The optical tokens, or None. Tokens of a sample without optical data are zero.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
            Mean over the patch tokens of both sensors that are present.
        feature_hidden_state (`torch.FloatTensor` of shape `(batch_size, 1 + optical + sar, feature_size)`):
            With `config.feature_layers`: the tokens of those depths after the last layer norm, side by side; zero like
            those of `last_hidden_state`. Otherwise None, and `last_hidden_state` takes its place.
        feature_output (`torch.FloatTensor` of shape `(batch_size, feature_size)`):
            Their mean over the patch tokens that are present, the features of the scene. Otherwise None, and
            `pooler_output` takes its place.
        hidden_states (`tuple(torch.FloatTensor)`):
            Input of the first joint layer and output of each, `(batch_size, 1 + optical + sar, hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`):
            Of each joint layer, `(batch_size, num_attention_heads, 1 + optical + sar, 1 + optical + sar)`.
        cross_attentions (`tuple(torch.FloatTensor)`):
            Of the early fusion: optical queries on SAR keys `(batch_size, num_attention_heads, optical, sar)`, then
            SAR queries on optical keys. Empty where there is no fusion or one sensor alone.
    """

    last_hidden_state: torch.Tensor | None = None
    sar_hidden_state: torch.Tensor | None = None
    optical_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    feature_hidden_state: torch.Tensor | None = None
    feature_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FusMAEForPreTrainingOutput(ModelOutput):
    r"""
    Reconstruction of a batch of pairs. `N` is the number of patches of the whole grid. A sensor that is None has none
    of its outputs.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Weighted sum of `optical_loss`, `sar_loss` and `contrastive_loss`. None with `return_loss=False`.
        contrastive_loss (`torch.FloatTensor` of shape `()`):
            With `config.contrastive_loss_weight`: cross-entropy of telling which optical and which SAR patches are of
            one pair; 0 where fewer than two pairs are complete. Otherwise None.
        optical_loss, sar_loss (`torch.FloatTensor` of shape `()`):
            Mean squared error on the masked, valid pixels of each sensor, in squared normalised units.
        logits, logits_sar (`torch.FloatTensor` of shape `(batch_size, N, bands * patch_size ** 2)`):
            Predicted pixels, by patch; the order within a patch is (band, row, column). `unpatchify` makes an image
            of them. Normalised by patch where `config.norm_pix_loss`.
        mask, mask_sar (`torch.LongTensor` of shape `(batch_size, N)`):
            1 where a patch was hidden from the encoder, 0 where it was seen.
        hidden_states, attentions, cross_attentions:
            As in [`FusMAEModelOutput`], over the visible patches.
        decoder_cross_attentions (`tuple(torch.FloatTensor)`):
            Of the decoders' fusion, optical queries first, `(batch_size, decoder_num_attention_heads, queries, keys)`.
    """

    loss: torch.Tensor | None = None
    optical_loss: torch.Tensor | None = None
    sar_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    logits_sar: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    mask_sar: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    decoder_cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FusMAEReconstruction(ModelOutput):
    r"""
    Images of both sensors, reconstructed where they were not visible, in the normalised units of the inputs.

    Args:
        pixel_values, pixel_values_sar (`torch.FloatTensor` of shape `(batch_size, bands, height, width)`):
            Pixels as they were given where they were visible, predicted elsewhere.
        reconstructed, reconstructed_sar (`torch.BoolTensor` of shape `(batch_size, height, width)`):
            True where the pixels of each sensor are predicted.
        assumed_levels (`bool`):
            True where mean and standard deviation of the predicted patches are assumed, not predicted
            (`config.norm_pix_loss`).
    """

    pixel_values: torch.Tensor | None = None
    pixel_values_sar: torch.Tensor | None = None
    reconstructed: torch.Tensor | None = None
    reconstructed_sar: torch.Tensor | None = None
    assumed_levels: bool | None = None


@dataclass
class FusMAEEmbeddingOutput(ModelOutput):
    r"""
    What a pair shows, on the unit sphere that both sensors share (`contrastive_loss_weight`). All are float32 of unit
    length, and zero for a sample without that sensor.

    Args:
        embeds (`torch.FloatTensor` of shape `(batch_size, contrastive_projection_size)`):
            Mean of those of the sensors that are there.
        optical_embeds, sar_embeds (`torch.FloatTensor` of shape `(batch_size, contrastive_projection_size)`):
            Of each sensor alone, or None where it was not given.
    """

    embeds: torch.Tensor | None = None
    optical_embeds: torch.Tensor | None = None
    sar_embeds: torch.Tensor | None = None


@dataclass
class FusMAEHeadOutput(ModelOutput):
    r"""
    Classification, regression or dense prediction of a batch of pairs.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Where labels were given.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Scores before softmax or sigmoid; the predicted values in regression. Of the dense head
            `(batch_size, num_labels, height, width)`, one for each pixel of the inputs.
            `FusMAEImageProcessor.post_process_semantic_segmentation` gives label maps at any size.
        hidden_states, attentions, cross_attentions:
            As in [`FusMAEModelOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FusMAEBackboneOutput(BackboneOutput):
    r"""
    Feature maps of a batch of pairs.

    Args:
        feature_maps (`tuple(torch.FloatTensor)` of shape `(batch_size, hidden_size, rows, columns)`):
            One map for each stage of `config.out_features`.
        hidden_states, attentions, cross_attentions:
            As in [`FusMAEModelOutput`].
    """

    cross_attentions: tuple[torch.Tensor, ...] | None = None


def given_images(pixel_values: torch.Tensor | None, pixel_values_sar: torch.Tensor | None) -> torch.Tensor:
    """The optical images, or the SAR images where there are no optical ones. Raises a ValueError without either."""
    if pixel_values is not None:
        return pixel_values
    if pixel_values_sar is not None:
        return pixel_values_sar
    raise ValueError("Neither sensor was given: pass `pixel_values` (optical), `pixel_values_sar` (SAR) or both.")


class FusMAEEmbeddings(nn.Module):
    """Patches of each sensor projected with weights of their own, with positions; and the class token."""

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        self.patch_size = config.patch_size
        pixels = config.patch_size**2
        self.optical_projection = nn.Linear(len(config.optical_bands) * pixels, config.hidden_size)
        self.sar_projection = nn.Linear(len(config.sar_bands) * pixels, config.hidden_size)
        # A table of one row, since transformers takes input embeddings to be a table.
        self.class_token = nn.Embedding(1, config.hidden_size)

    def forward(
        self,
        images: torch.Tensor,
        sensor: str,
        ids_keep: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Embed one sensor.

        Args:
            images: `(batch_size, bands, height, width)`.
            sensor: `"optical"` or `"sar"`.
            ids_keep: `(batch_size, kept)`, patches to embed; the others are never projected. None: all.
            present: `(batch_size, kept)` bool. Pixels of absent tokens, which may be NaN, are replaced by zero.
            scale: of the positions.

        Returns:
            `(batch_size, kept, hidden_size)`.
        """
        projection = self.optical_projection if sensor == "optical" else self.sar_projection
        rows, columns = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        patches = take_tokens(patchify(images, self.patch_size), ids_keep).flatten(2).to(projection.weight.dtype)
        if present is not None:
            patches = torch.where(present[..., None], patches, 0.0)
        tokens = projection(patches)
        # In the dtype of the weights: under autocast the residual stream that starts here stays in float32.
        dim, device, dtype = tokens.shape[-1], tokens.device, projection.weight.dtype
        positions = position_embeddings(rows, columns, dim, device, dtype, scale)
        return tokens + (positions if ids_keep is None else positions[ids_keep])


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out. Returns the result `(batch, queries, heads, head_dim)` and the weights."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    single = torch.promote_types(weights.dtype, torch.float32)
    weights = nn.functional.softmax(weights, dim=-1, dtype=single).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def cast_once(values: torch.Tensor) -> torch.Tensor:
    """What several projections read, in the dtype of autocast: each of them would cast it anew."""
    device = values.device.type
    if values.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return values.to(torch.get_autocast_dtype(device))
    return values


class FusMAEAttention(nn.Module):
    """Multi-head attention of tokens on a context, which may be of another width."""

    def __init__(self, config: FusMAEConfig, hidden_size: int, num_heads: int, context_size: int | None = None):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(context_size or hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(context_size or hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def attend(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None,
        implementation: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention through the configured implementation, unless another is named."""
        own, hidden_states = hidden_states is context, cast_once(hidden_states)
        context = hidden_states if own else cast_once(context)
        shape = (hidden_states.shape[0], -1, self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(context).view(shape).transpose(1, 2)
        value = self.v_proj(context).view(shape).transpose(1, 2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation or self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights


# Neither is a subclass of the other: outputs are recorded by isinstance, and maps would be recorded twice.
class FusMAESelfAttention(FusMAEAttention):
    """Multi-head self-attention."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.attend(hidden_states, hidden_states, attention_mask, **kwargs)


class FusMAECrossAttention(FusMAEAttention):
    """Multi-head attention of the tokens of one sensor on those of the other."""

    def forward(self, hidden_states, context, context_present=None, **kwargs):
        """Attend to the tokens of `context` that are present; a sample with none gets zero, whatever the back end.

        Args:
            hidden_states: `(batch_size, queries, hidden_size)`.
            context: `(batch_size, keys, context_size)`.
            context_present: `(batch_size, keys)` bool, or None where all are.
        """
        implementation = None
        if context_present is not None and is_flash_attention_requested(self.config):
            # Flash attention leaves out queries by the mask of the keys, which are tokens of another sensor here.
            implementation = "sdpa"
            mask = context_present[:, None, None].expand(-1, -1, hidden_states.shape[1], -1)
        else:
            mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=context_present,
                encoder_hidden_states=context,
            )
        output, weights = self.attend(hidden_states, context, mask, implementation, **kwargs)
        if context_present is not None:
            output = torch.where(context_present.any(dim=-1)[:, None, None], output, 0.0)
        return output, weights


class FusMAEMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: FusMAEConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class FusMAEDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016, arXiv 1603.09382): in training, random samples skip a residual branch."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states):
        if not self.training or self.rate == 0:
            return hidden_states
        kept = torch.rand((hidden_states.shape[0], 1, 1), device=hidden_states.device) >= self.rate
        return torch.where(kept, hidden_states / (1 - self.rate), 0.0)

    def extra_repr(self):
        return f"rate={self.rate:g}"


class FusMAELayer(GradientCheckpointingLayer):
    """Self-attention and MLP, each on the normalised input and with a residual."""

    def __init__(
        self,
        config: FusMAEConfig,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = FusMAESelfAttention(config, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = FusMAEMLP(config, hidden_size, intermediate_size)
        self.drop_path = FusMAEDropPath(drop_path_rate)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))


class FusMAEFusionLayer(GradientCheckpointingLayer):
    """Early fusion: the tokens of each sensor attend to those of the other, then an MLP; weights are not shared."""

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        size, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.optical_layernorm_before = nn.LayerNorm(size, eps=eps)
        self.optical_attention = FusMAECrossAttention(config, size, heads, context_size=size)
        self.optical_layernorm_after = nn.LayerNorm(size, eps=eps)
        self.optical_mlp = FusMAEMLP(config, size, config.intermediate_size)
        self.sar_layernorm_before = nn.LayerNorm(size, eps=eps)
        self.sar_attention = FusMAECrossAttention(config, size, heads, context_size=size)
        self.sar_layernorm_after = nn.LayerNorm(size, eps=eps)
        self.sar_mlp = FusMAEMLP(config, size, config.intermediate_size)

    def forward(self, optical, sar, optical_present=None, sar_present=None, **kwargs):
        """Fuse `(batch_size, optical, hidden_size)` with `(batch_size, sar, hidden_size)`; either may be None."""
        if optical is not None and sar is not None:
            normed_optical, normed_sar = self.optical_layernorm_before(optical), self.sar_layernorm_before(sar)
            from_sar, _ = self.optical_attention(normed_optical, normed_sar, sar_present, **kwargs)
            from_optical, _ = self.sar_attention(normed_sar, normed_optical, optical_present, **kwargs)
            optical, sar = optical + from_sar, sar + from_optical
        if optical is not None:
            optical = optical + self.optical_mlp(self.optical_layernorm_after(optical))
        if sar is not None:
            sar = sar + self.sar_mlp(self.sar_layernorm_after(sar))
        return optical, sar


class FusMAEPreTrainedModel(BandSelectionMixin, PreTrainedModel):
    """What all Fus-MAE models share: configuration, initialisation, loading, checks of the inputs."""

    config: FusMAEConfig
    config_class = FusMAEConfig
    base_model_prefix = "fusmae"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusMAEEmbeddings", "FusMAEFusionLayer", "FusMAELayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": FusMAELayer,
        "attentions": FusMAESelfAttention,
        "cross_attentions": FusMAECrossAttention,
    }
    # The learned token is the only input embedding: patches have no table, their projections are linear.
    _input_embed_layer = "class_token"
    # The Trainer divides the loss by the accumulated batches itself.
    accepts_loss_kwargs = False
    # A pretraining checkpoint serves every head; its decoders and projections are not worth a report there.
    _keys_to_ignore_on_load_unexpected = [r"^optical_decoder\.", r"^sar_decoder\.", r"^contrast\."]  # noqa: RUF012

    def init_parallel_plans(self) -> None:
        """Collect the sharding plans, without blocks that this configuration leaves out."""
        super().init_parallel_plans()
        blocks = {re.sub(r"\.\d+", ".*", name) for name, _ in self.named_modules()}
        self._fsdp_plan = {name: style for name, style in (self._fsdp_plan or {}).items() if name in blocks}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, FusMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, FusMAEContrast):
            module.init_scale(self.config)

    def enable_input_require_grads(self):
        """Let gradients reach adapters under reentrant checkpointing, those of the early fusion too: its inputs are
        projections of patches, which upstream does not take for embeddings."""
        super().enable_input_require_grads()
        embeddings = cast(nn.Module, self.base_model.embeddings)
        self._require_grads_hooks.append(embeddings.register_forward_hook(lambda *call: call[-1].requires_grad_(True)))

    def _receive(self, pixel_values: torch.Tensor | None, keywords: Any) -> Any:
        """The further keywords of a call of `forward`, of which unknown ones raise a TypeError. The Trainer asks for
        the main input after the call (`include_for_metrics`): it is that of SAR where there is no optical one."""
        if not is_tracing():
            self.main_input_name = "pixel_values_sar" if pixel_values is None else "pixel_values"
        return known_keywords(self, keywords)

    def _present_patches(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Which patches of each sensor hold data: `(batch_size, patches)` bool, or None where all do.

        Raises a ValueError unless there are images of the shape that the configuration tells, some in each sample.
        That each sample has a sensor is checked where the availability lies on the CPU and no graph is traced: a look
        at values would stall a GPU. Elsewhere a sample without any sensor has only its class token.
        """
        first = given_images(pixel_values, pixel_values_sar)
        batch_size, place = first.shape[0], tuple(first.shape[2:])
        size, given = self.config.patch_size, []
        presence: dict[str, torch.Tensor | None] = {}
        for sensor, images, valid, available in (
            ("optical", pixel_values, pixel_mask, optical_available),
            ("sar", pixel_values_sar, pixel_mask_sar, sar_available),
        ):
            presence[sensor] = None
            if images is None:
                if available is not None or valid is not None:
                    raise ValueError(
                        f"`{sensor}_available` or the pixel mask of the {sensor} sensor was given without pixel "
                        "values. Leave them out, or pass pixel values (any numbers) for the samples without it."
                    )
                continue
            name, bands = f"pixel_values{SENSORS[sensor]}", getattr(self.config, f"{sensor}_bands")
            if images.ndim != 4 or images.shape[1] != len(bands):
                raise ValueError(
                    f"`{name}` must have shape (batch_size, {len(bands)}, height, width), one channel for each of the "
                    f"bands {list(bands)}, but has {tuple(images.shape)}. FusMAEImageProcessor picks and orders bands."
                )
            if 0 in images.shape:
                raise ValueError(f"`{name}` of shape {tuple(images.shape)} holds no image: leave an empty batch out.")
            if images.shape[2] % size or images.shape[3] % size:
                raise ValueError(
                    f"`{name}` is {images.shape[2]}x{images.shape[3]} px, which the patch size of {size} px does not "
                    "divide. Crop it, or pad or resize it: FusMAEImageProcessor.from_pretrained(<your checkpoint>, "
                    f"do_pad=True, size_divisor={size})."
                )
            if images.shape[0] != batch_size or tuple(images.shape[2:]) != place:
                raise ValueError(
                    "Both sensors must show the same places on the same grid, but `pixel_values` has batch and size "
                    f"{(batch_size, *place)} and `pixel_values_sar` {(images.shape[0], *images.shape[2:])}."
                )
            for mask, what, shape, meaning in (
                (available, f"`{sensor}_available`", (batch_size,), "one value a sample"),
                (valid, f"The pixel mask of the {sensor} sensor", (batch_size, *place), "True where there is data"),
            ):
                if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
                    raise ValueError(
                        f"{what} must be bool of shape {shape}, {meaning}, but is {mask.dtype} of shape "
                        f"{tuple(mask.shape)}."
                    )
            given.append(available)
            if available is None and valid is None:
                continue
            present = images.new_ones((batch_size, (place[0] // size) * (place[1] // size)), dtype=torch.bool)
            if available is not None:
                present = present & available.to(images.device)[:, None]
            if valid is not None:
                present = present & patchify(valid[:, None].to(images.device), size).any(dim=-1).squeeze(-1)
            presence[sensor] = present
        known = [each for each in given if each is not None and each.device.type == "cpu" and not is_tracing(each)]
        if len(known) == len(given):
            nothing = ~torch.stack(known).any(dim=0)
            if nothing.any():
                raise ValueError(
                    f"Sample {nothing.nonzero().flatten().tolist()} of the batch has no sensor: `optical_available` "
                    "and `sar_available` are False, or the pixel values of the other sensor are None. Leave such "
                    "samples out."
                )
        return presence

    def _position_scale(self, gsd: float | None) -> float:
        """Distance between patches in patches of the training images."""
        if gsd is None:
            return 1.0
        if not gsd > 0:
            raise ValueError(f"`gsd` must be a positive distance in metres, one for the whole batch, not {gsd}.")
        return gsd / self.config.gsd


class FusMAEModel(FusMAEPreTrainedModel):
    r"""
    The Fus-MAE encoder: features of a SAR patch, an optical patch, or a pair of them. It never masks.

    Each sensor's patches are projected with weights of their own, attend to those of the other sensor in the early
    fusion layer, and go through the joint self-attention layers as [class, optical, SAR].

    Example:

    ```python
    >>> import torch
    >>> from fusmae_hf import FusMAEConfig, FusMAEModel

    >>> model = FusMAEModel(FusMAEConfig.from_preset("tiny")).eval()
    >>> with torch.no_grad():
    ...     features = model(pixel_values=torch.randn(2, 12, 120, 120), pixel_values_sar=torch.randn(2, 2, 120, 120))
    >>> features.pooler_output.shape, features.sar_hidden_state.shape
    (torch.Size([2, 192]), torch.Size([2, 225, 192]))
    ```"""

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.embeddings = FusMAEEmbeddings(config)
        self.fusion = FusMAEFusionLayer(config) if config.early_fusion == "cross_attention" else None
        self.layers = nn.ModuleList(
            FusMAELayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                drop_path_rate=config.drop_path_rate * number / config.num_hidden_layers,
            )
            for number in range(1, config.num_hidden_layers + 1)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def feature_maps(
        self,
        stages: list[int],
        hidden_states: tuple[torch.Tensor, ...],
        pixel_values: torch.Tensor | None,
        pixel_values_sar: torch.Tensor | None,
        *masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Maps `(batch_size, hidden_size, rows, columns)` of some stages, from the `hidden_states` of [`forward`].

        `masks` are its inputs up to `sar_available`. After the last layer norm, the mean over the sensors that are
        present at a place; zero where none is.
        """
        presence = self._present_patches(pixel_values, pixel_values_sar, *masks)
        given = {"optical": pixel_values, "sar": pixel_values_sar}
        present = [presence[sensor] for sensor, images in given.items() if images is not None]
        height, width = given_images(pixel_values, pixel_values_sar).shape[2:]
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        return tuple(
            fuse_map(self.layernorm(hidden_states[stage]), grid, present).permute(0, 3, 1, 2).contiguous()
            for stage in stages
        )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        ids_keep: torch.Tensor | None = None,
        ids_keep_sar: torch.Tensor | None = None,
        gsd: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusMAEModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, optical_bands, height, width)`):
                Optical patches as [`FusMAEImageProcessor`] normalises them, or None where no sample has any.
            pixel_values_sar (`torch.FloatTensor` of shape `(batch_size, sar_bands, height, width)`):
                SAR patches, normalised likewise, or None.
            pixel_mask (`torch.BoolTensor` of shape `(batch_size, height, width)`):
                True where the optical patch holds data. A patch token without any is treated as absent.
            pixel_mask_sar (`torch.BoolTensor` of shape `(batch_size, height, width)`):
                The same for SAR.
            optical_available (`torch.BoolTensor` of shape `(batch_size,)`):
                Which samples have optical data, in a batch that mixes complete and incomplete pairs. Each sample gets
                the features that it has alone.
            sar_available (`torch.BoolTensor` of shape `(batch_size,)`):
                Which samples have SAR data.
            ids_keep (`torch.LongTensor` of shape `(batch_size, kept)`):
                Optical patches to encode, by their number in the grid; all where None.
            ids_keep_sar (`torch.LongTensor` of shape `(batch_size, kept)`):
                SAR patches to encode.
            gsd (`float`):
                Ground sampling distance of the images in metres, where it is not `config.gsd`. Positions are scaled by
                their ratio, so that distances on the ground stay what they were in training (as in Scale-MAE, arXiv
                2212.14532). That is extrapolation: the model has seen one distance only, and objects look different
                at another. Resampling to `config.gsd` is the safe way.

        Raises:
            ValueError: no sensor or no image is given, or shapes disagree with the configuration or each other.
            TypeError: a keyword is unknown.
        """
        kwargs = self._receive(pixel_values, kwargs)
        presence = self._present_patches(
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available
        )
        scale = self._position_scale(gsd)
        tokens: dict[str, torch.Tensor | None] = {}
        for sensor, images, ids in (("optical", pixel_values, ids_keep), ("sar", pixel_values_sar, ids_keep_sar)):
            tokens[sensor] = None
            if images is None or (ids is not None and ids.shape[1] == 0):
                continue
            present = presence[sensor]
            presence[sensor] = present = None if present is None else take_tokens(present, ids)
            tokens[sensor] = self.embeddings(images, sensor, ids, present, scale)
        optical, sar = tokens["optical"], tokens["sar"]
        if optical is None and sar is None:
            raise ValueError(
                "Nothing is visible: the only sensor given is hidden entirely, as by the mask ratios "
                f"{self.config.mask_ratios}."
            )
        if self.fusion is not None:
            optical, sar = self.fusion(optical, sar, presence["optical"], presence["sar"], **kwargs)

        patches, present = join_streams([(optical, presence["optical"]), (sar, presence["sar"])])
        class_index = torch.zeros((patches.shape[0], 1), dtype=torch.long, device=patches.device)
        hidden_states = torch.cat([self.embeddings.class_token(class_index), patches], dim=1)
        attention_mask = None
        if present is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=torch.cat([present.new_ones((present.shape[0], 1)), present], dim=1),
            )
        depths = self.config.feature_layers or ()
        read = [hidden_states] if 0 in depths else []
        for depth, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
            if depth in depths:
                read.append(hidden_states)
        hidden_states, pooled = self._finish(hidden_states, present)
        features = [self._finish(state, present) for state in read]
        patches, num_optical = hidden_states[:, 1:], 0 if optical is None else optical.shape[1]
        return FusMAEModelOutput(
            last_hidden_state=hidden_states,
            sar_hidden_state=None if sar is None else patches[:, num_optical:],
            optical_hidden_state=None if optical is None else patches[:, :num_optical],
            pooler_output=pooled,
            feature_hidden_state=torch.cat([tokens for tokens, _ in features], dim=-1) if features else None,
            feature_output=torch.cat([mean for _, mean in features], dim=-1) if features else None,
        )

    def _finish(self, hidden_states: torch.Tensor, present: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after the last layer norm, zero where absent, and the mean of the patch tokens that are present."""
        hidden_states = self.layernorm(hidden_states)
        patches = hidden_states[:, 1:]
        if present is None:
            return hidden_states, patches.mean(dim=1)
        patches = torch.where(present[..., None], patches, 0.0)
        hidden_states = torch.cat([hidden_states[:, :1], patches], dim=1)
        return hidden_states, patches.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)


class FusMAEDecoder(nn.Module):
    """Reconstructs the pixels of one sensor from what the encoder saw of it and of the other sensor."""

    def __init__(self, config: FusMAEConfig, num_bands: int):
        super().__init__()
        size, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
        self.feature_fusion = config.feature_fusion
        self.decoder_context = config.decoder_context
        self.embed = nn.Linear(config.hidden_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        if config.feature_fusion != "none":
            self.fusion_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
            self.fusion_attention = FusMAECrossAttention(config, size, heads, config.hidden_size)
        self.layers = nn.ModuleList(
            FusMAELayer(config, size, heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.predict = nn.Linear(size, num_bands * config.patch_size**2)

    def forward(
        self,
        grid: tuple[int, int],
        own: torch.Tensor | None,
        other: torch.Tensor | None,
        ids_keep: torch.Tensor | None = None,
        own_present: torch.Tensor | None = None,
        other_present: torch.Tensor | None = None,
        scale: float = 1.0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict every patch of the grid.

        Args:
            grid: (rows, columns) of patches.
            own: `(batch_size, kept, hidden_size)`, the encoder's tokens of this sensor, or None.
            other: the encoder's tokens of the other sensor, or None.
            ids_keep: `(batch_size, kept)`, where the own tokens belong in the grid; None: they are the whole grid.
            own_present, other_present: `(batch_size, kept)` bool, which tokens hold data; None: all.
            scale: of the positions.

        Returns:
            Pixels by patch `(batch_size, rows * columns, bands * patch_size ** 2)` and the weights of the fusion's
            attention, which only eager attention gives.
        """
        weights = None
        tokens = None if own is None else self.embed(own)
        if tokens is not None and other is not None and self.feature_fusion == "latent":
            fused, weights = self.fusion_attention(self.fusion_layernorm(tokens), other, other_present, **kwargs)
            tokens = tokens + fused
        hidden_states = self._fill_grid(grid, tokens, other, ids_keep, own_present, scale)
        if self.feature_fusion == "query":
            streams = [(other, other_present)]
            if self.decoder_context == "all":
                streams.append((own, own_present))
            if any(tokens is not None for tokens, _ in streams):
                context, present = join_streams(streams)
                fused, weights = self.fusion_attention(
                    self.fusion_layernorm(hidden_states), context, present, **kwargs
                )
                hidden_states = hidden_states + fused
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)
        return self.predict(self.layernorm(hidden_states)), weights

    def _fill_grid(self, grid, tokens, other, ids_keep, present, scale):
        """The whole grid at decoder width: encoded tokens in their places, mask tokens elsewhere, positions added."""
        rows, columns = grid
        if tokens is None:
            hidden_states = self.mask_token.expand(other.shape[0], rows * columns, -1)
        else:
            # In the dtype of the weights, as in the encoder.
            mask_token, tokens = self.mask_token, tokens.to(self.mask_token.dtype)
            hidden_states = tokens if present is None else torch.where(present[..., None], tokens, mask_token)
            if ids_keep is not None:
                whole = mask_token.expand(tokens.shape[0], rows * columns, -1)
                index = ids_keep[..., None].expand(-1, -1, tokens.shape[-1])
                hidden_states = whole.scatter(1, index, hidden_states)
        dim, device, dtype = hidden_states.shape[-1], hidden_states.device, hidden_states.dtype
        return hidden_states + position_embeddings(rows, columns, dim, device, dtype, scale)


class FusMAEForPreTraining(FusMAEPreTrainedModel):
    r"""
    Fus-MAE with its two decoders: hides most patches of both sensors and reconstructs their pixels.

    With `config.modality_dropout`, fixed slices of each training batch show the encoder one sensor alone, at about
    half the cost; the other is reconstructed whole. The encoder runs once for each slice, and hidden states and
    attentions are not returned then.

    With `config.contrastive_loss_weight`, the visible patches of each sensor are encoded once more, alone: tokens that
    have attended to the other sensor would give it away. What modality dropout shows alone is not encoded twice. The
    mean tokens of both are projected onto one sphere, where those of a pair are to be closest. In training the pairs
    of all processes are compared with each other, as many in each process.

    Example:

    ```python
    >>> import torch
    >>> from fusmae_hf import FusMAEConfig, FusMAEForPreTraining

    >>> model = FusMAEForPreTraining(FusMAEConfig.from_preset("tiny"))
    >>> outputs = model(pixel_values=torch.randn(2, 12, 120, 120), pixel_values_sar=torch.randn(2, 2, 120, 120))
    >>> outputs.loss.shape, outputs.logits_sar.shape, outputs.mask.sum(dim=1)
    (torch.Size([]), torch.Size([2, 225, 128]), tensor([169, 169]))
    ```"""

    _fsdp_plan = {  # noqa: RUF012
        "optical_decoder.layers.*": "free_full_weight",
        "sar_decoder.layers.*": "free_full_weight",
    }

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.fusmae = FusMAEModel(config)
        self.optical_decoder = FusMAEDecoder(config, len(config.optical_bands))
        self.sar_decoder = FusMAEDecoder(config, len(config.sar_bands))
        self.contrast = FusMAEContrast(config) if config.contrastive_loss_weight else None
        self.post_init()

    def _band_layers(self, sensor: str) -> list[tuple[nn.Linear, int]]:
        return [*super()._band_layers(sensor), (getattr(self, f"{sensor}_decoder").predict, 0)]

    def unpatchify(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Image `(batch_size, bands, height, width)` of `logits` or `logits_sar`, in normalised units."""
        return unpatchify(logits, self.config.patch_size, height, width)

    def draw_masks(
        self,
        batch_size: int,
        num_patches: int,
        noise: torch.Tensor | None = None,
        noise_sar: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the patches that the encoder sees, by the configuration's ratios and strategy.

        Args:
            batch_size: number of pairs.
            num_patches: patches of one sensor.
            noise: `(batch_size, num_patches)`; the optical patches with the smallest values are kept. `"consistent"`
                and `"complementary"` masks of both sensors follow it. Drawn where None.
            noise_sar: the same for SAR, for `"independent"` masks alone.
            device: where to draw.

        Returns:
            `ids_keep`, `ids_keep_sar`: `(batch_size, kept)` each. A sensor whose ratio leaves none has shape
            `(batch_size, 0)`.

        Raises:
            ValueError: noise of another shape, or no patch of either sensor would be left.
        """
        for name, values in (("noise", noise), ("noise_sar", noise_sar)):
            if values is not None and values.shape != (batch_size, num_patches):
                raise ValueError(
                    f"`{name}` must have shape {(batch_size, num_patches)}, one value a patch, but has "
                    f"{tuple(values.shape)}."
                )
        # Rounded down (but for float error), so that complementary masks never overlap.
        kept = {name: int(num_patches * (1 - ratio) + 1e-6) for name, ratio in self.config.mask_ratios.items()}
        if not any(kept.values()):
            raise ValueError(
                f"mask ratios {self.config.mask_ratios} leave no visible patch on a grid of {num_patches} patches; "
                "lower `mask_ratio` or use larger images."
            )
        if noise is None:
            noise = torch.rand(batch_size, num_patches, device=device)
        shuffled = shuffled_sar = noise.argsort(dim=1)
        if self.config.mask_strategy == "independent":
            if noise_sar is None:
                noise_sar = torch.rand(batch_size, num_patches, device=device)
            shuffled_sar = noise_sar.argsort(dim=1)
        elif self.config.mask_strategy == "complementary":
            shuffled_sar = shuffled.flip(1)
        return shuffled[:, : kept["optical"]], shuffled_sar[:, : kept["sar"]]

    def dropout_groups(self, batch_size: int) -> list[tuple[slice, bool, bool]]:
        """Split a batch by `config.modality_dropout`: fixed slices, by position alone, so that shapes never change.

        Returns:
            (rows, whether the encoder sees their optical patches, whether it sees their SAR patches): first the rows
            whose optical patches are hidden, then the whole pairs, then those whose SAR patches are hidden. Shares are
            rounded down to whole samples.
        """
        shares = self.config.modality_dropouts
        hidden = {sensor: int(batch_size * share + 1e-6) for sensor, share in shares.items()}
        for sensor, share in shares.items():
            if share > 0 and hidden[sensor] == 0 and not is_tracing():
                logger.warning_once(
                    f"`modality_dropout` of {sensor} ({share}) hides no sample of a batch of {batch_size}: shares are "
                    "rounded down to whole samples. Use larger batches."
                )
        first, last = hidden["optical"], batch_size - hidden["sar"]
        groups = [
            (slice(0, first), False, True),
            (slice(first, last), True, True),
            (slice(last, batch_size), True, False),
        ]
        return [group for group in groups if group[0].start < group[0].stop]

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        noise_sar: torch.Tensor | None = None,
        return_loss: bool = True,
        gsd: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusMAEForPreTrainingOutput:
        r"""
        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`]. Pixels without data count neither in the loss nor in the statistics of a
                patch; a sensor that is None, or absent from a sample, is no target. A sensor that
                `config.modality_dropout` hides in training is one.
            noise (`torch.FloatTensor` of shape `(batch_size, N)`):
                Decides the masks: the patches with the smallest values stay visible. Drawn where None.
            noise_sar (`torch.FloatTensor` of shape `(batch_size, N)`):
                The same for SAR with `mask_strategy="independent"`.
            return_loss (`bool`): whether to compute the losses.

        Raises:
            ValueError: no sensor or no image is given, or shapes disagree with the configuration or each other.
            TypeError: a keyword is unknown.
        """
        kwargs = self._receive(pixel_values, kwargs)
        inputs = {
            "pixel_values": pixel_values,
            "pixel_values_sar": pixel_values_sar,
            "pixel_mask": pixel_mask,
            "pixel_mask_sar": pixel_mask_sar,
            "optical_available": optical_available,
            "sar_available": sar_available,
        }
        self._present_patches(**inputs)  # refuses what does not fit
        images = given_images(pixel_values, pixel_values_sar)
        batch_size, num_patches = images.shape[0], images.shape[2] * images.shape[3] // self.config.patch_size**2
        masks = self.draw_masks(batch_size, num_patches, noise, noise_sar, images.device)
        ids_keep = dict(zip(SENSORS, masks, strict=True))
        given = [sensor for sensor, suffix in SENSORS.items() if inputs[f"pixel_values{suffix}"] is not None]
        groups = [(slice(None), True, True)]
        if self.training and len(given) == 2:
            groups = self.dropout_groups(batch_size)
        contrast = self.contrast if return_loss and len(given) == 2 else None
        pooled: dict[str, list[torch.Tensor]] = {sensor: [] for sensor in SENSORS}
        found: dict[str, list[torch.Tensor]] = {}
        for rows, *sees in groups:
            some: dict[str, Any] = {name: None if values is None else values[rows] for name, values in inputs.items()}
            visible = {
                sensor: ids_keep[sensor][rows] if seen else ids_keep[sensor][rows, :0]
                for sensor, seen in zip(SENSORS, sees, strict=True)
            }
            encoded, predicted, maps = self._encode_and_decode(given, visible, some, gsd, **kwargs)
            for sensor, seen in zip(SENSORS, sees, strict=True):
                if sensor not in given:
                    continue
                if contrast is not None:
                    alone = seen and not all(sees)  # modality dropout has shown it by itself already
                    again = encoded if alone else self._encode_alone(sensor, some, ids_keep[sensor][rows], gsd)
                    pooled[sensor].append(cast(torch.Tensor, again.pooler_output))
                suffix, mask = SENSORS[sensor], masked_patches(visible[sensor], num_patches)
                found.setdefault(f"logits{suffix}", []).append(predicted[sensor])
                found.setdefault(f"mask{suffix}", []).append(mask)
                if return_loss:
                    available, other = some[f"{sensor}_available"], some[f"{OTHER[sensor]}_available"]
                    if not seen and other is not None:  # what dropout hides can be told from the other sensor alone
                        available = other if available is None else available & other
                    pixels, valid = some[f"pixel_values{suffix}"], some[f"pixel_mask{suffix}"]
                    error = self.sensor_error(predicted[sensor], pixels, mask, valid, available)
                    found.setdefault(f"{sensor}_loss", []).append(error)
        results: dict[str, Any] = {name: torch.cat(values) for name, values in found.items()}
        loss = None
        for sensor in given if return_loss else ():
            # The mean over samples, so that the loss does not depend on how a batch is cut.
            error = results[f"{sensor}_loss"] = results[f"{sensor}_loss"].mean()
            weighted = getattr(self.config, f"{sensor}_loss_weight") * error
            loss = weighted if loss is None else loss + weighted
        if contrast is not None:
            complete = self._complete_pairs(inputs, ids_keep)
            term = results["contrastive_loss"] = contrast(*(torch.cat(means) for means in pooled.values()), complete)
            loss = loss + self.config.contrastive_loss_weight * term
        elif self.contrast is not None and loss is not None:
            results["contrastive_loss"] = loss.new_zeros(())
        if len(groups) == 1:
            names = ("hidden_states", "attentions", "cross_attentions")
            results |= {name: getattr(encoded, name) for name in names}
            if kwargs.get("output_attentions", self.config.output_attentions):
                results["decoder_cross_attentions"] = maps
        return FusMAEForPreTrainingOutput(loss=loss, **results)

    def _encode_alone(
        self,
        sensor: str,
        inputs: Mapping[str, torch.Tensor | None],
        ids_keep: torch.Tensor | None,
        gsd: float | None,
    ) -> FusMAEModelOutput:
        """The encoder's output for one sensor of each sample, without the other; zero where a sample lacks it."""
        suffix = SENSORS[sensor]
        images = inputs[f"pixel_values{suffix}"]
        # As a pixel mask, since the encoder refuses a sample that has no sensor.
        valid = valid_pixels(inputs[f"pixel_mask{suffix}"], inputs[f"{sensor}_available"], images)
        shown = {f"pixel_values{suffix}": images, f"pixel_mask{suffix}": valid, f"ids_keep{suffix}": ids_keep}
        return self.fusmae(**shown, gsd=gsd)

    def _complete_pairs(
        self, inputs: Mapping[str, torch.Tensor | None], ids_keep: Mapping[str, torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Samples `(batch_size,)` bool with data in the patches `ids_keep` of both sensors; None: all have."""
        complete = None
        for sensor, present in self._present_patches(**inputs).items():
            if present is not None:
                some = take_tokens(present, ids_keep[sensor]).any(dim=1)
                complete = some if complete is None else complete & some
        return complete

    def _encode_and_decode(
        self,
        sensors: list[str],
        ids_keep: Mapping[str, torch.Tensor | None],
        inputs: dict[str, torch.Tensor | None],
        gsd: float | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[FusMAEModelOutput, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        """Encode the patches `ids_keep` of each sensor, `(batch_size, kept)` or None for all, and decode every patch
        of `sensors`. Returns the encoder's output, logits by sensor, and maps of the decoders' fusion."""
        encoded = self.fusmae(**inputs, ids_keep=ids_keep["optical"], ids_keep_sar=ids_keep["sar"], gsd=gsd, **kwargs)
        images = given_images(inputs["pixel_values"], inputs["pixel_values_sar"])
        grid = (images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size)
        # A sensor of which no patch is visible is not encoded, yet it is reconstructed.
        tokens = {sensor: getattr(encoded, f"{sensor}_hidden_state") for sensor in SENSORS}
        presence = self._present_patches(**inputs)
        for sensor, present in presence.items():
            if present is not None:
                presence[sensor] = take_tokens(present, ids_keep[sensor]) if tokens[sensor] is not None else None
        logits, maps = {}, []
        for sensor in sensors:
            decoder, other = getattr(self, f"{sensor}_decoder"), OTHER[sensor]
            logits[sensor], weights = decoder(
                grid,
                tokens[sensor],
                tokens[other],
                ids_keep[sensor],
                presence[sensor],
                presence[other],
                scale=self._position_scale(gsd),
                **kwargs,
            )
            if weights is not None:
                maps.append(weights)
            if self.config.predict_residual:
                logits[sensor] = logits[sensor] + self._interpolated(sensor, ids_keep[sensor], inputs)
        return encoded, logits, tuple(maps)

    def _interpolated(
        self, sensor: str, ids_keep: torch.Tensor | None, inputs: dict[str, torch.Tensor | None]
    ) -> torch.Tensor | float:
        """What the visible pixels of a sensor tell of each place, in the shape of `logits`; 0 without any."""
        suffix, size = SENSORS[sensor], self.config.patch_size
        pixels = inputs[f"pixel_values{suffix}"]
        if pixels is None:
            return 0.0
        visible = valid_pixels(inputs[f"pixel_mask{suffix}"], inputs.get(f"{sensor}_available"), pixels)
        if ids_keep is not None:
            height, width = pixels.shape[-2:]
            shown = visible_pixels(masked_patches(ids_keep, height * width // size**2), height, width, size)
            visible = shown if visible is None else visible & shown
        return 0.0 if visible is None else patchify(interpolate_visible(pixels, visible, size), size).flatten(2)

    @torch.no_grad()
    def embed(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        gsd: float | None = None,
    ) -> FusMAEEmbeddingOutput:
        r"""
        Where each sensor of a pair, seen alone and whole, lies on the sphere that the contrastive loss has taught them
        to share. The cosine of two places is the product of their vectors, of one sensor or of two.

        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`].

        Raises:
            ValueError: the model was pretrained without the contrastive loss; or as in [`FusMAEModel`].

        Example:

        ```python
        >>> import torch
        >>> from fusmae_hf import FusMAEConfig, FusMAEForPreTraining

        >>> config = FusMAEConfig.from_preset("tiny", objective="fusmae_contrastive")
        >>> model = FusMAEForPreTraining(config).eval()
        >>> sar = model.embed(pixel_values_sar=torch.randn(3, 2, 64, 64)).embeds
        >>> optical = model.embed(pixel_values=torch.randn(5, 12, 64, 64)).embeds
        >>> (sar @ optical.T).shape
        torch.Size([3, 5])
        ```"""
        if self.contrast is None:
            raise ValueError(
                "This model has no projections: it was pretrained without the contrastive loss, with "
                "`contrastive_loss_weight` 0. Pretrain with `--objective fusmae_contrastive`, or read its features."
            )
        inputs = {
            "pixel_values": pixel_values,
            "pixel_values_sar": pixel_values_sar,
            "pixel_mask": pixel_mask,
            "pixel_mask_sar": pixel_mask_sar,
            "optical_available": optical_available,
            "sar_available": sar_available,
        }
        presence = self._present_patches(**inputs)  # refuses what does not fit
        results: dict[str, torch.Tensor] = {}
        for sensor, suffix in SENSORS.items():
            if inputs[f"pixel_values{suffix}"] is None:
                continue
            projection: Any = getattr(self.contrast, sensor)
            vectors = projection(self._encode_alone(sensor, inputs, None, gsd).pooler_output)
            if (present := presence[sensor]) is not None:
                vectors = torch.where(present.any(dim=1, keepdim=True), vectors, 0.0)
            results[f"{sensor}_embeds"] = vectors
        return FusMAEEmbeddingOutput(
            nn.functional.normalize(torch.stack(list(results.values())).sum(dim=0), dim=-1), **results
        )

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        mask_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        gsd: float | None = None,
    ) -> FusMAEReconstruction:
        r"""
        Images of both sensors from what is visible: optical from SAR alone, SAR from optical alone, or the hidden
        patches of either. Nothing is drawn: what is not hidden by `mask` is visible. A sensor that is not given is
        reconstructed whole, on the grid of the other.

        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`].
            mask (`torch.Tensor` of shape `(batch_size, N)`, bool or integer):
                Nonzero for the optical patches to hide; samples may differ in number. None: hide none.
            mask_sar (`torch.Tensor` of shape `(batch_size, N)`):
                The same for SAR.

        Returns:
            [`FusMAEReconstruction`], in normalised units; `FusMAEImageProcessor.post_process_reconstruction` makes
            physical ones of them. With `config.norm_pix_loss` the model has learned each patch without its mean and
            standard deviation, and nothing tells those of a patch that it never saw: they are set to the average of
            the visible patches of that sensor in that sample, or to 0 and 1, the average of the training data, where
            none is visible, and `assumed_levels` is True. Textures are predictions then, brightness is not.

        Raises:
            ValueError: as in [`FusMAEModel`], a mask of another shape, or a sample in which nothing is visible.

        Example:

        ```python
        >>> import torch
        >>> from fusmae_hf import FusMAEConfig, FusMAEForPreTraining

        >>> model = FusMAEForPreTraining(FusMAEConfig.from_preset("tiny")).eval()
        >>> images = model.reconstruct(pixel_values_sar=torch.randn(1, 2, 64, 64))
        >>> images.pixel_values.shape, images.reconstructed.all().item(), images.reconstructed_sar.any().item()
        (torch.Size([1, 12, 64, 64]), True, False)
        ```"""
        self._present_patches(  # refuses what does not fit
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available
        )
        first, size = given_images(pixel_values, pixel_values_sar), self.config.patch_size
        batch_size, _, height, width = first.shape
        shape, device = (batch_size, (height // size) * (width // size)), first.device
        images, visible, inputs = {"optical": pixel_values, "sar": pixel_values_sar}, {}, {}
        for sensor, hidden, valid, available in (
            ("optical", mask, pixel_mask, optical_available),
            ("sar", mask_sar, pixel_mask_sar, sar_available),
        ):
            if hidden is not None and (images[sensor] is None or hidden.shape != shape):
                raise ValueError(
                    f"`mask{SENSORS[sensor]}` must have shape {shape}, one value a patch of the {sensor} images, but "
                    f"has {tuple(hidden.shape)}{' and there are none' if images[sensor] is None else ''}."
                )
            seen = first.new_full((batch_size, height, width), images[sensor] is not None, dtype=torch.bool)
            if valid is not None:
                seen = seen & valid.to(device)
            if available is not None:
                seen = seen & available.to(device)[:, None, None]
            if hidden is not None:
                hidden = hidden.to(device).bool()[:, :, None, None].expand(-1, -1, 1, size**2)
                seen = seen & ~unpatchify(hidden, size, height, width)[:, 0]
            visible[sensor] = seen
            inputs[f"pixel_values{SENSORS[sensor]}"] = images[sensor]
            inputs[f"pixel_mask{SENSORS[sensor]}"] = None if images[sensor] is None else seen
        shown = torch.stack(list(visible.values())).flatten(2).any(dim=-1).any(dim=0)
        if not shown.all():
            raise ValueError(
                f"Nothing is visible in sample {(~shown).nonzero().flatten().tolist()}: `mask` and `mask_sar` hide it "
                "all, or it holds no data."
            )
        _, predicted, _ = self._encode_and_decode(list(SENSORS), dict.fromkeys(SENSORS), inputs, gsd)
        results: dict[str, Any] = {}
        for sensor, suffix in SENSORS.items():
            given, seen, logits = images[sensor], visible[sensor], predicted[sensor].float()
            if self.config.norm_pix_loss and given is not None:
                logits = self._assume_levels(logits, given, seen)
            pixels = self.unpatchify(logits, height, width)
            if given is not None:
                pixels = torch.where(seen[:, None], given.float(), pixels)
            results |= {f"pixel_values{suffix}": pixels, f"reconstructed{suffix}": ~seen}
        return FusMAEReconstruction(**results, assumed_levels=self.config.norm_pix_loss)

    def _assume_levels(self, logits: torch.Tensor, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Give patches that were predicted without mean and deviation those of the visible patches of their sample."""
        valid = patchify(visible[:, None], self.config.patch_size)
        patches = torch.where(valid, patchify(images.float(), self.config.patch_size), 0.0)
        count = valid.sum(dim=(2, 3)) * patches.shape[2]
        means = patches.sum(dim=(2, 3)) / count.clamp(min=1)
        squares = (torch.where(valid, patches - means[..., None, None], 0.0)).square().sum(dim=(2, 3))
        deviations = (squares / count.clamp(min=1)).sqrt()
        seen = count > 0
        number = seen.sum(dim=1).clamp(min=1)
        some = seen.any(dim=1)[:, None, None]
        mean = torch.where(some, (means.sum(dim=1) / number)[:, None, None], 0.0)
        std = torch.where(some, (deviations.sum(dim=1) / number)[:, None, None], 1.0)
        return logits * std + mean

    def sensor_error(
        self,
        logits: torch.Tensor,
        images: torch.Tensor,
        mask: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        available: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reconstruction error of one sensor, of which the loss is the mean over the samples.

        Args:
            logits: `(batch_size, N, bands * patch_size ** 2)`, predicted pixels.
            images: `(batch_size, bands, height, width)`, the pixels as they are.
            mask: `(batch_size, N)`, 1 where a patch was hidden.
            pixel_mask: `(batch_size, height, width)` bool, where there is data.
            available: `(batch_size,)` bool, which samples have this sensor.

        Returns:
            `(batch_size,)` float32; zero for a sample that is absent or has no masked pixel with data.
        """
        valid = None
        if pixel_mask is not None or available is not None:
            valid = images.new_ones((images.shape[0], *images.shape[2:]), dtype=torch.bool)
            if pixel_mask is not None:
                valid = valid & pixel_mask
            if available is not None:
                valid = valid & available[:, None, None]
            valid = patchify(valid[:, None], self.config.patch_size).squeeze(2)
        target = patchify(images, self.config.patch_size)
        return reconstruction_error(logits, target, mask, valid, self.config.norm_pix_loss)


class FusMAEForImageClassification(FusMAEPreTrainedModel):
    r"""
    Fus-MAE with a linear classifier on the mean of the patch tokens (with `config.feature_layers` of several depths
    side by side): single label, multi-label or regression.

    The kind of problem is `config.problem_type`; where that is None it follows from the first labels: floats for one
    output mean regression, integers one class a sample, floats for several outputs several labels a sample.

    Example:

    ```python
    >>> import torch
    >>> from fusmae_hf import FusMAEConfig, FusMAEForImageClassification

    >>> config = FusMAEConfig.from_preset("tiny", num_labels=19, problem_type="multi_label_classification")
    >>> model = FusMAEForImageClassification(config)
    >>> sar, labels = torch.randn(2, 2, 120, 120), torch.randint(0, 2, (2, 19)).float()
    >>> outputs = model(pixel_values_sar=sar, labels=labels)  # SAR alone is fine
    >>> outputs.logits.shape, outputs.loss.shape
    (torch.Size([2, 19]), torch.Size([]))
    ```"""

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.fusmae = FusMAEModel(config)
        # Not `layernorm`: loading would take the encoder's weights of that name for it.
        self.pooled_layernorm = (
            nn.LayerNorm(config.feature_size, eps=config.layer_norm_eps) if config.classifier_norm else nn.Identity()
        )
        self.classifier = nn.Linear(config.feature_size, self.num_labels)
        self.loss_function = scene_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gsd: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusMAEHeadOutput:
        r"""
        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`].
            labels (`torch.Tensor`):
                Single label: integers `(batch_size,)` in `[0, num_labels)`, -100 to leave a sample out. Multi-label:
                floats `(batch_size, num_labels)` in [0, 1], -100 to leave one out. Regression: floats
                `(batch_size, num_labels)`, or `(batch_size,)` for one output, NaN to leave one out.

        Raises:
            ValueError: inputs as in [`FusMAEModel`], or labels of another shape, dtype or, on the CPU, range.
        """
        kwargs = self._receive(pixel_values, kwargs)
        if labels is not None:
            check_labels(labels, given_images(pixel_values, pixel_values_sar), self.config)
        inputs = (pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available)
        encoded = self.fusmae(*inputs, gsd=gsd, **kwargs)
        features = encoded.pooler_output if encoded.feature_output is None else encoded.feature_output
        logits = self.classifier(self.pooled_layernorm(features))
        return FusMAEHeadOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )


class FusMAEForSemanticSegmentation(FusMAEPreTrainedModel):
    r"""
    Fus-MAE with a light dense head: semantic segmentation, or regression of a value for each pixel.

    The head joins the fused tokens (the mean over the sensors present at a place) of the stages
    `config.segmentation_stages` with a detail path, convolutions on the pixels at full, half and quarter resolution,
    on the way up to a prediction for each pixel. Images of any size that the patch size divides work.

    Example:

    ```python
    >>> import torch
    >>> from fusmae_hf import FusMAEConfig, FusMAEForSemanticSegmentation

    >>> model = FusMAEForSemanticSegmentation(FusMAEConfig.from_preset("tiny", num_labels=10))
    >>> sar, optical = torch.randn(1, 2, 64, 96), torch.randn(1, 12, 64, 96)
    >>> labels = torch.randint(0, 10, (1, 64, 96))
    >>> labels[:, :8] = 255  # left out of the loss
    >>> outputs = model(pixel_values=optical, pixel_values_sar=sar, labels=labels)
    >>> outputs.logits.shape, outputs.loss.shape
    (torch.Size([1, 10, 64, 96]), torch.Size([]))
    ```"""

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.fusmae = FusMAEModel(config)
        self.decoder = FusMAESegmentationDecoder(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers. Raises a ValueError for the dense head of an older version, which had no detail path."""
        informed = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if any(name.startswith("decoder.layernorms.") for name in report["unexpected_keys"]):
            raise ValueError(
                f"{args[0] if args else 'The checkpoint'} holds a dense head of an older version, without a detail "
                "path. Its encoder serves: FusMAEModel.from_pretrained(...).save_pretrained(<folder>), then fine-tune "
                "again with `--model <folder>`."
            )
        return (model, report) if informed else model

    def post_init(self):
        """Install the hooks that collect hidden states, which this head always needs, before any compilation."""
        super().post_init()
        maybe_install_capturing_hooks(self)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        gsd: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusMAEHeadOutput:
        r"""
        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`].
            labels (`torch.Tensor`):
                Of the same ground as the images, at their size or a whole multiple or fraction of it; logits are
                upsampled to them. Classes: integers `(batch_size, height, width)` in `[0, num_labels)`, with
                `config.semantic_loss_ignore_index` (255) where there is no label. Regression
                (`problem_type="regression"`, or `num_labels=1`): floats `(batch_size, num_labels, height, width)`, or
                `(batch_size, height, width)` for one output, with NaN where there is no label.

        Raises:
            ValueError: inputs as in [`FusMAEModel`], or labels of another shape, dtype or, on the CPU, range.
        """
        kwargs = self._receive(pixel_values, kwargs)
        if labels is not None:
            check_labels(labels, given_images(pixel_values, pixel_values_sar), self.config, dense=True)
        inputs = (pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available)
        encoded = self.fusmae(*inputs, gsd=gsd, **kwargs)
        stages, states = self.config.segmentation_stages, encoded.hidden_states
        images = {"optical": pixel_values, "sar": pixel_values_sar}
        valid = {
            "optical": valid_pixels(pixel_mask, optical_available, pixel_values),
            "sar": valid_pixels(pixel_mask_sar, sar_available, pixel_values_sar),
        }
        given = {sensor: values for sensor, values in images.items() if values is not None}
        logits = self.decoder(self.fusmae.feature_maps(stages, states, *inputs), given, valid)
        return FusMAEHeadOutput(
            loss=None if labels is None else dense_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )


class FusMAEBackbone(BackboneMixin, FusMAEPreTrainedModel):
    r"""
    Fus-MAE as a backbone for detectors and segmenters: feature maps of chosen depths.

    Stages are `stem` (after the early fusion) and `stage1` ... `stage<num_hidden_layers>`; `config.out_features` or
    `config.out_indices` chooses. All maps have `hidden_size` channels and one cell a patch: the mean, over the sensors
    present there, of the tokens after the encoder's last layer norm.

    Example:

    ```python
    >>> import torch
    >>> from fusmae_hf import FusMAEBackbone, FusMAEConfig

    >>> backbone = FusMAEBackbone(FusMAEConfig.from_preset("tiny", out_features=["stage3", "stage11"]))
    >>> with torch.no_grad():
    ...     maps = backbone(torch.randn(1, 12, 64, 96), torch.randn(1, 2, 64, 96)).feature_maps
    >>> [tuple(values.shape) for values in maps], backbone.channels
    ([(1, 192, 8, 12), (1, 192, 8, 12)], [192, 192])
    ```"""

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.fusmae = FusMAEModel(config)
        self.num_features = [config.hidden_size for _ in range(config.num_hidden_layers + 1)]
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
        gsd: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FusMAEBackboneOutput:
        r"""
        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`]. A sample without a sensor gets the maps of the other one; a place without data
                in any sensor is zero.

        Raises:
            ValueError: no sensor or no image is given, or shapes disagree with the configuration or each other.
            TypeError: a keyword is unknown.
        """
        kwargs = self._receive(pixel_values, kwargs)
        inputs = (pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available)
        encoded = self.fusmae(*inputs, gsd=gsd, **kwargs)
        stages, states = [self.stage_names.index(name) for name in self.out_features], encoded.hidden_states
        maps = self.fusmae.feature_maps(stages, states, *inputs)
        return FusMAEBackboneOutput(
            feature_maps=maps,  # type: ignore[arg-type]  # transformers annotates one map
            hidden_states=states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )


def __getattr__(name: str) -> Any:
    # Saved folders carry what is imported here. Pipelines import much of transformers, so only who asks gets them.
    if name.endswith("Pipeline"):
        from .pipelines_fusmae import PIPELINES

        if name in PIPELINES:
            return PIPELINES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


FusMAEModel.register_for_auto_class("AutoModel")
FusMAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
FusMAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
FusMAEForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
FusMAEBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "FusMAEBackbone",
    "FusMAEForImageClassification",
    "FusMAEForPreTraining",
    "FusMAEForSemanticSegmentation",
    "FusMAEModel",
    "FusMAEPreTrainedModel",
]
