"""What Sentinel-1 and Sentinel-2 would see of made-up land: backscatter and reflectance from the class table."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION
from fusmae_hf.simulation.land_cover import (
    DORMANT_SPECTRUM,
    LAND_COVER,
    NUM_PARCELS,
    WATER_CLASSES,
    Ground,
    Landscape,
    fractal_noise,
)


@dataclass(frozen=True)
class Season:
    """What the time of year does to the optical sensor.

    Attributes:
        name: name of the season.
        dormancy: how dormant the vegetation is; 0 in the growing season, 1 in the depth of winter.
        sun_elevation: height of the sun in degrees.
        snow: share of open ground under snow.
        places: how many of 20 places are seen in it.
    """

    name: str
    dormancy: float
    sun_elevation: float
    snow: float
    places: int


SEASONS = (
    Season("spring", 0.3, 48.0, 0.0, 5),
    Season("summer", 0.0, 58.0, 0.0, 7),
    Season("autumn", 0.5, 32.0, 0.0, 5),
    Season("winter", 1.0, 20.0, 0.0, 2),
    Season("snow", 1.0, 24.0, 0.45, 1),
)
"""The seasons; "snow" is a winter place with snow on the ground."""

SNOW_SPECTRUM = (5000, 4900, 4700, 4650, 4700, 4700, 4650, 4600, 4500, 4300, 480, 400)
CLOUD_SPECTRUM = (5000, 5100, 4950, 5000, 5150, 5350, 5450, 5550, 5600, 5300, 4300, 3100)
HAZE_SPECTRUM = (40, 40, 26, 17, 14, 11, 9, 8, 6, 5, 2, 1)
"""Digital numbers of full snow, opaque cloud, and of the haze left by atmospheric correction at a typical place."""


@dataclass(frozen=True)
class Place:
    """What the pairs of one place share.

    Attributes:
        landscape: the kind of land.
        season: the time of year.
        angle: main direction of fields and streets, in radians.
        sun_azimuth: where the sun stands, in radians clockwise from north.
        incidence_angle: of the radar, in degrees.
        look_azimuth: where the radar is, in radians clockwise from north.
        wind: deviation of the backscatter of water from its mean, in dB.
        haze: strength of the haze; 1 is typical.
        brightness: factor on all reflectance.
    """

    landscape: Landscape
    season: Season
    angle: float
    sun_azimuth: float
    incidence_angle: float
    look_azimuth: float
    wind: float
    haze: float
    brightness: float


@lru_cache(maxsize=1)
def _class_columns() -> dict[str, np.ndarray]:
    """The class table by column, `(..., classes)` float32."""
    names = ("spectrum", "backscatter", "optical_texture", "sar_texture", "dormancy", "snow_cover")
    return {name: np.array([getattr(c, name) for c in LAND_COVER], dtype=np.float32).T for name in names}


def _towards(slope: np.ndarray, azimuth: float) -> np.ndarray:
    """How far the ground leans towards an azimuth (radians clockwise from north), relative."""
    return slope[0] * np.float32(np.cos(azimuth)) - slope[1] * np.float32(np.sin(azimuth))


def _within_class(rng: np.random.Generator, parcel: np.ndarray, roughness: float) -> np.ndarray:
    """Deviations of variance 1 within a class, half of it between parcels and half inside them."""
    between = rng.standard_normal(NUM_PARCELS, dtype=np.float32)[parcel]
    return (between + fractal_noise(rng, len(parcel), roughness)) * np.float32(np.sqrt(0.5))


def reflectance_of(rng: np.random.Generator, ground: Ground, place: Place) -> np.ndarray:
    """What the optical sensor would see at 10 m in every band: `(12, canvas, canvas)` float32 digital numbers."""
    columns, label_map, season = _class_columns(), ground.label_map, place.season
    size = len(label_map)
    vigour = 0.18 * rng.standard_normal(NUM_PARCELS, dtype=np.float32)[ground.parcel]
    dormant = np.clip(columns["dormancy"][label_map] * (season.dormancy + vigour), 0, 1)
    reflectance = columns["spectrum"][:, label_map]
    reflectance += dormant * (np.array(DORMANT_SPECTRUM, dtype=np.float32)[:, None, None] - reflectance)

    texture = columns["optical_texture"][label_map] * _within_class(rng, ground.parcel, 0.8)
    shadow = 1.5 / np.tan(np.deg2rad(season.sun_elevation)) * _towards(ground.slope, place.sun_azimuth)
    reflectance *= np.clip(1 + texture, 0.3, 2.5) * np.clip(1 + shadow, 0.35, 1.6) * np.float32(place.brightness)
    if season.snow > 0:
        noise = fractal_noise(rng, size, 1.3, 40.0)
        drifts = np.clip(0.5 + 1.2 * (noise - np.quantile(noise, 1 - season.snow)), 0, 1).astype(np.float32)
        snow = columns["snow_cover"][label_map] * drifts
        lit = np.clip(1 + shadow, 0.5, 1.2) * np.array(SNOW_SPECTRUM, dtype=np.float32)[:, None, None]
        reflectance += snow * (lit - reflectance)
    return reflectance + np.float32(place.haze) * np.array(HAZE_SPECTRUM, dtype=np.float32)[:, None, None]


def add_clouds(rng: np.random.Generator, reflectance: np.ndarray, mean_share: float, place: Place) -> np.ndarray:
    """Put clouds and their shadows over the land, in place; returns the opacity of the clouds, `(canvas, canvas)`."""
    size = reflectance.shape[-1]
    share = np.clip(rng.beta(4 * mean_share, 4 * (1 - mean_share)), 0.03, 0.97)
    noise = fractal_noise(rng, size, 1.7, 80.0)
    opacity = np.clip(0.5 + 1.6 * (noise - np.quantile(noise, 1 - share)), 0, 1).astype(np.float32)
    length = rng.uniform(25, 70) / np.tan(np.deg2rad(place.season.sun_elevation))
    steps = np.rint([length * np.cos(place.sun_azimuth), -length * np.sin(place.sun_azimuth)]).astype(int)
    reflectance *= 1 - 0.6 * np.roll(opacity, (int(steps[0]), int(steps[1])), axis=(0, 1))
    thickness = np.clip(1 + 0.15 * fractal_noise(rng, size, 1.2, 40.0), 0.6, 1.4)
    cloud = thickness * np.array(CLOUD_SPECTRUM, dtype=np.float32)[:, None, None]
    reflectance += opacity * (cloud - reflectance)
    return opacity


def at_band_resolution(rng: np.random.Generator, reflectance: np.ndarray) -> np.ndarray:
    """Give each band the detail of its native pixels (10, 20 or 60 m), back on the 10 m grid, with sensor noise."""
    seen = np.empty_like(reflectance)
    for metres in (10, 20, 60):
        bands = [index for index, name in enumerate(OPTICAL_BANDS) if OPTICAL_RESOLUTION[name] == metres]
        native = torch.from_numpy(reflectance[bands])[None]
        if metres == 10:
            native = 0.55 * native + 0.45 * F.avg_pool2d(native, 3, stride=1, padding=1, count_include_pad=False)
        else:
            native = F.avg_pool2d(native, metres // 10)
        native = native + 8 * torch.from_numpy(rng.standard_normal(native.shape, dtype=np.float32))
        if metres > 10:
            native = F.interpolate(native, scale_factor=metres // 10, mode="bilinear")
        seen[bands] = native[0].numpy()
    return seen


def backscatter_of(rng: np.random.Generator, ground: Ground, place: Place) -> np.ndarray:
    """Speckle-free backscatter `(2, canvas, canvas)`, float32 linear power."""
    columns, label_map = _class_columns(), ground.label_map
    decibel = columns["backscatter"][:, label_map]
    decibel += columns["sar_texture"][label_map] * _within_class(rng, ground.parcel, 0.5)
    decibel += np.float32(place.wind) * np.isin(label_map, WATER_CLASSES)
    decibel += 10 * np.clip(_towards(ground.slope, place.look_azimuth), -0.5, 0.5)
    decibel -= np.float32(0.13 * (place.incidence_angle - 38))
    power = torch.from_numpy(np.power(np.float32(10), decibel / 10))[None]
    blurred = F.avg_pool2d(power, 3, stride=1, padding=1, count_include_pad=False)
    return (0.5 * power + 0.5 * blurred)[0].numpy()
