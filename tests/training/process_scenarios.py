"""What `test_processes.py` lets several processes do. One launch runs several scenarios, since starting takes longest.

    accelerate launch --config_file training/accelerate/cpu-ddp.yaml --module tests.training.process_scenarios \
        <folder for results> <scenario> ...

A scenario is a function of the folder that returns JSON values; those of process R are written to
`<scenario>-<R>.json`. The folder holds `shards`, and what earlier scenarios left.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training.arguments import PretrainingArguments
from fusmae_hf.training.loop.processes import in_turn
from fusmae_hf.training.run_finetune import main as run_finetune
from fusmae_hf.training.run_pretrain import FusMAETrainer
from fusmae_hf.training.sources import PlainPairs

from .conftest import SMALL

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "eval_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 5,
}
"""Two processes see 8 of the 30 pairs in each step, 3 steps an epoch."""


class RecordingTrainer(FusMAETrainer):
    """Notes which pairs this process trained on, batch by batch: `seen`, lists of step, epoch and ids."""

    def prepare_pairs(self, batch):
        if self.model.training:
            self.seen.append([self.state.global_step, int(batch["epoch"][0]), batch["id"]])
        return super().prepare_pairs(batch)


def make_trainer(folder: Path, output: str, *, streaming: bool = False, pairs=None, config=None, **changes):
    """A trainer of a fresh small model, always the same one."""
    arguments = PretrainingArguments(output_dir=str(folder / output), **SETTINGS | changes)
    torch.manual_seed(0)
    trainer = RecordingTrainer(
        model=FusMAEForPreTraining(FusMAEConfig(**SMALL | (config or {}))),
        processor=FusMAEImageProcessor(),
        train_dataset=pairs or load_pairs(folder / "shards", streaming=streaming),
        eval_dataset=load_pairs(folder / "shards", "validation"),
        augmentation=PairAugmentation(min_crop=0.5, band_jitter=0.1),
        args=arguments,
    )
    trainer.seen = []
    return trainer


def train(folder: Path, output: str, checkpoint: str | None = None, **options) -> dict[str, Any]:
    """Train, save into `output`, evaluate."""
    trainer = make_trainer(folder, output, **options)
    if checkpoint:
        with torch.no_grad():  # what the checkpoint holds must not come from the fresh model or its random numbers
            for parameter in trainer.model.parameters():
                parameter.zero_()
        torch.manual_seed(99 + trainer.args.process_index)
    trainer.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else None)
    trainer.save_model()
    return {
        "seen": trainer.seen,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in trainer.evaluate().items() if "loss" in key},
        "processes": trainer.args.world_size,
        "kind": str(trainer.accelerator.distributed_type),
        "sharded": isinstance(trainer.model, FSDPModule),
    }


def refused(run, error_type: type[BaseException] = ValueError) -> dict[str, Any]:
    """The message with which something is refused."""
    try:
        run()
    except error_type as error:
        return {"message": str(error)}
    return {"message": None}


# --- scenarios -----------------------------------------------------------------------------------------------------


def whole(folder):
    return train(folder, "whole")


def resumed(folder):
    return train(folder, "resumed", "whole/checkpoint-4")


def streamed_whole(folder):
    return train(folder, "streamed_whole", streaming=True, dataloader_num_workers=1)


def streamed_resumed(folder):
    return train(folder, "streamed_resumed", "streamed_whole/checkpoint-4", streaming=True, dataloader_num_workers=1)


def plain_whole(folder):
    return train(folder, "plain_whole", pairs=plain_pairs(folder / "shards"), dataloader_num_workers=1)


def plain_resumed(folder):
    pairs = plain_pairs(folder / "shards")
    return train(folder, "plain_resumed", "plain_whole/checkpoint-4", pairs=pairs, dataloader_num_workers=1)


def plain_too_few_files(folder):
    trainer = make_trainer(folder, "other", pairs=plain_pairs(folder / "shards"), dataloader_num_workers=2)
    return refused(trainer.train_sampler)


def plain_pairs(shards: Path, streamed: bool = True) -> PlainPairs:
    """What `--loading hf` trains on."""
    return PlainPairs(load_pairs(shards, streaming=True), streamed, None)


def resumed_from_one_process(folder):
    return train(folder, "resumed_from_one_process", "one/checkpoint-4")


def other_global_batch(folder):
    return refused(lambda: train(folder, "other", "whole/checkpoint-4", per_device_train_batch_size=2))


def other_settings(folder):
    seed = 5 + int(torch.distributed.get_rank())
    return refused(lambda: make_trainer(folder, "other", seed=seed))


def a_file_missing_for_one(folder):
    mine = folder / "shards"
    if torch.distributed.get_rank() == 1:
        mine = shutil.copytree(folder / "shards", folder / "shards-of-1", dirs_exist_ok=True)
        next(mine.glob("data/train-00001*")).unlink()
    pairs = load_pairs(mine, on_bad_files="skip")
    return refused(lambda: make_trainer(folder, "other", pairs=pairs))


def turns(folder):
    """What each finds when it is its turn."""
    with in_turn():
        found = sorted(path.name for path in folder.glob("made-by-*"))
        (folder / f"made-by-{torch.distributed.get_rank()}").touch()
    return {"found": found}


def modality_dropout(folder):
    return train(folder, "dropout", config={"modality_dropout": 0.25}, max_steps=2, save_strategy="no")


def contrastive(folder, batch_size=4):
    config = {"contrastive_loss_weight": 1.0, "contrastive_projection_size": 8}
    return train(folder, "contrastive", config=config, save_strategy="no", per_device_train_batch_size=batch_size)


def without_a_sensor(folder):
    """Every batch lacks the optical side."""
    messages = {}
    for searching in (False, True):
        trainer = make_trainer(
            folder, "sar", ddp_find_unused_parameters=searching, max_steps=3, save_strategy="no", logging_steps=2
        )
        trainer.sensors = "sar"
        messages[str(searching)] = refused(trainer.train, RuntimeError)["message"]
    return messages


def fine_tuned(folder):
    return _fine_tune(folder, "fine_tuned", 4)


def fine_tuned_on_sar(folder):
    return _fine_tune(folder, "fine_tuned_on_sar", 4, "--sensors", "sar")


def fine_tuning_sharded(folder):
    return refused(lambda: _fine_tune(folder, "sharded", 4), SystemExit)


def _fine_tune(folder, output, batch_size, *arguments):
    run_finetune(
        [
            *("--model", str(folder / "checkpoint"), "--data", str(folder / "labelled")),
            *("--task", "single_label_classification"),
            *("--output_dir", str(folder / output), "--num_train_epochs", "2", "--learning_rate", "1e-3"),
            *("--per_device_train_batch_size", str(batch_size), "--per_device_eval_batch_size", "4"),
            *("--report_to", "none", "--disable_tqdm", "1", "--bootstrap", "0", "--num_pictures", "0"),
            *arguments,
        ]
    )
    return {"ended": True}


def main(folder: Path, names: list[str]) -> None:
    """Run the scenarios in turn."""
    PretrainingArguments(output_dir=str(folder))  # joins the other processes
    torch.use_deterministic_algorithms(True)
    for name in names:
        result = globals()[name](folder)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (folder / f"{name}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
