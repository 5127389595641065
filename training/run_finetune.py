"""Fine-tune Fus-MAE on labelled pairs of Sentinel-1 and Sentinel-2 patches.

    accelerate launch training/run_finetune.py training/configs/finetune-classification.yaml \
        --model <checkpoint> --data <shards> --output_dir outputs/finetune

Without a configuration file, what is not named follows the recipe for the task: see `fusmae finetune --help`.

Ends with a checkpoint (weights, configuration, processor, remote code, model card), `metrics.json`, `metrics.md`,
`predictions.parquet`, pictures and `run.json` in the output folder; with `--seeds 3` in a folder for each seed, beside
`summary.json` and `summary.md`.
"""

from fusmae_hf.training.short_help import FINETUNE, answer_early

if __name__ == "__main__":
    answer_early(__doc__, FINETUNE)  # before the imports, which take seconds


import copy
import dataclasses
import gc
import logging
import sys
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, set_seed

from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.files.finished import settings_hash, write_record
from fusmae_hf.hub.cards import write_fine_tuned_card
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.arguments import PairArguments, named, parse_arguments, spell_out_attention
from fusmae_hf.training.finetuning.arguments import FineTuningArguments, FineTuningModelArguments, TaskArguments
from fusmae_hf.training.finetuning.labels import (
    PairSubset,
    balanced_weights,
    check_labels,
    class_counts,
    few_labels,
    quantity_scale,
    read_columns,
    read_targets,
)
from fusmae_hf.training.finetuning.metrics import SMALLER_IS_BETTER, choosable, score_intervals
from fusmae_hf.training.finetuning.models import add_lora, build_model, freeze_encoder, read_config, rescale_output
from fusmae_hf.training.finetuning.recipes import recipe_for
from fusmae_hf.training.finetuning.results import (
    class_table,
    draw_pictures,
    evaluate_sensors,
    finished_run,
    score_table,
    write_maps,
    write_predictions,
    write_summary,
)
from fusmae_hf.training.finetuning.trainer import FineTuningTrainer
from fusmae_hf.training.loop.checkpoints import CheckpointNotWrittenError
from fusmae_hf.training.loop.nonfinite import NonFiniteError
from fusmae_hf.training.loop.processes import (
    check_same_everywhere,
    fork_workers_from_a_server,
    in_turn,
    lost_processes_explained,
)
from fusmae_hf.training.loop.records import (
    explained,
    require_writable,
    run_record,
    tensorboard_in,
)
from fusmae_hf.training.loop.resuming import checkpoint_to_resume
from fusmae_hf.training.loop.signals import ends_by_signal, interrupted_with_a_sentence
from fusmae_hf.training.sources import augmentation_of, content_of, open_splits, what_is_read

# What changes the outcome of a run, among the arguments that it shares with every Trainer.
_FINGERPRINTED = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "weight_decay", "warmup_steps", "lr_scheduler_type", "label_smoothing_factor", "layer_decay", "bf16", "fp16",
    "max_grad_norm", "adam_beta1", "adam_beta2", "early_stopping_patience", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "weights_dtype",
)  # fmt: skip


@dataclasses.dataclass
class Plan:
    """What all seeds of a command have in common.

    Attributes:
        measured_on: the split for the final figures: `test`, or `validation` where there is none.
    """

    data: PairArguments
    model: FineTuningModelArguments
    learning: TaskArguments
    task: FineTuningTask
    splits: dict[str, PairDataset]
    measured_on: str | None

    def fingerprint(self, arguments: FineTuningArguments) -> str:
        """Of everything but the seed that decides what a run gives."""
        parts = [dataclasses.asdict(part) for part in (self.data, self.model, self.learning)]
        parts[0] |= {"data": [content_of(pairs) for pairs in self.splits.values()]}
        parts.append({name: str(getattr(arguments, name)) for name in _FINGERPRINTED})
        return settings_hash(parts)


ARGUMENTS = (PairArguments, FineTuningModelArguments, TaskArguments, FineTuningArguments)


def follow_recipe(argv: list[str], given: tuple[Any, ...], splits: dict[str, PairDataset]) -> tuple[Any, ...]:
    """The arguments of a command line, with those that it does not name from the recipe for its task and data."""
    data, model, learning, arguments = given
    train = splits["train"]
    task = FineTuningTask.of_pairs(train.info, learning.task, learning.target)
    labels = max(1, round(len(train) * learning.label_fraction))
    pair = train[0]
    size = tuple(pair["sar"].shape[-2:])
    values, said = recipe_for(
        task,
        labels,
        size,
        model,
        patch_size=read_config(model.model).patch_size if model.model else None,
        preset=model.preset if "preset" in named(argv) else None,
        windows=not task.dense or tuple(pair["label_map"].shape) == size,
    )
    if learning.sensors != "both":
        values["modality_dropout"] = 0.0
    if arguments.should_log:
        print(said)
    measured = data.measured
    settled = parse_arguments(ARGUMENTS, argv, description=__doc__, defaults=values)
    settled[0].measured = measured
    settled[1].config = values.get("config", settled[1].config)  # with the fields that the user named
    return settled


