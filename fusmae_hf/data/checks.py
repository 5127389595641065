"""What a pair must be like to be stored, and where it holds no data."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fusmae_hf.data.native_resolution import PIXEL_DTYPES, NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo, problem_of_place
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.no_data_fusmae import extremes, has_data
from fusmae_hf.vocabulary import SENSORS

_PIXEL_KINDS = {(np.dtype(name).kind, np.dtype(name).itemsize) for name in PIXEL_DTYPES}

EXTRA_TYPES = {"string": str, "int64": int, "double": float, "bool": bool}
"""Type in `Pair.extra` of each type in `PairsInfo.extra_columns`."""


def pixels_without_data(pixels: np.ndarray | NativeBands, sensor: str, units: str) -> int:
    """Number of pixels of a patch that hold no data, by the rule of `has_data`.

    Args:
        pixels: `(bands, height, width)`, or bands in their own resolution.
        sensor: `"sar"` or `"optical"`, where 0 in all bands means no data.
        units: of the patch.
    """
    if pixels.dtype.kind in "iu" and units != "linear":
        if sensor == "sar":
            return 0
        fine = pixels.fine if isinstance(pixels, NativeBands) else pixels
        if any(band.all() for band in fine):  # one band without a zero, as nearly all are, settles it
            return 0
    if isinstance(pixels, NativeBands):
        pixels = pixels.expand()
    elif pixels.dtype.kind == "f":
        lowest, _, finite = extremes(pixels)
        if finite and lowest > (-math.inf if sensor == "sar" and units != "linear" else 0):
            return 0
    there = has_data(pixels, sensor, units, nodata=0 if sensor == "optical" else None)
    return there.size - int(np.count_nonzero(there))


def check_pair(pair: Pair, info: PairsInfo) -> dict[str, int]:
    """Check that a pair may be stored as it is.

    Returns:
        Number of pixels without data, by sensor: see `pixels_without_data`.

    Raises:
        PairError: the id is empty; a patch is not `(bands, height, width)` with the bands of `info`, or of no numeric
            dtype; bands in their own resolution are not as `info.optical_factors` says; a patch has no pixel with
            data; the label map fits neither patch or holds neither integers nor, with `info.map_units`, floats; one
            of the labels is none of `info.class_names`; the transform is not six numbers; a text is none that UTF-8
            can hold; or the extra columns are not those of `info`. Names the id.
    """
    return pair_to_store(pair, info, require_both=None)[1]


def pair_to_store(pair: Pair, info: PairsInfo, *, require_both: bool | None = False) -> tuple[Pair, dict[str, int]]:
    """Check a pair as is done for every one before it is written.

    Args:
        pair: the pair.
        info: what holds for all pairs.
        require_both: whether a pair must have both sensors. Otherwise one that has no pixel with data in one of them,
            only NaN in SAR or only zeros in the optical bands, goes without that sensor; with None it is refused.

    Returns:
        The pair to store, and its number of pixels without data, by sensor.

    Raises:
        PairError: see `check_pair`.
    """
    if not isinstance(pair.id, str) or not pair.id or not _is_text(pair.id):
        raise PairError(f"A pair needs a non-empty string as its id, but has {pair.id!r}.")
    no_data: dict[str, int] = {}
    problems = [*problems_of_pair(pair, info, no_data)]
    if require_both is False and len(no_data) == 2:
        empty = [sensor for sensor in SENSORS if _is_empty(getattr(pair, sensor), no_data[sensor], sensor)]
        if len(empty) == 1:
            lacking: dict[str, Any] = {empty[0]: None}
            pair, no_data = replace(pair, **lacking), {}
            problems = [*problems_of_pair(pair, info, no_data)]
    for _, problem in problems:
        raise PairError(f"{pair.id}: {problem}")
    if require_both and len(no_data) < 2:
        (sensor,) = (sensor for sensor in SENSORS if sensor not in no_data)
        raise PairError(f"{pair.id}: {sensor} is absent, but both sensors are required.")
    return pair, {sensor: no_data.get(sensor, 0) for sensor in SENSORS}


def _is_empty(pixels: np.ndarray | NativeBands, without_data: int, sensor: str) -> bool:
    """Whether a patch holds nothing at all: not values that are refused."""
    if without_data < math.prod(pixels.shape[1:]):
        return False
    values = pixels.expand() if isinstance(pixels, NativeBands) else pixels
    return not (values[np.isfinite(values)] != 0).any() if sensor == "sar" else True


def problems_of_pair(pair: Pair, info: PairsInfo, no_data: dict[str, int]) -> Iterator[tuple[str, str]]:
    """What is wrong with a pair that has an id, for `check_pair` and for whoever wants to know all of it.

    Args:
        pair: the pair.
        info: what is declared.
        no_data: number of pixels without data by sensor, which is added here.

    Yields:
        What is wrong: `"arrays"`, `"data"`, `"label maps"`, `"labels"`, `"places"` or `"columns"`; and how.
    """
    try:
        info = info.of_scene(pair)
    except ValueError as error:
        yield "columns", f"{error}"
        return
    problems = [*_problems_of_arrays(pair, info)]
    if problems:
        yield from problems
        return
    for sensor in SENSORS:
        if getattr(pair, sensor) is not None:
            no_data[sensor] = pixels_without_data(getattr(pair, sensor), sensor, getattr(info, f"{sensor}_units"))
    if no_data.get("sar") == math.prod(pair.size):
        if info.sar_units != "linear":
            yield "data", "sar has no data: no pixel is finite in all bands."
        else:
            units = (
                " Values are negative: this looks like dB. Declare `sar_units` as 'db' (`--sar-units db`)."
                if (pair.sar < 0).any()
                else ""
            )
            yield "data", f"sar has no data: no power is finite and positive in all bands.{units}"
    if no_data.get("optical") == math.prod(pair.size):
        yield "data", "optical has no data: every pixel is zero in all bands, or not finite."
    if pair.label_map is not None and (
        pair.label_map.shape not in [pixels.shape[1:] for pixels in (pair.sar, pair.optical) if pixels is not None]
        or _kind(pair.label_map.dtype) not in _PIXEL_KINDS
        or pair.label_map.dtype.kind not in ("f" if info.map_units else "iu")
    ):
        needed = f"floats ({info.map_units})" if info.map_units else "integers"
        yield (
            "label maps",
            f"label_map is {pair.label_map.dtype} {pair.label_map.shape}, but {needed} of the size of a patch are "
            f"needed, {pair.size}.",
        )
    yield from _problems_of_small_values(pair, info)


def _kind(dtype: np.dtype) -> tuple[str, int]:
    """What tells numeric dtypes apart whatever their byte order; quicker than their names."""
    return dtype.kind, dtype.itemsize


def _problems_of_arrays(pair: Pair, info: PairsInfo) -> Iterator[tuple[str, str]]:
    if pair.sar is None and pair.optical is None:
        yield "arrays", "neither sar nor optical is there."
    for sensor, pixels, bands in (("sar", pair.sar, info.sar_bands), ("optical", pair.optical, info.optical_bands)):
        if pixels is None:
            continue
        if len(pixels.shape) != 3 or pixels.shape[0] != len(bands) or 0 in pixels.shape:
            wanted = f"(bands, height, width) with the bands {list(bands)}"
            yield "arrays", f"{sensor} has shape {pixels.shape}, but {wanted} is needed."
        if _kind(pixels.dtype) not in _PIXEL_KINDS:
            yield "arrays", f"{sensor} has dtype {pixels.dtype}, but one of {PIXEL_DTYPES} is needed."
    optical = pair.optical
    if not isinstance(optical, NativeBands):
        return
    if tuple(optical.factors) != info.optical_factors:
        found = f"bands {tuple(optical.factors)} times coarser, but {info.optical_factors} is declared."
        yield "arrays", f"optical has {found}"
    _, height, width = optical.shape
    for band, factor in zip(optical.bands, optical.factors, strict=True):
        if (band.shape[0] * factor, band.shape[1] * factor) != (height, width) or band.dtype != optical.dtype:
            yield (
                "arrays",
                f"optical has a band of {band.shape} {band.dtype}, {factor} times coarser than the grid of "
                f"({height}, {width}) {optical.dtype}, which does not fit.",
            )


def _problems_of_small_values(pair: Pair, info: PairsInfo) -> Iterator[tuple[str, str]]:
    """Labels, place, times and extra columns that cannot be stored."""
    labels = pair.labels
    if labels is not None and (
        not isinstance(labels, list | tuple) or not all(isinstance(name, str) and _is_text(name) for name in labels)
    ):
        yield "labels", f"labels are {labels!r}, but a list of strings or None is needed."
    elif info.class_names and (unknown := sorted(set(labels or ()).difference(info.class_names))):
        yield "labels", f"labels {unknown} are none of the classes {list(info.class_names)}."
    for name in ("crs", "sar_time", "optical_time", "processing_baseline"):
        value = getattr(pair, name)
        if value is not None and not (isinstance(value, str) and _is_text(value)):
            yield "places", f"{name} is {value!r}, but a string or None is needed."
    transform = pair.transform
    if transform is not None and (
        len(transform) != 6
        or not all(isinstance(number, float | int | np.number) and math.isfinite(number) for number in transform)
    ):
        yield "places", f"transform is {transform}, but six finite numbers (a, b, c, d, e, f) are needed."
    elif transform is not None and isinstance(pair.crs, str):
        size = next(pixels.shape[1:] for pixels in (pair.sar, pair.optical) if pixels is not None)
        if problem := problem_of_place(pair.crs, transform, *size):
            yield "places", f"{problem}"
    if pair.extra.keys() != info.extra_columns.keys():
        declared = sorted(info.extra_columns)
        yield "columns", f"extra columns are {sorted(pair.extra)}, but {declared} are declared."
        return
    for name, value in pair.extra.items():
        kind = EXTRA_TYPES[info.extra_columns[name]]
        if value is not None and (
            type(value) is not kind
            or (isinstance(value, str) and not _is_text(value))
            or (isinstance(value, int) and not -(2**63) <= value < 2**63)
        ):
            yield "columns", f"extra column {name!r} holds {value!r}, but {info.extra_columns[name]} is declared."


def _is_text(value: str) -> bool:
    """False for strings that UTF-8 cannot hold: file names whose bytes are none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
