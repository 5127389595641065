"""Linear probes of frozen features, the same for every variant.

The feature of a patch is the mean over the sensors present of its tokens, that of a scene the mean over its patches:
what the model itself calls `pooler_output` and the maps of its backbone. Several encoders (two streams) are
concatenated. Since only they keep the sensors apart, `both, apart` gives every two-token model the same chance: the
means of optical and of SAR tokens side by side. Probes are fitted on aligned, complete pairs; the one of all labels is
shown misregistered pairs and pairs without a sensor as well.

Contrastive pretraining shows the encoder a sensor at a time, and never trains what joins both. Of such an encoder each
sensor is encoded alone here as well, and averaged like the tokens of the others.

Regularisation is chosen on the validation split alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier

from fusmae_hf.evaluation.features import Features
from fusmae_hf.evaluation.label_fractions import draw_label_fraction
from fusmae_hf.evaluation.probes import ProbeResult, Task, linear_probe
from fusmae_hf.evaluation.scores import average_precision, confusion_counts, intersection_over_union
from fusmae_hf.modeling.modeling_fusmae import FusMAEModel
from fusmae_hf.modeling.patches_fusmae import patchify

from .data import Split, StudyData
from .pretraining import autocast
from .settings import Settings
from .variants import Stream, Variant, stream_inputs

SHOWN = ("both", "sar", "optical")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BATCH_SIZE = 200
FEWEST_POSITIVES = 10
"""Of a class in the test split, for it to count in the mean over classes: that of a rarer one is mostly chance."""
TREES, LEAF_SIZES = 50, (1, 4)


@dataclasses.dataclass
class Described:
    """Features of some pairs by stream, None where a stream was shown nothing.

    Attributes:
        scenes: `(pairs, size)` by stream.
        patches: `(pairs, patches, size)` by stream.
        apart: `(pairs, 2 * size)`, optical and SAR tokens pooled apart, of a pair model shown both sensors.
    """

    scenes: list[np.ndarray | None]
    patches: list[np.ndarray | None]
    apart: np.ndarray | None = None


def shown_images(split: Split, shown: str, sar: torch.Tensor | None = None) -> dict[str, torch.Tensor | None]:
    """Images of the sensors that are shown; `sar` in place of the split's own."""
    return {
        "optical": split.optical if shown != "sar" else None,
        "sar": (split.sar if sar is None else sar) if shown != "optical" else None,
    }


@torch.no_grad()
def describe(
    settings: Settings,
    data: StudyData,
    encoders: dict[Stream, FusMAEModel],
    images: dict[str, torch.Tensor | None],
    patch_rows: np.ndarray,
    alone: bool = False,
) -> Described:
    """Features of images; those of patches only for the pairs in `patch_rows`.

    With `alone` each sensor is encoded for itself and the results are averaged, as contrastive pretraining knows them.
    """
    pairs = next(len(given) for given in images.values() if given is not None)
    found = Described([], [])
    for stream, encoder in encoders.items():
        scenes, patches, apart = [], [], []
        for start in range(0, pairs, BATCH_SIZE):
            part = {
                sensor: None if given is None else given[start : start + BATCH_SIZE].float()
                for sensor, given in images.items()
            }
            inputs = stream_inputs(stream, data, **part)
            if inputs is None:
                break
            calls = [{name: values} for name, values in inputs.items()] if alone else [inputs]
            with autocast(settings):
                outputs = [encoder(**call) for call in calls]
            tokens = [of_sensor for out in outputs for of_sensor in (out.optical_hidden_state, out.sar_hidden_state)]
            given = [of_sensor for of_sensor in tokens if of_sensor is not None]
            scenes.append(torch.stack([out.pooler_output for out in outputs]).mean(dim=0).float().cpu())
            wanted = patch_rows[(patch_rows >= start) & (patch_rows < start + BATCH_SIZE)] - start
            patches.append(torch.stack(given).mean(dim=0)[wanted].float().cpu())
            if len(given) == 2:
                apart.append(torch.cat([of_sensor.mean(dim=1) for of_sensor in given], dim=1).float().cpu())
        found.scenes.append(torch.cat(scenes).numpy() if scenes else None)
        found.patches.append(torch.cat(patches).numpy() if patches else None)
        if apart:
            found.apart = torch.cat(apart).numpy()
    return found


