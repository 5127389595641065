"""How many floating-point operations the matrix products and attentions of Fus-MAE take.

A multiplication and an addition are two. Elementwise work (norms, activations, softmax, the loss, the optimiser) is
not counted, as is usual where a rate is compared with that of a large matrix product. What is counted is the work that
the result needs: the backward pass takes twice the forward pass, but for the patch projections, whose input has no
gradient. What a kernel or gradient checkpointing computes again to save memory is not counted. So
`torch.utils.flop_counter` finds exactly these numbers with eager attention. Of fused attention on a GPU it counts the
backward pass as 2.5 times the forward pass, since such kernels compute the attention weights again.
"""

from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.vocabulary import Sensors


def _attention(queries: int, keys: int, width: int, context_width: int) -> int:
    projections = 2 * queries * width * width + 2 * keys * context_width * width  # query and output, key and value
    return 2 * projections + 4 * queries * keys * width


def _mlp(tokens: int, width: int, intermediate_size: int) -> int:
    return 4 * tokens * width * intermediate_size


def _patch_projections(config: FusMAEConfig, optical: int, sar: int) -> int:
    values = optical * len(config.optical_bands) + sar * len(config.sar_bands)
    return 2 * values * config.patch_size**2 * config.hidden_size


def encoder_flops(config: FusMAEConfig, optical: int, sar: int) -> int:
    """Of the forward pass of [`FusMAEModel`] on one pair.

    Args:
        config: sizes and depths.
        optical: optical tokens that are encoded; 0 for SAR alone.
        sar: SAR tokens that are encoded; 0 for optical alone.
    """
    width, tokens = config.hidden_size, 1 + optical + sar
    flops = _patch_projections(config, optical, sar)
    if config.early_fusion == "cross_attention":
        flops += _mlp(optical + sar, width, config.intermediate_size)
        if optical and sar:
            flops += _attention(optical, sar, width, width) + _attention(sar, optical, width, width)
    layer = _attention(tokens, tokens, width, width) + _mlp(tokens, width, config.intermediate_size)
    return flops + config.num_hidden_layers * layer


def decoder_flops(config: FusMAEConfig, bands: int, patches: int, own: int, other: int) -> int:
    """Of the forward pass of the decoder of one sensor on one pair.

    Args:
        config: sizes and depths.
        bands: of the sensor.
        patches: of the whole grid, which is decoded.
        own: tokens of the sensor that were encoded.
        other: tokens of the other sensor that were encoded.
    """
    width = config.decoder_hidden_size
    queries, keys = 0, other
    if config.feature_fusion == "latent":
        queries = own
    elif config.feature_fusion == "query":
        queries = patches
        keys += own if config.decoder_context == "all" else 0
    fusion = _attention(queries, keys, width, config.hidden_size) if queries and keys else 0
    layer = _attention(patches, patches, width, width) + _mlp(patches, width, config.decoder_intermediate_size)
    embed, predict = 2 * own * config.hidden_size * width, 2 * patches * width * bands * config.patch_size**2
    return embed + fusion + config.decoder_num_hidden_layers * layer + predict


def inference_flops(config: FusMAEConfig, height: int, width: int, sensors: Sensors = "both") -> int:
    """Of extracting the features of one pair, or of one sensor's image of it.

    Args:
        config: sizes and depths.
        height, width: of the images in pixels.
        sensors: which of them the model is shown.
    """
    patches = (height // config.patch_size) * (width // config.patch_size)
    return encoder_flops(config, patches if sensors != "sar" else 0, patches if sensors != "optical" else 0)


def contrast_flops(config: FusMAEConfig, pairs: int) -> int:
    """Of the projections of both sensors of one pair and its similarities to `pairs` pairs, forward."""
    heads = 4 * config.hidden_size * (config.hidden_size + config.contrastive_projection_size)
    return heads + 2 * pairs * config.contrastive_projection_size


def pretraining_flops(
    config: FusMAEConfig,
    height: int,
    width: int,
    *,
    sensors: Sensors = "both",
    batch_size: int | None = None,
    backward: bool = True,
) -> float:
    """Of a pretraining step without its optimiser, for one pair; the mean over a batch with `modality_dropout`.

    Args:
        config: sizes, depths, masking and modality dropout.
        height, width: of the images in pixels.
        sensors: which of them the model is shown and reconstructs.
        batch_size: pairs that pass through the model at once, whole ones of which modality dropout strips of a
            sensor, and which the contrastive loss compares. None: so many that those shares come out even, without
            the comparisons, which are few beside the rest.
        backward: whether to count the backward pass too, or the forward pass alone.
    """
    patches = (height // config.patch_size) * (width // config.patch_size)
    seen = {
        sensor: int(patches * (1 - ratio) + 1e-6) if sensors in ("both", sensor) else 0
        for sensor, ratio in config.mask_ratios.items()
    }
    hidden = config.modality_dropouts if sensors == "both" else {"optical": 0.0, "sar": 0.0}
    if batch_size is not None:
        hidden = {sensor: int(batch_size * share + 1e-6) / batch_size for sensor, share in hidden.items()}
    groups = [
        (1 - sum(hidden.values()), seen["optical"], seen["sar"]),
        (hidden["optical"], 0, seen["sar"]),
        (hidden["sar"], seen["optical"], 0),
    ]
    flops = 0.0
    for share, optical, sar in groups:
        forward = encoder_flops(config, optical, sar)
        if sensors != "sar":
            forward += decoder_flops(config, len(config.optical_bands), patches, optical, sar)
        if sensors != "optical":
            forward += decoder_flops(config, len(config.sar_bands), patches, sar, optical)
        projected = _patch_projections(config, optical, sar)
        if config.contrastive_loss_weight and sensors == "both":
            # Each sensor alone, but for the one that modality dropout has shown alone already.
            for alone in ((seen["optical"], 0) if sar else (0, 0), (0, seen["sar"]) if optical else (0, 0)):
                if any(alone):
                    forward += encoder_flops(config, *alone)
                    projected += _patch_projections(config, *alone)
            forward += contrast_flops(config, batch_size or 0)
        flops += share * (3 * forward - projected if backward else forward)
    return flops
