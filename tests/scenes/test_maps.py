"""Where pixels of a map lie, and what is in them."""

import dataclasses
import json

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from rio_cogeo.cogeo import cog_validate

from fusmae_hf import FusMAEConfig, FusMAEForSemanticSegmentation, FusMAEImageProcessor, map_scenes
from fusmae_hf.errors import PairError
from fusmae_hf.scenes.assembly import checksums_of
from tests.scenes.conftest import NORTH_UP, RAW, UTM, ground, read, write

ALIKE = dataclasses.replace(RAW, what=("values",))


def sar_alone(**fields):
    return dataclasses.replace(RAW, **{"what": ("values",), "sar_bands": ("A", "B"), "optical_bands": ()} | fields)


def echo(make_model, **fields):
    """Gives back what it sees of SAR, the map coordinates."""
    return make_model(lambda inputs: inputs["pixel_values_sar"], **{"sar": ("A", "B"), "optical": ("C",)} | fields)


@pytest.mark.parametrize(
    ("transform", "crs"),
    [
        (NORTH_UP, UTM),
        (NORTH_UP @ Affine.translation(3, 5), UTM),
        (NORTH_UP @ Affine.translation(0.4, 0.7), UTM),
        (NORTH_UP @ Affine.scale(1, -1), UTM),
        (NORTH_UP @ Affine.rotation(30), UTM),
        (Affine(0.0001, 0, 8.5, 0, -0.0001, 47.5), "EPSG:4326"),
    ],
    ids=["north-up", "shifted", "between pixels", "south-up", "rotated", "geographic"],
)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 5), (37, 53)])
def test_every_pixel_shows_the_ground_it_lies_on(make_model, tmp_path, transform, crs, shape):
    wanted = (ground(shape, transform) - np.reshape(transform @ (0, 0), (2, 1, 1)) + 1).astype(np.float32)
    scene = write(tmp_path / "scene.tif", wanted, transform, crs)
    [result] = map_scenes(echo(make_model), tmp_path / "out", sar=scene, options=sar_alone(), progress=False)
    with rasterio.open(result.files["values"]) as file:
        assert file.transform.almost_equals(transform, 1e-9)
        assert file.crs == crs
        np.testing.assert_allclose(file.read(), wanted, rtol=2e-6)


@pytest.mark.parametrize("side", [1, 15, 16, 17, 23, 24, 25, 60])
@pytest.mark.parametrize("overlap", [0, 4, 8, 12])
def test_whole_scenes_are_covered(make_model, tmp_path, side, overlap):
    wanted = np.random.default_rng(0).normal(size=(2, side, side)).astype(np.float32)
    scene = write(tmp_path / "scene.tif", wanted)
    [result] = map_scenes(
        echo(make_model), tmp_path / "out", sar=scene, options=sar_alone(overlap=overlap), progress=False
    )
    np.testing.assert_allclose(read(result.files["values"]), wanted, atol=1e-5)


@pytest.mark.parametrize("overlap", [-4, 3, 16, 20])
def test_an_overlap_that_leaves_no_step_is_refused(make_model, tmp_path, overlap):
    scene = write(tmp_path / "scene.tif", np.ones((2, 40, 40), np.float32))
    with pytest.raises(ValueError, match="multiple of the patch of 4 px"):
        map_scenes(echo(make_model), tmp_path / "out", sar=scene, options=sar_alone(overlap=overlap), progress=False)
    assert not (tmp_path / "out").exists()


def fields_of_window(inputs):
    """Probabilities that depend on the window: what it shows at its corner."""
    shown = inputs["pixel_values_sar"]
    level = (shown[:, :1, :1, :1] % 7 + 1) / 9
    return torch.cat([level, 1 - level], dim=1).expand(-1, -1, *shown.shape[2:])


def test_classes_are_the_largest_of_the_blended_probabilities(make_model, tmp_path):
    scene = write(tmp_path / "scene.tif", np.random.default_rng(1).uniform(0, 99, (2, 50, 70)).astype(np.float32))
    options = sar_alone(what=("classes", "probabilities", "confidence"))
    model = echo(make_model, kind="classes")
    model.predict = fields_of_window
    [result] = map_scenes(model, tmp_path / "out", sar=scene, options=options, progress=False)
    shares = read(result.files["probabilities"])
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-6)
    assert len(np.unique(shares)) > 100
    np.testing.assert_array_equal(read(result.files["classes"])[0], shares.argmax(axis=0))
    confidence = read(result.files["confidence"])
    np.testing.assert_array_equal(confidence[0], shares.max(axis=0))
    np.testing.assert_allclose(confidence[1], -(shares * np.log(shares)).sum(axis=0), rtol=1e-5)


