"""One rule, every door: odd values of each kind are told by the processor, `prepare`, `verify`, `inspect`, the
statistics and `show`, and plausible ones by none of them."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.preparation.inspection import inspect_shards
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.preparation.state import merge_sets
from fusmae_hf.preparation.statistics import band_statistics
from fusmae_hf.preparation.verification import verify_shards
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.format import FILE_NAME
from tests.small_shards import run_command

SIDE = 32
BANDS = ("B02", "B03", "B04", "B08")
INFO = PairsInfo("doors", "made by the tests", "CC0-1.0", ("VV", "VH"), BANDS)


class Given:
    """A reader of pairs that a test made."""

    summary = ""

    def __init__(self, pairs: list[Pair], info: PairsInfo):
        self.info, self.pairs, self.ids = info, pairs, [pair.id for pair in pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def split_of(self, index: int) -> str | None:
        return None

    def read(self, index: int) -> Pair:
        return self.pairs[index]

    def left_out(self):
        return iter(())


def sar(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal([[[-12]], [[-19]]], 2, (2, SIDE, SIDE)).astype("float32")


def optical(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(150, 3000, (4, SIDE, SIDE)).astype("uint16")


def filled(make, value, dtype="float32", bands=slice(None), rows=8):
    def change(seed: int) -> np.ndarray:
        pixels = make(seed).astype(dtype)
        pixels[bands, :rows] = value
        return pixels

    return change


FILLS = (-9999, -32768, 32767, 65535, -999, -99, 1e20, -1e20, -3.4e38)

ODD = {
    **{f"sar of {value:g}": ({"sar": filled(sar, value)}, {}, f"{value:g}") for value in FILLS},
    **{f"optical of {value:g}": ({"optical": filled(optical, value)}, {}, f"{value:g}") for value in FILLS},
    "a few pixels": ({"sar": filled(sar, -9999, rows=1)}, {}, "-9999"),
    "one SAR band alone": ({"sar": filled(sar, -9999, bands=1)}, {}, "-9999 in VH"),
    "one optical band alone": ({"optical": filled(optical, -9999, "int16", bands=2)}, {}, "-9999 in B04"),
    "integer SAR": ({"sar": filled(sar, -32768, "int16")}, {}, "-32768"),
    "linear power": (
        {"sar": lambda seed: np.where(np.arange(SIDE) < 9, 65535, 10 ** (sar(seed) / 10))},
        {"sar_units": "linear"},
        "65535",
    ),
    "0 dB": ({"sar": filled(sar, 0)}, {}, "exactly 0 dB"),
    "0 dB in integers": ({"sar": filled(sar, 0, "int16")}, {}, "exactly 0 dB"),
    "saturated": ({"optical": filled(optical, 65535, "uint16", rows=1)}, {}, "saturated"),
    "wrapped optical": (
        {"optical": lambda seed: (optical(seed) // 2).astype("uint16") - np.uint16(1000)},
        {},
        "negative numbers were put into unsigned",
    ),
    "wrapped reflectance": (
        {"optical": lambda seed: ((optical(seed) // 2).astype("uint16") - np.uint16(1000)) / np.float32(1e4)},
        {"optical_units": "reflectance"},
        "negative numbers were put into unsigned",
    ),
    "dB cast to unsigned": (
        {"sar": lambda seed: sar(seed).astype("int16").astype("uint16")},
        {},
        "negative numbers were put into unsigned",
    ),
    "reflectance filled": (
        {"optical": lambda seed: filled(optical, -9999)(seed) / np.float32(1e4)},
        {"optical_units": "reflectance"},
        "-0.9999",
    ),
    "reflectance as numbers": ({"optical": lambda seed: optical(seed) / np.float32(1e4)}, {}, "reflectance"),
    "numbers as reflectance": ({"optical": optical}, {"optical_units": "reflectance"}, "digital numbers"),
    "8 bits": ({"optical": lambda seed: (optical(seed) // 12).astype("uint8")}, {}, "8-bit"),
    "8 bits as reflectance": (
        {"optical": lambda seed: (optical(seed) // 12).astype("float32")},
        {"optical_units": "reflectance"},
        "8-bit",
    ),
    "percent": ({"optical": lambda seed: optical(seed) / np.float32(100)}, {}, "percent"),
    "percent as reflectance": (
        {"optical": lambda seed: optical(seed) / np.float32(100)},
        {"optical_units": "reflectance"},
        "percent",
    ),
    "power as dB": ({"sar": lambda seed: 10 ** (sar(seed) / 10)}, {}, "linear power"),
    "amplitude as dB": ({"sar": lambda seed: 10 ** (sar(seed) / 20)}, {}, "amplitude"),
    "dB as power": ({"sar": sar}, {"sar_units": "linear"}, "looks like dB"),
    "dB x 100": ({"sar": lambda seed: (sar(seed) * 100).astype("int16")}, {}, "multiplied by 100"),
    "bands exchanged": ({"sar": lambda seed: sar(seed)[::-1].copy()}, {}, "swapped"),
}
"""How the arrays of a pair are made, what is declared, and what every door says."""

PLAUSIBLE = {
    "a pair": ({}, {}),
    "raw values of any kind": (
        {"sar": filled(sar, -9999), "optical": filled(optical, 65535, "uint16")},
        {"sar_units": "raw", "optical_units": "raw"},
    ),
    "power with a border": (
        {"sar": lambda seed: np.where(np.arange(SIDE) < 9, 0, 10 ** (sar(seed) / 10))},
        {"sar_units": "linear"},
    ),
    "numbers below zero": ({"optical": lambda seed: optical(seed).astype("int16") - np.int16(500)}, {}),
    "reflectance": ({"optical": lambda seed: optical(seed) / np.float32(1e4)}, {"optical_units": "reflectance"}),
    "bright cloud": ({"optical": lambda seed: optical(seed) + np.uint16(12_000)}, {}),
    "NaN": ({"sar": filled(sar, np.nan)}, {}),
    "some targets of 0 dB": ({"sar": lambda seed: np.where(np.eye(SIDE) * (np.arange(SIDE) < 8), 0, sar(seed))}, {}),
}


def made(change, declared, number=6):
    info = replace(INFO, **declared)
    arrays = {"sar": sar, "optical": optical} | change
    pairs = [
        Pair(f"pair-{seed}", **{name: np.asarray(make(seed)) for name, make in arrays.items()})
        for seed in range(number)
    ]
    return Given(pairs, info)


def said(action) -> str:
    """What an action warns of or refuses."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = action()
        except ValueError as error:
            return str(error)
    return " ".join([str(warning.message) for warning in caught] + [str(result)])


