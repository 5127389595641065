"""The command `fusmae verify`: whether shards are whole and plausible."""

import argparse
import json
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command


def add_verify(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae verify`."""
    command = add_command(
        commands,
        parents,
        "verify",
        "check that shards are whole and plausible",
        "Check every file and every pair of a folder of shards, and name everything that is wrong. The exit\n"
        "code is 0 where the shards are sound (warnings do not count) and 1 where they are not.",
        "fusmae verify shards/ --json problems.json",
    )
    command.add_argument("shards", help="folder written by `fusmae prepare`, or its URL")
    command.add_argument("--split", help="check this split only (default all)")
    command.add_argument("--strict", action="store_true", help="warnings are errors")
    command.add_argument("--quick", action="store_true", help="check footers and counts only, not the pixels")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all problems to this file")
    command.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from fusmae_hf.preparation.verification import verify_shards

    report = verify_shards(
        arguments.shards, arguments.split, quick=arguments.quick, strict=arguments.strict, progress=True
    )
    print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        print(f"All {len(report.problems):,} problems: {arguments.json}")
    return 0 if report.sound else 1
