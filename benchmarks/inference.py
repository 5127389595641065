"""How fast does Fus-MAE give features of both sensors or of one, and how fast is a saved model there?

    python benchmarks/inference.py --preset base --batch_size 16
    python benchmarks/inference.py --preset base --batch_size 256 --compile      # on a GPU

Latency is that of one pair, the rate that of a batch. Ways take turns within each round, so that whatever else the
machine does meets them alike; medians over the rounds are compared. ViT is that of transformers, of the same width and
depth, on the 14 bands of both sensors in one stack: half the tokens of Fus-MAE with both sensors.

Loading is measured in a fresh process each time, everything imported: the time of `from_pretrained`, and the peak
resident memory above that before, which counts the pages of the mapped file (Linux only).
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from tqdm import tqdm
from train_step import machine_of, synchronize
from transformers import ViTConfig, ViTModel

from fusmae_hf import FusMAEConfig, FusMAEModel

INPUTS = {
    "both sensors": ("pixel_values", "pixel_values_sar"),
    "optical alone": ("pixel_values",),
    "SAR alone": ("pixel_values_sar",),
}
"""What Fus-MAE is given."""

PRECISIONS = {
    "fp32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "bf16 weights": (torch.bfloat16, False),
}
"""Type of the weights and images, and whether autocast is on."""

Images = dict[str, torch.Tensor]


@dataclass
class Way:
    """A way to features.

    Attributes:
        labels: model, inputs, precision and mode.
        dtype: of the images.
        features: of images by name of the input.
        seconds: of each measured call, by batch size.
    """

    labels: dict[str, str]
    dtype: torch.dtype
    features: Callable[[Images], Any]
    seconds: dict[int, list[float]] = field(default_factory=dict)


def reference_config(config: FusMAEConfig) -> ViTConfig:
    """A ViT of the same width and depth, the early fusion counted as a layer, on the bands of both sensors."""
    return ViTConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers + 1,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=len(config.optical_bands) + len(config.sar_bands),
    )


def make_models(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Fus-MAE and the ViT, freshly drawn, to evaluate."""
    fields = {"image_size": arguments.image_size, "patch_size": arguments.patch_size, **json.loads(arguments.config)}
    config = FusMAEConfig.from_preset(arguments.preset, **fields)
    vit = ViTModel(reference_config(config), add_pooling_layer=False)
    return {"FusMAE": FusMAEModel(config).eval(), "ViT, 14 bands": vit.eval()}


def make_ways(arguments: argparse.Namespace, device: str) -> list[Way]:
    """Every model with its inputs, in each precision, eager and compiled."""
    torch._dynamo.config.recompile_limit = 64  # one graph for each way and batch size
    models: dict[torch.dtype, dict[str, nn.Module]] = {}
    ways = []
    for precision, (dtype, autocast) in PRECISIONS.items():
        if dtype not in models:
            models[dtype] = {name: model.to(device, dtype) for name, model in make_models(arguments).items()}
        for name, model in models[dtype].items():
            for label, inputs in (INPUTS if name == "FusMAE" else {"both sensors": ("stacked",)}).items():
                for mode in ("eager", "compiled") if arguments.compile else ("eager",):
                    labels = {"model": name, "inputs": label, "precision": precision, "mode": mode}
                    run = torch.compile(model, dynamic=False) if mode == "compiled" else model
                    context = torch.autocast(device, dtype=torch.bfloat16, enabled=autocast)
                    ways.append(Way(labels, dtype, features_of(run, inputs, context)))
    return ways


def features_of(
    model: Callable[..., Any], inputs: tuple[str, ...], context: AbstractContextManager[Any]
) -> Callable[[Images], Any]:
    """A call of the model on its inputs, without gradients."""

    def features(images: Images) -> Any:
        given = {"pixel_values" if name == "stacked" else name: images[name] for name in inputs}
        with torch.inference_mode(), context:
            return model(**given)

    return features


def time_ways(ways: list[Way], arguments: argparse.Namespace, device: str) -> None:
    """Let the ways take turns, one pair and a batch each."""
    size, repeats = arguments.image_size, arguments.repeats or (1 if device == "cpu" else 10)
    images: dict[tuple[int, torch.dtype], Images] = {}
    for batch in {1, arguments.batch_size}:
        for dtype in {way.dtype for way in ways}:
            optical, sar = (torch.randn(batch, bands, size, size, device=device, dtype=dtype) for bands in (12, 2))
            stacked = torch.cat([optical, sar], dim=1)
            images[batch, dtype] = {"pixel_values": optical, "pixel_values_sar": sar, "stacked": stacked}
    for round_number in tqdm(range(arguments.rounds + 1), desc="rounds", leave=False):
        for way in ways:
            for batch in {1, arguments.batch_size}:
                given = images[batch, way.dtype]
                for _ in range(2 if device == "cuda" else 0):
                    way.features(given)
                synchronize(device)
                start = time.perf_counter()
                for _ in range(repeats):
                    way.features(given)
                synchronize(device)
                if round_number:  # the first one warms up
                    way.seconds.setdefault(batch, []).append((time.perf_counter() - start) / repeats)


