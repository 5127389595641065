"""Units of work: one variant, seed and stage on one data set. Each leaves a small JSON file, and is done once."""

import dataclasses
import fcntl
import itertools
import json
import os
import platform
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import transformers
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from fusmae_hf.files.atomic import write_atomically

from .attention import attends, measure_attention
from .data import StudyData, load_data, prepare_data
from .evaluation import evaluate
from .finetuning import finetune
from .pretraining import encoders_of, pretrain
from .settings import Settings
from .variants import all_variants, chosen_variants, pretraining_steps

STAGES = ("pretrain", "probe", "attention", "finetune")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One variant, seed and stage on one data set."""

    dataset: str
    stage: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}/{self.stage}/{self.variant}-seed{self.seed}"

    def result(self, folder: Path) -> Path:
        """The file that says that this unit is done."""
        return folder / "results" / f"{self}.json"

    def checkpoint(self, folder: Path) -> Path:
        """Where the encoders of its variant and seed lie."""
        return folder / "checkpoints" / self.dataset / f"{self.variant}-seed{self.seed}"


def all_units(settings: Settings) -> list[Unit]:
    """Units in the order of work: coarse to fine.

    The first seed of every variant on the first data set, its other seeds, the next data set, then fine-tuning.
    """
    units: list[Unit] = []
    for name, dataset in settings.datasets.items():
        for seed in dataset.seeds:
            for variant in chosen_variants(settings, dataset.variants):
                stages = ["pretrain"] * variant.is_pretrained + ["probe"]
                stages += ["attention"] * (attends(variant) and variant.is_pretrained)
                units += [Unit(name, stage, variant.name, seed) for stage in stages]
    probed = set(units)
    for name, dataset in settings.datasets.items():
        for seed in dataset.seeds:
            for variant in chosen_variants(settings, dataset.finetune):
                if Unit(name, "probe", variant.name, seed) not in probed:
                    raise ValueError(f"{name}: {variant.name} is in `finetune`, but not in `variants`.")
                if not variant.has_encoder:
                    raise ValueError(f"{name}: {variant.name} is in `finetune`, but has no network.")
                units.append(Unit(name, "finetune", variant.name, seed))
    return units


def needs(settings: Settings, unit: Unit) -> Unit | None:
    """The unit that must be done before."""
    pretrained = all_variants(settings)[unit.variant].is_pretrained and unit.stage != "pretrain"
    return dataclasses.replace(unit, stage="pretrain") if pretrained else None


@lru_cache(maxsize=2)
def _data(folder: Path, dataset: str, shifts: tuple[int, ...], device: str) -> StudyData:
    return load_data(_SETTINGS[0].datasets[dataset], shifts, folder / "data" / dataset, device)


_SETTINGS: list[Settings] = []


def run_unit(settings: Settings, unit: Unit, folder: Path) -> None:
    """Do a unit and write its result."""
    _SETTINGS[:] = [settings]
    data = _data(folder, unit.dataset, tuple(settings.shifts), settings.device)
    variant, checkpoint = all_variants(settings)[unit.variant], unit.checkpoint(folder)
    started = time.perf_counter()
    result: dict[str, Any]
    if unit.stage == "pretrain":
        result = pretrain(settings, variant, data, unit.seed, checkpoint)
    elif unit.stage == "probe":
        encoders = encoders_of(settings, variant, data, unit.seed, checkpoint)
        result = evaluate(settings, variant, data, encoders, unit.seed)
    elif unit.stage == "attention":
        result = measure_attention(settings, variant, data, unit.seed, checkpoint)
    else:
        result = finetune(settings, variant, data, unit.seed, checkpoint)
    record = dataclasses.asdict(unit) | {
        "group": variant.group,
        "objective": variant.objective,
        "streams": variant.streams,
        "config": settings.model | variant.config,
        "steps": pretraining_steps(settings, variant, data) if variant.is_pretrained else {},
        "result": result,
        "seconds": time.perf_counter() - started,
        "device": settings.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    write_atomically(unit.result(folder), json.dumps(record, indent=1).encode())


def _start_worker() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)  # scikit-learn would take all cores in every worker
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (parent := parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no orphans


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder until the process ends, however it does; a second one gets a RuntimeError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"Another process works in {folder}: wait for it, or name another folder.") from error
        yield


def _keep_settings(settings: Settings, folder: Path) -> None:
    """Refuse a folder whose results are of other settings: only variants and seeds may be added to a study."""
    kept = dataclasses.asdict(settings)
    for dataset in kept["datasets"].values():
        for name in ("variants", "finetune", "seeds", "root"):
            del dataset[name]
    kept = json.loads(json.dumps(kept))
    path = folder / "settings.json"
    if path.is_file():
        found = json.loads(path.read_text())
        found["datasets"] = kept["datasets"] | {name: found["datasets"][name] for name in found["datasets"]}
        kept["datasets"] = found["datasets"] | kept["datasets"]
        if found != kept:
            changed = [name for name in kept if kept[name] != found.get(name)]
            raise ValueError(f"{folder} holds results of other settings ({changed} differ): name another folder.")
    write_atomically(path, json.dumps(kept, indent=1).encode())


def run_study(settings: Settings, folder: Path, workers: int, only: Sequence[str] = ("*",)) -> list[Unit]:
    """Do all units that are not done yet.

    Args:
        settings: of the study.
        folder: where data, checkpoints and results are kept.
        workers: processes, of one thread each; 0 does everything in this one.
        only: patterns (`fnmatch`) of the units to do; those of an earlier pattern come first.

    Returns:
        Units that failed, or that need one that did. What went wrong is in `failed/` of the folder.

    Raises:
        ValueError: the folder holds results of other settings, or a pattern fits no unit.
        RuntimeError: another process works in the folder.
    """
    with _alone(folder):
        _keep_settings(settings, folder)
        known = all_units(settings)
        matched = {pattern: [unit for unit in known if fnmatch(str(unit), pattern)] for pattern in only}
        if unmatched := [pattern for pattern, found in matched.items() if not found]:
            raise ValueError(f"No unit of the study fits {unmatched}; units are called like {known[0]}.")
        wanted = dict.fromkeys(itertools.chain.from_iterable(matched.values()))
        needed = ((needs(settings, unit), unit) for unit in wanted)  # what a unit needs is done before it
        units = list(dict.fromkeys(unit for pair in needed for unit in pair if unit in wanted))
        missing = undone(settings, units, folder)
        for name in dict.fromkeys(unit.dataset for unit in missing):
            prepare_data(settings.datasets[name], tuple(settings.shifts), folder / "data" / name, workers)
        with tqdm(total=len(units), initial=len(units) - len(missing), unit="unit", smoothing=0.1) as bar:
            return (
                _run_here(settings, missing, folder, bar)
                if not workers
                else _dispatch(settings, missing, folder, workers, bar)
            )


def undone(settings: Settings, units: list[Unit], folder: Path) -> list[Unit]:
    """Units without a result, and pretrainings whose encoders they need but are gone: results are small and kept,
    encoders are not. A pretraining that is repeated ends with the same weights on the same machine; its result is kept
    until then."""
    missing = {unit for unit in units if not unit.result(folder).is_file()}
    for unit in tuple(missing):
        before = needs(settings, unit)
        if before in units and not before.checkpoint(folder).is_dir():
            missing.add(before)
    return [unit for unit in units if unit in missing]


def _run_here(settings: Settings, units: list[Unit], folder: Path, bar: tqdm) -> list[Unit]:
    _start_worker()
    for unit in units:
        bar.set_postfix_str(str(unit))
        run_unit(settings, unit, folder)
        bar.update()
    return []


def _dispatch(settings: Settings, units: list[Unit], folder: Path, workers: int, bar: tqdm) -> list[Unit]:
    waiting, failed = list(units), list[Unit]()
    running: dict[Future, Unit] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        while waiting or running:
            for unit in list(waiting):
                before = needs(settings, unit)
                ready = before is None or (
                    before not in waiting and before not in running.values() and before.result(folder).is_file()
                )
                if before in failed:
                    waiting.remove(unit)
                    failed.append(unit)
                elif len(running) < workers and ready:
                    waiting.remove(unit)
                    running[pool.submit(run_unit, settings, unit, folder)] = unit
            if not running:
                return failed + waiting  # they wait for units that are not part of this run
            bar.set_postfix_str(", ".join(map(str, running.values())))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit, error = running.pop(future), future.exception()
                if error is not None:
                    failed.append(unit)
                    tqdm.write(f"{unit} failed: {error!r}")
                    report = "".join(traceback.format_exception(error))
                    write_atomically(folder / "failed" / f"{unit}.txt", report.encode())
                bar.update()
    return failed
