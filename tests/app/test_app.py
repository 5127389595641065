"""What the demo computes, without a browser."""

import runpy
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.app import page as app
from fusmae_hf.app.pairs import read_upload, shard_samples, simulated_samples
from fusmae_hf.app.pictures import complete, draw, summary
from fusmae_hf.cli.main import main
from fusmae_hf.data.pairs import Pair
from fusmae_hf.hub.checkpoint_loading import load_checkpoint
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from tests.small_shards import SIZE, write_shards

ROOT = Path(__file__).resolve().parents[2]
SIDE = 48
PAIRS = SimulatedPairs(1, options=SimulationOptions(image_size=SIDE))
PAIR, INFO = PAIRS.read(0), PAIRS.info
BANDS = {"sar_bands": "VV, VH", "optical_bands": ", ".join(INFO.optical_bands)}
DESCRIPTION = BANDS | {"sar_units": "db", "optical_units": "dn", "offset": "0"}


def save_checkpoint(folder, **fields):
    torch.manual_seed(0)
    config = FusMAEConfig.from_preset(
        "tiny", num_hidden_layers=1, decoder_num_hidden_layers=1, image_size=SIDE, **fields
    )
    FusMAEForPreTraining(config).save_pretrained(folder)
    FusMAEImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(checkpoint, decoders=True, attn_implementation="eager")


@pytest.fixture
def files(tmp_path):
    for name in ("sar", "optical"):
        np.save(tmp_path / f"{name}.npy", getattr(PAIR, name))
    return {"sar": str(tmp_path / "sar.npy"), "optical": str(tmp_path / "optical.npy")}


def write_geotiff(path, image, **profile):
    rasterio = pytest.importorskip("rasterio")
    count, height, width = image.shape
    profile = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)} | profile
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=image.dtype, **profile
    ) as file:
        file.write(image)
    return str(path)


# --- what a model makes of a pair ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.95])
def test_the_ratio_says_how_many_patches_are_hidden(loaded, ratio):
    completion = complete(*loaded, PAIR, INFO, ratio)
    number = int(36 * ratio) / 36
    for sensor, images in completion.pictures.items():
        assert completion.hidden[sensor] == pytest.approx(number)
        assert (~images["visible"]).mean() == pytest.approx(number)
        kept = images["visible"][0]
        assert np.allclose(images["reconstruction"][0][:, kept], images["original"][0][:, kept], atol=1e-2)
    assert np.isnan(completion.rmse["sar"]).all() == (ratio == 0)


@pytest.mark.parametrize(("hide", "other"), [("sar", "optical"), ("optical", "sar")])
def test_a_hidden_sensor_does_not_show_in_its_reconstruction(loaded, hide, other):
    changed = Pair("changed", sar=PAIR.sar, optical=PAIR.optical)
    setattr(changed, hide, np.roll(getattr(PAIR, hide), 1, axis=2))
    one, two = (complete(*loaded, pair, INFO, 0.5, hide) for pair in (PAIR, changed))
    assert one.hidden == {hide: 1, other: 0.5}
    assert np.array_equal(one.pictures[hide]["reconstruction"], two.pictures[hide]["reconstruction"])
    assert one.rmse[hide][0] != two.rmse[hide][0]


def test_errors_are_those_of_the_hidden_pixels(loaded):
    completion = complete(*loaded, PAIR, INFO, 0.75)
    for sensor, images in completion.pictures.items():
        hidden = np.broadcast_to(~images["visible"], images["original"][0].shape)
        difference = (images["reconstruction"] - images["original"])[0][hidden]
        assert completion.rmse[sensor][0] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-5)
    assert completion.rmse["optical"][1] < 2_000  # interpolation, in digital numbers
    assert completion.rmse["sar"][1] < 20  # in dB


def test_the_same_seed_hides_the_same_patches(loaded):
    one, same, other = (complete(*loaded, PAIR, INFO, 0.75, seed=seed) for seed in (3, 3, 4))
    for sensor in ("optical", "sar"):
        assert np.array_equal(one.pictures[sensor]["reconstruction"], same.pictures[sensor]["reconstruction"])
        assert not np.array_equal(one.pictures[sensor]["visible"], other.pictures[sensor]["visible"])


