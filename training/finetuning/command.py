"""The sub-command `fusmae finetune`: the recipe for a task, in one line."""

import argparse
from typing import Any


def add_finetune(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae finetune`."""
    command = commands.add_parser(
        "finetune",
        help="fine-tune a checkpoint, or a fresh model, with the recipe for the task",
        description="Fine-tune on labelled pairs with settings that suit the task, the number of labels and the size\n"
        "of the images; says what it picked. Further arguments, after --, are those of run_finetune.py.",
        epilog="examples:\n"
        "  fusmae finetune shards/ombria outputs/floods\n"
        "  fusmae finetune shards/reben outputs/reben --model outputs/pretrain -- --label_fraction 0.01 --seeds 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )
    command.add_argument("shards", metavar="SHARDS", help="folder of shards, or a dataset repository on the Hub")
    command.add_argument("out", metavar="OUT", help="folder for checkpoint, card, tables and pictures")
    command.add_argument("--task", help="classes of scenes or pixels, or a quantity; where the shards allow several")
    command.add_argument("--model", metavar="CHECKPOINT", help="checkpoint to start from; left out: a fresh model")
    command.add_argument("--preset", help="size of a fresh model: nano, tiny, small, base or large")
    command.add_argument(
        "--modality_dropout",
        "--modality-dropout",
        metavar="X",
        help="share of the steps that show one sensor alone, for each sensor (recipes: 0.25)",
    )
    again = "Run the same command with `-- --resume_from_checkpoint auto` to go on from its newest checkpoint."
    command.set_defaults(run=_finetune, handed_on=(), interrupted=f"Interrupted. {again}")


def _finetune(arguments: argparse.Namespace) -> int:
    from fusmae_hf.training.run_finetune import main

    named = {name: getattr(arguments, name) for name in ("task", "model", "preset", "modality_dropout")}
    given = [part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))]
    main(["--data", arguments.shards, "--output_dir", arguments.out, *given, *arguments.handed_on])
    return 0
