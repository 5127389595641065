"""The sub-command `fusmae protocol`: one table of probes and fine-tuning with few labels."""

import argparse
import sys
from pathlib import Path
from typing import Any

# What the command needs is imported when it runs, so that `fusmae --help` is quick.


def add_protocol(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae protocol`."""
    command = commands.add_parser(
        "protocol",
        help="measure a checkpoint by probes and fine-tuning with few labels",
        description="Measure a checkpoint by linear probe and fine-tuning with 1 %, 10 % and 100 % of the labels: a\n"
        "reconstruction of the protocol of the Fus-MAE paper as far as it is public. Writes one table,\n"
        "protocol.md, and every number in protocol.json. Finished steps are kept when it is run again.\n"
        "Arguments after -- go to run_finetune.py.",
        epilog="examples:\n"
        "  fusmae protocol bigearthnet --data shards/reben --model outputs/pretrain --output_dir outputs/protocol\n"
        "  fusmae protocol simulated --seeds 2 --fractions 0.1,1 -- --num_train_epochs 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )
    command.add_argument(
        "protocol",
        choices=("bigearthnet", "sen12ms", "simulated"),
        help="bigearthnet: several of 19 classes, average precision; sen12ms: one class a scene, accuracy; simulated: "
        "as bigearthnet, on pairs made at once",
    )
    command.add_argument("--data", metavar="SHARDS", help="folder of shards, or a dataset repository on the Hub")
    command.add_argument("--model", metavar="CHECKPOINT", help="pretraining checkpoint: a folder or a Hub id")
    command.add_argument(
        "--output_dir",
        "--output-dir",
        type=Path,
        default=Path("outputs/protocol"),
        metavar="FOLDER",
        help="where everything is written (default outputs/protocol)",
    )
    command.add_argument(
        "--fractions",
        type=_shares,
        default=(0.01, 0.1, 1.0),
        metavar="SHARES",
        help="shares of the training labels, separated by commas (default 0.01,0.1,1)",
    )
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each row (default 3)")
    command.add_argument("--seed", type=int, default=42, metavar="N", help="the first seed (default 42)")
    command.add_argument(
        "--sensors",
        type=_names,
        default=("both",),
        metavar="SENSORS",
        help="both,sar,optical: a training for each (default both)",
    )
    command.add_argument(
        "--methods",
        type=_names,
        default=("linear", "finetune"),
        metavar="METHODS",
        help="linear,knn,finetune (default linear,finetune)",
    )
    command.add_argument(
        "--compare_scratch",
        "--compare-scratch",
        action="store_true",
        help="also measure the same model without pretraining",
    )
    command.add_argument(
        "--bootstrap",
        type=int,
        default=0,
        metavar="N",
        help="resamples of the test pairs for an interval of each run (default 0: none)",
    )
    command.add_argument(
        "--preset", default="tiny", help="simulated, without --model: size of the model from scratch (default tiny)"
    )
    command.add_argument(
        "--simulated_pairs",
        "--simulated-pairs",
        type=int,
        default=768,
        metavar="N",
        help="simulated: number of pairs (default 768)",
    )
    command.set_defaults(
        run=_protocol,
        handed_on=(),
        interrupted="Interrupted. Finished steps are kept: run the same command again to go on.",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of shares such as 0.01,0.1,1") from None


def _protocol(arguments: argparse.Namespace) -> int:
    from fusmae_hf.training.protocol.experiment import ProtocolArguments, run_protocol
    from fusmae_hf.training.protocol.steps import StepFailedError

    names = ProtocolArguments.__dataclass_fields__
    given = ProtocolArguments(**{name: value for name, value in vars(arguments).items() if name in names})
    try:
        run_protocol(given)
    except StepFailedError as error:
        if arguments.debug:
            raise
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0
