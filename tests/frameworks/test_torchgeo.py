"""Samples of TorchGeo's own datasets, read by TorchGeo from small archives in the official layouts."""

import csv
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from fusmae_hf import FusMAEImageProcessor, load_pairs
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C
from tests.readers import bigearthnet_fixtures, sen12ms_fixtures, ssl4eo_fixtures
from tests.small_shards import INFO, write_shards

datasets = pytest.importorskip("torchgeo.datasets", reason="TorchGeo is not installed", exc_type=ImportError)

from fusmae_hf.frameworks.torchgeo import ShardPairs, from_torchgeo  # noqa: E402


@pytest.fixture(scope="module")
def reben(tmp_path_factory):
    return bigearthnet_fixtures.make_reben(tmp_path_factory.mktemp("reben"), absent=0)


@pytest.fixture(scope="module")
def bigearthnet(tmp_path_factory):
    """Version 1 under the names that TorchGeo looks for."""
    root = tmp_path_factory.mktemp("bigearthnet")
    bigearthnet_fixtures.make_bigearthnet(root / "official")
    for sensor, folder in (("s1", "BigEarthNet-S1-v1.0"), ("s2", "BigEarthNet-v1.0")):
        found = next(path for path in (root / "official").iterdir() if path.name.startswith(folder))
        shutil.copytree(found, root / datasets.BigEarthNet.metadata[sensor]["directory"])
    for name, (sar, optical) in zip(["train", "val", "test"], bigearthnet_fixtures.V1_PAIRS, strict=True):
        with (root / f"bigearthnet-{name}.csv").open("w") as file:
            csv.writer(file).writerow([optical, sar])
    return root


@pytest.fixture(scope="module")
def sen12ms(tmp_path_factory):
    root = sen12ms_fixtures.make_sen12ms(tmp_path_factory.mktemp("sen12ms"))
    for path in (root / "splits").iterdir():
        shutil.move(path, root)
    for season in datasets.SEN12MS.light_filenames[:4]:
        (root / season).mkdir(exist_ok=True)
    (root / "train_list.txt").write_text("ROIs1158_spring_s2_1_p30.tif\n")
    return root


@pytest.fixture(scope="module")
def ssl4eo(tmp_path_factory):
    """Under the numbers of places that TorchGeo counts."""
    root = ssl4eo_fixtures.make_ssl4eo(tmp_path_factory.mktemp("ssl4eo"))
    for split in ("s1", "s2a", "s2c"):
        (root / split / "0000200").rename(root / split / "0000000")
    return root


def levels(images: torch.Tensor) -> list[float]:
    return [round(float(value), 1) for value in images.flatten(1).median(dim=1).values]


@pytest.mark.parametrize("version", ["reben", "bigearthnet"])
def test_samples_of_bigearthnet_have_vh_first_and_are_what_our_reader_gives_but_for_decimals(version, request):
    make = {"reben": datasets.BigEarthNetV2, "bigearthnet": datasets.BigEarthNet}[version]
    root = request.getfixturevalue(version)
    dataset = make(root)
    arguments = from_torchgeo(dataset[0], dataset)
    assert arguments["sar_bands"] == ["VH", "VV"]
    assert levels(arguments["sar"]) == [-19, -13]  # -19.3 and -12.7, rounded
    assert arguments["optical_bands"] == list(OPTICAL_BANDS)
    assert [round(level, -2) for level in levels(arguments["optical"])] == [300 + 100 * n for n in range(12)]
    for sensor, bands in (("s1", 2), ("s2", 12)):
        alone = make(root, bands=sensor)
        given = from_torchgeo(alone[0], alone)
        assert len(given) == (3 if sensor == "s1" else 4)
        assert next(iter(given.values())).shape[0] == bands


