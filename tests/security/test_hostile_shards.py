"""Shards of somebody else: what cannot be is refused by name, in memory in proportion to the size of the file."""

import dataclasses
import io
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusmae_hf.evaluation.features import read_scene_labels
from fusmae_hf.preparation.verification import verify_shards
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.decoding import DamagedShardError
from fusmae_hf.shards.format import FILE_NAME
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.shards.reading import ShardFile, check_decoded_size
from fusmae_hf.training.finetuning.labels import label_maps
from tests.small_shards import INFO, edit_shard, make_pair, write_shards

from .test_dataset_info import ANY_JSON

SHARD = "data/train-00000-of-00001.parquet"
LARGEST = 2**31 - 1
WAYS = pytest.mark.parametrize("way", ["local", "streaming", "url"])


@pytest.fixture
def peak_memory() -> Iterator[pa.MemoryPool]:
    """A memory pool of Arrow that has held nothing yet; ask it for `max_memory()`."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    yield pool
    pa.set_memory_pool(before)


def read_all(folder, way: str) -> dict:
    address = f"file://{folder}" if way == "url" else folder
    pairs = load_pairs(address, streaming=way != "local")
    return pairs.__getitems__(list(range(len(pairs))))


def small_folder(path, info=INFO, number: int = 6):
    return write_shards(path, info, train=[make_pair(at, info) for at in range(number)])


def rewrite(folder, change, **options) -> None:
    """Write the shard again from a changed table, with the same row groups and description."""
    path = folder / SHARD
    file = pq.ParquetFile(path)
    described, rows = file.metadata.metadata, file.metadata.row_group(0).num_rows
    table = change(file.read())
    options = {"compression": "none", "use_dictionary": False} | options
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=rows)
        writer.add_key_value_metadata(described)


def believe(folder, rows: list[int]) -> None:
    """Let `dataset_info.json` say that the shard has these row groups."""
    path = folder / FILE_NAME
    content = json.loads(path.read_bytes())
    content["splits"]["train"]["shards"][0] |= {"rows": sum(rows), "row_group_rows": rows}
    path.write_text(json.dumps(content))


@WAYS
@pytest.mark.parametrize("sensor", ["sar", "optical"])
@pytest.mark.parametrize(
    "shape",
    [
        [2, 1_000_000_000, 1_000_000_000],
        [LARGEST, LARGEST, LARGEST],
        [2, -8, -8],
        [-2, -1, 64],
        [0, 8, 8],
        [2, 8, None],
        [2, 1 << 16, 1 << 15],
        [1, 1, 1],
        None,
    ],
    ids=str,
)
def test_a_shape_that_the_bytes_do_not_have_is_refused(tmp_path, way, sensor, shape):
    folder = small_folder(tmp_path)
    edit_shard(folder / SHARD, lambda columns: columns[f"{sensor}_shape"].__setitem__(1, shape))
    with pytest.raises(DamagedShardError, match=r"train-00000-of-00001\.parquet is damaged.*pair-001"):
        read_all(folder, way)


@WAYS
@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("dtype", ["O", "object", "V8", "<U10", "S4", ">f4", "=f4", "M8[s]", "float32\0", "", None])
def test_a_dtype_that_is_no_plain_number_is_refused(tmp_path, way, dtype, rows):
    folder = small_folder(tmp_path)

    def edit(columns):
        for row in range(6) if rows == "all" else [1]:
            columns["sar_dtype"][row] = dtype

    edit_shard(folder / SHARD, edit)
    with pytest.raises(DamagedShardError, match=r"is damaged: pair 'pair-00\d' declares sar"):
        read_all(folder, way)


@pytest.mark.parametrize("shape", [[4, LARGEST, LARGEST], [4, 7, 8], [3, 8, 8], [4, 8, 0]])
def test_bands_of_several_resolutions_are_held_to_their_shape(tmp_path, shape):
    info = dataclasses.replace(INFO, optical_factors=(1, 1, 2, 4))
    folder = small_folder(tmp_path, info)
    edit_shard(folder / SHARD, lambda columns: columns["optical_shape"].__setitem__(1, shape))
    for way in ("local", "streaming", "url"):
        with pytest.raises(DamagedShardError, match="declares optical"):
            read_all(folder, way)


@WAYS
@pytest.mark.parametrize("column", ["id", "checksum", "sar", "optical", "sar_dtype"])
def test_a_missing_value_is_refused(tmp_path, way, column):
    folder = small_folder(tmp_path)

    def edit(columns):
        columns[column][1] = None

    edit_shard(folder / SHARD, edit, seal=False)
    with pytest.raises(DamagedShardError, match=r"train-00000-of-00001\.parquet"):
        read_all(folder, way)


@WAYS
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("id", pa.array([1, 2, 3, 4, 5, 6])),
        ("checksum", pa.array(["1"] * 6)),
        ("sar", pa.array([["a"]] * 6)),
        ("sar_shape", pa.array([[2, 8, 8]] * 6, pa.list_(pa.int64()))),
        ("labels", pa.array([{"a": {"b": [1]}}] * 6)),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path, way, column, values):
    folder = small_folder(tmp_path)
    rewrite(folder, lambda table: table.set_column(table.schema.get_field_index(column), column, values))
    with pytest.raises(DamagedShardError, match=f"no column '{column}'"):
        read_all(folder, way)


@WAYS
def test_a_column_that_stands_twice_is_refused(tmp_path, way):
    folder = small_folder(tmp_path)
    rewrite(folder, lambda table: table.append_column("id", table.column("id")))
    with pytest.raises(ValueError, match=r"no column 'id'|cannot be read"):
        read_all(folder, way)


@WAYS
def test_fewer_rows_than_declared_are_refused(tmp_path, way):
    folder = small_folder(tmp_path)
    believe(folder, [4, 1])
    with pytest.raises(ValueError, match="of the same preparation"):
        read_all(folder, way)


def zeros(table: pa.Table) -> pa.Table:
    """One pair after the other of 60 MB of zeros."""
    arrays = [bytes(60_000_000)] * len(table)
    return table.set_column(2, table.schema.field("sar"), pa.array(arrays, pa.large_binary()))


def many_missing_labels(table: pa.Table) -> pa.Table:
    """Eight million missing labels, of the first pair."""
    ends = pa.array([0, *[8_000_000] * len(table)], pa.int32())
    labels = pa.ListArray.from_arrays(ends, pa.nulls(8_000_000, pa.string()))
    return table.set_column(table.schema.get_field_index("labels"), "labels", labels)


@WAYS
@pytest.mark.parametrize(
    ("bomb", "options"),
    [
        (zeros, {"compression": "zstd"}),
        (zeros, {"compression": "gzip", "data_page_version": "2.0"}),
        (many_missing_labels, {}),
    ],
    ids=["zstd", "gzip", "missing values"],
)
def test_a_page_that_swells_is_refused_before_it_does(tmp_path, way, bomb, options, peak_memory):
    folder = small_folder(tmp_path)
    rewrite(folder, bomb, **options)
    assert (folder / SHARD).stat().st_size < 1_500_000
    peak = peak_memory.max_memory()
    with pytest.raises(DamagedShardError, match="would decode to"):
        read_all(folder, way)
    assert peak_memory.max_memory() <= peak + 20_000_000


@pytest.fixture(scope="module")
def dictionary_bomb(tmp_path_factory):
    """100,000 rows whose ids are one text of 100 kB in a dictionary: 10 GB out of some megabytes."""
    folder, rows = small_folder(tmp_path_factory.mktemp("dictionary")), 100_000

    def change(table: pa.Table) -> pa.Table:
        table = pa.concat_tables([table.slice(0, 1)] * rows).drop_columns(["sar", "optical"])
        indices = pa.array(np.zeros(rows, np.int32))
        ids = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 100_000]))
        table = table.set_column(0, "id", ids)
        one = pa.array([b"12345678"] * rows, pa.large_binary())
        return table.append_column("sar", one).append_column("optical", one)

    path = folder / SHARD
    file = pq.ParquetFile(path)
    table = change(file.read().replace_schema_metadata(None))
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=["id"], store_schema=False) as writer:
        writer.write_table(table, row_group_size=rows)
        writer.add_key_value_metadata(file.metadata.metadata)
    believe(folder, [rows])
    return folder


@WAYS
def test_a_dictionary_of_one_long_value_is_refused_before_it_is_spread(dictionary_bomb, way, peak_memory):
    with pytest.raises(DamagedShardError, match="would decode to"):
        read_all(dictionary_bomb, way)
    assert peak_memory.max_memory() < 100_000_000


def test_tools_refuse_such_pages_too(tmp_path, peak_memory):
    folder = small_folder(tmp_path)
    rewrite(folder, many_missing_labels)
    peak = peak_memory.max_memory()
    with pytest.raises(DamagedShardError, match="would decode to"):
        read_scene_labels(load_pairs(folder, streaming=True))
    report = verify_shards(folder)
    assert any("would decode to" in problem.message for problem in report.errors)
    assert peak_memory.max_memory() <= peak + 20_000_000


def test_leaving_bad_files_out_leaves_bombs_out(tmp_path):
    folder = write_shards(tmp_path, train=[make_pair(at) for at in range(12)])
    path = folder / "data/train-00001-of-00002.parquet"
    path.rename(folder / SHARD.replace("of-00001", "of-00009"))
    (folder / SHARD.replace("of-00001", "of-00009")).rename(folder / SHARD)
    rewrite(folder, many_missing_labels)
    (folder / SHARD).rename(path)
    pairs = load_pairs(folder, on_bad_files="skip")
    assert list(pairs.bad_files) == ["data/train-00001-of-00002.parquet"]
    assert len(pairs) == 6


@pytest.mark.parametrize("dtype", ["O", "V8", None])
def test_label_maps_of_no_number_are_refused(tmp_path, dtype):
    maps = np.zeros((8, 8), np.uint8)
    folder = write_shards(tmp_path, train=[make_pair(at, label_map=maps) for at in range(6)])
    edit_shard(folder / SHARD, lambda columns: columns["label_map_dtype"].__setitem__(1, dtype))
    with pytest.raises(DamagedShardError, match="row 1 has no label map"):
        list(label_maps(load_pairs(folder, streaming=True)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of shards, the bytes of its one shard, and the pairs in it."""
    folder = small_folder(tmp_path_factory.mktemp("sound"))
    return folder, (folder / SHARD).read_bytes(), read_all(folder, "streaming")


