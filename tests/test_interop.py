"""The model with other libraries: TorchGeo's samples, peft, torch.export, ONNX, accelerate."""

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch

from fusmae_hf import (
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEImageProcessor,
    FusMAEModel,
)
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


TARGETS = {None: "all-linear", "FEATURE_EXTRACTION": "all-linear", "SEQ_CLS": "all-linear", "TOKEN_CLS": ["q_proj"]}
"""What has adapters, by task type: peft itself cannot give TOKEN_CLS all linear layers, of any model."""


@pytest.mark.parametrize("task_type", TARGETS)
@pytest.mark.parametrize("sensors", SENSORS, ids="+".join)
def test_adapters_of_any_task_type_train_a_head(config, sensors, task_type):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, task_type=task_type, target_modules=TARGETS[task_type])
    model = peft.get_peft_model(FusMAEForImageClassification(config), adapters)
    outputs = model(**inputs(3, sensors), labels=torch.tensor([0, 1, 2]))
    outputs.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("model_class", [FusMAEModel, FusMAEForPreTraining, FusMAEForSemanticSegmentation])
@pytest.mark.parametrize("task_type", TARGETS)
def test_adapters_of_any_task_type_run_every_class(config, model_class, task_type):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, task_type=task_type, target_modules=TARGETS[task_type])
    assert peft.get_peft_model(model_class(config), adapters)(**inputs(2)) is not None


def test_images_that_are_not_named_are_refused_with_the_task_type_as_the_reason(config):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, task_type="FEATURE_EXTRACTION", target_modules="all-linear")
    model = peft.get_peft_model(FusMAEForImageClassification(config), adapters)
    with pytest.raises(TypeError, match=r"`input_ids`.*by name: `pixel_values=`.*`task_type`"):
        model(inputs(2)["pixel_values"])


def adapted(model, peft):
    """With adapters that change what it gives."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_bands_of_a_model_with_adapters_follow_their_names(config):
    peft, batch = pytest.importorskip("peft"), inputs(2)
    model = adapted(FusMAEForPreTraining(config), peft)
    order = [3, 2, 1, 7]
    bands = [config.optical_bands[band] for band in order]
    noise = {"noise": torch.rand(2, 16), "noise_sar": torch.rand(2, 16)}
    others = torch.zeros_like(batch["pixel_values"])
    others[:, order] = batch["pixel_values"][:, order]
    with torch.no_grad():
        expected = model(others, batch["pixel_values_sar"], **noise)
        model.select_bands(optical_bands=bands)
        got = model(others[:, order], batch["pixel_values_sar"], **noise)
    pixels = expected.logits.unflatten(-1, (12, -1))[:, :, order].flatten(2)
    torch.testing.assert_close(got.logits, pixels, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert merged.fusmae.embeddings.optical_projection.in_features == 4 * 64
    torch.testing.assert_close(
        merged(others[:, order], batch["pixel_values_sar"], **noise).logits, got.logits, rtol=1e-3, atol=1e-3
    )


def test_adapters_of_a_model_with_other_bands_train(config):
    peft, batch = pytest.importorskip("peft"), inputs(2)
    model = FusMAEForPreTraining(config)
    model.select_bands(optical_bands=list(config.optical_bands)[:4])
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert model(batch["pixel_values"][:, :4], batch["pixel_values_sar"]).loss.isfinite()


def test_adapters_that_cannot_follow_the_bands_are_refused_before_anything_changes(config):
    peft = pytest.importorskip("peft")
    model = FusMAEForPreTraining(config)
    adapters = peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear")
    with_adapters = peft.get_peft_model(model, adapters)
    with pytest.raises(ValueError, match="before `get_peft_model`, or after `merge_and_unload`"):
        with_adapters.select_bands(optical_bands=["B04"])
    assert list(model.config.optical_bands) == list(config.optical_bands)
    assert with_adapters(**inputs(2)).loss.isfinite()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_class", [FusMAEForImageClassification, FusMAEForSemanticSegmentation])
def test_with_checkpointing_every_adapter_has_a_gradient(config, model_class, reentrant):
    peft = pytest.importorskip("peft")
    model = model_class(config)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*fusmae\..*_(proj|projection)")).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, so that A would have no gradient
            torch.nn.init.normal_(parameter)
    model(**inputs(3)).logits.square().sum().backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert any("fusion" in name for name in adapters)
    assert [name for name, gradient in adapters.items() if gradient is None or not gradient.any()] == []


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
