"""`dataset_info.json` of somebody else: taken over where it is right, refused with a message where it is not."""

import copy
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusmae_hf.preparation.state import read_summary
from fusmae_hf.shards.dataset_info import DatasetInfo, read_dataset_info
from fusmae_hf.shards.format import FILE_NAME
from fusmae_hf.shards.loading import load_pairs
from tests.small_shards import write_shards

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 10**400, -1]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("hostile"))
    return folder, json.loads((folder / FILE_NAME).read_bytes())


@pytest.fixture(scope="module")
def folder(written):
    """A folder of shards, whose `dataset_info.json` each test replaces."""
    return written[0]


@pytest.fixture(scope="module")
def valid(written):
    """What `dataset_info.json` held."""
    return written[1]


def read(folder, text: str | bytes) -> DatasetInfo:
    folder.joinpath(FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    return read_dataset_info(folder)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """Keys that lead to every value of some JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(content: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    content = copy.copy(content)
    content[path[0]] = replaced(content[path[0]], path[1:], value)
    return content


@settings(max_examples=300, derandomize=True, deadline=None)
@given(data=st.data())
def test_one_value_replaced_by_anything_is_refused_or_right(folder, valid, data):
    place = data.draw(st.sampled_from([path for path in places(valid) if path]))
    content = replaced(valid, place, data.draw(ANY_JSON))
    try:
        dataset = read(folder, json.dumps(content))
    except ValueError:
        return
    assert json.loads(json.dumps(dataset.to_json()))["splits"].keys() == valid["splits"].keys()
    assert dataset.rows("train") == sum(shard.rows for shard in dataset.shards("train"))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(ANY_JSON | st.dictionaries(st.sampled_from(["info", "splits", "format_version", "left_out"]), ANY_JSON))
def test_any_other_json_is_refused(folder, content):
    with pytest.raises(ValueError, match=r"dataset_info\.json cannot be used"):
        read(folder, json.dumps(content))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(folder, content):
    with pytest.raises(ValueError, match=r"dataset_info\.json cannot be used"):
        read(folder, content)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"info": {"name": NaN}}', "NaN is no number"),
        ('{"info": -Infinity}', "-Infinity is no number"),
        ('{"info": 1e999}', "1e999 is too large"),
        ('{"info": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"info": 1, "info": 2}', "'info' stands twice"),
        ('{"info": "\\ud800"', "cannot be used"),
    ],
)
def test_json_that_readers_disagree_on_is_refused(folder, text, reason):
    with pytest.raises(ValueError, match=reason):
        read(folder, text)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "data/../../secret-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet\n",
        "data/train-00000-of-00001.parquet\0",
        "data\\train-00000-of-00001.parquet",
        "data/" + "x" * 5000 + "-00000-of-00001.parquet",
        "data/train-" + "0" * 5000 + "-of-00001.parquet",
        "https://example.org/train-00000-of-00001.parquet",
        "data/train-٠٠٠٠٠-of-٠٠٠٠١.parquet",
        7,
        None,
        ["data/train-00000-of-00001.parquet"],
    ],
    ids=lambda name: repr(name)[:30],
)
def test_a_shard_name_that_leads_elsewhere_is_refused(folder, valid, name):
    content = replaced(valid, ("splits", "train", "shards", 0, "name"), name)
    with pytest.raises(ValueError, match="shard name") as refusal:
        read(folder, json.dumps(content))
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([2**62, 2**62], "at most 1,000,000"),
        ([10**30], "at most 1,000,000"),
        ([True, 5], "whole numbers"),
        ([2.0, 4], "whole numbers"),
        ([-1, 7], "do not add up"),
        ([], "do not add up"),
        ([7], "do not add up"),
        ("33", "whole numbers"),
    ],
)
def test_row_groups_that_cannot_be_are_refused(folder, valid, rows, reason):
    content = replaced(valid, ("splits", "train", "shards", 0, "row_group_rows"), rows)
    with pytest.raises(ValueError, match=reason):
        read(folder, json.dumps(content))


def test_row_groups_that_lie_are_found_before_anything_of_their_size_is_made(folder, valid):
    shard = ("splits", "train", "shards", 0)
    content = replaced(valid, (*shard, "row_group_rows"), [1_000_000] * 4000)
    read(folder, json.dumps(replaced(content, (*shard, "rows"), 4_000_000_000)))
    tracemalloc.start()
    try:
        for options in ({}, {"streaming": True}):
            with pytest.raises(ValueError, match="of the same preparation"):
                load_pairs(folder, **options)[0]
        assert tracemalloc.get_traced_memory()[1] < 100_000_000  # 4 billion rows would take 32 GB
    finally:
        tracemalloc.stop()


def test_a_file_listed_twice_or_no_split_at_all_is_refused(folder, valid):
    shards = valid["splits"]["train"]["shards"]
    with pytest.raises(ValueError, match="lists a file twice"):
        read(folder, json.dumps(replaced(valid, ("splits", "train", "shards"), [*shards, shards[0]])))
    with pytest.raises(ValueError, match="lists no split"):
        read(folder, json.dumps(replaced(valid, ("splits",), {})))


def test_a_file_of_endless_length_is_not_read_to_its_end(tmp_path):
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.truncate(2**40)  # a hole: no byte of it is on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="longer than"):
            read_dataset_info(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a\n---\nb"),
        ("name", "\x1b[2J"),
        ("license", "CC\u202eYB"),
        ("source", "x" * 20_000),
        ("sar_bands", []),
        ("sar_bands", "VV"),
        ("sar_bands", ["VV", 2]),
        ("optical_offset", True),
        ("optical_offset", 1e31),
        ("optical_factors", [0, 1, 1, 1]),
        ("optical_factors", [-1, 1, 1, 1]),
        ("optical_factors", [2]),
        ("optical_units", "furlongs"),
        ("statistics", "../../home/somebody"),
        ("statistics", "/etc"),
        ("class_names", ["water", "forest\x00", "town"]),
        ("class_names", {"water": 1}),
        ("map_no_data", 1.5),
        ("extra_columns", {"a\nb": "string"}),
        ("extra_columns", ["a"]),
        ("simulated", "no"),
        ("unknown", 1),
    ],
)
def test_what_is_said_of_all_pairs_is_checked(folder, valid, field, value):
    content = copy.deepcopy(valid)
    content["info"][field] = value
    with pytest.raises(ValueError, match=field):
        read(folder, json.dumps(content))


def test_reasons_for_leaving_out_cannot_rewrite_the_terminal(folder, valid):
    left_out = {"pairs": 2, "reasons": {"\x1b[31mred": 2}}
    assert read(folder, json.dumps(valid | {"left_out": left_out})).left_out_reasons == {"?[31mred": 2}


@settings(max_examples=60, derandomize=True, deadline=None)
@given(ANY_JSON)
def test_the_plan_of_a_preparation_by_somebody_else_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "preparation").mkdir()
    (folder / "preparation/plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="this version cannot read"):
        read_summary(folder)


def test_a_preparation_that_is_no_plan_is_refused(folder, valid):
    read(folder, json.dumps(valid | {"preparation": {"arguments": {}}}))
    with pytest.raises(ValueError, match="this version cannot read"):
        read_summary(folder)
