import ast
import importlib.util
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS
from fusmae_hf.readers import bigearthnet
from fusmae_hf.readers.bigearthnet import BigEarthNet, example_pairs_root, official_lists_folder
from fusmae_hf.readers.bigearthnet_patches import CLASS_19_OF_43, CLASSES_19, CLASSES_43, OPTICAL_FACTORS, classes_19
from tests.readers.bigearthnet_fixtures import V1_PAIRS, VH_DB, VV_DB, make_bigearthnet, optical_value, write_tif

PARTNER = {optical: sar for sar, optical in V1_PAIRS}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return make_bigearthnet(tmp_path_factory.mktemp("bigearthnet"))


def sar_folder(root, optical):
    return root / "BigEarthNet-S1-v1.0" / PARTNER[optical]


def test_pairs_are_joined_by_the_metadata_and_not_by_the_order_of_names(archive):
    reader = BigEarthNet(archive)
    assert reader.ids == sorted(PARTNER)
    assert [reader.read(i).extra["sar_patch"] for i in range(3)] == [PARTNER[name] for name in reader.ids]
    assert sorted(PARTNER.values()) != [PARTNER[name] for name in reader.ids]
    assert list(reader.left_out()) == []


def test_vv_comes_first_although_vh_sorts_first(archive):
    reader = BigEarthNet(archive)
    assert reader.info.sar_bands == ("VV", "VH")
    vv, vh = reader.read(0).sar.mean(axis=(1, 2))
    assert vv == pytest.approx(VV_DB, abs=0.01)
    assert vh == pytest.approx(VH_DB, abs=0.01)


def test_backscatter_stays_float32_with_its_decimals(archive):
    sar = BigEarthNet(archive).read(0).sar
    assert sar.shape == (2, 120, 120)
    assert sar.dtype == np.float32
    assert np.mean(sar == np.round(sar)) < 0.01


@pytest.mark.parametrize(("band", "resolution"), [("B02", 10), ("B05", 20), ("B8A", 20), ("B01", 60), ("B09", 60)])
def test_each_band_is_at_its_place_and_its_pixels_are_repeated_to_10_m(archive, band, resolution):
    optical = BigEarthNet(archive).read(0).optical
    assert optical.shape == (12, 120, 120)
    assert optical.dtype == np.uint16
    row, column = np.indices((120, 120)) * 10 // resolution
    expected = optical_value(band, row, column, resolution)
    np.testing.assert_array_equal(optical[OPTICAL_BANDS.index(band)], expected)


def test_native_bands_have_the_sizes_of_the_files_and_expand_to_what_read_gives(archive):
    reader = BigEarthNet(archive)
    assert reader.info.optical_factors == OPTICAL_FACTORS == (6, 1, 1, 1, 2, 2, 2, 1, 2, 6, 2, 2)
    for index in range(len(reader)):
        pair, native = reader.read(index), reader.read_native(index)
        assert isinstance(native.optical, NativeBands)
        assert [
            band.shape[0] * factor for band, factor in zip(native.optical.bands, OPTICAL_FACTORS, strict=True)
        ] == [120] * 12
        np.testing.assert_array_equal(native.optical.expand(), pair.optical)
        np.testing.assert_array_equal(native.sar, pair.sar)
        assert replace(native, sar=0, optical=0) == replace(pair, sar=0, optical=0)


def test_a_pair_carries_labels_place_and_times(archive):
    reader = BigEarthNet(archive)
    pair = reader.read(reader.ids.index(V1_PAIRS[0][1]))
    assert pair.labels == ["Urban fabric", "Inland wetlands"]
    assert pair.extra["clc_labels"] == "Peatbogs; Continuous urban fabric"
    assert pair.crs == "EPSG:32633"
    assert pair.transform == (10, 0, 600_000, 0, -10, 5_800_000)
    assert (pair.sar_time, pair.optical_time) == ("2017-06-13T16:50:43Z", "2017-06-13T10:10:31Z")
    assert pair.split is None


