"""Other bands for a trained model: weights that belong to a band follow its name."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

BANDS = ("optical_bands", "sar_bands")


_Model: Any = object  # in truth a PreTrainedModel, beside which it is inherited


class BandSelectionMixin(_Model):
    """Loads a checkpoint with other bands than its own, and changes those of a model in memory."""

    config: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        new_bands: str | None = None,
        **kwargs,
    ):
        r"""
        Load a checkpoint, with its own bands or with others; all else as in transformers.

        Weights go by band name: the checkpoint's own configuration says which band each belongs to. transformers
        loads by name and shape of the tensors alone, and would take bands in another order for those of the
        checkpoint.

        Args:
            pretrained_model_name_or_path: folder or Hub repository.
            model_args, kwargs: see [`~transformers.PreTrainedModel.from_pretrained`].
            config: configuration instead of the checkpoint's. Its bands are treated like those given by name.
            optical_bands, sar_bands (`list[str]`): see [`select_bands`], which is called with them after loading.
            new_bands: see [`select_bands`].

        Raises:
            ValueError: the checkpoint never saw a band, and `new_bands` is not `"fresh"`.

        Example: `FusMAEModel.from_pretrained(folder, optical_bands=["B02", "B03", "B04", "B08"])`.
        """
        is_config = isinstance(config, PreTrainedConfig)
        wanted = {name: getattr(config, name) for name in BANDS} if is_config else {}
        wanted |= {name: kwargs[name] for name in BANDS if kwargs.get(name) is not None}
        saved = None
        if wanted and pretrained_model_name_or_path is not None:
            with contextlib.suppress(OSError):  # weights without a configuration beside them
                found, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path, **kwargs)
                saved = cls.config_class.from_dict(found)
        if saved is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        config = copy.deepcopy(config)
        for name in BANDS:
            kwargs.pop(name, None)
            if is_config:
                setattr(config, name, getattr(saved, name))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).select_bands(**wanted, new_bands=new_bands)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; weights, which safetensors keeps private, get the permissions of the rest."""
        super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory, "config.json")
        for weights in Path(save_directory).glob("*.safetensors") if config.is_file() else ():
            weights.chmod(config.stat().st_mode & 0o777)

    @torch.no_grad()
    def select_bands(
        self,
        optical_bands: list[str] | None = None,
        sar_bands: list[str] | None = None,
        new_bands: str | None = None,
    ) -> None:
        """Make the model take other bands, in place: weights that belong to a band follow its name.

        Args:
            optical_bands, sar_bands: the bands to take, in the order of the channels: a subset of the model's, or
                another order. None: as they are.
            new_bands: None to refuse bands that the model does not have, `"fresh"` to draw new weights for them.

        Raises:
            ValueError: a band is unknown or named twice, the weights are sharded or offloaded, or adapters of peft
                other than plain LoRA hold the pixels.
        """
        if new_bands not in (None, "fresh"):
            raise ValueError(f"`new_bands` must be None or 'fresh', not {new_bands!r}.")
        config = copy.deepcopy(self.config)
        for name, bands in (("optical_bands", optical_bands), ("sar_bands", sar_bands)):
            known = getattr(self.config, name)
            missing = [band for band in bands or () if band not in known]
            if missing and new_bands is None:
                raise ValueError(
                    f"`{name}`: the checkpoint never saw {missing}; it knows {list(known)}. Leave them out, or pass "
                    "`new_bands='fresh'` to draw new weights for them, which must be trained."
                )
            if bands is not None:
                setattr(config, name, list(bands))
        config.validate_bands()
        changes = []
        for name in BANDS:
            old, new = getattr(self.config, name), getattr(config, name)
            if old != new:
                index = [old.index(band) if band in old else None for band in new]
                of_sensor = self._band_layers(name.removesuffix("_bands"))
                changes += [(layer, layers_of_pixels(layer, dim), dim, index) for layer, dim in of_sensor]
        for layer, (base, *adapters), dim, index in changes:
            for part in (base, *adapters):
                self._select_band_weights(part, dim, index)
            layer.in_features, layer.out_features = base.in_features, base.out_features
        for name in BANDS:
            setattr(self.config, name, getattr(config, name))

    def _band_layers(self, sensor: str) -> list[tuple[nn.Linear, int]]:
        """Layers whose input (1) or output (0) is pixels of one sensor."""
        return [(getattr(self.base_model.embeddings, f"{sensor}_projection"), 1)]

    def _select_band_weights(self, layer: nn.Linear, dim: int, index: list[int | None]) -> None:
        """Rearrange the pixels of a layer, in the order (band, row, column), by band; None draws new weights."""
        weight, pixels = layer.weight, self.config.patch_size**2
        if weight.device.type == "meta" or hasattr(weight, "device_mesh"):
            raise ValueError("Bands cannot be selected of weights that are offloaded or sharded: load them plainly.")
        shape = list(weight.shape)
        shape[dim] = len(index) * pixels
        fresh = nn.Linear(shape[1], shape[0], device=weight.device, dtype=weight.dtype)
        self._init_weights(fresh)
        known = [(place, band) for place, band in enumerate(index) if band is not None]
        places, bands = torch.tensor(known, dtype=torch.long, device=weight.device).reshape(-1, 2).unbind(dim=1)
        for name, axis in (("weight", dim), ("bias", 0)):
            old, new = getattr(layer, name), getattr(fresh, name)
            if old is None or (name == "bias" and dim == 1):  # of the features, not of the pixels
                continue
            chosen = old.unflatten(axis, (-1, pixels)).index_select(axis, bands)
            new.unflatten(axis, (-1, pixels)).index_copy_(axis, places, chosen)
            setattr(layer, name, nn.Parameter(new.detach(), requires_grad=old.requires_grad))
        layer.in_features, layer.out_features = shape[1], shape[0]


def layers_of_pixels(layer: Any, dim: int) -> list[nn.Linear]:
    """The layers whose input (1) or output (0) is pixels: this one, or what peft made of it, the base layer first."""
    if not hasattr(layer, "base_layer"):
        return [layer]
    adapters = getattr(layer, "lora_A" if dim else "lora_B", {})
    plain = [layer.base_layer, *getattr(layer, "lora_A", {}).values(), *getattr(layer, "lora_B", {}).values()]
    if len(list(layer.parameters())) > sum(len(list(part.parameters())) for part in plain):
        raise ValueError(
            "Bands cannot be selected below these adapters: only the matrices of plain LoRA follow the bands. Call "
            "`select_bands` before `get_peft_model`, or after `merge_and_unload`."
        )
    return [layer.base_layer, *adapters.values()]
