"""Arguments of `run_finetune.py` and `run_probe.py`, besides those they share with pretraining."""

import os
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from fusmae_hf.evaluation.features import Pooling
from fusmae_hf.training.arguments import CheckpointArguments, RunArguments
from fusmae_hf.vocabulary import SENSOR_CHOICES, Sensors


def argument(default: Any, description: str) -> Any:
    """A field that stands in `--help` with its description."""
    return field(default=default, metadata={"help": description})


@dataclass
class FineTuningModelArguments(CheckpointArguments):
    """Which model to fine-tune, and how much of it."""

    freeze: str = argument("none", "`encoder` lets only the head learn; `none`.")
    lora_rank: int = argument(0, "Rank of low-rank adapters in the attention; 0 for none.")
    lora_alpha: int | None = argument(None, "Scale of adapters; twice the rank if left out.")
    lora_save: str = argument("merged", "`merged` into the weights of a whole checkpoint, or `adapter` alone.")
    drop_path_rate: float = argument(0.0, "Stochastic depth of the last layer; 0 for none.")
    focal_gamma: float = argument(0.0, "Exponent of the focal loss; 0 for none.")
    class_weights: str = argument("none", "`balanced` weighs classes by their rarity in the training labels; `none`.")

    def __post_init__(self) -> None:
        choices = {"freeze": ("none", "encoder"), "lora_save": ("merged", "adapter")}
        for name, allowed in {**choices, "class_weights": ("none", "balanced")}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, not {getattr(self, name)!r}.")
        if self.freeze == "encoder" and self.lora_rank:
            raise ValueError("`freeze` and `lora_rank` contradict each other: adapters are part of the encoder.")


@dataclass
class TaskArguments:
    """What is learnt, from which sensors and how many labels, and what is measured."""

    task: str | None = argument(
        None,
        "single_label_classification, multi_label_classification, semantic_segmentation or regression; "
        "may be left out where the data allows one alone.",
    )
    target: str | None = argument(None, "Numeric extra column of the shards, to regress on: a quantity of each scene.")
    sensors: str = argument("both", "Sensors that training sees: both, sar or optical.")
    eval_sensors: str | None = argument(
        None,
        "Sensors that the final evaluation sees, separated by commas: both,sar,optical (all three where "
        "training sees both, else the one it sees).",
    )
    label_fraction: float = argument(1.0, "Share of the training labels to use, such as 0.01.")
    label_seed: int | None = argument(None, "Seed of that draw; the seed of the run where left out.")
    modality_dropout: float = argument(
        0.0,
        "Share of the training steps in which the model sees SAR alone, and as large a share in which it sees optical "
        "alone, so that it does well when a sensor is missing; at most 0.5.",
    )
    threshold: float = argument(0.5, "Probability above which a class is predicted, for F1.")
    num_pictures: int = argument(4, "Pairs in the picture of segmented maps.")
    save_maps: bool = argument(False, "Write each predicted map of the test split as PNG.")

    def __post_init__(self) -> None:
        for name in (self.sensors, *self.sensors_to_evaluate):
            if name not in SENSOR_CHOICES:
                raise ValueError(f"There are no sensors {name!r}: choose from {SENSOR_CHOICES}.")
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"`label_fraction` must be a share above 0, at most 1, not {self.label_fraction}.")
        if not 0 <= self.modality_dropout <= 0.5:
            raise ValueError(f"`modality_dropout` must lie in [0, 0.5], not {self.modality_dropout}.")
        if self.modality_dropout and self.sensors != "both":
            raise ValueError(
                f"`modality_dropout` hides one of two sensors, but training sees `sensors` {self.sensors} alone: "
                "leave one of the two out."
            )
        if self.num_pictures < 0:
            raise ValueError(f"`num_pictures` must not be negative, not {self.num_pictures}.")

    @property
    def sensors_to_train(self) -> Sensors:
        """Sensors that training sees."""
        return cast(Sensors, self.sensors)

    @property
    def sensors_to_evaluate(self) -> list[Sensors]:
        """Sensors that the final evaluation sees, each once."""
        if self.eval_sensors is None:
            return list(SENSOR_CHOICES) if self.sensors == "both" else [self.sensors_to_train]
        names = (name.strip() for name in self.eval_sensors.split(","))
        return cast(list[Sensors], list(dict.fromkeys(names)))


