"""Tables of places are opened by others, and land where they should."""

import json

import duckdb
import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from rasterio.crs import CRS
from rasterio.warp import transform, transform_bounds

from fusmae_hf.embeddings.geoparquet import footprints, merge_places, places_table, vector_column, write_places
from fusmae_hf.embeddings.quantisation import (
    FILE,
    Quantisation,
    quantisation_of,
    read_quantisation,
    write_quantisation,
)
from fusmae_hf.readers.grids import Grid

UTM = Grid(CRS.from_epsg(32632), (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_300_000.0), 80, 96)
SOUTH_UP = Grid(UTM.crs, (10.0, 0.0, 600_000.0, 0.0, 10.0, 5_299_200.0), 80, 96)
SIZE = 4


def table_of(grid, first_row, stop_row, dtype=np.float32, scene="one"):
    """Tokens of 8 px; each vector holds row and column."""
    rows, columns = (
        part.ravel() for part in np.meshgrid(np.arange(first_row, stop_row), np.arange(12), indexing="ij")
    )
    values = np.stack([rows, columns, rows, columns], axis=1).astype(dtype)
    facts = {"scene": pa.scalar(scene), "row": pa.array(rows, pa.int32()), "column": pa.array(columns, pa.int32())}
    there = columns != 3
    return places_table(
        grid, rows * 8, columns * 8, (8, 8), facts, {"fused": vector_column(values, there)}, {"patch": 8}
    )


@pytest.fixture
def merged(tmp_path):
    """Three parts, one of them empty, as one file."""
    parts = []
    for number, (first, stop) in enumerate([(0, 4), (4, 4), (4, 10)]):
        parts.append(tmp_path / f"{number}.parquet")
        write_places(table_of(UTM, first, stop), parts[-1])
    assert merge_places(parts, tmp_path / "all.parquet") == 120
    return tmp_path / "all.parquet"


