"""Tiny archives of SSL4EO-S12 v1.0 (GeoTIFF) and v1.1 (zarr in zip) in their exact layouts, made at test time."""

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_BANDS_L1C, OPTICAL_RESOLUTION

VV_DB, VH_DB = -12.75, -19.25

# Sorted by name, the scenes of the two sensors are in opposite orders of time.
EARLY, LATE = "20200604T054639_20200604T054831_T43RCP", "20200813T054639_20200813T054952_T43RCP"
SAR_LATE = "S1A_IW_GRDH_1SDV_20200903T131212_20200903T131237_034195_03F8F5_AC1C"
SAR_EARLY = "S1B_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFBA_D457"
PIXEL = (0.00010141, -0.00008797)  # degrees of longitude and latitude, of Sentinel-2 in the official sample
SAR_PIXEL = (0.00010217, -0.0000883)
CORNER = (73.2925443, 30.4755733)
SAR_CORNER = (73.2921398, 30.4758364)  # a few pixels off, as in the official sample


def write_band(path: Path, values: np.ndarray, pixel: tuple[float, float], corner: tuple[float, float]) -> None:
    """Write one band (height, width) in degrees; `pixel` is for 264 pixels a side."""
    size, factor = len(values), 264 // len(values)
    transform = rasterio.Affine(pixel[0] * factor, 0, corner[0], 0, pixel[1] * factor, corner[1])
    profile = {"driver": "GTiff", "count": 1, "height": size, "width": size, "dtype": values.dtype}
    with rasterio.open(path, "w", crs="EPSG:4326", transform=transform, compress="deflate", **profile) as file:
        file.write(values, 1)


def band_value(band: str) -> int:
    """Digital number of the first pixel of a band; tells the bands apart."""
    return 300 + 100 * OPTICAL_BANDS_L1C.index(band)


def write_sar_scene(folder: Path, corner: tuple[float, float] = SAR_CORNER) -> None:
    folder.mkdir(parents=True)
    for band, level in (("VH", VH_DB), ("VV", VV_DB)):
        write_band(folder / f"{band}.tif", np.full((264, 264), level, np.float32), SAR_PIXEL, corner)


def write_optical_scene(folder: Path, bands: tuple[str, ...], resampled: bool = False) -> None:
    """The bands of a Sentinel-2 scene: `band_value` plus the column of the native pixel."""
    folder.mkdir(parents=True)
    for band in bands:
        size = 264 if resampled else 2640 // OPTICAL_RESOLUTION[band]
        values = np.tile(band_value(band) + np.arange(size, dtype=np.uint16), (size, 1))
        write_band(folder / f"{band.replace('B0', 'B')}.tif", values, PIXEL, CORNER)


def make_ssl4eo(root: Path, resampled: bool = False) -> Path:
    """SSL4EO-S12 v1.0: location 0000200 with two scenes of each sensor, 0000007 with one of each.

    0000007 has no Level-1C scene.
    """
    for location, sar, optical in (
        ("0000200", (SAR_LATE, SAR_EARLY), (EARLY, LATE)),
        ("0000007", (SAR_LATE,), (LATE,)),
    ):
        for scene in sar:
            write_sar_scene(root / "s1" / location / scene)
        for scene in optical:
            write_optical_scene(root / "s2a" / location / scene, OPTICAL_BANDS, resampled)
    write_optical_scene(root / "s2c" / "0000200" / EARLY, OPTICAL_BANDS_L1C, resampled)
    return root


LOCATIONS = ("0194630", "0024410", "0100003")
"""In the order of the file, which is not sorted."""

OPTICAL_TIMES = np.array(["2020-01-05T10:00", "2020-04-05T10:00", "2020-07-05T10:00", "2020-10-05T10:00"], "M8[s]")
SAR_SEASONS = (2, 0, 3, 1)
"""Season of Sentinel-2 to which each of the Sentinel-1 times belongs: they are not in chronological order."""

SAR_TIMES = OPTICAL_TIMES[list(SAR_SEASONS)] + np.timedelta64(36, "h")
UNITS = {"days": "D", "hours": "h", "minutes": "m", "seconds": "s", "milliseconds": "ms", "nanoseconds": "ns"}
MODALITIES = {"S1GRD": ("vv", "vh"), "S2L2A": OPTICAL_BANDS, "S2L1C": OPTICAL_BANDS_L1C}