def test_classes_do_not_come_from_rounded_probabilities(make_model, tmp_path):
    scene = write(tmp_path / "scene.tif", np.ones((2, 20, 20), np.float32))
    model = echo(make_model, kind="classes")
    model.predict = lambda inputs: torch.tensor([0.4999, 0.5001]).view(1, 2, 1, 1).expand(8, 2, 16, 16)
    options = sar_alone(what=("classes", "probabilities"), probability_dtype="uint8")
    [result] = map_scenes(model, tmp_path / "out", sar=scene, options=options, progress=False)
    with rasterio.open(result.files["probabilities"]) as file:
        steps, scale = file.read(), file.scales[0]
        assert (file.dtypes[0], file.nodata) == ("uint8", 255)
    assert {*steps.ravel().tolist()} == {127}
    assert scale * 127 == pytest.approx(0.5)
    assert {*read(result.files["classes"]).ravel().tolist()} == {1}


def test_seams_do_not_show_where_the_model_is_blind_at_its_edges(make_model, tmp_path):
    def blind(inputs):
        seen = torch.zeros_like(inputs["pixel_values_sar"])
        seen[..., 2:-2, 2:-2] = 1
        return seen

    scene = write(tmp_path / "scene.tif", np.ones((2, 80, 80), np.float32))
    model = echo(make_model, window=64)
    model.predict = blind
    [result] = map_scenes(model, tmp_path / "out", sar=scene, options=sar_alone(), progress=False)
    assert read(result.files["values"])[:, 4:-4, 4:-4].min() > 0.98


def test_a_mirrored_scene_gives_the_mirrored_map(make_model, tmp_path):
    values = np.random.default_rng(2).normal(size=(2, 64, 64)).astype(np.float32)
    maps = []
    for name, mirrored in (("one", values), ("other", values[:, ::-1, ::-1])):
        scene = write(tmp_path / f"{name}.tif", mirrored, Affine(10, 0, 0, 0, -10, 0))
        model = echo(make_model)
        model.predict = lambda inputs: inputs["pixel_values_sar"] * inputs["pixel_values_sar"].amax((2, 3), True)
        [result] = map_scenes(model, tmp_path / name, sar=scene, options=sar_alone(), progress=False)
        maps.append(read(result.files["values"]))
    np.testing.assert_array_equal(maps[0][:, 16:-16, 16:-16], maps[1][:, ::-1, ::-1][:, 16:-16, 16:-16])


def thirds(tmp_path):
    """SAR in the first two thirds, optical in the last two but for the right one, which has neither."""
    generator = np.random.default_rng(3)
    sar = generator.normal(size=(1, 60, 180)).astype(np.float32)
    optical = generator.uniform(1, 9, (2, 60, 180)).astype(np.float32)
    sar[..., 120:], optical[..., :60], optical[..., 120:] = np.nan, 0, 0
    return write(tmp_path / "optical.tif", optical), write(tmp_path / "sar.tif", sar)


def test_nothing_is_predicted_where_no_sensor_has_data_and_one_alone_where_there_is_one(make_model, tmp_path):
    optical, sar = thirds(tmp_path)
    calls = []

    def predict(inputs):
        calls.append(tuple(sorted(name for name in inputs if name.startswith("pixel_values"))))
        pixels = next(iter(inputs.values()))
        return pixels.new_full((len(pixels), 2, *pixels.shape[2:]), len(inputs))

    options = dataclasses.replace(ALIKE, overlap=0)
    [result] = map_scenes(make_model(predict), tmp_path / "out", optical=optical, sar=sar, options=options,
                          progress=False)  # fmt: skip
    values = read(result.files["values"])
    assert np.isnan(values[..., 120:]).all()
    assert np.isfinite(values[..., :120]).all()
    assert (values[..., :48] == 2).all()  # images and mask of SAR
    assert (values[..., 64:112] == 4).all()
    assert result.no_data == pytest.approx(1 / 3)
    assert result.windows == 4 * 8
    assert {*calls} == {("pixel_values_sar",), ("pixel_values", "pixel_values_sar")}


