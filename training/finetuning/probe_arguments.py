"""Arguments of `run_probe.py`, besides data and checkpoint."""

import os
from dataclasses import dataclass, field
from typing import cast

from fusmae_hf.evaluation.features import Pooling
from fusmae_hf.vocabulary import SENSOR_CHOICES, Sensors

PROBES = ("linear", "knn")
POOLINGS = ("mean", "class", "sensors")


@dataclass
class ProbeArguments:
    """What is measured, of which features, and how often."""

    output_dir: str = field(default="outputs/probe", metadata={"help": "Where everything is written."})
    task: str | None = field(
        default=None,
        metadata={
            "help": "single_label_classification or multi_label_classification; may be left out where the data allows "
            "one task alone."
        },
    )
    probes: str = field(default="linear,knn", metadata={"help": "Probes, separated by commas: linear,knn."})
    features: str = field(
        default="encoder",
        metadata={"help": "`encoder`, or `bands`: mean and deviation of each band, which a model has to beat."},
    )
    sensors: str = field(
        default="both,sar,optical", metadata={"help": "Sensors, separated by commas, each with a probe of its own."}
    )
    pooling: str = field(
        default="mean",
        metadata={
            "help": "How tokens make one vector, separated by commas: `mean`, `class` (the class token), `sensors` "
            "(the mean of each sensor, joined; for both sensors only)."
        },
    )
    sweep: str = field(
        default="1e-5,1e-4,1e-3,1e-2,1e-1,1,10",
        metadata={"help": "Inverse strengths of regularisation (C) that the linear probe chooses from."},
    )
    k: int = field(default=20, metadata={"help": "Neighbours of the k-NN probe."})
    temperature: float = field(default=0.07, metadata={"help": "Temperature of their votes."})
    label_fraction: float = field(default=1.0, metadata={"help": "Share of the training labels to use, such as 0.01."})
    label_seed: int | None = field(
        default=None, metadata={"help": "Seed of that draw; the seed of the run where left out."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the draw of labels, of folds, and of a fresh encoder."})
    seeds: int = field(
        default=1, metadata={"help": "Probe so many times, with seeds from `seed` on, each in a folder of its own."}
    )
    bootstrap: int = field(
        default=0,
        metadata={"help": "Resamples of the test pairs for an interval of each main metric; 0 for none."},
    )
    features_dir: str | None = field(
        default=None, metadata={"help": "Where features are kept; left out: `features` beside the output folder."}
    )
    batch_size: int = field(default=64, metadata={"help": "Pairs that the encoder is shown at a time."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read pairs."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; left out: the accelerator if any."})

    def __post_init__(self) -> None:
        chosen = {"probes": PROBES, "sensors": SENSOR_CHOICES, "pooling": POOLINGS, "features": ("encoder", "bands")}
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
