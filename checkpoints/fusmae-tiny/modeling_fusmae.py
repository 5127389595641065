"""Fus-MAE: a masked autoencoder that fuses SAR and optical patches with cross-attention.

From top to bottom: outputs, patches and positions, attention, layers, encoder, decoder, masking and loss, heads.
"""

import contextlib
import copy
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .configuration_fusmae import FusMAEConfig
from .labels_fusmae import (
    check_dense_labels,
    check_image_labels,
    count_labels,
    resolve_problem_type,
    weighs_classes,
    weighted_loss,
)

logger = logging.get_logger(__name__)


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
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FusMAEForPreTrainingOutput(ModelOutput):
    r"""
    Reconstruction of a batch of pairs. `N` is the number of patches of the whole grid.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Weighted sum of `optical_loss` and `sar_loss`. None with `return_loss=False`.
        optical_loss (`torch.FloatTensor` of shape `()`):
            Mean squared error on the masked, valid pixels of the optical patch, in squared normalised units.
        sar_loss (`torch.FloatTensor` of shape `()`):
            The same for SAR. A sensor that is None has no loss.
        logits (`torch.FloatTensor` of shape `(batch_size, N, optical_bands * patch_size ** 2)`):
            Predicted optical pixels, by patch; the order within a patch is (band, row, column). `unpatchify` makes an
            image of them. Normalised by patch where `config.norm_pix_loss`.
        logits_sar (`torch.FloatTensor` of shape `(batch_size, N, sar_bands * patch_size ** 2)`):
            Predicted SAR pixels, by patch.
        mask (`torch.LongTensor` of shape `(batch_size, N)`):
            1 where an optical patch was hidden from the encoder, 0 where it was seen.
        mask_sar (`torch.LongTensor` of shape `(batch_size, N)`):
            The same for SAR.
        hidden_states, attentions, cross_attentions:
            As in [`FusMAEModelOutput`], over the visible patches.
        decoder_cross_attentions (`tuple(torch.FloatTensor)`):
            Of the decoders' fusion, optical queries first, `(batch_size, decoder_num_attention_heads, queries, keys)`.
    """

    loss: torch.Tensor | None = None
    optical_loss: torch.Tensor | None = None
    sar_loss: torch.Tensor | None = None
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
        pixel_values (`torch.FloatTensor` of shape `(batch_size, optical_bands, height, width)`):
            The optical images: pixels as they were given where they were visible, predicted elsewhere.
        pixel_values_sar (`torch.FloatTensor` of shape `(batch_size, sar_bands, height, width)`):
            The same for SAR.
        reconstructed (`torch.BoolTensor` of shape `(batch_size, height, width)`):
            True where the optical pixels are predicted.
        reconstructed_sar (`torch.BoolTensor` of shape `(batch_size, height, width)`):
            True where the SAR pixels are predicted.
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
class FusMAEImageClassifierOutput(ModelOutput):
    r"""
    Classification or regression of a batch of pairs.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Where labels were given.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Scores before softmax or sigmoid; the predicted values in regression.
        hidden_states, attentions, cross_attentions:
            As in [`FusMAEModelOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FusMAESemanticSegmenterOutput(ModelOutput):
    r"""
    Dense prediction for a batch of pairs.

    Args:
        loss (`torch.FloatTensor` of shape `()`):
            Where labels were given.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, 4 * rows, 4 * columns)`):
            Scores before softmax, or the predicted values in regression, four to the side of each patch of the grid:
            one every 2 pixels at a patch size of 8. `FusMAEImageProcessor.post_process_semantic_segmentation` gives
            label maps at any size.
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


class FusMAEEmbeddings(nn.Module):
    """Patches of each sensor projected with weights of their own, with positions; and the class token."""

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        self.patch_size = config.patch_size
        pixels = config.patch_size**2
        self.optical_projection = nn.Linear(len(config.optical_bands) * pixels, config.hidden_size)
        self.sar_projection = nn.Linear(len(config.sar_bands) * pixels, config.hidden_size)
        # A table of one row: the learned token is this model's only input embedding.
        self.class_token: nn.Module = nn.Embedding(1, config.hidden_size)

    def forward(
        self,
        images: torch.Tensor,
        projection: nn.Linear,
        ids_keep: torch.Tensor | None = None,
        present: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Embed one sensor.

        Args:
            images: `(batch_size, bands, height, width)`.
            projection: `optical_projection` or `sar_projection`.
            ids_keep: `(batch_size, kept)`, patches to embed; the others are never projected. None: all.
            present: `(batch_size, kept)` bool. Pixels of absent tokens, which may be NaN, are replaced by zero.
            scale: of the positions.

        Returns:
            `(batch_size, kept, hidden_size)`.
        """
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
    weights = nn.functional.softmax(weights, dim=-1)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def cast_once(values: torch.Tensor) -> torch.Tensor:
    """What several projections read, in the dtype of autocast: each of them would cast it anew."""
    device = values.device.type
    if values.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return values.to(torch.get_autocast_dtype(device))
    return values


_SHORT = 256**2
"""Pairs of a query and a key up to which attention is spelt out on the CPU."""


def is_faster_spelt_out(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether two matrix products and a softmax beat PyTorch's fused attention: for the training of short sequences in
    bfloat16 on the CPU (docs/performance.md). The arithmetic is that of eager attention.

    Args:
        query: `(batch_size, heads, queries, head_dim)`.
        key: `(batch_size, heads, keys, head_dim)`.
    """
    trains = torch.is_grad_enabled() and query.requires_grad
    return (
        trains
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] * key.shape[2] <= _SHORT
    )


def attend(
    module: "FusMAESelfAttention | FusMAECrossAttention",
    hidden_states: torch.Tensor,
    context: torch.Tensor,
    attention_mask: torch.Tensor | None,
    implementation: str | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of `hidden_states` on `context`, through the configured implementation unless another is
    named, or unless spelling it out is faster."""
    batch_size, queries = hidden_states.shape[:2]
    own = hidden_states is context
    hidden_states = cast_once(hidden_states)
    context = hidden_states if own else cast_once(context)
    shape = (batch_size, -1, module.num_heads, module.head_dim)
    query = module.q_proj(hidden_states).view(shape).transpose(1, 2)
    key = module.k_proj(context).view(shape).transpose(1, 2)
    value = module.v_proj(context).view(shape).transpose(1, 2)
    implementation = implementation or module.config._attn_implementation
    if implementation == "sdpa" and attention_mask is None and is_faster_spelt_out(query, key):
        implementation = "eager"
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    output, weights = attention(
        module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs
    )
    return module.o_proj(output.reshape(batch_size, queries, -1)), weights


class FusMAESelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: FusMAEConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return attend(self, hidden_states, hidden_states, attention_mask, **kwargs)


# Not a subclass of the self-attention: outputs are recorded by isinstance, and its maps would be recorded twice.
class FusMAECrossAttention(nn.Module):
    """Multi-head attention of the tokens of one sensor on those of the other, which may be of another width."""

    def __init__(self, config: FusMAEConfig, hidden_size: int, num_heads: int, context_size: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(context_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(context_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

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
        output, weights = attend(self, hidden_states, context, mask, implementation, **kwargs)
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


# What leads to a checkpoint on the Hub.
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def _refuse_new_bands(name: str, wanted: list[str], known: list[str], new_bands: str | None) -> None:
    """Raise a ValueError where a band is not among the known ones, unless fresh weights are asked for."""
    if new_bands not in (None, "fresh"):
        raise ValueError(f"`new_bands` must be None or 'fresh', not {new_bands!r}.")
    missing = [band for band in wanted if band not in known]
    if missing and new_bands is None:
        raise ValueError(
            f"`{name}`: the checkpoint never saw {missing}; it knows {list(known)}. Leave them out, or pass "
            "`new_bands='fresh'` to draw new weights for them, which must be trained."
        )


class FusMAEPreTrainedModel(PreTrainedModel):
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

    # The Trainer divides the loss by the accumulated batches itself.
    accepts_loss_kwargs = False
    # A pretraining checkpoint serves every head; its decoders are not worth a report there.
    _keys_to_ignore_on_load_unexpected = [r"^optical_decoder\.", r"^sar_decoder\."]  # noqa: RUF012

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

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        new_bands: str | None = None,
        **kwargs,
    ):
        r"""
        Load a checkpoint, with its own bands or with others; all else as in transformers.

        Weights go by band name: the checkpoint's own configuration says which band each belongs to.

        Args:
            pretrained_model_name_or_path: folder or Hub repository.
            model_args: see [`~transformers.PreTrainedModel.from_pretrained`].
            config: configuration instead of the checkpoint's. Its bands are treated like those given by name.
            optical_bands, sar_bands (`list[str]`): the bands that the model is to take, in the order of its channels:
                a subset of the checkpoint's, or another order.
            new_bands: None to refuse bands that the checkpoint never saw, or `"fresh"` to draw new weights for them.
            kwargs: see [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: the checkpoint never saw a band, and `new_bands` is not `"fresh"`.

        Example: `FusMAEModel.from_pretrained(folder, optical_bands=["B02", "B03", "B04", "B08"])`.
        """
        names = ("optical_bands", "sar_bands")
        wanted = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        if isinstance(config, PreTrainedConfig):
            wanted = {name: getattr(config, name) for name in names} | wanted
        saved = None
        if wanted and pretrained_model_name_or_path is not None:
            hub = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
            with contextlib.suppress(OSError):  # weights without a configuration beside them
                saved = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
        if saved is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        for name in names:
            kwargs.pop(name, None)
            if name in wanted:
                _refuse_new_bands(name, wanted[name], getattr(saved, name), new_bands)
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
            for name in names:
                setattr(config, name, getattr(saved, name))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).select_bands(**wanted, new_bands=new_bands)
        return loaded

    @torch.no_grad()
    def select_bands(
        self,
        optical_bands: list[str] | None = None,
        sar_bands: list[str] | None = None,
        new_bands: str | None = None,
    ) -> None:
        """Make the model take other bands, in place: weights that belong to a band follow its name.

        Args:
            optical_bands, sar_bands: the bands to take, in the order of the channels. None: as they are.
            new_bands: None to refuse bands that the model does not have, `"fresh"` to draw new weights for them.

        Raises:
            ValueError: a band is unknown or named twice, or the weights are sharded or offloaded.
        """
        config = copy.deepcopy(self.config)
        for name, bands in (("optical_bands", optical_bands), ("sar_bands", sar_bands)):
            if bands is not None:
                _refuse_new_bands(name, bands, getattr(self.config, name), new_bands)
                setattr(config, name, list(bands))
        config.validate_bands()
        for sensor in ("optical", "sar"):
            old, new = getattr(self.config, f"{sensor}_bands"), getattr(config, f"{sensor}_bands")
            if old == new:
                continue
            index = [old.index(band) if band in old else None for band in new]
            for layer, dim in self._band_layers(sensor):
                self._select_band_weights(layer, dim, index)
            setattr(self.config, f"{sensor}_bands", new)

    def _band_layers(self, sensor: str) -> list[tuple[nn.Linear, int]]:
        """Layers whose input (1) or output (0) is pixels of one sensor."""
        return [(getattr(self.base_model.embeddings, f"{sensor}_projection"), 1)]

    def _select_band_weights(self, layer: nn.Linear, dim: int, index: list[int | None]) -> None:
        """Rearrange the pixels of a layer, in the order (band, row, column), by band; None draws new weights."""
        weight, pixels = layer.weight, self.config.patch_size**2
        if weight.device.type == "meta" or hasattr(weight, "device_mesh"):
            raise ValueError("Bands cannot be selected of weights that are offloaded or sharded: load them plainly.")
        shape = list(weight.shape)
        shape[dim] = len(index) * pixels
        fresh = nn.Linear(shape[1], shape[0], bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
        self._init_weights(fresh)
        known = [(place, band) for place, band in enumerate(index) if band is not None]
        places, bands = torch.tensor(known, dtype=torch.long, device=weight.device).reshape(-1, 2).unbind(dim=1)
        tensors = [("weight", dim)] + ([("bias", 0)] if layer.bias is not None else [])
        for name, axis in tensors:
            old, new = getattr(layer, name), getattr(fresh, name)
            if name == "bias" and dim == 1:  # of the features, not of the pixels
                new.copy_(old)
            else:
                chosen = old.unflatten(axis, (-1, pixels)).index_select(axis, bands)
                new.unflatten(axis, (-1, pixels)).index_copy_(axis, places, chosen)
            setattr(layer, name, nn.Parameter(new.detach(), requires_grad=old.requires_grad))
        layer.in_features, layer.out_features = shape[1], shape[0]

    def _check_images(
        self,
        pixel_values: torch.Tensor | None,
        pixel_values_sar: torch.Tensor | None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
    ) -> None:
        """Raise a ValueError unless there are images of the shape that the configuration tells, some in each sample.

        That each sample has a sensor is checked where the availability lies on the CPU and no graph is traced: a look
        at values would stall a GPU. Elsewhere a sample without any sensor has only its class token.
        """
        batch_size = given_images(pixel_values, pixel_values_sar).shape[0]
        size = self.config.patch_size
        for name, images, bands in (
            ("pixel_values", pixel_values, self.config.optical_bands),
            ("pixel_values_sar", pixel_values_sar, self.config.sar_bands),
        ):
            if images is None:
                continue
            if images.ndim != 4 or images.shape[1] != len(bands):
                raise ValueError(
                    f"`{name}` must have shape (batch_size, {len(bands)}, height, width), one channel for each of the "
                    f"bands {list(bands)}, but has {tuple(images.shape)}. FusMAEImageProcessor picks and orders bands."
                )
            if images.shape[2] % size or images.shape[3] % size:
                raise ValueError(
                    f"`{name}` is {images.shape[2]}x{images.shape[3]} px, which the patch size of {size} px does not "
                    "divide. Crop it, or pad or resize it: FusMAEImageProcessor.from_pretrained(<your checkpoint>, "
                    f"do_pad=True, size_divisor={size})."
                )
        if pixel_values is not None and pixel_values_sar is not None:
            optical_shape, sar_shape = pixel_values.shape, pixel_values_sar.shape
            if optical_shape[0] != sar_shape[0] or optical_shape[2:] != sar_shape[2:]:
                raise ValueError(
                    f"Both sensors must show the same places on the same grid, but `pixel_values` has batch and size "
                    f"{optical_shape[0], *optical_shape[2:]} and `pixel_values_sar` {sar_shape[0], *sar_shape[2:]}."
                )
        given = []
        for sensor, images, available in (
            ("optical", pixel_values, optical_available),
            ("sar", pixel_values_sar, sar_available),
        ):
            if available is not None and (available.shape != (batch_size,) or available.dtype != torch.bool):
                raise ValueError(
                    f"`{sensor}_available` must be bool of shape ({batch_size},), one value a sample, but is "
                    f"{available.dtype} of shape {tuple(available.shape)}."
                )
            if images is not None:
                given.append(available)
        known = [
            available
            for available in given
            if available is not None and available.device.type == "cpu" and not is_tracing(available)
        ]
        if len(known) < len(given):
            return
        nothing = ~torch.stack(known).any(dim=0)
        if nothing.any():
            raise ValueError(
                f"Sample {nothing.nonzero().flatten().tolist()} of the batch has no sensor: `optical_available` and "
                "`sar_available` are False, or the pixel values of the other sensor are None. Leave such samples out."
            )

    def _present_patches(
        self,
        sensor: str,
        images: torch.Tensor | None,
        available: torch.Tensor | None,
        pixel_mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Which patches of a sensor hold data: `(batch_size, patches)` bool, or None where all do."""
        if images is None:
            if available is not None or pixel_mask is not None:
                raise ValueError(
                    f"`{sensor}_available` or the pixel mask of the {sensor} sensor was given without pixel values. "
                    f"Leave them out, or pass pixel values (any numbers) for the samples without {sensor}."
                )
            return None
        if available is None and pixel_mask is None:
            return None
        batch_size, _, height, width = images.shape
        size = self.config.patch_size
        present = images.new_ones((batch_size, (height // size) * (width // size)), dtype=torch.bool)
        if available is not None:
            present = present & available.to(images.device)[:, None]
        if pixel_mask is not None:
            if pixel_mask.shape != (batch_size, height, width) or pixel_mask.dtype != torch.bool:
                raise ValueError(
                    f"The pixel mask of the {sensor} sensor must be bool of shape ({batch_size}, {height}, {width}), "
                    f"True where there is data, but is {pixel_mask.dtype} of shape {tuple(pixel_mask.shape)}."
                )
            present = present & patchify(pixel_mask[:, None].to(images.device), size).any(dim=-1).squeeze(-1)
        return present

    def _position_scale(self, gsd: float | None) -> float:
        """Distance between patches in patches of the training images."""
        if gsd is None:
            return 1.0
        if not gsd > 0:
            raise ValueError(f"`gsd` must be a positive distance in metres, one for the whole batch, not {gsd}.")
        return gsd / self.config.gsd

    def _may_look_at(self, labels: torch.Tensor) -> bool:
        """Whether the values of labels are checked: always on the CPU; on other devices, which a look would stall, in
        the first batch alone; never while a graph is traced."""
        if is_tracing(labels):
            return False
        first = not getattr(self, "_labels_seen", False)
        self._labels_seen = True
        return first or labels.device.type == "cpu"


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

    def get_input_embeddings(self) -> nn.Module:
        """The table that holds the class token. Patches have no table: their projections are linear."""
        return self.embeddings.class_token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table that holds the class token."""
        self.embeddings.class_token = value

    def feature_maps(
        self,
        stages: list[int],
        hidden_states: tuple[torch.Tensor, ...],
        pixel_values: torch.Tensor | None = None,
        pixel_values_sar: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        pixel_mask_sar: torch.Tensor | None = None,
        optical_available: torch.Tensor | None = None,
        sar_available: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Maps `(batch_size, hidden_size, rows, columns)` of some stages, from the `hidden_states` of [`forward`].

        After the last layer norm, the mean over the sensors that are present at a place; zero where none is.
        """
        images = given_images(pixel_values, pixel_values_sar)
        grid = (images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size)
        present = []
        if pixel_values is not None:
            present.append(self._present_patches("optical", pixel_values, optical_available, pixel_mask))
        if pixel_values_sar is not None:
            present.append(self._present_patches("sar", pixel_values_sar, sar_available, pixel_mask_sar))
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
            ValueError: no sensor is given, or shapes disagree with the configuration or with each other.
        """
        self._check_images(pixel_values, pixel_values_sar, optical_available, sar_available)
        optical_present = self._present_patches("optical", pixel_values, optical_available, pixel_mask)
        sar_present = self._present_patches("sar", pixel_values_sar, sar_available, pixel_mask_sar)
        scale = self._position_scale(gsd)
        optical = sar = None
        if pixel_values is not None:
            optical_present = None if optical_present is None else take_tokens(optical_present, ids_keep)
            optical = self.embeddings(
                pixel_values, self.embeddings.optical_projection, ids_keep, optical_present, scale
            )
        if pixel_values_sar is not None:
            sar_present = None if sar_present is None else take_tokens(sar_present, ids_keep_sar)
            sar = self.embeddings(pixel_values_sar, self.embeddings.sar_projection, ids_keep_sar, sar_present, scale)
        if self.fusion is not None:
            optical, sar = self.fusion(optical, sar, optical_present, sar_present, **kwargs)

        patches, present = join_streams([(optical, optical_present), (sar, sar_present)])
        class_index = torch.zeros((patches.shape[0], 1), dtype=torch.long, device=patches.device)
        class_token = self.embeddings.class_token(class_index)
        hidden_states = torch.cat([class_token, patches], dim=1)
        attention_mask = None
        if present is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=torch.cat([present.new_ones((present.shape[0], 1)), present], dim=1),
            )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layernorm(hidden_states)

        patches = hidden_states[:, 1:]
        if present is None:
            pooled = patches.mean(dim=1)
        else:
            patches = torch.where(present[..., None], patches, 0.0)
            hidden_states = torch.cat([hidden_states[:, :1], patches], dim=1)
            pooled = patches.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)
        num_optical = 0 if optical is None else optical.shape[1]
        return FusMAEModelOutput(
            last_hidden_state=hidden_states,
            sar_hidden_state=None if sar is None else patches[:, num_optical:],
            optical_hidden_state=None if optical is None else patches[:, :num_optical],
            pooler_output=pooled,
        )


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


class _View(NamedTuple):
    """One sensor of some pairs and what is visible of it."""

    images: torch.Tensor | None
    pixel_mask: torch.Tensor | None
    available: torch.Tensor | None
    ids_keep: torch.Tensor | None = None
    """Visible patches; None: all."""

    @property
    def is_seen(self) -> bool:
        """Whether the encoder gets anything of this sensor."""
        return self.images is not None and (self.ids_keep is None or self.ids_keep.shape[1] > 0)

    def rows(self, rows: slice, ids_keep: torch.Tensor) -> "_View":
        """Some samples; of `ids_keep` `(batch_size, kept)`, the visible patches of all samples, theirs."""
        images, pixel_mask, available = (
            None if values is None else values[rows] for values in (self.images, self.pixel_mask, self.available)
        )
        return _View(images, pixel_mask, available, ids_keep[rows])

    def inputs(self, suffix: str, sensor: str, alone: bool) -> dict[str, torch.Tensor | None]:
        """Arguments for the encoder; none where nothing is visible.

        Where the other sensor is hidden (`alone`), a sample may be left without any: a pixel mask says so, since an
        availability would be refused.
        """
        if self.images is None or not self.is_seen:
            return {}
        pixel_mask, available = self.pixel_mask, self.available
        if alone and available is not None:
            everywhere = self.images.new_ones((self.images.shape[0], *self.images.shape[2:]), dtype=torch.bool)
            pixel_mask = everywhere if pixel_mask is None else pixel_mask
            pixel_mask, available = pixel_mask & available.to(pixel_mask.device)[:, None, None], None
        return {
            f"pixel_values{suffix}": self.images,
            f"pixel_mask{suffix}": pixel_mask,
            f"{sensor}_available": available,
            f"ids_keep{suffix}": self.ids_keep,
        }


class FusMAEForPreTraining(FusMAEPreTrainedModel):
    r"""
    Fus-MAE with its two decoders: hides most patches of both sensors and reconstructs their pixels.

    With `config.modality_dropout`, fixed slices of each training batch show the encoder one sensor alone, at about
    half the cost; the other is reconstructed whole. The encoder runs once for each slice, and hidden states and
    attentions are not returned then.

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
        shuffled = noise.argsort(dim=1)
        if self.config.mask_strategy == "independent":
            if noise_sar is None:
                noise_sar = torch.rand(batch_size, num_patches, device=device)
            shuffled_sar = noise_sar.argsort(dim=1)
        elif self.config.mask_strategy == "consistent":
            shuffled_sar = shuffled
        else:
            shuffled_sar = shuffled.flip(1)
        return shuffled[:, : kept["optical"]], shuffled_sar[:, : kept["sar"]]

    def dropout_groups(self, batch_size: int) -> list[tuple[slice, bool, bool]]:
        """Split a batch by `config.modality_dropout`: fixed slices, by position alone, so that shapes never change.

        Args:
            batch_size: number of pairs.

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
            ValueError: no sensor is given, or shapes disagree with the configuration or with each other.
        """
        self._check_images(pixel_values, pixel_values_sar, optical_available, sar_available)
        images = given_images(pixel_values, pixel_values_sar)
        batch_size, size = images.shape[0], self.config.patch_size
        grid = (images.shape[2] // size, images.shape[3] // size)
        ids_keep, ids_keep_sar = self.draw_masks(batch_size, grid[0] * grid[1], noise, noise_sar, device=images.device)
        optical = _View(pixel_values, pixel_mask, optical_available)
        sar = _View(pixel_values_sar, pixel_mask_sar, sar_available)
        groups = [(slice(0, batch_size), True, True)]
        if self.training and pixel_values is not None and pixel_values_sar is not None:
            groups = self.dropout_groups(batch_size)
        parts = []
        for rows, sees_optical, sees_sar in groups:
            views = (
                optical.rows(rows, ids_keep if sees_optical else ids_keep[:, :0]),
                sar.rows(rows, ids_keep_sar if sees_sar else ids_keep_sar[:, :0]),
            )
            parts.append(self._reconstruct_group(grid, *views, scale=self._position_scale(gsd), **kwargs))
        results: dict[str, Any] = {}
        loss, dropped = None, not all(sees_optical and sees_sar for _, sees_optical, sees_sar in groups)
        for sensor, suffix, own, other, loss_weight in (
            ("optical", "", optical, sar, self.config.optical_loss_weight),
            ("sar", "_sar", sar, optical, self.config.sar_loss_weight),
        ):
            if own.images is None:
                continue
            logits = torch.cat([part[sensor] for part in parts])
            mask = torch.cat([part[f"{sensor}_mask"] for part in parts])
            results |= {f"logits{suffix}": logits, f"mask{suffix}": mask}
            if return_loss:
                target = own.available
                if dropped and other.available is not None:
                    # What dropout hides can be told from the other sensor alone.
                    index = ("optical", "sar").index(sensor)
                    seen = torch.cat(
                        [
                            mask.new_full((rows.stop - rows.start,), sees[index], dtype=torch.bool)
                            for rows, *sees in groups
                        ]
                    )
                    tellable = seen | other.available.to(mask.device)
                    target = tellable if target is None else tellable & target.to(mask.device)
                # The mean over samples, so that the loss does not depend on how a batch is cut.
                error = self.sensor_error(logits, own.images, mask, own.pixel_mask, target).mean()
                results[f"{sensor}_loss"] = error
                loss = loss_weight * error if loss is None else loss + loss_weight * error
        if len(parts) == 1:
            encoded = parts[0]["encoded"]
            results |= {
                name: encoded[name] for name in ("hidden_states", "attentions", "cross_attentions") if name in encoded
            }
            if kwargs.get("output_attentions", self.config.output_attentions):
                results["decoder_cross_attentions"] = parts[0]["maps"]
        return FusMAEForPreTrainingOutput(loss=loss, **results)

    def _reconstruct_group(
        self,
        grid: tuple[int, int],
        optical: "_View",
        sar: "_View",
        sensors: tuple[str, ...] | None = None,
        **kwargs,
    ) -> dict:
        """Encode what is visible of some pairs and decode every patch.

        Args:
            grid: (rows, columns) of patches.
            optical, sar: the sensors.
            sensors: which to decode; those given where None.

        Returns:
            `encoded`, the encoder's output; by sensor, its logits and `<sensor>_mask`; `maps` of the decoders' fusion.
        """
        scale = kwargs.pop("scale")
        if not optical.is_seen and not sar.is_seen:
            raise ValueError(
                f"Nothing is visible: the only sensor given is hidden entirely by the mask ratios "
                f"{self.config.mask_ratios}."
            )
        presents = {
            sensor: self._present_patches(sensor, view.images, view.available, view.pixel_mask)
            for sensor, view in (("optical", optical), ("sar", sar))
        }
        encoded = self.fusmae(
            **optical.inputs("", "optical", alone=not sar.is_seen),
            **sar.inputs("_sar", "sar", alone=not optical.is_seen),
            gsd=scale * self.config.gsd,
            **kwargs,
        )
        # A sensor of which no patch is visible is not encoded, yet it is reconstructed.
        decoded = {}
        for sensor, view in (("optical", optical), ("sar", sar)):
            present = presents[sensor]
            decoded[sensor] = (
                encoded[f"{sensor}_hidden_state"] if view.is_seen else None,
                view.ids_keep,
                None if present is None or not view.is_seen else take_tokens(present, view.ids_keep),
            )
        part, maps = {"encoded": encoded}, []
        for sensor, view, decoder in (
            ("optical", optical, self.optical_decoder),
            ("sar", sar, self.sar_decoder),
        ):
            if sensor not in sensors if sensors is not None else view.images is None:
                continue
            own, other = decoded[sensor], decoded["sar" if sensor == "optical" else "optical"]
            part[sensor], weights = decoder(grid, own[0], other[0], own[1], own[2], other[2], scale=scale, **kwargs)
            if view.ids_keep is not None:
                part[f"{sensor}_mask"] = masked_patches(view.ids_keep, grid[0] * grid[1])
            if weights is not None:
                maps.append(weights)
        part["maps"] = tuple(maps)
        return part

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
        self._check_images(pixel_values, pixel_values_sar, optical_available, sar_available)
        images = given_images(pixel_values, pixel_values_sar)
        size = self.config.patch_size
        batch_size, (height, width) = images.shape[0], images.shape[2:]
        grid = (height // size, width // size)
        views, visibles, shown = {}, {}, images.new_zeros(batch_size, dtype=torch.bool)
        for sensor, name, values, hidden, valid, available in (
            ("optical", "mask", pixel_values, mask, pixel_mask, optical_available),
            ("sar", "mask_sar", pixel_values_sar, mask_sar, pixel_mask_sar, sar_available),
        ):
            self._present_patches(sensor, values, available, valid)  # refuses what does not fit
            if hidden is not None and (values is None or hidden.shape != (batch_size, grid[0] * grid[1])):
                raise ValueError(
                    f"`{name}` must have shape {(batch_size, grid[0] * grid[1])}, one value a patch of the {sensor} "
                    f"images, but has {tuple(hidden.shape)}{' and there are none' if values is None else ''}."
                )
            visible = images.new_full((batch_size, height, width), values is not None, dtype=torch.bool)
            if valid is not None:
                visible = visible & valid.to(images.device)
            if available is not None:
                visible = visible & available.to(images.device)[:, None, None]
            if hidden is not None:
                hidden = hidden.to(images.device).bool()[:, :, None, None].expand(-1, -1, 1, size**2)
                visible = visible & ~unpatchify(hidden, size, height, width)[:, 0]
            views[sensor] = _View(values, visible if values is not None else None, None)
            visibles[sensor] = visible
            shown = shown | visible.flatten(1).any(dim=1)
        if not shown.all():
            raise ValueError(
                f"Nothing is visible in sample {(~shown).nonzero().flatten().tolist()}: `mask` and `mask_sar` hide it "
                "all, or it holds no data."
            )
        part = self._reconstruct_group(
            grid, views["optical"], views["sar"], sensors=("optical", "sar"), scale=self._position_scale(gsd)
        )
        results: dict[str, Any] = {}
        for sensor, suffix in (("optical", ""), ("sar", "_sar")):
            seen, visible, logits = views[sensor].images, visibles[sensor], part[sensor].float()
            if self.config.norm_pix_loss and seen is not None:
                logits = self._assume_levels(logits, seen, visible)
            predicted = self.unpatchify(logits, height, width)
            if seen is not None:
                predicted = torch.where(visible[:, None], seen.float(), predicted)
            results |= {f"pixel_values{suffix}": predicted, f"reconstructed{suffix}": ~visible}
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
    Fus-MAE with a linear classifier on the mean of the patch tokens: single label, multi-label or regression.

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
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.classifier_norm else nn.Identity()
        )
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
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
    ) -> FusMAEImageClassifierOutput:
        r"""
        Args:
            pixel_values, pixel_values_sar, pixel_mask, pixel_mask_sar, optical_available, sar_available, gsd:
                As in [`FusMAEModel`].
            labels (`torch.Tensor`):
                Single label: integers `(batch_size,)` in `[0, num_labels)`, -100 to leave a sample out. Multi-label:
                floats `(batch_size, num_labels)` in [0, 1]. Regression: floats `(batch_size, num_labels)`, or
                `(batch_size,)` for one output.

        Raises:
            ValueError: inputs as in [`FusMAEModel`], or labels of another shape, dtype or range. On an accelerator
                the range is checked in the first batch alone.
        """
        self._check_images(pixel_values, pixel_values_sar, optical_available, sar_available)
        if labels is not None:
            images = given_images(pixel_values, pixel_values_sar)
            check_image_labels(labels, images.shape[0], self.config, self._may_look_at(labels))
        encoded = self.fusmae(
            pixel_values=pixel_values,
            pixel_values_sar=pixel_values_sar,
            pixel_mask=pixel_mask,
            pixel_mask_sar=pixel_mask_sar,
            optical_available=optical_available,
            sar_available=sar_available,
            gsd=gsd,
            **kwargs,
        )
        logits = self.classifier(self.pooled_layernorm(encoded.pooler_output))
        loss = None
        if labels is not None:
            kind = resolve_problem_type(self.config, labels)
            if kind == "single_label_classification":
                labels = labels.long()
            if kind != "regression" and weighs_classes(self.config):
                loss = weighted_loss(logits, labels, self.config, multi_label=kind.startswith("multi"))
            else:
                loss = self.loss_function(labels, logits, self.config)
        return FusMAEImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )


class FusMAESegmentationDecoder(nn.Module):
    """Joins maps of several depths and brings them to four predictions to the side of a patch."""

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        width = config.segmentation_hidden_size
        self.projections = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in config.segmentation_stages)
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(2))
        self.layernorms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.act_fn = ACT2FN[config.hidden_act]
        self.predict = nn.Linear(width, count_labels(config))

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Predictions `(batch_size, num_labels, 4 * rows, 4 * columns)` from maps
        `(batch_size, hidden_size, rows, columns)`, one for each depth."""
        projected = [
            projection(values.permute(0, 2, 3, 1)) for projection, values in zip(self.projections, maps, strict=True)
        ]
        hidden_states = sum(projected).permute(0, 3, 1, 2)
        for convolution, layernorm in zip(self.convolutions, self.layernorms, strict=True):
            hidden_states = nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="bilinear")
            hidden_states = layernorm(convolution(hidden_states).permute(0, 2, 3, 1))
            hidden_states = self.act_fn(hidden_states).permute(0, 3, 1, 2)
        return self.predict(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def dense_regression_error(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the labels that are finite; zero where none is.

    Args:
        predicted: `(batch_size, num_labels, rows, columns)`, upsampled bilinearly to the labels.
        labels: `(batch_size, num_labels, height, width)`, or `(batch_size, height, width)` for one output. NaN and
            infinity mean no data.
    """
    labels = labels[:, None] if labels.ndim == 3 else labels
    predicted = nn.functional.interpolate(predicted.float(), labels.shape[-2:], mode="bilinear")
    valid = labels.isfinite()
    error = torch.where(valid, predicted - torch.where(valid, labels.float(), 0.0), 0.0)
    return error.square().sum() / valid.sum().clamp(min=1)


class FusMAEForSemanticSegmentation(FusMAEPreTrainedModel):
    r"""
    Fus-MAE with a light dense head: semantic segmentation, or regression of a value for each pixel.

    The head joins the fused tokens (the mean over the sensors present at a place) of the stages
    `config.segmentation_stages` and upsamples them twice. Images of any size that the patch size divides work.

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
    (torch.Size([1, 10, 32, 48]), torch.Size([]))
    ```"""

    def __init__(self, config: FusMAEConfig):
        super().__init__(config)
        self.num_labels = count_labels(config)
        self.fusmae = FusMAEModel(config)
        self.decoder = FusMAESegmentationDecoder(config)
        self.post_init()

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
    ) -> FusMAESemanticSegmenterOutput:
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
            ValueError: inputs as in [`FusMAEModel`], or labels of another shape, dtype or range. On an accelerator
                the range is checked in the first batch alone.
        """
        self._check_images(pixel_values, pixel_values_sar, optical_available, sar_available)
        images = given_images(pixel_values, pixel_values_sar)
        if labels is not None:
            look = self._may_look_at(labels)
            check_dense_labels(labels, images.shape[0], (images.shape[2], images.shape[3]), self.config, look)
        inputs = {
            "pixel_values": pixel_values,
            "pixel_values_sar": pixel_values_sar,
            "pixel_mask": pixel_mask,
            "pixel_mask_sar": pixel_mask_sar,
            "optical_available": optical_available,
            "sar_available": sar_available,
        }
        encoded = self.fusmae(**inputs, gsd=gsd, **kwargs)
        logits = self.decoder(
            self.fusmae.feature_maps(self.config.segmentation_stages, encoded.hidden_states, **inputs)
        )
        loss = None
        if labels is not None and resolve_problem_type(self.config, labels) == "regression":
            loss = dense_regression_error(logits, labels)
        elif labels is not None:
            labels, ignore_index = labels.long(), self.config.semantic_loss_ignore_index
            if weighs_classes(self.config):
                upsampled = nn.functional.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
                loss = weighted_loss(upsampled, labels, self.config, ignore_index=ignore_index)
            else:
                # A batch without any label adds zero, not 0 / 0.
                count = (labels != ignore_index).sum().clamp(min=1)
                loss = self.loss_function(logits.float(), labels, ignore_index=ignore_index, num_items_in_batch=count)
        return FusMAESemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
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
            ValueError: no sensor is given, or shapes disagree with the configuration or with each other.
        """
        inputs = {
            "pixel_values": pixel_values,
            "pixel_values_sar": pixel_values_sar,
            "pixel_mask": pixel_mask,
            "pixel_mask_sar": pixel_mask_sar,
            "optical_available": optical_available,
            "sar_available": sar_available,
        }
        encoded = self.fusmae(**inputs, gsd=gsd, **kwargs)
        stages = [self.stage_names.index(name) for name in self.out_features]
        return FusMAEBackboneOutput(
            # transformers annotates one map, where there are several.
            feature_maps=self.fusmae.feature_maps(stages, encoded.hidden_states, **inputs),  # type: ignore[arg-type]
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )


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
