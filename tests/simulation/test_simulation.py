from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION, SAR_BANDS, STATISTICS
from fusmae_hf.plots.pairs import CLASS_COLOURS, plot_pair
from fusmae_hf.simulation.land_cover import CLASS_NAMES, LAND_COVER, LANDSCAPES, WATER_CLASSES
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from fusmae_hf.simulation.sensors import SEASONS

CLEAR = SimulationOptions(cloud_probability=0.0)
EACH_PAIR_ITS_PLACE = replace(CLEAR, pairs_per_place=1)
COVER = {cover.name: cover for cover in LAND_COVER}
SAR_ONLY = sorted({tuple(sorted((c.name, other))) for c in LAND_COVER for other in c.sar_only_from})
OPTICAL_ONLY = sorted({tuple(sorted((c.name, other))) for c in LAND_COVER for other in c.optical_only_from})


def assert_same(one, other):
    np.testing.assert_array_equal(one.sar, other.sar)
    np.testing.assert_array_equal(one.optical, other.optical)
    np.testing.assert_array_equal(one.label_map, other.label_map)
    assert (one.id, one.labels, one.split, one.extra) == (other.id, other.labels, other.split, other.extra)


def linear(decibel):
    return 10 ** (decibel.astype(np.float64) / 10)


@pytest.fixture(scope="module")
def year():
    """120 places of a year: each landscape and season in its usual proportion."""
    pairs = SimulatedPairs(120, seed=3, options=SimulationOptions(pairs_per_place=1))
    return [pairs.read(index) for index in range(len(pairs))]


def test_a_pair_is_raw_labelled_and_marked_as_simulated():
    pairs = SimulatedPairs(3)
    pair = pairs.read(2)
    assert (pair.sar.shape, pair.sar.dtype) == ((2, 120, 120), np.float32)
    assert (pair.optical.shape, pair.optical.dtype) == ((12, 120, 120), np.uint16)
    assert (pair.label_map.shape, pair.label_map.dtype) == ((120, 120), np.uint8)
    assert all(array.flags.c_contiguous for array in (pair.sar, pair.optical, pair.label_map))
    assert np.isfinite(pair.sar).all()
    assert (pair.optical > 0).all()
    assert (pair.id, pairs.ids[2], len(pairs)) == ("simulated-s0-000002", "simulated-s0-000002", 3)
    assert (pairs.info.name, pairs.info.simulated, pairs.info.license) == ("simulated", True, "CC0-1.0")
    assert (pairs.info.sar_bands, pairs.info.optical_bands) == (SAR_BANDS, OPTICAL_BANDS)
    assert pairs.info.class_names == pairs.info.map_class_names == CLASS_NAMES
    assert list(pairs.left_out()) == []


@pytest.mark.parametrize("size", [8, 37, 96, 264])
def test_any_image_size_works(size):
    pair = SimulatedPairs(1, options=SimulationOptions(image_size=size, misregistration_px=10)).read(0)
    assert pair.sar.shape == (2, size, size)
    assert pair.optical.shape == (12, size, size)
    assert pair.label_map.shape == (size, size)


@pytest.mark.parametrize("options", [CLEAR, SimulationOptions(48, 2, 3, "snow", 0.1, 0.5, 0.2, 0.5, 1.5)])
def test_a_pair_depends_on_seed_index_and_options_and_not_on_what_was_read_before(options):
    few, many = SimulatedPairs(8, seed=5, options=options), SimulatedPairs(500, seed=5, options=options)
    for index in (7, 0, 3):
        assert_same(few.read(index), many.read(index))


def test_another_seed_or_index_gives_another_pair():
    pairs = SimulatedPairs(2, seed=1)
    assert not np.array_equal(pairs.read(0).label_map, pairs.read(1).label_map)
    assert not np.array_equal(pairs.read(0).label_map, SimulatedPairs(2, seed=2).read(0).label_map)


