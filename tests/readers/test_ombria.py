import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusmae_hf.data.checks import check_pair
from fusmae_hf.errors import PairError
from fusmae_hf.readers.ombria import EVENTS, OMBRIA, split_of_event

TRAIN, TEST = (1, 2, 19, 32, 33, 140), (20, 150)  # 19 and 20 lie between two events
BACKSCATTER = {"before": 150, "after": 60}
COMPOSITE = (30, 90, 45)  # SWIR, NIR, visible


def write_png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_tile(root, folder, number, times=("before", "after")):
    """One tile; its mask is flooded in as many rows as its number, up to 255."""
    mask = np.zeros((256, 256), np.uint8)
    mask[: min(number, 255)] = 255
    for sensor in ("S1", "S2"):
        above = root / f"Ombria{sensor}" / folder
        for time in times:
            values = np.full((256, 256), BACKSCATTER[time] + number % 7, np.uint8)
            if sensor == "S2":
                values = np.broadcast_to(np.array(COMPOSITE, np.uint8) + (time == "before"), (256, 256, 3))
            write_png(above / time.upper() / f"{sensor}_{time}_{number:04d}.png", values.astype(np.uint8))
        write_png(above / "MASK" / f"{sensor}_mask_{number:04d}.png", mask)


def make_ombria(root):
    for number in TRAIN:
        write_tile(root, "train", number)
    for number in TEST:
        write_tile(root, "test", number)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("ombria")
    make_ombria(root)
    return root


def png(root, sensor, kind, number, folder="train"):
    return root / f"Ombria{sensor}" / folder / kind.upper() / f"{sensor}_{kind}_{number:04d}.png"


def test_pairs_are_named_after_folder_and_number_in_sorted_order(archive):
    reader = OMBRIA(archive)
    assert reader.ids == [
        "test_0020", "test_0150", "train_0001", "train_0002", "train_0019", "train_0032", "train_0033", "train_0140",
    ]  # fmt: skip
    assert len(reader) == 8
    assert reader.summary == f"Found 8 pairs (after the flood) in {archive}: 6 train, 2 test."
    assert list(reader.left_out()) == []


def test_official_splits_are_the_folders(archive):
    reader = OMBRIA(archive)
    splits = [reader.split_of(index) for index in range(8)]
    assert splits == ["test"] * 2 + ["train"] * 6 == [reader.read(index).split for index in range(8)]


def test_bands_come_in_the_order_of_their_names_as_8_bit_values(archive):
    reader = OMBRIA(archive)
    pair = reader.read(reader.ids.index("train_0002"))
    assert (reader.info.sar_bands, reader.info.optical_bands) == (("backscatter",), ("SWIR", "NIR", "visible"))
    assert (reader.info.sar_units, reader.info.optical_units) == ("raw", "raw")
    assert (pair.sar.shape, pair.sar.dtype, pair.sar[0, 0, 0]) == ((1, 256, 256), np.uint8, 62)
    assert (pair.optical.shape, pair.optical.dtype) == ((3, 256, 256), np.uint8)
    assert tuple(pair.optical[:, 0, 0]) == COMPOSITE


def test_tiles_from_before_the_flood_are_given_on_request(archive):
    reader = OMBRIA(archive, time="before")
    assert reader.read(reader.ids.index("train_0002")).sar[0, 0, 0] == 152
    assert "before the flood" in reader.summary


def test_the_mask_is_1_where_it_is_255_in_the_file(archive):
    reader = OMBRIA(archive)
    label_map = reader.read(reader.ids.index("train_0002")).label_map
    assert (label_map.dtype, label_map.shape) == (np.uint8, (256, 256))
    assert np.unique(label_map[:2]).tolist() == [1]
    assert np.unique(label_map[2:]).tolist() == [0]
    assert reader.info.map_class_names == ("not flooded", "flooded")


def test_splits_by_event_leave_out_tiles_between_events(archive):
    reader = OMBRIA(archive, splits="events")
    assert {name: reader.split_of(index) for index, name in enumerate(reader.ids)} == {
        "train_0001": "train",
        "train_0002": "train",
        "train_0032": "test",
        "train_0033": "test",
        "train_0140": "train",
        "test_0150": "train",
    }
    assert dict(reader.left_out()).keys() == {"train_0019", "test_0020"}
    assert all("between two events" in reason for _, reason in reader.left_out())


def test_each_event_lies_in_one_split_and_events_do_not_overlap():
    borders = [border for first, last, _ in EVENTS for border in (first, last)]
    assert borders == sorted(borders)
    for first, last, split in EVENTS:
        assert split_of_event(first) == split_of_event(last) == split
    assert {split for *_, split in EVENTS} == {"train", "validation", "test"}
    assert split_of_event(18) is None


def test_extra_columns_give_number_and_first_number_of_the_event(archive):
    reader = OMBRIA(archive)
    extra = {name: reader.read(index).extra for index, name in enumerate(reader.ids)}
    assert extra["train_0140"] == {"number": 140, "event": 135}
    assert extra["train_0019"] == {"number": 19, "event": None}
    assert extra["test_0150"].keys() == reader.info.extra_columns.keys()


def test_folders_that_number_their_tiles_independently_cannot_be_split_by_event(own_archive):
    write_tile(own_archive, "test", 33)
    with pytest.raises(ValueError, match=r"1 numbers, such as 0033, are in both official folders .*splits='official'"):
        OMBRIA(own_archive, splits="events")
    assert len(OMBRIA(own_archive)) == 9


