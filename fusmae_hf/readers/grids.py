"""Pixels on a map: where a grid lies, which part of another one fills it, and how that is interpolated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusmae_hf.data.pairs import Place, problem_of_place

Window = tuple[int, int, int, int]
"""Row, column, height and width in pixels."""

SAME_GRID_TOLERANCE = 0.01
"""Two grids are the same where all corners agree within so many pixels."""

LEAST_SHARED = 0.1
"""Two extents that share less of the smaller one do not show one place."""

METRES_A_DEGREE = 111_195.0
"""Length of a degree on a meridian of a sphere of 6,371 km."""

_EDGE_POINTS = 21
"""Points along each edge of a window by which its place in another CRS is found: edges may be curved there."""


@dataclass(frozen=True)
class Grid:
    """Pixels on a map.

    Attributes:
        crs: `rasterio.crs.CRS`, or None.
        transform: (a, b, c, d, e, f) of the affine pixel-to-map transform in rasterio's order.
        height: number of rows.
        width: number of columns.
    """

    crs: Any
    transform: tuple[float, ...]
    height: int
    width: int

    def window(self, row: int, column: int, height: int, width: int) -> "Grid":
        """Part of the grid from the given pixel on; it may begin or end outside."""
        a, b, _, d, e, _ = self.transform
        x, y = self.to_map(column, row)
        return Grid(self.crs, (a, b, x, d, e, y), height, width)

    def place(self, window: Window | None, scene: str) -> Place:
        """Where a window of it, or the whole, lies; without a CRS in pixels of the scene."""
        row, column, height, width = window or (0, 0, self.height, self.width)
        if not self.crs:
            return Place(scene, None, (column, row, column + width, row + height))
        corners = [self.to_map(x, y) for x in (column, column + width) for y in (row, row + height)]
        (left, right), (bottom, top) = ((min(ends), max(ends)) for ends in zip(*corners, strict=True))
        return Place(scene, self.crs.to_string(), (left, bottom, right, top))

    def at_resolution(self, resolution: float) -> "Grid":
        """Grid of other pixels from the same upper left corner on, as many as fit.

        Args:
            resolution: size of a pixel in units of the CRS.

        Raises:
            ValueError: not even one fits.
        """
        pixel_width, pixel_height = self.pixel_size()
        height = math.floor(self.height * pixel_height / resolution + SAME_GRID_TOLERANCE)
        width = math.floor(self.width * pixel_width / resolution + SAME_GRID_TOLERANCE)
        if min(height, width) < 1:
            raise ValueError(f"pixels of {resolution:g} are larger than the whole of it: {self}")
        across, down = resolution / pixel_width, resolution / pixel_height
        a, b, c, d, e, f = self.transform
        return Grid(self.crs, (a * across, b * down, c, d * across, e * down, f), height, width)

    def pixel_size(self) -> tuple[float, float]:
        """Width and height of a pixel in units of the CRS."""
        a, b, _, d, e, _ = self.transform
        return math.hypot(a, d), math.hypot(b, e)

    def pixel_metres(self) -> float | None:
        """Side of a pixel in metres, of those in degrees from south to north; None without a CRS."""
        if self.crs is None:
            return None
        metres = METRES_A_DEGREE if self.crs.is_geographic else self.crs.linear_units_factor[1]
        return float(f"{self.pixel_size()[1] * metres:.4g}")

    def problem(self) -> str:
        """What is impossible about its place; empty where nothing is, and without a CRS."""
        if self.crs is None:
            return ""
        name = self.crs.to_string()
        return problem_of_place(name, self.transform, self.height, self.width, bool(self.crs.is_geographic))

    def to_map(self, columns: Any, rows: Any) -> tuple[Any, Any]:
        """Map coordinates (x, y) of positions in pixels from the upper left corner; numbers or arrays."""
        a, b, c, d, e, f = self.transform
        return a * columns + b * rows + c, d * columns + e * rows + f

    def to_pixels(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Positions (columns, rows) in pixels from the upper left corner; numbers or arrays."""
        a, b, c, d, e, f = self.transform
        area = a * e - b * d
        return (e * (x - c) - b * (y - f)) / area, (a * (y - f) - d * (x - c)) / area

    def same_as(self, other: "Grid") -> bool:
        """Whether size and CRS are equal and all corners agree within `SAME_GRID_TOLERANCE` pixels."""
        if (self.height, self.width, self.crs) != (other.height, other.width, other.crs):
            return False
        if self.transform == other.transform:
            return True
        columns, rows = np.array([0, self.width, 0, self.width]), np.array([0, 0, self.height, self.height])
        there = self.to_pixels(*other.to_map(columns, rows))
        return float(np.abs(np.subtract(there, (columns, rows))).max()) <= SAME_GRID_TOLERANCE

    def __str__(self) -> str:
        pixel_width, pixel_height = self.pixel_size()
        return (
            f"{self.height}x{self.width} px of {pixel_height:.10g} x {pixel_width:.10g} from "
            f"({self.transform[2]:.10g}, {self.transform[5]:.10g}) in {self.crs.to_string() if self.crs else 'no CRS'}"
        )


