"""Both ways to read give the same pairs, in an order that depends on (seed, epoch) alone, and say what is wrong."""

import multiprocessing
import pickle
import shutil
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from fusmae_hf.data.collation import PairCollator
from fusmae_hf.shards import loading as streamed_reading
from fusmae_hf.shards.decoding import RowsInMemory
from fusmae_hf.shards.loading import StreamedPairDataset, load_pairs
from fusmae_hf.shards.order import EpochSampler, LaneSampler, SequentialPairSampler
from fusmae_hf.shards.reading import RowsInFile
from fusmae_hf.shards.writing import write_dataset_info
from tests.conftest import write_split

BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])


class Rows:
    """Stands for a dataset where only the order matters."""

    def __init__(self, rows: int, epoch: int = 0):
        self.rows, self.epoch = rows, epoch

    def __len__(self) -> int:
        return self.rows


def ids_of(batches) -> list[str]:
    return [id for batch in batches for id in batch["id"]]


def assert_same_batches(given, expected):
    given, expected = list(given), list(expected)
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype
                assert torch.equal(value, other[key]), key
            else:
                assert value == other[key], key


# What is read


@BOTH_WAYS
def test_a_batch_holds_the_pairs_asked_for(prepare, make_pair, pairs_info, streaming):
    label_map = np.arange(64, dtype=np.uint8).reshape(8, 8)
    folder = prepare(train=20, labels=["Pastures", "Peatbogs"], label_map=label_map)
    pairs = load_pairs(folder, streaming=streaming)
    rows = [17, 3, 4, 11, 3]
    batch = pairs.__getitems__([(5, row) for row in rows])

    assert len(pairs) == 20
    assert pairs.info == pairs_info
    assert batch["id"] == [f"pair-{row:04d}" for row in rows]
    assert batch["row"].tolist() == rows
    assert batch["epoch"].tolist() == [5] * 5
    assert batch["labels"] == [["Pastures", "Peatbogs"]] * 5
    np.testing.assert_array_equal(batch["label_map"], np.stack([label_map] * 5))
    np.testing.assert_array_equal(batch["optical"].numpy(), np.stack([make_pair(row).optical for row in rows]))
    np.testing.assert_array_equal(batch["sar"].numpy(), np.stack([make_pair(row).sar for row in rows]))
    assert (batch["optical"].dtype, batch["sar"].dtype) == (torch.uint16, torch.float32)


@BOTH_WAYS
def test_an_item_is_a_batch_of_one_without_its_batch_dimension(prepare, make_pair, streaming):
    item = load_pairs(prepare(), streaming=streaming)[7]
    assert (item["id"], item["row"].item(), item["epoch"].item()) == ("pair-0007", 7, 0)
    np.testing.assert_array_equal(item["optical"].numpy(), make_pair(7).optical)


@BOTH_WAYS
@pytest.mark.parametrize("row", [40, -1])
def test_a_row_that_is_not_there_is_an_index_error(prepare, streaming, row):
    with pytest.raises(IndexError, match="rows are 0 to 39"):
        load_pairs(prepare(train=40), streaming=streaming)[row]


@BOTH_WAYS
def test_pairs_of_different_size_in_a_batch_are_named(make_pair, tmp_path, pairs_info, streaming):
    wide = make_pair(1, optical=np.ones((3, 8, 16), np.uint16))
    shards = write_split([make_pair(0), wide], pairs_info, tmp_path, "train")
    write_dataset_info(tmp_path, pairs_info, shards)
    with pytest.raises(ValueError, match=r"optical differs.*pair-0000.*pair-0001"):
        load_pairs(tmp_path, streaming=streaming).__getitems__([0, 1])


