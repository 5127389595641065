import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.modeling.patches_fusmae import interpolate_visible, predict_visible_mean, visible_pixels
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.shards.writing import write_dataset_info, write_shard
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import DataArguments
from fusmae_hf.training.run_pretrain import HELD_OUT_METRICS, PretrainingCollator
from fusmae_hf.training.sources import PlainPairs, open_datasets

from .process_scenarios import plain_pairs


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("reading", ["local", "streaming", "stream of datasets", "rows of datasets"])
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_a_run_cut_in_its_second_epoch_ends_with_the_weights_of_an_uncut_one(
    tmp_path, make_trainer, workers, persistent, reading, shards
):
    """30 pairs in batches of 4, two batches a step: 3 steps an epoch."""
    settings = {
        "train_dataset": plain_pairs(shards, reading.startswith("stream")) if "datasets" in reading else None,
        "augmentation": PairAugmentation(min_crop=0.5, band_jitter=0.1),
        "streaming": reading == "streaming",
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": persistent,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 5,
        "bf16": True,
        "emulate_bf16": True,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    whole.save_model()
    again = make_trainer(tmp_path / "again", **settings)
    with torch.no_grad():  # what the checkpoint holds must not come from the fresh model
        for parameter in again.model.parameters():
            parameter.zero_()
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    again.save_model()
    assert again.state.global_step == whole.state.global_step == 6
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    cut = weights(tmp_path / "whole" / "checkpoint-5")
    assert not all(torch.equal(cut[name], expected[name]) for name in expected)


def test_workers_change_neither_order_nor_masks_nor_weights(tmp_path, make_trainer):
    for workers in (0, 2):
        trainer = make_trainer(tmp_path / str(workers), dataloader_num_workers=workers, num_train_epochs=1)
        trainer.train()
        trainer.save_model()
    first, second = weights(tmp_path / "0"), weights(tmp_path / "2")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_training_pair_is_seen_once_an_epoch_but_for_the_uneven_tail(tmp_path, make_trainer, seed):
    trainer = make_trainer(tmp_path, seed=seed)
    loader = trainer.get_train_dataloader()
    rows = [row for batch in loader for row in batch["row"].tolist()]
    assert len(rows) == len(set(rows)) == 28
    assert rows != sorted(rows)


def test_batches_normalised_on_the_device_equal_those_of_the_processor_alone(tmp_path, make_trainer, shards):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["optical"].dtype == torch.uint16
    assert batch["sar"].dtype == torch.float32
    inputs = trainer.model_inputs(batch)
    pairs = load_pairs(shards, "train")
    rows = [pairs[row] for row in batch["row"].tolist()]
    expected = FusMAEImageProcessor()(
        sar=[row["sar"].numpy() for row in rows], optical=[row["optical"].numpy().astype("float64") for row in rows]
    )
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])
    torch.testing.assert_close(inputs["pixel_values_sar"], expected["pixel_values_sar"])
    assert set(inputs) == {"pixel_values", "pixel_values_sar", "noise", "noise_sar"}  # no missing data: no masks


def test_training_sees_random_views_and_evaluation_the_pairs_themselves(tmp_path, make_trainer):
    plain = make_trainer(tmp_path)
    varied = make_trainer(tmp_path, augmentation=PairAugmentation(seed=1))
    for trainer in (plain, varied):
        trainer.model.train()
    batch = next(iter(varied.get_train_dataloader()))
    seen, still = varied.model_inputs(batch), plain.model_inputs(batch)
    assert not torch.equal(seen["pixel_values"], still["pixel_values"])
    for name in ("pixel_values", "pixel_values_sar"):
        assert torch.equal(seen[name].flatten(1).sort()[0], still[name].flatten(1).sort()[0])
    varied.model.eval()
    assert torch.equal(varied.model_inputs(batch)["pixel_values"], still["pixel_values"])


