"""The size of pixels goes from the data into the configuration of a model that is trained on it."""

import warnings
from dataclasses import replace

import pytest

from fusmae_hf import FusMAEConfig, FusMAEModel
from fusmae_hf.training.sources import pixel_size_of, take_pixel_size
from tests.small_shards import INFO


@pytest.mark.parametrize(("size", "gsd"), [(30.0, 30.0), (None, 10.0)])
def test_a_fresh_model_takes_the_size_of_the_pixels(size, gsd):
    assert FusMAEConfig(**pixel_size_of(replace(INFO, pixel_size=size))).gsd == gsd


@pytest.mark.parametrize(
    ("size", "told"), [(30.0, True), (5.0, True), (10.0, False), (10.3, False), (9.5, False), (None, False)]
)
def test_training_on_another_size_than_the_checkpoints_says_so(size, told):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = FusMAEModel(FusMAEConfig(**sizes, gsd=10.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take_pixel_size(model, replace(INFO, pixel_size=size))
    said = [str(warning.message) for warning in caught]
    assert (f"trained on pixels of 10 m, those of small are of {size:g} m" in said[0] if told else not said) is True
    assert model.config.gsd == (size if told else 10.0)
