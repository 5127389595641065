"""A row of a shard as arrays, for those who read shards with HF Datasets, pandas or any other reader of parquet."""

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.format import pair_checksum, stored_bytes
from fusmae_hf.shards.loading import _root
from fusmae_hf.vocabulary import IMAGES


def decode_row(row: Mapping[str, Any], dataset: PairsInfo | str | os.PathLike[str]) -> dict[str, Any]:
    """Bring the pixels of a row, which shards hold as bytes, back into arrays on one grid.

    ```python
    rows = datasets.load_dataset("shards/reben", split="train")
    pair = fusmae_hf.decode_row(rows[0], "shards/reben")
    pair["optical"]  # (12, 120, 120) uint16, the pixels of 20 and 60 m bands repeated
    ```

    Args:
        row: columns by name, some or all of them; of an image its three columns, such as `sar`, `sar_dtype` and
            `sar_shape`.
        dataset: the folder, URL or Hub repository of the shards, or its `PairsInfo` (`load_pairs(...).info`): it says
            which optical bands are stored in a coarser resolution.

    Returns:
        The row, its `sar` and `optical` as `(bands, height, width)` and its `label_map` as `(height, width)`, in the
        dtype and raw units of the source; None where the pair has none. The columns of dtypes and shapes are gone.

    Raises:
        FileNotFoundError: there is no such folder of shards.
        ValueError: an image lacks a column, its bytes do not have the declared length, or the checksum is another.
    """
    info = dataset if isinstance(dataset, PairsInfo) else _info_of(os.fspath(dataset))
    described = {f"{name}_{what}" for name in IMAGES for what in ("dtype", "shape")}
    decoded = {name: value for name, value in row.items() if name not in described}
    stored = {name: row[name] for name in IMAGES if row.get(name) is not None}
    for name, content in stored.items():
        if missing := sorted({f"{name}_dtype", f"{name}_shape"} - row.keys()):
            raise ValueError(f"The row has {name}, but not {missing}, which tell how to read it: select them too.")
        dtype, shape = row[f"{name}_dtype"], tuple(map(int, row[f"{name}_shape"]))
        factors = info.optical_factors if name == "optical" else ()
        if len(content) != stored_bytes(dtype, shape, tuple(factors)):
            raise ValueError(
                f"Row {row.get('id')!r} declares {name} as {dtype} {shape}, but holds {len(content):,} bytes: it is "
                f"damaged, or not of {info.name}."
            )
        pixels = np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(dtype)
        if factors:
            decoded[name] = NativeBands.unpack(pixels, factors, *shape[1:]).expand()
        else:
            decoded[name] = pixels.reshape(shape)
    if {"id", "checksum", *IMAGES} <= row.keys() and pair_checksum(row["id"], *stored.values()) != row["checksum"]:
        raise ValueError(f"Row {row['id']!r} is damaged: its checksum is not that of its pixels.")
    return decoded


@lru_cache(maxsize=16)
def _info_of(dataset: str) -> PairsInfo:
    return read_dataset_info(_root(dataset)).info
