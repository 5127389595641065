import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, FusMAEModel
from fusmae_hf.modeling.modeling_fusmae import FusMAEHeadOutput
from fusmae_hf.modeling.no_data_fusmae import Declaration
from fusmae_hf.modeling.plausibility_fusmae import ACCELERATOR_LOOKS, Plausibility
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C, SAR_BANDS, STATISTICS

VV, VH = (-12.0, -19.0)


@pytest.fixture
def sar() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.normal(mean, 3, (16, 16)) for mean in (VV, VH)]).astype("float32")


@pytest.fixture
def optical() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 5000, (12, 16, 16)).astype("uint16")


def test_values_are_normalised_by_the_stored_statistics_of_their_band(sar, optical):
    inputs = FusMAEImageProcessor(statistics="bigearthnet")(sar=sar, optical=optical)
    assert inputs["pixel_values"].dtype == inputs["pixel_values_sar"].dtype == torch.float32
    mean, std = STATISTICS["bigearthnet"].optical["B08"]
    np.testing.assert_allclose(inputs["pixel_values"][0, 7], (optical[7] - mean) / std, rtol=1e-5, atol=1e-5)
    mean, std = STATISTICS["bigearthnet"].sar["VH"]
    np.testing.assert_allclose(inputs["pixel_values_sar"][0, 1], (sar[1] - mean) / std, rtol=1e-5, atol=1e-5)


def test_db_is_not_rounded_to_integers(sar):
    inputs = FusMAEImageProcessor()(sar=sar)
    restored = FusMAEImageProcessor().denormalize(inputs["pixel_values_sar"], "sar")
    np.testing.assert_allclose(restored[0], sar, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.permutations(OPTICAL_BANDS_L1C), st.lists(st.sampled_from(OPTICAL_BANDS), min_size=1, unique=True))
def test_bands_are_picked_and_ordered_by_name(given_order, wanted):
    values = {band: 100.0 * position + 1 for position, band in enumerate(OPTICAL_BANDS_L1C)}
    array = np.stack([np.full((4, 4), values[band], dtype="int32") for band in given_order])
    processor = FusMAEImageProcessor(optical_bands=wanted)
    restored = processor.denormalize(processor(optical=array, optical_bands=given_order)["pixel_values"], "optical")
    np.testing.assert_allclose(restored[0, :, 0, 0], [values[band] for band in wanted], rtol=1e-4)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, lambda x: [x, x], lambda x: np.stack([x, x])])
def test_arrays_tensors_lists_and_batches_give_the_same(sar, optical, make):
    alone = FusMAEImageProcessor()(sar=sar, optical=optical)
    inputs = FusMAEImageProcessor()(sar=make(sar), optical=make(optical))
    for name in alone:
        for sample in inputs[name]:
            assert torch.equal(sample, alone[name][0])


def test_big_endian_and_flipped_arrays_are_read_right(sar):
    alone = FusMAEImageProcessor()(sar=sar)["pixel_values_sar"]
    big_endian = FusMAEImageProcessor()(sar=sar.astype(">f4"))["pixel_values_sar"]
    flipped = FusMAEImageProcessor()(sar=sar[:, ::-1])["pixel_values_sar"]
    assert torch.equal(big_endian, alone)
    assert torch.equal(flipped, alone.flip(2))


