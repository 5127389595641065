"""The Trainer of Fus-MAE: transformers' own, fed with raw pairs that are normalised on the device."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import EvalPrediction

from fusmae_hf import FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.evaluation.baselines import (
    as_logits,
    interpolate_visible,
    predict_visible_mean,
    visible_pixels,
)
from fusmae_hf.flops import pretraining_flops
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.loop.pair_trainer import PairTrainer

SENSORS = {"optical": "", "sar": "_sar"}
"""Suffix of the model's inputs and outputs by sensor."""

HELD_OUT_METRICS = [f"{sensor}_loss{kind}" for sensor in SENSORS for kind in ("", "_visible_mean", "_interpolation")]
"""Mean squared errors on masked, valid pixels: of the model, of the visible pixels' mean, of interpolating them."""


class PretrainingCollator(PairCollator):
    """Leaves out labels, which pretraining does not see, and adds the masking noise."""

    def __call__(self, batch: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `PairCollator`."""
        batch = super().__call__(batch)
        return {key: value for key, value in batch.items() if key not in ("labels", "label_map")}


class FusMAETrainer(PairTrainer):
    """Pretrains [`FusMAEForPreTraining`] on prepared pairs.

    Batches reach the device as they lie in the shards, raw integers included; the processor normalises them there.
    Order, masks and evaluation are pure functions of seed and epoch, so that a cut run resumes exactly.

    Args:
        model: the model to train.
        processor: picks bands and normalises; saved beside the weights.
        train_dataset: pairs to train on.
        eval_dataset: pairs held out, one dataset or several by name.
        augmentation: random views of the training pairs; none by default.
        kwargs: as for transformers' Trainer.
    """

    def __init__(
        self,
        model: FusMAEForPreTraining,
        processor: FusMAEImageProcessor,
        train_dataset: PairDataset,
        eval_dataset: PairDataset | dict[str, PairDataset] | None = None,
        augmentation: PairAugmentation | None = None,
        **kwargs,
    ):
        super().__init__(
            model=model,
            processor=processor,
            train_dataset=train_dataset,
            collator=PretrainingCollator(model.config.patch_size, seed=kwargs["args"].seed, augmentation=augmentation),
            eval_dataset=eval_dataset,
            augmentation=augmentation,
            compute_metrics=mean_of_held_out,
            **kwargs,
        )

    def prepare_pairs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs, with the masking noise."""
        return {**super().prepare_pairs(batch), "noise": batch["noise"], "noise_sar": batch["noise_sar"]}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch; the losses of each sensor are kept for the next log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            for sensor in SENSORS:
                part = outputs.get(f"{sensor}_loss")
                if part is not None:
                    self.note_loss(f"{sensor}_loss", part)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the matrix products of a training step on a batch of raw pairs, see `fusmae_hf.flops`."""
        size, (height, width) = len(inputs["row"]), inputs["sar"].shape[-2:]
        config = cast(FusMAEForPreTraining, self.model).config
        return round(size * pretraining_flops(config, height, width, sensors=self.sensors, batch_size=size))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the losses of each sensor since the last log."""
        if "loss" in logs:
            logs |= self.mean_losses()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of a held-out batch, and the errors of every sample instead of its pixels."""
        replaced = inputs.get("replaced")
        inputs = self._prepare_inputs(inputs)
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
        for suffix in SENSORS.values():
            images, pixel_mask = inputs.get(f"pixel_values{suffix}"), inputs.get(f"pixel_mask{suffix}")
            if images is None:
                columns += [torch.full((len(inputs["noise"]),), float("nan"))] * 3
                continue
            mask = outputs[f"mask{suffix}"]
            visible = visible_pixels(mask, images.shape[2], images.shape[3], size)
            if pixel_mask is not None:
                visible = visible & pixel_mask
            columns.append(model.sensor_error(outputs[f"logits{suffix}"], images, mask, pixel_mask))
            for guess in (predict_visible_mean(images, visible), interpolate_visible(images, visible, size)):
                error = model.sensor_error(as_logits(guess, size), images, mask, pixel_mask)
                columns.append(torch.full_like(error, float("nan")) if model.config.norm_pix_loss else error)
        return torch.stack([column.to(outputs["loss"].device) for column in columns], dim=1)


def mean_of_held_out(prediction: EvalPrediction) -> dict[str, float]:
    """Mean over the held-out samples of each of `HELD_OUT_METRICS` that was measured."""
    errors = np.asarray(prediction.predictions)
    means = {
        name: of_samples[of_samples == of_samples] for name, of_samples in zip(HELD_OUT_METRICS, errors.T, strict=True)
    }
    return {name: float(of_samples.mean()) for name, of_samples in means.items() if of_samples.size}
