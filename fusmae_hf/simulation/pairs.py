"""Made-up Sentinel-1/2 pairs with labels, for trials and tests without a download. Always labelled "simulated".

A place has a landscape, a season and a sun; each of its pairs is a piece of land (`landcover.draw_ground`) seen by
both sensors. Optical: spectra of the classes with texture, season, slopes in the sun, snow, clouds, and the resolution
of each band. SAR: backscatter of the classes with texture, slopes towards the radar and multi-look speckle. The table
`LAND_COVER` says which classes SAR alone, or the optical sensor alone, can tell apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, SAR_BANDS
from fusmae_hf.simulation.land_cover import CLASS_NAMES, LAND_COVER, LANDSCAPES, draw_ground
from fusmae_hf.simulation.sensors import SEASONS, Place, add_clouds, at_band_resolution, backscatter_of, reflectance_of

MARGIN = 12
"""Px of land drawn around each patch, so that a shifted sensor and coarse bands see land beyond the edge."""

SPLIT_OF_PLACE = ("train", "train", "train", "validation", "test")
"""Split of place p is entry p modulo 5: from five places on, every split has pairs."""


@dataclass(frozen=True)
class SimulationOptions:
    """What the simulated scenes are like.

    Attributes:
        image_size: side of the square patches in px of 10 m.
        pairs_per_place: consecutive pairs that share landscape, season, sun and split.
        looks: equivalent number of looks of the SAR speckle (4.4 is that of Sentinel-1 IW GRD in high resolution).
        season: name of one of `SEASONS` for all places, or None for the mixture of a year.
        label_share: a class is a label of the scene if it covers more than this share of its label map.
        cloud_probability: share of the pairs that have clouds (and their shadows) in the optical patch.
        cloud_share: mean share of such a patch under cloud.
        nodata_probability: share of the pairs, for each sensor by itself, that a swath edge cuts: 5 to 40 % of the
            patch is 0 in all optical bands, or NaN in both SAR bands.
        misregistration_px: distance in px, fractions allowed, at most 10, by which the SAR patch of every pair is
            moved in a random direction. The label map stays with the optical patch.
    """

    image_size: int = 120
    pairs_per_place: int = 4
    looks: float = 4.4
    season: str | None = None
    label_share: float = 0.05
    cloud_probability: float = 0.02
    cloud_share: float = 0.35
    nodata_probability: float = 0.0
    misregistration_px: float = 0.0

    def __post_init__(self) -> None:
        seasons = [season.name for season in SEASONS]
        rules = (
            ("image_size", self.image_size >= 8 and self.image_size % 1 == 0, "a whole number >= 8"),
            ("pairs_per_place", self.pairs_per_place >= 1 and self.pairs_per_place % 1 == 0, "a whole number >= 1"),
            ("looks", 0 < self.looks < float("inf"), "a number > 0, such as 4.4"),
            ("season", self.season is None or self.season in seasons, f"None or one of {seasons}"),
            ("label_share", 0 <= self.label_share < 1, "a share in [0, 1)"),
            ("cloud_probability", 0 <= self.cloud_probability <= 1, "a share in [0, 1]"),
            ("cloud_share", 0 < self.cloud_share < 1, "a share in (0, 1)"),
            ("nodata_probability", 0 <= self.nodata_probability <= 1, "a share in [0, 1]"),
            ("misregistration_px", 0 <= self.misregistration_px <= 10, "a distance of 0 to 10 px"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"SimulationOptions: {name} must be {expected}, but is {getattr(self, name)!r}.")


class SimulatedPairs:
    """Simulated pairs of Sentinel-1 backscatter and Sentinel-2 surface reflectance, with labels.

    Pair i is a function of the seed, i and the options alone. A pair holds: `sar` `(2, size, size)` float32 dB (VV,
    VH); `optical` `(12, size, size)` uint16 digital numbers without offset, 0 only where there is no data; `label_map`
    `(size, size)` uint8, index into `LAND_COVER`; `labels`, the names of the classes that cover more than
    `label_share`; and in `extra`: place, landscape, season, looks, incidence_angle (degrees), cloud_share,
    and sar_shift_south and sar_shift_east (px by which the SAR patch is moved).

    Speckle is gamma distributed in linear power, independent from px to px and between the polarisations (in real
    products neighbouring px are correlated). In each 20 places landscapes and seasons come in fixed proportions, so
    that band means and deviations are near those of BigEarthNet.

    Args:
        num_pairs: number of pairs.
        seed: a different seed gives different pairs.
        options: what the scenes are like.

    Raises:
        ValueError: `num_pairs` is below 1 or `seed` is negative.
    """

    def __init__(self, num_pairs: int, seed: int = 0, options: SimulationOptions | None = None) -> None:
        if num_pairs < 1:
            raise ValueError(f"num_pairs must be a whole number >= 1, but is {num_pairs!r}.")
        if seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, but is {seed!r}.")
        self.seed = seed
        self.options = options or SimulationOptions()
        self.ids = [f"simulated-s{seed}-{index:06d}" for index in range(num_pairs)]
        self.summary = f"Simulating {num_pairs:,} pairs with seed {seed}."
        self.info = PairsInfo(
            name="simulated",
            source="simulated by fusmae_hf.simulation.pairs: made-up scenes, no satellite data",
            license="CC0-1.0",
            sar_bands=SAR_BANDS,
            optical_bands=OPTICAL_BANDS,
            statistics="bigearthnet",
            class_names=CLASS_NAMES,
            map_class_names=CLASS_NAMES,
            extra_columns={
                "place": "int64",
                "landscape": "string",
                "season": "string",
                "looks": "double",
                "incidence_angle": "double",
                "cloud_share": "double",
                "sar_shift_south": "double",
                "sar_shift_east": "double",
            },
            pixel_size=10.0,
            simulated=True,
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.ids)

    def split_of(self, index: int) -> str:
        """Split of the pair at `index`: all pairs of a place are in the same one."""
        return SPLIT_OF_PLACE[self._place_of(index) % len(SPLIT_OF_PLACE)]

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Nothing is ever left out."""
        return iter(())

    def read(self, index: int) -> Pair:
        """Make the pair at `index`.

        Raises:
            IndexError: there is no such pair.
        """
        number, options = self._place_of(index), self.options
        place = self._place(number)
        canvas = 6 * -(-(options.image_size + 2 * MARGIN) // 6)
        crop = slice(MARGIN, MARGIN + options.image_size)
        ground = draw_ground(self._rng("ground", index), canvas, place.landscape, place.angle)

        reflectance = reflectance_of(self._rng("optical", index), ground, place)
        cloud = np.zeros_like(reflectance[0])
        rng = self._rng("clouds", index)
        if rng.random() < options.cloud_probability:
            cloud = add_clouds(rng, reflectance, options.cloud_share, place)
        optical = at_band_resolution(self._rng("sensor noise", index), reflectance)[:, crop, crop]
        optical = np.ascontiguousarray(np.clip(np.rint(optical), 1, 20_000), dtype=np.uint16)

        rng = self._rng("misregistration", index)
        direction = rng.uniform(0, 2 * np.pi)
        south, east = options.misregistration_px * np.sin(direction), options.misregistration_px * np.cos(direction)
        power = backscatter_of(self._rng("sar", index), ground, place)
        power = _crop_moved(_crop_moved(power, south, options.image_size), east, options.image_size)
        speckle = self._rng("speckle", index).standard_gamma(options.looks, power.shape, dtype=np.float32)
        power = np.maximum(power * speckle / np.float32(options.looks), np.float32(1e-6))
        sar = np.ascontiguousarray(10 * np.log10(power))

        rng = self._rng("no data", index)
        for patch, nothing in ((optical, 0), (sar, np.nan)):
            edge = _swath_edge(rng, options.image_size)
            if rng.random() < options.nodata_probability:
                patch[:, edge] = nothing

        label_map = np.ascontiguousarray(ground.label_map[crop, crop])
        shares = np.bincount(label_map.ravel(), minlength=len(LAND_COVER)) / label_map.size
        return Pair(
            id=self.ids[index],
            sar=sar,
            optical=optical,
            labels=[name for name, share in zip(CLASS_NAMES, shares, strict=True) if share > options.label_share],
            label_map=label_map,
            split=self.split_of(index),
            extra={
                "place": number,
                "landscape": place.landscape.name,
                "season": place.season.name,
                "looks": float(options.looks),
                "incidence_angle": place.incidence_angle,
                "cloud_share": float((cloud[crop, crop] > 0.5).mean()),
                "sar_shift_south": float(south),
                "sar_shift_east": float(east),
            },
        )

    def _rng(self, purpose: str, number: int) -> np.random.Generator:
        """One stream of random numbers a purpose, so that an option changes nothing but what it is about."""
        return np.random.default_rng([self.seed, number, *purpose.encode()])

    def _place_of(self, index: int) -> int:
        if not 0 <= index < len(self.ids):
            raise IndexError(f"There is no pair {index}: the simulator was asked for {len(self.ids)} pairs, 0 first.")
        return index // self.options.pairs_per_place

    def _place(self, number: int) -> Place:
        deck, rng = self._rng("deck", number // 20), self._rng("place", number)
        landscapes = [index for index, landscape in enumerate(LANDSCAPES) for _ in range(landscape.places)]
        seasons = [index for index, season in enumerate(SEASONS) for _ in range(season.places)]
        landscape, season = deck.permutation(landscapes)[number % 20], deck.permutation(seasons)[number % 20]
        if self.options.season is not None:
            season = [season.name for season in SEASONS].index(self.options.season)
        return Place(
            landscape=LANDSCAPES[landscape],
            season=SEASONS[season],
            angle=rng.uniform(0, np.pi),
            sun_azimuth=rng.uniform(np.pi * 0.75, np.pi),
            incidence_angle=rng.uniform(30, 46),
            look_azimuth=rng.choice([np.deg2rad(80), np.deg2rad(280)]),
            wind=rng.normal(0, 2.5),
            haze=rng.lognormal(0, 0.6),
            brightness=rng.lognormal(0, 0.12),
        )


def _crop_moved(canvas: np.ndarray, move: float, size: int) -> np.ndarray:
    """Cut `size` rows from `(bands, rows, columns)` whose content moves down by `move` px; swaps the last two axes."""
    start = MARGIN - move
    first = int(np.floor(start))
    share = np.float32(start - first)
    rows = (1 - share) * canvas[:, first : first + size] + share * canvas[:, first + 1 : first + 1 + size]
    return rows.swapaxes(1, 2)


def _swath_edge(rng: np.random.Generator, size: int) -> np.ndarray:
    """Mask `(size, size)` of what lies beyond a straight swath edge: 5 to 40 % of the patch."""
    angle, share = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.4)
    position = np.arange(size)
    across = position[:, None] * np.sin(angle) + position[None, :] * np.cos(angle)
    return across > np.quantile(across, 1 - share)
