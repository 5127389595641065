import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from fusmae_hf import (
    PRESETS,
    FusMAEBackbone,
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEModel,
)
from fusmae_hf.modeling.labels_fusmae import dense_loss
from fusmae_hf.modeling.patches_fusmae import fuse_map

from .conftest import HEADS


def features(outputs) -> torch.Tensor:
    """What a head is used for, one row a sample."""
    for name in ("logits", "pooler_output"):
        if name in outputs:
            return outputs[name].flatten(1)
    return torch.cat([values.flatten(1) for values in outputs.feature_maps], dim=1)


# --- what every head keeps of the encoder --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_heads_never_mask_and_are_deterministic(tiny, images, head, training):
    model = head(tiny(mask_ratio=0.9)).train(training)
    assert torch.equal(features(model(**images)), features(model(**images)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
def test_a_sample_in_a_mixed_batch_has_the_outputs_it_has_alone(tiny, images, head, implementation):
    model = head._from_config(tiny(), attn_implementation=implementation).eval()
    alone = [model(**images), model(pixel_values=images["pixel_values"])]
    alone += [model(pixel_values_sar=images["pixel_values_sar"]), alone[0]]
    images["pixel_values_sar"][1], images["pixel_values"][2] = float("nan"), float("nan")
    mixed = model(
        **images,
        sar_available=torch.tensor([True, False, True, True]),
        optical_available=torch.tensor([True, True, False, True]),
    )
    for sample, expected in enumerate(alone):
        torch.testing.assert_close(features(mixed)[sample], features(expected)[sample], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_pixels_without_data_may_hold_anything(tiny, images, head):
    model = head(tiny()).eval()
    valid = torch.ones(4, 16, 16, dtype=torch.bool)
    valid[:, :8, :4] = False
    expected = features(model(**images, pixel_mask=valid))
    images["pixel_values"] = torch.where(valid[:, None], images["pixel_values"], float("nan"))
    assert torch.equal(features(model(**images, pixel_mask=valid)), expected)


@pytest.mark.parametrize("head", HEADS)
def test_nan_of_an_absent_sensor_spreads_into_no_gradient_and_every_parameter_learns(tiny, images, head):
    model = head(tiny()).train()
    images["pixel_values_sar"][1], images["pixel_values"][2] = float("nan"), float("nan")
    outputs = model(
        **images,
        sar_available=torch.tensor([True, False, True, True]),
        optical_available=torch.tensor([True, True, False, True]),
    )
    features(outputs).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head", HEADS)
def test_every_preset_makes_every_head(name, head):
    with torch.device("meta"):
        model = head(FusMAEConfig.from_preset(name, num_labels=5, out_indices=[0, 3]))
        outputs = model(torch.empty(2, 12, 240, 240), torch.empty(2, 2, 240, 240))
    width, patches = model.config.hidden_size, (240 // model.config.patch_size) ** 2
    expected = {
        FusMAEModel: (2, width),
        FusMAEForImageClassification: (2, 5),
        FusMAEForSemanticSegmentation: (2, 5 * 240 * 240),
        FusMAEBackbone: (2, 2 * width * patches),
    }
    assert features(outputs).shape == expected[head]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sensor", ["pixel_values", "pixel_values_sar"])
def test_each_sensor_matters(tiny, images, head, sensor):
    model = head(tiny()).eval()
    expected = features(model(**images))
    assert not torch.allclose(features(model(**images | {sensor: images[sensor] + 1})), expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_pretraining_checkpoint_gives_every_head_the_whole_encoder(tiny, images, head, tmp_path):
    pretrained = FusMAEForPreTraining(tiny()).eval()
    pretrained.save_pretrained(tmp_path)
    model, report = head.from_pretrained(tmp_path, output_loading_info=True)
    encoder = {f"fusmae.{name}" for name, _ in pretrained.fusmae.named_parameters()}
    assert not encoder & set(report["missing_keys"])
    assert not report["unexpected_keys"]
    expected = pretrained.fusmae(**images).pooler_output
    assert torch.equal(model.base_model(**images).pooler_output, expected)


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, FusMAEModel),
        (AutoModelForPreTraining, FusMAEForPreTraining),
        (AutoModelForImageClassification, FusMAEForImageClassification),
        (AutoModelForSemanticSegmentation, FusMAEForSemanticSegmentation),
        (AutoBackbone, FusMAEBackbone),
    ],
)
def test_auto_classes_make_our_classes(tiny, auto_class, model_class):
    assert type(auto_class.from_config(tiny())) is model_class


# --- classification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "labels", "error"),
    [
        ({"num_labels": 5}, torch.tensor([0, 4, 2, 1]), torch.nn.functional.cross_entropy),
        ({"num_labels": 5}, torch.tensor([0, 4, -100, 1], dtype=torch.int32), torch.nn.functional.cross_entropy),
        ({"num_labels": 3}, torch.rand(4, 3), torch.nn.functional.binary_cross_entropy_with_logits),
        ({"num_labels": 3, "problem_type": "regression"}, torch.randn(4, 3), torch.nn.functional.mse_loss),
        ({"num_labels": 1}, torch.randn(4, 1), torch.nn.functional.mse_loss),
    ],
)
def test_labels_decide_the_loss(tiny, images, fields, labels, error):
    outputs = FusMAEForImageClassification(tiny(**fields))(**images, labels=labels)
    target = labels if labels.is_floating_point() else labels.long()
    torch.testing.assert_close(outputs.loss, error(outputs.logits, target))


@pytest.mark.parametrize(
    ("fields", "labels", "message"),
    [
        ({"num_labels": 5}, torch.tensor([0, 5, 2, 1]), r"hold \[5\], but with `num_labels=5` classes are 0 to 4"),
        ({"num_labels": 5}, torch.tensor([0, 1, -1, 1]), r"hold \[-1\]"),
        ({"num_labels": 5}, torch.zeros(4, 5, dtype=torch.long), r"shape \(4,\).*problem_type='multi_label"),
        ({"num_labels": 5}, torch.zeros(3, dtype=torch.long), r"shape \(4,\)"),
        ({"num_labels": 3}, torch.zeros(4), r"floats of shape \(4, 3\)"),
        ({"num_labels": 3}, torch.full((4, 3), 2.0), r"must lie in \[0, 1\]"),
        ({"num_labels": 1}, torch.zeros(4, dtype=torch.long), "must be floats.*for two classes use `num_labels=2`"),
        ({"num_labels": 3}, torch.full((4, 3), float("nan")), r"must lie in \[0, 1\], or be -100"),
        ({"num_labels": 1}, torch.full((4,), float("inf")), "hold infinity. Put NaN where there is no value"),
    ],
)
def test_image_labels_that_do_not_fit_are_refused_before_any_computation(tiny, images, fields, labels, message):
    model = FusMAEForImageClassification(tiny(**fields))
    model.fusmae.forward = None  # would raise a TypeError
    with pytest.raises(ValueError, match=message):
        model(**images, labels=labels)


NAN = float("nan")
SCENES, MAPS = FusMAEForImageClassification, FusMAEForSemanticSegmentation
IGNORED = {
    "single label": (SCENES, {"num_labels": 3}, torch.tensor([2, 0, 1, 1]), -100),
    "single label, weighted": (
        SCENES, {"num_labels": 3, "class_weights": [1, 2, 3], "focal_gamma": 2}, torch.tensor([2, 0, 1, 1]), -100
    ),
    "several labels": (SCENES, {"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]), -100),
    "several labels, weighted": (
        SCENES, {"num_labels": 2, "class_weights": [1, 2], "focal_gamma": 2}, torch.ones(4, 2), -100
    ),
    "quantity of a scene": (SCENES, {"num_labels": 1}, torch.tensor([3.0, 1, 0, -2]), NAN),
    "quantities of a scene": (SCENES, {"num_labels": 2, "problem_type": "regression"}, torch.ones(4, 2), NAN),
    "map of classes": (MAPS, {"num_labels": 3}, torch.ones(4, 16, 16, dtype=torch.long), 255),
    "map of classes, weighted": (
        MAPS, {"num_labels": 2, "class_weights": [1, 2], "focal_gamma": 2}, torch.ones(4, 16, 16).long(), 255
    ),
    "map of a quantity": (MAPS, {"num_labels": 1}, torch.ones(4, 16, 16), NAN),
}  # fmt: skip
"""Head, fields of its configuration, labels, and what stands where there is no label."""


@pytest.mark.parametrize(("head", "fields", "labels", "ignored"), IGNORED.values(), ids=IGNORED)
def test_a_batch_in_which_no_label_counts_has_the_loss_zero_and_gradients(tiny, images, head, fields, labels, ignored):
    model = head(tiny(**fields)).train()
    loss = model(**images, labels=torch.full_like(labels, ignored)).loss
    loss.backward()
    assert loss == 0
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []


@pytest.mark.parametrize(("head", "fields", "labels", "ignored"), IGNORED.values(), ids=IGNORED)
def test_a_sample_whose_label_does_not_count_changes_no_loss(tiny, images, head, fields, labels, ignored):
    model, some = head(tiny(**fields)).eval(), labels.clone()
    some[2] = ignored
    others = [0, 1, 3]
    expected = model(**{name: values[others] for name, values in images.items()}, labels=labels[others]).loss
    torch.testing.assert_close(model(**images, labels=some).loss, expected)


def test_a_loss_of_the_users_own_takes_the_place_of_the_models(tiny, images):
    model = FusMAEForImageClassification(tiny(num_labels=3))
    model.loss_function = lambda labels, logits, config, **kwargs: logits.sum() * 0 + 7
    assert model(**images, labels=torch.tensor([0, 1, 2, 0])).loss == 7


def test_the_norm_before_the_classifier_can_be_left_out(tiny, images):
    model = FusMAEForImageClassification(tiny(classifier_norm=False)).eval()
    pooled = model.fusmae(**images).pooler_output
    assert torch.equal(model(**images).logits, model.classifier(pooled))


# --- dense prediction ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("scale", [0.5, 1, 2])
def test_logits_have_the_size_of_the_images_and_labels_may_be_finer_or_coarser(tiny, size, scale):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=3))
    labels = torch.randint(0, 3, (2, int(size[0] * scale), int(size[1] * scale)))
    outputs = model(torch.randn(2, 3, *size), torch.randn(2, 2, *size), labels=labels)
    assert outputs.logits.shape == (2, 3, size[0], size[1])
    upsampled = torch.nn.functional.interpolate(outputs.logits, labels.shape[1:], mode="bilinear")
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(upsampled, labels))


