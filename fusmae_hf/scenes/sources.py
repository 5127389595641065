"""The rasters of a scene, read onto the grid of its map, window by window."""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusmae_hf.errors import PairError
from fusmae_hf.readers.declarations import Stated
from fusmae_hf.readers.grids import Grid, Window, integer_shift, resample, scale_between
from fusmae_hf.readers.raster_files import Raster, open_raster
from fusmae_hf.readers.rasters import read_optical, read_sar

WARPED_SIDE = 256
"""Rasters on another grid are warped in squares of this side, whatever is read: the result does not depend on it."""

_KEPT_SQUARES = 64


@dataclass(frozen=True)
class SceneFiles:
    """The files of one sensor, or of a mask, and what is stated of them. It can be pickled.

    Attributes:
        paths: what rasterio opens, strings as they were given. One, or one a band with `{band}` in it; several are
            neighbouring tiles on one pixel grid. Where tiles overlap, the first with data counts.
        stated: what the user says of them.
    """

    paths: tuple[str, ...]
    stated: Stated

    def open(self, files: ExitStack) -> "Raster | Mosaic":
        """Open them until `files` is closed.

        Raises:
            PairError: a file is missing, or is not what is stated; or the files are no tiles of one grid.
        """
        opened = [open_raster(files, path, self.stated) for path in self.paths]
        for raster in opened:
            require_georeference(raster)
        return opened[0] if len(opened) == 1 else Mosaic(opened)


def require_georeference(raster: Raster) -> None:
    """Refuse a file of which nobody knows where it lies.

    Raises:
        PairError: it has no CRS, or pixels for coordinates; says whether it has ground control points.
    """
    for file in raster.files:
        grid = file.grid
        if grid.crs is not None and grid.transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0):
            continue
        points, _ = file.file.gcps
        advice = "Give a file that knows its place, such as a GeoTIFF."
        if points:
            advice = (
                f"It has {len(points)} ground control points instead, as Sentinel-1 GRD does: terrain-correct it "
                "first, with SNAP or pyroSAR, say; a map made of it now would be kilometres off."
            )
        raise PairError(f"{file.path}: has {'no CRS' if grid.crs is None else 'no georeference'}. {advice}")
    if problem := raster.grid.problem():
        raise PairError(f"{raster.path}: {problem}")


