import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEModel


@pytest.fixture
def noise() -> dict[str, torch.Tensor]:
    return {"noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)}


def test_the_first_samples_lose_optical_and_the_last_lose_sar(tiny):
    model = FusMAEForPreTraining(tiny(modality_dropout={"optical": 0.25, "sar": 0.5}))
    assert model.dropout_groups(8) == [
        (slice(0, 2), False, True),
        (slice(2, 4), True, True),
        (slice(4, 8), True, False),
    ]
    assert model.dropout_groups(2) == [(slice(0, 1), True, True), (slice(1, 2), True, False)]


@pytest.mark.parametrize("fusion", ["query", "latent", "none"])
def test_a_hidden_sensor_never_reaches_the_encoder_and_is_a_target_whole(tiny, images, noise, fusion):
    model = FusMAEForPreTraining(tiny(modality_dropout=0.25, feature_fusion=fusion)).train()
    outputs = model(**images, **noise)
    assert outputs.mask.sum(dim=1).tolist() == [16, 12, 12, 12]
    assert outputs.mask_sar.sum(dim=1).tolist() == [12, 12, 12, 16]
    changed = {name: values.clone() for name, values in images.items()}
    changed["pixel_values"][0] *= -1
    changed["pixel_values_sar"][3] *= -1
    again = model(**changed, **noise)
    assert torch.equal(again.logits, outputs.logits)
    assert torch.equal(again.logits_sar, outputs.logits_sar)
    assert again.optical_loss != outputs.optical_loss
    assert again.sar_loss != outputs.sar_loss


def test_a_sample_with_a_hidden_sensor_is_encoded_like_the_other_sensor_alone(tiny, images, noise):
    model = FusMAEForPreTraining(tiny(modality_dropout=0.25)).train()
    outputs = model(**images, **noise)
    alone = model(pixel_values_sar=images["pixel_values_sar"], noise_sar=noise["noise_sar"])
    torch.testing.assert_close(outputs.logits_sar[0], alone.logits_sar[0], rtol=1e-4, atol=1e-5)
    whole = model.eval()(**images, **noise)
    torch.testing.assert_close(outputs.logits[1:3], whole.logits[1:3], rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_in_evaluation_or_where_one_sensor_is_given(tiny, images, noise):
    model = FusMAEForPreTraining(tiny(modality_dropout=0.5)).eval()
    assert model(**images, **noise).mask.sum(dim=1).tolist() == [12] * 4
    assert model.train()(pixel_values=images["pixel_values"]).mask.sum(dim=1).tolist() == [12] * 4


def test_a_sample_left_without_any_sensor_is_no_target(tiny, images, noise):
    model = FusMAEForPreTraining(tiny(modality_dropout={"optical": 0.25, "sar": 0.0})).train()
    outputs = model(**images, **noise, sar_available=torch.tensor([False, True, True, True]))
    errors = model.sensor_error(outputs.logits, images["pixel_values"], outputs.mask)
    torch.testing.assert_close(outputs.optical_loss, errors[1:].sum() / 4)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_share_that_hides_no_sample_is_told(tiny, images, caplog):
    with caplog.at_level(logging.WARNING):
        FusMAEForPreTraining(tiny(modality_dropout=0.2)).train()(**images)
    assert "hides no sample of a batch of 4" in caplog.text


# --- cost ----------------------------------------------------------------------------------------------------------


def flops(model: torch.nn.Module, **inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_one_sensor_alone_costs_about_half(name):
    with torch.device("meta"):
        model = FusMAEModel(FusMAEConfig.from_preset(name)).eval()
        optical, sar = torch.empty(1, 12, 120, 120), torch.empty(1, 2, 120, 120)
    both = flops(model, pixel_values=optical, pixel_values_sar=sar)
    for alone in ({"pixel_values": optical}, {"pixel_values_sar": sar}):
        assert 0.35 < flops(model, **alone) / both < 0.5


def test_dropout_saves_encoder_work(tiny):
    config = FusMAEConfig.from_preset("tiny", modality_dropout=0.5, mask_ratio=0.5)
    with torch.device("meta"):
        model = FusMAEForPreTraining(config)
        images = {"pixel_values": torch.empty(4, 12, 120, 120), "pixel_values_sar": torch.empty(4, 2, 120, 120)}
    counts = {}
    for training in (True, False):
        model.train(training)
        with FlopCounterMode(display=False, depth=2) as counter, torch.no_grad():
            model(**images)
        counts[training] = sum(counter.get_flop_counts()["FusMAEForPreTraining.fusmae"].values())
    assert 0.35 < counts[True] / counts[False] < 0.5
