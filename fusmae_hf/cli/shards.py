"""The sub-commands of `fusmae` for shards that are there: looking, summing up, checking, pushing."""

import argparse
import json
from pathlib import Path
from typing import Any

# What the commands need is imported when they run, so that `fusmae --help` is quick.


def add_inspect(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae inspect`."""
    command = _add(
        commands,
        parents,
        "inspect",
        "show what a folder of shards holds",
        "Print what a folder of shards holds, with statistics of each band and counts of its classes,\n"
        "and draw some of its pairs and the histograms of its bands.",
        "fusmae inspect shards/ --pairs 4 --picture pairs.png --histograms histograms.png",
        "folder written by `fusmae prepare`, or its URL",
    )
    command.add_argument(
        "--max-pairs", type=int, default=256, metavar="N", help="pairs read for the statistics (default 256)"
    )
    command.add_argument("--pairs", type=int, default=6, metavar="N", help="pairs drawn (default 6)")
    command.add_argument(
        "--picture", type=Path, default=Path("pairs.png"), metavar="FILE", help="the drawing (default ./pairs.png)"
    )
    command.add_argument("--histograms", type=Path, metavar="FILE", help="also draw the histogram of each band")
    command.set_defaults(run=_inspect)


def add_stats(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae stats`."""
    command = _add(
        commands,
        parents,
        "stats",
        "compute the statistics of each band",
        "Compute mean, standard deviation, range and percentiles of each band in one pass, for the image\n"
        "processor to normalise with. Only the training split is read unless told otherwise: statistics must\n"
        "not see the pairs that a model is judged by. Figures are in dB and, with the declared offset\n"
        "subtracted, in digital numbers. Pixels without data do not count; a pixel of a coarser band counts as\n"
        "often as it covers the grid.",
        "fusmae stats shards/ --json statistics.json --processor checkpoint/",
        "folder written by `fusmae prepare`, its URL, or <user>/<name> on the Hub",
    )
    command.add_argument("--split", default="train", help="split to read (default train)")
    command.add_argument(
        "--max-pairs", type=int, metavar="N", help="read at most N pairs, spread over the split (default all)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    command.add_argument(
        "--processor",
        type=Path,
        metavar="FOLDER",
        help="put mean and std into the preprocessor_config.json of this folder, or start one there",
    )
    command.add_argument(
        "--num-proc", type=int, default=1, metavar="N", help="row groups read at the same time (default 1)"
    )
    command.set_defaults(run=_stats)


def add_verify(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae verify`."""
    command = _add(
        commands,
        parents,
        "verify",
        "check that shards are whole and plausible",
        "Check every file and every pair of a folder of shards, and name everything that is wrong. The exit\n"
        "code is 0 where the shards are sound (warnings do not count) and 1 where they are not.",
        "fusmae verify shards/ --json problems.json",
        "folder written by `fusmae prepare`, or its URL",
    )
    command.add_argument("--split", help="check this split only (default all)")
    command.add_argument("--quick", action="store_true", help="check footers and counts only, not the pixels")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all problems to this file")
    command.set_defaults(run=_verify)


def add_push(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae push`."""
    command = _add(
        commands,
        parents,
        "push",
        "push shards or a model to the Hub",
        "Push a folder of shards to the Hugging Face Hub as a dataset repository, with a card written from its\n"
        "description; or the folder of a checkpoint or run (one with a config.json) as a model repository, with\n"
        "processor, card and remote code. Log in before with `hf auth login`. After an interruption, run the\n"
        "same command again.",
        "fusmae push shards/ user/name --private",
        "folder written by `fusmae prepare`, or of a checkpoint or run",
    )
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


def _add(
    commands: Any,
    parents: list[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    example: str,
    shards: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )
    command.add_argument("shards", help=shards)
    return command


def _inspect(arguments: argparse.Namespace) -> int:
    from fusmae_hf.prepare.inspection import band_histograms, contact_sheet, inspect_shards

    found = inspect_shards(
        arguments.shards, max_pairs=arguments.max_pairs, num_pictured=arguments.pairs, progress=True
    )
    print(found)
    contact_sheet(found.pairs, found.dataset.info).savefig(arguments.picture, dpi=110)
    print(f"\nPicture of {len(found.pairs)} pairs: {arguments.picture}")
    if arguments.histograms:
        band_histograms(found.bands, found.dataset.info, found.num_pairs).savefig(arguments.histograms, dpi=110)
        print(f"Histograms of {len(found.bands)} bands: {arguments.histograms}")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from fusmae_hf.prepare.statistics import band_statistics, write_processor
    from fusmae_hf.shards.loading import load_pairs

    statistics = band_statistics(
        arguments.shards,
        arguments.split,
        max_pairs=arguments.max_pairs,
        num_proc=arguments.num_proc,
        progress=True,
    )
    print(statistics)
    if arguments.json:
        arguments.json.write_text(json.dumps(statistics.to_json(), indent=1) + "\n")
        print(f"\nFigures: {arguments.json}")
    if arguments.processor:
        info = load_pairs(arguments.shards, arguments.split, streaming=True).info
        print(f"\nImage processor: {write_processor(statistics, info, arguments.processor)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from fusmae_hf.prepare.verification import verify_shards

    report = verify_shards(arguments.shards, arguments.split, quick=arguments.quick, progress=True)
    print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        print(f"All {len(report.problems):,} problems: {arguments.json}")
    return 0 if report.sound else 1


def _push(arguments: argparse.Namespace) -> int:
    from fusmae_hf.hub.push import is_model, push_model, push_shards, require_pushable
    from fusmae_hf.prepare.statistics import DatasetStatistics

    require_pushable(arguments.shards)
    if is_model(arguments.shards):
        if arguments.statistics:
            raise ValueError(f"`--statistics` is for shards, but {arguments.shards} is a model.")
        options = {"private": arguments.private, "revision": arguments.revision}
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
    print(
        push_shards(
            arguments.shards,
            arguments.repository,
            private=arguments.private,
            revision=arguments.revision,
            statistics=statistics,
        )
    )
    return 0
