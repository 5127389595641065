"""Windows that scenes are cut into: where they lie, and in which order they are best read."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fusmae_hf.readers.grids import Grid, Window

Edges = Literal["drop", "shift", "pad"]
"""What becomes of pixels at the right and lower edge that are less than a window: dropped; the last window is shifted
back so that it ends at the edge; or it reaches beyond the edge, where there is no data."""


@dataclass
class Windows:
    """Square windows of scenes, row by row, numbered through all scenes.

    Attributes:
        size: side of a window in pixels.
        stride: distance of windows.
        edges: see `Edges`.
        pixels: of all scenes that have a window.
        uncovered: how many of them, at the right and lower edges, lie in no window.
    """

    size: int
    stride: int
    edges: Edges
    pixels: int = 0
    uncovered: int = 0
    _firsts: list[int] = field(default_factory=list)
    _rows: list[list[int]] = field(default_factory=list)
    _columns: list[list[int]] = field(default_factory=list)
    _number: int = 0

    def add_scene(self, grid: Grid | None) -> Iterator[tuple[int, int]]:
        """Cut the next scene; None for one that gives none.

        Returns:
            Row and column of the upper left pixel of each window.
        """
        rows, columns = ([], []) if grid is None else (self._starts(grid.height), self._starts(grid.width))
        self._firsts.append(self._number)
        self._rows.append(rows)
        self._columns.append(columns)
        self._number += len(rows) * len(columns)
        if grid and rows and columns:
            covered = min(rows[-1] + self.size, grid.height) * min(columns[-1] + self.size, grid.width)
            self.pixels += grid.height * grid.width
            self.uncovered += grid.height * grid.width - covered
        return ((row, column) for row in rows for column in columns)

    def _starts(self, size: int) -> list[int]:
        """First pixels of the windows along a side of a scene."""
        starts = list(range(0, size - self.size + 1, self.stride)) or [0] * (self.edges == "pad")
        if self.edges == "shift" and starts and starts[-1] + self.size < size:
            starts.append(size - self.size)
        while self.edges == "pad" and starts[-1] + max(self.size, self.stride) < size:
            starts.append(starts[-1] + self.stride)
        return starts

    def scene(self, index: int) -> int:
        """Number of the scene to which a window belongs."""
        return bisect_right(self._firsts, index) - 1

    def window(self, index: int) -> Window:
        """Where a window lies in its scene."""
        scene = self.scene(index)
        row, column = divmod(index - self._firsts[scene], len(self._columns[scene]))
        return self._rows[scene][row], self._columns[scene][column], self.size, self.size

    def groups(self) -> np.ndarray:
        """For each window a number that it shares with those beside it in the same row of its scene.

        Read one after the other, they have strips and blocks of a file decoded once.
        """
        lengths = [len(columns) for rows, columns in zip(self._rows, self._columns, strict=True) for _ in rows]
        return np.repeat(np.arange(len(lengths)), lengths)

    def __str__(self) -> str:
        text = f"cut into {self._number:,} windows of {self.size}x{self.size} px every {self.stride} px"
        if not self.uncovered:
            return text
        return (
            f"{text}; {self.uncovered:,} px at right and lower edges ({self.uncovered / self.pixels:.1%}) are in no "
            "window (`--edges shift` or `--edges pad` takes them in)"
        )