def rows_of(ways: list[Way], batch_size: int) -> list[dict[str, Any]]:
    """Latency and rate of each way, and their ratios to those of both sensors in the same precision and mode."""
    rows: list[dict[str, Any]] = []
    for way in ways:
        one, many = way.seconds[1], way.seconds[batch_size]
        slowest_and_fastest = [batch_size / max(many), batch_size / min(many)]
        rows.append(
            {
                **way.labels,
                "latency_ms": 1e3 * statistics.median(one),
                "pairs_per_second": batch_size / statistics.median(many),
                "slowest_and_fastest": slowest_and_fastest,
            }
        )
    both = {
        (row["precision"], row["mode"]): row
        for row in rows
        if row["model"] == "FusMAE" and row["inputs"] == "both sensors"
    }
    for row in rows:
        reference = both[row["precision"], row["mode"]]
        row["latency_to_both"] = row["latency_ms"] / reference["latency_ms"]
        row["rate_to_both"] = row["pairs_per_second"] / reference["pairs_per_second"]
    return rows


def resident_memory(peak: bool) -> int | None:
    """Resident memory of this process in bytes, now or at its peak since that was reset; None where unknown."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def load(folder: str, model: str, to: str) -> dict[str, Any]:
    """Load a saved model, in the process that calls this.

    Args:
        folder: of the checkpoint.
        model: a name of `make_models`.
        to: `"cpu"`, `"device_map"`, or `".to"` for the CPU first and then the GPU.

    Returns:
        `seconds`; `host_bytes`, peak resident memory above that before; `device_bytes`, the GPU's peak.
    """
    load_model: Callable[..., nn.Module] = FusMAEModel.from_pretrained
    if model != "FusMAE":
        load_model = functools.partial(ViTModel.from_pretrained, add_pooling_layer=False)
    device = "cpu" if to == "cpu" else "cuda"
    torch.zeros(1, device=device)  # starting CUDA is no part of it
    if Path("/proc/self/clear_refs").is_file():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_memory(peak=False)
    start = time.perf_counter()
    loaded = load_model(folder, **({"device_map": device} if to == "device_map" else {}))
    if to == ".to":
        loaded.to(device)
    synchronize(device)
    seconds, peak = time.perf_counter() - start, resident_memory(peak=True)
    return {
        "seconds": seconds,
        "host_bytes": None if before is None or peak is None else peak - before,
        "device_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def measure_loading(arguments: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Medians of [`load`] over fresh processes, beside the size of the weights on the disk."""
    targets = ["cpu", "device_map", ".to"] if device == "cuda" else ["cpu"]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    on_disk = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in make_models(arguments).items():
            folder = Path(temporary) / name
            model.save_pretrained(folder)  # type: ignore[operator]
            on_disk[name] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for _ in tqdm(range(arguments.load_rounds), desc="loading", leave=False):
            for name in on_disk:
                for to in targets:
                    spawn = multiprocessing.get_context("spawn")
                    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as fresh:
                        one = fresh.submit(load, str(Path(temporary) / name), name, to).result()
                    found.setdefault((name, to), []).append(one)
    rows = []
    for (name, to), several in found.items():
        row = {"model": name, "to": to, "bytes_on_disk": on_disk[name]}
        for key in several[0]:
            known = [one[key] for one in several if one[key] is not None]
            row[key] = statistics.median(known) if known else None
        rows.append(row)
    return rows


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """`{"features": rows, "loading": rows}`."""
    torch.manual_seed(0)
    ways = make_ways(arguments, device)
    time_ways(ways, arguments, device)
    return {"features": rows_of(ways, arguments.batch_size), "loading": measure_loading(arguments, device)}


def table(results: dict[str, Any]) -> str:
    """Markdown of what [`measure`] returns."""
    lines = [
        "| model | inputs | precision | mode | one pair, ms | to both sensors | pairs/s (slowest to fastest round) "
        "| to both sensors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["features"]:
        slow, fast = row["slowest_and_fastest"]
        lines.append(
            f"| {row['model']} | {row['inputs']} | {row['precision']} | {row['mode']} | {row['latency_ms']:.2f} "
            f"| {row['latency_to_both']:.2f}x | {row['pairs_per_second']:.1f} ({slow:.1f} to {fast:.1f}) "
            f"| {row['rate_to_both']:.2f}x |"
        )
    lines += [
        "",
        "| `from_pretrained` | to | seconds | peak of the host | peak of the device | weights on disk |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["loading"]:
        memory = [
            f"{row[key] / 2**20:.1f} MiB" if row[key] is not None else "-" for key in ("host_bytes", "device_bytes")
        ]
        lines.append(
            f"| {row['model']} | {row['to']} | {row['seconds']:.3f} | {memory[0]} | {memory[1]} "
            f"| {row['bytes_on_disk'] / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "small", "base", "large"], default="base")
    parser.add_argument("--image_size", type=int, default=120, help="in pixels (default 120)")
    parser.add_argument("--patch_size", type=int, default=8, help="in pixels (default 8)")
    parser.add_argument("--config", default="{}", help="fields of FusMAEConfig that differ, as JSON")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up (default 5)")
    parser.add_argument("--repeats", type=int, help="calls in each round (default 1, on a GPU 10)")
    parser.add_argument("--load_rounds", type=int, default=3, help="fresh processes for each load (default 3)")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def main() -> None:
    """Measure and print."""
    arguments = make_parser().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = machine_of(device)
    results = measure(arguments, device)
    print(
        f"{arguments.preset}, {arguments.image_size} px, patch {arguments.patch_size}, batches of 1 and "
        f"{arguments.batch_size}, {machine['device']}\n"
    )
    print(table(results))
    if arguments.json is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({**machine, "settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
