"""The console script `fusmae`: preparing archives of Sentinel-1/2 pairs and looking into what was prepared."""

import argparse
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fusmae_hf import __version__
from fusmae_hf.data.pairs import PairError, PairReader

USER_ERRORS = (PairError, ValueError, OSError, ImportError)
"""What a wrong argument or a damaged file raises: shown as one paragraph. Anything else is a bug and shows in full."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fusmae`.

    Args:
        argv: arguments without the name of the program; those of the process by default.

    Returns:
        Exit code: 0, 2 after a user's mistake, 130 after an interrupt.
    """
    arguments = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments.run(arguments)
        except KeyboardInterrupt:
            if arguments.debug:
                raise
            _say("Interrupted. Nothing half-written was kept; to prepare again, add `--overwrite`.")
            return 130
        except USER_ERRORS as error:
            if arguments.debug:
                raise
            _say(f"Error: {_message(error)}")
            return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each sets `run` to the function that does the work."""
    parser = argparse.ArgumentParser(
        prog="fusmae", description="Prepare and inspect pairs of Sentinel-1 and Sentinel-2 patches for Fus-MAE."
    )
    parser.add_argument("--version", action="version", version=f"fusmae {__version__}")
    debugging = argparse.ArgumentParser(add_help=False)
    debugging.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(commands, debugging)
    _add_inspect(commands, debugging)
    return parser


def _add_prepare(commands: Any, debugging: argparse.ArgumentParser) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="read an archive and write it as shards",
        description="Read a dataset and write it as parquet shards. `fusmae prepare DATASET --help` tells more.",
    )
    datasets = prepare.add_subparsers(required=True, metavar="DATASET")

    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("out", type=Path, help="folder for the shards; must be new or empty")
    options = writing.add_argument_group("writing")
    options.add_argument("--overwrite", action="store_true", help="replace the shards that are in OUT")
    options.add_argument("--limit", type=int, metavar="N", help="write at most N pairs, drawn over the whole dataset")
    options.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the pairs without a split for validation",
    )
    options.add_argument("--keep-order", action="store_true", help="do not shuffle the pairs")
    options.add_argument(
        "--rows-per-shard", type=int, default=1024, metavar="N", help="pairs in a file (default 1024)"
    )
    options.add_argument(
        "--row-group-rows", type=int, default=32, metavar="N", help="pairs that streaming reads at once (default 32)"
    )
    options.add_argument(
        "--on-error",
        choices=["skip", "stop"],
        default="skip",
        help="leave out a pair that cannot be read and note why (default), or stop at the first one",
    )
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument("root", type=Path, help="folder of the archive, see above")
    offset = argparse.ArgumentParser(add_help=False)
    offset.add_argument(
        "--optical-offset",
        type=float,
        default=0.0,
        metavar="DN",
        help="what was added to every optical value: 1000 for processing baseline 04.00 and later (default 0)",
    )

    def add(name: str, run: Any, summary: str, example: str, *parents: argparse.ArgumentParser) -> Any:
        command = datasets.add_parser(
            name,
            help=summary.splitlines()[0],
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[*parents, writing, debugging],
        )
        command.set_defaults(run=run)
        return command

    command = add(
        "bigearthnet",
        _prepare_bigearthnet,
        "BigEarthNet-MM version 1.\nROOT holds BigEarthNet-v1.0/ and BigEarthNet-S1-v1.0/.",
        "fusmae prepare bigearthnet archive/ shards/ --splits official",
        root,
        offset,
    )
    command.add_argument(
        "--splits",
        metavar="FOLDER",
        help="folder of train.csv, val.csv and test.csv; `official`: those of the PyPI package bigearthnet-common",
    )
    command.add_argument(
        "--leave-out",
        action="append",
        default=[],
        choices=["snow", "cloud", "unlabelled"],
        help="leave out the patches of this official list, which must be in the folder of --splits; may be repeated",
    )
    command.add_argument(
        "--keep-unlisted", action="store_true", help="put patches that are in no split list into train"
    )
    command = add(
        "reben",
        _prepare_reben,
        "reBEN (BigEarthNet version 2), or the part of it that is on disk.\n"
        "ROOT holds BigEarthNet-S1/, BigEarthNet-S2/ and metadata.parquet.",
        "fusmae prepare reben archive/ shards/",
        root,
        offset,
    )
    command.add_argument(
        "--keep-snow-and-clouds", action="store_true", help="also take the patches with snow, cloud or shadow"
    )
    command = add(
        "simulated",
        _prepare_simulated,
        "Simulated scenes with labels, made up on the spot: no download.",
        "fusmae prepare simulated shards/ --num-pairs 512 --seed 0",
    )
    command.add_argument("--num-pairs", type=int, default=256, metavar="N", help="number of pairs (default 256)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same pairs (default 0)")
    add(
        "example",
        _prepare_example,
        "The six real pairs of BigEarthNet v1 that the PyPI package bigearthnet-common carries.\n"
        "Install it with `pip install --no-deps bigearthnet-common==2.8.0`.",
        "fusmae prepare example shards/",
    )


def _add_inspect(commands: Any, debugging: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "inspect",
        help="show what a folder of shards holds",
        description="Print what a folder of shards holds, with statistics of each band, and draw some of its pairs.",
        epilog="example:\n  fusmae inspect shards/ --pairs 4 --picture pairs.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debugging],
    )
    command.add_argument("shards", help="folder written by `fusmae prepare`, or its URL")
    command.add_argument(
        "--max-pairs", type=int, default=256, metavar="N", help="pairs read for the statistics (default 256)"
    )
    command.add_argument("--pairs", type=int, default=6, metavar="N", help="pairs drawn (default 6)")
    command.add_argument(
        "--picture", type=Path, default=Path("pairs.png"), metavar="FILE", help="the drawing (default ./pairs.png)"
    )
    command.set_defaults(run=_inspect)


def _prepare_bigearthnet(arguments: argparse.Namespace) -> None:
    from fusmae_hf.data.bigearthnet import BigEarthNet, official_lists_folder

    reader = BigEarthNet(
        arguments.root,
        splits=official_lists_folder() if arguments.splits == "official" else arguments.splits,
        leave_out=arguments.leave_out,
        keep_unlisted=arguments.keep_unlisted,
        optical_offset=arguments.optical_offset,
        progress=True,
    )
    print(f"Found {len(reader):,} pairs in {arguments.root}.")
    _prepare(reader, arguments)


def _prepare_reben(arguments: argparse.Namespace) -> None:
    from fusmae_hf.data.reben import ReBEN

    reader = ReBEN(
        arguments.root,
        keep_snow_and_clouds=arguments.keep_snow_and_clouds,
        optical_offset=arguments.optical_offset,
    )
    print(f"Found {len(reader):,} of the {reader.num_listed:,} pairs that the metadata list in {arguments.root}.")
    _prepare(reader, arguments)


def _prepare_simulated(arguments: argparse.Namespace) -> None:
    from fusmae_hf.data.simulation import SimulatedPairs

    _prepare(SimulatedPairs(arguments.num_pairs, seed=arguments.seed), arguments)


def _prepare_example(arguments: argparse.Namespace) -> None:
    from fusmae_hf.data.bigearthnet import BigEarthNet, example_pairs_root, official_lists_folder

    with tempfile.TemporaryDirectory() as folder:
        root = example_pairs_root(folder)
        _prepare(BigEarthNet(root, splits=official_lists_folder(), keep_unlisted=True), arguments)


def _prepare(reader: PairReader, arguments: argparse.Namespace) -> None:
    from fusmae_hf.data.preparation import prepare

    report = prepare(
        reader,
        arguments.out,
        limit=arguments.limit,
        rows_per_shard=arguments.rows_per_shard,
        row_group_rows=arguments.row_group_rows,
        on_error=arguments.on_error,
        hold_out=arguments.hold_out,
        keep_order=arguments.keep_order,
        overwrite=arguments.overwrite,
    )
    print(report)
    print(f"Shards: {arguments.out}. Look at them with `fusmae inspect {arguments.out}`.")


def _inspect(arguments: argparse.Namespace) -> None:
    from fusmae_hf.inspection import contact_sheet, inspect_shards

    found = inspect_shards(arguments.shards, max_pairs=arguments.max_pairs, num_pictured=arguments.pairs)
    print(found)
    contact_sheet(found.pairs, found.dataset.info).savefig(arguments.picture, dpi=110)
    print(f"\nPicture of {len(found.pairs)} pairs: {arguments.picture}")


def _message(error: BaseException) -> str:
    """The text of an error; for those of the operating system what happened to which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def _say(text: str) -> None:
    """Write a paragraph to standard error, below a progress bar if there is one."""
    wrapped = textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False)
    tqdm.write(wrapped, file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"Warning: {message}")
