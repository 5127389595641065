"""Random views keep the sensors of a pair aligned and belong to (seed, epoch, row) alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusmae_hf.data.augmentation import PairAugmentation

TURNS_ONLY = PairAugmentation(seed=3)


def batch_of(rows, epoch=0):
    return {"row": torch.as_tensor(rows), "epoch": torch.full((len(rows),), epoch)}


def view(augmentation, inputs, rows=None, epoch=0):
    images = [inputs[name] for name in ("pixel_values", "pixel_values_sar") if name in inputs]
    rows = range(len(images[0])) if rows is None else rows
    parameters = augmentation.draw(batch_of(list(rows), epoch), sum(image.shape[1] for image in images))
    return augmentation.apply(inputs, parameters)


def ground(batch=64, size=12):
    """One scene, different in every pixel, as both sensors, masks and a label map see it."""
    scene = torch.arange(size * size, dtype=torch.float32).reshape(size, size).repeat(batch, 1, 1)
    return {
        "pixel_values": torch.stack([scene, -scene], 1),
        "pixel_values_sar": 2 * scene[:, None],
        "pixel_mask": scene % 7 != 0,
        "pixel_mask_sar": scene % 5 != 0,
        "label_map": scene.to(torch.int16),
    }


@given(st.integers(0, 2**40), st.integers(0, 9), st.permutations(range(8)))
def test_a_pair_gets_the_same_view_whatever_the_batch(first_row, epoch, order):
    augmentation = PairAugmentation(min_crop=0.3, band_jitter=0.1, seed=4)
    rows = [first_row + number for number in range(8)]
    whole = augmentation.draw(batch_of(rows, epoch), 14)
    assert torch.equal(augmentation.draw(batch_of([rows[n] for n in order], epoch), 14), whole[list(order)])
    assert torch.equal(augmentation.draw(batch_of(rows[:1], epoch), 14), whole[:1])


def test_another_seed_epoch_or_row_is_another_view():
    def draw(seed, epoch, row):
        return tuple(PairAugmentation(min_crop=0.3, seed=seed).draw(batch_of([row], epoch), 2)[0].tolist())

    assert len({draw(*which) for which in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4


def test_both_sensors_masks_and_label_map_show_the_same_ground():
    inputs = ground()
    seen = view(TURNS_ONLY, inputs)
    scene = seen["pixel_values"][:, 0]
    assert torch.equal(seen["pixel_values"][:, 1], -scene)
    assert torch.equal(seen["pixel_values_sar"][:, 0], 2 * scene)
    assert torch.equal(seen["pixel_mask"], scene % 7 != 0)
    assert torch.equal(seen["pixel_mask_sar"], scene % 5 != 0)
    assert torch.equal(seen["label_map"], scene.to(torch.int16))
    assert {name: value.dtype for name, value in seen.items()} == {name: v.dtype for name, v in inputs.items()}


@pytest.mark.parametrize(
    ("flips", "rotations", "views"),
    [(True, True, 8), (False, True, 4), (True, False, 4), (False, False, 1)],
)
def test_every_turn_and_mirror_image_comes_equally_often_and_is_exact(flips, rotations, views):
    inputs = ground(batch=1600, size=4)
    seen = view(PairAugmentation(flips, rotations), inputs)["pixel_values"][:, 0].numpy()
    counts = Counter(image.tobytes() for image in seen)
    scene = inputs["pixel_values"][0, 0].numpy()
    possible = {
        np.ascontiguousarray(np.rot90(mirrored, turns)).tobytes()
        for mirrored in ([scene, scene[:, ::-1], scene[::-1]] if flips else [scene])
        for turns in (range(4) if rotations else [0])
    } | ({np.ascontiguousarray(scene[::-1, ::-1]).tobytes()} if flips else set())
    assert set(counts) == possible
    assert len(possible) == views
    expected = 1600 / views
    assert all(abs(count - expected) < 5 * np.sqrt(expected) for count in counts.values())


def test_a_crop_shows_a_part_of_the_ground_at_the_drawn_scale():
    """Along a ramp, bilinear interpolation is exact: the slope tells the side, the values tell the place."""
    augmentation = PairAugmentation(flips=False, rotations=False, min_crop=0.25, seed=1)
    size = 64
    rows, columns = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
    inputs = {
        "pixel_values": torch.stack([rows, columns]).repeat(32, 1, 1, 1),
        "label_map": rows.repeat(32, 1, 1).int(),
    }
    parameters = augmentation.draw(batch_of(range(32)), 2)
    seen = augmentation.apply(inputs, parameters)
    side, top, left = parameters[:, 3:6].unbind(1)
    assert (side >= 0.5).all()
    assert (side <= 1).all()
    assert 0.7 < (side**2).mean() * 1.6 < 1.3  # areas are uniform from 0.25 to 1
    inner = slice(2, -2)  # half a pixel from the edge, values are those of the edge
    where = (torch.arange(size) + 0.5)[inner] * side[:, None]
    torch.testing.assert_close(seen["pixel_values"][:, 0, inner, 9], where + size * top[:, None])
    torch.testing.assert_close(seen["pixel_values"][:, 1, 9, inner], where + size * left[:, None])
    assert (seen["label_map"] - seen["pixel_values"][:, 0]).abs().max() <= 1.01


def test_a_pixel_made_from_any_without_data_has_none():
    augmentation = PairAugmentation(min_crop=0.5, seed=2)
    spoilt = torch.zeros(64, 1, 24, 24)
    valid = torch.rand(64, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.05
    spoilt[~valid[:, None]] = 1e6
    seen = view(augmentation, {"pixel_values": spoilt, "pixel_mask": valid})
    assert seen["pixel_values"][:, 0][seen["pixel_mask"]].abs().max() < 0.02 * 1e6
    assert seen["pixel_mask"].float().mean() > 0.6
    whole = view(augmentation, {"pixel_values": spoilt, "pixel_mask": torch.ones_like(valid)})
    assert whole["pixel_mask"].all()


def test_jitter_is_a_gain_and_an_offset_of_each_band_and_off_by_default():
    flat = {"pixel_values": torch.tensor([0.0, 1.0]).expand(4000, 3, 1, 2).clone()}
    still = PairAugmentation(flips=False, rotations=False)
    assert torch.equal(view(still, flat)["pixel_values"], flat["pixel_values"])
    seen = view(PairAugmentation(flips=False, rotations=False, band_jitter=0.2), flat)["pixel_values"][:, :, 0]
    offset, gain = seen[..., 0], seen[..., 1] - seen[..., 0]
    for drawn, mean in ((gain, 1), (offset, 0)):
        torch.testing.assert_close(drawn.mean(0), torch.full((3,), float(mean)), atol=0.02, rtol=0)
        torch.testing.assert_close(drawn.std(0), torch.full((3,), 0.2), atol=0.02, rtol=0)
    both = torch.cat([gain, offset], 1)
    assert (torch.corrcoef(both.T) - torch.eye(6)).abs().max() < 0.08


def test_oblong_patches_can_be_mirrored_but_not_turned():
    oblong = {"pixel_values": torch.rand(8, 1, 6, 9)}
    with pytest.raises(ValueError, match=r"6x9 px cannot be turned.*Switch rotations off"):
        view(TURNS_ONLY, oblong)
    assert view(PairAugmentation(rotations=False), oblong)["pixel_values"].shape == (8, 1, 6, 9)


@pytest.mark.parametrize("options", [{"min_crop": 0}, {"min_crop": 1.2}, {"band_jitter": -1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PairAugmentation(**options)


@pytest.mark.parametrize(("window", "size", "side"), [(1, 8, 8), (4, 8, 8), (4, 10, 8), (1, 40, 12)])
def test_training_sees_random_windows_of_the_size_asked_for(window, size, side):
    inputs = ground()
    seen = view(PairAugmentation(False, False, window=window, window_size=size), inputs)
    assert seen["pixel_values"].shape[-2:] == (side, side)
    assert seen["pixel_values_sar"].shape[-2:] == seen["label_map"].shape[-2:] == (side, side)
    corners = {tuple(corner.flatten().tolist()) for corner in seen["pixel_values"][:, :, 0, 0]}
    assert (len(corners) > 4) == (side < 12)


def test_windows_are_not_cut_from_label_maps_of_another_resolution():
    inputs = ground()
    inputs["label_map"] = inputs["label_map"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    view(PairAugmentation(), inputs)
    with pytest.raises(ValueError, match="cannot be cut from label maps"):
        view(PairAugmentation(window_size=8), inputs)


def test_label_maps_of_any_integer_type_keep_their_values():
    classes = torch.tensor([0, 40_000, 65_535], dtype=torch.int32).repeat(3, 1).to(torch.uint16)
    inputs = {"pixel_values": torch.zeros(16, 1, 3, 3), "label_map": classes.repeat(16, 1, 1)}
    seen = view(PairAugmentation(min_crop=0.5), inputs)["label_map"]
    assert seen.dtype == torch.uint16
    assert set(seen.int().unique().tolist()) <= {0, 40_000, 65_535}
