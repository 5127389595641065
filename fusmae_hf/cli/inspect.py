"""The command `fusmae inspect`: what a folder of shards holds."""

import argparse
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command, require_writable


def add_inspect(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae inspect`."""
    command = add_command(
        commands,
        parents,
        "inspect",
        "show what a folder of shards holds",
        "Print what a folder of shards holds, with statistics of each band and counts of its classes,\n"
        "and draw some of its pairs and the histograms of its bands.",
        "fusmae inspect shards/ --pairs 4 --picture pairs.png --histograms histograms.png",
    )
    command.add_argument("shards", help="folder written by `fusmae prepare`, or its URL")
    command.add_argument(
        "--max-pairs", type=int, default=256, metavar="N", help="pairs read for the statistics (default 256)"
    )
    command.add_argument("--pairs", type=int, default=6, metavar="N", help="pairs drawn (default 6)")
    command.add_argument(
        "--picture", type=Path, default=Path("pairs.png"), metavar="FILE", help="the drawing (default ./pairs.png)"
    )
    command.add_argument("--histograms", type=Path, metavar="FILE", help="also draw the histogram of each band")
    command.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from fusmae_hf.preparation.inspection import band_histograms, contact_sheet, inspect_shards

    for file in filter(None, (arguments.picture, arguments.histograms)):
        require_writable(file)
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
