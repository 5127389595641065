"""Small folders of shards whose labels can be learnt from their pixels, one for each task."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fusmae_hf.data.pairs import Pair, PairsInfo
from fusmae_hf.shards.writing import write_dataset_info, write_shard

CLASSES = ("dark", "grey", "bright")
SIZE = 16
NUMBERS = {"train": 24, "validation": 6, "test": 6}

INFO = PairsInfo(
    name="made-up",
    source="made by the tests (2024)",
    license="CC-BY-4.0",
    sar_bands=("VV", "VH"),
    optical_bands=("B02", "B03", "B04", "B05"),
    statistics="bigearthnet",
    simulated=True,
)
COLUMNS = {"height": "double", "town": "string"}
INFOS = {
    "single_label_classification": replace(INFO, class_names=CLASSES, extra_columns=COLUMNS),
    "multi_label_classification": replace(INFO, class_names=CLASSES),
    "semantic_segmentation": replace(INFO, map_class_names=CLASSES, map_no_data=9),
    "regression": replace(INFO, map_units="t/ha"),
    "unlabelled": INFO,
}


def make_scene(number: int, task: str) -> Pair:
    """A scene whose brightness tells its class, `number % 3`; the left half is of the next class."""
    generator = np.random.default_rng(number)
    classes = np.full((SIZE, SIZE), number % 3)
    classes[:, : SIZE // 2] = (number + 1) % 3
    optical = 300 + 500 * classes + generator.integers(0, 200, (4, SIZE, SIZE))
    sar = np.array([[[-16]], [[-23]]]) + 4 * classes + generator.normal(0, 1, (2, SIZE, SIZE))
    fields: dict = {}
    if task == "single_label_classification":
        fields = {"labels": [CLASSES[number % 3]], "extra": {"height": 50.0 + 10 * (number % 3), "town": "none"}}
    elif task == "multi_label_classification":
        fields = {"labels": [CLASSES[number % 3], CLASSES[(number + 1) % 3]]}
    elif task == "semantic_segmentation":
        label_map = classes.astype(np.uint8)
        label_map[0] = 9
        fields = {"label_map": label_map}
    elif task == "regression":
        values = 100 + 80 * classes.astype(np.float32)
        values[0] = np.nan
        fields = {"label_map": values}
    return Pair(f"{task}-{number:03d}", sar.astype(np.float32), optical.astype(np.uint16), **fields)


def write_labelled(folder: Path, task: str, change=None, info: PairsInfo | None = None, **numbers: int) -> Path:
    """Shards for a task; `change(pair)` may spoil pairs, and keywords say how many pairs a split has."""
    info, first, shards = info or INFOS[task], 0, []
    for split, number in (NUMBERS | numbers).items():
        pairs = [make_scene(first + n, task) for n in range(number)]
        first += number
        if not pairs:
            continue
        pairs = [change(pair) or pair if change else pair for pair in pairs]
        shards.append(write_shard(pairs, info, folder, f"data/{split}-00000-of-00001.parquet", row_group_rows=4))
    write_dataset_info(folder, info, shards)
    return folder
