"""From scenes to maps: one scene or a table of them, on one machine."""

import csv
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusmae_hf.embeddings.quantisation import read_quantisation
from fusmae_hf.errors import USER_ERRORS
from fusmae_hf.files.finished import write_record
from fusmae_hf.hub.checkpoint_loading import newest_model
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.scenes.assembly import areas, assemble, draw_quicklook
from fusmae_hf.scenes.blocks import Counts
from fusmae_hf.scenes.models import SceneModel, load_embedding_model, load_scene_model
from fusmae_hf.scenes.parts import PARTS, RUN, finished_block, open_folder, shape_of, write_block, write_blocks_on_ray
from fusmae_hf.scenes.places import clipped_share, write_tables
from fusmae_hf.scenes.plan import GDAL_CACHE_MB, MapOptions, Plan, make_plan

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class MapResult:
    """A finished map.

    Attributes:
        folder: where it is.
        files: by product, and the quicklook.
        checksums: of each band of each product: GDAL's of whole numbers, xxh3_128 of others.
        areas_km2: true area of each class, where classes were made.
        windows: windows that the model saw, in this run.
        failed: windows that could not be predicted: what they touch is no data.
        no_data: share of the pixels, or of the cells of scores, without a result.
        error: why there is no map; then all else is empty.
        clipped: share of the numbers of embeddings in uint8 that lay outside of what these can say.
    """

    folder: Path
    files: dict[str, Path]
    checksums: dict[str, list[int | str]]
    areas_km2: dict[str, float]
    windows: int
    failed: int
    no_data: float
    error: str = ""
    clipped: float = 0.0

    def __str__(self) -> str:
        if self.error:
            return f"{self.folder}: no map. {self.error}"
        lines = [f"{self.folder}: {', '.join(path.name for path in self.files.values())}"]
        lines += [f"  {name:30} {area:12,.6g} km2" for name, area in self.areas_km2.items() if area]
        lines.append(f"  no data: {self.no_data:.1%}; windows predicted: {self.windows:,}")
        if self.clipped:
            lines.append(f"  clipped: {self.clipped:.3%} of the numbers of the embeddings")
        if self.failed:
            lines.append(
                f"  {self.failed:,} windows failed, and what they touch is no data: {RUN} says why. The same command "
                "tries them again."
            )
        return "\n".join(lines)


def map_scenes(
    checkpoint: str | os.PathLike[str] | SceneModel,
    out: str | os.PathLike[str],
    *,
    optical: Paths = (),
    sar: Paths = (),
    items: str | os.PathLike[str] | None = None,
    options: MapOptions | None = None,
    progress: bool = True,
) -> list[MapResult]:
    """Map a scene, or each scene of a table, with a checkpoint that was fine-tuned.

    Interrupted, the same call goes on with the blocks that are missing and ends with the same pixels.

    Args:
        checkpoint: a folder or a Hub id; or a `SceneModel` of one's own.
        out: folder of the map; with `items`, one in it for each id.
        optical: what rasterio opens: one file, one a band (`{band}` in it), or neighbouring tiles on one pixel grid,
            of which the first with data counts. None where the sensor is missing.
        sar: the same.
        items: CSV or Parquet file with the columns `id`, and `optical`, `sar` or both (several files separated by
            `;`), and if you like `optical_offset` and `optical_mask`. Local paths are relative to the table's folder.
        options: see `MapOptions`; units must be said.
        progress: whether to show a bar.

    Returns:
        A result for each scene, in order.

    Raises:
        PairError: a file is missing, damaged or not what is stated of it, or scenes lie in different places.
        ValueError: options contradict each other, the checkpoint, the files, or what is in `out`.
        OSError: something cannot be written, or another process writes into `out`.
        ImportError: rasterio or matplotlib are missing.
    """
    options = options or MapOptions()
    _limit_cache()
    model = _model(checkpoint, options)
    results = []
    for scene in scenes_of(out, optical, sar, items, options):
        try:
            results.append(_map_scene(checkpoint, model, scene, progress))
        except USER_ERRORS as error:
            if items is None or options.on_error == "stop":
                raise
            results.append(MapResult(scene.out, {}, {}, {}, 0, 0, 1.0, str(error)))
    return results


def _model(checkpoint: str | os.PathLike[str] | SceneModel, options: MapOptions) -> SceneModel:
    if isinstance(checkpoint, SceneModel):
        return checkpoint
    if "embeddings" not in options.what:
        return load_scene_model(checkpoint, options.device)
    if len(options.what) > 1:
        raise ValueError(
            f"--what is {', '.join(options.what)}, but embeddings are a run of their own, into another OUT."
        )
    sensors = options.embedding_sensors
    model = load_embedding_model(checkpoint, options.embedding_unit, sensors, options.device)
    if options.embedding_dtype != "uint8":
        return model
    weights, _, _ = model.content_hash.partition("-")
    ranges = read_quantisation(Path(newest_model(checkpoint)), weights, options.embedding_unit, list(sensors))
    return replace(model, quantisation=ranges)