@pytest.mark.parametrize(
    ("change", "keeps"),
    [
        ({"looks": 1.0}, ("optical", "label_map")),
        ({"cloud_probability": 1.0}, ("sar", "label_map")),
        ({"misregistration_px": 3.0}, ("optical", "label_map")),
        ({"season": "summer"}, ("sar", "label_map")),
        ({"label_share": 0.5}, ("sar", "optical", "label_map")),
    ],
)
def test_an_option_changes_nothing_but_what_it_is_about(change, keeps):
    before = SimulatedPairs(1, seed=4, options=replace(CLEAR, season="winter")).read(0)
    after = SimulatedPairs(1, seed=4, options=replace(CLEAR, **{"season": "winter"} | change)).read(0)
    for name in ("sar", "optical", "label_map"):
        assert np.array_equal(getattr(before, name), getattr(after, name)) == (name in keeps), name


@pytest.mark.parametrize("looks", [1.0, 4.4, 20.0])
def test_speckle_is_gamma_in_linear_power_with_the_stated_looks_and_independent_between_polarisations(looks):
    options = replace(EACH_PAIR_ITS_PLACE, looks=looks)
    plain, smooth = SimulatedPairs(40, options=options), SimulatedPairs(40, options=replace(options, looks=1e6))
    speckle = []
    for index in range(40):
        water = np.isin(plain.read(index).label_map, WATER_CLASSES)
        if water.mean() > 0.2:
            speckle.append((linear(plain.read(index).sar) / linear(smooth.read(index).sar))[:, water])
    speckle = np.concatenate(speckle, axis=1)
    assert speckle.shape[1] > 10_000
    mean, variance = speckle.mean(axis=1), speckle.var(axis=1)
    np.testing.assert_allclose(mean, 1, atol=0.03)
    np.testing.assert_allclose(mean**2 / variance, looks, rtol=0.05)
    skewness = ((speckle - mean[:, None]) ** 3).mean(axis=1) / variance**1.5
    np.testing.assert_allclose(skewness, 2 / np.sqrt(looks), rtol=0.15)
    assert abs(np.corrcoef(speckle)[0, 1]) < 0.03
    gamma = np.random.default_rng(0).gamma(looks, 1 / looks, speckle.size)
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.mean(speckle < np.quantile(gamma, level)) == pytest.approx(level, abs=0.01)


def test_open_water_has_the_equivalent_number_of_looks_asked_for():
    pairs = SimulatedPairs(60, options=replace(EACH_PAIR_ITS_PLACE, looks=6.0))
    estimates = []
    for index in range(len(pairs)):
        pair = pairs.read(index)
        for row in range(0, 120, 24):
            for column in range(0, 120, 24):
                window = np.s_[row + 2 : row + 22, column + 2 : column + 22]
                if np.isin(pair.label_map[row : row + 24, column : column + 24], WATER_CLASSES).all():
                    power = linear(pair.sar[(slice(None), *window)])
                    estimates.append(power.mean(axis=(1, 2)) ** 2 / power.var(axis=(1, 2)))
    assert len(estimates) > 20
    np.testing.assert_allclose(np.median(estimates, axis=0), 6.0, rtol=0.1)


def test_vv_is_brighter_than_vh_in_every_pair(year):
    differences = [float(np.subtract(*pair.sar.mean(axis=(1, 2)))) for pair in year]
    assert min(differences) > 2
    assert 5.5 < np.mean(differences) < 8


@pytest.mark.parametrize("index", range(12), ids=OPTICAL_BANDS)
def test_optical_statistics_are_near_those_of_bigearthnet(year, index):
    mean, deviation = STATISTICS["bigearthnet"].optical[OPTICAL_BANDS[index]]
    values = np.stack([pair.optical[index] for pair in year]).astype(np.float64)
    assert values.mean() == pytest.approx(mean, rel=0.15)
    assert values.std() == pytest.approx(deviation, rel=0.35)


