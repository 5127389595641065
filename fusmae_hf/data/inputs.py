"""From a batch of raw pairs to the inputs of a model, on the device where the batch lies."""

from typing import Any

import torch

from fusmae_hf.data.augmentation import PairAugmentation
from fusmae_hf.data.native_resolution import expand_bands
from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.vocabulary import SENSOR_CHOICES, Sensors


class PairInputs:
    """Normalises batches of pairs with a processor, after undoing what is particular to the shards.

    Args:
        processor: picks bands and normalises.
        info: bands, units and offset of the pairs.
        pixel_masks: whether pixels without data are marked, which shards tell beforehand. None looks at the values,
            which would stall a GPU.
        augmentation: random views, for batches that carry their parameters.
    """

    def __init__(
        self,
        processor: FusMAEImageProcessor,
        info: PairsInfo,
        pixel_masks: bool | None = None,
        augmentation: PairAugmentation | None = None,
    ):
        self.processor, self.info, self.pixel_masks, self.augmentation = processor, info, pixel_masks, augmentation

    def __call__(
        self, batch: dict[str, Any], *, training: bool = False, sensors: Sensors = "both"
    ) -> dict[str, torch.Tensor]:
        """The inputs for a batch.

        Args:
            batch: what a collator of pairs gives: `optical` and `sar` as they lie in the shards; `label_map`
                `(batch, height, width)` and `augmentation` where there are any.
            training: whether each pair is one of its random views, if any are asked for.
            sensors: the others are left out, as if nobody had ever seen them.

        Returns:
            `pixel_values`, `pixel_values_sar` and, with `pixel_masks`, the masks, of the sensors chosen;
            `label_map`, turned as the images are.

        Raises:
            ValueError: `sensors` is unknown, or the processor refuses the pairs.
        """
        optical = sar = None
        if sensors not in SENSOR_CHOICES:
            raise ValueError(f"There are no sensors {sensors!r}: choose one of {SENSOR_CHOICES}.")
        if sensors != "sar":
            optical = batch["optical"]
            if "optical_shape" in batch:
                optical = expand_bands(optical, self.info.optical_factors, *batch["optical_shape"][1:])
        if sensors != "optical":
            sar = batch["sar"]
        inputs: dict[str, Any] = dict(
            self.processor(
                sar=sar,
                optical=optical,
                sar_bands=self.info.sar_bands,
                optical_bands=self.info.optical_bands,
                sar_units=self.info.sar_units,
                optical_units=self.info.optical_units,
                optical_offset=self.info.optical_offset,
                return_pixel_mask=self.pixel_masks,
            )
        )
        if "label_map" in batch:
            inputs["label_map"] = batch["label_map"]
        if self.augmentation and training:
            inputs = self.augmentation.apply(inputs, batch["augmentation"])
        return inputs
