"""Going on from a checkpoint: from which, whether it is of the same run, and what the run before left to do."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from fusmae_hf.hub.checkpoint_loading import MANIFEST, read_manifest
from fusmae_hf.training.loop.checkpoints import newest_complete, problem_of, settle
from fusmae_hf.training.loop.nonfinite import FiniteSteps

ORDER = "order"
"""Under this name a run says what the order of its pairs depends on."""


def checkpoint_to_resume(arguments: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names; for `auto` the newest complete one of the output folder.

    Says which and why. What killed processes left in the output folder is cleared away. Each process must call this;
    the first one looks at the files, and all get its answer.

    Raises:
        ValueError: the checkpoint that was named is damaged or incomplete.
    """
    answer: list[str | ValueError | None] = [None]
    if arguments.process_index == 0:
        try:
            answer = [_checkpoint_to_resume(arguments.resume_from_checkpoint, Path(str(arguments.output_dir)))]
        except ValueError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return answer[0]


def _checkpoint_to_resume(wanted: str | None, folder: Path) -> str | None:
    settle(folder)
    if wanted in (None, "", "false", "False"):
        return None
    if wanted in ("auto", "true", "True"):
        chosen, why = newest_complete(folder, print), f"the newest complete checkpoint in {folder}"
        if chosen is None:
            print(f"No complete checkpoint in {folder}: starting from the beginning.")
            return None
    else:
        chosen, why = Path(wanted), "as was asked for"
        if (problem := problem_of(chosen)) is not None:
            raise ValueError(
                f"Cannot resume from {wanted}: {problem}. Name another checkpoint, or pass `--resume_from_checkpoint "
                "auto` to go on from the newest complete one of the output folder."
            )
    print(f"Resuming from {chosen}, {why}.")
    if not (chosen / MANIFEST).is_file():
        print(
            f"It has no {MANIFEST}, so it was taken because all files that a resume needs are there and load. Whether "
            "its run had the same data, seed, augmentation and order of pairs cannot be seen."
        )
    return str(chosen)


def check_same_run(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Raise a ValueError if files of a checkpoint are missing or cut short, or name the differences of another run.

    Args:
        checkpoint: one without manifest passes, since nothing is known of its run.
        run: see `seal`.
    """
    if (problem := problem_of(checkpoint, thorough=False)) is not None:
        raise ValueError(f"Cannot resume from {checkpoint}: {problem}. Name another checkpoint.")
    if not (checkpoint / MANIFEST).is_file():
        return
    before = read_manifest(checkpoint)["run"]
    then, now = _flat(before), _flat(json.loads(json.dumps(run)))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if others := [name for name in names if not name.startswith(f"{ORDER}.")]:
        found = "; ".join(f"`{name}` was {then.get(name)!r} and is {now.get(name)!r} now" for name in others)
        raise ValueError(
            f"{checkpoint} is of another run: {found}. Start the command that it was written with, or give another "
            "`--output_dir`. To train on from its weights in a new run, pass it as `--model`."
        )
    if names:
        had, has = (", ".join(f"{name} {value}" for name, value in each[ORDER].items()) for each in (before, run))
        streamed = len(before[ORDER]) > 1 or len(run[ORDER]) > 1
        raise ValueError(
            f"{checkpoint} cannot be resumed: the run that wrote it had {had}, this one has {has}, so it would see "
            "other pairs in another order. "
            + (
                "A stream keeps its order only with the same batch of a process and the same processes x workers: "
                "with half the processes take twice the `dataloader_num_workers` and `gradient_accumulation_steps`."
                if streamed
                else "The global batch is `per_device_train_batch_size` x processes x `gradient_accumulation_steps`: "
                "with fewer processes accumulate more."
            )
            + " To begin another run with these weights, pass the checkpoint as `--model` instead."
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{part}".removesuffix("."): of_part for part, of_part in parts.items()}
    return flat


class Resumption(TrainerCallback):
    """Takes up what the run before left when training begins, and makes up for the evaluation it was cut short in.

    Args:
        trainer: calls `go_on_from`.
        steps: counts steps that were skipped.
    """

    def __init__(self, trainer: Trainer, steps: FiniteSteps):
        self.trainer, self.steps = trainer, steps

    def go_on_from(self, checkpoint: str | None) -> None:
        """Name the checkpoint, whose manifest has `nonfinite_steps` and `evaluation_due` under `progress`."""
        manifest = {}
        if checkpoint is not None and Path(checkpoint, MANIFEST).is_file():
            manifest = read_manifest(Path(checkpoint))
        self.checkpoint, self.progress = checkpoint, manifest.get("progress", {})
        self.steps.skipped = self.progress.get("nonfinite_steps", 0)

    def on_train_begin(self, args, state, control, **kwargs):
        """Called once everybody else has begun."""
        trainer = self.trainer
        best = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
        if best.is_dir():  # also where the folder was moved since
            state.best_model_checkpoint = str(best)
        kept = cast(dict[str, Any], state.stateful_callbacks)  # transformers declares a list here
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # those that wrote an old checkpoint may not have had it
                kept.setdefault(type(callback).__name__, callback.state())
        if self.checkpoint is not None and (why := self._why_finished(state)) is not None:
            control.should_training_stop = True
            if state.is_world_process_zero:
                print(f"Nothing is left to train: {why}.")
        if self.progress.get("evaluation_due"):
            if state.is_world_process_zero:
                print(f"Evaluating first: the run was ended before the evaluation of step {state.global_step}.")
            trainer._load_rng_state(self.checkpoint)
            trainer._determine_best_metric(trainer._evaluate(None, None), None)
            trainer._save_checkpoint(trainer.model_wrapped, None)  # replaces the one that lacks the evaluation

    def _why_finished(self, state: Any) -> str | None:
        """Why nothing is left to train; None while something is."""
        if state.global_step >= state.max_steps:
            return f"the checkpoint is of step {state.global_step} of {state.max_steps}"
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and (
                callback.early_stopping_patience_counter >= callback.early_stopping_patience
            ):
                return f"its run was stopped early, at step {state.global_step}"
        return None
