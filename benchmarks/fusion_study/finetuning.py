"""Fine-tuning on few labels: one fixed schedule for every variant, from its encoder or from scratch.

Several encoders (two streams) get a head each, and their logits are averaged. The last step is measured: nothing is
chosen on the validation split.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fusmae_hf.evaluation.label_fractions import draw_label_fraction
from fusmae_hf.evaluation.scores import average_precision, confusion_counts, intersection_over_union
from fusmae_hf.modeling.modeling_fusmae import FusMAEForImageClassification, FusMAEForSemanticSegmentation

from .data import Split, StudyData
from .evaluation import BATCH_SIZE, FEWEST_POSITIVES, SHOWN, mean_of, shown_images
from .pretraining import autocast, encoders_of, optimizer_of
from .settings import Settings
from .variants import Variant, stream_inputs


class Ensemble(nn.Module):
    """The encoders of a variant, each with a head: classes of scenes, or of pixels where scenes have none."""

    def __init__(self, settings: Settings, variant: Variant, data: StudyData, seed: int, folder: Path):
        super().__init__()
        self.data, self.heads = data, nn.ModuleDict()
        for stream, encoder in encoders_of(settings, variant, data, seed, folder).items():
            encoder.config.num_labels = len(data.class_names)
            torch.manual_seed(seed)
            head = FusMAEForImageClassification if data.scene_names else FusMAEForSemanticSegmentation
            model = head(encoder.config)
            model.fusmae.load_state_dict(encoder.state_dict())
            self.heads[stream] = model.to(settings.device)

    def forward(self, images: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """Logits: `(batch_size, classes)`, or `(batch_size, classes, height, width)` at the size of the images."""
        size = next(given.shape[-2:] for given in images.values() if given is not None)
        logits = []
        for stream, head in self.heads.items():
            inputs = stream_inputs(stream, self.data, **images)
            if inputs is not None:
                logits.append(head(**inputs).logits.float())
        mean = torch.stack(logits).mean(dim=0)
        return mean if mean.ndim == 2 else functional.interpolate(mean, size, mode="bilinear")


def finetune(
    settings: Settings, variant: Variant, data: StudyData, seed: int, folder: Path
) -> dict[str, dict[str, dict[str, Any]]]:
    """Fine-tune for each choice of sensors and fraction of the labels.

    Returns:
        Metrics on the test split by the sensors that were shown, in training and in the test, and by fraction.
    """
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for shown in (shown for shown in SHOWN if variant.sees(shown)):
        for fraction in settings.fractions:
            model = _train(settings, variant, data, seed, folder, shown, fraction)
            record.setdefault(shown, {})[str(fraction)] = _measure(settings, data, model, shown)
    return record


def _images(split: Split, rows: np.ndarray | slice, shown: str) -> dict[str, torch.Tensor | None]:
    given = shown_images(split, shown)
    return {sensor: None if images is None else images[rows].float() for sensor, images in given.items()}


def _train(
    settings: Settings, variant: Variant, data: StudyData, seed: int, folder: Path, shown: str, fraction: float
) -> Ensemble:
    options, train = settings.finetuning[data.settings.kind], data.splits["train"]
    drawn = draw_label_fraction(list(map(str, range(len(train)))), train.labels, fraction, seed, train.labels.shape[1])
    rows, steps = np.array(drawn, dtype=np.int64), options["steps"][fraction]
    model = Ensemble(settings, variant, data, seed, folder).train()
    optimizer, schedule = optimizer_of(model, settings, options["learning_rate"], steps)
    rng, order = np.random.default_rng([seed, 4]), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < options["batch_size"]:
            order = np.concatenate([order, rng.permutation(rows)])
        batch, order = order[: options["batch_size"]], order[options["batch_size"] :]
        images, flip, turns = _images(train, batch, shown), rng.random() < 0.5, int(rng.integers(4))
        label_map = train.label_map[batch].long()
        images, label_map = _turned(images, label_map, turns, flip)
        with autocast(settings):
            logits = model(images)
        if data.scene_names:
            labels = torch.from_numpy(train.labels[batch]).float().to(settings.device)
            loss = functional.binary_cross_entropy_with_logits(logits, labels)
        else:
            loss = functional.cross_entropy(logits, label_map)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _turned(images, label_map, turns, flip):
    def turn(values):
        turned = torch.rot90(values, turns, dims=(-2, -1))
        return (turned.flip(-1) if flip else turned).contiguous()

    return {sensor: None if given is None else turn(given) for sensor, given in images.items()}, turn(label_map)


@torch.no_grad()
def _measure(settings: Settings, data: StudyData, model: Ensemble, shown: str) -> dict[str, Any]:
    test, names = data.splits["test"], data.class_names
    scores, counts = [], torch.zeros(len(names), len(names), dtype=torch.long)
    for start in range(0, len(test), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        with autocast(settings):
            logits = model(_images(test, rows, shown))
        if data.scene_names:
            scores.append(logits.cpu())
        else:
            counts += confusion_counts(logits.argmax(dim=1), test.label_map[rows], len(names)).cpu()
    if not data.scene_names:
        metrics = intersection_over_union(counts, names)
        return {"mean_iou": metrics["mean_iou"], "iou_per_class": metrics["iou_per_class"]}
    metrics = average_precision(torch.cat(scores).numpy(), test.labels, names)
    of_class = metrics["average_precision_per_class"]
    frequent = tuple(np.array(names)[test.labels.sum(axis=0) >= FEWEST_POSITIVES].tolist())
    return {
        "ap_macro": mean_of(of_class, frequent),
        "ap_micro": metrics["average_precision_micro"],
        "ap_need_both": mean_of(of_class, data.need_both),
        "ap_per_class": of_class,
    }