def make_plan(
    data: PairArguments,
    model: FineTuningModelArguments,
    learning: TaskArguments,
    arguments: FineTuningArguments,
    splits: dict[str, PairDataset],
) -> Plan:
    """Settle what is learnt and measured."""
    task = FineTuningTask.of_pairs(splits["train"].info, learning.task, learning.target)
    for pairs in splits.values():
        check_labels(pairs, task)
    arguments.choose_best_by(choosable(task) if "validation" in splits else (), SMALLER_IS_BETTER)
    if "validation" not in splits:
        arguments.early_stopping_patience = 0
        print("There is no validation split: the last checkpoint is kept, not the best.")
    measured_on = next((split for split in ("test", "validation") if split in splits), None)
    if measured_on is None:
        print("There is neither a test nor a validation split: nothing is measured.")
    return Plan(data, model, learning, task, splits, measured_on)


def class_weights_of(plan: Plan, train: PairDataset | PairSubset) -> list[float] | None:
    """Weights of the classes in the loss, where some are asked for; says which classes have no label.

    Raises:
        ValueError: class weights or the focal loss are asked for, but there are no classes.
    """
    task, balanced = plan.task, plan.model.class_weights == "balanced"
    if task.is_regression:
        if balanced or plan.model.focal_gamma:
            raise ValueError("Class weights and the focal loss are for classes, not for regression: leave them out.")
        return None
    if not balanced and task.dense:
        return None  # every map would be read for the message alone
    counts, total = class_counts(train, task)
    if balanced:
        return balanced_weights(counts, total, task)
    empty = [name for name, count in zip(task.outputs, counts, strict=True) if not count]
    if empty:
        print(f"No training pair has the classes {empty}: the model cannot learn them.")
    return None


def make_trainer(plan: Plan, arguments: FineTuningArguments) -> FineTuningTrainer:
    """Model, labels and Trainer of one seed."""
    task, learning = plan.task, plan.learning
    label_seed = arguments.seed if learning.label_seed is None else learning.label_seed
    with in_turn():
        train = few_labels(plan.splits["train"], task, learning.label_fraction, label_seed, str(arguments.output_dir))
    size = tuple(train[0]["sar"].shape[-2:])
    weights = class_weights_of(plan, train)
    model, processor, has_head = build_model(plan.model, plan.data, task, train.info, size, weights)
    if arguments.bf16 and plan.model.attn_implementation is None:
        spell_out_attention(model, arguments.device.type, size, learning.sensors_to_train)
    scale = quantity_scale(train, task) if task.is_regression else (0.0, 1.0)
    if plan.model.freeze == "encoder":
        freeze_encoder(model)
    if plan.model.lora_rank:
        model = add_lora(model, plan.model.lora_rank, plan.model.lora_alpha)
    targets: dict[str, float] = {}
    if task.target is not None:
        for pairs in plan.splits.values():
            targets |= read_targets(pairs, task.target)
    patience = arguments.early_stopping_patience
    trainer = FineTuningTrainer(
        model=model,
        processor=processor,
        task=task,
        train_dataset=train,
        eval_dataset=plan.splits.get("validation"),
        targets=targets,
        augmentation=augmentation_of(plan.data, arguments.seed, size, model.config.patch_size),
        sensors=learning.sensors_to_train,
        layer_decay=arguments.layer_decay,
        scale=scale,
        threshold=learning.threshold,
        modality_dropout=learning.modality_dropout,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        args=arguments,
    )
    if has_head and task.is_regression:  # it gives the quantity, but is trained on normalised labels
        rescale_output(model, -scale[0] / scale[1], 1 / scale[1])
    return trainer


