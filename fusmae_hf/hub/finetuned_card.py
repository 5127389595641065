"""The card of a fine-tuned checkpoint, written from the records of the run that made it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.files.plain_text import inline
from fusmae_hf.hub.eval_results import write_eval_results
from fusmae_hf.hub.model_card import card_fields, dataset_names, save_card
from fusmae_hf.modeling.configuration_fusmae import FusMAEConfig
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor

_FINE_TUNED = """
# {name}

Fus-MAE fine-tuned for {task} on {pairs:,} labelled pairs of {dataset}{fraction}. Fus-MAE fuses SAR and optical patches
with cross-attention (arXiv 2401.02764); this is a reconstruction of it by `fusmae_hf`: details that the paper leaves
open are this project's choices.{simulated}

## Use

```python
{use}
```

Either sensor may be left out. {outputs}

## Sensors

| | bands, in order | units | normalised with |
|---|---|---|---|
| SAR | {sar_bands} | {sar_units} | {sar_statistics} |
| optical | {optical_bands} | {optical_units}, offset {optical_offset:g} | {optical_statistics} |

Trained on {sensors}.

## Training data

{dataset} ({source}; licence of the imagery: {license}), {pairs:,} pairs, content {content_hash}.

## Recipe

{command}

{start}. {learning}. {steps:,} steps of {batch} pairs, seed {seed}, {precision}, {device}; fields: {config}.

## Results

{measured:,} pairs of the split `{split}`; the same checkpoint in each row. One run: another seed gives other figures.

{results}
{by_class}

## Limits

Not evaluated for sensors, places, seasons or processing levels other than those above.

## Citation

```bibtex
{citation}
```
"""

_USE_WHOLE = """\
from transformers import AutoImageProcessor, {auto_class}
import fusmae_hf  # or pass trust_remote_code=True, which runs the Python files of this folder

processor = AutoImageProcessor.from_pretrained("{folder}")
model = {auto_class}.from_pretrained("{folder}")
logits = model(**processor(sar=sar, optical=optical)).logits"""

_USE_ADAPTER = """\
from peft import PeftModel
from fusmae_hf import FusMAEConfig, FusMAEImageProcessor, {model_class}

processor = FusMAEImageProcessor.from_pretrained("{folder}")
config = FusMAEConfig.from_pretrained("{folder}")
model = {model_class}.from_pretrained("<{base}>", config=config)
model = PeftModel.from_pretrained(model, "{folder}")
logits = model(**processor(sar=sar, optical=optical)).logits"""

_CARD_METRICS = {
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
    """Write `README.md`, the card of a fine-tuned checkpoint, into its folder.

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
    auto_class = "AutoModelForSemanticSegmentation" if dense else "AutoModelForImageClassification"
    model_class = auto_class.replace("AutoModel", "FusMAE")
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
        for metric, title in _CARD_METRICS.items()
        if values.get(metric) is not None
    ]
    data = ModelCardData(
        model_name=name,
        library_name="peft" if record["adapter"] else "transformers",
        pipeline_tag=kind,
        tags=["remote-sensing", "sentinel-1", "sentinel-2", "sar", "data-fusion", "fusmae", task.replace("_", "-")],
        license="apache-2.0",
        base_model=record["base_model"],
        datasets=dataset_names(info),
        metrics=sorted({result.metric_type for result in evaluated}),
        eval_results=evaluated or None,
    )
    labels = [label for _, label in sorted((config.id2label or {}).items())]
    quantity = f"The model gives {inline(labels[0])}{' for each pixel' if dense else ''}, in the units of the labels."
    use = _USE_ADAPTER if record["adapter"] else _USE_WHOLE
    fraction = record["label_fraction"]
    body = _FINE_TUNED.format(
        **card_fields(config=config, processor=processor, info=info, record=record),
        name=inline(name),
        task=f"{task.replace('_', ' ')}{' of pixels' if dense and task == 'regression' else ''}",
        use=use.format(folder=folder.name, auto_class=auto_class, model_class=model_class, base=record["preset"]),
        outputs=quantity if task == "regression" else f"Classes, in order: {inline(', '.join(labels))}.",
        fraction="" if fraction == 1 else f" ({fraction:.3g} of its training labels)",
        sensors={"both": "both sensors", "sar": "SAR alone", "optical": "optical alone"}[record["sensors"]],
        start="From scratch" if record["from_scratch"] else f"Started from `{record['preset']}`",
        learning=record["learning"],
        measured=record["measured"],
        split=record["split"],
        results=results,
        by_class=f"\n{by_class}" if by_class else "",
    )
    write_eval_results(folder, evaluated)
    return save_card(folder, data, body)
