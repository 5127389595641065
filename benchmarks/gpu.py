"""What a GPU says about Fus-MAE, within four minutes on one of them: pairs/s, MFU and memory of tiny to large.

    python benchmarks/gpu.py --out gpu
    PYTHONPATH=. python benchmarks/gpu.py --out gpu                    # from a checkout that is not installed
    python benchmarks/gpu.py --out gpu --minutes 30 --only "small|large"
    python benchmarks/gpu.py --out trial --device cpu --tiny           # a trial of the script, no measurement

Needs no network, and of the packages torch, transformers, accelerate, numpy, pyarrow, xxhash, PyYAML, jinja2, pillow,
tqdm and matplotlib.

Pieces run one after the other, sizes from tiny to large, each in a process of its own, so that memory and compiled
graphs are its own and an error ends it alone. A piece that takes too long is stopped. When the time is over, those
that are left, the largest and then the levers, are not measured. `gpu.json` is written after each figure, and
`gpu.md` after each piece.

A step is the forward and backward pass and an AdamW step, in bf16 autocast (float32 on a CPU that would only emulate
it), on one batch of random images in the memory of the device; "compiled" compiles each layer, one graph for all
alike. ViTMAE is that of transformers; see `train_step.py`. FLOPs are those of the matrix products and attentions that
the result needs. MFU is their rate over that of a product of large matrices, measured in turn with the steps.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import inference
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from train_step import fusmae, machine_of, peak_flops, synchronize, vitmae, working_dtype
from transformers.modeling_layers import GradientCheckpointingLayer

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.pairs import Pair
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions

Figures = dict[str, Any]
Step = Callable[[torch.Tensor, torch.Tensor], None]

BUILDERS = {"FusMAE": fusmae, "ViTMAE": vitmae}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are those of a GPU.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        presets: model sizes, in this order.
        focus: the one whose levers, transfers, training and inference are measured.
        image_size, patch_size: in pixels.
        config: fields of FusMAEConfig that differ, as JSON.
        batch_sizes: to try, increasing.
        rounds: measured ones.
        steps: in each round.
        backend: of torch.compile.
        peak_size: rows of the matrices whose product gives the peak; None for those of `train_step.py`.
        pairs: simulated, to train on from shards.
        training_steps: of that run.
        workers: of its loader.
    """

    device: str
    presets: tuple[str, ...] = ("tiny", "small", "base", "large")
    focus: str = "base"
    image_size: int = 120
    patch_size: int = 8
    config: str = "{}"
    batch_sizes: tuple[int, ...] = (64, 256, 1024)
    rounds: int = 3
    steps: int = 5
    backend: str = "inductor"
    peak_size: int | None = None
    pairs: int = 2048
    training_steps: int = 24
    workers: int = 8


TINY: dict[str, Any] = {
    "presets": ("tiny",),
    "focus": "tiny",
    "image_size": 24,
    "config": '{"num_hidden_layers": 1}',
    "batch_sizes": (2, 4),
    "rounds": 1,
    "steps": 1,
    "backend": "aot_eager",
    "peak_size": 256,
    "pairs": 32,
    "training_steps": 4,
    "workers": 0,
}
"""Settings for a trial of the script."""


@dataclass(frozen=True)
class Variant:
    """A way to take a step.

    Attributes:
        preset: model size.
        model: a key of `BUILDERS`.
        attention: implementation.
        compiled: `""` for eager; `"layers"`, each layer for itself; `"loss"`, forward and backward pass in one graph
            each; `"step"`, and the optimiser too; `"graphs"`, forward and backward pass as CUDA graphs.
        fused: whether AdamW is one kernel. Where not, it is one for each operation on many tensors (foreach).
        checkpointing: whether activations are computed again in the backward pass.
    """

    preset: str
    model: str = "FusMAE"
    attention: str = "sdpa"
    compiled: str = ""
    fused: bool = True
    checkpointing: bool = False

    def build(self, settings: Settings) -> tuple[torch.nn.Module, Any]:
        """The model, and its loss as a function of it, an optical and a SAR batch."""
        return BUILDERS[self.model](
            argparse.Namespace(
                size=self.preset,
                image_size=settings.image_size,
                patch_size=settings.patch_size,
                mask_ratio=0.75,
                config=settings.config,
                attention=self.attention,
            )
        )


