"""The command `fusmae app`: the demo page."""

import argparse
import socket
from typing import Any

from fusmae_hf.cli.command import add_command


def add_app(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae app`."""
    command = add_command(
        commands,
        parents,
        "app",
        "serve a page on which a checkpoint reconstructs pairs",
        "Serve a page on which a pretraining checkpoint reconstructs what is hidden of a pair:\n"
        "a simulated one, one of a folder of shards, or an uploaded one.\n"
        'Needs the extra `app`: `pip install -e ".[app]"` in a clone of the repository.',
        "fusmae app --checkpoint outputs/pretrain",
        "fusmae app --checkpoint outputs/pretrain --shards shards/reben --split validation",
    )
    command.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="pretraining checkpoint: a folder or a Hub id"
    )
    command.add_argument("--shards", metavar="SHARDS", help="choose samples from these shards, not simulated ones")
    command.add_argument("--split", metavar="SPLIT", help="split of the shards (default test)")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", type=int, metavar="N", help="port (default: the first free one from 7860 on)")
    command.set_defaults(run=_app)


def _app(arguments: argparse.Namespace) -> int:
    from fusmae_hf.app.page import serve_app

    if arguments.split and not arguments.shards:
        raise ValueError("--split is for the shards of --shards: simulated pairs have none.")
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise ValueError(f"--port is {arguments.port}, but ports are 1 to 65535.")
    try:
        socket.getaddrinfo(arguments.host, arguments.port)
    except OSError as error:
        raise ValueError(f"--host is {arguments.host!r}, which is no address of this machine ({error}).") from error
    serve_app(arguments.checkpoint, arguments.shards, arguments.split or "test", arguments.host, arguments.port)
    return 0
