import json

import pytest
import torch
from safetensors.torch import load_file

from fusmae_hf import FusMAEForPreTraining
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training.run_pretrain import main

from .conftest import QUICK, SMALL

CONTRASTIVE = {"contrastive_loss_weight": 0.1, "contrastive_projection_size": 8, "modality_dropout": 0.25}


def test_logs_hold_the_contrastive_loss_beside_the_others(tmp_path, make_trainer, shards):
    held_out = load_pairs(shards, "validation")
    trainer = make_trainer(tmp_path, fields=CONTRASTIVE, held_out=held_out, max_steps=4, logging_steps=2)
    trainer.train()
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        parts = entry["optical_loss"] + entry["sar_loss"] + 0.1 * entry["contrastive_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4)
    metrics = trainer.evaluate()
    parts = metrics["eval_optical_loss"] + metrics["eval_sar_loss"] + 0.1 * metrics["eval_contrastive_loss"]
    assert metrics["eval_loss"] == pytest.approx(parts, rel=1e-4)


def test_a_run_that_was_cut_ends_with_the_weights_of_an_uncut_one(tmp_path, make_trainer):
    settings = {"fields": CONTRASTIVE, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    whole.save_model()
    again = make_trainer(tmp_path / "again", **settings)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.zero_()
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again.save_model()
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert "contrast.sar.up_proj.weight" in expected
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_temperature_does_not_decay(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, fields=CONTRASTIVE)
    decaying = trainer.get_decay_parameter_names(trainer.model)
    assert "contrast.log_scale" not in decaying
    assert "contrast.sar.up_proj.weight" in decaying


@pytest.fixture
def pretrain(tmp_path, shards):
    def run(*arguments, output="run"):
        fields = json.dumps({**SMALL, "contrastive_projection_size": 8})
        data = ["--data", str(shards), "--output_dir", str(tmp_path / output), "--num_reconstructions", "0"]
        start = [] if "--model" in arguments else ["--preset", "tiny", "--config", fields]
        main([*data, *start, *QUICK, "--max_steps", "1", *arguments])
        return FusMAEForPreTraining.from_pretrained(tmp_path / output)

    return run


def test_the_objective_is_an_argument_for_fresh_models_and_for_checkpoints(tmp_path, pretrain):
    assert pretrain("--objective", "fusmae_contrastive").contrast is not None
    again = pretrain("--model", str(tmp_path / "run"), "--objective", "fusmae", output="again")
    assert again.contrast is None
    assert again.config.contrastive_loss_weight == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "mae"], "`objective` must be one of .*'fusmae_contrastive'.*not 'mae'"),
        (
            ["--objective", "fusmae_contrastive", "--per_device_train_batch_size", "1"],
            "tells the pairs of a batch from each other, but `per_device_train_batch_size` is 1",
        ),
    ],
)
def test_what_the_objective_cannot_do_is_said_before_training(pretrain, arguments, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        pretrain(*arguments)
