"""Pretrain Fus-MAE on pairs of Sentinel-1 and Sentinel-2 patches.

    accelerate launch training/run_pretrain.py training/configs/smoke.yaml --data shards --output_dir outputs/run

Ends with a checkpoint (weights, configuration, processor, remote code, model card), `loss.png`, `reconstructions.png`
and `run.json` in the output folder.
"""

from fusmae_hf.training.short_help import PRETRAIN, answer_early

if __name__ == "__main__":
    answer_early(__doc__, PRETRAIN)  # before the imports, which take seconds


import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import EvalPrediction, TrainerCallback, set_seed

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import image_size
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.evaluation.baselines import as_logits
from fusmae_hf.flops import pretraining_flops
from fusmae_hf.hub.cards import error_unit, results_table, write_model_card
from fusmae_hf.hub.checkpoint_loading import looked_up
from fusmae_hf.modeling.configuration_fusmae import OBJECTIVES
from fusmae_hf.modeling.patches_fusmae import interpolate_visible, predict_visible_mean, visible_pixels
from fusmae_hf.plots.model import plot_reconstructions, reconstruct_images
from fusmae_hf.plots.scores import plot_losses
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    PretrainingArguments,
    parse_arguments,
    spell_out_attention,
)
from fusmae_hf.training.loop.checkpoints import CheckpointNotWrittenError
from fusmae_hf.training.loop.nonfinite import NonFiniteError
from fusmae_hf.training.loop.processes import (
    fork_workers_from_a_server,
    in_turn,
    lost_processes_explained,
)
from fusmae_hf.training.loop.records import (
    explained,
    fresh_config,
    fresh_processor,
    require_writable,
    run_record,
    tensorboard_in,
)
from fusmae_hf.training.loop.resuming import checkpoint_to_resume
from fusmae_hf.training.loop.signals import ends_by_signal, interrupted_with_a_sentence
from fusmae_hf.training.loop.trainer import PairTrainer
from fusmae_hf.training.sources import augmentation_of, open_datasets, take_pixel_size
from fusmae_hf.vocabulary import Sensors

SENSORS = {"optical": "", "sar": "_sar"}
"""Suffix of the model's inputs and outputs by sensor."""

PARTS = [*(f"{sensor}_loss" for sensor in SENSORS), "contrastive_loss"]
"""Parts of the loss that are logged, where the model has them."""

HELD_OUT_METRICS = [
    *(f"{sensor}_loss{kind}" for sensor in SENSORS for kind in ("", "_visible_mean", "_interpolation")),
    "contrastive_loss",
]
"""Mean squared errors on masked, valid pixels: of the model, of the visible pixels' mean, of interpolating them; and
the contrastive loss of the batch that a pair was in."""