def describe_raw(images: dict[str, torch.Tensor | None], patch_size: int, patch_rows: np.ndarray) -> Described:
    """Mean, deviation and quantiles of each band, over scenes and over patches."""

    def summary(values: torch.Tensor) -> torch.Tensor:  # (..., bands, pixels)
        values = values.float()
        quantiles = torch.quantile(values, torch.tensor(QUANTILES, device=values.device), dim=-1).movedim(0, -1)
        parts = [values.mean(dim=-1, keepdim=True), values.std(dim=-1, keepdim=True), quantiles]
        return torch.cat(parts, dim=-1).flatten(-2)

    given = [of_sensor for of_sensor in images.values() if of_sensor is not None]
    scenes, patches = [], []
    for of_sensor in given:
        scenes.append(torch.cat([summary(part.flatten(2)) for part in of_sensor.split(BATCH_SIZE)]))
        patches.append(
            torch.cat([summary(patchify(part, patch_size)) for part in of_sensor[patch_rows].split(BATCH_SIZE)])
        )
    return Described([torch.cat(scenes, dim=-1).cpu().numpy()], [torch.cat(patches, dim=-1).cpu().numpy()])


def joined(streams: list[np.ndarray | None], like: list[np.ndarray | None] | None = None) -> np.ndarray:
    """Features of all streams side by side; of one that was shown nothing, the mean of `like`, or none."""
    columns = []
    for number, values in enumerate(streams):
        if values is None and like is not None and like[number] is not None:
            rows = next(len(given) for given in streams if given is not None)
            values = np.broadcast_to(like[number].mean(axis=0), (rows, *like[number].shape[1:]))
        if values is not None:
            columns.append(values)
    return np.concatenate(columns, axis=-1)


def evaluate(
    settings: Settings, variant: Variant, data: StudyData, encoders: dict[Stream, FusMAEModel], seed: int
) -> dict[str, Any]:
    """Probe a variant.

    Returns:
        `scenes` and `patches`: metrics by sensors shown and fraction of the labels; `robustness`: of the probe on all
        labels of both sensors, metrics by what is wrong with the test pairs.
    """
    rows = {
        split: np.sort(np.random.default_rng([seed, 2]).permutation(len(data.splits[split]))[:most])
        for split, most in settings.token_pairs.items()
    }

    def found(split: str, shown: str, sar: torch.Tensor | None = None) -> Described:
        images = shown_images(data.splits[split], shown, sar)
        if variant.has_encoder:
            return describe(settings, data, encoders, images, rows[split], variant.objective == "contrastive")
        return describe_raw(images, data.settings.patch_size, rows[split])

    described = {
        shown: {split: found(split, shown) for split in data.splits} for shown in SHOWN if variant.sees(shown)
    }
    record: dict[str, Any] = {"scenes": {}, "patches": {}, "robustness": {}}
    for shown, of_splits in described.items():
        wrong: dict[str, Described] = {}
        if shown == "both":
            wrong = {f"moved {px} px": found("test", "both", sar) for px, sar in data.shifted_sar.items() if px}
            if variant.has_encoder:
                wrong |= {f"{other} alone": described[other]["test"] for other in SHOWN[1:] if other in described}
        for fraction in settings.fractions:
            last = fraction == max(settings.fractions)
            tests = {"aligned": of_splits["test"]} | (wrong if last else {})
            for kind, probe in (("scenes", probe_scenes), ("patches", probe_patches)):
                if kind == "scenes" and not data.scene_names:
                    continue
                arguments = (of_splits["train"], of_splits["validation"], tests, fraction, seed, rows)
                scores = probe(settings, variant, data, *arguments)
                record[kind].setdefault(shown, {})[str(fraction)] = scores["aligned"]
                if shown == "both" and last:
                    record["robustness"][kind] = scores
                if kind == "scenes" and of_splits["test"].apart is not None:
                    apart = {split: Described([given.apart], []) for split, given in of_splits.items()}
                    arguments = (apart["train"], apart["validation"], {"aligned": apart["test"]}, fraction, seed, rows)
                    scores = probe(settings, variant, data, *arguments)
                    record[kind].setdefault("both, apart", {})[str(fraction)] = scores["aligned"]
    return record


