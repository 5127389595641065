"""Whether a run that goes on from a checkpoint sees its pairs in the order in which the run began."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState


class OrderRecord(TrainerCallback, ExportableState):
    """Keeps in the `trainer_state.json` of each checkpoint what the order of the pairs depends on.

    Args:
        depends_on: by name, see `EpochSampler` and `LaneSampler`.
    """

    def __init__(self, depends_on: Mapping[str, int]):
        self.depends_on = dict(depends_on)

    def state(self) -> dict[str, Any]:
        """See `ExportableState`."""
        return {"args": {"depends_on": self.depends_on}, "attributes": {}}


def check_order(checkpoint: str, depends_on: Mapping[str, int]) -> None:
    """Raise a ValueError if a run would see its pairs in another order than the run that wrote a checkpoint.

    Checkpoints that do not say what their order depends on pass.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    recorded = json.loads(file.read_text()).get("stateful_callbacks", {}) if file.is_file() else {}
    before = recorded.get(OrderRecord.__name__, {}).get("args", {}).get("depends_on", dict(depends_on))
    if before == dict(depends_on):
        return
    streamed = len(before) > 1 or len(depends_on) > 1
    raise ValueError(
        f"{checkpoint} cannot be resumed: the run that wrote it had {_listed(before)}, this one has "
        f"{_listed(depends_on)}, so it would see other pairs in another order. "
        + (
            "A stream keeps its order only with the same batch of a process and the same processes x workers: "
            "with half the processes take twice the `dataloader_num_workers` and `gradient_accumulation_steps`."
            if streamed
            else "The global batch is `per_device_train_batch_size` x processes x `gradient_accumulation_steps`: with "
            "fewer processes accumulate more."
        )
        + " To begin another run with these weights, pass the checkpoint as `--model` instead."
    )


def _listed(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
