"""Measure what a frozen Fus-MAE encoder knows: a linear probe and nearest neighbours on its features.

    python training/run_probe.py --model <checkpoint> --data <shards> --output_dir outputs/probe

Ends with `metrics.json`, `metrics.md`, `predictions.parquet`, `scores_by_class.png` and `run.json` in the output
folder; with `--seeds 3` in a folder for each seed, beside `summary.json` and `summary.md`. Features are kept, so that
nothing goes through the encoder twice.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, set_seed

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor
from fusmae_hf.evaluation.band_features import BandStatistics
from fusmae_hf.evaluation.features import Features, Pooling, extract_features, weights_hash
from fusmae_hf.evaluation.scene_labels import class_indices
from fusmae_hf.plots.scores import plot_scores_by_class
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.arguments import CheckpointArguments, SourceArguments, parse_arguments
from fusmae_hf.training.finetuning.label_drawing import drawn_ids
from fusmae_hf.training.finetuning.labels import check_labels
from fusmae_hf.training.finetuning.models import build_encoder
from fusmae_hf.training.finetuning.probe_arguments import ProbeArguments
from fusmae_hf.training.finetuning.results import scene_class_columns
from fusmae_hf.training.finetuning.score_intervals import score_intervals
from fusmae_hf.training.finetuning.score_tables import (
    SENSOR_NAMES,
    class_table,
    finished_run,
    score_table,
    write_summary,
)
from fusmae_hf.training.finetuning.tasks import FineTuningTask
from fusmae_hf.training.loop.records import data_record, explained, fresh_processor, require_writable
from fusmae_hf.training.sources import content_of, open_splits
from fusmae_hf.vocabulary import Sensors

if TYPE_CHECKING:
    from fusmae_hf.evaluation.probes import ProbeResult, Task

COLUMNS = ("probe", "sensors", "pooling")
"""Parts of the name of a row, such as `linear/both/mean`."""


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
    features: dict[str, dict[tuple[Sensors, Pooling], Features]]
    record: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of everything but the seed that decides what a run gives."""
        left_out = ("output_dir", "seed", "seeds", "bootstrap", "features_dir", "batch_size", "num_workers", "device")
        decisive = {name: value for name, value in vars(self.arguments).items() if name not in left_out}
        content = [content_of(pairs) for pairs in self.splits.values()]
        parts = [decisive, self.task.name, self.record["weights"], self.record["preprocessing"], content]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def scene_task(train: PairDataset, name: str | None) -> FineTuningTask:
    """The task of the probes.

    Raises:
        ValueError: scenes have no classes, or the task is none of classes of scenes.
    """
    task = FineTuningTask.of_pairs(train.info, name)
    if task.dense or task.is_regression:
        raise ValueError(
            f"Probes are for classes of scenes, not for {task.name}: fine-tune for that, with run_finetune.py, where "
            "`--freeze encoder` lets only the head learn."
        )
    return task


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
    splits = open_splits(data, Path(arguments.output_dir).parent / "shards")
    task = scene_task(splits["train"], arguments.task)
    measured_on = next((split for split in ("test", "validation") if split in splits), None)
    if measured_on is None:
        raise ValueError("There is neither a test nor a validation split, so nothing can be measured.")
    splits = {split: splits[split] for split in ("train", "validation", "test") if split in splits}
    for pairs in splits.values():
        check_labels(pairs, task)
    encoder, processor = make_encoder(checkpoint, data, arguments, splits["train"])
    kept = arguments.features_dir or Path(arguments.output_dir).parent / "features"
    features: dict[str, dict[tuple[Sensors, Pooling], Features]] = {split: {} for split in splits}
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
                cache=kept,
            )
    record = {
        "encoder": "mean and deviation of each band" if arguments.features == "bands" else checkpoint.model,
        "preset": checkpoint.preset if checkpoint.from_scratch else None,
        "encoder_seed": arguments.seed if checkpoint.from_scratch else None,
        "weights": weights_hash(encoder),
        "preprocessing": hashlib.sha256(processor.to_json_string().encode()).hexdigest()[:16],
    }
    return Plan(arguments, task, splits, measured_on, features, record)


