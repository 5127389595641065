import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusmae_hf import (
    FusMAEConfig,
    FusMAEForPreTraining,
    FusMAEModel,
)
from fusmae_hf.modeling.modeling_fusmae import FusMAEDecoder, FusMAEFusionLayer
from fusmae_hf.modeling.patches_fusmae import (
    masked_patches,
    patchify,
    position_embeddings,
    unpatchify,
)

from .conftest import CLASSES, TINY

SENSORS = [("pixel_values", "optical"), ("pixel_values_sar", "sar")]


def hidden_pixels(mask: torch.Tensor, size: int = 16, patch: int = 4) -> torch.Tensor:
    """(batch, 1, size, size) bool of the hidden pixels."""
    return unpatchify(mask[:, :, None, None].expand(-1, -1, 1, patch**2), patch, size, size).bool()


# --- patches, positions, masks -------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpatchify_undoes_patchify(batch_size, channels, rows, columns, patch_size):
    images = torch.randn(batch_size, channels, rows * patch_size, columns * patch_size)
    patches = patchify(images, patch_size)
    assert patches.shape == (batch_size, rows * columns, channels, patch_size**2)
    assert torch.equal(unpatchify(patches, patch_size, *images.shape[2:]), images)


def test_patches_are_numbered_row_by_row_and_hold_their_own_pixels():
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = patchify(images, 2)
    assert torch.equal(patches[0, 4, 1].reshape(2, 2), images[0, 1, 2:4, 2:4])


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([4, 16, 64]))
def test_positions_tell_all_patches_of_a_grid_apart(rows, columns, dim):
    positions = position_embeddings(rows, columns, dim, torch.device("cpu"))
    assert positions.shape == (rows * columns, dim)
    distances = torch.cdist(positions.double(), positions.double()) + 10 * torch.eye(rows * columns)
    assert distances.min() > 1e-3


def test_positions_of_a_larger_grid_continue_those_of_a_smaller_one():
    small = position_embeddings(3, 4, 32, torch.device("cpu")).reshape(3, 4, 32)
    large = position_embeddings(5, 9, 32, torch.device("cpu")).reshape(5, 9, 32)
    assert torch.equal(large[:3, :4], small)


def test_positions_of_another_sampling_distance_keep_distances_on_the_ground():
    at_10_m = position_embeddings(8, 8, 32, torch.device("cpu")).reshape(8, 8, 32)
    at_20_m = position_embeddings(4, 4, 32, torch.device("cpu"), scale=2.0).reshape(4, 4, 32)
    assert torch.equal(at_20_m, at_10_m[::2, ::2])


RATIOS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0])


@settings(deadline=None)
@given(RATIOS, RATIOS, st.sampled_from(["independent", "consistent", "complementary"]), st.integers(4, 40))
def test_masks_keep_the_share_and_the_relation_that_their_strategy_promises(optical, sar, strategy, num_patches):
    kept_shares = {"optical": 1 - optical, "sar": 1 - sar}
    assume(sum(kept_shares.values()) > 0)
    assume(strategy != "complementary" or sum(kept_shares.values()) <= 1)
    fields = {"mask_ratio": {"optical": optical, "sar": sar}, "mask_strategy": strategy}
    model = FusMAEForPreTraining(FusMAEConfig(**TINY | fields))
    if all(int(num_patches * share + 1e-6) == 0 for share in kept_shares.values()):
        with pytest.raises(ValueError, match="leave no visible patch"):
            model.draw_masks(2, num_patches)
        return
    ids = dict(zip(("optical", "sar"), model.draw_masks(2, num_patches), strict=True))
    for sensor, share in kept_shares.items():
        assert ids[sensor].shape == (2, int(num_patches * share + 1e-6))
        assert masked_patches(ids[sensor], num_patches).sum() == 2 * (num_patches - ids[sensor].shape[1])
    for first, second in zip(ids["optical"].tolist(), ids["sar"].tolist(), strict=True):
        first, second = sorted((set(first), set(second)), key=len)
        if strategy == "consistent":
            assert first <= second
        if strategy == "complementary":
            assert not first & second


def test_noise_decides_the_masks(tiny):
    model = FusMAEForPreTraining(tiny(mask_ratio=0.75))
    noise, noise_sar = torch.rand(2, 16), torch.rand(2, 16)
    ids, ids_sar = model.draw_masks(2, 16, noise, noise_sar)
    assert torch.equal(noise.gather(1, ids), noise.sort(dim=1).values[:, :4])
    assert torch.equal(noise_sar.gather(1, ids_sar), noise_sar.sort(dim=1).values[:, :4])