class Mosaic:
    """Tiles of one pixel grid, read as if they were one `Raster`."""

    def __init__(self, tiles: Sequence[Raster]):
        first = tiles[0]
        self.places = []
        for tile in tiles:
            shift = integer_shift(first.grid, tile.grid)
            if shift is None:
                raise PairError(
                    f"{tile.path} does not lie on the pixel grid of {first.path}: {tile.grid}, but {first.grid}. "
                    "Several files must be neighbouring tiles of one grid: warp one (`gdalwarp -tap`), or map them "
                    "one by one."
                )
            if (tile.names, tile.dtype) != (first.names, first.dtype):
                raise PairError(
                    f"{tile.path} has the bands {list(tile.names)} in {tile.dtype}, but {first.path} "
                    f"{list(first.names)} in {first.dtype}. Tiles must be alike; for one file a band write {{band}}."
                )
            self.places.append((*shift, tile))
        top, left = min(row for row, _, _ in self.places), min(column for _, column, _ in self.places)
        bottom = max(row + tile.grid.height for row, _, tile in self.places)
        right = max(column + tile.grid.width for _, column, tile in self.places)
        self.places = [(row - top, column - left, tile) for row, column, tile in self.places]
        self.grid = first.grid.window(top, left, bottom - top, right - left)
        self.path, self.names, self.dtype, self.kind = first.path, first.names, first.dtype, first.kind
        self.may_lack_data, self.no_data = True, first.no_data
        self.implied_offset = first.implied_offset
        if any(tile.implied_offset != first.implied_offset for tile in tiles):
            raise PairError(f"{first.path} and its neighbours imply different optical offsets by their tags.")

    def read(self, row: int, column: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Raster.read`."""
        values = np.zeros((len(self.names), height, width), self.dtype)
        missing = np.ones(values.shape, bool)
        for first_row, first_column, tile in self.places:
            top, left = max(row, first_row), max(column, first_column)
            bottom = min(row + height, first_row + tile.grid.height)
            right = min(column + width, first_column + tile.grid.width)
            if top >= bottom or left >= right:
                continue
            place = np.s_[:, top - row : bottom - row, left - column : right - column]
            if not missing[place].any():
                continue
            of_tile, without = tile.read(top - first_row, left - first_column, bottom - top, right - left)
            fill = missing[place].copy() if without is None else missing[place] & ~without
            if of_tile.dtype.kind == "f":
                fill &= np.isfinite(of_tile)
            if self.kind == "optical":
                fill &= (of_tile != 0).any(axis=0)
            values[place][fill] = of_tile[fill]
            missing[place] &= ~fill
        return values, missing


@dataclass
class _Opened:
    """A raster, its place on the grid of the map, and the squares of it that were warped last."""

    raster: Any
    shift: tuple[int, int] | None
    scale: tuple[float, float] | None
    squares: OrderedDict[tuple[int, int], np.ndarray] = field(default_factory=OrderedDict)


class SceneReader:
    """Reads a scene onto one grid. Files are opened by each thread and each process for itself.

    Args:
        files: by sensor, `"optical"` and `"sar"`, or one of them.
        grid: of the map.
        resampling: `"bilinear"`, which averages where the grid is coarser, or `"nearest"`.
        mask: raster that says where optical pixels are of no use, with clouds, say.
        mask_values: its values there; all but 0 where there are none.
    """

    def __init__(
        self,
        files: dict[str, SceneFiles],
        grid: Grid,
        resampling: str = "bilinear",
        mask: SceneFiles | None = None,
        mask_values: Sequence[int] = (),
    ):
        self.files, self.grid, self.resampling = files, grid, resampling
        self.mask, self.mask_values = mask, tuple(mask_values)
        self._kept = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kept = threading.local()

    def read(self, row: int, column: int, height: int, width: int) -> dict[str, np.ndarray]:
        """Pixels of a window, which may reach beyond the grid.

        Returns:
            By sensor `(bands, height, width)`: SAR as floats, NaN without data; optical in the dtype of the files, 0
            in all bands without data, and where the mask says so.

        Raises:
            PairError: a file is damaged, or has vanished.
        """
        opened = self._open()
        images = {sensor: self._filled(sensor, opened[sensor], row, column, height, width) for sensor in self.files}
        if self.mask is not None and "optical" in images:
            codes = self._filled("mask", opened["mask"], row, column, height, width)[0]
            hidden = np.isin(codes, self.mask_values) if self.mask_values else (codes != 0) & np.isfinite(codes)
            images["optical"][:, hidden] = 0
        return images

    def _open(self) -> dict[str, _Opened]:
        if getattr(self._kept, "process", None) != os.getpid():
            files, opened = ExitStack(), {}
            named = {**self.files, **({} if self.mask is None else {"mask": self.mask})}
            for name, of_name in named.items():
                raster = of_name.open(files)
                shift = integer_shift(raster.grid, self.grid)
                scale = scale_between(raster.grid, self.grid) if shift is None else None
                opened[name] = _Opened(raster, shift, scale)
            self._kept.files, self._kept.opened, self._kept.process = files, opened, os.getpid()
        result: dict[str, _Opened] = self._kept.opened
        return result

    def _filled(self, name: str, opened: _Opened, row: int, column: int, height: int, width: int) -> np.ndarray:
        """The part of a window inside of the grid, and no data around it."""
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + height, self.grid.height), min(column + width, self.grid.width)
        read = self._shifted if opened.shift is not None else self._warped
        inside = (top, left, max(bottom - top, 0), max(right - left, 0))
        if inside == (row, column, height, width):
            return read(name, opened, inside)
        empty = 0 if name == "optical" else np.nan
        if not inside[2] or not inside[3]:
            one = self._part(name, opened, (0, 0, 1, 1))
            return np.full((len(one), height, width), empty, one.dtype)
        values = read(name, opened, inside)
        filled = np.full((len(values), height, width), empty, values.dtype)
        filled[:, top - row : bottom - row, left - column : right - column] = values
        return filled

    def _shifted(self, name: str, opened: _Opened, window: Window) -> np.ndarray:
        """Pixels of a raster on the same pixel grid, with no data where it does not reach."""
        assert opened.shift is not None
        row, column, height, width = window
        row, column = row + opened.shift[0], column + opened.shift[1]
        grid = opened.raster.grid
        top, left = max(row, 0), max(column, 0)
        bottom, right = min(row + height, grid.height), min(column + width, grid.width)
        if top >= bottom or left >= right:
            one = self._part(name, opened, (0, 0, 1, 1))
            return np.full((len(one), height, width), 0 if name == "optical" else np.nan, one.dtype)
        values = self._part(name, opened, (top, left, bottom - top, right - left))
        if values.shape[1:] == (height, width):
            return values
        filled = np.full((len(values), height, width), 0 if name == "optical" else np.nan, values.dtype)
        filled[:, top - row : bottom - row, left - column : right - column] = values
        return filled

    def _part(self, name: str, opened: _Opened, window: Window) -> np.ndarray:
        """Pixels of a raster on its own grid."""
        raster = opened.raster
        if name == "optical":
            return read_optical(raster, raster.grid, window, resampling=self.resampling)
        if name == "sar":
            return read_sar(raster, raster.grid, window, units=self.files["sar"].stated.units, resampling=None)
        return _codes(raster)(*window)

    def _warped(self, name: str, opened: _Opened, window: Window) -> np.ndarray:
        """Pixels of a raster on another grid, out of squares that are warped whole."""
        row, column, height, width = window
        parts: np.ndarray | None = None
        first_row, first_column = row // WARPED_SIDE, column // WARPED_SIDE
        squares = math.ceil((row + height) / WARPED_SIDE) - first_row
        across = math.ceil((column + width) / WARPED_SIDE) - first_column
        for down in range(squares):
            for along in range(across):
                place = (first_row + down, first_column + along)
                square = self._square(name, opened, place, 2 * across + _KEPT_SQUARES)
                if parts is None:
                    parts = np.empty((len(square), squares * WARPED_SIDE, across * WARPED_SIDE), square.dtype)
                top, left = down * WARPED_SIDE, along * WARPED_SIDE
                parts[:, top : top + WARPED_SIDE, left : left + WARPED_SIDE] = square
        assert parts is not None
        top, left = row - first_row * WARPED_SIDE, column - first_column * WARPED_SIDE
        return parts[:, top : top + height, left : left + width].copy()

    def _square(self, name: str, opened: _Opened, place: tuple[int, int], kept: int) -> np.ndarray:
        squares = opened.squares
        if place in squares:
            squares.move_to_end(place)
            return squares[place]
        raster, sides = opened.raster, (WARPED_SIDE, WARPED_SIDE)
        window = (place[0] * WARPED_SIDE, place[1] * WARPED_SIDE, *sides)
        if name == "optical":
            square = read_optical(raster, self.grid, window, resampling=self.resampling)
        elif name == "sar":
            units = self.files["sar"].stated.units
            square = read_sar(raster, self.grid, window, units=units, resampling=self.resampling)
        else:
            square = resample(_codes(raster), raster.grid, self.grid.window(*window), "nearest", opened.scale)
        squares[place] = square
        while len(squares) > kept:
            squares.popitem(last=False)
        return square


def _codes(raster: Any) -> Callable[[int, int, int, int], np.ndarray]:
    """Reads the classes of a mask as floats, NaN where it says nothing."""

    def read(*window: int) -> np.ndarray:
        values, missing = raster.read(*window)
        values = values.astype(np.float64)
        if missing is not None:
            values[missing] = np.nan
        return values

    return read
