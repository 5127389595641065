"""Small shards and a small model to train on them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.loading import PairDataset, load_pairs
from fusmae_hf.data.preparation import prepare
from fusmae_hf.data.simulation import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import PretrainingArguments
from fusmae_hf.training.trainer import FusMAETrainer

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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 simulated pairs of 16x16 px in row groups of 2: 30 to train on, 9 to validate, 9 to test."""
    folder = tmp_path_factory.mktemp("shards")
    options = SimulationOptions(image_size=16, pairs_per_place=1)
    prepare(SimulatedPairs(48, options=options), folder, rows_per_shard=12, row_group_rows=2, progress=False)
    return folder


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
            model=FusMAEForPreTraining(FusMAEConfig(**SMALL)),
            processor=FusMAEImageProcessor(),
            train_dataset=train_dataset or load_pairs(shards, "train", streaming=streaming),
            eval_dataset=held_out,
            augmentation=augmentation,
            args=PretrainingArguments(**settings | arguments),
        )

    return make
