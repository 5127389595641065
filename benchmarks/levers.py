"""What does each means of making a pretraining step fast bring here? Prints one table.

    OMP_NUM_THREADS=2 python benchmarks/levers.py
    python benchmarks/levers.py --batch_size 256 --compile      # on a GPU

One thing at a time differs from the model as it is. Ways take turns within each round, in random order, so that
whatever else the machine does meets them alike; medians over the rounds are compared. A step is the forward and
backward pass and an AdamW step, in bf16 autocast. Ways that must not change the result are compared with the model as
it is before anything is measured.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from tqdm import tqdm
from train_step import machine_of, peak_flops, synchronize

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining
from fusmae_hf.flops import pretraining_flops
from fusmae_hf.modeling import modeling_fusmae as modeling
from fusmae_hf.training.arguments import spell_out_attention

TOLERANCE = 2e-2
"""Relative difference of losses in bf16 up to which a result counts as unchanged."""


@dataclass
class Way:
    """A way to train.

    Attributes:
        changes: entered around each step.
        fields: of the configuration that differ; the result differs with them.
        attention: implementation, where it is not that of training.
        compiled: whether the model is compiled.
        checkpointing: whether activations are computed again in the backward pass.
        optimizer: arguments of AdamW; None leaves its step out.
        seconds: of each measured step.
    """

    changes: Callable[[], AbstractContextManager] = nullcontext
    fields: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    compiled: bool = False
    checkpointing: bool = False
    optimizer: dict[str, Any] | None = field(default_factory=lambda: {"fused": True})
    seconds: list[float] = field(default_factory=list)


def project_everything(
    self: modeling.FusMAEEmbeddings,
    images: torch.Tensor,
    sensor: str,
    ids_keep: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Embed every patch and choose the visible ones then, as many masked autoencoders do."""
    projection = getattr(self, f"{sensor}_projection")
    rows, columns = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
    tokens = projection(modeling.patchify(images, self.patch_size).flatten(2))
    positions = modeling.position_embeddings(
        rows, columns, tokens.shape[-1], tokens.device, projection.weight.dtype, scale
    )
    return modeling.take_tokens(tokens + positions, ids_keep)


