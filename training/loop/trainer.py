"""transformers' Trainer on prepared pairs: their order, whole checkpoints, finite steps, and an end when told to."""

import contextlib
import dataclasses
import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer

from fusmae_hf import FusMAEImageProcessor, RowCollator
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import PairInputs
from fusmae_hf.hub.push_model import push_model
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.shards.order import PairSampler
from fusmae_hf.training.arguments import RunArguments
from fusmae_hf.training.loop import checkpoints
from fusmae_hf.training.loop.nonfinite import FiniteSteps
from fusmae_hf.training.loop.processes import (
    as_before_sharding,
    check_same_everywhere,
    maximum_everywhere,
    shard_on_any_device,
)
from fusmae_hf.training.loop.resuming import ORDER, Resumption, check_same_run
from fusmae_hf.training.loop.signals import EvaluationInterrupted, Preemption, held_back, ignore_signals_of_others
from fusmae_hf.training.loop.speed import SpeedCallback
from fusmae_hf.training.sources import check_same_sensors, content_of, has_no_data, having, packed, what_is_read
from fusmae_hf.vocabulary import Sensors

# Arguments that decide how many steps there are, when processes meet, and what each learns. Were they not the same in
# all processes, these would wait for each other forever.
_DECISIVE = (
    "seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "save_steps", "eval_steps", "logging_steps",
    "dataloader_num_workers",
)  # fmt: skip