def processed(reader: Given) -> str:
    processor = FusMAEImageProcessor(
        optical_bands=BANDS,
        sar_units=reader.info.sar_units,
        optical_units=reader.info.optical_units,
        statistics="bigearthnet",
    )
    pair = reader.read(0)
    return said(lambda: processor(sar=pair.sar, optical=pair.optical) and "")


@pytest.mark.parametrize("kind", ODD)
def test_every_door_tells_of_odd_values(tmp_path, kind):
    change, declared, message = ODD[kind]
    reader = made(change, declared)
    message = re.sub(r"([+.])", r"\\\1", message)
    assert re.search(message, processed(reader)), "processor"
    report = said(lambda: prepare(reader, tmp_path))
    assert re.search(message, report), "prepare"
    if not (tmp_path / FILE_NAME).is_file():  # refused: every door after it has nothing to look at
        return
    assert re.search(message, " ".join(str(verify_shards(tmp_path)).split())), "verify"


@pytest.mark.parametrize("kind", ["0 dB", "sar of -9999", "optical of 65535", "one optical band alone"])
def test_what_prepare_recorded_is_told_by_those_who_come_later(tmp_path, kind, capsys):
    change, declared, message = ODD[kind]
    reader = made(change, declared)
    said(lambda: prepare(reader, tmp_path))
    record = read_dataset_info(tmp_path).shards("train")[0].plausibility
    (seen,) = record["findings"].values()
    assert (seen["pairs"], seen["pixels"]) == (6, 6 * 8 * SIDE)
    for door in (
        lambda: inspect_shards(str(tmp_path)),
        lambda: band_statistics(tmp_path),
        lambda: run_command("show", tmp_path, "--what", "sar", "--output", tmp_path / "sar.png"),
    ):
        assert message in " ".join(said(door).split())


def test_without_a_record_inspect_looks_at_the_pairs_itself(tmp_path):
    said(lambda: prepare(made(*ODD["0 dB"][:2]), tmp_path))
    content = json.loads((tmp_path / FILE_NAME).read_text())
    for shard in content["splits"]["train"]["shards"]:
        del shard["plausibility"]
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    assert "6 pairs" in (found := " ".join(str(inspect_shards(str(tmp_path))).split()))
    assert "exactly 0 dB" in found


@pytest.mark.parametrize("kind", PLAUSIBLE)
def test_no_door_says_a_word_about_plausible_values(tmp_path, kind):
    reader = made(*PLAUSIBLE[kind])
    if kind != "NaN":
        assert processed(reader) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = prepare(reader, tmp_path)
    assert "warning" not in str(report)
    assert verify_shards(tmp_path).problems == []
    assert "warning" not in str(inspect_shards(str(tmp_path)))


@pytest.mark.parametrize("kind", ["0 dB", "bands exchanged", "a few pixels"])
def test_strict_makes_errors_of_warnings(tmp_path, kind):
    reader = made(*ODD[kind][:2])
    said(lambda: prepare(reader, tmp_path / "warned"))
    assert verify_shards(tmp_path / "warned").sound
    assert not verify_shards(tmp_path / "warned", strict=True).sound
    with pytest.raises(ValueError, match=ODD[kind][2]):
        prepare(reader, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / FILE_NAME).exists()


