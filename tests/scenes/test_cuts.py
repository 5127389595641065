"""However a map is cut, computed and begun again, it is the same to the bit."""

import dataclasses
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusmae_hf import FusMAEConfig, FusMAEForSemanticSegmentation, FusMAEImageProcessor, map_scenes
from fusmae_hf.scenes import mapping
from fusmae_hf.scenes.blocks import compute_block
from fusmae_hf.scenes.lattice import Lattice, lattice_of
from fusmae_hf.scenes.models import load_scene_model
from fusmae_hf.scenes.parts import write_block
from fusmae_hf.scenes.plan import MapOptions, make_plan
from tests.scenes.conftest import NORTH_UP, RAW, UTM, read, write

OPTIONS = dataclasses.replace(RAW, what=("values",))


def spread(inputs):
    """Every pixel depends on its whole window, and on which sensors that has."""
    names = [name for name in ("pixel_values", "pixel_values_sar") if name in inputs]
    images = torch.cat([inputs[name][:, :1] for name in names], dim=1).mean(dim=1, keepdim=True)
    total = images + images.mean((2, 3), True) * len(names)
    return torch.cat([total, total * 3], dim=1)


def holed_pair(folder, shape=(110, 130), seed=0, **profile):
    generator = np.random.default_rng(seed)
    optical = generator.uniform(1, 9, (2, *shape)).astype(np.float32)
    sar = generator.normal(size=(1, *shape)).astype(np.float32)
    optical[:, 30:90, 20:70] = 0
    sar[:, :, 100:] = np.nan
    sar[:, 80:, :50] = np.nan
    return write(folder / "optical.tif", optical, **profile), write(folder / "sar.tif", sar, **profile)


