"""Windows of a scene on one lattice, and the weights with which their results are blended."""

import math
from dataclasses import dataclass

import numpy as np

from fusmae_hf.readers.grids import Grid

BLOCK_STRIDES = 48
"""About so many windows lie along a side of a block: those on its borders, computed twice, are then few."""

BLOCK_UNIT = 512
"""Blocks start and end at multiples of this, as the tiles of the files that are written do."""


@dataclass(frozen=True)
class Lattice:
    """Where windows start on a grid: every `stride` pixels, from the origin of the grid's CRS on.

    Two grids of one CRS, pixel size and phase have windows, and tokens, in the same places, whatever part of the
    ground they show.

    Attributes:
        height, width: of a window in pixels.
        patch: side of a patch in pixels, of which sides, starts and overlap are multiples.
        overlap: of neighbouring windows in pixels, at least 0 and less than a window.
        row, column: where a window starts.
        single: there is one window alone, which holds the whole grid.
    """

    height: int
    width: int
    patch: int
    overlap: int
    row: int = 0
    column: int = 0
    single: bool = False

    @property
    def stride(self) -> tuple[int, int]:
        """Rows and columns from one window to the next."""
        return self.height - self.overlap, self.width - self.overlap

    def rows(self, first: int, stop: int) -> list[int]:
        """First rows of the windows that hold a row from `first` to before `stop`."""
        return [0] if self.single else _starts(self.row, self.stride[0], self.height, first, stop)

    def columns(self, first: int, stop: int) -> list[int]:
        """First columns of the windows that hold a column from `first` to before `stop`."""
        return [0] if self.single else _starts(self.column, self.stride[1], self.width, first, stop)

    def cell_rows(self, first: int, stop: int) -> list[int]:
        """First rows of the cells that meet the rows from `first` to before `stop`.

        A cell is the middle of a window, as large as a step of the lattice: cells cover the grid once.
        """
        return self.rows(first, stop) if self.single else _cells(self.row, self.overlap, self.stride[0], first, stop)

    def cell_columns(self, first: int, stop: int) -> list[int]:
        """First columns of the cells that meet the columns from `first` to before `stop`."""
        if self.single:
            return self.columns(first, stop)
        return _cells(self.column, self.overlap, self.stride[1], first, stop)

    def weights(self) -> np.ndarray:
        """Weight of each pixel of a window, `(height, width)` float32.

        Smooth, symmetric and positive everywhere. At every pixel of the grid the weights of the windows that hold it
        sum to 1.
        """
        if self.single:
            return np.ones((self.height, self.width), np.float32)
        rows, columns = (
            _weights(side, stride) for side, stride in zip((self.height, self.width), self.stride, strict=True)
        )
        return rows[:, None] * columns

    def block_side(self) -> int:
        """Side in pixels that a block of the grid is best given."""
        return BLOCK_UNIT * max(1, round(BLOCK_STRIDES * min(self.stride) / BLOCK_UNIT))


def _starts(anchor: int, stride: int, side: int, first: int, stop: int) -> list[int]:
    lowest = anchor + stride * math.ceil((first - side + 1 - anchor) / stride)
    return list(range(lowest, stop, stride))


def _cells(anchor: int, overlap: int, stride: int, first: int, stop: int) -> list[int]:
    return _starts(anchor + overlap // 2, stride, stride, first, stop)


def _weights(side: int, stride: int) -> np.ndarray:
    """A Hann window sampled at the centres of pixels, each divided by what all windows have there."""
    bump = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    bump = (bump + bump[::-1]) / 2
    totals = [math.fsum(bump[place::stride]) for place in range(min(stride, side))]
    shares = bump / [totals[place % stride] for place in range(side)]
    return ((shares + shares[::-1]) / 2).astype(np.float32)


def lattice_of(grid: Grid, window: tuple[int, int], patch: int, overlap: int | None = None) -> Lattice:
    """The lattice of a grid.

    Args:
        grid: what is mapped.
        window: height and width of the windows in pixels, those of training.
        patch: side of a patch in pixels.
        overlap: of windows in pixels; the multiple of the patch nearest to half a window by default.

    Returns:
        The lattice. A grid that fits into one window has that one alone, as large as the patches that hold the grid.

    Raises:
        ValueError: the overlap is no multiple of the patch, is negative, or leaves no step between windows.
    """
    side = min(window)
    if overlap is None:
        overlap = patch * math.ceil(side / 2 / patch - 0.5)
        overlap = min(overlap, side - patch)
    if overlap < 0 or overlap >= side or overlap % patch:
        raise ValueError(
            f"The overlap is {overlap} px, but must be a multiple of the patch of {patch} px, from 0 to "
            f"{side - patch}: windows have {window[0]}x{window[1]} px."
        )
    if grid.height <= window[0] and grid.width <= window[1]:
        height, width = (-(-size // patch) * patch for size in (grid.height, grid.width))
        return Lattice(height, width, patch, 0, single=True)
    column, row = (math.floor(float(place) + 0.499) for place in grid.to_pixels(0.0, 0.0))
    steps = [length - overlap for length in window]
    return Lattice(*window, patch, overlap, row % steps[0], column % steps[1])
