import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEModel
from fusmae_hf.flops import inference_flops, pretraining_flops

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 28,
    "optical_bands": ["B02", "B03", "B08"],
    "sar_bands": ["VV", "VH"],
    "image_size": [24, 32],
    "patch_size": 4,
    "mask_ratio": {"optical": 0.7, "sar": 0.4},
}
BATCH_SIZE = 8
SENSORS = ["both", "optical", "sar"]


def counted(model_class, fields, sensors="both", backward=False):
    """FLOPs of a pair as torch counts them while they are done, with attention spelt out in matrix products."""
    config = FusMAEConfig(**SMALL | fields)
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation="eager")
        images = {
            "pixel_values": torch.empty(BATCH_SIZE, 3, 24, 32) if sensors != "sar" else None,
            "pixel_values_sar": torch.empty(BATCH_SIZE, 2, 24, 32) if sensors != "optical" else None,
        }
    with FlopCounterMode(display=False) as counter:
        outputs = model.train()(**images)
        if backward:
            outputs.loss.backward()
    return counter.get_total_flops() / BATCH_SIZE, config


@pytest.mark.parametrize("sensors", SENSORS)
@pytest.mark.parametrize("early_fusion", ["cross_attention", "none"])
def test_flops_of_feature_extraction_are_those_that_torch_counts(sensors, early_fusion):
    flops, config = counted(FusMAEModel, {"early_fusion": early_fusion}, sensors)
    assert inference_flops(config, 24, 32, sensors) == flops


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_context": "all"},
        {"feature_fusion": "latent"},
        {"feature_fusion": "none"},
        {"early_fusion": "none"},
        {"decoder_num_hidden_layers": 0},
        {"mask_ratio": {"optical": 1, "sar": 0.5}},
        {"mask_ratio": 0},
        {"mask_strategy": "consistent"},
        {"mask_ratio": 0.75, "mask_strategy": "complementary"},
    ],
    ids=str,
)
def test_flops_of_pretraining_are_those_that_torch_counts(fields, backward):
    flops, config = counted(FusMAEForPreTraining, fields, backward=backward)
    assert pretraining_flops(config, 24, 32, backward=backward) == flops


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("sensors", SENSORS)
@pytest.mark.parametrize("feature_fusion", ["query", "latent"])
@pytest.mark.parametrize("decoder_context", ["other", "all"])
def test_flops_of_pretraining_on_one_sensor_alone(decoder_context, feature_fusion, sensors, backward):
    fields = {"feature_fusion": feature_fusion, "decoder_context": decoder_context, "modality_dropout": 0.25}
    flops, config = counted(FusMAEForPreTraining, fields, sensors, backward)
    assert pretraining_flops(config, 24, 32, sensors=sensors, backward=backward) == pytest.approx(flops, rel=1e-12)


def test_modality_dropout_hides_whole_pairs_of_a_batch():
    flops, config = counted(FusMAEForPreTraining, {"modality_dropout": {"optical": 0.2, "sar": 0.3}}, backward=True)
    assert pretraining_flops(config, 24, 32, batch_size=BATCH_SIZE) == pytest.approx(flops, rel=1e-12)
    assert pretraining_flops(config, 24, 32) < flops  # of 8 pairs, 1 and 2 lose a sensor, not 1.6 and 2.4


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("sensors", SENSORS)
@pytest.mark.parametrize("fields", [{}, {"early_fusion": "none"}, {"modality_dropout": 0.25}], ids=str)
def test_flops_of_the_contrastive_loss_are_those_that_torch_counts(fields, sensors, backward):
    fields = fields | {"contrastive_loss_weight": 0.1, "contrastive_projection_size": 8}
    flops, config = counted(FusMAEForPreTraining, fields, sensors, backward)
    found = pretraining_flops(config, 24, 32, sensors=sensors, batch_size=BATCH_SIZE, backward=backward)
    assert found == pytest.approx(flops, rel=1e-12)


def test_flops_grow_with_the_batch_in_proportion_and_faster_than_the_image():
    config = FusMAEConfig.from_preset("tiny")
    one = pretraining_flops(config, 120, 120)
    assert one == pretraining_flops(config, 120, 120, batch_size=64)
    assert pretraining_flops(config, 240, 240) > 4 * one
