"""Which grid a map is made on, and which part of it is wanted."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusmae_hf.errors import PairError
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.grids import Grid, Window, integer_shift, source_window
from fusmae_hf.readers.rasters import require_one_place

MOST_TIMES = 20.0
"""By how much the pixels of two sensors may differ in size."""

_EDGE = 0.01
"""A border that reaches so little of a pixel into the next one does not take it in."""


def grid_of_map(rasters: Mapping[str, Any], target: str | None, crs: str | None, resolution: float | None) -> Grid:
    """The grid on which a map is made.

    Args:
        rasters: of the scene, by sensor.
        target: `"optical"`, `"sar"` or a file; the optical scene by default, or the SAR scene where it is alone.
        crs: another CRS, in which pixels start at multiples of their size.
        resolution: another size of pixels, in units of the CRS.

    Raises:
        PairError: the sensors show different places, or one of them lies outside of the grid.
        ValueError: grids differ although nothing was said of the target, or what was said gives no grid.
    """
    if len(rasters) == 2:
        require_one_place(dict(rasters), MOST_TIMES)
    chosen = target or ("optical" if "optical" in rasters else "sar")
    if chosen in ("optical", "sar"):
        if chosen not in rasters:
            raise ValueError(f"--target is {chosen}, but no such scene was given (`--{chosen}`).")
        grid: Grid = rasters[chosen].grid
    else:
        grid = _grid_of_file(chosen)
    if crs is not None:
        grid = _in_crs(grid, crs, resolution)
    elif resolution is not None:
        grid = grid.at_resolution(resolution)
    for sensor, raster in rasters.items():
        if source_window(raster.grid, grid) is None:
            raise PairError(f"The {sensor} scene {raster.path} lies outside of the map: {raster.grid}; map: {grid}.")
        if (target, crs, resolution) == (None, None, None) and integer_shift(raster.grid, grid) is None:
            raise ValueError(
                f"The scenes lie on different grids: {sensor} {raster.grid}; {chosen} {grid}. Say on which one the "
                "map shall be: --target optical, --target sar or --target FILE; the other one is resampled."
            )
    return grid


def _grid_of_file(path: str) -> Grid:
    rasterio = require_rasterio()
    try:
        with rasterio.open(path) as file:
            grid = Grid(file.crs, tuple(file.transform)[:6], file.height, file.width)
    except rasterio.errors.RasterioError as error:
        raise ValueError(
            f"--target {path} is neither optical nor sar, nor a raster that can be read: {error}"
        ) from error
    if grid.crs is None:
        raise ValueError(f"--target {path} has no CRS, so it cannot be the grid of a map.")
    return grid


def _in_crs(grid: Grid, name: str, resolution: float | None) -> Grid:
    """North-up grid that holds another one, with pixels at multiples of their size."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        crs = CRS.from_user_input(name)
    except CRSError as error:
        raise ValueError(f"--crs {name} is no CRS ({error}). Give one such as EPSG:32632.") from error
    if resolution is None:
        if crs.is_geographic != grid.crs.is_geographic or (
            not crs.is_geographic and crs.linear_units_factor != grid.crs.linear_units_factor
        ):
            raise ValueError(f"--crs {name} has other units than {grid.crs.to_string()}: give --resolution in them.")
        resolution = max(grid.pixel_size())
    left, bottom, right, top = bounds_in(grid, crs)
    column, row = math.floor(left / resolution + _EDGE), math.floor(-top / resolution + _EDGE)
    width = math.ceil(right / resolution - _EDGE) - column
    height = math.ceil(-bottom / resolution - _EDGE) - row
    return Grid(crs, (resolution, 0.0, column * resolution, 0.0, -resolution, -row * resolution), height, width)