def test_dropped_labels_leave_the_others(archive):
    reader = BigEarthNet(archive)
    assert reader.read(reader.ids.index(V1_PAIRS[2][1])).labels == ["Arable land", "Coastal wetlands"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({0, 1}, 0), ({2}, 1), ({11, 12, 13}, 2), ({14, 15, 16, 18}, 3), ({17}, 4), ({19}, 5), ({20}, 6), ({21}, 7),
        ({22}, 8), ({23}, 9), ({24}, 10), ({25, 31}, 11), ({26, 27}, 12), ({28}, 13), ({29}, 14), ({33, 34}, 15),
        ({35, 36}, 16), ({38, 39}, 17), ({40, 41, 42}, 18), ({*range(3, 11), 30, 32, 37}, None),
    ],
)  # fmt: skip
def test_43_classes_map_to_19_as_published(old, new):
    target = None if new is None else CLASSES_19[new]
    assert {CLASSES_43.index(name) for name, mapped in CLASS_19_OF_43.items() if mapped == target} == old


def test_the_19_class_names_are_in_the_official_order_and_not_sorted():
    assert classes_19(CLASSES_43) == list(CLASSES_19)
    assert list(CLASSES_19) != sorted(CLASSES_19)


def test_class_names_equal_those_of_bigearthnet_common():
    if importlib.util.find_spec("bigearthnet_common") is None:
        pytest.skip("bigearthnet-common is not installed")
    tree = ast.parse((official_lists_folder() / "constants.py").read_text())
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id in {"OLD2NEW_LABELS_DICT", "NEW_LABELS_ORIGINAL_ORDER"}:
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    assert constants["NEW_LABELS_ORIGINAL_ORDER"] == CLASSES_19
    assert list(constants["OLD2NEW_LABELS_DICT"].items()) == list(CLASS_19_OF_43.items())


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_split_lists_are_read_with_and_without_partners_and_packed(own_archive, columns, packed):
    import bz2

    for path in list((own_archive / "splits").glob("*.csv")):
        text = "\r\n".join(",".join(line.split(",")[:columns]) for line in path.read_text().splitlines())
        path.write_text(text)
        if packed:
            path.with_suffix(".csv.bz2").write_bytes(bz2.compress(path.read_bytes()))
            path.unlink()
    reader = BigEarthNet(own_archive, splits=own_archive / "splits")
    splits = {name: reader.split_of(i) for i, name in enumerate(reader.ids)}
    assert splits == dict(zip([optical for _, optical in V1_PAIRS], ["train", "validation", "test"], strict=True))
    assert reader.read(0).split == reader.split_of(0)


def test_official_splits_come_from_the_package_that_carries_them(archive, monkeypatch):
    monkeypatch.setattr(bigearthnet, "official_lists_folder", lambda: archive / "splits")
    reader = BigEarthNet(archive, splits="official", leave_out=["snow"])
    assert sorted(reader.split_of(i) for i in range(2)) == ["test", "validation"]


def test_patches_in_no_split_list_are_left_out_unless_asked_for(own_archive):
    (own_archive / "splits" / "val.csv").unlink()
    unlisted = V1_PAIRS[1][1]
    ((name, reason),) = BigEarthNet(own_archive, splits=own_archive / "splits").left_out()
    assert name == unlisted
    assert "in none of the split lists" in reason
    reader = BigEarthNet(own_archive, splits=own_archive / "splits", keep_unlisted=True)
    assert reader.split_of(reader.ids.index(unlisted)) is None


def test_snowy_patches_are_left_out_on_request(archive):
    reader = BigEarthNet(archive, splits=archive / "splits", leave_out=["snow"])
    assert list(reader.left_out()) == [(V1_PAIRS[0][1], "listed in patches_with_seasonal_snow")]
    assert V1_PAIRS[0][1] not in reader.ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"leave_out": ["haze"]}, r"\['haze'\] is unknown; known: \['cloud', 'snow', 'unlabelled'\]"),
        ({"leave_out": ["snow"]}, "needs `splits`"),
    ],
)
def test_leaving_out_asks_for_a_known_list(archive, arguments, message):
    with pytest.raises(ValueError, match=message):
        BigEarthNet(archive, **arguments)


