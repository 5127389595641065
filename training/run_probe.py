"""Measure what a frozen Fus-MAE encoder knows: a linear probe and nearest neighbours on its features.

    python training/run_probe.py --model <checkpoint> --data <shards> --output_dir outputs/probe

Ends with `metrics.json`, `metrics.md`, `predictions.parquet`, `scores_by_class.png` and `run.json` in the output
folder; with `--seeds 3` in a folder for each seed, beside `summary.json` and `summary.md`. Features are kept, so that
nothing goes through the encoder twice.
"""

from fusmae_hf.training.short_help import PROBE, answer_early

if __name__ == "__main__":
    answer_early(__doc__, PROBE)  # before the imports, which take seconds


import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, set_seed

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.evaluation.baselines import BandStatistics
from fusmae_hf.evaluation.features import Features, Pooling, class_indices, extract_features, weights_hash
from fusmae_hf.files.finished import settings_hash, write_record
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.arguments import CheckpointArguments, SourceArguments, parse_arguments
from fusmae_hf.training.finetuning.arguments import ProbeArguments
from fusmae_hf.training.finetuning.labels import check_labels, drawn_ids
from fusmae_hf.training.finetuning.metrics import score_intervals
from fusmae_hf.training.finetuning.models import build_encoder
from fusmae_hf.training.finetuning.results import (
    class_table,
    draw_scores_by_class,
    finished_run,
    of_split,
    scene_class_columns,
    score_table,
    write_columns,
    write_summary,
)
from fusmae_hf.training.loop.records import data_record, explained, fresh_processor, require_writable
from fusmae_hf.training.loop.signals import interrupted_with_a_sentence
from fusmae_hf.training.sources import content_of, open_splits
from fusmae_hf.vocabulary import Sensors

if TYPE_CHECKING:
    from fusmae_hf.evaluation.probes import ProbeResult, Task

COLUMNS = ("probe", "sensors", "pooling")
"""Parts of the name of a row, such as `linear/both/mean`."""

View = tuple[Sensors, Pooling]


