import json
import re
import shutil
import warnings

import fsspec
import numpy as np
import pytest

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.preparation.statistics import band_statistics
from fusmae_hf.preparation.verification import verify_shards
from fusmae_hf.preparation.verification_report import CHECKS
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.format import FILE_NAME
from tests.small_shards import INFO, SIZE, edit_shard, make_pair, run_command, with_pixels, write_shards

FIRST = "data/train-00000-of-00002.parquet"
SECOND = "data/train-00001-of-00002.parquet"
TEST = "data/test-00000-of-00001.parquet"


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards")


def variant(**fields):
    return INFO.__class__(**{**vars(INFO), **fields})


def found(report, check):
    return [(problem.file, problem.pair) for problem in report.problems if problem.check == check]


def edit_description(folder, edit):
    path = folder / FILE_NAME
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_sound_shards_pass_every_check(tmp_path):
    info = variant(optical_factors=(1, 1, 1, 2), map_class_names=("sea", "land"), map_no_data=255)
    maps = [np.full((SIZE, SIZE), value, np.uint8) for value in (0, 1, 255)]
    pairs = [make_pair(number, info, label_map=maps[number % 3]) for number in range(9)]
    pairs[3].sar[:, 0, 0] = np.nan
    pairs[4].optical[:, :2, :2] = 0
    report = verify_shards(write_shards(tmp_path, info, train=pairs[:6], validation=pairs[6:]))
    assert report.problems == []
    assert report.sound
    assert list(report.checked) == list(CHECKS)
    assert "Sound: no problem was found." in str(report)


def test_a_quick_look_reads_no_pixels(shards):
    damaged = (shards / FIRST).read_bytes().replace(make_pair(1).sar.tobytes()[:64], bytes(64))
    (shards / FIRST).write_bytes(damaged)
    report = verify_shards(shards, quick=True)
    assert report.sound
    assert list(report.checked) == ["dataset_info.json", "files", "footers", "columns"]
    assert "Not checked: row groups" in str(report)
    assert not verify_shards(shards).sound


def test_every_bad_file_is_named_and_the_others_are_still_looked_at(shards):
    (shards / FIRST).unlink()
    (shards / TEST).write_bytes((shards / TEST).read_bytes()[:-100])
    edit_shard(shards / SECOND, lambda columns: columns["labels"][2].append("desert"))
    report = verify_shards(shards)
    assert report.bad_files == [TEST, FIRST, SECOND]
    assert (FIRST, "") in found(report, "files")
    assert (TEST, "") in found(report, "files")
    assert (TEST, "") in found(report, "footers")
    assert found(report, "labels") == [(SECOND, "pair-008")]
    assert "NOT sound" in str(report)


def test_a_flipped_bit_is_found_in_the_pair_where_it_is(shards):
    content = bytearray((shards / FIRST).read_bytes())
    content[content.index(make_pair(4).optical.tobytes()[:64]) + 10] ^= 1
    (shards / FIRST).write_bytes(content)
    report = verify_shards(shards)
    assert [str(problem) for problem in report.problems] == [
        f"{FIRST}: pair-004: is damaged: the checksum of pair 'pair-004' is not that of its pixels. Delete the file "
        "and prepare (or download) it again."
    ]


def test_a_row_group_that_cannot_be_read_is_named_and_the_rest_goes_on(shards):
    content = bytearray((shards / SECOND).read_bytes())
    content[4:60] = bytes(56)  # the header of the first page
    (shards / SECOND).write_bytes(content)
    report = verify_shards(shards)
    assert found(report, "row groups") == [(SECOND, "")]
    assert report.bad_files == [SECOND]


@pytest.mark.parametrize("seed", range(12))
def test_no_damage_makes_it_fall_over(shards, seed):
    generator, content = np.random.default_rng(seed), bytearray((shards / FIRST).read_bytes())
    for place in len(content) - 1 - generator.integers(0, 6000, 6):  # footer, names and small columns
        content[place] ^= 0xA5
    (shards / FIRST).write_bytes(content)
    assert verify_shards(shards).bad_files in ([FIRST], [])


def test_a_name_that_is_no_text_is_named_with_its_file(shards):
    content = (shards / FIRST).read_bytes().replace(b"pair-004", b"pair-\xff\xff4")
    (shards / FIRST).write_bytes(content)
    assert found(verify_shards(shards), "row groups") == [(FIRST, "")]


def test_a_shard_of_another_preparation_is_found_by_its_footer(shards, tmp_path):
    other = write_shards(tmp_path / "other", train=[make_pair(number) for number in range(100, 112)])
    shutil.copy(other / FIRST, shards / FIRST)
    report = verify_shards(shards)
    assert found(report, "footers") == [(FIRST, "")]


def test_pairs_in_another_order_are_found_by_the_hash(shards):
    def swap(columns):
        for values in columns.values():
            values[0], values[1] = values[1], values[0]

    edit_shard(shards / FIRST, swap)
    assert found(verify_shards(shards), "content hash") == [(FIRST, "")]


