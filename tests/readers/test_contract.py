"""What every reader promises (`PairReader`), on a tiny archive of each dataset."""

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import rasterio

from fusmae_hf.data.checks import check_pair
from fusmae_hf.data.pairs import PairReader
from fusmae_hf.errors import PairError
from fusmae_hf.plots.pairs import plot_pair
from fusmae_hf.readers import geotiff, ssl4eo_zarr
from fusmae_hf.readers.archives import ARCHIVES, open_archive
from tests.readers.bigearthnet_fixtures import make_bigearthnet, make_reben
from tests.readers.sen12ms_fixtures import make_dfc2020, make_sen12ms
from tests.readers.ssl4eo_fixtures import make_ssl4eo, make_ssl4eo_zarr
from tests.readers.terramesh_fixtures import make_terramesh
from tests.readers.test_biomassters import make_biomassters
from tests.readers.test_ombria import make_ombria
from tests.readers.test_paired_geotiffs import BANDS, PATTERNS, write_pair
from tests.readers.test_sen1floods11 import make_sen1floods11


@dataclass(frozen=True)
class Case:
    """A tiny archive, and files of its first pair: of both sensors, without which it cannot be read; and of maps."""

    make: Callable[[Path], object]
    sensors: tuple[str, ...]
    maps: tuple[str, ...] = ()
    options: Callable[[Path], dict[str, Any]] = lambda root: {}
    pair_without_data: str = ""


def make_geotiffs(root: Path) -> None:
    for name in ("b", "a"):
        write_pair(root, name)


S12 = "ROIs1158_spring"
CASES = {
    "bigearthnet": Case(
        make_bigearthnet,
        (
            "BigEarthNet-v1.0/S2A_MSIL2A_20170613T101031_87_48/*_B08.tif",
            "BigEarthNet-S1-v1.0/S1B*_69_24/*_VH.tif",
            "BigEarthNet-S1-v1.0/S1B*_69_24/*.json",
        ),
        options=lambda root: {"splits": root / "splits"},
    ),
    "reben": Case(
        make_reben,
        ("BigEarthNet-S2/*/S2A_MSIL2A_20180413*/*_B12.tif", "BigEarthNet-S1/*/S1A*_74_13/*_VV.tif"),
        ("Reference_Maps/*/S2A_MSIL2A_20180413*/*.tif",),
    ),
    "sen12ms": Case(
        make_sen12ms,
        (f"{S12}/s1_1/{S12}_s1_1_p30.tif", f"{S12}/s2_1/{S12}_s2_1_p30.tif"),
        (f"{S12}/lc_1/{S12}_lc_1_p30.tif",),
        options=lambda root: {"splits": root / "splits"},
    ),
    "dfc2020": Case(
        make_dfc2020,
        tuple(f"ROIs0000_validation/{kind}_validation/*_p0.tif" for kind in ("s1", "s2")),
        ("ROIs0000_validation/dfc_validation/*_p0.tif",),
    ),
    "ssl4eo": Case(make_ssl4eo, ("s1/0000007/*/VH.tif", "s2a/0000007/*/B9.tif")),
    "ssl4eo-zarr": Case(make_ssl4eo_zarr, ("train/S1GRD/*.zip", "train/S2L2A/*.zip")),
    "terramesh": Case(make_terramesh, ("S1RTC/433D*.tif", "S2L2A/433D*.tif"), ("LULC/433D*.tif",)),
    "sen1floods11": Case(
        make_sen1floods11, ("**/S1Hand/Ghana_103272*", "**/S2Hand/Ghana_103272*"), ("**/LabelHand/Ghana_103272*",)
    ),
    "biomassters": Case(
        make_biomassters,
        ("train_features/0060c0a5_S1_04.tif", "train_features/0060c0a5_S2_04.tif"),
        ("train_agbm/0060c0a5_agbm.tif",),
        pair_without_data="0060c0a5_04",
    ),
    "ombria": Case(
        make_ombria,
        ("OmbriaS1/test/AFTER/*_0020.png", "OmbriaS2/test/AFTER/*_0020.png"),
        ("OmbriaS2/test/MASK/*_0020.png",),
    ),
    "geotiffs": Case(make_geotiffs, ("s1/a.tif", "s2/a.tif"), options=lambda root: PATTERNS | BANDS),
}
FILES = [(name, file) for name, case in CASES.items() for file in (*case.sensors, *case.maps)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    roots: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name)
            CASES[name].make(roots[name])
        return roots[name]

    return make


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def archive(made: Callable[[str], Path], name: str) -> Path:
    return made(name)


def opened(name: str, root: Path) -> PairReader:
    return open_archive(name, root, **CASES[name].options(root))


