"""The card that goes with a checkpoint, written from the records of the run that made it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.evaluation.probe_scores import ProbeScore, probe_table
from fusmae_hf.files.plain_text import code, inline
from fusmae_hf.hub.eval_results import write_eval_results
from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor

CITATION = """\
@misc{chantohing2024fusmae,
  title  = {Fus-MAE: A cross-attention-based data fusion approach for Masked Autoencoders in remote sensing},
  author = {Hugo Chan-To-Hing and Bharadwaj Veeravalli},
  year   = {2024},
  eprint = {2401.02764},
  archivePrefix = {arXiv}
}"""
"""How to cite the paper."""

INTENDED_USE = """\
Features of pairs of Sentinel-1 (SAR) and Sentinel-2 (optical) patches, or of one sensor alone, for fine-tuning and
probing.

Reconstructions are guesses of an average, not observations: do not use them to fill data gaps that decisions rest on.
Checkpoints trained on simulated imagery show that the program works. They know next to nothing of real places."""
"""What a checkpoint is for, and what it is not."""

LIMITS = """\
Reconstruction error says little about how well features separate classes: measure that on your task. Not evaluated for
sensors, places, seasons or processing levels other than those named here. Imagery of another processing level, of
ascending or descending orbits alone, or of baselines with an offset needs statistics and an offset of its own."""
"""Limits of every pretraining checkpoint."""

BIGEARTHNET_GEOGRAPHY = """\
BigEarthNet covers ten European countries in 2017 and 2018. Features for other regions, seasons and processing levels
must be checked before use."""
"""What its places and times mean for a checkpoint trained on BigEarthNet."""

SIMULATED_GEOGRAPHY = """\
Simulated scenes are of no real place: shapes, spectra and backscatter follow made-up rules, with the band statistics
of BigEarthNet in mind. What such training leaves out is unknown."""
"""What made-up scenes mean for a checkpoint."""

_OPENING = """
# {name}

{what}{pretrained}.
Fus-MAE is a masked autoencoder that fuses SAR and optical patches with cross-attention (arXiv 2401.02764); this is a
reconstruction of it by `fusmae_hf`: details that the paper leaves open are this project's choices.{simulated}"""

_USE = """\
```python
from transformers import AutoImageProcessor, {auto_class}
import fusmae_hf  # or pass trust_remote_code=True, which runs the Python files of this folder

processor = AutoImageProcessor.from_pretrained("{folder}")
model = {auto_class}.from_pretrained("{folder}").eval()
outputs = model(**processor(sar=sar, optical=optical)){result}
```

`sar` ({num_sar}, height, width) in {sar_units}, `optical` ({num_optical}, height, width) in {optical_units}, bands
in the order below, sides multiples of {patch_size} px; either may be left out. Arrays come as they are: the processor
normalises them."""

_SENSORS = """\
| | bands, in order | units | normalised with |
|---|---|---|---|
| SAR | {sar_bands} | {sar_units} | {sar_statistics} |
| optical | {optical_bands} | {optical_units}, offset {optical_offset:g} | {optical_statistics} |

| sensor | band | mean | standard deviation |
|---|---|---|---|
{band_rows}"""

_DATA = "{dataset} ({source}; licence of the imagery: {license}), {pairs:,} pairs, content {content_hash}."

_RECIPE = """\
{command}

{steps:,} steps of {batch} pairs, seed {seed}, {precision}, {device}. {architecture} All fields are in
`config.json`."""

_RESULTS = """\
Mean squared error on masked pixels with data, in squared standard deviations of the band; one run, seed {seed}.
*Visible mean* predicts the mean of the visible pixels of a band; *interpolated* fills the masked pixels from the
visible ones by a Gaussian.

{results}

{reading}"""

_NORMALISED_RESULTS = """\
Mean squared error on masked pixels with data, each patch of a sensor normalised by its own mean and standard deviation
(`norm_pix_loss`); one run, seed {seed}. A flat patch, the same in all bands, scores 1. The model has not learned the
brightness of a patch, so there is no comparison with interpolation.

{results}"""