def test_pixels_without_data_are_filled_in_but_not_compared(loaded):
    pair = Pair("cut", sar=PAIR.sar.copy(), optical=PAIR.optical.copy())
    pair.sar[:, :12], pair.optical[:, :, :12] = np.nan, 0
    completion = complete(*loaded, pair, INFO, 0.75)
    assert completion.pictures["sar"]["visible"][0, :12].all()
    assert all(np.isfinite(images["reconstruction"]).all() for images in completion.pictures.values())
    assert np.isfinite(list(completion.rmse.values())).all()
    text = summary(completion, loaded[1], INFO)
    assert "25% of the SAR pixels hold no data" in text
    assert "25% of the optical pixels hold no data" in text
    assert len(draw(completion, loaded[1], pair, INFO)) == 3


def test_attention_is_that_of_the_decoders_over_what_is_visible(loaded):
    model, _ = loaded
    completion = complete(*loaded, PAIR, INFO, 0.75, patch=(1, 2))
    for sensor, weights in completion.attention.items():
        visible = completion.pictures[sensor]["visible"][0, ::8, ::8]
        assert np.array_equal(np.isfinite(weights), visible)
        assert np.nansum(weights) == pytest.approx(1, abs=1e-4)
    other = complete(*loaded, PAIR, INFO, 0.75, patch=(5, 5)).attention
    assert not np.allclose(completion.attention["sar"], other["sar"], equal_nan=True)
    assert not any(decoder.fusion_attention._forward_hooks for decoder in (model.optical_decoder, model.sar_decoder))


def test_nobody_looks_at_a_hidden_sensor(loaded):
    completion = complete(*loaded, PAIR, INFO, 0.5, hide="sar")
    assert completion.attention.keys() == {"optical"}
    assert draw(completion, loaded[1], PAIR, INFO)[2] is not None