def assert_same(first, second) -> None:
    for one, other in zip(astuple(first), astuple(second), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_dataset_on_disk_is_under_this_contract():
    assert CASES.keys() == {archive.command for archive in ARCHIVES if archive.layout}


def test_every_pair_may_be_stored_under_its_id_and_split(name, archive):
    reader = opened(name, archive)
    assert len(reader) == len(reader.ids) == len(set(reader.ids)) > 1
    assert str(archive) in reader.summary
    for index, expected in enumerate(reader.ids):
        pair = reader.read(index)
        assert (pair.id, pair.split) == (expected, reader.split_of(index))
        assert pair.extra.keys() == reader.info.extra_columns.keys()
        if expected != CASES[name].pair_without_data:
            check_pair(pair, reader.info)


def test_opening_reads_no_pixels(name, archive, monkeypatch):
    tried: list[Any] = []

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        tried.append(path)
        raise PairError(f"{path} was opened")

    monkeypatch.setattr(rasterio, "open", refuse)
    monkeypatch.setattr(geotiff, "open_plain", refuse)
    monkeypatch.setattr(PIL.Image, "open", refuse)
    monkeypatch.setattr(ssl4eo_zarr._SeasonalFile, "patch", refuse)
    reader = opened(name, archive)
    # Headers alone: are bands on one grid, and what do the files of the first pairs that open declare?
    assert len(tried) == {"ssl4eo": 1, "geotiffs": 2}.get(name, 0)
    assert {reader.split_of(index) for index in range(len(reader))} <= {None, "train", "validation", "test"}


class ReversedScan(list):
    """What `os.scandir` gives, in another order."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_order_does_not_depend_on_the_directory(name, archive, monkeypatch):
    listdir, scandir, expected = os.listdir, os.scandir, opened(name, archive).ids
    monkeypatch.setattr(os, "listdir", lambda folder=".": sorted(listdir(folder), reverse=True))
    monkeypatch.setattr(
        os, "scandir", lambda folder=".": ReversedScan(sorted(scandir(folder), key=lambda e: e.name, reverse=True))
    )
    assert opened(name, archive).ids == expected


def test_a_reader_can_be_pickled_also_after_reading(name, archive):
    reader = opened(name, archive)
    pair = reader.read(1)
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.ids, copy.info, copy.summary) == (reader.ids, reader.info, reader.summary)
    assert list(copy.left_out()) == list(reader.left_out())
    assert_same(copy.read(1), pair)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, case in CASES.items() for file in case.sensors])
def test_a_pair_that_lacks_a_file_is_left_out_with_a_reason_or_raises_an_error_that_names_it(
    made, name, file, own_archive
):
    (path,) = own_archive.glob(file)
    before = opened(name, own_archive)
    path.unlink()
    reader = opened(name, own_archive)
    if before.ids[0] in reader.ids:
        with pytest.raises(PairError, match="no such file") as caught:
            reader.read(0)
        assert str(path) in str(caught.value)
    else:
        left_out = set(reader.left_out()) - set(before.left_out())
        assert left_out
        assert all(reason for _, reason in left_out)


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: b"nonsense", lambda c: c[: len(c) // 2], None])
@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_that_is_damaged_or_vanishes_after_opening_raises_an_error_that_names_it(
    made, name, file, damage, own_archive
):
    reader = opened(name, own_archive)
    (path,) = own_archive.glob(file)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PairError, match=r"cannot be (read|opened)|no such file|No such file") as caught:
        reader.read(0)
    assert str(path) in str(caught.value)


def test_a_wrong_folder_is_named_with_what_was_looked_for(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for") as caught:
        opened(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"bigearthnet", "reben", "ssl4eo"}))  # these list folders
def test_an_archive_without_any_pair_is_refused_with_what_is_expected(made, name, own_archive):
    for path in own_archive.glob("**/*"):
        if path.suffix in (".tif", ".png", ".zip", ".json"):
            path.unlink()
    with pytest.raises(ValueError, match=r"no pair to read in .* left out.* Expected ") as caught:
        opened(name, own_archive)
    assert str(own_archive) in str(caught.value)


def test_a_missing_package_is_named_with_the_command_that_installs_it(name, archive, monkeypatch):
    if name == "ombria":
        pytest.skip("it needs no further package")
    for package in ("rasterio", "zarr"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[data\]"'):
        opened(name, archive)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (archive.command, option)
        for archive in ARCHIVES
        for option, described in archive.options.items()
        if "choices" in described and archive.command in CASES
    ],
)
def test_an_unknown_value_of_an_option_is_refused_by_its_name(made, name, option):
    root = made(name)
    with pytest.raises(ValueError, match=option):
        open_archive(name, root, **CASES[name].options(root) | {option: "unknown"})


def test_a_pair_can_be_drawn_with_its_map(name, archive):
    reader = opened(name, archive)
    pair = reader.read(1)
    titles = [axes.get_title() for axes in plot_pair(pair, reader.info).axes]
    assert list(reader.info.sar_bands) == [title for title in titles if title in reader.info.sar_bands]
    assert ("label map" in titles) == (pair.label_map is not None)