def run(plan: Plan, arguments: FineTuningArguments) -> dict[str, dict[str, Any]]:
    """Train and evaluate with one seed, and write everything; metrics by sensors."""
    folder, split = Path(str(arguments.output_dir)), plan.measured_on
    set_seed(arguments.seed)
    with explained():
        trainer = make_trainer(plan, arguments)
        trainer.train_sampler()  # too few pairs for a batch are found here, before anything is started
        trainer.try_batch()
        checkpoint = checkpoint_to_resume(arguments)
        trainer.check_checkpoint(checkpoint)
        if split:
            check_same_everywhere(what_is_read(plan.splits[split], "the final figures"))
        set_seed(arguments.seed)
    with tensorboard_in(folder), explained(CheckpointNotWrittenError, NonFiniteError):
        trainer.train(resume_from_checkpoint=checkpoint)
    results = evaluate_sensors(trainer, plan.splits[split], plan.learning.sensors_to_evaluate) if split else {}
    replaced = trainer.replaced_everywhere()  # here, where no process keeps the others waiting
    if split and trainer.is_world_process_zero():
        ids = read_columns(plan.splits[split], ["id"])["id"]
        write_predictions(folder / "predictions.parquet", plan.task, ids, results)
        draw_pictures(folder, trainer, plan.splits[split], results, plan.learning.num_pictures)
        if plan.learning.save_maps and plan.task.name == "semantic_segmentation":
            write_maps(trainer, plan.splits[split], folder / "maps")
    save_model(trainer, plan, folder)
    if trainer.is_world_process_zero():
        report(plan, arguments, trainer, folder, results, replaced)
        if arguments.push_to_hub:
            print(trainer.push_to_hub())
    return {name: result["metrics"] for name, result in results.items()}


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


def report(
    plan: Plan,
    arguments: FineTuningArguments,
    trainer: FineTuningTrainer,
    folder: Path,
    results: dict[str, dict[str, Any]],
    replaced: Any,
) -> None:
    """`run.json`, the model card and the tables; `metrics.json`, by which a run counts as finished, last."""
    task, split, model = plan.task, plan.measured_on, plan.model
    learning = f"The whole model learnt, each layer at {trainer.layer_decay:g} times the rate of the next"
    if model.lora_rank:
        learning = f"Head and adapters of rank {model.lora_rank} in the attention learnt"
    elif model.freeze == "encoder":
        learning = "The head alone learnt, on a frozen encoder"
    held_out = {name: pairs for name, pairs in plan.splits.items() if name != "train"}
    record = run_record("run_finetune.py", trainer, held_out) | {
        "task": task.name,
        "dense": task.dense,
        "classes": list(task.outputs),
        "preset": Path(model.model).name if model.model else model.preset,
        "from_scratch": model.from_scratch,
        "base_model": model.model if model.model and not Path(model.model).is_dir() else None,
        "adapter": bool(model.lora_rank) and model.lora_save == "adapter",
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
    write_record(folder / "run.json", record, indent=2)
    metrics = {name: result["metrics"] for name, result in results.items()}
    intervals = {}
    for name, result in results.items() if arguments.bootstrap else ():
        given, threshold = (result["predictions"], result["labels"]), plan.learning.threshold
        intervals[name] = score_intervals(task, *given, arguments.bootstrap, threshold=threshold)
    table = score_table(task, metrics, intervals) if metrics else "Nothing was held out."
    by_class = class_table(next(iter(metrics.values()))) if metrics else ""
    write_fine_tuned_card(
        folder,
        config=trainer.accelerator.unwrap_model(trainer.model).config,
        processor=trainer.processor,
        info=trainer.info,
        record=record,
        metrics=metrics,
        results=table,
        by_class=by_class,
    )
    (folder / "metrics.md").write_text(f"{table}\n\n{by_class}\n")
    finished = {
        "task": task.name,
        "split": split,
        "seed": arguments.seed,
        "settings": plan.fingerprint(arguments),
        "bootstrap": arguments.bootstrap,
        "sensors": metrics,
        "intervals": intervals,
    }
    write_record(folder / "metrics.json", finished, indent=2)
    measured = f"{record['measured']:,} pairs of the split {split}, one checkpoint:\n\n{table}\n\n{by_class}"
    print(f"\n{measured if split else table}\n")
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
        argv = list(sys.argv[1:] if argv is None else argv)
        given = parse_arguments(ARGUMENTS, argv, description=__doc__)
        require_writable(given[3].output_dir)
        with in_turn():
            splits = open_splits(given[0], Path(str(given[3].output_dir)).parent / "shards")
        if not (argv and argv[0].endswith((".yaml", ".yml"))):
            given = follow_recipe(argv, given, splits)
        data, model, learning, arguments = given
        logging.basicConfig(level=logging.INFO if arguments.should_log else logging.WARNING, format="%(message)s")
        arguments.scale_learning_rate()
        if arguments.should_log:
            print(f"Learning rate {arguments.learning_rate:.3g} for {arguments.global_batch_size} pairs a step.")
        fork_workers_from_a_server(arguments, "fusmae_hf.training.run_finetune")
        if learning.sensors != "both" or learning.modality_dropout:
            arguments.ddp_find_unused_parameters = True  # the fusion sees one sensor
        plan = make_plan(data, model, learning, arguments, splits)
    if arguments.seeds > 1:
        run_seeds(plan, arguments)
    else:
        run(plan, arguments)


if __name__ == "__main__":
    with interrupted_with_a_sentence():
        main()