@pytest.mark.parametrize(
    ("declared", "ignored", "dtype"),
    [(255, 255, torch.uint8), (255, 255, torch.long), (-1, -1, torch.int16), (255, -100, torch.long)],
)
def test_ignored_pixels_do_not_count(tiny, images, declared, ignored, dtype):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=3, semantic_loss_ignore_index=declared)).eval()
    labels = torch.randint(0, 3, (4, 16, 16)).to(dtype)
    labels[:, 4:] = ignored
    outputs = model(**images, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :, :4], labels[:, :4].long())
    torch.testing.assert_close(outputs.loss, expected)
    assert model(**images, labels=torch.full((4, 16, 16), ignored, dtype=dtype)).loss == 0


@pytest.mark.parametrize("size", [(9, 15), (8, 24)])
def test_pixels_without_data_do_not_reach_the_detail_path(tiny, size):
    model = FusMAEForSemanticSegmentation(
        tiny(num_labels=3, patch_size=3 if size[0] == 9 else 4, image_size=12)
    ).eval()
    optical, sar, mask = torch.randn(2, 3, *size), torch.randn(2, 2, *size), torch.rand(2, *size) > 0.2
    expected = model(torch.where(mask[:, None], optical, 0.0), sar, pixel_mask=mask).logits
    decoder_alone = model.decoder.detail("optical", torch.where(mask[:, None], optical, float("nan")), mask)
    again = model.decoder.detail("optical", torch.where(mask[:, None], optical, 0.0), mask)
    assert all(torch.equal(*each) for each in zip(decoder_alone, again, strict=True))
    assert expected.isfinite().all()


