"""The pair: one SAR and one optical patch of the same place, as readers give it and shards store it."""

import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusmae_hf.files.plain_text import is_plain_text
from fusmae_hf.modeling.sensors_fusmae import offset_problem
from fusmae_hf.vocabulary import OF_SCENES, OPTICAL_UNITS, SAR_UNITS


@dataclass
class Pair:
    """One SAR and one optical patch of the same place, in raw units. One of them may be absent.

    Attributes:
        id: name of the pair, unique in its dataset.
        sar: `(bands, height, width)`, the dtype of the source (float32 dB for Sentinel-1 products); or None.
        optical: `(bands, height, width)`, the dtype of the source (uint16 digital numbers for Sentinel-2 products); or
            None.
        labels: class names that hold for the scene, or None where the dataset has none.
        label_map: `(height, width)` integer classes, or float values in `PairsInfo.map_units`; or None.
        split: `"train"`, `"validation"`, `"test"`, or None where the dataset defines none.
        crs: coordinate reference system as WKT or `EPSG:<code>`.
        transform: the six coefficients (a, b, c, d, e, f) of the affine pixel-to-map transform, in rasterio's order.
        sar_time: acquisition time in ISO 8601.
        optical_time: acquisition time in ISO 8601.
        optical_offset: where it is not that of the dataset: see `PairsInfo.per_scene`.
        sar_units: the same.
        optical_units: the same.
        processing_baseline: of the optical product, such as `"04.00"`.
        extra: dataset-specific columns: a value or None for each name in `PairsInfo.extra_columns`.
    """

    id: str
    sar: Any
    optical: Any
    labels: list[str] | None = None
    label_map: np.ndarray | None = None
    split: str | None = None
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    sar_time: str | None = None
    optical_time: str | None = None
    optical_offset: float | None = None
    sar_units: str | None = None
    optical_units: str | None = None
    processing_baseline: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, of the optical patch where there is one."""
        height, width = (self.sar if self.optical is None else self.optical).shape[1:]
        return height, width


@dataclass(frozen=True)
class PairsInfo:
    """What holds for every pair of a dataset; stored in each shard and in `dataset_info.json`.

    Attributes:
        name: short name of the dataset.
        source: paper or official page, with version.
        license: licence of the imagery.
        sar_bands: band names of `Pair.sar`, in order.
        optical_bands: band names of `Pair.optical`, in order.
        sar_units: `"db"`, `"linear"` or `"raw"`.
        optical_units: `"dn"`, `"reflectance"` or `"raw"`.
        optical_offset: what was added to every optical value, in digital numbers, and is subtracted before use: 0, or
            1000 from baseline 04.00 on. Neither negative nor between 0 and 1, unless units are raw.
        optical_factors: by how much each optical band is coarser than the grid of `Pair.optical`, on which its pixels
            are repeated: 2 for a 20 m band on a 10 m grid. Shards hold such bands in their own resolution. Empty
            where every band is as fine as the grid.
        statistics: key of `sensors_fusmae.STATISTICS`, or None where none is published.
        class_names: names of the scene classes, in index order; empty where there are none.
        map_class_names: names of the classes of the label maps, by index, or empty.
        map_no_data: value that marks pixels without a class in label maps, or None where every pixel has one.
        map_units: units of label maps that hold a quantity (float) instead of classes, such as `"t/ha"`, or None.
        pixel_size: side of a pixel of `Pair.optical` in metres, or None where it is not known.
        extra_columns: type of each dataset-specific column in `Pair.extra`: `"string"`, `"int64"`, `"double"` or
            `"bool"`.
        simulated: True for made-up imagery.
        per_scene: those of `OF_SCENES` that differ from scene to scene: rows tell them, and what is said here holds
            for pairs that say nothing.

    Raises:
        ValueError: a field has another type than said here, is empty where it must not be, or holds text that is not
            plain (`is_plain_text`): these words go into cards, pictures and terminals.
    """

    name: str
    source: str
    license: str
    sar_bands: tuple[str, ...]
    optical_bands: tuple[str, ...]
    sar_units: str = "db"
    optical_units: str = "dn"
    optical_offset: float = 0.0
    optical_factors: tuple[int, ...] = ()
    statistics: str | None = None
    class_names: tuple[str, ...] = ()
    map_class_names: tuple[str, ...] = ()
    map_no_data: int | None = None
    map_units: str | None = None
    pixel_size: float | None = None
    extra_columns: dict[str, str] = field(default_factory=dict)
    simulated: bool = False
    per_scene: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        units = {"sar_units": SAR_UNITS, "optical_units": OPTICAL_UNITS}
        offset, factors, extra = self.optical_offset, self.optical_factors, self.extra_columns
        required = {
            "name": ("a word of plain text", is_plain_text(self.name) and self.name != ""),
            "source": ("plain text", is_plain_text(self.source, 10_000)),
            "license": ("plain text", is_plain_text(self.license, 10_000)),
            "sar_bands": ("a tuple of names, at least one", _are_names(self.sar_bands) and self.sar_bands),
            "optical_bands": ("a tuple of names, at least one", _are_names(self.optical_bands) and self.optical_bands),
            **{name: (f"one of {known}", getattr(self, name) in known) for name, known in units.items()},
            "optical_offset": ("a finite number", type(offset) in (int, float) and abs(offset) < 1e30),
            "optical_factors": (
                "empty, or a whole number from 1 on for each optical band",
                isinstance(factors, tuple)
                and all(type(factor) is int and 1 <= factor <= 10_000 for factor in factors)
                and len(factors) in (0, len(self.optical_bands)),
            ),
            # A word, since what the user gives in its place may also be a folder.
            "statistics": (
                "a word of letters, digits, dots and dashes, or None",
                self.statistics is None
                or (isinstance(self.statistics, str) and re.fullmatch(r"[\w-][\w.-]{,99}", self.statistics)),
            ),
            "class_names": ("a tuple of names", _are_names(self.class_names)),
            "map_class_names": ("a tuple of names", _are_names(self.map_class_names)),
            "map_no_data": (
                "a whole number or None",
                self.map_no_data is None or (type(self.map_no_data) is int and abs(self.map_no_data) < 2**63),
            ),
            "map_units": ("plain text or None", self.map_units is None or is_plain_text(self.map_units)),
            "pixel_size": (
                "a positive number of metres or None",
                self.pixel_size is None or (type(self.pixel_size) in (int, float) and 0 < self.pixel_size < 1e7),
            ),
            "extra_columns": (
                "a dictionary of names and types",
                isinstance(extra, dict) and _are_names((*extra, *extra.values())),
            ),
            "simulated": ("True or False", isinstance(self.simulated, bool)),
            "per_scene": (
                f"a tuple of some of {OF_SCENES}",
                isinstance(self.per_scene, tuple) and all(name in OF_SCENES for name in self.per_scene),
            ),
        }
        for name, (needed, holds) in required.items():
            if not holds:
                raise ValueError(f"{name} of the pairs is {reprlib.repr(getattr(self, name))}, but must be {needed}")
        if problem := offset_problem(self.optical_offset, self.optical_units):
            raise ValueError(f"{self.name}: {problem}")

    def of_scene(self, scene: Any) -> "PairsInfo":
        """What holds for one scene.

        Args:
            scene: a `Pair`, or a dictionary with some of `OF_SCENES`; None stands for what is said here.

        Raises:
            ValueError: it says something that cannot be, or differs in what is not `per_scene`.
        """
        named = scene if isinstance(scene, dict) else vars(scene)
        said = {name: value for name in OF_SCENES if (value := named.get(name)) is not None}
        differing = {name: value for name, value in said.items() if value != getattr(self, name)}
        if not differing:
            return self
        if foreign := differing.keys() - set(self.per_scene):
            name = sorted(foreign)[0]
            raise ValueError(
                f"{name} is {differing[name]!r}, but {getattr(self, name)!r} is declared for all pairs. List it in "
                "`per_scene` where scenes differ."
            )
        return replace(self, **differing)


def _are_names(names: Any) -> bool:
    return isinstance(names, tuple) and all(is_plain_text(name, 500) for name in names)


class Place(NamedTuple):
    """Where a pair lies.

    Attributes:
        scene: of which it is a part.
        crs: coordinate reference system, or None without a georeference.
        box: left, bottom, right, top of its footprint, in the CRS or in pixels of the scene.
    """

    scene: str
    crs: str | None
    box: tuple[float, float, float, float]


class PairReader(Protocol):
    """What every dataset reader offers. Opening one lists the pairs; pixels are read by `read` alone.

    A reader whose `places(indices)` gives the `Place` of each pair, or None, has those on the same ground held out
    together.

    Readers can be pickled: `prepare` sends them to its worker processes. One that decodes the same part of a file for
    several pairs may have `reading_groups`, a number for each pair that it shares with those to read next to it, and
    `rows_read_together`, how many may wait in memory so that they are. One whose files say which pixels hold no data
    may have `declares_no_data`, the sensors of which they do.

    Attributes:
        info: what holds for all pairs.
        ids: name of each pair; no two are the same.
        summary: a sentence on what was found where, and of how many that are listed.
    """

    info: PairsInfo
    ids: list[str]
    summary: str

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    def split_of(self, index: int) -> str | None:
        """Split of the pair at `index`, without reading its pixels."""
        ...

    def read(self, index: int) -> Pair:
        """Read one pair. Raises `PairError` naming the file."""
        ...

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Pairs that opening the dataset left out, as (id, reason)."""
        ...


