"""The suite of faults can fail: other weights, a lost pair, a hang and a missing message make the table say so."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.training.started_programs import NotPossibleHere

from . import __main__ as chaos
from .disturbed_runs import Ended, ends, run
from .faults import judged

STEPS = [{"step": step, "skipped": False, "pairs": [[0, f"pair-{step}"], [0, "pair-0"]]} for step in (1, 2)]


def write(folder, weights=1.0, steps=STEPS):
    """What a run leaves: its record, and its weights."""
    (folder / "run").mkdir(parents=True)
    (folder / "seen-0.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    save_file({"weight": torch.full((2,), weights)}, folder / "run" / "model.safetensors")


def changed(**changes):
    """A fault whose run differs from the uncut one in this."""

    def fault(folder, seed):
        write(folder.parent / f"whole-{seed}")
        write(folder, **changes)
        return judged(folder, folder.parent / f"whole-{seed}", "went on")

    return fault


def silent(folder, seed):
    folder.mkdir()
    ends(Ended(0, "", True), 0, "Resuming")


def hanging(folder, seed):
    folder.mkdir()
    run(["sleep", "100"], folder / "log")


def impossible(folder, seed):
    raise NotPossibleHere("no disk")


AGAIN = [{"step": 1, "skipped": False, "pairs": [[0, "pair-9"]]}]


@pytest.mark.parametrize(
    ("fault", "outcome", "lost", "equal"),
    [
        (changed(), "went on", "0", "yes"),
        (changed(steps=[*AGAIN, *STEPS]), "went on", "0", "yes"),  # the last execution of a step counts
        (changed(weights=1.001), "FAILED with seed 7: not as uncut", "0", "0 times"),
        (changed(steps=STEPS[:1]), "FAILED with seed 7: not as uncut", "2", "yes"),
        (changed(steps=[*STEPS, *AGAIN]), "FAILED with seed 7: not as uncut", "2", "yes"),
        (changed(steps=[*STEPS, {**STEPS[0], "step": 3}]), "FAILED with seed 7: 2 pairs too many", "0", "yes"),
        (silent, "FAILED with seed 7: did not say 'Resuming'", "0 (1 unknown)", "0 times"),
        (hanging, "FAILED with seed 7: hangs, by itself", "0 (1 unknown)", "0 times"),
        (impossible, "skipped: no disk", "-", "-"),
    ],
)
def test_the_table_and_the_exit_code_say_what_was_not_as_promised(
    tmp_path, monkeypatch, capsys, fault, outcome, lost, equal
):
    fault.__name__, fault.__doc__ = "fault", "A fault"
    monkeypatch.setattr(chaos, "FAULTS", {fault: ("local",)})
    monkeypatch.setattr(chaos, "write_shards", lambda folder: None)
    monkeypatch.setattr("tests.chaos.faults.uncut", lambda folder, settings: None)
    monkeypatch.setattr("tests.chaos.disturbed_runs.LONGEST", 0.1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = chaos.main(["--times", "1", "--seed", "7"])
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("| A fault"))
    _, _, times, said, *figures, _ = (cell.strip() for cell in line.split("|"))
    assert said.startswith(outcome)
    assert figures == [lost, equal]
    assert times == ("0" if fault is impossible else "1")
    failed = outcome.startswith("FAILED")
    assert code == failed
    assert ("python -m tests.chaos --only fault --seed 7 --times 1" in printed) == failed
    kept = re.search(r"kept in (\S+)", said)
    assert bool(kept) == failed == bool(list(tmp_path.glob("fusmae-chaos-*/fault-7")))
