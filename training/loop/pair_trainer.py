"""What every Trainer on pairs shares: their order, their way onto the device, and the count of damaged ones."""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, TrainingArguments

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import PairInputs
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.shards.order import PairSampler
from fusmae_hf.training.loop.guarded_trainer import GuardedTrainer
from fusmae_hf.training.loop.pair_order import OrderRecord, check_order
from fusmae_hf.training.loop.processes import as_before_sharding, check_same_everywhere, fsdp_on_any_device
from fusmae_hf.training.loop.records import content_of
from fusmae_hf.training.loop.speed import SpeedCallback
from fusmae_hf.vocabulary import Sensors

# Arguments that decide how many steps there are, when processes meet, and what each learns.
_DECISIVE = (
    "seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "save_steps", "eval_steps", "logging_steps",
    "dataloader_num_workers",
)  # fmt: skip


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


class PairTrainer(GuardedTrainer):
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
        compared = {"training": train_dataset, **{name or "evaluation": dataset for name, dataset in held_out.items()}}
        check_same_everywhere(what_decides(self.args, compared))
        self.speed = SpeedCallback(self)
        self.add_callback(self.speed)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator; see `fsdp_on_any_device`."""
        with fsdp_on_any_device():
            super().create_accelerator_and_postprocess()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers' Trainer does.

        Raises:
            ValueError: the checkpoint is incomplete, or its run had other data, seed, augmentation or order of pairs.
            CheckpointNotWrittenError: a checkpoint could not be written, as on a full disk.
            NonFiniteError: see `GuardedTrainer`.
            Preempted: see `GuardedTrainer`.
        """
        if isinstance(resume_from_checkpoint, str):
            self.check_checkpoint(resume_from_checkpoint)
        self.remove_callback(OrderRecord)
        self.add_callback(OrderRecord(self._get_train_sampler().depends_on))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def check_checkpoint(self, checkpoint: str | None) -> None:
        """Raise a ValueError unless all processes go on from the same checkpoint, of the same run, in its order."""
        check_same_everywhere({"the checkpoint to resume from": checkpoint})
        if checkpoint is not None:
            self.check_same_run(checkpoint)
            check_order(checkpoint, self._get_train_sampler().depends_on)

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints, besides the order of pairs."""
        rows = getattr(self.pairs, "rows", None)  # of a subset
        return {
            "data": content_of(self.pairs),
            "pairs": len(self.pairs),
            "subset": None if rows is None else hashlib.sha256(rows.tobytes()).hexdigest()[:16],
            "left_out_files": sorted(self.pairs.bad_files),
            "sensors": self.sensors,
            "seed": self.args.seed,
            "data_seed": self.args.data_seed,
            "augmentation": dataclasses.asdict(self.augmentation) if self.augmentation else None,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with as_before_sharding(self.model):
            super()._save(output_dir, state_dict)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> PairSampler:
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

    def held_out_loss(self, model: Any, inputs: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
        """Loss of a held-out batch without the pairs that only fill up the last batches of several processes.

        accelerate drops what is gathered of such pairs, but not their share in the mean over a batch.
        """
        loader, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
            return outputs["loss"].detach()
        # With a sharded model every process must run it as often as the others, even if none of its pairs count.
        counted = min(max(loader.remainder - self.args.process_index * size, 0), size) or size
        return model(**{name: values[:counted] for name, values in inputs.items()})["loss"].detach()

    @property
    def replaced_pairs(self) -> int:
        """Damaged rows of this process, since the trainer was made, in whose place training saw another pair."""
        return int(self._replaced)

    def replaced_everywhere(self) -> int:
        """`replaced_pairs` of all processes together; each of them must call this."""
        replaced = torch.tensor([self.replaced_pairs], device=self.accelerator.device)
        return int(self.accelerator.gather(replaced).sum())

    def get_batch_samples(self, *args, **kwargs) -> Any:
        """The batches of the next step, counted and timed for the log."""
        with self.speed.fetching() as fetched:
            samples = super().get_batch_samples(*args, **kwargs)
            fetched(samples[0])
        return samples

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the speed of training and, where there can be any, the number of replaced pairs."""
        if "loss" in logs:
            logs |= self.speed.report()
            if self.pairs.on_bad_files != "error":
                logs["replaced_pairs"] = self.replaced_everywhere()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted: transformers' estimate is one for text."""
        return 0


def what_decides(arguments: TrainingArguments, datasets: Mapping[str, PairDataset]) -> dict[str, Any]:
    """What must be the same in all processes, lest they wait for each other forever or learn from other pairs."""
    values: dict[str, Any] = {name: getattr(arguments, name) for name in _DECISIVE}
    for name, dataset in datasets.items():
        values |= what_is_read(dataset, name)
    return values


def what_is_read(dataset: PairDataset, name: str) -> dict[str, Any]:
    """What must be the same in all processes that read the same pairs for `name`."""
    of = f"split {dataset.split} for {name}"
    return {
        f"the files left out of {of}": sorted(dataset.bad_files),
        f"the number of pairs in {of}": len(dataset),
        f"the content of {of}": content_of(dataset),
    }


def has_no_data(dataset: PairDataset) -> bool:
    """Whether pixels of the dataset lack data."""
    return sum(dataset.dataset_info.no_data_pixels(dataset.split).values()) > 0
