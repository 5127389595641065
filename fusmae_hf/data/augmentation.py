"""Random views of pairs: both sensors and the label map of a pair change alike, on the batch and on any device.

What is drawn for a pair, here and for masking, is a pure function of (seed, purpose, epoch, row).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

PURPOSES = ("optical", "sar", "augmentation")
"""What numbers are drawn for: masking noise of each sensor, random views."""

PARAMETERS = 8
"""Geometric parameters of a sample: transpose, flip rows, flip columns, side of the crop, its top and left edge, and
where the window lies, as shares of the room that it has."""

_IMAGES = {"pixel_values": "optical", "pixel_values_sar": "sar"}
_MASKS = ("pixel_mask", "pixel_mask_sar")


class SampleRandomness:
    """Uniform numbers for each pair of a batch, the same whatever the batch, the worker or the process.

    A counter-based generator (Philox) is set to the pair's own counter, so nothing is drawn in sequence and nothing
    has to be saved to resume.

    Args:
        seed: non-negative integer below 2**64.
        purpose: one of `PURPOSES`.
    """

    def __init__(self, seed: int, purpose: str):
        self._bits = np.random.Philox(key=[seed, PURPOSES.index(purpose)])
        self._generator, self._state = np.random.Generator(self._bits), self._bits.state

    def fill(self, drawn: np.ndarray, epochs: torch.Tensor, rows: torch.Tensor) -> None:
        """Fill `drawn` (batch, numbers) float32 with numbers in [0, 1), for pairs given by `(batch,)` integers."""
        for sample, epoch, row in zip(drawn, epochs.tolist(), rows.tolist(), strict=True):
            self._state["state"]["counter"][:] = (0, 0, epoch, row)
            self._bits.state = self._state
            self._generator.random(out=sample, dtype=np.float32)


@dataclass(frozen=True)
class PairAugmentation:
    """Flips, quarter turns, square crops brought back to full size, and changes of brightness by band.

    What happens to a pair is a pure function of (seed, epoch, row), like its mask: the same whatever the batch, the
    worker, the process or the device.

    Args:
        flips: mirror rows and columns, each in half of the cases.
        rotations: turn by 0, 90, 180 or 270 degrees, each equally often. Patches must be square.
        min_crop: smallest share of the area that a crop keeps, 1 for no crops. The share is uniform from there to 1.
            Crops are square and brought back to full size by bilinear interpolation (label maps: nearest pixel), so
            the ground shows up to `1 / sqrt(min_crop)` times larger. A pixel made from any without data has none.
        band_jitter: standard deviation of a random gain (around 1) and a random offset of each band, in standard
            deviations of the band, since it acts on normalised values. 0 for none.
        seed: non-negative integer below 2**64.
        window: side of the patches of a model, in pixels: of images that they do not fill, the view is the largest
            window that they do, placed at random. 1 for whole images.
        window_size: sides in pixels above which images are shown through a window of this size, placed at random. 0
            for none.

    Raises:
        ValueError: `min_crop` is no share above 0, `band_jitter` is negative, or a window is not positive.
    """

    flips: bool = True
    rotations: bool = True
    min_crop: float = 1.0
    band_jitter: float = 0.0
    seed: int = 0
    window: int = 1
    window_size: int = 0

    def __post_init__(self) -> None:
        if self.window_size < 0:
            raise ValueError(f"window_size is {self.window_size}, but must be a number of pixels, or 0 for none.")
        if self.window < 1:
            raise ValueError(f"window is {self.window}, but must be a number of pixels, at least 1.")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"min_crop is {self.min_crop}, but must be a share of the area: above 0, at most 1.")
        if self.band_jitter < 0:
            raise ValueError(f"band_jitter is {self.band_jitter}, but must not be negative.")

    @property
    def _has_window(self) -> bool:
        return self.window > 1 or self.window_size > 0

    def draw(self, batch: dict[str, Any], num_bands: int) -> torch.Tensor:
        """Parameters of each pair of a batch, on the CPU: cheap, for the collator.

        Args:
            batch: has `epoch` and `row`, `(batch,)` integers.
            num_bands: bands of both sensors together.

        Returns:
            `(batch, 8 + 2 * num_bands)` float32: see `PARAMETERS`, then gain and offset of each band, optical first.
        """
        jitter = 2 * num_bands if self.band_jitter else 0
        count = 5 + jitter + (2 if self._has_window else 0)
        drawn = np.empty((len(batch["row"]), count), dtype=np.float32)
        SampleRandomness(self.seed, "augmentation").fill(drawn, batch["epoch"], batch["row"])
        parameters = np.empty((len(drawn), PARAMETERS + 2 * num_bands), dtype=np.float32)
        turns = np.floor(4 * drawn[:, 0]) * self.rotations
        flip = (drawn[:, 1] < 0.5) & self.flips
        # A quarter turn is a transposition and a flip; an additional flip of the columns makes all eight of them.
        parameters[:, 0] = turns % 2
        parameters[:, 1] = (turns == 1) | (turns == 2)
        parameters[:, 2] = ((turns == 2) | (turns == 3)) ^ flip
        if self.flips and not self.rotations:
            parameters[:, 1] = drawn[:, 0] < 0.5
        side = np.sqrt(self.min_crop + (1 - self.min_crop) * drawn[:, 2])
        parameters[:, 3] = side
        parameters[:, 4:6] = drawn[:, 3:5] * (1 - side)[:, None]
        parameters[:, 6:8] = drawn[:, 5 + jitter :] if self._has_window else 0
        parameters[:, PARAMETERS::2], parameters[:, PARAMETERS + 1 :: 2] = 1, 0
        if self.band_jitter:
            # Normal from uniform numbers (Box and Muller, 1958); 1 - u is never 0.
            for_radius, for_angle = drawn[:, 5 : 5 + jitter : 2], drawn[:, 6 : 5 + jitter : 2]
            radius = self.band_jitter * np.sqrt(-2 * np.log1p(-for_radius.astype(np.float64)))
            angle = 2 * np.pi * for_angle
            parameters[:, PARAMETERS::2] += radius * np.cos(angle)
            parameters[:, PARAMETERS + 1 :: 2] += radius * np.sin(angle)
        return torch.from_numpy(parameters)

    def apply(self, inputs: dict[str, torch.Tensor], parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """Change normalised inputs, on the device where they lie.

        Args:
            inputs: any of `pixel_values` and `pixel_values_sar` (batch, bands, height, width), `pixel_mask`,
                `pixel_mask_sar` and `label_map` (batch, height, width). Others are passed on.
            parameters: what `draw` returned for the batch, on the same device.

        Returns:
            The same keys, dtypes and, unless there is a window, shapes.

        Raises:
            ValueError: patches are not square, but `rotations` is set; or windows are to be cut from label maps of
                another size than the images.
        """
        changed = dict(inputs)
        first = PARAMETERS
        for name in _IMAGES:
            if (images := inputs.get(name)) is None:
                continue
            if self.band_jitter:
                gain, offset = (
                    parameters[:, first : first + 2 * images.shape[1]].reshape(-1, images.shape[1], 2).unbind(2)
                )
                images = images * gain[..., None, None].to(images) + offset[..., None, None].to(images)
                first += 2 * images.shape[1]
            turned = self._turn(images, parameters, name)
            changed[name] = self._window(self._crop(turned, parameters, "bilinear"), parameters)
        for name in _MASKS:
            if inputs.get(name) is not None:
                turned = self._turn(inputs[name][:, None], parameters, name)
                # Half a percent of what lies outside is rounding, more is a pixel without data.
                cropped = self._crop(turned.float(), parameters, "bilinear") > 0.995
                changed[name] = self._window(cropped, parameters)[:, 0]
        if inputs.get("label_map") is not None:
            label_map = inputs["label_map"][:, None]
            sizes = {tuple(inputs[name].shape[-2:]) for name in _IMAGES if inputs.get(name) is not None}
            if self._has_window and sizes != {tuple(label_map.shape[-2:])}:
                raise ValueError(
                    f"Windows of images of {sorted(sizes)} px cannot be cut from label maps of "
                    f"{tuple(label_map.shape[-2:])} px: train on whole images (`--window 0`) that patches fill, or "
                    "prepare label maps on the same grid."
                )
            # In double precision every class number is exact; torch has few kernels for 16 bits without sign.
            turned = self._turn(label_map.double(), parameters, "label_map")
            cropped = self._window(self._crop(turned, parameters, "nearest"), parameters)
            changed["label_map"] = cropped[:, 0].to(label_map.dtype)
        return changed

    def _turn(self, images: torch.Tensor, parameters: torch.Tensor, name: str) -> torch.Tensor:
        """Transpose and flip `(batch, bands, height, width)` sample by sample, without a loop."""
        height, width = images.shape[-2:]
        if self.rotations and height != width:
            raise ValueError(
                f"{name}: patches of {height}x{width} px cannot be turned by 90 degrees. Switch rotations off, or "
                "crop the pairs to squares when preparing."
            )
        transpose, flip_rows, flip_columns = (parameters[:, n, None, None, None] > 0.5 for n in range(3))
        if self.rotations:
            images = torch.where(transpose, images.mT, images)
        if self.rotations or self.flips:
            images = torch.where(flip_rows, images.flip(-2), images)
            images = torch.where(flip_columns, images.flip(-1), images)
        return images

    def _crop(self, images: torch.Tensor, parameters: torch.Tensor, mode: str) -> torch.Tensor:
        """Square crops of `(batch, bands, height, width)` at full size."""
        if self.min_crop == 1:
            return images
        side, top, left = parameters[:, 3:6].unbind(1)
        theta = torch.zeros(len(images), 2, 3, device=images.device)
        theta[:, 0, 0], theta[:, 1, 1] = side, side
        theta[:, 0, 2], theta[:, 1, 2] = 2 * left + side - 1, 2 * top + side - 1
        grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
        return functional.grid_sample(
            images, grid.to(images.dtype), mode=mode, padding_mode="border", align_corners=False
        )

    def _window(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """Windows of `(batch, bands, height, width)` that patches fill; a side below a patch stays whole."""
        for axis, place in ((2, 6), (3, 7)) if self._has_window else ():
            side = images.shape[axis]
            kept = min(side, self.window_size or side)
            kept = kept // self.window * self.window or side
            first = (parameters[:, place] * (side - kept + 1)).long().clamp(max=side - kept)
            index = (first[:, None] + torch.arange(kept, device=images.device))[:, None, :, None]
            index = index if axis == 2 else index.mT
            images = images.gather(axis, index.expand(*(kept if n == axis else s for n, s in enumerate(images.shape))))
        return images
