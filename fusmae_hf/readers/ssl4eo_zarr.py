"""Reader of SSL4EO-S12 version 1.1: Sentinel-1 and Sentinel-2 patches of 246,144 locations in four seasons, as zarr.

Paper: Blumenstiel et al., "SSL4EO-S12 v1.1: A Multimodal, Multiseasonal Dataset for Pretraining, Updated"
(arXiv 2503.00168); of version 1.0: Wang et al. 2023 (arXiv 2211.07044). Format: zarr version 2 in zip files, with
times as in the CF conventions. Licence: CC-BY-4.0.

What a file declares is checked before zarr unpacks it: sizes, and that no filter is run (one of them unpickles).
"""

import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.errors import PairError
from fusmae_hf.modeling.sensors_fusmae import BASELINE_0400_OFFSET, SAR_BANDS
from fusmae_hf.readers.geotiff import Patch, require_same_footprint
from fusmae_hf.readers.listed_pairs import ListedPairs, require_folders
from fusmae_hf.readers.ssl4eo import EXTRA_COLUMNS, LEVELS, MAX_DAYS_APART, PATCH_PIXELS, check_options, pair_by_time

SPLIT_FOLDERS = {"train": "train", "val": "validation"}
SAR_FOLDER = "S1GRD"
OPTICAL_FOLDERS = {"l2a": "S2L2A", "l1c": "S2L1C"}

MAX_SAMPLES = 64
"""Locations in a file."""

SEASONS = 4

MAX_MEMBER_BYTES = MAX_SAMPLES * SEASONS * 13 * PATCH_PIXELS**2 * 4
"""No member of a zip file can be larger: all pixels of all locations in one chunk."""

COMPRESSORS = ("blosc", "zstd")

_FILE_NAME = re.compile(r"ssl4eos12_(?:train|val)_seasonal_data_\d{6}\.zarr\.zip")
_STRINGS = r"<U\d{1,3}"
_TIME_UNITS = {
    "days": "D", "hours": "h", "minutes": "m", "seconds": "s",
    "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns",
}  # fmt: skip
_SINCE = re.compile(
    rf"({'|'.join(_TIME_UNITS)}) since (\d{{4}}-\d\d-\d\d)(?:[ T](\d\d:\d\d(?::\d\d(?:\.\d{{1,9}})?)?))?"
)


