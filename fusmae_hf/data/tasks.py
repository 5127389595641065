"""What a model is fine-tuned for, and the labels that go with it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.modeling.modeling_fusmae import FusMAEForImageClassification, FusMAEForSemanticSegmentation
from fusmae_hf.vocabulary import TASKS

_BEST = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "average_precision_micro",
    "semantic_segmentation": "mean_iou",
    "regression": "rmse",
}


@dataclass(frozen=True)
class FineTuningTask:
    """A task on the pairs of one dataset. Make it with `of_pairs`.

    Attributes:
        name: one of `TASKS`.
        outputs: names of what the model gives: classes, or the one quantity.
        dense: whether there is a label for each pixel.
        no_data: value of the label maps where there is no label, or None.
        target: column that holds the quantity of a scene, or None.
        units: of the quantity, or empty.
    """

    name: str
    outputs: tuple[str, ...]
    dense: bool = False
    no_data: int | None = None
    target: str | None = None
    units: str = ""

    @classmethod
    def of_pairs(cls, info: PairsInfo, name: str | None = None, target: str | None = None) -> "FineTuningTask":
        """The task on a dataset.

        Args:
            info: what holds for all its pairs.
            name: one of `TASKS`; None where the dataset allows one alone.
            target: numeric extra column with a quantity of each scene; means regression.

        Raises:
            ValueError: the dataset has no labels for the task, several tasks are possible, or there is no such target.
        """
        possible = _possible(info)
        if target is not None:
            if name not in (None, "regression"):
                raise ValueError(f"A target column ({target!r}) means regression, but the task is {name!r}.")
            numeric = sorted(column for column, kind in info.extra_columns.items() if kind != "string")
            if target not in numeric:
                raise ValueError(
                    f"{info.name} has no numeric column {target!r} to regress on; it has {numeric or 'none'}. Name "
                    "one of them, or prepare the shards with such a column."
                )
            return cls("regression", (target,), target=target)
        if name is not None and name not in TASKS:
            raise ValueError(f"There is no task {name!r}: choose one of {TASKS}.")
        if not possible:
            raise ValueError(
                f"{info.name} has no labels: neither scene classes, nor label maps with classes or units. Prepare "
                "shards with labels, or name a numeric column with `--target`."
            )
        if name is None and len(possible) > 1:
            raise ValueError(
                f"{info.name} allows several tasks: {sorted(possible)}. Say which with `--task`; a scene has exactly "
                "one of its classes (single label) or any number of them (multi-label)."
            )
        name = name or next(iter(possible))
        if name not in possible:
            raise ValueError(f"{info.name} has no labels for {name}; what it has is for {sorted(possible)}.")
        return possible[name]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Class of the model with the head for the task."""
        return FusMAEForSemanticSegmentation if self.dense else FusMAEForImageClassification

    @property
    def is_regression(self) -> bool:
        """Whether the model gives a quantity, not classes."""
        return self.name == "regression"

    @property
    def is_multi_label(self) -> bool:
        """Whether a scene has any number of classes."""
        return self.name == "multi_label_classification"

    @property
    def best_metric(self) -> str:
        """Metric by which the best checkpoint is chosen."""
        return _BEST[self.name]

    @property
    def ignore_index(self) -> int:
        """Label that does not count: of pixels without a class, or of scenes."""
        return 255 if self.dense and len(self.outputs) <= 255 else -100

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of the model's configuration that follow from the task."""
        fields: dict[str, Any] = {
            "id2label": dict(enumerate(self.outputs)),
            "label2id": {label: number for number, label in enumerate(self.outputs)},
        }
        if self.name == "semantic_segmentation":
            fields["semantic_loss_ignore_index"] = self.ignore_index
        else:
            fields["problem_type"] = self.name
        return fields

    def scene_labels(
        self, ids: Sequence[str], labels: Sequence[Sequence[str] | None] | None, targets: Mapping[str, float] | None
    ) -> torch.Tensor:
        """Labels of whole scenes as the model wants them.

        Args:
            ids: of the scenes, for messages.
            labels: class names of each scene.
            targets: quantity of each scene, by id, for regression.

        Returns:
            Single label: int64 `(batch,)`; multi-label: float32 `(batch, classes)`; regression: float32 `(batch, 1)`.

        Raises:
            ValueError: a scene has no labels, a class that the dataset does not list, or not exactly one of them.
        """
        if self.is_regression:
            return torch.tensor([[_target(id, self.target, targets)] for id in ids], dtype=torch.float32)
        indices = {label: number for number, label in enumerate(self.outputs)}
        numbers = []
        for id, names in zip(ids, labels or [None] * len(ids), strict=True):
            if names is None:
                raise ValueError(f"{id} has no labels. Leave such pairs out when preparing the shards.")
            unknown = [label for label in names if label not in indices]
            if unknown:
                raise ValueError(f"{id} is labelled {unknown}, but the classes are {list(self.outputs)}.")
            if not self.is_multi_label and len(names) != 1:
                raise ValueError(
                    f"{id} has {len(names)} labels ({list(names)}), but a single-label problem needs exactly one. "
                    "Choose `--task multi_label_classification`."
                )
            numbers.append([indices[label] for label in names])
        if not self.is_multi_label:
            return torch.tensor([number for (number,) in numbers])
        held = torch.zeros(len(numbers), len(self.outputs))
        for row, of_scene in zip(held, numbers, strict=True):
            row[of_scene] = 1
        return held

    def dense_labels(
        self, label_map: torch.Tensor, given: Sequence[int] = (), padded: Sequence[int] = ()
    ) -> torch.Tensor:
        """Label maps `(batch, height, width)` as the model wants them, on any device.

        Args:
            label_map: as it lies in the shards.
            given: (height, width) of the images in the shards.
            padded: (height, width) that they were padded to. Maps of the same size are padded likewise, with labels
                that do not count; others are left to the model, which refuses those of other ground.

        Returns:
            Classes: int64 with `ignore_index` where there is none. Quantities: float32 with NaN.
        """
        labels = label_map.float() if self.is_regression else label_map.long()
        nothing = float("nan") if self.is_regression else self.ignore_index
        if self.no_data is not None:
            labels = torch.where(labels == self.no_data, nothing, labels)
        if tuple(labels.shape[1:]) != tuple(given):
            return labels
        return functional.pad(labels, (0, padded[1] - given[1], 0, padded[0] - given[0]), value=nothing)


def _possible(info: PairsInfo) -> dict[str, FineTuningTask]:
    """Tasks for which a dataset has labels, by name."""
    possible = {}
    if len(info.class_names) > 1:
        for name in TASKS[:2]:
            possible[name] = FineTuningTask(name, tuple(info.class_names))
    if len(info.map_class_names) > 1 and not info.map_units:
        name = "semantic_segmentation"
        possible[name] = FineTuningTask(name, tuple(info.map_class_names), dense=True, no_data=info.map_no_data)
    if info.map_units:
        possible["regression"] = FineTuningTask(
            "regression", (info.map_units,), dense=True, no_data=info.map_no_data, units=info.map_units
        )
    return possible


def _target(id: str, column: str | None, targets: Mapping[str, float] | None) -> float:
    value = None if targets is None else targets.get(id)
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"{id} has no finite value of the target {column!r}, but {value}. Leave such pairs out when preparing the "
            "shards, and give the collator the targets of all its pairs."
        )
    return float(value)
