"""Scenes as people have them: tiles, masks, other grids, odd names; and what is refused."""

import dataclasses
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from fusmae_hf import map_scenes
from fusmae_hf.cli.main import main
from fusmae_hf.errors import PairError
from fusmae_hf.readers.declarations import Stated
from fusmae_hf.readers.grids import Grid
from fusmae_hf.scenes.plan import MapOptions, make_plan
from fusmae_hf.scenes.sources import SceneFiles, SceneReader
from tests.scenes.conftest import NORTH_UP, RAW, UTM, read, write

SAR = dataclasses.replace(RAW, what=("values",), sar_bands=("S",))
OPTICAL = dataclasses.replace(RAW, what=("values",))


def moved(columns, rows):
    return NORTH_UP @ Affine.translation(columns, rows)


def noise(shape=(1, 60, 70), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def sar_map(make_model, tmp_path):
    """Values of a map that shows SAR as it is."""

    def run(*files, name="out", **changed):
        model = make_model(lambda inputs: inputs["pixel_values_sar"], labels=("S",))
        options = dataclasses.replace(SAR, **changed)
        [result] = map_scenes(model, tmp_path / name, sar=files, options=options, progress=False)
        return read(result.files["values"])

    return run


def test_touching_tiles_show_no_line(sar_map, tmp_path):
    whole = noise()
    tiles = [
        write(tmp_path / f"{name}.tif", whole[:, rows, columns], moved(columns.start, rows.start))
        for name, rows, columns in (
            ("a", slice(0, 35), slice(0, 40)), ("b", slice(0, 35), slice(40, 70)), ("c", slice(35, 60), slice(0, 40)),
        )
    ]  # fmt: skip
    found = sar_map(*tiles)
    wanted = whole.copy()
    wanted[:, 35:, 40:] = np.nan
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_first_of_two_overlapping_tiles_counts_where_it_has_data(sar_map, tmp_path):
    first, second = np.full((1, 30, 30), 1, np.float32), np.full((1, 30, 30), 2, np.float32)
    first[:, 25, 25] = np.nan
    files = write(tmp_path / "a.tif", first), write(tmp_path / "b.tif", second, NORTH_UP @ Affine.translation(20, 20))
    found = sar_map(*files)[0]
    np.testing.assert_allclose([found[25, 24], found[25, 25], found[40, 40]], [1, 2, 2], rtol=1e-6)
    assert sar_map(*files[::-1], name="other")[0][25, 24] == pytest.approx(2)


def test_tiles_between_pixels_are_refused(sar_map, tmp_path):
    files = [write(tmp_path / f"{shift}.tif", noise(), NORTH_UP @ Affine.translation(shift, 0)) for shift in (0, 70.5)]
    with pytest.raises(PairError, match="does not lie on the pixel grid"):
        sar_map(*files)


def test_one_file_a_band_and_coarser_bands_on_the_finest(make_model, tmp_path):
    fine, coarse = noise((1, 40, 40)) + 9, noise((1, 20, 20), 1) + 9
    write(tmp_path / "T_A.tif", fine)
    write(tmp_path / "T_B.tif", coarse, NORTH_UP @ Affine.scale(2))
    [result] = map_scenes(make_model(), tmp_path / "out", optical=tmp_path / "T_{band}.tif", options=OPTICAL,
                          progress=False)  # fmt: skip
    found = read(result.files["values"])
    np.testing.assert_allclose(found[0], fine[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], coarse[0].repeat(2, 0).repeat(2, 1), rtol=1e-5)


def test_bands_go_by_name_and_a_contradiction_is_refused(make_model, tmp_path):
    values = np.random.default_rng(1).integers(500, 900, (2, 30, 30)).astype(np.uint16)
    maps = []
    for name, order in (("plain", [0, 1]), ("permuted", [1, 0])):
        path = tmp_path / f"{name}.tif"
        write(path, values[order])
        with rasterio.open(path, "r+") as file:
            file.descriptions = [("B02", "B03")[index] for index in order]
        options = MapOptions(optical_units="dn", optical_offset=0)
        model = make_model(optical=("B02", "B03"))
        model.processor.optical_units = "dn"
        [result] = map_scenes(model, tmp_path / name, optical=path, options=options, progress=False)
        maps.append(read(result.files["values"]))
    np.testing.assert_array_equal(*maps)
    with pytest.raises(PairError, match="described as 'B03'"):
        map_scenes(model, tmp_path / "wrong", optical=tmp_path / "permuted.tif",
                   options=dataclasses.replace(options, optical_bands=("B02", "B03")))  # fmt: skip


def test_an_offset_that_is_stated_is_subtracted(make_model, tmp_path):
    values = np.random.default_rng(1).integers(1500, 2900, (2, 30, 30)).astype(np.uint16)
    file = write(tmp_path / "scene.tif", values)
    options = MapOptions(optical_bands=("B02", "B03"), optical_units="dn", optical_offset=1000)
    model = make_model(optical=("B02", "B03"))
    [result] = map_scenes(model, tmp_path / "out", optical=file, options=options, progress=False)
    np.testing.assert_allclose(read(result.files["values"]), values - 1000.0, rtol=1e-5)


@pytest.mark.parametrize("way", ["tag", "NaN", "mask", "stated"])
def test_no_data_is_no_data_however_it_is_declared(sar_map, tmp_path, way):
    values, missing = noise(), np.zeros((60, 70), bool)
    missing[10:20, 10:30] = missing[59, 69] = True
    wanted = np.where(missing, np.nan, values)
    values[:, missing] = np.nan if way == "NaN" else -77
    path = tmp_path / "scene.tif"
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write(path, values, **({"nodata": -77} if way == "tag" else {}))
        if way == "mask":
            with rasterio.open(path, "r+") as file:
                file.write_mask(~missing)
    found = sar_map(path, **({"sar_no_data": -77} if way == "stated" else {}))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("tagged", ["Point", "Area"])
def test_the_transform_is_what_gdal_says(sar_map, tmp_path, tagged):
    values = np.zeros((1, 20, 20), np.float32)
    values[0, 5, 7] = 1
    path = tmp_path / "scene.tif"
    write(path, values)
    with rasterio.open(path, "r+") as file:
        file.update_tags(AREA_OR_POINT=tagged)
    found = sar_map(path)
    with rasterio.open(path) as file, rasterio.open(tmp_path / "out" / "values.tif") as result:
        assert result.transform == file.transform
    assert np.argwhere(found[0] > 0.5).tolist() == [[5, 7]]


@pytest.mark.parametrize("name", ["a b.tif", "Fluß 50%.tif", "a#1.TIFF", "scene"])
def test_names_are_handed_on_as_they_are(sar_map, tmp_path, name):
    values = noise()
    file = write(tmp_path / name, values)
    np.testing.assert_allclose(sar_map(file), values, atol=1e-6)


@pytest.mark.parametrize("form", ["/vsizip/{}/a.tif", "zip://{}!a.tif"])
def test_scenes_in_archives(sar_map, tmp_path, form):
    values = noise()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(write(tmp_path / "a.tif", values), "a.tif")
    np.testing.assert_allclose(sar_map(form.format(tmp_path / "x.zip")), values, atol=1e-6)


@pytest.mark.parametrize("url", ["s3://bucket/a.tif", "/vsicurl/https://host/a.tif"])
def test_urls_reach_rasterio_unchanged(monkeypatch, url):
    seen = []

    def opening(path, **_):
        seen.append(path)
        raise rasterio.errors.RasterioIOError("no network in tests")

    monkeypatch.setattr(rasterio, "open", opening)
    with pytest.raises(PairError, match="no network"):
        SceneReader({"sar": SceneFiles((url,), Stated("sar", ["S"], units="raw"))}, None).read(0, 0, 1, 1)
    assert seen == [url]


UTM33 = "EPSG:32633"


def in_utm33(values, tmp_path, name="sar.tif"):
    """A scene about the ground of the optical one, on the grid of the neighbouring zone."""
    x, y = rasterio.warp.transform(UTM, UTM33, [600_000], [5_300_000])
    return write(tmp_path / name, values, Affine(10, 0, x[0] - 600, 0, -10, y[0] + 600), UTM33)


@pytest.fixture
def two_zones(tmp_path):
    optical = write(tmp_path / "optical.tif", np.full((2, 300, 310), 5, np.float32))
    return optical, in_utm33(noise((1, 420, 430)), tmp_path)


def test_resampled_scenes_do_not_show_how_they_were_read(make_model, two_zones):
    plan = make_plan(make_model(), two_zones[:1], two_zones[1:], dataclasses.replace(OPTICAL, target="optical"))
    whole = plan.reader.read(0, 0, 300, 310)["sar"]
    for side in (37, 64, 256):
        for row in range(0, 300, side):
            for column in range(0, 310, side):
                height, width = min(side, 300 - row), min(side, 310 - column)
                part = plan.reader.read(row, column, height, width)["sar"]
                np.testing.assert_array_equal(part, whole[:, row : row + height, column : column + width])
    assert np.isfinite(whole).mean() > 0.95


def test_squares_that_are_resampled_meet_without_a_seam(make_model, tmp_path):
    """A plane over the map coordinates of the other zone is the same plane where squares of 256 px meet."""
    columns, rows = np.meshgrid(np.arange(700.0), np.arange(700.0))
    sar = in_utm33((columns + 2 * rows)[None].astype(np.float32), tmp_path)
    optical = write(tmp_path / "optical.tif", np.full((2, 560, 560), 5, np.float32))
    plan = make_plan(make_model(), [optical], [sar], dataclasses.replace(OPTICAL, target="optical"))
    found = plan.reader.read(0, 0, 560, 560)["sar"][0]
    with rasterio.open(sar) as file:
        grid = Grid(file.crs, tuple(file.transform)[:6], file.height, file.width)
    across, down = np.meshgrid(np.arange(560) + 0.5, np.arange(560) + 0.5)
    x, y = plan.reader.grid.to_map(across.ravel(), down.ravel())
    there = grid.to_pixels(*map(np.asarray, rasterio.warp.transform(UTM, UTM33, x, y)))
    wanted = (there[0] - 0.5 + 2 * (there[1] - 0.5)).reshape(560, 560)
    assert np.nanmax(np.abs(found - wanted)) < 0.05


def test_scenes_on_different_grids_need_a_target(make_model, two_zones, tmp_path):
    with pytest.raises(ValueError, match=r"different grids.*--target optical"):
        map_scenes(make_model(), tmp_path / "out", optical=two_zones[0], sar=two_zones[1], options=OPTICAL)
    assert not (tmp_path / "out").exists()


def test_a_map_has_the_grid_that_is_asked_for(make_model, two_zones):
    plans = [
        make_plan(make_model(), two_zones[:1], two_zones[1:], dataclasses.replace(OPTICAL, **asked)).reader.grid
        for asked in (
            {"target": "sar"},
            {"target": two_zones[1]},
            {"crs": UTM33},
            {"target": "optical", "resolution": 20},
        )
    ]
    assert plans[0] == plans[1]
    assert plans[2].crs == UTM33
    assert (plans[2].transform[2] % 10, plans[2].transform[5] % 10, plans[2].pixel_size()) == (0, 0, (10, 10))
    assert (plans[3].height, plans[3].width, plans[3].pixel_size()) == (150, 155, (20, 20))


def test_grids_shifted_by_whole_pixels_are_read_and_not_resampled(make_model, tmp_path):
    values = noise((1, 80, 90))
    optical = write(tmp_path / "optical.tif", np.full((2, 60, 70), 5, np.float32))
    sar = write(tmp_path / "sar.tif", values, NORTH_UP @ Affine.translation(-7, -11))
    plan = make_plan(make_model(), [optical], [sar], OPTICAL)
    np.testing.assert_array_equal(plan.reader.read(0, 0, 60, 70)["sar"], values[:, 11:71, 7:77])


def test_decibels_are_resampled_as_power(make_model, tmp_path):
    values = np.tile(np.array([-5, -25], np.float32), (1, 40, 20))
    optical = write(tmp_path / "optical.tif", np.full((2, 20, 20), 5, np.float32), NORTH_UP @ Affine.scale(2))
    sar = write(tmp_path / "sar.tif", values)
    model = make_model(sar=("VV",))
    options = dataclasses.replace(OPTICAL, sar_bands=("VV",), sar_units="db", target="optical")
    found = make_plan(model, [optical], [sar], options, look=False).reader.read(4, 4, 8, 8)["sar"]
    assert np.abs(found - 10 * np.log10((10**-0.5 + 10**-2.5) / 2)).max() < 1.0


def test_clouds_are_taken_out_of_optical_pixels_alone(make_model, tmp_path):
    optical = write(tmp_path / "optical.tif", np.full((2, 40, 40), 5, np.float32))
    codes = np.full((1, 20, 20), 4, np.uint8)
    codes[:, 5:10, 5:10] = 9
    mask = write(tmp_path / "scl.tif", codes, NORTH_UP @ Affine.scale(2))
    options = dataclasses.replace(OPTICAL, optical_mask=mask, optical_mask_values=(3, 8, 9))
    plan = make_plan(make_model(), [optical], [], options)
    hidden = (plan.reader.read(0, 0, 40, 40)["optical"] == 0).all(axis=0)
    wanted = np.zeros((40, 40), bool)
    wanted[10:20, 10:20] = True
    np.testing.assert_array_equal(hidden, wanted)


def test_threads_never_read_each_others_windows(make_model, tmp_path):
    values = np.random.default_rng(0).integers(1, 255, (1, 600, 700)).astype(np.uint8)
    file = write(tmp_path / "sar.tif", values, tiled=True, blockxsize=128, blockysize=128, compress="deflate")
    reader = make_plan(make_model(), [], [file], SAR).reader
    places = np.random.default_rng(1).integers(0, 500, (200, 2)).tolist()

    def wrong(place):
        row, column = place
        return (reader.read(row, column, 90, 90)["sar"] != values[:, row : row + 90, column : column + 90]).any()

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(wrong, places))


