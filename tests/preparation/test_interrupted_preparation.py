"""However preparing is interrupted or divided, going on gives the same files to the byte."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from fusmae_hf.cli.main import main
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.preparation.plan import plan_preparation
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.preparation.state import merge_parts
from fusmae_hf.preparation.work import WritingOptions, write_files
from fusmae_hf.shards.dataset_info import read_dataset_info, read_left_out

SIZES = {"rows_per_shard": 6, "row_group_rows": 2}
"""Six files in all: four of train, one each of validation and test."""

PLANNED = SIZES | {
    "limit": None,
    "hold_out": 0,
    "seed": 0,
    "keep_order": False,
    "max_no_data": 1,
    "require_both": False,
    "reader_options": {},
}


class Numbered:
    """Thirty tiny pairs; every seventh cannot be read.

    Args:
        die_at: the process is killed as it begins to read this pair, unless the file `survived` is there; it is made
            before, so that the next try survives.
        raise_at: this pair raises `error` instead, under the same condition.
    """

    info = PairsInfo("numbered", "these tests", "none", sar_bands=("VV", "VH"), optical_bands=("B02", "B03", "B04"))
    summary = "Thirty pairs."
    brightness = 0

    def __init__(self, die_at=None, raise_at=None, error=None, survived=None):
        self.ids = [f"pair-{number:03d}" for number in range(30)]
        self.die_at, self.raise_at, self.error, self.survived = die_at, raise_at, error, survived

    def __len__(self):
        return len(self.ids)

    def split_of(self, index):
        return {0: "validation", 1: "test"}.get(index % 6, "train")

    def left_out(self):
        return iter([("snowy", "snow")])

    def read(self, index):
        writing = self.survived and (self.survived.parent / "begun").exists()
        if writing and index in (self.die_at, self.raise_at) and not self.survived.exists():
            self.survived.touch()
            if self.raise_at is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)
        if index % 7 == 6:
            raise PairError(f"/archive/{self.ids[index]}_B03.tif: cannot be read.")
        generator = np.random.default_rng(index)
        sar = generator.normal(-12, 2, (2, 8, 8)).astype(np.float32) + self.brightness
        sar[1] -= 7
        return Pair(self.ids[index], sar, generator.integers(1, 900, (3, 8, 8), dtype=np.uint16))


def hashes(folder):
    """SHA-256 of every file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run of one process writes."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(Numbered(), folder, **SIZES)
    found = hashes(folder)
    assert len(found) == 6 + 2
    return found