def plan_scenes(
    checkpoint: str | os.PathLike[str] | SceneModel,
    out: str | os.PathLike[str],
    *,
    optical: Paths = (),
    sar: Paths = (),
    items: str | os.PathLike[str] | None = None,
    options: MapOptions | None = None,
) -> list[str]:
    """What `map_scenes` would do: a paragraph for each scene. Arguments and errors as there; nothing is written."""
    options = options or MapOptions()
    _limit_cache()
    model = _model(checkpoint, options)
    texts = []
    for scene in scenes_of(out, optical, sar, items, options):
        plan = make_plan(model, scene.optical, scene.sar, scene.options)
        seconds = plan.number_of_windows() * seconds_a_window(plan, model)
        texts.append(
            f"{scene.out}\n{plan}\nAbout {seconds / 3600:.2g} hours ({seconds:,.0f} s) if no window is without data; "
            f"up to {plan.memory_bytes(scene.options.num_workers) / 1e9:.2g} GB of memory beside the model; up to "
            f"{plan.disk_bytes() / 1e9:.2g} GB of disk, half of it while the map is made."
        )
    return texts


def seconds_a_window(plan: Plan, model: SceneModel) -> float:
    """Time that the model takes for a window, measured on noise."""
    height, width = plan.lattice.height, plan.lattice.width
    generator, images = np.random.default_rng(0), {}
    for sensor in plan.reader.files:
        shape = (len(plan.declared[f"{sensor}_bands"]), height, width)
        images[sensor] = generator.uniform(0.1, 1, shape).astype(np.float32)
    window = model.normalised(images, plan.declared)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.run([window] * plan.batch_size, plan.batch_size, plan.symmetries)
        times.append((time.perf_counter() - start) / plan.batch_size)
    return min(times)


@dataclass(frozen=True)
class Scene:
    """What is mapped, and where to."""

    out: Path
    optical: tuple[str, ...]
    sar: tuple[str, ...]
    options: MapOptions


def scenes_of(
    out: str | os.PathLike[str], optical: Paths, sar: Paths, items: str | os.PathLike[str] | None, options: MapOptions
) -> list[Scene]:
    """The scenes that are asked for: see `map_scenes`."""
    if "://" in str(out) or str(out).startswith("/vsi"):
        raise ValueError(f"OUT is {out}, but must be a folder of this machine, or one that it mounts.")
    if items is None:
        return [Scene(Path(out), _as_strings(optical), _as_strings(sar), options)]
    if optical or sar:
        raise ValueError("Give --items, or --optical and --sar, not both.")
    path = Path(items)
    rows = _table(path)
    scenes, seen = [], set()
    for row in rows:
        name = str(row.get("id") or "")
        if not name or name in seen or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{path}: the id {name!r} is empty, stands twice or is no name for a folder.")
        seen.add(name)
        changed: dict[str, Any] = {}
        if row.get("optical_offset") not in (None, ""):
            changed["optical_offset"] = float(row["optical_offset"])
        if row.get("optical_mask"):
            changed["optical_mask"] = _beside(path, str(row["optical_mask"]))
        sensors = {}
        for sensor in ("optical", "sar"):
            named = [part.strip() for part in str(row.get(sensor) or "").split(";")]
            sensors[sensor] = tuple(_beside(path, part) for part in named if part)
        scenes.append(Scene(Path(out) / name, sensors["optical"], sensors["sar"], replace(options, **changed)))
    if not scenes:
        raise ValueError(f"{path} holds no scene.")
    return scenes


def _as_strings(paths: Paths) -> tuple[str, ...]:
    return (os.fspath(paths),) if isinstance(paths, str | os.PathLike) else tuple(os.fspath(path) for path in paths)


def _table(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such table. Give a CSV or Parquet file with the columns id, optical, sar."
        )
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a table ({error}).") from error
    if rows and "id" not in rows[0]:
        raise ValueError(f"{path} lacks the column id; it has {list(rows[0])}.")
    return rows


def _beside(table: Path, path: str) -> str:
    """A path of a table: relative to its folder, unless it is absolute or GDAL's affair."""
    if "://" in path or path.startswith("/vsi") or os.path.isabs(path):
        return path
    return os.path.join(table.parent, path)