_PROBES = """\
Linear probes of frozen features (logistic regression on the mean of the patch tokens; *AP macro* of the classes of
scenes, in per cent) on {probed_on}: mean and 95 % interval over
{seeds} seeds, which draw the labels. With all labels there is nothing to draw.

{rows}"""

_CITATION = f"```bibtex\n{CITATION}\n```"

_UNITS = {
    "db": "dB",
    "linear": "linear power",
    "dn": "digital numbers (reflectance x 10,000)",
    "reflectance": "reflectance",
    "raw": "raw values",
}

_TAGS = ["remote-sensing", "sentinel-1", "sentinel-2", "sar", "masked-autoencoder", "data-fusion", "fusmae"]


def results_table(metrics: dict[str, float], held_out: dict[str, int]) -> str:
    """Markdown table of held-out reconstruction errors.

    Args:
        metrics: as logged by the Trainer, `eval_<name>_optical_loss` and so on.
        held_out: number of pairs of each held-out dataset, by name.
    """
    if not held_out:
        return "Nothing was held out."
    kinds = {"": "model", "_visible_mean": "visible mean", "_interpolation": "interpolated"}
    kinds = {kind: title for kind, title in kinds.items() if any(key.endswith(f"_loss{kind}") for key in metrics)}
    lines = [f"| held out | pairs | sensor | {' | '.join(kinds.values())} |", "|---|---|---|" + "---|" * len(kinds)]
    for name, pairs in held_out.items():
        for sensor in ("optical", "sar"):
            keys = [f"eval_{name}_{sensor}_loss{kind}" for kind in kinds]
            if keys[0] in metrics:
                values = [f"{metrics[key]:.4f}" if key in metrics else "-" for key in keys]
                lines.append(" | ".join([f"| {name}", str(pairs), sensor, *values]) + " |")
    return "\n".join(lines)


def error_unit(config: FusMAEConfig) -> str:
    """What held-out errors are measured in."""
    return "normalised patches, 1 is a flat one" if config.norm_pix_loss else "squared standard deviations"


