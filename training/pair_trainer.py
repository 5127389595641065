"""What every Trainer on pairs shares: their order, their way onto the device, and the count of damaged ones."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import PairInputs, Sensors
from fusmae_hf.data.loading import PairDataset


def check_same_sensors(datasets: Sequence[PairDataset]) -> None:
    """Raise a ValueError unless all datasets agree in bands, units and offset, which one processor then undoes."""
    first = datasets[0].info
    for dataset in datasets[1:]:
        for name in ("sar_bands", "optical_bands", "sar_units", "optical_units", "optical_offset"):
            if getattr(dataset.info, name) != getattr(first, name):
                raise ValueError(
                    f"{datasets[0].root} and {dataset.root} differ in {name}: {getattr(first, name)} and "
                    f"{getattr(dataset.info, name)}. Prepare them alike, or train on one of them."
                )


def packed(datasets: Any, factors: Sequence[int]) -> Any:
    """The same datasets, optical bands left in their own resolution: they are brought onto one grid on the device.

    Datasets that are not stored with the resolutions of training, `factors`, give their bands on one grid already.
    """
    if isinstance(datasets, dict):
        return {name: packed(dataset, factors) for name, dataset in datasets.items()}
    if datasets is not None:
        datasets = copy.copy(datasets)
        datasets.packed = tuple(datasets.info.optical_factors) == tuple(factors)
    return datasets


class PairTrainer(Trainer):
    """transformers' Trainer on prepared pairs.

    Batches reach the device as they lie in the shards, raw integers included; the processor normalises them there.
    Order and random views are pure functions of seed and epoch, so that a cut run resumes exactly.

    Args:
        model: the model to train.
        processor: picks bands and normalises; saved beside the weights.
        train_dataset: pairs to train on.
        collator: completes batches on the CPU.
        eval_dataset: pairs held out, one dataset or several by name.
        augmentation: random views of the training pairs; none by default.
        sensors: which sensors the model is shown; `trainer.sensors` may be changed between evaluations.
        kwargs: as for transformers' Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: FusMAEImageProcessor,
        train_dataset: PairDataset,
        collator: PairCollator,
        eval_dataset: PairDataset | dict[str, PairDataset] | None = None,
        augmentation: PairAugmentation | None = None,
        sensors: Sensors = "both",
        **kwargs,
    ):
        factors = train_dataset.info.optical_factors
        train_dataset, eval_dataset = packed(train_dataset, factors), packed(eval_dataset, factors)
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset} if eval_dataset else {}
        datasets = [train_dataset, *held_out.values()]
        check_same_sensors(datasets)
        self.pairs, self.info = train_dataset, train_dataset.info
        self.processor, self.augmentation, self.sensors, self.collator = processor, augmentation, sensors, collator
        # Known since the shards were written, so that no step has to look for missing pixels.
        self.inputs = PairInputs(processor, self.info, any(map(has_no_data, datasets)), augmentation)
        self._replaced: torch.Tensor | int = 0
        super().__init__(
            model=model,
            processing_class=processor,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            **kwargs,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        workers = max(1, self.args.dataloader_num_workers)
        return self.pairs.sampler(
            self._train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.args.world_size,
            num_lanes=self.args.world_size * workers,
            accumulation=self.args.gradient_accumulation_steps,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return eval_dataset.sampler(self.args.eval_batch_size, shuffle=False)

    def prepare_pairs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs, made on the device where the batch lies.

        In training each pair is one of its random views, if any are asked for.
        """
        return self.inputs(batch, training=cast(PreTrainedModel, self.model).training, sensors=self.sensors)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = super()._prepare_inputs(inputs)
        if cast(PreTrainedModel, self.model).training and "replaced" in inputs:
            self._replaced = self._replaced + inputs["replaced"].sum()  # read when it is logged: no stall here
        return self.prepare_pairs(inputs)

    @property
    def replaced_pairs(self) -> int:
        """Damaged rows of this process, since the trainer was made, in whose place training saw another pair."""
        return int(self._replaced)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of replaced pairs where there can be any."""
        if "loss" in logs and self.pairs.on_bad_files != "error":
            replaced = torch.tensor([self.replaced_pairs], device=self.accelerator.device)
            logs["replaced_pairs"] = int(self.accelerator.gather(replaced).sum())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted: transformers' estimate is one for text."""
        return 0


def has_no_data(dataset: PairDataset) -> bool:
    """Whether pixels of the dataset lack data."""
    return sum(dataset.dataset_info.no_data_pixels(dataset.split).values()) > 0