@pytest.mark.parametrize("index", range(2), ids=SAR_BANDS)
def test_sar_statistics_are_near_those_of_bigearthnet(year, index):
    mean, deviation = STATISTICS["bigearthnet"].sar[SAR_BANDS[index]]
    values = np.stack([pair.sar[index] for pair in year]).astype(np.float64)
    assert values.mean() == pytest.approx(mean, abs=1.0)
    assert values.std() == pytest.approx(deviation, abs=1.5)


def test_every_class_landscape_and_season_occurs_in_a_year(year):
    assert set(np.unique(np.stack([pair.label_map for pair in year]))) == set(range(len(LAND_COVER)))
    assert {pair.extra["landscape"] for pair in year} == {landscape.name for landscape in LANDSCAPES}
    assert {pair.extra["season"] for pair in year} == {season.name for season in SEASONS}


def test_coarse_bands_carry_less_detail_than_fine_ones(year):
    def detail(band):
        image = np.stack([pair.optical[OPTICAL_BANDS.index(band)] for pair in year]).astype(np.float64)
        return np.abs(np.diff(image, n=2, axis=2)).mean() / image.std()

    finest = {metres: [detail(b) for b in OPTICAL_BANDS if OPTICAL_RESOLUTION[b] == metres] for metres in (10, 20, 60)}
    assert min(finest[10]) > 1.5 * max(finest[20])
    assert min(finest[20]) > 2 * max(finest[60])


def test_the_class_table_backs_what_it_claims():
    assert len(SAR_ONLY) >= 2
    assert len(OPTICAL_ONLY) >= 4
    for one, other in (map(COVER.get, names) for names in SAR_ONLY):
        assert (one.spectrum, one.optical_texture, one.dormancy, one.snow_cover) == (
            other.spectrum, other.optical_texture, other.dormancy, other.snow_cover,
        )  # fmt: skip
        assert one.name in other.sar_only_from
        assert other.name in one.sar_only_from
    for one, other in (map(COVER.get, names) for names in OPTICAL_ONLY):
        assert (one.backscatter, one.sar_texture) == (other.backscatter, other.sar_texture)
        assert one.name in other.optical_only_from
        assert other.name in one.optical_only_from


@pytest.fixture(scope="module")
def windows():
    """Means over 5x5 px inside one class: per class the features of each sensor and the pair they are from."""
    pairs = SimulatedPairs(160, seed=1, options=replace(EACH_PAIR_ITS_PLACE, season="spring"))
    found = {name: {"sar": [], "optical": [], "pair": []} for name in CLASS_NAMES}
    rng = np.random.default_rng(0)
    for index in range(len(pairs)):
        pair = pairs.read(index)
        views = np.lib.stride_tricks.sliding_window_view(pair.label_map, (9, 9))[::5, ::5]
        for row, column in rng.permutation(np.argwhere((views == views[..., :1, :1]).all(axis=(2, 3)))):
            inside = np.s_[:, 5 * row + 2 : 5 * row + 7, 5 * column + 2 : 5 * column + 7]
            of_class = found[CLASS_NAMES[views[row, column, 0, 0]]]
            if of_class["pair"].count(index) < 20:
                of_class["sar"].append(10 * np.log10(linear(pair.sar[inside]).mean(axis=(1, 2))))
                of_class["optical"].append(pair.optical[inside].mean(axis=(1, 2)))
                of_class["pair"].append(index)
    return found


def balanced_accuracy(windows, classes, sensor):
    """Of a linear classifier, cross-validated between pairs, on pairs that hold both classes."""
    both = set(windows[classes[0]]["pair"]) & set(windows[classes[1]]["pair"])
    kept = [
        (f, g, c) for c in classes for f, g in zip(windows[c][sensor], windows[c]["pair"], strict=True) if g in both
    ]
    features, groups, target = (np.array(column) for column in zip(*kept, strict=True))
    assert min(np.sum(target == name) for name in classes) >= 50, "too few windows to tell"
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", C=0.1))
    folds = GroupKFold(5)
    return cross_val_score(classifier, features, target, groups=groups, cv=folds, scoring="balanced_accuracy").mean()