def test_details_finer_than_a_patch_reach_the_map(tiny):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=2)).train()
    labels = (torch.arange(16) % 2).expand(4, 16, 16).contiguous()  # stripes of one pixel in patches of four
    optical = labels[:, None].float().expand(4, 3, 16, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(optical, labels=labels).loss.backward()
        optimiser.step()
    assert (model(optical).logits.argmax(1) == labels).all()


def test_the_dense_head_of_an_older_version_is_refused(tiny, tmp_path):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=3))
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    weights["decoder.layernorms.0.weight"] = torch.ones(16)
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="dense head of an older version"):
        FusMAEForSemanticSegmentation.from_pretrained(tmp_path)
    assert FusMAEModel.from_pretrained(tmp_path).num_parameters() > 0


def test_no_data_of_bytes_is_no_negative_number(tiny, images):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=3, semantic_loss_ignore_index=-1))
    with pytest.raises(ValueError, match=r"hold \[255\]"):
        model(**images, labels=torch.full((4, 16, 16), 255, dtype=torch.uint8))


def test_dense_regression_leaves_out_nan(tiny, images):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=1)).eval()
    labels = torch.randn(4, 16, 16)
    labels[:, 4:] = float("nan")
    outputs = model(**images, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.mse_loss(outputs.logits[:, 0, :4], labels[:, :4]))
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert dense_loss(outputs.logits, torch.full_like(labels, float("nan")), model.config) == 0


