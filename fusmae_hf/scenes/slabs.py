"""Rows of a scene as the model takes them, read ahead from the top down."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusmae_hf.errors import PairError
from fusmae_hf.scenes.models import Inputs, SceneModel, valid_of

if TYPE_CHECKING:
    from fusmae_hf.scenes.plan import Plan

_PIECE = 64
"""Where pixels cannot be read, pieces of so many columns are tried one by one."""


@dataclass
class Counts:
    """What was done.

    Attributes:
        windows: that the model saw.
        empty: windows without any pixel that is wanted and has data, which it did not see.
        failed: windows that touch pixels that could not be read, or for which the model gave no number.
        pixels: with a result.
        errors: first messages of what failed.
    """

    windows: int = 0
    empty: int = 0
    failed: int = 0
    pixels: int = 0
    errors: list[str] = field(default_factory=list)

    def fail(self, error: str) -> None:
        """Note a message; a few are enough."""
        if len(self.errors) < 5:
            self.errors.append(error)


@dataclass
class Slab:
    """Rows of the scene: normalised inputs, which pixels are wanted and have data, which could not be read."""

    inputs: Inputs
    wanted: np.ndarray
    broken: np.ndarray | None

    def below(self, new: Slab, rows: int) -> Slab:
        """Drop the first rows and add new ones."""
        inputs = {
            name: torch.cat([values[..., rows:, :], new.inputs[name]], dim=-2) for name, values in self.inputs.items()
        }
        broken = None
        if self.broken is not None or new.broken is not None:
            parts = [np.zeros(each.wanted.shape, bool) if each.broken is None else each.broken for each in (self, new)]
            broken = np.concatenate([parts[0][rows:], parts[1]])
        return Slab(inputs, np.concatenate([self.wanted[rows:], new.wanted]), broken)


def read_slabs(
    plan: Plan, model: SceneModel, starts: list[int], left: int, width: int, counts: Counts, readers: Executor | None
) -> Iterator[Slab]:
    """Rows that each row of the lattice needs anew, read ahead by as many threads as there are."""
    height, step = plan.lattice.height, plan.lattice.stride[0]
    wanted = [(starts[0], height)] + [(row + height - step, step) for row in starts[1:]]
    if readers is None:
        for row, rows in wanted:
            yield _read_slab(plan, model, row, left, rows, width, counts)
        return
    ahead: deque[Any] = deque()
    rest = iter(wanted)
    depth = 1 + getattr(readers, "_max_workers", 1)
    try:
        while True:
            while len(ahead) < depth and (following := next(rest, None)) is not None:
                row, rows = following
                ahead.append(readers.submit(_read_slab, plan, model, row, left, rows, width, counts))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        for task in ahead:
            task.cancel()


def _read_slab(plan: Plan, model: SceneModel, row: int, column: int, height: int, width: int, counts: Counts) -> Slab:
    broken = None
    try:
        images = plan.reader.read(row, column, height, width)
    except PairError as error:
        if plan.on_error == "stop":
            raise
        counts.fail(str(error))
        images, broken = _read_pieces(plan, row, column, height, width)
    inputs = model.normalised(images, plan.declared)
    there: Any = False
    for sensor in plan.reader.files:
        there = there | valid_of(inputs, sensor).numpy()  # type: ignore[union-attr]
    return Slab(
        inputs, _inside(plan, row, column, height, width) & (there if broken is None else there | broken), broken
    )


def _read_pieces(
    plan: Plan, row: int, column: int, height: int, width: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What can be read of some rows, and where nothing can."""
    bands = {sensor: len(plan.declared[f"{sensor}_bands"]) for sensor in plan.reader.files}
    images = {
        sensor: np.full((number, height, width), 0 if sensor == "optical" else np.nan, np.float32)
        for sensor, number in bands.items()
    }
    broken = np.zeros((height, width), bool)
    for first in range(0, width, _PIECE):
        stop = min(first + _PIECE, width)
        try:
            of_piece = plan.reader.read(row, column + first, height, stop - first)
        except PairError:
            broken[:, first:stop] = True
            continue
        for sensor, image in of_piece.items():
            images[sensor][..., first:stop] = image
    return images, broken


def _inside(plan: Plan, row: int, column: int, height: int, width: int) -> np.ndarray:
    """Which pixels belong to the area."""
    top, left, rows, columns = plan.area
    inside = np.zeros((height, width), bool)
    inside[max(top - row, 0) : max(top + rows - row, 0), max(left - column, 0) : max(left + columns - column, 0)] = (
        True
    )
    if plan.polygons and inside.any():
        from affine import Affine
        from rasterio.features import geometry_mask

        transform = Affine(*plan.reader.grid.window(row, column, height, width).transform)
        inside &= geometry_mask(plan.polygons, (height, width), transform, invert=True)
    return inside
