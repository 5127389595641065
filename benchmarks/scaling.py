"""How does the cost of a pretraining step grow with images, patches, model, batch and processes?

    python benchmarks/scaling.py --out scaling --quick      # two minutes on a CPU
    python benchmarks/scaling.py --out scaling

One thing at a time is changed from a centre. A step is the forward and backward pass and an AdamW step, in bf16
autocast, on one batch. Points take turns within each round; medians over the rounds. Beside each stands the time that
`fusmae_hf.flops` predicts from the rate, in FLOP/s, at the centre: a point above the line runs at a lower rate.

More processes each have a batch of the centre's size and an equal share of the machine: a GPU, or as many CPU threads
as one of the largest number of processes can have. Perfect scaling takes the time of the smallest number of processes.

Writes `scaling.json` and `scaling.png` and prints tables.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.ticker import NullLocator
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from train_step import Contender, machine_of, synchronize, train

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining
from fusmae_hf.flops import pretraining_flops
from fusmae_hf.plots.pairs import new_figure
from fusmae_hf.training.arguments import spell_out_attention


@dataclass(frozen=True)
class Point:
    """What is trained: a preset, square images and patches (px), pairs a process."""

    preset: str
    image_size: int
    patch_size: int
    batch_size: int

    @property
    def config(self) -> FusMAEConfig:
        """Configuration of the model."""
        return FusMAEConfig.from_preset(self.preset, image_size=self.image_size, patch_size=self.patch_size)

    @property
    def flops(self) -> float:
        """Of a step of one process."""
        return self.batch_size * pretraining_flops(self.config, self.image_size, self.image_size)


CENTRES = {
    "quick": Point("tiny", 48, 8, 8),
    "cpu": Point("small", 120, 8, 8),
    "cuda": Point("base", 120, 8, 128),
}
AXES: dict[str, dict[str, list[Any]]] = {
    "quick": {
        "image_size": [32, 48, 72, 96],
        "patch_size": [4, 6, 8, 12],
        "preset": ["tiny", "small", "base"],
        "batch_size": [4, 8, 16, 32],
    },
    "cpu": {
        "image_size": [72, 96, 120, 168],
        "patch_size": [6, 8, 12, 20],
        "preset": ["tiny", "small", "base"],
        "batch_size": [2, 4, 8, 16],
    },
    "cuda": {
        "image_size": [72, 120, 192, 240],
        "patch_size": [6, 8, 12, 20],
        "preset": ["small", "base", "large"],
        "batch_size": [32, 64, 128, 256],
    },
}
"""Values of each axis through the centre."""

LABELS = {
    "image_size": "image size, px",
    "patch_size": "patch size, px",
    "preset": "model size",
    "batch_size": "batch size, pairs",
    "processes": "processes",
}


def step_seconds(point: Point, device: str, steps: int, group: dist.ProcessGroup | None = None) -> float:
    """Seconds a step, after one of warm-up, of a fresh model; in each process of the group, where there is one."""
    torch.manual_seed(0)
    pretrained = FusMAEForPreTraining(point.config).to(device).train()
    spell_out_attention(pretrained, device, (point.image_size, point.image_size))
    model: torch.nn.Module = pretrained
    if group is not None:
        model = DistributedDataParallel(model, process_group=group)
    contender = Contender(model, lambda model, optical, sar: model(pixel_values=optical, pixel_values_sar=sar).loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = point.image_size
    images = [torch.randn(point.batch_size, bands, size, size, device=device) for bands in (12, 2)]
    for _ in range(3 if device == "cuda" else 1):
        train(contender, optimizer, images, device)
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        train(contender, optimizer, images, device)
    synchronize(device)
    return (time.perf_counter() - start) / steps


def measure_points(points: list[Point], device: str, rounds: int, steps: int) -> dict[Point, list[float]]:
    """Seconds a step of each point in each round, after a round of warm-up with the first point alone."""
    step_seconds(points[0], device, steps)
    seconds: dict[Point, list[float]] = {point: [] for point in points}
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for point in points:
            seconds[point].append(step_seconds(point, device, steps))
    return seconds


def train_in_process(
    rank: int, counts: list[int], point: Point, device: str, rounds: int, steps: int, threads: int, folder: str
) -> None:
    """What each process does: the first n train together, for each n of `counts` in turn; the first one writes."""
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=max(counts),
    )
    groups = {count: dist.new_group(list(range(count))) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for round_number in range(rounds + 1):
        for count, group in groups.items():
            if rank < count:
                one = step_seconds(point, device, steps, group if count > 1 else None)
                if round_number:  # the first one warms up
                    seconds[count].append(one)
            dist.barrier()
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(list(seconds.items())))
    dist.destroy_process_group()


def measure_processes(counts: list[int], point: Point, device: str, rounds: int, steps: int) -> dict[int, list[float]]:
    """Seconds a step by number of processes, in each round."""
    threads = max(1, torch.get_num_threads() // max(counts))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (counts, point, device, rounds, steps, threads, folder)
        torch.multiprocessing.spawn(train_in_process, arguments, nprocs=max(counts))
        return dict(json.loads((Path(folder) / "seconds.json").read_text()))


def row_of(value: Any, seconds: list[float], flops: float, predicted: float) -> dict[str, Any]:
    """Figures of one point of an axis; `predicted` is in seconds, `flops` are of a step of all processes."""
    median = statistics.median(seconds)
    return {
        "value": value,
        "seconds": median,
        "fastest_and_slowest": [min(seconds), max(seconds)],
        "predicted_seconds": predicted,
        "measured_to_predicted": median / predicted,
        "gflop": flops / 1e9,
    }


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """`{"centre": fields, "axes": {axis: rows}}`."""
    kind = "quick" if arguments.quick else device
    given = {name: getattr(arguments, name) for name in ("preset", "image_size", "patch_size", "batch_size")}
    centre = dataclasses.replace(CENTRES[kind], **{name: value for name, value in given.items() if value is not None})
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    steps = arguments.steps or (10 if device == "cuda" else 1)
    points: dict[str, list[Point]] = {}
    for axis, values in AXES[kind].items():
        if axis in arguments.axes:
            through = {*values, getattr(centre, axis)}
            points[axis] = [dataclasses.replace(centre, **{axis: value}) for value in through]
            points[axis].sort(key=lambda point: point.flops, reverse=axis == "patch_size")
    every = list(dict.fromkeys([centre, *(point for axis in points.values() for point in axis)]))
    seconds = measure_points(every, device, rounds, steps)
    rate = centre.flops / statistics.median(seconds[centre])
    axes = {
        axis: [row_of(getattr(point, axis), seconds[point], point.flops, point.flops / rate) for point in of_axis]
        for axis, of_axis in points.items()
    }
    if "processes" in arguments.axes:
        there = list(range(1, torch.cuda.device_count() + 1)) if device == "cuda" else [1, 2]
        counts = sorted(set(arguments.processes or there))
        of_count = measure_processes(counts, centre, device, rounds, steps)
        first = statistics.median(of_count[counts[0]])
        axes["processes"] = [row_of(count, of_count[count], count * centre.flops, first) for count in counts]
    return {"centre": dataclasses.asdict(centre), "axes": axes}


def table(results: dict[str, Any]) -> str:
    """Markdown of what [`measure`] returns."""
    lines = []
    for axis, rows in results["axes"].items():
        lines += [
            f"| {LABELS[axis]} | seconds a step (fastest to slowest round) | predicted | measured to predicted |",
            "|---|---|---|---|",
        ]
        for row in rows:
            fast, slow = row["fastest_and_slowest"]
            lines.append(
                f"| {row['value']} | {row['seconds']:.4f} ({fast:.4f} to {slow:.4f}) | {row['predicted_seconds']:.4f} "
                f"| {row['measured_to_predicted']:.2f}x |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any], title: str) -> Any:
    """A figure with a panel for each axis: what was measured, and the line that the FLOPs predict."""
    axes = results["axes"]
    figure = new_figure(max(3.2 * len(axes), 8), 3.4)
    for panel, (axis, rows) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        values = [row["value"] for row in rows]
        places = range(len(values)) if axis == "preset" else values
        medians = [row["seconds"] for row in rows]
        spread = [
            [row["seconds"] - row["fastest_and_slowest"][0] for row in rows],
            [row["fastest_and_slowest"][1] - row["seconds"] for row in rows],
        ]
        panel.plot(places, [row["predicted_seconds"] for row in rows], color="0.6", label="predicted by FLOPs")
        panel.errorbar(places, medians, spread, fmt="o", color="C0", label="measured")
        if axis != "preset":
            panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(places, [str(value) for value in values])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
        panel.yaxis.set_minor_formatter(lambda seconds, _: f"{seconds:g}")
        panel.tick_params(axis="y", which="both", labelsize="small")
        panel.set_xlabel(LABELS[axis])
    figure.axes[0].set_ylabel("seconds a step")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def main() -> None:
    """Measure, print, and write the figures and their picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for scaling.json and scaling.png")
    parser.add_argument("--quick", action="store_true", help="small images and models")
    parser.add_argument("--axes", nargs="+", choices=list(LABELS), default=list(LABELS), help="default all")
    parser.add_argument("--preset", choices=["tiny", "small", "base", "large"], help="of the centre")
    parser.add_argument("--image_size", type=int, help="of the centre, in pixels")
    parser.add_argument("--patch_size", type=int, help="of the centre, in pixels")
    parser.add_argument("--batch_size", type=int, help="of the centre, pairs a process")
    parser.add_argument("--processes", type=int, nargs="+", help="default 1 and 2; on GPUs as many as there are")
    parser.add_argument("--rounds", type=int, help="measured rounds (default 5, quick 3)")
    parser.add_argument("--steps", type=int, help="steps in each round (default 1, on a GPU 10)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = machine_of(device)
    results = measure(arguments, device)
    title = (
        "A pretraining step around that of {preset}, {image_size} px, patch {patch_size}, batch {batch_size}; bf16, "
        "{device}".format(**results["centre"], **machine)
    )
    print(f"{title}\n\n{table(results)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    record = {**machine, "settings": settings, "results": results}
    (arguments.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, title).savefig(arguments.out / "scaling.png", dpi=110)


if __name__ == "__main__":
    main()
