"""Storage that stalls, goes away and comes back while shards are read."""

import errno
import os
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from fsspec.exceptions import FSTimeoutError
from huggingface_hub.errors import HfHubHTTPError

from fusmae_hf.files import retries as storage_retries
from fusmae_hf.files.retries import WAITS, forget_failures, is_passing, retried
from fusmae_hf.shards.decoding import DamagedShardError, MissingShardError
from fusmae_hf.shards.loading import load_pairs

SECOND = "data/train-00001-of-00003.parquet"


@pytest.fixture
def slept(monkeypatch):
    """Seconds that would have been slept, one entry a wait; tests may append what is to happen meanwhile."""

    class Clock(list):
        def meanwhile(self) -> None:
            """What happens during a wait."""

    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.append(seconds)
        clock.meanwhile()

    monkeypatch.setattr(storage_retries, "sleep", sleep)
    forget_failures()
    yield clock
    forget_failures()


def failing(error: Exception, times: int):
    """A function that raises so many times, then returns 7."""
    left = [error] * times

    def read() -> int:
        if left:
            raise left.pop()
        return 7

    return read


def stale(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def http_error(status: int) -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = type("Response", (), {"status_code": status})()
    return error


def test_a_passing_error_is_waited_out_with_growing_waits_and_warnings_that_name_the_file(slept):
    with pytest.warns(UserWarning, match=r"/a/b\.parquet cannot be read at the moment") as warned:
        assert retried(failing(stale(errno.EIO), 4), "/a/b.parquet") == 7
    assert slept == list(WAITS)
    assert sorted(slept) == slept
    assert sum(slept) == 60
    assert [str(warning.message).split("). ")[1] for warning in warned] == [
        "Try 2 of 5 in 1 s.",
        "Try 3 of 5 in 4 s.",
        "Try 4 of 5 in 15 s.",
        "Try 5 of 5 in 40 s.",
    ]


@pytest.mark.filterwarnings("ignore:.*cannot be read at the moment")
def test_after_five_tries_the_error_is_raised_and_further_failures_are_not_waited_for(slept):
    for name, waits in (("a", WAITS), ("a", ()), ("b", ())):
        slept.clear()
        with pytest.raises(OSError, match="Stale"):
            retried(failing(stale(errno.ESTALE), 99), name)
        assert tuple(slept) == waits
    # Something can be read again: other files are waited for, that which was given up is not.
    assert retried(lambda: 1, "c") == 1
    slept.clear()
    assert retried(failing(stale(errno.ESTALE), 1), "d") == 7
    assert len(slept) == 1
    with pytest.raises(OSError, match="Stale"):
        retried(failing(stale(errno.ESTALE), 1), "a")
    assert len(slept) == 1
    # Until it can be read.
    retried(lambda: 1, "a")
    assert retried(failing(stale(errno.ESTALE), 1), "a") == 7


@pytest.mark.parametrize(
    "error",
    [
        stale(errno.EIO),
        stale(errno.ESTALE),
        stale(errno.ETIMEDOUT),
        stale(errno.ENOTCONN),
        ConnectionResetError(),
        TimeoutError(),
        FSTimeoutError(),
        http_error(503),
        http_error(429),
    ],
    ids=repr,
)
def test_errors_of_storage_that_may_come_back_pass(error):
    assert is_passing(error)
    wrapped = DamagedShardError("cannot be read")
    wrapped.__cause__ = error
    assert is_passing(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        stale(errno.ENOSPC),
        stale(errno.EACCES),
        stale(errno.ENOENT),
        stale(errno.EISDIR),
        OSError("Corrupt footer"),
        ValueError("x"),
        http_error(404),
        http_error(401),
        MemoryError(),
    ],
    ids=repr,
)
def test_other_errors_do_not(error):
    assert not is_passing(error)


def test_other_errors_are_raised_at_once(slept):
    with pytest.raises(OSError, match="Permission"):
        retried(failing(stale(errno.EACCES), 1), "a")
    assert not slept


def test_errors_of_http_libraries_that_are_no_os_error_pass():
    httpx, aiohttp = pytest.importorskip("httpx2"), pytest.importorskip("aiohttp")
    assert is_passing(httpx.ReadTimeout("slow"))
    assert is_passing(httpx.ConnectError("gone"))
    assert is_passing(aiohttp.ServerDisconnectedError())
    assert not is_passing(aiohttp.InvalidURL("x"))


@pytest.fixture
def folder(prepare):
    """36 pairs in three files of twelve, row groups of four."""
    return prepare(train=36)


def all_batches(pairs) -> list[dict]:
    return [pairs.__getitems__([(0, row) for row in range(start, start + 6)]) for start in range(0, 36, 6)]


def assert_same(batches, expected) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert batch["id"] == other["id"]
        assert torch.equal(batch["sar"], other["sar"])
        assert torch.equal(batch["optical"].view(torch.int16), other["optical"].view(torch.int16))


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "url"])
def test_a_folder_that_vanishes_and_comes_back_gives_the_same_batches(folder, slept, scheme):
    expected = all_batches(load_pairs(folder, streaming=True))
    pairs = load_pairs(f"{scheme}{folder}", streaming=True, mix=1)
    before = pairs.__getitems__([(0, row) for row in range(6)])
    away = folder.with_name("away")
    folder.rename(away)
    slept.meanwhile = lambda: len(slept) == 3 and away.rename(folder)
    with pytest.warns(UserWarning, match=r"train-0000\d-of-00003\.parquet cannot be read at the moment"):
        rest = [pairs.__getitems__([(0, row) for row in range(start, start + 6)]) for start in range(6, 36, 6)]
    assert len(slept) == 3
    assert_same([before, *rest], expected)


