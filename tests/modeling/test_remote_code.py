"""A saved folder must serve people who never installed the package."""

import os
import subprocess
import sys

import pytest
import torch

from fusmae_hf import FusMAEForPreTraining, FusMAEImageProcessor, FusMAEModel

PROGRAM = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fusmae_hf":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForPreTraining

folder, pairs, result = sys.argv[1:]
pairs = torch.load(pairs, weights_only=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
pretrained = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(sar=pairs["sar"], optical=pairs["optical"])
noise = {"noise": pairs["noise"], "noise_sar": pairs["noise_sar"]}
with torch.no_grad():
    features, loss = model(**inputs).pooler_output, pretrained(**inputs, **noise).loss
pretrained.save_pretrained(folder + "-again")
processor.save_pretrained(folder + "-again")
assert type(AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)).__name__ == "FusMAEModel"
assert not any(name.startswith("fusmae_hf") for name in sys.modules)
torch.save({"features": features, "loss": loss, "bands": config.optical_bands}, result)
"""


@pytest.mark.slow
def test_every_auto_class_loads_from_a_folder_in_a_process_without_the_package(tmp_path, tiny):
    model, processor = FusMAEForPreTraining(tiny()).eval(), FusMAEImageProcessor(optical_bands=["B02", "B03", "B04"])
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    pairs = {
        "sar": torch.randn(2, 2, 16, 16) * 3 + torch.tensor([-12.0, -19.0])[:, None, None],
        "optical": torch.randint(1, 4000, (2, 3, 16, 16)).float(),
        "noise": torch.rand(2, 16),
        "noise_sar": torch.rand(2, 16),
    }
    torch.save(pairs, tmp_path / "pairs.pt")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, tmp_path / "pairs.pt", tmp_path / "result.pt"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    inputs = processor(sar=pairs["sar"], optical=pairs["optical"])
    with torch.no_grad():
        expected = FusMAEModel.from_pretrained(folder)(**inputs).pooler_output
        loss = model(**inputs, noise=pairs["noise"], noise_sar=pairs["noise_sar"]).loss
    torch.testing.assert_close(result["features"], expected)
    torch.testing.assert_close(result["loss"], loss)
    assert result["bands"] == ["B02", "B03", "B04"]


def test_importing_the_source_folder_by_its_bare_name_is_refused(pytestconfig):
    program = "import modeling"
    run = subprocess.run([sys.executable, "-c", program], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert run.returncode != 0
    assert "fusmae_hf.modeling" in run.stderr