def test_a_scene_without_any_data_gives_a_map_without_any(make_model, tmp_path):
    scene = write(tmp_path / "scene.tif", np.full((2, 40, 40), np.nan, np.float32))
    [result] = map_scenes(echo(make_model), tmp_path / "out", sar=scene, options=sar_alone(), progress=False)
    assert (result.windows, result.no_data) == (0, 1)
    assert np.isnan(read(result.files["values"])).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_pixel_that_is_no_number_spoils_itself_alone(make_model, tmp_path, odd):
    values = np.random.default_rng(4).normal(size=(2, 40, 40)).astype(np.float32)
    values[0, 20, 20] = odd
    scene = write(tmp_path / "scene.tif", values)
    [result] = map_scenes(echo(make_model), tmp_path / "out", sar=scene, options=sar_alone(), progress=False)
    found = read(result.files["values"])
    assert np.argwhere(np.isnan(found[0])).tolist() == [[20, 20]]
    values[:, 20, 20] = np.nan
    np.testing.assert_allclose(found, values, atol=1e-6)


@pytest.fixture
def tiny(tmp_path):
    torch.manual_seed(0)
    config = FusMAEConfig.from_preset(
        "tiny", num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32,
        optical_bands=["B04", "B03", "B02"], num_labels=3, id2label={0: "water", 1: "field", 2: "town"},
    )  # fmt: skip
    FusMAEForSemanticSegmentation(config).save_pretrained(tmp_path / "tiny")
    FusMAEImageProcessor(optical_bands=config.optical_bands).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


SENTINEL = dataclasses.replace(
    RAW, optical_units="dn", sar_units="db", optical_bands=("B04", "B03", "B02"), sar_bands=("VV", "VH"),
    optical_offset=0, what=("classes", "probabilities"),
)  # fmt: skip


def pair(tmp_path, shape, seed=0):
    generator = np.random.default_rng(seed)
    optical = generator.integers(300, 3000, (3, *shape)).astype(np.uint16)
    sar = (generator.normal(size=(2, *shape)) * 3 + [[[-10]], [[-17]]]).astype(np.float32)
    files = write(tmp_path / f"optical{seed}.tif", optical), write(tmp_path / f"sar{seed}.tif", sar)
    return (*files, optical, sar)


def test_a_scene_of_one_window_is_one_plain_forward_pass(tiny, tmp_path):
    optical_file, sar_file, optical, sar = pair(tmp_path, (32, 24))
    [result] = map_scenes(tiny, tmp_path / "out", optical=optical_file, sar=sar_file, options=SENTINEL, progress=False)
    model = FusMAEForSemanticSegmentation.from_pretrained(tiny).eval()
    with torch.no_grad():
        logits = model(**FusMAEImageProcessor.from_pretrained(tiny)(sar=sar, optical=optical)).logits[0]
    np.testing.assert_allclose(read(result.files["probabilities"]), logits.softmax(0).numpy(), atol=1e-6)
    assert result.windows == 1


def test_one_pixel_without_data_changes_a_real_model_little_elsewhere(tiny, tmp_path):
    optical_file, _, optical, _ = pair(tmp_path, (70, 70))
    maps = []
    for name in ("whole", "holed"):
        [result] = map_scenes(tiny, tmp_path / name, optical=optical_file, options=SENTINEL, progress=False)
        maps.append(read(result.files["probabilities"]))
        optical[:, 30, 30] = 0
        write(tmp_path / "optical0.tif", optical)
    assert np.argwhere(np.isnan(maps[1][0])).tolist() == [[30, 30]]
    assert np.nanmax(np.abs(maps[0] - maps[1])) < 0.1


def test_files_are_valid_and_say_what_they_are(tiny, tmp_path, with_quicklook):
    optical_file, sar_file, *_ = pair(tmp_path, (600, 90))
    options = dataclasses.replace(SENTINEL, what=("classes", "probabilities", "confidence"), overlap=0)
    [result] = map_scenes(tiny, tmp_path / "out", optical=optical_file, sar=sar_file, options=options, progress=False)
    for product in options.what:
        valid, errors, warned = cog_validate(str(result.files[product]), strict=True)
        assert valid, (errors, warned)
    with rasterio.open(result.files["classes"]) as file:
        assert (file.dtypes[0], file.nodata, file.overviews(1)) == ("uint8", 255, [2])
        assert json.loads(file.tags()["FUSMAE_CLASSES"]) == {"0": "water", "1": "field", "2": "town"}
        assert file.tags()["FUSMAE_WINDOW"] == "32x32"
        assert len({file.colormap(1)[index] for index in range(3)}) == 3
        areas = file.read(1)
        assert [file.checksum(1)] == result.checksums["classes"]
    with rasterio.open(result.files["probabilities"]) as file:
        assert file.descriptions == ("water", "field", "town")
        assert len(set(result.checksums["probabilities"])) == 3
        assert checksums_of(file) == result.checksums["probabilities"]
    for index, area in enumerate(result.areas_km2.values()):
        assert area == pytest.approx((areas == index).sum() * 1e-4, rel=2e-3)
    assert result.files["quicklook"].stat().st_size > 10_000
    assert not (tmp_path / "out" / "parts").exists()