def write_model_card(
    folder: str | Path,
    *,
    config: FusMAEConfig,
    processor: FusMAEImageProcessor,
    info: PairsInfo,
    record: dict[str, Any],
    metrics: dict[str, float],
    name: str | None = None,
    shown_as: str | None = None,
    probe_scores: Sequence[ProbeScore] = (),
    probed_on: str = "",
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write `README.md`, the model card, and `.eval_results/results.yaml` into a checkpoint folder.

    Args:
        folder: the checkpoint.
        config: configuration of the model.
        processor: its bands, units and statistics.
        info: what holds for the training pairs.
        record: the run's own record (`run.json`).
        metrics: held-out losses.
        name: of the model; made of preset and data by default.
        shown_as: where the card says that the checkpoint is; the name of the folder by default.
        probe_scores: what linear probes of its features reached, those of other features for comparison after them.
        probed_on: on which pairs.
        more: further sections by title, put before the limits.

    Returns:
        Path of the card.
    """
    folder, name = Path(folder), name or f"fusmae-{record['preset']}-{info.name}"
    results = [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type=info.name,
            dataset_name=f"{info.name}, held out: {held_out}",
            dataset_split=held_out,
            metric_type="mse",
            metric_name=f"masked reconstruction, {sensor}",
            metric_value=metrics[f"eval_{held_out}_{sensor}_loss"],
        )
        for held_out in record["held_out"]
        for sensor in ("optical", "sar")
        if f"eval_{held_out}_{sensor}_loss" in metrics
    ]
    results += [
        EvalResult(
            task_type="image-classification",
            dataset_type="simulated",
            dataset_name=f"simulated, {score.labels} of the labels",
            dataset_config=f"{score.labels} of the labels",
            dataset_split="test",
            metric_type="average_precision",
            metric_name=f"{score.metric} of a linear probe, sensors: {score.sensors}",
            metric_value=score.score.estimate,
        )
        for score in probe_scores
        if score.encoder == probe_scores[0].encoder
    ]
    fields = card_fields(config=config, processor=processor, info=info, record=record)
    fields |= _use_fields(config, processor, shown_as or folder.name)
    fields |= {
        "name": inline(name),
        "what": "A Fus-MAE encoder and decoders",
        "pretrained": f", pretrained by masked reconstruction on {record['pairs']:,} pairs of {inline(info.name)}",
        "band_rows": _band_rows(processor),
        "results": results_table(metrics, record["held_out"]),
        "reading": _reading(metrics, record["held_out"]),
        "architecture": _architecture(config),
    }
    probes = {"probed_on": probed_on, "rows": probe_table(probe_scores)} if probe_scores else None
    sections = {
        "Intended use": INTENDED_USE,
        "Use": _USE.format(**fields),
        "Sensors": _SENSORS.format(**fields),
        "Training data": _DATA.format(**fields),
        "Recipe": _RECIPE.format(**fields),
        "Held-out reconstruction": (_NORMALISED_RESULTS if config.norm_pix_loss else _RESULTS).format(**fields),
        "Features": _PROBES.format(**probes, seeds=probe_scores[0].seeds) if probes else None,
        **(more or {}),
        "Limits": LIMITS,
        "Bias and geography": _geography(info),
        "Environmental cost": _cost(record),
        "Citation": _CITATION,
    }
    write_eval_results(folder, results)
    return save_card(folder, _metadata(name, results, info), _body(_OPENING.format(**fields), sections))


def _use_fields(config: FusMAEConfig, processor: FusMAEImageProcessor, folder: str) -> dict[str, Any]:
    """What the section on use says of a model without a head."""
    return {
        "folder": folder,
        "auto_class": "AutoModel",
        "result": ".pooler_output",
        "num_sar": len(processor.sar_bands),
        "num_optical": len(processor.optical_bands),
        "patch_size": config.patch_size,
    }


def _architecture(config: FusMAEConfig) -> str:
    """Size, masking and fusion in a sentence."""
    return (
        f"Width {config.hidden_size}, {config.num_hidden_layers} joint layers, patches of {config.patch_size} px; "
        f"mask ratio {config.mask_ratio}, {config.mask_strategy}; early fusion: {config.early_fusion}, feature "
        f"fusion: {config.feature_fusion}."
    )


def _reading(metrics: dict[str, float], held_out: dict[str, int]) -> str:
    """On which held-out pairs the model is better than interpolation, and on which it is not."""
    better, worse = list[str](), list[str]()
    for name in held_out:
        for sensor in ("optical", "sar"):
            key = f"eval_{name}_{sensor}_loss"
            if key in metrics and f"{key}_interpolation" in metrics:
                group = better if metrics[key] < metrics[f"{key}_interpolation"] else worse
                group.append(f"{name} ({'SAR' if sensor == 'sar' else sensor})")
    parts = [f"Better than interpolation on {', '.join(better)}."] if better else []
    parts += [f"**Not better than interpolation on {', '.join(worse)}.**"] if worse else []
    return " ".join(parts)


def _geography(info: PairsInfo) -> str | None:
    """What is known of the places of the training pairs."""
    source = info.source.lower()
    parts = [SIMULATED_GEOGRAPHY] if info.simulated or "simulated" in source else []
    parts += [BIGEARTHNET_GEOGRAPHY] if "bigearthnet" in source else []
    return "\n\n".join(parts) or None


_HEADS = {
    "FusMAEForImageClassification": (
        "AutoModelForImageClassification",
        "image-classification",
        "A classifier of pairs",
    ),
    "FusMAEForSemanticSegmentation": (
        "AutoModelForSemanticSegmentation",
        "image-segmentation",
        "A model that maps pairs",
    ),
}
"""Auto class, task of the Hub and opening words of the models with a head."""


def plain_card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a checkpoint without a record: what its configuration and its processor say.

    Args:
        folder: the checkpoint.
        repo_id: `<user>/<name>` where it is going to be.
    """
    config, processor = FusMAEConfig.from_pretrained(folder), FusMAEImageProcessor.from_pretrained(folder)
    architecture = next(iter(config.architectures or []), "FusMAEModel")
    fields = _sensor_fields(processor) | _use_fields(config, processor, repo_id)
    name, intended, task = repo_id.split("/")[-1], INTENDED_USE, "image-feature-extraction"
    what = "A Fus-MAE encoder" + (" and decoders" if architecture == "FusMAEForPreTraining" else "")
    if architecture in _HEADS:
        fields["auto_class"], task, what = _HEADS[architecture]
        fields["result"] = ".logits"
        outputs = inline(", ".join(label for _, label in sorted((config.id2label or {}).items())))
        what += " of Sentinel-1 and Sentinel-2 patches, on a Fus-MAE encoder"
        intended = f"It gives, in this order: {outputs}."
    sections = {
        "Intended use": intended,
        "Use": _USE.format(**fields),
        "Sensors": _SENSORS.format(**fields, band_rows=_band_rows(processor)),
        "Limits": LIMITS,
        "Citation": _CITATION,
    }
    opening = _OPENING.format(name=inline(name), what=what, pretrained="", simulated="")
    return ModelCard(f"---\n{_metadata(name, [], None, task).to_yaml()}\n---\n{_body(opening, sections)}")


def _metadata(
    name: str, results: list[EvalResult], info: PairsInfo | None, task: str = "image-feature-extraction"
) -> ModelCardData:
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        tags=_TAGS,
        license="apache-2.0",
        datasets=dataset_names(info) if info else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
    )


