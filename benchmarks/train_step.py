"""How fast is a pretraining step beside other masked autoencoders, and how near to what the machine can do?

    python benchmarks/train_step.py --size base --batch_size 16
    python benchmarks/train_step.py --size base --batch_size 256 --compile      # on a GPU
    python benchmarks/train_step.py --peer <file.py>                            # a model of your own, or a checkout

A step is the forward and backward pass and an AdamW step, in bf16 autocast (float32 on a CPU that would only emulate
it). Models take turns within each round, so
that whatever else the machine does meets them alike; medians over the rounds are compared. ViTMAE is that of
transformers, on the 14 bands of both sensors in one stack. The peak is that of a product of large bf16 matrices,
measured in each round.

A `--peer` file defines `build(size, image_size, patch_size, mask_ratio)`, which returns a module and a function of it,
an optical batch `(batch, 12, height, width)` and a SAR batch `(batch, 2, height, width)` that returns the loss.
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining
from fusmae_hf.training.arguments import spell_out_attention
from fusmae_hf.training.loop.speed import emulates_bf16

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

PEAK_SIZE = {"cpu": 4096, "cuda": 8192}
"""Rows of the square matrices whose product gives the peak."""


@dataclass
class Contender:
    """A model in the race.

    Attributes:
        model: on the device, in training mode.
        loss: of the model, an optical batch and a SAR batch.
        flops: of the matrix products of one step of the whole batch, forward and backward.
        seconds: of each measured step.
        peak_memory: of the device during a step, in bytes; 0 where it is not known.
    """

    model: nn.Module
    loss: Loss
    flops: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0


def fusmae(arguments: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """Fus-MAE with its defaults, changed by `--config`."""
    config = FusMAEConfig.from_preset(
        arguments.size,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        mask_ratio=arguments.mask_ratio,
        **json.loads(arguments.config),
    )
    attention = {} if arguments.attention is None else {"attn_implementation": arguments.attention}
    model = FusMAEForPreTraining._from_config(config, **attention)
    if arguments.attention is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        spell_out_attention(model, device, (arguments.image_size, arguments.image_size))
    return model, lambda model, optical, sar: model(pixel_values=optical, pixel_values_sar=sar).loss


def vitmae(arguments: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """transformers' ViTMAE of the same width and depth, with its own default decoder (512 wide, 8 layers)."""
    reference = FusMAEConfig.from_preset(arguments.size)
    config = ViTMAEConfig(
        hidden_size=reference.hidden_size,
        num_hidden_layers=reference.num_hidden_layers + 1,
        num_attention_heads=reference.num_attention_heads,
        intermediate_size=reference.intermediate_size,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        num_channels=14,
        mask_ratio=arguments.mask_ratio,
    )
    model = ViTMAEForPreTraining._from_config(config, attn_implementation=arguments.attention or "sdpa")
    return model, lambda model, optical, sar: model(pixel_values=torch.cat([optical, sar], dim=1)).loss


