"""The rasters of a pair read onto one grid, window by window, with what lacks data put in one form."""

from collections.abc import Mapping, Sequence

import numpy as np

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.no_data_fusmae import looks_like_db
from fusmae_hf.readers.geotiff import require_codes
from fusmae_hf.readers.grids import Grid, Window, problem_between, resample, scale_between, source_window
from fusmae_hf.readers.raster_files import Raster


def require_resampling(raster: Raster, target: Grid) -> None:
    """Refuse a file that cannot be resampled onto a grid.

    Raises:
        PairError: one of the two has no CRS, or they do not overlap.
    """
    if raster.grid.crs is None or target.crs is None:
        raise PairError(f"{raster.path}: cannot be resampled without a CRS: {raster.grid}; wanted: {target}.")
    if source_window(raster.grid, target) is None:
        raise PairError(f"{raster.path}: does not overlap its partner: {raster.grid}; wanted: {target}.")


def require_one_place(rasters: Mapping[str, Raster], most_times: float) -> None:
    """Refuse files of a pair, by kind, that cannot show one place.

    Raises:
        PairError: coordinates cannot be of the CRS that is stated; the finest pixels of the sensors differ more than
            `most_times`; or their extents barely meet. Names the files and grids.
    """
    for raster in rasters.values():
        if problem := raster.grid.problem():
            raise PairError(f"{raster.path}: {problem}")
    sar, optical = (rasters.get(sensor) for sensor in ("sar", "optical"))
    if sar is None or optical is None or None in (sar.grid.crs, optical.grid.crs) or sar.grid.same_as(optical.grid):
        return
    if problem := problem_between(sar.grid, optical.grid, most_times):
        raise PairError(f"{sar.path} and {optical.path} {problem}: {sar.grid}; {optical.grid}.")


def read_sar(raster: Raster, whole: Grid, window: Window, *, units: str, resampling: str | None) -> np.ndarray:
    """Read backscatter onto a grid.

    Args:
        raster: the file. Values that are not finite, or that it declares to be none, are no data.
        whole: grid of the pair.
        window: part of it to read.
        units: `"db"`, `"linear"` or `"raw"`. Zero and below are no data in linear units; dB is resampled as power.
        resampling: `"bilinear"` or `"nearest"`, None where nothing may be resampled.

    Returns:
        `(bands, height, width)`, NaN without data. Integers become floats where they may have to be NaN, so that all
        windows have one dtype.
    """
    needs_nan = resampling is not None or units == "linear" or raster.may_lack_data

    def read(*window: int) -> np.ndarray:
        values, declared = raster.read(*window)
        missing = np.zeros(values.shape, bool) if declared is None else declared.copy()
        if values.dtype.kind == "f":
            missing |= ~np.isfinite(values)
        if units == "linear" and not looks_like_db(values[~missing]):  # dB stays, for whoever judges the values
            missing |= values <= 0
        if needs_nan:
            values = _as_float(values)
            values[missing] = np.nan
        return values

    if resampling is None or raster.grid.same_as(whole):
        return read(*window)
    target, scale = whole.window(*window), scale_between(raster.grid, whole)
    if units != "db" or resampling == "nearest":
        return resample(read, raster.grid, target, resampling, scale)
    power = resample(lambda *part: 10 ** (read(*part) / 10), raster.grid, target, resampling, scale)
    return 10 * np.log10(power)


def read_optical(raster: Raster, whole: Grid, window: Window, *, resampling: str) -> np.ndarray:
    """Read optical values onto a grid.

    Args:
        raster: the file. A pixel has no data where it is not finite, or is declared to be none, in any band, and
            where it is 0 in all bands, as is the rule if 0 is its no-data value.
        whole: grid of the pair.
        window: part of it to read.
        resampling: `"bilinear"` or `"nearest"`.

    Returns:
        `(bands, height, width)` in the dtype of the file, 0 in all bands without data.
    """
    if raster.grid.same_as(whole):
        values, missing = _optical(raster, *window)
        values[:, missing] = 0
        return values

    def read(*part: int) -> np.ndarray:
        values, missing = _optical(raster, *part)
        values = _as_float(values)
        values[:, missing] = np.nan
        return values

    scale = scale_between(raster.grid, whole)
    values = np.nan_to_num(resample(read, raster.grid, whole.window(*window), resampling, scale), copy=False)
    return (np.rint(values) if raster.dtype.kind in "iu" else values).astype(raster.dtype)


