"""What a map will be, decided and checked before any window is computed."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from fusmae_hf import __version__
from fusmae_hf.embeddings.quantisation import VectorColumns
from fusmae_hf.errors import PairError
from fusmae_hf.readers.declarations import BAND_FIELD, Stated
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.grids import Window
from fusmae_hf.readers.listed_pairs import require_one_of
from fusmae_hf.scenes.lattice import Lattice, lattice_of
from fusmae_hf.scenes.models import SceneModel
from fusmae_hf.scenes.sources import SceneFiles, SceneReader
from fusmae_hf.scenes.target import area_of_map, grid_of_map
from fusmae_hf.vocabulary import OPTICAL_UNITS, SAR_UNITS

PRODUCTS = {
    "classes": ("classes", "probabilities", "confidence"),
    "values": ("values",),
    "scores": ("scores",),
    "tokens": ("embeddings",),
    "vectors": ("embeddings",),
}
"""What can be made of each kind of model, the first by default."""

QUICKLOOK_SIDE = 640
"""Longer side of a picture of the quicklook, in pixels."""

GDAL_CACHE_MB = 256

_GSD_TIMES = 1.25
_SAMPLED_WINDOWS = 16


@dataclass(frozen=True)
class MapOptions:
    """How a map is made. Everything has a default but the units of the scenes that are given.

    Attributes:
        what: `"classes"`, `"probabilities"`, `"confidence"` of a segmentation checkpoint, `"values"` of a regression
            map, `"scores"` of a classification checkpoint. The first that the checkpoint has, where empty.
        optical_bands, sar_bands: names of the bands of the files in their order; their descriptions by default.
        optical_units: `"dn"` (reflectance x 10,000), `"reflectance"` or `"raw"`.
        sar_units: `"db"`, `"linear"` (power) or `"raw"`.
        optical_offset: what was added to every optical value, in digital numbers; must be said of `"dn"`, unless tags
            of the files do.
        optical_no_data, sar_no_data: value without data, where the files do not say it.
        target: grid of the map: `"optical"`, `"sar"` or a raster file; needed where the scenes' grids differ.
        crs, resolution: another CRS, or size of pixels in its units.
        resampling: `"bilinear"`, which averages where the target is coarser, or `"nearest"`.
        area: GeoJSON file of polygons outside of which nothing is mapped.
        bounds, bounds_crs: west, south, east, north instead; in the CRS of the map by default.
        optical_mask, optical_mask_values: raster, and its values where optical pixels are not used (default: all
            but 0).
        overlap: of windows in pixels, a multiple of the patch; about half a window by default.
        batch_size: windows that the model sees at once.
        tta: `"d4"`: the mean over the eight symmetries of each window; `"none"`.
        probability_dtype: `"float32"`, or `"uint8"` in steps of 1/254.
        any_resolution: map scenes whose pixels are of another size than those the checkpoint knows.
        on_error: `"stop"`, or `"skip"`: what touches pixels that cannot be read is no data and is counted.
        num_workers: threads that read.
        device: such as `"cuda"`; a GPU where there is one by default.
        overwrite: delete what an earlier run left in the folder.
        engine, ray_address: `"ray"`: the nodes of that Ray cluster, or a local one, compute; each must see all files.
        embedding_unit: `"patch"`: a vector for each token of the patch grid; `"window"`: one for each window.
        embedding_sensors: `"fused"`, of all sensors that are there, `"sar"`, `"optical"`: a column for each.
        embedding_dtype: uint8 takes scale and offset of each dimension that were measured for the checkpoint.
        optical_time, sar_time: when the scenes were taken, in ISO 8601, to be noted in tables.
    """

    what: Sequence[str] = ()
    optical_bands: Sequence[str] = ()
    optical_units: Literal["dn", "reflectance", "raw"] | None = None
    optical_offset: float | None = None
    optical_no_data: float | None = None
    sar_bands: Sequence[str] = ()
    sar_units: Literal["db", "linear", "raw"] | None = None
    sar_no_data: float | None = None
    target: str | None = None
    crs: str | None = None
    resolution: float | None = None
    resampling: Literal["bilinear", "nearest"] = "bilinear"
    area: str | None = None
    bounds: Sequence[float] | None = None
    bounds_crs: str | None = None
    optical_mask: str | None = None
    optical_mask_values: Sequence[int] = ()
    overlap: int | None = None
    batch_size: int = 8
    tta: Literal["none", "d4"] = "none"
    probability_dtype: Literal["float32", "uint8"] = "float32"
    any_resolution: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    num_workers: int = 2
    device: str | None = None
    overwrite: bool = False
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    embedding_unit: Literal["patch", "window"] = "patch"
    embedding_sensors: Sequence[str] = ("fused",)
    embedding_dtype: Literal["float32", "float16", "uint8"] = "float32"
    optical_time: str | None = None
    sar_time: str | None = None

    def __post_init__(self) -> None:
        choices = ("tta", "probability_dtype", "on_error", "resampling", "embedding_unit", "embedding_dtype", "engine")
        for name in choices:
            require_one_of(name, getattr(self, name), get_args(get_type_hints(MapOptions)[name]))
        for name in ("batch_size", "num_workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.ray_address is not None and self.engine == "local":
            raise ValueError("ray_address is given, but engine is 'local': give --engine ray (engine='ray') as well.")


@dataclass(frozen=True)
class Plan:
    """Everything that decides a map; it can be pickled and sent to another process, which has the model.

    Rows and columns are those of the whole grid, `reader.grid`, also where an area is a part of it.

    Attributes:
        what: products to make.
        kind, labels: of the model.
        reader: reads the scene onto the grid.
        declared: keywords for the processor: bands, units, offset.
        area: window of the grid that is mapped.
        polygons: in the CRS of the grid; pixels outside are no data. Empty: all of `area`.
        lattice: of windows.
        block_side: side of a block in pixels.
        batch_size, symmetries, probability_dtype, on_error: see `MapOptions`.
        num_bands: of all files.
        shown: places of red, green and blue, or of one band, among the optical bands of the model: for the quicklook.
        made_of: what a result must have been made of to go on with it, by name.
        vectors: how embeddings or scores are written as a table; None of other products.
    """

    what: tuple[str, ...]
    kind: str
    labels: tuple[str, ...]
    reader: SceneReader
    declared: dict[str, Any]
    area: Window
    polygons: list[dict[str, Any]]
    lattice: Lattice
    block_side: int
    batch_size: int
    symmetries: bool
    probability_dtype: str
    on_error: str
    num_bands: int
    shown: tuple[int, ...]
    made_of: dict[str, Any] = field(default_factory=dict)
    vectors: VectorColumns | None = None

    def blocks(self) -> list[Window]:
        """Parts of the area, row by row, each computed and written by itself."""
        top, left, height, width = self.area
        side = self.block_side
        return [
            (row, column, min(side, top + height - row), min(side, left + width - column))
            for row in range(top, top + height, side)
            for column in range(left, left + width, side)
        ]

    def with_block_side(self, side: int) -> "Plan":
        """The same map cut into other blocks: no pixel changes."""
        return replace(self, block_side=side)

    def windows_of(self, area: Window) -> tuple[list[int], list[int]]:
        """First rows and first columns of the windows that hold a pixel of a part of the grid."""
        row, column, height, width = area
        return self.lattice.rows(row, row + height), self.lattice.columns(column, column + width)

    def number_of_windows(self) -> int:
        """Windows that hold a pixel of the area, whether there is data or not."""
        rows, columns = self.windows_of(self.area)
        return len(rows) * len(columns)

    def quicklook_step(self) -> int:
        """Every so many rows and columns are in the quicklook."""
        return max(1, math.ceil(max(self.area[2:]) / QUICKLOOK_SIDE))

    def memory_bytes(self, num_workers: int = 2) -> int:
        """Memory that a process needs beside its libraries, the model and what the model needs for a batch."""
        lattice, labels = self.lattice, len(self.labels)
        width = min(self.block_side, self.area[3]) + 2 * lattice.width
        inputs = 4 * self.num_bands + len(self.reader.files)
        rows = 2 * lattice.height + 3 * (num_workers + 1) * lattice.stride[0]
        sums = 4 * labels * width * (3 * lattice.height + 2 * 256)
        waiting = 4 * 6 * self.batch_size * lattice.height * lattice.width * (labels + inputs // 4)
        warped = 256 * 256 * 4 * self.num_bands * (64 + 2 * width // 256)
        return inputs * width * rows + sums + waiting + warped * (num_workers + 1) + GDAL_CACHE_MB * 2**20

    def disk_bytes(self) -> int:
        """What the results take at most, uncompressed: parts, and the files made of them."""
        pixels = self.area[2] * self.area[3]
        bytes_a_pixel = {
            "classes": 1 if len(self.labels) <= 255 else 2,
            "probabilities": len(self.labels) * (4 if self.probability_dtype == "float32" else 1),
            "confidence": 8,
            "values": 4 * len(self.labels),
            "embeddings": 4 * len(self.labels) / self.lattice.patch**2,
        }
        return int(2 * pixels * sum(bytes_a_pixel.get(product, 0) for product in self.what))

    def __str__(self) -> str:
        lattice = self.lattice
        row, column, height, width = self.area
        part = "" if (height, width) == (self.reader.grid.height, self.reader.grid.width) else (
            f", of which {height}x{width} px from row {row} and column {column} on"
        )  # fmt: skip
        return (
            f"Map of {', '.join(self.what)} on {self.reader.grid}{part}.\n"
            f"Windows of {lattice.height}x{lattice.width} px, overlapping by {lattice.overlap} px: "
            f"{self.number_of_windows():,}. Blocks of {self.block_side} px: {len(self.blocks()):,}."
        )


def make_plan(
    model: SceneModel,
    optical: Sequence[str],
    sar: Sequence[str],
    options: MapOptions,
    look: bool = True,
) -> Plan:
    """Decide and check everything about a map.

    Args:
        model: that predicts.
        optical: files of the optical scene, none where it is missing.
        sar: files of the SAR scene.
        options: see there.
        look: judge from some windows whether the values are what is declared.

    Raises:
        PairError: a file is missing, damaged, or not what is stated of it; or scenes lie in different places.
        ValueError: options contradict each other, the checkpoint or the files; values cannot be what is declared.
    """
    files = _files(optical, sar, options)
    what = _products(model, options.what)
    mask = None
    if options.optical_mask is not None:
        if "optical" not in files:
            raise ValueError("--optical-mask is given, but no optical scene.")
        mask = SceneFiles((options.optical_mask,), Stated("label_map"))
    require_rasterio()
    with ExitStack() as opened:
        rasters: dict[str, Any] = {sensor: of_sensor.open(opened) for sensor, of_sensor in files.items()}
        masks = {} if mask is None else {"mask": mask.open(opened)}
        grid = grid_of_map(rasters, options.target, options.crs, options.resolution)
        declared = _declared(rasters, files)
        identities = [_identity(raster) for raster in (*rasters.values(), *masks.values())]
        num_bands = sum(len(raster.names) for raster in rasters.values())
    _require_gsd(model, grid, options.any_resolution)
    area, polygons = area_of_map(grid, options.area, options.bounds, options.bounds_crs)
    lattice = lattice_of(grid, model.window, model.patch, options.overlap)
    batch_size = 1 if lattice.single else options.batch_size
    reader = SceneReader(files, grid, options.resampling, mask, options.optical_mask_values)
    made_of = {
        "version": __version__,
        "checkpoint": model.name,
        "content_hash": model.content_hash,
        "what": list(what),
        "optical": list(optical),
        "sar": list(sar),
        "files": identities,
        "stated": {sensor: _plain(asdict(of_sensor.stated)) for sensor, of_sensor in files.items()},
        "grid": [grid.crs.to_wkt(), list(grid.transform), grid.height, grid.width],
        "area": list(area),
        "polygons": _plain(polygons),
        "resampling": options.resampling,
        "optical_mask": options.optical_mask,
        "optical_mask_values": list(options.optical_mask_values),
        "window": [lattice.height, lattice.width],
        "overlap": lattice.overlap,
        "batch_size": batch_size,
        "tta": options.tta,
        "probability_dtype": options.probability_dtype,
        "device": model.device.partition(":")[0],
    }
    vectors = _vectors(model, options)
    if vectors is not None:
        made_of["vectors"] = [model.kind, vectors.to_json()]
    plan = Plan(
        what, model.kind, model.labels, reader, declared, area, polygons, lattice, lattice.block_side(), batch_size,
        options.tta == "d4", options.probability_dtype, options.on_error, num_bands, _shown(model), made_of, vectors,
    )  # fmt: skip
    if look:
        _judge(plan, model)
    return plan


def _vectors(model: SceneModel, options: MapOptions) -> VectorColumns | None:
    if model.kind not in ("scores", "tokens", "vectors"):
        return None
    times = {"optical": options.optical_time, "sar": options.sar_time}
    if model.kind == "scores":
        return VectorColumns(("scores",), times=times)
    return VectorColumns(model.columns, options.embedding_dtype, model.quantisation, times)


def _shown(model: SceneModel) -> tuple[int, ...]:
    """Red, green and blue among the optical bands of a model, or what may stand for them."""
    bands = list(model.processor.optical_bands)
    if {"B04", "B03", "B02"} <= {*bands}:
        return bands.index("B04"), bands.index("B03"), bands.index("B02")
    return (2, 1, 0) if len(bands) > 2 else (0,)


def _plain(content: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, list | tuple) else content


def _files(optical: Sequence[str], sar: Sequence[str], options: MapOptions) -> dict[str, SceneFiles]:
    files = {}
    for sensor, paths, bands, units, allowed, no_data, offset in (
        ("optical", optical, options.optical_bands, options.optical_units, OPTICAL_UNITS, options.optical_no_data,
         options.optical_offset),
        ("sar", sar, options.sar_bands, options.sar_units, SAR_UNITS, options.sar_no_data, None),
    ):  # fmt: skip
        if not paths:
            continue
        if units not in allowed:
            raise ValueError(f"Say in which units the {sensor} scene is: --{sensor}-units {' or '.join(allowed)}.")
        if any(BAND_FIELD in path for path in paths) and not bands:
            raise ValueError(f"{paths[0]} is one file a band: say which ones, --{sensor}-bands A,B,C.")
        stated = Stated(sensor, bands, no_data=no_data, units=units, offset=offset, padded=sensor == "sar")
        files[sensor] = SceneFiles(tuple(map(str, paths)), stated)
    if not files:
        raise ValueError("Give a scene: --optical FILE, --sar FILE, or both.")
    return files


def _products(model: SceneModel, wanted: Sequence[str]) -> tuple[str, ...]:
    known = PRODUCTS[model.kind]
    what = tuple(dict.fromkeys(wanted)) or known[:1]
    if unknown := [name for name in what if name not in known]:
        raise ValueError(
            f"{model.name} gives {', '.join(known)}, but --what asks for {', '.join(unknown)}: name one of those, or "
            "take a checkpoint that was fine-tuned for it."
        )
    return what


def _declared(rasters: Mapping[str, Any], files: Mapping[str, SceneFiles]) -> dict[str, Any]:
    declared: dict[str, Any] = {}
    for sensor, raster in rasters.items():
        stated = files[sensor].stated
        declared[f"{sensor}_bands"], declared[f"{sensor}_units"] = list(raster.names), stated.units
        if sensor == "optical":
            offset = raster.implied_offset if stated.offset is None else stated.offset
            if offset is None and stated.units == "dn":
                raise ValueError(
                    f"Say what was added to the values of {raster.path}: --optical-offset 1000 for Sentinel-2 of "
                    "processing baseline 04.00 and later that still carries it, --optical-offset 0 for others."
                )
            declared["optical_offset"] = offset or 0.0
    return declared


def _identity(raster: Any) -> list[Any]:
    """Names, sizes and times of the files of a raster, and its headers."""
    found = []
    for part in [tile for _, _, tile in raster.places] if hasattr(raster, "places") else [raster]:
        for file in part.files:
            paths = [path for path in map(Path, file.file.files) if path.is_file()]
            stats = {path.name: {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns} for path in paths}
            found.append([str(file.path), stats, str(file.grid), list(file.file.dtypes)])
    return found


def _require_gsd(model: SceneModel, grid: Any, any_resolution: bool) -> None:
    metres = grid.pixel_metres()
    if model.gsd is None or any_resolution or metres is None:
        return
    if not 1 / _GSD_TIMES <= metres / model.gsd <= _GSD_TIMES:
        raise ValueError(
            f"The map has pixels of {metres:g} m, but {model.name} was trained on {model.gsd:g} m and does not know "
            "what things look like at another size. Resample with --resolution, or give --any-resolution."
        )


def _judge(plan: Plan, model: SceneModel) -> None:
    """Have the processor look at some windows, all together."""
    rows, columns = plan.windows_of(plan.area)
    places = [(row, column) for row in rows for column in columns]
    chosen = [places[index] for index in np.unique(np.linspace(0, len(places) - 1, _SAMPLED_WINDOWS).astype(int))]
    images: dict[str, list[np.ndarray]] = {}
    for row, column in chosen:
        try:
            found = plan.reader.read(row, column, plan.lattice.height, plan.lattice.width)
        except PairError:
            if plan.on_error == "stop":
                raise
            continue
        for sensor, image in found.items():
            if (image != 0).any() if sensor == "optical" else np.isfinite(image).any():
                images.setdefault(sensor, []).append(image)
    for sensor in plan.reader.files:
        side_by_side = np.concatenate(images[sensor], axis=2) if sensor in images else image_of_nothing(plan, sensor)
        declared = {name: value for name, value in plan.declared.items() if name.startswith(sensor)}
        model.normalised({sensor: side_by_side}, declared, look=True)


def image_of_nothing(plan: Plan, sensor: str) -> np.ndarray:
    """One pixel without data."""
    bands = len(plan.declared[f"{sensor}_bands"])
    return np.full((bands, 1, 1), 0 if sensor == "optical" else np.nan, np.float32)
