"""Fus-MAE as a backbone of TerraTorch, in its own models and tasks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEBackbone, FusMAEConfig, FusMAEImageProcessor
from tests.readers.sen12ms_fixtures import write_tif

pytest.importorskip("terratorch", reason="TerraTorch is not installed", exc_type=ImportError)

import terratorch.tasks as tasks
from terratorch.cli_tools import build_lightning_cli
from terratorch.registry import BACKBONE_REGISTRY

import fusmae_hf.frameworks.terratorch  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
OWN = {
    "optical_mean": [2000.0] * 12,
    "optical_std": [500.0] * 12,
    "sar_mean": [-11.0, -18.0],
    "sar_std": [4.0, 5.0],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of two layers, with statistics that nobody else has."""
    folder = tmp_path_factory.mktemp("checkpoint")
    FusMAEBackbone(FusMAEConfig.from_preset("tiny", num_hidden_layers=2)).save_pretrained(folder)
    FusMAEImageProcessor(**OWN).save_pretrained(folder)
    return folder


def raw(size=32, batch=2):
    sar = torch.tensor([-11.0, -18.0])[:, None, None] + torch.randn(batch, 2, size, size)
    return {"S1GRD": sar, "S2L2A": torch.rand(batch, 12, size, size) * 3000 + 1}


MODALITIES = {"both": ["S1GRD", "S2L2A"], "sar": ["S1GRD"], "optical": ["S2L2A"]}


def chosen(images, names):
    return {name: images[name] for name in names} if len(names) > 1 else images[names[0]]


@pytest.mark.parametrize("names", MODALITIES.values(), ids=MODALITIES)
def test_features_are_those_of_the_checkpoint_with_its_own_statistics(checkpoint, names):
    backbone = BACKBONE_REGISTRY.build(
        "fusmae_tiny", pretrained=True, checkpoint=str(checkpoint), modalities=names, out_indices=[0, -1]
    ).eval()
    images = raw()
    sensors = {{"S1GRD": "sar", "S2L2A": "optical"}[name]: images[name] for name in names}
    expected = FusMAEBackbone.from_pretrained(checkpoint, out_indices=[0, 2]).eval()
    with torch.no_grad():
        got = backbone(chosen(images, names))
        maps = expected(**FusMAEImageProcessor(**OWN)(**sensors)).feature_maps
    assert backbone.out_channels == [192, 192]
    torch.testing.assert_close(got, list(maps))


def test_bands_go_by_name_and_nan_is_missing_data(checkpoint):
    options = {"pretrained": True, "checkpoint": str(checkpoint)}
    images = raw()
    images["S2L2A"][0, :, :8, :8] = torch.nan
    turned = images | {"S1GRD": images["S1GRD"].flip(1)}
    with torch.no_grad():
        plain = BACKBONE_REGISTRY.build("fusmae_tiny", **options).eval()(images)
        named = BACKBONE_REGISTRY.build("fusmae_tiny", **options, bands={"S1GRD": ["VH", "VV"]}).eval()(turned)
    torch.testing.assert_close(named, plain)
    assert all(values.isfinite().all() for values in plain)


NECKS = [
    {"name": "SelectIndices", "indices": [0, 1, 1, 2]},
    {"name": "ReshapeTokensToImage", "remove_cls_token": False},
    {"name": "LearnedInterpolateToPyramidal"},
]
PIXELWISE = {"decoder": "UNetDecoder", "decoder_channels": [32, 16, 8, 4], "necks": NECKS}
TASKS = {
    "segmentation": (tasks.SemanticSegmentationTask, PIXELWISE | {"num_classes": 3}, {"mask": torch.ones(2, 36, 36)}),
    "regression": (tasks.PixelwiseRegressionTask, PIXELWISE, {"mask": torch.rand(2, 36, 36)}),
    "classification": (
        tasks.ClassificationTask,
        {"decoder": "IdentityDecoder", "necks": [{"name": "AggregateTokens"}], "num_classes": 3},
        {"label": torch.tensor([0, 2])},
    ),
}


@pytest.mark.parametrize("names", MODALITIES.values(), ids=MODALITIES)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_a_step_with_every_choice_of_sensors(checkpoint, task, names):
    task_class, model_args, target = TASKS[task]
    if "mask" in target and task == "segmentation":
        target = {"mask": target["mask"].long()}
    model_args = model_args | {
        "backbone": "fusmae_tiny",
        "backbone_pretrained": True,
        "backbone_checkpoint": str(checkpoint),
        "backbone_modalities": names,
    }
    module = task_class(model_factory="EncoderDecoderFactory", model_args=model_args, **OPTIONS[task])
    module.log = module.log_dict = lambda *_, **__: None
    loss = module.training_step({"image": chosen(raw(36), names)} | target, 0)  # 36 px: TerraTorch pads
    loss.backward()
    weights = dict(module.model.encoder.backbone.named_parameters())
    used = {"S1GRD": "sar_projection", "S2L2A": "optical_projection"}
    for name, projection in used.items():
        gradient = weights[f"fusmae.embeddings.{projection}.weight"].grad
        assert (gradient is not None and bool(gradient.any())) == (name in names)


OPTIONS = {"segmentation": {"loss": "ce", "ignore_index": -1}, "regression": {"loss": "mse"}, "classification": {}}


def write_scenes(root):
    """Three scenes as GeoTIFFs, a folder for each modality and one for the masks."""
    for number in range(3):
        images = {name: values[0].numpy() for name, values in raw(64, 1).items()}
        for name, values in (images | {"mask": np.arange(64 * 64, dtype=np.uint8).reshape(1, 64, 64) % 3}).items():
            write_tif(root / "scenes" / name / f"scene{number}.tif", values)


def test_the_yaml_of_the_page_trains_with_terratorchs_own_command(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "frameworks.md").read_text()
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    write_scenes(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom_modules").mkdir()
    (tmp_path / "custom_modules" / "__init__.py").write_text("import fusmae_hf.frameworks.terratorch\n")
    cli = build_lightning_cli(["fit", "--config", "config.yaml", "--custom_modules_path", "custom_modules"])
    encoder = cli.model.model.encoder
    assert encoder.backbone.device.type == "cpu"
    assert encoder.processor.optical_mean["B01"] == pytest.approx(340.8)
    assert cli.trainer.global_step == 2


def test_values_that_terratorch_normalised_are_warned_of():
    with pytest.warns(UserWarning, match="looks normalised already"):
        BACKBONE_REGISTRY.build("fusmae_tiny")({"S2L2A": torch.randn(1, 12, 32, 32)})


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"out_indices": [12]}, None, "out_indices"),
        ({"pretrained": True}, None, "needs `backbone_checkpoint`"),
        ({"modalities": ["S2L1C"]}, None, r"takes the modalities \['S1GRD', 'S2L2A'\], not \['S2L1C'\]"),
        ({}, {"DEM": torch.zeros(1, 1, 32, 32)}, r"\['DEM'\] were given, but the backbone takes"),
        ({}, torch.zeros(1, 2, 32, 32), "name the one that it is, in `backbone_modalities`"),
        ({}, {"S1GRD": torch.zeros(1, 3, 32, 32)}, "the array has 3 bands"),
    ],
)
def test_what_cannot_be_is_refused(options, images, message):
    with pytest.raises(ValueError, match=message):
        BACKBONE_REGISTRY.build("terratorch_fusmae_tiny", **options)(images)
