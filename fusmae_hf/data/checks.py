"""What a pair must be like to be stored, and where it holds no data."""

import math
from collections.abc import Sequence

import numpy as np

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError

PIXEL_DTYPES = tuple(
    np.dtype(name).name for name in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
)
"""Dtypes of pixels that a shard may hold: those that numpy and torch share."""

_PIXEL_KINDS = {(np.dtype(name).kind, np.dtype(name).itemsize) for name in PIXEL_DTYPES}

EXTRA_TYPES = {"string": str, "int64": int, "double": float, "bool": bool}
"""Type in `Pair.extra` of each type in `PairsInfo.extra_columns`."""


def no_data_pixels(pair: Pair) -> dict[str, int]:
    """Count the pixels without data, by sensor: non-finite in any band or, if optical, zero in all bands."""
    return {"sar": _without_data(pair.sar), "optical": _without_optical_data(pair.optical)}


def check_pair(pair: Pair, info: PairsInfo) -> dict[str, int]:
    """Check that a pair may be stored, as is done for every pair before it is written.

    Returns:
        Number of pixels without data, by sensor: see `no_data_pixels`.

    Raises:
        PairError: the id is empty; a patch is not `(bands, height, width)` with the bands of `info`, or of no numeric
            dtype; bands in their own resolution are not as `info.optical_factors` says; a patch has no pixel with
            data; the label map fits neither patch or holds neither integers nor, with `info.map_units`, floats; one
            of the labels is none of `info.class_names`; the transform is not six numbers; a text is none that UTF-8
            can hold; or the extra columns are not those of `info`. Names the id.
    """
    if not isinstance(pair.id, str) or not pair.id or not _is_text(pair.id):
        raise PairError(f"A pair needs a non-empty string as its id, but has {pair.id!r}.")
    for sensor, pixels, bands in (("sar", pair.sar, info.sar_bands), ("optical", pair.optical, info.optical_bands)):
        if len(pixels.shape) != 3 or pixels.shape[0] != len(bands) or 0 in pixels.shape:
            raise PairError(
                f"{pair.id}: {sensor} has shape {pixels.shape}, but (bands, height, width) with the bands "
                f"{list(bands)} is needed."
            )
        if _kind(pixels.dtype) not in _PIXEL_KINDS:
            raise PairError(f"{pair.id}: {sensor} has dtype {pixels.dtype}, but one of {PIXEL_DTYPES} is needed.")
    if isinstance(pair.optical, NativeBands):
        _check_native_bands(pair.id, pair.optical, info)
    no_data = no_data_pixels(pair)
    if no_data["sar"] == math.prod(pair.sar.shape[1:]):
        raise PairError(f"{pair.id}: sar has no data: no pixel is finite in all bands.")
    if no_data["optical"] == math.prod(pair.optical.shape[1:]):
        raise PairError(f"{pair.id}: optical has no data: every pixel is zero in all bands, or not finite.")
    if pair.label_map is not None and (
        pair.label_map.shape not in (pair.sar.shape[1:], pair.optical.shape[1:])
        or _kind(pair.label_map.dtype) not in _PIXEL_KINDS
        or pair.label_map.dtype.kind not in ("f" if info.map_units else "iu")
    ):
        raise PairError(
            f"{pair.id}: label_map is {pair.label_map.dtype} {pair.label_map.shape}, but "
            f"{f'floats ({info.map_units})' if info.map_units else 'integers'} of the size of a patch are needed, "
            f"{pair.optical.shape[1:]}."
        )
    _check_small_values(pair, info)
    return no_data


def _kind(dtype: np.dtype) -> tuple[str, int]:
    """What tells numeric dtypes apart whatever their byte order; quicker than their names."""
    return dtype.kind, dtype.itemsize


