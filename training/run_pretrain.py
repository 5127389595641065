"""Pretrain Fus-MAE on pairs of Sentinel-1 and Sentinel-2 patches.

    accelerate launch training/run_pretrain.py training/configs/smoke.yaml --data shards --output_dir outputs/run

Ends with a checkpoint (weights, configuration, processor, remote code, model card), `loss.png`, `reconstructions.png`
and `run.json` in the output folder.
"""

import dataclasses
import hashlib
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, __version__
from fusmae_hf.data.loading import PairDataset
from fusmae_hf.data.pairs import PairError, PairsInfo
from fusmae_hf.hub import results_table, write_model_card
from fusmae_hf.training.arguments import DataArguments, ModelArguments, PretrainingArguments, parse_arguments
from fusmae_hf.training.callbacks import PictureCallback
from fusmae_hf.training.sources import augmentation_of, open_datasets
from fusmae_hf.training.trainer import FusMAETrainer


def build_model(arguments: ModelArguments, info: PairsInfo, image_size: tuple[int, int]) -> FusMAEForPreTraining:
    """A fresh model for the bands and size of the data, or the checkpoint that was named."""
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model is not None:
        if arguments.config_fields:
            raise ValueError("`config` describes a fresh model; with `model` the checkpoint's configuration holds.")
        return FusMAEForPreTraining.from_pretrained(arguments.model, **attention)
    fields = {"optical_bands": info.optical_bands, "sar_bands": info.sar_bands, "image_size": image_size}
    config = FusMAEConfig.from_preset(arguments.preset, **{**fields, **arguments.config_fields})
    return FusMAEForPreTraining._from_config(config, **attention)


def build_processor(
    data: DataArguments, arguments: ModelArguments, info: PairsInfo, config: FusMAEConfig
) -> FusMAEImageProcessor:
    """The checkpoint's processor, or a fresh one for the units and statistics of the data."""
    if arguments.model is not None:
        return FusMAEImageProcessor.from_pretrained(arguments.model)
    statistics = data.statistics or info.statistics
    if statistics is None:
        raise ValueError(
            f"The shards of {info.name} name no band statistics. Pass `--statistics` with the name of a dataset "
            "like it (bigearthnet, reben)."
        )
    return FusMAEImageProcessor(
        sar_bands=config.sar_bands,
        optical_bands=config.optical_bands,
        statistics=statistics,
        sar_units=info.sar_units,
        optical_units=info.optical_units,
        optical_offset=info.optical_offset,
    )


def checkpoint_to_resume(arguments: PretrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names, or the newest of the output folder for `auto`."""
    wanted = arguments.resume_from_checkpoint
    if wanted in (None, "", "false", "False"):
        return None
    if wanted not in ("auto", "true", "True"):
        return wanted
    folder = str(arguments.output_dir)
    newest = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if newest is None:
        print(f"No checkpoint in {folder}: starting from the beginning.")
    else:
        print(f"Resuming from {newest}, the newest in {folder}.")
    return newest


def run_record(
    arguments: PretrainingArguments,
    model: ModelArguments,
    train: PairDataset,
    held_out: dict[str, PairDataset],
    steps: int,
) -> dict:
    """What somebody needs to repeat the run."""
    content = hashlib.sha256("".join(s.content_hash for s in train.dataset_info.shards("train")).encode()).hexdigest()
    return {
        "command": shlex.join(["run_pretrain.py", *sys.argv[1:]]),
        "preset": Path(model.model).name if model.model else model.preset,
        "data": train.info.name,
        "simulated": train.info.simulated,
        "pairs": len(train),
        "content": content[:16],
        "held_out": {name: len(dataset) for name, dataset in held_out.items()},
        "steps": steps,
        "global_batch_size": arguments.global_batch_size,
        "seed": arguments.seed,
        "learning_rate": arguments.learning_rate,
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "processes": arguments.world_size,
        "versions": {
            "fusmae_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def summary(folder: Path, record: dict, metrics: dict[str, float]) -> str:
    """Where everything is, what was measured, and what to try next."""
    pictures = sorted(path.name for path in folder.glob("*.png"))
    return "\n".join(
        [
            "",
            f"Done: {record['steps']:,} steps of {record['global_batch_size']} pairs on {record['pairs']:,} pairs of "
            f"{record['data']}{' (simulated imagery)' if record['simulated'] else ''}.",
            "",
            "Held-out error on masked pixels (squared standard deviations; lower is better):",
            results_table(metrics, record["held_out"]),
            "",
            f"In {folder}:",
            "  model.safetensors, config.json, preprocessor_config.json   the checkpoint",
            "  README.md                                                  its model card",
            f"  {', '.join(pictures):<58} look at these",
            "  run.json, runs/                                            record of the run, TensorBoard logs",
            "",
            "Next:",
            f'  AutoModel.from_pretrained("{folder}")   features, after `import fusmae_hf`',
            "  make pretrain DATA=<folder>   the same on your own shards or a BigEarthNet archive",
            f"  tensorboard --logdir {folder}",
        ]
    )


@contextmanager
def explained() -> Iterator[None]:
    """End with a message instead of a traceback where the arguments or the data are at fault."""
    try:
        yield
    except (OSError, ValueError, ImportError, PairError, StrictDataclassError) as error:
        raise SystemExit(f"Error: {error}") from error


def main(argv: list[str] | None = None) -> None:
    """Run the program; see the module's docstring and `--help`."""
    data, model_arguments, arguments = parse_arguments(
        (DataArguments, ModelArguments, PretrainingArguments), argv, description=__doc__
    )
    logging.basicConfig(level=logging.INFO if arguments.should_log else logging.WARNING, format="%(message)s")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(arguments.output_dir) / "runs"))
    arguments.scale_learning_rate()
    set_seed(arguments.seed)
    with explained():
        with arguments.main_process_first(desc="preparing the data"):
            train, held_out = open_datasets(data, Path(arguments.output_dir).parent / "shards")
        if not held_out:
            arguments.eval_strategy = "no"
            print(f"Nothing is held out: {train.root} has no validation split, so no held-out loss is measured.")
        model = build_model(model_arguments, train.info, tuple(train[0]["optical"].shape[-2:]))
        processor = build_processor(data, model_arguments, train.info, model.config)
        trainer = FusMAETrainer(
            model=model,
            processor=processor,
            train_dataset=train,
            eval_dataset=held_out or None,
            augmentation=augmentation_of(data, arguments.seed),
            args=arguments,
        )
        trainer._get_train_sampler()  # too few pairs for a batch are found here, before anything is started
        checkpoint = checkpoint_to_resume(arguments)
    pictures = PictureCallback(trainer, held_out, arguments.num_reconstructions)
    trainer.add_callback(pictures)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if held_out else {}
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir)
        record = run_record(arguments, model_arguments, train, held_out, trainer.state.global_step)
        record |= {
            "augmentation": dataclasses.asdict(trainer.augmentation) if trainer.augmentation else None,
            "bad_files": train.bad_files,
            "replaced_pairs": trainer.replaced_pairs,
        }
        (folder / "run.json").write_text(json.dumps({**record, "metrics": metrics}, indent=2) + "\n")
        write_model_card(
            folder, config=model.config, processor=processor, info=train.info, record=record, metrics=metrics
        )
        print(summary(folder, record, metrics))


if __name__ == "__main__":
    main()
