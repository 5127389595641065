"""The optimised model computes what the plain one does: outputs, losses and gradients, in every mode."""

import pytest
import torch
from transformers.utils import ModelOutput

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEModel, FusMAEPreTrainedModel

from . import plain_fusmae

HEIGHT, WIDTH, PATCHES, BATCH = 24, 40, 15, 4
FIELDS = {
    "optical_bands": ["B02", "B03", "B04"],
    "image_size": (HEIGHT, WIDTH),
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 40,
    "mask_ratio": 0.6,
}
VARIANTS = {
    "query": {},
    "query on all": {"decoder_context": "all"},
    "latent": {"feature_fusion": "latent", "decoder_num_hidden_layers": 2},
    "no feature fusion": {"feature_fusion": "none"},
    "no early fusion": {"early_fusion": "none"},
    "no fusion at all": {"early_fusion": "none", "feature_fusion": "none"},
    "no decoder layers": {"decoder_num_hidden_layers": 0},
    "no bias": {"qkv_bias": False, "num_hidden_layers": 3},
    "consistent": {"mask_strategy": "consistent", "mask_ratio": {"optical": 0.75, "sar": 0.5}},
    "complementary": {"mask_strategy": "complementary", "mask_ratio": {"optical": 0.7, "sar": 0.3}},
    "unequal ratios": {"mask_ratio": {"optical": 0.8, "sar": 0.4}, "sar_loss_weight": 0.5},
    "normalised targets": {"norm_pix_loss": True, "optical_loss_weight": 2.0},
    "modality dropout": {"modality_dropout": 0.25, "decoder_context": "all"},
    "modality dropout, latent": {"modality_dropout": {"optical": 0.5, "sar": 0.25}, "feature_fusion": "latent"},
    "all lose optical": {"modality_dropout": {"optical": 1.0, "sar": 0.0}},
}
SITUATIONS = ["pairs", "no-data pixels", "missing sensors", "both", "optical alone", "sar alone", "other distance"]


def make_model(
    model_class: type[FusMAEPreTrainedModel], dtype: torch.dtype = torch.float32, attention: str = "sdpa", **fields
) -> FusMAEPreTrainedModel:
    """A model in which biases, norms and tokens count, unlike fresh ones."""
    torch.manual_seed(1)
    model = model_class._from_config(FusMAEConfig(**FIELDS | fields), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "token" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def make_inputs(situation: str, dtype: torch.dtype = torch.float32, noise: bool = True) -> dict:
    """Four samples on a grid of 3 x 5 patches. Pixels without data are NaN where a whole patch or sensor has none."""
    torch.manual_seed(2)
    inputs = {
        "pixel_values": torch.randn(BATCH, 3, HEIGHT, WIDTH, dtype=dtype),
        "pixel_values_sar": torch.randn(BATCH, 2, HEIGHT, WIDTH, dtype=dtype),
    }
    noises = {"noise": torch.rand(BATCH, PATCHES), "noise_sar": torch.rand(BATCH, PATCHES)}
    if situation in ("no-data pixels", "both"):
        for suffix in ("", "_sar"):
            mask = torch.rand(BATCH, HEIGHT, WIDTH) > 0.2
            mask[1, :, :16] = mask[2, 8:, 24:] = False
            inputs[f"pixel_values{suffix}"][1, :, :, :16] = torch.nan
            inputs[f"pixel_mask{suffix}"] = mask
        inputs["pixel_mask_sar"][3] = False
    if situation in ("missing sensors", "both"):
        inputs["optical_available"] = torch.tensor([True, True, False, True])
        inputs["sar_available"] = torch.tensor([False, True, True, True])
        inputs["pixel_values"][2] = inputs["pixel_values_sar"][0] = torch.nan
    if situation.endswith("alone"):
        del inputs["pixel_values_sar" if situation == "optical alone" else "pixel_values"]
    if situation == "other distance":
        inputs["gsd"] = 20.0
    return inputs | noises if noise else inputs


def in_double(inputs: dict) -> dict:
    return {
        name: value.double() if name.startswith("pixel_values") and value is not None else value
        for name, value in inputs.items()
    }


def plain_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}