@pytest.mark.parametrize("classes", SAR_ONLY, ids="/".join)
def test_sar_alone_separates_classes_of_the_same_spectrum(windows, classes):
    assert balanced_accuracy(windows, classes, "sar") > 0.85
    assert balanced_accuracy(windows, classes, "optical") < 0.65


@pytest.mark.parametrize("classes", OPTICAL_ONLY, ids="/".join)
def test_the_optical_sensor_alone_separates_classes_of_the_same_backscatter(windows, classes):
    assert balanced_accuracy(windows, classes, "optical") > 0.85
    assert balanced_accuracy(windows, classes, "sar") < 0.65


def test_scene_labels_are_the_classes_above_the_stated_share():
    pairs = SimulatedPairs(10, options=replace(EACH_PAIR_ITS_PLACE, label_share=0.2))
    for index in range(10):
        pair = pairs.read(index)
        assert pair.labels == [name for i, name in enumerate(CLASS_NAMES) if np.mean(pair.label_map == i) > 0.2]


def test_splits_are_disjoint_in_places_and_known_without_reading():
    pairs = SimulatedPairs(60, options=SimulationOptions(image_size=8, pairs_per_place=6))
    read = [pairs.read(index) for index in range(60)]
    assert [pair.split for pair in read] == [pairs.split_of(index) for index in range(60)]
    places = {s: {p.extra["place"] for p in read if p.split == s} for s in ("train", "validation", "test")}
    assert {split: len(found) for split, found in places.items()} == {"train": 6, "validation": 2, "test": 2}
    assert len(set.union(*places.values())) == 10


def test_pairs_of_a_place_share_landscape_season_and_incidence_angle():
    pairs = SimulatedPairs(24, options=SimulationOptions(image_size=8, pairs_per_place=4))
    shared = [tuple(pairs.read(i).extra[k] for k in ("landscape", "season", "incidence_angle")) for i in range(24)]
    assert all(len(set(shared[first : first + 4])) == 1 for first in range(0, 24, 4))
    assert len(set(shared)) == 6


def test_clouds_brighten_the_optical_patch_where_they_lie_and_darken_it_in_their_shadow():
    cloudy = replace(EACH_PAIR_ITS_PLACE, cloud_probability=1.0, cloud_share=0.3, season="summer")
    pairs, clear = SimulatedPairs(20, options=cloudy), SimulatedPairs(20, options=replace(cloudy, cloud_probability=0))
    shares, shadows = [], []
    for index in range(20):
        under, open_sky = pairs.read(index), clear.read(index)
        gain = under.optical[1] / open_sky.optical[1].astype(float)
        shares.append(under.extra["cloud_share"])
        assert open_sky.extra["cloud_share"] == 0
        assert np.mean(under.optical[1] > 1800) == pytest.approx(shares[-1], abs=0.2)
        shadows.append(np.mean(gain < 0.8))
        np.testing.assert_array_equal(under.sar, open_sky.sar)
    assert np.mean(shares) == pytest.approx(0.3, abs=0.12)
    assert np.mean(shadows) > 0.4 * np.mean(shares)


def test_clouds_come_with_the_stated_probability():
    pairs = SimulatedPairs(200, options=SimulationOptions(image_size=16, cloud_probability=0.3, cloud_share=0.9))
    assert np.mean([pairs.read(i).extra["cloud_share"] > 0 for i in range(200)]) == pytest.approx(0.3, abs=0.1)


def test_snow_hides_open_land_from_the_optical_sensor_alone():
    options = replace(EACH_PAIR_ITS_PLACE, season="winter")
    bare, snowy = SimulatedPairs(20, options=options), SimulatedPairs(20, options=replace(options, season="snow"))
    for index in range(20):
        np.testing.assert_array_equal(bare.read(index).sar, snowy.read(index).sar)
    blue = [np.mean([pairs.read(index).optical[1].mean() for index in range(20)]) for pairs in (bare, snowy)]
    assert blue[1] > 2 * blue[0]