@dataclasses.dataclass
class Plan:
    """What all seeds of a command have in common.

    Attributes:
        features: by split, then by sensors and pooling.
        record: what tells the encoder from others.
    """

    arguments: ProbeArguments
    task: FineTuningTask
    splits: dict[str, PairDataset]
    measured_on: str
    features: dict[str, dict[View, Features]]
    record: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of everything but the seed that decides what a run gives."""
        left_out = ("output_dir", "seed", "seeds", "bootstrap", "features_dir", "batch_size", "num_workers", "device")
        decisive = {name: value for name, value in vars(self.arguments).items() if name not in left_out}
        content = [content_of(pairs) for pairs in self.splits.values()]
        encoder = [self.record[name] for name in ("weights", "feature_layers", "preprocessing")]
        return settings_hash([decisive, self.task.name, *encoder, content])


def open_data(data: SourceArguments, arguments: ProbeArguments) -> tuple[FineTuningTask, dict[str, PairDataset], str]:
    """The task, the splits, and the one that is measured on.

    Raises:
        ValueError: scenes have no classes, the task is none of classes of scenes, or nothing is held out.
    """
    splits = open_splits(data, Path(arguments.output_dir).parent / "shards")
    task = FineTuningTask.of_pairs(splits["train"].info, arguments.task)
    if task.dense or task.is_regression:
        raise ValueError(
            f"Probes are for classes of scenes, not for {task.name}: fine-tune for that, with run_finetune.py, where "
            "`--freeze encoder` lets only the head learn."
        )
    measured_on = next((split for split in ("test", "validation") if split in splits), None)
    if measured_on is None:
        raise ValueError("There is neither a test nor a validation split, so nothing can be measured.")
    splits = {split: splits[split] for split in ("train", "validation", "test") if split in splits}
    for pairs in splits.values():
        check_labels(pairs, task)
    return task, splits, measured_on


def make_encoder(
    checkpoint: CheckpointArguments, data: SourceArguments, arguments: ProbeArguments, train: PairDataset
) -> tuple[PreTrainedModel, FusMAEImageProcessor]:
    """What makes features, and the processor that goes with it."""
    set_seed(arguments.seed)
    size = tuple(train[0]["sar"].shape[-2:])
    if arguments.features == "encoder":
        return build_encoder(checkpoint, data, train.info, size)
    if checkpoint.model or checkpoint.from_scratch:
        raise ValueError("`features` bands need no model: leave `model` and `from_scratch` out.")
    config = FusMAEConfig(optical_bands=train.info.optical_bands, sar_bands=train.info.sar_bands)
    return BandStatistics(config), fresh_processor(data, train.info, config)


def make_plan(checkpoint: CheckpointArguments, data: SourceArguments, arguments: ProbeArguments) -> Plan:
    """Open the data and make all features, or find those that were kept."""
    task, splits, measured_on = open_data(data, arguments)
    encoder, processor = make_encoder(checkpoint, data, arguments, splits["train"])
    features: dict[str, dict[View, Features]] = {split: {} for split in splits}
    for split, pairs in splits.items():
        for sensors, pooling in arguments.views:
            features[split][sensors, pooling] = extract_features(
                encoder,
                pairs,
                processor,
                sensors=sensors,
                pooling=pooling,
                batch_size=arguments.batch_size,
                num_workers=arguments.num_workers,
                device=arguments.device or torch.accelerator.current_accelerator() or "cpu",
                cache=arguments.features_dir or Path(arguments.output_dir).parent / "features",
            )
    record = {
        "encoder": "mean and deviation of each band" if arguments.features == "bands" else checkpoint.model,
        "preset": checkpoint.preset if checkpoint.from_scratch else None,
        "encoder_seed": arguments.seed if checkpoint.from_scratch else None,
        "weights": weights_hash(encoder),
        "feature_layers": encoder.config.feature_layers,
        "preprocessing": hashlib.sha256(processor.to_json_string().encode()).hexdigest()[:16],
    }
    return Plan(arguments, task, splits, measured_on, features, record)


def fit_probe(plan: Plan, probe: str, view: View, ids: list[str] | None, seed: int) -> "ProbeResult":
    """The result of one probe, with warnings where it should not be taken at its word."""
    from fusmae_hf.evaluation.probes import knn_probe, linear_probe

    arguments, task = plan.arguments, cast("Task", plan.task.name)
    train, test = plan.features["train"][view], plan.features[plan.measured_on][view]
    if ids is not None:
        readable = set(train.ids)
        train = train.select([id for id in ids if id in readable])
    if probe == "knn":
        if arguments.k > len(train):
            raise ValueError(
                f"`k` is {arguments.k}, but there are only {len(train)} training samples: give a smaller `--k`, or "
                "`--probes linear`."
            )
        return knn_probe(train, test, task, arguments.k, arguments.temperature)
    chosen_on = plan.features.get("validation", {}).get(view) if plan.measured_on == "test" else None
    result, row = linear_probe(train, chosen_on, test, task, arguments.values, seed), "/".join((probe, *view))
    if result.at_edge_of_sweep:
        print(f"{row}: the best C, {result.hyperparameters['C']:g}, lies on the edge of `--sweep`. Widen it.")
    if not result.hyperparameters["converged"]:
        print(f"{row}: the final fit did not reach its optimum.")
    return result


def run(plan: Plan, folder: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Fit all probes with one seed, and write everything; metrics by row."""
    arguments, task = plan.arguments, plan.task
    label_seed = seed if arguments.label_seed is None else arguments.label_seed
    folder.mkdir(parents=True, exist_ok=True)
    ids = drawn_ids(plan.splits["train"], task, arguments.label_fraction, label_seed, folder)
    rows, tables, untrained = dict[str, dict[str, Any]](), list[dict[str, Any]](), list[str]()
    for probe in arguments.names("probes"):
        for view in arguments.views:
            result, test = fit_probe(plan, probe, view, ids, seed), plan.features[plan.measured_on][view]
            held = np.asarray(test.labels)
            labels = held.astype(np.float32) if task.is_multi_label else class_indices(held)
            row = rows["/".join((probe, *view))] = {
                "metrics": result.metrics,
                "hyperparameters": result.hyperparameters,
                "sweep": {f"{value:g}": score for value, score in result.sweep.items()},
                "at_edge_of_sweep": result.at_edge_of_sweep,
                "untrained_classes": result.untrained_classes,
            }
            if arguments.bootstrap:
                row["intervals"] = score_intervals(task, result.scores, labels, arguments.bootstrap)
            untrained = result.untrained_classes
            parts = {name: [part] * len(test) for name, part in zip(COLUMNS, (probe, *view), strict=True)}
            tables.append({**parts, "id": test.ids, **scene_class_columns(task, result.scores, labels)})
    if untrained:
        print(f"No training sample tells the classes {untrained} from others: their scores say nothing.")
    write_columns(folder / "predictions.parquet", task, tables)
    report(plan, folder, seed, rows, len(ids) if ids else len(plan.splits["train"]))
    return {name: row["metrics"] for name, row in rows.items()}