def test_bands_in_their_own_resolution_reach_the_model_on_one_grid(tmp_path, make_trainer, shards, tmp_path_factory):
    """The same pairs stored both ways give the same inputs; the trainer moves the smaller ones."""
    factors = tuple(OPTICAL_RESOLUTION[band] // 10 for band in OPTICAL_BANDS)
    options = SimulationOptions(image_size=24, pairs_per_place=1)
    inputs = {}
    for kind in ((), factors):
        reader = SimulatedPairs(12, options=options)
        reader.info = dataclasses.replace(reader.info, optical_factors=kind)
        pairs = [reader.read(index) for index in range(4)]
        for pair in pairs:
            for band, factor in zip(pair.optical, factors, strict=True):
                band[:] = band[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)
        folder = tmp_path_factory.mktemp("native")
        shard = write_shard(pairs, reader.info, folder, "data/train-00000-of-00001.parquet")
        write_dataset_info(folder, reader.info, [shard])
        trainer = make_trainer(tmp_path, train_dataset=load_pairs(folder))
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["optical"].ndim == (2 if kind else 4)
        inputs[kind] = trainer.model_inputs(batch)
        mixed = make_trainer(tmp_path, held_out=load_pairs(folder, streaming=True))  # trained on pairs on one grid
        assert mixed.evaluate()["eval_optical_loss"] > 0
        assert load_pairs(folder)[0]["optical"].shape == (12, 24, 24)
    assert inputs[()].keys() == inputs[factors].keys()
    assert all(torch.equal(inputs[()][name], inputs[factors][name]) for name in inputs[()])


def test_pairs_that_stand_in_for_damaged_ones_are_counted_and_no_held_out_figure(tmp_path, make_trainer, shards):
    folder = shutil.copytree(shards, tmp_path / "shards")
    for split, row in (("train", 3), ("validation", 2)):
        path = next(folder.glob(f"data/{split}-00000*"))
        content = bytearray(path.read_bytes())
        pixels = load_pairs(shards, split)[row]["sar"].numpy().tobytes()
        content[content.index(pixels) + 7] ^= 4
        path.write_bytes(content)
    train, held_out = (load_pairs(folder, split, on_bad_files="skip") for split in ("train", "validation"))
    trainer = make_trainer(tmp_path, train_dataset=train, held_out=held_out, num_train_epochs=3, logging_steps=1)
    trainer.train()
    counts = [entry["replaced_pairs"] for entry in trainer.state.log_history if "replaced_pairs" in entry]
    assert counts == sorted(counts)
    assert 1 <= counts[-1] == trainer.replaced_pairs <= 3
    errors = trainer.predict(held_out).predictions
    assert np.isnan(errors[2]).all()
    expected = errors[[0, 1, *range(3, 9)], 0].mean()
    assert trainer.evaluate()["eval_optical_loss"] == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_of_each_sensor_and_logs_them(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, num_train_epochs=12, learning_rate=3e-3, logging_steps=7)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["optical_loss"] + entry["sar_loss"], rel=1e-4)
        assert entry["grad_norm"] > 0
    assert logs[-1]["optical_loss"] < 0.7 * logs[0]["optical_loss"]
    assert logs[-1]["sar_loss"] < 0.7 * logs[0]["sar_loss"]


def test_held_out_losses_are_means_over_the_pairs_whatever_the_batch(tmp_path, make_trainer, shards):
    held_out = {"simulated": load_pairs(shards, "validation")}
    metrics = {}
    for batch_size in (2, 4, 9):
        trainer = make_trainer(tmp_path, held_out=held_out, per_device_eval_batch_size=batch_size)
        trainer.model.config.norm_pix_loss = False
        metrics[batch_size] = trainer.evaluate()
    of_reconstruction = [name for name in HELD_OUT_METRICS if name != "contrastive_loss"]
    for name in [f"eval_simulated_{name}" for name in ("loss", *of_reconstruction)]:
        assert metrics[2][name] == pytest.approx(metrics[9][name], rel=1e-4)
        assert metrics[4][name] == pytest.approx(metrics[9][name], rel=1e-4)
    both = metrics[9]["eval_simulated_optical_loss"] + metrics[9]["eval_simulated_sar_loss"]
    assert metrics[9]["eval_simulated_loss"] == pytest.approx(both, rel=1e-4)


