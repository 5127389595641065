import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.data.inputs import PairInputs
from fusmae_hf.plots.model import (
    cross_attention_maps,
    embedding_colours,
    plot_cross_attention,
    plot_embedding,
    plot_errors,
    reconstruct_images,
)
from fusmae_hf.plots.pairs import percentile_stretch, plot_backscatter, plot_composite
from fusmae_hf.simulation.pairs import SimulatedPairs

PAIRS = SimulatedPairs(1)
PAIR, INFO = PAIRS.read(0), PAIRS.info


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, decoder_num_hidden_layers=1)
    return FusMAEForPreTraining(config)


@pytest.fixture(scope="module")
def inputs():
    batch = {"sar": torch.from_numpy(PAIR.sar)[None], "optical": torch.from_numpy(PAIR.optical)[None]}
    return PairInputs(FusMAEImageProcessor(), INFO)(batch)


def test_a_composite_shows_the_bands_it_names():
    axis = plot_composite(PAIR, INFO, ("B11", "B08", "B04")).axes[0]
    bands = [INFO.optical_bands.index(name) for name in ("B11", "B08", "B04")]
    shown = np.asarray(axis.images[0].get_array())
    assert np.array_equal(shown, percentile_stretch(PAIR.optical[bands], together=False))
    assert "B11, B08, B04" in axis.get_title()


def test_a_band_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="B99"):
        plot_composite(PAIR, INFO, ("B99", "B04", "B03"))


def test_the_ratio_of_vv_and_vh_is_their_difference_in_db():
    axes = [axis for axis in plot_backscatter(PAIR, INFO).axes if axis.get_title()]
    assert [axis.get_title() for axis in axes] == ["VV", "VH", "VV / VH"]
    for axis, values in zip(axes, (*PAIR.sar, PAIR.sar[0] - PAIR.sar[1]), strict=True):
        assert np.allclose(np.asarray(axis.images[0].get_array()), values)


def test_attention_maps_are_those_of_the_model_in_both_directions(model, inputs):
    before = model.config._attn_implementation
    maps = cross_attention_maps(model, inputs, 2, 3)
    assert model.config._attn_implementation == before
    columns = inputs["pixel_values"].shape[3] // model.config.patch_size
    model.set_attn_implementation("eager")
    with torch.no_grad():
        of_optical, of_sar = model.eval().fusmae(**inputs, output_attentions=True).cross_attentions
    model.set_attn_implementation(before)
    for name, weights in (("optical", of_sar), ("sar", of_optical)):
        expected = weights[0, :, 2 * columns + 3].mean(dim=0).numpy()
        assert np.allclose(maps[name].ravel(), expected, atol=1e-6)
        assert maps[name].sum() == pytest.approx(1, abs=1e-4)


def test_a_patch_outside_the_grid_is_refused(model, inputs):
    with pytest.raises(ValueError, match="There is no patch 99,0"):
        cross_attention_maps(model, inputs, 99, 0)


def test_embedding_colours_cover_the_grid_of_each_sensor(model, inputs):
    side = inputs["pixel_values"].shape[2] // model.config.patch_size
    for picture, share in embedding_colours(model, inputs).values():
        assert picture.shape == (side, side, 3)
        assert (picture.min(), picture.max()) == (0, 1)
        assert 0 < share <= 1


def test_errors_are_reconstruction_minus_input_where_it_was_hidden(model, inputs):
    number = (inputs["pixel_values"].shape[2] // model.config.patch_size) ** 2
    noise = {name: torch.rand(1, number) for name in ("noise", "noise_sar")}
    processor = FusMAEImageProcessor()
    pictures = reconstruct_images(model, inputs | noise, processor)
    axes = plot_errors(pictures, processor, "a title").axes
    sar = pictures["sar"]
    error = np.ma.filled(axes[11].images[0].get_array(), np.nan)
    expected = np.where(sar["visible"][0], np.nan, (sar["reconstruction"] - sar["original"])[0, 0])
    assert np.allclose(error, expected, equal_nan=True)
    assert axes[8].get_ylabel() == "SAR VV"


def test_hidden_patches_are_shown_without_the_brightness_that_only_the_truth_knows(inputs):
    torch.manual_seed(0)
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, decoder_num_hidden_layers=1, norm_pix_loss=True)
    model, processor = FusMAEForPreTraining(config).eval(), FusMAEImageProcessor()
    patches = (inputs["pixel_values"].shape[2] // config.patch_size) ** 2
    noise = {name: torch.rand(1, patches) for name in ("noise", "noise_sar")}
    given = dict(inputs)
    for suffix in ("", "_sar"):  # a corner without data
        given[f"pixel_mask{suffix}"] = torch.ones(1, *inputs["pixel_values"].shape[2:], dtype=torch.bool)
        given[f"pixel_mask{suffix}"][:, :20, :20] = False
    with torch.no_grad():
        masks = model(**given, **noise)
        expected = model.reconstruct(**given, mask=masks.mask, mask_sar=masks.mask_sar)
    pictures = reconstruct_images(model, given | noise, processor)
    for sensor, suffix in (("optical", ""), ("sar", "_sar")):
        hidden = ~pictures[sensor]["visible"][0]
        wanted = processor.denormalize(expected[f"pixel_values{suffix}"], sensor).numpy()
        np.testing.assert_allclose(
            pictures[sensor]["reconstruction"][0][:, hidden], wanted[0][:, hidden], rtol=1e-3, atol=1e-2
        )


def test_pictures_of_padded_pairs_are_cut_to_the_pair():
    model = FusMAEForPreTraining(FusMAEConfig.from_preset("tiny", num_hidden_layers=1, patch_size=7, image_size=14))
    batch = {"sar": torch.from_numpy(PAIR.sar)[None], "optical": torch.from_numpy(PAIR.optical)[None]}
    inputs = PairInputs(FusMAEImageProcessor(), INFO, patch_size=7)(batch)
    size, patches = PAIR.optical.shape[1:], inputs["pixel_values"].shape[-1] // 7
    noise = {name: torch.rand(1, patches**2) for name in ("noise", "noise_sar")}
    for images in reconstruct_images(model, inputs | noise, FusMAEImageProcessor(), size).values():
        assert {values.shape[-2:] for values in images.values()} == {size}
    figures = [
        plot_cross_attention(cross_attention_maps(model, inputs, 0, 0), PAIR, INFO, 0, 0, 7),
        plot_embedding(embedding_colours(model, inputs), PAIR, INFO, 7),
    ]
    for figure in figures:
        drawn = [axis for axis in figure.axes if axis.images and axis.images[0].get_array().shape[0] == patches]
        assert len(drawn) == 2
        assert {axis.images[0].get_extent()[1] for axis in drawn} == {7 * patches - 0.5}
        assert {axis.get_xlim() for axis in drawn} == {(-0.5, size[1] - 0.5)}
