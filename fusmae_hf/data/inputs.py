"""From a batch of raw pairs to the inputs of a model, on the device where the batch lies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.utils import logging

from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.vocabulary import OF_SCENES, SENSOR_CHOICES, SENSORS, Sensors

logger = logging.get_logger(__name__)

_IMAGES = {"pixel_values": "pixel_mask", "pixel_values_sar": "pixel_mask_sar"}


def image_size(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of the images among the inputs of a model."""
    height, width = next(inputs[name] for name in _IMAGES if inputs.get(name) is not None).shape[-2:]
    return height, width


def given_size(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of the images in a batch of raw pairs."""
    shape = (
        batch["optical_shape"]
        if "optical_shape" in batch
        else next(batch[sensor].shape for sensor in SENSORS if sensor in batch)
    )
    return shape[-2], shape[-1]


def fitting_size(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The largest (height, width) within `size` that patches fill, or one patch where they are larger."""
    height, width = (max(side // patch_size, 1) * patch_size for side in size)
    return height, width


def pad_to_patches(inputs: dict[str, Any], patch_size: int) -> dict[str, Any]:
    """Images padded at the bottom and on the right until patches fill them; says once what it did.

    Args:
        inputs: of a model. Others than images and pixel masks are passed on.
        patch_size: of the model, in pixels.

    Returns:
        The same, in which the pixel masks mark padding as without data. What fits already is left alone.
    """
    height, width = image_size(inputs)
    down, right = -height % patch_size, -width % patch_size
    if not down and not right:
        return inputs
    logger.warning_once(
        f"Images of {height}x{width} px are padded to {height + down}x{width + right} px, since the patches of the "
        f"model are {patch_size} px. Padding counts as without data, and is cut off results."
    )
    padded = dict(inputs)
    for name, mask in _IMAGES.items():
        if (images := inputs.get(name)) is not None:
            valid = inputs.get(mask)
            valid = images.new_ones((len(images), height, width), dtype=torch.bool) if valid is None else valid
            padded[name], padded[mask] = (functional.pad(values, (0, right, 0, down)) for values in (images, valid))
    return padded


class PairInputs:
    """Normalises batches of pairs with a processor, after undoing what is particular to the shards.

    Args:
        processor: picks bands and normalises.
        info: bands, units and offset of the pairs.
        pixel_masks: whether pixels without data are marked, which shards tell beforehand. None looks at the values,
            which would stall a GPU.
        augmentation: random views, for batches that carry their parameters.
        patch_size: of the model, in pixels: images that patches do not fill are padded, see `pad_to_patches`. None:
            they stay as they are.
    """

    def __init__(
        self,
        processor: FusMAEImageProcessor,
        info: PairsInfo,
        pixel_masks: bool | None = None,
        augmentation: PairAugmentation | None = None,
        patch_size: int | None = None,
    ):
        self.processor, self.info, self.pixel_masks, self.augmentation = processor, info, pixel_masks, augmentation
        self.patch_size = patch_size

    def __call__(
        self, batch: dict[str, Any], *, training: bool = False, sensors: Sensors = "both"
    ) -> dict[str, torch.Tensor]:
        """The inputs for a batch.

        Args:
            batch: what a collator of pairs gives: `optical` and `sar` as they lie in the shards; `label_map`
                `(batch, height, width)` and `augmentation` where there are any.
            training: whether each pair is one of its random views, if any are asked for.
            sensors: the others are left out, as if nobody had ever seen them. Pairs that lack the one that is left
                give images without data, which whoever asks for it has to leave out.

        Returns:
            `pixel_values`, `pixel_values_sar` and, with `pixel_masks` or padding, the masks, of the sensors chosen;
            where pairs may lack one, `optical_available` and `sar_available`; `label_map`, turned as the images are
            but never padded.

        Raises:
            ValueError: `sensors` is unknown, or the processor refuses the pairs.
        """
        if sensors not in SENSOR_CHOICES:
            raise ValueError(f"There are no sensors {sensors!r}: choose one of {SENSOR_CHOICES}.")
        shown = [sensor for sensor in SENSORS if sensors in ("both", sensor)]
        images = {sensor: batch[sensor] for sensor in shown}
        if "optical" in shown and "optical_shape" in batch:
            images["optical"] = expand_bands(images["optical"], self.info.optical_factors, *batch["optical_shape"][1:])
        said = {name: batch[name] for name in self.info.per_scene}
        available = {sensor: batch[f"{sensor}_available"] for sensor in shown if f"{sensor}_available" in batch}
        units = [batch[name] for name in self.info.per_scene if name.endswith("_units")]
        if len(set(zip(*units, strict=True))) > 1:
            inputs = self._by_units(images, said, [*zip(*units, strict=True)])
        else:
            said |= {name: values[0] for name, values in said.items() if name.endswith("_units")}
            if self.pixel_masks is None:  # values are looked at, so that what is absent must not be there
                images = {sensor: _present(pixels, available.get(sensor)) for sensor, pixels in images.items()}
            inputs = self._processed(images, said, self.pixel_masks)
        for sensor, of_sensor in available.items() if sensors == "both" else ():
            if f"pixel_values{'_sar' if sensor == 'sar' else ''}" in inputs:
                inputs[f"{sensor}_available"] = of_sensor
        if "label_map" in batch:
            inputs["label_map"] = batch["label_map"]
        if self.augmentation and training:
            inputs = self.augmentation.apply(inputs, batch["augmentation"])
        return inputs if self.patch_size is None else pad_to_patches(inputs, self.patch_size)

    def _processed(
        self, images: dict[str, Any], said: dict[str, Any], pixel_masks: bool | None
    ) -> dict[str, torch.Tensor]:
        """What the processor gives for images whose scenes say something else than the dataset."""
        declared = {name: getattr(self.info, name) for name in OF_SCENES} | said
        bands = {"sar_bands": self.info.sar_bands, "optical_bands": self.info.optical_bands}
        masks = pixel_masks or (True if self.processor.do_pad else pixel_masks)
        return dict(self.processor(**images, **bands, **declared, return_pixel_mask=masks))

    def _by_units(
        self, images: dict[str, torch.Tensor], said: dict[str, Any], units: list[tuple[str, ...]]
    ) -> dict[str, torch.Tensor]:
        """The same for a batch of several units, those of one at a time."""
        order: list[int] = []
        parts: list[dict[str, torch.Tensor]] = []
        for kind in dict.fromkeys(units):
            rows = [row for row, other in enumerate(units) if other == kind]
            of_kind = {
                name: values[rows[0]] if name.endswith("_units") else values[rows] for name, values in said.items()
            }
            chosen = {sensor: _rows(pixels, rows) for sensor, pixels in images.items()}
            parts.append(self._processed(chosen, of_kind, self.pixel_masks is not False))
            order += rows
        places = torch.tensor(order, device=parts[0][next(iter(parts[0]))].device).argsort()
        return {name: torch.cat([part[name] for part in parts])[places] for name in parts[0]}


def _present(pixels: torch.Tensor, available: torch.Tensor | None) -> Any:
    """Images as the processor takes them where some, or all, are absent."""
    if available is None or bool(available.all()):
        return pixels
    return (
        [image if there else None for image, there in zip(pixels, available.tolist(), strict=True)]
        if bool(available.any())
        else None
    )


def _rows(pixels: torch.Tensor, rows: list[int]) -> torch.Tensor:
    if pixels.dtype == torch.uint16:  # torch has few kernels for it, and the bits are the same
        return pixels.view(torch.int16)[rows].view(torch.uint16)
    return pixels[rows]
