import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForImageClassification, FusMAEForPreTraining
from fusmae_hf.training.arguments import spell_out_attention


@pytest.mark.parametrize(
    ("model_class", "device", "size", "sensors", "expected"),
    [
        (FusMAEForPreTraining, "cpu", (120, 120), "both", "eager"),
        (FusMAEForPreTraining, "cpu", (256, 256), "both", "sdpa"),
        (FusMAEForPreTraining, "cuda", (120, 120), "both", "sdpa"),
        (FusMAEForImageClassification, "cpu", (120, 120), "both", "sdpa"),  # nothing is masked: 451 tokens
        (FusMAEForImageClassification, "cpu", (120, 120), "sar", "eager"),
    ],
)
def test_attention_is_spelt_out_on_the_cpu_where_sequences_are_short(model_class, device, size, sensors, expected):
    with torch.device("meta"):
        model = model_class._from_config(FusMAEConfig.from_preset("tiny"), attn_implementation="sdpa")
    spell_out_attention(model, device, size, sensors)
    assert {module.config._attn_implementation for module in (model, model.base_model)} == {expected}
