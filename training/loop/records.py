"""What programs share around the Trainer: output folder, processor, the record of a run, messages."""

import errno
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor, __version__
from fusmae_hf.data.inputs import fitting_size
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.files.atomic import flush_to_disk, incomplete_path
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.arguments import ModelArguments, SourceArguments
from fusmae_hf.training.sources import content_of, pixel_size_of

if TYPE_CHECKING:
    from fusmae_hf.training.loop.trainer import PairTrainer

_ADVICE = {
    errno.EROFS: "It is mounted read-only.",
    errno.EACCES: "This user may not write there.",
    errno.EPERM: "This user may not write there.",
    errno.ENOSPC: "There is no space left.",
    errno.EDQUOT: "The quota is used up.",
    errno.ENOTDIR: "A file stands where a folder is needed.",
    errno.EEXIST: "A file stands where a folder is needed.",
    errno.ESTALE: "Its file system is gone: is it still mounted?",
    errno.EIO: "Its file system is gone: is it still mounted?",
}
"""What an error of the system means here."""

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""How accelerate calls precisions."""

_TRIED_WITH = 4096
"""Bytes: a full disk takes an empty file."""


def fresh_config(
    arguments: ModelArguments, info: PairsInfo, size: tuple[int, int], fields: Mapping[str, Any] | None = None
) -> FusMAEConfig:
    """The configuration of a fresh model for the bands and the pixel size of the data, and for images of `size`
    (height, width) or the windows of them that its patches fill; `fields` besides."""
    patch_size = arguments.config_fields.get("patch_size", FusMAEConfig().patch_size)
    seen = fitting_size(size, patch_size) if isinstance(patch_size, int) and patch_size > 0 else size
    of_data: dict[str, Any] = {"optical_bands": info.optical_bands, "sar_bands": info.sar_bands, "image_size": seen}
    of_data |= pixel_size_of(info)
    return FusMAEConfig.from_preset(arguments.preset, **of_data | dict(fields or {}) | arguments.config_fields)


def fresh_processor(data: SourceArguments, info: PairsInfo, config: FusMAEConfig) -> FusMAEImageProcessor:
    """A processor for the units and statistics of the data.

    Raises:
        ValueError: neither the user nor the shards name statistics.
    """
    statistics = data.statistics or info.statistics
    if statistics is None and data.measured:
        return _measured_processor(data.measured, info, config)
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


def _measured_processor(
    measured: dict[str, tuple[int, float, float]], info: PairsInfo, config: FusMAEConfig
) -> FusMAEImageProcessor:
    """A processor with the statistics that were measured when the shards were written."""
    fields: dict[str, Any] = {}
    for sensor in ("sar", "optical"):
        bands = getattr(config, f"{sensor}_bands")
        found = {band: measured.get(f"{sensor}/{band}", (0, 0.0, 0.0)) for band in bands}
        if flat := [band for band, (_, _, std) in found.items() if not std > 0]:
            raise ValueError(
                f"The training pairs of {info.name} have no data, or one value alone, in the {sensor} bands {flat}, "
                "so that nothing can be normalised by them: name statistics with `--statistics`."
            )
        fields[f"{sensor}_mean"] = {band: mean for band, (_, mean, _) in found.items()}
        fields[f"{sensor}_std"] = {band: std for band, (_, _, std) in found.items()}
        fields[f"{sensor}_bands"], fields[f"{sensor}_units"] = bands, getattr(info, f"{sensor}_units")
    return FusMAEImageProcessor(statistics=None, optical_offset=info.optical_offset, **fields)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Make the folder of a run, and see that a file can be written into it and put in place.

    Raises:
        OSError: it cannot; names the folder and says what to do. What was tried with is removed.
    """
    place = Path(folder)
    tried = incomplete_path(place / "try-to-write")
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            with tried.open("xb") as file:
                file.write(bytes(_TRIED_WITH))
                flush_to_disk(file)
        finally:
            tried.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Nothing can be written to the output folder {place} ({error.strerror or error}). "
            f"{_ADVICE.get(error.errno or 0, 'Is its disk there?')} Name another with --output_dir.",
        ) from error


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


def run_record(program: str, trainer: "PairTrainer", held_out: dict[str, PairDataset]) -> dict[str, Any]:
    """What somebody needs to repeat a training run of a program such as `run_pretrain.py`, as it really went."""
    arguments = trainer.args
    weights = sorted({str(p.dtype).removeprefix("torch.") for p in cast(PreTrainedModel, trainer.model).parameters()})
    computed = trainer.accelerator.mixed_precision
    return data_record(program, trainer.pairs, held_out) | {
        "steps": trainer.state.global_step,
        "global_batch_size": arguments.global_batch_size,
        "seed": arguments.seed,
        "learning_rate": arguments.learning_rate,
        "precision": computed if computed != "no" else ", ".join(_SHORT.get(name, name) for name in weights),
        "weights_dtype": ", ".join(weights),
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