def _limit_cache() -> None:
    """Keep GDAL's cache of blocks small: by default each process takes a twentieth of the memory."""
    os.environ.setdefault("GDAL_CACHEMAX", str(GDAL_CACHE_MB))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder.

    Raises:
        OSError: another one is in it.
    """
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"Another process writes into {out}. Wait for it, or give another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _map_scene(
    checkpoint: str | os.PathLike[str] | SceneModel, model: SceneModel, scene: Scene, progress: bool
) -> MapResult:
    rasterio = require_rasterio()
    with rasterio.Env(GDAL_CACHEMAX=int(os.environ["GDAL_CACHEMAX"]) * 2**20):
        plan = make_plan(model, scene.optical, scene.sar, scene.options)
        if plan.vectors is not None:
            plan = replace(plan, vectors=replace(plan.vectors, scene=scene.out.name))
        with locked(scene.out):
            done = open_folder(scene.out, plan.made_of, scene.options.overwrite)
            if done is not None:
                return _result(scene.out, done, 0)
            _require_space(plan, scene.out)
            load = partial(_model, checkpoint, replace(scene.options, device=model.device))
            marks = run_blocks(plan, model, scene.out / PARTS, scene.options, load, progress)
            return finish(plan, scene.out, marks)


def _require_space(plan: Plan, out: Path) -> None:
    free, needed = shutil.disk_usage(out).free, plan.disk_bytes()
    if free < needed / 4:  # even if all of it compresses well
        raise OSError(
            f"{out} has {free / 1e9:.3g} GB free, but the map takes up to {needed / 1e9:.3g} GB while it is made. "
            "Free space, or give a folder on another disk."
        )


def run_blocks(
    plan: Plan,
    model: SceneModel,
    folder: Path,
    options: MapOptions,
    load: Callable[[], SceneModel],
    progress: bool = True,
) -> dict[int, dict[str, Any]]:
    """Compute the blocks that are missing, one after the other; threads read ahead and write.

    Args:
        plan: of the map.
        model: that predicts.
        folder: of the parts.
        options: engine and number of threads that read.
        load: gives the model on another machine.
        progress: whether to show a bar.

    Returns:
        The marks of all blocks, by number. `windows` in the counts of those that were there before is 0.
    """
    from tqdm import tqdm

    marks, missing = {}, []
    blocks = plan.blocks()
    for number in range(len(blocks)):
        mark = finished_block(plan, number, folder)
        if mark is None:
            missing.append(number)
        else:
            mark["counts"]["windows"] = 0
            marks[number] = mark
    numbers = {number: [len(side) for side in plan.windows_of(blocks[number])] for number in missing}
    total = sum(rows * columns for rows, columns in numbers.values())
    empty = 0
    with (
        ThreadPoolExecutor(options.num_workers) as readers,
        tqdm(total=total, unit=" windows", disable=not progress or not total) as bar,
    ):
        if options.engine == "ray" and missing:
            for number, mark in write_blocks_on_ray(plan, load, missing, folder, options.ray_address):
                marks[number] = mark
                bar.update(numbers[number][0] * numbers[number][1])
            missing = []
        for number in missing:
            before = bar.n

            def tell(counts: Counts, before: int = before, empty: int = empty) -> None:
                bar.set_postfix_str(f"{(empty + counts.empty) / max(1, bar.n):.0%} without data", refresh=False)
                bar.update(before + counts.windows + counts.empty - bar.n)

            marks[number] = write_block(plan, model, number, folder, readers, tell)
            empty += marks[number]["counts"]["empty"]
            bar.update(before + numbers[number][0] * numbers[number][1] - bar.n)
    return dict(sorted(marks.items()))


def finish(plan: Plan, out: Path, marks: dict[int, dict[str, Any]]) -> MapResult:
    """Put the files of a map together, once all blocks are finished, and delete the parts.

    Args:
        plan: of the map.
        out: its folder.
        marks: of all blocks, by number.

    Raises:
        OSError: a file cannot be written.
    """
    folder = out / PARTS
    rasters = [product for product in plan.what if product != "embeddings"]
    checksums = {product: assemble(plan, product, marks, folder, out / f"{product}.tif") for product in rasters}
    tables = write_tables(marks, folder, out, plan.what[0]) if plan.vectors else []
    draw_quicklook(plan, marks, folder, out / "quicklook.png")
    counts = [mark["counts"] for mark in marks.values()]
    failed = sum(of_block["failed"] for of_block in counts)
    cells = math.prod(shape_of(plan, plan.what[0]))
    names = [*(f"{product}.tif" for product in rasters), *tables, "quicklook.png"]
    results = {
        "complete": failed == 0,
        "files": {name: (out / name).stat().st_size for name in names},
        "checksums": checksums,
        "areas_km2": areas(plan, out / "classes.tif") if "classes" in plan.what else {},
        "windows": sum(of_block["windows"] for of_block in counts),
        "failed": failed,
        "errors": [error for of_block in counts for error in of_block["errors"]][:20],
        "clipped": clipped_share(marks),
        "no_data": 1 - sum(of_block["pixels"] for of_block in counts) / cells,
    }
    write_record(out / RUN, {**plan.made_of, "results": results})
    if not failed:
        shutil.rmtree(folder)
    return _result(out, results, results["windows"])


def _result(out: Path, results: dict[str, Any], windows: int) -> MapResult:
    return MapResult(
        out,
        {name.removesuffix(".tif").removesuffix(".png"): out / name for name in results["files"]},
        results["checksums"],
        results["areas_km2"],
        windows,
        results["failed"],
        results["no_data"],
        clipped=results.get("clipped", 0.0),
    )