def computed(plan, model, blocks, **keywords):
    """Values of the area, put together from blocks."""
    top, left, height, width = plan.area
    values = np.full((2, height, width), -7, np.float32)
    for block in blocks:
        for strip in compute_block(plan, model, block, **keywords):
            array = strip.arrays["values"]
            row, column = strip.row - top, strip.column - left
            assert (values[:, row : row + array.shape[1], column : column + array.shape[2]] == -7).all()
            values[:, row : row + array.shape[1], column : column + array.shape[2]] = array
    assert not (values == -7).any()
    return values


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return holed_pair(tmp_path_factory.mktemp("scene"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_gives_the_pixels_of_one_block(make_model, scene, data):
    overlap = data.draw(st.sampled_from([0, 4, 8, 12]))
    plan = make_plan(make_model(spread), scene[:1], scene[1:], dataclasses.replace(OPTIONS, overlap=overlap))
    rows, columns = (
        sorted({0, size, *data.draw(st.lists(st.integers(1, size - 1), max_size=4))}) for size in plan.area[2:]
    )
    blocks = [
        (row, column, stop - row, end - column)
        for row, stop in itertools.pairwise(rows)
        for column, end in itertools.pairwise(columns)
    ]
    model = make_model(spread)
    random.Random(0).shuffle(blocks)
    np.testing.assert_array_equal(computed(plan, model, blocks), computed(plan, model, [plan.area]))


def test_threads_that_read_ahead_change_nothing(make_model, scene):
    plan, model = make_plan(make_model(spread), scene[:1], scene[1:], OPTIONS), make_model(spread)
    alone = computed(plan, model, [plan.area])
    with ThreadPoolExecutor(4) as readers:
        np.testing.assert_array_equal(computed(plan, model, plan.with_block_side(64).blocks(), readers=readers), alone)


def test_a_plan_can_be_sent_to_another_process(make_model, scene):
    plan = make_plan(make_model(spread), scene[:1], scene[1:], OPTIONS)
    sent = pickle.loads(pickle.dumps(plan))
    model = make_model(spread)
    np.testing.assert_array_equal(computed(sent, model, [plan.area]), computed(plan, model, [plan.area]))


def test_a_block_written_twice_is_the_same_files(make_model, scene, tmp_path):
    plan, model = make_plan(make_model(spread), scene[:1], scene[1:], OPTIONS).with_block_side(64), make_model(spread)
    assert write_block(plan, model, 1, tmp_path) == write_block(plan, model, 1, tmp_path)


@pytest.mark.parametrize("kind", ["bounds", "area"])
def test_a_crop_is_the_crop_of_the_map(make_model, scene, tmp_path, kind):
    left, top = 600_000 + 37 * 10, 5_300_000 - 21 * 10
    right, bottom = left + 55 * 10, top - 70 * 10
    options = dataclasses.replace(OPTIONS, bounds=(left, bottom, right, top))
    if kind == "area":
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        content = {"type": "Polygon", "coordinates": [ring]}
        crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32632"}}
        (tmp_path / "area.geojson").write_text(json.dumps({**content, "crs": crs}))
        options = dataclasses.replace(OPTIONS, area=str(tmp_path / "area.geojson"))
    model, maps = make_model(spread), []
    for name, given_options in (("whole", OPTIONS), ("crop", options)):
        [result] = map_scenes(model, tmp_path / name, optical=scene[0], sar=scene[1], options=given_options,
                              progress=False)  # fmt: skip
        maps.append(read(result.files["values"]))
    np.testing.assert_array_equal(maps[1], maps[0][:, 21:91, 37:92])


def test_outside_of_a_polygon_there_is_no_data_and_no_work(make_model, scene, tmp_path):
    ring = [[600_000, 5_300_000], [601_300, 5_300_000], [600_000, 5_298_900], [600_000, 5_300_000]]
    crs = {"type": "name", "properties": {"name": "EPSG:32632"}}
    (tmp_path / "area.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring], "crs": crs}))
    results = [
        map_scenes(make_model(spread), tmp_path / str(area is None), optical=scene[0], sar=scene[1], progress=False,
                   options=dataclasses.replace(OPTIONS, area=area))[0]
        for area in (None, str(tmp_path / "area.geojson"))
    ]  # fmt: skip
    whole, part = (read(result.files["values"]) for result in results)
    inside = np.isfinite(part[0])
    np.testing.assert_array_equal(part[:, inside], whole[:, inside])
    assert 0.3 < inside.mean() < 0.5
    assert results[1].windows < 0.75 * results[0].windows


def test_two_dates_have_their_windows_in_the_same_places(make_model, tmp_path):
    from rasterio.transform import Affine

    files = [
        write(
            tmp_path / f"{shift}.tif", np.ones((2, 90, 90), np.float32), NORTH_UP @ Affine.translation(shift, -shift)
        )
        for shift in (0, 13)
    ]
    places = []
    for file, shift in zip(files, (0, 13), strict=True):
        plan = make_plan(make_model(), [file], [], OPTIONS)
        rows, columns = plan.windows_of(plan.area)
        places.append(({(row - shift) % 8 for row in rows}, {(column + shift) % 8 for column in columns}))
    assert places[0] == places[1]


@given(st.integers(1, 12), st.integers(2, 12), st.integers(-40, 40), st.integers(1, 60), st.data())
def test_weights_of_the_windows_at_a_pixel_sum_to_one_and_none_is_zero(patch, patches, anchor, size, data):
    side = patch * patches
    overlap = patch * data.draw(st.integers(0, patches - 1))
    lattice = Lattice(side, side, patch, overlap, anchor, anchor)
    weights = lattice.weights()
    assert (weights > 0).all()
    np.testing.assert_array_equal(weights, weights[::-1, ::-1].T)
    total = np.zeros((size, size))
    for row in lattice.rows(0, size):
        for column in lattice.columns(0, size):
            rows, columns = (slice(max(first, 0), min(first + side, size)) for first in (row, column))
            total[rows, columns] += weights[
                rows.start - row : rows.stop - row, columns.start - column : columns.stop - column
            ]
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 300))
def test_cells_cover_the_grid_once(first, size, anchor):
    lattice = Lattice(16, 16, 4, 12, anchor, anchor)
    cells = lattice.cell_rows(first, first + size)
    assert cells[0] <= first
    assert np.diff(cells).tolist() == [4] * (len(cells) - 1)
    assert cells[-1] < first + size <= cells[-1] + 4


def test_the_overlap_is_about_half_a_window():
    from fusmae_hf.readers.grids import Grid

    grid = Grid(rasterio.crs.CRS.from_epsg(32632), tuple(NORTH_UP)[:6], 900, 900)
    for side, patch, overlap in ((128, 16, 64), (120, 8, 56), (16, 16, 0), (32, 8, 16)):
        assert lattice_of(grid, (side, side), patch).overlap == overlap


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(1)
    config = FusMAEConfig.from_preset(
        "tiny", num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32,
        optical_bands=["B04"], sar_bands=["VV"], num_labels=3,
    )  # fmt: skip
    FusMAEForSemanticSegmentation(config).save_pretrained(folder)
    FusMAEImageProcessor(optical_bands=["B04"], sar_bands=["VV"]).save_pretrained(folder)
    return folder


SENTINEL = MapOptions(what=("classes", "probabilities"), optical_units="dn", optical_offset=0, sar_units="db",
                      optical_bands=("B04",), sar_bands=("VV",), num_workers=1)  # fmt: skip


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("sentinel"), np.random.default_rng(3)
    optical = generator.integers(300, 3000, (1, 120, 110)).astype(np.uint16)
    sar = generator.normal(-10, 3, (1, 120, 110)).astype(np.float32)
    optical[:, 40:90, 30:70], sar[:, :, 90:], sar[:, 100:, :25] = 0, np.nan, np.nan
    return write(folder / "optical.tif", optical), write(folder / "sar.tif", sar)


def probabilities(plan, model, blocks):
    values = np.zeros((3, *plan.area[2:]), np.float32)
    for block in blocks:
        for strip in compute_block(plan, model, block):
            array = strip.arrays["probabilities"]
            rows, columns = (slice(first, first + size) for first, size in zip(
                (strip.row, strip.column), array.shape[1:], strict=True))  # fmt: skip
            values[:, rows, columns] = array
    return values


def test_a_real_model_gives_the_same_bits_however_it_is_cut(checkpoint, sentinel):
    model = load_scene_model(checkpoint, "cpu")
    plan = make_plan(model, sentinel[:1], sentinel[1:], SENTINEL)
    whole = probabilities(plan, model, [plan.area])
    np.testing.assert_array_equal(probabilities(plan, model, plan.with_block_side(48).blocks()), whole)
    other = make_plan(model, sentinel[:1], sentinel[1:], dataclasses.replace(SENTINEL, batch_size=3))
    np.testing.assert_allclose(probabilities(other, model, [plan.area]), whole, atol=1e-5)


def test_symmetries_are_averaged(checkpoint, sentinel):
    model = load_scene_model(checkpoint, "cpu")
    plan = make_plan(model, sentinel[:1], sentinel[1:], dataclasses.replace(SENTINEL, tta="d4", batch_size=2))
    window = model.normalised(plan.reader.read(0, 0, 32, 32), plan.declared)
    turned = {name: torch.rot90(values, 1, (-2, -1)).flip(-1) for name, values in window.items()}
    one, other = (model.run([given], 2, symmetries=True)[0] for given in (window, turned))
    np.testing.assert_allclose(np.flip(np.rot90(one, 1, (1, 2)), 2), other, atol=1e-6)
    assert np.abs(one - model.run([window], 2)[0]).max() > 1e-5


RUNNER = textwrap.dedent(
    """
    import os, sys
    import torch
    torch.set_num_threads(1)
    from fusmae_hf import map_scenes
    from fusmae_hf.scenes import lattice, mapping, plan
    from tests.scenes.test_cuts import SENTINEL
    lattice.BLOCK_UNIT, lattice.BLOCK_STRIDES = 16, 2
    mapping.draw_quicklook = lambda plan, marks, folder, out: out.write_bytes(b"")
    checkpoint, out, optical, sar = sys.argv[1:5]
    if len(sys.argv) > 5:
        done, at = 0, int(sys.argv[5])
        write = mapping.write_block
        def dying(*given):
            global done
            if done == at:
                def die(counts):
                    os.kill(os.getpid(), 9)
                given = (*given[:5], die)
            done += 1
            return write(*given)
        mapping.write_block = dying
    [result] = map_scenes(checkpoint, out, optical=optical, sar=sar, options=SENTINEL, progress=False)
    print(result.windows, result.checksums)
    """
)


def started(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, "-c", RUNNER, *map(str, arguments)], env=environment, text=True,
                          capture_output=True)  # fmt: skip


