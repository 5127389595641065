"""Settings of fine-tuning that fit a task, the number of labels and the size of the images, where the user names none.

The files `training/configs/finetune-*.yaml` hold what depends on the task; the number of steps, the window and, for a
fresh model, the patch size follow from the data here.
"""

from pathlib import Path
from typing import Any

import yaml

from fusmae_hf import PRESETS
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.training.finetuning.arguments import FineTuningModelArguments

CONFIGS = Path(__file__).parents[1] / "configs"

MIN_STEPS, MAX_STEPS = 600, 20_000
VIEWS_OF_A_LABEL = 10
"""How often training shows each labelled pair: more views fit the places that were seen, at the cost of others."""

LARGEST_WINDOW = 256
"""Pixels to the side that a dense head trains on at a time."""

FRESH_PATCHES = range(8, 21)
"""Patch sizes in pixels that a fresh model may have, the one nearest to that of its preset first."""


def name_of_recipe(task: FineTuningTask) -> str:
    """The configuration file of a task, without its folder and ending."""
    if task.name == "semantic_segmentation":
        return "finetune-segmentation"
    return "finetune-regression" if task.is_regression else "finetune-classification"


def recipe_for(
    task: FineTuningTask,
    labels: int,
    size: tuple[int, int],
    model: FineTuningModelArguments,
    *,
    patch_size: int | None = None,
    preset: str | None = None,
    windows: bool = True,
) -> tuple[dict[str, Any], str]:
    """Values of arguments that suit the data, and a sentence or two that say which and why.

    Args:
        task: what is learnt.
        labels: labelled training pairs.
        size: (height, width) of their images in pixels.
        model: what the user said about the model.
        patch_size: of the checkpoint; None for a fresh model, whose patch size is chosen.
        preset: of a fresh model, if the user named one.
        windows: whether windows can be cut: label maps lie on the grid of the images.

    Returns:
        Values by argument, and the sentences.
    """
    name = name_of_recipe(task)
    values = dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    values.pop("output_dir", None)
    steps = VIEWS_OF_A_LABEL * labels // values["per_device_train_batch_size"]
    values["max_steps"] = min(max(steps, MIN_STEPS), MAX_STEPS)
    said = [
        f"Recipe {name}: {values['max_steps']:,} steps of {values['per_device_train_batch_size']} pairs, since there "
        f"are {labels:,} labelled pairs; learning rate {values['learning_rate']:g}."
    ]
    side = min(*size, LARGEST_WINDOW) if task.dense else min(size)
    if patch_size is None:
        values["from_scratch"] = True
        preset = preset or values["preset"]
        wanted = model.config_fields.get("patch_size")
        nearest = PRESETS[preset].get("patch_size", 8) if preset in PRESETS else 8
        dividing = [patch for patch in FRESH_PATCHES if side % patch == 0]
        patch_size = wanted or min(dividing or [nearest], key=lambda patch: (abs(patch - nearest), patch))
        values["config"] = {"patch_size": patch_size} | model.config_fields
        said.append(f"No checkpoint is named: a fresh model of preset {preset}, patches of {patch_size} px.")
    else:
        values.pop("preset", None)
    if model.freeze == "encoder" or model.lora_rank:
        values["drop_path_rate"] = 0.0
    if task.dense and windows and max(size) > LARGEST_WINDOW and (window := side // patch_size * patch_size):
        values["window"] = window
        said.append(f"Training sees random windows of {window} px of the {size[0]}x{size[1]} px images.")
    said.append("Arguments that you name win; --help-all lists them.")
    return values, " ".join(said)