def read_label_map(raster: Raster, whole: Grid, window: Window, info: PairsInfo) -> np.ndarray:
    """Read a label map onto a grid, taking the nearest pixel.

    Args:
        raster: the file.
        whole: grid of the pair.
        window: part of it to read.
        info: classes, no-data value and units of the maps.

    Returns:
        `(height, width)` in the dtype of the file: classes, `info.map_no_data` outside the file, or a quantity, NaN
        there.

    Raises:
        PairError: the file holds another kind of number or an unknown class, or does not cover the window although
            `info` has no no-data value.
    """
    if (raster.dtype.kind == "f") != bool(info.map_units):
        raise PairError(
            f"{raster.path}: label maps of classes hold integers, those of a quantity floats and need map_units; "
            f"this one holds {raster.dtype}, and map_units is {info.map_units!r}."
        )

    def read(*part: int) -> np.ndarray:
        values, missing = raster.read(*part)
        if missing is None:
            return values
        values = values.astype(np.float64)
        values[missing] = np.nan
        return values

    if raster.grid.same_as(whole):
        exact = read(*window)[0]
    else:
        exact = resample(lambda *part: read(*part).astype(np.float64), raster.grid, whole.window(*window), "nearest")[
            0
        ]
    if info.map_units:
        return exact.astype(raster.dtype)
    if exact.dtype.kind == "f" and (without := np.isnan(exact)).any():
        if info.map_no_data is None:
            raise PairError(
                f"{raster.path}: declares pixels without a class, or does not cover the whole patch: give map_no_data "
                "(`--map-no-data`) to mark them."
            )
        if not np.iinfo(raster.dtype).min <= info.map_no_data <= np.iinfo(raster.dtype).max:
            raise PairError(
                f"{raster.path}: holds {raster.dtype}, into which map_no_data={info.map_no_data} does not go."
            )
        exact[without] = info.map_no_data
    values = exact.astype(raster.dtype)
    if info.map_class_names:
        classes = range(len(info.map_class_names))
        expected = f"the classes are 0 to {classes[-1]}, and "
        expected += (
            "no value is declared to be none: name all classes (`--map-class-names`) or declare it (`--map-no-data`)"
            if info.map_no_data is None
            else f"no data is {info.map_no_data} (map_no_data, `--map-no-data`)"
        )
        require_codes(raster.path, values, {*classes, info.map_no_data}, expected)
    return values


def _optical(raster: Raster, *window: int) -> tuple[np.ndarray, np.ndarray]:
    """Optical values of a window, and `(height, width)` bool: pixels without data."""
    values, declared = raster.read(*window)
    missing = (values == 0).all(axis=0)
    if declared is not None:
        missing |= declared.all(axis=0) if raster.no_data == 0 else declared.any(axis=0)
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(values).all(axis=0)
    return values, missing


def _as_float(values: np.ndarray) -> np.ndarray:
    """Values in the smallest of float32 and float64 that holds them exactly; floats as they are."""
    if values.dtype.kind == "f":
        return values
    return values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)


def require_data(
    paths: Sequence[str | None], sar: np.ndarray | None, optical: np.ndarray | None, max_no_data: float
) -> None:
    """Raise a PairError where more than a share of the pixels have no data in either sensor of a pair.

    A sensor that is empty throughout is absent, and the other one decides.
    """
    lacks = [] if sar is None else [~np.isfinite(sar).all(axis=0)]
    lacks += [] if optical is None else [(optical == 0).all(axis=0)]
    missing = np.logical_or.reduce([each for each in lacks if not each.all()] or lacks)
    if missing.mean() > max_no_data:
        raise PairError(
            f"{' and '.join(filter(None, paths))}: {missing.mean():.1%} of {missing.size:,} pixels have no data in "
            f"SAR or optical, more than max_no_data={max_no_data:g}."
        )


def require_grids(rasters: dict[str, Raster], whole: Grid, target: Raster, warp: bool) -> None:
    """Refuse files that are not on the grid of the pair, unless they can be resampled onto it."""
    for kind, raster in rasters.items():
        if raster.grid.same_as(whole):
            continue
        if not warp:
            raise PairError(
                f"{raster.path} is not on the grid of {target.path}: {raster.grid}, but {whole}. Bring them onto one "
                "grid, or pass on_different_grids='warp' to have "
                f"{'it' if kind == 'label_map' else 'one of them'} resampled."
            )
        require_resampling(raster, whole)
