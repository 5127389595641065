"""Keywords that `forward` takes besides its own arguments; all others are refused, where upstream ignores them."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

OF_TRANSFORMERS = (
    "num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "cu_seq_lens_q",
    "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "is_causal", "seq_idx", "use_cache", "debug_io",
    "debug_io_dir", "prune_layers",
)  # fmt: skip
"""What transformers itself hands to any model: the Trainer, the decorators of `forward`, attention back ends."""

OF_TEXT = (
    "input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "labels", "start_positions", "end_positions",
    "task_ids",
)  # fmt: skip
"""What peft hands to any model for its `task_type`; None here, since there is no text."""


def known_keywords(model: nn.Module, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those further keywords of a call that the layers are handed.

    Args:
        model: whose `forward` was called.
        keywords: those that are no arguments of its own.

    Raises:
        TypeError: one is unknown; names the nearest one that is known.
    """
    for name, value in keywords.items():
        if name not in OF_TRANSFORMERS and not (name in OF_TEXT and value is None):
            raise TypeError(_refusal(model, name))
    return {name: value for name, value in keywords.items() if name in OF_TRANSFORMERS}


def _refusal(model: nn.Module, name: str) -> str:
    own = [
        argument.name
        for argument in inspect.signature(type(model).forward).parameters.values()
        if argument.name != "self" and argument.kind is not argument.VAR_KEYWORD
    ]
    text = f"The forward of {type(model).__name__} has no argument `{name}`."
    if name in OF_TEXT and name not in own and name != "labels":
        return (
            f"{text} It takes images, by name: `pixel_values=`, `pixel_values_sar=`. A peft model with a `task_type` "
            "takes what is not named for `input_ids`: name the images, or leave `task_type` out of the peft "
            "configuration."
        )
    if hasattr(getattr(model, "config", None), name):
        return f"{text} It is a field of the configuration: set `model.config.{name}`."
    near = difflib.get_close_matches(name, [*own, *OF_TRANSFORMERS], n=1, cutoff=0.5)
    return f"{text}{f' Did you mean `{near[0]}`?' if near else ''} It takes {own}."
