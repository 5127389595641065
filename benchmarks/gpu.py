"""Everything that a GPU should say about Fus-MAE, within ten minutes on one of them.

    python benchmarks/gpu.py --out gpu
    python benchmarks/gpu.py --out gpu --minutes 30 --only "small|large"
    python benchmarks/gpu.py --out quick --quick      # tiny sizes, on a CPU too: a trial of the script, no measurement

Pieces run one after the other, each in a process of its own, so that memory and compiled graphs are its own and an
error ends it alone. A piece has a share of the time that is left, which grows as others end early; what is still
missing when it is over is not measured. Writes `gpu.json`, after each figure, and `gpu.md`.

A step is the forward and backward pass and an AdamW step, in bf16 autocast, on one batch of random images. ViTMAE is
that of transformers; see `train_step.py`. FLOPs are those of the matrix products and attentions that the result needs.
MFU is their rate over that of a product of large bf16 matrices, measured in turn with the steps.
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
from train_step import fusmae, machine_of, peak_flops, synchronize, vitmae

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
        presets: model sizes; levers, transfers, training and inference are measured on the first.
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
    presets: tuple[str, ...] = ("base", "small", "large")
    image_size: int = 120
    patch_size: int = 8
    config: str = "{}"
    batch_sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)
    rounds: int = 5
    steps: int = 10
    backend: str = "inductor"
    peak_size: int | None = None
    pairs: int = 4096
    training_steps: int = 48
    workers: int = 8


QUICK: dict[str, Any] = {
    "presets": ("tiny",),
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
        compiled: `""` for eager; `"loss"`, forward and backward pass in one graph each; `"step"`, and the optimiser
            too; `"graphs"`, forward and backward pass as CUDA graphs.
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
        model.activation_checkpointing_enable()  # type: ignore[operator]

    def loss(optical: torch.Tensor, sar: torch.Tensor) -> torch.Tensor:
        with torch.autocast(settings.device, dtype=torch.bfloat16):
            return loss_of(model, optical, sar)

    whole = variant.compiled == "step"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=variant.fused and not whole)
    update: Callable[[], Any] = optimizer.step
    if variant.compiled:
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
    """A step with the fastest of the batch sizes: they grow until one does not fit or gains less than 2 %."""
    flops = flops_per_pair(settings, variant)
    yield {"gflop_per_pair": flops / 1e9}
    step, best, tried = make_step(settings, variant), batches[0], {}
    for batch in batches if len(batches) > 1 else ():
        try:
            tried[batch] = time_step(step, settings, batch, 1, until)["pairs_per_second"]
        except torch.OutOfMemoryError:
            yield {"out_of_memory_at": batch}
            break
        faster = tried[batch] > 1.02 * tried.get(best, 0) if batch != best else True
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

    step = make_step(settings, Variant(settings.presets[0]))
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
            "preset": settings.presets[0],
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
    arguments.preset, arguments.config = settings.presets[0], settings.config
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
        share: weight of its time against those of the pieces after it.
        measure: a function of the settings, the end of its time, and batch sizes.
        arguments: further ones of that function.
        batch_of: piece whose batch size is taken; the smallest where that has none. All are tried where None.
    """

    name: str
    share: float
    measure: Callable[..., Iterator[Figures]]
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_of: str | None = None


LEVERS: dict[str, dict[str, Any]] = {
    "unfused AdamW": {"fused": False},
    "gradient checkpointing": {"checkpointing": True},
    "attention: eager": {"attention": "eager"},
    "attention: flex_attention": {"attention": "flex_attention"},
    "compiled loss and optimiser": {"compiled": "step"},
    "compiled loss, CUDA graphs": {"compiled": "graphs"},
}
"""Changes to the eager step of FusMAE with scaled-dot-product attention and fused AdamW."""


def make_pieces(settings: Settings) -> list[Piece]:
    """What is measured, the most important first."""

    def eager(preset: str, share: float) -> list[Piece]:
        return [
            Piece(f"step {preset} {model} eager", share, measure_step, {"variant": Variant(preset, model)})
            for model in BUILDERS
        ]

    def compiled(preset: str, share: float) -> list[Piece]:
        return [
            Piece(
                f"step {preset} {model} compiled",
                share,
                measure_step,
                {"variant": Variant(preset, model, compiled="loss")},
                batch_of=f"step {preset} {model} eager",
            )
            for model in BUILDERS
        ]

    first, *others = settings.presets
    baseline = baseline_of(first)
    pieces = [Piece("peak", 2, measure_peak), *eager(first, 5), *compiled(first, 16)]
    pieces += [
        Piece("training run", 9, measure_training, batch_of=baseline),
        Piece("transfers", 4, measure_transfers, batch_of=baseline),
    ]
    for lever, changes in LEVERS.items():
        share = 6 if "compiled" in changes or "flex" in lever else 2
        variant = Variant(first, **changes)
        pieces.append(Piece(f"lever {lever}", share, measure_step, {"variant": variant}, baseline))
    pieces.append(Piece("inference", 5, measure_inference, batch_of=baseline))
    for preset in others:
        pieces += eager(preset, 4)
    for preset in others:
        pieces += compiled(preset, 8)
    return pieces


