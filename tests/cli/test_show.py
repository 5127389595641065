import json
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, SimulatedPairs
from fusmae_hf.cli.main import main
from fusmae_hf.data.pairs import Pair, PairsInfo
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


@pytest.mark.parametrize("side", [7, 16, 50])
@pytest.mark.parametrize("what", ["reconstruction", "attention", "embedding"])
def test_a_checkpoint_whose_patches_do_not_fill_a_pair_draws_it(what, side, tmp_path):
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, patch_size=side, image_size=2 * side)
    FusMAEForPreTraining(config).save_pretrained(tmp_path / "model")
    FusMAEImageProcessor().save_pretrained(tmp_path / "model")
    output = tmp_path / "picture.png"
    command = ["show", "simulated", "--what", what, "--checkpoint", str(tmp_path / "model"), "--output", str(output)]
    assert main(command) == 0  # of pairs of 120 px
    assert Image.open(output).width > 400


@pytest.mark.parametrize("absent", ["sar", "optical"])
@pytest.mark.parametrize("what", ["rgb", "sar", "reconstruction", "embedding", "attention"])
def test_a_pair_that_lacks_a_sensor_is_drawn_of_the_other(what, absent, run_folder, tmp_path, capsys):
    pairs = SimulatedPairs(1)
    nothing = {"sar": np.full((2, 120, 120), np.nan, "float32"), "optical": np.zeros((12, 120, 120), "uint16")}
    pair = replace(pairs.read(0), **{absent: nothing[absent]})
    shards = write_shards(tmp_path / "shards", pairs.info, train=[pair])
    command = ["show", str(shards), "--what", what, "--output", str(tmp_path / "picture.png")]
    command += ["--checkpoint", str(run_folder)] if what not in ("rgb", "sar") else []
    if what == "attention":
        assert main(command) == 2
        assert "give another --index" in " ".join(capsys.readouterr().err.split())
    else:
        assert main(command) == 0
        assert Image.open(tmp_path / "picture.png").width > 300


def test_a_pair_of_shards_is_drawn_by_its_number(tmp_path, capsys):
    shards, output = write_shards(tmp_path / "shards"), tmp_path / "sar.png"
    command = ["show", str(shards), "--what", "sar", "--output", str(output)]
    assert main([*command, "--split", "test", "--index", "1"]) == 0
    assert "pair-013" in capsys.readouterr().out
    assert main([*command, "--index", "99"]) == 2
    assert "--index is 0 to 11" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optical", "units", "said"),
    [
        (("B02", "B03", "B04"), "dn", ("rgb of", "true colour", "digital numbers")),
        (
            ("B08", "B11", "B12"),
            "reflectance",
            ("false-colour of", "B08, B11, B12 as red, green, blue", "reflectance"),
        ),
        (("swir", "nir"), "raw", ("false-colour of", "swir, nir, nir as red, green, blue", ")")),
        (("pan",), "raw", ("false-colour of", "pan, pan, pan as red, green, blue", ")")),
    ],
)
def test_a_kind_of_picture_is_chosen_that_the_bands_allow(optical, units, said, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    info = PairsInfo("own", "made up", "CC0", ("VV", "VH"), optical, sar_units="raw", optical_units=units)
    top = {"dn": 3000, "reflectance": 0.3, "raw": 2}[units]
    values = np.random.default_rng(0).uniform(top / 10, top, (len(optical), 24, 24)).astype(np.float32)
    pair = Pair("a", values[:1].repeat(2, axis=0), values)
    monkeypatch.setattr("fusmae_hf.cli.show._read_pair", lambda *_: (pair, info))
    assert main(["show", "somewhere"]) == 0
    kind, composite, named = said
    assert kind in capsys.readouterr().out
    title = drawn[0].axes[0].get_title()
    assert composite in title
    assert title.endswith(named if units == "raw" else f"; {named})")
    assert main(["show", "somewhere", "--what", "sar"]) == 0
    assert [axes.get_ylabel() for axes in drawn[1].axes if axes.get_label() == "<colorbar>"] == ["", ""]


def test_a_picture_of_a_model_needs_a_checkpoint(capsys):
    assert main(["show", "simulated", "--what", "attention"]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_a_mistyped_checkpoint_is_called_a_folder_that_is_not_there(tmp_path, capsys):
    missing = tmp_path / "nope"
    assert main(["show", "simulated", "--what", "embedding", "--checkpoint", str(missing)]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"There is no folder {missing}, so it was looked up on the Hub" in printed