def test_no_data_borders_cut_either_sensor_and_never_a_whole_patch():
    pairs = SimulatedPairs(60, options=SimulationOptions(image_size=48, nodata_probability=0.5))
    missing = {"sar": [], "optical": []}
    for index in range(60):
        pair = pairs.read(index)
        empty, nan = (pair.optical == 0), np.isnan(pair.sar)
        assert (empty.all(axis=0) == empty.any(axis=0)).all()
        assert (nan.all(axis=0) == nan.any(axis=0)).all()
        missing["optical"].append(empty[0].mean())
        missing["sar"].append(nan[0].mean())
    for shares in map(np.array, missing.values()):
        assert np.mean(shares > 0) == pytest.approx(0.5, abs=0.2)
        assert shares.max() <= 0.41
    assert any((s > 0) != (o > 0) for s, o in zip(missing["sar"], missing["optical"], strict=True))


@pytest.mark.parametrize("distance", [0.0, 0.5, 2.5, 7.0])
def test_misregistration_moves_the_sar_patch_by_the_stated_distance(distance):
    options = replace(EACH_PAIR_ITS_PLACE, looks=1000.0, misregistration_px=distance)
    moved, still = (
        SimulatedPairs(40, options=options),
        SimulatedPairs(40, options=replace(options, misregistration_px=0)),
    )
    errors = []
    for index in range(40):
        pair = moved.read(index)
        shift = np.array([pair.extra["sar_shift_south"], pair.extra["sar_shift_east"]])
        assert np.hypot(*shift) == pytest.approx(distance)
        if len(pair.labels) > 3:
            errors.append(np.hypot(*(phase_shift(still.read(index).sar[1], pair.sar[1]) - shift)))
    assert len(errors) > 15
    assert np.median(errors) < 0.3


def phase_shift(reference, moved):
    """Shift (south, east) in px of the peak of the cross-correlation, refined by parabolas."""
    taper = np.outer(np.hanning(len(reference)), np.hanning(len(reference)))
    spectra = [np.fft.fft2((image - image.mean()) * taper) for image in (reference, moved)]
    correlation = np.fft.ifft2(np.conj(spectra[0]) * spectra[1]).real
    row, column = np.unravel_index(correlation.argmax(), correlation.shape)
    size, shift = len(correlation), []
    for axis, peak in ((correlation[:, column], row), (correlation[row], column)):
        before, at, after = axis[peak - 1], axis[peak], axis[(peak + 1) % size]
        refined = peak + 0.5 * (before - after) / (before - 2 * at + after)
        shift.append(refined - size if refined > size / 2 else refined)
    return np.array(shift)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 4}, {"image_size": 60.5}, {"pairs_per_place": 0}, {"pairs_per_place": 1.5},
        {"looks": 0}, {"looks": float("nan")},
        {"season": "monsoon"}, {"label_share": 1.0}, {"cloud_probability": 1.2}, {"cloud_share": 0},
        {"nodata_probability": -0.1}, {"misregistration_px": 11},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SimulationOptions(**wrong)


@pytest.mark.parametrize(("arguments", "name"), [((0,), "num_pairs"), ((4, -1), "seed")])
def test_wrong_numbers_of_pairs_and_seeds_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        SimulatedPairs(*arguments)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_pair_that_does_not_exist_is_an_index_error(index):
    with pytest.raises(IndexError, match="asked for 4 pairs"):
        SimulatedPairs(4).read(index)


def test_the_picture_shows_every_class_in_its_colour_and_says_simulated():
    pytest.importorskip("matplotlib")
    pairs = SimulatedPairs(1, options=SimulationOptions(nodata_probability=1.0))
    figure = plot_pair(pairs.read(0), pairs.info)
    assert {"true colour", "VV", "VH", "label map"} <= {axis.get_title() for axis in figure.axes}
    assert "simulated" in figure.get_suptitle()
    assert set(CLASS_NAMES) <= CLASS_COLOURS.keys()
