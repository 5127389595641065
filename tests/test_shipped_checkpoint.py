"""The checkpoint in the repository is what its card says, and is of use."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, FusMAEModel
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, SAR_BANDS, statistics_for
from fusmae_hf.simulation.pairs import SimulatedPairs

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = (
    "Intended use", "Sensors", "Training data", "Recipe", "Held-out reconstruction", "Features", "Limits",
    "Bias and geography", "Environmental cost", "Citation",
)  # fmt: skip
CHECKPOINT = ROOT / "checkpoints" / "fusmae-tiny"


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return ModelCard.load(CHECKPOINT / "README.md")


def test_it_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 25e6


def test_it_carries_the_code_of_this_version():
    for path in CHECKPOINT.glob("*.py"):
        assert path.read_text() == (ROOT / "modeling" / path.name).read_text(), (
            f"{path.name} has changed: run python checkpoints/make_fusmae_tiny.py --code"
        )
    assert {path.name for path in CHECKPOINT.glob("*.py")} == {p.name for p in (ROOT / "modeling").glob("*_fusmae.py")}


def test_its_card_is_the_page_of_the_project_and_leaves_nothing_open(card):
    assert (ROOT / "model_card.md").read_text() == (CHECKPOINT / "README.md").read_text()
    assert not re.search(r"\{[a-z_]*\}|More information needed|TODO|\bNone\b|\bnan\b", card.text)
    for title in SECTIONS:
        assert f"\n## {title}\n" in card.text, title
    for field in ("library_name", "pipeline_tag", "tags", "license", "datasets", "metrics", "model-index"):
        assert card.data.to_dict().get(field), field


def test_its_results_stand_in_both_forms(card):
    entries = yaml.safe_load((CHECKPOINT / ".eval_results" / "results.yaml").read_text())
    assert [entry["value"] for entry in entries] == [result.metric_value for result in card.data.eval_results]
    assert entries


def test_it_knows_bands_units_and_statistics(card):
    processor = FusMAEImageProcessor.from_pretrained(CHECKPOINT)
    assert (tuple(processor.sar_bands), tuple(processor.optical_bands)) == (SAR_BANDS, OPTICAL_BANDS)
    for sensor in ("sar", "optical"):
        mean, std = statistics_for("bigearthnet", sensor, getattr(processor, f"{sensor}_bands"))
        for band, *values in zip(getattr(processor, f"{sensor}_bands"), mean, std, strict=True):
            name = "SAR" if sensor == "sar" else sensor
            assert f"| {name} | {band} | {values[0]:.6g} | {values[1]:.6g} |" in card.text


def test_it_loads_and_reconstructs_better_than_flat_patches():
    model, processor = FusMAEForPreTraining.from_pretrained(CHECKPOINT).eval(), FusMAEImageProcessor()
    pairs = [SimulatedPairs(40, seed=5).read(index) for index in range(0, 40, 4)]
    inputs = processor(sar=[pair.sar for pair in pairs], optical=[pair.optical for pair in pairs])
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.rand(10, model.config.num_patches, generator=generator) for name in ("noise", "noise_sar")}
    with torch.no_grad():
        outputs = model(**inputs, **noise)
    for suffix, share in (("", 0.7), ("_sar", 0.99)):  # most of SAR is speckle
        logits, mask = outputs[f"logits{suffix}"], outputs[f"mask{suffix}"]
        predicted, flat = (
            model.sensor_error(values, inputs[f"pixel_values{suffix}"], mask).mean()
            for values in (logits, torch.zeros_like(logits))
        )
        assert predicted < share * flat, suffix


def test_its_sar_features_tell_land_cover_better_than_those_of_an_untrained_model():
    simulated = SimulatedPairs(480, seed=6)
    split = np.array([simulated.split_of(index) for index in range(0, 480, 2)])
    pairs = [simulated.read(index) for index in range(0, 480, 2)]
    processor = FusMAEImageProcessor.from_pretrained(CHECKPOINT)
    labels = np.array([[name in pair.labels for name in simulated.info.class_names] for pair in pairs])
    usable = [c for c in range(labels.shape[1]) if all(labels[split == s, c].sum() > 2 for s in ("train", "test"))]
    torch.manual_seed(0)
    scores = {}
    models = {
        "trained": FusMAEModel.from_pretrained(CHECKPOINT),
        "untrained": FusMAEModel(FusMAEConfig.from_pretrained(CHECKPOINT)),
    }
    for name, model in models.items():
        with torch.no_grad():
            features = np.concatenate(
                [
                    model.eval()(**processor(sar=[pair.sar for pair in some])).pooler_output
                    for some in (pairs[start : start + 40] for start in range(0, len(pairs), 40))
                ]
            )
        train = features[split == "train"]
        features = (features - train.mean(axis=0)) / train.std(axis=0)
        of_classes = []
        for number in usable:
            probe = LogisticRegression(C=0.3, max_iter=500).fit(
                features[split == "train"], labels[split == "train", number]
            )
            held_out = probe.decision_function(features[split == "test"])
            of_classes.append(average_precision_score(labels[split == "test", number], held_out))
        scores[name] = np.mean(of_classes)
    assert scores["trained"] > scores["untrained"] + 0.03, scores
