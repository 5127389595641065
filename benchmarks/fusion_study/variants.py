"""What is compared, and what a step of it costs.

A variant is one encoder or more (streams), each shown a pair, one sensor of it, or all bands stacked to one image.
Depth is equal: where there is no early fusion layer, there is one more joint layer.
"""

import dataclasses
import itertools
from fnmatch import fnmatch
from typing import Any, Literal

import torch

from fusmae_hf.flops import encoder_flops, pretraining_flops
from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig

from .data import StudyData
from .settings import Settings

Stream = Literal["pair", "stacked", "optical", "sar"]
Objective = Literal["mae", "contrastive", "combined", "none", "linear", "forest"]

FUSIONS: dict[str, dict[str, Any]] = {
    "none": {"early_fusion": "none", "feature_fusion": "none"},
    "early": {"early_fusion": "cross_attention", "feature_fusion": "none"},
    "query": {"early_fusion": "none", "feature_fusion": "query"},
    "latent": {"early_fusion": "none", "feature_fusion": "latent"},
    "both": {"early_fusion": "cross_attention", "feature_fusion": "query"},
    "both-latent": {"early_fusion": "cross_attention", "feature_fusion": "latent"},
}
STRATEGIES = ("independent", "consistent", "complementary")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the tables.

    Attributes:
        name: of the row.
        group: `fusion`, `baseline`, `factor` or `untrained`.
        objective: of the pretraining; `none` leaves the initial weights, `linear` and `forest` are classifiers of raw
            bands without a network.
        streams: what each of its encoders is shown.
        config: fields of `FusMAEConfig`.
    """

    name: str
    group: str
    objective: Objective = "mae"
    streams: tuple[Stream, ...] = ("pair",)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_pretrained(self) -> bool:
        """Whether there are weights to train beforehand."""
        return self.objective in ("mae", "contrastive", "combined")

    @property
    def has_encoder(self) -> bool:
        """Whether there is a network at all."""
        return bool(self.streams)

    def sees(self, shown: str) -> bool:
        """Whether any of its encoders has something of the sensors shown: `both`, `sar` or `optical`."""
        return (
            shown == "both" or not self.streams or any(stream in ("pair", "stacked", shown) for stream in self.streams)
        )


def all_variants(settings: Settings) -> dict[str, Variant]:
    """Every variant by name; the single-factor rows vary `settings.factors_of`."""
    none = FUSIONS["none"]
    rows = [
        Variant(f"{name}-{strategy}", "fusion", config=fusion | {"mask_strategy": strategy})
        for strategy, (name, fusion) in itertools.product(STRATEGIES, FUSIONS.items())
    ]
    rows += [
        Variant("stacked", "baseline", streams=("stacked",), config=none),
        Variant("two-streams", "baseline", streams=("optical", "sar"), config=none),
        Variant("optical-only", "baseline", streams=("optical",), config=none),
        Variant("sar-only", "baseline", streams=("sar",), config=none),
        Variant("contrastive", "baseline", "contrastive", config=FUSIONS["early"]),
        Variant("contrastive-none", "baseline", "contrastive", config=none),
        Variant("combined", "baseline", "combined", config=FUSIONS["both"]),
        Variant("random-early", "untrained", "none", config=FUSIONS["early"]),
        Variant("random-none", "untrained", "none", config=none),
        Variant("random-stacked", "untrained", "none", ("stacked",), none),
        Variant("raw-linear", "untrained", "linear", ()),
        Variant("raw-forest", "untrained", "forest", ()),
    ]
    best = next((row for row in rows if row.name == settings.factors_of), None)
    if best is None:
        raise ValueError(f"factors_of is {settings.factors_of!r}, but must be one of {[row.name for row in rows]}.")
    width, layers = settings.model["decoder_hidden_size"], settings.model["decoder_num_hidden_layers"]
    factors: dict[str, dict[str, Any]] = {
        "mask-0.5": {"mask_ratio": 0.5},
        "mask-0.9": {"mask_ratio": 0.9},
        "norm-pix-switched": {"norm_pix_loss": not settings.model.get("norm_pix_loss", False)},
        "decoder-deeper": {"decoder_num_hidden_layers": layers + 1},
        "decoder-wider": {"decoder_hidden_size": 2 * width, "decoder_intermediate_size": 4 * width},
        "context-all": {"decoder_context": "all"},
        "modality-dropout": {"modality_dropout": 0.25},
    }
    rows += [Variant(f"factor-{name}", "factor", config=best.config | change) for name, change in factors.items()]
    return {row.name: row for row in rows}


def chosen_variants(settings: Settings, patterns: tuple[str, ...]) -> list[Variant]:
    """Variants whose name fits a pattern, in the order of the patterns.

    Raises:
        ValueError: a pattern fits none.
    """
    known, chosen = all_variants(settings), dict[str, Variant]()
    for pattern in patterns:
        found = {name: row for name, row in known.items() if fnmatch(name, pattern)}
        if not found:
            raise ValueError(f"No variant is called {pattern!r}; known: {list(known)}.")
        chosen |= found
    return list(chosen.values())


def stream_config(settings: Settings, variant: Variant, data: StudyData, stream: Stream) -> FusMAEConfig:
    """Configuration of one encoder of a variant, and of its decoders."""
    fields = settings.model | variant.config
    depth = fields.pop("num_hidden_layers")
    return FusMAEConfig(
        **fields,
        num_hidden_layers=depth - (fields["early_fusion"] == "cross_attention"),
        optical_bands=data.optical_bands + (data.sar_bands if stream == "stacked" else ()),
        sar_bands=data.sar_bands,
        image_size=data.settings.image_size,
        patch_size=data.settings.patch_size,
    )


def stream_inputs(
    stream: Stream, data: StudyData, optical: torch.Tensor | None, sar: torch.Tensor | None
) -> dict[str, torch.Tensor] | None:
    """What an encoder gets of some images, or None where they are not for it.

    A stack of bands has no way to leave a sensor out: its bands are zero then, the mean.
    """
    if stream == "stacked":
        some = optical if optical is not None else sar
        parts = (
            some.new_zeros((len(some), len(bands), *some.shape[2:])) if images is None else images
            for images, bands in ((optical, data.optical_bands), (sar, data.sar_bands))
        )
        return {"pixel_values": torch.cat(list(parts), dim=1)}
    given = {"pixel_values": optical, "pixel_values_sar": sar}
    of_stream = {"pair": tuple(given), "optical": ("pixel_values",), "sar": ("pixel_values_sar",)}[stream]
    kept = {name: images for name, images in given.items() if name in of_stream and images is not None}
    return kept or None


def flops_per_pair(settings: Settings, variant: Variant, data: StudyData, stream: Stream) -> float:
    """Floating-point operations of a pretraining step, forward and backward, for one pair."""
    config, size = stream_config(settings, variant, data, stream), data.settings.image_size
    flops = 0.0
    if variant.objective != "contrastive":
        sensors = {"pair": "both", "stacked": "optical"}.get(stream, stream)
        batch_size = data.settings.batch_size
        flops += pretraining_flops(config, size, size, sensors=sensors, batch_size=batch_size)
    if variant.objective != "mae":
        kept = {"optical": config.num_patches, "sar": config.num_patches}
        if variant.objective == "combined":
            kept = {
                sensor: int(config.num_patches * (1 - ratio) + 1e-6) for sensor, ratio in config.mask_ratios.items()
            }
        values = kept["optical"] * len(config.optical_bands) + kept["sar"] * len(config.sar_bands)
        no_gradient = 2 * values * config.patch_size**2 * config.hidden_size  # of the pixels
        heads = 4 * config.hidden_size * (config.hidden_size + settings.contrastive["projection_size"])
        similarities = 2 * data.settings.batch_size * settings.contrastive["projection_size"]
        forward = encoder_flops(config, kept["optical"], 0) + encoder_flops(config, 0, kept["sar"])
        flops += 3 * (forward + heads + similarities) - no_gradient
    return flops


def pretraining_steps(settings: Settings, variant: Variant, data: StudyData) -> dict[Stream, int]:
    """Steps of each stream, so that all variants take the same number of operations; streams share it evenly."""
    budget = data.settings.budget_tflops * 1e12 / len(variant.streams)
    return {
        stream: max(1, round(budget / (flops_per_pair(settings, variant, data, stream) * data.settings.batch_size)))
        for stream in variant.streams
    }
