"""How fast a run is and what it waits for, measured while it trains."""

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

_PEAK_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices whose product gives the peak, by kind of device."""

_PEAK_SECONDS = 0.1


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the product of two large square matrices now: the fastest of those done in a tenth of a second.

    Random numbers that others draw stay what they would be.
    """
    size = _PEAK_SIZE.get(device.type, 4096)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn((size, size), generator=generator, device=device).to(dtype) for _ in range(2))
    a @ b  # loads and chooses kernels
    _wait_for(device)
    fastest, end = float("inf"), time.perf_counter() + _PEAK_SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        _wait_for(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


@functools.cache
def emulates_bf16() -> bool:
    """Whether products in bfloat16 take this CPU more than twice as long as in float32: those without instructions
    for it convert every number, which was measured to take 55 times as long. Tried out once, in the CPU time of this
    process, which other programs on a busy machine change little; a second where bfloat16 is slow."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        matrix @ matrix  # loads and chooses kernels
        seconds = []
        for _ in range(3):
            start = time.process_time()
            matrix @ matrix
            seconds.append(time.process_time() - start)
        fastest[dtype] = min(seconds)
    return fastest[torch.bfloat16] > 2 * fastest[torch.float32]


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of an accelerator, in tensors since training began; on the CPU, in all
    since the process began (0 on Windows, which does not say). For MPS, which keeps no such record, what its driver
    holds now, its cache included."""
    if device.type == "cpu":
        if resource is None:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return torch.accelerator.max_memory_allocated(device)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class SpeedCallback(TrainerCallback):
    """Measures the speed of training, between one log of the loss and the next.

    **What is counted.** The clock runs from when the batches of a step are asked for to the end of the step, and on
    through the next one; it stands still from the end of a step after which something is logged, evaluated or saved
    until the next batches are asked for. Then, and only then, the device is waited for. The first step counts like
    any other, with what it does once (starting workers, choosing kernels, compiling). Of a resumed run, batches that
    are skipped are no pairs; the time to pass over them is time spent waiting for the first batch. Pairs of a step
    that was left out because it was not finite count.

    Args:
        trainer: fetches the batches of a step in `waiting`, calls `count`, and puts `report` into its logs.

    Attributes:
        clock: gives seconds.
        matrix_peak: FLOP/s of a product of large matrices on the device of this process in the precision of the run,
            measured when training begins.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.clock: Callable[[], float] = time.perf_counter
        self.matrix_peak = 0.0
        # What this process did, by name: pairs, FLOPs, seconds, and those of them waited.
        self._since_log, self._since_start = defaultdict[str, float](float), defaultdict[str, float](float)
        self._running_since: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Start anew, and measure the peak."""
        device = args.device
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        precision = self.trainer.accelerator.mixed_precision
        self.matrix_peak = matrix_peak(device, dtypes.get(precision, torch.float32))
        if device.type not in ("cpu", "mps"):
            torch.accelerator.reset_peak_memory_stats(device)  # of the matrices, too
        self._since_log.clear()
        self._since_start.clear()
        self._running_since = None

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock where the Trainer does something else than training next."""
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._stop()

    def on_epoch_end(self, args, state, control, **kwargs):
        """See `on_step_end`."""
        self.on_step_end(args, state, control)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the batches of a step: the clock runs from here on, and this is waiting for data."""
        start = self.clock()
        if self._running_since is None:
            self._running_since = start
        yield
        self._since_log["waited"] += self.clock() - start

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count the batches of a step."""
        for batch in batches:
            self._since_log["pairs"] += len(batch["row"])
            self._since_log["flops"] += self.trainer.floating_point_ops(batch)

    def _stop(self) -> None:
        if self._running_since is not None:
            _wait_for(self.trainer.args.device)
            self._since_log["seconds"] += self.clock() - self._running_since
            self._running_since = None

    def report(self) -> dict[str, float]:
        """The speed since the last report, for the log; every process must call this.

        Returns:
            `pairs_per_second`, of all processes together; `mfu` (model FLOPs utilisation, Chowdhery et al., 2022,
            arXiv 2204.02311), FLOP/s of the model's matrix products over `matrix_peak` of all processes, where the
            Trainer knows the FLOPs of a batch; `data_wait_share`, the share of the time for which the process which
            waited longest waited for batches, until they were on its device; `peak_memory_gib`, of the process that
            needed most, see `peak_memory`.
        """
        return self._figures(self._end_interval())

    def report_run(self) -> dict[str, float]:
        """`report` of the whole training since it was started or resumed, with `matrix_peak_tflops`, the peak of all
        processes; nothing where there was no step. Every process must call this."""
        self._end_interval()
        figures = self._figures(self._since_start)
        return figures and figures | {"matrix_peak_tflops": sum(gather_object([self.matrix_peak])) / 1e12}

    def _end_interval(self) -> dict[str, float]:
        self._stop()
        interval, self._since_log = self._since_log, defaultdict(float)
        for name, value in interval.items():
            self._since_start[name] += value
        return interval

    def _figures(self, mine: dict[str, float]) -> dict[str, float]:
        memory = peak_memory(self.trainer.args.device)
        counts, peaks, memories = zip(*gather_object([(mine, self.matrix_peak, memory)]), strict=True)
        seconds, flops = max(count["seconds"] for count in counts), sum(count["flops"] for count in counts)
        if not seconds:
            return {}
        return {
            "pairs_per_second": sum(count["pairs"] for count in counts) / seconds,
            **({"mfu": flops / seconds / sum(peaks)} if flops else {}),
            "data_wait_share": max(count["waited"] / count["seconds"] for count in counts),
            "peak_memory_gib": max(memories) / 2**30,
        }
