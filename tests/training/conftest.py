"""Small shards and a small model to train on them."""

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import PretrainingArguments
from fusmae_hf.training.finetuning.arguments import FineTuningArguments
from fusmae_hf.training.finetuning.labels import quantity_scale, read_targets
from fusmae_hf.training.finetuning.trainer import FineTuningTrainer
from fusmae_hf.training.run_finetune import main
from fusmae_hf.training.run_pretrain import FusMAETrainer

from .labelled_pairs import INFO, write_labelled
from .started_programs import NotPossibleHere, mount

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(autouse=True)
def short_waits_for_workers(monkeypatch):
    """Collected as garbage, loaders with persistent workers wait for each of them, five seconds by default."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)


QUICK = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--report_to", "none", "--disable_tqdm", "1"]
"""Arguments of a run that is over at once."""


def write_shards(folder: Path) -> Path:
    """48 simulated pairs of 16x16 px in row groups of 2: 30 to train on, 9 to validate, 9 to test."""
    options = SimulationOptions(image_size=16, pairs_per_place=1)
    prepare(SimulatedPairs(48, options=options), folder, rows_per_shard=12, row_group_rows=2, progress=False)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_shards`."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def make_trainer(shards: Path) -> Callable[..., FusMAETrainer]:
    """Makes a trainer of a fresh small model, always the same one."""

    def make(
        output: Path,
        *,
        streaming: bool = False,
        train_dataset: PairDataset | None = None,
        held_out: PairDataset | dict[str, PairDataset] | None = None,
        augmentation: PairAugmentation | None = None,
        fields: dict | None = None,
        **arguments,
    ):
        torch.manual_seed(0)
        settings = {
            "output_dir": str(output),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
            "seed": 5,
        }
        return FusMAETrainer(
            model=FusMAEForPreTraining(FusMAEConfig(**SMALL | (fields or {}))),
            processor=FusMAEImageProcessor(),
            train_dataset=train_dataset or load_pairs(shards, "train", streaming=streaming),
            eval_dataset=held_out,
            augmentation=augmentation,
            args=PretrainingArguments(**settings | arguments),
        )

    return make


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system in memory, or changes its options; skips the test where that is not allowed."""
    folders = set()

    def mount_memory(name: str, options: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        kind = ["-o", f"remount,{options}"] if folder in folders else ["-t", "tmpfs", "-o", options]
        try:
            mount(folder, *kind)
        except NotPossibleHere as error:
            pytest.skip(str(error))
        folders.add(folder)
        return folder

    yield mount_memory
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Shards by task: 24 pairs to train on, 6 to validate, 6 to test. Written once."""
    return cache(lambda task: write_labelled(tmp_path_factory.mktemp(task), task))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretraining checkpoint for the bands of the labelled shards."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    bands = {"optical_bands": INFO.optical_bands, "sar_bands": INFO.sar_bands}
    FusMAEForPreTraining(FusMAEConfig(**SMALL, **bands)).save_pretrained(folder)
    FusMAEImageProcessor(**bands).save_pretrained(folder)
    return folder


@pytest.fixture
def make_tuner(labelled, checkpoint) -> Callable[..., FineTuningTrainer]:
    """Makes a trainer that fine-tunes the small checkpoint on one of the tasks, always the same one."""

    def make(
        output: Path,
        name: str = "single_label_classification",
        *,
        target: str | None = None,
        train_dataset=None,
        change=lambda model: model,
        fields: dict | None = None,
        sensors: str = "both",
        layer_decay: float = 1.0,
        augmentation: PairAugmentation | None = None,
        eval_dataset=None,
        **arguments,
    ):
        torch.manual_seed(0)
        train = train_dataset or load_pairs(labelled(name), "train")
        task = FineTuningTask.of_pairs(train.info, None if target else name, target)
        model = task.model_class.from_pretrained(checkpoint, **task.config_fields | (fields or {}))
        settings = {
            "output_dir": str(output),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 10,
            "learning_rate": 3e-3,
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "disable_tqdm": True,
            "logging_steps": 3,
            "seed": 5,
        }
        return FineTuningTrainer(
            model=change(model),
            processor=FusMAEImageProcessor.from_pretrained(checkpoint),
            task=task,
            train_dataset=train,
            eval_dataset=eval_dataset,
            targets=read_targets(train, target) if target else None,
            augmentation=augmentation,
            sensors=sensors,
            layer_decay=layer_decay,
            scale=quantity_scale(train, task) if task.is_regression else (0.0, 1.0),
            args=FineTuningArguments(**settings | arguments),
        )

    return make


@pytest.fixture
def finetune(tmp_path, checkpoint, labelled):
    """Runs the program on a task, by default from the small checkpoint into `run`."""

    def run(task, *arguments, data=None, model=checkpoint, output="run"):
        named = ["--data", str(data or labelled(task)), "--output_dir", str(tmp_path / output), *QUICK]
        start = ["--model", str(model)] if model else []
        main([*named, *start, *map(str, arguments)])
        return tmp_path / output

    return run