def test_a_patch_is_processed_alike_whatever_its_neighbours_are(sar, optical):
    processor = FusMAEImageProcessor()
    alone = processor(sar=sar, optical=optical)
    beside = processor(sar=[sar, sar * 3], optical=[optical, optical // 9])
    for name in alone:
        assert torch.equal(beside[name][0], alone[name][0])


def test_raw_integers_on_a_tensor_give_what_floats_give(optical):
    raw = FusMAEImageProcessor()(optical=torch.from_numpy(optical)[None], return_pixel_mask=True)
    floats = FusMAEImageProcessor()(optical=optical.astype("float32"), return_pixel_mask=True)
    assert torch.equal(raw["pixel_values"], floats["pixel_values"])
    assert torch.equal(raw["pixel_mask"], floats["pixel_mask"])


@pytest.mark.parametrize(
    ("units", "convert"), [("db", lambda db: db), ("linear", lambda db: 10 ** (db / 10)), ("raw", lambda db: db)]
)
def test_sar_units_are_converted_to_db(sar, units, convert):
    expected = FusMAEImageProcessor()(sar=sar)["pixel_values_sar"]
    got = FusMAEImageProcessor(sar_units=units)(sar=convert(sar).astype("float32"))["pixel_values_sar"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "convert"),
    [
        ({"optical_units": "reflectance"}, lambda dn: dn / 10_000),
        ({"optical_offset": 1000}, lambda dn: dn + 1000),
        ({"optical_offset": 1000, "optical_units": "reflectance"}, lambda dn: (dn + 1000) / 10_000),
    ],
)
def test_reflectance_and_offset_lead_to_the_same_values(optical, options, convert):
    optical = optical.astype("float32")
    expected = FusMAEImageProcessor()(optical=optical)["pixel_values"]
    at_construction = FusMAEImageProcessor(**options)(optical=convert(optical))["pixel_values"]
    at_call = FusMAEImageProcessor()(optical=convert(optical), **options)["pixel_values"]
    torch.testing.assert_close(at_construction, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(at_call, at_construction)


def test_pixels_without_data_are_marked_and_filled_with_the_mean(sar, optical):
    sar[0, :3], sar[1, 5, 5], optical[:, 8:10] = np.nan, -np.inf, 0
    optical[3, 0, 0] = 0  # one dark band is a value, not missing data
    inputs = FusMAEImageProcessor()(sar=sar, optical=optical)
    expected = np.ones((16, 16), dtype=bool)
    expected[:3], expected[5, 5] = False, False
    assert np.array_equal(inputs["pixel_mask_sar"][0], expected)
    assert (inputs["pixel_values_sar"][0][:, ~expected] == 0).all()
    assert inputs["pixel_mask"][0, 8:10].sum() == 0
    assert inputs["pixel_mask"].sum() == 14 * 16
    assert inputs["pixel_values"].isfinite().all()


def test_a_declared_value_means_no_data(sar):
    sar[1, :4] = -9999
    inputs = FusMAEImageProcessor(sar_nodata=-9999)(sar=sar)
    assert inputs["pixel_mask_sar"].sum() == 12 * 16


def test_zero_linear_power_is_no_data(sar):
    power = 10 ** (sar / 10)
    power[0, :4] = 0
    inputs = FusMAEImageProcessor(sar_units="linear")(sar=power)
    assert inputs["pixel_mask_sar"].sum() == 12 * 16
    assert inputs["pixel_values_sar"].isfinite().all()


@pytest.mark.parametrize(("return_pixel_mask", "given"), [(None, False), (True, True), (False, False)])
def test_masks_come_where_they_are_needed_or_asked_for(sar, optical, return_pixel_mask, given):
    inputs = FusMAEImageProcessor()(sar=sar, optical=optical, return_pixel_mask=return_pixel_mask)
    assert ("pixel_mask" in inputs) == ("pixel_mask_sar" in inputs) == given


def test_none_in_a_list_is_an_absent_sensor_and_the_model_takes_it(sar, optical):
    inputs = FusMAEImageProcessor()(sar=[sar, None, sar], optical=[optical, optical, None])
    assert inputs["sar_available"].tolist() == [True, False, True]
    assert inputs["optical_available"].tolist() == [True, True, False]
    model = FusMAEModel(FusMAEConfig.from_preset("tiny", num_hidden_layers=1)).eval()
    with torch.no_grad():
        mixed, alone = model(**inputs), model(**FusMAEImageProcessor()(optical=optical))
    torch.testing.assert_close(mixed.pooler_output[1], alone.pooler_output[0], rtol=1e-4, atol=1e-5)


def test_resizing_happens_on_request_alone_and_keeps_no_data_apart(sar, optical):
    sar[:, :8] = np.nan
    inputs = FusMAEImageProcessor(do_resize=True, size={"height": 8, "width": 24})(sar=sar, optical=optical)
    assert inputs["pixel_values"].shape == (1, 12, 8, 24)
    assert inputs["pixel_mask_sar"][0].sum() == 4 * 24
    assert FusMAEImageProcessor()(optical=optical)["pixel_values"].shape == (1, 12, 16, 16)


def test_saved_and_loaded_processors_are_equal(tmp_path, sar, optical):
    processor = FusMAEImageProcessor(
        statistics=None,
        sar_bands=["VV"],
        optical_bands=["B04", "B08"],
        sar_mean=[-11.5],
        sar_std=[4.5],
        optical_mean={"B08": 2200.0, "B04": 600.0},
        optical_std=[700.0, 1300.0],
        optical_offset=1000,
        sar_nodata=-9999,
        optical_nodata=None,
    )
    FusMAEModel(FusMAEConfig.from_preset("tiny", num_hidden_layers=1)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FusMAEImageProcessor)
    loaded.save_pretrained(tmp_path / "again")  # saving writes what AutoImageProcessor needs into both
    assert loaded.to_dict() == processor.to_dict()
    optical = optical + 1000
    for name, values in processor(sar=sar[:1], optical=optical, optical_bands=OPTICAL_BANDS).items():
        assert torch.equal(loaded(sar=sar[:1], optical=optical, optical_bands=OPTICAL_BANDS)[name], values)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["optical_mean"] == {"B04": 600.0, "B08": 2200.0}
    assert stored["optical_std"] == {"B04": 700.0, "B08": 1300.0}


def test_other_bands_at_load_take_their_statistics_by_name(tmp_path):
    FusMAEImageProcessor().save_pretrained(tmp_path)
    loaded = FusMAEImageProcessor.from_pretrained(tmp_path, optical_bands=["B08", "B02"])
    values = torch.tensor([2218.9, 429.9])[:, None, None].expand(2, 4, 4)
    torch.testing.assert_close(loaded(optical=values)["pixel_values"], torch.zeros(1, 2, 4, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sar_units": "decibel"}, r"must be one of \['db', 'linear', 'raw'\], not 'decibel'"),
        ({"statistics": "imagenet"}, "Unknown statistics 'imagenet'"),
        ({"statistics": "sen12ms"}, "hold no optical figure"),
        ({"statistics": None}, "No statistics of the sar sensor"),
        ({"sar_mean": [1.0, 2.0]}, "belong together"),
        ({"sar_mean": [1.0], "sar_std": [1.0]}, "has 1 values for the 2 bands"),
        ({"sar_mean": {"VV": 1.0}, "sar_std": {"VV": 1.0}}, r"bands \['VH'\] are needed"),
        ({"sar_mean": [1.0, 1.0], "sar_std": [1.0, 0.0]}, "must be positive and finite"),
        ({"optical_bands": ["B02", "B99"]}, "B99"),
        ({"do_resize": True}, "needs `size="),
    ],
)
def test_a_processor_that_would_guess_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FusMAEImageProcessor(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "Neither sensor was given"),
        ({"optical": np.ones((13, 16, 16))}, "13 bands but 12 names"),
        ({"optical": np.ones((13, 16, 16)), "optical_bands": ["B02"] * 13}, "must be unique"),
        ({"sar": np.ones((2, 16, 16)), "sar_bands": ["VV", "HH"]}, r"\['VH'\] are needed but were not given"),
        ({"sar": np.ones((16, 16))}, "expected shape"),
        ({"sar": [np.ones((2, 2, 16, 16))]}, "each patch of a list"),
        ({"sar": [np.full((2, 16, 16), -9.0), np.full((2, 8, 16), -9.0)]}, "differ in size"),
        ({"sar": [None, None]}, "holds no patch at all"),
        ({"sar": np.ones((0, 2, 16, 16))}, "holds no pixel. Leave an empty batch out"),
        ({"optical": torch.ones(0, 12, 16, 16), "return_pixel_mask": True}, "holds no pixel"),
        ({"sar": [np.ones((2, 0, 16))]}, "holds no pixel"),
        ({"sar": "file.tif"}, "expected numpy arrays or torch tensors of numbers, got a str"),
        ({"sar": np.full((2, 16, 16), np.nan)}, r"sample \[0\] of the batch holds no valid pixel"),
        ({"sar": np.full((2, 8, 16), -9.0), "optical": np.ones((12, 16, 16))}, "same places on the same grid"),
        (
            {"sar": [np.full((2, 16, 16), -9.0)] * 2, "optical": [np.ones((12, 16, 16))]},
            r"differ in the number of samples: 2 SAR and 1 optical were given\. Give both for each sample",
        ),
        ({"optical": np.ones((16, 16, 12))}, r"bands come first: array\.transpose\(2, 0, 1\)"),
        ({"sar": np.ones((3, 16, 16, 2))}, r"of a batch \(0, 3, 1, 2\)"),
        ({"sar": np.full((2, 16, 16), -9.0), "sar_units": "linear"}, "looks like dB"),
        ({"optical": np.full((12, 16, 16), 900), "optical_units": "reflectance"}, "looks like digital numbers"),
        ({"optical": np.ones((12, 16, 16)), "optical_units": "percent"}, "must be one of"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arrays_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        FusMAEImageProcessor()(**call)


# --- values that are not what is declared ---------------------------------------------------------------------------


def normalised(optical: np.ndarray) -> np.ndarray:
    return FusMAEImageProcessor()(optical=optical)["pixel_values"][0].numpy()


MISTAKES = {
    "swapped bands": (lambda sar, optical: {"sar": sar[::-1]}, "Are the bands swapped"),
    "linear power": (lambda sar, optical: {"sar": 10 ** (sar / 10)}, "looks like linear power"),
    "dB x 100": (lambda sar, optical: {"sar": (sar * 100).astype("int16")}, "Were dB multiplied by 100"),
    "dB x 10": (lambda sar, optical: {"sar": sar * 10}, "Were dB multiplied by 100"),
    "dB / 10,000": (lambda sar, optical: {"sar": sar / 10_000}, "Were they divided by 10,000"),
    "dB in integers": (
        lambda sar, optical: {"sar": sar.astype("int16")},
        "comes in int16: the fraction of each dB is lost",
    ),
    "not calibrated": (lambda sar, optical: {"sar": abs(sar) * 1e4, "sar_units": "linear"}, "never calibrated"),
    "marks in SAR": (
        lambda sar, optical: {"sar": np.where(np.eye(16, dtype=bool), -9999, sar)},
        r"sar_nodata=-9999), or set these pixels to NaN.",
    ),
    "marks above SAR": (
        lambda sar, optical: {"sar": np.where(np.eye(16, dtype=bool), 9999, sar)},
        r"sar_nodata=9999), or set these pixels to NaN.",
    ),
    "negative power": (
        lambda sar, optical: {"sar": np.where(np.eye(16, dtype=bool), -1e-3, 10 ** (sar / 10)), "sar_units": "linear"},
        "32 values are negative, to -0.001: they count as no data",
    ),
    "normalised SAR": (lambda sar, optical: {"sar": (sar + 15.5) / 5}, "looks normalised already: load the processor"),
    "normalised optical": (
        lambda sar, optical: {"optical": normalised(optical)},
        "looks normalised already: load the processor with from_pretrained(..., do_normalize=False), or pass the ",
    ),
    "reflectance": (lambda sar, optical: {"optical": optical / 10_000}, "looks like reflectance"),
    "reflectance below zero": (lambda sar, optical: {"optical": optical / 10_000 - 0.1}, "looks like reflectance"),
    "uint8": (
        lambda sar, optical: {"optical": (optical // 20).astype("uint8")},
        "comes in uint8: this looks like an 8-bit",
    ),
    "8 bits in uint16": (
        lambda sar, optical: {"optical": optical // 20},
        "no value exceeds 249: this looks like an 8-bit",
    ),
    "offset forgotten": (lambda sar, optical: {"optical": optical + 1000}, "optical_offset=1000 if yours do"),
    "offset in vain": (
        lambda sar, optical: {"optical": optical, "optical_offset": 1000},
        r"% of the pixels lie below the declared offset of 1000. Was the offset subtracted already",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_values_that_are_not_what_is_declared_warn_once_and_of_nothing_else(sar, optical, mistake):
    change, message = MISTAKES[mistake]
    processor = FusMAEImageProcessor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            processor(**change(sar, optical))
    assert [message in str(warning.message) for warning in caught] == [True], caught
    assert caught[0].filename == __file__


PLAUSIBLE = {
    "a pair": lambda sar, optical: {"sar": sar, "optical": optical},
    "a tiny crop": lambda sar, optical: {"sar": sar[:, :8, :8], "optical": optical[:, :8, :8]},
    "one pixel": lambda sar, optical: {"sar": sar[:, :1, :1], "optical": optical[:, :1, :1]},
    "constant": lambda sar, optical: {
        "sar": torch.full((2, 64, 64), -12.0),
        "optical": torch.full((12, 64, 64), 100),
    },
    "calm water": lambda sar, optical: {
        "sar": sar / 3 + np.array([-20, -19.5])[:, None, None],
        "optical": optical // 200 + np.linspace(250, 10, 12).astype("uint16")[:, None, None],
    },
    "a town": lambda sar, optical: {"sar": sar + 9},
    "snow": lambda sar, optical: {
        "optical": optical // 9 + np.array([9000] * 10 + [300, 200]).astype("uint16")[:, None, None]
    },
    "thick cloud": lambda sar, optical: {"optical": optical // 9 + 6000},
    "night": lambda sar, optical: {"optical": optical // 100},
    "shadow a little below the offset": lambda sar, optical: {
        "optical": optical // 50 + 930,
        "optical_offset": 1000,
    },
    "reflectance below zero": lambda sar, optical: {
        "optical": optical / 10_000 - 0.1,
        "optical_units": "reflectance",
    },
    "raw": lambda sar, optical: {
        "sar": sar * 100,
        "sar_units": "raw",
        "optical": optical / 1e4,
        "optical_units": "raw",
    },
}


@pytest.mark.parametrize("scene", PLAUSIBLE)
def test_plausible_values_do_not_warn(sar, optical, scene):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusMAEImageProcessor()(**PLAUSIBLE[scene](sar, optical), return_pixel_mask=True)


def test_values_are_looked_at_in_every_batch_on_the_cpu(sar, optical):
    processor = FusMAEImageProcessor()
    for _ in range(10):
        processor(sar=sar, optical=optical)
    with pytest.warns(UserWarning, match="Are the bands swapped"):
        processor(sar=sar[::-1], optical=optical)
    for _ in range(10):
        with pytest.raises(ValueError, match="looks like digital numbers"):
            processor(optical=optical, optical_units="reflectance")
        with pytest.raises(ValueError, match="looks like dB"):
            processor(sar=sar, sar_units="linear")


def test_another_mistake_and_another_declaration_warn_again(sar, optical):
    processor = FusMAEImageProcessor()
    with pytest.warns(UserWarning, match="Are the bands swapped"):
        processor(sar=sar[::-1])
    with pytest.warns(UserWarning, match="looks like linear power"):
        processor(sar=10 ** (sar / 10))
    for other in (
        {"sar": sar[::-1].astype("float64")},
        {"sar": sar, "sar_bands": ["VH", "VV"]},
        {"sar": 10 ** (sar[::-1] / 10), "sar_units": "linear"},
    ):
        with pytest.warns(UserWarning, match="Are the bands swapped"):
            processor(**other)
    with pytest.warns(UserWarning, match="optical_offset=1000"):
        processor(optical=optical + 1000)
    with pytest.warns(UserWarning, match="optical_offset=1000"):
        processor(optical=optical + 1000, optical_offset=1)


def test_declarations_that_take_turns_do_not_warn_at_every_turn(sar):
    processor = FusMAEImageProcessor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            processor(sar=sar[::-1])
            processor(sar=sar[::-1].astype("float64"))
    assert len(caught) == 2


class OnAccelerator(torch.Tensor):
    """A tensor that says it lies on an accelerator."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


def test_an_accelerator_is_stalled_by_the_first_batches_of_a_declaration_alone(sar):
    pixels, valid = torch.from_numpy(sar)[None], torch.ones(1, 16, 16, dtype=torch.bool)
    plausibility = Plausibility()
    for dtype in (torch.float32, torch.float64):
        declared = Declaration("sar", "db", SAR_BANDS, SAR_BANDS, 0.0, dtype)
        for _ in range(ACCELERATOR_LOOKS - 1):
            assert not plausibility.look(pixels.as_subclass(OnAccelerator), valid, declared)
        assert plausibility.look(pixels.flip(1).as_subclass(OnAccelerator), valid, declared)
        assert not plausibility.look((10 ** (pixels / 10)).as_subclass(OnAccelerator), valid, declared)
        assert plausibility.look(10 ** (pixels / 10), valid, declared)


def test_a_single_mark_in_a_large_batch_is_found(sar):
    batch = np.tile(sar, (8, 1, 8, 8))
    batch[5, 1, 77, 101] = -9999
    with pytest.warns(UserWarning, match="sar_nodata=-9999"):
        FusMAEImageProcessor()(sar=batch)


def test_the_advice_on_marks_and_on_normalised_arrays_helps(sar, optical, tmp_path):
    FusMAEImageProcessor().save_pretrained(tmp_path)
    marked = sar.copy()
    marked[:, :12] = -9999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = FusMAEImageProcessor.from_pretrained(tmp_path, sar_nodata=-9999)(sar=marked)
        ready = FusMAEImageProcessor()(sar=sar, optical=optical)
        processor = FusMAEImageProcessor.from_pretrained(tmp_path, do_normalize=False)
        again = processor(sar=ready["pixel_values_sar"], optical=ready["pixel_values"])
    assert inputs["pixel_mask_sar"].sum() == 4 * 16
    for name in ready:
        assert torch.equal(again[name], ready[name])


def test_a_processor_that_has_looked_is_saved_without_what_it_saw(sar, tmp_path):
    processor = FusMAEImageProcessor()
    before = processor.to_dict()
    with pytest.warns(UserWarning, match="swapped"):
        processor(sar=sar[::-1])
    assert processor.to_dict() == before


# --- calls that cannot be meant -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda p, s, o: p(s, o), lambda p, s, o: p(o), lambda p, s, o: p(images=o)])
def test_sensors_that_are_not_named_are_refused(sar, optical, call):
    with pytest.raises(TypeError, match=r"Name the sensors: processor\(sar=\.\.\., optical=\.\.\.\).*pipelines"):
        call(FusMAEImageProcessor(), sar, optical)


def test_an_option_of_the_processor_in_a_call_is_refused_with_the_place_where_it_belongs(sar):
    with pytest.raises(TypeError, match=r"from_pretrained\(<your checkpoint>, do_pad=True, size_divisor=8\)"):
        FusMAEImageProcessor()(sar=sar, do_pad=True, size_divisor=8)
    with pytest.raises(TypeError, match=r"takes \['sar', 'optical', .*'return_tensors'\], but not \['radar'\]\.$"):
        FusMAEImageProcessor()(radar=sar)


def test_the_advice_on_sizes_keeps_the_statistics_of_the_checkpoint(sar, optical, tmp_path):
    processor = FusMAEImageProcessor(sar_mean=[-11.0, -18.0], sar_std=[4.0, 4.0])
    processor.save_pretrained(tmp_path)
    model = FusMAEModel(FusMAEConfig.from_preset("tiny", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"FusMAEImageProcessor\.from_pretrained\(<your checkpoint>, ") as refusal:
        model(**processor(sar=sar[:, :15], optical=optical[:, :15]))
    divisor = model.config.patch_size
    assert f"do_pad=True, size_divisor={divisor})" in str(refusal.value)
    padding = FusMAEImageProcessor.from_pretrained(tmp_path, do_pad=True, size_divisor=divisor)
    assert padding.sar_mean == processor.sar_mean
    assert model(**padding(sar=sar[:, :15], optical=optical[:, :15])).pooler_output.isfinite().all()


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        (["B8A"], ["B8AA"], "'B8AA': did you mean 'B8A'?"),
        (["B01", "B02"], ["B10", "B02"], None),
        (["B12"], ["B1"], None),
        (["B02"], ["nir"], None),
    ],
)
def test_a_misspelt_band_is_recognised(wanted, given, message):
    with pytest.raises(ValueError, match="are needed but were not given") as refusal:
        FusMAEImageProcessor(optical_bands=wanted)(optical=np.ones((len(given), 8, 8)), optical_bands=given)
    assert message in str(refusal.value) if message else "did you mean" not in str(refusal.value)


@pytest.mark.parametrize(("given", "meant"), [("B2", "B02"), ("b02", "B02"), ("B8a", "B8A"), ("b11", "B11")])
def test_sentinels_bands_are_known_however_they_are_spelt(given, meant):
    statistics = {"optical_mean": {given: 1.0}, "optical_std": {given: 2.0}}
    processor = FusMAEImageProcessor(sar_bands=["vv", "Vh"], optical_bands=[given], **statistics)
    assert (processor.sar_bands, processor.optical_bands) == (["VV", "VH"], [meant])
    assert processor.optical_std == {meant: 2.0}
    optical = np.full((1, 8, 8), 500, "uint16")
    named = FusMAEImageProcessor(optical_bands=[meant])(optical=optical, optical_bands=[given])
    assert torch.equal(
        named["pixel_values"], FusMAEImageProcessor(optical_bands=[meant])(optical=optical)["pixel_values"]
    )


def test_names_of_raw_bands_are_free():
    raw = {"optical_units": "raw", "optical_mean": [1.0], "optical_std": [1.0]}
    assert FusMAEImageProcessor(optical_bands=["b2"], **raw).optical_bands == ["b2"]


@pytest.mark.parametrize("argument", ["sar_nodat", "optical_offsets", "anything"])
def test_an_unknown_argument_is_refused(tmp_path, argument):
    near = {"sar_nodat": "did you mean 'sar_nodata'", "optical_offsets": "did you mean 'optical_offset'"}.get(
        argument, ""
    )
    with pytest.raises(TypeError, match=near or argument):
        FusMAEImageProcessor(**{argument: 1})
    with pytest.raises(TypeError, match=near or argument):
        FusMAEImageProcessor()(optical=np.ones((12, 8, 8)), **{argument: 1})
    if near:
        FusMAEImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(TypeError, match=near):
            FusMAEImageProcessor.from_pretrained(tmp_path, **{argument: 1})


def test_foreign_keys_of_a_configuration_are_kept():
    processor = FusMAEImageProcessor.from_dict(FusMAEImageProcessor().to_dict() | {"of_somebody": 7})
    assert processor.of_somebody == 7
    assert processor.to_dict()["of_somebody"] == 7


@pytest.mark.parametrize("offset", [-1000, -0.1, 0.1, -1])
def test_an_offset_of_the_wrong_sign_or_scale_is_refused(optical, offset):
    with pytest.raises(ValueError, match="what was added"):
        FusMAEImageProcessor(optical_offset=offset)
    with pytest.raises(ValueError, match="what was added"):
        FusMAEImageProcessor()(optical=optical, optical_offset=offset)
    raw = FusMAEImageProcessor(optical_units="raw", optical_offset=offset)
    assert raw.optical_offset == offset


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int32"])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_masked_array_keeps_its_mask(optical, dtype, as_list):
    masked = np.ma.masked_array(optical.astype(dtype), mask=False)
    masked[3, :5] = np.ma.masked  # in one band alone
    masked.data[3, :5] = 30_000
    inputs = FusMAEImageProcessor()(optical=[masked] if as_list else masked)
    assert inputs["pixel_mask"][0].sum() == 11 * 16
    assert (inputs["pixel_values"][0, :, :5] == 0).all()


def test_an_array_that_must_not_be_written_to_is_read_without_a_word(optical):
    expected = FusMAEImageProcessor()(optical=optical)["pixel_values"]
    optical.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(FusMAEImageProcessor()(optical=optical)["pixel_values"], expected)


@pytest.mark.parametrize("size", [8, 24, 33])
def test_pixels_without_data_have_no_weight_when_others_are_resized(size):
    optical = np.full((12, 16, 16), 3000, "uint16")
    optical[:, 4:9, 3:7] = 0
    inputs = FusMAEImageProcessor(do_resize=True, size={"height": size, "width": size})(optical=optical)
    valid = inputs["pixel_mask"][0]
    assert 0 < (~valid).sum() < size * size
    expected = FusMAEImageProcessor()(optical=optical[:, :4])["pixel_values"][0, :, 0, 0]
    found = inputs["pixel_values"][0][:, valid]
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-4, atol=1e-4)


def test_a_call_leaves_no_trace_in_the_processor(sar):
    processor = FusMAEImageProcessor()
    before = pickle.dumps(processor)
    with pytest.warns(UserWarning, match="Are the bands swapped"):
        processor(sar=sar[::-1])
    assert pickle.dumps(processor) == before


# --- padding -------------------------------------------------------------------------------------------------------


def test_padding_is_marked_and_the_model_ignores_it(sar, optical):
    sar, optical = sar[:, :13, :10], optical[:, :13, :10]
    inputs = FusMAEImageProcessor(do_pad=True, size_divisor=8)(sar=sar, optical=optical)
    assert inputs["pixel_values"].shape == (1, 12, 16, 16)
    for suffix in ("", "_sar"):
        assert inputs[f"pixel_mask{suffix}"][0, :13, :10].all()
        assert inputs[f"pixel_mask{suffix}"].sum() == 13 * 10
        assert (inputs[f"pixel_values{suffix}"][0, :, 13:] == 0).all()
    wider = FusMAEImageProcessor(do_pad=True, size_divisor=32)(sar=sar, optical=optical)
    model = FusMAEModel(FusMAEConfig.from_preset("tiny", num_hidden_layers=1)).eval()
    with torch.no_grad():
        pooled = [model(**values).pooler_output for values in (inputs, wider)]
    torch.testing.assert_close(pooled[0], pooled[1], rtol=1e-4, atol=1e-5)


def test_patches_of_different_sizes_are_padded_to_the_largest(sar, optical):
    small = FusMAEImageProcessor(do_pad=True, size_divisor=4)(
        sar=[sar[:, :9], None, sar[:, :8, :5]], optical=[optical[:, :9], optical[:, :8], optical[:, :8, :5]]
    )
    assert small["pixel_values_sar"].shape == (3, 2, 12, 16)
    assert small["pixel_mask"].flatten(1).sum(dim=1).tolist() == [9 * 16, 8 * 16, 8 * 5]
    assert small["pixel_mask_sar"].flatten(1).sum(dim=1).tolist() == [9 * 16, 0, 8 * 5]


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"do_pad": True}, {}, "needs `size_divisor`"),
        ({"do_pad": True, "size_divisor": 8}, {"return_pixel_mask": False}, "cannot go with it"),
        ({"do_pad": True, "size_divisor": 8}, {"sar": np.full((2, 9, 16), -9.0)}, "same places on the same grid"),
    ],
)
def test_padding_that_could_not_be_told_from_data_is_refused(sar, optical, options, call, message):
    with pytest.raises(ValueError, match=message):
        FusMAEImageProcessor(**options)(**{"sar": sar, "optical": optical} | call)


# --- results of the models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1000])
def test_a_reconstruction_comes_back_in_physical_units(sar, optical, offset):
    optical = optical.astype("float32") + offset
    processor = FusMAEImageProcessor(optical_offset=offset, do_pad=True, size_divisor=8)
    inputs = processor(sar=sar[:, :13], optical=optical[:, :13])
    outputs = FusMAEForPreTraining(FusMAEConfig.from_preset("tiny", num_hidden_layers=1)).reconstruct(**inputs)
    images = processor.post_process_reconstruction(outputs, size=(13, 16))
    np.testing.assert_allclose(images["optical"][0], optical[:, :13] - offset, atol=0.01)
    np.testing.assert_allclose(images["sar"][0], sar[:, :13], atol=1e-4)
    images = processor.post_process_reconstruction(
        outputs, optical_offset=offset, optical_units="reflectance", sar_units="linear", size=(13, 16)
    )
    np.testing.assert_allclose(images["optical"][0], optical[:, :13] / 10_000, atol=1e-5)
    np.testing.assert_allclose(images["sar"][0], 10 ** (sar[:, :13] / 10), rtol=1e-3)


def test_raw_values_are_not_made_physical():
    processor = FusMAEImageProcessor(sar_units="raw")
    with pytest.raises(ValueError, match="cannot be made 'linear'"):
        processor.post_process_reconstruction(None, sar_units="linear")


def test_label_maps_come_at_the_size_that_is_asked_for():
    outputs = FusMAEHeadOutput(logits=torch.randn(2, 3, 4, 4))
    processor = FusMAEImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(maps), outputs.logits.argmax(dim=1))
    sizes = [(16, 16), (9, 7)]
    assert [tuple(m.shape) for m in processor.post_process_semantic_segmentation(outputs, sizes)] == sizes
    with pytest.raises(ValueError, match="1 sizes for 2 samples"):
        processor.post_process_semantic_segmentation(outputs, sizes[:1])
