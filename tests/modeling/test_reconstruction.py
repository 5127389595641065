import pytest
import torch

from fusmae_hf import FusMAEForPreTraining
from fusmae_hf.modeling.patches_fusmae import unpatchify

SUFFIXES = ["", "_sar"]


def pixels(mask: torch.Tensor) -> torch.Tensor:
    return unpatchify(mask[:, :, None, None].expand(-1, -1, 1, 16), 4, 16, 16)[:, 0].bool()


@pytest.mark.parametrize("given", SUFFIXES)
def test_a_sensor_that_is_not_given_is_made_of_the_other_one(tiny, images, given):
    model = FusMAEForPreTraining(tiny()).eval()
    other = "_sar" if given == "" else ""
    name = f"pixel_values{given}"
    result = model.reconstruct(**{name: images[name]})
    assert torch.equal(result[name], images[name])
    assert not result[f"reconstructed{given}"].any()
    assert result[f"pixel_values{other}"].shape == images[f"pixel_values{other}"].shape
    assert result[f"reconstructed{other}"].all()
    changed = model.reconstruct(**{name: images[name] + 1})
    assert not torch.allclose(changed[f"pixel_values{other}"], result[f"pixel_values{other}"])


def test_the_reconstruction_of_given_masks_is_that_of_pretraining(tiny, images):
    model = FusMAEForPreTraining(tiny(mask_ratio=0.5, norm_pix_loss=False)).eval()
    outputs = model(**images)
    result = model.reconstruct(**images, mask=outputs.mask, mask_sar=outputs.mask_sar)
    for suffix in SUFFIXES:
        hidden = pixels(outputs[f"mask{suffix}"])
        assert torch.equal(result[f"reconstructed{suffix}"], hidden)
        predicted = model.unpatchify(outputs[f"logits{suffix}"], 16, 16)
        expected = torch.where(hidden[:, None], predicted, images[f"pixel_values{suffix}"])
        torch.testing.assert_close(result[f"pixel_values{suffix}"], expected, rtol=1e-4, atol=1e-5)


def test_hidden_pixels_are_not_looked_at_and_samples_may_hide_different_numbers(tiny, images):
    model = FusMAEForPreTraining(tiny()).eval()
    mask = torch.rand(4, 16) < torch.tensor([0.1, 0.4, 0.7, 0.95])[:, None]
    expected = model.reconstruct(**images, mask=mask)
    images["pixel_values"] = torch.where(pixels(mask)[:, None], float("nan"), images["pixel_values"])
    got = model.reconstruct(**images, mask=mask)
    assert torch.equal(got.pixel_values, expected.pixel_values)
    assert got.pixel_values.isfinite().all()


def test_absent_samples_and_missing_pixels_are_filled(tiny, images):
    model = FusMAEForPreTraining(tiny()).eval()
    valid = torch.rand(4, 16, 16) < 0.8
    available = torch.tensor([True, False, True, True])
    result = model.reconstruct(**images, pixel_mask=valid, sar_available=available)
    assert torch.equal(result.reconstructed, ~valid)
    assert result.reconstructed_sar[1].all()
    assert not result.reconstructed_sar[~torch.tensor([False, True, False, False])].any()


def test_levels_of_unseen_patches_are_assumed_and_said_to_be(tiny, images):
    model = FusMAEForPreTraining(tiny(norm_pix_loss=True)).eval()
    images["pixel_values"] = images["pixel_values"] * 0.1 + 50
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, 5] = True
    plain = model(**images, noise=mask.float(), noise_sar=torch.rand(4, 16))
    assert plain.logits.abs().max() < 10  # levels are no part of the predictions
    result = model.reconstruct(**images, mask=mask)
    assert result.assumed_levels
    hidden = result.pixel_values.permute(1, 0, 2, 3)[:, pixels(mask)]
    assert (hidden - 50).abs().max() < 1
    unseen = model.reconstruct(pixel_values_sar=images["pixel_values_sar"])
    assert unseen.pixel_values.abs().max() < 10  # in units of the training data
    assert not FusMAEForPreTraining(tiny(norm_pix_loss=False)).reconstruct(**images).assumed_levels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None, "pixel_values_sar": None}, "Neither sensor"),
        ({"mask": torch.zeros(4, 9)}, r"`mask` must have shape \(4, 16\)"),
        ({"pixel_values_sar": None, "mask_sar": torch.zeros(4, 16)}, "there are none"),
        ({"pixel_values_sar": None, "mask": torch.eye(4, 16) * 0 + 1}, r"Nothing is visible in sample \[0, 1, 2, 3\]"),
    ],
)
def test_a_reconstruction_of_nothing_is_refused(tiny, images, change, message):
    with pytest.raises(ValueError, match=message):
        FusMAEForPreTraining(tiny()).reconstruct(**images | change)