def test_a_model_whose_decoders_do_not_look_across_has_no_attention_to_draw(tmp_path):
    model, processor = load_checkpoint(
        save_checkpoint(tmp_path, feature_fusion="none", norm_pix_loss=True),
        decoders=True,
        attn_implementation="eager",
    )
    completion = complete(model, processor, PAIR, INFO, 0.75)
    assert draw(completion, processor, PAIR, INFO)[2] is None
    text = summary(completion, processor, INFO)
    assert "There are no attention maps" in text
    assert "without brightness" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, "mask ratio 1.0"),
        ({"patch": (6, 0)}, "patch row 6, column 0. Expected: a row from 0 to 5"),
        ({"patch": (0, -1)}, "patch row 0, column -1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(loaded, fields, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        complete(*loaded, PAIR, INFO, **{"mask_ratio": 0.5} | fields)


def test_large_images_are_refused(loaded):
    pair = SimulatedPairs(1, options=SimulationOptions(image_size=264)).read(0)
    with pytest.raises(ValueError, match="at most 256 px a side"):
        complete(*loaded, pair, INFO, 0.5)


def test_images_that_patches_do_not_fill_are_padded_and_cut_again(loaded):
    pair = SimulatedPairs(1, options=SimulationOptions(image_size=44)).read(0)
    completion = complete(*loaded, pair, INFO, 0.5)
    for images in completion.pictures.values():
        assert {values.shape[-2:] for values in images.values()} == {(44, 44)}
    assert not [note for note in completion.notes if "hold no data" in note]
    assert draw(completion, loaded[1], pair, INFO)[2] is not None


def test_what_the_processor_doubts_is_said_every_time(loaded):
    linear = Pair("linear", sar=10 ** (PAIR.sar / 10), optical=PAIR.optical)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert "looks like linear power" in summary(complete(*loaded, linear, INFO, 0.5), loaded[1], INFO)


def test_the_summary_tells_errors_from_nothing_to_compare(loaded):
    text = summary(complete(*loaded, PAIR, INFO, 0.0, hide="sar"), loaded[1], INFO)
    assert "| **optical** | 0% | nothing to compare | nothing to compare |" in text
    assert "| **SAR** | 100% |" in text
    assert " dB |" in text
    assert "made-up scenes" in text


# --- where pairs come from -------------------------------------------------------------------------------------------


def test_simulated_samples_are_named_by_what_they_show():
    samples = simulated_samples(SIDE)
    assert len(set(samples.names)) == len(samples.names) == 12
    assert samples.names[1].startswith("2: ")
    assert samples.read(1).optical.shape == (12, SIDE, SIDE)


def test_samples_of_shards_are_spread_over_the_split(tmp_path):
    samples = shard_samples(write_shards(tmp_path / "shards"), "test")
    assert samples.names == [f"test {row}" for row in range(4)]
    assert samples.read(3).id == "pair-015"
    assert samples.read(3).sar.shape == (2, SIZE, SIZE)


def test_an_upload_is_what_its_user_says(files):
    description = DESCRIPTION | {"sar_bands": " VH ,VV", "offset": "1000"}
    pair, info = read_upload(**files, **description)
    assert np.array_equal(pair.sar, PAIR.sar)
    assert np.array_equal(pair.optical, PAIR.optical)
    assert (info.sar_bands, info.optical_offset, info.simulated) == (("VH", "VV"), 1000, False)


def test_masked_pixels_of_geotiffs_hold_no_data(tmp_path, loaded):
    sar, optical = PAIR.sar.copy(), PAIR.optical.copy()
    sar[:, 0, 0], optical[:, 1, 1] = -9999, 65535
    paths = {
        "sar": write_geotiff(tmp_path / "sar.tif", sar, nodata=-9999),
        "optical": write_geotiff(tmp_path / "optical.tiff", optical, nodata=65535),
    }
    pair, info = read_upload(**paths, **DESCRIPTION)
    assert np.isnan(pair.sar[:, 0, 0]).all()
    assert (pair.optical[:, 1, 1] == 0).all()
    assert "hold no data" in summary(complete(*loaded, pair, info, 0.5), loaded[1], info)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sar": None}, "Given: optical file"),
        ({"sar": None, "optical": None}, "Given: no file"),
        ({"offset": None}, "Given: no offset"),
        ({"offset": "  "}, "Given: no offset"),
        ({"offset": "1,000"}, "offset '1,000'"),
        ({"offset": "nan"}, "must be a finite number"),
        ({"sar_bands": ""}, "0 names"),
        ({"sar_bands": "VV, VH, ratio"}, "3 names"),
        ({"optical_bands": "B02, B03"}, "2 names .* has 12 bands"),
    ],
)
def test_a_wrong_description_of_an_upload_is_refused(files, given, message):
    with pytest.raises(ValueError, match=message):
        read_upload(**files | DESCRIPTION | given)


@pytest.mark.parametrize(
    ("bands", "message"), [("VV, HH", r"bands \['VH'\] are needed"), ("VV, VV", "band names must be unique")]
)
def test_bands_that_the_model_needs_are_asked_for_by_name(files, loaded, bands, message):
    pair, info = read_upload(**files, **DESCRIPTION | {"sar_bands": bands})
    with pytest.raises(ValueError, match=message):
        complete(*loaded, pair, info, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 257, 8), np.float32), "at most 256 px a side"),
        (np.zeros((48, 48), np.float32), "of shape"),
        (np.zeros((2, 48, 0), np.float32), "of shape"),
        (np.zeros((2, 48, 48), np.complex64), "Expected: real numbers"),
        (np.full((2, 48, 48), None), "no sound .npy file"),
        (b"no numbers at all", "no sound .npy file"),
        (b"", "no sound .npy file"),
    ],
)
def test_an_array_that_is_no_image_is_refused(files, content, message):
    path = Path(files["sar"])
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        read_upload(**files, **DESCRIPTION)


def test_an_archive_called_npy_is_refused(files):
    with open(files["sar"], "wb") as file:
        np.savez(file, PAIR.sar)
    with pytest.raises(ValueError, match=r"no sound \.npy file"):
        read_upload(**files, **DESCRIPTION)


