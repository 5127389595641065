"""What a raster declares of itself, held against what the user states of it.

A declaration that contradicts a statement is an error with both; where nothing is stated the declaration counts.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS_L1C, REFLECTANCE_SCALE, sentinel_bands

SKIPPED_BAND = "-"
"""Stands in a list of band names for a band of the files that is not given."""

BAND_FIELD = "{band}"
"""Stands in a path for the name of a band: one file a band."""

_KNOWN_BANDS = {*OPTICAL_BANDS_L1C, "VV", "VH", "HH", "HV"}


@dataclass(frozen=True)
class Stated:
    """What the user says of the files of one kind.

    Attributes:
        kind: `"sar"`, `"optical"` or `"label_map"`.
        names: of all bands in the order of the file, `SKIPPED_BAND` for one that is not given. Empty: the file shall
            say them. Sentinel's are spelt as its products do, unless units are raw.
        by_name: bands are looked up by their descriptions, in whatever order they lie.
        file_names: what stands for the bands in `BAND_FIELD`; `names`, as given, by default.
        no_data: value of pixels without data, None where the file shall say it.
        units: of the values; empty for label maps of classes.
        offset: what must be subtracted from optical values, None where the file shall say it.
        padded: windows may reach beyond the file, and have no data there.

    Raises:
        ValueError: names are repeated, or none is left; or `no_data` is not finite, which is no data in any case.
    """

    kind: str
    names: Sequence[str] = ()
    by_name: bool = False
    file_names: tuple[str, ...] = ()
    no_data: float | None = None
    units: str = ""
    offset: float | None = None
    padded: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.names, str):
            object.__setattr__(self, "file_names", self.file_names or tuple(self.names))
            object.__setattr__(self, "names", tuple(sentinel_bands(self.names, self.units)))
        if self.no_data is not None and not math.isfinite(self.no_data):
            raise ValueError(
                f"{self.option}-no-data is {self.no_data}, but this is no data in any case: leave it out."
            )
        named = [name for name in self.names if name != SKIPPED_BAND]
        if isinstance(self.names, str) or (self.names and not named) or len(set(named)) < len(named):
            raise ValueError(
                f"{self.kind}_bands is {self.names!r}, but must name every band of the {self.kind} files in their "
                f"order, each name once and {SKIPPED_BAND!r} for one to be skipped, such as ['VV', 'VH']."
            )

    @property
    def option(self) -> str:
        """Beginning of the options that state something of these files."""
        return "--map" if self.kind == "label_map" else f"--{self.kind}"


def band_named(description: str | None, given: Sequence[str] = ()) -> str | None:
    """The band that a description such as `"B4"`, `"Sigma0_VV_db"` or `"B04 (665 nm)"` names, or None for none."""
    if not description or description in given:
        return description or None
    words = {_spelled(word) for word in re.split(r"[^A-Za-z0-9]+", description)}
    found = words & (_KNOWN_BANDS | {*given})
    return found.pop() if len(found) == 1 else None


@lru_cache(1024)
def _spelled(name: str) -> str:
    """The usual spelling of a band: `B02` of `b2`; `Band1` counts the bands of a file and names none."""
    return name if name.lower().startswith("band") else sentinel_bands([name], "")[0]


def bands_to_read(path: Path | str, file: Any, stated: Stated, alpha: int | None) -> tuple[list[int], tuple[str, ...]]:
    """Numbers and names of the bands to read; descriptions that name bands must agree with the names stated."""
    if stated.kind == "label_map":
        if file.count - (alpha is not None) != 1:
            raise PairError(f"{path}: has {file.count} bands, but a label map has one.")
        return [1], ("",)
    numbers = [number for number in range(1, file.count + 1) if number != alpha]
    descriptions = file.descriptions
    described = {number: band_named(descriptions[number - 1], stated.names) for number in numbers}
    if not stated.names:
        names = [described[number] for number in numbers]
        if None in names or len(set(names)) < len(names):
            raise PairError(
                f"{path}: its bands are described as {list(file.descriptions)}, which does not name them all: give "
                f"{stated.option}-bands, all names in the order of the file."
            )
        return numbers, tuple(name for name in names if name)
    if stated.by_name:
        wanted = list(stated.names)
        place = {name: number for number, name in described.items()}
        if missing := [name for name in wanted if name not in place]:
            raise PairError(
                f"{path}: its bands are described as {list(file.descriptions)}, and {missing} are not among them, but "
                f"other files have them. Give {stated.option}-bands, or leave the file out."
            )
        return [place[name] for name in wanted], tuple(wanted)
    if len(stated.names) == file.count and alpha is not None:
        _require_band(path, file, stated, alpha)
        numbers = [*range(1, file.count + 1)]
        described[alpha] = band_named(descriptions[alpha - 1], stated.names)
    if len(numbers) != len(stated.names):
        raise PairError(
            f"{path}: has {len(numbers)} bands, but the names of {len(stated.names)} were given, in file order."
        )
    read = [(number, name) for number, name in zip(numbers, stated.names, strict=True) if name != SKIPPED_BAND]
    for number, name in read:
        said = described[number]
        if said is None or _spelled(said) == _spelled(name):
            continue
        if said in stated.names or (_spelled(name) in _KNOWN_BANDS and said in _KNOWN_BANDS):
            raise PairError(
                f"{path}: its band {number} is described as {file.descriptions[number - 1]!r}, but "
                f"{stated.option}-bands calls it {name}. The file has {', '.join(map(str, file.descriptions))}: give "
                f"the names in this order, or correct the description if it is wrong."
            )
    return [number for number, _ in read], tuple(name for _, name in read)


def _require_band(path: Path | str, file: Any, stated: Stated, alpha: int) -> None:
    """Refuse a name for a band that is transparency by what the file says and by its values, which are 0 and 255.

    GDAL calls the fourth band of any file of four bands of 8 bits alpha, so its word alone does not settle it.
    """
    name = stated.names[alpha - 1]
    if name == SKIPPED_BAND or band_named(file.descriptions[alpha - 1], stated.names) == name:
        return
    seen = np.unique(file.read(alpha, out_shape=(min(file.height, 256), min(file.width, 256))))
    if set(seen.tolist()) <= {0, np.iinfo(seen.dtype).max if seen.dtype.kind in "iu" else 1}:
        raise PairError(
            f"{path}: its band {alpha} is alpha (where there is data) by its colour interpretation and its values, "
            f"but {stated.option}-bands calls it {name}. Leave that name out, or give {SKIPPED_BAND} for it."
        )


def no_data_values(path: Path | str, file: Any, bands: Sequence[int], stated: Stated) -> tuple[float | None, ...]:
    """Value without data of each band: the tag, or what is stated."""
    of_file = file.nodatavals
    tags = [of_file[number - 1] for number in bands]
    if stated.no_data is None:
        return tuple(tags)
    harmless = {0} if stated.kind == "optical" or stated.units == "linear" else set()  # no data whatever is declared
    for tag in tags:
        if tag is not None and not math.isnan(tag) and tag not in (stated.no_data, *harmless):
            raise PairError(
                f"{path}: its tag says that {tag:g} is no data, but {stated.option}-no-data is {stated.no_data:g}. "
                f"Leave the option out, or correct the tag: `rio edit-info --nodata {stated.no_data:g} FILE`."
            )
    return (stated.no_data,) * len(tags)


def declared_scaling(
    path: Path | str, file: Any, bands: Sequence[int], stated: Stated
) -> tuple[tuple[float, ...], tuple[float, ...], float | None]:
    """Scales and offsets to apply to each band, and the optical offset that the tags imply."""
    measures = {(unit or "").lower() for unit in file.units}
    if stated.kind == "sar" and stated.units == "linear" and measures & {"db", "decibel", "decibels"}:
        raise PairError(f"{path}: its unit is dB by its tag, but --sar-units is linear. Declare --sar-units db.")
    plain = (1.0,) * len(bands), (0.0,) * len(bands), None
    scales, offsets = (tuple(values[number - 1] for number in bands) for values in (file.scales, file.offsets))
    if (scales, offsets) == plain[:2]:
        return plain
    tags = f"{path}: its tags say scale {_listed(scales)} and offset {_listed(offsets)}"
    if not all(math.isfinite(number) for number in (*scales, *offsets)) or 0 in scales:
        raise PairError(f"{tags}, which gives no values. Correct the tags.")
    if stated.kind == "label_map" and not stated.units:
        raise PairError(f"{tags}, but classes are not scaled. Remove the tags, or give --map-units for a quantity.")
    if stated.kind == "optical" and stated.units == "dn":
        if (
            len({*scales}) == len({*offsets}) == 1
            and min(abs(scales[0] * s - 1) for s in (1, REFLECTANCE_SCALE)) < 1e-6
        ):
            implied = round(-offsets[0] / scales[0], 6) + 0.0
            if implied and stated.offset not in (None, implied):
                raise PairError(
                    f"{tags}, that is an optical offset of {implied:g}, but --optical-offset is {stated.offset:g}. "
                    "Leave the option out, or correct the tags."
                )
            return (*plain[:2], implied or None)
        raise PairError(
            f"{tags}, which does not give digital numbers (reflectance x 10,000) as --optical-units dn says: declare "
            "--optical-units reflectance, or raw, to have them applied, or correct the tags."
        )
    if stated.kind == "optical" and stated.offset and any(offsets):
        raise PairError(
            f"{tags}, but --optical-offset is {stated.offset:g}: the offset would be subtracted twice. Leave one out."
        )
    return scales, offsets, None


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in dict.fromkeys(numbers))