def test_both_ways_read_the_same_pairs_in_training(prepare):
    folder = prepare(train=48)
    read = {}
    for streaming in (False, True):
        pairs = load_pairs(folder, streaming=streaming)
        sampler = pairs.sampler(4, seed=3, num_lanes=2)
        assert sampler.dropped == 0
        read[streaming] = list(DataLoader(pairs, batch_size=4, sampler=sampler, collate_fn=PairCollator(4, seed=3)))
    assert sorted(ids_of(read[False])) == sorted(ids_of(read[True])) == [f"pair-{row:04d}" for row in range(48)]
    noise = {
        streaming: {
            id: noise.tolist() for batch in batches for id, noise in zip(batch["id"], batch["noise"], strict=True)
        }
        for streaming, batches in read.items()
    }
    assert noise[False] == noise[True]


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_url_takes_the_same_way_as_a_folder(prepare, protocol):
    folder = prepare()
    url = f"file://{folder}"
    if protocol == "memory":
        url = "memory://archive/prepared"
        fsspec.filesystem("memory").put(f"{folder}/", "/archive/prepared/", recursive=True)
    rows = [39, 0, 13, 14]
    expected = load_pairs(folder, streaming=True).__getitems__(rows)
    for streaming in (False, True):
        assert_same_batches([load_pairs(url, streaming=streaming).__getitems__(rows)], [expected])


def test_an_archive_prepared_again_is_not_taken_from_the_cache(prepare):
    folder = prepare(train=8)
    assert load_pairs(folder)[0]["sar"].dtype == torch.float32
    shutil.rmtree(folder)
    prepare(train=8, sar=np.ones((2, 8, 8), np.float64))
    assert load_pairs(folder)[0]["sar"].dtype == torch.float64


# In which order


@given(rows=st.integers(8, 200), batch_size=st.integers(1, 8), seed=st.integers(0, 2**40), epoch=st.integers(0, 99))
def test_local_order_is_a_function_of_seed_and_epoch(rows, batch_size, seed, epoch):
    sampler = EpochSampler(Rows(rows, epoch), batch_size, seed=seed)
    order = list(sampler)
    assert order == list(EpochSampler(Rows(rows, epoch), batch_size, seed=seed))
    assert {given_epoch for given_epoch, _ in order} == {epoch}
    assert len({row for _, row in order}) == len(order) == len(sampler) == rows - sampler.dropped
    assert sampler.dropped == rows % batch_size


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=40),
    num_lanes=st.integers(1, 12),
    mix=st.integers(1, 5),
    epoch=st.integers(0, 99),
)
def test_streaming_order_is_a_function_of_seed_and_epoch(sizes, num_lanes, mix, epoch):
    rows, options = Rows(sum(sizes), epoch), {"seed": 1, "num_lanes": num_lanes, "mix": mix}
    sampler = LaneSampler(rows, sizes, 2, **options)
    order = list(sampler)
    assert order == list(LaneSampler(rows, sizes, 2, **options))
    assert {given_epoch for given_epoch, _ in order} == {epoch}
    assert len({row for _, row in order}) == len(order) == len(sampler) == sum(sizes) - sampler.dropped
    assert sampler.dropped == sum(sizes) % 2


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    processes=st.integers(1, 4),
    workers=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    mix=st.integers(1, 4),
    streaming=st.booleans(),
)
def test_any_number_of_processes_workers_and_row_groups_sees_each_pair_once(
    sizes, processes, workers, batch_size, mix, streaming
):
    rows = Rows(sum(sizes), epoch=2)
    assume(len(rows) >= batch_size * processes)
    options = {"seed": 1, "num_processes": processes}
    sampler = EpochSampler(rows, batch_size, **options)
    if streaming:
        sampler = LaneSampler(rows, sizes, batch_size, num_lanes=processes * workers, mix=mix, **options)
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    of_rank = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert len({len(batches) for batches in of_rank}) == 1
    seen = [row for batches in of_rank for batch in batches for _, row in batch]
    assert len(seen) == len(set(seen)) == len(rows) - len(rows) % (batch_size * processes)