def seasonal_pixels(modality: str, bands: tuple[str, ...]) -> np.ndarray:
    """Pixels (locations, 4, bands, 264, 264), the value of each a function of all its five indices."""
    location, season, row, column = np.ogrid[:3, :4, :264, :264]
    if modality == "S1GRD":
        level = {"vv": VV_DB, "vh": VH_DB}
        texture = location / 8 + season / 4 + (row + 2 * column) % 264 // 66 / 64
        return np.stack([level[band] + texture for band in bands], axis=2).astype(np.float16)
    texture = 1000 + 100 * location + 10 * season + (row + 2 * column) % 264 // 33
    return np.stack([texture + 1000 * OPTICAL_BANDS_L1C.index(band) for band in bands], axis=2).astype(np.int16)


def write_seasonal_file(
    path: Path,
    *,
    locations: tuple[str, ...] = LOCATIONS,
    chunks: tuple[int, ...] | None = None,
    bands: tuple[str, ...] | None = None,
    time_units: str | None = "nanoseconds since 1970-01-01",
    times: np.ndarray | None = None,
    compressor: str | None = "blosc",
    zarr_format: int = 2,
) -> None:
    """Write one `.zarr.zip` with the zarr package, as the official ones were; its modality is the name of its folder.

    `time_units` None stores `time` as datetime64.
    """
    import zarr
    from numcodecs import Blosc, Zstd

    modality = path.parent.name
    bands = MODALITIES[modality] if bands is None else bands
    sar = modality == "S1GRD"
    if times is None:
        times = np.tile(SAR_TIMES if sar else OPTICAL_TIMES, (len(locations), 1))
    start = "S1A_IW_GRDH_1SDV_" if sar else "S2A_MSIL2A_"
    places = np.array([int(name[-2:]) for name in locations])
    axis = 500_005 + 10.0 * np.arange(264) + 3000 * places[:, None]
    arrays = {
        "band": np.array(bands),
        "sample": np.array(locations),
        "x": axis,
        "y": axis[:, ::-1],
        "crs": np.full(len(locations), 32633),
        "center_lat": np.full(len(locations), 52.0),
        "file_id": np.char.add(start, np.datetime_as_string(times)),
    }
    if time_units is None:
        arrays["time"] = times.astype("M8[ns]")
    else:
        unit, reference = time_units.split(" since ")
        ticks = (times - np.datetime64(reference, "ns")) // np.timedelta64(1, UNITS[unit])
        arrays["time"] = ticks.astype(np.int64)
    pixels = seasonal_pixels(modality, bands)[: len(locations)]
    codec = {"blosc": Blosc("zstd", 1), "zstd": Zstd(1), None: None}[compressor] if zarr_format == 2 else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), zarr.storage.ZipStore(path, mode="w") as store:
        warnings.simplefilter("ignore")  # fixed-length strings are not in the specification of zarr 3
        group = zarr.create_group(store, zarr_format=zarr_format)
        array = group.create_array(
            "bands", shape=pixels.shape, dtype=pixels.dtype, chunks=chunks or (1, *pixels.shape[1:]), compressors=codec
        )
        array[:] = pixels
        for name, values in arrays.items():
            group.create_array(name, data=values, compressors=codec)
        if time_units is not None:
            group["time"].attrs["units"] = time_units


def make_ssl4eo_zarr(root: Path, **options: object) -> Path:
    """SSL4EO-S12 v1.1 with one file of three locations for training and one of another location for validation."""
    for modality in MODALITIES:
        folder = root / "train" / modality
        write_seasonal_file(folder / "ssl4eos12_train_seasonal_data_000012.zarr.zip", **options)
        folder = root / "val" / modality
        write_seasonal_file(folder / "ssl4eos12_val_seasonal_data_000001.zarr.zip", locations=("0000001",), **options)
    return root


def edit_member(path: Path, name: str, change: Callable[[bytes], bytes | None]) -> None:
    """Rewrite a zip file with one member changed, or without it where `change` gives None."""
    with zipfile.ZipFile(path) as file:
        members = {member: file.read(member) for member in file.namelist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            if content is not None:
                file.writestr(member, content)


def edit_json(path: Path, name: str, **changes: object) -> None:
    """Rewrite a zip file with keys of one JSON member changed."""
    edit_member(path, name, lambda content: json.dumps(json.loads(content) | changes).encode())
