"""`predict_residual`: the decoders add to an interpolation of what is visible."""

import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining
from fusmae_hf.modeling.patches_fusmae import interpolate_visible, unpatchify

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 8, "optical_bands": ["B02", "B03", "B04"], "image_size": 32,
}  # fmt: skip


@pytest.fixture
def model() -> FusMAEForPreTraining:
    """A model whose decoders predict zero."""
    torch.manual_seed(0)
    model = FusMAEForPreTraining(FusMAEConfig(**SIZES, norm_pix_loss=False, predict_residual=True)).eval()
    for decoder in (model.optical_decoder, model.sar_decoder):
        torch.nn.init.zeros_(decoder.predict.weight)
        torch.nn.init.zeros_(decoder.predict.bias)
    return model


def test_decoders_that_predict_zero_leave_the_interpolation(model):
    optical, sar = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 32, 32)
    outputs = model(pixel_values=optical, pixel_values_sar=sar)
    for images, logits, mask in ((optical, outputs.logits, outputs.mask), (sar, outputs.logits_sar, outputs.mask_sar)):
        visible = unpatchify((mask == 0).float()[:, :, None].expand(-1, -1, 64), 8, 32, 32)[:, 0] > 0
        expected = interpolate_visible(images, visible, 8)
        torch.testing.assert_close(unpatchify(logits, 8, 32, 32), expected, rtol=1e-5, atol=1e-5)


def test_hidden_pixels_and_those_without_data_are_not_read(model):
    optical, sar = torch.randn(2, 3, 32, 32), torch.randn(2, 2, 32, 32)
    noise = torch.rand(2, 16)
    there = torch.ones(2, 32, 32, dtype=torch.bool)
    there[:, 3:9, 5:17] = False
    given = {"pixel_values_sar": sar, "pixel_mask": there, "noise": noise, "noise_sar": noise.flip(1)}
    first = model(pixel_values=optical, **given)
    hidden = unpatchify(first.mask.float()[:, :, None].expand(-1, -1, 64), 8, 32, 32) > 0
    second = model(pixel_values=torch.where(hidden, float("nan"), optical), **given, return_loss=False)
    torch.testing.assert_close(first.logits, second.logits)
    third = model(pixel_values=torch.where(there[:, None], optical, 77.0), **given, return_loss=False)
    torch.testing.assert_close(first.logits, third.logits)


def test_a_sensor_that_is_hidden_whole_starts_from_the_mean_of_the_training_data(model):
    images = model.reconstruct(pixel_values_sar=torch.randn(1, 2, 32, 32))
    assert (images.pixel_values == 0).all()
    sensors = {"pixel_values": torch.randn(2, 3, 32, 32), "pixel_values_sar": torch.randn(2, 2, 32, 32)}
    outputs = model(**sensors, optical_available=torch.tensor([True, False]))
    assert (outputs.logits[1] == 0).all()
    assert (outputs.logits[0] != 0).any()


def test_residuals_of_normalised_patches_are_refused():
    with pytest.raises(Exception, match="norm_pix_loss=False"):
        FusMAEConfig(predict_residual=True)