@pytest.mark.parametrize(
    ("fields", "labels", "message"),
    [
        ({}, torch.full((4, 16, 16), 3), r"hold \[3\].*255 is left out"),
        ({}, torch.full((4, 16, 16), -1), r"hold \[-1\]"),
        ({}, torch.zeros(4, 1, 16, 16, dtype=torch.long), r"\(4, height, width\)"),
        ({}, torch.zeros(3, 16, 16, dtype=torch.long), r"\(4, height, width\)"),
        ({}, torch.zeros(4, 18, 18, dtype=torch.long), "cannot cover the same ground"),
        ({}, torch.zeros(4, 16, 32, dtype=torch.long), "cannot cover the same ground"),
        ({"problem_type": "single_label_classification"}, torch.zeros(4, 16, 16), "must be integers"),
        ({"problem_type": "regression"}, torch.zeros(4, 16, 16), r"\(4, 3, height, width\)"),
        ({"problem_type": "regression"}, torch.zeros(4, 3, 16, 16, dtype=torch.long), "must be floats"),
        ({"problem_type": "multi_label_classification"}, torch.zeros(4, 3, 16, 16), "neither"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused_before_any_computation(tiny, images, fields, labels, message):
    model = FusMAEForSemanticSegmentation(tiny(num_labels=3, **fields))
    model.fusmae.forward = None
    with pytest.raises(ValueError, match=message):
        model(**images, labels=labels)


def test_hidden_states_are_given_on_request_alone(tiny, images):
    model = FusMAEForSemanticSegmentation(tiny())
    assert model(**images).hidden_states is None
    assert len(model(**images, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize(("depth", "stages"), [(1, [1]), (2, [1, 2]), (11, [3, 6, 8, 11]), (23, [6, 12, 17, 23])])
def test_the_dense_head_joins_evenly_spaced_stages(depth, stages):
    assert FusMAEConfig(num_hidden_layers=depth).segmentation_stages == stages


@pytest.mark.parametrize("indices", [[], [0, 3], [2, 1], [-1]])
def test_stages_that_do_not_exist_are_refused(tiny, indices):
    with pytest.raises(Exception, match="`segmentation_indices` must increase"):
        tiny(segmentation_indices=indices)


# --- feature maps --------------------------------------------------------------------------------------------------


def test_maps_are_the_mean_over_the_sensors_present():
    tokens = torch.randn(2, 1 + 2 * 6, 8)
    present = torch.rand(2, 6) < 0.5
    present[0, 2] = False
    fused = fuse_map(tokens, (2, 3), [None, present])
    optical, sar = tokens[:, 1:7], tokens[:, 7:]
    expected = torch.where(present[..., None], (optical + sar) / 2, optical)
    torch.testing.assert_close(fused, expected.reshape(2, 2, 3, 8))
    assert (fuse_map(tokens[:, :7], (2, 3), [present])[0, 0, 2] == 0).all()


def test_the_last_map_of_the_backbone_holds_the_features_of_the_model(tiny, images):
    backbone = FusMAEBackbone(tiny(out_indices=[0, 2])).eval()
    encoded, maps = backbone.fusmae(**images), backbone(**images).feature_maps
    assert [values.shape for values in maps] == [(4, 32, 4, 4)] * 2
    expected = (encoded.optical_hidden_state + encoded.sar_hidden_state) / 2
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), expected)