class PretrainingCollator(PairCollator):
    """Leaves out labels, which pretraining does not see, and adds the masking noise."""

    def __call__(self, batch: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `PairCollator`."""
        batch = super().__call__(batch)
        return {key: value for key, value in batch.items() if key not in ("labels", "label_map")}


class FusMAETrainer(PairTrainer):
    """Pretrains [`FusMAEForPreTraining`] on prepared pairs; masks, too, are pure functions of seed and epoch.

    Args:
        model: the model to train.
        processor: picks bands and normalises; saved beside the weights.
        train_dataset: pairs to train on.
        augmentation: random views of the training pairs; none by default.
        kwargs: as for `PairTrainer`.
    """

    def __init__(
        self,
        model: FusMAEForPreTraining,
        processor: FusMAEImageProcessor,
        train_dataset: PairDataset,
        *,
        augmentation: PairAugmentation | None = None,
        **kwargs,
    ):
        collator = PretrainingCollator(model.config.patch_size, seed=kwargs["args"].seed, augmentation=augmentation)
        kwargs |= {"augmentation": augmentation, "compute_metrics": mean_of_held_out}
        super().__init__(model, processor, train_dataset, collator, **kwargs)

    def prepare_pairs(self, batch: dict[str, Any], sensors: Sensors | None = None) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs, with the masking noise."""
        inputs = super().prepare_pairs(batch, sensors)
        height, width = image_size(inputs)
        patches = height * width // self.collator.patch_size**2  # of a window there are fewer
        return inputs | {name: batch[name][:, :patches] for name in ("noise", "noise_sar")}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch; its parts are kept for the next log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            for name in PARTS:
                if (part := outputs.get(name)) is not None:
                    self.steps.note(name, part)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Those of transformers, without the temperature of the contrastive loss."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_scale")]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the matrix products of a training step on a batch of raw pairs, see `fusmae_hf.flops`."""
        config = cast(FusMAEForPreTraining, self.model).config
        size, (height, width) = len(inputs["row"]), inputs["sar"].shape[-2:]
        if not self.augmentation or self.augmentation.window == 1:  # padded, not cut
            height, width = (-(-side // config.patch_size) * config.patch_size for side in (height, width))
        return round(size * pretraining_flops(config, height, width, sensors=self.sensors, batch_size=size))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of a held-out batch, and the errors of every sample instead of its pixels."""
        replaced = inputs.get("replaced")
        inputs = self.model_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            errors = self.held_out_errors(inputs, outputs)
            if replaced is not None:  # the pair that stands in counts once, at its own place
                errors[replaced.to(errors.device)] = float("nan")
            loss = self.held_out_loss(model, inputs, outputs)
        return loss, errors, torch.zeros_like(errors[:, :1])

    def held_out_errors(self, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Errors of each sample, `(batch_size, len(HELD_OUT_METRICS))`; NaN where a sensor is missing.

        Reconstructions without learning are compared in pixels, so they are NaN too with `norm_pix_loss`.
        """
        model = self.accelerator.unwrap_model(self.model)
        size = model.config.patch_size
        columns = []
        for sensor, suffix in SENSORS.items():
            images, pixel_mask = inputs.get(f"pixel_values{suffix}"), inputs.get(f"pixel_mask{suffix}")
            if images is None:
                columns += [torch.full((len(inputs["noise"]),), float("nan"))] * 3
                continue
            mask = outputs[f"mask{suffix}"]
            visible = visible_pixels(mask, images.shape[2], images.shape[3], size)
            if pixel_mask is not None:
                visible = visible & pixel_mask
            of_sensor = [model.sensor_error(outputs[f"logits{suffix}"], images, mask, pixel_mask)]
            for guess in (predict_visible_mean(images, visible), interpolate_visible(images, visible, size)):
                error = model.sensor_error(as_logits(guess, size), images, mask, pixel_mask)
                of_sensor.append(torch.full_like(error, float("nan")) if model.config.norm_pix_loss else error)
            if (available := inputs.get(f"{sensor}_available")) is not None:
                of_sensor = [torch.where(available, error, float("nan")) for error in of_sensor]
            columns += of_sensor
        contrast = outputs.get("contrastive_loss")
        none = torch.full_like(columns[0], float("nan"))
        columns.append(none if contrast is None else contrast.detach().expand(len(none)))
        return torch.stack([column.to(outputs["loss"].device) for column in columns], dim=1)


def mean_of_held_out(prediction: EvalPrediction) -> dict[str, float]:
    """Mean over the held-out samples of each of `HELD_OUT_METRICS` that was measured."""
    errors = np.asarray(prediction.predictions)
    means = {
        name: of_samples[of_samples == of_samples] for name, of_samples in zip(HELD_OUT_METRICS, errors.T, strict=True)
    }
    return {name: float(of_samples.mean()) for name, of_samples in means.items() if of_samples.size}


class PictureCallback(TrainerCallback):
    """Draws held-out reconstructions at each evaluation, and the loss curves.

    Args:
        trainer: prepares the pairs as it does for training.
        held_out: datasets to draw pairs of, by name; the first gives `reconstructions.png`, any further
            `reconstructions-<name>.png`.
        number: pairs to draw of each; 0 for no reconstructions.
    """

    def __init__(self, trainer: FusMAETrainer, held_out: dict[str, PairDataset], number: int):
        self.trainer = trainer
        self.pictured = {
            "reconstructions.png" if position == 0 else f"reconstructions-{name}.png": (name, dataset)
            for position, (name, dataset) in enumerate(held_out.items())
            if number
        }
        self.last = list(held_out)[-1] if held_out else None
        self.number = number

    def draw(self) -> None:
        """Write all pictures into the output folder. Every process runs the model, the first one draws."""
        trainer, folder = self.trainer, Path(self.trainer.args.output_dir or ".")
        for file, (name, dataset) in self.pictured.items():
            batch = trainer.collator(dataset.__getitems__(range(min(self.number, len(dataset)))))
            inputs = trainer.model_inputs(batch)
            with torch.no_grad():
                model, size = cast(FusMAEForPreTraining, trainer.model), tuple(batch["sar"].shape[-2:])
                pictures = reconstruct_images(model, inputs, trainer.processor, size)
            if trainer.is_world_process_zero():
                kind = "simulated imagery" if dataset.info.simulated else dataset.info.name
                title = f"Held-out pairs ({name}: {kind}) after step {trainer.state.global_step}"
                plot_reconstructions(pictures, trainer.processor, title, batch["id"]).savefig(folder / file, dpi=110)
        if trainer.is_world_process_zero() and trainer.state.log_history:
            title = f"Reconstruction losses, trained on {trainer.info.name} pairs"
            plot_losses(trainer.state.log_history, title).savefig(folder / "loss.png", dpi=110)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Draw once all held-out datasets are evaluated; the Trainer evaluates them in turn."""
        if f"eval_{self.last}_loss" in (metrics or {}):
            self.draw()


def build_model(
    arguments: ModelArguments, info: PairsInfo, size: tuple[int, int], objective: str | None = None
) -> FusMAEForPreTraining:
    """A fresh model for the bands and size of the data, or the checkpoint that was named; with a named objective."""
    fields: dict[str, Any] = {} if objective is None else dict(OBJECTIVES[objective])
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model is not None:
        if arguments.config_fields:
            raise ValueError("`config` describes a fresh model; with `model` the checkpoint's configuration holds.")
        with looked_up(arguments.model):
            model = FusMAEForPreTraining.from_pretrained(arguments.model, **fields, **attention)
        take_pixel_size(model, info)
        return model
    config = fresh_config(arguments, info, size, fields)
    return FusMAEForPreTraining._from_config(config, **attention)


def check_contrast(config: FusMAEConfig, arguments: PretrainingArguments, pairs: PairDataset) -> None:
    """Raise a ValueError where the contrastive loss would have nothing to compare in any step."""
    batch_size = arguments.per_device_train_batch_size * arguments.world_size
    if not config.contrastive_loss_weight:
        return
    instead = "or pretrain with `--objective fusmae`, the paper's, which has no contrastive loss."
    if batch_size < 2:
        raise ValueError(
            "The contrastive loss tells the pairs of a batch from each other, but "
            f"`per_device_train_batch_size` is {batch_size} on one process: give at least 2, better 32 and more, "
            f"{instead} Accumulated batches are not compared with each other."
        )
    for sensor, absent in pairs.dataset_info.absent(pairs.split).items():
        if absent >= len(pairs):
            raise ValueError(
                f"The contrastive loss compares both sensors of a pair, but none of the {len(pairs):,} training pairs "
                f"has {sensor} images: add pairs of both, {instead}"
            )


def build_processor(
    data: DataArguments, arguments: ModelArguments, info: PairsInfo, config: FusMAEConfig
) -> FusMAEImageProcessor:
    """The checkpoint's processor, or a fresh one for the units and statistics of the data."""
    if arguments.model is not None:
        return FusMAEImageProcessor.from_pretrained(arguments.model)
    return fresh_processor(data, info, config)


def summary(folder: Path, record: dict, metrics: dict[str, float], unit: str, logs: bool) -> str:
    """Where everything is, what was measured, and what to try next; with TensorBoard's `logs` where there are any."""
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
            "  run.json                                                   record of the run",
            *(["  runs/                                                      TensorBoard logs"] if logs else []),
            "",
            "Next:",
            f'  AutoModel.from_pretrained("{folder}")   features, after `import fusmae_hf`',
            "  make pretrain DATA=<folder>   the same on your own shards or a BigEarthNet archive",
            *([f"  tensorboard --logdir {folder}"] if logs else []),
        ]
    )


