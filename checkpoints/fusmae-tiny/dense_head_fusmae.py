"""The dense head: token maps and the pixels themselves, joined into a prediction for each pixel."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_fusmae import FusMAEConfig
from .labels_fusmae import count_labels
from .patches_fusmae import sensor_mean


class FusMAEConvolution(nn.Module):
    """A 3x3 convolution, a group norm with the statistics of each image, an activation."""

    def __init__(self, config: FusMAEConfig, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels, kernel_size=3, stride=stride, padding=1)
        self.norm = nn.GroupNorm(math.gcd(channels, 8), channels, eps=config.layer_norm_eps)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        """`(batch_size, channels_in, height, width)` to `(batch_size, channels, height / stride, width / stride)`."""
        return self.act_fn(self.norm(self.convolution(hidden_states)))


class FusMAESegmentationDecoder(nn.Module):
    """Joins token maps of several depths with a detail path: maps of the pixels at full, half and quarter resolution.

    Each sensor has convolutions of its own, and a place of a map is the mean over the sensors that have data there. A
    sample of which a sensor is missing is therefore decoded as if that sensor were not given.
    """

    def __init__(self, config: FusMAEConfig):
        super().__init__()
        width, detail = config.segmentation_hidden_size, config.segmentation_detail_size
        self.projections = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in config.segmentation_stages)
        channels = [detail, 2 * detail, 4 * detail]

        def detail_path(bands: list[str]) -> nn.ModuleList:
            steps = zip([len(bands), *channels[:2]], channels, (1, 2, 2), strict=True)
            return nn.ModuleList(FusMAEConvolution(config, *step) for step in steps)

        self.optical_detail = detail_path(list(config.optical_bands))
        self.sar_detail = detail_path(list(config.sar_bands))
        widths = [width, max(1, width // 2), max(1, width // 4)]
        self.convolutions = nn.ModuleList(
            FusMAEConvolution(config, before + beside, after)
            for before, beside, after in zip([width, *widths[:2]], channels[::-1], widths, strict=True)
        )
        self.predict = nn.Conv2d(widths[-1], count_labels(config), kernel_size=1)

    def detail(self, sensor: str, images: torch.Tensor, valid: torch.Tensor | None) -> list[torch.Tensor]:
        """Maps of one sensor's `(batch_size, bands, height, width)`, finest first; pixels without data count as 0."""
        blocks = self.optical_detail if sensor == "optical" else self.sar_detail
        hidden_states = images.to(self.predict.weight.dtype)
        if valid is not None:
            hidden_states = torch.where(valid[:, None], hidden_states, 0.0)
        maps = []
        for block in blocks:
            hidden_states = block(hidden_states)
            maps.append(hidden_states)
        return maps

    def forward(
        self,
        maps: tuple[torch.Tensor, ...],
        images: Mapping[str, torch.Tensor],
        valid: Mapping[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """Predictions for each pixel.

        Args:
            maps: of the tokens, `(batch_size, hidden_size, rows, columns)`, one for each depth.
            images: of the sensors that are given, `(batch_size, bands, height, width)`.
            valid: pixels that hold data, `(batch_size, height, width)` bool by sensor, or None where all do.

        Returns:
            `(batch_size, num_labels, height, width)`.
        """
        of_sensors = [self.detail(sensor, values, valid[sensor]) for sensor, values in images.items()]
        masks = [valid[sensor] for sensor in images]
        details = [sensor_mean(each, masks, 2**step) for step, each in enumerate(zip(*of_sensors, strict=True))]
        projected = [
            projection(values.permute(0, 2, 3, 1)) for projection, values in zip(self.projections, maps, strict=True)
        ]
        hidden_states = sum(projected).permute(0, 3, 1, 2)
        for convolution, beside in zip(self.convolutions, reversed(details), strict=True):
            hidden_states = nn.functional.interpolate(hidden_states, beside.shape[-2:], mode="bilinear")
            hidden_states = convolution(torch.cat([hidden_states, beside], dim=1))
        return self.predict(hidden_states)
