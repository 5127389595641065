"""Ctrl-C that ends a program wherever it comes."""

import _thread
import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REPEATED = 10.0
"""Seconds after which a Ctrl-C is repeated in a program that still runs."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of shells."""


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Let no Ctrl-C get lost until the end of the context.

    Python ignores a KeyboardInterrupt that is raised in a finalizer. In the import of an extension written in C it
    becomes an ImportError, which some libraries take for a package that is missing, and go on. So it is repeated every
    `REPEATED` seconds, and stands for all that is raised after it. Where the process was started deaf to Ctrl-C, as in
    the background of a script, it stays so.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, whatever error it led to.
    """
    ends = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL)
    if not ends or threading.current_thread() is not threading.main_thread():
        yield
        return
    repeats: list[threading.Timer] = []

    def interrupt(number: int, frame: Any) -> None:
        repeat = threading.Timer(REPEATED, _thread.interrupt_main)
        repeat.daemon = True
        repeats.append(repeat)
        repeat.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if not repeats:
            raise
        if isinstance(error, ImportError):
            # An extension of which half is imported aborts the process when the interpreter is taken down.
            atexit.register(_end)
        raise KeyboardInterrupt from error
    except SystemExit as error:
        if repeats and isinstance(error.__cause__, Exception):  # an error that somebody put into a sentence
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        for repeat in repeats:
            repeat.cancel()


def _end() -> None:
    sys.stdout.flush()
    os._exit(INTERRUPTED)