@dataclass
class FineTuningArguments(RunArguments):
    """transformers' TrainingArguments with the defaults of fine-tuning a masked autoencoder (He et al., 2022).

    A field that changes the outcome of a run also goes into `_FINGERPRINTED` of `run_finetune.py`.
    """

    output_dir: str | None = argument("outputs/finetune", "Where everything is written.")
    base_learning_rate: float = argument(
        1e-3, "Learning rate for a global batch of 256 pairs; the rate used is in proportion to the batch."
    )
    layer_decay: float = argument(0.75, "Learning rate of a layer, as a share of that of the next; 1 for one rate.")
    early_stopping_patience: int = argument(0, "Stop after so many evaluations without a better one; 0 for never.")
    load_best_model_at_end: bool = argument(True, "Keep the best checkpoint, not the last.")
    save_total_limit: int | None = argument(1, "Checkpoints to keep besides the best.")
    restore_callback_states_from_checkpoint: bool = argument(True, "Resume the patience of early stopping, too.")
    seeds: int = argument(1, "Train so many times, with seeds from `seed` on, each in a folder of its own.")
    bootstrap: int = argument(0, "Resamples of the test pairs for an interval of each main metric; 0 for none.")

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, not {self.seeds}.")
        if self.bootstrap < 0:
            raise ValueError(f"`bootstrap` must be a number of resamples, or 0 for none, not {self.bootstrap}.")
        super().__post_init__()


@dataclass
class ProbeArguments:
    """What `run_probe.py` measures, of which features, and how often."""

    output_dir: str = argument("outputs/probe", "Where everything is written.")
    task: str | None = argument(
        None,
        "single_label_classification or multi_label_classification; may be left out where the data allows "
        "one task alone.",
    )
    probes: str = argument("linear,knn", "Probes, separated by commas: linear,knn.")
    features: str = argument(
        "encoder", "`encoder`, or `bands`: mean and deviation of each band, which a model has to beat."
    )
    sensors: str = argument("both,sar,optical", "Sensors, separated by commas, each with a probe of its own.")
    pooling: str = argument(
        "mean",
        "How tokens make one vector, separated by commas: `mean`, `class` (the class token), `sensors` "
        "(the mean of each sensor, joined; for both sensors only).",
    )
    sweep: str = argument(
        "1e-5,1e-4,1e-3,1e-2,1e-1,1,10", "Inverse strengths of regularisation (C) that the linear probe chooses from."
    )
    k: int = argument(20, "Neighbours of the k-NN probe.")
    temperature: float = argument(0.07, "Temperature of their votes.")
    label_fraction: float = argument(1.0, "Share of the training labels to use, such as 0.01.")
    label_seed: int | None = argument(None, "Seed of that draw; the seed of the run where left out.")
    seed: int = argument(42, "Seed of the draw of labels, of folds, and of a fresh encoder.")
    seeds: int = argument(1, "Probe so many times, with seeds from `seed` on, each in a folder of its own.")
    bootstrap: int = argument(0, "Resamples of the test pairs for an interval of each main metric; 0 for none.")
    features_dir: str | None = argument(
        None, "Where features are kept; left out: `features` beside the output folder."
    )
    batch_size: int = argument(64, "Pairs that the encoder is shown at a time.")
    num_workers: int = argument(0, "Processes that read pairs.")
    device: str | None = argument(None, "cpu, cuda, ...; left out: the accelerator if any.")

    def __post_init__(self) -> None:
        chosen = {
            "probes": ("linear", "knn"),
            "sensors": SENSOR_CHOICES,
            "pooling": get_args(Pooling),
            "features": ("encoder", "bands"),
        }
        for name, choices in chosen.items():
            given = self.names(name)
            if not given or not set(given) <= set(choices):
                raise ValueError(
                    f"`{name}` must be among {choices}, separated by commas, not {getattr(self, name)!r}."
                )
        if self.features == "bands" and self.pooling != "mean":
            raise ValueError("`features` bands have no tokens to pool: leave `pooling` out.")
        if not self.views:
            raise ValueError("`pooling` sensors joins the tokens of both sensors: add both to `sensors`.")
        if not self.values or min(self.values) <= 0:
            raise ValueError(f"`sweep` must be positive numbers, separated by commas, not {self.sweep!r}.")
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"`label_fraction` must be a share above 0, at most 1, not {self.label_fraction}.")
        for name, least in (("k", 1), ("seed", 0), ("seeds", 1), ("bootstrap", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, not {getattr(self, name)}.")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"Probes run in one process, but {os.environ['WORLD_SIZE']} were started: use "
                "`python training/run_probe.py` instead of `accelerate launch` or torchrun."
            )

    def names(self, field: str) -> list[str]:
        """The parts of an argument that is a list, each once."""
        return list(dict.fromkeys(name.strip() for name in getattr(self, field).split(",") if name.strip()))

    @property
    def values(self) -> list[float]:
        """Values of the sweep.

        Raises:
            ValueError: something is no number.
        """
        try:
            return [float(value) for value in self.names("sweep")]
        except ValueError as error:
            raise ValueError(f"`sweep` must be numbers, separated by commas, not {self.sweep!r}.") from error

    @property
    def views(self) -> list[tuple[Sensors, Pooling]]:
        """Sensors and pooling of each kind of features."""
        return [
            (cast(Sensors, sensors), cast(Pooling, pooling))
            for sensors in self.names("sensors")
            for pooling in self.names("pooling")
            if sensors == "both" or pooling != "sensors"
        ]
