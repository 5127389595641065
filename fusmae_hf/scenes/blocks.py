"""One block of a map: the function that every engine calls.

`compute_block(plan, model, block)` is pure: what it gives for a pixel depends on the plan, the model and the files
alone, not on how the map is cut into blocks, on the number of workers or on what was computed before. It gives the
block in strips, from the top down, so that neither the block nor the scene is ever whole in memory.

`parts.write_block` writes them as a part of the map and marks the part as finished. An engine (a cluster, say) calls
that one with a pickled `Plan`, a model that each worker loads itself (`load_scene_model`), the number of a block in
`plan.blocks()` and the folder of the parts, which all machines see. It may be called twice, anywhere, in any order;
`parts.finished_block` tells what is done. `mapping.finish` then puts the parts together. `mapping.run_blocks` is the
engine of one machine. A product that is not one of pixels or cells is added here, as a third class beside `_Pixels`
and `_Scores`, which take the windows in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusmae_hf.readers.grids import Window
from fusmae_hf.scenes.models import Inputs, SceneModel, valid_of, window_of
from fusmae_hf.scenes.places import Tokens, Windows
from fusmae_hf.scenes.slabs import Counts, Slab, read_slabs

if TYPE_CHECKING:
    from fusmae_hf.scenes.plan import Plan

_WAITING = 4
"""Batches of windows that may wait for others of their kind."""


@dataclass(frozen=True)
class Strip:
    """Finished rows of a block.

    Attributes:
        row, column: of the first pixel in the whole grid; of scores: of the first cell of the map, from 0.
        arrays: by product, `(bands, rows, columns)` in the dtype of the file. `"quicklook"` holds every
            `plan.quicklook_step()`-th row and column of the normalised inputs, counted from the corner of the area,
            from the first one on that is not before `row` and `column`; float32, NaN without data.
    """

    row: int
    column: int
    arrays: dict[str, np.ndarray]


def compute_block(
    plan: Plan, model: SceneModel, block: Window, counts: Counts | None = None, readers: Executor | None = None
) -> Iterator[Strip]:
    """Compute a part of the map.

    Args:
        plan: of the map.
        model: that predicts, the same as the plan was made with.
        block: row, column, height and width in the grid, inside of `plan.area`; one of `plan.blocks()`, or any other.
        counts: to which is added what was done.
        readers: threads that read ahead; nothing is read ahead without.

    Yields:
        Strips from the top down. Of pixel products they cover the block; of scores they hold the cells whose first
        pixel in the area lies in the block.

    Raises:
        PairError: pixels cannot be read, unless `plan.on_error` is `"skip"`.
        ValueError: the model gives values that are no numbers where there is data, unless they are skipped.
    """
    counts = Counts() if counts is None else counts
    sink = _sink(plan, block, counts)
    if not sink.rows or not sink.columns:
        return
    lattice, step = plan.lattice, plan.lattice.stride[0]
    left, width = sink.columns[0], sink.columns[-1] + lattice.width - sink.columns[0]
    ring: Slab | None = None
    queue = _Queue(plan, model, counts)
    for row, slab in zip(sink.rows, read_slabs(plan, model, sink.rows, left, width, counts, readers), strict=True):
        ring = slab if ring is None else ring.below(slab, step)
        sink.start_row(row, ring, left)
        for column in sink.columns:
            rows, columns = slice(0, lattice.height), slice(column - left, column - left + lattice.width)
            wanted = ring.wanted[rows, columns]
            if not sink.needs(row, column, wanted):
                counts.empty += 1
                continue
            broken = ring.broken is not None and bool(ring.broken[rows, columns].any())
            queue.add((row, column), None if broken else ring.inputs, rows, columns, wanted)
            for place, result in queue.finished():
                yield from sink.take(place, result)
        queue.end_row(row)
        for place, result in queue.finished():
            yield from sink.take(place, result)
    queue.flush()
    for place, result in queue.finished():
        yield from sink.take(place, result)
    yield from sink.rest()


def _sink(plan: Plan, block: Window, counts: Counts) -> Any:
    """What takes the windows of a block and makes strips of them."""
    if plan.kind == "tokens":
        return Tokens(plan, block, counts, _Pixels, Strip)
    if plan.kind in ("scores", "vectors"):
        return Windows(plan, block, counts, _Scores, Strip)
    return _Pixels(plan, block, counts)


class _Queue:
    """Windows in order, predicted in full batches of one kind, and given back in order.

    Windows of a kind have the same sensors; and either each patch of theirs has data, or in some window of the batch
    some patch has none. The model takes another way through the attention then, for all windows of a batch.
    """

    def __init__(self, plan: Plan, model: SceneModel, counts: Counts):
        self.plan, self.model, self.counts = plan, model, counts
        self.order: deque[tuple[int, int | None]] = deque()
        self.waiting: dict[tuple[Any, ...], list[tuple[tuple[int, int], Inputs, np.ndarray]]] = {}
        self.results: dict[tuple[int, int], np.ndarray | None] = {}

    def add(self, place: tuple[int, int], inputs: Inputs | None, rows: slice, columns: slice, wanted: Any) -> None:
        """Take a window; None for one that cannot be predicted."""
        self.order.append(place)
        if inputs is None:
            self.counts.failed += 1
            self.results[place] = None
            return
        sensors, full = [], True
        for sensor in self.plan.reader.files:
            valid = valid_of(inputs, sensor)
            assert valid is not None
            if not bool((valid := valid[rows, columns]).any()):
                continue
            sensors.append(sensor)
            patches = valid.unflatten(0, (-1, self.plan.lattice.patch)).unflatten(2, (-1, self.plan.lattice.patch))
            full = full and bool(patches.any(dim=3).any(dim=1).all())
        kind = (*sensors, full)
        waiting = self.waiting.setdefault(kind, [])
        waiting.append((place, window_of(inputs, rows, columns, tuple(sensors)), wanted))
        if len(waiting) == self.plan.batch_size:
            self._run(kind)
        while len(self.order) > _WAITING * self.plan.batch_size and self._oldest() is not None:
            self._run(self._oldest())

    def end_row(self, row: int) -> None:
        """Note that no window of a row of the lattice follows."""
        self.order.append((row, None))

    def flush(self) -> None:
        """Predict all that waits."""
        for kind in list(self.waiting):
            self._run(kind)

    def finished(self) -> Iterator[tuple[tuple[int, int | None], np.ndarray | None]]:
        """What is ready, in order; None for the end of a row, and for a window that failed."""
        while self.order:
            row, column = self.order[0]
            if column is None:
                yield self.order.popleft(), None
            elif (row, column) in self.results:
                self.order.popleft()
                yield (row, column), self.results.pop((row, column))
            else:
                return

    def _oldest(self) -> Any:
        """The kind for which the first window in order waits; None where it is ready."""
        first = next((place for place in self.order if place[1] is not None), None)
        return next(
            (kind for kind, windows in self.waiting.items() if any(place == first for place, _, _ in windows)), None
        )

    def _run(self, kind: Any) -> None:
        windows = self.waiting.pop(kind)
        given = [inputs for _, inputs, _ in windows]
        results = self.model.run(given, self.plan.batch_size, self.plan.symmetries)
        self.counts.windows += len(windows)
        for (place, _, wanted), result in zip(windows, results, strict=True):
            there = result[:, wanted] if result.shape[1:] == wanted.shape else result
            if np.isfinite(there).all():
                self.results[place] = result
                continue
            message = f"The model gives values that are no numbers in the window at row {place[0]}, column {place[1]}."
            if self.plan.on_error == "stop":
                raise ValueError(f"{message} Is the checkpoint sound? --on-error skip goes on without such windows.")
            self.counts.failed += 1
            self.counts.fail(message)
            self.results[place] = None


class _Pixels:
    """Blends windows into pixels: first those of a row of the lattice, then the rows."""

    def __init__(self, plan: Plan, block: Window, counts: Counts):
        self.plan, self.block, self.counts = plan, block, counts
        self.rows, self.columns = plan.windows_of(block)
        self.weights = plan.lattice.weights()
        self.of_row: np.ndarray | None = None
        self.total: np.ndarray | None = None
        self.wanted: dict[int, np.ndarray] = {}
        self.looks: dict[int, np.ndarray | None] = {}

    def start_row(self, row: int, ring: Slab, left: int) -> None:
        """Keep what is needed of the rows that are finished with this row of the lattice."""
        top, first, height, width = self.block
        columns = slice(first - left, first - left + width)
        step, side = self.plan.quicklook_step(), self.plan.lattice.stride[0]
        self.wanted[row] = ring.wanted[:side, columns]
        begin, stop = max(row, top), min(row + side, top + height)
        begin += (self.plan.area[0] - begin) % step
        aside = first - left + (self.plan.area[1] - first) % step
        places = np.s_[begin - row : max(stop - row, 0) : step, aside : first - left + width : step]
        self.looks[row] = quicklook_of(self.plan, ring.inputs, places) if begin < stop else None

    def needs(self, row: int, column: int, wanted: np.ndarray) -> bool:
        """Whether a pixel of the block needs this window."""
        rows, columns, _ = self._place(row, column)
        return bool(wanted[rows, columns].any())

    def take(self, place: tuple[int, int | None], result: np.ndarray | None) -> Iterator[Strip]:
        """Add a window; at the end of a row of the lattice, give the rows that are finished."""
        row, column = place
        if column is None:
            yield from self._finish_row(row)
            return
        if self.of_row is None:
            shape = (len(self.plan.labels), self.plan.lattice.height, self.block[3])
            self.of_row = np.zeros(shape, np.float32)
        _, columns, there = self._place(row, column)
        if result is None:
            self.of_row[:, :, there] = np.nan
        else:
            self.of_row[:, :, there] += result[:, :, columns] * self.weights[:, columns]

    def rest(self) -> Iterator[Strip]:
        """Nothing: every row ends."""
        return iter(())

    def _place(self, row: int, column: int) -> tuple[slice, slice, slice]:
        """Rows and columns of a window that lie in the block, and where these columns lie there."""
        top, left, height, width = self.block
        lattice = self.plan.lattice
        rows = slice(max(top - row, 0), min(top + height - row, lattice.height))
        columns = slice(max(left - column, 0), min(left + width - column, lattice.width))
        return rows, columns, slice(column + columns.start - left, column + columns.stop - left)

    def _finish_row(self, row: int) -> Iterator[Strip]:
        lattice, (top, left, height, _) = self.plan.lattice, self.block
        step = lattice.stride[0]
        if self.of_row is not None:
            self.total = self.of_row if self.total is None else self.total + self.of_row
        wanted, look = self.wanted.pop(row), self.looks.pop(row)
        rows = slice(max(top - row, 0), min(top + height - row, step))
        if rows.start < rows.stop:
            if self.total is None:
                shape = (len(self.plan.labels), rows.stop - rows.start, self.block[3])
                values, there = np.zeros(shape, np.float32), np.zeros(shape[1:], bool)
            else:
                values = self.total[:, rows]
                there = wanted[rows] & np.isfinite(values).all(axis=0)
            self.counts.pixels += int(there.sum())
            arrays = pixel_products(self.plan, values, there)
            if look is not None:
                arrays["quicklook"] = look
            yield Strip(row + rows.start, left, arrays)
        self.of_row = None
        if self.total is not None:
            rest = np.zeros_like(self.total)
            rest[:, : lattice.height - step] = self.total[:, step:]
            self.total = rest if lattice.height > step and rest.any() else None


class _Scores:
    """Puts the scores of windows into cells: see `Lattice.cell_rows`."""

    def __init__(self, plan: Plan, block: Window, counts: Counts):
        self.plan, self.block, self.counts = plan, block, counts
        self.all_rows, self.all_columns = cells_of(plan)
        top, left, height, width = block
        shift = 0 if plan.lattice.single else plan.lattice.overlap // 2
        self.rows = [row - shift for row in self.all_rows if top <= max(row, plan.area[0]) < top + height]
        self.columns = [
            column - shift for column in self.all_columns if left <= max(column, plan.area[1]) < left + width
        ]
        self.shift = shift
        self.values = np.full((len(plan.labels), len(self.rows), len(self.columns)), np.nan, np.float32)
        self.looks: list[Strip] = []

    def start_row(self, row: int, ring: Slab, left: int) -> None:
        """Keep the quicklook of the rows of the cells."""
        top, first, height, width = self.block
        step, cell = self.plan.quicklook_step(), row + self.shift
        begin, stop = max(cell, top), min(cell + self.plan.lattice.stride[0], top + height)
        begin_column, end = max(first, left), min(first + width, left + ring.wanted.shape[1])
        aligned = begin + (self.plan.area[0] - begin) % step
        aside = begin_column + (self.plan.area[1] - begin_column) % step
        if aligned < stop and aside < end:
            places = np.s_[aligned - row : stop - row : step, aside - left : end - left : step]
            look = quicklook_of(self.plan, ring.inputs, places)
            self.looks.append(Strip(begin, begin_column, {"quicklook": look}))

    def needs(self, row: int, column: int, wanted: np.ndarray) -> bool:
        """Whether a pixel of the cell is wanted and has data."""
        height, width = self.plan.lattice.stride
        return bool(wanted[self.shift : self.shift + height, self.shift : self.shift + width].any())

    def take(self, place: tuple[int, int | None], result: np.ndarray | None) -> Iterator[Strip]:
        """Note the scores of a window."""
        row, column = place
        if column is not None and result is not None:
            self.values[:, self.rows.index(row), self.columns.index(column)] = result
            self.counts.pixels += 1
        return iter(())

    def rest(self) -> Iterator[Strip]:
        """All cells of the block."""
        yield from self.looks
        row, column = (
            self.all_rows.index(self.rows[0] + self.shift),
            self.all_columns.index(self.columns[0] + self.shift),
        )
        yield Strip(row, column, {"scores": self.values})


def cells_of(plan: Plan) -> tuple[list[int], list[int]]:
    """First rows and first columns, in the grid, of the cells of the whole map."""
    top, left, height, width = plan.area
    return plan.lattice.cell_rows(top, top + height), plan.lattice.cell_columns(left, left + width)


def pixel_products(plan: Plan, values: np.ndarray, there: np.ndarray) -> dict[str, np.ndarray]:
    """Products of blended probabilities or values.

    Args:
        plan: of the map.
        values: `(labels, rows, columns)` float32.
        there: `(rows, columns)` bool, which pixels have a result.

    Returns:
        By product `(bands, rows, columns)`, with the value of no data elsewhere.
    """
    arrays = {}
    for product in plan.what:
        if product == "classes":
            several = len(plan.labels) > 255
            dtype, nothing = (np.uint16, 65535) if several else (np.uint8, 255)
            arrays[product] = np.where(there, values.argmax(axis=0), nothing).astype(dtype)[None]
        elif product == "confidence":
            sure = np.where(there, values, 1)
            entropy = -(sure * np.log(np.maximum(sure, 1e-38))).sum(axis=0)
            both = np.stack([values.max(axis=0), entropy])
            arrays[product] = np.where(there, both, np.nan).astype(np.float32)
        elif product == "probabilities" and plan.probability_dtype == "uint8":
            with np.errstate(invalid="ignore"):
                steps = np.rint(np.clip(values, 0, 1) * 254)
            arrays[product] = np.where(there, steps, 255).astype(np.uint8)
        else:
            arrays[product] = np.where(there, values, np.float32(np.nan))
    return arrays


def quicklook_of(plan: Plan, inputs: Inputs, places: Any) -> np.ndarray:
    """Some pixels of the optical bands that `plan.shown` lists, if there are any, and of the first SAR band."""
    layers = []
    for sensor, name, shown in (("optical", "pixel_values", plan.shown), ("sar", "pixel_values_sar", (0,))):
        if name in inputs:
            valid = valid_of(inputs, sensor)
            assert valid is not None
            layers += [torch.where(valid[places], inputs[name][(band, *places)], torch.nan).numpy() for band in shown]
    return np.stack(layers).astype(np.float32)
