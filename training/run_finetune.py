"""Fine-tune Fus-MAE on labelled pairs of Sentinel-1 and Sentinel-2 patches.

    accelerate launch training/run_finetune.py training/configs/finetune-classification.yaml \
        --model <checkpoint> --data <shards> --output_dir outputs/finetune

Ends with a checkpoint (weights, configuration, processor, remote code, model card), `metrics.json`, `metrics.md`,
`predictions.parquet`, pictures and `run.json` in the output folder; with `--seeds 3` in a folder for each seed, beside
`summary.json` and `summary.md`.
"""

import copy
import dataclasses
import gc
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, set_seed

from fusmae_hf.hub.finetuned_card import write_fine_tuned_card
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.arguments import PairArguments, parse_arguments
from fusmae_hf.training.finetuning.arguments import FineTuningArguments, FineTuningModelArguments, TaskArguments
from fusmae_hf.training.finetuning.label_drawing import few_labels
from fusmae_hf.training.finetuning.labels import (
    balanced_weights,
    check_labels,
    class_counts,
    quantity_scale,
    read_columns,
    read_targets,
)
from fusmae_hf.training.finetuning.models import add_lora, build_model, freeze_encoder, rescale_output
from fusmae_hf.training.finetuning.results import draw_pictures, evaluate_sensors, write_maps, write_predictions
from fusmae_hf.training.finetuning.score_intervals import score_intervals
from fusmae_hf.training.finetuning.score_tables import class_table, finished_run, score_table, write_summary
from fusmae_hf.training.finetuning.tasks import FineTuningTask
from fusmae_hf.training.finetuning.trainer import FineTuningTrainer
from fusmae_hf.training.loop.checkpoints import CheckpointNotWrittenError
from fusmae_hf.training.loop.nonfinite import NonFiniteError
from fusmae_hf.training.loop.processes import check_same_everywhere, in_turn, lost_processes_explained
from fusmae_hf.training.loop.records import (
    explained,
    require_writable,
    run_record,
    tensorboard_in,
)
from fusmae_hf.training.loop.resuming import checkpoint_to_resume
from fusmae_hf.training.loop.signals import ends_by_signal
from fusmae_hf.training.sources import augmentation_of, content_of, open_splits, what_is_read

# What changes the outcome of a run, among the arguments that it shares with every Trainer.
_DECISIVE = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "weight_decay", "warmup_steps", "lr_scheduler_type", "label_smoothing_factor", "layer_decay", "bf16", "fp16",
    "max_grad_norm", "adam_beta1", "adam_beta2", "early_stopping_patience", "load_best_model_at_end",
    "metric_for_best_model",
)  # fmt: skip


@dataclasses.dataclass
class Plan:
    """What all seeds of a command have in common."""

    data: PairArguments
    model: FineTuningModelArguments
    learning: TaskArguments
    task: FineTuningTask
    splits: dict[str, PairDataset]

    @property
    def measured_on(self) -> str | None:
        """The split for the final figures: `test`, or `validation` where there is none."""
        return next((split for split in ("test", "validation") if split in self.splits), None)

    def fingerprint(self, arguments: FineTuningArguments) -> str:
        """Of everything but the seed that decides what a run gives."""
        parts = [dataclasses.asdict(part) for part in (self.data, self.model, self.learning)]
        parts[0] |= {"data": [content_of(pairs) for pairs in self.splits.values()]}
        parts.append({name: str(getattr(arguments, name)) for name in _DECISIVE})
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def make_trainer(plan: Plan, arguments: FineTuningArguments) -> FineTuningTrainer:
    """Model, labels and Trainer of one seed."""
    task, model_arguments, learning = plan.task, plan.model, plan.learning
    label_seed = arguments.seed if learning.label_seed is None else learning.label_seed
    with in_turn():
        train = few_labels(plan.splits["train"], task, learning.label_fraction, label_seed, str(arguments.output_dir))
    weights = None
    if not task.is_regression and (model_arguments.class_weights == "balanced" or not task.dense):
        counts, total = class_counts(train, task)
        empty = [name for name, count in zip(task.outputs, counts, strict=True) if not count]
        if model_arguments.class_weights == "balanced":
            weights = balanced_weights(counts, total, task)
        elif empty:
            print(f"No training pair has the classes {empty}: the model cannot learn them.")
    if task.is_regression and (model_arguments.class_weights == "balanced" or model_arguments.focal_gamma):
        raise ValueError("Class weights and the focal loss are for classes, not for regression: leave them out.")
    size = tuple(train[0]["sar"].shape[-2:])
    model, processor, has_head = build_model(model_arguments, plan.data, task, train.info, size, weights)
    scale = quantity_scale(train, task) if task.is_regression else (0.0, 1.0)
    if has_head and task.is_regression:  # it gives the quantity, but is trained on normalised labels
        rescale_output(model, -scale[0] / scale[1], 1 / scale[1])
    if model_arguments.freeze == "encoder":
        freeze_encoder(model)
    if model_arguments.lora_rank:
        model = add_lora(model, model_arguments.lora_rank, model_arguments.lora_alpha)
    targets: dict[str, float] = {}
    if task.target is not None:
        for pairs in plan.splits.values():
            targets |= read_targets(pairs, task.target)
    return FineTuningTrainer(
        model=model,
        processor=processor,
        task=task,
        train_dataset=train,
        eval_dataset=plan.splits.get("validation"),
        targets=targets,
        augmentation=augmentation_of(plan.data, arguments.seed),
        sensors=learning.sensors_to_train,
        layer_decay=arguments.layer_decay,
        scale=scale,
        threshold=learning.threshold,
        callbacks=[EarlyStoppingCallback(arguments.early_stopping_patience)]
        if arguments.early_stopping_patience
        else None,
        args=arguments,
    )