def bounds_in(grid: Grid, crs: Any) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a grid in a CRS.

    Raises:
        ValueError: it lies where that CRS is not defined.
    """
    from rasterio.warp import transform

    along = np.linspace(0, 1, 33)
    nothing, all_of_it = np.zeros(33), np.ones(33)
    columns = np.concatenate([along, along, nothing, all_of_it]) * grid.width
    rows = np.concatenate([nothing, all_of_it, along, along]) * grid.height
    x, y = grid.to_map(columns, rows)
    if crs != grid.crs:
        x, y = (np.asarray(values) for values in transform(grid.crs, crs, x, y))
    if not np.isfinite([x, y]).all():
        raise ValueError(f"{grid} lies where {crs.to_string()} is not defined.")
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def area_of_map(
    grid: Grid, area: str | None, bounds: Sequence[float] | None, bounds_crs: str | None
) -> tuple[Window, list[dict[str, Any]]]:
    """The part of a grid that is wanted.

    Args:
        grid: of the map.
        area: GeoJSON file of polygons.
        bounds: west, south, east, north instead.
        bounds_crs: in which they are; that of the grid by default.

    Returns:
        Window of the pixels that the area touches, and the polygons in the CRS of the grid, none where all pixels of
        the window are wanted.

    Raises:
        ValueError: the area cannot be read, or does not meet the grid.
        FileNotFoundError: the file is missing.
    """
    if area is not None and bounds is not None:
        raise ValueError("Give --area or --bounds, not both.")
    if area is None and bounds is None:
        return (0, 0, grid.height, grid.width), []
    from rasterio.crs import CRS
    from rasterio.warp import transform, transform_geom

    polygons: list[dict[str, Any]] = []
    if bounds is not None:
        west, south, east, north = bounds
        crs = CRS.from_user_input(bounds_crs) if bounds_crs else grid.crs
        if west >= east or south >= north:
            raise ValueError(f"--bounds are west, south, east, north, but {west} {south} {east} {north} were given.")
        along = np.linspace(0, 1, 33)
        x = np.concatenate([west + along * (east - west)] * 2 + [np.full(33, west), np.full(33, east)])
        y = np.concatenate([np.full(33, south), np.full(33, north)] + [south + along * (north - south)] * 2)
        if crs != grid.crs:
            x, y = (np.asarray(values) for values in transform(crs, grid.crs, x, y))
    else:
        assert area is not None
        found, crs = _polygons(Path(area))
        polygons = [transform_geom(crs, grid.crs, polygon) for polygon in found]
        points = np.array([point[:2] for polygon in polygons for ring in _rings(polygon) for point in ring])
        x, y = points[:, 0], points[:, 1]
    columns, rows = grid.to_pixels(x, y)
    if not np.isfinite([columns, rows]).all():
        raise ValueError(f"The area lies where {grid.crs.to_string()} is not defined.")
    top, left = (max(0, math.floor(places.min() + _EDGE)) for places in (rows, columns))
    bottom = min(grid.height, math.ceil(rows.max() - _EDGE))
    right = min(grid.width, math.ceil(columns.max() - _EDGE))
    if top >= bottom or left >= right:
        raise ValueError(
            f"The area (x {x.min():.10g} to {x.max():.10g}, y {y.min():.10g} to {y.max():.10g} in "
            f"{grid.crs.to_string()}) does not meet the scene: {grid}."
        )
    return (top, left, bottom - top, right - left), polygons


def _polygons(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """Polygons of a GeoJSON file, and their CRS: longitude and latitude, or what an old file states."""
    from rasterio.crs import CRS

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} for --area.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        features = content.get("features", [content])
        found = [feature.get("geometry", feature) for feature in features]
        flat = [part for each in found for part in each.get("geometries", [each])]
        stated = content.get("crs")
        crs = CRS.from_user_input(stated["properties"]["name"]) if stated else CRS.from_epsg(4326)
        polygons = [each for each in flat if each["type"] in ("Polygon", "MultiPolygon")]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no GeoJSON ({error!r}). Convert it: `ogr2ogr -t_srs OGC:CRS84 area.geojson {path}`."
        ) from error
    if not polygons:
        raise ValueError(f"{path} holds no polygon.")
    return polygons, crs


def _rings(polygon: Mapping[str, Any]) -> list[Any]:
    parts = [polygon["coordinates"]] if polygon["type"] == "Polygon" else polygon["coordinates"]
    return [ring for part in parts for ring in part]
