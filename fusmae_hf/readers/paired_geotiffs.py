"""Reader of your own pairs: a SAR and an optical GeoTIFF of the same place, whole or cut into patches."""

import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo, Place
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_UNITS, SAR_UNITS
from fusmae_hf.readers.declarations import SKIPPED_BAND, Stated
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.grids import Grid
from fusmae_hf.readers.listed_pairs import ListedPairs, require_one_of
from fusmae_hf.readers.pair_listing import list_by_manifest, list_by_patterns
from fusmae_hf.readers.raster_files import KeptFiles, Raster, open_raster
from fusmae_hf.readers.rasters import (
    read_label_map,
    read_optical,
    read_sar,
    require_data,
    require_grids,
    require_one_place,
)
from fusmae_hf.readers.windows import Edges, Windows
from fusmae_hf.vocabulary import IMAGES, OF_SCENES, SENSORS

_Resampling = Literal["bilinear", "nearest"]

_LISTENED_TO = 20
"""Pairs whose files are tried, one after the other, for what the user did not state."""

_BYTES_READ_TOGETHER = 1 << 28


class PairedGeoTIFFs(ListedPairs):
    """Pairs of a SAR and an optical GeoTIFF, found by their names or listed in a table.

    Nothing is guessed: units are given, grids that differ are an error unless you ask for resampling, and pairs are
    left out with the reason rather than repaired. What files declare of themselves counts: no-data values, masks and
    alpha bands, band descriptions that name bands, scale and offset tags. Where you state the same it must agree, and
    where you state nothing it is taken from the files (of the first pair for what holds for all pairs).

    Files are those that rasterio opens: GeoTIFF, JPEG 2000, VRT and others, by their ending. Values are scaled as tags
    say; digital numbers stay as they are, and an offset that the tags imply becomes `optical_offset`.

    Pixels keep the dtype of the files, with these exceptions. Scaled values are float32 (float64 from 32 bit on). SAR
    without data becomes NaN, and for that integer SAR becomes float too where its files declare any or with
    `on_different_grids="warp"`; with `sar_units="linear"` zero and below are no data too. Optical pixels without data
    become 0 in all bands: those that are not finite or declared to be none in any band or, if 0 is the no-data value,
    in all of them.

    Files on one grid (same CRS and size, corners within 1/100 pixel) are given as they are. With
    `on_different_grids="warp"` the others are resampled onto the grid of `target`, optical values rounded to their
    dtype, label maps always to the nearest pixel. Backscatter in dB is resampled as power: the mean of -5 dB and
    -25 dB is -8 dB, not -15 dB. Only pixels that both files cover have data.

    With `patch_size` each pair of files, then called a scene, is cut into windows. They are named
    `<id>_<row>_<column>` after their upper left pixel, five digits each; `extra` holds `scene`, `row` and `col`.
    What remains at the right and lower edge is dropped, or given as `edges` says. Scenes are never read as a whole.

    Args:
        root: folder to which `sar`, `optical`, `label_map` and `manifest` are relative.
        sar: pattern of the SAR files below `root`, such as `"s1/{id}.tif"`; further fields such as `{date}` may follow
            and become extra columns, `{split}` gives the split. Files whose fields agree are a pair. `{band}` stands
            for the names of the bands: one file a band. Coarser bands are repeated onto the grid of the finest.
        optical: pattern of the optical files, with the same fields.
        label_map: pattern of label maps (one band), with some or all of the fields.
        manifest: instead of patterns, a CSV or Parquet file with the columns `id`, `sar` and `optical`, optionally
            `label_map`, `labels` (separated by `;`), `split`, `sar_time`, `optical_time`, and any further ones, which
            become extra columns. Its paths are relative to its folder.
        sar_bands: names of all bands of the SAR files in their order, without an alpha band; `"-"` for one that is not
            to be given. By default the descriptions in the files, which then need not have the same order.
        optical_bands: the same for the optical files.
        sar_units: `"db"`, `"linear"` (power) or `"raw"`.
        optical_units: `"dn"` (reflectance x 10,000), `"reflectance"` or `"raw"`.
        optical_offset: what must be subtracted from every optical value before use: 1000 for Sentinel-2 products of
            processing baseline 04.00 and later that still carry it. By default what the files' tags imply, or 0.
        sar_no_data: value of SAR pixels without data; that of each file's tag by default.
        optical_no_data: value of optical pixels without data; that of each file's tag by default.
        class_names: names of the scene classes in the order of their indices, needed for `labels`.
        map_class_names: names of the classes 0, 1, ... of the label maps; other values are an error then.
        map_no_data: value of label maps without a class, or a quantity (which becomes NaN); by default their tag.
        map_units: units of label maps that hold a quantity (float) instead of classes.
        on_different_grids: `"error"` or `"warp"`.
        target: whose grid pairs are given on when their grids differ: `"optical"` or `"sar"`.
        max_pixel_ratio: by how much the finest pixels of the two sensors may differ in size.
        resolution: size of a pixel of that grid in units of its CRS, if it shall differ from that of the files.
        resampling: `"bilinear"`, which averages where the grid is coarser than the file, or `"nearest"`.
        patch_size: side of a window in pixels; whole files by default.
        stride: distance of windows in pixels; `patch_size` by default.
        edges: what remains at the right and lower edge: `"drop"`; `"shift"`, the last window lies at the edge and
            overlaps the one before; or `"pad"`, it reaches beyond the edge, where there is no data.
        max_no_data: `read` refuses windows, or whole files, in which a larger share of the pixels has no data in
            either sensor.
        keep_single: keep files that fit a pattern without a partner of the other sensor.
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
        optical_offset: float | None = None,
        sar_no_data: float | None = None,
        optical_no_data: float | None = None,
        class_names: Sequence[str] = (),
        map_class_names: Sequence[str] = (),
        map_no_data: float | None = None,
        map_units: str | None = None,
        on_different_grids: Literal["error", "warp"] = "error",
        target: Literal["optical", "sar"] = "optical",
        max_pixel_ratio: float = 5.0,
        resolution: float | None = None,
        resampling: _Resampling = "bilinear",
        patch_size: int | None = None,
        stride: int | None = None,
        edges: Edges = "drop",
        max_no_data: float = 0.0,
        keep_single: bool = False,
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
        require_one_of("edges", edges, get_args(Edges))
        if resolution is not None and (on_different_grids != "warp" or not 0 < resolution < math.inf):
            raise ValueError(f"resolution={resolution} must be positive, and needs on_different_grids='warp'.")
        if not 0 <= max_no_data <= 1:
            raise ValueError(f"max_no_data is {max_no_data}, but must be a share between 0 and 1.")
        if (stride is not None and patch_size is None) or any(
            pixels is not None and pixels < 1 for pixels in (patch_size, stride)
        ):
            raise ValueError(f"{patch_size=} and {stride=}: both must be at least 1, and stride needs patch_size.")
        if edges != "drop" and patch_size is None:
            raise ValueError(f"{edges=} is for windows: it needs patch_size.")
        padded = edges == "pad"
        self._stated = {
            "sar": Stated("sar", sar_bands, no_data=sar_no_data, units=str(sar_units), padded=padded),
            "optical": Stated(
                "optical",
                optical_bands,
                no_data=optical_no_data,
                units=str(optical_units),
                offset=optical_offset,
                padded=padded,
            ),
            "label_map": Stated("label_map", no_data=map_no_data, units=map_units or "", padded=padded),
        }
        self._map_classes = range(len(map_class_names))
        self._implied_offset: float | None = None
        self._warp, self._target, self._resolution = on_different_grids == "warp", target, resolution
        self._order = sorted(SENSORS, key=lambda sensor: sensor != target)
        self._resampling, self._max_no_data, self._max_pixel_ratio = resampling, max_no_data, max_pixel_ratio
        self._windows = None if patch_size is None else Windows(patch_size, stride or patch_size, edges)

        if manifest is not None and (sar, optical, label_map) == (None, None, None):
            listing = list_by_manifest(self.root / manifest, class_names)
        elif manifest is None and sar and optical:
            bands = {sensor: self._stated[sensor].file_names for sensor in SENSORS}
            listing = list_by_patterns(self.root, sar, optical, label_map, bands, keep_single)
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
        self._table, self._left_out = listing.table, listing.left_out
        per_scene = tuple(name for name in OF_SCENES if self._table[name].null_count < len(self._table))
        if "optical_offset" in per_scene and optical_offset is None:
            self._stated["optical"] = replace(self._stated["optical"], offset=0.0)
        self._kept = KeptFiles()
        found = self._listen()
        has_maps = listing.table["label_map"].null_count < len(listing.table)
        if padded and has_maps and not map_units and found["map_no_data"] is None:
            raise ValueError("edges='pad' needs map_no_data (`--map-no-data`), the value beyond the edge of maps.")
        self.info = PairsInfo(
            name=name,
            source=source,
            license=license,
            sar_units=str(sar_units),
            optical_units=str(optical_units),
            class_names=tuple(class_names),
            map_class_names=tuple(map_class_names),
            map_units=map_units,
            extra_columns=extra_columns,
            per_scene=per_scene,
            **found,
        )
        for scene in self._table.select(OF_SCENES).group_by(list(OF_SCENES)).aggregate([]).to_pylist():
            self.info.of_scene(scene)  # refuses what cannot be
        self._list_windows()
        self._require_pairs("Paired GeoTIFFs", "", "files that fit the patterns or the manifest")

    def _listen(self) -> dict[str, Any]:
        """Fields of `PairsInfo`: as stated, and else as the files of the first pair that can be opened declare.

        Raises:
            ValueError: band names are neither stated nor declared.
        """
        optical, label_map = self._stated["optical"], self._stated["label_map"]
        rasters: dict[str, Raster] = {}
        pixel_size, problem = None, ""
        for number in range(min(len(self._table), _LISTENED_TO)):
            try:
                with ExitStack() as files:
                    kinds = [kind for kind in IMAGES if self._table[kind][number].is_valid]
                    opened = {kind: self._open(files, number, kind) for kind in kinds}
                    rasters = opened | rasters
                    if self._target in opened:
                        pixel_size = pixel_size or self._target_grid(opened[self._target]).pixel_metres()
            except PairError as error:
                problem = problem or str(error)
                continue
            if {"sar", "optical"} <= rasters.keys():
                break
        self.declares_no_data = {kind for kind, raster in rasters.items() if raster.may_lack_data}
        for sensor in SENSORS:
            stated = self._stated[sensor]
            if not stated.names:
                if sensor not in rasters:
                    raise ValueError(
                        f"{sensor}_bands ({stated.option}-bands) is needed: {problem or 'no file to ask'}"
                    )
                self._stated[sensor] = replace(stated, names=rasters[sensor].names, by_name=True)
        offset, map_no_data = optical.offset, label_map.no_data
        if offset is None and "optical" in rasters:
            offset = self._implied_offset = rasters["optical"].implied_offset
        self._stated["optical"] = replace(self._stated["optical"], offset=offset or 0.0)
        if label_map.units:
            map_no_data = None  # it becomes NaN
        elif map_no_data is None and "label_map" in rasters:
            tag = rasters["label_map"].no_data
            map_no_data = None if tag is None or not float(tag).is_integer() else int(tag)
            self._stated["label_map"] = replace(label_map, no_data=map_no_data)
        bands = {
            f"{sensor}_bands": tuple(name for name in self._stated[sensor].names if name != SKIPPED_BAND)
            for sensor in SENSORS
        }
        return bands | {"optical_offset": offset or 0.0, "map_no_data": map_no_data, "pixel_size": pixel_size}

    def _list_windows(self) -> None:
        """Name the pairs: scenes, or windows of them, which takes the header of one file a scene."""
        scenes = self._table["id"].to_pylist()
        self.ids = scenes
        self.summary = f"Found {len(scenes):,} pairs of files in {self.root}."
        if self._windows is None:
            return
        self.ids, patch = [], self._windows.size
        for number, scene in enumerate(scenes):
            found = self._grid_of(number)
            grid = None if isinstance(found, PairError) else found
            if isinstance(found, PairError):
                self._left_out.append((scene, str(found)))
            names = [f"{scene}_{row:05d}_{column:05d}" for row, column in self._windows.add_scene(grid)]
            if grid and not names:
                self._left_out.append((scene, f"{grid.height}x{grid.width} px are less than a window of {patch} px"))
            self.ids += names
        self.summary = f"{self.summary.removesuffix('.')}, {self._windows}."

    @property
    def reading_groups(self) -> np.ndarray | None:
        """For each pair a number that it shares with those to read next to it; None where the order costs nothing."""
        return self._windows.groups() if self._windows else None

    @property
    def rows_read_together(self) -> int:
        """Number of pairs that may wait in memory to be written in another order than they were read in."""
        bands, side = len(self.info.sar_bands + self.info.optical_bands), getattr(self._windows, "size", 1)
        return max(32, min(1024, _BYTES_READ_TOGETHER // (4 * bands * side**2)))

    def _grid_of(self, number: int) -> Grid | PairError:
        """Grid of a scene, from the header of one file, or why there is none."""
        try:
            with ExitStack() as files:
                kind = next(kind for kind in self._order if self._table[kind][number].is_valid)
                return self._target_grid(self._open(files, number, kind))
        except PairError as error:
            return error

    def places(self, indices: Sequence[int]) -> Iterator[Place | None]:
        """Where pairs lie, in the order given; None where no file tells."""
        of_scene = functools.lru_cache(4096)(self._grid_of)
        for number, index in zip(map(self._scene, indices), indices, strict=True):
            grid, window = of_scene(number), self._windows.window(index) if self._windows else None
            yield None if isinstance(grid, PairError) else grid.place(window, self._table["id"][number].as_py())

    def _scene(self, index: int) -> int:
        """Row of the listing to which a pair belongs."""
        index = range(len(self.ids))[index]
        return self._windows.scene(index) if self._windows else index

    def split_of(self, index: int) -> str | None:
        """Split that the manifest or the field `{split}` gives, or None."""
        return self._table["split"][self._scene(index)].as_py()

    def _read(self, index: int) -> Pair:
        number = self._scene(index)
        row = self._table.slice(number, 1).to_pylist()[0]
        with self._opened(number) as rasters:
            target = next(rasters[kind] for kind in self._order if kind in rasters)
            whole = self._target_grid(target)
            window = (0, 0, whole.height, whole.width)
            extra = {name: row[name] for name in self.info.extra_columns if name in row}
            if self._windows:
                window = self._windows.window(range(len(self.ids))[index])
                extra |= {"scene": row["id"], "row": window[0], "col": window[1]}
            require_grids(rasters, whole, target, self._warp)
            sar = optical = None
            if "sar" in rasters:
                units, resampling = row["sar_units"] or self.info.sar_units, self._resampling if self._warp else None
                sar = read_sar(rasters["sar"], whole, window, units=units, resampling=resampling)
            if "optical" in rasters:
                optical = read_optical(rasters["optical"], whole, window, resampling=self._resampling)
            label_map = (
                read_label_map(rasters["label_map"], whole, window, self.info) if "label_map" in rasters else None
            )
        require_data((row["sar"], row["optical"]), sar, optical, self._max_no_data)
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
            **{name: row[name] for name in (*OF_SCENES, "processing_baseline")},
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
                require_one_place(kept.rasters, self._max_pixel_ratio)
                kept.key, kept.files = key, files.pop_all()
        try:
            yield kept.rasters
        finally:
            if self._windows is None:
                kept.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._kept = KeptFiles()

    def _open(self, files: ExitStack, number: int, kind: str) -> Raster:
        """Open the SAR, optical or label map file of a listed pair, until `files` is closed."""
        stated = self._stated[kind]
        if kind in SENSORS and (units := self._table[f"{kind}_units"][number].as_py()):
            stated = replace(stated, units=units)
        if kind == "optical" and (offset := self._table["optical_offset"][number].as_py()) is not None:
            stated = replace(stated, offset=offset)
        raster = open_raster(files, Path(self._table[kind][number].as_py()), stated)
        if kind == "label_map" and self._stated[kind].no_data is None and raster.no_data in self._map_classes:
            raise PairError(
                f"{raster.path}: its tag says that {raster.no_data:g} is no data, but map_class_names has a class "
                f"{raster.no_data:g}. Give --map-no-data {raster.no_data:g} if it is none, or remove the tag: "
                "`rio edit-info --unset-nodata FILE`."
            )
        if kind == "optical" and self._implied_offset not in (None, raster.implied_offset):
            raise PairError(
                f"{raster.path}: its scale and offset tags imply no optical offset, but those of other files "
                f"{self._implied_offset:g}. State --optical-offset, or leave the file out."
            )
        return raster

    def _target_grid(self, raster: Raster) -> Grid:
        """Grid on which pairs are given, from the file of the sensor `target`."""
        if self._resolution is None:
            return raster.grid
        try:
            return raster.grid.at_resolution(self._resolution)
        except ValueError as error:
            raise PairError(f"{raster.path}: {error}.") from error
