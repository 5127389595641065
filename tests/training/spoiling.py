"""Makes numbers of a training run not finite, in one process or in one of two.

    RANK=1 WORLD_SIZE=2 ... python -m tests.training.spoiling <folder> stop|skip

trains on the `shards` of the folder; the second process sees a batch that spoils the third step. Each writes what
became of it to `<policy>-<rank>.json`.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import torch

from fusmae_hf.training.loop.nonfinite import NonFiniteError


def spoil(trainer, *batches, by="sar_loss"):
    """Spoil some batches, counted from 0 over the whole run.

    Args:
        trainer: changed in place.
        batches: their numbers.
        by: `sar_loss` makes pixels NaN, and with them all losses and gradients; `gradient` leaves the losses finite,
            and `loss` the gradients.
    """
    count, compute = itertools.count(), type(trainer).compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training or next(count) not in batches:
            return compute(trainer, model, inputs, return_outputs, num_items_in_batch)
        if by == "gradient":
            loss, outputs = compute(trainer, model, inputs, True)
            loss.register_hook(lambda gradient: gradient * math.inf)
        elif by == "loss":
            loss, outputs = compute(trainer, model, inputs, True)
            loss = loss + math.inf
        else:
            prepared = trainer.prepare_pairs(inputs)
            prepared["pixel_values_sar"] *= math.nan
            trainer.prepare_pairs = lambda batch: prepared
            loss, outputs = compute(trainer, model, inputs, True)
            del trainer.prepare_pairs
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
    return trainer


def main(folder: Path, policy: str) -> None:
    """Train as one process of several."""
    from .process_scenarios import make_trainer

    trainer = make_trainer(folder, policy, on_nonfinite=policy, save_strategy="no")
    if trainer.args.process_index == 1:
        spoil(trainer, 2, by="loss")  # of which the gradient tells the other process nothing
    message = None
    try:
        trainer.train()
    except NonFiniteError as error:
        message = str(error)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    found = {
        "message": message,
        "steps": trainer.state.global_step,
        "skipped": trainer.nonfinite_steps,
        "weights": weights.double().sum().item(),
    }
    (folder / f"{policy}-{trainer.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