@pytest.mark.filterwarnings("ignore:SAR")  # TorchGeo reads BigEarthNet's decibels as whole numbers
def test_the_processor_takes_a_batch_of_a_subset(reben):
    dataset = Subset(datasets.BigEarthNetV2(reben), [0])
    arguments = from_torchgeo(next(iter(DataLoader(dataset, 1))), dataset)
    inputs = FusMAEImageProcessor()(**arguments)
    vv = FusMAEImageProcessor().denormalize(inputs["pixel_values_sar"], "sar")[0, 0]
    assert vv.median() == pytest.approx(-13, abs=1e-3)


@pytest.mark.parametrize("bands", ["all", "s1", "s2-all", "s2-reduced"])
def test_samples_of_sen12ms_follow_the_bands_asked_for(sen12ms, bands):
    names = datasets.SEN12MS.BAND_SETS[bands]
    dataset = datasets.SEN12MS(sen12ms, bands=names)
    arguments = from_torchgeo(dataset[0], dataset)
    assert (*arguments.get("sar_bands", ()), *arguments.get("optical_bands", ())) == tuple(names)
    if "sar" in arguments:
        np.testing.assert_allclose(arguments["sar"], sen12ms_fixtures.backscatter())
    if "optical" in arguments:
        chosen = [OPTICAL_BANDS_L1C.index(name) for name in arguments["optical_bands"]]
        np.testing.assert_array_equal(arguments["optical"], sen12ms_fixtures.digital_numbers()[chosen])


@pytest.mark.parametrize(("split", "seasons"), [("s1", 1), ("s1", 2), ("s2a", 2), ("s2c", 1)])
def test_seasons_of_ssl4eo_become_a_batch(ssl4eo, split, seasons):
    dataset = datasets.SSL4EOS12(ssl4eo, split=split, seasons=seasons)
    arguments = from_torchgeo(dataset[0], dataset)
    sensor = "sar" if split == "s1" else "optical"
    inputs = FusMAEImageProcessor()(**arguments)
    assert len(next(iter(inputs.values()))) == seasons
    first = arguments[sensor].reshape(-1, *arguments[sensor].shape[-3:])[-1, :, 0, 0].tolist()
    values = [ssl4eo_fixtures.VV_DB, ssl4eo_fixtures.VH_DB]
    if sensor == "optical":
        values = [
            ssl4eo_fixtures.band_value(band) for band in (OPTICAL_BANDS if split == "s2a" else OPTICAL_BANDS_L1C)
        ]
    assert first == values


def test_shards_are_a_dataset_of_torchgeo_and_come_back(tmp_path):
    dataset = ShardPairs(write_shards(tmp_path))
    assert isinstance(dataset, datasets.NonGeoDataset)
    assert len(dataset) == 12
    assert dataset.bands == (*INFO.sar_bands, *INFO.optical_bands)
    pair = load_pairs(tmp_path)[3]
    arguments = from_torchgeo(dataset[3], dataset)
    torch.testing.assert_close(arguments["sar"], pair["sar"])
    torch.testing.assert_close(arguments["optical"], pair["optical"].float())
    assert [INFO.class_names[n] for n in dataset[3]["label"].nonzero().flatten()] == pair["labels"]
    assert ShardPairs(tmp_path, task="single_label_classification")[3]["label"] == 1
    assert ShardPairs(tmp_path, "test", transforms=lambda sample: {"keys": sorted(sample)})[0] == {
        "keys": ["image", "label"]
    }


def test_a_sample_of_other_bands_and_an_unknown_dataset_say_what_to_do(sen12ms, reben):
    dataset = datasets.SEN12MS(sen12ms)
    sample = dataset[0]
    with pytest.raises(ValueError, match=r"'image' of shape \(14, 256, 256\).*15 bands.*pass the dataset"):
        from_torchgeo({"image": sample["image"][:14]}, dataset)
    with pytest.raises(ValueError, match=r"the keys \['image', 'mask'\].*BigEarthNetV2 gives 'image_s1'"):
        from_torchgeo(sample, datasets.BigEarthNetV2(reben))
    with pytest.raises(ValueError, match=r"not EuroSAT.*`processor\(sar=\.\.\., sar_bands="):
        from_torchgeo(sample, datasets.EuroSAT.__new__(datasets.EuroSAT))