def baseline_of(preset: str) -> str:
    """Name of the piece that levers are compared with."""
    return f"step {preset} FusMAE eager"


def must_spawn() -> bool:
    """Whether this process was forked from one that had looked for GPUs, and can use none itself."""
    return torch.cuda._is_in_bad_fork()


def process_context() -> Any:
    """How to start processes: forked from one that has imported everything, or anew where those could use no GPU."""
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
        yield {"stopped": f"after {seconds:.0f} s, its share of the time"}
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
    """Measure, and keep `gpu.json` in the folder up to date.

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
        for position, piece in enumerate(pieces):
            begun = time.monotonic()
            left = 60 * minutes - (begun - started)
            seconds = max(0.0, left) * piece.share / sum(later.share for later in pieces[position:])
            batch = results.get(piece.batch_of or "", {}).get("batch", settings.batch_sizes[0])
            batches = settings.batch_sizes if piece.batch_of is None else (batch,)
            figures: Figures = {"allowed_seconds": seconds}
            results[piece.name] = figures
            for found in run_piece(processes, piece, settings, batches, seconds, scratch):
                figures |= found
                (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
            figures["seconds"] = time.monotonic() - begun
            ended = figures.get("error") or figures.get("stopped") or "measured"
            print(f"{piece.name}: {ended} ({figures['seconds']:.0f} s)", flush=True)
    (folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


# --- the report ------------------------------------------------------------------------------------------------------


def cell(figures: Figures, name: str, form: str) -> str:
    """A figure in words."""
    value = figures.get(name)
    return NOT_MEASURED if value is None else form.format(value)


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
    rows["compiled loss"] = results.get(baseline.replace("eager", "compiled"), {})
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
    first, baseline = presets[0], baseline_of(presets[0])
    transfers, training = results.get("transfers", {}), results.get("training run", {})
    lines = [
        f"# Fus-MAE on {record['device']}",
        "",
        f"torch {record['torch']}, transformers {record['transformers']}; {settings['image_size']} px, patch "
        f"{settings['patch_size']}, 75% masked, bf16, torch.compile with {settings['backend']}; matrix peak "
        f"{cell(results.get('peak', {}), 'tflop_per_second', '{:.3g} TFLOP/s')}.",
    ]
    if settings["config"] != "{}":
        lines += ["", f"FusMAE, not ViTMAE, has `{settings['config']}`: their speeds are not to be compared."]
    if settings["device"] == "cpu":
        lines += ["", "**These are figures of a CPU, not of a GPU.**"]
    lines += ["", "## Pretraining steps", "", *step_table(results, presets)]
    lines += ["", f"## Levers on the step of {first}", "", *lever_table(results, baseline)]
    lines += ["", "## From the host to the device", "", "| batches | pairs/s | to the step alone |", "|---|---|---|"]
    for way, found in transfers.get("ways", {NOT_MEASURED: {}}).items():
        lines.append(f"| {way} | {cell(found, 'pairs_per_second', '{:.1f}')} | {cell(found, 'to_step', '{:.2f}x')} |")
    lines += [
        "",
        "## A training run from shards",
        "",
        "| batch | workers | pairs/s | MFU | waiting for data | peak memory |",
        "|---|---|---|---|---|---|",
        f"| {cell(training, 'batch', '{}')} | {cell(training, 'workers', '{}')} "
        f"| {cell(training, 'pairs_per_second', '{:.1f}')} | {cell(training, 'mfu', '{:.1%}')} "
        f"| {cell(training, 'data_wait_share', '{:.1%}')} | {cell(training, 'peak_memory_gib', '{:.1f} GiB')} |",
        "",
        f"## Inference with {first}",
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
    parser.add_argument("--minutes", type=float, default=10, help="that all may take (default 10)")
    parser.add_argument("--only", default="", help="regular expression: pieces by name")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    arguments = parser.parse_args()
    # Looking for GPUs this way leaves processes forked later able to use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(device, **(QUICK if arguments.quick else {}))
    record = run(settings, arguments.out, arguments.minutes, arguments.only)
    report = markdown(record)
    (arguments.out / "gpu.md").write_text(report)
    print(f"\n{report}")


if __name__ == "__main__":
    main()
