"""How a run ends when a scheduler takes its machine away: at once where nothing is lost, else after a checkpoint.

SIGTERM, as Kubernetes, Slurm and spot machines send it, and SIGUSR1, as Slurm sends it ahead of time with
`--signal=USR1@120`, mean the same here, and each further one changes nothing. SIGINT (Ctrl-C) ends at once.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback

from fusmae_hf.interrupts import INTERRUPTED, heeding_interrupts
from fusmae_hf.training.loop.processes import maximum_everywhere

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals that end a run early. Windows has no SIGUSR1."""

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


class EvaluationInterrupted(Exception):
    """A signal to end came while held-out pairs were being evaluated."""


class Preemption(TrainerCallback):
    """Makes the step in progress the last one of a run when one of `SIGNALS` arrives; held by a trainer.

    A checkpoint is written after that step, and `Preempted` raised. In a run of several processes all must agree on
    the step: they do at its gradient, so it is at most the next one. An evaluation is cut short, and noted in the
    checkpoint as due.

    Args:
        trainer: sets `told` where its processes agree in a step, and acts on `EvaluationInterrupted`.

    Attributes:
        told: number of the signal on which all processes agree, 0 for none.
        evaluation_due: the run ends before the evaluation that belongs to its last step.
        began_at: step at which training began.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.received = self.told = self.began_at = 0
        self.evaluation_due = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the end of the context. Python lets only the main thread of a process do so: others do not."""
        self.received = self.told = 0
        with _handlers(self._remember, lambda number: None):
            yield

    def _remember(self, number: int) -> None:
        if not self.received:
            self.received = number
            # Not `print`: the signal may have interrupted one.
            os.write(2, f"{signal.Signals(number).name}: ending after this step, with a checkpoint.\n".encode())

    def is_told_anywhere(self) -> bool:
        """Whether any process was asked to end; every one must call this."""
        self.told = self.told or int(maximum_everywhere([float(self.received)], self.trainer.args.device)[0])
        return bool(self.told)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start anew."""
        self.began_at, self.evaluation_due = state.global_step, False

    def on_step_end(self, args, state, control, **kwargs):
        """Save and end; after the last step of an epoch, once it is known what the end of the epoch asks for."""
        last_of_epoch = float(state.epoch).is_integer() or control.should_training_stop
        if self.told or (args.world_size == 1 and self.is_told_anywhere()):
            self._save_instead(control, not last_of_epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        """See `on_step_end`."""
        if self.is_told_anywhere():
            self._save_instead(control, True)

    def _save_instead(self, control: Any, now: bool) -> None:
        self.evaluation_due |= control.should_evaluate
        control.should_evaluate, control.should_save = False, now

    def on_prediction_step(self, args, state, control, **kwargs):
        """Cut an evaluation short."""
        if self.trainer.is_in_train and self.is_told_anywhere():
            raise EvaluationInterrupted

    def on_save(self, args, state, control, **kwargs):
        """End, once what was told to end has its checkpoint."""
        if self.told:
            checkpoint = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            raise self.end(f"checkpoint {checkpoint} written after step {state.global_step}")

    def save_without_evaluation(self) -> None:
        """End a run in the midst of an evaluation, with a checkpoint that says so."""
        trainer, state, control = self.trainer, self.trainer.state, self.trainer.control
        if state.global_step == self.began_at:
            raise self.end("ended before the first step, with nothing new to save")
        state.log_history = [
            entry
            for entry in state.log_history
            if entry["step"] != state.global_step or not any(name.startswith("eval_") for name in entry)
        ]
        self.evaluation_due = True
        control.should_evaluate = control.should_save = False
        trainer._save_checkpoint(trainer.model_wrapped, None)
        trainer.callback_handler.on_save(trainer.args, state, control)  # which ends the run

    def end(self, what: str) -> Preempted:
        """What to raise, once trackers have written what they hold; says what became of the run and how to go on."""
        trainer = self.trainer
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        name = signal.Signals(self.told).name
        message = f"{name}: {what}; start the same command with --resume_from_checkpoint auto to go on"
        if trainer.is_world_process_zero():
            print(message, flush=True)
        return Preempted(message)


@contextmanager
def ends_by_signal() -> Iterator[None]:
    """End with `EXIT_CODE` as soon as one of `SIGNALS` arrives, unless a `Preemption` is there to see to it."""

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


RESUME = "Start the same command with `--resume_from_checkpoint auto` to go on from its newest checkpoint."


@contextmanager
def interrupted_with_a_sentence(again: str = RESUME) -> Iterator[None]:
    """End the process with `INTERRUPTED` and a message after Ctrl-C, where nobody else wants to know of it.

    Args:
        again: how to go on.
    """
    try:
        with heeding_interrupts():
            yield
    except KeyboardInterrupt:
        os.write(2, f"\nInterrupted. {again}\n".encode())
        raise SystemExit(INTERRUPTED) from None


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
    if not hasattr(signal, "pthread_sigmask"):  # Windows forks nothing
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals_of_others(worker: int) -> None:
    """Make the worker of a loader deaf to `SIGNALS` of others than the process that started it; a `worker_init_fn`.

    Schedulers signal every process of a job. Workers that died of it would take the main process with them before it
    has written its checkpoint. SIGTERM of the main process still ends them: it comes, when a loader is thrown away or
    the program ends, to those that did not end when they were asked. Where the main process was killed they end within
    `ORPHANED` seconds, whatever they are doing.
    """
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        parents = (os.getppid(), multiprocessing.parent_process())  # two where a server forks the workers
        threading.Thread(target=_await_end, args=parents, name="signals", daemon=True).start()
    else:  # macOS and Windows do not tell who sent a signal
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # forgets one that was held back
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _await_end(forked_by: int, parent: Any) -> None:
    """Take `SIGNALS` until one is the SIGTERM of the main process, or that process is gone, and end this one then."""
    while os.getppid() == forked_by and parent.is_alive():
        told = signal.sigtimedwait(SIGNALS, ORPHANED / 2)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == parent.pid:
            break
    os._exit(EXIT_CODE)
