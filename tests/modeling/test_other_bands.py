import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining

from fusmae_hf import (
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEModel,
)

from .conftest import HEADS


@pytest.fixture
def pretrained(tiny) -> FusMAEForPreTraining:
    return FusMAEForPreTraining(tiny()).eval()


@pytest.fixture
def folder(pretrained, tmp_path):
    pretrained.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("model_class", [*HEADS, AutoModel])
def test_another_order_of_bands_gives_the_same_features(pretrained, folder, images, model_class):
    model = model_class.from_pretrained(folder, optical_bands=["B04", "B02", "B03"], sar_bands=["VH", "VV"])
    assert model.base_model.config.optical_bands == model.config.optical_bands == ["B04", "B02", "B03"]
    got = model.base_model(images["pixel_values"][:, [2, 0, 1]], images["pixel_values_sar"][:, [1, 0]])
    expected = pretrained.fusmae(**images)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [FusMAEForPreTraining, AutoModelForPreTraining])
def test_predictions_follow_their_band_by_name(pretrained, folder, images, model_class):
    model = model_class.from_pretrained(folder, optical_bands=["B04", "B02", "B03"], sar_bands=["VH", "VV"])
    noise = {"noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)}
    got = model(images["pixel_values"][:, [2, 0, 1]], images["pixel_values_sar"][:, [1, 0]], **noise)
    expected = pretrained(**images, **noise)
    for suffix, order in (("", [2, 0, 1]), ("_sar", [1, 0])):
        pixels, reference = (
            m.unpatchify(o[f"logits{suffix}"], 16, 16) for m, o in ((model, got), (pretrained, expected))
        )
        torch.testing.assert_close(pixels, reference[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss)


def test_a_subset_takes_the_weights_of_its_bands(pretrained, folder, images):
    model = FusMAEForPreTraining.from_pretrained(folder, optical_bands=["B04"])
    assert model.fusmae.embeddings.optical_projection.weight.shape == (32, 16)
    others_empty = images["pixel_values"].clone()
    others_empty[:, :2] = 0
    got = model.fusmae(others_empty[:, 2:]).pooler_output
    torch.testing.assert_close(got, pretrained.fusmae(others_empty).pooler_output, rtol=1e-4, atol=1e-5)
    assert model(others_empty[:, 2:]).logits.shape == (4, 16, 16)


@pytest.mark.parametrize("model_class", [FusMAEForPreTraining, AutoModel])
def test_a_band_that_the_checkpoint_never_saw_is_refused_by_name(folder, model_class):
    with pytest.raises(ValueError, match=r"`optical_bands`: the checkpoint never saw \['B8A'\].*new_bands='fresh'"):
        model_class.from_pretrained(folder, optical_bands=["B02", "B8A"])


@pytest.mark.parametrize("model_class", [FusMAEForPreTraining, AutoModelForPreTraining])
def test_fresh_weights_for_a_new_band_are_drawn_on_request(pretrained, folder, model_class):
    model = model_class.from_pretrained(folder, optical_bands=["B8A", "B03"], new_bands="fresh")
    weight = model.fusmae.embeddings.optical_projection.weight.unflatten(1, (2, 16))
    known = pretrained.fusmae.embeddings.optical_projection.weight.unflatten(1, (3, 16))
    assert torch.equal(weight[:, 1], known[:, 1])
    assert weight[:, 0].std() > 0.01
    assert not any(torch.equal(weight[:, 0], known[:, band]) for band in range(3))
    assert model.optical_decoder.predict.out_features == 32


def test_a_sensor_may_have_new_bands_alone(pretrained):
    sar = pretrained.fusmae.embeddings.sar_projection.weight.clone()
    pretrained.select_bands(optical_bands=["P1", "P2"], new_bands="fresh")
    assert pretrained.fusmae.embeddings.optical_projection.weight.shape == (32, 2 * 16)
    assert torch.equal(pretrained.fusmae.embeddings.sar_projection.weight, sar)


def test_a_configuration_with_other_bands_counts_like_bands_given_by_name(folder, pretrained, images, tiny):
    config = tiny(optical_bands=["B03", "B04", "B02"])
    model = FusMAEModel.from_pretrained(folder, config=config)
    got = model(images["pixel_values"][:, [1, 2, 0]], images["pixel_values_sar"]).pooler_output
    torch.testing.assert_close(got, pretrained.fusmae(**images).pooler_output, rtol=1e-4, atol=1e-5)
    assert config.optical_bands == ["B03", "B04", "B02"]


def test_a_model_with_other_bands_is_saved_and_loaded_like_any(folder, tmp_path, images):
    model = FusMAEModel.from_pretrained(folder, optical_bands=["B04", "B02"]).eval()
    model.save_pretrained(tmp_path / "again")
    again = FusMAEModel.from_pretrained(tmp_path / "again")
    assert again.config.optical_bands == ["B04", "B02"]
    assert torch.equal(again(images["pixel_values"][:, :2]).pooler_output, model(images["pixel_values"][:, :2])[-1])


def test_other_options_of_loading_still_hold(folder):
    model, report = FusMAEForImageClassification.from_pretrained(
        folder, optical_bands=["B04"], num_labels=7, dtype=torch.bfloat16, output_loading_info=True
    )
    assert model.config.num_labels == 7
    assert model.fusmae.embeddings.optical_projection.weight.dtype == torch.bfloat16
    assert not [key for key in report["missing_keys"] if key.startswith("fusmae.")]


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({"optical_bands": ["B02", "B02"]}, "repeats a name"),
        ({"optical_bands": []}, "is empty"),
        ({"optical_bands": ["B8A"], "new_bands": "zeros"}, "must be None or 'fresh'"),
    ],
)
def test_bands_that_make_no_sense_leave_the_model_as_it_was(pretrained, bands, message):
    before = copy.deepcopy(pretrained.state_dict())
    with pytest.raises(ValueError, match=message):
        pretrained.select_bands(**bands)
    assert all(torch.equal(value, before[name]) for name, value in pretrained.state_dict().items())


@pytest.mark.parametrize("name", ["tiny", "large"])
def test_presets_take_rgb_alone(name):
    with torch.device("cpu"):
        model = FusMAEModel(FusMAEConfig.from_preset(name, num_hidden_layers=1))
    model.select_bands(optical_bands=["B04", "B03", "B02"])
    assert model(torch.randn(1, 3, 16, 16)).last_hidden_state.shape == (1, 5, model.config.hidden_size)
