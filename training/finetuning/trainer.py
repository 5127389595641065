"""The Trainer for fine-tuning: labels beside the pairs, learning rates by depth, metrics of the task."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.finetuning_collation import LabelCollator
from fusmae_hf.data.inputs import given_size, image_size
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.modeling.labels_fusmae import IGNORED, check_labels
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.finetuning.labels import PairSubset
from fusmae_hf.training.finetuning.metrics import TaskMetrics, predictions_of
from fusmae_hf.training.loop.trainer import PairTrainer
from fusmae_hf.vocabulary import Sensors

_ENCODER_PART = re.compile(r"(?:^|\.)fusmae\.(?:(embeddings)|(fusion)|layers\.(\d+))\.")


def parameter_depth(name: str, num_layers: int) -> int:
    """Depth of a parameter: 0 for patch projections and class token, 1 for the early fusion, 2 and more for the joint
    layers, `num_layers + 2` for the head and the last layer norm."""
    match = _ENCODER_PART.search(name)
    if match is None:
        return num_layers + 2
    return 0 if match[1] else 1 if match[2] else int(match[3]) + 2


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    decayed: Iterable[str],
    num_layers: int,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: the head learns at the full rate, each layer below at `layer_decay` times the next.

    Args:
        parameters: by name; frozen ones are left out.
        decayed: names of those with weight decay.
        num_layers: joint layers of the encoder.
        learning_rate: of the head.
        weight_decay: of those that have it.
        layer_decay: in (0, 1].

    Returns:
        Dictionaries with `params`, `names`, `lr` and `weight_decay`, the head's first.

    Source: Clark et al., "ELECTRA" (2020); for masked autoencoders, He et al. (2022).
    """
    decayed, groups = set(decayed), dict[tuple[int, bool], dict[str, Any]]()
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        depth = parameter_depth(name, num_layers)
        group = groups.setdefault(
            (-depth, name not in decayed),
            {
                "params": [],
                "names": [],
                "lr": learning_rate * layer_decay ** (num_layers + 2 - depth),
                "weight_decay": weight_decay if name in decayed else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


class FineTuningTrainer(PairTrainer):
    """Fine-tunes a head and, unless it is frozen, the encoder on labelled pairs.

    Args:
        model: of the class `task.model_class`.
        processor: picks bands and normalises; saved beside the weights.
        task: what is learnt.
        train_dataset: pairs to train on.
        eval_dataset: pairs held out.
        targets: quantity of each scene, by id, for the regression of one.
        augmentation: random views of the training pairs, their label maps included.
        sensors: which sensors the model is shown.
        layer_decay: see `parameter_groups`.
        scale: mean and deviation of a quantity, by which its labels are normalised for the model.
        threshold: for F1.
        modality_dropout: share of the steps that show SAR alone, and share of those that show optical alone.
        kwargs: as for transformers' Trainer.

    Raises:
        ValueError: `layer_decay` is out of range, label smoothing does not suit the task or its loss, or the model is
            sharded (FSDP).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: FusMAEImageProcessor,
        task: FineTuningTask,
        train_dataset: PairDataset | PairSubset,
        eval_dataset: PairDataset | dict[str, PairDataset] | None = None,
        *,
        targets: Mapping[str, float] | None = None,
        augmentation: PairAugmentation | None = None,
        sensors: Sensors = "both",
        layer_decay: float = 1.0,
        scale: tuple[float, float] = (0.0, 1.0),
        threshold: float = 0.5,
        modality_dropout: float = 0.0,
        **kwargs,
    ):
        if not 0 < layer_decay <= 1:
            raise ValueError(f"`layer_decay` must lie in (0, 1], not {layer_decay}; 1 is one rate for all layers.")
        self.task, self.layer_decay, self.scale = task, layer_decay, scale
        self.metrics = TaskMetrics(task, threshold)
        self.modality_dropout = modality_dropout
        self._place = (-1, 0)
        _check_smoothing(kwargs["args"].label_smoothing_factor, task, model.config)
        super().__init__(
            model=model,
            processor=processor,
            train_dataset=cast(PairDataset, train_dataset),
            collator=LabelCollator(task, targets, augmentation),
            eval_dataset=eval_dataset,
            augmentation=augmentation,
            sensors=sensors,
            compute_metrics=self.metrics,
            **kwargs,
        )
        if self.label_smoother is not None:  # transformers' own divides by the number of labels that count
            smoother: Any = functools.partial(smoothed_loss, kwargs["args"].label_smoothing_factor)
            self.label_smoother = smoother
        if self.is_fsdp_enabled:
            raise ValueError(
                "Fine-tuning does not run on a sharded model (FSDP): maps and pictures are made by one process. "
                "Launch it with training/accelerate/ddp.yaml, a copy of the model on each device."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the arguments, with a learning rate for each depth."""
        trained = cast(PreTrainedModel, self.model if model is None else model)
        if self.optimizer is None and self.layer_decay < 1:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained.named_parameters(),
                self.get_decay_parameter_names(trained),
                self.accelerator.unwrap_model(trained).config.num_hidden_layers,
                self.args.learning_rate,
                self.args.weight_decay,
                self.layer_decay,
            )
            self.optimizer = optimizer(
                [{k: v for k, v in group.items() if k != "names"} for group in groups], **options
            )
        return super().create_optimizer(trained)

    @property
    def sensors_shown(self) -> Sensors:
        """Sensors that the model is shown now: those of a training batch are drawn from seed, step and batch, alike in
        all processes."""
        training = cast(PreTrainedModel, self.model).training
        if not self.modality_dropout or not training or self._place[0] != self.state.global_step:
            return self.sensors
        drawn = np.random.default_rng([self.args.seed, *self._place]).random()
        dropped = self.modality_dropout
        return "sar" if drawn < dropped else "optical" if drawn < 2 * dropped else self.sensors

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints."""
        return super().identity() | {"modality_dropout": self.modality_dropout}

    def prepare_pairs(self, batch: dict[str, Any], sensors: Sensors | None = None) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs, with their labels. Pairs that lack the one sensor shown have
        labels that do not count."""
        sensors = sensors or self.sensors_shown
        inputs = super().prepare_pairs(batch, sensors)
        labels: Any = batch.get("labels")
        if self.task.dense:
            labels = self.task.dense_labels(inputs.pop("label_map"), given_size(batch), image_size(inputs))
        if self.task.is_regression:
            mean, deviation = self.scale
            labels = (labels - mean) / deviation
        if (there := batch.get(f"{sensors}_available")) is not None:
            nothing = float("nan") if self.task.is_regression else self.task.ignore_index
            labels = torch.where(there.view(-1, *[1] * (labels.ndim - 1)), labels, nothing)
        return {**inputs, "labels": labels}

    def try_batch(self) -> None:
        """Run the model on a few training pairs, so that what does not fit is found before training starts.

        Raises:
            ValueError: pairs, labels and model do not fit; says how.
        """
        number = min(len(self.pairs), self.args.per_device_train_batch_size)
        model = cast(PreTrainedModel, self.model).eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self.model_inputs(self.collator(self.pairs.__getitems__(range(number))))
            images = next(
                inputs[name] for name in ("pixel_values", "pixel_values_sar") if inputs.get(name) is not None
            )
            # The model looks at their values on the CPU alone.
            check_labels(inputs["labels"].cpu(), images, model.config, dense=self.task.dense)
            model(**inputs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One batch. Stochastic depth draws from seed, step, batch and process: random numbers restored with a
        checkpoint would not do, since loaders draw from them whenever their workers start."""
        step, batch = self.state.global_step, 0
        if self._place[0] == step:
            batch = self._place[1] + 1
        self._place = (step, batch)
        if cast(PreTrainedModel, self.model).config.drop_path_rate:
            key = [self.args.seed, step, batch, self.args.process_index]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
        return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss of a held-out batch, and what `predictions_of` keeps of it."""
        replaced = inputs.get("replaced")
        if (available := inputs.get(f"{self.sensors}_available")) is not None:
            # Images of pairs that lack the one sensor shown hold nothing, and do not count.
            replaced = ~available if replaced is None else replaced | ~available
        inputs = self.model_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            loss = self.held_out_loss(model, inputs, outputs)
        if prediction_loss_only:
            return loss, None, None
        return loss, *predictions_of(self.task, outputs["logits"], inputs["labels"], self.scale, replaced)


def smoothed_loss(factor: float, outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Cross-entropy `()` with label smoothing (Szegedy et al., 2016, arXiv 1512.00567), zero where no label counts.

    Args:
        factor: share of the probability that all classes get alike.
        outputs: with `logits` `(batch, classes)`.
        labels: `(batch,)`, -100 where there is none.
        kwargs: what the Trainer hands to a loss.
    """
    logits, counted = outputs["logits"].float(), (labels != IGNORED).sum().clamp(min=1)
    options: Any = {"label_smoothing": factor, "ignore_index": IGNORED, "reduction": "sum"}
    return nn.functional.cross_entropy(logits, labels, **options) / counted


def _check_smoothing(factor: float, task: FineTuningTask, config: Any) -> None:
    if not factor:
        return
    if task.name != "single_label_classification":
        raise ValueError(f"Label smoothing is for single-label classification, not for {task.name}: leave it out.")
    if config.class_weights is not None or config.focal_gamma:
        raise ValueError(
            "Label smoothing replaces the model's loss, so that class weights and the focal loss would be ignored: "
            "choose one."
        )
