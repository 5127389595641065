"""Pipelines of transformers take pairs and give what processor and model give by hand."""

import numpy as np
import pytest
import torch
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation, pipeline

from fusmae_hf import (
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForSemanticSegmentation,
    FusMAEImageProcessor,
    FusMAEModel,
    SimulatedPairs,
    SimulationOptions,
)

CLASSES = {
    "image-feature-extraction": FusMAEModel,
    "image-classification": FusMAEForImageClassification,
    "image-segmentation": FusMAEForSemanticSegmentation,
}


@pytest.fixture(scope="module")
def pairs():
    read = SimulatedPairs(2, options=SimulationOptions(image_size=32)).read
    return [{"optical": pair.optical, "sar": pair.sar} for pair in (read(0), read(1))]


@pytest.fixture
def load(tmp_path):
    """Saves a model and its processor, and loads the pipeline of a task from there."""

    def load(task, **processor):
        config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, image_size=32, num_labels=3)
        CLASSES[task](config).save_pretrained(tmp_path)
        FusMAEImageProcessor(**processor).save_pretrained(tmp_path)
        return pipeline(task, model=str(tmp_path), trust_remote_code=True, device="cpu")

    return load


def given(task, results):
    """What a pipeline gave for one pair, as numbers."""
    if task == "image-classification":
        return [result["score"] for result in sorted(results, key=lambda result: result["label"])]
    if task == "image-segmentation":
        return sum(int(result["label"][-1]) * (np.array(result["mask"]) > 0) for result in results)
    return results[0]


@pytest.mark.parametrize("task", CLASSES)
def test_a_batch_of_pairs_gives_what_the_model_gives(load, pairs, task, tmp_path):
    pipe = load(task)
    with torch.no_grad():
        inputs = pipe.image_processor(**{sensor: np.stack([pair[sensor] for pair in pairs]) for sensor in pairs[0]})
        outputs = pipe.model(**inputs)
    expected = {
        "image-feature-extraction": lambda: outputs.last_hidden_state,
        "image-classification": lambda: outputs.logits.softmax(-1),
        "image-segmentation": lambda: torch.stack(
            pipe.image_processor.post_process_semantic_segmentation(outputs, [(32, 32)] * 2)
        ),
    }[task]()
    for number, results in enumerate(pipe(pairs, batch_size=2)):
        assert np.allclose(given(task, results), expected[number], atol=1e-5)
    pipe.save_pretrained(tmp_path / "again")
    assert pipeline(task, model=str(tmp_path / "again"), trust_remote_code=True)(pairs[0])


def test_paths_and_one_sensor_alone_and_words_of_the_processor(load, pairs, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    pipe, optical = load("image-feature-extraction"), pairs[0]["optical"]
    np.save(tmp_path / "optical.npy", optical)
    shape = {"count": len(optical), "height": 32, "width": 32, "dtype": optical.dtype}
    with rasterio.open(tmp_path / "optical.tif", "w", driver="GTiff", **shape) as raster:
        raster.write(optical)
    expected = pipe({"optical": optical})
    for path in (str(tmp_path / "optical.npy"), tmp_path / "optical.tif"):
        assert pipe({"optical": path}) == expected
    assert np.allclose(pipe({"optical": optical + 1000, "optical_offset": 1000}), expected, atol=1e-4)
    assert len(pipe(pairs[0])[0]) > len(expected[0])
    with rasterio.open(tmp_path / "optical.tif", "r+") as raster:
        raster.scales = [1e-4] * len(optical)
    with pytest.raises(ValueError, match="states a scale"):
        pipe({"optical": tmp_path / "optical.tif"})


def test_masks_have_the_size_of_the_pair_where_the_processor_pads(load, pairs):
    pipe = load("image-segmentation", do_pad=True, size_divisor=8)
    cut = {sensor: image[:, :29, :27] for sensor, image in pairs[0].items()}
    assert {found["mask"].size for found in pipe(cut)} == {(27, 29)}


def test_what_is_no_pair_is_refused(load):
    with pytest.raises(TypeError, match=r"\{'optical': \.\.\., 'sar': \.\.\.\}.*not a str"):
        load("image-classification")("scene.tif")


def test_upernet_takes_the_backbone_of_a_configuration():
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=4, image_size=64, out_indices=[1, 2, 3, 4])
    assert AutoBackbone.from_config(config).channels == [192] * 4
    upernet = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config, hidden_size=32, num_labels=5, pool_scales=[1, 2], auxiliary_in_channels=192
        )
    ).eval()
    one, other = torch.randn(2, 2, 12, 64, 64)
    with torch.no_grad():
        logits = upernet(one).logits
        assert logits.shape == (2, 5, 64, 64)
        assert not torch.allclose(logits, upernet(other).logits)
