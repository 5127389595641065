"""Preparing and mapping on a Ray cluster of two nodes give what one process gives, whatever dies meanwhile."""

import os
import signal
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.cluster import connected, require_same_everywhere, run_tasks
from fusmae_hf.errors import PairError
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.scenes.mapping import MapResult, map_scenes
from fusmae_hf.scenes.models import SceneModel
from fusmae_hf.scenes.plan import MapOptions
from tests.preparation.test_interrupted_preparation import SIZES, Numbered, hashes

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fusmae_hf[cluster]'")

MEMORY = {"object_store_memory": 80_000_000, "num_cpus": 1}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **MEMORY})
    cluster.add_node(**MEMORY)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module", autouse=True)
def joined(cluster):
    """The tests are a caller with a connection of their own, which nobody closes."""
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    with connected(None) as found:
        assert found is ray
    assert ray.is_initialized()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare(Numbered(), folder, **SIZES)
    return hashes(folder)


def test_prepared_shards_are_those_of_one_process(tmp_path, whole):
    report = prepare(Numbered(), tmp_path, engine="ray", **SIZES)
    assert (report.files_written, report.num_pairs, len(report.left_out)) == (6, 26, 5)
    assert hashes(tmp_path) == whole


class Deadly(Numbered):
    """The first process but this one that reads pair 16 is killed."""

    def __init__(self, survived):
        super().__init__(survived=survived)
        self.harmless = os.getpid()

    def read(self, index):
        self.die_at = None if os.getpid() == self.harmless else 16
        return super().read(index)


def test_a_file_whose_worker_is_killed_is_written_by_another(tmp_path, whole):
    reader = Deadly(tmp_path / "survived")
    (tmp_path / "begun").touch()
    prepare(reader, tmp_path / "out", engine="ray", **SIZES)
    assert reader.survived.exists()
    assert {name: hashes(tmp_path / "out")[name] for name in whole if name.startswith("data/")} == {
        name: digest for name, digest in whole.items() if name.startswith("data/")
    }  # the reader has another name


def test_each_node_must_see_the_folder_and_read_the_same(tmp_path):
    require_same_everywhere(ray, tmp_path / "shared", lambda: 1)
    here = os.getpid()
    with pytest.raises(OSError, match="does not read what this machine does"):
        require_same_everywhere(ray, tmp_path / "shared", lambda: os.getpid() == here)
    assert list((tmp_path / "shared").iterdir()) == []


def fail_once(folder: Path, item: int) -> int:
    """Item 1 kills its worker once, item 2 raises once."""
    mark = folder / str(item)
    if item in (1, 2) and not mark.exists():
        mark.touch()
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the disk was away")
    return 10 * item


def test_a_task_that_dies_or_cannot_read_is_tried_again(tmp_path):
    assert sorted(run_tasks(ray, partial(fail_once, tmp_path), range(5), 3)) == [0, 10, 20, 30, 40]


def always_fail(item: int) -> int:
    if item == 1:
        raise PairError("scene 1 is damaged")
    return item


def test_what_no_other_try_would_mend_is_raised_as_it_is():
    with pytest.raises(PairError, match="scene 1 is damaged"):
        list(run_tasks(ray, always_fail, range(3), 1))


def note(folder: Path, item: int) -> int:
    """How many tasks had begun and not been collected when this one ran."""
    (folder / f"begun-{item}").touch()
    return len(list(folder.glob("begun-*"))) - len(list(folder.glob("collected-*")))


def test_few_tasks_are_in_flight(tmp_path):
    for number, open_tasks in enumerate(run_tasks(ray, partial(note, tmp_path), range(12), 2)):
        (tmp_path / f"collected-{number}").touch()
        assert open_tasks <= 3


class Stub:
    """A map's model: means of neighbours. With a mark, the first process but its own that calls it is killed."""

    def __init__(self, mark: Path | None = None):
        self.mark, self.harmless = mark, os.getpid()

    def __call__(self, inputs):
        if self.mark and os.getpid() != self.harmless and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.nn.functional.avg_pool2d(inputs["pixel_values"], 3, 1, 1)


def map_with(folder: Path, predict: Stub, engine: str, scene: str) -> MapResult:
    processor = FusMAEImageProcessor(
        optical_bands=("A",), sar_bands=("S",), statistics=None, optical_units="raw", sar_units="raw",
        optical_mean=[0.0], optical_std=[1.0], sar_mean=[0.0], sar_std=[1.0], optical_nodata=0.0,
    )  # fmt: skip
    model = SceneModel("stub", "one", "values", ("A",), (16, 16), 4, None, processor, predict)
    options = MapOptions(optical_units="raw", optical_bands=("A",), overlap=4, num_workers=1, engine=engine)  # type: ignore[arg-type]
    return map_scenes(model, folder, optical=scene, options=options, progress=False)[0]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    values = np.random.default_rng(0).normal(5, 1, (1, 520, 1030)).astype(np.float32)
    options = {"driver": "GTiff", "count": 1, "height": 520, "width": 1030, "dtype": "float32", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", transform=Affine(10, 0, 600_000, 0, -10, 5_300_000), **options) as file:
        file.write(values)
    return str(path)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_map_of_two_nodes_is_that_of_one_process_though_one_is_killed(tmp_path, scene, cluster, one_thread):
    node = cluster.add_node(**MEMORY)
    local = map_with(tmp_path / "local", Stub(), "local", scene)
    mark = tmp_path / "killed"
    thread = threading.Thread(target=remove_when, args=(mark, cluster, node))
    thread.start()
    spread = map_with(tmp_path / "ray", Stub(mark), "ray", scene)
    thread.join()
    assert mark.exists()
    assert spread.checksums == local.checksums
    assert spread.windows == local.windows


def remove_when(mark: Path, cluster, node) -> None:
    """Take a node away once a process of the map was killed."""
    for _ in range(600):
        if mark.exists():
            cluster.remove_node(node)
            return
        threading.Event().wait(0.1)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"engine": "spark"}, "'local' or 'ray'"), ({"engine": "ray", "num_proc": 2}, "num_proc is 2"),
     ({"ray_address": "auto"}, "engine is 'local'")],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        prepare(Numbered(), tmp_path, **given)
