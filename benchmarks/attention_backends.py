"""Which attention implementation makes a pretraining step fastest here? Prints one table.

    python benchmarks/attention_backends.py --preset tiny --batch_size 16

Implementations take turns within each round, so that whatever else the machine does meets them alike; the medians over
the rounds are compared.
"""

import argparse
import statistics
import time

import torch

from fusmae_hf import PRESETS, FusMAEConfig, FusMAEForPreTraining


def pretraining_step(model: FusMAEForPreTraining, inputs: dict[str, torch.Tensor], bf16: bool) -> None:
    """Forward and backward pass of one batch."""
    with torch.autocast(inputs["pixel_values"].device.type, dtype=torch.bfloat16, enabled=bf16):
        loss = model(**inputs).loss
    loss.backward()
    model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--patch_size", type=int, default=8, help="in pixels (default 8)")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs (default 16)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up (default 5)")
    parser.add_argument("--implementations", nargs="+", default=["eager", "sdpa"])
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = FusMAEConfig.from_preset(arguments.preset, patch_size=arguments.patch_size)
    torch.manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(arguments.batch_size, 12, 120, 120, device=device),
        "pixel_values_sar": torch.randn(arguments.batch_size, 2, 120, 120, device=device),
    }
    models = {
        name: FusMAEForPreTraining._from_config(config, attn_implementation=name).to(device)
        for name in arguments.implementations
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(arguments.rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            pretraining_step(model, inputs, bf16=not arguments.fp32)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    device_name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.preset}, {'fp32' if arguments.fp32 else 'bf16'}, batch {arguments.batch_size}, {device_name}\n")
    print("| attention | pairs/s | against the first |\n|---|---|---|")
    first = statistics.median(seconds[arguments.implementations[0]])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {arguments.batch_size / median:.1f} | {first / median:.2f} |")


if __name__ == "__main__":
    main()