@pytest.mark.parametrize("dtype", [">f4", np.float64, np.float16, np.longdouble, ">i2", np.uint32])
def test_any_real_numbers_will_do(files, loaded, dtype):
    np.save(files["sar"], np.abs(PAIR.sar).astype(dtype) if np.dtype(dtype).kind == "u" else PAIR.sar.astype(dtype))
    pair, info = read_upload(**files, **DESCRIPTION)
    assert np.isfinite(complete(*loaded, pair, info, 0.5).rmse["sar"]).all()


def test_other_files_are_refused(files, tmp_path):
    (tmp_path / "sar.png").write_bytes(b"")
    (tmp_path / "sar.tif").write_bytes(b"no image")
    for name, message in (("sar.png", "a GeoTIFF .* or .npy file"), ("sar.tif", "no sound GeoTIFF")):
        with pytest.raises(ValueError, match=message):
            read_upload(**files | DESCRIPTION | {"sar": str(tmp_path / name)})


def test_a_large_geotiff_is_refused_before_it_is_read(tmp_path, files):
    path = write_geotiff(tmp_path / "sar.tif", np.zeros((1, 8, 4096), np.uint8), compress="deflate")
    with pytest.raises(ValueError, match="at most 256 px a side"):
        read_upload(**files | DESCRIPTION | {"sar": path, "sar_bands": "VV"})


def test_images_of_different_places_are_refused(tmp_path, files):
    rasterio = pytest.importorskip("rasterio")
    sar = write_geotiff(tmp_path / "sar.tif", PAIR.sar)
    moved = rasterio.Affine(10, 0, 500_010, 0, -10, 5_000_000)
    optical = write_geotiff(tmp_path / "optical.tif", PAIR.optical, transform=moved)
    with pytest.raises(ValueError, match="Resample one file"):
        read_upload(sar=sar, optical=optical, **DESCRIPTION)
    read_upload(sar=sar, optical=files["optical"], **DESCRIPTION)  # an array lies nowhere
    nearly = rasterio.Affine(10, 0, 500_000 + 1e-7, 0, -10, 5_000_000)
    optical = write_geotiff(tmp_path / "optical.tif", PAIR.optical, transform=nearly)
    read_upload(sar=sar, optical=optical, **DESCRIPTION)


def test_images_of_different_sizes_are_refused(files, loaded):
    np.save(files["sar"], PAIR.sar[:, :40])
    pair, info = read_upload(**files, **DESCRIPTION)
    with pytest.raises(ValueError, match="on the same grid"):
        complete(*loaded, pair, info, 0.5)


# --- how it is started -----------------------------------------------------------------------------------------------


def test_the_command_needs_a_checkpoint_that_can_reconstruct(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["app"])
    assert "--checkpoint" in capsys.readouterr().err
    FusMAEConfig.from_preset("tiny", architectures=["FusMAEForImageClassification"]).save_pretrained(tmp_path)
    assert main(["app", "--checkpoint", str(tmp_path)]) == 2
    assert "without decoders" in " ".join(capsys.readouterr().err.split())


def test_a_split_without_shards_is_refused(checkpoint, capsys):
    assert main(["app", "--checkpoint", str(checkpoint), "--split", "test"]) == 2
    assert "--split is for the shards" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(checkpoint, capsys):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--checkpoint", str(checkpoint), "--port", str(port)]) == 2
    assert f"Cannot serve at 127.0.0.1, port {port}: taken" in " ".join(capsys.readouterr().err.split())


def test_the_space_serves_the_checkpoint_that_its_variable_names(monkeypatch):
    fields = yaml.safe_load((ROOT / "app" / "README.md").read_text().split("---")[1])
    assert fields["sdk"] == "gradio"
    script = ROOT / "app" / fields["app_file"]
    monkeypatch.delenv("FUSMAE_CHECKPOINT", raising=False)
    with pytest.raises(SystemExit, match="FUSMAE_CHECKPOINT"):
        runpy.run_path(str(script))
    served = []
    monkeypatch.setattr(app, "serve_app", lambda checkpoint, host, port: served.append((checkpoint, host, port)))
    monkeypatch.setenv("FUSMAE_CHECKPOINT", "somebody/fusmae")
    runpy.run_path(str(script))
    assert served == [("somebody/fusmae", "0.0.0.0", 7860)]