def test_windows_at_all_edges_are_padded_without_data(make_model, tmp_path):
    values = noise((1, 20, 30))
    values[0, 0] = 0
    reader = make_plan(make_model(), [], [write(tmp_path / "sar.tif", values)], SAR).reader
    found = reader.read(-5, -6, 40, 50)["sar"]
    wanted = np.full((1, 40, 50), np.nan, np.float32)
    wanted[:, 5:25, 6:36] = values
    np.testing.assert_array_equal(found, wanted)
    assert np.isnan(reader.read(-50, 0, 10, 10)["sar"]).all()


def test_nothing_is_read_boundless():
    import fusmae_hf.scenes

    for module in Path(fusmae_hf.scenes.__file__).parent.glob("*.py"):
        assert "boundless" not in module.read_text()


def spoil(path):
    """Overwrite compressed tiles in the middle of a file."""
    content = bytearray(Path(path).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = b"\x55" * 600
    Path(path).write_bytes(content)


def test_a_broken_tile_stops_or_is_left_without_data_and_counted(sar_map, make_model, tmp_path):
    values = noise((1, 256, 256))
    file = write(tmp_path / "sar.tif", values, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    spoil(file)
    with pytest.raises(PairError, match="The file is damaged"):
        sar_map(file)
    model = make_model(lambda inputs: inputs["pixel_values_sar"], labels=("S",))
    [result] = map_scenes(model, tmp_path / "skipped", sar=file, progress=False,
                          options=dataclasses.replace(SAR, on_error="skip"))  # fmt: skip
    found = read(result.files["values"])
    there = np.isfinite(found)
    assert 0.5 < there.mean() < 0.95
    np.testing.assert_allclose(found[there], values[there], atol=1e-5)
    assert result.failed > 0
    record = json.loads((tmp_path / "skipped" / "run.json").read_text())
    assert (record["results"]["complete"], str(file) in record["results"]["errors"][0]) == (False, True)
    write(tmp_path / "sar.tif", values)
    assert (tmp_path / "skipped" / "parts").is_dir()


def test_a_model_that_gives_no_numbers_stops_or_is_counted(make_model, tmp_path):
    file = write(tmp_path / "sar.tif", noise((1, 64, 64)))

    def sick(inputs):
        values = inputs["pixel_values_sar"].clone()
        values[values.amax((1, 2, 3)) > 2.9] = torch.nan
        return values

    model = make_model(sick, labels=("S",))
    with pytest.raises(ValueError, match="values that are no numbers in the window at row"):
        map_scenes(model, tmp_path / "out", sar=file, options=SAR, progress=False)
    [result] = map_scenes(model, tmp_path / "out", sar=file, progress=False,
                          options=dataclasses.replace(SAR, on_error="skip"))  # fmt: skip
    assert result.failed > 0
    assert 0 < result.no_data < 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optical_units": None}, "--optical-units dn or reflectance or raw"),
        ({"optical_units": "dn"}, "Say what was added to the values"),
        ({"optical_bands": ()}, "which does not name them all: give --optical-bands"),
        ({"optical_bands": ("A", "X")}, "bands ['B'] are needed but were not given"),
        ({"what": ("classes",)}, "gives values, but --what asks for classes"),
        ({"target": "sar"}, "no such scene was given (`--sar`)"),
        ({"target": "nothing.tif"}, "neither optical nor sar"),
        ({"crs": "EPSG:0"}, "is no CRS"),
        ({"crs": "EPSG:4326"}, "give --resolution"),
        ({"bounds": (0, 0, 1, 1)}, "does not meet the scene"),
        ({"bounds": (1, 0, 0, 1)}, "west, south, east, north"),
        ({"area": "nothing.geojson"}, "no file nothing.geojson"),
        ({"optical_mask": "nothing.tif"}, "nothing.tif"),
        ({"tta": "d8"}, "tta is 'd8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"ray_address": "auto"}, "engine is 'local': give --engine ray"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(make_model, tmp_path, changed, message):
    file = write(tmp_path / "optical.tif", np.ones((2, 20, 20), np.float32))
    with pytest.raises((ValueError, PairError, FileNotFoundError)) as caught:
        map_scenes(make_model(), tmp_path / "out", optical=file, options=dataclasses.replace(OPTICAL, **changed))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_scenes_of_different_places_are_refused(make_model, tmp_path):
    optical = write(tmp_path / "optical.tif", np.ones((2, 20, 20), np.float32))
    sar = write(tmp_path / "sar.tif", noise((1, 20, 20)), NORTH_UP @ Affine.translation(10_000, 0))
    for target in (None, "optical"):
        with pytest.raises(PairError, match="barely meet"):
            map_scenes(make_model(), tmp_path / "out", optical=optical, sar=sar,
                       options=dataclasses.replace(OPTICAL, target=target))  # fmt: skip


def test_pixels_of_another_size_than_those_of_training_are_refused_unless_allowed(make_model, tmp_path):
    file = write(tmp_path / "optical.tif", np.ones((2, 20, 20), np.float32), NORTH_UP @ Affine.scale(3))
    model = make_model()
    model.gsd = 10.0
    with pytest.raises(ValueError, match="pixels of 30 m, but stub was trained on 10 m"):
        make_plan(model, [file], [], OPTICAL)
    make_plan(model, [file], [], dataclasses.replace(OPTICAL, any_resolution=True))


def test_values_that_are_not_what_is_declared_are_refused(make_model, tmp_path):
    decibels = (noise((2, 64, 64)) * 3 - 12).astype(np.float32)
    file = write(tmp_path / "sar.tif", decibels)
    model = make_model(sar=("VV", "VH"))
    options = MapOptions(sar_bands=("VV", "VH"), sar_units="linear")
    with pytest.raises(ValueError, match="looks like dB"):
        make_plan(model, [], [file], options)


def test_a_png_has_no_place(make_model, tmp_path):
    with rasterio.open(tmp_path / "a.png", "w", driver="PNG", width=20, height=20, count=1, dtype="uint8") as file:
        file.write(np.ones((1, 20, 20), np.uint8))
    with pytest.raises(PairError, match="has no CRS"):
        map_scenes(make_model(), tmp_path / "out", sar=tmp_path / "a.png", options=SAR)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_scenes(make_model, tmp_path, ending):
    import pandas

    for name in ("one", "two"):
        write(tmp_path / f"{name}.tif", np.full((1, 20, 20), len(name), np.float32))
    (tmp_path / "bad.tif").write_text("no raster")
    table = pandas.DataFrame({"id": ["one", "bad", "two"], "sar": ["one.tif", "bad.tif", "two.tif"]})
    path = tmp_path / f"scenes.{ending}"
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    model = make_model(lambda inputs: inputs["pixel_values_sar"], labels=("S",))
    with pytest.raises(PairError, match=r"bad\.tif"):
        map_scenes(model, tmp_path / "out", items=path, options=SAR, progress=False)
    results = map_scenes(model, tmp_path / "out", items=path, progress=False,
                         options=dataclasses.replace(SAR, on_error="skip"))  # fmt: skip
    assert [bool(result.error) for result in results] == [False, True, False]
    np.testing.assert_allclose(read(tmp_path / "out" / "two" / "values.tif"), 3)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden"])
def test_ids_are_names_of_folders(make_model, tmp_path, name):
    (tmp_path / "scenes.csv").write_text(f"id,sar\n{name},a.tif\n")
    with pytest.raises(ValueError, match="is no name for a folder"):
        map_scenes(make_model(), tmp_path / "out", items=tmp_path / "scenes.csv", options=SAR)


def test_out_is_a_folder_of_this_machine(make_model):
    with pytest.raises(ValueError, match="a folder of this machine"):
        map_scenes(make_model(), "s3://bucket/map", sar="a.tif", options=SAR)


def test_the_command_maps_plans_and_explains(tmp_path, capsys):
    from fusmae_hf import FusMAEConfig, FusMAEForSemanticSegmentation, FusMAEImageProcessor

    config = FusMAEConfig.from_preset("nano", num_hidden_layers=1, image_size=32, sar_bands=["VV"], num_labels=2)
    FusMAEForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    FusMAEImageProcessor(sar_bands=["VV"]).save_pretrained(tmp_path / "model")
    file = write(tmp_path / "sar.tif", noise((1, 80, 80)) * 3 - 12)
    command = ["map", str(tmp_path / "model"), str(tmp_path / "out"), "--sar", file, "--sar_bands", "VV"]
    assert main(command) == 2
    assert "--sar-units db or linear or raw" in capsys.readouterr().err
    assert main([*command, "--sar-units", "db", "--plan"]) == 0
    assert "Windows of 32x32 px" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main([*command, "--sar-units", "db", "--device", "nothing"]) == 2
    assert "--device nothing cannot be used here" in capsys.readouterr().err
    assert main([*command, "--sar-units=db", "--what", "classes,probabilities", "--device", "cpu"]) == 0
    assert "km2" in capsys.readouterr().out
    assert (tmp_path / "out" / "probabilities.tif").is_file()
    assert main(["map", str(tmp_path / "nothing"), str(tmp_path / "out"), "--sar", file, "--sar-units", "db"]) == 2
    assert os.fspath(tmp_path / "nothing") in capsys.readouterr().err
