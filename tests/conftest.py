"""Settings that every test shares; tiny pairs, and folders prepared from them."""

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.shards.format import ShardRecord
from fusmae_hf.shards.writing import write_dataset_info, write_shard

# Marks that transformers' own test mixins set (see tests/conformance).
UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_mps_test",
    "fsdp2_test",
    "generate",
    "is_staging_test",
    "is_pipeline_test",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # faster than many for models as small as these
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' test mixins")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what HF Datasets stores out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_datasets"))


@pytest.fixture
def ctrl_c_as_in_a_terminal() -> Iterator[None]:
    """As Python sets it at its start, unless it was started in the background of a script, deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def pairs_info() -> PairsInfo:
    return PairsInfo("tiny", "made by the tests", "none", sar_bands=("VV", "VH"), optical_bands=("B02", "B03", "B04"))


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    """Pair whose pixels are a function of its number; keywords replace its fields."""

    def make(number: int, **fields: Any) -> Pair:
        generator = np.random.default_rng(number)
        sar = generator.normal(-12, 5, (2, 8, 8)).astype(np.float32)
        optical = generator.integers(1, 60_000, (3, 8, 8), dtype=np.uint16)
        return Pair(**{"id": f"pair-{number:04d}", "sar": sar, "optical": optical} | fields)

    return make


def write_split(
    pairs: Sequence[Pair], info: PairsInfo, folder: Path, split: str, *, rows_per_shard: int = 12, **sizes: int
) -> list[ShardRecord]:
    """Write the pairs of one split in files of `rows_per_shard`."""
    starts = range(0, len(pairs), rows_per_shard)
    return [
        write_shard(
            pairs[start : start + rows_per_shard],
            info,
            folder,
            f"data/{split}-{number:05d}-of-{len(starts):05d}.parquet",
            **sizes,
        )
        for number, start in enumerate(starts)
    ]


@pytest.fixture
def prepare(tmp_path: Path, pairs_info: PairsInfo, make_pair: Callable[..., Pair]) -> Callable[..., Path]:
    """Prepare a folder with the given numbers of pairs in each split, numbered through."""

    def prepare_folder(
        *, train: int = 40, validation: int = 0, rows_per_shard: int = 12, row_group_rows: int = 4, **fields: Any
    ) -> Path:
        folder, start, shards = tmp_path / "prepared", 0, []
        for split, count in (("train", train), ("validation", validation)):
            pairs = [make_pair(number, **fields) for number in range(start, start + count)]
            if pairs:
                shards += write_split(
                    pairs, pairs_info, folder, split, rows_per_shard=rows_per_shard, row_group_rows=row_group_rows
                )
            start += count
        write_dataset_info(folder, pairs_info, shards)
        return folder

    return prepare_folder
