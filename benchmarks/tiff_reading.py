"""Which library opens and reads the small GeoTIFFs of BigEarthNet fastest, and how do our readers compare?

Prints one table: pairs (14 files each, 15 with a reference map) per second on one core, and the ratio to the fastest
library. The libraries give pixels alone; the readers also check them and add labels, place and times. Each round reads
the same files in every way, in turn; the figures are medians over the rounds. After the first round, which is not
counted, the files come from memory.

python benchmarks/tiff_reading.py
python benchmarks/tiff_reading.py --root <folder of reBEN or BigEarthNet v1>
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import torch

try:
    import tifffile
except ImportError:
    tifffile = None
try:
    import imagecodecs
except ImportError:
    imagecodecs = None

from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION, SAR_BANDS
from fusmae_hf.readers import bigearthnet, reben
from fusmae_hf.readers.bigearthnet_patches import GRID_METRES, PATCH_METRES


def read_bytes(path: str) -> bytes:
    """The bytes of a file: the floor under every way to read it."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def read_with_rasterio(path: str) -> np.ndarray:
    """All bands by rasterio."""
    with rasterio.open(path) as file:
        return file.read()


def read_with_imagecodecs(path: str) -> np.ndarray:
    """All bands by imagecodecs, which decodes bytes."""
    return imagecodecs.tiff_decode(read_bytes(path))


def read_with_both(path: str) -> np.ndarray:
    """All bands by imagecodecs, but one of each patch by rasterio, for the place."""
    if not path.endswith(("_B02.tif", "_VV.tif")):
        return read_with_imagecodecs(path)
    with rasterio.open(path) as file:
        file.crs.to_string()
        return file.read()


def libraries() -> dict[str, Callable[[str], object]]:
    """How each installed library opens and reads a file."""
    ways: dict[str, Callable[[str], object]] = {"rasterio": read_with_rasterio}
    if tifffile is not None:
        ways["tifffile"] = tifffile.imread
    if imagecodecs is not None:
        ways["imagecodecs"] = read_with_imagecodecs
        ways["imagecodecs, place by rasterio"] = read_with_both
    for name in sorted({"tifffile", "imagecodecs"} - ways.keys()):
        print(f"{name} is not installed and left out: pip install {name}")
    return ways


def patch_folders(root: Path, optical: str, sar: str) -> tuple[Path, Path, Path]:
    """Folders of a pair in either layout: bands of the optical and the SAR patch, and the map that reBEN may have."""
    if (root / bigearthnet.OPTICAL_FOLDER).is_dir():
        return root / bigearthnet.OPTICAL_FOLDER / optical, root / bigearthnet.SAR_FOLDER / sar, root / "no maps"
    tile, scene = optical.rsplit("_", 2)[0], sar.rsplit("_", 3)[0]
    return (
        root / reben.OPTICAL_FOLDER / tile / optical,
        root / reben.SAR_FOLDER / scene / sar,
        root / reben.MAP_FOLDER / tile / optical,
    )


def make_reben(root: Path, pairs: int) -> None:
    """Noise in the layout of reBEN, in files like the official ones: a band each, uncompressed, UTM."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(pairs):
        sar, optical = f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{number}_0", f"S2A_20170613T101031_T33UUP_{number}_0"
        for folder, bands in zip(patch_folders(root, optical, sar), (OPTICAL_BANDS, SAR_BANDS), strict=False):
            folder.mkdir(parents=True)
            for band in bands:
                metres = OPTICAL_RESOLUTION.get(band, GRID_METRES)
                size = PATCH_METRES // metres
                values = generator.integers(1, 10_000, (size, size), np.uint16)
                if band in SAR_BANDS:
                    values = values.astype(np.float32) / -500
                place = rasterio.Affine(metres, 0, 600_000 + PATCH_METRES * number, 0, -metres, 5_800_000)
                profile = {"count": 1, "height": size, "width": size, "dtype": values.dtype, "transform": place}
                path = folder / f"{folder.name}_{band}.tif"
                with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", **profile) as file:
                    file.write(values, 1)
        rows.append({"patch_id": optical, "s1_name": sar, "labels": ["Pastures"], "split": "train", "country": "none"})
    pq.write_table(pa.Table.from_pylist(rows), root / reben.METADATA)


def consume(read: Callable[..., object], items: Iterable[object]) -> None:
    """Read one after the other; keep nothing."""
    for item in items:
        read(item)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="reBEN or BigEarthNet v1 (default: made-up files)")
    parser.add_argument("--pairs", type=int, default=48, help="pairs to read in each round (default 48)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, after one of warm-up (default 15)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root
        if root is None:
            root = Path(temporary)
            make_reben(root, arguments.pairs)
        is_v1 = (root / bigearthnet.OPTICAL_FOLDER).is_dir()
        reader = bigearthnet.BigEarthNet(root, progress=True) if is_v1 else reben.ReBEN(root)
        indices = range(min(arguments.pairs, len(reader)))
        pairs = [(reader.ids[index], reader.read_native(index).extra["sar_patch"]) for index in indices]
        files = [
            str(path)
            for optical, sar in pairs
            for folder in patch_folders(root, optical, sar)
            for path in sorted(folder.glob("*.tif"))
        ]
        known = libraries()
        ways: dict[str, Callable[[], None]] = {"bytes alone": partial(consume, read_bytes, files)}
        ways |= {name: partial(consume, read, files) for name, read in known.items()}
        ways["our read_native"] = partial(consume, reader.read_native, indices)
        ways["our read"] = partial(consume, reader.read, indices)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round_number in range(arguments.rounds + 1):
            for way, read in ways.items():
                start = time.perf_counter()
                read()
                if round_number:
                    seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(measured) for way, measured in seconds.items()}
    fastest = min(known, key=medians.__getitem__)
    print(f"{len(indices)} pairs, {len(files)} files, median of {arguments.rounds} rounds, one core")
    print(f"\n| way | pairs/s | us a pair | against {fastest} |\n|---|---|---|---|")
    for way, median in medians.items():
        rate = len(indices) / median
        print(f"| {way} | {rate:,.0f} | {1e6 / rate:,.0f} | {medians[fastest] / median:.2f} |")


if __name__ == "__main__":
    main()
