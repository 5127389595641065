"""A saved folder must serve people who never installed the package."""

import os
import subprocess
import sys

import pytest
import torch

from fusmae_hf import FusMAEForPreTraining, FusMAEImageProcessor, FusMAEModel
from fusmae_hf.modeling.configuration_fusmae import AUTO_MAP

PROGRAM = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fusmae_hf":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled())
import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18):  # that one demands torchvision
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, pairs, result = sys.argv[1:]
pairs = torch.load(pairs, weights_only=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(sar=pairs["sar"], optical=pairs["optical"])
results = {"bands": config.optical_bands}

def load(name, folder):
    auto_class = getattr(transformers, name)
    if name == "AutoBackbone":  # its from_pretrained asks the Hub whether a local folder exists
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        auto_class = type(auto_class.from_config(config, trust_remote_code=True))
    return auto_class.from_pretrained(folder, trust_remote_code=True).eval()

for name, reference in config.auto_map.items():
    if name in ("AutoConfig", "AutoImageProcessor"):
        continue
    model = load(name, folder)
    assert type(model).__name__ == reference.split(".")[1], type(model)
    noise = {"noise": pairs["noise"], "noise_sar": pairs["noise_sar"]} if name == "AutoModelForPreTraining" else {}
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model(**inputs, **noise)
    results[name] = outputs.loss if noise else model.base_model(**inputs).pooler_output
    model.save_pretrained(folder + name)
    again = load(name, folder + name)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
some = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, optical_bands=["B04"])
assert some.config.optical_bands == ["B04"]
for task in config.custom_pipelines:
    pipe = transformers.pipeline(task, model=folder, trust_remote_code=True)
    assert pipe({"sar": pairs["sar"][0], "optical": pairs["optical"][0]})
processor.save_pretrained(folder + "-again")
assert not any(name.startswith("fusmae_hf") for name in sys.modules)
torch.save(results, result)
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
    assert result.pop("bands") == ["B02", "B03", "B04"]
    torch.testing.assert_close(result.pop("AutoModelForPreTraining"), loss)
    assert set(result) == set(AUTO_MAP) - {"AutoConfig", "AutoImageProcessor", "AutoModelForPreTraining"}
    for features in result.values():
        torch.testing.assert_close(features, expected)


def test_importing_the_source_folder_by_its_bare_name_is_refused(pytestconfig):
    program = "import modeling"
    run = subprocess.run([sys.executable, "-c", program], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert run.returncode != 0
    assert "fusmae_hf.modeling" in run.stderr