def peer(path: Path, arguments: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """The model of a `--peer` file."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise SystemExit(f"--peer: {path} is no Python file.")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.build(arguments.size, arguments.image_size, arguments.patch_size, arguments.mask_ratio)


def machine_of(device: str) -> dict[str, str]:
    """What figures hold for: the device, the processor's architecture and the versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["precision"] = "bf16" if working_dtype(device) == torch.bfloat16 else "float32"
    return {"device": name, "machine": platform.machine(), **versions}


def working_dtype(device: str) -> torch.dtype:
    """bfloat16, or float32 on a CPU that would only emulate it."""
    return torch.float32 if device == "cpu" and emulates_bf16() else torch.bfloat16


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def train(contender: Contender, optimizer: torch.optim.Optimizer | None, images: Any, device: str) -> None:
    """One step; without an optimizer, its forward and backward pass."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=working_dtype(device) == torch.bfloat16):
        loss = contender.loss(contender.model, *images)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    contender.model.zero_grad()


def counted_flops(contender: Contender, images: Any, device: str) -> int:
    """FLOPs of the matrix products of a step, counted as it runs, on one pair times the batch.

    Counted with attention spelt out where the model is one of transformers: of fused attention, torch counts nothing
    on the CPU, and on a GPU what its backward pass computes again.
    """
    one = [image[:1] for image in images]
    used = None
    if isinstance(contender.model, PreTrainedModel):
        used = contender.model.config._attn_implementation
        contender.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        train(contender, None, one, device)
    if isinstance(contender.model, PreTrainedModel):
        contender.model.set_attn_implementation(used)
    return counter.get_total_flops() * len(images[0])


def peak_flops(device: str, size: int | None = None) -> float:
    """FLOP/s of the product of two matrices of `size` rows (default: `PEAK_SIZE`) in `working_dtype`, now."""
    size = size or PEAK_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=working_dtype(device)) for _ in range(2))
    repeats = 2 if device == "cpu" else 50
    a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    synchronize(device)
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Let the models take turns; pairs/s, FLOP/s, share of the peak and ratios of each."""
    torch.manual_seed(0)
    batch, size = arguments.batch_size, arguments.image_size
    images = [torch.randn(batch, bands, size, size, device=device) for bands in (12, 2)]
    made = {"FusMAE": fusmae(arguments)}
    if not arguments.alone:
        made["ViTMAE"] = vitmae(arguments)
    made |= {path.stem: peer(path, arguments) for path in arguments.peer}
    contenders = {name: Contender(model.to(device).train(), loss) for name, (model, loss) in made.items()}
    for contender in contenders.values():
        contender.flops = counted_flops(contender, images, device)
    if arguments.compile:
        for contender in contenders.values():
            contender.model.compile()
    optimizers = {
        name: torch.optim.AdamW(contender.model.parameters(), lr=1e-4, fused=True)
        for name, contender in contenders.items()
    }
    peaks: list[float] = []
    steps = arguments.steps or (1 if device == "cpu" else 10)
    for round_number in tqdm(range(arguments.rounds + 1), desc="rounds", leave=False):
        peaks.append(peak_flops(device))
        # The one after the product of matrices is slower on a CPU: each is the first one in turn.
        turns = list(contenders.items())
        for name, contender in turns if round_number % 2 else turns[::-1]:
            for _ in range(2 if device == "cuda" else 0):
                train(contender, optimizers[name], images, device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                train(contender, optimizers[name], images, device)
            synchronize(device)
            if round_number:  # the first one warms up
                contender.seconds.append((time.perf_counter() - start) / steps)
            if device == "cuda":
                contender.peak_memory = max(contender.peak_memory, torch.cuda.max_memory_allocated())
    peak = statistics.median(peaks[1:])
    first = statistics.median(contenders["FusMAE"].seconds)
    return {
        name: {
            "pairs_per_second": batch / statistics.median(contender.seconds),
            "fastest_and_slowest": [batch / max(contender.seconds), batch / min(contender.seconds)],
            "gflop_per_pair": contender.flops / batch / 1e9,
            "tflop_per_second": contender.flops / statistics.median(contender.seconds) / 1e12,
            "share_of_peak": contender.flops / statistics.median(contender.seconds) / peak,
            "peak_memory_gib": contender.peak_memory / 2**30 or None,
            "fusmae_is_faster": statistics.median(contender.seconds) / first,
            "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
        }
        for name, contender in contenders.items()
    } | {"peak_tflop_per_second": peak / 1e12}


def table(results: dict[str, Any]) -> str:
    """Markdown of what [`measure`] returns."""
    lines = [
        "| model | pairs/s (slowest to fastest round) | GFLOP a pair | TFLOP/s | share of the matrix peak | memory |"
    ]
    lines[0] += " FusMAE is faster |"
    lines.append("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        if not isinstance(found, dict):
            continue
        slow, fast = found["fastest_and_slowest"]
        memory = "" if found["peak_memory_gib"] is None else f"{found['peak_memory_gib']:.1f} GiB"
        lines.append(
            f"| {name} | {found['pairs_per_second']:.2f} ({slow:.2f} to {fast:.2f}) | {found['gflop_per_pair']:.1f} "
            f"| {found['tflop_per_second']:.3f} | {found['share_of_peak']:.0%} | {memory} "
            f"| {found['fusmae_is_faster']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "base", "large"], default="base")
    parser.add_argument("--image_size", type=int, default=120, help="in pixels (default 120)")
    parser.add_argument("--patch_size", type=int, default=8, help="in pixels (default 8)")
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--batch_size", type=int, default=16, help="pairs (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up (default 5)")
    parser.add_argument("--steps", type=int, help="steps in each round (default 1, on a GPU 10)")
    parser.add_argument(
        "--attention", help="implementation for all models (default: that of training/run_pretrain.py; ViTMAE sdpa)"
    )
    parser.add_argument("--config", default="{}", help="fields of FusMAEConfig that differ, as JSON")
    parser.add_argument("--peer", type=Path, nargs="*", default=[], help="files that build further models")
    parser.add_argument("--alone", action="store_true", help="FusMAE without ViTMAE")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = measure(arguments, device)
    machine = machine_of(device)
    print(
        f"{arguments.size}, {arguments.image_size} px, patch {arguments.patch_size}, {arguments.mask_ratio:.0%} "
        f"masked, batch {arguments.batch_size}, {machine['precision']}, {machine['device']}; peak "
        f"{results['peak_tflop_per_second']:.3f} TFLOP/s\n"
    )
    print(table(results))
    if arguments.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        settings |= {"peer": [path.stem for path in arguments.peer], "json": None}
        record = {**machine, "settings": settings, "results": results}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
