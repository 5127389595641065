"""The sub-commands of `fusmae` that write shards: `prepare` and `merge`."""

import argparse
import re
import textwrap
from pathlib import Path
from typing import Any

from fusmae_hf.readers.archives import ARCHIVES, Archive

# What the commands need is imported when they run, so that `fusmae --help` is quick.

GO_ON = "Interrupted. Finished files are kept: run the same command again to go on."


def add_prepare(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae prepare` with one sub-command a dataset."""
    prepare = commands.add_parser(
        "prepare",
        help="read an archive and write it as shards",
        description="Read a dataset and write it as parquet shards. `fusmae prepare DATASET --help` tells more.\n\n"
        "Whatever interrupts it: run the same command again, and it goes on after the files that are finished.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    datasets = prepare.add_subparsers(required=True, metavar="DATASET")
    for archive in ARCHIVES:
        command = datasets.add_parser(
            archive.command,
            help=archive.summary,
            description="\n".join(textwrap.fill(text, 100) for text in (archive.summary, archive.layout) if text),
            epilog=f"example:\n  {archive.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=parents,
        )
        if archive.layout:
            command.add_argument("root", type=Path, help="folder of the archive, see above")
        command.add_argument("out", type=Path, help="folder for the shards: new, empty, or to go on with")
        if archive.options:
            reading = command.add_argument_group("reading")
            for keyword, described in archive.options.items():
                flag = f"--{keyword.replace('_', '-')}"
                reading.add_argument(flag, dest=keyword, **{"default": argparse.SUPPRESS, **described})
        _add_writing_options(command.add_argument_group("writing"))
        command.set_defaults(run=_prepare, archive=archive, interrupted=GO_ON)


def add_merge(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae merge`."""
    command = commands.add_parser(
        "merge",
        help="bring parts of one preparation together",
        description="Bring the files together that `fusmae prepare --part i/n` wrote into folders of their own.\n"
        "Files are linked where that is possible, otherwise copied; the parts stay as they are.",
        epilog="example:\n  fusmae merge shards/ part-1/ part-2/ part-3/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )
    command.add_argument("out", type=Path, help="folder for all shards: new, empty, or one of the parts")
    command.add_argument("parts", type=Path, nargs="+", metavar="PART", help="folder that a part was written into")
    command.set_defaults(run=_merge, interrupted=GO_ON)


def part_of(text: str) -> tuple[int, int]:
    """Type of `--part`: `i/n`."""
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 1 to n, such as 1/4")
    return int(match[1]), int(match[2])


def _add_writing_options(group: Any) -> None:
    """Options of `prepare` itself, the same for every dataset."""
    group.add_argument("--limit", type=int, metavar="N", help="write at most N pairs, drawn over the whole dataset")
    group.add_argument(
        "--max-no-data",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="leave out pairs with a larger share of pixels without data in either sensor",
    )
    group.add_argument(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the pairs without a split for validation",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the order of pairs, and of what --limit and --hold-out draw (default 0)",
    )
    group.add_argument("--keep-order", action="store_true", help="do not shuffle the pairs")
    group.add_argument(
        "--num-proc",
        type=int,
        default=1,
        metavar="N",
        help="processes that read and write, a file each at a time (default 1); they take some seconds to start",
    )
    group.add_argument(
        "--part",
        type=part_of,
        default=(1, 1),
        metavar="I/N",
        help="write only part I of N, so that N machines share the work: into one folder, or each into its own for "
        "`fusmae merge`",
    )
    group.add_argument("--rows-per-shard", type=int, default=1024, metavar="N", help="pairs in a file (default 1024)")
    group.add_argument(
        "--row-group-rows", type=int, default=32, metavar="N", help="pairs that streaming reads at once (default 32)"
    )
    group.add_argument(
        "--on-error",
        choices=["skip", "stop"],
        default="skip",
        help="leave out a pair that cannot be read and note why (default), or stop at the first one",
    )
    group.add_argument("--overwrite", action="store_true", help="delete the shards that are in OUT and start anew")


def _prepare(arguments: argparse.Namespace) -> None:
    from fusmae_hf.prepare.preparation import prepare

    archive: Archive = arguments.archive
    given = vars(arguments)
    options = {keyword: given[keyword] for keyword in (*archive.options, *archive.shared) if keyword in given}
    reader = archive.open(given.get("root"), options)
    print(reader.summary, flush=True)
    report = prepare(
        reader,
        arguments.out,
        limit=arguments.limit,
        rows_per_shard=arguments.rows_per_shard,
        row_group_rows=arguments.row_group_rows,
        max_no_data=arguments.max_no_data,
        on_error=arguments.on_error,
        hold_out=arguments.hold_out,
        seed=arguments.seed,
        keep_order=arguments.keep_order,
        num_proc=arguments.num_proc,
        part=arguments.part,
        overwrite=arguments.overwrite,
        reader_options={
            name: value
            for name, value in options.items()
            if name not in archive.shared and not _is_place(value)  # another machine has other places
        },
    )
    print(report)
    if report.dataset:
        print(f"Shards: {arguments.out}. Look at them with `fusmae inspect {arguments.out}`.")


def _is_place(value: Any) -> bool:
    """True for the name of a file or folder."""
    return isinstance(value, str | Path) and Path(value).exists()


def _merge(arguments: argparse.Namespace) -> None:
    from fusmae_hf.prepare.preparation import describe_dataset
    from fusmae_hf.prepare.state import merge_parts

    dataset = merge_parts(arguments.out, arguments.parts)
    print("\n".join(describe_dataset(dataset)))
    print(f"Shards: {arguments.out}. Look at them with `fusmae inspect {arguments.out}`.")
