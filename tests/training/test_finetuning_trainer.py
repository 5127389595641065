"""Fine-tuning: every task learns, only what should learn does, and a cut run resumes exactly."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import LabelSmoother

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.finetuning_collation import FineTuningCollator
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.training.finetuning.labels import PairSubset
from fusmae_hf.training.finetuning.models import add_lora, freeze_encoder, output_layer, rescale_output
from fusmae_hf.training.finetuning.results import evaluate_sensors
from fusmae_hf.training.finetuning.trainer import parameter_groups, smoothed_loss
from fusmae_hf.vocabulary import TASKS

from .labelled_pairs import write_labelled

PERSISTENT = {"dataloader_persistent_workers": True}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


# --- tasks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "target"), [*((name, None) for name in TASKS), (TASKS[0], "height")])
def test_every_task_is_learnt_and_measured(tmp_path, make_tuner, labelled, name, target):
    held_out = load_pairs(labelled(name), "train")
    tuner = make_tuner(tmp_path, name, target=target, eval_dataset=held_out, num_train_epochs=12)
    before = tuner.evaluate()
    tuner.train()
    after = tuner.evaluate()
    losses = [entry["loss"] for entry in tuner.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    best = f"eval_{tuner.task.best_metric}"
    assert (after[best] < before[best]) if tuner.task.is_regression else (after[best] > before[best])


def test_a_quantity_is_measured_in_its_units(tmp_path, make_tuner, labelled):
    tuner = make_tuner(tmp_path, "regression")
    output = tuner.predict(load_pairs(labelled("regression"), "test"))
    values = np.stack([pair["label_map"].numpy() for pair in load_pairs(labelled("regression"), "test")])
    number, _, _, _, mean, spread = output.predictions.T
    assert number.sum() == np.isfinite(values).sum()
    assert (mean * number).sum() / number.sum() == pytest.approx(np.nanmean(values))
    assert spread[0] == pytest.approx(np.nanvar(values[0]) * np.isfinite(values[0]).sum())
    assert output.metrics["test_rmse"] > 30  # an untrained head predicts about the mean of 100, 180 and 260


def test_a_rescaled_head_gives_the_quantity_itself(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, "regression")
    inputs = tuner.model_inputs(tuner.collator(tuner.pairs.__getitems__([0, 1])))
    tuner.model.eval()
    before = tuner.model(**inputs).logits
    mean, deviation = tuner.scale
    rescale_output(tuner.model, mean, deviation)
    torch.testing.assert_close(tuner.model(**inputs).logits, before * deviation + mean)


def test_maps_without_data_do_not_count(tmp_path, make_tuner, labelled):
    counts = make_tuner(tmp_path, "semantic_segmentation").predict(
        load_pairs(labelled("semantic_segmentation"), "test")
    )
    assert counts.predictions.shape == (6, 3, 3)
    assert counts.predictions.sum() == 6 * 15 * 16
    assert counts.metrics["test_num_pixels"] == 6 * 15 * 16


def test_label_maps_turn_with_their_images(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, "semantic_segmentation", augmentation=PairAugmentation(seed=2))
    tuner.model.train()
    inputs = tuner.model_inputs(next(iter(tuner.get_train_dataloader())))
    brightness, labels = inputs["pixel_values"].mean(dim=1), inputs["labels"]
    means = torch.stack([brightness[labels == number].mean() for number in range(3)])
    spreads = torch.stack([brightness[labels == number].std() for number in range(3)])
    assert means.diff().min() > 4 * spreads.max()  # classes are told by brightness, whatever the turn
    assert (labels == 255).sum() == 8 * 16


@pytest.mark.parametrize("name", TASKS)
def test_the_plain_collator_gives_what_the_trainer_makes_on_the_device(
    tmp_path, make_tuner, labelled, checkpoint, name
):
    tuner = make_tuner(tmp_path, name)
    pairs = load_pairs(labelled(name), "train")
    collator = FineTuningCollator(FusMAEImageProcessor.from_pretrained(checkpoint), pairs.info, name)
    tuner.model.eval()
    expected = tuner.model_inputs(tuner.collator(pairs.__getitems__([0, 3, 4])))
    if tuner.task.is_regression:
        expected["labels"] = expected["labels"] * tuner.scale[1] + tuner.scale[0]
    got = collator(pairs.__getitems__([0, 3, 4]))
    assert got.keys() == expected.keys()
    for key, values in got.items():
        torch.testing.assert_close(values, expected[key], equal_nan=True)
    listed = collator([pairs[0], pairs[3], pairs[4]])
    torch.testing.assert_close(listed["pixel_values"], got["pixel_values"])


# --- what learns ---------------------------------------------------------------------------------------------------


def test_learning_rates_fall_with_depth_and_norms_have_no_weight_decay(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, layer_decay=0.5, learning_rate=0.8)
    model = tuner.model
    decayed = tuner.get_decay_parameter_names(model)
    groups = parameter_groups(model.named_parameters(), decayed, 1, 0.8, 0.05, 0.5)
    rate = {name: group["lr"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert rate.keys() == dict(model.named_parameters()).keys()
    assert rate["classifier.weight"] == rate["fusmae.layernorm.weight"] == pytest.approx(0.8)
    assert rate["fusmae.layers.0.mlp.up_proj.weight"] == pytest.approx(0.4)
    assert rate["fusmae.fusion.sar_attention.q_proj.weight"] == pytest.approx(0.2)
    assert rate["fusmae.embeddings.optical_projection.weight"] == pytest.approx(0.1)
    assert rate["fusmae.embeddings.class_token.weight"] == pytest.approx(0.1)
    assert decay["classifier.weight"] == 0.05
    assert decay["classifier.bias"] == decay["fusmae.layers.0.layernorm_before.weight"] == 0
    assert groups[0]["lr"] == pytest.approx(0.8)  # the Trainer logs the rate of the first group
    optimizer = tuner.create_optimizer()
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rate)


def test_a_frozen_encoder_does_not_move_and_the_head_does(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, num_train_epochs=1, layer_decay=0.75)
    freeze_encoder(tuner.model)
    before = weights(tuner.model)
    tuner.train()
    assert moved(tuner.model, before) == {name for name in before if not name.startswith("fusmae.")}


def test_a_frozen_encoder_is_not_disturbed_by_stochastic_depth(tmp_path, make_tuner):
    with pytest.raises(ValueError, match="disturbs a frozen encoder"):
        make_tuner(tmp_path, fields={"drop_path_rate": 0.1}, change=freeze_encoder)


@pytest.mark.parametrize("name", ["single_label_classification", "semantic_segmentation"])
def test_only_adapters_and_head_learn_and_merging_changes_no_output(tmp_path, make_tuner, name):
    pytest.importorskip("peft")
    tuner = make_tuner(tmp_path, name, change=lambda model: add_lora(model, 2), num_train_epochs=1, layer_decay=0.9)
    before = weights(tuner.model)
    tuner.train()
    changed = moved(tuner.model, before)
    assert changed
    assert all("lora_" in key or "modules_to_save" in key for key in changed)
    assert {"q_proj", "v_proj"} <= {part for key in changed for part in key.split(".")}
    inputs = tuner.model_inputs(tuner.collator(tuner.pairs.__getitems__([0, 1])))
    tuner.model.eval()
    expected = tuner.model(**inputs).logits
    assert output_layer(tuner.model).weight.requires_grad
    merged = tuner.model.merge_and_unload().eval()
    assert type(merged) is tuner.task.model_class
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "few", "workers", "settings"),
    [
        ("multi_label_classification", True, 0, {}),
        ("multi_label_classification", True, 0, {"change": lambda model: add_lora(model, 2)}),
        ("semantic_segmentation", False, 2, {"gradient_accumulation_steps": 2, "num_train_epochs": 5} | PERSISTENT),
        ("regression", False, 0, {"streaming": True, "bf16": True, "emulate_bf16": True}),
    ],
    ids=["few labels", "adapters", "workers", "streaming"],
)
def test_a_cut_run_ends_with_the_weights_of_an_uncut_one(tmp_path, make_tuner, labelled, name, few, workers, settings):
    """With random views and stochastic depth; cut in the middle of an epoch."""
    settings, file = dict(settings), "adapter_model" if "change" in settings else "model"
    streaming = settings.pop("streaming", False)

    def tuner(folder):
        train = load_pairs(labelled(name), "train", streaming=streaming)
        return make_tuner(
            folder,
            name,
            train_dataset=PairSubset(train, range(1, 22, 2)) if few else train,
            fields={"drop_path_rate": 0.5},
            augmentation=PairAugmentation(min_crop=0.5, band_jitter=0.1),
            layer_decay=0.8,
            per_device_train_batch_size=3 if few else 6,
            save_strategy="steps",
            save_steps=5,
            save_total_limit=None,
            dataloader_num_workers=workers,
            eval_dataset=load_pairs(labelled(name), "validation"),
            eval_strategy="steps",
            eval_steps=2,
            **{"num_train_epochs": 3} | settings,
        )

    whole, again = tuner(tmp_path / "whole"), tuner(tmp_path / "again")
    whole.train()
    whole.save_model()
    with torch.no_grad():  # what the checkpoint holds must not come from the fresh model
        for parameter in again.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    again.save_model()
    assert again.state.global_step == whole.state.global_step > 5
    expected, got = (load_file(tmp_path / folder / f"{file}.safetensors") for folder in ("whole", "again"))
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    cut = load_file(tmp_path / "whole" / "checkpoint-5" / f"{file}.safetensors")
    assert not all(torch.equal(cut[key], expected[key]) for key in expected)


# --- sensors -------------------------------------------------------------------------------------------------------


def test_a_sensor_left_out_of_training_is_never_shown(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, sensors="sar", num_train_epochs=1)
    before = weights(tuner.model)
    tuner.train()
    changed = moved(tuner.model, before)
    assert "fusmae.embeddings.sar_projection.weight" in changed
    assert "fusmae.embeddings.optical_projection.weight" not in changed
    inputs = tuner.model_inputs(next(iter(tuner.get_train_dataloader())))
    assert set(inputs) == {"pixel_values_sar", "labels"}


def test_modality_dropout_shows_each_sensor_alone_in_its_share_of_the_steps(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, "semantic_segmentation")
    tuner.modality_dropout = 0.3
    tuner.model.train()
    shown = []
    for tuner.state.global_step in range(200):
        tuner._place = (tuner.state.global_step, 0)
        shown.append(tuner.sensors_shown)
    assert 40 < shown.count("sar") < 80
    assert 40 < shown.count("optical") < 80
    tuner._place = (7, 0)
    assert tuner.sensors_shown == "both"  # no batch of this step: a trial, an evaluation
    tuner.state.global_step = next(step for step, name in enumerate(shown) if name == "sar")
    tuner._place = (tuner.state.global_step, 0)
    inputs = tuner.model_inputs(tuner.collator(tuner.pairs.__getitems__([0, 1])))
    assert {name for name in inputs if name.startswith("pixel_values")} == {"pixel_values_sar"}
    tuner.model.eval()
    assert tuner.sensors_shown == "both"


def test_one_checkpoint_is_measured_with_each_sensor_alone(tmp_path, make_tuner, labelled):
    tuner = make_tuner(tmp_path)
    pairs = load_pairs(labelled("single_label_classification"), "test")
    results = evaluate_sensors(tuner, pairs, ["both", "sar", "optical"])
    batch = tuner.collator(pairs.__getitems__(range(6)))
    tuner.model.eval()
    inputs = tuner.model_inputs(batch)
    alone = {"both": {}, "sar": {"pixel_values": None}, "optical": {"pixel_values_sar": None}}
    for sensors, absent in alone.items():
        expected = tuner.model(**inputs | absent).logits.softmax(dim=1)
        np.testing.assert_allclose(results[sensors]["predictions"], expected.detach().numpy(), atol=1e-6)
    assert tuner.sensors == "both"
    assert not np.allclose(results["both"]["predictions"], results["sar"]["predictions"])


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_pairs_that_stand_in_for_damaged_ones_do_not_count(tmp_path, make_tuner, name):
    folder = write_labelled(tmp_path / "shards", name)
    path = folder / "data" / "test-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    pixels = load_pairs(folder, "test")[2]["sar"].numpy().tobytes()
    content[content.index(pixels) + 7] ^= 4
    path.write_bytes(content)
    whole = make_tuner(tmp_path / "run", name)
    damaged = evaluate_sensors(whole, load_pairs(folder, "test", on_bad_files="skip"), ["both"])["both"]
    kept = [0, 1, 3, 4, 5]
    expected = whole.metrics.details(damaged["predictions"][kept], damaged["labels"][kept])
    measured = {key: value for key, value in damaged["metrics"].items() if key != "loss"}
    assert measured == pytest.approx(expected) if name == "regression" else measured == expected


# --- labels that do not count ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ignored", "smoothing"),
    [
        ("single_label_classification", -100, 0.0),
        ("single_label_classification", -100, 0.1),
        ("multi_label_classification", -100, 0.0),
        ("semantic_segmentation", 255, 0.0),
        ("regression", float("nan"), 0.0),
    ],
)
def test_a_batch_in_which_no_label_counts_trains_with_the_loss_zero(tmp_path, make_tuner, name, ignored, smoothing):
    tuner = make_tuner(tmp_path, name, label_smoothing_factor=smoothing)
    batch = tuner.collator(tuner.pairs.__getitems__([0, 1]))
    prepared = tuner.prepare_pairs(batch)
    tuner.prepare_pairs = lambda _: prepared | {"labels": torch.full_like(prepared["labels"], ignored)}
    loss = tuner.compute_loss(tuner.model.train(), batch)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in tuner.model.parameters())


def test_the_smoothed_loss_is_that_of_transformers():
    logits, labels = {"logits": torch.randn(6, 3)}, torch.tensor([0, 1, -100, 2, 2, -100])
    expected = LabelSmoother(epsilon=0.2)(logits, labels)
    torch.testing.assert_close(smoothed_loss(0.2, logits, labels), expected)
