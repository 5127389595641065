"""Fus-MAE once more, written out as plainly as possible: what the real classes must compute, however they do it.

Pure functions of a state dict and a configuration, sample by sample, head by head, patch by patch, in the dtype of the
weights. What is absent is left out, not masked. Sensors go by their names, `"optical"` and `"sar"`, inputs by those of
the real `forward`; `weights` are those of one module, by their names inside it. The activation is the exact GELU, and
there is no stochastic depth.
"""

import math

import torch

from fusmae_hf import FusMAEConfig

Weights = dict[str, torch.Tensor]

SUFFIXES = {"optical": "", "sar": "_sar"}
OTHER = {"optical": "sar", "sar": "optical"}


# --- building blocks -----------------------------------------------------------------------------------------------


def part(weights: Weights, module: str) -> Weights:
    """Weights of a module inside, under its own names."""
    return {name.removeprefix(f"{module}."): value for name, value in weights.items() if name.startswith(f"{module}.")}


def linear(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    result = tokens @ weights["weight"].T
    return result + weights["bias"] if "bias" in weights else result


def layer_norm(weights: Weights, tokens: torch.Tensor, config: FusMAEConfig) -> torch.Tensor:
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + config.layer_norm_eps) * weights["weight"] + weights["bias"]


def mlp(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    hidden = linear(part(weights, "up_proj"), tokens)
    return linear(part(weights, "down_proj"), 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


def attention(weights: Weights, tokens: torch.Tensor, context: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention of `tokens` `(queries, dim)` on `context` `(keys, context_dim)`; attention on nothing gives zero."""
    if len(context) == 0:
        return torch.zeros_like(tokens)
    query = linear(part(weights, "q_proj"), tokens)
    key = linear(part(weights, "k_proj"), context)
    value = linear(part(weights, "v_proj"), context)
    size = query.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        channels = slice(head * size, (head + 1) * size)
        scores = query[:, channels] @ key[:, channels].T / math.sqrt(size)
        heads.append(torch.softmax(scores, dim=1) @ value[:, channels])
    return linear(part(weights, "o_proj"), torch.cat(heads, dim=1))


def self_attention_layers(
    weights: Weights, tokens: torch.Tensor, config: FusMAEConfig, num: int, heads: int
) -> torch.Tensor:
    """The `layers` of encoder or decoder, `num` of them."""
    for number in range(num):
        layer = part(weights, f"layers.{number}")
        normed = layer_norm(part(layer, "layernorm_before"), tokens, config)
        tokens = tokens + attention(part(layer, "attention"), normed, normed, heads)
        tokens = tokens + mlp(part(layer, "mlp"), layer_norm(part(layer, "layernorm_after"), tokens, config))
    return tokens


# --- patches and positions -----------------------------------------------------------------------------------------


def given_sensors(inputs: dict) -> list[str]:
    return [sensor for sensor, suffix in SUFFIXES.items() if inputs.get(f"pixel_values{suffix}") is not None]


def patchify(image: torch.Tensor, size: int) -> torch.Tensor:
    """Patches of an image `(bands, height, width)`, row by row: `(patches, bands, size ** 2)`."""
    patches = []
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            patches.append(image[:, top : top + size, left : left + size].flatten(1))
    return torch.stack(patches)


def positions(config: FusMAEConfig, inputs: dict, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Of each patch, sine and cosine of its row, then of its column: `(patches, dim)`."""
    images = inputs[f"pixel_values{SUFFIXES[given_sensors(inputs)[0]]}"]
    scale = (inputs.get("gsd") or config.gsd) / config.gsd
    # In single precision for models of every dtype.
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    places = []
    for row in range(images.shape[2] // config.patch_size):
        for column in range(images.shape[3] // config.patch_size):
            of_row, of_column = row * scale * frequencies, column * scale * frequencies
            places.append(torch.cat([of_row.sin(), of_row.cos(), of_column.sin(), of_column.cos()]))
    return torch.stack(places).to(dtype)


def valid_pixels(config: FusMAEConfig, inputs: dict, sensor: str, sample: int) -> torch.Tensor:
    """Which pixels of a sample hold data, by patch: `(patches, patch_size ** 2)` bool."""
    images = inputs[f"pixel_values{SUFFIXES[sensor]}"]
    pixel_mask, available = inputs.get(f"pixel_mask{SUFFIXES[sensor]}"), inputs.get(f"{sensor}_available")
    valid = torch.ones(1, *images.shape[2:], dtype=torch.bool) if pixel_mask is None else pixel_mask[sample][None]
    valid = patchify(valid, config.patch_size)[:, 0]
    return valid if available is None or available[sample] else torch.zeros_like(valid)


# --- encoder -------------------------------------------------------------------------------------------------------


def embed(
    weights: Weights, config: FusMAEConfig, inputs: dict, sensor: str, sample: int, places: list[int]
) -> torch.Tensor:
    """Tokens of the patches `places` of one sample `(places, hidden_size)`: all are projected, then some taken."""
    images = inputs.get(f"pixel_values{SUFFIXES[sensor]}")
    if images is None:
        return weights["class_token.weight"].new_zeros(0, config.hidden_size)
    patches = patchify(images[sample], config.patch_size).flatten(1).to(weights["class_token.weight"].dtype)
    with_data = valid_pixels(config, inputs, sensor, sample).any(dim=1)
    patches = torch.where(with_data[:, None], patches, 0.0)
    tokens = linear(part(weights, f"{sensor}_projection"), patches)
    tokens = tokens + positions(config, inputs, config.hidden_size, tokens.dtype)
    return tokens[places]


def encode(
    weights: Weights, config: FusMAEConfig, inputs: dict, sample: int, places: dict[str, list[int]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Encode some patches of one sample, all of them with data.

    Returns:
        The class token `(1, hidden_size)`, and by sensor the tokens `(places, hidden_size)`.
    """
    embeddings, heads = part(weights, "embeddings"), config.num_attention_heads
    tokens = {sensor: embed(embeddings, config, inputs, sensor, sample, places[sensor]) for sensor in SUFFIXES}
    if config.early_fusion == "cross_attention":
        fusion = part(weights, "fusion")
        normed = {
            sensor: layer_norm(part(fusion, f"{sensor}_layernorm_before"), tokens[sensor], config) for sensor in tokens
        }
        for sensor, other in OTHER.items():
            cross = attention(part(fusion, f"{sensor}_attention"), normed[sensor], normed[other], heads)
            fused = tokens[sensor] + cross
            after = layer_norm(part(fusion, f"{sensor}_layernorm_after"), fused, config)
            tokens[sensor] = fused + mlp(part(fusion, f"{sensor}_mlp"), after)
    joint = torch.cat([embeddings["class_token.weight"], tokens["optical"], tokens["sar"]])
    joint = self_attention_layers(weights, joint, config, config.num_hidden_layers, heads)
    joint = layer_norm(part(weights, "layernorm"), joint, config)
    end = 1 + len(tokens["optical"])
    return joint[:1], {"optical": joint[1:end], "sar": joint[end:]}


def features(weights: Weights, config: FusMAEConfig, inputs: dict) -> dict[str, torch.Tensor | None]:
    """What FusMAEModel with these weights makes of its `inputs`, under the names of its outputs."""
    sensors = given_sensors(inputs)
    batch_size = len(inputs[f"pixel_values{SUFFIXES[sensors[0]]}"])
    classes, pooled = [], []
    maps: dict[str, list[torch.Tensor]] = {sensor: [] for sensor in sensors}
    for sample in range(batch_size):
        with_data = {sensor: valid_pixels(config, inputs, sensor, sample).any(dim=1) for sensor in sensors}
        places: dict[str, list[int]] = {"optical": [], "sar": []}
        places |= {sensor: with_data[sensor].nonzero().flatten().tolist() for sensor in sensors}
        class_token, tokens = encode(weights, config, inputs, sample, places)
        classes.append(class_token)
        pooled.append(torch.cat([tokens["optical"], tokens["sar"]]).mean(dim=0))
        for sensor in sensors:
            whole = [torch.zeros_like(class_token[0])] * len(with_data[sensor])
            for place, token in zip(places[sensor], tokens[sensor], strict=True):
                whole[place] = token
            maps[sensor].append(torch.stack(whole))
    hidden = {sensor: torch.stack(maps[sensor]) for sensor in sensors}
    return {
        "last_hidden_state": torch.cat([torch.stack(classes), *hidden.values()], dim=1),
        "optical_hidden_state": hidden.get("optical"),
        "sar_hidden_state": hidden.get("sar"),
        "pooler_output": torch.stack(pooled),
    }


# --- pretraining ---------------------------------------------------------------------------------------------------


def visible_patches(config: FusMAEConfig, noise: torch.Tensor, noise_sar: torch.Tensor) -> dict[str, list[int]]:
    """Patches of one sample that stay visible, by the noise `(patches,)` of each."""
    order = sorted(range(len(noise)), key=noise.tolist().__getitem__)
    order_sar = {
        "independent": sorted(range(len(noise)), key=noise_sar.tolist().__getitem__),
        "consistent": order,
        "complementary": order[::-1],
    }[config.mask_strategy]
    kept = {sensor: int(len(noise) * (1 - ratio) + 1e-6) for sensor, ratio in config.mask_ratios.items()}
    return {"optical": order[: kept["optical"]], "sar": order_sar[: kept["sar"]]}


def decode(
    weights: Weights, config: FusMAEConfig, inputs: dict, own: torch.Tensor, other: torch.Tensor, places: list[int]
) -> torch.Tensor:
    """Predict all patches of one sensor of one sample: `(patches, bands * patch_size ** 2)`.

    `own` are the encoder's tokens of this sensor, which belong at `places`, and `other` those of the other sensor.
    """
    heads = config.decoder_num_attention_heads
    tokens = linear(part(weights, "embed"), own)
    if config.feature_fusion == "latent":
        normed = layer_norm(part(weights, "fusion_layernorm"), tokens, config)
        tokens = tokens + attention(part(weights, "fusion_attention"), normed, other, heads)
    grid_positions = positions(config, inputs, config.decoder_hidden_size, tokens.dtype)
    whole = [weights["mask_token"].flatten()] * len(grid_positions)
    for place, token in zip(places, tokens, strict=True):
        whole[place] = token
    filled = torch.stack(whole) + grid_positions
    if config.feature_fusion == "query":
        context = other if config.decoder_context == "other" else torch.cat([other, own])
        normed = layer_norm(part(weights, "fusion_layernorm"), filled, config)
        filled = filled + attention(part(weights, "fusion_attention"), normed, context, heads)
    filled = self_attention_layers(weights, filled, config, config.decoder_num_hidden_layers, heads)
    return linear(part(weights, "predict"), layer_norm(part(weights, "layernorm"), filled, config))


def mean_error(
    config: FusMAEConfig, predicted: torch.Tensor, image: torch.Tensor, valid: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of one sample over the pixels with data in hidden patches, zero without any.

    Args:
        config: tells the patch size and whether targets are normalised.
        predicted: `(patches, bands * patch_size ** 2)`.
        image: `(bands, height, width)`.
        valid: `(patches, patch_size ** 2)` bool, which pixels hold data.
        hidden: `(patches,)` bool.
    """
    squares = [predicted.new_zeros(0)]
    for patch, guess, with_data, is_hidden in zip(
        patchify(image, config.patch_size).to(predicted.dtype), predicted, valid, hidden, strict=True
    ):
        if not is_hidden or not with_data.any():
            continue
        target = patch[:, with_data]
        if config.norm_pix_loss:
            variance = ((target - target.mean()) ** 2).mean()
            target = (target - target.mean()) / torch.sqrt(variance + 1e-6)
        squares.append((guess.reshape(patch.shape)[:, with_data] - target).square().flatten())
    errors = torch.cat(squares)
    return errors.mean() if len(errors) else errors.sum()


def pretraining(weights: Weights, config: FusMAEConfig, inputs: dict, training: bool) -> dict[str, torch.Tensor]:
    """What FusMAEForPreTraining with these weights makes of its `inputs`, under the names of its outputs.

    Both `noise` and `noise_sar` must be among the inputs. `training` tells whether modality dropout applies.
    """
    sensors = given_sensors(inputs)
    batch_size = len(inputs["noise"])
    lost = {sensor: int(batch_size * share + 1e-6) for sensor, share in config.modality_dropouts.items()}
    if not training or len(sensors) == 1:
        lost = {"optical": 0, "sar": 0}
    predictions: dict[str, list[torch.Tensor]] = {sensor: [] for sensor in sensors}
    masks: dict[str, list[torch.Tensor]] = {sensor: [] for sensor in sensors}
    errors: dict[str, list[torch.Tensor]] = {sensor: [] for sensor in sensors}
    for sample in range(batch_size):
        dropped = {"optical": sample < lost["optical"], "sar": sample >= batch_size - lost["sar"]}
        visible = visible_patches(config, inputs["noise"][sample], inputs["noise_sar"][sample])
        visible = {sensor: [] if dropped[sensor] else visible[sensor] for sensor in visible}
        valid = {sensor: valid_pixels(config, inputs, sensor, sample) for sensor in sensors}
        places: dict[str, list[int]] = {"optical": [], "sar": []}
        for sensor in sensors:
            places[sensor] = [place for place in visible[sensor] if valid[sensor][place].any()]
        _, tokens = encode(part(weights, "fusmae"), config, inputs, sample, places)
        for sensor in sensors:
            decoder, other = part(weights, f"{sensor}_decoder"), OTHER[sensor]
            predicted = decode(decoder, config, inputs, tokens[sensor], tokens[other], places[sensor])
            hidden = torch.tensor([place not in visible[sensor] for place in range(len(predicted))])
            targets, available = valid[sensor], inputs.get(f"{other}_available")
            if dropped[sensor] and available is not None and not available[sample]:
                targets = torch.zeros_like(targets)  # nothing tells of this sample
            image = inputs[f"pixel_values{SUFFIXES[sensor]}"][sample]
            predictions[sensor].append(predicted)
            masks[sensor].append(hidden)
            errors[sensor].append(mean_error(config, predicted, image, targets, hidden))
    results = {}
    for sensor in sensors:
        results[f"logits{SUFFIXES[sensor]}"] = torch.stack(predictions[sensor])
        results[f"mask{SUFFIXES[sensor]}"] = torch.stack(masks[sensor]).long()
        results[f"{sensor}_loss"] = torch.stack(errors[sensor]).mean()
    weight = {"optical": config.optical_loss_weight, "sar": config.sar_loss_weight}
    results["loss"] = torch.stack([weight[sensor] * results[f"{sensor}_loss"] for sensor in sensors]).sum()
    return results
