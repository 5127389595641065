"""Image processor of Fus-MAE: from arrays in physical units to normalised tensors, bands picked by name."""

import inspect
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType

from .arrays_fusmae import nearest_names, offsets_of_batches, one_of, resized, spread, to_batches
from .no_data_fusmae import Declaration, has_data
from .plausibility_fusmae import Plausibility
from .sensors_fusmae import (
    OPTICAL_BANDS,
    OPTICAL_UNITS,
    REFLECTANCE_SCALE,
    SAR_BANDS,
    SAR_UNITS,
    band_positions,
    did_you_mean,
    offset_problem,
    sentinel_bands,
    statistics_for,
)

_OF_TRANSFORMERS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
"""Names that transformers puts into configurations."""


class FusMAEImageProcessorKwargs(ImagesKwargs, total=False):
    """What preprocessor_config.json stores; see [`FusMAEImageProcessor`]."""

    sar_bands: list[str] | None
    optical_bands: list[str] | None
    statistics: str | None
    sar_mean: dict[str, float] | list[float] | None
    sar_std: dict[str, float] | list[float] | None
    optical_mean: dict[str, float] | list[float] | None
    optical_std: dict[str, float] | list[float] | None
    sar_units: str | None
    optical_units: str | None
    optical_offset: float | int | None
    sar_nodata: float | int | None
    optical_nodata: float | int | None
    size_divisor: int | None


