"""Whoever may read other new files may read what is written here."""

import os
import stat

import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.evaluation.features import _write_cache
from fusmae_hf.files.atomic import follow_umask, write_atomically
from fusmae_hf.training.loop.nonfinite import keep_batch


def write_model(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": size for name, size in sizes.items()}
    FusMAEForPreTraining(FusMAEConfig(**sizes, **decoder)).save_pretrained(folder)


def write_private(folder):
    (folder / "x").touch(0o600)
    follow_umask(folder / "x")


WRITERS = {
    "weights": write_model,
    "processor": lambda folder: FusMAEImageProcessor().save_pretrained(folder),
    "features": lambda folder: _write_cache(folder / "features.json", {}, np.zeros((2, 3)), np.arange(2)),
    "bad batch": lambda folder: keep_batch(folder, "batch", {"sar": torch.zeros(2)}, {}),
    "record": lambda folder: write_atomically(folder / "run.json", b"{}"),
    "private before": write_private,
}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("name", WRITERS)
def test_files_follow_the_umask(tmp_path, name, umask):
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
