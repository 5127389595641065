import json
import logging

import pytest
from transformers import AutoConfig

from fusmae_hf import PRESETS, FusMAEConfig, FusMAEModel


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_heads_of_64_channels_and_the_usual_depth_with_the_fusion_layer(name):
    config = FusMAEConfig.from_preset(name)
    nano = name == "nano"
    assert config.hidden_size // config.num_attention_heads == (32 if nano else 64)
    assert config.num_hidden_layers + 1 == (4 if nano else 24 if name == "large" else 12)
    assert config.num_patches == (64 if nano else 225)


def test_a_preset_takes_other_fields_and_an_unknown_one_is_refused():
    assert FusMAEConfig.from_preset("tiny", mask_ratio=0.6).mask_ratio == 0.6
    with pytest.raises(
        ValueError, match=r"Unknown preset 'huge'; known: \['nano', 'tiny', 'small', 'base', 'large'\]"
    ):
        FusMAEConfig.from_preset("huge")


def test_a_misspelt_field_is_refused_with_the_field_that_was_meant():
    with pytest.raises(ValueError, match=r"no field `mask_ration`.*Did you mean `mask_ratio`"):
        FusMAEConfig(mask_ration=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.2}, r"must lie in \[0, 1\], not 1.2"),
        ({"mask_ratio": 1}, "hides every patch of both sensors"),
        ({"mask_ratio": {"sar": 0.5}}, "keys 'optical' and 'sar'"),
        ({"mask_ratio": 0.4, "mask_strategy": "complementary"}, "show 1.20 of the places"),
        ({"mask_strategy": "block"}, "expected one of"),
        ({"feature_fusion": "early"}, "expected one of"),
        ({"num_attention_heads": 5}, "must divide its width"),
        ({"decoder_hidden_size": 250, "decoder_num_attention_heads": 10}, "multiple of 4"),
        ({"patch_size": 7}, "120x120 px is not a multiple"),
        ({"optical_bands": []}, "`optical_bands` is empty"),
        ({"sar_bands": ["VV", "VV"]}, "repeats a name"),
        ({"sar_loss_weight": -1}, "must not be negative"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"gsd": 0}, "positive distance"),
        ({"modality_dropout": 0.6}, "nor exceed 1 for both"),
        ({"modality_dropout": {"optical": 0.5}}, "keys 'optical' and 'sar'"),
        ({"modality_dropout": 0.1, "mask_ratio": {"optical": 0.5, "sar": 1}}, "nothing would be visible"),
        ({"hidden_size": "768"}, "hidden_size"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        FusMAEConfig(**fields)


def test_saved_and_loaded_configurations_are_equal(tmp_path):
    config = FusMAEConfig.from_preset(
        "tiny", optical_bands=["B04", "B03"], mask_ratio={"optical": 0.9, "sar": 0.5}, image_size=(64, 96)
    )
    config.save_pretrained(tmp_path)
    assert FusMAEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FusMAEConfig)


def test_fields_replaced_while_loading_are_validated(tmp_path):
    FusMAEConfig.from_preset("tiny").save_pretrained(tmp_path)
    assert FusMAEConfig.from_pretrained(tmp_path, mask_ratio=0.9).mask_ratio == 0.9
    with pytest.raises(Exception, match="must lie in"):
        FusMAEConfig.from_pretrained(tmp_path, mask_ratio=2.0)


def test_a_saved_key_from_another_version_is_kept_with_a_warning(tmp_path, caplog):
    FusMAEConfig.from_preset("tiny").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "a_newer_field": 3}))
    with caplog.at_level(logging.WARNING):
        config = FusMAEConfig.from_pretrained(tmp_path)
    assert config.a_newer_field == 3
    assert "['a_newer_field']" in caplog.text


def test_the_whole_auto_map_is_saved_with_a_model(tmp_path, tiny):
    FusMAEModel(tiny()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForPreTraining", "AutoImageProcessor"} <= set(auto_map)
    for reference in auto_map.values():
        module, _ = reference.split(".")
        if module != "image_processing_fusmae":  # saved by the processor
            assert (tmp_path / f"{module}.py").is_file()
