"""Small folders of shards, sound and damaged, for the tests of what is done with shards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusmae_hf.cli.main import build_parser
from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.shards.format import pair_checksum
from fusmae_hf.shards.writing import write_dataset_info, write_shard

INFO = PairsInfo(
    name="small",
    source="made by the tests (2024)",
    license="CC-BY-4.0",
    sar_bands=("VV", "VH"),
    optical_bands=("B02", "B03", "B04", "B05"),
    statistics="bigearthnet",
    class_names=("water", "forest", "town"),
)
SIZE = 8


def make_pair(number: int, info: PairsInfo = INFO, **fields: Any) -> Pair:
    """A plausible pair, always the same for the same number; keywords replace its fields."""
    generator = np.random.default_rng(number)
    sar = generator.normal([[[-12]], [[-19]]], 3, (2, SIZE, SIZE)).astype(np.float32)
    optical = generator.integers(1, 4000, (len(info.optical_bands), SIZE, SIZE)) + info.optical_offset
    optical = optical.astype(np.uint16)
    for band, factor in zip(optical, info.optical_factors, strict=False):
        band[:] = band[::factor, ::factor].repeat(factor, 0).repeat(factor, 1)
    labels = [info.class_names[number % 2]] if info.class_names else None
    return Pair(**{"id": f"pair-{number:03d}", "sar": sar, "optical": optical, "labels": labels} | fields)


def write_shards(
    folder: Path,
    info: PairsInfo = INFO,
    *,
    rows_per_shard: int = 6,
    row_group_rows: int = 4,
    **splits: Sequence[Pair],
) -> Path:
    """Write a prepared folder: 12 training and 4 test pairs, or those given by split."""
    if not splits:
        splits = {
            "train": [make_pair(number, info) for number in range(12)],
            "test": [make_pair(number, info) for number in range(12, 16)],
        }
    shards = []
    for split, pairs in splits.items():
        starts = range(0, len(pairs), rows_per_shard)
        for number, start in enumerate(starts):
            name = f"data/{split}-{number:05d}-of-{len(starts):05d}.parquet"
            of_file = pairs[start : start + rows_per_shard]
            shards.append(write_shard(of_file, info, folder, name, row_group_rows=row_group_rows))
    write_dataset_info(folder, info, shards)
    return folder


def edit_shard(path: Path, edit: Callable[[dict[str, list[Any]]], None], *, seal: bool = True) -> None:
    """Change the rows of a shard, given as lists by column, behind the back of `write_shard`.

    The footer stays as it is; `seal` gives every row a right checksum.
    """
    file = pq.ParquetFile(path)
    columns = {name: file.read().column(name).to_pylist() for name in file.schema_arrow.names}
    edit(columns)
    if seal:
        columns["checksum"] = [
            pair_checksum(id or "", *(pixels for pixels in arrays if pixels is not None))
            for id, *arrays in zip(*(columns[name] for name in ("id", "sar", "optical", "label_map")), strict=True)
        ]
    schema = file.schema_arrow
    fields = [replace_nullability(field) for field in schema]
    table = pa.table(
        [pa.array(columns[field.name], field.type) for field in fields], pa.schema(fields, metadata=schema.metadata)
    )
    rows = file.metadata.row_group(0).num_rows
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(table, row_group_size=rows)
        writer.add_key_value_metadata(file.metadata.metadata)


def replace_nullability(field: pa.Field) -> pa.Field:
    """The field, allowed to hold nulls."""
    return field.with_nullable(True)


def with_pixels(pair: Pair, **pixels: np.ndarray) -> Pair:
    """The pair with other pixels."""
    return replace(pair, **pixels)


def run_command(*arguments: str | Path) -> int:
    """Run a command of `fusmae` that lets errors through; its exit code."""
    parsed = build_parser().parse_args([str(argument) for argument in arguments])
    return parsed.run(parsed)