def test_geopandas_opens_it_in_longitude_and_latitude_at_the_bounds_of_the_raster(merged):
    frame = geopandas.read_parquet(merged)
    assert frame.crs == "OGC:CRS84"
    assert len(frame) == 120
    bounds = transform_bounds(UTM.crs, "OGC:CRS84", 600_000, 5_299_200, 600_960, 5_300_000, densify_pts=2)
    np.testing.assert_allclose(frame.total_bounds, bounds, atol=1e-7)
    geo = json.loads(pq.read_schema(merged).metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["columns"][geo["primary_column"]]["bbox"] == frame.total_bounds.tolist()
    assert geo["columns"]["geometry"]["geometry_types"] == ["Polygon"]
    assert "crs" not in geo["columns"]["geometry"]  # which means OGC:CRS84


def test_a_footprint_is_the_token_on_the_ground(merged):
    frame = geopandas.read_parquet(merged)
    one = frame[(frame.row == 7) & (frame.column == 5)].iloc[0]
    assert one.crs == "EPSG:32632"
    assert (one.x, one.y) == UTM.to_map(5 * 8 + 4, 7 * 8 + 4)
    back = frame.geometry.to_crs("EPSG:32632")[one.name].bounds
    np.testing.assert_allclose(back, (600_400, 5_299_360, 600_480, 5_299_440), atol=1e-5)
    assert one.fused.tolist() == [7, 5, 7, 5]
    assert frame[frame.column == 3].fused.isna().all()


def test_vectors_are_lists_of_one_length(merged):
    assert pq.read_schema(merged).field("fused").type == pa.list_(pa.float32(), SIZE)


def test_the_bounding_box_of_each_row_selects_rows(merged):
    whole = geopandas.read_parquet(merged)
    place = whole[(whole.row == 2) & (whole.column == 2)].geometry.iloc[0].centroid
    box = (place.x - 1e-6, place.y - 1e-6, place.x + 1e-6, place.y + 1e-6)
    assert geopandas.read_parquet(merged, bbox=box)[["row", "column"]].to_numpy().tolist() == [[2, 2]]


def test_duckdb_reads_vectors_and_geometry(merged):
    query = f'SELECT fused, bbox.xmin, geometry FROM \'{merged}\' WHERE "row" = 7 AND "column" = 5'
    (vector, west, geometry), *others = duckdb.sql(query).fetchall()
    assert not others
    assert list(vector) == [7, 5, 7, 5]
    text = geometry if isinstance(geometry, str) else None
    shape = shapely.from_wkt(text) if text else shapely.from_wkb(bytes(geometry))
    assert shape.bounds[0] == west


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_each_dtype_of_vectors_is_read_again(tmp_path, dtype):
    write_places(table_of(UTM, 0, 2, dtype), tmp_path / "some.parquet")
    column = pq.read_table(tmp_path / "some.parquet").column("fused")
    assert column.type == pa.list_(pa.from_numpy_dtype(dtype), SIZE)
    assert (column[17].as_py(), column[15].as_py()) == ([1, 5, 1, 5], None)


@pytest.mark.parametrize("grid", [UTM, SOUTH_UP], ids=["north up", "south up"])
def test_rings_turn_counter_clockwise(grid):
    shapes, bounds = footprints(grid, np.array([0, 8]), np.array([0, 8]), (8, 8))
    for shape, box in zip(shapely.from_wkb(shapes), bounds, strict=True):
        assert shape.exterior.is_ccw
        assert shape.bounds == tuple(box)


def test_a_place_across_the_antimeridian_is_two_polygons():
    x, y = (of_axis[0] for of_axis in transform("OGC:CRS84", "EPSG:32601", [180.0], [65.0]))
    grid = Grid(CRS.from_epsg(32601), (10.0, 0.0, x - 60, 0.0, -10.0, y), 8, 24)
    shapes, bounds = footprints(grid, np.zeros(3, int), np.array([-8, 0, 8]), (8, 8))
    west, across, east = shapely.from_wkb(shapes)
    assert [one.geom_type for one in (west, across, east)] == ["Polygon", "MultiPolygon", "Polygon"]
    assert west.bounds[0] > 179
    assert east.bounds[2] < -179
    assert across.is_valid
    assert bounds[1].tolist() == [-180, across.bounds[1], 180, across.bounds[3]]
    assert across.area == pytest.approx((west.area + east.area) / 2, rel=1e-3)
    assert all(part.exterior.is_ccw for part in across.geoms)


def test_a_place_that_ends_at_the_antimeridian_is_one_polygon():
    grid = Grid(CRS.from_epsg(4326), (0.001, 0.0, 179.992, 0.0, -0.001, 10.0), 8, 16)
    shapes, _ = footprints(grid, np.zeros(2, int), np.array([0, 8]), (8, 8))
    assert [one.geom_type for one in shapely.from_wkb(shapes)] == ["Polygon", "Polygon"]
    np.testing.assert_allclose(shapely.bounds(shapely.from_wkb(shapes))[:, [0, 2]], [[179.992, 180], [-180, -179.992]])


def test_a_place_with_a_pole_is_refused():
    grid = Grid(CRS.from_epsg(3413), (10.0, 0.0, -40.0, 0.0, -10.0, 40.0), 8, 8)
    with pytest.raises(ValueError, match="holds a pole"):
        footprints(grid, np.zeros(1, int), np.zeros(1, int), (8, 8))


def test_parts_of_two_tables_are_not_merged(tmp_path):
    write_places(table_of(UTM, 0, 1), tmp_path / "one.parquet")
    write_places(table_of(UTM, 1, 2, np.float16), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="not parts of one table"):
        merge_places([tmp_path / "one.parquet", tmp_path / "two.parquet"], tmp_path / "all.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]


def test_eight_bits_keep_a_value_to_half_a_step_and_count_what_is_clipped():
    values = np.random.default_rng(0).normal(3, 2, (5000, 6)).astype(np.float32)
    found = quantisation_of(values)
    levels, clipped = found.levels(values)
    inside = (values >= found.offset) & (values <= found.offset + 255 * found.scale)
    error = np.abs(found.offset + found.scale * levels - values)
    assert (error <= found.scale * 0.5001)[inside].all()
    assert 0 < clipped <= (~inside).sum() == pytest.approx(0.002 * values.size, rel=0.2)


def test_a_quantisation_belongs_to_a_checkpoint(tmp_path):
    written = {"fused": Quantisation(np.full(3, 0.5, np.float32), np.arange(3, dtype=np.float32))}
    with pytest.raises(ValueError, match=r"is no .*embedding_quantisation.json.*fusmae stats SHARDS --embeddings"):
        read_quantisation(tmp_path, "abc", "patch", ["fused"])
    write_quantisation(tmp_path, "abc", {"patch": written}, pairs=7)
    read = read_quantisation(tmp_path, "abc", "patch", ["fused"])["fused"]
    assert (read.scale.tolist(), read.offset.tolist()) == ([0.5] * 3, [0, 1, 2])
    with pytest.raises(ValueError, match="other weights"):
        read_quantisation(tmp_path, "abd", "patch", ["fused"])
    with pytest.raises(ValueError, match="says nothing of sar, only of fused"):
        read_quantisation(tmp_path, "abc", "patch", ["sar"])
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        read_quantisation(tmp_path, "abc", "patch", ["fused"])