_IN_DEGREES = {4148, 4258, 4267, 4269, 4283, 4326, 4490, 4617, 4674, 4979}
_MERCATOR = 20_037_509.0
"""Half the length of the equator in EPSG:3857."""


def problem_of_place(
    crs: str, transform: Sequence[float], height: int, width: int, in_degrees: bool | None = None
) -> str:
    """What is impossible about a place; empty where nothing is.

    Degrees end at 90 and 180 (360 where longitudes begin at 0); a zone of UTM is some 800 km wide, and neighbouring
    scenes may lie in it too; nothing in metres has pixels of a hundredth and lies within 360 of the origin.

    Args:
        crs: `EPSG:<code>` or WKT.
        transform: (a, b, c, d, e, f) of the affine pixel-to-map transform.
        height: number of rows.
        width: number of columns.
        in_degrees: whether the CRS has longitude and latitude; None where its text shall tell.
    """
    match = re.fullmatch(r"EPSG:(\d+)", crs)
    code = int(match[1]) if match else 0
    if in_degrees is None:
        in_degrees = code in _IN_DEGREES or crs.startswith(("GEOG", "OGC:CRS84"))
    a, b, c, d, e, f = transform
    corners = [(column, row) for column in (0, width) for row in (0, height)]
    xs, ys = ([p * x + q * y + r for x, y in corners] for p, q, r in ((a, b, c), (d, e, f)))
    lies = f"x from {min(xs):.8g} to {max(xs):.8g} and y from {min(ys):.8g} to {max(ys):.8g} cannot be of {crs[:60]}"
    if in_degrees:
        if min(xs) < -180.5 or max(xs) > 360.5 or max(ys) > 90.5 or min(ys) < -90.5:
            return f"{lies}, which has degrees. State the right CRS: `rio edit-info --crs EPSG:<code> FILE`."
        return ""
    size = max(abs(a), abs(b), abs(d), abs(e))
    if (code or crs.startswith("PROJ")) and size < 0.05 and max(map(abs, xs)) <= 361 and max(map(abs, ys)) <= 91:
        return (
            f"{lies}, which has metres: these are degrees. State the right CRS: `rio edit-info --crs EPSG:4326 FILE`."
        )
    is_utm = 32600 < code <= 32660 or 32700 < code <= 32760
    if is_utm and (min(xs) < -1.5e6 or max(xs) > 2.5e6 or min(ys) < -1.05e7 or max(ys) > 2.05e7):
        return f"{lies}, a zone of UTM. State the right CRS: `rio edit-info --crs EPSG:<code> FILE`."
    if code == 3857 and max(map(abs, (*xs, *ys))) > 1.01 * _MERCATOR:
        return f"{lies}. State the right CRS: `rio edit-info --crs EPSG:<code> FILE`."
    return ""