# --- what reaches the encoder and the loss -------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["query", "latent", "none"])
@pytest.mark.parametrize("strategy", ["independent", "consistent", "complementary"])
@pytest.mark.parametrize(("name", "sensor"), SENSORS)
def test_masked_pixels_never_reach_the_encoder(tiny, images, name, sensor, fusion, strategy):
    model = FusMAEForPreTraining(tiny(feature_fusion=fusion, mask_strategy=strategy)).eval()
    noise = {"noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)}
    plain = model(**images, **noise)
    mask = plain["mask" if sensor == "optical" else "mask_sar"]
    spoilt = {**images, name: torch.where(hidden_pixels(mask), float("nan"), images[name])}
    seen = model(**spoilt, **noise)
    assert torch.equal(seen.logits, plain.logits)
    assert torch.equal(seen.logits_sar, plain.logits_sar)
    assert seen[f"{sensor}_loss"].isnan()  # only the target knows them


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize(("name", "sensor"), SENSORS)
def test_the_loss_looks_at_masked_valid_pixels_alone(tiny, images, name, sensor, norm_pix_loss):
    model = FusMAEForPreTraining(tiny(norm_pix_loss=norm_pix_loss)).eval()
    mask = (torch.rand(4, 16) < 0.5).long()
    valid = torch.rand(4, 16, 16) < 0.7
    logits = torch.randn(4, 16, images[name].shape[1] * 16)
    targets = images[name].clone().requires_grad_()
    model.sensor_error(logits, targets, mask, valid).sum().backward()
    counts = hidden_pixels(mask) & valid[:, None]
    assert (targets.grad[~counts.expand_as(targets)] == 0).all()
    assert (targets.grad[counts.expand_as(targets)] != 0).float().mean() > 0.95


@pytest.mark.parametrize("case", ["nothing masked", "no valid pixel", "absent"])
def test_a_sensor_without_a_target_adds_zero_not_nan(tiny, images, case):
    model = FusMAEForPreTraining(tiny(mask_ratio={"optical": 0.75, "sar": 0.0 if case == "nothing masked" else 0.75}))
    extra = {}
    if case == "no valid pixel":
        extra["pixel_mask_sar"] = torch.zeros(4, 16, 16, dtype=torch.bool)
    if case == "absent":
        extra["sar_available"] = torch.zeros(4, dtype=torch.bool)
    outputs = model(**images, **extra)
    assert outputs.sar_loss == 0
    assert outputs.optical_loss > 0
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("sensors", [["optical"], ["sar"], ["optical", "sar"]], ids="+".join)
def test_a_batch_without_a_valid_pixel_has_the_loss_zero_and_finite_gradients(tiny, images, sensors, implementation):
    model = FusMAEForPreTraining._from_config(tiny(), attn_implementation=implementation)
    nothing, suffixes = torch.zeros(4, 16, 16, dtype=torch.bool), {"optical": "", "sar": "_sar"}
    inputs = {f"pixel_values{suffixes[sensor]}": images[f"pixel_values{suffixes[sensor]}"] for sensor in sensors}
    loss = model(**inputs, **{f"pixel_mask{suffixes[sensor]}": nothing for sensor in sensors}).loss
    loss.backward()
    assert loss == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(tiny, images):
    model = FusMAEForPreTraining(tiny()).eval()
    valid = torch.rand(4, 16, 16) < torch.tensor([0.0, 0.2, 0.6, 1.0])[:, None, None]
    inputs = {**images, "pixel_mask": valid, "noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)}
    whole = model(**inputs).loss
    parts = [model(**{key: value[i : i + 1] for key, value in inputs.items()}).loss for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


# --- fusion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["optical", "sar"])
def test_early_fusion_lets_each_sensor_change_the_tokens_of_the_other(tiny, changed):
    layer = FusMAEFusionLayer(_eager(tiny()))
    tokens = {"optical": torch.randn(2, 5, 32), "sar": torch.randn(2, 7, 32)}
    before = dict(zip(tokens, layer(**tokens), strict=True))
    other = "sar" if changed == "optical" else "optical"
    # One token of one sensor changes: attention spreads that to every token of the other, an MLP alone to none.
    tokens[changed] = tokens[changed].clone()
    tokens[changed][:, 3] = torch.randn(2, 32)
    after = dict(zip(tokens, layer(**tokens), strict=True))
    assert ((after[other] - before[other]).abs().amax(dim=-1) > 1e-6).all()
    # Queries are a sensor's own tokens, keys and values the other's: its other tokens do not see the change.
    unchanged = [token for token in range(tokens[changed].shape[1]) if token != 3]
    assert torch.equal(after[changed][:, unchanged], before[changed][:, unchanged])


@pytest.mark.parametrize(("fusion", "context"), [("query", "other"), ("query", "all"), ("latent", "other")])
def test_the_decoder_of_a_sensor_sees_the_other_one(tiny, fusion, context):
    decoder = FusMAEDecoder(_eager(tiny(feature_fusion=fusion, decoder_context=context)), num_bands=2)
    own, other = torch.randn(2, 6, 32), torch.randn(2, 5, 32)
    ids = torch.stack([torch.randperm(16)[:6] for _ in range(2)])
    before, weights = decoder((4, 4), own, other, ids)
    after, _ = decoder((4, 4), own, other + torch.randn(2, 5, 32), ids)
    assert ((after - before).abs().amax(dim=-1) > 1e-7).all()
    keys = {"query": {"other": 5, "all": 11}, "latent": {"other": 5}}[fusion][context]
    assert weights.shape == (2, 4, 16 if fusion == "query" else 6, keys)


def test_without_feature_fusion_the_decoder_sees_its_own_sensor_alone(tiny):
    decoder = FusMAEDecoder(_eager(tiny(feature_fusion="none")), num_bands=2)
    own = torch.randn(2, 16, 32)
    assert torch.equal(decoder((4, 4), own, torch.randn(2, 5, 32))[0], decoder((4, 4), own, None)[0])


def test_positions_tell_mask_tokens_apart(tiny):
    decoder = FusMAEDecoder(_eager(tiny(decoder_num_hidden_layers=0)), num_bands=2)
    predicted, _ = decoder((4, 4), None, torch.randn(1, 5, 32))
    distances = torch.cdist(predicted[0], predicted[0]) + torch.eye(16)
    assert distances.min() > 1e-4


def test_without_early_fusion_there_is_no_fusion_layer(tiny, images):
    config = tiny(early_fusion="none")
    model = FusMAEModel._from_config(config, attn_implementation="eager")
    assert model.fusion is None
    outputs = model(**images, output_attentions=True)
    assert outputs.cross_attentions == ()


def _eager(config: FusMAEConfig) -> FusMAEConfig:
    config._attn_implementation = "eager"
    return config


# --- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_feature_extraction_never_masks_and_is_deterministic(tiny, images, training):
    model = FusMAEModel(tiny(mask_ratio=0.9)).train(training)
    first, second = model(**images), model(**images)
    assert first.optical_hidden_state.shape == first.sar_hidden_state.shape == (4, 16, 32)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)


def test_every_output_has_its_documented_shape(tiny, images):
    model = FusMAEModel._from_config(tiny(), attn_implementation="eager")
    outputs = model(**images, output_attentions=True, output_hidden_states=True)
    assert outputs.last_hidden_state.shape == (4, 33, 32)
    assert torch.equal(outputs.last_hidden_state[:, 1:17], outputs.optical_hidden_state)
    assert torch.equal(outputs.last_hidden_state[:, 17:], outputs.sar_hidden_state)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 1:].mean(dim=1))
    assert [h.shape for h in outputs.hidden_states] == [(4, 33, 32)] * 3
    assert [a.shape for a in outputs.attentions] == [(4, 4, 33, 33)] * 2
    assert [a.shape for a in outputs.cross_attentions] == [(4, 4, 16, 16)] * 2


