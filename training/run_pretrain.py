"""Pretrain Fus-MAE on pairs of Sentinel-1 and Sentinel-2 patches.

    accelerate launch training/run_pretrain.py training/configs/smoke.yaml --data shards --output_dir outputs/run

Ends with a checkpoint (weights, configuration, processor, remote code, model card), `loss.png`, `reconstructions.png`
and `run.json` in the output folder.
"""

import dataclasses
import json
import logging
from pathlib import Path

from transformers import set_seed

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.hub.cards import error_unit, results_table, write_model_card
from fusmae_hf.hub.checkpoint_loading import looked_up
from fusmae_hf.hub.checkpoints import CheckpointNotWrittenError
from fusmae_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    PretrainingArguments,
    parse_arguments,
    spell_out_attention,
)
from fusmae_hf.training.loop.nonfinite import NonFiniteError
from fusmae_hf.training.loop.output_folder import require_writable
from fusmae_hf.training.loop.processes import in_turn, lost_processes_explained
from fusmae_hf.training.loop.records import (
    checkpoint_to_resume,
    explained,
    fresh_processor,
    run_record,
    tensorboard_in,
)
from fusmae_hf.training.loop.signals import ends_by_signal
from fusmae_hf.training.pretraining.pictures import PictureCallback
from fusmae_hf.training.pretraining.trainer import FusMAETrainer
from fusmae_hf.training.sources import augmentation_of, open_datasets


def build_model(arguments: ModelArguments, info: PairsInfo, image_size: tuple[int, int]) -> FusMAEForPreTraining:
    """A fresh model for the bands and size of the data, or the checkpoint that was named."""
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model is not None:
        if arguments.config_fields:
            raise ValueError("`config` describes a fresh model; with `model` the checkpoint's configuration holds.")
        with looked_up(arguments.model):
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
    return fresh_processor(data, info, config)


def summary(folder: Path, record: dict, metrics: dict[str, float], unit: str) -> str:
    """Where everything is, what was measured, and what to try next."""
    pictures = sorted(path.name for path in folder.glob("*.png"))
    return "\n".join(
        [
            "",
            f"Done: {record['steps']:,} steps of {record['global_batch_size']} pairs on {record['pairs']:,} pairs of "
            f"{record['data']}{' (simulated imagery)' if record['simulated'] else ''}.",
            "",
            f"Held-out error on masked pixels ({unit}; lower is better):",
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


@ends_by_signal()
@lost_processes_explained()
def main(argv: list[str] | None = None) -> None:
    """Run the program; see the module's docstring and `--help`."""
    data, model_arguments, arguments = parse_arguments(
        (DataArguments, ModelArguments, PretrainingArguments), argv, description=__doc__
    )
    logging.basicConfig(level=logging.INFO if arguments.should_log else logging.WARNING, format="%(message)s")
    arguments.scale_learning_rate()
    set_seed(arguments.seed)
    with explained():
        require_writable(arguments.output_dir)
        with in_turn():
            train, held_out = open_datasets(data, Path(arguments.output_dir).parent / "shards")
        if not held_out:
            arguments.eval_strategy = "no"
            print(f"Nothing is held out: {train.root} has no validation split, so no held-out loss is measured.")
        size = tuple(train[0]["optical"].shape[-2:])
        model = build_model(model_arguments, train.info, size)
        if arguments.bf16 and model_arguments.attn_implementation is None:
            spell_out_attention(model, arguments.device.type, size)
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
        trainer.check_checkpoint(checkpoint)
    pictures = PictureCallback(trainer, held_out, arguments.num_reconstructions)
    trainer.add_callback(pictures)
    with tensorboard_in(arguments.output_dir), explained(CheckpointNotWrittenError, NonFiniteError):
        trained = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate() if held_out else {}
    replaced, speed = trainer.replaced_everywhere(), trainer.speed.report_run()
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir)
        record = run_record("run_pretrain.py", arguments, train, held_out, trainer.state.global_step)
        record |= {
            "preset": Path(model_arguments.model).name if model_arguments.model else model_arguments.preset,
            "augmentation": dataclasses.asdict(trainer.augmentation) if trainer.augmentation else None,
            "replaced_pairs": replaced,
            "nonfinite_steps": trainer.nonfinite_steps,
            "speed": speed,
            "train_seconds": trained.metrics["train_runtime"],
        }
        (folder / "run.json").write_text(json.dumps({**record, "metrics": metrics}, indent=2) + "\n")
        write_model_card(
            folder, config=model.config, processor=processor, info=train.info, record=record, metrics=metrics
        )
        if arguments.push_to_hub:
            print(trainer.push_to_hub())
        print(summary(folder, record, metrics, error_unit(model.config)))


if __name__ == "__main__":
    main()