def test_missing_rows_are_counted(shards):
    edit_shard(shards / FIRST, lambda columns: [values.pop() for values in columns.values()])
    report = verify_shards(shards)
    (message,) = [str(problem) for problem in report.problems if problem.check == "footers"]
    assert message.startswith(f"{FIRST}: holds 5 pairs in 2 row groups")
    assert "but dataset_info.json says 6 in 2" in message


def test_a_pair_in_two_splits_is_named(shards):
    edit_shard(shards / TEST, lambda columns: columns["id"].__setitem__(1, "pair-007"))
    report = verify_shards(shards)
    assert (TEST, "pair-007") in found(report, "ids") or (SECOND, "pair-007") in found(report, "ids")
    assert not report.sound


def test_a_split_alone_is_still_compared_with_the_ids_of_the_others(shards):
    edit_shard(shards / TEST, lambda columns: columns["id"].__setitem__(1, "pair-007"))
    report = verify_shards(shards, "train")
    assert found(report, "ids") == [(TEST, "pair-007")]
    assert report.checked["checksums"] == "12 pairs"
    with pytest.raises(ValueError, match="There is no split 'dev'"):
        verify_shards(shards, "dev")


def set_value(column, row, value):
    return lambda columns: columns[column].__setitem__(row, value)


@pytest.mark.parametrize(
    ("edit", "check", "message"),
    [
        (set_value("sar", 1, None), "checksums", r"declares sar as float32 .*, but holds 0 bytes"),
        (set_value("optical", 1, b"123"), "checksums", "but holds 3 bytes"),
        (set_value("sar_dtype", 1, "complex64"), "checksums", "declares sar as complex64"),
        (set_value("sar_dtype", 1, "int8"), "checksums", r"declares sar as int8 .*, but holds 512 bytes"),
        (set_value("sar_shape", 1, [4, SIZE, SIZE // 2]), "arrays", r"sar has shape \(4, 8, 4\)"),
        (set_value("id", 1, None), "ids", "has no id"),
        (set_value("split", 1, "validation"), "places", "says split 'validation'"),
        (set_value("transform", 1, [1.0, 2.0]), "places", r"transform is \[1.0, 2.0\]"),
        (
            set_value("sar", 1, np.full((2, SIZE, SIZE), np.nan, np.float32).tobytes()),
            "data",
            "sar has no data: no pixel is finite",
        ),
        (set_value("optical", 1, bytes(4 * SIZE * SIZE * 2)), "data", "optical has no data: every pixel is zero"),
    ],
)
def test_each_bad_row_is_named(shards, edit, check, message):
    edit_shard(shards / FIRST, edit)
    report = verify_shards(shards)
    problems = [problem for problem in report.errors if problem.check == check]
    assert len(problems) == 1
    assert (problems[0].file, problems[0].pair) == (FIRST, "" if check == "ids" else "pair-001")
    assert re.search(message, problems[0].message)


def test_label_maps_outside_of_the_classes_are_named(tmp_path):
    info = variant(map_class_names=("sea", "land"), map_no_data=255)
    values = np.array([[0, 1], [255, 9]], np.uint8).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)
    pairs = [make_pair(0, info, label_map=np.where(values == 9, 0, values)), make_pair(1, info, label_map=values)]
    report = verify_shards(write_shards(tmp_path, info, train=pairs))
    assert found(report, "label maps") == [("data/train-00000-of-00001.parquet", "pair-001")]
    assert "holds [9]" in report.problems[0].message


def test_wrong_counts_of_pixels_without_data_are_found(shards):
    edit_description(shards, lambda c: c["splits"]["train"]["shards"][0]["no_data_pixels"].update(sar=5))
    assert found(verify_shards(shards), "no-data counts") == [(FIRST, "")]


def test_missing_and_foreign_columns_are_named(shards):
    import pyarrow.parquet as pq

    file = pq.ParquetFile(shards / FIRST)
    table = file.read().drop_columns(["crs"]).append_column("colour", [["red"] * 6])
    table = table.replace_schema_metadata(file.metadata.metadata)
    pq.write_table(table, shards / FIRST, row_group_size=4)
    messages = [problem.message for problem in verify_shards(shards).problems if problem.check == "columns"]
    assert messages == ["has no column 'crs'.", "has a column 'colour', which is not declared."]


def test_a_shard_that_nobody_listed_is_a_warning(shards):
    shutil.copy(shards / FIRST, shards / "data/train-00002-of-00003.parquet")
    report = verify_shards(shards)
    assert report.sound
    assert found(report, "files") == [("data/train-00002-of-00003.parquet", "")]
    assert "Sound, with 1 warning to look at." in str(report)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_missing_or_unreadable_description_is_an_error_and_not_a_crash(shards, content):
    (shards / FILE_NAME).unlink()
    if content is not None:
        (shards / FILE_NAME).write_text(content)
    report = verify_shards(shards)
    assert found(report, "dataset_info.json") == [("", "")]
    assert not report.sound


def test_swapped_bands_are_a_warning_for_each_pair_and_for_all(tmp_path):
    pairs = [make_pair(number) for number in range(5)]
    pairs = [with_pixels(pair, sar=pair.sar[::-1].copy()) for pair in pairs]
    report = verify_shards(write_shards(tmp_path, train=pairs))
    assert report.sound
    named = [problem.pair for problem in report.problems if problem.check == "VV above VH"]
    assert named == ["pair-000", "pair-001", "pair-002", "pair-003", "pair-004", ""]
    assert "and 3 more" in str(report)


def test_positive_db_is_an_error_and_db_beyond_reason_a_warning(tmp_path):
    pair = make_pair(0)
    positive = with_pixels(pair, sar=10 ** (pair.sar / 10))
    assert not verify_shards(write_shards(tmp_path / "linear", train=[positive])).sound
    pair.sar[0, 0, 0] = 9_999
    report = verify_shards(write_shards(tmp_path / "far", train=[pair]))
    assert report.sound
    assert "1 values, such as 9999, are outside of -100 to 60 dB" in " ".join(str(report).split())


def test_infinite_backscatter_is_a_warning(tmp_path):
    pair = make_pair(0)
    pair.sar[1, 2, 3] = -np.inf
    report = verify_shards(write_shards(tmp_path, train=[pair]))
    assert report.sound
    assert found(report, "data") == [("data/train-00000-of-00001.parquet", "pair-000")]


@pytest.mark.parametrize(("added", "declared"), [(1000, 0.0), (0, 3000.0)])
def test_an_offset_forgotten_or_declared_in_vain_is_a_warning(tmp_path, added, declared):
    pairs = [make_pair(number) for number in range(5)]
    pairs = [with_pixels(pair, optical=pair.optical + np.uint16(added)) for pair in pairs]
    report = verify_shards(write_shards(tmp_path, variant(optical_offset=declared), train=pairs))
    assert report.sound
    assert found(report, "optical offset") == [("", "")]


@pytest.mark.parametrize("units", ["db", "linear", "raw"])
@pytest.mark.parametrize("optical_dtype", ["uint16", "float32"])
def test_every_door_finds_the_same_pixels_without_data(tmp_path, units, optical_dtype):
    info, pair = variant(sar_units=units), make_pair(0)
    sar = (10 ** (pair.sar / 10)).astype(np.float32) if units == "linear" else pair.sar.copy()
    optical = pair.optical.astype(optical_dtype)
    sar[0, 0, :3], sar[1, 1, 0] = np.nan, np.inf
    sar[1, 2, :2], sar[0, 3, 0] = (0, -1e-6) if units == "linear" else (-12, -12)
    optical[:, 4], optical[0, 5] = 0, 0  # zero in one band alone is a dark pixel
    folder = write_shards(tmp_path, info, train=[with_pixels(pair, sar=sar, optical=optical)])
    expected = {"sar": 7 if units == "linear" else 4, "optical": SIZE}
    assert read_dataset_info(folder).no_data_pixels("train") == expected
    assert found(verify_shards(folder), "no-data counts") == []
    for sensor in expected:
        bands = band_statistics(folder).of_sensor(sensor)
        assert {band.pixels - band.valid for band in bands} == {expected[sensor]}
    processor = FusMAEImageProcessor(optical_bands=info.optical_bands, sar_units=units)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of power below zero
        inputs = processor(sar=sar, optical=optical)
    masks = {"sar": inputs["pixel_mask_sar"], "optical": inputs["pixel_mask"]}
    assert {sensor: int((~mask).sum()) for sensor, mask in masks.items()} == expected


def test_pairs_of_several_sizes_are_a_warning(tmp_path):
    small = make_pair(1)
    small = with_pixels(small, sar=small.sar[:, :4, :4], optical=small.optical[:, :4, :4])
    report = verify_shards(write_shards(tmp_path, train=[make_pair(0), small, make_pair(2)]))
    assert report.sound
    assert "sar float32 (2, 8, 8), optical uint16 (4, 8, 8) in 2" in report.problems[0].message
    assert "first data/train-00000-of-00001.parquet: pair-001" in report.problems[0].message


def test_a_url_is_verified_like_a_folder(shards):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/verify", recursive=True)
    try:
        assert verify_shards("memory://verify").problems == []
        memory.rm(f"/verify/{FIRST}")
        assert found(verify_shards("memory://verify"), "files") == [(FIRST, "")]
    finally:
        memory.rm("/verify", recursive=True)


def test_verify_ends_with_1_only_where_there_are_errors(shards, tmp_path, capsys):
    assert run_command("verify", shards) == 0
    assert run_command("verify", shards, "--quick") == 0
    edit_shard(shards / FIRST, set_value("labels", 0, ["desert"]))
    assert run_command("verify", shards, "--json", tmp_path / "problems.json") == 1
    printed = capsys.readouterr().out
    assert f"error: {FIRST}: pair-000: labels ['desert'] are none of the classes" in " ".join(printed.split())
    problems = json.loads((tmp_path / "problems.json").read_text())["problems"]
    assert {"check": "labels", "severity": "error", "file": FIRST, "pair": "pair-000"}.items() <= problems[-1].items()
