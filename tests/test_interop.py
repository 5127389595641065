"""The model with other libraries: TorchGeo's samples, peft, torch.export, ONNX, accelerate."""

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch

from fusmae_hf import FusMAEConfig, FusMAEForImageClassification, FusMAEImageProcessor, FusMAEModel
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C

SENSORS = [("pixel_values", "pixel_values_sar"), ("pixel_values",), ("pixel_values_sar",)]


@pytest.fixture
def config():
    torch.manual_seed(0)
    return FusMAEConfig.from_preset("tiny", num_hidden_layers=2, decoder_num_hidden_layers=1, num_labels=3)


def inputs(batch: int, sensors: tuple[str, ...] = SENSORS[0]) -> dict[str, torch.Tensor]:
    bands = {"pixel_values": 12, "pixel_values_sar": 2}
    return {name: torch.randn(batch, bands[name], 32, 32) for name in sensors}


def dynamic_batch(example: dict[str, torch.Tensor]) -> dict:
    return {name: {0: torch.export.Dim.DYNAMIC} for name in example}


# --- TorchGeo ------------------------------------------------------------------------------------------------------


def sar_and_optical() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 2, 32, 32) * 20 - 25, torch.rand(2, 13, 32, 32) * 4000 + 1


def test_a_sample_with_a_key_for_each_sensor_goes_into_the_processor_with_vh_first():
    sar, optical = sar_and_optical()
    sample = {"image_s1": sar[0].flip(0), "image_s2": optical[0, :12]}
    got = FusMAEImageProcessor()(sar=sample["image_s1"], optical=sample["image_s2"], sar_bands=["VH", "VV"])
    expected = FusMAEImageProcessor()(sar=sar[0], optical=optical[0, :12])
    torch.testing.assert_close(dict(got), dict(expected))


def test_a_batch_of_stacked_channels_is_split_and_the_cirrus_band_left_out():
    sar, optical = sar_and_optical()
    batch = {"image": torch.cat([sar, optical], dim=1)}
    got = FusMAEImageProcessor()(
        sar=batch["image"][:, :2], optical=batch["image"][:, 2:], optical_bands=OPTICAL_BANDS_L1C
    )
    kept = [number for number, band in enumerate(OPTICAL_BANDS_L1C) if band != "B10"]
    torch.testing.assert_close(dict(got), dict(FusMAEImageProcessor()(sar=sar, optical=optical[:, kept])))


# --- peft ----------------------------------------------------------------------------------------------------------


def test_low_rank_adapters_train_and_come_back_and_merge(config, tmp_path):
    peft = pytest.importorskip("peft")
    FusMAEForImageClassification(config).save_pretrained(tmp_path / "plain")
    adapters = peft.LoraConfig(
        r=2,
        target_modules=r"fusmae\..*\.(q_proj|k_proj|v_proj|o_proj)",
        modules_to_save=["pooled_layernorm", "classifier"],
    )
    load = FusMAEForImageClassification.from_pretrained
    model = peft.get_peft_model(load(tmp_path / "plain"), adapters)
    batch, labels = inputs(3), torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        reloaded = peft.PeftModel.from_pretrained(load(tmp_path / "plain"), tmp_path / "adapter").eval()
        torch.testing.assert_close(reloaded(**batch).logits, expected)
        reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged")(**batch).logits, expected, rtol=1e-4, atol=1e-4)


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensors", SENSORS, ids="+".join)
def test_an_exported_program_takes_other_batches(config, sensors, tmp_path):
    model, example, other = FusMAEModel(config).eval(), inputs(2, sensors), inputs(5, sensors)
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=dynamic_batch(example))
        torch.export.save(program, tmp_path / "fusmae.pt2")
        got = torch.export.load(tmp_path / "fusmae.pt2").module()(**other)
        torch.testing.assert_close(dict(got), dict(model(**other)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [FusMAEModel, FusMAEForImageClassification])
@pytest.mark.parametrize("sensors", SENSORS, ids="+".join)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_onnx_model_gives_what_the_model_gives(config, model_class, sensors, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, example, other = model_class(config).eval(), inputs(2, sensors), inputs(5, sensors)
    with torch.no_grad():
        expected = model(**other)
    exported = torch.onnx.export(
        model,
        (),
        kwargs=example,
        dynamic_shapes=dynamic_batch(example),
        output_names=list(expected),
        dynamo=True,
        verbose=False,
    )
    exported.save(tmp_path / "fusmae.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fusmae.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(sensors)
    got = session.run(list(expected), {name: values.numpy() for name, values in other.items()})
    for values, name in zip(got, expected, strict=True):
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


# --- accelerate ----------------------------------------------------------------------------------------------------

DEVICE_MAP = {
    "fusmae.embeddings": "cpu",
    "fusmae.fusion": "cpu",
    "fusmae.layers": "disk",
    "fusmae.layernorm": "cpu",
    "pooled_layernorm": "cpu",
    "classifier": "cpu",
}


@pytest.mark.parametrize("way", ["accelerate", "transformers"])
def test_layers_offloaded_to_the_disk_give_the_same(config, way, tmp_path):
    model, batch = FusMAEForImageClassification(config).eval(), inputs(2)
    model.save_pretrained(tmp_path / "plain")
    offloading = {"device_map": DEVICE_MAP, "offload_folder": str(tmp_path / "offload")}
    if way == "accelerate":
        with init_empty_weights():
            empty = FusMAEForImageClassification(config)
        loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / "plain"), **offloading).eval()
    else:
        loaded = FusMAEForImageClassification.from_pretrained(tmp_path / "plain", **offloading)
    assert loaded.fusmae.layers[0].attention.q_proj.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
