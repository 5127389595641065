"""The card that goes with a checkpoint, written from the records of the run that made it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .data.pairs import PairsInfo
from .modeling.configuration_fusmae import FusMAEConfig
from .modeling.image_processing_fusmae import FusMAEImageProcessor
from .plain_markdown import code, inline

CITATION = """\
@misc{chantohing2024fusmae,
  title  = {Fus-MAE: A cross-attention-based data fusion approach for Masked Autoencoders in remote sensing},
  author = {Hugo Chan-To-Hing and Bharadwaj Veeravalli},
  year   = {2024},
  eprint = {2401.02764},
  archivePrefix = {arXiv}
}"""
"""How to cite the paper."""

_BODY = """
# {name}

A Fus-MAE encoder and decoders, pretrained by masked reconstruction on {pairs:,} pairs of {dataset}. Fus-MAE is a
masked autoencoder that fuses SAR and optical patches with cross-attention (arXiv 2401.02764); this is a
reconstruction of it by `fusmae_hf`: details that the paper leaves open are this project's choices.{simulated}

## Use

```python
from transformers import AutoImageProcessor, AutoModel
import fusmae_hf  # or pass trust_remote_code=True, which runs the Python files of this folder

processor = AutoImageProcessor.from_pretrained("{folder}")
model = AutoModel.from_pretrained("{folder}")
features = model(**processor(sar=sar, optical=optical)).pooler_output
```

## Sensors

| | bands, in order | units | normalised with |
|---|---|---|---|
| SAR | {sar_bands} | {sar_units} | {sar_statistics} |
| optical | {optical_bands} | {optical_units}, offset {optical_offset:g} | {optical_statistics} |

Mean and standard deviation of every band are in `preprocessor_config.json`.

## Training data

{dataset} ({source}; licence of the imagery: {license}), {pairs:,} pairs, content {content_hash}.

## Recipe

{command}

{steps:,} steps of {batch} pairs, seed {seed}, {precision}, {device}; preset fields: {config}.

## Held-out reconstruction

Mean squared error on masked pixels with data, in squared standard deviations of the band. *Visible mean* predicts the
mean of the visible pixels of a band; *interpolated* fills the masked pixels from the visible ones by a Gaussian.

{results}

## Limits

Reconstruction error says nothing of how good the features are for a task: measure that on yours. Not evaluated for
sensors, places, seasons or processing levels other than those above.

## Citation

```bibtex
{citation}
```
"""


def results_table(metrics: dict[str, float], held_out: dict[str, int]) -> str:
    """Markdown table of held-out reconstruction errors.

    Args:
        metrics: as logged by the Trainer, `eval_<name>_optical_loss` and so on.
        held_out: number of pairs of each held-out dataset, by name.
    """
    if not held_out:
        return "Nothing was held out."
    lines = ["| held out | pairs | sensor | model | visible mean | interpolated |", "|---|---|---|---|---|---|"]
    for name, pairs in held_out.items():
        for sensor in ("optical", "sar"):
            keys = [f"eval_{name}_{sensor}_loss{kind}" for kind in ("", "_visible_mean", "_interpolation")]
            if keys[0] in metrics:
                values = [f"{metrics[key]:.4f}" if key in metrics else "-" for key in keys]
                lines.append(" | ".join([f"| {name}", str(pairs), sensor, *values]) + " |")
    return "\n".join(lines)


def write_model_card(
    folder: str | Path,
    *,
    config: FusMAEConfig,
    processor: FusMAEImageProcessor,
    info: PairsInfo,
    record: dict[str, Any],
    metrics: dict[str, float],
) -> Path:
    """Write `README.md`, the model card, into a checkpoint folder.

    Args:
        folder: the checkpoint.
        config: configuration of the model.
        processor: its bands, units and statistics.
        info: what holds for the training pairs.
        record: the run's own record (`run.json`).
        metrics: held-out losses.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    name = f"fusmae-{record['preset']}-{info.name}"
    results = [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type=info.name,
            dataset_name=f"{info.name}, held out: {held_out}",
            metric_type="mse",
            metric_name=f"masked reconstruction, {sensor}",
            metric_value=metrics[f"eval_{held_out}_{sensor}_loss"],
        )
        for held_out in record["held_out"]
        for sensor in ("optical", "sar")
        if f"eval_{held_out}_{sensor}_loss" in metrics
    ]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["remote-sensing", "sentinel-1", "sentinel-2", "sar", "masked-autoencoder", "data-fusion", "fusmae"],
        license="apache-2.0",
        metrics=["mse"],
        eval_results=results or None,
    )
    body = _BODY.format(
        **card_fields(config=config, processor=processor, info=info, record=record),
        name=inline(name),
        folder=folder.name,
        results=results_table(metrics, record["held_out"]),
    )
    return save_card(folder, data, body)


def card_fields(
    *, config: FusMAEConfig, processor: FusMAEImageProcessor, info: PairsInfo, record: dict[str, Any]
) -> dict[str, Any]:
    """What every card tells of the sensors, the training pairs and the run, by the names of the templates."""
    statistics = f"{inline(processor.statistics)} statistics" if processor.statistics else "statistics of its own"
    return {
        "dataset": inline(info.name),
        "simulated": " **The imagery is simulated.**" if info.simulated else "",
        "sar_bands": inline(", ".join(processor.sar_bands)),
        "sar_units": processor.sar_units,
        "sar_statistics": statistics,
        "optical_bands": inline(", ".join(processor.optical_bands)),
        "optical_units": processor.optical_units,
        "optical_offset": processor.optical_offset,
        "optical_statistics": statistics,
        "source": inline(info.source),
        "license": inline(info.license),
        "pairs": record["pairs"],
        "content_hash": record["content"],
        "command": code(record["command"]),
        "steps": record["steps"],
        "batch": record["global_batch_size"],
        "seed": record["seed"],
        "precision": record["precision"],
        "device": record["device"],
        "config": inline(
            json.dumps({key: value for key, value in config.to_diff_dict().items() if key in config._own_fields()})
        ),
        "citation": CITATION,
    }


def save_card(folder: Path, data: ModelCardData, body: str) -> Path:
    """Write metadata and text as `README.md` of a checkpoint folder; gives its path."""
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(path)
    return path
