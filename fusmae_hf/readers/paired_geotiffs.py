"""Reader of your own pairs: a SAR and an optical GeoTIFF of the same place, whole or cut into patches."""

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_UNITS, SAR_UNITS
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.listed_pairs import ListedPairs, require_one_of
from fusmae_hf.readers.pair_listing import list_by_manifest, list_by_patterns
from fusmae_hf.readers.rasters import (
    Grid,
    KeptFiles,
    Raster,
    open_raster,
    read_label_map,
    read_optical,
    read_sar,
    require_resampling,
)
from fusmae_hf.vocabulary import IMAGES

SKIPPED_BAND = "-"
"""Stands in a list of band names for a band of the files that is not given."""

_Resampling = Literal["bilinear", "nearest"]


class PairedGeoTIFFs(ListedPairs):
    """Pairs of a SAR and an optical GeoTIFF, found by their names or listed in a table.

    Nothing is guessed: bands, units and offset are given, grids that differ are an error unless you ask for
    resampling, and pairs are left out with the reason rather than repaired.

    Pixels keep the dtype of the files, with these exceptions. SAR without data becomes NaN, and for that integer SAR
    becomes float32 (float64 from 32 bit on) where its files have a no-data value or with `on_different_grids="warp"`;
    with `sar_units="linear"` zero and below are no data too. Optical pixels without data become 0 in all bands: those
    that are not finite or have the no-data value in any band or, if that value is 0, in all of them.

    Files on one grid (same CRS and size, corners within 1/100 pixel) are given as they are. With
    `on_different_grids="warp"` the others are resampled onto the grid of `target`, optical values rounded to their
    dtype, label maps always to the nearest pixel. Backscatter in dB is resampled as power: the mean of -5 dB and
    -25 dB is -8 dB, not -15 dB. Only pixels that both files cover have data.

    With `patch_size` each pair of files, then called a scene, is cut into windows. They are named
    `<id>_<row>_<column>` after their upper left pixel, five digits each; `extra` holds `scene`, `row` and `col`.
    Windows lie completely in the target grid: a remainder at the right and lower edge that is smaller than a window
    is not given. Scenes are never read as a whole.

    Args:
        root: folder to which `sar`, `optical`, `label_map` and `manifest` are relative.
        sar: pattern of the SAR files below `root`, such as `"s1/{id}.tif"`; further fields such as `{date}` may follow
            and become extra columns, `{split}` gives the split. Files whose fields agree are a pair.
        optical: pattern of the optical files, with the same fields.
        label_map: pattern of label maps (one band), with some or all of the fields.
        manifest: instead of patterns, a CSV or Parquet file with the columns `id`, `sar` and `optical`, optionally
            `label_map`, `labels` (separated by `;`), `split`, `sar_time`, `optical_time`, and any further ones, which
            become extra columns. Its paths are relative to its folder.
        sar_bands: names of all bands of the SAR files in their order; `"-"` for one that is not to be given.
        optical_bands: the same for the optical files.
        sar_units: `"db"`, `"linear"` (power) or `"raw"`.
        optical_units: `"dn"` (reflectance x 10,000), `"reflectance"` or `"raw"`.
        optical_offset: what must be subtracted from every optical value before use: 1000 for Sentinel-2 products of
            processing baseline 04.00 and later that still carry it.
        sar_no_data: value of SAR pixels without data; that of each file's tag by default.
        optical_no_data: value of optical pixels without data; that of each file's tag by default.
        class_names: names of the scene classes in the order of their indices, needed for `labels`.
        map_class_names: names of the classes 0, 1, ... of the label maps; other values are an error then.
        map_no_data: value of label maps that marks pixels without a class.
        map_units: units of label maps that hold a quantity (float) instead of classes.
        on_different_grids: `"error"` or `"warp"`.
        target: whose grid pairs are given on when their grids differ: `"optical"` or `"sar"`.
        resolution: size of a pixel of that grid in units of its CRS, if it shall differ from that of the files.
        resampling: `"bilinear"`, which averages where the grid is coarser than the file, or `"nearest"`.
        patch_size: side of a window in pixels; whole files by default.
        stride: distance of windows in pixels; `patch_size` by default.
        max_no_data: `read` refuses windows, or whole files, in which a larger share of the pixels has no data in
            either sensor.
        name: short name of the dataset.
        source: where the imagery comes from.
        license: licence of the imagery.

    Raises:
        FileNotFoundError: a folder or the manifest are missing; says where they were searched.
        ValueError: an option, pattern or manifest is wrong, or no pair is complete.
        ImportError: rasterio is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        sar: str | None = None,
        optical: str | None = None,
        label_map: str | None = None,
        manifest: str | Path | None = None,
        sar_bands: Sequence[str] = (),
        optical_bands: Sequence[str] = (),
        sar_units: Literal["db", "linear", "raw"] | None = None,
        optical_units: Literal["dn", "reflectance", "raw"] | None = None,
        optical_offset: float = 0.0,
        sar_no_data: float | None = None,
        optical_no_data: float | None = None,
        class_names: Sequence[str] = (),
        map_class_names: Sequence[str] = (),
        map_no_data: int | None = None,
        map_units: str | None = None,
        on_different_grids: Literal["error", "warp"] = "error",
        target: Literal["optical", "sar"] = "optical",
        resolution: float | None = None,
        resampling: _Resampling = "bilinear",
        patch_size: int | None = None,
        stride: int | None = None,
        max_no_data: float = 0.0,
        name: str = "paired_geotiffs",
        source: str = "own GeoTIFFs",
        license: str = "not stated",
    ):
        require_rasterio()
        super().__init__(root)
        require_one_of("sar_units", sar_units, SAR_UNITS)
        require_one_of("optical_units", optical_units, OPTICAL_UNITS)
        require_one_of("on_different_grids", on_different_grids, ("error", "warp"))
        require_one_of("target", target, ("optical", "sar"))
        require_one_of("resampling", resampling, get_args(_Resampling))
        if resolution is not None and (on_different_grids != "warp" or not 0 < resolution < math.inf):
            raise ValueError(f"resolution={resolution} must be positive, and needs on_different_grids='warp'.")
        if not 0 <= max_no_data <= 1:
            raise ValueError(f"max_no_data is {max_no_data}, but must be a share between 0 and 1.")
        if (stride is not None and patch_size is None) or any(
            pixels is not None and pixels < 1 for pixels in (patch_size, stride)
        ):
            raise ValueError(f"{patch_size=} and {stride=}: both must be at least 1, and stride needs patch_size.")
        self._bands = {"sar": _band_numbers("sar", sar_bands), "optical": _band_numbers("optical", optical_bands)}
        self._num_bands = {"sar": len(sar_bands), "optical": len(optical_bands)}
        self._no_data = {"sar": sar_no_data, "optical": optical_no_data}
        self._warp, self._target, self._resolution = on_different_grids == "warp", target, resolution
        self._resampling, self._max_no_data = resampling, max_no_data
        self._patch_size, self._stride = patch_size, stride or patch_size or 1

        if manifest is not None and (sar, optical, label_map) == (None, None, None):
            listing = list_by_manifest(self.root / manifest, class_names)
        elif manifest is None and sar and optical:
            listing = list_by_patterns(self.root, sar, optical, label_map)
        else:
            raise ValueError(
                "Give either the patterns sar= and optical=, such as 's1/{id}.tif' and 's2/{id}.tif', or manifest=, a "
                "table with the columns id, sar and optical."
            )
        extra_columns = listing.extra_columns
        if patch_size is not None:
            if taken := sorted({"scene", "row", "col"} & extra_columns.keys()):
                raise ValueError(f"The extra columns {taken} are given to windows by patch_size: rename yours.")
            extra_columns = extra_columns | {"scene": "string", "row": "int64", "col": "int64"}
        self.info = PairsInfo(
            name=name,
            source=source,
            license=license,
            sar_bands=tuple(band for band in sar_bands if band != SKIPPED_BAND),
            optical_bands=tuple(band for band in optical_bands if band != SKIPPED_BAND),
            sar_units=str(sar_units),
            optical_units=str(optical_units),
            optical_offset=optical_offset,
            class_names=tuple(class_names),
            map_class_names=tuple(map_class_names),
            map_no_data=map_no_data,
            map_units=map_units,
            extra_columns=extra_columns,
        )
        self._table, self._left_out = listing.table, listing.left_out
        self._kept = KeptFiles()
        self._list_windows()
        self._require_pairs("Paired GeoTIFFs", "", "files that fit the patterns or the manifest")

    def _list_windows(self) -> None:
        """Name the pairs: scenes, or windows of them, which takes the header of one file a scene."""
        scenes = self._table["id"].to_pylist()
        self.ids = scenes
        self.summary = f"Found {len(scenes):,} pairs of files in {self.root}."
        if self._patch_size is None:
            return
        self.ids, self._starts, self._columns = [], [], []
        for number, scene in enumerate(scenes):
            rows, columns = range(0), range(0)
            try:
                with ExitStack() as files:
                    grid = self._target_grid(self._open(files, number, self._target))
                rows, columns = (
                    range(0, size - self._patch_size + 1, self._stride) for size in (grid.height, grid.width)
                )
                if not rows or not columns:
                    self._left_out.append(
                        (scene, f"{grid.height}x{grid.width} px are less than a window of {self._patch_size} px")
                    )
            except PairError as error:
                self._left_out.append((scene, str(error)))
            self._starts.append(len(self.ids))
            self._columns.append(columns)
            self.ids += [f"{scene}_{row:05d}_{column:05d}" for row in rows for column in columns]
        self.summary = (
            f"Found {len(scenes):,} pairs of files in {self.root}, cut into {len(self.ids):,} windows of "
            f"{self._patch_size}x{self._patch_size} px every {self._stride} px."
        )

    def _scene(self, index: int) -> int:
        """Row of the listing to which a pair belongs."""
        if self._patch_size is None:
            return range(len(self.ids))[index]
        return bisect_right(self._starts, range(len(self.ids))[index]) - 1

    def split_of(self, index: int) -> str | None:
        """Split that the manifest or the field `{split}` gives, or None."""
        return self._table["split"][self._scene(index)].as_py()

    def _read(self, index: int) -> Pair:
        number = self._scene(index)
        row = self._table.slice(number, 1).to_pylist()[0]
        with self._opened(number) as rasters:
            whole = self._target_grid(rasters[self._target])
            top, left, height, width = 0, 0, whole.height, whole.width
            extra = {name: row[name] for name in self.info.extra_columns if name in row}
            if self._patch_size is not None:
                columns = self._columns[number]
                step, place = divmod(range(len(self.ids))[index] - self._starts[number], len(columns))
                top, left, height, width = step * self._stride, columns[place], self._patch_size, self._patch_size
                extra |= {"scene": row["id"], "row": top, "col": left}
            self._require_grids(rasters, whole)
            window = (top, left, height, width)
            sar = read_sar(
                rasters["sar"],
                whole,
                window,
                units=self.info.sar_units,
                resampling=self._resampling if self._warp else None,
            )
            optical = read_optical(rasters["optical"], whole, window, resampling=self._resampling)
            label_map = (
                read_label_map(rasters["label_map"], whole, window, self.info) if "label_map" in rasters else None
            )
        self._require_data(row, sar, optical)
        grid = whole.window(*window)
        return Pair(
            id=self.ids[index],
            sar=sar,
            optical=optical,
            labels=row["labels"],
            label_map=label_map,
            split=row["split"],
            crs=grid.crs.to_string() if grid.crs else None,
            transform=grid.transform if grid.crs else None,
            sar_time=row["sar_time"],
            optical_time=row["optical_time"],
            extra=extra,
        )

    @contextmanager
    def _opened(self, number: int) -> Iterator[dict[str, Raster]]:
        """Open files of a listed pair by kind. Those of a scene stay open until another one is read."""
        kept, key = self._kept, (os.getpid(), number)
        if kept.key != key:
            kept.close()
            with ExitStack() as files:
                kinds = [kind for kind in IMAGES if self._table[kind][number].is_valid]
                kept.rasters = {kind: self._open(files, number, kind) for kind in kinds}
                kept.key, kept.files = key, files.pop_all()
        try:
            yield kept.rasters
        finally:
            if self._patch_size is None:
                kept.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._kept = KeptFiles()

    def _open(self, files: ExitStack, number: int, kind: str) -> Raster:
        """Open the SAR, optical or label map file of a listed pair, until `files` is closed."""
        path = Path(self._table[kind][number].as_py())
        raster = open_raster(files, path, self._num_bands.get(kind, 1), self._bands.get(kind, [1]))
        no_data = self._no_data.get(kind)
        return raster if no_data is None else replace(raster, no_data=no_data)

    def _target_grid(self, raster: Raster) -> Grid:
        """Grid on which pairs are given, from the file of the sensor `target`."""
        if self._resolution is None:
            return raster.grid
        try:
            return raster.grid.at_resolution(self._resolution)
        except ValueError as error:
            raise PairError(f"{raster.path}: {error}.") from error

    def _require_grids(self, rasters: dict[str, Raster], whole: Grid) -> None:
        """Refuse files that are not on the grid of the pair, unless they can be resampled onto it."""
        for kind, raster in rasters.items():
            if raster.grid.same_as(whole):
                continue
            if not self._warp:
                raise PairError(
                    f"{raster.path} is not on the grid of {rasters[self._target].path}: {raster.grid}, but {whole}. "
                    "Bring them onto one grid, or pass on_different_grids='warp' to have "
                    f"{'it' if kind == 'label_map' else 'one of them'} resampled."
                )
            require_resampling(raster, whole)

    def _require_data(self, row: dict, sar: np.ndarray, optical: np.ndarray) -> None:
        """Refuse a pair in which more than `max_no_data` of the pixels have no data in either sensor."""
        missing = ~np.isfinite(sar).all(axis=0) | (optical == 0).all(axis=0)
        if missing.mean() > self._max_no_data:
            raise PairError(
                f"{row['sar']} and {row['optical']}: {missing.mean():.1%} of {missing.size:,} pixels have no data in "
                f"SAR or optical, more than max_no_data={self._max_no_data:g}."
            )


def _band_numbers(sensor: str, names: Sequence[str]) -> list[int]:
    """Numbers, from 1, of the bands that have a name."""
    named = [name for name in names if name != SKIPPED_BAND]
    if isinstance(names, str) or not named or len(set(named)) < len(named):
        raise ValueError(
            f"{sensor}_bands is {names!r}, but must name every band of the {sensor} files in their order, each name "
            f"once and {SKIPPED_BAND!r} for one to be skipped, such as ['VV', 'VH']."
        )
    return [number for number, name in enumerate(names, 1) if name != SKIPPED_BAND]
