"""Words that several files must spell alike: splits, sensors, units and tasks, each named once."""

from typing import Literal

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_UNITS, SAR_UNITS

__all__ = [
    "IMAGES",
    "OF_SCENES",
    "OPTICAL_UNITS",
    "SAR_UNITS",
    "SENSORS",
    "SENSOR_CHOICES",
    "SPLITS",
    "TASKS",
    "Sensors",
]

SPLITS = ("train", "validation", "test")

SENSORS = ("sar", "optical")

Sensors = Literal["both", "sar", "optical"]
SENSOR_CHOICES: tuple[Sensors, ...] = ("both", "sar", "optical")
"""What a model is shown: both sensors or one of them."""

IMAGES = (*SENSORS, "label_map")
"""Rasters of a pair, as readers name them and as columns of a shard."""

OF_SCENES = ("optical_offset", "sar_units", "optical_units")
"""What may differ from scene to scene: fields of `PairsInfo`, and columns of a shard."""

TASKS = ("single_label_classification", "multi_label_classification", "semantic_segmentation", "regression")
"""What a model is fine-tuned for, in the words of transformers' `problem_type`. Regression is of a quantity for each
pixel, or, with a target column, for each scene."""
