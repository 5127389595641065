"""Finished blocks of a map on the disk, which a killed run goes on from, and the folder that holds them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from fusmae_hf.cluster import connected, require_ray, require_same_everywhere, run_tasks
from fusmae_hf.files.atomic import explain_failed_write, incomplete_path, sweep_incomplete, write_atomically
from fusmae_hf.files.finished import read_record, write_record
from fusmae_hf.hub.checkpoint_loading import checksum_of_file
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.grids import Window
from fusmae_hf.scenes.blocks import Counts, Strip, cells_of, compute_block
from fusmae_hf.scenes.models import SceneModel
from fusmae_hf.scenes.places import PLACES, PlacesPart, tokens_of

if TYPE_CHECKING:
    from fusmae_hf.scenes.plan import Plan

PARTS = "parts"
"""Folder beside the results that holds the parts until all are there."""

RUN = "run.json"

RESULTS = ("classes.tif", "probabilities.tif", "confidence.tif", "values.tif", "scores.tif", "quicklook.png")

_TILE = 256


def mark_path(folder: Path, number: int) -> Path:
    """The record that says that a block is finished. It is written last."""
    return folder / f"{number:06d}.json"


def part_path(folder: Path, number: int, product: str) -> Path:
    """The part of a product that a block gives."""
    ending = {"quicklook": "npy", PLACES: "parquet"}.get(product, "tif")
    return folder / f"{number:06d}-{product}.{ending}"


def write_block(
    plan: Plan,
    model: SceneModel,
    number: int,
    folder: Path,
    readers: Executor | None = None,
    tell: Callable[[Counts], None] | None = None,
) -> dict[str, Any]:
    """Compute a block and write its parts and its mark. Done twice, it gives the same files.

    Args:
        plan: of the map.
        model: that predicts.
        number: of the block in `plan.blocks()`.
        folder: for the parts, which all who compute or assemble see.
        readers: threads that read ahead.
        tell: is called after each strip with what was done so far.

    Returns:
        What the mark holds: `window` (of the block), `counts` (see `Counts`) and `files` by product, each with
        `name`, `bytes`, `xxh3_128` and `window` (row, column, height and width in the raster of the product).

    Raises:
        OSError: a part cannot be written; none of the block is kept.
        PairError, ValueError: as `compute_block`.
    """
    block = plan.blocks()[number]
    counts = Counts()
    with ExitStack() as stack:
        writing = stack.enter_context(_Writing(plan, block, number, folder))
        for strip in compute_block(plan, model, block, counts, readers):
            writing.take(strip)
            if tell is not None:
                tell(counts)
        files = writing.finish()
    mark = {"window": list(block), "counts": asdict(counts), "files": files}
    write_record(mark_path(folder, number), mark)
    return mark


def finished_block(plan: Plan, number: int, folder: Path) -> dict[str, Any] | None:
    """The mark of a block whose parts are all there and whole; None where it must be computed.

    Blocks of which something failed are computed again.
    """
    path = mark_path(folder, number)
    if not path.is_file():
        return None
    try:
        mark: dict[str, Any] = json.loads(path.read_bytes())
        if mark["window"] != list(plan.blocks()[number]) or mark["counts"]["failed"]:
            return None
        for part in mark["files"].values():
            file = folder / part["name"]
            if file.stat().st_size != part["bytes"] or checksum_of_file(file) != part["xxh3_128"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mark


def write_blocks_on_ray(
    plan: Plan, load: Callable[[], SceneModel], numbers: list[int], folder: Path, address: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`write_block` on the nodes of a Ray cluster, each process of which loads the model once.

    Args:
        plan: of the map.
        load: gives the model, with as many threads as this process has.
        numbers: of the blocks to write.
        folder: for the parts; every node must see it, and the scenes, under the same names, which is tried first.
        address: of the cluster, see `connected`.

    Yields:
        Number and mark of each block, in any order.

    Raises:
        ImportError, ConnectionError: Ray is missing, or there is no cluster at the address.
        OSError: a node does not see what this machine sees; a part cannot be written.
        ValueError: no node has as many CPUs as this process has threads. Others as `write_block`.
    """
    threads, gpus = torch.get_num_threads(), int(str(plan.made_of.get("device", "cpu")) != "cpu")
    with connected(address) as ray:
        most = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        if most < threads:
            raise ValueError(
                f"This process computes with {threads} threads, but no node of the cluster has more than {most} CPUs. "
                f"Start it with OMP_NUM_THREADS={most}, so that all compute alike."
            )
        require_same_everywhere(ray, folder, partial(_first_pixels, plan))
        work = partial(_write_on_node, [ray.put((plan, load))], folder, threads)
        in_flight = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        yield from run_tasks(ray, work, numbers, in_flight, threads, gpus)


