"""The command `fusmae push`: shards or a model to the Hub."""

import argparse
import json
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command


def add_push(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae push`."""
    command = add_command(
        commands,
        parents,
        "push",
        "push shards or a model to the Hub",
        "Push a folder of shards to the Hugging Face Hub as a dataset repository, with a card written from its\n"
        "description; or the folder of a checkpoint or run (one with a config.json) as a model repository, with\n"
        "processor, card and remote code. Log in before with `hf auth login`. After an interruption, run the\n"
        "same command again.",
        "fusmae push shards/ user/name --private",
    )
    command.add_argument("shards", help="folder written by `fusmae prepare`, or of a checkpoint or run")
    command.add_argument("repository", metavar="USER/NAME", help="the repository; made if need be")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--revision", metavar="BRANCH", help="branch to push to, made if need be (default main)")
    command.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="figures for the card of shards, from `fusmae stats --json FILE`",
    )
    command.set_defaults(run=_push)


def _push(arguments: argparse.Namespace) -> int:
    from fusmae_hf.hub.push_model import is_model, push_model, require_pushable
    from fusmae_hf.hub.push_shards import push_shards
    from fusmae_hf.preparation.statistics import DatasetStatistics

    require_pushable(arguments.shards)
    options = {"private": arguments.private, "revision": arguments.revision}
    if is_model(arguments.shards):
        if arguments.statistics:
            raise ValueError(f"`--statistics` is for shards, but {arguments.shards} is a model.")
        print(push_model(arguments.shards, arguments.repository, **options))
        return 0
    statistics = None
    if arguments.statistics:
        try:
            statistics = DatasetStatistics.from_json(json.loads(arguments.statistics.read_text()))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{arguments.statistics} holds no statistics ({error!r}). Write it with `fusmae stats --json`."
            ) from error
    print(push_shards(arguments.shards, arguments.repository, statistics=statistics, **options))
    return 0