@pytest.fixture(scope="module")
def processes():
    """How to start a process: quickly, since the package is already imported there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusmae_hf.preparation.work", __name__])
    return context


def exit_code(processes, function, *arguments):
    process = processes.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


FEW_FILES = {"rows_per_shard": 30, "row_group_rows": 10}
"""One file for each split."""


def prepare_until_killed(folder, operation):
    """Prepare in this process, which is killed before the given file operation of those that change the folder."""
    count = 0

    def dying(function):
        def called(*arguments, **options):
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return called

    for name in ("replace", "fsync", "rmdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    prepare(Numbered(), folder, progress=False, **FEW_FILES)


def test_a_kill_at_any_step_changes_nothing_in_the_end(tmp_path, processes):
    prepare(Numbered(), tmp_path / "whole", **FEW_FILES)
    folder, operation, whole = tmp_path / "out", 0, hashes(tmp_path / "whole")
    while True:
        operation += 1
        shutil.rmtree(folder, ignore_errors=True)
        code = exit_code(processes, prepare_until_killed, folder, operation)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        report = prepare(Numbered(), folder, **FEW_FILES)
        assert hashes(folder) == whole, operation
        assert report.files_kept + report.files_written == 3
    assert operation > 20


def test_run_after_killed_run_gets_done(tmp_path, processes):
    prepare(Numbered(), tmp_path / "whole", **FEW_FILES)
    codes = [exit_code(processes, prepare_until_killed, tmp_path / "out", 14) for _ in range(12)]
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def prepare_simulated(folder, *options):
    os._exit(main(["prepare", "simulated", str(folder), "--num-pairs", "24", "--rows-per-shard", "4", *options]))


def test_the_command_killed_at_random_moments_goes_on(tmp_path, processes):
    assert exit_code(processes, prepare_simulated, tmp_path / "whole") == 0
    generator, kills = np.random.default_rng(0), 0
    for _ in range(40):
        process = processes.Process(target=prepare_simulated, args=(tmp_path / "out",))
        process.start()
        process.join(generator.uniform(0.05, 0.8))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
    assert exit_code(processes, prepare_simulated, tmp_path / "out") == 0
    assert kills
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("num_proc", [0, 3])
def test_the_number_of_processes_changes_nothing(tmp_path, whole, processes, num_proc):
    report = prepare(Numbered(), tmp_path, num_proc=num_proc, **SIZES)
    assert hashes(tmp_path) == whole
    assert (report.files_written, report.num_pairs) == (6, 26)


def begin(folder):
    """Write a plan and let `Numbered` know that what follows is writing."""
    folder.mkdir()
    (folder.parent / "begun").touch()


@pytest.mark.parametrize("die_at", [1, 8, 29])
def test_a_worker_that_is_killed_is_named_by_its_file_and_costs_only_that(tmp_path, whole, processes, die_at):
    begin(tmp_path / "out")
    reader = Numbered(die_at=die_at, survived=tmp_path / "survived")
    (tmp_path / "begun").unlink()
    plan = plan_preparation(reader, **PLANNED)
    name = next(file.name for file in plan.files if die_at in file.indices)
    (tmp_path / "begun").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusmae_hf.preparation.prepare._begin", begin_without_reading)
        with pytest.raises(ChildProcessError, match=rf"{name} ended without a word \(signal 9, SIGKILL\).*memory"):
            prepare(reader, tmp_path / "out", num_proc=2, **SIZES)
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    assert not list((tmp_path / "out" / "data").glob(".*"))
    prepare(reader, tmp_path / "out", num_proc=2, **SIZES)
    assert sorted(hashes(tmp_path / "out")) == sorted(whole)


def begin_without_reading(reader, plan, folder, *_):
    from fusmae_hf.preparation.state import write_summary

    write_summary(folder, plan.summary, plan.left_out)
    return plan.summary


def prepare_with_slow_workers(folder):
    (folder.parent / "begun").touch()
    prepare(Waiting(folder.parent / "pids"), folder, num_proc=2, progress=False, **SIZES)


class Waiting(Numbered):
    """Each process that writes notes its id and then waits for ever."""

    def __init__(self, pids):
        super().__init__()
        self.pids = pids
        self.main = os.getpid()

    def read(self, index):
        if os.getpid() != self.main:
            with self.pids.open("a") as file:
                file.write(f"{os.getpid()}\n")
            signal.pause()
        return super().read(index)


def wait_until(condition):
    """Wait for another process, at most a minute."""
    for _ in range(600):
        if condition():
            return
        multiprocessing.connection.wait([], 0.1)
    raise AssertionError("waited in vain")


def test_workers_end_when_the_main_process_is_killed(tmp_path, processes):
    pids = tmp_path / "pids"
    process = processes.Process(target=prepare_with_slow_workers, args=(tmp_path / "out",))
    process.start()
    wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
    process.kill()
    process.join()
    workers = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def interruptible(folder):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder.parent / "messages").open("w") as messages:
        os.dup2(messages.fileno(), 2)
        with pytest.MonkeyPatch.context() as patch:
            simulated = "fusmae_hf.simulation.pairs.SimulatedPairs"
            patch.setattr(simulated, lambda *_, **__: Waiting(folder.parent / "pids"))
            code = main(["prepare", "simulated", str(folder), "--num-proc", "2", "--rows-per-shard", "6"])
    os._exit(code)


def test_ctrl_c_ends_all_processes_at_once_and_says_how_to_go_on(tmp_path, processes):
    pids = tmp_path / "pids"
    process = processes.Process(target=interruptible, args=(tmp_path / "out",))
    process.start()
    wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert (tmp_path / "messages").read_text().splitlines()[-1] == (
        "Interrupted. Finished files are kept: run the same command again to go on."
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split())
    assert not list((tmp_path / "out").rglob("*.incomplete"))


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_disk_that_is_full_in_the_middle_loses_one_file(tmp_path, whole, processes, num_proc):
    (tmp_path / "begun").touch()
    full = OSError(errno.ENOSPC, "No space left on device")
    reader = Numbered(raise_at=29, error=full, survived=tmp_path / "survived")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusmae_hf.preparation.prepare._begin", begin_without_reading)
        with pytest.raises(OSError, match="No space left on device"):
            prepare(reader, tmp_path / "out", num_proc=num_proc, **SIZES)
    kept = len(list((tmp_path / "out" / "data").iterdir()))
    report = prepare(reader, tmp_path / "out", **SIZES)
    assert report.files_kept == kept
    assert {name: value for name, value in hashes(tmp_path / "out").items() if "data/" in name} == {
        name: value for name, value in whole.items() if "data/" in name
    }


@pytest.mark.parametrize("times", range(1, 16, 2))
def test_a_full_disk_at_any_write_is_named_and_then_gone_on_from(tmp_path, whole, monkeypatch, times):
    calls, fsync = 0, os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == times:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\).*finished are kept"):
        prepare(Numbered(), tmp_path, **SIZES)
    assert not list(tmp_path.rglob("*.incomplete"))
    prepare(Numbered(), tmp_path, **SIZES)
    assert hashes(tmp_path) == whole


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_in_one_folder_make_the_whole(tmp_path, whole, order):
    reports = [prepare(Numbered(), tmp_path, part=(part, 3), **SIZES) for part in order]
    assert [report.dataset is None for report in reports] == [True, True, False]
    assert f"(part {', '.join(f'{part}/3' for part in sorted(order[1:]))})" in str(reports[0])
    assert hashes(tmp_path) == whole


def test_parts_in_folders_of_their_own_are_merged_to_the_whole(tmp_path, whole, capsys):
    parts = [tmp_path / str(part) for part in (1, 2, 3)]
    for number, folder in enumerate(parts, start=1):
        prepare(Numbered(), folder, part=(number, 3), **SIZES)
        assert not (folder / "dataset_info.json").exists()
    assert main(["merge", str(tmp_path / "out"), *map(str, parts)]) == 0
    assert "Prepared numbered: 26 pairs" in capsys.readouterr().out
    assert hashes(tmp_path / "out") == whole
    assert merge_parts(tmp_path / "out", parts) == read_dataset_info(tmp_path / "out")
    assert hashes(tmp_path / "out") == whole
    merge_parts(parts[0], parts)
    assert hashes(parts[0]) == whole


def test_parts_are_copied_where_they_cannot_be_linked(tmp_path, whole, monkeypatch):
    def no_links(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    for part in (1, 2):
        prepare(Numbered(), tmp_path / str(part), part=(part, 2), **SIZES)
    merge_parts(tmp_path / "out", [tmp_path / "1", tmp_path / "2"])
    assert hashes(tmp_path / "out") == whole


def test_a_merge_without_all_parts_names_those_that_are_missing(tmp_path):
    for part in (1, 2):
        prepare(Numbered(), tmp_path / str(part), part=(part, 3), **SIZES)
    with pytest.raises(ValueError, match=r"2 of the 6 files are missing: data/train-00002-.*\(part 3/3\)"):
        merge_parts(tmp_path / "out", [tmp_path / "1", tmp_path / "2"])
    assert not (tmp_path / "out").exists()


def test_a_merge_of_something_else_is_refused(tmp_path):
    prepare(Numbered(), tmp_path / "1", part=(1, 2), **SIZES)
    prepare(Numbered(), tmp_path / "2", part=(2, 2), seed=1, **SIZES)
    with pytest.raises(ValueError, match="are not parts of one preparation: `seed` was 0 and is 1 now"):
        merge_parts(tmp_path / "out", [tmp_path / "1", tmp_path / "2"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no part of a preparation"):
        merge_parts(tmp_path / "out", [tmp_path / "1", tmp_path / "empty"])


def prepare_part(folder, part):
    prepare(Numbered(), folder, part=part, progress=False, **SIZES)


@pytest.mark.parametrize("attempt", range(3))
def test_parts_that_begin_and_finish_at_once_do_not_get_in_each_others_way(tmp_path, whole, processes, attempt):
    running = [processes.Process(target=prepare_part, args=(tmp_path, (part, 3))) for part in (1, 2, 3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert hashes(tmp_path) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 20}, "`limit` was None and is 20 now"),
        ({"seed": 1}, "`seed` was 0 and is 1 now"),
        ({"rows_per_shard": 7}, "`rows_per_shard` was 6 and is 7 now"),
        ({"max_no_data": 0.5, "keep_order": True}, "`keep_order` was False and is True now; `max_no_data` was 1.0"),
        ({"reader_options": {"cloud": True}}, "`reader.cloud` was None and is True now"),
    ],
)
@pytest.mark.parametrize("part", [(1, 2), (1, 1)], ids=["unfinished", "finished"])
def test_going_on_with_other_arguments_is_refused(tmp_path, arguments, message, part):
    prepare(Numbered(), tmp_path, part=part, **SIZES)
    before = hashes(tmp_path)
    with pytest.raises(FileExistsError, match=f"was begun with other arguments: {message}.*--overwrite"):
        prepare(Numbered(), tmp_path, **SIZES | arguments)
    assert hashes(tmp_path) == before
    prepare(Numbered(), tmp_path, overwrite=True, **SIZES | arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"brightness": -1}, r"the pixels of pair-\d+ are not the same"),
        ({"ids": Numbered().ids[:-1]}, "number of pairs found was 30 and is 29 now"),
        (
            {"split_of": lambda index: ("train", "test")[index % 2]},
            "the pairs found, or their splits, are not the same",
        ),
    ],
)
def test_going_on_with_other_pixels_pairs_or_splits_is_refused(tmp_path, changed, message):
    prepare(Numbered(), tmp_path, part=(1, 2), **SIZES)
    other = Numbered()
    vars(other).update(changed)
    with pytest.raises(FileExistsError, match=message):
        prepare(other, tmp_path, **SIZES)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_file_of_a_finished_folder_that_is_lost_is_written_again(tmp_path, whole, damage):
    prepare(Numbered(), tmp_path, **SIZES)
    shard = next(tmp_path.glob("data/train-00001-*"))
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:100])
    report = prepare(Numbered(), tmp_path, **SIZES)
    assert (report.files_written, report.files_kept) == (1, 5)
    assert hashes(tmp_path) == whole


def test_a_finished_folder_is_left_alone(tmp_path, whole):
    prepare(Numbered(), tmp_path, **SIZES)
    report = prepare(Numbered(), tmp_path, **SIZES)
    assert f"Nothing to do: {tmp_path} is complete." in str(report)
    assert list(report.left_out) == read_left_out(tmp_path)
    assert hashes(tmp_path) == whole


def test_a_reader_that_cannot_be_sent_to_workers_is_named(tmp_path):
    reader = Numbered()
    reader.open_file = (tmp_path / "open").open("w")
    with pytest.raises(ValueError, match=r"The reader Numbered cannot be sent to other processes.*--num-proc 1"):
        prepare(reader, tmp_path / "out", num_proc=2, **SIZES)


def test_progress_counts_every_pair_and_those_left_out(tmp_path, processes):
    reader, counted = Numbered(), []
    plan = plan_preparation(reader, **PLANNED)
    options = WritingOptions(tmp_path, "", "1/1", 2, 1.0, False, "skip", False)
    for num_proc in (1, 2):
        counted.clear()
        list(write_files(reader, plan.files, options, num_proc, lambda *counts: counted.append(counts)))
        assert np.sum(counted, axis=0).tolist() == [30, 4]
