"""Made-up land cover: the class table of the simulator, and maps of fields, woods, rivers, roads, towns and shores."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class LandCoverClass:
    """How one land-cover class looks to both sensors.

    Attributes:
        name: name of the class.
        spectrum: digital numbers of `OPTICAL_BANDS` in the growing season (12 values).
        backscatter: mean backscatter of VV and VH in dB at an incidence angle of 38 degrees.
        optical_texture: standard deviation of the brightness within the class, relative to the mean.
        sar_texture: standard deviation of the speckle-free backscatter within the class, in dB.
        dormancy: share of the signal that turns into `DORMANT_SPECTRUM` in the depth of winter.
        snow_cover: share of the ground that snow hides from the optical sensor (C-band radar sees through dry snow).
        sar_only_from: classes of the same spectrum, texture and season, told apart by SAR alone.
        optical_only_from: classes of the same backscatter and texture, told apart by the optical sensor alone.
    """

    name: str
    spectrum: tuple[float, ...]
    backscatter: tuple[float, float]
    optical_texture: float
    sar_texture: float
    dormancy: float
    snow_cover: float
    sar_only_from: tuple[str, ...] = ()
    optical_only_from: tuple[str, ...] = ()


_SOIL = (290, 430, 660, 880, 1180, 1500, 1780, 1950, 2090, 2130, 2550, 2000)
_BROAD_LEAVED = (92, 175, 380, 210, 720, 2500, 3050, 3250, 3350, 3350, 1650, 760)
_CROP_BACKSCATTER = (-11.6, -18.2)
_GRASS_BACKSCATTER = (-12.8, -20.2)
_CANOPY_BACKSCATTER = (-9.4, -14.8)
_WATER_BACKSCATTER = (-21.5, -29.0)

LAND_COVER = (
    LandCoverClass(
        "urban fabric", (640, 780, 930, 1020, 1280, 1640, 1850, 2000, 2060, 2100, 2000, 1700), (-4.8, -12.6),
        0.28, 3.5, 0.0, 0.5,
    ),
    LandCoverClass(
        "road", (520, 620, 750, 810, 960, 1220, 1370, 1440, 1480, 1480, 1560, 1380), (-13.5, -21.5),
        0.06, 0.8, 0.0, 0.7,
    ),
    LandCoverClass(
        "ploughed soil", _SOIL, (-9.0, -17.0), 0.14, 0.8, 0.0, 1.0, sar_only_from=("smooth seedbed",),
    ),
    LandCoverClass(
        "smooth seedbed", _SOIL, (-16.0, -25.0), 0.14, 0.8, 0.0, 1.0, sar_only_from=("ploughed soil",),
    ),
    LandCoverClass(
        "cereals", (170, 250, 580, 330, 1080, 3200, 3950, 4150, 4330, 4300, 1950, 980), _CROP_BACKSCATTER,
        0.10, 0.9, 0.6, 1.0, optical_only_from=("flowering rapeseed",),
    ),
    LandCoverClass(
        "flowering rapeseed", (220, 300, 1080, 960, 1600, 2900, 3400, 3600, 3750, 3750, 2050, 1080),
        _CROP_BACKSCATTER, 0.10, 0.9, 0.6, 1.0, optical_only_from=("cereals",),
    ),
    LandCoverClass(
        "pasture", (175, 260, 600, 370, 1080, 2900, 3450, 3620, 3780, 3760, 2200, 1150), _GRASS_BACKSCATTER,
        0.10, 0.8, 0.4, 1.0, optical_only_from=("dry grassland",),
    ),
    LandCoverClass(
        "dry grassland", (260, 370, 640, 800, 1220, 1950, 2180, 2330, 2480, 2520, 2950, 1980), _GRASS_BACKSCATTER,
        0.10, 0.8, 0.2, 1.0, optical_only_from=("pasture",),
    ),
    LandCoverClass(
        "coniferous forest", (72, 145, 285, 170, 500, 1640, 2010, 2150, 2220, 2230, 1030, 490), _CANOPY_BACKSCATTER,
        0.12, 0.6, 0.05, 0.15, optical_only_from=("broad-leaved forest",),
    ),
    LandCoverClass(
        "broad-leaved forest", _BROAD_LEAVED, _CANOPY_BACKSCATTER, 0.12, 0.6, 0.7, 0.25,
        sar_only_from=("flooded forest",), optical_only_from=("coniferous forest",),
    ),
    LandCoverClass(
        "flooded forest", _BROAD_LEAVED, (-5.0, -12.6), 0.12, 0.6, 0.7, 0.25,
        sar_only_from=("broad-leaved forest",),
    ),
    LandCoverClass(
        "moor and shrub", (130, 190, 360, 410, 700, 1320, 1540, 1680, 1780, 1780, 1750, 1080), (-11.5, -17.2),
        0.14, 0.9, 0.3, 0.8,
    ),
    LandCoverClass(
        "marsh", (210, 280, 480, 500, 820, 1480, 1690, 1790, 1880, 1890, 1280, 720), (-14.6, -20.0),
        0.14, 1.2, 0.4, 0.8,
    ),
    LandCoverClass(
        "sand", (1150, 1480, 1980, 2380, 2620, 2780, 2890, 3020, 3120, 3150, 3700, 3300), (-18.0, -26.5),
        0.08, 0.8, 0.0, 0.8,
    ),
    LandCoverClass(
        "clear water", (170, 160, 150, 85, 75, 80, 75, 65, 60, 65, 30, 22), _WATER_BACKSCATTER,
        0.04, 0.0, 0.0, 0.0, optical_only_from=("turbid water",),
    ),
    LandCoverClass(
        "turbid water", (340, 460, 740, 560, 470, 350, 330, 280, 250, 230, 85, 55), _WATER_BACKSCATTER,
        0.04, 0.0, 0.0, 0.0, optical_only_from=("clear water",),
    ),
)  # fmt: skip
"""The classes by index of the label map, set by hand after the look of Europe; none is measured.