def test_normalised_targets_are_not_compared_with_reconstructions_of_pixels(tmp_path, make_trainer, shards):
    metrics = make_trainer(tmp_path, held_out=load_pairs(shards, "validation")).evaluate()
    assert {"eval_loss", "eval_optical_loss", "eval_sar_loss"} <= set(metrics)
    assert not [name for name in metrics if name.endswith(("interpolation", "visible_mean"))]


def test_datasets_of_different_sensors_are_refused(tmp_path, make_trainer, shards):
    other = load_pairs(shards, "validation")
    info = json.loads((shards / "dataset_info.json").read_text())
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in shards.iterdir():
        (changed / file.name).symlink_to(file)
    (changed / "dataset_info.json").unlink()
    info["info"]["optical_offset"] = 1000.0
    (changed / "dataset_info.json").write_text(json.dumps(info))
    other = load_pairs(changed, "validation", streaming=True)
    with pytest.raises(ValueError, match=r"differ in optical_offset: 0.0 and 1000.0"):
        make_trainer(tmp_path, held_out={"other": other})


def test_labels_do_not_travel_into_pretraining(shards):
    pairs = load_pairs(shards, "train")
    batch = PretrainingCollator(4)(pairs.__getitems__([0, 1]))
    assert {"labels", "label_map"}.isdisjoint(batch)
    assert {"optical", "sar", "noise", "noise_sar", "id"} <= set(batch)


# --- reconstructions without learning ------------------------------------------------------------------------------


def test_visible_pixels_are_those_of_unmasked_patches():
    visible = visible_pixels(torch.tensor([[1, 0, 0, 1]]), 4, 4, 2)
    expected = np.zeros((4, 4), dtype=bool)
    expected[:2, 2:] = expected[2:, :2] = True
    assert np.array_equal(visible[0], expected)


def test_the_visible_mean_is_of_each_band_and_knows_no_hidden_pixel():
    images, visible = torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8) < 0.4
    spoilt = torch.where(visible[:, None], images, 1e6)
    predicted = predict_visible_mean(spoilt, visible)
    for sample in range(2):
        expected = images[sample][:, visible[sample]].mean(dim=1)
        torch.testing.assert_close(predicted[sample, :, 0, 0], expected)


def test_interpolation_recovers_a_smooth_image_and_knows_no_hidden_pixel():
    row = torch.linspace(0, 1, 32)
    images = (row[:, None] + row).expand(1, 1, 32, 32)
    mask = (torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    visible = visible_pixels(mask, 32, 32, 4)
    guess = interpolate_visible(torch.where(visible[:, None], images, 0.0), visible, 4)
    hidden = ~visible[:, None]
    error = (guess - images)[hidden].abs().mean()
    mean_error = (predict_visible_mean(images, visible) - images)[hidden].abs().mean()
    assert error < 0.4 * mean_error
    torch.testing.assert_close(guess, interpolate_visible(torch.where(hidden, 77.0, images), visible, 4))


def test_interpolation_far_from_anything_visible_is_the_visible_mean():
    images, visible = torch.full((1, 1, 64, 64), 3.0), torch.zeros(1, 64, 64, dtype=torch.bool)
    visible[:, :2, :2] = True
    torch.testing.assert_close(interpolate_visible(images, visible, 2), images, rtol=1e-3, atol=1e-3)


def test_training_is_read_by_datasets_where_the_program_is_told_so(tmp_path, shards):
    arguments = DataArguments(data=str(shards), loading="hf", streaming=True)
    train, held_out = open_datasets(arguments, tmp_path)
    assert isinstance(train, PlainPairs)
    assert len(held_out["validation"]) == 9
    for wrong, message in (
        ({"loading": "tf"}, "`loading` must be one of"),
        ({"on_bad_files": "skip"}, "leave `--on_bad_files` out"),
    ):
        with pytest.raises(ValueError, match=message):
            open_datasets(DataArguments(**{"data": str(shards), "loading": "hf"} | wrong), tmp_path)