def test_missing_lists_are_named(archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected train\.csv, val\.csv or test\.csv"):
        BigEarthNet(archive, splits=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"patches_with_cloud_and_shadow\.csv \(or \.csv\.bz2\)"):
        BigEarthNet(archive, splits=archive / "splits", leave_out=["cloud"])


@pytest.mark.parametrize(("name", "content"), [("val.csv.bz2", b"BZh9 damaged"), ("val.csv", b"S2A_\xff")])
def test_a_damaged_list_is_named(own_archive, name, content):
    (own_archive / "splits" / "val.csv").unlink()
    (own_archive / "splits" / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a list") as caught:
        BigEarthNet(own_archive, splits=own_archive / "splits")
    assert str(own_archive / "splits" / name) in str(caught.value)


def test_a_patch_in_two_splits_is_refused(own_archive):
    (own_archive / "splits" / "val.csv").write_text(V1_PAIRS[0][1])
    with pytest.raises(ValueError, match="is listed for both train and validation"):
        BigEarthNet(own_archive, splits=own_archive / "splits")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "no such folder"),
        ("splits", r"the folder holds \['patches_with_seasonal_snow\.csv'"),
        ("BigEarthNet-v1.0", "Give the folder above it"),
    ],
)
def test_a_wrong_root_says_what_was_searched_and_what_to_give(archive, folder, message):
    with pytest.raises(FileNotFoundError, match=message) as caught:
        BigEarthNet(archive / folder)
    assert str(archive / folder) in str(caught.value)
    assert "BigEarthNet-S1-v1.0" in str(caught.value)


def test_patches_without_a_partner_are_left_out_with_the_reason(own_archive):
    (_, lone_optical), (lone_sar, gone), _ = V1_PAIRS
    shutil.rmtree(sar_folder(own_archive, lone_optical))
    shutil.rmtree(own_archive / "BigEarthNet-v1.0" / gone)
    reader = BigEarthNet(own_archive)
    assert reader.ids == [V1_PAIRS[2][1]]
    reasons = dict(reader.left_out())
    assert f"{gone} is missing" in reasons[lone_sar]
    assert "names it as its Sentinel-2 partner" in reasons[lone_optical]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ("{}", "names no `corresponding_s2_patch`"),
        ('{"corresponding_s2_patch": ["a"]}', "`corresponding_s2_patch` is ['a'], no str"),
        ("[" * 100_000, "cannot be read as JSON"),
        (None, "no such file"),
    ],
)
def test_damaged_metadata_leave_the_pair_out_with_the_reason(own_archive, content, message):
    sar, optical = V1_PAIRS[0]
    path = sar_folder(own_archive, optical) / f"{sar}_labels_metadata.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    reason = dict(BigEarthNet(own_archive).left_out())[sar]
    assert message in reason
    assert str(path) in reason


def test_metadata_that_one_may_not_read_are_named(archive, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bigearthnet, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"_labels_metadata\.json: cannot be read \(Permission denied\)"):
        BigEarthNet(archive)


def damage_nothing_there(path):
    path.unlink()


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def damage_size(path):
    write_tif(path, np.ones((64, 64), np.uint16), 10)


def damage_dtype(path):
    write_tif(path, np.ones((120, 120), np.int16), 10)


@pytest.mark.parametrize("sensor", ["sar", "optical"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "no such file"),
        (damage_truncated, "cannot be read as GeoTIFF"),
        (damage_size, "expected 1 band of 120x120 pixels in (uint16|float32), found 1 of 64x64"),
        (damage_dtype, "expected 1 band of 120x120 pixels in (uint16|float32), found 1 of 120x120 in int16"),
    ],
)
def test_a_damaged_band_raises_an_error_that_names_the_file(own_archive, sensor, damage, message):
    reader = BigEarthNet(own_archive)
    optical = reader.ids[0]
    folder = sar_folder(own_archive, optical) if sensor == "sar" else own_archive / "BigEarthNet-v1.0" / optical
    path = folder / f"{folder.name}_{'VH' if sensor == 'sar' else 'B08'}.tif"
    damage(path)
    with pytest.raises(PairError, match=message) as caught:
        reader.read(0)
    assert str(path) in str(caught.value)


