"""Arguments of the training scripts: dataclasses filled from a YAML file and the command line."""

import difflib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments

from fusmae_hf import FusMAEForPreTraining
from fusmae_hf.modeling.configuration_fusmae import OBJECTIVES
from fusmae_hf.training.loop.processes import start_on_cpu
from fusmae_hf.training.loop.speed import emulates_bf16
from fusmae_hf.vocabulary import Sensors


def option(default: Any, help: str) -> Any:
    """A field of such a dataclass."""
    return field(default=default, metadata={"help": help})


@dataclass
class SourceArguments:
    """Where the pairs come from."""

    measured: ClassVar[dict[str, tuple[int, float, float]]] = {}
    """Statistics that the opened shards were measured with when they were written."""

    data: str | None = option(
        None,
        "Folder of shards, dataset repository on the Hub, or root of a BigEarthNet v1 or reBEN archive "
        "(prepared first). Left out: simulated pairs, made at once.",
    )
    like: str | None = option(
        None, "Prepared folder from which `data` was made by others, by filtering with `datasets` for example."
    )
    streaming: bool = option(
        False, "Read row groups when they are needed, from a folder or a URL, instead of keeping shards on the disk."
    )
    statistics: str | None = option(
        None,
        "Statistics to normalise with: the name of a dataset that has published ones, or a folder with a "
        "processor (`fusmae stats --processor`); left out: those that the shards name or were measured with.",
    )
    on_bad_files: str = option(
        "error",
        "Files and pairs that cannot be read: `error` stops, `warn` and `skip` go on without the file or "
        "with the next pair, and count it.",
    )
    simulated_pairs: int = option(768, "Pairs to simulate where no `data` is given.")


@dataclass
class PairArguments(SourceArguments):
    """Where the pairs come from, and how training is shown them."""

    flips: bool = option(True, "Mirror training pairs at random.")
    rotations: bool = option(True, "Turn training pairs by quarter turns at random.")
    window: int = option(0, "Side in pixels of the random windows of larger images that training sees; 0 for none.")
    min_crop: float = option(1.0, "Smallest share of the area that random crops keep; 1 for no crops.")
    band_jitter: float = option(0.0, "Random gain and offset of each band, in its standard deviations; 0 for none.")


@dataclass
class DataArguments(PairArguments):
    """Where the pairs of pretraining come from. Without `data`, six real BigEarthNet pairs are held out as well."""

    extra_eval: list[str] = field(
        default_factory=list,
        metadata={"help": "Further folders of shards to evaluate and picture, all their splits held out."},
    )
    loading: str = option(
        "fusmae",
        "What reads the training pairs: `fusmae`, or `hf`, HF Datasets, as a stream where `streaming` is given; "
        "docs/datasets.md says what differs.",
    )


@dataclass
class ModelArguments:
    """Which model to train."""

    preset: str = option("small", "Named size: nano, tiny, small, base or large.")
    config: dict | str | None = option(  # noqa: RUF009
        None, "Fields of FusMAEConfig that differ from the preset; on the command line as JSON."
    )
    model: str | None = option(None, "Pretraining checkpoint (folder or Hub id) to go on from instead of a preset.")
    attn_implementation: str | None = option(None, "eager, sdpa, flex_attention, ...")

    @property
    def config_fields(self) -> dict[str, Any]:
        """`config` as a dictionary.

        Raises:
            ValueError: it is text, as from the command line, but not JSON.
        """
        if not isinstance(self.config, str):
            return self.config or {}
        try:
            return json.loads(self.config)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`config` must be JSON such as '{{\"mask_ratio\": 0.6}}', not {self.config!r}: {error}."
            ) from error


INSTEAD_OF = {"num_train_epochs": "max_steps", "base_learning_rate": "learning_rate"}
"""Arguments that count only while another is left out: to name one undoes the other of a file or a recipe."""

SHORT_SEQUENCE = 256
"""Tokens up to which two matrix products and a softmax train faster on a CPU than PyTorch's fused attention."""


