"""Masking noise belongs to the pair: it depends on (seed, epoch, row, sensor) and on nothing else."""

import numpy as np
import torch

from fusmae_hf.data.collation import PairCollator


def batch_of(rows, epoch=0, side=8, sar_side=8):
    return {
        "optical": torch.zeros(len(rows), 3, side, side, dtype=torch.uint16),
        "sar": torch.zeros(len(rows), 2, sar_side, sar_side),
        "id": [f"pair-{row}" for row in rows],
        "row": torch.tensor(rows),
        "epoch": torch.full((len(rows),), epoch),
    }


def test_noise_has_one_number_a_token_and_everything_else_is_kept():
    given = batch_of([4, 9], side=120, sar_side=60)
    batch = PairCollator(patch_size=12)(given)
    assert (batch["noise"].shape, batch["noise_sar"].shape) == ((2, 100), (2, 25))
    assert batch["noise"].dtype == batch["noise_sar"].dtype == torch.float32
    assert all(batch[key] is value for key, value in given.items())
    assert "noise" not in given


def test_noise_is_the_same_in_any_batch():
    collator = PairCollator(4, seed=3)
    together, alone = collator(batch_of([7, 2, 5])), collator(batch_of([5]))
    assert torch.equal(together["noise"][2], alone["noise"][0])
    assert torch.equal(together["noise_sar"][2], alone["noise_sar"][0])
    assert torch.equal(PairCollator(4, seed=3)(batch_of([5]))["noise"], alone["noise"])


def test_each_sensor_row_epoch_and_seed_has_its_own_noise():
    drawn = set()
    for seed in (0, 1, 2**63):
        for epoch in (0, 1):
            batch = PairCollator(2, seed=seed)(batch_of([0, 1, 2], epoch))
            drawn |= {tuple(noise) for name in ("noise", "noise_sar") for noise in batch[name].tolist()}
    assert len(drawn) == 3 * 2 * 3 * 2


def test_noise_is_uniform_and_uncorrelated_between_neighbours():
    noise = PairCollator(1)(batch_of(list(range(400)), side=16, sar_side=16))["noise"].double().numpy()
    assert noise.min() >= 0
    assert noise.max() < 1
    counts, _ = np.histogram(noise, bins=10, range=(0, 1))
    np.testing.assert_allclose(counts / noise.size, 0.1, atol=0.005)  # five standard deviations
    correlation = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(noise.size)


def test_single_items_are_stacked_first():
    batch = batch_of([7, 2])
    batch["labels"] = [["Pastures"], []]
    items = [{key: values[position] for key, values in batch.items()} for position in range(2)]
    from_items, expected = PairCollator(4)(items), PairCollator(4)(batch)
    assert from_items.keys() == expected.keys()
    assert (from_items["id"], from_items["labels"]) == (expected["id"], expected["labels"])
    for key in ("optical", "sar", "row", "epoch", "noise", "noise_sar"):
        assert torch.equal(from_items[key], expected[key])
        assert from_items[key].dtype == expected[key].dtype


def test_without_masking_there_is_no_noise():
    batch = PairCollator(5, masking=False)(batch_of([0]))
    assert batch.keys() == batch_of([0]).keys()


def test_an_image_that_patches_do_not_fill_has_noise_for_the_padded_one():
    noise = PairCollator(4)(batch_of([0], side=9, sar_side=9))
    assert noise["noise"].shape == noise["noise_sar"].shape == (1, 9)
