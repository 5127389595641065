"""Pipelines of transformers that take a pair, or one sensor, where those of transformers take one picture."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, ImageSegmentationPipeline

from .configuration_fusmae import CUSTOM_PIPELINES

try:
    import rasterio
except ImportError:  # needed for rasters alone
    rasterio = None


def read_image(image: Any) -> Any:
    """An array as it is, or what lies at a path: `(bands, height, width)`, where a raster has no data, masked."""
    if not isinstance(image, str | os.PathLike):
        return image
    if str(image).endswith(".npy"):
        return np.load(image)
    if rasterio is None:
        raise ImportError(
            f"{image}: rasters need rasterio (`pip install rasterio`). An array or a .npy needs nothing."
        )
    with rasterio.open(image) as raster:
        if {*raster.scales, *raster.offsets} != {0.0, 1.0}:
            raise ValueError(
                f"{image} states a scale {set(raster.scales)} and an offset {set(raster.offsets)}, which a pipeline "
                "does not apply. Read it, apply them, and give the array with its units."
            )
        return raster.read(masked=True)


class _OfPairs:
    """What the three have in common.

    An input is a dictionary: `optical` and `sar`, either of which may be missing, arrays `(bands, height, width)` or
    paths of a `.npy` or of a raster; and whatever else a call of the image processor takes (`optical_bands`,
    `optical_offset`, `sar_units` ...). A list of them gives a list, with `batch_size` in batches.
    """

    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # transformers has put classes into it, which cannot be saved.
        self.model.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def check_model_type(self, supported_models):
        """The configuration names the class of the model; upstream's list has its own models alone."""

    def preprocess(self, pair, timeout=None, subtask=None, **options):
        """Inputs of the model, with the (height, width) of the pair where that is needed."""
        if not isinstance(pair, Mapping):
            raise TypeError(
                f"Give a dictionary of arrays or paths, {{'optical': ..., 'sar': ...}}, or one of the two, not a "
                f"{type(pair).__name__}."
            )
        images = {sensor: read_image(pair[sensor]) for sensor in ("optical", "sar") if pair.get(sensor) is not None}
        inputs = self.image_processor(**{**pair, **images}, **options).to(self.dtype)
        if isinstance(self, ImageSegmentationPipeline):
            inputs["target_size"] = [tuple(next(iter(images.values())).shape[-2:])]
        return inputs


class FusMAEImageFeatureExtractionPipeline(_OfPairs, ImageFeatureExtractionPipeline):
    """Tokens of each pair, or with `pool=True` their mean; tensors with `return_tensors=True`."""


class FusMAEImageClassificationPipeline(_OfPairs, ImageClassificationPipeline):
    """Scores of the classes of each pair, the highest first; all of them with `top_k=None`."""


class FusMAEImageSegmentationPipeline(_OfPairs, ImageSegmentationPipeline):
    """Masks of the classes that are somewhere in each pair, of its height and width."""

    def postprocess(self, model_outputs, **options):
        """Upstream's list of `label`, `mask` and `score` (None), after padding was cut off."""
        processor, [size] = self.image_processor, model_outputs["target_size"]
        if processor.do_pad:
            height, width = (processor.size["height"], processor.size["width"]) if processor.do_resize else size
            padded = [side + -side % (processor.size_divisor or 1) for side in (height, width)]
            logits = torch.nn.functional.interpolate(model_outputs["logits"], padded, mode="bilinear")
            model_outputs["logits"] = logits[..., :height, :width]
        return super().postprocess(model_outputs, **options)


PIPELINES = {
    pipeline.__name__: pipeline
    for pipeline in (
        FusMAEImageFeatureExtractionPipeline,
        FusMAEImageClassificationPipeline,
        FusMAEImageSegmentationPipeline,
    )
}
"""By name, for `modeling_fusmae`, where transformers finds them."""

__all__ = ["PIPELINES", *PIPELINES]