def probe_scenes(
    settings: Settings,
    variant: Variant,
    data: StudyData,
    train: Described,
    validation: Described,
    tests: dict[str, Described],
    fraction: float,
    seed: int,
    rows: dict[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """Average precision of the classes of scenes, by test."""
    labels = {split: of_split.labels for split, of_split in data.splits.items()}
    ids = [str(row) for row in range(len(labels["train"]))]
    drawn = draw_label_fraction(ids, labels["train"], fraction, seed, len(data.scene_names))
    kept = np.array([int(row) for row in drawn])
    known, held = joined(train.scenes)[kept], joined(validation.scenes)
    unknown = np.concatenate([joined(test.scenes, like=train.scenes) for test in tests.values()])
    truth = np.tile(labels["test"], (len(tests), 1))
    of_splits = ((known, labels["train"][kept]), (held, labels["validation"]), (unknown, truth))
    probe = _classify(settings, variant, "multi_label_classification", of_splits, data.scene_names)
    frequent = tuple(np.array(data.scene_names)[labels["test"].sum(axis=0) >= FEWEST_POSITIVES].tolist())
    results = {}
    for name, scores in zip(tests, np.split(probe.scores, len(tests)), strict=True):
        metrics = average_precision(scores, labels["test"], class_names=data.scene_names)
        of_class = metrics["average_precision_per_class"]
        results[name] = {
            "ap_macro": mean_of(of_class, frequent),
            "ap_micro": metrics["average_precision_micro"],
            "ap_need_both": mean_of(of_class, data.need_both),
            "ap_per_class": of_class,
            "probe": probe.hyperparameters | {"at_edge_of_sweep": probe.at_edge_of_sweep},
        }
    return results


def probe_patches(
    settings: Settings,
    variant: Variant,
    data: StudyData,
    train: Described,
    validation: Described,
    tests: dict[str, Described],
    fraction: float,
    seed: int,
    rows: dict[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """Intersection over union of the classes of patches, by test; of two classes also the average precision."""
    names = data.class_names
    classes = {
        split: data.splits[split].rows(of_split).token_classes(data.settings.patch_size, len(names))
        for split, of_split in rows.items()
    }
    pairs = max(1, round(fraction * len(rows["train"])))
    kept = np.random.default_rng([seed, 3]).permutation(len(rows["train"]))[:pairs]
    one_hot = np.eye(len(names), dtype=bool)

    def of_patches(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, values.shape[-1])

    unknown = np.concatenate([of_patches(joined(test.patches, like=train.patches)) for test in tests.values()])
    truth = classes["test"].ravel()
    of_splits = (
        (of_patches(joined(train.patches)[kept]), one_hot[classes["train"][kept].ravel()]),
        (of_patches(joined(validation.patches)), one_hot[classes["validation"].ravel()]),
        (unknown, one_hot[np.tile(truth, len(tests))]),
    )
    probe = _classify(settings, variant, "single_label_classification", of_splits, names)
    results = {}
    for name, scores in zip(tests, np.split(probe.scores, len(tests)), strict=True):
        counts = confusion_counts(torch.from_numpy(scores.argmax(axis=1)), torch.from_numpy(truth), len(names))
        metrics = intersection_over_union(counts, names)
        of_class = metrics["iou_per_class"]
        results[name] = {
            "mean_iou": metrics["mean_iou"],
            "accuracy": metrics["pixel_accuracy"],
            "iou_need_both": mean_of(of_class, data.need_both),
            "iou_per_class": of_class,
            "probe": probe.hyperparameters | {"at_edge_of_sweep": probe.at_edge_of_sweep},
        }
        if len(names) == 2:
            ap = average_precision(scores[:, 1:], one_hot[truth][:, 1:])
            results[name]["ap"] = ap["average_precision_macro"]
    return results


def mean_of(of_class: dict[str, float | None], names: tuple[str, ...]) -> float | None:
    """Mean score of some classes, without those that have none."""
    measured = [of_class[name] for name in names if of_class[name] is not None]
    return float(np.mean(measured)) if measured else None


def _classify(
    settings: Settings,
    variant: Variant,
    task: Task,
    of_splits: Sequence[tuple[np.ndarray, np.ndarray]],
    class_names: tuple[str, ...],
) -> ProbeResult:
    train, validation, test = (
        Features(np.asarray(values, dtype=np.float32), [str(row) for row in range(len(values))], labels, class_names)
        for values, labels in of_splits
    )
    if variant.objective != "forest":
        return linear_probe(train, validation, test, task, sweep=settings.sweep)
    tried = {}
    for leaf in LEAF_SIZES:
        forest = RandomForestClassifier(TREES, min_samples_leaf=leaf, random_state=0).fit(train.values, train.labels)
        tried[leaf] = (
            average_precision(_votes(forest, validation), validation.labels)["average_precision_micro"],
            forest,
        )
    best = max(tried, key=lambda leaf: tried[leaf][0])
    return ProbeResult(_votes(tried[best][1], test), {}, {"min_samples_leaf": best}, {}, False, [])


def _votes(forest: RandomForestClassifier, features: Features) -> np.ndarray:
    """Share of positive votes of each class, `(samples, classes)`."""
    votes = forest.predict_proba(features.values)
    positive = [
        share[:, list(known).index(True)] if True in known else np.zeros(len(share))
        for share, known in zip(votes, forest.classes_, strict=True)
    ]
    return np.stack(positive, axis=1).astype(np.float32)
