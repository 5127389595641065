"""Tiny archives of BigEarthNet v1 and reBEN in their exact layouts, made at test time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION

# (Sentinel-1 patch, Sentinel-2 patch): sorted by name, neither list is in the order of the other.
V1_PAIRS = [
    ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_87_48", "S2B_MSIL2A_20180204T94161_57_38"),
    ("S1A_IW_GRDH_1SDV_20170617T064724_29UPU_4_55", "S2A_MSIL2A_20170617T113321_4_55"),
    ("S1B_IW_GRDH_1SDV_20170925T043256_35VPK_69_24", "S2A_MSIL2A_20170613T101031_87_48"),
]
# The Sentinel-1 name drops the leading zeros of row and column, the Sentinel-2 name keeps them.
REBEN_PAIRS = [
    ("S1A_IW_GRDH_1SDV_20170923T160313_35UMA_2_7", "S2B_MSIL2A_20170924T093019_N9999_R136_T35UMA_02_07"),
    ("S1A_IW_GRDH_1SDV_20180413T161957_34UEG_74_13", "S2A_MSIL2A_20180413T095031_N9999_R079_T34UEG_74_13"),
    ("S1B_IW_GRDH_1SDV_20170817T045637_34WFS_22_84", "S2B_MSIL2A_20170817T101019_N9999_R022_T34WFS_22_84"),
]
SPLITS = ["train", "validation", "test"]
# Backscatter with decimals, VV 7 dB above VH: an integer or swapped band shows.
VV_DB, VH_DB = -12.7, -19.3


def write_tif(
    path: Path, values: np.ndarray, resolution: int, corner: tuple[float, float] = (600_000, 5_800_000)
) -> None:
    """Write one band (height, width) as GeoTIFF in UTM zone 33N, uncompressed like the official files."""
    height, width = values.shape
    transform = rasterio.Affine(resolution, 0, corner[0], 0, -resolution, corner[1])
    profile = {"driver": "GTiff", "count": 1, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=transform, **profile) as file:
        file.write(values, 1)


def write_sar(folder: Path, corner: tuple[float, float]) -> None:
    folder.mkdir(parents=True)
    texture = np.sin(np.arange(120 * 120, dtype=np.float32)).reshape(120, 120)
    write_tif(folder / f"{folder.name}_VH.tif", np.float32(VH_DB) + texture, 10, corner)
    write_tif(folder / f"{folder.name}_VV.tif", np.float32(VV_DB) + texture, 10, corner)


def optical_value(band: str, row: np.ndarray, column: np.ndarray, resolution: int) -> np.ndarray:
    """Digital number of a band at a native pixel; tells the bands apart (100 and more) and the pixels apart."""
    return 300 + 100 * OPTICAL_BANDS.index(band) + (row + column) * resolution // 60


def write_optical(folder: Path, corner: tuple[float, float]) -> None:
    folder.mkdir(parents=True)
    for band in OPTICAL_BANDS:
        pixels = 1200 // OPTICAL_RESOLUTION[band]
        values = optical_value(band, *np.indices((pixels, pixels)), OPTICAL_RESOLUTION[band])
        write_tif(folder / f"{folder.name}_{band}.tif", values.astype(np.uint16), OPTICAL_RESOLUTION[band], corner)


def make_bigearthnet(root: Path) -> Path:
    """BigEarthNet-MM v1 with the pairs of `V1_PAIRS` and their split lists in `<root>/splits`."""
    labels = [["Peatbogs", "Continuous urban fabric"], ["Pastures"], ["Airports", "Rice fields", "Salines"]]
    for index, ((sar, optical), names) in enumerate(zip(V1_PAIRS, labels, strict=True)):
        corner = (600_000 + 1200 * index, 5_800_000)
        sar_folder, optical_folder = root / "BigEarthNet-S1-v1.0" / sar, root / "BigEarthNet-v1.0" / optical
        write_sar(sar_folder, corner)
        write_optical(optical_folder, corner)
        metadata = {"labels": names, "corresponding_s2_patch": optical, "acquisition_time": "2017-06-13T16:50:43"}
        (sar_folder / f"{sar}_labels_metadata.json").write_text(json.dumps(metadata))
        metadata = {"labels": names, "acquisition_date": "2017-06-13 10:10:31"}
        (optical_folder / f"{optical}_labels_metadata.json").write_text(json.dumps(metadata))
    lists = root / "splits"
    lists.mkdir()
    for name, (sar, optical) in zip(["train", "val", "test"], V1_PAIRS, strict=True):
        (lists / f"{name}.csv").write_bytes(f"{optical},{sar}\r\n".encode())
    (lists / "patches_with_seasonal_snow.csv").write_text(f"{V1_PAIRS[0][1]}\n")
    return root


def make_reben(root: Path, absent: int = 50) -> Path:
    """reBEN with the pairs of `REBEN_PAIRS` on disk and `absent` further ones in the metadata alone.

    Each patch has a reference map with a border of CLC code 523; the fourth optical patch on disk is a snowy one.
    """
    rows = []
    for index, ((sar, optical), split) in enumerate(zip(REBEN_PAIRS, SPLITS, strict=True)):
        corner = (600_000 + 1200 * index, 5_800_000)
        write_sar(root / "BigEarthNet-S1" / sar.rsplit("_", 3)[0] / sar, corner)
        write_optical(root / "BigEarthNet-S2" / optical.rsplit("_", 2)[0] / optical, corner)
        reference = np.full((120, 120), 311, dtype=np.uint16)
        reference[0] = 523
        maps = root / "Reference_Maps" / optical.rsplit("_", 2)[0] / optical
        maps.mkdir(parents=True)
        write_tif(maps / f"{optical}_reference_map.tif", reference, 10, corner)
        labels = ["Pastures", "Arable land"]
        rows.append({"patch_id": optical, "labels": labels, "split": split, "country": "Serbia", "s1_name": sar})
    snowy = rows[0] | {"patch_id": REBEN_PAIRS[0][1][:-5] + "11_12", "s1_name": REBEN_PAIRS[0][0][:-3] + "11_12"}
    copy_patch(root / "BigEarthNet-S2", rows[0]["patch_id"], snowy["patch_id"], 2)
    copy_patch(root / "BigEarthNet-S1", rows[0]["s1_name"], snowy["s1_name"], 3)
    copy_patch(root / "Reference_Maps", rows[0]["patch_id"], snowy["patch_id"], 2)
    pq.write_table(pa.Table.from_pylist([snowy]), root / "metadata_for_patches_with_snow_cloud_or_shadow.parquet")
    for index in range(absent):
        rows.append(rows[0] | {"patch_id": f"S2A_absent_{index}_0", "s1_name": f"S1A_absent_{index}_0"})
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")
    return root


def copy_patch(root: Path, old: str, new: str, parts: int) -> None:
    """Copy a patch folder of reBEN under another name, files included."""
    source, target = root / old.rsplit("_", parts)[0] / old, root / new.rsplit("_", parts)[0] / new
    shutil.copytree(source, target)
    for file in target.iterdir():
        file.rename(target / file.name.replace(old, new))