def _without_data(pixels: np.ndarray) -> int:
    """Number of pixels that are not finite in every band."""
    if pixels.dtype.kind in "iu":
        return 0
    finite = np.isfinite(pixels)
    return 0 if finite.all() else int((~finite.all(axis=0)).sum())


def _without_optical_data(pixels: np.ndarray | NativeBands) -> int:
    """Number of pixels that are not finite or, since zero means no data in Sentinel-2, zero in all bands."""
    if isinstance(pixels, NativeBands):
        if pixels.dtype.kind in "iu":
            fine = [band for band, factor in zip(pixels.bands, pixels.factors, strict=True) if factor == 1]
            if fine and _ever_nonzero(fine).all():
                return 0
        pixels = pixels.expand()
    has_data = _ever_nonzero(pixels)
    if pixels.dtype.kind not in "iu":
        has_data &= np.isfinite(pixels).all(axis=0)
    return has_data.size - int(np.count_nonzero(has_data))


def _ever_nonzero(bands: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """`(height, width)` bool: not zero in some band. Looks at further bands only as long as they can matter."""
    nonzero = bands[0] != 0
    for band in bands[1:]:
        if nonzero.all():
            break
        nonzero |= band != 0
    return nonzero


def _check_native_bands(id: str, optical: NativeBands, info: PairsInfo) -> None:
    """Check that the bands are as coarse as declared and of one dtype; `PairError` otherwise."""
    if tuple(optical.factors) != info.optical_factors:
        raise PairError(
            f"{id}: optical has bands {tuple(optical.factors)} times coarser, but {info.optical_factors} is declared."
        )
    _, height, width = optical.shape
    for band, factor in zip(optical.bands, optical.factors, strict=True):
        if (band.shape[0] * factor, band.shape[1] * factor) != (height, width) or band.dtype != optical.dtype:
            raise PairError(
                f"{id}: optical has a band of {band.shape} {band.dtype}, {factor} times coarser than the grid of "
                f"({height}, {width}) {optical.dtype}, which does not fit."
            )


def _check_small_values(pair: Pair, info: PairsInfo) -> None:
    """Check labels, place, times and extra columns of a pair; `PairError` where one cannot be stored."""
    labels = pair.labels
    if labels is not None and (
        not isinstance(labels, list | tuple) or not all(isinstance(name, str) and _is_text(name) for name in labels)
    ):
        raise PairError(f"{pair.id}: labels are {labels!r}, but a list of strings or None is needed.")
    if info.class_names and (unknown := sorted(set(labels or ()).difference(info.class_names))):
        raise PairError(f"{pair.id}: labels {unknown} are none of the classes {list(info.class_names)}.")
    for name in ("crs", "sar_time", "optical_time"):
        value = getattr(pair, name)
        if value is not None and not (isinstance(value, str) and _is_text(value)):
            raise PairError(f"{pair.id}: {name} is {value!r}, but a string or None is needed.")
    if pair.transform is not None and (
        len(pair.transform) != 6
        or not all(isinstance(number, float | int | np.number) and math.isfinite(number) for number in pair.transform)
    ):
        raise PairError(
            f"{pair.id}: transform is {pair.transform}, but six finite numbers (a, b, c, d, e, f) are needed."
        )
    if pair.extra.keys() != info.extra_columns.keys():
        raise PairError(
            f"{pair.id}: extra columns are {sorted(pair.extra)}, but {sorted(info.extra_columns)} are declared."
        )
    for name, value in pair.extra.items():
        kind = EXTRA_TYPES[info.extra_columns[name]]
        if value is not None and (
            type(value) is not kind
            or (isinstance(value, str) and not _is_text(value))
            or (isinstance(value, int) and not -(2**63) <= value < 2**63)
        ):
            raise PairError(
                f"{pair.id}: extra column {name!r} holds {value!r}, but {info.extra_columns[name]} is declared."
            )


def _is_text(value: str) -> bool:
    """False for strings that UTF-8 cannot hold: file names whose bytes are none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
