"""How fast do shuffled batches leave the shards, beside other ways to keep the same pairs? On one core.

python benchmarks/data_pipeline.py --pairs 1024

Prints tables on reading, storage, memory and preparing. Ratios are of the medians over interleaved
rounds of one run; the rates themselves depend on the machine.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import torch
from torch.utils.data import BatchSampler, DataLoader
from tqdm.auto import tqdm

from fusmae_hf import RowCollator, load_pairs, stream_pairs
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.pairs import Pair
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, OPTICAL_RESOLUTION, SAR_BANDS
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.readers.reben import ReBEN
from fusmae_hf.simulation.pairs import SimulatedPairs

BATCH_SIZE = 32


class MadeUpPairs(SimulatedPairs):
    """Pairs of 460 kB, 12 + 2 bands of 120x120 px, from a few simulated ones: what is read does not matter here."""

    def __init__(self, num_pairs: int):
        super().__init__(num_pairs)
        self._originals = [super(MadeUpPairs, self).read(index) for index in range(16)]

    def split_of(self, index: int) -> str:
        """All to train on."""
        return "train"

    def read(self, index: int) -> Pair:
        """A simulated pair under another name, without its label map."""
        original = self._originals[index % 16]
        return Pair(self.ids[index], original.sar, original.optical, extra=original.extra)


# --- ways to read; each yields the number of pairs as they come ------------------------------------------------------


def plain_pyarrow(shards: Path) -> Iterator[int]:
    """Row groups of every shard in order, undecoded."""
    for file in sorted(shards.glob("data/*.parquet")):
        shard = pq.ParquetFile(file)
        for group in range(shard.num_row_groups):
            yield shard.read_row_group(group, use_threads=False).num_rows


def batches(shards: Path, *, streaming: bool = False, packed: bool = False) -> Callable[[], Iterator[int]]:
    """Shuffled batches with masking noise, an epoch each time, of pairs that stay open as in training."""
    pairs = load_pairs(shards, "train", streaming=streaming)
    pairs.packed = packed
    loader = DataLoader(
        pairs, batch_size=BATCH_SIZE, sampler=pairs.sampler(BATCH_SIZE), collate_fn=PairCollator(patch_size=8)
    )

    def read() -> Iterator[int]:
        pairs.set_epoch(pairs.epoch + 1)
        return (len(batch["id"]) for batch in loader)

    return read


def plain_batches(shards: Path, *, streaming: bool) -> Iterator[int]:
    """The same batches from HF Datasets: of a shuffled stream of pairs, or of rows on the disk in random order."""
    files = sorted(map(str, shards.glob("data/*.parquet")))
    pairs = (
        stream_pairs(shards).shuffle(seed=0, buffer_size=256, max_buffer_input_shards=1)
        if streaming
        else datasets.load_dataset("parquet", data_files=files, split="train")
    )
    collator = RowCollator(shards, PairCollator(patch_size=8))
    return (len(batch["id"]) for batch in DataLoader(pairs, BATCH_SIZE, not streaming or None, collate_fn=collator))


def array3d(folder: Path, reader: MadeUpPairs) -> Callable[[], Iterator[int]]:
    """HF Datasets with `Array3D` columns in torch format, random batches."""
    features = datasets.Features(
        {"sar": datasets.Array3D((2, 120, 120), "float32"), "optical": datasets.Array3D((12, 120, 120), "uint16")}
    )
    pairs = [reader.read(index) for index in range(128)]
    columns = {"sar": [pair.sar for pair in pairs], "optical": [pair.optical for pair in pairs]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    rows = datasets.load_from_disk(folder).with_format("torch")

    def read() -> Iterator[int]:
        for indices in BatchSampler(torch.randperm(len(rows)).tolist(), BATCH_SIZE, drop_last=True):
            yield len(rows[indices]["optical"])

    return read


def shuffle_buffer(shards: Path, **options: int) -> Iterator[int]:
    """HF Datasets' stream of the same shards with `.shuffle(buffer_size=256)`, as many rows as we mix."""
    stream = datasets.load_dataset(
        "parquet", data_files=sorted(map(str, shards.glob("data/*.parquet"))), split="train", streaming=True
    )
    rows = iter(stream.select_columns(["sar", "optical"]).shuffle(seed=0, buffer_size=256, **options))
    while batch := list(islice(rows, BATCH_SIZE)):
        np.stack([np.frombuffer(row["optical"], np.uint16).reshape(12, 120, 120) for row in batch])
        np.stack([np.frombuffer(row["sar"], np.float32).reshape(2, 120, 120) for row in batch])
        yield len(batch)