Dormancy and snow narrow the difference in the optical sensor between `optical_only_from` classes, as they do outdoors.
"""

CLASS_NAMES = tuple(cover.name for cover in LAND_COVER)

DORMANT_SPECTRUM = (180, 290, 480, 620, 920, 1320, 1590, 1740, 1850, 1890, 2200, 1550)
"""Litter, stubble and leafless branches, in digital numbers: what `LandCoverClass.dormancy` blends in."""

WATER_CLASSES = tuple(index for index, name in enumerate(CLASS_NAMES) if name.endswith("water"))

(
    _URBAN, _ROAD, _PLOUGHED, _SEEDBED, _CEREALS, _RAPESEED, _PASTURE, _DRY_GRASS,
    _CONIFEROUS, _BROAD, _FLOODED, _MOOR, _MARSH, _SAND, _CLEAR_WATER, _TURBID_WATER,
) = range(len(LAND_COVER))  # fmt: skip


@dataclass(frozen=True)
class Landscape:
    """What a kind of place is made of. All shares are means over its patches, between 0 and 1.

    Attributes:
        name: name of the landscape.
        fields: weight of ploughed soil, smooth seedbed, cereals, flowering rapeseed, pasture and dry grassland.
        field_width: typical width of a field in px of 10 m.
        forest: share under forest.
        coniferous: share of the forest that is coniferous.
        moor: share under moor and shrub.
        water: share under a lake or the sea.
        wet: share of the ground, from the shore on, where forest stands in water and open land is marsh.
        hedges: share of the field borders with a hedge.
        towns: probability that a patch holds part of a town.
        rivers: probability that a river crosses a patch.
        relief: strength of the slopes; 0 is flat.
        places: how many of 20 places have this landscape.
    """

    name: str
    fields: tuple[float, float, float, float, float, float]
    field_width: float
    forest: float
    coniferous: float
    moor: float
    water: float
    wet: float
    hedges: float
    towns: float
    rivers: float
    relief: float
    places: int


LANDSCAPES = (
    Landscape("arable plain", (3, 3, 4, 1.5, 1, 0.5), 9, 0.08, 0.4, 0.0, 0.0, 0.02, 0.05, 0.30, 0.2, 0.25, 5),
    Landscape("pasture with hedges", (1, 1, 2, 0.6, 6, 1.5), 11, 0.15, 0.3, 0.03, 0.02, 0.04, 0.6, 0.35, 0.3, 0.5, 3),
    Landscape("forest", (1, 1, 1.5, 0.5, 3, 1), 10, 0.72, 0.65, 0.06, 0.04, 0.08, 0.1, 0.12, 0.25, 0.9, 5),
    Landscape("dry upland", (2, 2, 1, 0.3, 1, 6), 13, 0.18, 0.6, 0.35, 0.0, 0.0, 0.05, 0.12, 0.15, 1.0, 2),
    Landscape("shore", (1, 1, 2, 0.5, 3, 2), 10, 0.2, 0.5, 0.05, 0.62, 0.02, 0.1, 0.30, 0.1, 0.3, 3),
    Landscape("wetland", (1, 1, 1, 0.3, 4, 1), 10, 0.45, 0.3, 0.05, 0.15, 0.40, 0.15, 0.08, 0.6, 0.2, 1),
    Landscape("town", (2, 2, 3, 1, 3, 1), 8, 0.12, 0.4, 0.0, 0.02, 0.02, 0.2, 1.0, 0.35, 0.4, 1),
)


@dataclass(frozen=True)
class Ground:
    """The land under one patch.

    Attributes:
        label_map: `(height, width)` uint8, index into `LAND_COVER`.
        parcel: `(height, width)` int, number of the field or stand, below `NUM_PARCELS`.
        slope: `(2, height, width)` float32, rise per px to the south and to the east, relative; 0 on water.
    """

    label_map: np.ndarray
    parcel: np.ndarray
    slope: np.ndarray


NUM_PARCELS = 4096


@lru_cache(maxsize=32)
def _noise_filter(size: int, roughness: float, scale: float) -> np.ndarray:
    row, column = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    amplitude = (row**2 + column**2 + scale**-2) ** (-roughness / 2)
    amplitude[0, 0] = 0.0
    return amplitude.astype(np.float32)


def fractal_noise(rng: np.random.Generator, size: int, roughness: float, scale: float = 120.0) -> np.ndarray:
    """Noise of mean 0 and variance 1, `(size, size)` float32, whose amplitude falls as frequency to the `-roughness`.

    Args:
        rng: source of the noise.
        size: side in px.
        roughness: 0 is white noise; 2 gives smooth hills.
        scale: wavelength in px above which the amplitude no longer rises.
    """
    white = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    noise = np.fft.irfft2(white * _noise_filter(size, roughness, scale), s=(size, size)).astype(np.float32)
    return noise / noise.std()


def _rotated(size: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in px along and across a direction, the origin in the middle."""
    position = np.arange(size, dtype=np.float32) - size / 2
    along = position[None, :] * np.float32(np.cos(angle)) + position[:, None] * np.float32(np.sin(angle))
    across = -position[None, :] * np.float32(np.sin(angle)) + position[:, None] * np.float32(np.cos(angle))
    return along, across


