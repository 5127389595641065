"""The command `fusmae stats`: statistics of each band."""

import argparse
import json
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command


def add_stats(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae stats`."""
    command = add_command(
        commands,
        parents,
        "stats",
        "compute the statistics of each band",
        "Compute mean, standard deviation, range and percentiles of each band in one pass, for the image\n"
        "processor to normalise with. Only the training split is read unless told otherwise: statistics must\n"
        "not see the pairs that a model is judged by. Figures are in dB and, with the declared offset\n"
        "subtracted, in digital numbers. Pixels without data do not count; a pixel of a coarser band counts as\n"
        "often as it covers the grid.",
        "fusmae stats shards/ --json statistics.json --processor checkpoint/",
    )
    command.add_argument("shards", help="folder written by `fusmae prepare`, its URL, or <user>/<name> on the Hub")
    command.add_argument("--split", default="train", help="split to read (default train)")
    command.add_argument(
        "--max-pairs", type=int, metavar="N", help="read at most N pairs, spread over the split (default all)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    command.add_argument(
        "--processor",
        type=Path,
        metavar="FOLDER",
        help="put mean and std into the preprocessor_config.json of this folder, or start one there",
    )
    command.add_argument(
        "--embeddings",
        type=Path,
        metavar="CHECKPOINT",
        help="instead of bands, measure the range of this checkpoint's embeddings, which `fusmae map --what "
        "embeddings --embedding-dtype uint8` needs; written into its folder",
    )
    command.add_argument(
        "--num-proc", type=int, default=1, metavar="N", help="row groups read at the same time (default 1)"
    )
    command.set_defaults(run=_stats)


def _stats(arguments: argparse.Namespace) -> int:
    if arguments.embeddings:
        from fusmae_hf.embeddings.ranges import measure_quantisation

        record = measure_quantisation(
            arguments.embeddings, arguments.shards, arguments.split, max_pairs=arguments.max_pairs
        )
        print(f"Range of each dimension: {record}")
        return 0
    from fusmae_hf.preparation.statistics import band_statistics, write_processor
    from fusmae_hf.shards.loading import load_pairs

    statistics = band_statistics(
        arguments.shards,
        arguments.split,
        max_pairs=arguments.max_pairs,
        num_proc=arguments.num_proc,
        progress=True,
    )
    print(statistics)
    if arguments.json:
        arguments.json.write_text(json.dumps(statistics.to_json(), indent=1) + "\n")
        print(f"\nFigures: {arguments.json}")
    if arguments.processor:
        info = load_pairs(arguments.shards, arguments.split, streaming=True).info
        print(f"\nImage processor: {write_processor(statistics, info, arguments.processor)}")
    return 0
