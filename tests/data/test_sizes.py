"""Images that patches do not fill: padded and marked, or seen through windows that patches fill."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.inputs import fitting_size, image_size, pad_to_patches
from fusmae_hf.data.tasks import FineTuningTask

SIDES = st.integers(1, 40)


def images(height: int, width: int, batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.rand(batch, 3, height, width),
        "pixel_values_sar": torch.rand(batch, 2, height, width),
    }


@given(SIDES, SIDES, st.integers(1, 12), st.booleans())
def test_padding_fills_the_last_patches_and_is_marked(height, width, patch_size, masked):
    inputs = images(height, width) | {"other": torch.ones(2)}
    if masked:
        inputs["pixel_mask"] = torch.rand(2, height, width) < 0.5
    padded = pad_to_patches(inputs, patch_size)
    rows, columns = image_size(padded)
    assert 0 <= rows - height < patch_size
    assert 0 <= columns - width < patch_size
    assert rows % patch_size == columns % patch_size == 0
    if (rows, columns) == (height, width):
        assert padded is inputs
        return
    for name, mask in (("pixel_values", "pixel_mask"), ("pixel_values_sar", "pixel_mask_sar")):
        assert torch.equal(padded[name][..., :height, :width], inputs[name])
        assert torch.equal(padded[mask][:, :height, :width], inputs.get(mask, torch.ones(2, height, width).bool()))
        assert not padded[mask][:, height:].any()
        assert not padded[mask][:, :, width:].any()
    assert padded["other"] is inputs["other"]


def test_padding_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pad_to_patches(images(31, 33), 6)
    said = [record.message for record in caplog.records if "31x33 px are padded to 36x36" in record.message]
    assert len(said) == 1


@given(SIDES, SIDES, st.integers(1, 12))
def test_a_fitting_size_is_the_largest_that_patches_fill(height, width, patch_size):
    for side, fitting in zip((height, width), fitting_size((height, width), patch_size), strict=True):
        assert fitting % patch_size == 0
        assert fitting == patch_size if side < patch_size else 0 <= side - fitting < patch_size


@pytest.mark.parametrize(
    ("height", "width", "seen"), [(14, 14, (12, 12)), (13, 8, (12, 8)), (12, 9, (12, 8)), (3, 9, (3, 8))]
)
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_a_window_shows_the_same_ground_to_sensors_masks_and_labels(height, width, seen, jitter):
    scene = torch.arange(height * width, dtype=torch.float32).reshape(1, height, width).repeat(64, 1, 1)
    inputs = {"pixel_values": scene[:, None], "pixel_values_sar": scene[:, None], "pixel_mask": scene % 7 != 0}
    inputs["label_map"] = scene.to(torch.uint16)
    augmentation = PairAugmentation(False, False, band_jitter=jitter, seed=1, window=4)
    batch = {"row": torch.arange(64), "epoch": torch.zeros(64, dtype=torch.long)}
    parameters = augmentation.draw(batch, 2)
    view = augmentation.apply(inputs, parameters)
    labels = view["label_map"].long()
    assert image_size(view) == seen == tuple(labels.shape[1:])
    assert torch.equal(view["pixel_mask"], labels % 7 != 0)
    assert torch.equal(labels, labels[:, :1, :1] + scene[0, : seen[0], : seen[1]].long())
    starts = {divmod(int(first), width) for first in labels[:, 0, 0]}
    assert starts == {(row, column) for row in range(height - seen[0] + 1) for column in range(width - seen[1] + 1)}
    if not jitter:
        assert torch.equal(view["pixel_values"][:, 0], labels.float())
        assert torch.equal(view["pixel_values_sar"], view["pixel_values"])


def test_a_window_changes_nothing_else_of_a_view():
    batch = {"row": torch.arange(16), "epoch": torch.ones(16, dtype=torch.long)}
    plain, windowed = (PairAugmentation(min_crop=0.5, band_jitter=0.1, window=w).draw(batch, 3) for w in (1, 4))
    assert torch.equal(plain[:, [0, 1, 2, 3, 4, 5, *range(8, 14)]], windowed[:, [0, 1, 2, 3, 4, 5, *range(8, 14)]])


@pytest.mark.parametrize("no_data", [None, 9])
def test_labels_of_padding_do_not_count(no_data):
    classes = FineTuningTask("semantic_segmentation", ("a", "b"), dense=True, no_data=no_data)
    labels = classes.dense_labels(torch.ones(1, 3, 4, dtype=torch.uint8), (3, 4), (5, 6))
    assert labels.shape == (1, 5, 6)
    assert (labels[:, :3, :4] == 1).all()
    assert (labels == classes.ignore_index).sum() == 30 - 12
    quantity = FineTuningTask("regression", ("t/ha",), dense=True, no_data=no_data)
    assert quantity.dense_labels(torch.ones(1, 3, 4), (3, 4), (5, 6)).isnan().sum() == 30 - 12
