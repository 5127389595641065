"""What is drawn while a run goes on."""

from pathlib import Path
from typing import cast

import torch
from transformers import TrainerCallback

from fusmae_hf import FusMAEForPreTraining
from fusmae_hf.plots.model import plot_reconstructions, reconstruct_images
from fusmae_hf.plots.scores import plot_losses
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.pretraining.trainer import FusMAETrainer


class PictureCallback(TrainerCallback):
    """Draws held-out reconstructions at each evaluation, and the loss curves.

    Args:
        trainer: prepares the pairs as it does for training.
        held_out: datasets to draw pairs of, by name; the first gives `reconstructions.png`, any further
            `reconstructions-<name>.png`.
        number: pairs to draw of each.
    """

    def __init__(self, trainer: FusMAETrainer, held_out: dict[str, PairDataset], number: int):
        self.trainer = trainer
        self.pictured = {
            "reconstructions.png" if position == 0 else f"reconstructions-{name}.png": (name, dataset)
            for position, (name, dataset) in enumerate(held_out.items())
        }
        self.last = list(held_out)[-1] if held_out else None
        self.number = number

    def draw(self) -> None:
        """Write all pictures into the output folder. Every process runs the model, the first one draws."""
        trainer, folder = self.trainer, Path(self.trainer.args.output_dir or ".")
        for file, (name, dataset) in self.pictured.items():
            batch = trainer.collator(dataset.__getitems__(range(min(self.number, len(dataset)))))
            inputs = trainer._prepare_inputs(batch)
            with torch.no_grad():
                pictures = reconstruct_images(cast(FusMAEForPreTraining, trainer.model), inputs, trainer.processor)
            if trainer.is_world_process_zero():
                kind = "simulated imagery" if dataset.info.simulated else dataset.info.name
                title = f"Held-out pairs ({name}: {kind}) after step {trainer.state.global_step}"
                plot_reconstructions(pictures, trainer.processor, title, batch["id"]).savefig(folder / file, dpi=110)
        if trainer.is_world_process_zero() and trainer.state.log_history:
            title = f"Reconstruction losses, trained on {trainer.info.name} pairs"
            plot_losses(trainer.state.log_history, title).savefig(folder / "loss.png", dpi=110)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Draw once all held-out datasets are evaluated; the Trainer evaluates them in turn."""
        if f"eval_{self.last}_loss" in (metrics or {}):
            self.draw()