def attend_fused(
    self: modeling.FusMAEAttention,
    hidden_states: torch.Tensor,
    context: torch.Tensor,
    attention_mask: None,
    *args,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with queries, keys and values of self-attention from one product of the three weights in a row."""
    if hidden_states is not context:
        return ATTEND(self, hidden_states, context, attention_mask, *args, **kwargs)
    parts = (self.q_proj, self.k_proj, self.v_proj)
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    joint = nn.functional.linear(hidden_states, weight, bias)
    query, key, value = joint.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    attention = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, modeling.eager_attention_forward
    )
    output, weights = attention(self, query, key, value, None, scaling=self.scaling)
    return self.o_proj(output.reshape(*hidden_states.shape)), weights


ATTEND = modeling.FusMAEAttention.attend


def masked_ids(mask: torch.Tensor, masked: int) -> torch.Tensor:
    """Numbers of the masked patches, `(batch_size, masked)`, in their order."""
    return mask.argsort(dim=1, descending=True, stable=True)[:, :masked]


def decode_masked(
    self: modeling.FusMAEDecoder,
    grid: tuple[int, int],
    own: torch.Tensor,
    other: torch.Tensor,
    ids_keep: torch.Tensor,
    own_present: None = None,
    other_present: None = None,
    scale: float = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Predict the masked patches alone: the last layer has queries for them alone. For `feature_fusion="query"`."""
    hidden_states = self._fill_grid(grid, self.embed(own), other, ids_keep, None, scale)
    context = torch.cat([other, own], dim=1) if self.decoder_context == "all" else other
    fused, _ = self.fusion_attention(self.fusion_layernorm(hidden_states), context, None)
    hidden_states = hidden_states + fused
    for layer in self.layers[:-1]:
        hidden_states = layer(hidden_states, None)
    patches = grid[0] * grid[1]
    ids, last = masked_ids(modeling.masked_patches(ids_keep, patches), patches - ids_keep.shape[1]), self.layers[-1]
    normed = last.layernorm_before(hidden_states)
    attended, _ = last.attention.attend(modeling.take_tokens(normed, ids), normed, None)
    hidden_states = modeling.take_tokens(hidden_states, ids) + attended
    hidden_states = hidden_states + last.mlp(last.layernorm_after(hidden_states))
    return self.predict(self.layernorm(hidden_states)), None


def error_of_masked(
    self: FusMAEForPreTraining, logits: torch.Tensor, images: torch.Tensor, mask: torch.Tensor, *args
) -> torch.Tensor:
    """Reconstruction error where the predictions are those of the masked patches alone."""
    target = modeling.take_tokens(modeling.patchify(images, self.config.patch_size), masked_ids(mask, logits.shape[1]))
    ones = torch.ones_like(target[:, :, 0, 0], dtype=torch.long)
    return modeling.reconstruction_error(logits, target, ones, None, self.config.norm_pix_loss)


@contextmanager
def only_masked_decoded() -> Iterator[None]:
    """Decode and compare the masked patches alone."""
    with (
        patch.object(modeling.FusMAEDecoder, "forward", decode_masked),
        patch.object(FusMAEForPreTraining, "sensor_error", error_of_masked),
    ):
        yield


def ways(compiled: bool) -> dict[str, Way]:
    """All that is compared, the model as it is first."""
    found = {
        "as it is": Way(),
        "every patch projected, then gathered": Way(
            partial(patch.object, modeling.FusMAEEmbeddings, "forward", project_everything)
        ),
        "PyTorch's fused attention everywhere": Way(attention="sdpa"),
        "each of q, k, v casts its input": Way(partial(patch.object, modeling, "cast_once", lambda values: values)),
        "q, k, v in one product": Way(partial(patch.object, modeling.FusMAEAttention, "attend", attend_fused)),
        "masked patches alone decoded": Way(only_masked_decoded),
        "no decoder layers (a bound; another result)": Way(fields={"decoder_num_hidden_layers": 0}),
        "activations computed again": Way(checkpointing=True),
        "AdamW not fused (foreach)": Way(optimizer={"foreach": True}),
        "AdamW, a loop over the tensors": Way(optimizer={"foreach": False}),
        "no optimizer step (a bound)": Way(optimizer=None),
    }
    if compiled:
        found["compiled"] = Way(compiled=True)
    return found


def loss_of(model: FusMAEForPreTraining, images: Any, device: str, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of a batch in bf16 autocast."""
    with torch.autocast(device, dtype=torch.bfloat16):
        return model(
            pixel_values=images[0], pixel_values_sar=images[1], noise=noise, noise_sar=noise, return_dict=True
        ).loss


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Let the ways take turns; pairs/s of each."""
    torch.manual_seed(0)
    compared = ways(arguments.compile)
    config = FusMAEConfig.from_preset(arguments.preset)
    size, batch = config.image_size, arguments.batch_size
    images = [torch.randn(batch, bands, size, size, device=device) for bands in (12, 2)]
    noise = torch.rand(batch, (size // config.patch_size) ** 2, device=device)
    plain = FusMAEForPreTraining(config).to(device).train()
    spell_out_attention(plain, device, (size, size))
    expected, models = loss_of(plain, images, device, noise).item(), {}
    for name, way in compared.items():
        model = plain
        if way.fields or way.attention or way.compiled or way.checkpointing:
            model = FusMAEForPreTraining(FusMAEConfig.from_preset(arguments.preset, **way.fields))
            model.load_state_dict(plain.state_dict(), strict=not way.fields)
            model = model.to(device).train()
            model.set_attn_implementation(way.attention or plain.config._attn_implementation)
        if way.checkpointing:
            model.activation_checkpointing_enable()
        if way.compiled:
            model.compile(fullgraph=True)
        models[name] = model
        with way.changes():
            found = loss_of(model, images, device, noise).item()
        if not way.fields and abs(found - expected) > TOLERANCE * abs(expected):
            raise SystemExit(f"{name}: the loss is {found}, but {expected} with the model as it is.")
    steps = {
        name: None if way.optimizer is None else torch.optim.AdamW(models[name].parameters(), lr=1e-5, **way.optimizer)
        for name, way in compared.items()
    }
    peaks, order = [], random.Random(0)
    repeats = 1 if device == "cpu" else 10
    for round_number in tqdm(range(arguments.rounds + 1), desc="rounds", leave=False):
        peaks.append(peak_flops(device))
        for name in order.sample(list(compared), len(compared)):
            way, optimizer, model = compared[name], steps[name], models[name]
            synchronize(device)
            start = time.perf_counter()
            with way.changes():
                for _ in range(repeats):
                    loss_of(model, images, device).backward()
                    if optimizer is not None:
                        optimizer.step()
                    model.zero_grad()
            synchronize(device)
            if round_number:  # the first one warms up
                way.seconds.append((time.perf_counter() - start) / repeats)
    seconds = {name: statistics.median(way.seconds) for name, way in compared.items()}
    peak = statistics.median(peaks[1:])
    return {
        "peak_tflop_per_second": peak / 1e12,
        "share_of_peak_as_it_is": pretraining_flops(config, size, size) * batch / seconds["as it is"] / peak,
        "ways": {
            name: {"pairs_per_second": batch / of_way, "time_against_as_it_is": of_way / seconds["as it is"]}
            for name, of_way in seconds.items()
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "small", "base", "large"], default="base")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs (default 16)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one of warm-up (default 7)")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = machine_of(device)
    results = measure(arguments, device)
    print(f"{arguments.preset}, batch {arguments.batch_size}, bf16, {machine['device']}\n")
    print(f"Matrix peak {results['peak_tflop_per_second']:.3f} TFLOP/s, ", end="")
    print(f"of which the model as it is uses {results['share_of_peak_as_it_is']:.0%}.\n")
    print("| way | pairs/s | time of a step |\n|---|---|---|")
    for name, found in results["ways"].items():
        print(f"| {name} | {found['pairs_per_second']:.2f} | {found['time_against_as_it_is'] - 1:+.1%} |")
    if arguments.json is not None:
        settings = {"preset": arguments.preset, "batch_size": arguments.batch_size, "rounds": arguments.rounds}
        arguments.json.write_text(json.dumps({**machine, "settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