def _distance_to_curve(rng: np.random.Generator, size: int, angle: float, bends: float) -> np.ndarray:
    """Distance in px to a winding line across the patch; `bends` is the size of the swings in px."""
    along, across = _rotated(size, angle)
    offset = np.full_like(along, rng.uniform(-0.35, 0.35) * size)
    slope = np.zeros_like(along)
    for wavelength, share in ((170.0, 1.0), (75.0, 0.45), (33.0, 0.18)):
        turn = 2 * np.pi / (wavelength * rng.uniform(0.8, 1.25))
        phase = rng.uniform(0, 2 * np.pi)
        offset += bends * share * np.sin(turn * along + phase)
        slope += bends * share * turn * np.cos(turn * along + phase)
    return np.abs(across - offset) / np.sqrt(1 + slope**2)


def _blocks(rng: np.random.Generator, size: int, angle: float, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells of a jittered lattice: number of the cell (below 1024), and distance in px to its border."""
    along, across = (axis / np.float32(spacing) for axis in _rotated(size, angle))
    jitter = rng.uniform(0.1, 0.9, (2, 32, 32)).astype(np.float32)
    column, row = np.floor(along), np.floor(across)
    column_number, row_number = column.astype(np.int32), row.astype(np.int32)
    nearest = np.full((size, size), np.inf, dtype=np.float32)
    second = nearest.copy()
    block = np.zeros((size, size), dtype=np.int32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cell_row, cell_column = (row_number + down) & 31, (column_number + right) & 31
            down_to_site = (row - across) + (down + jitter[0, cell_row, cell_column])
            right_to_site = (column - along) + (right + jitter[1, cell_row, cell_column])
            distance = down_to_site * down_to_site + right_to_site * right_to_site
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            block = np.where(closer, cell_row * 32 + cell_column, block)
            nearest = np.where(closer, distance, nearest)
    return block, (np.sqrt(second) - np.sqrt(nearest)) * np.float32(spacing / 2)


def _parcels(rng: np.random.Generator, block: np.ndarray, angle: float, field_width: float) -> np.ndarray:
    """Strips of fields within each block, each block with its own direction and field size."""
    size = len(block)
    angles = angle + rng.normal(0, 0.25, 1024) + rng.integers(0, 2, 1024) * np.pi / 2
    widths = field_width * rng.lognormal(0, 0.4, 1024)
    lengths = widths * rng.uniform(1.2, 4.0, 1024)
    position = np.arange(size) - size / 2
    cosine, sine = np.cos(angles)[block], np.sin(angles)[block]
    strip = np.floor((-position[None, :] * sine + position[:, None] * cosine) / widths[block]).astype(np.int64)
    starts = rng.uniform(0, 1, 64)[strip % 64]
    along = (position[None, :] * cosine + position[:, None] * sine) / lengths[block] + starts
    return (block * 7919 + strip * 613 + np.floor(along).astype(np.int64) * 97) % NUM_PARCELS


def _borders(parcel: np.ndarray) -> np.ndarray:
    border = np.zeros(parcel.shape, dtype=bool)
    border[:, 1:] |= parcel[:, 1:] != parcel[:, :-1]
    border[1:] |= parcel[1:] != parcel[:-1]
    return border


def _highest(score: np.ndarray, share: float) -> np.ndarray:
    """The pixels of highest score that together make up `share` of the patch."""
    return score >= np.quantile(score, 1 - share) if share > 0 else np.zeros(score.shape, dtype=bool)


def _share(rng: np.random.Generator, mean: float) -> float:
    """A share that varies from patch to patch around its mean."""
    return float(rng.beta(3 * mean, 3 * (1 - mean))) if mean > 0 else 0.0


def _paint_town(rng: np.random.Generator, label_map: np.ndarray, angle: float) -> None:
    size = len(label_map)
    row, column = rng.uniform(0, size, 2)
    position = np.arange(size)
    distance = np.hypot(position[:, None] - row, position[None, :] - column)
    town = distance / rng.uniform(18, 50) + 0.3 * fractal_noise(rng, size, 1.2, 30.0) < 1
    along, across = _rotated(size, angle)
    lots = rng.choice([_URBAN, _PASTURE, _BROAD], 1024, p=[0.72, 0.16, 0.12])
    lot = (np.floor(along / 3).astype(np.int64) * 31 + np.floor(across / 3).astype(np.int64) * 17) % 1024
    label_map[town] = lots[lot][town]
    halls = rng.random(1024) < 0.06
    hall = (np.floor(along / 9).astype(np.int64) * 31 + np.floor(across / 7).astype(np.int64) * 17) % 1024
    label_map[town & halls[hall]] = _URBAN
    label_map[town & ((along % rng.uniform(8, 13) < 1) | (across % rng.uniform(8, 16) < 1))] = _ROAD


def _paint_farms(rng: np.random.Generator, label_map: np.ndarray) -> None:
    size = len(label_map)
    for _ in range(rng.poisson(4 * (size / 120) ** 2)):
        row, column, height, width = *rng.integers(0, size - 4, 2), *rng.integers(2, 5, 2)
        label_map[row : row + height, column : column + width] = _URBAN


def draw_ground(rng: np.random.Generator, size: int, landscape: Landscape, angle: float) -> Ground:
    """Draw the land of one patch.

    Args:
        rng: source of everything that varies.
        size: side of the square patch in px of 10 m.
        landscape: the kind of place.
        angle: main direction of its fields and streets, in radians.
    """
    block, to_border = _blocks(rng, size, angle, 4.5 * landscape.field_width)
    parcel = _parcels(rng, block, angle, landscape.field_width)
    weights = np.array(landscape.fields) / sum(landscape.fields)
    crops = rng.choice(np.arange(_PLOUGHED, _DRY_GRASS + 1, dtype=np.uint8), NUM_PARCELS, p=weights)
    label_map = crops[parcel]

    terrain = fractal_noise(rng, size, 2.6, 60.0)
    woodland = fractal_noise(rng, size, 1.9, 60.0) + 0.5 * rng.standard_normal(NUM_PARCELS)[parcel]
    stands = fractal_noise(rng, size, 1.7, 50.0) + 0.4 * rng.standard_normal(NUM_PARCELS)[parcel]
    hedge = _borders(parcel) & (rng.random(NUM_PARCELS) < landscape.hedges)[parcel]
    label_map[hedge] = _BROAD
    label_map[_highest(terrain, _share(rng, landscape.moor))] = _MOOR
    forest = _highest(woodland, _share(rng, landscape.forest))
    label_map[forest] = _BROAD
    label_map[forest & _highest(stands, landscape.coniferous)] = _CONIFEROUS

    shore = fractal_noise(rng, size, 2.1, 150.0)
    water_share = _share(rng, landscape.water)
    low_share = min(1.0, water_share + _share(rng, landscape.wet))
    wet = _highest(shore, low_share) if low_share > water_share else np.zeros_like(forest)
    label_map[wet] = np.where(forest[wet], _FLOODED, _MARSH)

    if rng.random() < landscape.towns:
        _paint_town(rng, label_map, angle)
    _paint_farms(rng, label_map)
    turbid = rng.random() < 0.4
    if rng.random() < landscape.rivers:
        distance, width = _distance_to_curve(rng, size, rng.uniform(0, np.pi), 14.0), rng.uniform(1.2, 6.0)
        banks = distance < width + 2.5 + 2.5 * fractal_noise(rng, size, 1.0, 20.0)
        label_map[banks] = _BROAD
        label_map[distance < width] = _TURBID_WATER if turbid else _CLEAR_WATER
    label_map[(to_border < 0.7) & (rng.random(1024) < 0.5)[block] & ~forest & (label_map < _CONIFEROUS)] = _ROAD
    for _ in range(rng.integers(0, 3)):
        label_map[_distance_to_curve(rng, size, rng.uniform(0, np.pi), 5.0) < rng.uniform(0.5, 1.1)] = _ROAD
    if water_share > 0:
        beach = _highest(shore, min(1.0, water_share + min(0.03, 0.2 * water_share) * rng.random())) & ~wet
        label_map[beach] = _SAND
        plume = fractal_noise(rng, size, 2.2, 150.0) + 0.8 * turbid > 0.6
        water = _highest(shore, water_share)
        label_map[water] = np.where(plume[water], _TURBID_WATER, _CLEAR_WATER)

    slope = np.stack(np.gradient(terrain)) * np.float32(landscape.relief)
    slope[:, np.isin(label_map, WATER_CLASSES)] = 0.0
    return Ground(label_map=label_map, parcel=parcel, slope=slope)
