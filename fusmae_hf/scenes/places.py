"""Rows of a table of places: tokens of the patch grid with vectors, and windows with vectors or scores.

Places come from blocks as structured arrays, see `places_dtype`, and are written as a part of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fusmae_hf.embeddings.geoparquet import merge_places, places_table, vector_column, write_places
from fusmae_hf.scenes.models import valid_of

if TYPE_CHECKING:
    from fusmae_hf.readers.grids import Window
    from fusmae_hf.scenes.plan import Plan
    from fusmae_hf.scenes.slabs import Slab

PLACES = "places"
"""Name under which blocks give them."""

ROWS_A_FILE = 2**20

_SENSORS = ("optical", "sar")


def places_dtype(labels: int) -> np.dtype[Any]:
    """Of places.

    `row` and `column` are those of the first pixel in the grid, `valid` the share of pixels that are wanted and have
    data, `optical` and `sar` whether a pixel of the sensor has data, `vector` what the model gives, `labels` numbers.
    """
    kinds = [("row", "i4"), ("column", "i4"), ("valid", "f4"), ("optical", "?"), ("sar", "?")]
    return np.dtype([*kinds, ("vector", "f4", (labels,))])


def first_token(plan: Plan) -> tuple[int, int]:
    """Row and column of the first pixel of the token that holds the first pixel of the grid; not above 0."""
    lattice = plan.lattice
    return -(-lattice.row % lattice.patch), -(-lattice.column % lattice.patch)


def tokens_of(plan: Plan, block: Window) -> Window:
    """Tokens whose first pixel in the area lies in a block: row, column, height and width on the grid of tokens."""
    patch, found = plan.lattice.patch, []
    for axis, anchor in enumerate(first_token(plan)):
        start, stop, least = block[axis], block[axis] + block[axis + 2], plan.area[axis]
        # Tokens that begin before the area belong to the block at its edge.
        first = (start - anchor) // patch if start == least else math.ceil((start - anchor) / patch)
        found.append((first, math.ceil((stop - anchor) / patch) - first))
    return found[0][0], found[1][0], found[0][1], found[1][1]


class Tokens:
    """Blends the tokens of windows into those of the patch grid, as pixels are: see `_Pixels`."""

    def __init__(self, plan: Plan, block: Window, counts: Any, pixels: Callable[..., Any], strip: Callable[..., Any]):
        self.plan, self.strip = plan, strip
        lattice, patch = plan.lattice, plan.lattice.patch
        self.anchor, self.block = first_token(plan), tokens_of(plan, block)
        of_tokens = replace(
            lattice,
            height=lattice.height // patch,
            width=lattice.width // patch,
            patch=1,
            overlap=lattice.overlap // patch,
            row=(lattice.row - self.anchor[0]) // patch,
            column=(lattice.column - self.anchor[1]) // patch,
        )
        whole = tokens_of(plan, plan.area)
        self.tokens = pixels(replace(plan, lattice=of_tokens, area=whole, what=(PLACES,)), self.block, counts)
        self.looks = pixels(plan, block, counts)
        ends = [
            (min(block[axis], self.anchor[axis] + patch * self.block[axis]),
             max(block[axis] + block[axis + 2], self.anchor[axis] + patch * (self.block[axis] + self.block[axis + 2])))
            for axis in (0, 1)
        ]  # fmt: skip
        (top, bottom), (left, right) = ends
        self.rows, self.columns = plan.windows_of((top, left, bottom - top, right - left))
        self.facts: dict[int, tuple[np.ndarray, ...]] = {}

    def start_row(self, row: int, ring: Slab, left: int) -> None:
        """Keep what is known of the tokens that are finished with this row of the lattice."""
        self.looks.start_row(row, ring, left)
        self.looks.wanted.pop(row)
        patch, side, first = self.plan.lattice.patch, self.plan.lattice.stride[0], self.anchor[1]
        start = first + patch * self.block[1] - left
        of_row = np.s_[:side, start : start + patch * self.block[3]]
        share: np.ndarray = _tokens(ring.wanted[of_row].astype(np.float32), patch).mean(axis=(1, 3))
        there: list[np.ndarray] = []
        for sensor in _SENSORS:
            valid = valid_of(ring.inputs, sensor)
            present = np.zeros(share.shape, bool)
            if valid is not None:
                np.any(_tokens(valid[of_row].numpy(), patch), axis=(1, 3), out=present)
            there.append(present)
        number = self._token(row, 0)
        self.facts[number] = (share, *there)
        self.tokens.wanted[number], self.tokens.looks[number] = share > 0, None

    def needs(self, row: int, column: int, wanted: np.ndarray) -> bool:
        """Whether a token of the block needs this window."""
        rows, columns, _ = self.tokens._place(self._token(row, 0), self._token(column, 1))
        if rows.stop <= rows.start or columns.stop <= columns.start:
            return False
        patches = _tokens(wanted, self.plan.lattice.patch)
        return bool(patches[rows, :, columns].any())

    def take(self, place: tuple[int, int | None], result: np.ndarray | None) -> Iterator[Any]:
        """Add a window; at the end of a row of the lattice, give the tokens that are finished."""
        row, column = place
        number = self._token(row, 0)
        for strip in self.tokens.take((number, None if column is None else self._token(column, 1)), result):
            facts = tuple(
                values[strip.row - number :][: strip.arrays[PLACES].shape[1]] for values in self.facts[number]
            )
            yield self.strip(strip.row, strip.column, {PLACES: self._places(strip, facts)})
        if column is None:
            del self.facts[number]
            look = self.looks.looks.pop(row)
            if look is not None:
                yield self.strip(max(row, self.looks.block[0]), self.looks.block[1], {"quicklook": look})

    def rest(self) -> Iterator[Any]:
        """Nothing: every row ends."""
        return iter(())

    def _places(self, strip: Any, facts: tuple[np.ndarray, ...]) -> np.ndarray:
        values, patch = strip.arrays[PLACES], self.plan.lattice.patch
        rows, columns = np.nonzero(np.isfinite(values[0]))
        found = np.zeros(len(rows), places_dtype(len(values)))
        found["row"] = self.anchor[0] + patch * (strip.row + rows)
        found["column"] = self.anchor[1] + patch * (strip.column + columns)
        for name, known in zip(("valid", *_SENSORS), facts, strict=True):
            found[name] = known[rows, columns]
        found["vector"] = values[:, rows, columns].T
        return found

    def _token(self, pixel: int, axis: int) -> int:
        return (pixel - self.anchor[axis]) // self.plan.lattice.patch


def _tokens(values: np.ndarray, patch: int) -> np.ndarray:
    height, width = values.shape
    return values.reshape(height // patch, patch, width // patch, patch)


class Windows:
    """Notes vectors or scores of windows: see `_Scores`, which puts the latter into cells."""

    def __init__(self, plan: Plan, block: Window, counts: Any, scores: Callable[..., Any], strip: Callable[..., Any]):
        self.plan, self.strip = plan, strip
        self.scores = scores(plan, block, counts)
        self.rows, self.columns = self.scores.rows, self.scores.columns
        self.facts: dict[tuple[int, int], tuple[float, ...]] = {}
        self.ring: Slab | None = None
        self.left = 0

    def start_row(self, row: int, ring: Slab, left: int) -> None:
        """Keep the quicklook, and what windows are looked up in."""
        self.ring, self.left = ring, left
        self.scores.start_row(row, ring, left)

    def needs(self, row: int, column: int, wanted: np.ndarray) -> bool:
        """Whether a pixel of the middle of the window is wanted and has data."""
        if not self.scores.needs(row, column, wanted):
            return False
        assert self.ring is not None
        columns = slice(column - self.left, column - self.left + self.plan.lattice.width)
        there = (valid_of(self.ring.inputs, sensor) for sensor in _SENSORS)
        present = [valid is not None and bool(valid[: len(wanted), columns].any()) for valid in there]
        self.facts[row, column] = (float(wanted.mean()), *present)
        return True

    def take(self, place: tuple[int, int | None], result: np.ndarray | None) -> Iterator[Any]:
        """Note the vector of a window."""
        return self.scores.take(place, result)

    def rest(self) -> Iterator[Any]:
        """All windows of the block."""
        for strip in self.scores.rest():
            if "scores" in strip.arrays:
                yield self.strip(strip.row, strip.column, {PLACES: self._places(strip.arrays["scores"])})
            if "scores" not in strip.arrays or "scores" in self.plan.what:
                yield strip

    def _places(self, values: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(np.isfinite(values[0]))
        found = np.zeros(len(rows), places_dtype(len(values)))
        found["row"], found["column"] = np.array(self.rows)[rows], np.array(self.columns)[columns]
        for name, known in zip(
            ("valid", *_SENSORS),
            zip(*(self.facts[row, column] for row, column in found[["row", "column"]].tolist()), strict=True),
            strict=bool(len(rows)),
        ):
            found[name] = known
        found["vector"] = values[:, rows, columns].T
        return found


def table_of(plan: Plan, places: np.ndarray) -> tuple[pa.Table, int]:
    """Places as a table, and how many values were clipped."""
    vectors_as, lattice, clipped, vectors = plan.vectors, plan.lattice, 0, {}
    assert vectors_as is not None
    tokens = plan.kind == "tokens"
    size = (lattice.patch, lattice.patch) if tokens else (lattice.height, lattice.width)
    values = np.split(places["vector"], len(vectors_as.columns), axis=1)
    for name, of_column in zip(vectors_as.columns, values, strict=True):
        there = places[name] if name in _SENSORS else np.ones(len(places), bool)
        if vectors_as.dtype == "uint8":
            assert vectors_as.quantisation is not None
            levels, outside = vectors_as.quantisation[name].levels(of_column[there])
            clipped += outside
            of_column = np.zeros(of_column.shape, np.uint8)
            of_column[there] = levels
        vectors[name] = vector_column(of_column.astype(vectors_as.dtype), there)
    both = np.where(places["sar"], "both", "optical")
    moment = pa.timestamp("ms", "UTC")
    times = {f"{sensor}_time": (vectors_as.times or {}).get(sensor) for sensor in _SENSORS}
    start = first_token(plan) if tokens else (0, 0)
    steps = (lattice.patch, lattice.patch) if tokens else (1, 1)
    facts = {
        "scene": pa.scalar(vectors_as.scene, pa.string()),
        "row": (places["row"] - start[0]) // steps[0],
        "column": (places["column"] - start[1]) // steps[1],
        "sensors": pa.array(np.where(places["optical"], both, "sar").tolist(), pa.string()),
        "valid": places["valid"],
        **{name: pa.scalar(None if text is None else _utc(text), moment) for name, text in times.items()},
    }
    facts["row"], facts["column"] = (np.ascontiguousarray(facts[name], np.int32) for name in ("row", "column"))
    facts["valid"] = np.ascontiguousarray(facts["valid"])
    described = {
        name: plan.made_of.get(name) for name in ("version", "checkpoint", "content_hash", "window", "overlap")
    }
    described |= {"unit": "patch" if tokens else "window", "size_px": list(size)}
    described |= {"labels": list(plan.labels)} if plan.kind == "scores" else {}
    if vectors_as.quantisation is not None and vectors_as.dtype == "uint8":
        described["quantisation"] = {name: each.to_json() for name, each in vectors_as.quantisation.items()}
    table = places_table(plan.reader.grid, places["row"], places["column"], size, facts, vectors, described)
    return table, clipped


def _utc(text: str) -> datetime:
    """A moment; in UTC where no zone is said."""
    moment = datetime.fromisoformat(text)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


class PlacesPart:
    """The places of a block on the disk: pieces while it is computed, then one file."""

    def __init__(self, plan: Plan, path: Path):
        self.plan, self.path = plan, path
        self.pieces: list[Path] = []
        self.clipped = self.values = 0

    def add(self, places: np.ndarray) -> None:
        """Write a piece."""
        table, clipped = table_of(self.plan, places)
        piece = self.path.with_name(f".{self.path.name}.{len(self.pieces):06d}.incomplete")
        piece.unlink(missing_ok=True)
        write_places(table, piece)
        self.pieces.append(piece)
        self.clipped += clipped
        self.values += places["vector"].size

    def finish(self) -> dict[str, Any]:
        """Put the part in place, and say what it holds."""
        rows = merge_places(self.pieces, self.path)
        self.discard()
        return {"rows": rows, "clipped": self.clipped, "values": self.values}

    def discard(self) -> None:
        """Remove the pieces."""
        for piece in self.pieces:
            piece.unlink(missing_ok=True)


def write_tables(marks: Mapping[int, Mapping[str, Any]], folder: Path, out: Path, name: str) -> list[str]:
    """Write the places of all blocks: as `<name>.parquet`, or several files in a folder of that name.

    Args:
        marks: of the blocks, by number.
        folder: of the parts.
        out: folder of the map.
        name: `"scores"` or `"embeddings"`.

    Returns:
        Names of the files below `out`.
    """
    described = [mark["files"][PLACES] for mark in marks.values() if PLACES in mark["files"]]
    files: list[list[Path]] = []
    rows = 0
    for part in described:
        if not files or (rows := rows + part["rows"]) > ROWS_A_FILE:
            files.append([])
            rows = part["rows"]
        files[-1].append(folder / part["name"])
    names = [f"{name}/part-{number:05d}.parquet" for number in range(len(files))]
    if name == "scores":
        files, names = (
            [[path for of_file in files for path in of_file]] if files else [],
            ["scores.parquet"] * bool(files),
        )
    for parts, written in zip(files, names, strict=True):
        merge_places(parts, out / written)
    return names


def clipped_share(marks: Mapping[int, Mapping[str, Any]]) -> float:
    """Share of the numbers of all vectors that were clipped."""
    described = [mark["files"][PLACES] for mark in marks.values() if PLACES in mark["files"]]
    return sum(part["clipped"] for part in described) / max(1, sum(part["values"] for part in described))
