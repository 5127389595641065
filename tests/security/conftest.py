"""Shards by somebody who wishes us ill."""

import datasets
import pytest

from fusmae_hf.files import retries as storage_retries


@pytest.fixture(autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what HF Datasets stores out of the user's cache, and wait for no storage."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_datasets"))
    monkeypatch.setattr(storage_retries, "WAITS", ())
    storage_retries.forget_failures()
