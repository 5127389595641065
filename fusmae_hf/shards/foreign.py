"""Shards that others wrote anew, such as filtered ones of HF Datasets, which lost what describes them."""

import dataclasses
import os
import re
from typing import Any

import fsspec
import pyarrow.parquet as pq

from fusmae_hf.shards.dataset_info import DatasetInfo, read_dataset_info
from fusmae_hf.shards.format import SMALL_COLUMNS, ShardRecord, content_hash
from fusmae_hf.vocabulary import SENSORS, SPLITS


def describe_foreign(root: str, like: str | os.PathLike[str], **storage: Any) -> DatasetInfo:
    """What a folder of Parquet files holds, whose rows are some of a prepared folder's.

    The split of a file is the first word of its name that is one, or of the folders above it; else `train`.

    Args:
        root: folder or URL.
        like: the prepared folder, whose bands, units, offset, classes and statistics the files have.
        storage: options of fsspec's file system, such as `token`.

    Raises:
        FileNotFoundError: there is no Parquet file, or `like` holds no shards.
        ValueError: a file has not the columns of a shard.
    """
    known = read_dataset_info(like)
    filesystem, folder = fsspec.url_to_fs(root, **storage)
    found = sorted(filesystem.glob(f"{folder}/*.parquet") + filesystem.glob(f"{folder}/**/*.parquet"))
    paths: dict[str, list[str]] = {}
    for path in dict.fromkeys(found):
        words = re.split(r"[^a-z]+", path.removeprefix(folder).lower())
        split = next((name for word in words for name in SPLITS if word == name), "train")
        paths.setdefault(split, []).append(path)
    if not paths:
        raise FileNotFoundError(f"There are no Parquet files in {root}.")
    lacking = {sensor: sum(known.no_data_pixels(split)[sensor] for split in known.splits) for sensor in SENSORS}
    statistics = {band: (number, mean, std**2 * number) for band, (number, mean, std) in known.statistics.items()}
    splits: dict[str, tuple[ShardRecord, ...]] = {}
    places: dict[str, str] = {}
    for split, of_split in paths.items():
        records = list[ShardRecord]()
        for number, path in enumerate(of_split):
            name = f"data/{split}-{number:05d}-of-{len(of_split):05d}.parquet"
            places[name] = filesystem.unstrip_protocol(path) if "://" in root else path
            with filesystem.open(path, "rb") as file:
                parquet = pq.ParquetFile(file)
                if missing := sorted(SMALL_COLUMNS.keys() - set(parquet.schema_arrow.names)):
                    raise ValueError(f"{path} has no columns {missing}, so it holds no pairs of {like}.")
                small = parquet.read(["checksum", *(f"{sensor}_shape" for sensor in SENSORS)])
                groups = [parquet.metadata.row_group(at).num_rows for at in range(parquet.num_row_groups)]
            if not len(small):
                continue
            records.append(
                ShardRecord(
                    name,
                    len(small),
                    tuple(rows for rows in groups if rows),
                    filesystem.info(path)["size"],
                    content_hash(small.column("checksum").to_pylist()),
                    lacking,
                    absent={sensor: small.column(f"{sensor}_shape").null_count for sensor in SENSORS},
                    statistics=statistics if split == "train" and not records else {},
                )
            )
        if records:
            splits[split] = tuple(records)
    return dataclasses.replace(known, splits=splits, left_out_reasons={}, preparation={}, places=places)
