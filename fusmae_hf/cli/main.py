"""The console script `fusmae`: preparing archives of Sentinel-1/2 pairs, and looking into what was prepared."""

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from tqdm import tqdm

from fusmae_hf import __version__
from fusmae_hf.cli.app import add_app
from fusmae_hf.cli.doctor import add_doctor
from fusmae_hf.cli.inspect import add_inspect
from fusmae_hf.cli.map import add_map
from fusmae_hf.cli.merge import add_merge
from fusmae_hf.cli.prepare import add_prepare
from fusmae_hf.cli.push import add_push
from fusmae_hf.cli.show import add_show
from fusmae_hf.cli.stats import add_stats
from fusmae_hf.cli.verify import add_verify
from fusmae_hf.errors import USER_ERRORS
from fusmae_hf.files.retries import is_passing
from fusmae_hf.interrupts import INTERRUPTED, heeding_interrupts
from fusmae_hf.requirements import require_libraries

ENTRY_POINTS = "fusmae_hf.commands"
"""Group of entry points, each a function that adds a command: `add(commands, parents)` as those below."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fusmae`.

    Args:
        argv: arguments without the name of the program; those of the process by default.

    Returns:
        Exit code: 0, 1 where `verify` found errors, a step of `protocol` or a part of `map` failed, or `doctor` found
        something required broken, 2 after a user's mistake, 130 after an interrupt.
    """
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        _say("Interrupted.")
        return INTERRUPTED
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with heeding_interrupts():
                if not getattr(arguments, "any_release", False):
                    require_libraries()
                return arguments.run(arguments) or 0
        except KeyboardInterrupt:
            if arguments.debug:
                raise
            _say(getattr(arguments, "interrupted", "Interrupted."))
            return INTERRUPTED
        except USER_ERRORS as error:
            if arguments.debug:
                raise
            _say(f"Error: {_message(error)}")
            return 2
        except Exception as error:
            if arguments.debug or not is_passing(error):
                raise
            _say(f"Error: {type(error).__name__}: {error}. Is there a network, and is the server up?")
            return 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in a line or two: all options are in `--help`.

    Options of all commands may be written with hyphens or underscores.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse."""
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([self._spelt(argument) for argument in given], namespace)

    def _spelt(self, argument: str) -> str:
        """An option as this parser knows it."""
        name, sign, value = argument.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return argument
        others = (f"--{name[2:].replace(*pair)}" for pair in (("_", "-"), ("-", "_")))
        return next((f"{other}{sign}{value}" for other in others if other in self._option_string_actions), argument)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; each sets `run` to the function that does the work.

    Commands of the training programs are found by their entry point: this package does not import them.
    """
    parser = Parser(
        prog="fusmae",
        description="Prepare, check, measure and share pairs of Sentinel-1 and Sentinel-2 patches for Fus-MAE, "
        "measure its checkpoints, and map scenes with them.",
    )
    parser.add_argument("--version", action="version", version=f"fusmae {__version__}")
    debugging = argparse.ArgumentParser(add_help=False)
    debugging.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_prepare,
        add_merge,
        add_inspect,
        add_stats,
        add_verify,
        add_push,
        add_show,
        add_map,
        *(entry.load() for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)),
        add_doctor,
        add_app,
    ):
        add(commands, [debugging])
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parsed arguments; of a command with a `handed_on`, those after `--` go there, for another program."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    command = commands.choices.get(argv[0]) if argv else None
    if command is None or command.get_default("handed_on") is None or "--" not in argv:
        return parser.parse_args(argv)
    place = argv.index("--")
    arguments = parser.parse_args(argv[:place])
    arguments.handed_on = argv[place + 1 :]
    return arguments


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
