"""Files and rows that cannot be read: named and refused, or left out and counted, as the user says."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from fusmae_hf.data.collation import PairCollator
from fusmae_hf.shards.decoding import DamagedShardError, MissingShardError
from fusmae_hf.shards.loading import load_pairs

BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])
SECOND = "data/train-00001-of-00003.parquet"


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


def remove(path):
    path.unlink()


def replace_by_another(path):
    path.write_bytes(path.with_name("train-00000-of-00003.parquet").read_bytes())


def overwrite_pages(path):
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)


@pytest.fixture
def folder(prepare):
    """36 pairs in three files of twelve, row groups of four."""
    return prepare(train=36)


def flip_a_bit(folder, pair):
    path = folder / SECOND
    content = bytearray(path.read_bytes())
    content[content.index(pair.optical.tobytes()) + 100] ^= 1
    path.write_bytes(content)


@BOTH_WAYS
@pytest.mark.parametrize("damage", [cut_short, remove, replace_by_another])
def test_a_bad_file_is_left_out_named_and_the_rest_is_read(folder, streaming, damage):
    damage(folder / SECOND)
    with pytest.warns(UserWarning, match=r"Left out: .*train-00001-of-00003\.parquet"):
        pairs = load_pairs(folder, streaming=streaming, on_bad_files="warn")
    assert len(pairs) == 24
    assert list(pairs.bad_files) == [SECOND]
    ids = pairs.__getitems__(list(range(24)))["id"]
    assert ids == [f"pair-{number:04d}" for number in (*range(12), *range(24, 36))]


@BOTH_WAYS
@pytest.mark.parametrize(
    ("damage", "error"), [(cut_short, DamagedShardError), (remove, MissingShardError), (remove, FileNotFoundError)]
)
def test_by_default_a_bad_file_stops_with_its_name(folder, streaming, damage, error):
    damage(folder / SECOND)
    with pytest.raises(error, match=r"train-00001-of-00003\.parquet"):
        load_pairs(folder, streaming=streaming).__getitems__([0, 12, 24])


def test_skipping_is_silent_but_counted(folder):
    remove(folder / SECOND)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_pairs(folder, on_bad_files="skip").bad_files) == 1


def test_a_file_whose_pages_the_local_copy_cannot_read_is_left_out(folder):
    overwrite_pages(folder / SECOND)
    with pytest.raises(DamagedShardError, match="train-00001"):
        load_pairs(folder)
    pairs = load_pairs(folder, on_bad_files="skip")
    assert list(pairs.bad_files) == [SECOND]
    assert len(pairs) == 24


@BOTH_WAYS
def test_a_damaged_row_is_replaced_by_the_next_sound_one_and_marked(folder, make_pair, streaming):
    flip_a_bit(folder, make_pair(14))
    pairs = load_pairs(folder, streaming=streaming, on_bad_files="skip")
    batch = pairs.__getitems__([(2, 13), (2, 14), (2, 15)])
    assert batch["replaced"].tolist() == [False, True, False]
    assert batch["id"] == ["pair-0013", "pair-0015", "pair-0015"]
    assert batch["row"].tolist() == [13, 15, 15]
    assert torch.equal(batch["optical"][1], torch.from_numpy(make_pair(15).optical))
    assert not pairs.bad_files
    # Masks are those of the pair that is there: the same as beside it.
    noise = PairCollator(4)(batch)["noise"]
    assert torch.equal(noise[1], noise[2])


def test_a_row_group_that_turns_bad_while_streaming_is_replaced_without_changing_batch_sizes(folder, make_pair):
    pairs = load_pairs(folder, streaming=True, on_bad_files="skip", mix=2)
    overwrite_pages(folder / SECOND)  # row group 3, rows 12 to 15
    loader = DataLoader(pairs, batch_size=4, sampler=pairs.sampler(4), collate_fn=PairCollator(4))
    batches = list(loader)
    assert [len(batch["id"]) for batch in batches] == [4] * 9
    assert sum(int(batch["replaced"].sum()) for batch in batches) == 4
    seen = [id for batch in batches for id in batch["id"]]
    assert {f"pair-{number:04d}" for number in range(12, 16)}.isdisjoint(seen)
    assert set(seen) == {f"pair-{number:04d}" for number in (*range(12), *range(16, 36))}


def test_the_stand_in_of_a_row_does_not_depend_on_the_batch(folder, make_pair):
    flip_a_bit(folder, make_pair(23))
    pairs = load_pairs(folder, on_bad_files="skip")
    for rows in ([23], [0, 23], [23, 35, 24]):
        batch = pairs.__getitems__(rows)
        assert batch["id"][rows.index(23)] == "pair-0024"


def test_where_nothing_can_be_read_any_more_reading_stops(folder):
    pairs = load_pairs(folder, streaming=True, on_bad_files="skip")
    for path in folder.glob("data/*.parquet"):
        path.unlink()
    with pytest.raises(DamagedShardError, match=r"rows in turn cannot be read.*train-0000"):
        pairs.__getitems__([0])
    with pytest.raises(DamagedShardError, match="No file of split 'train'"):
        load_pairs(folder, streaming=True, on_bad_files="skip")


def test_pairs_of_different_sizes_are_a_mistake_not_damage(folder, prepare):
    pairs = load_pairs(folder, on_bad_files="skip")
    with pytest.raises(ValueError, match="on_bad_files is 'ignore', but must be one of"):
        load_pairs(folder, on_bad_files="ignore")
    assert not pairs.__getitems__([0])["replaced"].any()
