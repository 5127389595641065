"""Rows of shards as arrays, streams and batches, for those who read shards with HF Datasets, pandas or the like."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusmae_hf.data.native_resolution import NativeBands
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.foreign import describe_foreign
from fusmae_hf.shards.format import pair_checksum, stored_bytes
from fusmae_hf.shards.loading import _root
from fusmae_hf.vocabulary import IMAGES, SENSORS

if TYPE_CHECKING:
    import datasets  # where it is needed: the collator serves training without it

_DESCRIBED = {f"{name}_{what}" for name in IMAGES for what in ("dtype", "shape")}


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
    decoded = {name: value for name, value in row.items() if name not in _DESCRIBED}
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


def stream_pairs(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    like: str | os.PathLike[str] | None = None,
    decode: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> "datasets.IterableDataset":
    """One split of a prepared folder as a stream of HF Datasets, file by file, for all that it does with streams.

    ```python
    stream = fusmae_hf.stream_pairs("shards/reben", "train")
    winter = stream.filter(lambda pair: pair["optical_time"] < "2017-12").shuffle(seed=0, buffer_size=256)
    ```

    Args:
        path: a folder written by `fusmae prepare`, a dataset repository on the Hub, or a URL that fsspec knows.
        split: `"train"`, `"validation"` or `"test"`.
        like: the prepared folder from which `path` was made by others: see `load_pairs`.
        decode: False gives rows as they are stored, whose pixels are bytes. `to_parquet` and `push_to_hub` write them
            as shards, which `load_pairs(..., like=path)` reads.
        revision: branch, tag or commit, of a repository on the Hub.
        token: of the Hub, where it is not that of the environment.

    Returns:
        A stream of dictionaries. Decoded, `sar`, `optical` and `label_map` are arrays as `decode_row` gives them,
        declared as nested lists of plain numbers, and there is no checksum: it was compared.

    Raises:
        FileNotFoundError: there is no such folder or repository, or no shards or no `dataset_info.json` in it.
        ValueError: there is no such split, or `revision` is given for something that is not on the Hub.
    """
    import datasets

    root = _root(os.fspath(path))
    if revision is not None:
        if not root.startswith("hf://"):
            raise ValueError(f"revision is {revision!r}, but {path} is not on the Hub: leave it out.")
        root += f"@{revision}"
    login = {"token": token} if token and root.startswith("hf://") else {}
    described = (
        read_dataset_info(root, **login) if like is None else describe_foreign(root, _root(os.fspath(like)), **login)
    )
    names = [shard.name for shard in described.shards(split)]
    files = {split: [described.places.get(name, f"{root}/{name}") for name in names]}
    opened = partial(datasets.load_dataset, "parquet", data_files=files, split=split, streaming=True, **login)
    rows, info = opened(), described.info
    if not decode:  # numpy's integers keep their type; of Python's, Arrow takes those above 2**63 for too large
        return rows.map(_with_numpy_checksum, features=rows.features)
    first = next(iter(opened(columns=[f"{name}_dtype" for name in IMAGES])))
    usual = {"sar": "float32", "optical": "uint16" if info.optical_units == "dn" else "float32", "label_map": "uint8"}
    gone = ["checksum", *sorted(_DESCRIBED)]
    features = datasets.Features({name: kind for name, kind in rows.features.items() if name not in gone})
    for name in IMAGES:
        lines = datasets.List(datasets.List(datasets.Value(first[f"{name}_dtype"] or usual[name])))
        features[name] = lines if name == "label_map" else datasets.List(lines)
    return rows.map(partial(_decoded, info=info), remove_columns=gone, features=features)


def _with_numpy_checksum(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"checksum": np.uint64(row["checksum"])}


def _decoded(row: Mapping[str, Any], info: PairsInfo) -> dict[str, Any]:
    return {name: value for name, value in decode_row(row, info).items() if name != "checksum"}


class RowCollator:
    """Batches of what HF Datasets reads, for `PairCollator`, `FineTuningCollator` or nothing more.

    Takes pairs of `stream_pairs` and rows of `load_dataset`, which it decodes first. Random numbers that follow from
    the row of a pair, such as masks, follow from a hash of its id here.

    Args:
        dataset: the folder, URL or Hub repository of the shards, or its `PairsInfo`.
        collator: completes batches as they come from `load_pairs`.
    """

    def __init__(
        self, dataset: PairsInfo | str | os.PathLike[str], collator: Callable[[dict[str, Any]], Any] | None = None
    ):
        self.info = dataset if isinstance(dataset, PairsInfo) else _info_of(os.fspath(dataset))
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of some rows: the columns that `load_pairs` gives.

        Raises:
            ValueError: the rows are no pairs, or are damaged.
        """
        if missing := [name for name in ("id", *SENSORS) if name not in rows[0]]:
            raise ValueError(
                f"The rows have no columns {missing}, but {sorted(rows[0])}: they are no pairs. Prepare the data with "
                "`fusmae prepare`, and keep these columns in `map` and `select_columns`."
            )
        pairs = [decode_row(row, self.info) if _DESCRIBED & row.keys() else row for row in rows]
        batch: dict[str, Any] = {"id": [pair["id"] for pair in pairs]}
        batch["row"] = torch.tensor([pair_checksum(id) >> 1 for id in batch["id"]])
        batch["epoch"] = torch.tensor([pair.get("epoch", 0) for pair in pairs])
        for name in IMAGES:
            images = [None if pair.get(name) is None else np.asarray(pair[name]) for pair in pairs]
            if name == "label_map" and any(image is None for image in images):
                continue
            batch |= self._stacked(name, images, pairs)
        for name in ("optical_offset", *self.info.per_scene):
            values = [pair.get(name) for pair in pairs]
            batch[name] = [getattr(self.info, name) if value is None else value for value in values]
        batch["optical_offset"] = torch.tensor(batch["optical_offset"], dtype=torch.float32)
        if any(pair.get("labels") is not None for pair in pairs):
            batch["labels"] = [pair["labels"] for pair in pairs]
        return batch if self.collator is None else self.collator(batch)

    def _stacked(
        self, name: str, images: list[np.ndarray | None], pairs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """A column of images, NaN or zero where a pair has none, and, where one has none, which have it."""
        there = [image is not None for image in images]
        found = next((image for image in images if image is not None), None)
        if found is None:
            other = next(np.shape(pairs[0][sensor]) for sensor in SENSORS if pairs[0].get(sensor) is not None)
            found = np.empty((len(getattr(self.info, f"{name}_bands")), *other[1:]), np.float32)
        absent = np.full_like(found, np.nan if found.dtype.kind == "f" else 0)
        stacked = np.stack([absent if image is None else image for image in images])
        column = {name: torch.from_numpy(stacked)}
        return column if all(there) else column | {f"{name}_available": torch.tensor(there)}
