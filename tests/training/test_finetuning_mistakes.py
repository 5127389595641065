"""What a user can get wrong in fine-tuning ends with a message that says what to do."""

import re
from dataclasses import replace

import numpy as np
import pytest

from fusmae_hf import FusMAEForImageClassification
from fusmae_hf.vocabulary import TASKS

from .labelled_pairs import write_labelled


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("unlabelled", [], "made-up has no labels"),
        (TASKS[0], [], "allows several tasks"),
        (TASKS[0], ["--task", "detection"], "There is no task 'detection'"),
        (TASKS[0], ["--task", "semantic_segmentation"], "has no labels for semantic_segmentation"),
        (TASKS[0], ["--target", "width"], "no numeric column 'width' to regress on; it has ['height']"),
        (TASKS[0], ["--target", "town"], "no numeric column 'town'"),
        (TASKS[1], ["--task", TASKS[0]], "has 2 labels (['dark', 'grey']), but a single-label problem"),
        (TASKS[0], ["--task", TASKS[0], "--sensors", "lidar"], "There are no sensors 'lidar'"),
        (TASKS[0], ["--task", TASKS[0], "--eval_sensors", "both,radar"], "There are no sensors 'radar'"),
        (TASKS[0], ["--task", TASKS[0], "--label_fraction", "0.01"], "gives none"),
        (TASKS[0], ["--task", TASKS[0], "--label_fraction", "0"], "`label_fraction` must be a share"),
        (TASKS[0], ["--task", TASKS[0], "--from_scratch", "true"], "one of the two"),
        (TASKS[0], ["--task", TASKS[0], "--freeze", "encoder", "--lora_rank", "2"], "contradict each other"),
        (TASKS[0], ["--task", TASKS[0], "--freeze", "head"], "`freeze` must be one of"),
        (TASKS[0], ["--task", TASKS[0], "--layer_decay", "0"], "`layer_decay` must lie in (0, 1]"),
        (TASKS[1], ["--task", TASKS[1], "--label_smoothing_factor", "0.1"], "Label smoothing is for single-label"),
        (
            TASKS[0],
            ["--task", TASKS[0], "--label_smoothing_factor", "0.1", "--focal_gamma", "2"],
            "Label smoothing replaces the model's loss",
        ),
        (
            TASKS[0],
            ["--task", TASKS[0], "--config", '{"hidden_size": 48}'],
            "`config` sets ['hidden_size'], but with `model`",
        ),
        ("regression", ["--class_weights", "balanced"], "are for classes, not for regression"),
        (TASKS[0], ["--task", TASKS[0], "--per_device_train_batch_size", "64"], "fewer than one batch of 64"),
    ],
)
def test_a_mistake_ends_with_a_message(finetune, task, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        finetune(task, *arguments)


def spoil(number, **fields):
    """Changes one pair."""
    return lambda pair: replace(pair, **fields) if pair.id.endswith(f"{number:03d}") else pair


@pytest.mark.parametrize(
    ("task", "change", "arguments", "message"),
    [
        (TASKS[0], lambda pair: replace(pair, labels=None), [], "No pair of the split 'train'"),
        (TASKS[0], spoil(25, labels=None), [], "single_label_classification-025 has no labels"),
        (TASKS[0], spoil(3, extra={"height": None, "town": None}), ["--target", "height"], "-003 has no finite value"),
        (TASKS[2], spoil(4, label_map=None), [], "1 of 24 pairs of the split 'train' have no label map"),
        (TASKS[2], spoil(4, label_map=np.full((16, 16), 5, np.uint8)), ["--class_weights", "balanced"], "from 5 to 5"),
        (TASKS[2], spoil(0, label_map=np.full((16, 16), 5, np.uint8)), [], "hold [5]"),
    ],
)
def test_labels_that_are_missing_or_out_of_range_are_named(tmp_path, finetune, task, change, arguments, message):
    data = write_labelled(tmp_path / "spoilt", task, change)
    named = [] if "--target" in arguments else ["--task", task]
    with pytest.raises(SystemExit, match=re.escape(message)):
        finetune(task, *named, *arguments, data=data)


def test_a_map_that_covers_other_ground_than_the_images_is_refused(make_tuner, tmp_path):
    tuner = make_tuner(tmp_path, "semantic_segmentation")
    batch = tuner.collator(tuner.pairs.__getitems__([0, 1]))
    tuner.model.eval()
    inputs = tuner.model_inputs(batch | {"label_map": batch["label_map"][:, :10]})
    with pytest.raises(ValueError, match="`labels` of 10x16 px cannot cover the same ground as images of 16x16 px"):
        tuner.model(**inputs)


def test_a_class_without_training_labels_is_named(tmp_path, finetune, capsys):
    change = lambda pair: replace(pair, labels=["dark"] if pair.labels == ["grey"] else pair.labels)  # noqa: E731
    data = write_labelled(tmp_path / "empty", TASKS[0], change)
    finetune(TASKS[0], "--task", TASKS[0], data=data)
    assert "No training pair has the classes ['grey']" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"without a training sample: \['grey'\]"):
        finetune(TASKS[0], "--task", TASKS[0], "--class_weights", "balanced", data=data)


def test_a_checkpoint_for_other_classes_is_refused(tmp_path, finetune, checkpoint):
    other = tmp_path / "other"
    labels = {"id2label": {0: "dark", 1: "bright"}, "label2id": {"dark": 0, "bright": 1}}
    FusMAEForImageClassification.from_pretrained(checkpoint, **labels).save_pretrained(other)
    with pytest.raises(SystemExit, match=r"classifies 2 classes \['dark', 'bright'\], but the data has 3"):
        finetune(TASKS[0], "--task", TASKS[0], model=other)


def test_nothing_held_out_is_said_and_trains_all_the_same(tmp_path, finetune, capsys):
    data = write_labelled(tmp_path / "only", TASKS[0], validation=0, test=0)
    folder = finetune(TASKS[0], "--task", TASKS[0], data=data)
    assert "nothing is measured" in capsys.readouterr().out
    assert (folder / "model.safetensors").is_file()