def test_pretraining_outputs_have_their_documented_shapes(tiny, images):
    model = FusMAEForPreTraining._from_config(tiny(), attn_implementation="eager")
    outputs = model(**images, output_attentions=True)
    assert outputs.logits.shape == (4, 16, 48)
    assert outputs.logits_sar.shape == (4, 16, 32)
    assert outputs.mask.sum(dim=1).tolist() == outputs.mask_sar.sum(dim=1).tolist() == [12] * 4
    assert [a.shape for a in outputs.cross_attentions] == [(4, 4, 4, 4)] * 2
    assert [a.shape for a in outputs.decoder_cross_attentions] == [(4, 4, 16, 4)] * 2
    assert model.unpatchify(outputs.logits, 16, 16).shape == (4, 3, 16, 16)
    assert model(**images, return_loss=False).loss is None


def test_every_parameter_learns(tiny, images):
    model = FusMAEForPreTraining(tiny())
    model(**images).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# --- missing sensors -----------------------------------------------------------------------------------------------


def test_a_patch_without_data_does_not_change_the_other_tokens(tiny, images):
    model = FusMAEModel(tiny()).eval()
    valid = torch.ones(4, 16, 16, dtype=torch.bool)
    valid[:, :4, :8] = False
    spoilt = torch.where(valid[:, None], images["pixel_values"], 99.0)
    outputs = [
        model(pixel_values=values, pixel_values_sar=images["pixel_values_sar"], pixel_mask=valid)
        for values in (images["pixel_values"], spoilt)
    ]
    assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)
    assert (outputs[0].optical_hidden_state[:, :2] == 0).all()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None, "pixel_values_sar": None}, "Neither sensor was given"),
        ({"pixel_values": torch.zeros(4, 12, 16, 16)}, r"one channel for each of the bands \['B02', 'B03', 'B04'\]"),
        ({"pixel_values_sar": torch.zeros(4, 16, 16)}, "pixel_values_sar"),
        ({"pixel_values": torch.zeros(4, 3, 18, 16), "pixel_values_sar": None}, "18x16 px, which the patch size of 4"),
        ({"pixel_values_sar": torch.zeros(4, 2, 20, 16)}, "same places on the same grid"),
        ({"pixel_values_sar": torch.zeros(3, 2, 16, 16)}, "same places on the same grid"),
        ({"sar_available": torch.ones(4)}, "must be bool of shape"),
        ({"sar_available": torch.ones(3, dtype=torch.bool)}, "must be bool of shape"),
        (
            {"pixel_values": None, "sar_available": torch.tensor([True, False, True, True])},
            r"Sample \[1\].* no sensor",
        ),
        (
            {
                "sar_available": torch.tensor([1, 0, 0, 1]).bool(),
                "optical_available": torch.tensor([1, 1, 0, 0]).bool(),
            },
            r"Sample \[2\] of the batch has no sensor",
        ),
        ({"gsd": 0.0}, "must be a positive distance"),
        (
            {"pixel_values": torch.zeros(0, 3, 16, 16), "pixel_values_sar": None},
            "holds no image: leave an empty batch",
        ),
        (
            {"pixel_values": None, "pixel_values_sar": torch.zeros(0, 2, 16, 16)},
            "holds no image: leave an empty batch",
        ),
        ({"pixel_values": torch.zeros(4, 3, 0, 16), "pixel_values_sar": None}, "holds no image"),
        ({"pixel_values_sar": None, "sar_available": torch.ones(4, dtype=torch.bool)}, "without pixel values"),
        ({"pixel_mask": torch.ones(4, 4, 4, dtype=torch.bool)}, "pixel mask of the optical sensor must be bool"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny, images, model_class, change, message):
    with pytest.raises(ValueError, match=message):
        model_class(tiny())(**images | change)


