"""Scenes written by the tests, and models whose output says where it was made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from fusmae_hf import FusMAEImageProcessor
from fusmae_hf.scenes import mapping
from fusmae_hf.scenes.models import SceneModel
from fusmae_hf.scenes.plan import MapOptions

UTM = "EPSG:32632"
NORTH_UP = Affine(10, 0, 600_000, 0, -10, 5_300_000)

RAW = MapOptions(optical_units="raw", sar_units="raw", optical_bands=("A", "B"), sar_bands=("S",), num_workers=1)


def write(path: Path, values: np.ndarray, transform: Affine = NORTH_UP, crs: str = UTM, **profile: Any) -> str:
    """A GeoTIFF of `(bands, height, width)`."""
    count, height, width = values.shape
    options = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", **options | {"crs": crs, "transform": transform} | profile) as file:
        file.write(values)
    return str(path)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def ground(shape: tuple[int, int], transform: Affine = NORTH_UP) -> np.ndarray:
    """Map coordinates (x, y) of the centres of pixels, `(2, height, width)` float64."""
    columns, rows = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
    return np.stack(transform @ (columns, rows))


@pytest.fixture(autouse=True)
def no_quicklook(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Draw nothing but where a test asks `with_quicklook`: matplotlib takes longer than a small map."""
    if "with_quicklook" not in request.fixturenames:
        monkeypatch.setattr(mapping, "draw_quicklook", lambda plan, marks, folder, out: out.write_bytes(b""))


@pytest.fixture
def with_quicklook() -> None:
    """See `no_quicklook`."""


@pytest.fixture
def make_model() -> Callable[..., SceneModel]:
    """A model made of a function of its inputs; normalisation changes nothing."""

    def make(
        predict: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
        kind: Any = "values",
        labels: tuple[str, ...] = ("A", "B"),
        window: int = 16,
        patch: int = 4,
        optical: tuple[str, ...] = ("A", "B"),
        sar: tuple[str, ...] = ("S",),
    ) -> SceneModel:
        processor = FusMAEImageProcessor(
            optical_bands=optical, sar_bands=sar, statistics=None, optical_units="raw", sar_units="raw",
            optical_mean=[0.0] * len(optical), optical_std=[1.0] * len(optical),
            sar_mean=[0.0] * len(sar), sar_std=[1.0] * len(sar), optical_nodata=0.0,
        )  # fmt: skip
        return SceneModel(
            "stub", f"{kind} {labels}", kind, labels, (window, window), patch, None, processor,
            predict or (lambda inputs: inputs["pixel_values"]),
        )  # fmt: skip

    return make
