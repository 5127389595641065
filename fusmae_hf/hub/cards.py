"""Cards of models, written from the records of their runs; the texts stand in `templates/`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import (
    CardData,
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.files.plain_text import code, inline
from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor

if TYPE_CHECKING:
    from fusmae_hf.evaluation.intervals import Interval

TAGS = ("remote-sensing", "sentinel-1", "sentinel-2", "sar", "masked-autoencoder", "data-fusion", "fusmae")

_UNITS = {
    "db": "dB",
    "linear": "linear power",
    "dn": "digital numbers (reflectance x 10,000)",
    "reflectance": "reflectance",
    "raw": "raw values",
}

_HEADS = {
    "FusMAEForImageClassification": ("image-classification", "A classifier of pairs"),
    "FusMAEForSemanticSegmentation": ("image-segmentation", "A model that maps pairs"),
}
"""Task of the Hub and opening words of the models with a head."""

_SCORES = {
    "accuracy": "accuracy",
    "average_precision_micro": "mean average precision, micro",
    "average_precision_macro": "mean average precision, macro",
    "f1_micro": "F1, micro",
    "f1_macro": "F1, macro",
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "r2": "coefficient of determination",
}
"""Scores of fine-tuned models that cards tell, with their names."""


@dataclass(frozen=True)
class ProbeScore:
    """What a linear probe of some features reached, for a card.

    Attributes:
        encoder: whose features.
        sensors: which sensors were shown, in words.
        labels: share of the labels that the probe learnt from, in words.
        metric: name of the score.
        score: mean over the seeds, in [0, 1], and its 95 % interval.
        seeds: how many.
    """

    encoder: str
    sensors: str
    labels: str
    metric: str
    score: "Interval"
    seeds: int


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
    """Write `README.md`, the card of a pretrained model, and `.eval_results/results.yaml` into a checkpoint folder.

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
    body = _text_of_model(
        config,
        processor,
        shown_as or folder.name,
        name=name,
        what="A Fus-MAE encoder and decoders",
        info=info,
        record=record,
        results=results_table(metrics, record["held_out"]),
        reading=_reading(metrics, record["held_out"]),
        probes=_probe_table(probe_scores) if probe_scores else "",
        probed_on=probed_on,
        seeds=probe_scores[0].seeds if probe_scores else 0,
        more=more or {},
    )
    return _save(folder, _metadata(name, results, info), body, results)


def plain_card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a checkpoint without a record: what its configuration and its processor say.

    Args:
        folder: the checkpoint.
        repo_id: `<user>/<name>` where it is going to be.
    """
    config, processor = FusMAEConfig.from_pretrained(folder), FusMAEImageProcessor.from_pretrained(folder)
    architecture = next(iter(config.architectures or []), "FusMAEModel")
    name, task, auto_class, outputs = repo_id.split("/")[-1], "image-feature-extraction", "AutoModel", None
    what = "A Fus-MAE encoder" + (" and decoders" if architecture == "FusMAEForPreTraining" else "")
    if architecture in _HEADS:
        task, what = _HEADS[architecture]
        what += " of Sentinel-1 and Sentinel-2 patches, on a Fus-MAE encoder"
        auto_class, outputs = architecture.replace("FusMAE", "AutoModel"), _labels(config)
    body = _text_of_model(config, processor, repo_id, name=name, what=what, auto_class=auto_class, outputs=outputs)
    return ModelCard(card_text(_metadata(name, [], None, task), body))


def write_fine_tuned_card(
    folder: str | Path,
    *,
    config: FusMAEConfig,
    processor: FusMAEImageProcessor,
    info: PairsInfo,
    record: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
    results: str,
    by_class: str,
) -> Path:
    """Write `README.md`, the card of a fine-tuned checkpoint, and `.eval_results/results.yaml` into its folder.

    Args:
        folder: the checkpoint.
        config: configuration of the model.
        processor: its bands, units and statistics.
        info: what holds for the training pairs.
        record: the run's own record (`run.json`).
        metrics: by sensors (`"both"`, `"sar"`, `"optical"`), then by name.
        results: Markdown table of the main metrics.
        by_class: Markdown table by class, or empty.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    dense, task = record["dense"], record["task"]
    kind = "image-segmentation" if dense else "image-classification"
    start = record["preset"] if record["preset"].startswith("fusmae") else f"fusmae-{record['preset']}"
    name = f"{start}-{info.name}-{task.replace('_', '-')}"
    evaluated = [
        EvalResult(
            task_type=kind,
            dataset_type=info.name,
            dataset_name=f"{info.name}, {record['split']}",
            dataset_split=record["split"],
            metric_type=metric,
            metric_name=f"{title}, {sensors}",
            metric_value=values[metric],
        )
        for sensors, values in metrics.items()
        for metric, title in _SCORES.items()
        if values.get(metric) is not None
    ]
    data = _metadata(
        name,
        evaluated,
        info,
        kind,
        library_name="peft" if record["adapter"] else "transformers",
        tags=[*(tag for tag in TAGS if tag != "masked-autoencoder"), task.replace("_", "-")],
        base_model=record["base_model"],
        metrics=sorted({result.metric_type for result in evaluated}),
    )
    body = render(
        "fine_tuned.md",
        name=name,
        task=f"{task.replace('_', ' ')}{' of pixels' if dense and task == 'regression' else ''}",
        info=info,
        record=record,
        processor=processor,
        units=_UNITS,
        folder=folder.name,
        auto_class="AutoModelForSemanticSegmentation" if dense else "AutoModelForImageClassification",
        adapter=record["adapter"],
        fine_tuned=True,
        labels=_labels(config),
        fields=json.dumps({name: x for name, x in config.to_diff_dict().items() if name in config._own_fields()}),
        results=results,
        by_class=by_class,
    )
    return _save(folder, data, body, evaluated)


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