def test_noise_of_another_grid_is_refused(tiny, images):
    with pytest.raises(ValueError, match=r"`noise_sar` must have shape \(4, 16\)"):
        FusMAEForPreTraining(tiny())(**images, noise_sar=torch.rand(4, 9))


def test_hiding_the_only_sensor_given_is_refused(tiny, images):
    model = FusMAEForPreTraining(tiny(mask_ratio={"optical": 0.5, "sar": 1.0}))
    with pytest.raises(ValueError, match="Nothing is visible"):
        model(pixel_values_sar=images["pixel_values_sar"])


# --- saving --------------------------------------------------------------------------------------------------------


def test_under_bf16_autocast_the_residual_stream_stays_in_float32(tiny, images):
    model = FusMAEForPreTraining(tiny()).eval()
    inputs = {**images, "noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)}
    streams = []
    for layer in (model.fusmae.layers[-1], model.optical_decoder.layers[-1], model.sar_decoder.layers[-1]):
        layer.register_forward_hook(lambda layer, args, output: streams.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**inputs)
    assert streams == [(torch.float32, torch.float32)] * 3
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, model(**inputs).loss, rtol=2e-2, atol=2e-2)


def test_a_model_in_bf16_stays_in_bf16(tiny, images):
    model = FusMAEForPreTraining(tiny()).to(torch.bfloat16)
    outputs = model(**{name: values.bfloat16() for name, values in images.items()})
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
