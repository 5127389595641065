"""Pairs in loaders, subsets and samplers that know nothing of them."""

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset, random_split
from transformers import Trainer, TrainingArguments

from fusmae_hf import FusMAEConfig, FusMAEForImageClassification, FusMAEImageProcessor, load_pairs
from fusmae_hf.data.finetuning_collation import FineTuningCollator
from tests.small_shards import INFO, SIZE, make_pair, write_shards


@pytest.fixture
def pairs(tmp_path):
    written = [make_pair(number, labels=["water", "town"][: 1 + number % 2]) for number in range(12)]
    written[3].sar = None
    return load_pairs(write_shards(tmp_path, train=written), "train")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("choose", [lambda p: p, lambda p: Subset(p, [0, 3, 5]), lambda p: random_split(p, [4, 8])[0]])
def test_torchs_own_collation_makes_batches(pairs, workers, choose):
    chosen, seen = choose(pairs), []
    for batch in DataLoader(chosen, batch_size=2, num_workers=workers):
        seen += batch["id"]
        assert batch["optical"].shape == (len(batch["id"]), len(INFO.optical_bands), SIZE, SIZE)
        assert batch["sar_available"].tolist() == [id != "pair-003" for id in batch["id"]]
        assert batch["labels"] == [["water", "town"][: 1 + int(id[-3:]) % 2] for id in batch["id"]]
    assert len(seen) == len(set(seen)) == len(chosen)


def test_a_batch_is_a_sequence_of_its_pairs(pairs):
    batch = pairs.__getitems__([4, 2, 7])
    assert [item["id"] for item in batch] == batch["id"] == ["pair-004", "pair-002", "pair-007"]
    assert torch.equal(batch[1]["optical"], pairs[2]["optical"])
    assert batch[-1]["row"] == 7
    assert [item["id"] for item in batch[:2]] == ["pair-004", "pair-002"]


def test_transformers_trainer_trains_with_its_own_sampler(pairs, tmp_path):
    processor = FusMAEImageProcessor(sar_bands=INFO.sar_bands, optical_bands=INFO.optical_bands)
    model = FusMAEForImageClassification(
        FusMAEConfig(
            sar_bands=INFO.sar_bands, optical_bands=INFO.optical_bands, image_size=SIZE, patch_size=4, hidden_size=32,
            num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3,
            problem_type="multi_label_classification",
        )
    )  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False,
            report_to="none", use_cpu=True, save_strategy="no",
        ),
        train_dataset=pairs,
        data_collator=FineTuningCollator(processor, INFO, "multi_label_classification"),
    )  # fmt: skip
    assert isinstance(trainer._get_train_sampler(), RandomSampler)
    assert trainer.train().global_step == 2
