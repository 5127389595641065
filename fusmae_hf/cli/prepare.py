"""The command `fusmae prepare`: an archive becomes shards, with one sub-command a dataset."""

import argparse
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command
from fusmae_hf.readers.archives import ARCHIVES, Archive

GO_ON = "Interrupted. Finished files are kept: run the same command again to go on."
LOOK = "Shards: {out}. Look at them with `fusmae inspect {out}`."


def part_of(text: str) -> tuple[int, int]:
    """Type of `--part`: `i/n`."""
    if not (match := re.fullmatch(r"(\d+)/(\d+)", text)) or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 1 to n, such as 1/4")
    return int(match[1]), int(match[2])


def ids_in(text: str) -> list[str]:
    """Type of `--select`: a file of ids, one a line."""
    try:
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"the list of ids {text!r} cannot be read: {error}") from error


WRITING: dict[str, dict[str, Any]] = {
    "limit": {"type": int, "metavar": "N", "help": "write at most N pairs, drawn over the whole dataset"},
    "max_no_data": {
        "type": float,
        "default": 1.0,
        "metavar": "SHARE",
        "help": "leave out pairs with a larger share of pixels without data in either sensor (default 1: none)",
    },
    "require_both": {
        "action": "store_true",
        "help": "leave out pairs that lack a sensor, instead of keeping them with the other one",
    },
    "hold_out": {
        "type": float,
        "default": 0.0,
        "metavar": "SHARE",
        "help": "share of the pairs without a split for validation",
    },
    "split_by": {
        "default": "place",
        "metavar": "scene|place|block:SIZE",
        "help": "what --hold-out keeps together: pairs on the same ground (default), scenes, or squares of ground",
    },
    "select": {"type": ids_in, "metavar": "FILE", "help": "write only the pairs whose ids FILE lists, one a line"},
    "seed": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "of the order of pairs, and of what --limit and --hold-out draw (default 0)",
    },
    "keep_order": {"action": "store_true", "help": "do not shuffle the pairs"},
    "num_proc": {
        "type": int,
        "default": 1,
        "metavar": "N",
        "help": "processes that read and write, a file each at a time (default 1); they take some seconds to start",
    },
    "engine": {
        "choices": ["local", "ray"],
        "default": "local",
        "help": "this machine (default), or the nodes of a Ray cluster, which all see the archive and OUT",
    },
    "ray_address": {
        "metavar": "HOST:PORT",
        "help": "of the cluster for --engine ray; by default one is started on this machine",
    },
    "part": {
        "type": part_of,
        "default": (1, 1),
        "metavar": "I/N",
        "help": "write only part I of N, so that N machines share the work: into one folder, or each into its own for "
        "`fusmae merge`",
    },
    "rows_per_shard": {"type": int, "default": 1024, "metavar": "N", "help": "pairs in a file (default 1024)"},
    "row_group_rows": {
        "type": int,
        "default": 32,
        "metavar": "N",
        "help": "pairs that streaming reads at once (default 32)",
    },
    "on_error": {
        "choices": ["skip", "stop"],
        "default": "skip",
        "help": "leave out a pair that cannot be read and note why (default), or stop at the first one",
    },
    "strict": {"action": "store_true", "help": "values that look odd are an error instead of a warning"},
    "overwrite": {"action": "store_true", "help": "delete the shards that are in OUT and start anew"},
}
"""Keywords of `prepare` that are options of every dataset, as argparse takes them."""


def add_prepare(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae prepare`."""
    prepare = add_command(
        commands,
        [],
        "prepare",
        "read an archive and write it as shards",
        "Read a dataset and write it as parquet shards. `fusmae prepare DATASET --help` tells more.\n\n"
        "Whatever interrupts it: run the same command again, and it goes on after the files that are finished.",
    )
    datasets = prepare.add_subparsers(required=True, metavar="DATASET")
    for archive in ARCHIVES:
        description = "\n".join(textwrap.fill(text, 100) for text in (archive.summary, archive.layout) if text)
        command = add_command(datasets, parents, archive.command, archive.summary, description, archive.example)
        if archive.layout:
            command.add_argument("root", type=Path, help="folder of the archive, see above")
        command.add_argument("out", type=Path, help="folder for the shards: new, empty, or to go on with")
        if archive.options:
            _add_options(command, "reading", archive.options, default=argparse.SUPPRESS)
        _add_options(command, "writing", WRITING)
        command.set_defaults(run=_prepare, archive=archive, interrupted=GO_ON)


def _add_options(
    command: argparse.ArgumentParser, title: str, options: Mapping[str, Mapping[str, Any]], **defaults: Any
) -> None:
    group = command.add_argument_group(title)
    for keyword, described in options.items():
        group.add_argument(f"--{keyword.replace('_', '-')}", dest=keyword, **{**defaults, **described})


def _prepare(arguments: argparse.Namespace) -> None:
    from fusmae_hf.preparation.prepare import prepare

    archive: Archive = arguments.archive
    given = vars(arguments)
    options = {keyword: given[keyword] for keyword in (*archive.options, *archive.shared) if keyword in given}
    reader = archive.open(given.get("root"), options)
    print(reader.summary, flush=True)
    report = prepare(
        reader,
        arguments.out,
        reader_options={
            name: value
            for name, value in options.items()
            if name not in archive.shared and not _is_place(value)  # another machine has other places
        },
        **{keyword: given[keyword] for keyword in WRITING},
    )
    print(report)
    if report.dataset:
        print(LOOK.format(out=arguments.out))


def _is_place(value: Any) -> bool:
    """True for the name of a file or folder."""
    return isinstance(value, str | Path) and Path(value).exists()
