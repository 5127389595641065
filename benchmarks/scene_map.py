"""What `fusmae map` adds to the time of the model, and how much memory it takes.

    python benchmarks/scene_map.py speed --size 2048
    python benchmarks/scene_map.py memory --sizes 5000x5000 25000x16700 2000x100000 100000x2000

`speed` maps a scene of noise (12 + 2 bands, GeoTIFF in tiles with deflate) with a fresh segmentation model, and prints
windows a second: of the model alone, on windows that lie in memory; of `map_scenes`; and of the loop that most people
write, which reads a window, predicts it, adds it up, and goes on. Rounds of the three follow each other.

`memory` maps sparse scenes with a stub in place of the model, each in a process of its own, and prints the largest
resident memory. A few squares and a full row of windows hold data; the rest is skipped, as in any scene.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GDAL_CACHEMAX", "256")
OPTICAL = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
SAR = ["VV", "VH"]
TILES = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
SQUARE = 512


def write(path: Path, bands: list[str], size: tuple[int, int], full: bool) -> str:
    """A scene of noise, or one that holds a few squares of it and is sparse elsewhere."""
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin

    rng, (height, width), optical = np.random.default_rng(0), size, len(bands) > 2
    profile: dict[str, Any] = TILES | {"count": len(bands), "height": height, "width": width, "sparse_ok": True}
    profile |= {"crs": "EPSG:32632", "transform": from_origin(600_000, 5_300_000, 10, 10), "bigtiff": "IF_SAFER"}
    profile |= {"dtype": "uint16", "nodata": 0} if optical else {"dtype": "float32", "nodata": float("nan")}
    with rasterio.open(path, "w", **profile) as file:
        for row in range(0, height, SQUARE):
            for column in range(0, width, SQUARE):
                if not full and row != height // 2 // SQUARE * SQUARE and (row, column) not in ((0, 0), (row, row)):
                    continue
                shape = (len(bands), min(SQUARE, height - row), min(SQUARE, width - column))
                values = rng.integers(200, 4000, shape) if optical else rng.normal(-12, 3, shape)
                window = ((row, row + shape[1]), (column, column + shape[2]))
                file.write(values.astype(profile["dtype"]), window=window)
        file.descriptions = bands
    return str(path)


def speed(size: int, preset: str, batch: int, rounds: int, threads: int) -> None:
    """Windows a second of the model, of `map_scenes`, and of a plain loop."""
    import numpy as np
    import rasterio
    import torch

    from fusmae_hf import FusMAEConfig, FusMAEForSemanticSegmentation, FusMAEImageProcessor, MapOptions, map_scenes
    from fusmae_hf.scenes.models import load_scene_model

    torch.set_num_threads(threads)
    options = MapOptions(
        optical_units="dn", optical_offset=0, sar_units="db", what=("classes", "probabilities"), batch_size=batch
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        optical, sar = (
            write(root / f"{name}.tif", bands, (size, size), True) for name, bands in (("o", OPTICAL), ("s", SAR))
        )
        config = FusMAEConfig.from_preset(preset, num_labels=5)
        torch.manual_seed(0)
        FusMAEForSemanticSegmentation(config).save_pretrained(root / "model")
        processor = FusMAEImageProcessor()
        processor.save_pretrained(root / "model")
        model = load_scene_model(root / "model", "cpu")
        height, width = model.window
        declared = {"optical_units": "dn", "optical_offset": 0, "sar_units": "db"}

        def windows() -> list[dict[str, torch.Tensor]]:
            with rasterio.open(optical) as first, rasterio.open(sar) as second:
                place = ((0, height), (0, width))
                images = {"optical": first.read(window=place), "sar": second.read(window=place)}
            return [model.normalised(images, declared)] * batch

        def of_model(number: int) -> float:
            given = windows()
            model.run(given, batch)
            started = time.perf_counter()
            for _ in range(0, number, batch):
                model.run(given, batch)
            return -(-number // batch) * batch / (time.perf_counter() - started)

        def of_map(out: Path) -> tuple[float, int]:
            started = time.perf_counter()
            [result] = map_scenes(root / "model", out, optical=optical, sar=sar, options=options, progress=False)
            return result.windows / (time.perf_counter() - started), result.windows

        def of_loop(step: int) -> float:
            started, done = time.perf_counter(), 0
            total = np.zeros((5, size, size), np.float32)
            with rasterio.open(optical) as first, rasterio.open(sar) as second:
                for row in range(0, size - height + 1, step):
                    for column in range(0, size - width + 1, step):
                        place = ((row, row + height), (column, column + width))
                        images = {"optical": first.read(window=place), "sar": second.read(window=place)}
                        found = model.run([model.normalised(images, declared)], 1)
                        total[:, row : row + height, column : column + width] += found[0]
                        done += 1
            return done / (time.perf_counter() - started)

        print(f"{preset}, windows of {height} px, {size}x{size} px, batches of {batch}, {threads} threads")
        print("| round | model alone | fusmae map | share | plain loop |\n|---|---|---|---|---|")
        for number in range(rounds):
            mapped, count = of_map(root / f"map-{number}")
            alone, loop = of_model(min(count, 256)), of_loop(height // 2)
            print(f"| {number + 1} | {alone:.1f} | {mapped:.1f} | {mapped / alone:.2f} | {loop:.1f} |", flush=True)


def memory(size: str) -> None:
    """Largest resident memory of the map of one sparse scene, with a stub; run in a process of its own."""
    import torch

    from fusmae_hf import FusMAEImageProcessor, MapOptions, map_scenes
    from fusmae_hf.scenes.models import SceneModel

    torch.set_num_threads(1)
    height, width = map(int, size.split("x"))
    stub = SceneModel(
        "stub", "stub", "classes", ("a", "b"), (128, 128), 16, 10.0, FusMAEImageProcessor(),
        lambda inputs: torch.softmax(next(iter(inputs.values()))[:, :2].float(), dim=1),
    )  # fmt: skip
    options = MapOptions(optical_units="dn", optical_offset=0, sar_units="db", what=("classes", "probabilities"))
    with tempfile.TemporaryDirectory() as folder:
        files = [write(Path(folder) / f"{len(bands)}.tif", bands, (height, width), False) for bands in (OPTICAL, SAR)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        started = time.perf_counter()
        [result] = map_scenes(
            stub, Path(folder) / "map", optical=files[0], sar=files[1], options=options, progress=False
        )
        peak, took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter() - started
    print(f"| {size} | {result.windows:,} | {took:.0f} | {before:.2f} | {peak:.2f} |", flush=True)


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "memory", "one"], help="`one` is a process of `memory`")
    parser.add_argument("--size", type=int, default=2048, help="side of the scene of `speed` in pixels")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["5000x5000", "25000x16700"], metavar="HEIGHTxWIDTH")
    arguments = parser.parse_args()
    if arguments.part == "speed":
        speed(arguments.size, arguments.preset, arguments.batch, arguments.rounds, arguments.threads)
    elif arguments.part == "one":
        memory(arguments.sizes[0])
    else:
        print("| scene, px | windows | s | GiB before | GiB at most |\n|---|---|---|---|---|", flush=True)
        for size in arguments.sizes:
            subprocess.run([sys.executable, __file__, "one", "--sizes", size], check=True)


if __name__ == "__main__":
    main()