def test_partners_named_by_the_split_lists_are_checked_against_the_metadata(own_archive):
    (sar_a, optical_a), (sar_b, optical_b), _ = V1_PAIRS
    (own_archive / "splits" / "train.csv").write_text(f"{optical_a},{sar_b}\n{optical_b},{sar_a}\n")
    (own_archive / "splits" / "val.csv").unlink()
    reader = BigEarthNet(own_archive, splits=own_archive / "splits")
    with pytest.raises(PairError, match=f"{sar_b}: its metadata name {optical_b}"):
        reader.read(reader.ids.index(optical_a))


def test_patches_of_two_places_are_no_pair(own_archive):
    reader = BigEarthNet(own_archive)
    folder = sar_folder(own_archive, reader.ids[0])
    write_tif(folder / f"{folder.name}_VV.tif", np.zeros((120, 120), np.float32), 10, corner=(700_000, 5_800_000))
    with pytest.raises(PairError, match="are not the same place"):
        reader.read(0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"labels": ["Lava"]}, r"labels \['Lava'\] are none of the 43 classes"),
        ({"labels": [["Pastures"]]}, "are none of the 43 classes"),
        ({"labels": "Pastures"}, "`labels` is 'Pastures', no list"),
        ({"labels": ["Pastures"], "acquisition_date": 20170613}, "`acquisition_date` is 20170613, no str"),
    ],
)
def test_unknown_labels_and_malformed_metadata_are_errors_that_name_the_patch(own_archive, metadata, message):
    reader = BigEarthNet(own_archive)
    path = own_archive / "BigEarthNet-v1.0" / reader.ids[0] / f"{reader.ids[0]}_labels_metadata.json"
    path.write_text(json.dumps(metadata))
    with pytest.raises(PairError, match=message) as caught:
        reader.read(0)
    assert str(path.parent) in str(caught.value)


def test_a_patch_without_labels_has_none(own_archive):
    reader = BigEarthNet(own_archive)
    path = own_archive / "BigEarthNet-v1.0" / reader.ids[0] / f"{reader.ids[0]}_labels_metadata.json"
    path.write_text('{"labels": null, "acquisition_date": null}')
    pair = reader.read(0)
    assert (pair.labels, pair.extra["clc_labels"], pair.optical_time) == ([], "", None)


def test_the_example_pairs_need_their_package(monkeypatch, tmp_path):
    monkeypatch.setattr(bigearthnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps bigearthnet-common==2\.8\.0"):
        example_pairs_root(tmp_path)


@pytest.fixture(scope="module")
def example_root(tmp_path_factory):
    if importlib.util.find_spec("bigearthnet_common") is None:
        pytest.skip("bigearthnet-common is not installed")
    return example_pairs_root(tmp_path_factory.mktemp("example"))


def test_the_example_pairs_are_six_and_one_of_them_is_snowy(example_root):
    assert len(BigEarthNet(example_root)) == 6
    reader = BigEarthNet(example_root, splits=official_lists_folder(), leave_out=["snow"], keep_unlisted=True)
    assert [reader.split_of(i) for i in range(5)] == ["test", "train", "train", "train", "train"]
    assert [name for name, _ in reader.left_out()] == ["S2B_MSIL2A_20180204T94161_57_38"]


def test_unpacking_the_example_pairs_twice_keeps_what_is_there(example_root):
    assert example_pairs_root(example_root) == example_root
    assert sorted(path.name for path in example_root.iterdir()) == ["BigEarthNet-S1-v1.0", "BigEarthNet-v1.0"]


@pytest.mark.real_data
def test_real_pairs_have_plausible_backscatter_and_reflectance():
    folder = os.environ.get("FUSMAE_REAL_DATA")
    if not folder:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    reader = BigEarthNet(Path(folder, "bigearthnet_v1"))
    assert len(reader) == 6
    for index in range(6):
        pair = reader.read(index)
        vv, vh = pair.sar.mean(axis=(1, 2))
        assert 4 < vv - vh < 9
        assert -20 < vv < -5
        assert pair.optical.shape == (12, 120, 120)
        b01 = pair.optical[0].reshape(20, 6, 20, 6)
        assert (b01 == b01[:, :1, :, :1]).all()
        assert pair.labels
        assert pair.crs
        assert pair.crs.startswith("EPSG:326")