def dataset_names(info: PairsInfo) -> list[str] | None:
    """Name of a dataset for the metadata of a card; None where the Hub would not take it for one."""
    return [info.name] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", info.name) else None


def _body(opening: str, sections: Mapping[str, str | None]) -> str:
    """The text of a card, without sections that nothing is known for."""
    return "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]) + "\n"


def _band_rows(processor: FusMAEImageProcessor) -> str:
    rows = []
    for sensor, bands, means, stds in (
        ("SAR", processor.sar_bands, processor.sar_mean, processor.sar_std),
        ("optical", processor.optical_bands, processor.optical_mean, processor.optical_std),
    ):
        rows += [f"| {sensor} | {inline(band)} | {means[band]:.6g} | {stds[band]:.6g} |" for band in bands]
    return "\n".join(rows)


def _cost(record: dict[str, Any]) -> str | None:
    """Wall time and device; no energy, which nothing measures."""
    if "train_seconds" not in record:
        return None
    processes = "one process" if record["processes"] == 1 else f"{record['processes']} processes"
    return (
        f"{record['train_seconds'] / 3600:.3g} hours since training was started or last resumed, evaluations "
        f"included, in {processes} on {inline(record['device'])}. Energy was not measured."
    )


def _sensor_fields(processor: FusMAEImageProcessor) -> dict[str, Any]:
    statistics = f"{inline(processor.statistics)} statistics" if processor.statistics else "statistics of its own"
    return {
        "sar_bands": inline(", ".join(processor.sar_bands)),
        "sar_units": _UNITS[processor.sar_units],
        "sar_statistics": statistics,
        "optical_bands": inline(", ".join(processor.optical_bands)),
        "optical_units": _UNITS[processor.optical_units],
        "optical_offset": processor.optical_offset,
        "optical_statistics": statistics,
    }


def card_fields(
    *, config: FusMAEConfig, processor: FusMAEImageProcessor, info: PairsInfo, record: dict[str, Any]
) -> dict[str, Any]:
    """What every card tells of the sensors, the training pairs and the run, by the names of the templates."""
    return _sensor_fields(processor) | {
        "dataset": inline(info.name),
        "simulated": " **The imagery is simulated.**" if info.simulated else "",
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
