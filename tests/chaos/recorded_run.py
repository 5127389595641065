"""`run_pretrain`, noting which pairs each step of the optimiser saw, and with a batch spoilt if asked for.

    python -m tests.chaos.recorded_run <folder for records> <batch to spoil, or none> <arguments of run_pretrain>

Batches count from 0 over the whole run, restarts included. Each process appends a line of JSON after each step to a
file of its own, `seen-<rank>.jsonl`: a run that is started again does some steps again, and then the last line counts.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from transformers import TrainerCallback

from fusmae_hf.training import run_pretrain
from tests.training.spoiling import spoil


class RecordedTrainer(run_pretrain.FusMAETrainer):
    """Keeps the pairs of the step in hand: `seen`, as lists of epoch and id."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen += [[epoch, pair] for epoch, pair in zip(inputs["epoch"].tolist(), inputs["id"], strict=True)]
        return super().training_step(model, inputs, num_items_in_batch)


class Record(TrainerCallback):
    """Writes down the pairs of each step, and spoils a batch."""

    def __init__(self, trainer: RecordedTrainer, folder: Path, spoilt: int | None):
        self.trainer, self.spoilt = trainer, spoilt
        self.file = (folder / f"seen-{trainer.args.process_index}.jsonl").open("a")

    def on_train_begin(self, args, state, control, **kwargs):
        self.skipped, self.trainer.seen = self.trainer.nonfinite_steps, []
        if self.spoilt is not None:
            spoil(self.trainer, self.spoilt - state.global_step * args.gradient_accumulation_steps)

    def on_step_end(self, args, state, control, **kwargs):
        skipped, self.skipped = self.trainer.nonfinite_steps > self.skipped, self.trainer.nonfinite_steps
        line = {"step": state.global_step, "skipped": skipped, "pairs": self.trainer.seen}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.trainer.seen = []


def lines_of(folder: Path) -> list[str]:
    """What was written down so far, the last line of each process perhaps in part."""
    return [line for file in sorted(folder.glob("seen-*.jsonl")) for line in file.read_text().splitlines()]


def trained_on(folder: Path) -> tuple[dict[int, Counter], set[int]]:
    """By step, the pairs that its last execution saw in all processes; and the steps that were skipped."""
    last = {}
    for file in folder.glob("seen-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            last[line["step"], file.name] = line
    pairs: dict[int, Counter] = {}
    for (step, _), line in last.items():
        pairs.setdefault(step, Counter()).update(() if line["skipped"] else map(tuple, line["pairs"]))
    return pairs, {step for (step, _), line in last.items() if line["skipped"]}


def main(folder: str, spoilt: str, *arguments: str) -> None:
    """Run `run_pretrain` with these arguments."""

    def make(**kwargs):
        trainer = RecordedTrainer(**kwargs)
        trainer.add_callback(Record(trainer, Path(folder), None if spoilt == "none" else int(spoilt)))
        return trainer

    run_pretrain.FusMAETrainer = make
    run_pretrain.main(list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
