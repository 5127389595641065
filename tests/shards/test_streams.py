"""Pairs as a stream of HF Datasets: what `datasets` does with streams, and the way into transformers' Trainer."""

from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from packaging.version import Version
from transformers import Trainer, TrainingArguments

import fusmae_hf
from fusmae_hf import FusMAEConfig, FusMAEForImageClassification, FusMAEImageProcessor, RowCollator, stream_pairs
from fusmae_hf.data.finetuning_collation import FineTuningCollator
from tests.small_shards import INFO, SIZE, make_pair, write_shards

NEW = Version(datasets.__version__) >= Version("5.1")
older = pytest.mark.skipif(not NEW, reason="docs/datasets.md says what older releases of datasets do not do")


def even(pair):
    return int(pair["id"][-3:]) % 2 == 0


@pytest.fixture
def shards(tmp_path):
    written = [make_pair(number) for number in range(12)]
    written[5].optical = None
    return write_shards(tmp_path / "shards", train=written)


def ids(pairs):
    return [int(pair["id"][-3:]) for pair in pairs]


def test_a_stream_gives_the_arrays_that_were_written_under_plain_features(shards):
    stream = stream_pairs(shards)
    assert type(stream) is datasets.IterableDataset
    for number, pair in enumerate(stream):
        np.testing.assert_array_equal(pair["sar"], make_pair(number).sar, strict=True)
        assert (pair["optical"] is None) == (number == 5)
    lines = datasets.List(datasets.List(datasets.Value("uint16")))
    assert stream.features["optical"] == datasets.List(lines)
    assert datasets.Features.from_dict(stream.features.to_dict()) == stream.features


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.map(lambda pair: {"brightest": pair["sar"].max()}), range(12)),
        pytest.param(lambda s: s.filter(even), range(0, 12, 2), marks=older),
        (lambda s: s.take(3), range(3)),
        (lambda s: s.shuffle(seed=0, buffer_size=4), range(12)),
        (lambda s: split_dataset_by_node(s, 1, 2), range(6, 12)),
        (lambda s: datasets.interleave_datasets([s.take(2), s.skip(10)]), [0, 1, 10]),
    ],
    ids=["map", "filter", "take", "shuffle", "split_dataset_by_node", "interleave_datasets"],
)
def test_what_datasets_does_with_streams_it_does_with_pairs(shards, change, expected, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # datasets waits five for its threads
    pairs = list(change(stream_pairs(shards)))
    assert sorted(ids(pairs)) == list(expected)
    assert {pair["sar"].dtype for pair in pairs} == {np.dtype("float32")}


@older
@pytest.mark.parametrize("decode", [True, False])
def test_a_stream_goes_on_from_its_state(shards, decode):
    stream, again = stream_pairs(shards, decode=decode), stream_pairs(shards, decode=decode)
    assert ids(islice(stream, 5)) == [0, 1, 2, 3, 4]
    again.load_state_dict(stream.state_dict())
    assert ids(again) == [*range(5, 12)]


@pytest.mark.parametrize("streaming", [True, False])
def test_pairs_and_rows_make_the_batches_of_load_pairs(shards, streaming, tmp_path):
    rows = stream_pairs(shards) if streaming else stored(shards)
    got = RowCollator(shards)(list(islice(rows, 3, 7)))
    wanted = fusmae_hf.load_pairs(shards).__getitems__(range(3, 7)).columns
    assert got.keys() | {"sar_available"} == wanted.keys() | {"sar_available"}
    for name in got.keys() - {"row", "epoch"}:
        same = torch.equal if isinstance(got[name], torch.Tensor) else list.__eq__
        assert same(got[name], wanted[name]), name
    assert len(set(got["row"].tolist())) == 4


def stored(shards):
    files = sorted(str(path) for path in shards.glob("data/*.parquet"))
    return list(datasets.load_dataset("parquet", data_files=files, split="train"))


@pytest.mark.parametrize("streaming", [True, False])
def test_transformers_trainer_takes_them_as_they_are(shards, streaming, tmp_path):
    bands = {"sar_bands": INFO.sar_bands, "optical_bands": INFO.optical_bands}
    model = FusMAEForImageClassification(
        FusMAEConfig(
            **bands, image_size=SIZE, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, num_labels=3, problem_type="multi_label_classification",
        )
    )  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, remove_unused_columns=False,
            report_to="none", use_cpu=True, save_strategy="no",
        ),
        train_dataset=stream_pairs(shards) if streaming else stored(shards),
        data_collator=RowCollator(
            shards, FineTuningCollator(FusMAEImageProcessor(**bands), INFO, "multi_label_classification")
        ),
    )  # fmt: skip
    assert trainer.train().global_step == 4


@older
def test_a_filtered_stream_that_was_written_is_read_like_what_it_comes_from(shards, tmp_path):
    rows = stream_pairs(shards, decode=False).filter(
        lambda row: even(row) and fusmae_hf.decode_row(row, shards)["sar"].max() > -30
    )
    (tmp_path / "even").mkdir()
    rows.to_parquet(str(tmp_path / "even" / "train.parquet"))
    original = fusmae_hf.load_pairs(shards)
    for pairs in (
        fusmae_hf.load_pairs(tmp_path / "even", like=shards),
        [*stream_pairs(tmp_path / "even", like=shards)],
    ):
        assert ids(pairs[row] for row in range(6)) == [*range(0, 12, 2)]
        np.testing.assert_array_equal(pairs[1]["sar"], original[2]["sar"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: stream_pairs(s, revision="v2"), "is not on the Hub: leave it out"),
        (lambda s: stream_pairs(s, "test"), "no split 'test'"),
        (lambda s: RowCollator(s)([{"image": 1}]), r"no columns \['id', 'sar', 'optical'\].*fusmae prepare"),
    ],
)
def test_what_cannot_be_streamed_is_said(shards, wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(shards)