class PairTrainer(Trainer):
    """transformers' Trainer on prepared pairs.

    Batches reach the device as they lie in the shards, raw integers included; the processor normalises them there.
    Order and random views are pure functions of seed and epoch, so that a cut run resumes exactly. Checkpoints are
    whole or absent, see `checkpoints`; steps are finite, see `FiniteSteps`; for signals to end see `Preemption`.

    Args:
        model: the model to train.
        processor: picks bands and normalises; saved beside the weights.
        train_dataset: pairs to train on.
        collator: completes batches on the CPU.
        eval_dataset: pairs held out, one dataset or several by name.
        augmentation: random views of the training pairs; none by default.
        sensors: which sensors the model is shown; `trainer.sensors` may be changed between evaluations.
        kwargs: as for transformers' Trainer; inputs in metrics raise a ValueError, batches being raw.
    """

    args: RunArguments
    _aside: Path | None = None
    """Where a checkpoint is being written."""

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
        train_dataset, eval_dataset = packed(having(train_dataset, sensors), factors), packed(eval_dataset, factors)
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset} if eval_dataset else {}
        datasets = [train_dataset, *held_out.values()]
        check_same_sensors(datasets)
        self.pairs, self.info = train_dataset, train_dataset.info
        self.processor, self.augmentation, self.sensors, self.collator = processor, augmentation, sensors, collator
        # Known since the shards were written, so that no step has to look for missing pixels.
        has_any, size = any(map(has_no_data, datasets)), model.config.patch_size
        self.inputs = PairInputs(processor, self.info, has_any, augmentation, size)
        self._replaced: torch.Tensor | int = 0
        self._kept_loader = functools.cache(self.get_test_dataloader)
        # transformers' own callback for this argument waits three seconds, goes through with a due evaluation, returns
        # as if training had finished, may then delete its checkpoint, and leaves processes without a signal behind.
        arguments = kwargs["args"]
        if "inputs" in arguments.include_for_metrics:
            raise ValueError("`include_for_metrics` inputs: metrics here see predictions and labels. Leave it out.")
        arguments.set_precision(model)
        self._watches_signals, arguments.enable_jit_checkpoint = arguments.enable_jit_checkpoint, False
        super().__init__(
            model=model,
            processing_class=processor,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            **kwargs,
        )
        arguments.enable_jit_checkpoint = self._watches_signals
        compared = {name: getattr(self.args, name) for name in _DECISIVE} | what_is_read(train_dataset, "training")
        for name, dataset in held_out.items():
            compared |= what_is_read(dataset, name or "evaluation")
        check_same_everywhere(compared)
        self.steps, self.speed = FiniteSteps(self, self.model_inputs), SpeedCallback(self)
        self.preemption, self.resumption = Preemption(self), Resumption(self, self.steps)
        for callback in (self.steps, self.speed, self.preemption, self.resumption):
            self.add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator; see `shard_on_any_device`."""
        shard_on_any_device()
        super().create_accelerator_and_postprocess()

    # --- pairs -------------------------------------------------------------------------------------------------------

    def train_sampler(self) -> PairSampler:
        """The order of the training pairs.

        Raises:
            ValueError: there are too few for one batch.
        """
        return self.pairs.sampler(
            self._train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.args.world_size,
            num_lanes=self.args.world_size * max(1, self.args.dataloader_num_workers),
            accumulation=self.args.gradient_accumulation_steps,
        )

    def _loader(self, pairs: Any, sampler: Any, batch_size: int) -> DataLoader:
        arguments, plain = self.args, isinstance(sampler, IterableDataset)
        loader: DataLoader[Any] = DataLoader(
            sampler if plain else pairs,
            batch_size,
            sampler=None if plain else sampler,
            collate_fn=RowCollator(self.info, self.collator) if plain else self.collator,
            drop_last=arguments.dataloader_drop_last,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=getattr(arguments, "dataloader_multiprocessing_context", None),
            in_order=getattr(arguments, "dataloader_in_order", True),  # older releases of transformers lack both
            worker_init_fn=ignore_signals_of_others if self._watches_signals else None,
        )
        return (sampler if plain else self.accelerator).prepare(loader)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the training pairs."""
        return self._loader(self.pairs, self.train_sampler(), self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of held-out pairs, in stored order; workers that persist serve every evaluation."""
        held_out: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        pairs = cast(dict[str, PairDataset], self.eval_dataset)[held_out] if isinstance(held_out, str) else held_out
        return (self._kept_loader if self.args.dataloader_persistent_workers else self.get_test_dataloader)(pairs)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Batches of pairs, in stored order."""
        size = self.args.eval_batch_size
        return self._loader(test_dataset, test_dataset.sampler(size, shuffle=False), size)

    def get_batch_samples(self, *args, **kwargs) -> Any:
        """The batches of the next step, counted and timed for the log."""
        with held_back(), self.speed.waiting():  # held back, since workers of the loader may be started
            samples = super().get_batch_samples(*args, **kwargs)
        self.speed.count(samples[0])
        return samples

    def prepare_pairs(self, batch: dict[str, Any], sensors: Sensors | None = None) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs, made on the device where the batch lies.

        In training each pair is one of its random views, if any are asked for.
        """
        training = cast(PreTrainedModel, self.model).training
        return self.inputs(batch, training=training, sensors=sensors or self.sensors)

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs, wherever it lies."""
        return self.prepare_pairs(send_to_device(batch, self.args.device))

    @property
    def replaced_pairs(self) -> int:
        """Damaged rows of this process, since the trainer was made, in whose place training saw another pair."""
        return int(self._replaced)

    def replaced_everywhere(self) -> int:
        """`replaced_pairs` of all processes together; each of them must call this."""
        replaced = torch.tensor([self.replaced_pairs], device=self.accelerator.device)
        return int(self.accelerator.gather(replaced).sum())

    # --- steps -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a batch of raw pairs."""
        return super().compute_loss(model, self.prepare_pairs(inputs), return_outputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch; it is kept until its step is known to be finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        scale = self.current_gradient_accumulation_steps  # by which the Trainer divided it
        self.steps.note_batch(inputs, loss * scale)
        if "replaced" in inputs:
            self._replaced = self._replaced + inputs["replaced"].sum()  # read when it is logged: no stall here
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        mine = [float(self.steps.is_spoilt(grad_norm)), float(self.preemption.received)]
        spoilt, told = maximum_everywhere(mine, self.args.device)
        self.preemption.told = self.preemption.told or int(told)
        if self.steps.end(bool(spoilt), grad_norm) and self.accelerator.scaler is None:
            model.zero_grad()  # no optimiser touches a parameter without gradient, or its state
        return grad_norm

    @property
    def nonfinite_steps(self) -> int:
        """Steps of the whole run that were skipped because a loss or a gradient was not finite."""
        return self.steps.skipped

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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted: transformers' estimate is one for text."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with parts of the loss, the speed, and, where there can be any, replaced pairs and skipped steps."""
        if "loss" in logs:
            logs |= self.steps.report(logs["loss"])
            logs |= self.speed.report()
            if self.pairs.on_bad_files != "error":
                logs["replaced_pairs"] = self.replaced_everywhere()
        super().log(logs, start_time)

    # --- the course of a run -----------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers' Trainer does, after clearing away what killed processes left in the output folder.

        Raises:
            ValueError: the checkpoint is incomplete, or its run had other data, seed, augmentation or order of pairs.
            CheckpointNotWrittenError: a checkpoint could not be written, as on a full disk.
            NonFiniteError: see `FiniteSteps`.
            Preempted: see `Preemption`.
        """
        folder, checkpoint = Path(str(self.args.output_dir)), resume_from_checkpoint or None
        if self.args.should_save:
            checkpoints.settle(folder)
        self.accelerator.wait_for_everyone()
        if checkpoint is True:
            if (newest := checkpoints.newest_complete(folder)) is None:
                raise ValueError(f"There is no complete checkpoint in {folder} to resume from.")
            checkpoint = str(newest)
        self.check_checkpoint(checkpoint)
        self.resumption.go_on_from(checkpoint)
        for last in (self.preemption, self.resumption):  # after those that were added since
            self.remove_callback(last)
            self.add_callback(last)
        with self.preemption.watching() if self._watches_signals else contextlib.nullcontext():
            try:
                result = super().train(checkpoint, trial, ignore_keys_for_eval)
            except EvaluationInterrupted:
                self.preemption.save_without_evaluation()
            if self.preemption.is_told_anywhere():
                raise self.preemption.end("ended when training had just finished")
        return result

    def check_checkpoint(self, checkpoint: str | None) -> None:
        """Raise a ValueError unless all processes go on from the same, complete checkpoint of this very run."""
        check_same_everywhere({"the checkpoint to resume from": checkpoint})
        if checkpoint is not None:
            check_same_run(Path(checkpoint), self.identity())

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints; JSON values."""
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
            ORDER: self.train_sampler().depends_on,
        }

    def _run_epoch(self, *args, **kwargs) -> None:
        # The Trainer looks after each step whether it was the last: of a finished run it would do one more.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs) -> Any:
        # With `save_total_limit` 1 the Trainer would now delete the last checkpoint, unless it is the best one, and a
        # run that is resumed after its end would train again from there.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _checkpoint_of(self, step: int | None) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside, put it in place when all processes have written their files, then delete old ones.

        Raises:
            CheckpointNotWrittenError: it could not be written. What was written is removed; older ones are untouched.
        """
        checkpoint, state, main = self._checkpoint_of(self.state.global_step), self.state, self.args.should_save
        with checkpoints.explained_failure(checkpoint):
            if main:
                checkpoints.begin(checkpoint)
            self.accelerator.wait_for_everyone()
            best, self._aside = state.best_model_checkpoint, checkpoints.place_aside(checkpoint)
            try:
                super()._save_checkpoint(model, trial)
            finally:  # the Trainer looked for the best one where this one is written
                self._aside, state.best_model_checkpoint = None, best
            best_checkpoint = self._checkpoint_of(state.best_global_step)
            if best_checkpoint == checkpoint or best_checkpoint.is_dir():
                state.best_model_checkpoint = str(best_checkpoint)
            self.accelerator.wait_for_everyone()
            if main:
                written = checkpoints.place_aside(checkpoint) / checkpoint.name
                state.save_to_json(str(written / "trainer_state.json"))
                checkpoints.seal(written, self._manifest())
                checkpoints.put_in_place(checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if main:
            protected = [checkpoint, *([Path(state.best_model_checkpoint)] if state.best_model_checkpoint else [])]
            for surplus in checkpoints.surplus(checkpoint.parent, self.args.save_total_limit, protected):
                checkpoints.discard(surplus)

    def _manifest(self) -> dict[str, Any]:
        processes = self.args.world_size
        return {
            "step": self.state.global_step,
            "processes": processes,
            "global_batch_size": self._train_batch_size * processes * self.args.gradient_accumulation_steps,
            "run": self.identity(),
            "progress": {"nonfinite_steps": self.steps.skipped, "evaluation_due": self.preemption.evaluation_due},
        }

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # not before it is in place, where an upload in the background finds it
            if self.is_world_process_zero():  # the Trainer copies weights and configuration without their code
                for code in Path(checkpoint_folder).glob("*.py"):
                    shutil.copy(code, str(self.args.output_dir))
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers' Trainer does, without pushing: `push_to_hub` does, once there is a card."""
        with as_before_sharding(self.model):
            super().save_model(output_dir, _internal_call=True)
        checkpoints.share_weights(Path(output_dir or str(self.args.output_dir)), self.args.should_save)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: programs write a card from their records, the Trainer's is a draft with gaps."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push what is saved in the output folder, the same files as `fusmae push` does; see `push_model`.

        It is done when this returns, `blocking` or not. Call it after `save_model` and after the card is written.
        """
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        if not self.is_world_process_zero():
            return None
        return push_model(
            str(self.args.output_dir),
            str(self.hub_model_id),
            private=bool(self.args.hub_private_repo if private is None else private),
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message or "End of training",
        )