def test_killed_and_begun_again_a_map_is_the_same_and_only_what_is_missing_is_computed(
    checkpoint, sentinel, tmp_path, monkeypatch
):
    from fusmae_hf.scenes import lattice

    monkeypatch.setattr(lattice, "BLOCK_UNIT", 16)
    monkeypatch.setattr(lattice, "BLOCK_STRIDES", 2)
    [whole] = map_scenes(checkpoint, tmp_path / "whole", optical=sentinel[0], sar=sentinel[1], options=SENTINEL,
                         progress=False)  # fmt: skip
    out = tmp_path / "killed"
    killed = started(checkpoint, out, *sentinel, 5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(list((out / "parts").glob("*.json"))) == 5
    (out / "parts" / ".000007-classes.tif.0123abcd.incomplete").write_bytes(b"torn")
    spoilt = sorted((out / "parts").glob("*-probabilities.tif"))[:2]
    spoilt[0].write_bytes(spoilt[0].read_bytes()[:100])
    spoilt[1].write_bytes(b"")
    seen = []
    write = mapping.write_block
    monkeypatch.setattr(mapping, "write_block", lambda plan, model, number, *rest: (
        seen.append(number), write(plan, model, number, *rest))[1])  # fmt: skip
    [again] = map_scenes(checkpoint, out, optical=sentinel[0], sar=sentinel[1], options=SENTINEL, progress=False)
    assert again.checksums == whole.checksums
    plan = make_plan(load_scene_model(checkpoint, "cpu"), sentinel[:1], sentinel[1:], SENTINEL)
    assert seen == [0, 1, *range(5, len(plan.blocks()))]
    assert again.windows < whole.windows
    assert again.no_data == whole.no_data
    assert not (out / "parts").exists()
    seen.clear()
    [third] = map_scenes(checkpoint, out, optical=sentinel[0], sar=sentinel[1], options=SENTINEL, progress=False)
    assert (third.checksums, third.windows, seen) == (whole.checksums, 0, [])


@pytest.mark.slow
def test_killed_at_random_moments_a_map_is_the_same(checkpoint, sentinel, tmp_path):
    wanted = started(checkpoint, tmp_path / "whole", *sentinel).stdout.split(" ", 1)[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", RUNNER, str(checkpoint), str(tmp_path / "killed"), *sentinel]
    for attempt in range(40):
        process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
        try:
            printed, _ = process.communicate(timeout=random.Random(attempt).uniform(3, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        assert process.returncode == 0
        assert printed.split(" ", 1)[1] == wanted
        return
    pytest.fail("never finished")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"overlap": 0}, "overlap"),
        ({"what": ("values",), "tta": "d4"}, "tta"),
        ({"batch_size": 3}, "batch_size"),
        ({"bounds": (600_000, 5_299_000, 601_000, 5_300_000)}, "area"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name(make_model, scene, tmp_path, changed, named):
    map_scenes(make_model(spread), tmp_path, optical=scene[0], sar=scene[1], options=OPTIONS, progress=False)
    with pytest.raises(ValueError, match=rf"run\.json is of other settings or data: {named} "):
        map_scenes(make_model(spread), tmp_path, optical=scene[0], sar=scene[1], progress=False,
                   options=dataclasses.replace(OPTIONS, **changed))  # fmt: skip


def test_a_folder_of_other_inputs_or_another_model_is_refused_until_it_is_overwritten(make_model, tmp_path):
    optical, sar = holed_pair(tmp_path, (40, 40))
    model, out = make_model(spread), tmp_path / "out"
    map_scenes(model, out, optical=optical, sar=sar, options=OPTIONS, progress=False)
    with pytest.raises(ValueError, match="content_hash"):
        map_scenes(make_model(spread, labels=("X", "Y")), out, optical=optical, sar=sar, options=OPTIONS)
    time.sleep(0.01)
    holed_pair(tmp_path, (40, 40), seed=1)
    with pytest.raises(ValueError, match=r"files \S+ modified \d+ instead of \d+\. .* --overwrite"):
        map_scenes(model, out, optical=optical, sar=sar, options=OPTIONS)
    before = read(out / "values.tif")
    options = dataclasses.replace(OPTIONS, overwrite=True)
    map_scenes(model, out, optical=optical, sar=sar, options=options, progress=False)
    assert (read(out / "values.tif") != before).any()


def test_a_folder_in_use_is_refused(make_model, scene, tmp_path):
    with mapping.locked(tmp_path), pytest.raises(OSError, match="Another process writes into"):
        map_scenes(make_model(spread), tmp_path, optical=scene[0], sar=scene[1], options=OPTIONS)


def test_a_folder_with_foreign_files_is_refused(make_model, scene, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match=r"is not empty \(thesis.tex\)"):
        map_scenes(make_model(spread), tmp_path, optical=scene[0], sar=scene[1], options=OPTIONS)


def test_a_full_disk_is_named_and_the_rest_is_kept(make_model, scene, tmp_path, monkeypatch):
    from fusmae_hf.scenes import lattice

    monkeypatch.setattr(lattice, "BLOCK_UNIT", 64)
    monkeypatch.setattr(lattice, "BLOCK_STRIDES", 2)
    real, model = mapping.write_block, make_model(spread)

    def full(plan, model, number, *rest):
        if number == 2:
            import resource

            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
            try:
                return real(plan, model, number, *rest)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return real(plan, model, number, *rest)

    monkeypatch.setattr(mapping, "write_block", full)
    with pytest.raises(OSError, match=r"000002-values\.tif could not be written"):
        map_scenes(model, tmp_path, optical=scene[0], sar=scene[1], options=OPTIONS, progress=False)
    assert len(list((tmp_path / "parts").glob("*.json"))) == 2
    assert not list((tmp_path / "parts").glob(".*"))
    monkeypatch.setattr(mapping, "write_block", real)
    [result] = map_scenes(model, tmp_path, optical=scene[0], sar=scene[1], options=OPTIONS, progress=False)
    plan = make_plan(model, scene[:1], scene[1:], OPTIONS)
    np.testing.assert_array_equal(read(result.files["values"]), computed(plan, model, [plan.area]))


def test_every_block_of_a_file_is_written_once(make_model, scene, tmp_path):
    [result] = map_scenes(make_model(spread), tmp_path / "out", optical=scene[0], sar=scene[1], options=OPTIONS,
                          progress=False)  # fmt: skip
    once = write(tmp_path / "once.tif", read(result.files["values"]), crs=UTM, driver="COG", compress="deflate",
                 predictor="yes")  # fmt: skip
    assert result.files["values"].stat().st_size <= 1.05 * os.path.getsize(once) + 2000
