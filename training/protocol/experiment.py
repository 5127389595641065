"""The evaluation protocol of the Fus-MAE paper, as far as it is public: probes and fine-tuning with few labels.

Every training is a step of its own, a program in a folder; what is finished is kept when the protocol is run again.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fusmae_hf import FusMAEConfig
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.files.finished import settings_hash
from fusmae_hf.hub.checkpoint_loading import looked_up
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.training.arguments import SourceArguments
from fusmae_hf.training.finetuning.labels import check_labels
from fusmae_hf.training.protocol.steps import METHOD_NAMES, Step, run_step, write_protocol
from fusmae_hf.training.sources import content_of, open_splits
from fusmae_hf.vocabulary import SENSOR_CHOICES

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Protocol:
    """What a protocol measures, and on what data.

    Attributes:
        name: of the sub-command.
        title: of the table.
        task: of `TASKS`.
        metrics: those in the table.
        num_classes: that the data must have; None for any.
        splits: that the data must have.
        config: of fine-tuning, a file in training/configs.
    """

    name: str
    title: str
    task: str
    metrics: tuple[str, ...]
    num_classes: int | None = None
    splits: tuple[str, ...] = ("train", "validation", "test")
    config: str = "finetune-classification.yaml"


_MULTI_LABEL = "multi_label_classification"
_PRECISIONS = ("average_precision_micro", "average_precision_macro")
PROTOCOLS = {
    "bigearthnet": Protocol("bigearthnet", "BigEarthNet, 19 classes", _MULTI_LABEL, _PRECISIONS, num_classes=19),
    "sen12ms": Protocol(
        "sen12ms", "SEN12MS scene classes", "single_label_classification", ("accuracy",), splits=("train", "test")
    ),
    "simulated": Protocol("simulated", "Simulated pairs", _MULTI_LABEL, _PRECISIONS, config="protocol-simulated.yaml"),
}
"""By name of the sub-command."""


@dataclass
class ProtocolArguments:
    """What the user asks for: the arguments of `fusmae protocol`, which says what they mean.

    Raises:
        ValueError: something is out of range, unknown or missing.
    """

    protocol: str
    output_dir: Path
    data: str | None
    model: str | None
    preset: str
    fractions: Sequence[float]
    seeds: int
    seed: int
    sensors: Sequence[str]
    methods: Sequence[str]
    compare_scratch: bool
    bootstrap: int
    simulated_pairs: int
    handed_on: Sequence[str]

    def __post_init__(self) -> None:
        for name, choices in (("sensors", SENSOR_CHOICES), ("methods", METHOD_NAMES)):
            given = getattr(self, name)
            if not given or not set(given) <= set(choices):
                raise ValueError(f"--{name} must be among {','.join(choices)}, not {','.join(given) or 'empty'}.")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"--fractions must be shares above 0, at most 1, not {list(self.fractions)}.")
        for name, least in (("seeds", 1), ("seed", 0), ("bootstrap", 0), ("simulated_pairs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        simulated = self.protocol == "simulated"
        if simulated and self.data is not None:
            raise ValueError("The protocol simulated makes its own pairs: leave --data out.")
        if not simulated and self.data is None:
            raise ValueError(f"Name the shards of {self.protocol} with --data.")
        if not simulated and self.model is None:
            raise ValueError("Name a pretraining checkpoint, a folder or a Hub id, with --model.")

    @property
    def starts(self) -> tuple[str, ...]:
        """What the encoder starts from, in the order of the rows."""
        if self.model is None:
            return ("scratch",)
        return ("checkpoint", "scratch") if self.compare_scratch else ("checkpoint",)


def run_protocol(arguments: ProtocolArguments) -> Path:
    """Run all steps that are not finished; the table is written anew after each.

    Returns:
        Path of the table, `protocol.md`, beside which is `protocol.json`.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: the data is not what the protocol is about, or a folder holds results of other settings.
        StepFailedError: a step failed; what is finished is kept.
    """
    protocol, folder = PROTOCOLS[arguments.protocol], Path(arguments.output_dir)
    if arguments.model:
        with looked_up(arguments.model):  # before pairs are simulated
            FusMAEConfig.from_pretrained(arguments.model)
    source = SourceArguments(data=arguments.data, simulated_pairs=arguments.simulated_pairs)
    splits = open_splits(source, folder / "shards")
    check_data(protocol, splits)
    steps = make_steps(protocol, arguments, splits)
    record = describe(protocol, arguments, splits)
    for number, step in enumerate(steps, 1):
        place = f"[{number}/{len(steps)}] {step.name}"
        if step.scores() is not None:
            print(f"{place}: finished before, kept.", flush=True)
            continue
        print(f"{place}\n  {shlex.join(step.command)}", flush=True)
        step.prepare()
        run_step(step)
        if step.scores() is None:
            raise ValueError(f"The step {step.name} ended without results in {step.folder}.")
        write_protocol(folder, protocol.title, protocol.metrics, record, steps)
    path = write_protocol(folder, protocol.title, protocol.metrics, record, steps)
    print(f"\n{path.read_text()}\nThe table is {path}, and every number in {path.with_suffix('.json')}.")
    return path


def check_data(protocol: Protocol, splits: dict[str, PairDataset]) -> None:
    """Raise a ValueError unless the data is what the protocol is about."""
    info = splits["train"].info
    wrong = f"{info.name} is not the data of the protocol {protocol.name}"
    missing = [split for split in protocol.splits if split not in splits]
    if missing:
        raise ValueError(
            f"{wrong}: it has the splits {sorted(splits)}, but not {missing}. Prepare it with its official splits."
        )
    if protocol.num_classes not in (None, len(info.class_names)):
        raise ValueError(f"{wrong}: it has {len(info.class_names)} scene classes, not {protocol.num_classes}.")
    try:
        task = FineTuningTask.of_pairs(info, protocol.task)
        for pairs in splits.values():
            check_labels(pairs, task)
    except ValueError as error:
        raise ValueError(f"{wrong}, which is {protocol.task.replace('_', ' ')}: {error}") from error


def make_steps(protocol: Protocol, arguments: ProtocolArguments, splits: dict[str, PairDataset]) -> list[Step]:
    """All steps, in the order of the rows of the table."""
    content = {split: content_of(pairs) for split, pairs in splits.items()}
    identity = model_identity(arguments.model)
    return [
        _step(protocol, arguments, splits["train"], method, start, sensors, fraction, [content, identity])
        for method in METHOD_NAMES
        if method in arguments.methods
        for start in arguments.starts
        for sensors in arguments.sensors
        for fraction in sorted(set(arguments.fractions))
    ]


def _step(
    protocol: Protocol,
    arguments: ProtocolArguments,
    train: PairDataset,
    method: str,
    start: str,
    sensors: str,
    fraction: float,
    identity: list[Any],
) -> Step:
    pairs = max(1, round(fraction * len(train)))
    name = f"{method}-{start}-{sensors}-{fraction:g}"
    decisive = {
        "task": protocol.task,
        "sensors": sensors,
        "label_fraction": f"{fraction:g}",
        "seed": str(arguments.seed),
        "seeds": str(arguments.seeds),
        "bootstrap": str(arguments.bootstrap),
        **_start(arguments, start, train),
    }
    config, handed_on = CONFIGS / protocol.config, list(arguments.handed_on)
    if method == "finetune":
        launch = ["accelerate", "launch", "-m", "fusmae_hf.training.run_finetune", str(config)]
        batch = yaml.safe_load(config.read_text())["per_device_train_batch_size"]
        # The whole of a small draw is one batch, unless the user knows better.
        decisive |= {"eval_sensors": sensors, "per_device_train_batch_size": str(min(batch, pairs))}
        places = {"resume_from_checkpoint": "auto"}
        settings = [decisive, yaml.safe_load(config.read_text()), handed_on, *identity]
    else:
        launch = ["python", "-m", "fusmae_hf.training.run_probe"]
        decisive["probes"] = method
        if method == "knn":
            decisive["k"] = str(min(20, pairs))
        places, handed_on = {"features_dir": str(arguments.output_dir / "features")}, []
        settings = [decisive, *identity]
    folder = arguments.output_dir / name
    places |= {"data": train.root, "output_dir": str(folder)}
    if start == "checkpoint":
        places["model"] = str(arguments.model)
    options = [word for key, value in (decisive | places).items() for word in (f"--{key}", value)]
    command = (*launch, *options, *handed_on)
    return Step(name, method, start, sensors, fraction, pairs, folder, command, settings_hash([settings]))


def _start(arguments: ProtocolArguments, start: str, train: PairDataset) -> dict[str, str]:
    """Arguments that describe a model from scratch: of the shape of the checkpoint, or a preset without one."""
    if start == "checkpoint":
        return {}
    if arguments.model is None:
        return {"from_scratch": "true", "preset": arguments.preset}
    config = FusMAEConfig.from_pretrained(arguments.model)
    fields = {name: value for name, value in config.to_diff_dict().items() if name in FusMAEConfig._own_fields()}
    for name in ("optical_bands", "sar_bands"):
        fields[name] = [band for band in getattr(config, name) if band in getattr(train.info, name)]
    for name in ("class_weights", "focal_gamma", "drop_path_rate"):  # of fine-tuning, which sets them itself
        fields.pop(name, None)
    return {"from_scratch": "true", "preset": "base", "config": json.dumps(fields, sort_keys=True)}


def model_identity(model: str | None) -> str | None:
    """Hash of the weights and configuration of a checkpoint folder; the name itself of one on the Hub.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    if model is None or not Path(model).is_dir():
        return model
    files = [*sorted(Path(model).glob("*.safetensors")), *Path(model).glob("*config.json")]
    if not any(path.suffix == ".safetensors" for path in files):
        raise FileNotFoundError(f"{model} holds no weights (*.safetensors): name the folder of a checkpoint.")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def describe(protocol: Protocol, arguments: ProtocolArguments, splits: dict[str, PairDataset]) -> dict[str, Any]:
    """What holds for all rows."""
    info = splits["train"].info
    return {
        "protocol": protocol.name,
        "task": protocol.task,
        "data": {
            "name": info.name,
            "source": info.source,
            "simulated": info.simulated,
            "classes": list(info.class_names),
            "pairs": {split: len(pairs) for split, pairs in splits.items()},
            "content": {split: content_of(pairs) for split, pairs in splits.items()},
        },
        "measured_on": "test",
        "model": os.path.basename(os.path.normpath(arguments.model)) if arguments.model else None,
        "model_identity": model_identity(arguments.model),
        "seeds": list(range(arguments.seed, arguments.seed + arguments.seeds)),
        "sensors": list(arguments.sensors),
        "bootstrap": arguments.bootstrap,
        "finetune_config": {"file": protocol.config, **yaml.safe_load((CONFIGS / protocol.config).read_text())},
        "finetune_arguments": list(arguments.handed_on),
    }
