"""How a run ends when a scheduler takes its machine away: at once where nothing is lost, else after a checkpoint.

SIGTERM, as Kubernetes, Slurm and spot machines send it, and SIGUSR1, as Slurm sends it ahead of time with
`--signal=USR1@120`, mean the same here, and each further one changes nothing. SIGINT (Ctrl-C) is left to Python.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a run early."""

EXIT_CODE = 75
"""Exit code of a run that was ended by one of `SIGNALS`: EX_TEMPFAIL of sysexits.h, "try again later"."""

ORPHANED = 5.0
"""Seconds within which the worker of a loader ends once the process that started it is gone."""


class Preempted(SystemExit):
    """The run was told to end and can be resumed. Uncaught, it ends the process with `EXIT_CODE`.

    Args:
        message: what became of the run, and how to go on.
    """

    def __init__(self, message: str):
        super().__init__(EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class SignalWatch:
    """Remembers whether one of `SIGNALS` arrived, so that the step in progress can end first."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the context. Python lets only the main thread of a process do so: others do not."""
        self.received = None
        with _handlers(self._remember, lambda number: None):
            yield

    def _remember(self, number: int) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            # Not `print`: the signal may have interrupted one.
            os.write(2, f"{self.received.name}: ending after this step, with a checkpoint.\n".encode())


@contextmanager
def ends_by_signal() -> Iterator[None]:
    """End with `EXIT_CODE` as soon as one of `SIGNALS` arrives, unless a `SignalWatch` is there to see to it."""

    def end(number: int) -> None:
        message = f"{signal.Signals(number).name}: ended at once, with no further checkpoint. Start the same command "
        message += "with `--resume_from_checkpoint auto` to go on."
        os.write(2, f"{message}\n".encode())
        raise Preempted(message)

    def die(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    with _handlers(end, die):
        yield


@contextmanager
def _handlers(act: Callable[[int], None], act_in_child: Callable[[int], None]) -> Iterator[None]:
    """Handle `SIGNALS` in this process, and otherwise in those that are forked from it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        (act if os.getpid() == owner else act_in_child)(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Hold `SIGNALS` back until the end of the context; what is forked in it starts with them held back."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class UnpreemptedWorker:
    """Makes the worker of a loader deaf to `SIGNALS` of others than the process that started it; a `worker_init_fn`.

    Schedulers signal every process of a job. Workers that died of it would take the main process with them before it
    has written its checkpoint. SIGTERM of the main process still ends them: it comes, when a loader is thrown away or
    the program ends, to those that did not end when they were asked. Where the main process was killed they end within
    `ORPHANED` seconds, whatever they are doing.

    Args:
        then: called with the number of the worker, if any.
    """

    def __init__(self, then: Callable[[int], Any] | None = None):
        self.then = then

    def __call__(self, worker: int) -> None:
        """Called in the worker before it begins."""
        if hasattr(signal, "sigtimedwait"):
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            threading.Thread(target=_await_end, args=(os.getppid(),), name="signals", daemon=True).start()
        else:  # macOS does not tell who sent a signal
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # forgets one that was held back
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.then is not None:
            self.then(worker)


def _await_end(parent: int) -> None:
    """Take `SIGNALS` until one of them is the SIGTERM of a process, or that process is gone, and end this one then."""
    while os.getppid() == parent:
        told = signal.sigtimedwait(SIGNALS, ORPHANED / 2)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == parent:
            break
    os._exit(EXIT_CODE)