@settings(max_examples=400, derandomize=True, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_noticed_or_change_nothing(sound, data):
    folder, content, expected = sound
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        # Footer and headers are a small part of the bytes, and the one that leads astray.
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 3000, len(content) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    (folder / SHARD).write_bytes(changed)
    try:
        batch = read_all(folder, data.draw(st.sampled_from(["local", "streaming", "url"])))
    except DamagedShardError:
        return
    assert batch["id"] == expected["id"]
    assert batch["optical"].numpy().tobytes() == expected["optical"].numpy().tobytes()
    assert batch["sar"].numpy().tobytes() == expected["sar"].numpy().tobytes()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.binary(max_size=60) | ANY_JSON.map(lambda content: json.dumps(content).encode()))
def test_any_description_in_a_footer_is_refused(sound, described):
    folder, content, _ = sound
    (folder / SHARD).write_bytes(content)
    (shard,) = read_dataset_info(folder).shards("train")
    table, file = pq.read_table(folder / SHARD), folder / SHARD
    with pq.ParquetWriter(file, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None), row_group_size=4)
        writer.add_key_value_metadata({b"fusmae": described})
    with pytest.raises(DamagedShardError, match=r"train-00000-of-00001"):
        ShardFile(str(folder), shard).footer()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    values=st.lists(st.text(max_size=30), min_size=1, max_size=40),
    compression=st.sampled_from(["none", "zstd", "snappy", "gzip"]),
    dictionary=st.booleans(),
    version=st.sampled_from(["1.0", "2.0"]),
    page=st.sampled_from([1, 100, 1_000_000]),
)
def test_what_ordinary_files_hold_is_within_bounds(values, compression, dictionary, version, page):
    file = io.BytesIO()
    table = pa.table({"text": values, "number": list(range(len(values))), "list": [[value] * 3 for value in values]})
    pq.write_table(
        table, file, compression=compression, use_dictionary=dictionary, data_page_version=version,
        data_page_size=page, write_batch_size=4,
    )  # fmt: skip
    check_decoded_size(pq.read_metadata(file), 0)
