"""A checkpoint pushed to the Hub serves people with and without the package."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from fusmae_hf import FusMAEConfig, FusMAEForImageClassification, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.hub.push_model import push_model
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.training.arguments import PretrainingArguments
from fusmae_hf.training.run_pretrain import FusMAETrainer
from tests.small_shards import run_command

NAME = "user/model"
ONLINE = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
"""What a process needs to talk to the Hub of the test, whatever the environment says."""


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, decoder_num_hidden_layers=1)
    FusMAEForPreTraining(config).save_pretrained(folder, max_shard_size="500KB")
    FusMAEImageProcessor().save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def test_push_takes_a_model_for_one_and_sends_what_others_need(hub, checkpoint, capsys):
    assert run_command("push", checkpoint, NAME, "--private", "--revision", "v2") == 0
    files = hub.files(NAME, "v2").keys()
    local = {path.name for path in checkpoint.iterdir()}
    assert files - {".gitattributes", "README.md"} == local - {"training_args.bin"}
    assert {"README.md", "modeling_fusmae.py", "model.safetensors.index.json", "preprocessor_config.json"} <= files
    assert "config.json" not in hub.files(NAME, "main")
    assert hub.private == {NAME}
    assert "Pushed a model of" in capsys.readouterr().out


def test_a_card_without_a_record_has_no_section_about_a_run(hub, checkpoint):
    push_model(checkpoint, NAME)
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "## Sensors" in card.text
    assert "## Recipe" not in card.text
    assert "{" not in card.text.split("## Citation")[0]


def test_the_card_on_the_hub_loads_the_repository_and_that_of_the_folder_stays(hub, checkpoint):
    mine = '---\nlicense: mit\n---\n`AutoModel.from_pretrained("outputs/checkpoint")`, not from_pretrained("other")\n'
    (checkpoint / "README.md").write_text(mine)
    push_model(checkpoint, NAME)
    pushed = hub.files(NAME)["README.md"].decode()
    assert 'AutoModel.from_pretrained("user/model")`, not from_pretrained("other")' in pushed
    assert (checkpoint / "README.md").read_text() == mine


def test_a_classifier_without_a_card_gets_one_of_a_classifier_on_the_hub_alone(hub, tmp_path):
    folder = tmp_path / "classifier"
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, id2label={0: "water", 1: "forest"})
    FusMAEForImageClassification(config).save_pretrained(folder)
    FusMAEImageProcessor().save_pretrained(folder)
    push_model(folder, NAME)
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.data.pipeline_tag == "image-classification"
    assert 'AutoModelForImageClassification.from_pretrained("user/model")' in card.text
    assert "water, forest" in card.text
    assert "decoders" not in card.text
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [(None, "There is no folder"), ((), "holds neither a config.json"), (("adapter_config.json",), "merge it into")],
)
def test_what_cannot_be_pushed_is_said(tmp_path, files, said):
    folder = tmp_path / "folder"
    for name in files if files is not None else ():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    if files == ():
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=said):
        run_command("push", folder, NAME)


def test_weights_of_an_earlier_push_are_deleted(hub, checkpoint):
    push_model(checkpoint, NAME)
    assert "model.safetensors.index.json" in hub.files(NAME)
    model = FusMAEForPreTraining.from_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    push_model(checkpoint, NAME)
    weights = [name for name in hub.files(NAME) if "safetensors" in name]
    assert weights == ["model.safetensors"]


@pytest.mark.parametrize("file", ["preprocessor_config.json", "modeling_fusmae.py"])
def test_an_incomplete_checkpoint_is_not_pushed(hub, checkpoint, file):
    (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=f"lacks {file}, so nothing was pushed"):
        push_model(checkpoint, NAME)
    assert not hub.log


def test_the_trainer_pushes_the_same_files(hub, checkpoint, tmp_path):
    push_model(checkpoint, NAME)
    prepare(SimulatedPairs(12, options=SimulationOptions(image_size=24)), tmp_path / "shards", progress=False)
    trainer = FusMAETrainer(
        FusMAEForPreTraining.from_pretrained(checkpoint),
        FusMAEImageProcessor(),
        load_pairs(tmp_path / "shards"),
        args=PretrainingArguments(str(checkpoint), eval_strategy="no", push_to_hub=True, hub_model_id="user/trained"),
    )
    trainer.push_to_hub()
    assert hub.files("user/trained").keys() == hub.files(NAME).keys()


def test_a_run_pushes_its_checkpoint_with_record_results_and_pictures(hub, tmp_path):
    prepare(SimulatedPairs(24, options=SimulationOptions(image_size=24)), tmp_path / "shards", progress=False)
    output = tmp_path / "run"
    fields = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    command = [
        "--data",
        tmp_path / "shards",
        "--output_dir",
        output,
        "--preset",
        "tiny",
        "--config",
        json.dumps(fields),
    ]
    command += [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    command += ["--push_to_hub", "true", "--hub_model_id", "user/run", "--hub_strategy", "every_save"]
    done = subprocess.run(
        [sys.executable, "-m", "fusmae_hf.training.run_pretrain", *map(str, command), "--disable_tqdm", "true"],
        env=os.environ | ONLINE | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.url}/user/run" in done.stdout
    files = hub.files("user/run")
    expected = {"README.md", ".eval_results/results.yaml", "run.json", "loss.png", "model.safetensors", "config.json"}
    assert expected | {"preprocessor_config.json", "modeling_fusmae.py"} <= files.keys()
    card = (output / "README.md").read_text()
    assert files["README.md"].decode() == card.replace('from_pretrained("run")', 'from_pretrained("user/run")')
    assert not [name for name in files if name.endswith((".bin", ".pt")) or name.startswith("runs/")]


LOAD = """
import sys

if sys.argv[2] == "without":
    class NotInstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "fusmae_hf":
                raise ModuleNotFoundError(f"No module named {name!r}")

    sys.meta_path.insert(0, NotInstalled())
    options = {"trust_remote_code": True}
else:
    import fusmae_hf
    options = {}
import torch
from transformers import AutoImageProcessor, AutoModel

name, commit = sys.argv[1], sys.argv[3]
for revision in ("main", commit):
    processor = AutoImageProcessor.from_pretrained(name, revision=revision, **options)
    model = AutoModel.from_pretrained(name, revision=revision, **options)
size = model.config.image_size
height, width = (size, size) if isinstance(size, int) else size
inputs = processor(sar=torch.full((1, 2, height, width), -12.0), optical=torch.full((1, 12, height, width), 900.0))
with torch.no_grad():
    print("sum", round(model(**inputs).pooler_output.double().sum().item(), 3))
assert ("fusmae_hf" in sys.modules) == (sys.argv[2] == "with")
"""


def test_a_pushed_model_loads_by_name_and_revision_with_and_without_the_package(hub, checkpoint, tmp_path):
    commit = push_model(checkpoint, NAME).commit
    environment = os.environ | ONLINE | {"HF_ENDPOINT": hub.url}
    sums = []
    for package in ("without", "with"):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, NAME, package, commit],
            env=environment | {"HF_HOME": str(tmp_path / package)},
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        sums.append(done.stdout.split("sum")[1])
    assert sums[0] == sums[1]