def test_overviews_hold_no_class_that_the_map_does_not(make_model, tmp_path):
    classes = np.random.default_rng(5).choice([1.0, 9.0], (2, 520, 300)).astype(np.float32)
    model = echo(make_model, kind="classes", labels=tuple("abcdefghij"), window=512, patch=8)
    model.predict = lambda inputs: torch.nn.functional.one_hot(
        inputs["pixel_values_sar"][:, 0].long(), 10
    ).permute(0, 3, 1, 2).float()  # fmt: skip
    options = sar_alone(what=("classes", "probabilities"), overlap=0)
    [result] = map_scenes(model, tmp_path / "out", sar=write(tmp_path / "scene.tif", classes), options=options,
                          progress=False)  # fmt: skip
    with rasterio.open(result.files["classes"], overview_level=0) as file:
        assert {*file.read().ravel().tolist()} == {1, 9}
    with rasterio.open(result.files["probabilities"], overview_level=0) as file:
        shares = file.read()
    assert shares.min() >= 0
    np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("number", "dtype", "no_data"), [(2, "uint8", 255), (255, "uint8", 255), (256, "uint16", 65535)]
)
def test_no_data_of_classes_is_no_class(make_model, tmp_path, number, dtype, no_data):
    values = np.ones((2, 20, 20), np.int16)
    values[:, :5] = -9999
    model = echo(make_model, kind="classes", labels=tuple(map(str, range(number))))

    def last(inputs):
        shape = inputs["pixel_values_sar"].shape
        shares = torch.zeros(shape[0], number, *shape[2:])
        shares[:, -1] = 1
        return shares

    model.predict = last
    scene = write(tmp_path / "scene.tif", values, nodata=-9999)
    [result] = map_scenes(model, tmp_path / "out", sar=scene, options=sar_alone(what=("classes",)), progress=False)
    with rasterio.open(result.files["classes"]) as file:
        assert (file.dtypes[0], file.nodata) == (dtype, no_data)
        assert {*file.read(1)[:5].ravel().tolist()} == {no_data}
        assert {*file.read(1)[5:].ravel().tolist()} == {number - 1}


def test_scores_lie_where_the_middle_of_their_window_lies(make_model, tmp_path):
    shape = (70, 50)
    wanted = (ground(shape) - [[[600_000]], [[5_300_000]]]).astype(np.float32)
    model = make_model(
        lambda inputs: inputs["pixel_values_sar"].mean((2, 3)), kind="scores", sar=("A", "B"), optical=("C",)
    )
    scene = write(tmp_path / "scene.tif", wanted)
    [result] = map_scenes(model, tmp_path / "out", sar=scene, options=sar_alone(what=("scores",)), progress=False)
    with rasterio.open(result.files["scores"]) as file:
        assert (file.transform.a, file.transform.e) == (80, -80)
        values = file.read()
        middle = ground(values.shape[1:], file.transform) - [[[600_000]], [[5_300_000]]]
    whole = (np.abs(middle[0] - 250) <= 170) & (np.abs(middle[1] + 350) <= 270)  # the window lies within the scene
    assert whole.sum() >= 20
    np.testing.assert_allclose(values[:, whole], middle[:, whole], atol=0.01)
    assert np.isfinite(values).all()


def test_a_file_of_control_points_alone_is_refused(make_model, tmp_path):
    points = [rasterio.control.GroundControlPoint(row, column, 8 + column / 99, 47 - row / 99)
              for row, column in ((0, 0), (0, 40), (40, 0))]  # fmt: skip
    with rasterio.open(tmp_path / "grd.tif", "w", driver="GTiff", width=40, height=40, count=2, dtype="float32",
                       gcps=points, crs="EPSG:4326") as file:  # fmt: skip
        file.write(np.ones((2, 40, 40), np.float32))
    with pytest.raises(PairError, match=r"3 ground control points.*terrain-correct"):
        map_scenes(echo(make_model), tmp_path / "out", sar=str(tmp_path / "grd.tif"), options=sar_alone())
    assert not (tmp_path / "out").exists()