def _first_pixels(plan: Plan) -> dict[str, str]:
    """Checksums of some pixels of each sensor."""
    top, left, height, width = plan.area
    images = plan.reader.read(top + height // 2, left, 1, min(width, 256))
    return {sensor: xxhash.xxh3_128_hexdigest(image.tobytes()) for sensor, image in images.items()}


@lru_cache(maxsize=1)
def _work_of(reference: Any) -> tuple[Plan, SceneModel]:
    plan, load = require_ray().get(reference)
    return plan, load()


def _write_on_node(references: list[Any], folder: Path, threads: int, number: int) -> tuple[int, dict[str, Any]]:
    torch.set_num_threads(threads)
    plan, model = _work_of(references[0])
    if model.content_hash != plan.made_of["content_hash"]:
        raise ValueError(f"The checkpoint {model.name} is not the same on all nodes. Give one that all share.")
    with require_rasterio().Env(GDAL_CACHEMAX=256 * 2**20), ThreadPoolExecutor(1) as readers:
        return number, write_block(plan, model, number, folder, readers)


class _Writing:
    """Files of a block while it is computed; a thread writes them."""

    def __init__(self, plan: Plan, block: Window, number: int, folder: Path):
        self.plan, self.block, self.number, self.folder = plan, block, number, folder
        self.thread = ThreadPoolExecutor(1)
        self.rasters: dict[str, _PartFile] = {}
        self.places = PlacesPart(plan, part_path(folder, number, PLACES))
        self.look: np.ndarray | None = None
        self.task: Future[None] | None = None

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()
        for raster in self.rasters.values():
            raster.discard()
        self.places.discard()

    def take(self, strip: Strip) -> None:
        """Hand a strip to the thread, once the one before is written."""
        if self.task is not None:
            self.task.result()
        self.task = self.thread.submit(self._write, strip)

    def finish(self) -> dict[str, Any]:
        """Wait, put the files in place, and say what they are."""
        if self.task is not None:
            self.task.result()
        files = {product: raster.finish() for product, raster in self.rasters.items()}
        if self.places.pieces:
            described = self.places.finish()
            files[PLACES] = _described(self.places.path, self.block) | described
        if self.look is not None:
            path = part_path(self.folder, self.number, "quicklook")
            content = self.look.astype(np.float16)
            with explain_failed_write(path):
                write_atomically(path, _npy(content))
            files["quicklook"] = _described(path, self._look_window())
        return files

    def _write(self, strip: Strip) -> None:
        for product, array in strip.arrays.items():
            if product == "quicklook":
                self._keep(strip, array)
                continue
            if product == PLACES:
                self.places.add(array)
                continue
            if product not in self.rasters:
                window = self._window(product, strip, array)
                path = part_path(self.folder, self.number, product)
                self.rasters[product] = _PartFile(path, window, array)
            self.rasters[product].add(array)

    def _window(self, product: str, strip: Strip, array: np.ndarray) -> Window:
        if product == "scores":
            return strip.row, strip.column, array.shape[1], array.shape[2]
        top, left = self.plan.area[:2]
        return self.block[0] - top, self.block[1] - left, self.block[2], self.block[3]

    def _look_window(self) -> Window:
        step, (top, left) = self.plan.quicklook_step(), self.plan.area[:2]
        row, column = -(-(self.block[0] - top) // step), -(-(self.block[1] - left) // step)
        stop, end = (-(-(self.block[axis] + self.block[axis + 2] - self.plan.area[axis]) // step) for axis in (0, 1))
        return row, column, stop - row, end - column

    def _keep(self, strip: Strip, array: np.ndarray) -> None:
        first_row, first_column, height, width = self._look_window()
        if self.look is None:
            self.look = np.full((len(array), height, width), np.nan, np.float32)
        step, (top, left) = self.plan.quicklook_step(), self.plan.area[:2]
        row, column = -(-(strip.row - top) // step) - first_row, -(-(strip.column - left) // step) - first_column
        self.look[:, row : row + array.shape[1], column : column + array.shape[2]] = array


class _PartFile:
    """A raster written from the top down, in whole tiles, and read again to see that it holds what was written."""

    def __init__(self, path: Path, window: Window, first: np.ndarray):
        self.path, self.window = path, window
        self.incomplete = incomplete_path(path)
        count, dtype = len(first), first.dtype
        rasterio = require_rasterio()
        with explain_failed_write(path):
            self.file: Any = rasterio.open(
                self.incomplete, "w", driver="GTiff", height=window[2], width=window[3], count=count, dtype=dtype,
                transform=rasterio.Affine.scale(2),  # any one: without it rasterio warns each time
                tiled=True, blockxsize=_TILE, blockysize=_TILE, compress="deflate", zlevel=1, bigtiff="IF_SAFER",
                predictor=3 if dtype.kind == "f" else 1, interleave="pixel",
            )  # fmt: skip
        self.rows = np.zeros((count, 0, window[3]), dtype)
        self.row = 0
        self.digests: list[str] = []

    def add(self, array: np.ndarray) -> None:
        """Take rows, and write those that fill tiles."""
        self.rows = np.concatenate([self.rows, array], axis=1)
        while self.rows.shape[1] >= _TILE:
            self._write(_TILE)

    def _write(self, number: int) -> None:
        values, self.rows = np.ascontiguousarray(self.rows[:, :number]), self.rows[:, number:]
        with explain_failed_write(self.path):
            self.file.write(values, window=((self.row, self.row + number), (0, self.window[3])))
        self.digests.append(xxhash.xxh3_128_hexdigest(values.tobytes()))
        self.row += number

    def finish(self) -> dict[str, Any]:
        """Close the file, see that it is whole, and give it its name."""
        if self.rows.shape[1]:
            self._write(self.rows.shape[1])
        rasterio = require_rasterio()
        with explain_failed_write(self.path):
            self.file.close()
            with rasterio.open(self.incomplete) as file:
                for number, digest in enumerate(self.digests):
                    rows = (number * _TILE, min((number + 1) * _TILE, self.window[2]))
                    if xxhash.xxh3_128_hexdigest(file.read(window=(rows, (0, self.window[3]))).tobytes()) != digest:
                        raise OSError(f"{self.incomplete} does not hold what was written to it. Is the disk full?")
            with self.incomplete.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(self.incomplete, self.path)
        return _described(self.path, self.window)

    def discard(self) -> None:
        """Remove what was not finished."""
        self.file.close()
        self.incomplete.unlink(missing_ok=True)


def _described(path: Path, window: Window) -> dict[str, Any]:
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "xxh3_128": checksum_of_file(path),
        "window": list(window),
    }


def _npy(array: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def shape_of(plan: Plan, product: str) -> tuple[int, int]:
    """Height and width of the raster of a product."""
    if plan.kind in ("scores", "vectors"):
        rows, columns = cells_of(plan)
        return len(rows), len(columns)
    if plan.kind == "tokens":
        return tokens_of(plan, plan.area)[2:]
    return plan.area[2], plan.area[3]


def open_folder(out: Path, made_of: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Make the folder of a map ready, or find what is there already.

    Args:
        out: the folder.
        made_of: see `Plan`.
        overwrite: delete what an earlier run left.

    Returns:
        The results that `run.json` holds, where the map is finished; None where there is something to do.

    Raises:
        ValueError: it holds a map of something else, named, or foreign files.
    """
    if overwrite:
        for name in (PARTS, "embeddings"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (RUN, *RESULTS, "scores.parquet"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        record = read_record(out / RUN, made_of)
    except ValueError as error:
        raise ValueError(f"{error} --overwrite deletes the map that is there.") from error
    if record is None:
        foreign = sorted(path.name for path in out.iterdir() if path.name != ".lock")
        if foreign:
            raise ValueError(
                f"{out} is not empty ({', '.join(foreign[:4])}), and no map was begun there. Give a new "
                "or an empty folder."
            )
        write_record(out / RUN, {**made_of, "results": None})
    elif (
        (results := record.get("results")) is not None
        and results["complete"]
        and all(
            (out / name).is_file() and (out / name).stat().st_size == size for name, size in results["files"].items()
        )
    ):
        return dict(results)
    parts = out / PARTS
    parts.mkdir(exist_ok=True)
    sweep_incomplete([parts / path.name.removeprefix(".").rsplit(".", 2)[0] for path in parts.glob(".*.incomplete")])
    return None