@given(
    rows=st.integers(1, 300),
    batch_size=st.integers(1, 5),
    processes=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    streaming=st.booleans(),
)
def test_an_epoch_has_whole_global_batches_however_they_are_divided(
    rows, batch_size, processes, accumulation, streaming
):
    global_batch = batch_size * processes * accumulation
    assume(rows >= global_batch)
    options = {"num_processes": processes, "accumulation": accumulation}
    if streaming:
        sampler = LaneSampler(Rows(rows), [7] * (rows // 7) + [rows % 7], batch_size, num_lanes=processes, **options)
        seen = list(sampler)
    else:
        sampler = EpochSampler(Rows(rows), batch_size, **options)
        seen = list(sampler)
        assert seen == list(EpochSampler(Rows(rows), global_batch))
    assert len(set(seen)) == len(seen) == len(sampler) == rows - rows % global_batch
    assert sampler.depends_on["global batch"] == global_batch


def test_more_workers_than_row_groups_still_read_everything(prepare):
    pairs = load_pairs(prepare(train=24, row_group_rows=12), streaming=True)
    sampler = pairs.sampler(4, num_lanes=6)
    batches = list(DataLoader(pairs, batch_size=4, sampler=sampler, collate_fn=PairCollator(4), num_workers=6))
    assert sorted(ids_of(batches)) == [f"pair-{number:04d}" for number in range(24)]


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda rows, seed: EpochSampler(rows, 4, seed=seed),
        lambda rows, seed: LaneSampler(rows, [5] * 20, 4, seed=seed, num_lanes=2),
    ],
    ids=["local", "streaming"],
)
def test_another_epoch_or_seed_is_another_order(make_sampler):
    rows = Rows(100)
    orders = set()
    for rows.epoch in range(3):
        for seed in range(3):
            orders.add(tuple(row for _, row in make_sampler(rows, seed)))
    assert len(orders) == 9


def test_the_rows_left_out_change_with_the_epoch():
    rows = Rows(45)
    sampler = LaneSampler(rows, [5] * 9, 4, num_lanes=2)
    left_out = set()
    for rows.epoch in range(10):
        left_out.add(frozenset(range(45)) - {row for _, row in sampler})
    assert {len(rows) for rows in left_out} == {sampler.dropped} == {1}
    assert len(left_out) > 5