@ends_by_signal()
@lost_processes_explained()
def main(argv: list[str] | None = None) -> None:
    """Run the program; see the module's docstring and `--help`."""
    with explained():
        data, model_arguments, arguments = parse_arguments(
            (DataArguments, ModelArguments, PretrainingArguments), argv, description=__doc__
        )
    logging.basicConfig(level=logging.INFO if arguments.should_log else logging.WARNING, format="%(message)s")
    arguments.scale_learning_rate()
    set_seed(arguments.seed)
    with explained():
        require_writable(arguments.output_dir)
        fork_workers_from_a_server(arguments, "fusmae_hf.training.run_pretrain")
        with in_turn():
            train, held_out = open_datasets(data, Path(arguments.output_dir).parent / "shards")
        if not held_out:
            arguments.choose_best_by(())
            print(f"Nothing is held out: {train.root} has no validation split, so no held-out loss is measured.")
        elif arguments.load_best_model_at_end or arguments.metric_is_given:
            losses = ("loss", *PARTS)
            arguments.choose_best_by([f"{name}_{loss}" for name in held_out for loss in losses])
        size = tuple(train[0]["optical"].shape[-2:])
        model = build_model(model_arguments, train.info, size, arguments.objective)
        check_contrast(model.config, arguments, train)
        if arguments.bf16 and model_arguments.attn_implementation is None:
            spell_out_attention(model, arguments.device.type, size)
        processor = build_processor(data, model_arguments, train.info, model.config)
        trainer = FusMAETrainer(
            model=model,
            processor=processor,
            train_dataset=train,
            eval_dataset=held_out or None,
            augmentation=augmentation_of(data, arguments.seed, size, model.config.patch_size),
            args=arguments,
        )
        trainer.train_sampler()  # too few pairs for a batch are found here, before anything is started
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
        record = run_record("run_pretrain.py", trainer, held_out)
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
        logs = (folder / "runs").is_dir()
        print(summary(folder, record, metrics, error_unit(model.config), logs))


if __name__ == "__main__":
    with interrupted_with_a_sentence():
        main()
