"""Optimiser steps whose loss or gradient is not finite: found before they reach the weights, described, kept."""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback

from fusmae_hf.files.atomic import follow_umask
from fusmae_hf.training.arguments import RunArguments
from fusmae_hf.training.loop.processes import maximum_everywhere

_SHOWN_IDS = 8


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite; the message says where, why, and where the batch was kept."""


@dataclass
class MicroBatch:
    """One batch of a step, as it came to this process, and its losses.

    Attributes:
        number: of the batch in its step, from 0.
        batch: raw pairs.
        losses: scalars by name, `loss` first and then those of each sensor.
    """

    number: int
    batch: Mapping[str, Any]
    losses: dict[str, Any]

    @property
    def not_finite(self) -> list[str]:
        """Names of the losses that are not finite, those of sensors if there are any."""
        names = [name for name, loss in self.losses.items() if not math.isfinite(loss)]
        return [name for name in names if name != "loss"] or names


class FiniteSteps(TrainerCallback):
    """Looks at each step before the optimiser does; held by a trainer.

    A step is spoilt if the loss of one of its batches, in any process, or the norm of its gradient is not finite. It
    changes neither weights nor the optimiser's state. `on_nonfinite="stop"` then raises a `NonFiniteError`; `"skip"`
    goes on with the next step, up to `max_nonfinite_steps` times in the whole run, its resumed parts included. (Were
    only steps in a row counted, a run could lose every second one for ever.) A skipped step counts as a step: its
    pairs are spent and the learning-rate schedule moves on, so that both stay functions of the number of the step.

    In fp16 the gradient scaler already skips steps whose gradients overflow, as a part of its work: there, losses
    alone are looked at.

    Args:
        trainer: calls `note` and `note_batch` for each batch, `is_spoilt` and `end` for each step, `report` for a log.
        inputs_of: gives the model's inputs for a batch of raw pairs.

    Attributes:
        skipped: steps of the whole run that were left out.
    """

    def __init__(self, trainer: Trainer, inputs_of: Callable[[dict[str, Any]], dict[str, torch.Tensor]]):
        self.trainer, self.inputs_of = trainer, inputs_of
        self.skipped = 0
        self._parts: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Start anew."""
        self._batches: list[MicroBatch] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._to_log = {"taken": 0, "skipped": 0}

    def on_step_begin(self, args, state, control, **kwargs):
        """Note the sums for the log, in which what is not finite would stay for ever."""
        self._before, self._sums_before = self.trainer._tr_loss.clone(), dict(self._sums)

    def note(self, name: str, value: torch.Tensor) -> None:
        """Remember a part of the loss of the batch in hand, for the log and for `NonFiniteError`."""
        self._parts[name] = value.detach()

    def note_batch(self, batch: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Remember a batch and its loss, until its step is known to be finite."""
        self._batches.append(MicroBatch(len(self._batches), batch, {"loss": loss, **self._parts}))
        for name, value in {**self._parts, "batches": torch.ones((), device=loss.device)}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._parts = {}

    def is_spoilt(self, grad_norm: Any) -> bool:
        """Whether the step in hand is, by what this process knows of it. The host waits for the device here."""
        finite = torch.stack([loss.isfinite() for micro in self._batches for loss in micro.losses.values()]).all()
        if self.trainer.accelerator.scaler is None:
            finite = finite & torch.as_tensor(_whole(grad_norm), device=finite.device).isfinite()
        return not finite

    def end(self, spoilt: bool, grad_norm: Any) -> bool:
        """End a step of which all processes know whether it was spoilt, with a message if it was; whether to skip it.

        Raises:
            NonFiniteError: it was spoilt, and the run may not go on.
        """
        batches, self._batches = self._batches, []
        self._to_log["skipped" if spoilt else "taken"] += 1
        if not spoilt:
            return False
        self.trainer._tr_loss.copy_(self._before)
        self._sums = {name: self._sums_before.get(name, torch.zeros_like(sum)) for name, sum in self._sums.items()}
        args = cast(RunArguments, self.trainer.args)
        message = self._explain(self.trainer.state.global_step + 1, float(_whole(grad_norm)), batches)
        if args.on_nonfinite == "stop":
            raise NonFiniteError(
                f"{message}\nThe step was not taken. `--on_nonfinite skip` leaves such steps out instead of stopping."
            )
        limit = args.max_nonfinite_steps
        if self.skipped >= limit:
            raise NonFiniteError(f"{message}\n`max_nonfinite_steps` ({limit}) had been skipped already.")
        self.skipped += 1
        if self.trainer.is_world_process_zero():
            print(f"{message}\nThe step is skipped, {self.skipped} of at most {limit}.", flush=True)
        return True

    def _explain(self, step: int, norm: float, batches: list[MicroBatch]) -> str:
        """Keep the batches that may have spoilt a step, and say what happened; every process must call this."""
        args = self.trainer.args
        suspects = [micro for micro in batches if micro.not_finite]
        if not maximum_everywhere([float(bool(suspects))], args.device)[0]:  # then it was the gradient, of any
            suspects = batches
        rank, folder = args.process_index, Path(str(args.output_dir)) / "nonfinite" / f"step-{step}"
        settings = {
            name: getattr(args, name)
            for name in ("seed", "bf16", "fp16", "learning_rate", "max_grad_norm", "per_device_train_batch_size")
        }
        reports = []
        for micro in suspects:
            with torch.no_grad():
                report = report_of_batch(micro, self.inputs_of(dict(micro.batch)))
            record = {"step": step, "process": rank, "grad_norm": norm, **report, "settings": settings}
            kept = keep_batch(folder, f"process-{rank}-micro-batch-{micro.number}", micro.batch, record)
            reports.append({**report, "file": None if kept is None else str(kept)})
        parameters = non_finite_parameters(cast(nn.Module, self.trainer.model))
        return describe(step, norm, gather_object([{"process": rank, "parameters": parameters, "batches": reports}]))

    def report(self, loss: float) -> dict[str, float]:
        """What to log: means since the last report over the steps that were taken; every process must call this.

        Args:
            loss: mean over all steps, as the Trainer has it.

        Returns:
            `loss`, the parts of it that were noted, and, where steps may be skipped, `nonfinite_steps`, their number.
        """
        sums, self._sums = self._sums, {}
        number = sums.pop("batches", 1)
        gather = self.trainer.accelerator.gather
        means = {name: gather(total / number).mean().item() for name, total in sums.items()}
        taken, skipped = self._to_log.values()
        self._to_log = dict.fromkeys(self._to_log, 0)
        if skipped:
            loss = loss * (taken + skipped) / taken if taken else math.nan
        skips = cast(RunArguments, self.trainer.args).on_nonfinite == "skip"
        return {"loss": loss, **means, **({"nonfinite_steps": self.skipped} if skips else {})}


def _whole(norm: Any) -> Any:
    """A norm, of a sharded model over all processes."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite; of a sharded model in the part of this process."""
    names = []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not bool(local.detach().isfinite().all()):
            names.append(name)
    return names


def input_faults(inputs: Mapping[str, Any], ids: Sequence[str]) -> tuple[list[str], dict[str, float]]:
    """What is not finite in the model's inputs, and how large the rest is.

    Args:
        inputs: normalised pairs, with their pixel masks if pixels lack data.
        ids: of the pairs.

    Returns:
        A phrase for each fault, and the largest absolute value of each sensor.
    """
    faults, largest = [], {}
    for sensor, suffix in (("optical", ""), ("sar", "_sar")):
        images = inputs.get(f"pixel_values{suffix}")
        if images is None:
            continue
        bad = ~images.isfinite()
        mask = inputs.get(f"pixel_mask{suffix}")
        if mask is not None:
            bad = bad & mask[:, None]
        for sample in bad.flatten(1).any(dim=1).nonzero()[:, 0].tolist():
            faults.append(f"{int(bad[sample].sum()):,} {sensor} values of {ids[sample]}")
        largest[sensor] = float(images.abs().nan_to_num(0.0, 0.0, 0.0).max())
    labels = inputs.get("labels")
    if isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.ndim <= 2:  # maps may lack labels
        for sample in (~labels.isfinite()).reshape(len(labels), -1).any(dim=1).nonzero()[:, 0].tolist():
            faults.append(f"the label of {ids[sample]}")
    return faults, largest


def keep_batch(folder: Path, name: str, batch: Mapping[str, Any], record: Mapping[str, Any]) -> Path | None:
    """Write a batch for somebody to look at: tensors as safetensors, everything else and the record as JSON.

    Returns:
        The file of tensors; None, after a warning, if it cannot be written.
    """
    tensors = {key: value.cpu().contiguous().clone() for key, value in batch.items() if torch.is_tensor(value)}
    values = {key: value for key, value in batch.items() if key not in tensors}
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        follow_umask(path)
        text = json.dumps({**record, "batch": values}, indent=2, default=str)
        (folder / f"{name}.json").write_text(text + "\n")
    except Exception as error:  # the message about the step must not be lost to a full disk
        warnings.warn(f"The batch could not be kept in {folder}: {error}.", stacklevel=2)
        return None
    return path


def report_of_batch(micro: MicroBatch, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be said of a batch: its number, losses, pairs, and faults of its inputs."""
    ids = list(micro.batch["id"])
    faults, largest = input_faults(inputs, ids)
    return {
        "micro_batch": micro.number,
        "not_finite": micro.not_finite,
        "losses": {name: float(loss) for name, loss in micro.losses.items()},
        "ids": ids,
        "rows": micro.batch["row"].tolist(),
        "input_faults": faults,
        "largest_inputs": largest,
    }


def describe(step: int, grad_norm: float, reports: Sequence[Mapping[str, Any]]) -> str:
    """What happened in a step, for people.

    Args:
        step: its number, from 1, as in the logs.
        grad_norm: of the step.
        reports: of each process: `process`, `parameters` that are not finite, and the `batches` to name, which are
            `report_of_batch` and `file`, where each was kept.
    """
    lines = []
    batches = [(report["process"], batch) for report in reports for batch in report["batches"]]
    for process, batch in batches:
        of_process = f" of process {process}" if len(reports) > 1 else ""
        what = f"{' and '.join(batch['not_finite'])} not finite" if batch["not_finite"] else "losses finite"
        losses = ", ".join(f"{name} {loss:g}" for name, loss in batch["losses"].items())
        ids, rows = batch["ids"], batch["rows"]
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        lines.append(
            f"  micro-batch {batch['micro_batch']}{of_process}: {what} ({losses}); pairs "
            f"{', '.join(map(str, ids[:_SHOWN_IDS]))}{more}, rows {', '.join(map(str, rows[:_SHOWN_IDS]))}{more}"
        )
    named = any(batch["not_finite"] for _, batch in batches)
    subject = "The loss" if named else f"The gradient, of norm {grad_norm:g},"
    lines.insert(0, f"{subject} of step {step} is not finite.")
    lines.append(_reason(reports))
    if files := [batch["file"] for _, batch in batches if batch["file"]]:
        lines += [
            f"Kept in {Path(files[0]).parent}, identifiers in the .json file beside each. To look at the first:",
            "    from safetensors.torch import load_file",
            f'    batch = load_file("{files[0]}")',
            "    print({name: (tuple(values.shape), values.double().min(), values.double().max()) "
            "for name, values in batch.items()})",
        ]
    return "\n".join(lines)


def _reason(reports: Sequence[Mapping[str, Any]]) -> str:
    parameters = [name for report in reports for name in report["parameters"]]
    if parameters:
        return (
            f"The weights themselves are not finite ({len(parameters)} parameters, {parameters[0]} the first), so no "
            "pair is to blame: training had diverged before. Go on from an earlier checkpoint with a lower learning "
            "rate."
        )
    batches = [batch for report in reports for batch in report["batches"]]
    if faults := [fault for batch in batches for fault in batch["input_faults"]]:
        more = f" and {len(faults) - _SHOWN_IDS} more" if len(faults) > _SHOWN_IDS else ""
        return (
            f"The input is at fault: not finite are {', '.join(faults[:_SHOWN_IDS])}{more}. `fusmae verify <shards>` "
            "checks the rest. Leave such pairs out when preparing."
        )
    largest = {
        sensor: max(batch["largest_inputs"].get(sensor, 0.0) for batch in batches)
        for sensor in sorted({sensor for batch in batches for sensor in batch["largest_inputs"]})
    }
    sizes = ", ".join(f"{sensor} {value:.3g}" for sensor, value in largest.items())
    return (
        f"Weights and inputs are finite (largest normalised values: {sizes}), so training diverges. Values far above "
        "10 point to wrong units or statistics; otherwise lower the learning rate, warm up for longer, or go on from "
        "an earlier checkpoint."
    )
