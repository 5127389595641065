"""The command `fusmae merge`: parts of one preparation become one folder of shards."""

import argparse
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command
from fusmae_hf.cli.prepare import GO_ON, LOOK


def add_merge(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae merge`."""
    command = add_command(
        commands,
        parents,
        "merge",
        "bring parts of one preparation, or sets of one kind, together",
        "Bring the files together that `fusmae prepare --part i/n` wrote into folders of their own, or whole sets\n"
        "that differ in nothing but the offset and the units of their scenes.\n"
        "Files are linked where that is possible, otherwise copied; the parts stay as they are.",
        "fusmae merge shards/ part-1/ part-2/ part-3/",
    )
    command.add_argument("out", type=Path, help="folder for all shards: new, empty, or one of the parts")
    command.add_argument("parts", type=Path, nargs="+", metavar="PART", help="folder that a part was written into")
    command.set_defaults(run=_merge, interrupted=GO_ON)


def _merge(arguments: argparse.Namespace) -> None:
    from fusmae_hf.preparation.prepare import describe_dataset
    from fusmae_hf.preparation.state import merge_parts, merge_sets, read_summary
    from fusmae_hf.shards.format import FILE_NAME

    plans = [read_summary(part) if part.is_dir() else None for part in arguments.parts]
    whole = [(part / FILE_NAME).is_file() for part in arguments.parts]
    fingerprints = [plan.fingerprint for plan in plans if plan]
    are_sets = len(plans) > 1 and all(whole) and len(set(fingerprints)) == len(fingerprints)
    dataset = (merge_sets if are_sets else merge_parts)(arguments.out, arguments.parts)
    print("\n".join(describe_dataset(dataset)))
    print(LOOK.format(out=arguments.out))
