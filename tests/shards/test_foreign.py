"""Shards that HF Datasets filtered and wrote anew."""

import datasets
import pytest
import torch

from fusmae_hf import load_pairs
from tests.small_shards import make_pair, write_shards


@pytest.fixture
def filtered(tmp_path):
    written = [make_pair(number) for number in range(12)]
    written[5].optical = None
    folder = write_shards(tmp_path / "shards", train=written, test=[make_pair(number) for number in range(12, 16)])
    for split in ("train", "test"):
        rows = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        kept = rows.filter(lambda row: int(row["id"][-3:]) % 2 == 1)
        (tmp_path / "filtered").mkdir(exist_ok=True)
        kept.to_parquet(str(tmp_path / "filtered" / f"{split}.parquet"))
    return folder, tmp_path / "filtered"


@pytest.mark.parametrize("streaming", [False, True])
def test_filtered_pairs_are_read_like_those_they_come_from(filtered, streaming):
    folder, foreign = filtered
    original, pairs = load_pairs(folder), load_pairs(foreign, like=folder, streaming=streaming)
    assert len(pairs) == 6
    assert pairs.lacking == ("optical",)
    for row in range(6):
        assert pairs[row]["id"] == original[2 * row + 1]["id"]
        assert torch.equal(pairs[row]["sar"], original[2 * row + 1]["sar"])
    assert len(load_pairs(foreign, "test", like=folder, streaming=streaming)) == 2


def test_without_the_folder_they_come_from_the_error_says_what_to_do(filtered):
    with pytest.raises(FileNotFoundError, match="--like FOLDER"):
        load_pairs(filtered[1])
