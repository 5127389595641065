"""A Trainer that notices numbers which are not finite before they reach the weights, and signals to end."""

import math
import signal
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from fusmae_hf.training.arguments import RunArguments
from fusmae_hf.training.loop.checkpointing import CheckpointingTrainer
from fusmae_hf.training.loop.nonfinite import (
    MicroBatch,
    NonFiniteError,
    describe,
    keep_batch,
    non_finite_parameters,
    report_of_batch,
)
from fusmae_hf.training.loop.signals import Preempted, SignalWatch, UnpreemptedWorker, held_back


class GuardRecord(TrainerCallback, ExportableState):
    """What a resumed run has to know of the run before; kept in the `trainer_state.json` of each checkpoint.

    Attributes:
        nonfinite_steps: steps that were skipped because a loss or a gradient was not finite.
        evaluation_due: the run was told to end before the evaluation that belongs to this step.
    """

    def __init__(self) -> None:
        self.nonfinite_steps, self.evaluation_due = 0, False

    def state(self) -> dict[str, Any]:
        """See `ExportableState`."""
        return {"args": {}, "attributes": dict(vars(self))}


class _EvaluationInterrupted(Exception):
    """A signal to end came while held-out pairs were being evaluated."""


class _Guard(TrainerCallback):
    """Tells a `GuardedTrainer` where training is."""

    def __init__(self, trainer: "GuardedTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_record()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ended = True

    def on_prediction_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.is_in_train and trainer._watches_signals and trainer._told_anywhere():
            raise _EvaluationInterrupted


class _HostCopy:
    """A copy of a small tensor that is under way from the device to the host."""

    def __init__(self, tensor: torch.Tensor):
        self.arrived = None
        if tensor.device.type == "cpu":
            self.tensor = tensor
        else:
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.arrived = torch.Event(tensor.device)
            self.arrived.record()

    def read(self) -> list[float]:
        """Wait for the copy, and for nothing that was asked of the device after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor.tolist()


@dataclass
class _Verdict:
    """A step of which the host does not know yet whether it was finite."""

    step: int
    flags: _HostCopy
    batches: list[MicroBatch]


class GuardedTrainer(CheckpointingTrainer):
    """Base of the Trainers here; adds two guards to transformers' Trainer.

    **Numbers.** A step is spoilt if the loss of one of its batches, in any process, or the norm of its gradient is not
    finite. A spoilt step changes neither weights nor the optimiser's state. `on_nonfinite="stop"` then raises a
    `NonFiniteError`; `"skip"` goes on with the next step, up to `max_nonfinite_steps` times in the whole run, its
    resumed parts included. (Were only steps in a row counted, a run could lose every second one for ever.) A skipped
    step counts as a step: its pairs are spent and the learning-rate schedule moves on, so that both stay functions of
    the number of the step.

    In fp16 the gradient scaler already skips steps whose gradients overflow, as a part of its work: there, losses
    alone are looked at.

    **Signals.** With `enable_jit_checkpoint`, the first SIGTERM or SIGUSR1 makes the step in progress the last one;
    see `train`. (transformers' own callback for this argument waits three seconds, goes through with a due evaluation,
    returns as if training had finished, may then delete its checkpoint, and leaves processes that got no signal
    behind; it is not installed.)

    No step waits for a GPU on account of the guards. Two flags, spoilt and signalled, are reduced over the processes
    on the device and copied to the host in the background. The host reads them when the batches of the next step have
    been moved to the device, for which the Trainer waits for all earlier work anyway, or earlier where it logs, saves
    or evaluates and waits as well. Until then a fused optimiser is held back on the device by its `found_inf`, with
    which gradient scalers do the same. Other optimisers, and sharded ones, need to know at once: there the host waits.
    """

    args: RunArguments

    def __init__(self, *args, **kwargs):
        arguments = kwargs["args"]
        self._watches_signals, arguments.enable_jit_checkpoint = arguments.enable_jit_checkpoint, False
        self._watch = SignalWatch()
        self._epoch_ended = False
        self._resumed_from: str | None = None
        self._batches: list[MicroBatch] = []
        self._parts: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._verdict: _Verdict | None = None
        self._told = 0
        self._evaluation_due = False
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_to_log = self._skipped_to_log = 0
        super().__init__(*args, **kwargs)
        arguments.enable_jit_checkpoint = self._watches_signals
        self.add_callback(GuardRecord())
        self.add_callback(_Guard(self))

    @abstractmethod
    def prepare_pairs(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of raw pairs on the device."""

    @property
    def record(self) -> GuardRecord:
        """What is kept in checkpoints; resuming may replace it."""
        return next(each for each in self.callback_handler.callbacks if isinstance(each, GuardRecord))

    @property
    def nonfinite_steps(self) -> int:
        """Steps of the whole run that were skipped because a loss or a gradient was not finite."""
        return self.record.nonfinite_steps

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers' Trainer does.

        Raises:
            NonFiniteError: see the class.
            Preempted: a signal asked to end. A checkpoint has been written after the step in progress; in a run of
                several processes or on a GPU at most two steps later, since all must agree on the step. An evaluation
                is cut short, and the resumed run makes up for it before it goes on.
        """
        self._resumed_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        self._verdict, self._told, self._evaluation_due = None, 0, False
        if not self._watches_signals:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        with self._watch.watching():
            try:
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except _EvaluationInterrupted:
                self._end_early("ended before the first step, with nothing new to save")
            if self._told_anywhere():
                self._end_early("ended when training had just finished")
        return result

    # --- numbers -----------------------------------------------------------------------------------------------------

    def note_loss(self, name: str, value: torch.Tensor) -> None:
        """Remember a part of the loss of the batch in hand, for the log and for `NonFiniteError`."""
        self._parts[name] = value.detach()
        self._add(name, value.detach())

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def mean_losses(self) -> dict[str, float]:
        """Mean over processes and batches since the last call of what was noted, spoilt steps left out."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        number = sums.pop("batches")
        return {name: self.accelerator.gather(total / number).mean().item() for name, total in sums.items()}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One batch; it is kept until its step is known to be finite."""
        if not self._batches:
            self._before = {"": self._tr_loss.clone(), **self._sums}
        self._parts = {}
        loss = super().training_step(model, inputs, num_items_in_batch)
        scale = self.current_gradient_accumulation_steps  # by which the Trainer divided it
        self._batches.append(MicroBatch(len(self._batches), inputs, {"loss": loss * scale, **self._parts}))
        self._add("batches", torch.ones((), device=loss.device))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Between the clipping of the gradients and the step of the optimiser.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._judge(model, grad_norm)
        return grad_norm

    def _judge(self, model: Any, grad_norm: Any) -> None:
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        losses = [loss for micro in self._batches for loss in micro.losses.values()]
        norm = torch.as_tensor(norm, dtype=torch.float32, device=losses[0].device)
        scaled = self.accelerator.scaler is not None
        finite = torch.stack([loss.float().isfinite() for loss in losses]).all()
        flags = torch.stack([~finite if scaled else ~(finite & norm.isfinite()), torch.zeros_like(finite)]).float()
        flags[1] = self._signal
        if self.args.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        spoilt = flags[0] > 0
        # The logs leave the whole step out. What is not finite would stay in these sums for ever.
        self._tr_loss.copy_(torch.where(spoilt, self._before.pop(""), self._tr_loss))
        self._sums = {
            name: torch.where(spoilt, self._before.get(name, torch.zeros_like(total)), total)
            for name, total in self._sums.items()
        }
        copied = _HostCopy(torch.cat([flags, norm[None]]))
        self._verdict = _Verdict(self.state.global_step + 1, copied, self._batches)
        self._batches, self._parts, self._before = [], {}, {}
        if self._can_hold_back_on_device():
            optimizer = cast(AcceleratedOptimizer, self.optimizer).optimizer
            optimizer.grad_scale, optimizer.found_inf = None, flags[0]
        elif not scaled and self._settle_verdict():
            model.zero_grad()  # no optimiser touches a parameter without gradient, or its state

    def _can_hold_back_on_device(self) -> bool:
        return (
            self.args.device.type != "cpu"  # where there is no waiting to avoid
            and self.accelerator.scaler is None
            and self.accelerator.distributed_type is not DistributedType.FSDP
            and getattr(cast(AcceleratedOptimizer, self.optimizer).optimizer, "_step_supports_amp_scaling", False)
        )

    def _settle_verdict(self) -> bool:
        """Find out whether the last step was spoilt, if that is not known yet, and stop or go on.

        Raises:
            NonFiniteError: it was, and the run may not go on.
        """
        if self._verdict is None:
            return False
        verdict, self._verdict = self._verdict, None
        spoilt, told, norm = verdict.flags.read()
        self._told = self._told or int(told)
        if not spoilt:
            return False
        message = self._explain(verdict, norm)
        if self.args.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{message}\nThe step was not taken. `--on_nonfinite skip` leaves such steps out instead of stopping."
            )
        limit = self.args.max_nonfinite_steps
        if self.record.nonfinite_steps >= limit:
            raise NonFiniteError(f"{message}\n`max_nonfinite_steps` ({limit}) had been skipped already.")
        self.record.nonfinite_steps += 1
        self._skipped_to_log += 1
        if self.is_world_process_zero():
            print(f"{message}\nThe step is skipped, {self.record.nonfinite_steps} of at most {limit}.", flush=True)
        return True

    def _explain(self, verdict: _Verdict, norm: float) -> str:
        """Keep the batches that may have spoilt a step, and say what happened; every process must call this."""
        for micro in verdict.batches:
            micro.read()
        suspects = [micro for micro in verdict.batches if micro.not_finite]
        if not self._maximum(float(bool(suspects))):  # then it was the gradient, of any
            suspects = verdict.batches
        rank, folder = self.args.process_index, Path(str(self.args.output_dir)) / "nonfinite" / f"step-{verdict.step}"
        settings = {
            name: getattr(self.args, name)
            for name in ("seed", "bf16", "fp16", "learning_rate", "max_grad_norm", "per_device_train_batch_size")
        }
        reports = []
        for micro in suspects:
            with torch.no_grad():
                report = report_of_batch(micro, self.prepare_pairs(super()._prepare_inputs(dict(micro.batch))))
            record = {"step": verdict.step, "process": rank, "grad_norm": norm, **report, "settings": settings}
            kept = keep_batch(folder, f"process-{rank}-micro-batch-{micro.number}", micro.batch, record)
            reports.append({**report, "file": None if kept is None else str(kept)})
        parameters = non_finite_parameters(cast(PreTrainedModel, self.model))
        mine = {"process": rank, "parameters": parameters, "batches": reports}
        return describe(verdict.step, norm, gather_object([mine]))

    def get_batch_samples(self, *args, **kwargs) -> Any:
        """The batches of the next step. See the class: here the host may look at the flags of the last one."""
        with held_back():  # workers of the loader may be started
            samples = super().get_batch_samples(*args, **kwargs)
        self._settle_verdict()
        return samples

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the mean of the loss is over the steps that were taken, and the others are counted."""
        if "loss" in logs:
            taken = self._steps_to_log - self._skipped_to_log
            if self._skipped_to_log:
                logs["loss"] = logs["loss"] * self._steps_to_log / taken if taken else math.nan
            self._skipped_to_log = 0
            if self.args.on_nonfinite == "skip":
                logs["nonfinite_steps"] = self.nonfinite_steps
        super().log(logs, start_time)

    # --- signals -----------------------------------------------------------------------------------------------------

    @property
    def _signal(self) -> int:
        """Number of the signal that asked this process to end; 0 for none."""
        return self._watch.received or 0

    def _maximum(self, mine: float) -> float:
        """Of a number over the processes; every one must call this."""
        if self.args.world_size == 1:
            return mine
        number = torch.tensor(mine, device=self.args.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def _told_anywhere(self) -> bool:
        """Whether any process was asked to end; every one must call this."""
        self._told = self._told or int(self._maximum(float(self._signal)))
        return bool(self._told)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        if self._watches_signals and loader.num_workers:
            made = getattr(loader, "base_dataloader", loader)  # accelerate's loaders wrap the one that has the workers
            made.worker_init_fn = UnpreemptedWorker(made.worker_init_fn)
        return loader

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        """End of a step, and of an epoch: log, evaluate, save, or end the run."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._settle_verdict()
        self._steps_to_log = self.state.global_step - self._globalstep_last_logged
        if self.args.world_size == 1:  # nobody else must agree
            self._told = self._told or self._signal
        if not self._told:
            try:
                super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            except _EvaluationInterrupted:
                step = self.state.global_step
                self.state.log_history = [
                    entry
                    for entry in self.state.log_history
                    if entry["step"] != step or not any(name.startswith("eval_") for name in entry)
                ]
                self._save_and_end(model, trial, evaluation_due=True)
            return
        self._evaluation_due |= control.should_evaluate
        control.should_evaluate = control.should_save = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        last_of_epoch = float(self.state.epoch).is_integer() or control.should_training_stop
        if self._epoch_ended or not last_of_epoch:  # else this is called again at once, with what an epoch's end asks
            self._save_and_end(model, trial, evaluation_due=self._evaluation_due)

    def _finalize_training(self, trial, *args, **kwargs) -> Any:
        self._settle_verdict()
        if self._watches_signals and self._told_anywhere():
            self._save_and_end(self.model_wrapped, trial, evaluation_due=False)
        return super()._finalize_training(trial, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Early stopping can follow from an evaluation that was made up for.
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_and_end(self, model: Any, trial: Any, *, evaluation_due: bool) -> NoReturn:
        self.record.evaluation_due = evaluation_due
        self.control.should_evaluate = self.control.should_save = False
        self._save_checkpoint(model, trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        step = self.state.global_step
        self._end_early(f"checkpoint {self._checkpoint_of(step, trial)} written after step {step}")

    def _end_early(self, what: str) -> NoReturn:
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # trackers write what they hold
        name = signal.Signals(self._told).name
        message = f"{name}: {what}; start the same command with --resume_from_checkpoint auto to go on"
        if self.is_world_process_zero():
            print(message, flush=True)
        raise Preempted(message)

    def _restore_record(self) -> None:
        """At the beginning of training: take over what the run before left, and make up for its last evaluation."""
        state = self.state
        kept = cast(dict[str, dict[str, Any]], state.stateful_callbacks)  # transformers declares a list here
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # those that wrote an old checkpoint may not have had it
                kept.setdefault(type(callback).__name__, callback.state())
        if self._resumed_from is None:
            vars(self.record).update(vars(GuardRecord()))
            return
        vars(self.record).update(kept[GuardRecord.__name__]["attributes"])
        if not self.record.evaluation_due:
            return
        if self.is_world_process_zero():
            print(f"Evaluating first: the run was ended before the evaluation of step {state.global_step}.")
        self._load_rng_state(self._resumed_from)
        self._determine_best_metric(self._evaluate(None, None), None)
        self.record.evaluation_due = False
        self._save_checkpoint(self.model_wrapped, None)  # replaces the one that lacks the evaluation