def random_images(settings: Settings, batch: int, device: str) -> list[torch.Tensor]:
    """An optical and a SAR batch."""
    size = settings.image_size
    return [torch.randn(batch, bands, size, size, device=device) for bands in (12, 2)]


def flops_per_pair(settings: Settings, variant: Variant) -> int:
    """FLOPs of the forward and backward pass that the result needs: counted without data, with attention spelt out."""
    model, loss_of = dataclasses.replace(variant, attention="eager").build(settings)
    with FlopCounterMode(display=False) as counter:
        loss_of(model.to("meta").train(), *random_images(settings, 1, "meta")).backward()
    return counter.get_total_flops()


def make_step(settings: Settings, variant: Variant) -> Step:
    """A function of an optical and a SAR batch that takes a step."""
    if variant.compiled == "graphs" and settings.device != "cuda":
        raise ValueError("CUDA graphs need a GPU.")
    model, loss_of = variant.build(settings)
    model.to(settings.device).train()
    if variant.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]

    in_bf16 = working_dtype(settings.device) == torch.bfloat16

    def loss(optical: torch.Tensor, sar: torch.Tensor) -> torch.Tensor:
        with torch.autocast(settings.device, dtype=torch.bfloat16, enabled=in_bf16):
            return loss_of(model, optical, sar)

    whole = variant.compiled == "step"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=variant.fused and not whole)
    update: Callable[[], Any] = optimizer.step
    if variant.compiled == "layers":
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(dynamic=False, backend=settings.backend)
    elif variant.compiled:
        mode = "reduce-overhead" if variant.compiled == "graphs" else None
        loss = torch.compile(loss, fullgraph=True, dynamic=False, backend=settings.backend, mode=mode)
    if whole:
        update = torch.compile(lambda: optimizer.step(), backend=settings.backend)

    def step(optical: torch.Tensor, sar: torch.Tensor) -> None:
        loss(optical, sar).backward()
        update()
        optimizer.zero_grad()

    return step


def compiled_graphs() -> int:
    """Graphs that torch.compile has traced so far in this process."""
    return counters["stats"]["unique_graphs"]


def time_step(step: Step, settings: Settings, batch: int, rounds: int, until: float) -> Figures:
    """Rates of a step over the rounds that begin before `until` (monotonic seconds), but at least one."""
    device, images = settings.device, random_images(settings, batch, settings.device)
    start = time.perf_counter()
    for _ in range(3):
        step(*images)
    synchronize(device)
    warm_up, graphs = time.perf_counter() - start, compiled_graphs()
    seconds: list[float] = []
    peaks: list[float] = []
    memory = 0
    while not seconds or (len(seconds) < rounds and time.monotonic() < until):
        peaks.append(peak_flops(device, settings.peak_size))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(settings.steps):
            step(*images)
        synchronize(device)
        seconds.append((time.perf_counter() - start) / settings.steps)
        if device == "cuda":
            memory = max(memory, torch.cuda.max_memory_allocated())
    return {
        "batch": batch,
        "pairs_per_second": batch / statistics.median(seconds),
        "slowest_and_fastest": [batch / max(seconds), batch / min(seconds)],
        "rounds": len(seconds),
        "warm_up_seconds": warm_up,
        "graphs": graphs,
        "recompiles": compiled_graphs() - graphs,
        "peak_memory_gib": memory / 2**30 or None,
        "peak_tflop_per_second": statistics.median(peaks) / 1e12,
    }


# --- pieces: each yields figures as they come ------------------------------------------------------------------------


def measure_peak(settings: Settings, until: float, batches: tuple[int, ...]) -> Iterator[Figures]:
    """The rate of large matrix products."""
    peaks = [peak_flops(settings.device, settings.peak_size) for _ in range(settings.rounds)]
    yield {"tflop_per_second": statistics.median(peaks) / 1e12}


