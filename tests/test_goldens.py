"""What must not change unnoticed: content of shards, and losses, gradients and features of fixed weights in float32.

`python -m tests.test_goldens` measures the figures anew and writes them to `goldens.json`; say why in the commit.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEForPreTraining, FusMAEModel
from fusmae_hf.cli.main import main

GOLDENS = Path(__file__).with_name("goldens.json")
CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "fusmae-tiny"
CONSTRAINTS = (Path(__file__).resolve().parents[1] / "constraints.txt").read_text()


def shards_of_simulated_pairs(folder: Path) -> dict[str, str]:
    """SHA-256 of the pixels' columns in the shards of 48 simulated pairs."""
    import pyarrow.parquet as pq

    assert main(["prepare", "simulated", str(folder), "--num-pairs", "48", "--rows-per-shard", "16"]) == 0
    found = {}
    for path in sorted(folder.rglob("*.parquet")):
        digest = hashlib.sha256()
        for row in pq.read_table(path, columns=["id", "sar", "optical", "label_map"]).to_pylist():
            for value in row.values():
                digest.update(value.encode() if isinstance(value, str) else value)
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return found


def inputs() -> dict[str, torch.Tensor]:
    """A batch of two pairs of smooth noise, with the noise that masks them."""
    generator = torch.Generator().manual_seed(0)
    config = FusMAEModel.config_class.from_pretrained(CHECKPOINT)
    size, patch = (value if isinstance(value, int) else value[0] for value in (config.image_size, config.patch_size))
    tokens = (size // patch) ** 2

    def image(channels: int) -> torch.Tensor:
        coarse = torch.randn((2, channels, size // 8, size // 8), generator=generator)
        return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")

    return {
        "pixel_values": image(len(config.optical_bands)),
        "pixel_values_sar": image(len(config.sar_bands)),
        "noise": torch.rand((2, tokens), generator=generator),
        "noise_sar": torch.rand((2, tokens), generator=generator),
    }


def figures_of_the_checkpoint() -> dict[str, float]:
    """Loss, norms of gradients, and features of both sensors and of each alone, in eager attention and float32."""
    torch.manual_seed(0)
    batch = inputs()
    model = FusMAEForPreTraining.from_pretrained(CHECKPOINT, attn_implementation="eager").float().eval()
    loss = model(**batch).loss
    loss.backward()
    gradients = torch.stack([each.grad.double().norm() for each in model.parameters() if each.grad is not None])
    figures = {"loss": loss.item(), "gradients": gradients.norm().item(), "gradients (sum)": gradients.sum().item()}
    encoder = FusMAEModel.from_pretrained(CHECKPOINT, attn_implementation="eager").float().eval()
    views = {
        "both": ("pixel_values", "pixel_values_sar"),
        "optical": ("pixel_values",),
        "sar": ("pixel_values_sar",),
    }
    for name, sensors in views.items():
        with torch.no_grad():
            pooled = encoder(**{sensor: batch[sensor] for sensor in sensors}).pooler_output.double()
        weights = torch.linspace(-1, 1, pooled.shape[1], dtype=torch.float64)
        figures[f"features of {name}"] = (pooled @ weights).sum().item()
    return figures


@pytest.mark.skipif(f"numpy=={np.__version__}\n" not in CONSTRAINTS, reason="another numpy rounds otherwise")
def test_the_shards_of_simulated_pairs_hold_the_same_bytes(tmp_path):
    assert shards_of_simulated_pairs(tmp_path / "shards") == json.loads(GOLDENS.read_text())["shards"]


def test_loss_gradients_and_features_of_the_shipped_checkpoint_are_the_same():
    assert figures_of_the_checkpoint() == pytest.approx(json.loads(GOLDENS.read_text())["checkpoint"], rel=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        content = {
            "shards": shards_of_simulated_pairs(Path(temporary) / "shards"),
            "checkpoint": figures_of_the_checkpoint(),
        }
    GOLDENS.write_text(json.dumps(content, indent=1) + "\n")
