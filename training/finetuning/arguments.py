"""Arguments of `run_finetune.py`, besides those it shares with pretraining."""

from dataclasses import dataclass, field
from typing import cast

from fusmae_hf.training.arguments import CheckpointArguments, RunArguments
from fusmae_hf.vocabulary import SENSOR_CHOICES, Sensors


@dataclass
class FineTuningModelArguments(CheckpointArguments):
    """Which model to fine-tune, and how much of it."""

    freeze: str = field(default="none", metadata={"help": "`encoder` lets only the head learn; `none`."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of low-rank adapters in the attention; 0 for none."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of adapters; twice the rank if left out."})
    lora_save: str = field(
        default="merged", metadata={"help": "`merged` into the weights of a whole checkpoint, or `adapter` alone."}
    )
    drop_path_rate: float = field(default=0.0, metadata={"help": "Stochastic depth of the last layer; 0 for none."})
    focal_gamma: float = field(default=0.0, metadata={"help": "Exponent of the focal loss; 0 for none."})
    class_weights: str = field(
        default="none", metadata={"help": "`balanced` weighs classes by their rarity in the training labels; `none`."}
    )

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

    task: str | None = field(
        default=None,
        metadata={
            "help": "single_label_classification, multi_label_classification, semantic_segmentation or regression; "
            "may be left out where the data allows one alone."
        },
    )
    target: str | None = field(
        default=None, metadata={"help": "Numeric extra column of the shards, to regress on: a quantity of each scene."}
    )
    sensors: str = field(default="both", metadata={"help": "Sensors that training sees: both, sar or optical."})
    eval_sensors: str | None = field(
        default=None,
        metadata={
            "help": "Sensors that the final evaluation sees, separated by commas: both,sar,optical (all three where "
            "training sees both, else the one it sees)."
        },
    )
    label_fraction: float = field(default=1.0, metadata={"help": "Share of the training labels to use, such as 0.01."})
    label_seed: int | None = field(
        default=None, metadata={"help": "Seed of that draw; the seed of the run where left out."}
    )
    threshold: float = field(default=0.5, metadata={"help": "Probability above which a class is predicted, for F1."})
    num_pictures: int = field(default=4, metadata={"help": "Pairs in the picture of segmented maps."})
    save_maps: bool = field(default=False, metadata={"help": "Write each predicted map of the test split as PNG."})

    def __post_init__(self) -> None:
        for name in (self.sensors, *self.sensors_to_evaluate):
            if name not in SENSOR_CHOICES:
                raise ValueError(f"There are no sensors {name!r}: choose from {SENSOR_CHOICES}.")
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"`label_fraction` must be a share above 0, at most 1, not {self.label_fraction}.")

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
    """transformers' TrainingArguments with the defaults of fine-tuning a masked autoencoder (He et al., 2022)."""

    output_dir: str | None = field(default="outputs/finetune", metadata={"help": "Where everything is written."})
    base_learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Learning rate for a global batch of 256 pairs; the rate used is in proportion to the batch."
        },
    )
    layer_decay: float = field(
        default=0.75, metadata={"help": "Learning rate of a layer, as a share of that of the next; 1 for one rate."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after so many evaluations without a better one; 0 for never."}
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint, not the last."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep besides the best."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume the patience of early stopping, too."}
    )
    seeds: int = field(
        default=1, metadata={"help": "Train so many times, with seeds from `seed` on, each in a folder of its own."}
    )
    bootstrap: int = field(
        default=0,
        metadata={"help": "Resamples of the test pairs for an interval of each main metric; 0 for none."},
    )

    def __post_init__(self) -> None:
        self.metric_is_given = self.metric_for_best_model is not None
        if self.seeds < 1:
            raise ValueError(f"`seeds` must be at least 1, not {self.seeds}.")
        if self.bootstrap < 0:
            raise ValueError(f"`bootstrap` must be a number of resamples, or 0 for none, not {self.bootstrap}.")
        super().__post_init__()

    def choose_best_by(self, metric: str, held_out: bool) -> None:
        """Choose the best checkpoint by `metric` unless the user named another; by none where nothing is held out."""
        if not held_out:
            self.eval_strategy, self.load_best_model_at_end, self.early_stopping_patience = "no", False, 0
            return
        if not self.metric_is_given:
            self.metric_for_best_model = metric
            self.greater_is_better = metric != "rmse"