def write_geotiffs(archive: Path, reader: MadeUpPairs, count: int) -> None:
    """The reBEN layout, one uncompressed GeoTIFF for each band in its own resolution, as in the archive."""
    rows = []
    for index in range(count):
        pair = reader.read(index)
        optical, sar = f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_{index:02d}_00", f"S1A_IW_{index:02d}_00"
        bands = [
            (archive / "BigEarthNet-S1" / "scene" / sar, band, pair.sar[n], 10) for n, band in enumerate(SAR_BANDS)
        ]
        for number, band in enumerate(OPTICAL_BANDS):
            metres = OPTICAL_RESOLUTION[band]
            coarse = np.ascontiguousarray(pair.optical[number, :: metres // 10, :: metres // 10])
            bands.append((archive / "BigEarthNet-S2" / optical[:-6] / optical, band, coarse, metres))
        for folder, band, values, metres in bands:
            folder.mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "count": 1, "height": len(values), "width": len(values)}
            transform = rasterio.Affine(metres, 0, 600_000 + 1200 * index, 0, -metres, 5_800_000)
            path = folder / f"{folder.name}_{band}.tif"
            with rasterio.open(
                path, "w", dtype=values.dtype, crs="EPSG:32633", transform=transform, **profile
            ) as file:
                file.write(values, 1)
        rows.append({"patch_id": optical, "s1_name": sar, "labels": ["Pastures"], "split": "train", "country": "-"})
    pq.write_table(pa.Table.from_pylist(rows), archive / "metadata.parquet")


def geotiffs(archive: Path, open_and_read: Callable[[Path], object]) -> Iterator[int]:
    """The 14 files of every pair, pairs in random order, each file opened and read."""
    folders = sorted(archive.glob("BigEarthNet-S2/*/*"))
    partners = sorted(archive.glob("BigEarthNet-S1/*/*"))
    for index in torch.randperm(len(folders)).tolist():
        for folder in (folders[index], partners[index]):
            for path in sorted(folder.iterdir()):
                open_and_read(path)
        yield 1


def with_rasterio(path: Path) -> object:
    """The pixels of one file."""
    with rasterio.open(path) as file:
        return file.read()


def with_tifffile(path: Path) -> object:
    """The pixels of one file."""
    import tifffile

    return tifffile.imread(path)


def with_imagecodecs(path: Path) -> object:
    """The pixels of one file."""
    import imagecodecs

    return imagecodecs.tiff_decode(path.read_bytes())


def prepared(archive: Path, out: Path) -> Iterator[int]:
    """`prepare` in this process, up to the last flush to the disk. What was there before is deleted uncounted."""
    shutil.rmtree(out, ignore_errors=True)
    reader = ReBEN(archive)
    return (len(reader) for _ in [0] if prepare(reader, out, progress=False))


# --- measuring ---------------------------------------------------------------------------------------------------


def measure(ways: dict[str, Callable[[], Iterator[int]]], rounds: int) -> dict[str, float]:
    """Median rate of each way, pairs/s, over interleaved rounds after one of warm-up; opening is not counted."""
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for round_number in tqdm(range(rounds + 1), "rounds", disable=None):
        for way, read in ways.items():
            iterator = read()
            start = time.perf_counter()
            pairs = sum(iterator)
            if round_number:
                rates[way].append(pairs / (time.perf_counter() - start))
    return {way: statistics.median(measured) for way, measured in rates.items()}


def print_rates(title: str, rates: dict[str, float]) -> None:
    """One Markdown table; ratios are to the first row."""
    first = next(iter(rates.values()))
    print(f"\n| {title} | pairs/s | ratio |\n|---|---|---|")
    for way, rate in rates.items():
        print(f"| {way} | {rate:,.0f} | {rate / first:.2f} |")


def anonymous_memory() -> float:
    """Memory of this process that is not a mapped file, in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1e3


def print_memory(shards: Path) -> None:
    """Memory after each of some epochs."""
    epochs = (1, 2, 3, 6)
    print(f"\n| memory after epoch, MB | {' | '.join(map(str, epochs))} |\n|---{'|---' * len(epochs)}|")
    for streaming in (False, True):
        read, used = batches(shards, streaming=streaming), {}
        for epoch in range(1, max(epochs) + 1):
            sum(read())
            used[epoch] = anonymous_memory()
        print(f"| {'streaming' if streaming else 'local'} | " + " | ".join(f"{used[e]:,.0f}" for e in epochs) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024, help="pairs of 460 kB in the shards (default 1024)")
    parser.add_argument("--patches", type=int, default=512, help="pairs kept as GeoTIFFs (default 512)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up (default 5)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files; that of the system by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as temporary:
        scratch = Path(temporary)
        datasets.config.HF_DATASETS_CACHE = scratch / "cache"
        shards, native, archive = scratch / "shards", scratch / "native", scratch / "archive"
        reader = MadeUpPairs(arguments.pairs)
        prepare(reader, shards, progress=False)
        write_geotiffs(archive, reader, arguments.patches)
        opening: dict[str, Callable[[], Iterator[int]]] = {
            "opened and read with imagecodecs": lambda: geotiffs(archive, with_imagecodecs),
            "opened and read with tifffile": lambda: geotiffs(archive, with_tifffile),
            "opened and read with rasterio": lambda: geotiffs(archive, with_rasterio),
            "`prepare`, one process": lambda: prepared(archive, scratch / "prepared"),
        }
        print_rates("preparing BigEarthNet patches", measure(opening, arguments.rounds))
        prepare(ReBEN(archive), native, progress=False)
        reading = {
            "pyarrow, in order, undecoded": lambda: plain_pyarrow(shards),
            "local: shuffled batches with noise": batches(shards),
            "streaming: shuffled batches with noise": batches(shards, streaming=True),
            "`stream_pairs`, `.shuffle(buffer_size=256)`, with noise": lambda: plain_batches(shards, streaming=True),
            "`load_dataset` rows, random batches with noise": lambda: plain_batches(shards, streaming=False),
            "`Array3D` columns, torch format": array3d(scratch / "array3d", reader),
            "`.shuffle(buffer_size=256)` of a stream": lambda: shuffle_buffer(shards),
            "the same, `max_buffer_input_shards=1`": lambda: shuffle_buffer(shards, max_buffer_input_shards=1),
            "GeoTIFFs, one for each band (rasterio)": lambda: geotiffs(archive, with_rasterio),
        }
        print_rates("reading, pairs of 460 kB", measure(reading, arguments.rounds))
        resolution = {
            "local, bands stored on the 10 m grid": batches(shards),
            "local, bands in their own resolution, brought to 10 m": batches(native),
            "the same, left for the device to bring to 10 m": batches(native, packed=True),
        }
        print_rates("storing coarse bands", measure(resolution, arguments.rounds))
        print_memory(shards)


if __name__ == "__main__":
    main()
