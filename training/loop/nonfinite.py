"""What is said and kept of an optimiser step whose loss or gradient is not finite."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

POLICIES = ("stop", "skip")
"""What to do at a step whose loss or gradient is not finite."""

_SHOWN_IDS = 8


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite; the message says where, why, and where the batch was kept."""


@dataclass
class MicroBatch:
    """One batch of a step, as it came to this process, and its losses.

    Attributes:
        number: of the batch in its step, from 0.
        batch: raw pairs.
        losses: scalars by name, `loss` first and then those of each sensor; tensors until `read`.
    """

    number: int
    batch: Mapping[str, Any]
    losses: dict[str, Any] = field(default_factory=dict)

    def read(self) -> None:
        """Move the losses from the device."""
        self.losses = {name: float(loss) for name, loss in self.losses.items()}

    @property
    def not_finite(self) -> list[str]:
        """Names of the losses that are not finite, those of sensors if there are any."""
        names = [name for name, loss in self.losses.items() if not math.isfinite(loss)]
        return [name for name in names if name != "loss"] or names


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
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in _flat(batch):
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            values[key] = value
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
        text = json.dumps({**record, "batch": values}, indent=2, default=str)
        (folder / f"{name}.json").write_text(text + "\n")
    except Exception as error:  # the message about the step must not be lost to a full disk
        warnings.warn(f"The batch could not be kept in {folder}: {error}.", stacklevel=2)
        return None
    return path


def _flat(values: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def report_of_batch(micro: MicroBatch, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be said of a batch: its number, losses, pairs, and faults of its inputs."""
    ids = list(micro.batch["id"])
    faults, largest = input_faults(inputs, ids)
    return {
        "micro_batch": micro.number,
        "not_finite": micro.not_finite,
        "losses": micro.losses,
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