def plain_step(
    model: FusMAEForPreTraining, inputs: dict, training: bool = True
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Outputs of the plain model in double precision, and the gradient of its loss to each weight."""
    weights = plain_weights(model)
    outputs = plain_fusmae.pretraining(weights, model.config, in_double(inputs), training)
    return outputs, gradients_of(outputs["loss"], weights)


def gradients_of(scalar: torch.Tensor, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(scalar, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), found, strict=True)
    }


def assert_same_outputs(got: ModelOutput, expected: dict, tolerance: float) -> None:
    """Largest difference of each output, relative to its largest value."""
    for name, values in expected.items():
        if values is None:
            assert getattr(got, name) is None, name
            continue
        assert getattr(got, name).shape == values.shape, name
        difference, scale = (getattr(got, name).double() - values).abs().max(), values.abs().max()
        assert difference <= tolerance * scale, f"{name}: {difference / scale:.1e}"


def assert_same_gradients(got: dict, expected: dict, tolerance: float) -> None:
    """Norm of each difference, relative to the norm of the gradient and a hundredth of that of the whole (the biases
    of keys have none but rounding)."""
    assert got.keys() == expected.keys()
    whole = torch.stack([values.norm() for values in expected.values()]).norm()
    for name, values in expected.items():
        difference = (got[name].double() - values).norm() / (values.norm() + 1e-2 * whole)
        assert difference <= tolerance, f"gradient of {name}: {difference:.1e}"


def assert_like_plain(model: FusMAEForPreTraining, inputs: dict, tolerance: float) -> None:
    """Outputs and gradients of one step, in the mode that the model is in, are those of the plain model."""
    expected, gradients = plain_step(model, inputs, model.training)
    outputs = model(**inputs)
    assert_same_outputs(outputs, expected, tolerance)
    got = gradients_of(outputs.loss, dict(model.named_parameters()))
    assert_same_gradients(got, gradients, tolerance)


# --- one training step: losses, logits, masks, gradients -----------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_is_that_of_the_plain_model(variant, situation):
    model = make_model(FusMAEForPreTraining, **VARIANTS[variant]).train()
    assert_like_plain(model, make_inputs(situation), 1e-5)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("variant", ["query on all", "latent"])
def test_a_training_step_with_eager_attention_is_that_of_the_plain_model(variant, situation):
    model = make_model(FusMAEForPreTraining, attention="eager", **VARIANTS[variant]).train()
    assert_like_plain(model, make_inputs(situation), 1e-5)


@pytest.mark.slow
def test_flex_attention_predicts_what_the_plain_model_predicts():
    """Forward alone: flex attention has no gradient on the CPU."""
    model = make_model(FusMAEForPreTraining, attention="flex_attention", decoder_context="all").eval()
    inputs = make_inputs("both")
    with torch.no_grad():
        outputs = model(**inputs)
    assert_same_outputs(outputs, plain_step(model, inputs, training=False)[0], 1e-5)


@pytest.mark.parametrize("situation", ["pairs", "both"])
@pytest.mark.parametrize("variant", ["query", "latent", "normalised targets", "modality dropout"])
def test_an_evaluation_step_is_that_of_the_plain_model(variant, situation):
    model = make_model(FusMAEForPreTraining, **VARIANTS[variant]).eval()
    assert_like_plain(model, make_inputs(situation), 1e-5)
    with torch.no_grad():
        without_graph = model(**make_inputs(situation))
    assert_same_outputs(without_graph, plain_step(model, make_inputs(situation), training=False)[0], 1e-5)


@pytest.mark.parametrize("sensor", ["optical", "sar"])
@pytest.mark.parametrize("variant", ["query", "query on all", "latent", "no feature fusion"])
def test_a_sensor_hidden_by_its_ratio_is_reconstructed_as_by_the_plain_model(variant, sensor):
    ratios = {"optical": 0.5, "sar": 0.5} | {sensor: 1.0}
    model = make_model(FusMAEForPreTraining, **VARIANTS[variant] | {"mask_ratio": ratios}).train()
    assert_like_plain(model, make_inputs("no-data pixels"), 1e-5)


@pytest.mark.parametrize("ratio", [0.0, 1 / 3, 0.93])
def test_any_share_of_visible_patches_gives_what_the_plain_model_gives(ratio):
    model = make_model(FusMAEForPreTraining, mask_ratio={"optical": ratio, "sar": 0.5}).train()
    assert_like_plain(model, make_inputs("both"), 1e-5)


@pytest.mark.parametrize("variant", ["query on all", "latent", "modality dropout"])
def test_gradient_checkpointing_leaves_the_step_that_of_the_plain_model(variant):
    model = make_model(FusMAEForPreTraining, **VARIANTS[variant]).train()
    model.gradient_checkpointing_enable()
    assert_like_plain(model, make_inputs("both"), 1e-5)


def test_a_compiled_step_is_that_of_the_plain_model():
    torch._dynamo.reset()
    model = make_model(FusMAEForPreTraining, **VARIANTS["modality dropout"]).train()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_like_plain(model, make_inputs("both"), 1e-5)
    torch._dynamo.reset()


# --- other precisions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("situation", ["pairs", "both", "sar alone"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_double_precision_predictions_differ_by_rounding_alone(variant, situation, attention):
    """Losses are of single precision by design, so gradients are those of a weighted sum of the predictions."""
    model = make_model(FusMAEForPreTraining, torch.float64, attention, **VARIANTS[variant]).train()
    inputs, weights = make_inputs(situation, torch.float64), plain_weights(model)
    expected, outputs = plain_fusmae.pretraining(weights, model.config, inputs, training=True), model(**inputs)
    assert_same_outputs(outputs, {name: v for name, v in expected.items() if "loss" in name}, 1e-6)
    predictions = {name: values for name, values in expected.items() if name.startswith("logits")}
    assert_same_outputs(outputs, predictions, 1e-10)
    factors = {name: torch.randn_like(values) for name, values in predictions.items()}
    plain_sum = torch.stack([(factors[name] * values).sum() for name, values in predictions.items()]).sum()
    model_sum = torch.stack([(factors[name] * outputs[name]).sum() for name in predictions]).sum()
    got = gradients_of(model_sum, dict(model.named_parameters()))
    assert_same_gradients(got, gradients_of(plain_sum, weights), 1e-10)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("situation", ["pairs", "both"])
@pytest.mark.parametrize("variant", ["query on all", "latent", "normalised targets", "modality dropout"])
def test_in_bfloat16_a_step_stays_near_that_of_the_plain_model(variant, situation, weights):
    """Weights in float32 with autocast, or weights and pixels in bfloat16."""
    model = make_model(FusMAEForPreTraining, getattr(torch, weights), **VARIANTS[variant]).train()
    inputs = make_inputs(situation, getattr(torch, weights))
    expected, gradients = plain_step(model, inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "float32"):
        outputs = model(**inputs)
    losses = {name: values for name, values in expected.items() if "loss" in name}
    assert_same_outputs(outputs, losses, 1e-2)
    assert_same_outputs(outputs, {name: v for name, v in expected.items() if name not in losses}, 5e-2)
    got = gradients_of(outputs.loss, dict(model.named_parameters()))
    whole = torch.cat([values.flatten() for values in gradients.values()])
    similarity = torch.cosine_similarity(torch.cat([got[name].double().flatten() for name in gradients]), whole, dim=0)
    assert similarity > 0.99
    for name, values in gradients.items():
        if values.norm() > 1e-2 * whole.norm():
            assert torch.cosine_similarity(got[name].double().flatten(), values.flatten(), dim=0) > 0.98, name


# --- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("early_fusion", ["cross_attention", "none"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_features_and_their_gradients_are_those_of_the_plain_model(
    situation, early_fusion, attention, dtype, tolerance
):
    model = make_model(FusMAEModel, dtype, attention, early_fusion=early_fusion).train()
    inputs, weights = make_inputs(situation, dtype, noise=False), plain_weights(model)
    expected, outputs = plain_fusmae.features(weights, model.config, in_double(inputs)), model(**inputs)
    assert_same_outputs(outputs, expected, tolerance)
    factors = {name: torch.randn_like(values) for name, values in expected.items() if values is not None}
    plain_sum = torch.stack([(values * expected[name]).sum() for name, values in factors.items()]).sum()
    model_sum = torch.stack([(values * outputs[name]).sum() for name, values in factors.items()]).sum()
    got = gradients_of(model_sum, dict(model.named_parameters()))
    assert_same_gradients(got, gradients_of(plain_sum, weights), tolerance)


# --- the comparison itself -----------------------------------------------------------------------------------------


def test_the_comparison_fails_wherever_a_weight_differs():
    """All weights but the biases of keys, which shift all scores of a query alike."""
    model = make_model(FusMAEForPreTraining, **VARIANTS["query on all"]).eval()
    inputs = make_inputs("both")
    with torch.no_grad():
        outputs = model(**inputs)
    for name in model.state_dict():
        weights = {key: value.detach() for key, value in plain_weights(model).items()}
        weights[name] = weights[name] + 1e-2 * torch.randn_like(weights[name])
        expected = plain_fusmae.pretraining(weights, model.config, in_double(inputs), training=False)
        if name.endswith("k_proj.bias"):
            assert_same_outputs(outputs, expected, 1e-5)
        else:
            with pytest.raises(AssertionError, match=r"^(loss|(optical|sar)_loss|logits)"):
                assert_same_outputs(outputs, expected, 1e-5)


def test_the_comparison_fails_where_a_gradient_differs():
    model = make_model(FusMAEForPreTraining)
    _, gradients = plain_step(model, make_inputs("pairs"))
    name = "fusmae.layers.0.attention.v_proj.weight"
    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        assert_same_gradients(gradients | {name: 1.0001 * gradients[name]}, gradients, 1e-5)
