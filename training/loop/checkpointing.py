"""transformers' Trainer, made to write its checkpoints whole or not at all, and to know when a run has finished."""

import shutil
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fusmae_hf.hub import checkpoints
from fusmae_hf.hub.push_model import push_model


class CheckpointingTrainer(Trainer):
    """Base of the Trainers here. See `checkpoints` for how a checkpoint is written, checked and deleted."""

    _aside: Path | None = None
    """Where a checkpoint is being written."""

    _finished: str | None = None
    """Why nothing is left to train; None while something is."""

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints; JSON values."""
        raise NotImplementedError

    def check_same_run(self, checkpoint: str) -> None:
        """Raise a ValueError if files of a checkpoint are missing or cut short, or if it is of another run."""
        if (problem := checkpoints.problem_of(Path(checkpoint), thorough=False)) is not None:
            raise ValueError(f"Cannot resume from {checkpoint}: {problem}. Name another checkpoint.")
        checkpoints.check_same_run(Path(checkpoint), self.identity())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers' Trainer does, after clearing away what killed processes left in the output folder."""
        if self.args.should_save:
            checkpoints.settle(Path(str(self.args.output_dir)))
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            folder = Path(str(self.args.output_dir))
            complete = (path for path in checkpoints.checkpoints_in(folder) if checkpoints.problem_of(path) is None)
            if (newest := next(complete, None)) is None:
                raise ValueError(f"There is no complete checkpoint in {folder} to resume from.")
            resume_from_checkpoint = str(newest)
            self.check_same_run(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    # --- writing -----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _checkpoint_of(self, step: int | None, trial: Any = None) -> Path:
        return Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside, put it in place when all processes have written their files, then delete old ones.

        Raises:
            CheckpointNotWrittenError: it could not be written. What was written is removed; older ones are untouched.
        """
        checkpoint = self._checkpoint_of(self.state.global_step, trial)
        with checkpoints.explained_failure(checkpoint):
            if self.args.should_save:
                checkpoints.begin(checkpoint)
            self.accelerator.wait_for_everyone()
            best = self.state.best_model_checkpoint
            self._aside = checkpoints.place_aside(checkpoint)
            try:
                super()._save_checkpoint(model, trial)
            finally:  # the Trainer looked for the best one where this one is written
                self._aside, self.state.best_model_checkpoint = None, best
            best_checkpoint = self._checkpoint_of(self.state.best_global_step, trial)
            if best_checkpoint == checkpoint or best_checkpoint.is_dir():
                self.state.best_model_checkpoint = str(best_checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._complete(checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            protected = [str(checkpoint), self.state.best_model_checkpoint]
            for surplus in checkpoints.surplus(
                checkpoint.parent, self.args.save_total_limit, [Path(path) for path in protected if path]
            ):
                checkpoints.discard(surplus)

    def _complete(self, checkpoint: Path) -> None:
        """Seal a checkpoint of which every process has written its files, and put it in place."""
        written = checkpoints.place_aside(checkpoint) / checkpoint.name
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        processes = self.args.world_size
        checkpoints.seal(
            written,
            step=self.state.global_step,
            processes=processes,
            global_batch_size=self._train_batch_size * processes * self.args.gradient_accumulation_steps,
            run=self.identity(),
        )
        checkpoints.put_in_place(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # not before it is in place, where an upload in the background finds it
            if self.is_world_process_zero():  # the Trainer copies weights and configuration without their code
                for code in Path(checkpoint_folder).glob("*.py"):
                    shutil.copy(code, str(self.args.output_dir))
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as transformers' Trainer does, without pushing: `push_to_hub` does, once there is a card."""
        super().save_model(output_dir, _internal_call=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: programs write a card from their records, the Trainer's is a draft with gaps."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push what is saved in the output folder, the same files as `fusmae push` does; see `push_model`.

        It is done when this returns, `blocking` or not. Call it after `save_model` and after the card is written.
        """
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return push_model(
            str(self.args.output_dir),
            str(self.hub_model_id),
            private=bool(self.args.hub_private_repo if private is None else private),
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message or "End of training",
        )

    # --- the end of a run --------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        best = self._checkpoint_of(self.state.best_global_step, trial)
        if best.is_dir():  # also where the folder of the run was moved since
            self.state.best_model_checkpoint = str(best)
        self._finished = self._why_finished() if resume_from_checkpoint is not None else None
        if self._finished and self.is_world_process_zero():
            print(f"Nothing is left to train: {self._finished}.")
        return trained

    def _why_finished(self) -> str | None:
        if self.state.global_step >= self.state.max_steps:
            return f"the checkpoint is of step {self.state.global_step} of {self.state.max_steps}"
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and (
                callback.early_stopping_patience_counter >= callback.early_stopping_patience
            ):
                return f"its run was stopped early, at step {self.state.global_step}"
        return None

    def _run_epoch(self, *args, **kwargs) -> None:
        # The Trainer looks after each step whether it was the last: of a finished run it would do one more.
        if self._finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs) -> Any:
        # With `save_total_limit` 1 the Trainer would now delete the last checkpoint, unless it is the best one, and a
        # run that is resumed after its end would train again from there.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
