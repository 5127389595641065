"""What the training scripts share around the Trainer: the processor, resuming, the record of a run, messages."""

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor, __version__
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.hub.checkpoints import MANIFEST, checkpoints_in, problem_of, settle
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.arguments import SourceArguments


def fresh_processor(data: SourceArguments, info: PairsInfo, config: FusMAEConfig) -> FusMAEImageProcessor:
    """A processor for the units and statistics of the data.

    Raises:
        ValueError: neither the user nor the shards name statistics.
    """
    statistics = data.statistics or info.statistics
    if statistics is None:
        raise ValueError(
            f"The shards of {info.name} name no band statistics. Measure them with `fusmae stats <shards> --processor "
            "<folder>` and pass `--statistics <folder>`, or pass the name of a dataset like it (bigearthnet, reben)."
        )
    if Path(statistics).is_dir():
        return FusMAEImageProcessor.from_pretrained(
            statistics, sar_bands=config.sar_bands, optical_bands=config.optical_bands
        )
    return FusMAEImageProcessor(
        sar_bands=config.sar_bands,
        optical_bands=config.optical_bands,
        statistics=statistics,
        sar_units=info.sar_units,
        optical_units=info.optical_units,
        optical_offset=info.optical_offset,
    )


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names; for `auto` the newest complete one of the output folder.

    Says which and why. What killed processes left in the output folder is cleared away. Each process must call this;
    the first one looks at the files, and all get its answer.

    Raises:
        ValueError: the checkpoint that was named is damaged or incomplete.
    """
    answer: list[str | ValueError | None] = [None]
    if arguments.process_index == 0:
        try:
            answer = [_checkpoint_to_resume(arguments.resume_from_checkpoint, Path(str(arguments.output_dir)))]
        except ValueError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return answer[0]


def _checkpoint_to_resume(wanted: str | None, folder: Path) -> str | None:
    settle(folder)
    if wanted in (None, "", "false", "False"):
        return None
    if wanted not in ("auto", "true", "True"):
        if (problem := problem_of(Path(wanted))) is not None:
            raise ValueError(
                f"Cannot resume from {wanted}: {problem}. Name another checkpoint, or pass `--resume_from_checkpoint "
                "auto` to go on from the newest complete one of the output folder."
            )
        chosen, why = Path(wanted), "as was asked for"
    else:
        for chosen in checkpoints_in(folder):
            if (problem := problem_of(chosen)) is None:
                break
            print(f"Passing over {chosen}: {problem}.")
        else:
            print(f"No complete checkpoint in {folder}: starting from the beginning.")
            return None
        why = f"the newest complete checkpoint in {folder}"
    print(f"Resuming from {chosen}, {why}.")
    if not (chosen / MANIFEST).is_file():
        print(
            f"It has no {MANIFEST}, so it was taken because all files that a resume needs are there and load. Whether "
            "its run had the same data, seed and augmentation cannot be seen."
        )
    return str(chosen)


def content_of(pairs: PairDataset) -> str:
    """Hash of the pairs of a split, as 16 hexadecimal digits."""
    shards = pairs.dataset_info.shards(pairs.split)
    return hashlib.sha256("".join(shard.content_hash for shard in shards).encode()).hexdigest()[:16]


def data_record(program: str, train: PairDataset, held_out: dict[str, PairDataset]) -> dict[str, Any]:
    """What somebody needs to repeat a run of a program such as `run_probe.py`: command, data, machine, versions."""
    return {
        "command": shlex.join([program, *sys.argv[1:]]),
        "data": train.info.name,
        "simulated": train.info.simulated,
        "pairs": len(train),
        "content": content_of(train),
        "held_out": {name: len(dataset) for name, dataset in held_out.items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "bad_files": train.bad_files,
        "versions": {
            "fusmae_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def run_record(
    program: str, arguments: TrainingArguments, train: PairDataset, held_out: dict[str, PairDataset], steps: int
) -> dict[str, Any]:
    """What somebody needs to repeat a training run of a program such as `run_pretrain.py`."""
    batch = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return data_record(program, train, held_out) | {
        "steps": steps,
        "global_batch_size": batch,
        "seed": arguments.seed,
        "learning_rate": arguments.learning_rate,
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "processes": arguments.world_size,
    }


@contextmanager
def tensorboard_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Let transformers write TensorBoard logs below a folder, unless the user's environment names another."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = name in os.environ
    os.environ.setdefault(name, os.path.join(folder, "runs"))
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


@contextmanager
def explained(*kinds: type[Exception]) -> Iterator[None]:
    """End with a message instead of a traceback for errors of these kinds, by default of arguments and data."""
    kinds = kinds or (OSError, ValueError, ImportError, PairError, StrictDataclassError)
    try:
        yield
    except kinds as error:
        raise SystemExit(f"Error: {error}") from error
