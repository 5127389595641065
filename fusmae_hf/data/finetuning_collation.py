"""Batches of labelled pairs: for the project's own Trainer, and, ready for the model, for any other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.inputs import PairInputs, given_size, image_size
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.vocabulary import Sensors

_MASKS = ("pixel_mask", "pixel_mask_sar")


class LabelCollator(PairCollator):
    """Batches of raw pairs with the labels of a task: `labels` of scenes, or `label_map`.

    Args:
        task: what the labels are for.
        targets: quantity of each scene, by id, for the regression of one.
        augmentation: adds the parameters of each pair's random view.
    """

    def __init__(
        self,
        task: FineTuningTask,
        targets: Mapping[str, float] | None = None,
        augmentation: PairAugmentation | None = None,
    ):
        super().__init__(patch_size=1, masking=False, augmentation=augmentation)
        self.task, self.targets = task, targets

    def __call__(self, batch: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `PairCollator`.

        Raises:
            ValueError: labels are missing or do not suit the task.
        """
        batch = super().__call__(batch)
        names = batch.pop("labels", None)
        if not self.task.dense:
            batch.pop("label_map", None)
            batch["labels"] = self.task.scene_labels(batch["id"], names, self.targets)
        elif "label_map" not in batch:
            raise ValueError(f"These pairs have no label map, which {self.task.name} needs: {batch['id'][:4]}.")
        return batch


class FineTuningCollator(LabelCollator):
    """The inputs of a model, with `labels`, for transformers' `Trainer` as it is or any other loop.

    Pass `remove_unused_columns=False` to the Trainer: batches are made whole. `FineTuningTrainer` normalises on the
    device instead, which is faster.

    Args:
        processor: picks bands and normalises.
        info: what holds for all pairs.
        task: one of `TASKS`, or a task; None where the dataset allows one alone.
        targets: quantity of each scene, by id, for the regression of one.
        sensors: the others are left out.
        patch_size: of the model: images and label maps that patches do not fill are padded, without data there.

    Raises:
        ValueError: the dataset has no labels for the task.
    """

    def __init__(
        self,
        processor: FusMAEImageProcessor,
        info: PairsInfo,
        task: FineTuningTask | str | None = None,
        targets: Mapping[str, float] | None = None,
        sensors: Sensors = "both",
        patch_size: int | None = None,
    ):
        super().__init__(task if isinstance(task, FineTuningTask) else FineTuningTask.of_pairs(info, task), targets)
        self.inputs, self.sensors = PairInputs(processor, info, True, patch_size=patch_size), sensors

    def __call__(self, batch: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Model inputs of a batch; pixel masks only where pixels lack data."""
        batch = super().__call__(batch)
        inputs = self.inputs(batch, sensors=self.sensors)
        labels: Any = batch.get("labels")
        if self.task.dense:
            labels = self.task.dense_labels(inputs.pop("label_map"), given_size(batch), image_size(inputs))
        return {key: value for key, value in inputs.items() if key not in _MASKS or not value.all()} | {
            "labels": labels
        }
