"""Ctrl-C in moments in which Python, or a library, loses it."""

import signal
import subprocess
import sys
import time

import pytest

from fusmae_hf import interrupts
from fusmae_hf.interrupts import INTERRUPTED, heeding_interrupts

pytestmark = pytest.mark.usefixtures("ctrl_c_as_in_a_terminal")


class PressedAtItsEnd:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_came_in_a_finalizer_is_repeated(monkeypatch):
    monkeypatch.setattr(interrupts, "REPEATED", 0.05)
    survived = []

    def go_on():
        PressedAtItsEnd()
        survived.append(True)  # Python ignored it
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pass

    with pytest.raises(KeyboardInterrupt), heeding_interrupts():
        go_on()
    assert survived
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def pressed_in_an_import():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("initialization failed") from error


def into_a_sentence():
    try:
        pressed_in_an_import()
    except ValueError as error:
        raise SystemExit("Error: the package is not installed") from error


@pytest.mark.parametrize("act", [pressed_in_an_import, into_a_sentence])
def test_it_stands_for_the_error_that_a_library_made_of_it(act):
    with pytest.raises(KeyboardInterrupt), heeding_interrupts():
        act()


def test_a_program_that_ends_in_time_is_not_called_interrupted():
    with heeding_interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("error", [ValueError("of its own"), SystemExit(75)])
def test_without_one_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, heeding_interrupts():
        raise error
    assert caught.value is error


def test_a_process_that_was_started_deaf_to_it_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with heeding_interrupts():
        signal.raise_signal(signal.SIGINT)


HALF_IMPORTED = """
import atexit, os, signal
from fusmae_hf.interrupts import heeding_interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.abort)  # as extensions do of which half is imported
try:
    with heeding_interrupts():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error
except KeyboardInterrupt:
    print("Interrupted.")
"""


def test_a_half_imported_extension_does_not_abort_the_process():
    done = subprocess.run([sys.executable, "-c", HALF_IMPORTED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (INTERRUPTED, "Interrupted.\n")