def _probe_table(scores: Sequence[ProbeScore]) -> str:
    """A row for each encoder and choice of sensors, a column for each share of labels."""
    shares = list(dict.fromkeys(score.labels for score in scores))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        low, high = 100 * score.score.low, 100 * score.score.high
        cell = f"{100 * score.score.estimate:.1f}" + (f" [{low:.1f}, {high:.1f}]" if high > low else "")
        rows.setdefault((score.encoder, score.sensors), {})[score.labels] = cell
    lines = [f"| features | sensors | {' | '.join(f'{share} of the labels' for share in shares)} |"]
    lines.append("|---|---|" + "---|" * len(shares))
    lines += [f"| {' | '.join(names)} | {' | '.join(cells.values())} |" for names, cells in rows.items()]
    return "\n".join(lines)


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


def _text_of_model(config: FusMAEConfig, processor: FusMAEImageProcessor, folder: str, **fields: Any) -> str:
    """The card of a model that was not fine-tuned here; without `record` it tells of no run."""
    none: dict[str, Any] = {"auto_class": "AutoModel", "outputs": None, "info": None, "record": None, "more": {}}
    shared = {"config": config, "processor": processor, "units": _UNITS, "folder": folder}
    return render("model.md", **none | shared | fields, adapter=False, fine_tuned=False)


def _labels(config: FusMAEConfig) -> list[str]:
    return [label for _, label in sorted((config.id2label or {}).items())]


def _metadata(
    name: str,
    results: list[EvalResult],
    info: PairsInfo | None,
    task: str = "image-feature-extraction",
    **fields: Any,
) -> ModelCardData:
    usual = {
        "model_name": name,
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": list(TAGS),
        "license": "apache-2.0",
        # None where the Hub would not take the name for that of a dataset
        "datasets": [info.name] if info and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", info.name) else None,
        "metrics": sorted({result.metric_type for result in results}) or None,
        "eval_results": results or None,
    }
    return ModelCardData(**usual | fields)


def render(template: str, **fields: Any) -> str:
    """The text of a template, which says itself where the words of others become `inline` Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,  # not HTML
    )
    environment.filters |= {"inline": inline, "code": code}
    return environment.get_template(template).render(fields)


def card_text(data: CardData, body: str) -> str:
    """Metadata and text, as they stand in a README.md."""
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _save(folder: Path, data: ModelCardData, body: str, results: Sequence[EvalResult]) -> Path:
    """Write a card, and its results in the form from which the Hub takes them today: the model-index is older."""
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=result.task_type,
            value=result.metric_value,
            notes=f"{result.metric_name}; {result.dataset_name}",
        )
        for result in results
    ]
    path = folder / EVAL_RESULTS_FOLDER / "results.yaml"
    path.unlink(missing_ok=True)
    if entries:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    card = folder / "README.md"
    ModelCard(card_text(data, body)).save(card)
    return card
