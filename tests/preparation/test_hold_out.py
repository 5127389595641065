"""Held-out pairs share no ground with those to train on."""

import itertools

import numpy as np
import pytest

from fusmae_hf.data.pairs import Place
from fusmae_hf.preparation.hold_out import draw_held_out
from fusmae_hf.readers.biomassters import BioMassters
from fusmae_hf.readers.sen12ms import SEN12MS
from fusmae_hf.readers.ssl4eo import SSL4EOS12
from fusmae_hf.readers.ssl4eo_zarr import SSL4EOS12Zarr


def windows(scene, left=0.0, crs="EPSG:32632", size=64, stride=32, side=256):
    starts = range(0, side - size + 1, stride)
    return [Place(scene, crs, (left + x, y, left + x + size, y + size)) for y, x in itertools.product(starts, starts)]


def shares_ground(one, other):
    if (one.crs or one.scene) != (other.crs or other.scene):
        return False
    (a, b, c, d), (e, f, g, h) = one.box, other.box
    return min(c, g) > max(a, e) and min(d, h) > max(b, f)


def dates_of_one_place():
    at = [(n * 100.0, 0.0, n * 100.0 + 90, 90.0) for n in range(20)]
    return [Place(f"{box[0]}-{date}", "EPSG:32632", box) for box in at for date in "abc"]


CASES = {
    "overlapping windows of three scenes": windows("a") + windows("b", 1e4) + windows("c", 2e4),
    "overlapping windows of one scene": windows("a"),
    "windows that touch": windows("a", stride=64) + windows("b", 256.0, stride=64),
    "several dates": dates_of_one_place(),
    "overlapping scenes": [p for n in range(12) for p in windows(str(n), 300.0 * n, stride=64)],
    "no georeference": windows("a", crs=None) + windows("b", crs=None) + windows("c", crs=None),
    "one scene without georeference": windows("a", crs=None),
}


@pytest.mark.parametrize("split_by", ["place", "scene", "block:128"])
@pytest.mark.parametrize("places", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_no_ground_is_in_two_splits(places, split_by, seed):
    drawn = draw_held_out(places, 0.3, seed, split_by)
    held_out, dropped = set(drawn.held_out.tolist()), set(drawn.dropped.tolist())
    train = set(range(len(places))) - held_out - dropped
    assert held_out
    assert train
    assert not held_out & dropped
    assert not any(shares_ground(places[one], places[other]) for one, other in itertools.product(held_out, train))
    assert f"Held out {len(held_out):,}" in drawn.summary


def test_pairs_of_nobody_knows_where_are_drawn_one_by_one():
    drawn = draw_held_out([None] * 10, 0.3, 0)
    assert sorted(np.random.default_rng(0).permutation(10)[:3].tolist()) == drawn.held_out.tolist()


def test_the_share_is_reached_where_places_allow_it():
    drawn = draw_held_out(dates_of_one_place(), 0.25, 0)
    assert len(drawn.held_out) == 15
    assert not len(drawn.dropped)


def test_scenes_of_two_systems_on_the_same_ground_stay_together():
    from rasterio.warp import transform_bounds

    here = (500_000.0, 5_000_000.0, 510_000.0, 5_010_000.0)
    there = transform_bounds("EPSG:32632", "EPSG:3857", *here)
    places = [Place("a", "EPSG:32632", here), Place("b", "EPSG:3857", there), *windows("c", 1e6, stride=64)]
    for seed in range(5):
        held_out = set(draw_held_out(places, 0.5, seed).held_out.tolist())
        assert len(held_out & {0, 1}) in (0, 2)


def test_ground_that_all_pairs_share_cannot_be_divided():
    with pytest.raises(ValueError, match="lie on one another"):
        draw_held_out([Place("a", "EPSG:32632", (0, 0, 9, 9))] * 4, 0.5, 0)
    with pytest.raises(ValueError, match="scene, place or block:SIZE"):
        draw_held_out([None], 0.5, 0, "tile")


@pytest.mark.parametrize(("sizes", "share", "expected"), [((4, 4), 0.25, 4), ((4, 4, 6), 0.1, 4), ((4,) * 20, 0.1, 8)])
def test_dates_of_one_place_are_held_out_whole_where_only_names_tell_places(sizes, share, expected):
    places = [Place(str(name), None, (0, 0, 1, 1)) for name, size in enumerate(sizes) for _ in range(size)]
    held_out = {places[number].scene for number in draw_held_out(places, share, 0).held_out}
    assert sum(sizes[int(name)] for name in held_out) == expected == len(draw_held_out(places, share, 0).held_out)


@pytest.mark.parametrize(
    ("reader", "ids", "same"),
    [
        (
            SSL4EOS12,
            ["0000200_20200604T054639_T43RCP", "0000200_20200813T054639_T43RCP", "0000201_2020_T43RCP"],
            2,
        ),
        (SSL4EOS12Zarr, ["0000200_0", "0000200_3", "0000201_0"], 2),
        (BioMassters, ["0060c0a5_00", "0060c0a5_11", "0060c0a6_00"], 2),
        (SEN12MS, ["ROIs1158_spring_1_p30", "ROIs1158_spring_1_p31", "ROIs1158_spring_11_p30"], 2),
    ],
)
def test_readers_know_pairs_of_one_ground_by_their_names(reader, ids, same):
    opened = object.__new__(reader)
    opened.ids = ids
    scenes = [place.scene for place in opened.places(range(len(ids)))]
    assert len(set(scenes[:same])) == 1
    assert len(set(scenes)) == 2
