"""The command `fusmae map`: scenes become maps."""

import argparse
import os
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command
from fusmae_hf.readers.archives import names

INTERRUPTED = "Interrupted. Finished blocks are kept: run the same command again to go on."


def codes(text: str) -> list[int]:
    """Type of `--optical-mask-values`: `3,8,9`."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 3,8,9,10") from error


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "scene": {
        "optical": {"nargs": "+", "metavar": "FILE", "help": "optical scene; {band} in the name for one file a band"},
        "sar": {"nargs": "+", "metavar": "FILE", "help": "SAR scene; several files are neighbouring tiles"},
        "items": {"metavar": "TABLE", "help": "instead: CSV or Parquet with the columns id, optical and sar"},
        "optical_bands": {
            "type": names,
            "metavar": "NAMES",
            "help": "bands of the optical files in order, - skips one (default: their descriptions)",
        },
        "optical_units": {"choices": ["dn", "reflectance", "raw"], "help": "dn is reflectance x 10,000"},
        "optical_offset": {
            "type": float,
            "metavar": "DN",
            "help": "what was added to every value: 1000 for processing baseline 04.00 and later, else 0",
        },
        "optical_no_data": {"type": float, "metavar": "VALUE", "help": "value without data (default: the file's)"},
        "sar_bands": {"type": names, "metavar": "NAMES", "help": "bands of the SAR files in order"},
        "sar_units": {"choices": ["db", "linear", "raw"], "help": "units of the SAR files"},
        "sar_no_data": {"type": float, "metavar": "VALUE", "help": "value without data (default: the file's)"},
        "optical_mask": {"metavar": "FILE", "help": "raster that says where optical pixels are not used: clouds, say"},
        "optical_mask_values": {"type": codes, "metavar": "N,N", "help": "its values there (default: all but 0)"},
    },
    "map": {
        "what": {
            "type": names,
            "metavar": "NAMES",
            "help": "classes,probabilities,confidence, or values, or scores (default: the first that the checkpoint "
            "has); or embeddings, of any checkpoint",
        },
        "target": {"metavar": "optical|sar|FILE", "help": "whose grid the map has (default: the optical scene's)"},
        "crs": {"metavar": "CRS", "help": "another CRS, such as EPSG:32632"},
        "resolution": {"type": float, "metavar": "SIZE", "help": "another size of pixels, in units of the CRS"},
        "resampling": {"choices": ["bilinear", "nearest"], "help": "of what lies on another grid (default bilinear)"},
        "area": {"metavar": "FILE", "help": "GeoJSON of polygons outside of which nothing is mapped"},
        "bounds": {"type": float, "nargs": 4, "metavar": ("W", "S", "E", "N"), "help": "map this rectangle alone"},
        "bounds_crs": {"metavar": "CRS", "help": "of --bounds (default: that of the map)"},
        "probability_dtype": {"choices": ["float32", "uint8"], "help": "uint8: in steps of 1/254 (default float32)"},
        "any_resolution": {
            "action": "store_true",
            "help": "map pixels of another size than those of training, too",
        },
    },
    "embeddings": {
        "embedding_unit": {"choices": ["patch", "window"], "help": "what a vector is of (default patch)"},
        "embedding_sensors": {
            "type": names,
            "metavar": "NAMES",
            "help": "columns, some of fused,sar,optical: of all sensors, or one alone (default fused)",
        },
        "embedding_dtype": {
            "choices": ["float32", "float16", "uint8"],
            "help": "uint8 needs `fusmae stats SHARDS --embeddings CHECKPOINT` once (default float32)",
        },
        "optical_time": {"metavar": "TIME", "help": "when the optical scene was taken, in ISO 8601, to be noted"},
        "sar_time": {"metavar": "TIME", "help": "the same of the SAR scene"},
    },
    "work": {
        "overlap": {"type": int, "metavar": "PX", "help": "of windows, a multiple of the patch (default: about half)"},
        "tta": {"choices": ["none", "d4"], "help": "d4: mean over the eight symmetries of each window (default none)"},
        "batch_size": {"type": int, "metavar": "N", "help": "windows at once (default 8)"},
        "device": {"metavar": "DEVICE", "help": "such as cuda or cpu (default: a GPU where there is one)"},
        "num_workers": {"type": int, "metavar": "N", "help": "threads that read (default 2)"},
        "on_error": {
            "choices": ["stop", "skip"],
            "help": "stop where pixels cannot be read (default), or leave what touches them without data",
        },
        "engine": {
            "choices": ["local", "ray"],
            "help": "this machine (default), or the nodes of a Ray cluster, which all see the scenes and OUT",
        },
        "ray_address": {"metavar": "HOST:PORT", "help": "of the cluster (default: one is started on this machine)"},
        "overwrite": {"action": "store_true", "help": "delete the map that is in OUT and start anew"},
    },
}
"""Options by group: all but those that name files are fields of `MapOptions`."""


def add_map(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae map`."""
    command = add_command(
        commands,
        parents,
        "map",
        "map a scene with a fine-tuned checkpoint",
        "Predict a whole Sentinel-1 and Sentinel-2 scene, or either of them, window by window, and write\n"
        "cloud-optimised GeoTIFFs. Whatever interrupts it: run the same command again, and it goes on.\n"
        "Units must be said, and for dn the offset; nothing is guessed.",
        "fusmae map outputs/flood map/ --optical s2.tif --optical-units dn --optical-offset 1000 \\\n"
        "      --sar s1.tif --sar-units db",
        "fusmae map outputs/flood map/ --sar s1.tif --sar-units db --plan",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a fine-tuned checkpoint: a folder or a Hub id")
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the map: new, or to go on with")
    for title, options in OPTIONS.items():
        group = command.add_argument_group(title)
        for keyword, described in options.items():
            group.add_argument(f"--{keyword.replace('_', '-')}", dest=keyword, default=argparse.SUPPRESS, **described)
    command.add_argument("--plan", action="store_true", help="say what would be done, how long it takes, and stop")
    command.set_defaults(run=_map, interrupted=INTERRUPTED)


def _map(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("GDAL_CACHEMAX", "256")
    from fusmae_hf.scenes.mapping import map_scenes, plan_scenes
    from fusmae_hf.scenes.plan import MapOptions

    given = vars(arguments)
    options = {keyword: given[keyword] for group in OPTIONS.values() for keyword in group if keyword in given}
    scene = {keyword: options.pop(keyword) for keyword in ("optical", "sar", "items") if keyword in options}
    if arguments.plan:
        for text in plan_scenes(arguments.checkpoint, arguments.out, **scene, options=MapOptions(**options)):
            print(text)
        return 0
    results = map_scenes(arguments.checkpoint, arguments.out, **scene, options=MapOptions(**options))
    for result in results:
        print(result)
    return int(any(result.failed or result.error for result in results))