def test_a_file_that_was_read_before_and_vanished_is_waited_for(folder, slept):
    pairs = load_pairs(folder, streaming=True, mix=1)
    pairs[12]
    away = folder / "away.parquet"
    (folder / SECOND).rename(away)
    slept.meanwhile = lambda: away.rename(folder / SECOND)
    with pytest.warns(UserWarning, match="train-00001"):
        assert pairs[20]["id"] == "pair-0020"
    assert len(slept) == 1


def test_a_file_that_never_was_there_is_not_waited_for(folder, slept):
    (folder / SECOND).unlink()
    for streaming in (False, True):
        with pytest.raises(MissingShardError, match="train-00001"):
            load_pairs(folder, streaming=streaming)[12]
    assert not slept


@pytest.mark.filterwarnings("ignore:.*cannot be read at the moment")
def test_a_file_that_stays_away_is_named_or_replaced_as_on_bad_files_says(folder, slept, monkeypatch):
    stopping = load_pairs(folder, streaming=True, mix=1)
    going_on = load_pairs(folder, streaming=True, mix=1, on_bad_files="skip")
    for pairs in (stopping, going_on):
        pairs[12]
        pairs._forget()  # as if the cache of row groups had moved on
    (folder / SECOND).unlink()
    with pytest.raises(DamagedShardError, match=r"train-00001-of-00003\.parquet is missing"):
        stopping[13]
    assert slept == list(WAITS)
    slept.clear()
    forget_failures()
    batch = going_on.__getitems__([13, 2])
    assert batch["replaced"].tolist() == [True, False]
    assert batch["id"] == ["pair-0024", "pair-0002"]
    assert len(slept) <= 2 * len(WAITS)


@pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_pixels_are_read_again_through_a_fresh_descriptor(folder, slept, monkeypatch, streaming, number):
    expected = all_batches(load_pairs(folder, streaming=streaming))
    pairs = load_pairs(folder, streaming=streaming)
    preadv, calls = os.preadv, []

    def unsteady(file, buffers, offset):
        calls.append(os.fstat(file).st_ino)
        if 20 <= len(calls) < 23:
            raise stale(number)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", unsteady)
    with pytest.warns(UserWarning, match="cannot be read at the moment"):
        batches = all_batches(pairs)
    assert_same(batches, expected)
    assert slept == list(WAITS[:3])


def test_a_file_put_in_place_anew_is_opened_by_name_where_the_descriptor_is_stale(folder, slept, monkeypatch):
    pairs = load_pairs(folder, streaming=True)
    expected = load_pairs(folder, streaming=True).__getitems__([1, 2])
    pairs[0]  # opens the file
    path = folder / "data/train-00000-of-00003.parquet"
    old = path.stat().st_ino
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    preadv = os.preadv

    def stale_if_old(file, buffers, offset):
        if os.fstat(file).st_ino == old:
            raise stale(errno.ESTALE)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", stale_if_old)
    with pytest.warns(UserWarning, match="Stale file handle"):
        assert_same([pairs.__getitems__([1, 2])], [expected])
    assert slept == list(WAITS[:1])


@pytest.mark.filterwarnings("ignore:.*cannot be read at the moment")
def test_storage_that_is_gone_for_good_ends_the_run_after_one_round_of_waiting(folder, slept):
    pairs = load_pairs(folder, streaming=True, on_bad_files="skip", mix=1)
    shutil.rmtree(folder)
    with pytest.raises(DamagedShardError, match="rows in turn cannot be read"):
        pairs[20]
    assert slept == list(WAITS)


@pytest.fixture
def compressed(folder):
    """A folder of which the local way of reading needs an Arrow copy."""
    for path in folder.glob("data/*.parquet"):
        table, described = pq.read_table(path), pq.read_metadata(path).metadata
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            writer.write_table(table, row_group_size=4)
            writer.add_key_value_metadata({b"fusmae": described[b"fusmae"]})
    return folder


def arrow_file(pairs):
    (file,) = pairs._copy.cache_files
    return file["filename"]


@pytest.mark.parametrize("cut", [500, 6000], ids="{} bytes".format)
def test_a_local_copy_that_was_cut_short_is_named_when_it_is_opened(compressed, cut):
    name = arrow_file(load_pairs(compressed))
    os.truncate(name, os.path.getsize(name) - cut)
    with pytest.raises(ValueError, match=r"local copy .*\.arrow.* is damaged.*Delete"):
        load_pairs(compressed)


def test_a_local_copy_that_is_cut_while_in_use_is_named_instead_of_ending_the_process(compressed):
    pairs = load_pairs(compressed)
    pairs[0]
    os.truncate(arrow_file(pairs), 100)
    with pytest.raises(ValueError, match="cut while in use"):
        pairs[30]
