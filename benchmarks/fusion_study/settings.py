"""What a study compares and how long it trains: the contents of its YAML file."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """One data set of the study.

    Attributes:
        kind: `"simulated"` makes pairs, `"ombria"` reads the archive.
        image_size: side in px of what the models see.
        patch_size: side of a patch in px.
        budget_tflops: floating-point operations (in 10**12) that the pretraining of each variant may take.
        batch_size: pairs a pretraining step.
        variants: patterns (`fnmatch`) of the variants that are pretrained and probed.
        finetune: patterns of those that are fine-tuned as well.
        seeds: one run of each variant for each.
        pairs: by split, how many pairs are simulated.
        root: folder of the archive; `ombria` in the folder `FUSMAE_REAL_DATA` where None.
        max_tiles: at most so many tiles of each split of the archive are read; None for all.
    """

    kind: Literal["simulated", "ombria"]
    image_size: int
    patch_size: int
    budget_tflops: float
    batch_size: int
    variants: tuple[str, ...]
    finetune: tuple[str, ...]
    seeds: tuple[int, ...]
    pairs: dict[str, int] = dataclasses.field(default_factory=dict)
    root: str | None = None
    max_tiles: int | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """A study.

    Attributes:
        datasets: by name.
        model: fields of `FusMAEConfig` that all variants share; `num_hidden_layers` counts the fusion layer.
        learning_rate: peak, by objective: `mae`, `contrastive`, `combined`.
        weight_decay: of AdamW.
        contrastive: `geometry` (`consistent` or `independent` crops of both sensors), `min_crop`, `band_jitter`,
            `sar_noise` (standard deviation, normalised units), `projection_size`, `weight` in the combined objective.
        fractions: shares of the training labels.
        sweep: inverse regularisation strengths that the probes try on the validation split.
        token_pairs: training, validation and test pairs at most whose patch tokens are probed.
        shifts: misregistrations in px of the test pairs.
        attention_pairs: test pairs whose attention is measured.
        finetuning: by kind of data set, `steps` by fraction, `batch_size` and `learning_rate`.
        factors_of: the variant that the single-factor rows vary.
        device: where models train.
        autocast: whether matrix products are in bfloat16.
    """

    datasets: dict[str, DatasetSettings]
    model: dict[str, Any]
    learning_rate: dict[str, float]
    weight_decay: float
    contrastive: dict[str, Any]
    fractions: tuple[float, ...]
    sweep: tuple[float, ...]
    token_pairs: dict[str, int]
    shifts: tuple[int, ...]
    attention_pairs: int
    finetuning: dict[str, Any]
    factors_of: str = "both-independent"
    device: str = "cpu"
    autocast: bool = True


def read_settings(path: str | Path) -> Settings:
    """Read a study from a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: a field is missing, or unknown.
    """
    content = yaml.safe_load(Path(path).read_text())
    content["datasets"] = {name: DatasetSettings(**given) for name, given in content["datasets"].items()}
    return Settings(**content)
