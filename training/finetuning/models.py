"""Models to fine-tune: of a checkpoint or from scratch, whole, with a frozen encoder, or with low-rank adapters."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor, FusMAEModel
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.hub.checkpoint_loading import looked_up
from fusmae_hf.training.arguments import CheckpointArguments, SourceArguments
from fusmae_hf.training.finetuning.arguments import FineTuningModelArguments
from fusmae_hf.training.loop.records import fresh_config, fresh_processor
from fusmae_hf.training.sources import take_pixel_size

HEAD_FIELDS = {
    "segmentation_hidden_size",
    "segmentation_detail_size",
    "segmentation_indices",
    "classifier_norm",
    "feature_layers",
}
"""Fields of the configuration that a pretraining checkpoint has no weights for."""

HEADS = {"FusMAEForImageClassification": "classifies", "FusMAEForSemanticSegmentation": "segments into"}


def build_model(
    arguments: FineTuningModelArguments,
    data: SourceArguments,
    task: FineTuningTask,
    info: PairsInfo,
    image_size: tuple[int, int],
    class_weights: list[float] | None = None,
) -> tuple[PreTrainedModel, FusMAEImageProcessor, bool]:
    """A model with the head for a task, its processor, and whether the head comes trained with the checkpoint.

    Where the pairs lack bands of the checkpoint, the model takes those that both have.

    Raises:
        ValueError: neither a checkpoint nor `from_scratch` is given, or both; or the checkpoint has another head.
    """
    fields: dict[str, Any] = task.config_fields | {
        "drop_path_rate": arguments.drop_path_rate,
        "class_weights": class_weights,
        "focal_gamma": arguments.focal_gamma,
    }
    has_head = arguments.model is not None and _has_head(arguments.model, task)
    return *_fresh_or_loaded(task.model_class, arguments, data, info, image_size, fields), has_head


def build_encoder(
    arguments: CheckpointArguments, data: SourceArguments, info: PairsInfo, image_size: tuple[int, int]
) -> tuple[PreTrainedModel, FusMAEImageProcessor]:
    """The encoder of a pretraining or fine-tuned checkpoint, or a fresh one, and its processor.

    Where the pairs lack bands of the checkpoint, the model takes those that both have.

    Raises:
        ValueError: neither a checkpoint nor `from_scratch` is given, or both.
    """
    return _fresh_or_loaded(FusMAEModel, arguments, data, info, image_size, {})


def _fresh_or_loaded(
    model_class: type[PreTrainedModel],
    arguments: CheckpointArguments,
    data: SourceArguments,
    info: PairsInfo,
    image_size: tuple[int, int],
    fields: dict[str, Any],
) -> tuple[PreTrainedModel, FusMAEImageProcessor]:
    """A model of a class with fields of its configuration replaced, and its processor."""
    if (arguments.model is None) != arguments.from_scratch:
        raise ValueError(
            "Name a checkpoint to start from (`--model <folder or Hub id>`) or pass `--from_scratch true` for a fresh "
            "model of `--preset`: one of the two."
        )
    attention: Any = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if arguments.model is None:
        config = fresh_config(arguments, info, image_size, fields)
        return model_class._from_config(config, **attention), fresh_processor(data, info, config)
    if foreign := sorted(set(arguments.config_fields) - HEAD_FIELDS):
        raise ValueError(
            f"`config` sets {foreign}, but with `model` the checkpoint's configuration holds; only fields of the head "
            f"may be set: {sorted(HEAD_FIELDS)}."
        )
    fields |= arguments.config_fields
    config = read_config(arguments.model)
    fewer: dict[str, Any] = {}
    for name in ("optical_bands", "sar_bands"):
        wanted, there = list(getattr(config, name)), list(getattr(info, name))
        shared = [band for band in wanted if band in there]
        if not shared:
            raise ValueError(f"The checkpoint takes the {name} {wanted}, but {info.name} has {there}: none is shared.")
        if shared != wanted:
            print(f"{info.name} lacks some {name} of the checkpoint: the model takes {shared} alone.")
            fewer[name] = shared
    model = model_class.from_pretrained(arguments.model, **fields, **fewer, **attention)
    take_pixel_size(model, info)
    return model, FusMAEImageProcessor.from_pretrained(arguments.model, **fewer)


def read_config(checkpoint: str) -> FusMAEConfig:
    """Configuration of a checkpoint: a folder or a Hub id."""
    with looked_up(checkpoint):
        return FusMAEConfig.from_pretrained(checkpoint)


def _has_head(checkpoint: str, task: FineTuningTask) -> bool:
    """Whether the checkpoint has the task's head already; raises where it is one for other classes."""
    config = read_config(checkpoint)
    head = next((name for name in config.architectures or [] if name in HEADS), None)
    if head != task.model_class.__name__:
        return False
    known = [name for _, name in sorted((config.id2label or {}).items())]
    if known != list(task.outputs):
        raise ValueError(
            f"The checkpoint {checkpoint} {HEADS[head]} {len(known)} classes {known}, but the data has "
            f"{len(task.outputs)}: {list(task.outputs)}. Start from its pretraining checkpoint, or keep its encoder "
            f"alone: FusMAEModel.from_pretrained({checkpoint!r}).save_pretrained(<folder>)."
        )
    return True


def freeze_encoder(model: PreTrainedModel) -> None:
    """Let only the head learn.

    Raises:
        ValueError: stochastic depth is on, which would disturb a frozen encoder.
    """
    if model.config.drop_path_rate:
        raise ValueError("Stochastic depth (`drop_path_rate`) disturbs a frozen encoder: leave one of them out.")
    model.base_model.requires_grad_(False)


def add_lora(model: PreTrainedModel, rank: int, alpha: int | None = None) -> Any:
    """Freeze the encoder and give its attention low-rank adapters (Hu et al., 2021, arXiv 2106.09685).

    Args:
        model: with a head, which learns as a whole.
        rank: of the adapters.
        alpha: their scale is `alpha / rank`; twice the rank where None.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ImportError: peft is not installed; names the pip command.
        ValueError: the rank is not positive.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "Low-rank adapters need peft, which is not installed. Install it "
            'with `pip install -e ".[train]"` in a clone of the repository.'
        ) from error
    if rank < 1:
        raise ValueError(f"`lora_rank` must be at least 1, not {rank}.")
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,
        target_modules=r"fusmae\..*\.(q_proj|k_proj|v_proj|o_proj)",
        modules_to_save=[name for name in head if any(True for _ in getattr(model, name).parameters())],
    )
    return get_peft_model(model, config)


def output_layer(model: Any) -> nn.Linear:
    """The last layer of the head, that which learns."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(plain, "decoder", None)
    return _trained(plain.classifier) if decoder is None else _trained(decoder).predict


def _trained(module: Any) -> Any:
    """The copy of a module that peft trains, or the module itself."""
    return module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module


@torch.no_grad()
def rescale_output(model: Any, mean: float, deviation: float) -> None:
    """Change the last layer so that the model gives `deviation * output + mean`."""
    layer = output_layer(model)
    layer.weight.mul_(deviation)
    layer.bias.mul_(deviation).add_(mean)