class FusMAEImageProcessor(BaseImageProcessor):
    r"""
    Prepares SAR and optical patches for Fus-MAE.

    Bands are picked and ordered by name, units and offset are declared, pixels without data are marked, and every
    band is normalised with the mean and standard deviation stored here, which travel with the weights. No statistic
    is taken from the batch, so that a patch is processed alike whatever its neighbours are.

    Values that do not look like what is declared raise or warn, each kind of sign once for each declaration of units,
    bands, offset and dtype: see `plausibility_fusmae.Plausibility`. With units `"raw"` nothing is checked.

    Args:
        sar_bands (`list[str]`): SAR bands that the model takes, in its order.
        optical_bands (`list[str]`): optical bands that the model takes, in its order.
        statistics (`str`): dataset whose published statistics to use, a key of `sensors_fusmae.STATISTICS`, for a
            sensor whose mean and std are not given. None where they are your own.
        sar_mean, sar_std (`dict[str, float]` or `list[float]`): by band name, or one value a band in the order of
            `sar_bands`; in dB, or in the raw values of `sar_units="raw"`.
        optical_mean, optical_std (`dict[str, float]` or `list[float]`): the same in digital numbers (reflectance x
            10,000) without offset, or in raw values.
        sar_units (`str`): `"db"`, `"linear"` (power; converted to dB, zero and negative mean no data) or `"raw"`.
        optical_units (`str`): `"dn"`, `"reflectance"` (multiplied by 10,000) or `"raw"`.
        optical_offset (`float`): subtracted from every optical value, in digital numbers (from reflectance: after the
            multiplication). 1000 for products of processing baseline 04.00 and later that still carry it.
        sar_nodata (`float`): a pixel with this value in any SAR band holds no data. NaN and infinity never do.
        optical_nodata (`float`): a pixel with this value in any optical band holds no data; if it is 0 (Sentinel-2),
            in all of them.
        do_normalize (`bool`): subtract the mean and divide by the standard deviation. Where off, no value warns.
        do_resize (`bool`): resize to `size`, bilinear with antialiasing; pixels without data have no weight. Off
            unless asked for.
        size (`dict[str, int]`): `{"height": ..., "width": ...}` in pixels.
        do_pad (`bool`): pad at the bottom and on the right to the largest patch of the batch, and on to the next
            multiple of `size_divisor`. Padding is marked as without data in the pixel masks, which are always returned
            then. Off unless asked for: patches of other sizes are refused by the model.
        size_divisor (`int`): the patch size of the model, in pixels.

    Example:

    ```python
    >>> import numpy as np
    >>> from fusmae_hf import FusMAEImageProcessor

    >>> processor = FusMAEImageProcessor(statistics="bigearthnet")
    >>> sar = np.random.normal([[[-12]], [[-19]]], 5, (2, 120, 120)).astype("float32")  # VV, VH in dB
    >>> optical = np.random.randint(1, 5000, (12, 120, 120)).astype("uint16")  # digital numbers, B01 ... B12
    >>> inputs = processor(sar=sar, optical=optical)
    >>> inputs["pixel_values"].shape, inputs["pixel_values_sar"].shape
    (torch.Size([1, 12, 120, 120]), torch.Size([1, 2, 120, 120]))
    ```"""

    valid_kwargs = FusMAEImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_values_sar"]  # noqa: RUF012 - a list in every processor
    # None is saved only where the class has another default.
    statistics: str | None = "bigearthnet"
    optical_nodata: float | None = 0.0

    def __init__(
        self,
        sar_bands: Sequence[str] = SAR_BANDS,
        optical_bands: Sequence[str] = OPTICAL_BANDS,
        statistics: str | None = "bigearthnet",
        sar_mean: dict[str, float] | Sequence[float] | None = None,
        sar_std: dict[str, float] | Sequence[float] | None = None,
        optical_mean: dict[str, float] | Sequence[float] | None = None,
        optical_std: dict[str, float] | Sequence[float] | None = None,
        sar_units: str = "db",
        optical_units: str = "dn",
        optical_offset: float = 0.0,
        sar_nodata: float | None = None,
        optical_nodata: float | None = 0.0,
        do_normalize: bool = True,
        do_resize: bool = False,
        size: dict[str, int] | None = None,
        do_pad: bool = False,
        size_divisor: int | None = None,
        **kwargs,
    ):
        self._refuse_unknown(name for name in kwargs if name not in _OF_TRANSFORMERS)
        super().__init__(**kwargs)
        self.sar_units = one_of("sar_units", sar_units, SAR_UNITS)
        self.optical_units = one_of("optical_units", optical_units, OPTICAL_UNITS)
        self.sar_bands = sentinel_bands(sar_bands, sar_units)
        self.optical_bands = sentinel_bands(optical_bands, optical_units)
        self.statistics = statistics
        self.optical_offset = self._offset(optical_offset, optical_units)
        self.sar_nodata = sar_nodata
        self.optical_nodata = optical_nodata
        self.do_normalize = do_normalize
        self.do_resize = do_resize
        self.size = None if size is None else dict(size)
        if do_resize and set(self.size or {}) != {"height", "width"}:
            raise ValueError(f'`do_resize` needs `size={{"height": ..., "width": ...}}` in pixels, not {size!r}.')
        self.do_pad = do_pad
        self.size_divisor = size_divisor
        if do_pad and (not isinstance(size_divisor, int) or size_divisor < 1):
            raise ValueError(f"`do_pad` needs `size_divisor`, the patch size of the model, not {size_divisor!r}.")
        self.sar_mean, self.sar_std = self._statistics("sar", self.sar_bands, sar_mean, sar_std)
        self.optical_mean, self.optical_std = self._statistics(
            "optical", self.optical_bands, optical_mean, optical_std
        )
        self._plausibility = Plausibility()

    def _statistics(self, sensor, bands, mean, std) -> tuple[dict[str, float], dict[str, float]]:
        """Mean and std by band name, given or published, checked to cover every band."""
        if (mean is None) != (std is None):
            raise ValueError(f"`{sensor}_mean` and `{sensor}_std` belong together: give both or neither.")
        if mean is None:
            if self.statistics is None:
                raise ValueError(f"No statistics of the {sensor} sensor: name a dataset, or give mean and std.")
            try:
                mean, std = statistics_for(self.statistics, sensor, bands)
            except ValueError as error:
                raise ValueError(f"{error}{did_you_mean(bands)}") from None
        by_band = []
        for name, values in ((f"{sensor}_mean", mean), (f"{sensor}_std", std)):
            if not isinstance(values, dict):
                if len(values) != len(bands):
                    raise ValueError(
                        f"`{name}` has {len(values)} values for the {len(bands)} bands {bands}; give one a band, or a "
                        "dictionary by band name."
                    )
                values = dict(zip(bands, values, strict=True))
            names = sentinel_bands(list(values), getattr(self, f"{sensor}_units"))
            values = dict(zip(names, values.values(), strict=True))
            band_positions(bands, list(values), f"{name} of the {sensor} sensor")
            by_band.append({band: float(value) for band, value in values.items()})
        bad = {band: by_band[1][band] for band in bands if not 0 < by_band[1][band] < float("inf")}
        if bad:
            raise ValueError(f"`{sensor}_std` must be positive and finite, but is {bad}.")
        return by_band[0], by_band[1]

    @staticmethod
    def _offset(offset: Any, units: str) -> Any:
        """The offset as a number, unless it has the wrong sign or scale; one a sample as it is given."""
        if not isinstance(offset, int | float):
            return offset
        if problem := offset_problem(float(offset), units):
            raise ValueError(f"optical: {problem}")
        return float(offset)

    @classmethod
    def _refuse_unknown(cls, names: Iterable[str], but_foreign: bool = False) -> None:
        """Raise a TypeError for names that are no arguments of the processor, or for those near to one alone."""
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
        unknown = [name for name in names if name not in known]
        near = nearest_names(unknown, known)
        if near if but_foreign else unknown:
            raise TypeError(f"{cls.__name__} has no {unknown}.{near} It takes {known}.")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As upstream: foreign keys of a configuration become attributes, foreign keywords are for others."""
        cls._refuse_unknown(kwargs, but_foreign=True)
        known = {*inspect.signature(cls.__init__).parameters, *_OF_TRANSFORMERS}
        loaded = super().from_dict(
            {key: image_processor_dict[key] for key in image_processor_dict if key in known}, **kwargs
        )
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        for key in image_processor_dict.keys() - known:
            setattr(processor, key, image_processor_dict[key])
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """What preprocessor_config.json holds."""
        output = super().to_dict()
        output.pop("_plausibility", None)
        return output

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """See [`~FusMAEImageProcessor.preprocess`]. Sensors are named, so that they cannot be swapped by accident."""
        if args or "images" in kwargs:
            raise TypeError(
                "Name the sensors: processor(sar=..., optical=...). Sensors never go by position. The pipelines of "
                "transformers take one picture. Those of this model take a pair: pipeline(<task>, model=<folder or "
                "Hub id>, trust_remote_code=True)({'optical': ..., 'sar': ...})."
            )
        arguments = list(inspect.signature(self.preprocess).parameters)
        if unknown := [name for name in kwargs if name not in arguments]:
            settings = [
                f"{name}={kwargs[name]!r}" for name in unknown if name in inspect.signature(type(self)).parameters
            ]
            advice = (
                f" Set it at loading: from_pretrained(<your checkpoint>, {', '.join(settings)})." if settings else ""
            )
            near = nearest_names(unknown, [*arguments, *inspect.signature(type(self)).parameters])
            raise TypeError(f"A call of FusMAEImageProcessor takes {arguments}, but not {unknown}.{advice or near}")
        return self.preprocess(**kwargs)

    def preprocess(
        self,
        *,
        sar: Any = None,
        optical: Any = None,
        sar_bands: Sequence[str] | None = None,
        optical_bands: Sequence[str] | None = None,
        sar_units: str | None = None,
        optical_units: str | None = None,
        optical_offset: float | Sequence[float] | torch.Tensor | None = None,
        return_pixel_mask: bool | None = None,
        return_tensors: str | TensorType = "pt",
    ) -> BatchFeature:
        r"""
        Prepare one pair or a batch, on the device where the tensors lie.

        Args:
            sar: numpy array (a masked one keeps its mask) or torch tensor `(bands, height, width)` or `(batch_size,
                bands, height, width)`, or a list of arrays `(bands, height, width)` in which None stands for a sample
                without SAR. None: no sample has any.
            optical: the same for the optical sensor.
            sar_bands: names of the bands of `sar`, in the order in which they lie in the array; the processor's own
                where None. Bands that the model does not take are left out.
            optical_bands: names of the bands of `optical`.
            sar_units, optical_units, optical_offset: of these arrays, if they differ; offsets may be one a sample.
            return_pixel_mask: whether to return `pixel_mask` and `pixel_mask_sar`. None: where any pixel lacks data,
                and a patch without any data raises. True and False look at no value, so that a GPU is not stalled.
            return_tensors: `"pt"` or `"np"`.

        Returns:
            `pixel_values` `(batch_size, bands, height, width)` float32 and `pixel_values_sar`; `pixel_mask` and
            `pixel_mask_sar` `(batch_size, height, width)` bool, True where there is data; `optical_available` and
            `sar_available` `(batch_size,)` bool where a list holds None.

        Raises:
            ValueError: no sensor, unknown or missing bands, shapes that disagree, unknown units, values that cannot
                be in the declared units, or a patch without any data.
        """
        if sar is None and optical is None:
            raise ValueError("Neither sensor was given: pass `sar=`, `optical=` or both.")
        if self.do_pad and return_pixel_mask is False:
            raise ValueError("`do_pad` marks padding in the pixel masks: `return_pixel_mask=False` cannot go with it.")
        patches: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        availables, sizes = {}, {}
        for sensor, values, bands, units, offset in (
            ("optical", optical, optical_bands, optical_units, optical_offset),
            ("sar", sar, sar_bands, sar_units, 0.0),
        ):
            if values is None:
                continue
            units = one_of(
                f"{sensor}_units",
                units or getattr(self, f"{sensor}_units"),
                SAR_UNITS if sensor == "sar" else OPTICAL_UNITS,
            )
            offset = self.optical_offset if offset is None else self._offset(offset, units)
            batches, available = to_batches(values, sensor)
            offsets = offsets_of_batches(offset, batches, available)
            bands = sentinel_bands(getattr(self, f"{sensor}_bands") if bands is None else bands, units)
            wanted = getattr(self, f"{sensor}_bands")
            patches[sensor] = []
            for batch, offset in zip(batches, offsets, strict=True):
                pixels, valid = self._pick(batch, sensor, bands)
                seen, of_all = pixels, offset
                if isinstance(offset, torch.Tensor):  # judged as if none carried one
                    seen, of_all = pixels - offset / (REFLECTANCE_SCALE if units == "reflectance" else 1.0), 0.0
                declared = Declaration(sensor, units, tuple(wanted), tuple(bands), of_all, batch.dtype)
                stalls = return_pixel_mask is not None and pixels.device.type != "cpu"
                for finding in () if stalls else self._plausibility.look(seen, valid, declared):
                    if finding.impossible:
                        raise ValueError(str(finding))
                    if self.do_normalize:
                        warnings.warn(str(finding), stacklevel=3)
                patches[sensor].append(self._prepare(pixels, valid, sensor, units, offset))
            availables[sensor] = available
            sizes[sensor] = [tuple(mask.shape[1:]) for _, mask in patches[sensor] for _ in range(mask.shape[0])]
            if len(set(sizes[sensor])) > 1 and not self.do_pad:
                raise ValueError(
                    f"{sensor}: the patches of a batch differ in size (height, width): {sorted(set(sizes[sensor]))}. "
                    "Crop them, or load a processor that pads them: FusMAEImageProcessor.from_pretrained(<your "
                    "checkpoint>, do_pad=True, size_divisor=<patch size of the model>), or one with do_resize=True."
                )
        self._refuse_other_grids(sizes, availables)
        target = None
        if self.do_pad:
            largest = [max(size[axis] for shapes in sizes.values() for size in shapes) for axis in (0, 1)]
            divisor = self.size_divisor or 1
            target = [-(-side // divisor) * divisor for side in largest]
        data = {}
        for sensor, suffix in (("optical", ""), ("sar", "_sar")):
            if sensor not in patches:
                continue
            available = availables[sensor]
            padded = patches[sensor] if target is None else [self._pad(*p, target, sensor) for p in patches[sensor]]
            pixels, mask = torch.cat([p for p, _ in padded]), torch.cat([m for _, m in padded])
            if available is not None:
                pixels, mask = spread(pixels, available), spread(mask, available)
                data[f"{sensor}_available"] = available.to(pixels.device)
            if return_pixel_mask is None:
                self._refuse_empty(mask, available, sensor)
                with_mask = self.do_pad or not bool(mask[slice(None) if available is None else available].all())
            else:
                with_mask = return_pixel_mask
            data[f"pixel_values{suffix}"] = pixels
            if with_mask:
                data[f"pixel_mask{suffix}"] = mask
        return BatchFeature(data=data, tensor_type=return_tensors)

    @staticmethod
    def _refuse_other_grids(sizes, availables):
        """Raise a ValueError unless both sensors show the same places, sample by sample."""
        if len(sizes) < 2:
            return
        shapes = {}
        for sensor, given in sizes.items():
            available = availables[sensor]
            rest = iter(given)
            present = [True] * len(given) if available is None else available.tolist()
            shapes[sensor] = [next(rest) if here else None for here in present]
        if len(shapes["sar"]) != len(shapes["optical"]):
            raise ValueError(
                f"The sensors differ in the number of samples: {len(shapes['sar'])} SAR and {len(shapes['optical'])} "
                "optical were given. Give both for each sample, in the same order, with None in a list for a missing "
                "one."
            )
        pairs = list(zip(shapes["sar"], shapes["optical"], strict=True))
        differing = [pair for pair in pairs if None not in pair and pair[0] != pair[1]]
        if differing:
            raise ValueError(
                "Both sensors must show the same places on the same grid, but there is a SAR patch of (height, width) "
                f"{differing[0][0]} for an optical one of {differing[0][1]}. Resample one onto the grid of the other."
            )

    def _pad(self, pixels, mask, size, sensor):
        """Extend pixels and mask at the bottom and on the right to (height, width)."""
        padding = (0, size[1] - mask.shape[2], 0, size[0] - mask.shape[1])
        mask = torch.nn.functional.pad(mask, padding)
        pixels = torch.nn.functional.pad(pixels, padding)
        if not self.do_normalize:
            pixels = torch.where(mask[:, None], pixels, self._tensors(sensor, pixels.device)[0])
        return pixels, mask

    def _pick(self, values, sensor, bands) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's bands `(batch, bands, height, width)`, and where they hold data `(batch, height, width)`."""
        wanted = getattr(self, f"{sensor}_bands")
        if values.shape[1] != len(bands):
            advice = f"Pass `{sensor}_bands=[...]` with one name for each band of the array, in its order."
            if values.shape[3] == len(bands):
                advice = "Its last axis fits, but bands come first: array.transpose(2, 0, 1), of a batch (0, 3, 1, 2)."
            given = f"the array has {values.shape[1]} bands but {len(bands)} names apply to it: {bands}."
            raise ValueError(f"{sensor}: {given} {advice}")
        index = band_positions(wanted, bands, sensor)
        pixels = values.to(torch.float32)
        if index != list(range(len(bands))):
            pixels = pixels[:, index]
        nodata = getattr(self, f"{sensor}_nodata")
        valid = has_data(pixels, sensor, nodata=nodata, known_finite=not values.is_floating_point())
        return pixels, valid

    def _prepare(self, pixels, valid, sensor, units, offset) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pixels of the same shape and where they hold data, of which less may be left."""
        if units == "linear":
            valid = valid & has_data(pixels, "sar", units, known_finite=True)
            pixels = 10 * torch.log10(pixels.clamp(min=1e-30))
        elif units == "reflectance":
            pixels = pixels * REFLECTANCE_SCALE
        mean, std = self._tensors(sensor, pixels.device)
        if self.do_normalize:
            pixels = (pixels - (mean + offset)) / std
        elif isinstance(offset, torch.Tensor) or offset:
            pixels = pixels - offset
        pixels = torch.where(valid[:, None], pixels, 0.0 if self.do_normalize else mean)
        if self.do_resize:
            sides = self.size or {}
            pixels, valid = resized(pixels, valid, (sides["height"], sides["width"]))
            pixels = torch.where(valid[:, None], pixels, 0.0 if self.do_normalize else mean)
        return pixels, valid

    def _tensors(self, sensor: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std of the model's bands, `(1, bands, 1, 1)` each."""
        bands = getattr(self, f"{sensor}_bands")
        mean, std = (
            torch.tensor([getattr(self, f"{sensor}_{name}")[band] for band in bands], device=device)[
                None, :, None, None
            ]
            for name in ("mean", "std")
        )
        return mean, std

    def denormalize(self, pixel_values: torch.Tensor, sensor: str) -> torch.Tensor:
        """Undo the normalisation: dB for SAR and digital numbers without offset for optical, or raw values.

        Args:
            pixel_values: `(batch_size, bands, height, width)` as this processor returns them.
            sensor: `"sar"` or `"optical"`.

        Returns:
            A float32 tensor of the same shape.
        """
        mean, std = self._tensors(one_of("sensor", sensor, ("sar", "optical")), pixel_values.device)
        return pixel_values.float() * std + mean

    def post_process_reconstruction(
        self,
        outputs: Any,
        optical_offset: float = 0.0,
        optical_units: str = "dn",
        sar_units: str = "db",
        size: tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Physical units of what `FusMAEForPreTraining.reconstruct` gives.

        Args:
            outputs: with `pixel_values` and `pixel_values_sar`, either of which may be None.
            optical_offset: added to the optical values, in digital numbers. The processor subtracted its own from
                the inputs, so that 0, the default, gives digital numbers without offset (reflectance x 10,000);
                pass the processor's `optical_offset` to get the numbers of the product back.
            optical_units: `"dn"` or `"reflectance"` (divided by 10,000, after the offset was added). Where the
                processor's statistics are of raw values, `"dn"` means these.
            sar_units: `"db"` or `"linear"` (power). Where the processor's statistics are of raw values, `"db"` means
                these.
            size: (height, width) to crop to, where the inputs were padded.

        Returns:
            `{"optical": ..., "sar": ...}`, float32 `(batch_size, bands, height, width)`; predicted values are neither
            clipped nor rounded. With `norm_pix_loss`, mind `outputs.assumed_levels`: brightness is no prediction then.

        Raises:
            ValueError: unknown units, or units that raw values do not have.
        """
        one_of("optical_units", optical_units, ("dn", "reflectance"))
        one_of("sar_units", sar_units, ("db", "linear"))
        for sensor, units, plain in (("optical", optical_units, "dn"), ("sar", sar_units, "db")):
            if getattr(self, f"{sensor}_units") == "raw" and units != plain:
                raise ValueError(f"{sensor}: this processor holds raw values, which cannot be made {units!r}.")
        images = {}
        for sensor, pixels in (("optical", outputs.pixel_values), ("sar", outputs.pixel_values_sar)):
            if pixels is None:
                continue
            values = self.denormalize(pixels, sensor) if self.do_normalize else pixels.float()
            if sensor == "optical":
                values = (values + optical_offset) / (REFLECTANCE_SCALE if optical_units == "reflectance" else 1.0)
            elif sar_units == "linear":
                values = 10 ** (values / 10)
            images[sensor] = values if size is None else values[..., : size[0], : size[1]]
        return images

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Label maps of what [`FusMAEForSemanticSegmentation`] gives.

        Args:
            outputs: with `logits` `(batch_size, num_labels, rows, columns)`.
            target_sizes: (height, width) of each sample, to which logits are upsampled bilinearly; that of the logits
                where None. Padding counts as part of the image: crop it from the result.

        Returns:
            An int64 tensor `(height, width)` for each sample.

        Raises:
            ValueError: there is not one size for each sample.
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != logits.shape[0]:
            raise ValueError(f"`target_sizes` has {len(target_sizes)} sizes for {logits.shape[0]} samples.")
        return [
            torch.nn.functional.interpolate(sample[None], tuple(size), mode="bilinear")[0].argmax(dim=0)
            for sample, size in zip(logits, target_sizes, strict=True)
        ]

    @staticmethod
    def _refuse_empty(mask, available, sensor):
        empty = ~mask.flatten(1).any(dim=1)
        if available is not None:
            empty = empty & available.to(empty.device)
        if bool(empty.any()):
            raise ValueError(
                f"{sensor}: sample {empty.nonzero().flatten().tolist()} of the batch holds no valid pixel (all "
                f"no-data, NaN or infinite). Leave the sample out, or pass None for its {sensor} patch in a list."
            )


FusMAEImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["FusMAEImageProcessor"]
