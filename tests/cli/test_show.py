import json

import pytest
from PIL import Image

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.cli.main import main
from tests.small_shards import write_shards


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    FusMAEForPreTraining(
        FusMAEConfig.from_preset("tiny", num_hidden_layers=1, decoder_num_hidden_layers=1)
    ).save_pretrained(folder)
    FusMAEImageProcessor().save_pretrained(folder)
    history = [
        {"step": step, "loss": 2.0 / step, "optical_loss": 1.0 / step, "sar_loss": 1.0 / step} for step in (1, 2)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


@pytest.mark.parametrize("what", ["loss", "reconstruction", "attention", "embedding"])
def test_a_run_folder_is_drawn(what, run_folder, tmp_path, capsys):
    output = tmp_path / "picture.png"
    assert main(["show", str(run_folder), "--what", what, "--output", str(output)]) == 0
    assert Image.open(output).width > 400
    assert ("losses of" if what == "loss" else "pair 0 of simulated") in capsys.readouterr().out


def test_a_pair_of_shards_is_drawn_by_its_number(tmp_path, capsys):
    shards, output = write_shards(tmp_path / "shards"), tmp_path / "sar.png"
    command = ["show", str(shards), "--what", "sar", "--output", str(output)]
    assert main([*command, "--split", "test", "--index", "1"]) == 0
    assert "pair-013" in capsys.readouterr().out
    assert main([*command, "--index", "99"]) == 2
    assert "--index is 0 to 11" in capsys.readouterr().err


def test_a_picture_of_a_model_needs_a_checkpoint(capsys):
    assert main(["show", "simulated", "--what", "attention"]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_a_mistyped_checkpoint_is_called_a_folder_that_is_not_there(tmp_path, capsys):
    missing = tmp_path / "nope"
    assert main(["show", "simulated", "--what", "embedding", "--checkpoint", str(missing)]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"There is no folder {missing}, so it was looked up on the Hub" in printed
