"""TorchGeo: its samples for the processor, and prepared pairs as a dataset of its kind."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Subset

from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.modeling.sensors_fusmae import OPTICAL_BANDS, SAR_BANDS
from fusmae_hf.shards.loading import load_pairs
from fusmae_hf.vocabulary import SENSORS

try:
    from torchgeo.datasets import SEN12MS, SSL4EOS12, BigEarthNet, BigEarthNetV2, NonGeoDataset
except ImportError as error:
    raise ImportError(
        f"TorchGeo cannot be imported ({error}): install it with `pip install torchgeo`, on Python 3.12 or later."
    ) from error

_FILES_BY_NAME = ("VH", "VV")
"""Order of the SAR bands of BigEarthNet in TorchGeo, which sorts the files of a patch by name."""


class ShardPairs(NonGeoDataset):
    """One split of a prepared folder as a `NonGeoDataset`.

    Samples hold `image`, float32 `(bands, height, width)`: SAR bands, then optical bands, in the raw units of the
    shards; and `label` (`(classes,)` int64, 1 where a class holds, or one class) or `mask` `(height, width)` where the
    pairs have labels. Where pairs lack a sensor there is `sar_available` or `optical_available`, too.

    Args:
        root: what `load_pairs` opens.
        split: `"train"`, `"val"` or `"test"`.
        task: one of `TASKS`; None where the dataset allows one alone, and for multi-label where it has scene classes.
        transforms: called with each sample.

    Attributes:
        info: what holds for all pairs.
        bands: names of the bands of `image`, in order.
        task: what the labels are for, or None.

    Raises:
        ValueError: there is no such split, the dataset has no labels for the task, or its optical offset differs from
            scene to scene.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        task: str | None = None,
        transforms: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.pairs = load_pairs(root, {"val": "validation"}.get(split, split))
        self.info, self.transforms = self.pairs.info, transforms
        if self.info.per_scene:
            raise ValueError(
                f"{root}: {list(self.info.per_scene)} differ from scene to scene, which samples of TorchGeo cannot "
                "tell. Prepare shards of one kind of scene each, with `fusmae prepare --select`."
            )
        self.bands = (*self.info.sar_bands, *self.info.optical_bands)
        if task is None and len(self.info.class_names) > 1:
            task = "multi_label_classification"
        has_labels = self.info.class_names or self.info.map_class_names or self.info.map_units
        self.task = FineTuningTask.of_pairs(self.info, task) if task or has_labels else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        sample = {"image": torch.cat([pair[sensor].float() for sensor in SENSORS])}
        sample |= {name: value for name, value in pair.items() if name.endswith("_available")}
        if self.task is not None and self.task.dense:
            sample["mask"] = self.task.dense_labels(pair["label_map"][None])[0]
        elif self.task is not None:
            sample["label"] = self.task.scene_labels([pair["id"]], [pair["labels"]], None)[0].long()
        return sample if self.transforms is None else self.transforms(sample)


def from_torchgeo(sample: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """Arguments of the processor for a sample of TorchGeo, or for a batch of them: `processor(**from_torchgeo(...))`.

    Orders of bands and units are those of TorchGeo 0.9: SAR in dB, optical bands in digital numbers without offset.

    Args:
        sample: a sample, or what a `DataLoader` makes of several. Samples with several seasons become a batch.
        dataset: where it comes from: `BigEarthNet`, `BigEarthNetV2`, `SEN12MS`, `SSL4EOS12`, `ShardPairs`, or a
            `Subset` of one.

    Returns:
        `sar` and `sar_bands`, `optical` and `optical_bands`, of the sensors that the sample has; units and offset.

    Raises:
        ValueError: the dataset is another one, or the sample does not have its bands.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    said = {"sar_units": "db", "optical_units": "dn", "optical_offset": 0.0}
    if isinstance(dataset, ShardPairs):
        said = {name: getattr(dataset.info, name) for name in said}
        sar = dataset.info.sar_bands
    elif isinstance(dataset, BigEarthNet | BigEarthNetV2 | SEN12MS | SSL4EOS12):
        sar = SAR_BANDS
    else:
        raise ValueError(
            f"from_torchgeo knows BigEarthNet, BigEarthNetV2, SEN12MS, SSL4EOS12 and ShardPairs, not "
            f"{type(dataset).__name__}. Name the bands yourself: `processor(sar=..., sar_bands=[...], optical=..., "
            "optical_bands=[...])`."
        )
    arguments: dict[str, Any] = {}
    for key, bands in _bands_of(dataset).items():
        images = sample.get(key)
        expected = len(bands) * getattr(dataset, "seasons", 1)
        if images is None or images.ndim not in (3, 4) or images.shape[-3] != expected:
            given = f"the keys {sorted(sample)}" if images is None else f"{key!r} of shape {tuple(images.shape)}"
            raise ValueError(
                f"The sample has {given}, but {type(dataset).__name__} gives {key!r} with {expected} bands, "
                f"{list(bands)}: pass the dataset that the sample is from, without `transforms` that drop or add "
                "bands."
            )
        if expected != len(bands):
            images = images.unflatten(-3, (-1, len(bands))).reshape(-1, len(bands), *images.shape[-2:])
        for sensor in SENSORS:
            chosen = [number for number, band in enumerate(bands) if (band in sar) == (sensor == "sar")]
            if chosen:
                arguments |= {sensor: images[..., chosen, :, :], f"{sensor}_bands": [bands[n] for n in chosen]}
    return arguments | {name: value for name, value in said.items() if name.partition("_")[0] in arguments}


def _bands_of(dataset: Any) -> dict[str, tuple[str, ...]]:
    """Names of the bands of each image in a dataset's samples, in their order."""
    if isinstance(dataset, BigEarthNet | BigEarthNetV2):
        sensors = {"s1": _FILES_BY_NAME, "s2": OPTICAL_BANDS}
        if dataset.bands != "all":
            return {"image": sensors[dataset.bands]}
        if isinstance(dataset, BigEarthNet):
            return {"image": (*sensors["s1"], *sensors["s2"])}
        return {f"image_{name}": bands for name, bands in sensors.items()}
    return {"image": tuple(dataset.bands)}
