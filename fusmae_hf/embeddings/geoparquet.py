"""Tables of places with vectors as GeoParquet 1.1.

Each row is a footprint on the ground: a polygon of longitude and latitude (OGC:CRS84), in two where it crosses the
antimeridian. https://geoparquet.org/releases/v1.1.0/ says what the metadata `geo` must hold.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusmae_hf.files.atomic import explain_failed_write, flush_to_disk, incomplete_path

if TYPE_CHECKING:
    from fusmae_hf.readers.grids import Grid

GEOMETRY, BOUNDS = "geometry", "bbox"

ROW_GROUP_ROWS = 16_384
"""Rows that a reader takes at once."""

_POLYGON = np.dtype([("order", "u1"), ("kind", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))])
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_CRS84 = "OGC:CRS84"
_KINDS = {"Polygon": 3, "MultiPolygon": 6}


def places_table(
    grid: Grid,
    rows: np.ndarray,
    columns: np.ndarray,
    size: tuple[int, int],
    facts: Mapping[str, Any],
    vectors: Mapping[str, pa.FixedSizeListArray],
    described: Mapping[str, Any],
) -> pa.Table:
    """Places on a grid, with what is known of them.

    Args:
        grid: of pixels, in any CRS.
        rows, columns: `(places,)` integers, the first pixel of each place; it may lie outside of the grid.
        size: height and width of a place in pixels.
        facts: further columns by name, arrays of as many values or one value for all.
        vectors: see `vector_column`.
        described: what holds for all places, as JSON can say it; under `fusmae` in the metadata.

    Returns:
        A table with `geometry` (WKB), `bbox`, `crs`, `x` and `y` (the centre in that CRS), the facts and the vectors.

    Raises:
        ValueError: a place lies where its CRS is not defined.
    """
    shapes, bounds = footprints(grid, rows, columns, size)
    x, y = grid.to_map(np.asarray(columns) + size[1] / 2, np.asarray(rows) + size[0] / 2)
    number = len(rows)
    found: dict[str, pa.Array] = {
        GEOMETRY: pa.array(shapes, pa.binary()),
        BOUNDS: pa.StructArray.from_arrays([pa.array(bounds[:, side]) for side in range(4)], _SIDES),
        "crs": pa.repeat(pa.scalar(grid.crs.to_string()), number),
        "x": pa.array(np.broadcast_to(x, number)),
        "y": pa.array(np.broadcast_to(y, number)),
    }
    for name, values in facts.items():
        found[name] = pa.repeat(values, number) if isinstance(values, pa.Scalar) else pa.array(values)
    table = pa.table({**found, **vectors})
    kinds = [name for name, code in _KINDS.items() if any(shape[1] == code for shape in shapes)]
    extents = [[*bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0)]] if number else []
    return table.replace_schema_metadata(
        {"geo": json.dumps(_geo(kinds, _union(extents))), "fusmae": json.dumps(described)}
    )


def vector_column(values: np.ndarray, there: np.ndarray | None = None) -> pa.FixedSizeListArray:
    """Vectors as a column of lists of one length.

    Args:
        values: `(places, size)` float32, float16 or uint8.
        there: `(places,)` bool, which have a vector; the others are null.
    """
    values = np.ascontiguousarray(values)
    mask = None if there is None or there.all() else pa.array(~there)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1], mask=mask)


def write_places(table: pa.Table, path: Path) -> None:
    """Write a table of places. The file appears when it is whole and on the disk.

    Raises:
        OSError: it cannot be written.
    """
    _write([table], table.schema, path)


def merge_places(parts: Sequence[Path], path: Path) -> int:
    """Write the rows of several files, which `write_places` wrote, as one.

    Args:
        parts: files of the same columns; some may be empty.
        path: the file to write.

    Returns:
        Number of rows.

    Raises:
        ValueError: no file is given, or columns or what holds for all places differ.
        OSError: a file cannot be read or written.
    """
    if not parts:
        raise ValueError(f"No part was given to write {path.name} from.")
    schemas = [pq.read_schema(part) for part in parts]
    for part, schema in zip(parts, schemas, strict=True):
        if not schema.equals(schemas[0]) or schema.metadata[b"fusmae"] != schemas[0].metadata[b"fusmae"]:
            raise ValueError(f"{part} and {parts[0]} are not parts of one table: their columns or settings differ.")
    described = [json.loads(schema.metadata[b"geo"])["columns"][GEOMETRY] for schema in schemas]
    kinds = [kind for kind in _KINDS if any(kind in one["geometry_types"] for one in described)]
    extents = [one["bbox"] for one in described if "bbox" in one]
    metadata = {**schemas[0].metadata, b"geo": json.dumps(_geo(kinds, _union(extents))).encode()}
    pieces = (batch for part in parts for batch in pq.ParquetFile(part).iter_batches(ROW_GROUP_ROWS))
    return _write(pieces, schemas[0].with_metadata(metadata), path)


def footprints(
    grid: Grid, rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]
) -> tuple[list[bytes], np.ndarray]:
    """Outlines of places, of longitude and latitude.

    Sides are straight in longitude and latitude, which for places of some kilometres is what they are on the ground to
    within centimetres.

    Args:
        grid, rows, columns, size: as in `places_table`.

    Returns:
        Well-known binary of each, a polygon turning counter-clockwise, or two where it crosses the antimeridian; and
        `(places, 4)` float64, the least and largest longitude and latitude: west, south, east, north.

    Raises:
        ValueError: a place lies where the CRS of the grid is not defined.
    """
    from rasterio.warp import transform

    rows, columns = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    down, along = np.array([0, size[0], size[0], 0, 0]), np.array([0, 0, size[1], size[1], 0])
    corners = np.stack([rows[:, None] + down, columns[:, None] + along], axis=-1)
    # Neighbours share their corners.
    places, which = np.unique(corners.reshape(-1, 2), axis=0, return_inverse=True)
    longitudes, latitudes = transform(
        grid.crs, _CRS84, *grid.to_map(places[:, 1].astype(float), places[:, 0].astype(float))
    )
    points = np.stack([longitudes, latitudes], axis=-1).reshape(-1, 2)[which.reshape(-1)].reshape(-1, 5, 2)
    if not np.isfinite(points).all():
        raise ValueError(f"Some places lie where {grid.crs.to_string()} is not defined: {grid}.")
    points[..., 0] = (points[..., 0] + 180) % 360 - 180
    torn = np.ptp(points[..., 0], axis=1) > 180
    points[torn, :, 0] %= 360  # one piece again, across or at 180 degrees
    if (np.ptp(points[..., 0], axis=1) > 180).any():
        raise ValueError(f"A place holds a pole, which longitude and latitude cannot outline: {grid}.")
    beyond = points[..., 0].min(axis=1) >= 180
    points[beyond, :, 0] -= 360
    across = points[..., 0].max(axis=1) > 180
    first, second = points[:, 1] - points[:, 0], points[:, 2] - points[:, 1]
    turned = first[:, 0] * second[:, 1] < first[:, 1] * second[:, 0]
    points[turned] = points[turned, ::-1]
    polygons = np.zeros(len(points), _POLYGON)
    polygons["order"], polygons["kind"], polygons["rings"], polygons["points"] = 1, 3, 1, 5
    polygons["xy"] = points
    shapes = polygons.view(f"V{_POLYGON.itemsize}").tolist()
    bounds = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    for index in np.flatnonzero(across):
        shapes[index] = _split(points[index, :4])
        bounds[index, [0, 2]] = -180, 180
    return shapes, bounds


def _split(points: np.ndarray) -> bytes:
    """A quadrilateral across 180 degrees, in two, as well-known binary of a multipolygon."""
    halves = []
    for side, shift in ((1, 0.0), (-1, 360.0)):
        kept = []
        for one, other in zip(points, np.roll(points, -1, axis=0), strict=True):
            here, there = (side * (180 - point[0]) for point in (one, other))
            if here >= 0:
                kept.append(one)
            if here * there < 0:
                kept.append(one + (other - one) * here / (here - there))
        ring = np.array([*kept, kept[0]]) - (shift, 0)
        halves.append(struct.pack("<BIII", 1, 3, 1, len(ring)) + ring.astype("<f8").tobytes())
    return struct.pack("<BII", 1, 6, 2) + b"".join(halves)


def _union(extents: Sequence[Sequence[float]]) -> list[float] | None:
    if not extents:
        return None
    lowest, highest = np.min(extents, axis=0), np.max(extents, axis=0)
    return [float(lowest[0]), float(lowest[1]), float(highest[2]), float(highest[3])]


def _geo(kinds: Sequence[str], extent: Sequence[float] | None) -> dict[str, Any]:
    """The metadata `geo`. No `crs` means OGC:CRS84."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": list(kinds),
        "orientation": "counterclockwise",
        "edges": "planar",
        "covering": {"bbox": {side: [BOUNDS, side] for side in _SIDES}},
    }
    if extent is not None:
        column["bbox"] = list(extent)
    return {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}


def _write(pieces: Any, schema: pa.Schema, path: Path) -> int:
    incomplete, rows = incomplete_path(path), 0
    try:
        with explain_failed_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with incomplete.open("xb") as file:
                with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                    for piece in pieces:
                        rows += piece.num_rows
                        if isinstance(piece, pa.Table):
                            writer.write_table(piece, ROW_GROUP_ROWS)
                        else:
                            writer.write_batch(piece.replace_schema_metadata(schema.metadata))
                flush_to_disk(file)
            os.replace(incomplete, path)
    finally:
        incomplete.unlink(missing_ok=True)
    return rows