def test_a_lane_mixes_the_rows_of_its_row_groups():
    """Four row groups of eight read together: a batch is drawn from more than one of them."""
    order = [row for _, row in LaneSampler(Rows(32), [8] * 4, 8, mix=4)]
    batches = [order[start : start + 8] for start in range(0, 32, 8)]
    assert all(len({row // 8 for row in batch}) > 1 for batch in batches)


@BOTH_WAYS
def test_the_sampler_reads_the_epoch_when_its_iteration_starts(prepare, streaming):
    pairs = load_pairs(prepare(), streaming=streaming)
    sampler = pairs.sampler(4, seed=1)
    first = list(sampler)
    pairs.set_epoch(1)
    second = list(sampler)
    pairs.set_epoch(0)
    assert first == list(sampler) != second
    assert {epoch for epoch, _ in second} == {1}


@BOTH_WAYS
def test_evaluation_reads_everything_in_stored_order_as_of_epoch_0(prepare, streaming):
    pairs = load_pairs(prepare(train=4, validation=7), "validation", streaming=streaming)
    pairs.set_epoch(3)
    sampler = pairs.sampler(4, shuffle=False)
    assert isinstance(sampler, SequentialPairSampler)
    assert sampler.dropped == 0
    batches = list(DataLoader(pairs, batch_size=4, sampler=sampler, collate_fn=PairCollator(4)))
    assert ids_of(batches) == [f"pair-{number:04d}" for number in range(4, 11)]
    assert torch.cat([batch["epoch"] for batch in batches]).tolist() == [0] * 7


@pytest.mark.parametrize(
    ("make_sampler", "message"),
    [
        (lambda: EpochSampler(Rows(7), 4, num_processes=2), "7 pairs are fewer than one batch of 4 for each of 2"),
        (
            lambda: LaneSampler(Rows(7), [4, 3], 4, num_processes=2, num_lanes=2),
            "7 pairs are fewer than one batch of 4",
        ),
    ],
)
def test_too_few_pairs_for_a_batch_is_an_error(make_sampler, message):
    with pytest.raises(ValueError, match=message):
        make_sampler()


def test_lanes_that_processes_would_share_are_refused(prepare):
    with pytest.raises(ValueError, match="multiple of processes x workers"):
        load_pairs(prepare(), streaming=True).sampler(2, num_processes=2, num_lanes=3)


# With workers, processes and resumed runs


def loader(pairs, num_workers=0, persistent=False):
    sampler = pairs.sampler(3, seed=5, num_lanes=2)
    collator = PairCollator(4, seed=5)
    options = {"num_workers": num_workers, "persistent_workers": persistent}
    return DataLoader(pairs, batch_size=3, sampler=sampler, collate_fn=collator, drop_last=True, **options)


@BOTH_WAYS
@pytest.mark.parametrize("persistent", [False, True], ids=["new workers", "persistent workers"])
def test_workers_change_nothing(prepare, streaming, persistent):
    pairs = load_pairs(prepare(), streaming=streaming)
    alone, helped = loader(pairs), loader(pairs, num_workers=2, persistent=persistent)
    for epoch in range(2):
        pairs.set_epoch(epoch)
        assert_same_batches(helped, alone)


@BOTH_WAYS
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("skipped", [1, 5])
def test_a_resumed_epoch_goes_on_where_it_was_cut(prepare, streaming, num_workers, skipped):
    folder = prepare()
    pairs = load_pairs(folder, streaming=streaming)
    pairs.set_epoch(1)
    rest = list(islice(loader(pairs), skipped, None))
    resumed = load_pairs(folder, streaming=streaming)
    resumed.set_epoch(1)
    assert_same_batches(skip_first_batches(loader(resumed, num_workers), skipped), rest)


def test_a_resumed_stream_reads_no_row_group_before_the_cut(prepare, monkeypatch):
    pairs = load_pairs(prepare(train=40, row_group_rows=4), streaming=True, mix=1)
    read = []
    original = StreamedPairDataset._rows_of
    monkeypatch.setattr(StreamedPairDataset, "_rows_of", lambda self, g: read.append(g) or original(self, g))
    whole = DataLoader(pairs, batch_size=4, sampler=pairs.sampler(4), collate_fn=PairCollator(4))
    list(skip_first_batches(whole, 7))
    assert len(read) == 3


@BOTH_WAYS
@pytest.mark.parametrize("train", [40, 37], ids=["even", "uneven"])
def test_two_processes_read_each_row_at_most_once_and_equally_many_batches(prepare, streaming, train):
    pairs = load_pairs(prepare(train=train), streaming=streaming)
    sampler = pairs.sampler(3, num_processes=2, num_lanes=2)
    batches = [list(BatchSamplerShard(BatchSampler(sampler, 3, drop_last=True), 2, rank)) for rank in range(2)]
    rows = [row for of_rank in batches for batch in of_rank for _, row in batch]
    assert len(batches[0]) == len(batches[1])
    assert len(set(rows)) == len(rows) == train - sampler.dropped


@pytest.mark.parametrize(
    ("processes", "workers", "num_lanes"), [(1, 1, 1), (1, 2, 2), (2, 2, 4), (2, 1, 4), (1, 2, 4)]
)
@pytest.mark.parametrize("batch_size", [2, 5], ids=["small batches", "batches across row groups"])
@pytest.mark.parametrize("train", [80, 91], ids=["even lanes", "with a tail"])
def test_each_row_group_is_read_about_once_an_epoch_by_one_worker(
    prepare, monkeypatch, processes, workers, num_lanes, batch_size, train
):
    """Batches are given out as accelerate and torch do: to process b mod R, there to worker j mod W."""
    folder = prepare(train=train, row_group_rows=4)
    read = Counter()
    needed = set()
    most_kept = 0
    original = StreamedPairDataset._rows_of

    def counted(self, group):
        read[epoch, group] += 1
        return original(self, group)

    monkeypatch.setattr(StreamedPairDataset, "_rows_of", counted)
    main = load_pairs(folder, streaming=True, mix=2)
    sampler = main.sampler(batch_size, seed=2, num_processes=processes, num_lanes=num_lanes)
    copies = {
        (rank, worker): pickle.loads(pickle.dumps(main)) for rank in range(processes) for worker in range(workers)
    }
    monkeypatch.setattr(streamed_reading, "get_worker_info", lambda: type("Worker", (), {"num_workers": workers}))
    for epoch in range(4):
        main.set_epoch(epoch)
        batches = list(BatchSampler(sampler, batch_size, drop_last=True))
        needed |= {(epoch, row // 4) for batch in batches for _, row in batch}
        for (rank, worker), copy in copies.items():
            for batch in batches[rank::processes][worker::workers]:
                copy.__getitems__(batch)
                most_kept = max(most_kept, len(copy._kept))
    assert set(read) == needed
    if train == 80:
        assert set(read.values()) == {1}
    # Twice at most where two lanes meet; and what is left over is dealt out in batches, each of few row groups.
    left_over = 11 // batch_size
    assert read.total() <= len(needed) + 4 * (num_lanes + left_over * (batch_size // 4 + 2))
    assert most_kept <= 2 * num_lanes // (processes * workers) + 1


def test_torch_workers_read_each_row_group_once(prepare, monkeypatch):
    pairs = load_pairs(prepare(train=48, row_group_rows=4), streaming=True, mix=2)
    counts = multiprocessing.get_context("fork").Array("i", pairs.num_row_groups)
    original = StreamedPairDataset._rows_of

    def counted(self, group):
        with counts.get_lock():
            counts[group] += 1
        return original(self, group)

    monkeypatch.setattr(StreamedPairDataset, "_rows_of", counted)
    batches = DataLoader(
        pairs,
        batch_size=3,
        sampler=pairs.sampler(3, num_lanes=2),
        collate_fn=PairCollator(4),
        num_workers=2,
        multiprocessing_context="fork",
    )
    assert len(ids_of(batches)) == 48
    assert list(counts) == [1] * 12


def test_row_groups_are_kept_within_bounds_in_any_order(prepare):
    pairs = load_pairs(prepare(train=80, row_group_rows=4), streaming=True, mix=2)
    for row in np.random.default_rng(0).integers(0, 80, 60).tolist():
        pairs[row]
        assert len(pairs._kept) <= 3


# What can be wrong


def test_an_empty_folder_says_how_to_fill_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is empty\. Fill it with `fusmae prepare`"):
        load_pairs(tmp_path)


def test_a_folder_without_dataset_info_says_who_writes_it(prepare):
    folder = prepare(train=4)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_info\.json.*fusmae prepare"):
        load_pairs(folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "nowhere"])
def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"no folder {path}"):
        load_pairs(path)


@BOTH_WAYS
def test_a_split_that_is_not_there_names_those_that_are(prepare, streaming):
    with pytest.raises(ValueError, match=r"no split 'test' in tiny; there are \['train', 'validation'\]"):
        load_pairs(prepare(train=4, validation=4), "test", streaming=streaming)


def read_all(folder, streaming):
    pairs = load_pairs(folder, streaming=streaming)
    return pairs.__getitems__(range(len(pairs)))


@BOTH_WAYS
@pytest.mark.parametrize("kept", [0, 3, 2000, -1])
def test_a_truncated_shard_is_named(prepare, streaming, kept):
    folder = prepare(train=24)
    shard = folder / "data/train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet cannot be read.*delete it and prepare"):
        read_all(folder, streaming)


@BOTH_WAYS
def test_a_shard_with_a_flipped_bit_is_named(prepare, make_pair, streaming):
    folder = prepare(train=24)
    shard = folder / "data/train-00001-of-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[content.index(make_pair(20).optical.tobytes()) + 100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"train-00001-of-00002\.parquet is damaged: the checksum of pair 'pair-0020'"
    ):
        read_all(folder, streaming)


@BOTH_WAYS
def test_a_missing_shard_is_named(prepare, streaming):
    folder = prepare(train=24)
    (folder / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001-of-00002\.parquet"):
        read_all(folder, streaming)


@BOTH_WAYS
def test_a_shard_of_another_preparation_is_named(prepare, streaming):
    folder = prepare(train=24)
    shutil.copy(folder / "data/train-00000-of-00002.parquet", folder / "data/train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"train-00001.*not of the same preparation.*Prepare the folder again"):
        read_all(folder, streaming)


@BOTH_WAYS
def test_memory_is_used_again_only_when_no_batch_holds_it(prepare, make_pair, streaming):
    pairs = load_pairs(prepare(), streaming=streaming)
    where, held = set(), []
    for _ in range(6):
        where.add(pairs.__getitems__([0, 1, 2])["optical"].data_ptr())
    assert len(where) <= 2
    for first in range(0, 36, 3):
        batch = pairs.__getitems__([first, first + 1, first + 2])
        # What is kept: a view, a numpy array, a single pair.
        held.append((first, batch["optical"][1:], batch["sar"].numpy(), batch["optical"][0]))
        del batch
    for first, view, sar, pair in held:
        assert torch.equal(pair, torch.from_numpy(make_pair(first).optical))
        assert torch.equal(view[1], torch.from_numpy(make_pair(first + 2).optical))
        assert np.array_equal(sar[2], make_pair(first + 2).sar)


def test_fetching_ahead_from_a_url_changes_nothing_and_reads_nothing_twice(prepare, monkeypatch):
    folder = prepare(train=44, row_group_rows=4)
    read = Counter()
    original = StreamedPairDataset._rows_of
    monkeypatch.setattr(StreamedPairDataset, "_rows_of", lambda self, g: read.update([g]) or original(self, g))
    plain = load_pairs(folder, streaming=True, mix=2)
    ahead = load_pairs(f"file://{folder}", streaming=True, mix=2)
    assert ahead.prefetch
    assert not plain.prefetch
    for epoch in range(2):
        for pairs in (plain, ahead):
            pairs.set_epoch(epoch)
        expected = list(loader(plain))
        read.clear()
        most_held = 0
        for batch, other in zip(loader(ahead), expected, strict=True):
            assert_same_batches([batch], [other])
            most_held = max(most_held, len(ahead._kept) + len(ahead._coming))
        assert max(read.values()) <= 2  # two where lanes meet
        assert most_held <= 2 * 2 * 2 + 2  # two lanes, two row groups each, and as many ahead
    assert not ahead._coming


def test_damage_met_while_fetching_ahead_is_named_when_its_rows_are_asked_for(prepare):
    folder = prepare(train=44, row_group_rows=4)
    pairs = load_pairs(f"file://{folder}", streaming=True, mix=2)
    (folder / "data/train-00002-of-00004.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002-of-00004\.parquet is missing"):
        list(loader(pairs))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"compression": "none", "use_dictionary": False}, RowsInFile),
        ({"compression": "zstd", "use_dictionary": False}, RowsInMemory),
        ({"compression": "none", "use_dictionary": True}, RowsInMemory),
        ({"compression": "none", "use_dictionary": False, "data_page_size": 1, "write_batch_size": 1}, RowsInMemory),
    ],
    ids=["as written", "compressed", "with a dictionary", "several pages"],
)
def test_arrays_are_read_where_they_lie_if_the_file_allows(prepare, make_pair, options, kind):
    label_map = np.arange(64, dtype=np.uint8).reshape(8, 8)
    folder = prepare(train=10, rows_per_shard=10, row_group_rows=5, label_map=label_map)
    (path,) = folder.glob("data/*.parquet")
    table, described = pq.read_table(path), pq.read_metadata(path).metadata[b"fusmae"]
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=5)
        writer.add_key_value_metadata({b"fusmae": described})
    streamed, local = load_pairs(folder, streaming=True), load_pairs(folder)
    assert type(streamed._rows_of(1)) is kind
    assert {type(at) for at, _ in local._locate(np.zeros(10), np.arange(10))} == {kind}
    assert any(Path(datasets.config.HF_DATASETS_CACHE).iterdir()) == (kind is RowsInMemory)
    for pairs in (streamed, local, pickle.loads(pickle.dumps(local))):
        batch = pairs.__getitems__([7, 2, 9])
        assert np.array_equal(batch["optical"].numpy(), np.stack([make_pair(row).optical for row in (7, 2, 9)]))
        assert np.array_equal(batch["label_map"].numpy(), np.stack([label_map] * 3))


def test_giving_memory_back_calls_nothing(prepare):
    """Python ignores a Ctrl-C that comes in what it calls for an object that is gone."""
    batches, called = [load_pairs(prepare()).__getitems__([0, 1, 2])], []
    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        batches.clear()
    finally:
        sys.setprofile(None)
    assert called == []