def spell_out_attention(model: PreTrainedModel, device: str, size: tuple[int, int], sensors: Sensors = "both") -> None:
    """Give a model that trains in bfloat16 `eager` attention where that is faster (docs/performance.md): on the CPU,
    where no sequence is longer than `SHORT_SEQUENCE`.

    Args:
        model: of this package.
        device: type of the device that it trains on.
        size: (height, width) of the images in pixels.
        sensors: which of them the model is shown.
    """
    config = model.config
    patches = (size[0] // config.patch_size) * (size[1] // config.patch_size)
    tokens = 1 + (2 if sensors == "both" else 1) * patches
    if isinstance(model, FusMAEForPreTraining):  # the decoders attend over the whole grid of one sensor
        tokens = max(patches, 1 + sum(int(patches * (1 - ratio)) for ratio in config.mask_ratios.values()))
    if device == "cpu" and tokens <= SHORT_SEQUENCE:
        model.set_attn_implementation("eager")


@dataclass
class CheckpointArguments(ModelArguments):
    """Which encoder to measure: that of a checkpoint, or a fresh one."""

    model: str | None = option(None, "Checkpoint to start from: a folder or a Hub id.")
    from_scratch: bool = option(False, "Take a fresh model of `preset` instead.")


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of all runs here."""

    base_learning_rate: float = option(
        1.5e-4, "Learning rate for a global batch of 256 pairs; the rate used is in proportion to the batch."
    )
    learning_rate: float = option(
        0.0, "Learning rate as it is; 0 takes base_learning_rate in proportion to the batch."
    )
    weight_decay: float = option(0.05, "Weight decay; norms and biases have none.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    warmup_steps: float = option(0.05, "Steps of warm-up, or their share if below 1.")
    eval_strategy: str = option("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = option("epoch", "When to write a checkpoint: no, steps or epoch.")
    save_total_limit: int | None = option(3, "Checkpoints to keep.")
    logging_steps: float = option(10, "Log every so many steps.")
    report_to: None | str | list[str] = option(  # noqa: RUF009, RUF036 - HfArgumentParser wants this order
        "tensorboard", "Trackers: tensorboard, wandb, mlflow, ..., or none."
    )
    weights_dtype: str = option(
        "float32",
        "Precision of the weights that learn, in whatever precision a checkpoint stores them: float32 or bfloat16, "
        "whose steps of 1 in 256 lose small updates. What is computed with them is for `bf16` and `fp16` to say.",
    )
    emulate_bf16: bool = option(
        False,
        "Compute in bfloat16 as `bf16` asks even on a CPU that only emulates it, tens of times slower than float32, "
        "which such a CPU takes otherwise.",
    )
    remove_unused_columns: bool = option(False, "Leave False: batches are made whole.")
    logging_nan_inf_filter: bool = option(False, "Leave False: NaN must be seen.")
    ddp_find_unused_parameters: bool | None = option(False, "True where a sensor can be missing from a whole step.")
    ddp_timeout: int = option(
        600,
        "Seconds that a process waits for another before the run ends; while data is prepared there is no such limit.",
    )
    on_nonfinite: str = option(
        "stop",
        "Steps whose loss or gradient is not finite: `stop` ends with a message, `skip` leaves the step "
        "out and counts it.",
    )
    max_nonfinite_steps: int = option(10, "Steps that may be skipped in the whole run before it ends all the same.")
    enable_jit_checkpoint: bool = option(
        True,
        "On SIGTERM or SIGUSR1, finish the step, write a checkpoint and end with exit code 75; False ends at once.",
    )

    def __post_init__(self):
        self.metric_is_given = self.metric_for_best_model is not None
        self.direction_is_given = self.greater_is_better is not None
        if self.weights_dtype not in (kinds := ("float32", "bfloat16")):
            raise ValueError(f"`weights_dtype` must be one of {kinds}, not {self.weights_dtype!r}.")
        if self.on_nonfinite not in (policies := ("stop", "skip")):
            raise ValueError(f"`on_nonfinite` must be one of {policies}, not {self.on_nonfinite!r}.")
        if self.max_nonfinite_steps < 0:
            raise ValueError(f"`max_nonfinite_steps` must not be negative, but is {self.max_nonfinite_steps}.")
        # transformers asks for `use_cpu` before it allows bf16 on a machine without accelerator.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu:
            start_on_cpu(self.ddp_timeout)
            if self.bf16 and not self.emulate_bf16 and emulates_bf16():
                self.bf16 = False
                if os.environ.get("RANK", "0") == "0":
                    print(
                        "This CPU would emulate bf16, many times slower: computing in float32 (--emulate_bf16 true)."
                    )
        super().__post_init__()

    def scale_learning_rate(self) -> None:
        """Set `learning_rate` in proportion to the global batch where it was not given (Goyal et al., 2017)."""
        if not self.learning_rate:
            self.learning_rate = self.base_learning_rate * self.global_batch_size / 256

    def choose_best_by(self, metrics: Sequence[str], smaller: Collection[str] = ()) -> None:
        """Choose the best checkpoint by the metric that the user named, or the first of those there are.

        Args:
            metrics: those that an evaluation gives. None: nothing is held out, and the last checkpoint is kept.
            smaller: those of which less is better, besides losses. A direction that the user gave counts.

        Raises:
            ValueError: there is no such metric; names those there are.
        """
        if not metrics:
            self.eval_strategy, self.load_best_model_at_end = "no", False
            return
        name = str(self.metric_for_best_model).removeprefix("eval_") if self.metric_is_given else metrics[0]
        if name not in metrics:
            raise ValueError(
                f"`metric_for_best_model` is {name!r}, which an evaluation here does not give: choose one of "
                f"{', '.join(metrics)}."
            )
        self.metric_for_best_model = name
        if not self.direction_is_given:
            self.greater_is_better = not name.endswith("loss") and name not in smaller

    def set_precision(self, model: PreTrainedModel) -> None:
        """Bring the weights of a model that learns to `weights_dtype`: a checkpoint may be stored in another."""
        dtype = getattr(torch, self.weights_dtype)
        if any(weight.requires_grad and weight.dtype != dtype for weight in model.parameters()):
            model.to(dtype)

    @property
    def global_batch_size(self) -> int:
        """Pairs in one optimiser step, over all processes and accumulated batches."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps


@dataclass
class PretrainingArguments(RunArguments):
    """The defaults of masked-autoencoder pretraining."""

    output_dir: str | None = option("outputs/pretrain", "Where everything is written.")
    objective: str | None = option(
        None,
        "What is learnt: `fusmae`, the paper's masked reconstruction, or `fusmae_contrastive`, ours, which adds a "
        "contrastive loss between the sensors; left out: that of the checkpoint or of `config`.",
    )
    num_reconstructions: int = option(4, "Held-out pairs in reconstructions.png; 0 for no such picture.")
    adam_beta2: float = option(0.95, "Second beta of AdamW.")

    def __post_init__(self):
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {list(OBJECTIVES)}, not {self.objective!r}.")
        if self.num_reconstructions < 0:
            raise ValueError(f"`num_reconstructions` must not be negative, not {self.num_reconstructions}.")
        super().__post_init__()


def parse_arguments(
    classes: Sequence[Any],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
):
    """Fill dataclasses from `[file.yaml] [--name value ...]`; the command line wins over the file.

    Args:
        classes: dataclasses to fill.
        arguments: the command line; that of the process where None.
        description: for `--help`.
        defaults: values of arguments that neither names, instead of those of the dataclasses.

    Returns:
        One instance of each class.

    Raises:
        SystemExit: a name is unknown or a value does not fit, with a message.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    parser = HfArgumentParser(classes, description=description)
    parser.usage = "%(prog)s [config.yaml] [--name value ...]"
    values = _typed(defaults or {}, parser)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        values |= _read_yaml(Path(arguments.pop(0)), parser)
    undone = {INSTEAD_OF.get(name) for name in named(arguments)}
    parser.set_defaults(**{name: value for name, value in values.items() if name not in undone})
    known = {action.dest for action in parser._actions}
    unknown = [argument for argument in parser.parse_known_args(arguments)[1] if argument.startswith("-")]
    for argument in unknown:
        name = argument.lstrip("-").split("=")[0]
        parser.error(f"there is no argument --{name}.{_did_you_mean(name, known)} See --help-all.")
    return parser.parse_args_into_dataclasses(arguments)


def named(arguments: Sequence[str]) -> set[str]:
    """Names of the arguments that a command line names."""
    return {part[2:].split("=")[0].replace("-", "_") for part in arguments if part.startswith("--")}


def _read_yaml(path: Path, parser: HfArgumentParser) -> dict:
    if not path.is_file():
        shipped = sorted(file.name for file in (Path(__file__).parent / "configs").glob("*.yaml"))
        parser.error(f"there is no configuration file {path}. Those shipped in training/configs are {shipped}.")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        parser.error(f"{path} must hold `name: value` lines, not a {type(values).__name__}.")
    known = {action.dest for action in parser._actions}
    for name in values:
        if name not in known:
            parser.error(f"{path}: there is no argument `{name}`.{_did_you_mean(name, known)}")
    return _typed(values, parser)


def _typed(values: Mapping[str, Any], parser: HfArgumentParser) -> dict[str, Any]:
    # What argparse would convert on the command line it leaves alone in defaults; numbers such as 1e-4 come from YAML
    # as text.
    kinds = {action.dest: action.type for action in parser._actions}
    return {
        name: float(value) if isinstance(value, str) and kinds[name] is float else value
        for name, value in values.items()
    }


def _did_you_mean(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{close[0]}`?" if close else ""
