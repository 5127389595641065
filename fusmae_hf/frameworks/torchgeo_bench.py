"""torchgeo-bench: a checkpoint as one of its models."""

import os
from collections.abc import Mapping, Sequence

import torch

try:
    from torchgeo_bench.datasets.base import BandSpec
    from torchgeo_bench.models.interface import BenchModel
except ImportError as error:
    raise ImportError(
        f"torchgeo-bench cannot be imported ({error}): install it with `pip install torchgeo-bench`, on Python 3.12 "
        "or later."
    ) from error

from fusmae_hf.hub.checkpoint_loading import load_checkpoint
from fusmae_hf.modeling.sensors_fusmae import sentinel_bands

_SENSORS = {"s1": "sar", "sar": "sar", "s2": "optical"}
"""Sensors by the words of torchgeo-bench."""


class FusMAEBench(BenchModel):
    """Pooled features of a checkpoint, normalised by its own processor: no figure of a `BandSpec` is used.

    Args:
        bands: of the dataset, which torchgeo-bench gives.
        checkpoint: a folder or a Hub id.
        names: what bands really are, by the name that the dataset gives them: `{"vv": "VH", "vh": "VV"}`.

    Raises:
        ValueError: a band is of another sensor, or one that the checkpoint needs is missing.
    """

    def __init__(
        self,
        bands: Sequence[BandSpec],
        checkpoint: str | os.PathLike[str],
        names: Mapping[str, str] | None = None,
        **kwargs: object,
    ):
        super().__init__(bands=list(bands), normalization="identity")
        self.model, self.processor = load_checkpoint(checkpoint, decoders=False)
        if foreign := [band.name for band in bands if band.sensor not in _SENSORS]:
            raise ValueError(
                f"Fus-MAE takes bands of Sentinel-1 and Sentinel-2, but not {foreign}: leave them out with "
                "`dataset.bands=[...]`."
            )
        self.positions: dict[str, list[int]] = {}
        for number, band in enumerate(bands):
            self.positions.setdefault(_SENSORS[band.sensor], []).append(number)
        called = [(names or {}).get(band.name, band.source_name) for band in bands]
        self.names = {
            f"{sensor}_bands": sentinel_bands([called[number] for number in numbers], "db")
            for sensor, numbers in self.positions.items()
        }

    def _forward_patch_features(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(batch, feature_size)` of raw images `(batch, bands, height, width)`."""
        given = {sensor: images[:, numbers] for sensor, numbers in self.positions.items()}
        outputs = self.model(**self.processor(**given, **self.names, return_pixel_mask=True))
        return outputs.pooler_output if outputs.feature_output is None else outputs.feature_output
