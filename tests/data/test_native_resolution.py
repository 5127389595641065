"""Bands in their own resolution: packed without loss, refused where something would be lost, unpacked everywhere."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusmae_hf.data.checks import check_pair
from fusmae_hf.data.native_resolution import PIXEL_DTYPES, NativeBands, expand_bands, native_bands, native_size
from fusmae_hf.errors import PairError
from fusmae_hf.shards.decoding import RowsInMemory, decode_pairs
from fusmae_hf.shards.writing import row_checksum, write_shard

NAME = "data/train-00000-of-00001.parquet"
FACTORS = (2, 1, 4)


def bands(dtype="uint16", height=8, width=12, factors=FACTORS, seed=0):
    generator = np.random.default_rng(seed)
    sizes = [(height // factor, width // factor) for factor in factors]
    return NativeBands([generator.integers(1, 100, size).astype(dtype) for size in sizes], factors)


@pytest.fixture
def coarse_info(pairs_info):
    return replace(pairs_info, optical_factors=FACTORS)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(PIXEL_DTYPES),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    factors=st.lists(st.sampled_from([1, 2, 3, 6]), min_size=1, max_size=5).map(tuple),
    count=st.integers(1, 3),
)
def test_packing_and_expanding_are_inverse(dtype, rows, columns, factors, count):
    height, width = 6 * rows, 6 * columns
    native = [bands(dtype, height, width, factors, seed) for seed in range(count)]
    expanded = [pair.expand() for pair in native]
    for pair, pixels in zip(native, expanded, strict=True):
        assert pixels.shape == pair.shape == (len(factors), height, width)
        for packed, band in zip(native_bands(pixels, factors).bands, pair.bands, strict=True):
            np.testing.assert_array_equal(packed, band)
    packed = torch.stack([torch.from_numpy(np.concatenate([band.ravel() for band in pair.bands])) for pair in native])
    assert packed.shape[1] == native_size((len(factors), height, width), factors)
    np.testing.assert_array_equal(expand_bands(packed, factors, height, width).numpy(), np.stack(expanded))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_both_ways_of_giving_bands_are_the_same_in_the_file(tmp_path, coarse_info, make_pair, dtype):
    native = [make_pair(number, optical=bands(dtype, 8, 8, seed=number)) for number in range(3)]
    expanded = [replace(pair, optical=pair.optical.expand()) for pair in native]
    for folder, pairs in (("native", native), ("expanded", expanded)):
        write_shard(pairs, coarse_info, tmp_path / folder, NAME)
    assert (tmp_path / "native" / NAME).read_bytes() == (tmp_path / "expanded" / NAME).read_bytes()
    (rows,) = pq.read_table(tmp_path / "native" / NAME).to_batches()
    batch = decode_pairs([(RowsInMemory(rows, "shard"), row) for row in range(3)], coarse_info)
    np.testing.assert_array_equal(batch["optical"].numpy(), np.stack([pair.optical for pair in expanded]))
    assert rows.column("checksum").to_pylist() == [row_checksum(pair, coarse_info) for pair in native]


def test_bands_are_stored_little_endian(tmp_path, coarse_info, make_pair):
    optical = bands("uint16", 8, 8)
    swapped = NativeBands([band.astype(">u2") for band in optical.bands], FACTORS)
    for folder, given_bands in (("a", optical), ("b", swapped)):
        write_shard([make_pair(0, optical=given_bands)], coarse_info, tmp_path / folder, NAME)
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_pixels_that_differ_within_a_coarse_pixel_are_refused(tmp_path, coarse_info, make_pair):
    with pytest.raises(PairError, match=r"pair-0000: optical band number 0 is declared 2 times coarser.*differ"):
        write_shard([make_pair(0)], coarse_info, tmp_path, NAME)


def test_a_size_that_the_factors_do_not_divide_is_refused(tmp_path, coarse_info, make_pair):
    pair = make_pair(0, optical=np.ones((3, 6, 6), np.uint16))
    with pytest.raises(PairError, match=r"pair-0000: optical band number 2 is declared 4 times coarser than 6x6"):
        write_shard([pair], coarse_info, tmp_path, NAME)


def with_band(number, band):
    fitting = bands("uint16", 8, 8)
    return NativeBands([*fitting.bands[:number], band, *fitting.bands[number + 1 :]], FACTORS)


@pytest.mark.parametrize(
    ("optical", "message"),
    [
        (bands(factors=(1, 1, 1)), r"bands \(1, 1, 1\) times coarser, but \(2, 1, 4\) is declared"),
        (with_band(2, np.ones((3, 2), np.uint16)), r"a band of \(3, 2\) uint16, 4 times coarser"),
        (with_band(1, np.ones((8, 8), np.uint8)), r"a band of \(8, 8\) uint8"),
        (with_band(1, np.ones((8, 9), np.uint16)), r"a band of \(8, 9\) uint16"),
    ],
)
def test_bands_that_do_not_fit_are_refused(coarse_info, make_pair, optical, message):
    with pytest.raises(PairError, match=f"pair-0000: optical has {message}"):
        check_pair(make_pair(0, optical=optical), coarse_info)


def test_bands_in_their_own_resolution_must_be_declared(pairs_info, make_pair):
    with pytest.raises(PairError, match=r"times coarser, but \(\) is declared"):
        check_pair(make_pair(0, optical=bands("uint16", 8, 8)), pairs_info)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_no_data_is_counted_as_on_the_grid(coarse_info, make_pair, dtype):
    optical = bands(dtype, 8, 8)
    optical.bands[1][:4, :4] = 0  # the fine band alone: dark, not missing
    assert check_pair(make_pair(0, optical=optical), coarse_info)["optical"] == 0
    optical.bands[0][:2, :2] = 0
    optical.bands[2][0, 0] = 0
    assert check_pair(make_pair(0, optical=optical), coarse_info)["optical"] == 16
    expanded = make_pair(0, optical=optical.expand())
    assert check_pair(expanded, coarse_info)["optical"] == 16


def test_a_hole_in_a_coarse_band_counts_as_often_as_it_covers_the_grid(coarse_info, make_pair):
    optical = bands("float32", 8, 8)
    optical.bands[2][1, 1] = np.nan
    assert check_pair(make_pair(0, optical=optical), coarse_info)["optical"] == 16