def _edges_seen_from(source: Grid, target: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Positions (columns, rows) in pixels of `source` of points along the upper, lower, left, right edge of `target`.

    Not finite where the CRS of the source is not defined.
    """
    from rasterio.warp import transform

    along = np.linspace(0, 1, _EDGE_POINTS)
    zeros, ones = np.zeros_like(along), np.ones_like(along)
    columns = np.concatenate([along, along, zeros, ones]) * target.width
    rows = np.concatenate([zeros, ones, along, along]) * target.height
    x, y = target.to_map(columns, rows)
    if source.crs != target.crs:
        x, y = (np.asarray(values) for values in transform(target.crs, source.crs, x, y))
    return source.to_pixels(x, y)


def problem_between(one: Grid, other: Grid, most_times: float) -> str:
    """Why two grids, both with a CRS, cannot show one place; empty where they may.

    Args:
        one: a grid.
        other: a grid.
        most_times: by how much the finest side of a pixel may differ.
    """
    columns, rows = _edges_seen_from(one, other)
    if not np.isfinite([columns, rows]).all():
        return "lie in places of which one is not defined in the CRS of the other"
    lengths = np.hypot(np.diff(columns), np.diff(rows))
    upper, left = lengths[: _EDGE_POINTS - 1].sum(), lengths[2 * _EDGE_POINTS : 3 * _EDGE_POINTS - 1].sum()
    times = min(upper / other.width, left / other.height)
    if not 1 / most_times <= times <= most_times:
        return (
            f"have pixels that differ {max(times, 1 / times):.3g} times in size, more than {most_times:g}: is it one "
            "product? `--max-pixel-ratio` (max_pixel_ratio) allows more"
        )
    shared, area = 1.0, (columns.max() - columns.min()) * (rows.max() - rows.min())
    for positions, size in ((columns, one.width), (rows, one.height)):
        shared *= max(0.0, min(positions.max(), size) - max(positions.min(), 0))
    share = shared / min(area, one.width * one.height)
    return "" if share >= LEAST_SHARED else f"barely meet: they share {share:.1%} of the smaller one's area"


def source_window(source: Grid, target: Grid) -> Window | None:
    """Pixels of `source` needed to fill `target`, with a margin for interpolation; None where they do not overlap."""
    columns, rows = _edges_seen_from(source, target)
    if not np.isfinite(columns).all() or not np.isfinite(rows).all():
        return None  # the target lies where the CRS of the source is not defined
    bounds = []
    for positions, size, target_size in ((rows, source.height, target.height), (columns, source.width, target.width)):
        first, last = float(positions.min()), float(positions.max())
        if last <= 0 or first >= size:
            return None
        margin = 2 * math.ceil(max(1.0, (last - first) / target_size)) + 2
        bounds.append((max(0, math.floor(first) - margin), min(size, math.ceil(last) + margin)))
    (top, bottom), (left, right) = bounds
    return top, left, bottom - top, right - left


def integer_shift(source: Grid, target: Grid) -> tuple[int, int] | None:
    """Row and column of `source` at which the upper left pixel of `target` lies, where their pixels coincide.

    None where the CRS differ, or pixels of the two are more than `SAME_GRID_TOLERANCE` apart anywhere.
    """
    if source.crs != target.crs:
        return None
    columns, rows = np.array([0, target.width, 0, target.width]), np.array([0, 0, target.height, target.height])
    there = np.array(source.to_pixels(*target.to_map(columns, rows))) - (columns, rows)
    shift = np.rint(there[:, :1])
    if np.abs(there - shift).max() > SAME_GRID_TOLERANCE:
        return None
    return int(shift[1, 0]), int(shift[0, 0])


def scale_between(source: Grid, target: Grid) -> tuple[float, float]:
    """Pixels of `target` in one of `source` along columns and rows, at the centre of the target.

    GDAL would estimate this anew for each window, and resample neighbouring windows differently.
    """
    from rasterio.warp import transform

    middle = np.array([0.0, 1.0, 0.0]) + target.width // 2, np.array([0.0, 0.0, 1.0]) + target.height // 2
    x, y = target.to_map(*middle)
    if source.crs != target.crs:
        x, y = (np.asarray(values) for values in transform(target.crs, source.crs, x, y))
    columns, rows = source.to_pixels(x, y)
    lengths = np.hypot(columns[1:] - columns[0], rows[1:] - rows[0])
    across, down = (1.0 if not np.isfinite(length) or abs(length - 1) < 0.01 else 1 / length for length in lengths)
    return float(across), float(down)


def resample(
    read: Callable[[int, int, int, int], np.ndarray],
    source: Grid,
    target: Grid,
    resampling: str,
    scale: tuple[float, float] | None = None,
) -> np.ndarray:
    """Interpolate the part of a raster that fills a grid.

    Args:
        read: gives the pixels of the raster from (row, column) on, `(bands, height, width)` float, NaN without data.
        source: its grid.
        target: the grid to fill.
        resampling: `"nearest"` or `"bilinear"`, which averages where the target is coarser. Pixels without data have
            no weight; each band has its own.
        scale: of the whole, from `scale_between`, where `target` is a part of it; GDAL's own estimate by default.

    Returns:
        `(bands, height, width)` in the dtype of `read`, NaN where there is no data.
    """
    window = source_window(source, target)
    if window is None:
        values = read(0, 0, 1, 1)
        return np.full((len(values), target.height, target.width), np.nan, values.dtype)
    from affine import Affine
    from rasterio.enums import Resampling
    from rasterio.warp import reproject

    values = read(*window)
    filled = np.full((len(values), target.height, target.width), np.nan, values.dtype)
    # Band by band: given several at once, GDAL 3.10 spreads a NaN to all neighbours instead of giving it no weight.
    for band, result in zip(values, filled, strict=True):
        reproject(
            band,
            result,
            src_transform=Affine(*source.window(*window).transform),
            src_crs=source.crs,
            src_nodata=np.nan,
            dst_transform=Affine(*target.transform),
            dst_crs=target.crs,
            dst_nodata=np.nan,
            resampling=Resampling[resampling],
            **({} if scale is None else {"XSCALE": scale[0], "YSCALE": scale[1]}),
        )
    return filled
