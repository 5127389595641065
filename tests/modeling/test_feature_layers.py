import pytest
import torch

from fusmae_hf import FusMAEBackbone, FusMAEForImageClassification, FusMAEModel


@pytest.fixture
def several(tiny) -> FusMAEModel:
    return FusMAEModel(tiny(feature_layers=[0, 2])).eval()


def test_without_feature_layers_outputs_are_as_they_were(tiny, images):
    outputs = FusMAEModel(tiny())(**images)
    assert outputs.feature_output is None
    assert list(outputs) == ["last_hidden_state", "sar_hidden_state", "optical_hidden_state", "pooler_output"]


def test_features_are_the_normed_tokens_of_the_depths_side_by_side(several, images):
    with torch.no_grad():
        outputs = several(**images, output_hidden_states=True)
        tokens = torch.cat([several.layernorm(outputs.hidden_states[depth]) for depth in (0, 2)], dim=-1)
    torch.testing.assert_close(outputs.feature_hidden_state, tokens)
    torch.testing.assert_close(outputs.feature_output, tokens[:, 1:].mean(dim=1))
    assert outputs.feature_output.shape == (4, several.config.feature_size)
    assert torch.equal(outputs.feature_output[:, 32:], outputs.pooler_output)


def test_a_sample_of_a_mixed_batch_has_the_features_that_it_has_alone(several, images):
    with torch.no_grad():
        mixed = several(**images, sar_available=torch.tensor([True, False, True, True]))
        alone = several(pixel_values=images["pixel_values"][1:2])
    torch.testing.assert_close(mixed.feature_output[1], alone.feature_output[0], rtol=1e-4, atol=1e-5)
    assert (mixed.feature_hidden_state[1, 17:] == 0).all()


def test_a_classifier_reads_them_and_a_backbone_minds_them_not(tiny, images):
    config = tiny(feature_layers=[0, 1, 2], num_labels=3)
    model = FusMAEForImageClassification(config)
    assert model.classifier.in_features == 3 * 32
    features = model.fusmae(**images).feature_output
    torch.testing.assert_close(model(**images).logits, model.classifier(model.pooled_layernorm(features)))
    assert FusMAEBackbone(config)(**images).feature_maps[0].shape == (4, 32, 4, 4)


def test_another_depth_at_loading_forgets_the_layers_of_the_old_one(several, tmp_path):
    several.save_pretrained(tmp_path)
    assert FusMAEModel.from_pretrained(tmp_path).config.feature_layers == [0, 2]
    assert FusMAEModel.from_pretrained(tmp_path, num_hidden_layers=1).config.feature_layers is None
    assert FusMAEModel.from_pretrained(tmp_path, feature_layers=[1]).config.feature_size == 32


def test_features_compile_and_export(several, images):
    given = (images["pixel_values"], images["pixel_values_sar"])
    exported = torch.export.export(several, given).module()(*given)
    torch.testing.assert_close(exported["feature_output"], several(*given).feature_output, rtol=1e-4, atol=1e-5)
