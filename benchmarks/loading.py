"""How fast do shuffled batches leave the shards? Prints one table, with plain pyarrow read in order as the yardstick.

python benchmarks/loading.py --pairs 512
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from fusmae_hf import load_pairs
from fusmae_hf.data.collation import PairCollator
from fusmae_hf.data.preparation import prepare
from fusmae_hf.data.simulation import SimulatedPairs


def plain_pyarrow(folder: Path) -> Iterator[int]:
    """Row groups of every training shard in order, undecoded; their numbers of rows."""
    for file in sorted((folder / "data").glob("train-*.parquet")):
        shard = pq.ParquetFile(file)
        for group in range(shard.num_row_groups):
            yield shard.read_row_group(group, use_threads=False).num_rows


def batches(folder: Path, streaming: bool, batch_size: int) -> Iterator[int]:
    """One epoch of shuffled batches with masking noise, from opened shards; their sizes."""
    pairs = load_pairs(folder, "train", streaming=streaming)
    loader = DataLoader(
        pairs, batch_size=batch_size, sampler=pairs.sampler(batch_size), collate_fn=PairCollator(patch_size=8)
    )
    return (len(batch["id"]) for batch in loader)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=int, default=512, help="simulated pairs, of which 60 %% are read (default 512)"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one of warm-up (default 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(SimulatedPairs(arguments.pairs), folder)
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "pyarrow, in order, undecoded": lambda: plain_pyarrow(folder),
            "local, shuffled batches with noise": lambda: batches(folder, False, arguments.batch_size),
            "streaming, shuffled batches with noise": lambda: batches(folder, True, arguments.batch_size),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for round_number in range(arguments.rounds + 1):
            for way, read in ways.items():
                iterator = read()
                start = time.perf_counter()
                pairs = sum(iterator)
                if round_number:
                    rates[way].append(pairs / (time.perf_counter() - start))
    print("\n| way | pairs/s | against pyarrow |\n|---|---|---|")
    first = statistics.median(next(iter(rates.values())))
    for way, measured in rates.items():
        print(f"| {way} | {statistics.median(measured):,.0f} | {statistics.median(measured) / first:.2f} |")


if __name__ == "__main__":
    main()