def save_model(trainer: FineTuningTrainer, plan: Plan, folder: Path) -> None:
    """Write the checkpoint: whole, with adapters merged, or the adapters alone with the configuration."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.task.is_regression:
        rescale_output(model, *trainer.scale)
    if plan.model.lora_rank and plan.model.lora_save == "merged":
        trainer.model = trainer.model_wrapped = model.merge_and_unload()
    elif plan.model.lora_rank and trainer.is_world_process_zero():
        model.config.save_pretrained(folder)
    trainer.save_model(str(folder))


def learning_of(plan: Plan, trainer: FineTuningTrainer) -> str:
    """How much of the model learnt, in words."""
    if plan.model.lora_rank:
        return f"Head and adapters of rank {plan.model.lora_rank} in the attention learnt"
    if plan.model.freeze == "encoder":
        return "The head alone learnt, on a frozen encoder"
    return f"The whole model learnt, each layer at {trainer.layer_decay:g} times the rate of the next"


def run(plan: Plan, arguments: FineTuningArguments) -> dict[str, dict[str, Any]]:
    """Train and evaluate with one seed, and write everything; metrics by sensors."""
    folder = Path(str(arguments.output_dir))
    set_seed(arguments.seed)
    with explained():
        trainer = make_trainer(plan, arguments)
        trainer.train_sampler()  # too few pairs for a batch are found here, before anything is started
        trainer.try_batch()
        checkpoint = checkpoint_to_resume(arguments)
        trainer.check_checkpoint(checkpoint)
        if plan.measured_on:
            check_same_everywhere(what_is_read(plan.splits[plan.measured_on], "the final figures"))
        set_seed(arguments.seed)
    with tensorboard_in(folder), explained(CheckpointNotWrittenError, NonFiniteError):
        trainer.train(resume_from_checkpoint=checkpoint)
    split = plan.measured_on
    sensors = plan.learning.sensors_to_evaluate if split else []
    results = evaluate_sensors(trainer, plan.splits[split], sensors) if split else {}
    metrics = {name: result["metrics"] for name, result in results.items()}
    replaced = trainer.replaced_everywhere()  # here, where no process keeps the others waiting
    intervals = {}
    if split and trainer.is_world_process_zero():
        for name, result in results.items() if arguments.bootstrap else ():
            intervals[name] = score_intervals(
                plan.task,
                result["predictions"],
                result["labels"],
                arguments.bootstrap,
                threshold=plan.learning.threshold,
            )
        ids = read_columns(plan.splits[split], ["id"])["id"]
        write_predictions(folder / "predictions.parquet", plan.task, ids, results)
        draw_pictures(folder, trainer, plan.splits[split], results, plan.learning.num_pictures)
        if plan.learning.save_maps and plan.task.name == "semantic_segmentation":
            write_maps(trainer, plan.splits[split], folder / "maps")
    learning = learning_of(plan, trainer)
    save_model(trainer, plan, folder)
    if trainer.is_world_process_zero():
        record = run_record(
            "run_finetune.py",
            arguments,
            trainer.pairs,
            {name: pairs for name, pairs in plan.splits.items() if name != "train"},
            trainer.state.global_step,
        )
        record |= {
            "task": plan.task.name,
            "dense": plan.task.dense,
            "classes": list(plan.task.outputs),
            "preset": Path(plan.model.model).name if plan.model.model else plan.model.preset,
            "from_scratch": plan.model.from_scratch,
            "base_model": plan.model.model if plan.model.model and not Path(plan.model.model).is_dir() else None,
            "adapter": bool(plan.model.lora_rank) and plan.model.lora_save == "adapter",
            "learning": learning,
            "sensors": plan.learning.sensors,
            "label_fraction": plan.learning.label_fraction,
            "best": {"metric": arguments.metric_for_best_model, "value": trainer.state.best_metric},
            "split": split,
            "measured": len(plan.splits[split]) if split else 0,
            "augmentation": dataclasses.asdict(trainer.augmentation) if trainer.augmentation else None,
            "replaced_pairs": replaced,
            "nonfinite_steps": trainer.nonfinite_steps,
        }
        _write_records(folder, plan, arguments, trainer, record, metrics, intervals)
        if arguments.push_to_hub:
            print(trainer.push_to_hub())
    return metrics


def _write_records(folder, plan, arguments, trainer, record, metrics, intervals) -> None:
    """`run.json`, the model card and the tables; `metrics.json`, by which a run counts as finished, last."""
    table = score_table(plan.task, metrics, intervals) if metrics else "Nothing was held out."
    by_class = class_table(next(iter(metrics.values()))) if metrics else ""
    (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    config = trainer.accelerator.unwrap_model(trainer.model).config
    write_fine_tuned_card(
        folder,
        config=config,
        processor=trainer.processor,
        info=trainer.info,
        record=record,
        metrics=metrics,
        results=table,
        by_class=by_class,
    )
    (folder / "metrics.md").write_text(f"{table}\n\n{by_class}\n")
    finished = {
        "task": plan.task.name,
        "split": record["split"],
        "seed": arguments.seed,
        "settings": plan.fingerprint(arguments),
        "bootstrap": arguments.bootstrap,
        "sensors": metrics,
        "intervals": intervals,
    }
    (folder / "metrics.json").write_text(json.dumps(finished, indent=2) + "\n")
    print(f"\n{record['measured']:,} pairs of the split {record['split']}, one checkpoint:\n\n{table}\n\n{by_class}\n")
    print(f"Everything is in {folder}: README.md tells what, metrics.md and *.png show it.")


def run_seeds(plan: Plan, arguments: FineTuningArguments) -> None:
    """Train with several seeds, one after another; those that finished before are kept."""
    folder, by_seed = Path(str(arguments.output_dir)), {}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        of_seed = copy.copy(arguments)
        of_seed.output_dir, of_seed.seed = str(folder / f"seed-{seed}"), seed
        with explained():
            finished = finished_run(Path(of_seed.output_dir), plan.fingerprint(arguments), arguments.bootstrap)
        if finished:
            by_seed[seed] = finished["sensors"]
        else:
            by_seed[seed] = run(plan, of_seed)
            gc.collect()
    if arguments.should_save and plan.measured_on:
        write_summary(folder, plan.task, by_seed, plan.measured_on)


@ends_by_signal()
@lost_processes_explained()
def main(argv: list[str] | None = None) -> None:
    """Run the program; see the module's docstring and `--help`."""
    with explained():
        data, model, learning, arguments = parse_arguments(
            (PairArguments, FineTuningModelArguments, TaskArguments, FineTuningArguments), argv, description=__doc__
        )
        logging.basicConfig(level=logging.INFO if arguments.should_log else logging.WARNING, format="%(message)s")
        arguments.scale_learning_rate()
        if arguments.should_log:
            print(f"Learning rate {arguments.learning_rate:.3g} for {arguments.global_batch_size} pairs a step.")
        require_writable(arguments.output_dir)
        if learning.sensors != "both":
            arguments.ddp_find_unused_parameters = True  # the fusion sees one sensor
        with in_turn():
            splits = open_splits(data, Path(str(arguments.output_dir)).parent / "shards")
        task = FineTuningTask.of_pairs(splits["train"].info, learning.task, learning.target)
        for pairs in splits.values():
            check_labels(pairs, task)
        arguments.choose_best_by(task.best_metric, "validation" in splits)
        if "validation" not in splits:
            print("There is no validation split: the last checkpoint is kept, not the best.")
        plan = Plan(data, model, learning, task, splits)
        if plan.measured_on is None:
            print("There is neither a test nor a validation split: nothing is measured.")
        if learning.num_pictures < 0:
            raise ValueError(f"`num_pictures` must not be negative, not {learning.num_pictures}.")
    if arguments.seeds > 1:
        run_seeds(plan, arguments)
    else:
        run(plan, arguments)


if __name__ == "__main__":
    main()
