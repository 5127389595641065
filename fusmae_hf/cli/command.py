"""How a command is added to `fusmae`."""

import argparse
from pathlib import Path
from typing import Any


def add_command(
    commands: Any, parents: list[argparse.ArgumentParser], name: str, summary: str, description: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a command; its module imports what the work needs when it runs, so that `fusmae --help` is quick.

    Args:
        commands: where `argparse` collects sub-commands.
        parents: parsers with the options of every command.
        name: what the user types.
        summary: its line in `fusmae --help`.
        description: what it does, in lines as they are to be shown.
        examples: calls of it.
    """
    title = "example" if len(examples) == 1 else "examples"
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="\n  ".join([f"{title}:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )


def require_writable(picture: Path) -> None:
    """Refuse a file to be written whose folder is not there, or that is a folder.

    Raises:
        FileNotFoundError, IsADirectoryError: names it.
    """
    if not picture.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {picture.parent} to write {picture.name} to.")
    if picture.is_dir():
        raise IsADirectoryError(f"{picture} is a folder: name a file in it, such as {picture / 'picture.png'}.")