def measure_step(settings: Settings, until: float, batches: tuple[int, ...], variant: Variant) -> Iterator[Figures]:
    """A step with the fastest of the batch sizes: they grow until one does not fit or gains less than 5 %."""
    flops = flops_per_pair(settings, variant)
    yield {"gflop_per_pair": flops / 1e9}
    step, best, tried = make_step(settings, variant), batches[0], {}
    for batch in batches if len(batches) > 1 else ():
        try:
            tried[batch] = time_step(step, settings, batch, 1, until)["pairs_per_second"]
        except torch.OutOfMemoryError:
            yield {"out_of_memory_at": batch}
            break
        faster = tried[batch] > 1.05 * tried.get(best, 0) if batch != best else True
        best = max(tried, key=lambda size: tried[size])
        yield {"tried": {str(size): rate for size, rate in tried.items()}}
        if not faster or time.monotonic() > until:
            break
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    figures = time_step(step, settings, best, settings.rounds, until)
    rate = figures["pairs_per_second"] * flops / 1e12
    yield {**figures, "tflop_per_second": rate, "mfu": rate / figures["peak_tflop_per_second"]}


def measure_transfers(settings: Settings, until: float, batches: tuple[int, ...]) -> Iterator[Figures]:
    """Steps on batches from the host: raw ones that the processor normalises on the device, and normalised ones.

    A batch is copied before its step (in line), or on a stream of its own during the step before (overlapped).
    """
    device, batch, size = settings.device, batches[0], settings.image_size
    processor = FusMAEImageProcessor()
    optical = torch.randint(1, 5000, (batch, 12, size, size), dtype=torch.int32).to(torch.uint16)
    sar = torch.randn(batch, 2, size, size) * 3 - torch.tensor([12.0, 19.0])[:, None, None]
    ready = processor(optical=optical, sar=sar, return_pixel_mask=False)
    hosts = {"raw": [optical, sar], "float32": [ready["pixel_values"], ready["pixel_values_sar"]]}
    if device == "cuda":
        hosts = {name: [images.pin_memory() for images in host] for name, host in hosts.items()}

    def copied(name: str) -> list[torch.Tensor]:
        return [images.to(device, non_blocking=True) for images in hosts[name]]

    def normalised(name: str, images: list[torch.Tensor]) -> list[torch.Tensor]:
        if name == "float32":
            return images
        made = processor(optical=images[0], sar=images[1], return_pixel_mask=False)
        return [made["pixel_values"], made["pixel_values_sar"]]

    step = make_step(settings, Variant(settings.focus))
    images = copied("float32")

    def step_alone() -> None:
        for _ in range(settings.steps):
            step(*images)

    def arrive(name: str) -> None:
        for _ in range(settings.steps):
            normalised(name, copied(name))

    def in_line(name: str) -> None:
        for _ in range(settings.steps):
            step(*normalised(name, copied(name)))

    def overlapped(name: str) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            coming = copied(name)
        for _ in range(settings.steps):
            torch.cuda.current_stream().wait_stream(stream)
            now = coming
            for tensor in now:
                tensor.record_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                coming = copied(name)
            step(*normalised(name, now))

    ways: dict[str, Callable[[], None]] = {"step alone": step_alone}
    for name in hosts:
        ways[f"{name}, without the step"] = functools.partial(arrive, name)
        ways[f"{name}, in line"] = functools.partial(in_line, name)
        if device == "cuda":
            ways[f"{name}, overlapped"] = functools.partial(overlapped, name)
    for _ in range(4):  # the processor looks at the values of its first batches
        normalised("raw", copied("raw"))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in range(settings.rounds + 1):
        if round_number > 1 and time.monotonic() > until:
            break
        for way, run in ways.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if round_number:  # the first one warms up
                seconds[way].append((time.perf_counter() - start) / settings.steps)
    alone = statistics.median(seconds["step alone"])
    bytes_per_pair = {name: sum(images.nbytes for images in host) // batch for name, host in hosts.items()}
    yield {"batch": batch, "bytes_per_pair": bytes_per_pair}
    yield {
        "ways": {
            way: {"pairs_per_second": batch / statistics.median(times), "to_step": alone / statistics.median(times)}
            for way, times in seconds.items()
        }
    }


class RepeatedPairs(SimulatedPairs):
    """A few simulated pairs under many names, all to train on: what they show does not matter here."""

    def __init__(self, num_pairs: int, image_size: int):
        super().__init__(num_pairs, options=SimulationOptions(image_size=image_size))
        self._originals = [super(RepeatedPairs, self).read(index) for index in range(min(16, num_pairs))]

    def split_of(self, index: int) -> str:
        """All to train on."""
        return "train"

    def read(self, index: int) -> Pair:
        """One of the few, under a name of its own."""
        return dataclasses.replace(self._originals[index % len(self._originals)], id=self.ids[index])


def measure_training(settings: Settings, until: float, batches: tuple[int, ...]) -> Iterator[Figures]:
    """What the log of a run of `run_pretrain.py` on simulated shards says, but for the first log, with warm-up."""
    with tempfile.TemporaryDirectory() as temporary:
        shards, output = Path(temporary) / "shards", Path(temporary) / "run"
        prepare(RepeatedPairs(settings.pairs, settings.image_size), shards, progress=False)
        options = {
            "data": shards,
            "output_dir": output,
            "preset": settings.focus,
            "config": json.dumps({"patch_size": settings.patch_size, **json.loads(settings.config)}),
            "bf16": True,
            "max_steps": settings.training_steps,
            "per_device_train_batch_size": batches[0],
            "dataloader_num_workers": settings.workers,
            "logging_steps": max(1, settings.training_steps // 6),
            "save_strategy": "steps",
            "save_steps": settings.training_steps,
            "save_only_model": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        command = [sys.executable, "-m", "fusmae_hf.training.run_pretrain"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(temporary) / "cache")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"run_pretrain.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        state = json.loads((output / f"checkpoint-{settings.training_steps}" / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log][1:]
    yield {"batch": batches[0], "workers": settings.workers, "steps": settings.training_steps}
    for name in ("pairs_per_second", "mfu", "data_wait_share", "peak_memory_gib"):
        logged = [log[name] for log in logs if log.get(name) is not None]
        yield {name: statistics.median(logged) if logged else None}


def measure_inference(settings: Settings, until: float, batches: tuple[int, ...]) -> Iterator[Figures]:
    """Features of both sensors and of one, and loading: see `inference.py`."""
    arguments = inference.make_parser().parse_args([])
    arguments.preset, arguments.config = settings.focus, settings.config
    arguments.image_size, arguments.patch_size = settings.image_size, settings.patch_size
    arguments.batch_size, arguments.rounds, arguments.repeats = batches[0], settings.rounds, settings.steps
    arguments.load_rounds = min(2, settings.rounds)
    yield {"batch": batches[0]}
    torch.manual_seed(0)
    ways = inference.make_ways(arguments, settings.device)
    inference.time_ways(ways, arguments, settings.device)
    yield {"features": inference.rows_of(ways, batches[0])}
    yield {"loading": inference.measure_loading(arguments, settings.device)}


# --- running the pieces within their time ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Something to measure.

    Attributes:
        name: in the JSON.
        seconds: after which it is stopped, if the time is not over before.
        measure: a function of the settings, the end of its time, and batch sizes.
        arguments: further ones of that function.
        batch_of: piece whose batch size is taken; the smallest where that has none. All are tried where None.
    """

    name: str
    seconds: float
    measure: Callable[..., Iterator[Figures]]
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_of: str | None = None


LEVERS: dict[str, dict[str, Any]] = {
    "unfused AdamW": {"fused": False},
    "gradient checkpointing": {"checkpointing": True},
    "attention: eager": {"attention": "eager"},
    "attention: flex_attention": {"attention": "flex_attention"},
    "compiled loss": {"compiled": "loss"},
    "compiled loss and optimiser": {"compiled": "step"},
    "compiled loss, CUDA graphs": {"compiled": "graphs"},
}
"""Changes to the eager step of FusMAE with scaled-dot-product attention and fused AdamW."""


def make_pieces(settings: Settings) -> list[Piece]:
    """What is measured, the most important first."""

    def steps(preset: str) -> list[Piece]:
        """Both models, as they are and compiled with the batch size that was the fastest."""
        return [
            Piece(
                f"step {preset} {model} {mode}",
                seconds,
                measure_step,
                {"variant": Variant(preset, model, compiled=compiled)},
                f"step {preset} {model} eager" if compiled else None,
            )
            for mode, compiled, seconds in (("eager", "", 40), ("compiled", "layers", 90))
            for model in BUILDERS
        ]

    baseline = baseline_of(settings.focus)
    pieces = [Piece("peak", 20, measure_peak)]
    for preset in settings.presets:
        pieces += steps(preset)
        if preset == settings.focus:
            pieces.append(Piece("training run", 60, measure_training, batch_of=baseline))
    pieces.append(Piece("transfers", 40, measure_transfers, batch_of=baseline))
    for lever, changes in LEVERS.items():
        variant = Variant(settings.focus, **changes)
        pieces.append(Piece(f"lever {lever}", 120, measure_step, {"variant": variant}, baseline))
    return [*pieces, Piece("inference", 60, measure_inference, batch_of=baseline)]


def baseline_of(preset: str) -> str:
    """Name of the piece that levers are compared with."""
    return f"step {preset} FusMAE eager"


def must_spawn() -> bool:
    """Whether this process was forked from one that had looked for GPUs, and can use none itself."""
    return torch.cuda._is_in_bad_fork()


def process_context() -> Any:
    """How to start processes: forked from one that has imported everything, or anew where those could use no GPU."""
    # The server looks for what it imports beforehand nowhere else.
    path = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["inference", "fusmae_hf.preparation.prepare", "fusmae_hf.simulation.pairs"])
    with ProcessPoolExecutor(max_workers=1, mp_context=processes) as forked:
        return multiprocessing.get_context("spawn") if forked.submit(must_spawn).result() else processes


def send_figures(
    connection: Connection, measure: Callable[..., Iterator[Figures]], arguments: Figures, scratch: str
) -> None:
    """What the process of a piece does: send figures as they come, and the error that ended it."""
    os.setsid()  # so that its own processes can be ended with it
    tempfile.tempdir = scratch
    try:
        for figures in measure(**arguments):
            connection.send(figures)
    except Exception as error:
        connection.send({"error": f"{type(error).__name__}: {str(error).strip()[:500]}"})


def run_piece(
    processes: Any, piece: Piece, settings: Settings, batches: tuple[int, ...], seconds: float, scratch: str
) -> Iterator[Figures]:
    """Figures of a piece as they come.

    Args:
        processes: how to start one.
        piece: what to measure.
        settings: how.
        batches: batch sizes to try.
        seconds: after which the piece is stopped.
        scratch: folder for its temporary files.

    Yields:
        Figures by name; last `"error"` or `"stopped"` where the piece did not end by itself.
    """
    if seconds <= 0:
        yield {"stopped": "the time was over"}
        return
    receiving, sending = processes.Pipe(duplex=False)
    end = time.monotonic() + seconds
    # Rounds end a little earlier than the process is stopped.
    arguments = {"settings": settings, "until": end - 0.2 * seconds, "batches": batches, **piece.arguments}
    process = processes.Process(target=send_figures, args=(sending, piece.measure, arguments, scratch))
    process.start()
    sending.close()
    try:
        while receiving.poll(max(0, end - time.monotonic())):
            yield receiving.recv()
        yield {"stopped": f"after {seconds:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"error": f"its process ended with {process.exitcode}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def run(settings: Settings, folder: Path, minutes: float, only: str = "") -> Figures:
    """Measure, and keep `gpu.json` and `gpu.md` in the folder up to date.

    Args:
        settings: what to measure.
        folder: made where it is not there.
        minutes: that all pieces may take together.
        only: regular expression that the names of pieces must match somewhere; empty for all.

    Returns:
        Device and versions, settings, minutes, and the figures of each piece by its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [piece for piece in make_pieces(settings) if re.search(only, piece.name)]
    if not pieces:
        raise ValueError(f"No piece has a name that {only!r} matches: {[p.name for p in make_pieces(settings)]}.")
    started = time.monotonic()
    results: dict[str, Figures] = {}
    record = {
        **machine_of(settings.device),
        "settings": dataclasses.asdict(settings),
        "minutes": minutes,
        "pieces": results,
    }
    processes = process_context()
    with tempfile.TemporaryDirectory() as scratch:
        for piece in pieces:
            begun = time.monotonic()
            seconds = min(piece.seconds, 60 * minutes - (begun - started))
            batch = results.get(piece.batch_of or "", {}).get("batch", settings.batch_sizes[0])
            batches = settings.batch_sizes if piece.batch_of is None else (batch,)
            figures: Figures = {"allowed_seconds": seconds}
            results[piece.name] = figures
            for found in run_piece(processes, piece, settings, batches, seconds, scratch):
                figures |= found
                (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
            figures["seconds"] = time.monotonic() - begun
            (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
            (folder / "gpu.md").write_text(markdown(record))
            print(f"{piece.name}: {in_words(figures)} ({figures['seconds']:.0f} s)", flush=True)
    return record


# --- the report ------------------------------------------------------------------------------------------------------


def cell(figures: Figures, name: str, form: str) -> str:
    """A figure in words."""
    value = figures.get(name)
    return NOT_MEASURED if value is None else form.format(value)


def in_words(figures: Figures) -> str:
    """What a piece found, in a line."""
    if why := figures.get("error") or figures.get("stopped"):
        return why
    forms = {"batch": "batch {}", "pairs_per_second": "{:.1f} pairs/s", "tflop_per_second": "{:.3g} TFLOP/s"}
    forms |= {"mfu": "MFU {:.1%}", "peak_memory_gib": "{:.1f} GiB", "data_wait_share": "waiting {:.1%}"}
    return ", ".join(cell(figures, name, form) for name, form in forms.items() if figures.get(name) is not None)


def ratio(figures: Figures, reference: Figures, name: str = "pairs_per_second") -> str:
    """A figure as a multiple of another."""
    if figures.get(name) is None or reference.get(name) is None:
        return NOT_MEASURED
    return f"{figures[name] / reference[name]:.2f}x"


def step_table(results: dict[str, Figures], presets: tuple[str, ...]) -> list[str]:
    """Steps by model size, eager and compiled."""
    lines = [
        "| size | model | mode | batch | pairs/s | to ViTMAE | TFLOP/s | MFU | peak memory | recompiles |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in presets:
        for mode in ("eager", "compiled"):
            for model in BUILDERS:
                found = results.get(f"step {preset} {model} {mode}", {})
                cells = [
                    cell(found, "batch", "{}"),
                    cell(found, "pairs_per_second", "{:.1f}"),
                    ratio(found, results.get(f"step {preset} ViTMAE {mode}", {})),
                    cell(found, "tflop_per_second", "{:.3g}"),
                    cell(found, "mfu", "{:.1%}"),
                    cell(found, "peak_memory_gib", "{:.1f} GiB"),
                    "-" if found.get("graphs") == 0 else cell(found, "recompiles", "{}"),
                ]
                lines.append(f"| {preset} | {model} | {mode} | {' | '.join(cells)} |")
    return lines


def lever_table(results: dict[str, Figures], baseline: str) -> list[str]:
    """What each lever does to the speed and memory of the eager step."""
    reference = results.get(baseline, {})
    rows = {"none: eager, sdpa, fused AdamW": reference}
    rows["compiled layers"] = results.get(baseline.replace("eager", "compiled"), {})
    rows |= {lever: results.get(f"lever {lever}", {}) for lever in LEVERS}
    lines = [
        "| lever | pairs/s | speed | peak memory | memory | recompiles | warm-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for lever, found in rows.items():
        cells = [
            cell(found, "pairs_per_second", "{:.1f}"),
            ratio(found, reference),
            cell(found, "peak_memory_gib", "{:.1f} GiB"),
            ratio(found, reference, "peak_memory_gib"),
            "-" if found.get("graphs") == 0 else cell(found, "recompiles", "{}"),
            cell(found, "warm_up_seconds", "{:.0f} s"),
        ]
        lines.append(f"| {lever} | {' | '.join(cells)} |")
    return lines


def markdown(record: Figures) -> str:
    """The report on what [`run`] returns."""
    settings, results = record["settings"], record["pieces"]
    presets = tuple(settings["presets"])
    focus, baseline = settings["focus"], baseline_of(settings["focus"])
    transfers, training = results.get("transfers", {}), results.get("training run", {})
    lines = [
        f"# Fus-MAE on {record['device']}",
        "",
        f"torch {record['torch']}, transformers {record['transformers']}; {settings['image_size']} px, patch "
        f"{settings['patch_size']}, 75% masked, {record['precision']}, torch.compile with {settings['backend']}; "
        f"matrix peak {cell(results.get('peak', {}), 'tflop_per_second', '{:.3g} TFLOP/s')}.",
    ]
    if settings["config"] != "{}":
        lines += ["", f"FusMAE, not ViTMAE, has `{settings['config']}`: their speeds are not to be compared."]
    if settings["device"] == "cpu":
        lines += ["", "**These are figures of a CPU, not of a GPU.**"]
    lines += ["", "## Pretraining steps", "", *step_table(results, presets)]
    lines += ["", f"## Levers on the step of {focus}", "", *lever_table(results, baseline)]
    lines += ["", "## From the host to the device", "", "| batches | pairs/s | to the step alone |", "|---|---|---|"]
    for way, found in transfers.get("ways", {NOT_MEASURED: {}}).items():
        lines.append(f"| {way} | {cell(found, 'pairs_per_second', '{:.1f}')} | {cell(found, 'to_step', '{:.2f}x')} |")
    lines += [
        "",
        f"## A training run of {focus} from shards",
        "",
        "| batch | workers | pairs/s | MFU | waiting for data | peak memory |",
        "|---|---|---|---|---|---|",
        f"| {cell(training, 'batch', '{}')} | {cell(training, 'workers', '{}')} "
        f"| {cell(training, 'pairs_per_second', '{:.1f}')} | {cell(training, 'mfu', '{:.1%}')} "
        f"| {cell(training, 'data_wait_share', '{:.1%}')} | {cell(training, 'peak_memory_gib', '{:.1f} GiB')} |",
        "",
        f"## Inference with {focus}",
        "",
    ]
    inferred = {"features": [], "loading": [], **results.get("inference", {})}
    lines.append(inference.table(inferred) if inferred["features"] else NOT_MEASURED)
    missing = {name: found.get("error") or found.get("stopped") for name, found in results.items()}
    if any(missing.values()):
        lines += ["", "## Errors, and pieces that were stopped", ""]
        lines += [f"- {name}: {' '.join(why.split())}" for name, why in missing.items() if why]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=3.5, help="for all pieces, imports not counted (default 3.5)")
    parser.add_argument("--only", default="", help="regular expression: pieces by name")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="(default: the GPU where there is one)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    arguments = parser.parse_args()
    # Looking for GPUs this way leaves processes forked later able to use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" != device:
        parser.error("--device cuda: torch sees no GPU here. Install a build of torch for it, or give --device cpu.")
    if arguments.tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # products so small only wait for further threads
    settings = Settings(arguments.device or device, **(TINY if arguments.tiny else {}))
    print(f"\n{markdown(run(settings, arguments.out, arguments.minutes, arguments.only))}")


if __name__ == "__main__":
    main()