class SSL4EOS12Zarr(ListedPairs):
    """Pairs of SSL4EO-S12 v1.1: for each location, the seasons of both sensors that lie close in time.

    Files are `train/<modality>/ssl4eos12_train_seasonal_data_<number>.zarr.zip` and the same with `val`. Each holds
    64 locations in four seasons; the file of the same name in another modality holds the same locations. The seasons
    of Sentinel-1 are known to be out of order, so they are paired by the arrays `time`, never by index: the two
    closest first, then the closest of those that remain. A pair is named `<location>_<season of Sentinel-2>`.

    `sar` is float16 dB, (VV, VH); `optical` is int16 digital numbers of 12 (Level-2A) or 13 bands (Level-1C), all on
    the 10 m grid of 264x264 pixels as they are on disk. Both are put in order by the array `band`. `crs` and
    `transform` come from the arrays `crs`, `x` and `y`, and the names of the scenes from `file_id`, where a file has
    them for each location; they are None otherwise. There are no labels. `train/` and `val/` are the splits.

    Opening the dataset reads the small arrays of every file (a few milliseconds each, some 7,700 files in all) and no
    pixels. Pairs are in the order of the files. Reading them in that order is fastest: the last file of each sensor
    stays open, with the last chunk that was decompressed.

    Args:
        root: folder that holds `train/`, `val/` or both, with `S1GRD/` and `S2L2A/` or `S2L1C/` in each.
        level: Sentinel-2 product: `"l2a"` (surface reflectance, 12 bands) or `"l1c"` (top of atmosphere, 13 bands).
        max_days_apart: most days between the two scenes of a pair. The default is half the distance of two seasons.
        optical_offset: what must be subtracted from the optical values. The values of v1.1 carry the 1000 of
            processing baseline 04.00: the mean of B02 is 1924.9 on Level-2A, against 884.3 in v1.0.
        progress: show a progress bar while the files are opened.

    Raises:
        FileNotFoundError: a folder is missing; says where it was searched.
        ValueError: there is no pair, or an argument is none of its values.
        ImportError: zarr is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        level: Literal["l2a", "l1c"] = "l2a",
        max_days_apart: float = MAX_DAYS_APART,
        optical_offset: float = BASELINE_0400_OFFSET,
        progress: bool = False,
    ):
        require_zarr()
        super().__init__(root)
        check_options(level, max_days_apart)
        self._optical_folder = OPTICAL_FOLDERS[level]
        self.info = PairsInfo(
            name="ssl4eo-s12-v1.1",
            source=f"SSL4EO-S12 v1.1, Sentinel-1 GRD and Sentinel-2 {level.upper()} (Blumenstiel et al. 2025, "
            "arXiv 2503.00168)",
            license="CC-BY-4.0",
            sar_bands=SAR_BANDS,
            optical_bands=LEVELS[level][1],
            optical_offset=optical_offset,
            statistics="ssl4eo-s12-v1.1",
            extra_columns=EXTRA_COLUMNS,
            pixel_size=10.0,
        )
        self._held: dict[str, _SeasonalFile] = {}
        self._files = self._list_files()
        rows: list[tuple[int, int, int, int, int]] = []
        seen: dict[str, str] = {}
        for number, file in enumerate(tqdm(self._files, "Opening", unit=" files", disable=not progress, delay=2)):
            try:
                sar, optical = (_SeasonalFile(path, bands) for path, bands in self._paths_and_bands(file))
            except PairError as error:
                self._left_out.append((file, str(error)))
                continue
            rows += [(number, *row) for row in self._pair_up(file, sar, optical, seen, max_days_apart)]
        self._require_pairs(
            "SSL4EO-S12 v1.1",
            f"{len(self._files):,} files are there for both {SAR_FOLDER} and {self._optical_folder}. ",
            f"train/{SAR_FOLDER}/ssl4eos12_train_seasonal_data_000001.zarr.zip and the same in "
            f"train/{self._optical_folder}/, or both in val/ with `val` in the name",
        )
        self._rows = np.array(rows, dtype=np.int32)  # file, row in both files, season in both: there may be a million
        self.summary = (
            f"Found {len(self.ids):,} pairs of scenes within {max_days_apart:g} days in "
            f"{len({name.rpartition('_')[0] for name in self.ids}):,} of the 246,144 locations in {self.root}."
        )

    def _list_files(self) -> list[str]:
        """`<folder of the split>/<file name>` of the files that both modalities have."""
        modalities = (SAR_FOLDER, self._optical_folder)
        present = [folder for folder in SPLIT_FOLDERS if (self.root / folder).is_dir()]
        if not present:
            require_folders(self.root, list(SPLIT_FOLDERS), "SSL4EO-S12 v1.1")
        files: list[str] = []
        for folder in present:
            folders = require_folders(self.root / folder, modalities, "SSL4EO-S12 v1.1")
            names = [{name for name in os.listdir(path) if _FILE_NAME.fullmatch(name)} for path in folders]
            files += [f"{folder}/{name}" for name in sorted(names[0] & names[1])]
            for modality, lacking in zip(modalities, (names[1] - names[0], names[0] - names[1]), strict=True):
                self._left_out += [(f"{folder}/{name}", f"{modality} lacks this file") for name in sorted(lacking)]
        return files

    def _paths_and_bands(self, file: str) -> list[tuple[Path, tuple[str, ...]]]:
        """Path and bands of a file of Sentinel-1, then of Sentinel-2."""
        folder, name = file.split("/")
        return [
            (self.root / folder / SAR_FOLDER / name, self.info.sar_bands),
            (self.root / folder / self._optical_folder / name, self.info.optical_bands),
        ]

    def _pair_up(
        self, file: str, sar: "_SeasonalFile", optical: "_SeasonalFile", seen: dict[str, str], max_days: float
    ) -> Iterator[tuple[int, int, int, int]]:
        """Row and season in both files of each pair, the ids of which are appended; the rest is left out."""
        sar_rows = {location: row for row, location in enumerate(sar.locations)}
        for location in sorted(sar_rows.keys() - set(optical.locations)):
            self._left_out.append((location, f"{file}: the Sentinel-2 file lacks it"))
        for optical_row, location in enumerate(optical.locations):
            if location not in sar_rows:
                self._left_out.append((location, f"{file}: the Sentinel-1 file lacks it"))
                continue
            if seen.setdefault(location, file) != file:
                self._left_out.append((location, f"in {file}, but already in {seen[location]}"))
                continue
            sar_row = sar_rows[location]
            pairs = pair_by_time(sar.days(sar_row), optical.days(optical_row), max_days)
            for sar_season, optical_season in pairs:
                self.ids.append(f"{location}_{optical_season}")
                yield sar_row, optical_row, sar_season, optical_season
            for other, used, name in (
                ("Sentinel-1", {season for _, season in pairs}, location),
                ("Sentinel-2", {season for season, _ in pairs}, f"{location}_{SAR_FOLDER}"),
            ):
                reason = f"no {other} scene of its location is left within {max_days:g} days"
                self._left_out += [(f"{name}_{season}", reason) for season in range(SEASONS) if season not in used]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}  # open files stay in their process

    def split_of(self, index: int) -> str | None:
        """`"train"` or `"validation"`."""
        return SPLIT_FOLDERS[self._files[self._rows[index, 0]].partition("/")[0]]

    def _ground_of(self, name: str) -> str:
        return name.rpartition("_")[0]  # seasons of a location

    def _read(self, index: int) -> Pair:
        number, sar_row, optical_row, sar_season, optical_season = self._rows[index].tolist()
        paths = self._paths_and_bands(self._files[number])
        sar, optical = (self._open(path, bands) for path, bands in paths)
        sar_patch = Patch(sar.patch(sar_row, sar_season), *sar.place(sar_row))
        optical_patch = Patch(optical.patch(optical_row, optical_season), *optical.place(optical_row))
        require_same_footprint(paths[0][0], sar_patch, paths[1][0], optical_patch)
        return Pair(
            id=self.ids[index],
            sar=sar_patch.values,
            optical=optical_patch.values,
            split=self.split_of(index),
            crs=optical_patch.crs,
            transform=optical_patch.transform,
            sar_time=f"{sar.times[sar_row, sar_season]}Z",
            optical_time=f"{optical.times[optical_row, optical_season]}Z",
            extra={
                "location": optical.locations[optical_row],
                "sar_scene": sar.scene(sar_row, sar_season),
                "optical_scene": optical.scene(optical_row, optical_season),
                "days_apart": abs(sar.days(sar_row)[sar_season] - optical.days(optical_row)[optical_season]),
            },
        )

    def _open(self, path: Path, bands: tuple[str, ...]) -> "_SeasonalFile":
        """The file of a sensor: the one that was read last, or another that takes its place."""
        held = self._held.get(path.parent.name)
        if held is None or held.path != path or held.process != os.getpid():  # a fork shares the position in the file
            held = self._held[path.parent.name] = _SeasonalFile(path, bands)
        return held


class _SeasonalFile:
    """One `.zarr.zip` file: the small arrays are read when it is opened, pixels by `patch`.

    Attributes:
        path: the file.
        process: number of the process that opened it.
        locations: name of each location.
        times: `(locations, 4)` datetime64[s], NaT where the time of a season is unknown.

    Raises:
        PairError: the file is missing, damaged or not as expected.
    """

    def __init__(self, path: Path, bands: tuple[str, ...]):
        zarr = require_zarr()
        self.path, self.process = path, os.getpid()
        with self._named("the file"):
            with zipfile.ZipFile(path) as members:
                largest = max(members.infolist(), key=lambda member: member.file_size)
            if largest.file_size > MAX_MEMBER_BYTES:
                raise ValueError(f"{largest.filename} has {largest.file_size:,} bytes unpacked")
            self._group = zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r", zarr_format=2)
        self._optional: dict[str, np.ndarray | None] = {}
        self._kept: tuple[tuple[slice, ...], np.ndarray] = ((), np.empty(0))
        shape = (None, SEASONS, len(bands), PATCH_PIXELS, PATCH_PIXELS)
        self._bands = self._array("bands", shape, "<f[24]" if bands == SAR_BANDS else "<[iu]2")
        size = self._bands.shape[0]
        names = [name.upper() for name in self._values(self._array("band", (len(bands),), _STRINGS)).tolist()]
        if sorted(names) != sorted(bands):
            raise PairError(f"{path}: expected the bands {list(bands)}, found {names}. Download it again.")
        self._order = [names.index(band) for band in bands]
        self.locations: list[str] = self._values(self._array("sample", (size,), _STRINGS)).tolist()
        if len(set(self.locations)) < size or not all(self.locations):
            raise PairError(f"{path}: `sample` does not name every location once: {self.locations}.")
        self.times = self._read_times((size, SEASONS))
        self._days = (self.times - np.datetime64(0, "s")) / np.timedelta64(1, "D")

    def days(self, row: int) -> list[float]:
        """Time of each season of a location in days, NaN where it is unknown."""
        return self._days[row].tolist()

    def patch(self, row: int, season: int) -> np.ndarray:
        """Pixels `(bands, 264, 264)`, in the order of the bands that were asked for. The last chunks are kept."""
        chunk = tuple(
            slice(index - index % size, index - index % size + size)
            for index, size in zip((row, season), self._bands.chunks, strict=False)
        )
        if self._kept[0] != chunk:
            with self._named("`bands`"):
                self._kept = chunk, self._bands[chunk]
        return self._kept[1][row - chunk[0].start, season - chunk[1].start][self._order]

    def scene(self, row: int, season: int) -> str | None:
        """Name of the scene of a season, where `file_id` holds it."""
        names = self._read_optional("file_id", self.times.shape, _STRINGS)
        return None if names is None else str(names[row, season])

    def place(self, row: int) -> tuple[str | None, tuple[float, ...] | None]:
        """CRS and transform of a location, from the coordinates of the centres of its pixels, or None for both."""
        crs = self._read_optional("crs", self.times.shape[:1], "<[iu][48]")
        x, y = (self._read_optional(name, (len(self.locations), PATCH_PIXELS), "<f8") for name in "xy")
        if crs is None or x is None or y is None:
            return None, None
        (a, c), (e, f) = (
            (step, float(axis[row, 0]) - step / 2)
            for axis in (x, y)
            for step in [float(axis[row, -1] - axis[row, 0]) / (PATCH_PIXELS - 1)]
        )
        return f"EPSG:{crs[row]}", (a, 0.0, c, 0.0, e, f)

    def _read_times(self, shape: tuple[int, ...]) -> np.ndarray:
        """The array `time`: stored as datetime64, or as integers with units as in the CF conventions."""
        array = self._array("time", shape, r"<i8|<M8\[(?:ns|us|ms|s)\]")
        values = self._values(array)
        if values.dtype.kind == "M":
            return values.astype("datetime64[s]")
        units = array.attrs.get("units")
        since = _SINCE.fullmatch(str(units))
        try:
            reference = np.datetime64(f"{since[2]}T{since[3] or '00:00:00'}" if since else None, "ns")
        except ValueError:  # a date such as 2020-13-01
            since = None
        if since is None:
            raise PairError(
                f"{self.path}: `time` holds integers with the units {units!r}, but datetime64 or integers with units "
                "such as 'days since 2020-01-01' or 'nanoseconds since 1970-01-01 00:00:00' are expected."
            )
        return (reference + values.astype(f"timedelta64[{_TIME_UNITS[since[1]]}]")).astype("datetime64[s]")

    def _read_optional(self, name: str, shape: tuple[int, ...], dtypes: str) -> np.ndarray | None:
        """An array, read once, or None where the file has none of this form."""
        if name not in self._optional:
            try:
                array = self._array(name, shape, dtypes)
            except PairError:
                array = None
            self._optional[name] = None if array is None else self._values(array)
        return self._optional[name]

    def _values(self, array: Any) -> np.ndarray:
        """All values of an array."""
        with self._named(f"`{array.basename}`"):
            values = array[...]
            if values.dtype.kind == "U" and values.view(np.uint32).max() > sys.maxunicode:
                raise ValueError("it holds no text")
        return values

    def _array(self, name: str, shape: tuple[int | None, ...], dtypes: str) -> Any:
        """An array, not yet read, that is declared with this shape (None: 1 to `MAX_SAMPLES`) and dtype."""
        with self._named(f"`{name}`"):
            array = self._group[name]
            found = (array.shape, array.chunks, array.dtype.str, [*array.filters], [*array.compressors])
        size, chunks, dtype, filters, compressors = found
        fits = (
            len(size) == len(shape)
            and all(n == e or (e is None and 1 <= n <= MAX_SAMPLES) for n, e in zip(size, shape, strict=True))
            and all(1 <= c <= n for c, n in zip(chunks, size, strict=True))
            and re.fullmatch(dtypes, dtype)
            and not filters
            and all(getattr(codec, "codec_id", None) in COMPRESSORS for codec in compressors)
        )
        if not fits:
            expected = [f"1 to {MAX_SAMPLES}" if n is None else n for n in shape]
            raise PairError(
                f"{self.path}: `{name}` is declared with shape, chunks, dtype, filters and compressors {found}, but "
                f"shape {expected}, chunks within it, dtype {dtypes}, no filters and the compressor "
                f"{', '.join(COMPRESSORS)} or none are expected. Download the file again."
            )
        return array

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Let errors of zarr, of its codecs and of zip name the file and what was read."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PairError(f"{self.path}: {what} cannot be read ({reason}). Download it again.") from error


def require_zarr() -> ModuleType:
    """Import zarr.

    Raises:
        ImportError: it is not installed; names the pip command.
    """
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "Reading .zarr.zip needs zarr, which is not installed. Install it "
            'with `pip install -e ".[data]"` in a clone of the repository.'
        ) from error
    return zarr