def probe_row(
    plan: Plan, probe: str, view: tuple[Sensors, Pooling], ids: tuple[str, ...] | None, seed: int
) -> "ProbeResult":
    """The result of one probe, with warnings where it should not be taken at its word."""
    from fusmae_hf.evaluation.probes import knn_probe, linear_probe

    arguments, task = plan.arguments, cast("Task", plan.task.name)
    train, test = plan.features["train"][view], plan.features[plan.measured_on][view]
    if ids is not None:
        readable = set(train.ids)
        train = train.select([id for id in ids if id in readable])
    row = "/".join((probe, *view))
    if probe == "knn":
        if arguments.k > len(train):
            raise ValueError(
                f"`k` is {arguments.k}, but there are only {len(train)} training samples: give a smaller `--k`, or "
                "`--probes linear`."
            )
        result = knn_probe(train, test, task, arguments.k, arguments.temperature)
    else:
        validation = (
            plan.features["validation"][view] if plan.measured_on == "test" and "validation" in plan.splits else None
        )
        result = linear_probe(train, validation, test, task, arguments.values, seed)
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
    rows, tables, untrained = dict[str, dict[str, Any]](), [], list[str]()
    for probe in arguments.names("probes"):
        for view in arguments.views:
            result, row = probe_row(plan, probe, view, ids, seed), "/".join((probe, *view))
            test = plan.features[plan.measured_on][view]
            held = np.asarray(test.labels)
            labels = held.astype(np.float32) if task.is_multi_label else class_indices(held)
            rows[row] = {
                "metrics": result.metrics,
                "hyperparameters": result.hyperparameters,
                "sweep": {f"{value:g}": score for value, score in result.sweep.items()},
                "at_edge_of_sweep": result.at_edge_of_sweep,
                "untrained_classes": result.untrained_classes,
            }
            if arguments.bootstrap:
                rows[row]["intervals"] = score_intervals(task, result.scores, labels, arguments.bootstrap)
            untrained = result.untrained_classes
            parts = {name: [part] * len(test) for name, part in zip(COLUMNS, (probe, *view), strict=True)}
            tables.append(pa.table(parts | {"id": test.ids} | scene_class_columns(task, result.scores, labels)))
    if untrained:
        print(f"No training sample tells the classes {untrained} from others: their scores say nothing.")
    predictions = pa.concat_tables(tables).replace_schema_metadata({"class_names": json.dumps(task.outputs)})
    pq.write_table(predictions, folder / "predictions.parquet")
    _write_records(plan, folder, seed, rows, len(ids) if ids else len(plan.splits["train"]))
    return {row: of_row["metrics"] for row, of_row in rows.items()}


def _write_records(plan: Plan, folder: Path, seed: int, rows: dict[str, dict[str, Any]], trained_on: int) -> None:
    """The picture, `run.json` and the tables; `metrics.json`, by which a run counts as finished, last."""
    task, info, measured = plan.task, plan.splits["train"].info, plan.splits[plan.measured_on]
    metrics = {row: of_row["metrics"] for row, of_row in rows.items()}
    intervals = {row: of_row["intervals"] for row, of_row in rows.items() if "intervals" in of_row}
    table, by_class = score_table(task, metrics, intervals, COLUMNS), class_table(next(iter(metrics.values())))
    first = next(iter(rows)).split("/")
    per_class = next(name for name, values in next(iter(metrics.values())).items() if isinstance(values, dict))
    pictured = {
        SENSOR_NAMES[row.split("/")[1]]: values[per_class]
        for row, values in metrics.items()
        if row.split("/")[::2] == first[::2]
    }
    kind = "simulated imagery" if info.simulated else info.name
    title = f"{first[0]} probe of {first[2]} features, {plan.measured_on} split of {kind}"
    measure = per_class.removesuffix("_per_class").replace("_", " ")
    plot_scores_by_class(pictured, measure, title).savefig(folder / "scores_by_class.png", dpi=110)
    held_out = {name: pairs for name, pairs in plan.splits.items() if name != "train"}
    record = data_record("run_probe.py", plan.splits["train"], held_out) | {
        "task": task.name,
        "classes": list(task.outputs),
        "features": plan.record,
        "trained_on": trained_on,
        "label_fraction": plan.arguments.label_fraction,
        "seed": seed,
        "split": plan.measured_on,
        "measured": len(measured),
    }
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    first_row = f"By class, {', '.join(first)}:" if by_class else ""
    (folder / "metrics.md").write_text(f"{table}\n\n{first_row}\n\n{by_class}\n")
    finished = {
        "task": task.name,
        "split": plan.measured_on,
        "seed": seed,
        "settings": plan.fingerprint,
        "bootstrap": plan.arguments.bootstrap,
        "probes": rows,
    }
    (folder / "metrics.json").write_text(json.dumps(finished, indent=2) + "\n")
    print(f"\n{len(measured):,} pairs of the split {plan.measured_on}:\n\n{table}\n\nEverything is in {folder}.")


def main(argv: list[str] | None = None) -> None:
    """Run the program; see the module's docstring and `--help`."""
    with explained():
        data, checkpoint, arguments = parse_arguments(
            (SourceArguments, CheckpointArguments, ProbeArguments), argv, description=__doc__
        )
        require_writable(arguments.output_dir)
        plan = make_plan(checkpoint, data, arguments)
        folder = Path(arguments.output_dir)
        if arguments.seeds == 1:
            run(plan, folder, arguments.seed)
            return
        by_seed = {}
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            of_seed = folder / f"seed-{seed}"
            finished = finished_run(of_seed, plan.fingerprint, arguments.bootstrap)
            kept = {row: of_row["metrics"] for row, of_row in finished["probes"].items()} if finished else None
            by_seed[seed] = kept or run(plan, of_seed, seed)
        write_summary(folder, plan.task, by_seed, plan.measured_on, COLUMNS)


if __name__ == "__main__":
    main()