def report(plan: Plan, folder: Path, seed: int, rows: dict[str, dict[str, Any]], trained_on: int) -> None:
    """The picture, `run.json` and the tables; `metrics.json`, by which a run counts as finished, last."""
    task, train, measured = plan.task, plan.splits["train"], plan.splits[plan.measured_on]
    metrics = {name: row["metrics"] for name, row in rows.items()}
    first, *_ = (name.split("/") for name in rows)
    alike = {name: values for name, values in metrics.items() if name.split("/")[::2] == first[::2]}
    title = f"{first[0]} probe of {first[2]} features, {of_split(train.info, plan.measured_on)}"
    draw_scores_by_class(folder, alike, title, COLUMNS)
    record = data_record(
        "run_probe.py", train, {name: pairs for name, pairs in plan.splits.items() if name != "train"}
    )
    record |= {
        "task": task.name,
        "classes": list(task.outputs),
        "features": plan.record,
        "trained_on": trained_on,
        "label_fraction": plan.arguments.label_fraction,
        "seed": seed,
        "split": plan.measured_on,
        "measured": len(measured),
    }
    write_record(folder / "run.json", record, indent=2)
    intervals = {name: row["intervals"] for name, row in rows.items() if "intervals" in row}
    table = score_table(task, metrics, intervals, COLUMNS)
    by_class = class_table(next(iter(metrics.values())))
    (folder / "metrics.md").write_text(f"{table}\n\nBy class, {', '.join(first)}:\n\n{by_class}\n")
    finished = {
        "task": task.name,
        "split": plan.measured_on,
        "seed": seed,
        "settings": plan.fingerprint,
        "bootstrap": plan.arguments.bootstrap,
        "probes": rows,
    }
    write_record(folder / "metrics.json", finished, indent=2)
    print(f"\n{len(measured):,} pairs of the split {plan.measured_on}:\n\n{table}\n\nEverything is in {folder}.")


def main(argv: list[str] | None = None) -> None:
    """Run the program; see the module's docstring and `--help`."""
    with explained():
        data, checkpoint, arguments = parse_arguments(
            (SourceArguments, CheckpointArguments, ProbeArguments), argv, description=__doc__
        )
        require_writable(arguments.output_dir)
        plan, folder = make_plan(checkpoint, data, arguments), Path(arguments.output_dir)
        if arguments.seeds == 1:
            run(plan, folder, arguments.seed)
            return
        by_seed = {}
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            of_seed = folder / f"seed-{seed}"
            finished = finished_run(of_seed, plan.fingerprint, arguments.bootstrap)
            kept = {name: row["metrics"] for name, row in finished["probes"].items()} if finished else None
            by_seed[seed] = kept or run(plan, of_seed, seed)
        write_summary(folder, plan.task, by_seed, plan.measured_on, COLUMNS)


if __name__ == "__main__":
    with interrupted_with_a_sentence("Start the same command again."):
        main()