@pytest.mark.parametrize(("sensor", "kind"), [("S1", "after"), ("S2", "after"), ("S1", "mask"), ("S2", "mask")])
def test_a_tile_that_lacks_a_file_is_left_out_with_its_name(own_archive, sensor, kind):
    path = png(own_archive, sensor, kind, 32)
    path.unlink()
    reader = OMBRIA(own_archive)
    assert list(reader.left_out()) == [("train_0032", f"{path} missing")]
    assert "train_0032" not in reader.ids


def test_an_archive_of_training_tiles_after_the_flood_alone_is_enough(tmp_path):
    write_tile(tmp_path, "train", 7, times=("after",))
    assert OMBRIA(tmp_path).ids == ["train_0007"]
    with pytest.raises(ValueError, match=r"no pair to read in .* 1 were left out.*BEFORE/S1_before_<number>.png"):
        OMBRIA(tmp_path, time="before")


def test_other_files_are_ignored(own_archive):
    write_png(own_archive / "OmbriaS1/train/AFTER/S1_after_12.png", np.zeros((256, 256), np.uint8))
    (own_archive / "OmbriaS1/train/AFTER/Thumbs.db").write_bytes(b"")
    assert len(OMBRIA(own_archive)) == 8


@pytest.mark.parametrize(
    ("sensor", "kind", "values", "message"),
    [
        ("S1", "after", np.zeros((128, 256), np.uint8), "expected 256x256 pixels of kind 'L', found 256x128 of 'L'"),
        ("S1", "after", np.zeros((256, 256, 3), np.uint8), "of kind 'L', found 256x256 of 'RGB'"),
        ("S1", "after", np.zeros((256, 256), np.uint16), "found 256x256 of 'I;16'"),
        ("S2", "after", np.zeros((256, 256, 4), np.uint8), "of kind 'RGB', found 256x256 of 'RGBA'"),
        ("S1", "mask", np.full((256, 256), 1, np.uint8), r"holds the values \[1\], but a mask has 0"),
        ("S2", "mask", np.full((256, 256), 128, np.uint8), r"holds the values \[128\]"),
        ("S2", "mask", np.full((256, 256), 255, np.uint8), "differ in 57,344 pixels"),
    ],
)
def test_a_file_of_another_kind_is_named(own_archive, sensor, kind, values, message):
    path = png(own_archive, sensor, kind, 32)
    write_png(path, values)
    reader = OMBRIA(own_archive)
    with pytest.raises(PairError, match=message) as caught:
        reader.read(reader.ids.index("train_0032"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "jpeg"], ids=["empty", "nonsense", "truncated", "jpeg"])
def test_a_damaged_file_is_named(own_archive, content):
    path = png(own_archive, "S2", "after", 32)
    if content == "jpeg":
        Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(path, format="JPEG")
    else:
        path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    reader = OMBRIA(own_archive)
    with pytest.raises(PairError, match="cannot be read as PNG") as caught:
        reader.read(reader.ids.index("train_0032"))
    assert str(path) in str(caught.value)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for \['OmbriaS1', 'OmbriaS2'\]"):
        OMBRIA(tmp_path)
    for sensor in ("S1", "S2"):
        (tmp_path / f"Ombria{sensor}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked for \['train', 'test'\] in .*OmbriaS1"):
        OMBRIA(tmp_path)


@pytest.fixture(scope="module")
def real_root():
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    return Path(folder, "ombria")


@pytest.mark.real_data
def test_real_tiles_are_split_by_event_as_the_docstring_says(real_root):
    reader = OMBRIA(real_root, splits="events")
    assert list(reader.left_out()) == []
    splits = [reader.split_of(index) for index in range(len(reader))]
    assert {split: splits.count(split) for split in set(splits)} == {"train": 451, "validation": 71, "test": 102}


@pytest.mark.real_data
def test_water_is_dark_in_both_sensors_of_real_tiles(real_root):
    reader = OMBRIA(real_root)
    flooded, dry = [], []
    for index in range(0, len(reader), 12):
        pair = reader.read(index)
        check_pair(pair, reader.info)
        values = np.concatenate([pair.sar, pair.optical])
        flooded.append(values[:, pair.label_map == 1].mean(axis=1))
        dry.append(values[:, pair.label_map == 0].mean(axis=1))
    brighter = np.mean(dry, axis=0) - np.mean(flooded, axis=0)
    assert brighter[0] > 20  # backscatter
    assert brighter[1] > 10  # short-wave infrared, the first band


@pytest.mark.real_data
def test_no_real_tile_continues_a_tile_of_another_event(real_root):
    """Tiles lie side by side where the right edge of one continues in the left edge of the next."""
    reader = OMBRIA(real_root)
    edges = {"left": [], "right": []}
    events = []
    for index in range(len(reader)):
        pair = reader.read(index)
        values = np.concatenate([pair.sar, pair.optical]).astype(np.float32)
        for name, column in (("left", 0), ("right", -1)):
            edge = values[:, :, column] - values[:, :, column].mean(axis=1, keepdims=True)
            edges[name].append(edge / np.maximum(np.linalg.norm(edge, axis=1, keepdims=True), 1e-6))
        events.append(pair.extra["event"])
    correlation = np.einsum("ibp,jbp->ijb", np.stack(edges["right"]), np.stack(edges["left"]), optimize=True)
    continues = np.argwhere((correlation.mean(axis=-1) > 0.9) & (correlation.min(axis=-1) > 0.8))
    assert len(continues) > 300
    assert all(events[first] == events[second] for first, second in continues)