def test_strict_finds_what_only_a_late_pair_holds(tmp_path):
    reader = made({}, {}, number=60)
    reader.pairs[57].sar[:, :4] = -9999
    with pytest.raises(ValueError, match=r"Values look odd, which --strict .*pair-57.*-9999"):
        prepare(reader, tmp_path, strict=True, keep_order=True)
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("value", [*FILLS, np.inf])
def test_a_map_of_a_quantity_is_judged(tmp_path, value):
    reader = made({}, {"map_units": "t/ha"})
    for pair in reader.pairs:
        pair.label_map = np.random.default_rng(0).uniform(0, 300, (SIDE, SIDE)).astype("float32")
    assert "warning" not in str(prepare(reader, tmp_path / "fine"))
    for pair in reader.pairs:
        pair.label_map[:3] = value
    assert "map range" in said(lambda: prepare(reader, tmp_path / "odd"))
    assert [problem.check for problem in verify_shards(tmp_path / "odd").problems] == ["label maps"] * 6


@pytest.mark.parametrize("declared", [0, 1000])
@pytest.mark.parametrize("carry", [lambda i: i % 2, lambda i: i < 3, lambda i: i > 8])
def test_scenes_with_and_without_the_offset_are_not_mixed_in_silence(tmp_path, carry, declared):
    reader = made({}, {"optical_offset": declared}, number=12)
    for index, pair in enumerate(reader.pairs):
        pair.optical = pair.optical + np.uint16(1000 if carry(index) else 0)
    assert "two groups" in said(lambda: prepare(reader, tmp_path))
    assert "two groups" in " ".join(str(verify_shards(tmp_path)).split())


def test_merged_sets_that_declare_their_offsets_are_no_mix(tmp_path):
    for name, offset in (("without", 0), ("with", 1000)):
        reader = made({}, {"optical_offset": offset})
        for pair in reader.pairs:
            pair.id, pair.optical = f"{name}-{pair.id}", pair.optical + np.uint16(offset)
        reader.ids = [pair.id for pair in reader.pairs]
        prepare(reader, tmp_path / name)
    merged = merge_sets(tmp_path / "merged", [tmp_path / "without", tmp_path / "with"])
    assert merged.odd_values() == []
    assert not verify_shards(tmp_path / "merged").problems


@pytest.mark.parametrize("brightness", ["all dark", "all with the offset", "clouds", "every brightness"])
def test_scenes_of_other_brightness_are_not_taken_for_a_mix(tmp_path, brightness):
    reader = made({}, {}, number=24)
    added = {
        "all dark": lambda i: 0,
        "all with the offset": lambda i: 1000,
        "clouds": lambda i: 0 if i % 3 else 900 + 400 * i,
        "every brightness": lambda i: 80 * i,
    }[brightness]
    for index, pair in enumerate(reader.pairs):
        pair.optical = pair.optical + np.uint16(added(index))
    assert "two groups" not in said(lambda: prepare(reader, tmp_path))


@pytest.mark.parametrize("offset", [-1000, -0.1, 0.1, -1])
def test_an_offset_of_the_wrong_sign_or_scale_cannot_be_declared(offset):
    with pytest.raises(ValueError, match="what was added"):
        replace(INFO, optical_offset=offset)
    assert replace(INFO, optical_offset=offset, optical_units="raw").optical_offset == offset


IMPOSSIBLE = {
    "metres in degrees": ("EPSG:4326", (10, 0, 5e5, 0, -10, 5e6)),
    "pixels of ten degrees": ("EPSG:4326", (10, 0, 9, 0, -10, 45)),
    "degrees in a zone of UTM": ("EPSG:32632", (1e-4, 0, 9, 0, -1e-4, 45)),
    "far from the zone": ("EPSG:32632", (10, 0, 5e6, 0, -10, 5e6)),
    "beyond Mercator": ("EPSG:3857", (10, 0, 5e7, 0, -10, 5e6)),
}


@pytest.mark.parametrize("place", IMPOSSIBLE)
def test_a_place_that_cannot_be_is_left_out(tmp_path, place):
    reader = made({}, {})
    crs, transform = IMPOSSIBLE[place]
    reader.pairs[2].crs, reader.pairs[2].transform = crs, transform
    reader.pairs[3].crs, reader.pairs[3].transform = "EPSG:32632", (10, 0, 5e5, 0, -10, 5e6)
    reader.pairs[4].crs, reader.pairs[4].transform = "EPSG:4326", (1e-4, 0, 9, 0, -1e-4, 45)
    report = prepare(reader, tmp_path)
    assert [pair.id for pair in report.left_out] == ["pair-2"]
    assert "cannot be of" in report.left_out[0].reason
