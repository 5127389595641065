"""Tables of the results: means over seeds with 95 % intervals, and differences seed by seed."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusmae_hf.evaluation.intervals import mean_and_interval, paired_comparison

from .variants import FUSIONS, STRATEGIES

Record = dict[str, Any]
Scores = dict[str, dict[int, float]]
"""A score in per cent by variant and seed."""

METRICS = {
    "scenes": {"ap_macro": "AP macro", "ap_need_both": "AP, need both"},
    "patches": {"mean_iou": "mean IoU", "iou_need_both": "IoU, need both", "accuracy": "accuracy", "ap": "AP flooded"},
}
SHORT = {
    "both-independent": "Fus-MAE: early fusion, query fusion",
    "early-independent": "early fusion alone",
    "query-independent": "query fusion alone",
    "latent-independent": "latent fusion alone",
    "none-independent": "no cross-attention, one encoder of both sensors",
    "two-streams": "an encoder for each sensor, features side by side",
    "stacked": "all bands stacked to one image",
    "optical-only": "optical alone",
    "sar-only": "SAR alone",
    "contrastive": "contrastive, SAR against optical",
    "combined": "Fus-MAE and contrastive",
    "random-early": "not trained",
    "raw-linear": "statistics of the bands",
    "raw-forest": "statistics of the bands, random forest",
}
"""Rows of the short tables, in words."""
FINETUNED = {"ap_macro": "AP macro", "ap_need_both": "AP, need both", "mean_iou": "mean IoU"}


def read_results(folder: Path) -> list[Record]:
    """Results of all units that are done, without those of another kind."""
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*/*/*.json"))]


def reference_of(variant: str) -> str:
    """No fusion, under the same masks as a fusion variant; independent masks for all others."""
    strategy = variant.rsplit("-", 1)[-1]
    return f"none-{strategy if strategy in ('consistent', 'complementary') else 'independent'}"


def scores(records: Iterable[Record], stage: str, *path: str) -> Scores:
    """Scores in per cent, by variant and seed, at a path into the results of a stage."""
    found: Scores = {}
    for record in records:
        if record["stage"] != stage:
            continue
        value: Any = record["result"]
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.setdefault(record["variant"], {})[record["seed"]] = 100 * value
    return found


def cell(values: Sequence[float]) -> str:
    """Mean and 95 % interval over seeds; of one seed, its value."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    interval = mean_and_interval(values)
    return f"{interval.estimate:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def difference(scores: Scores, variant: str, reference: str) -> str:
    """Mean difference seed by seed with interval and p value; of one seed, the difference."""
    seeds = sorted(scores.get(variant, {}).keys() & scores.get(reference, {}).keys())
    if variant == reference or not seeds:
        return ""
    one, other = ([scores[name][seed] for seed in seeds] for name in (variant, reference))
    if len(seeds) == 1:
        return f"{one[0] - other[0]:+.1f}"
    compared = paired_comparison(one, other)
    found = compared.difference
    p_value = f"p={compared.p_value:.3f}" if compared.p_value >= 0.001 else "p<0.001"
    return f"{found.estimate:+.1f} [{found.low:+.1f}, {found.high:+.1f}] {p_value}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def variants_in_order(records: Iterable[Record]) -> list[str]:
    """Names of the variants, by group."""
    groups = ("fusion", "factor", "baseline", "untrained")
    found = {record["variant"]: (groups.index(record["group"]), record["variant"]) for record in records}
    return sorted(found, key=lambda name: found[name])


def short_table(records: list[Record]) -> str:
    """What probes of both sensors reach with each share of the labels, of the rows that matter most."""
    scenes = bool(scores(records, "probe", "scenes", "both", "1.0", "ap_macro"))
    kind, metric, title = ("scenes", "ap_macro", "AP macro") if scenes else ("patches", "mean_iou", "mean IoU")
    fractions = _keys(records, "probe", kind, "both")
    found = {fraction: scores(records, "probe", kind, "both", fraction, metric) for fraction in fractions}
    rows = [
        [row, *(cell(list(of_fraction.get(name, {}).values())) for of_fraction in found.values())]
        for name, row in SHORT.items()
        if any(name in of_fraction for of_fraction in found.values())
    ]
    head = [f"{kind}, {title} in per cent", *(f"{float(fraction):.0%} of the labels" for fraction in fractions)]
    return markdown(head, rows)


def write_tables(folder: Path, report: Path) -> str:
    """Write `tables.md`, and `short-<data set>.md` with the rows that matter most, into a folder.

    Returns:
        The tables.

    Raises:
        ValueError: there is no result yet.
    """
    records = read_results(folder)
    if not records:
        raise ValueError(f"There are no results in {folder / 'results'}: run the study first.")
    parts = [
        "Per cent, mean over seeds [95 % interval]. `vs none`: difference to no fusion under the same masks, seed by "
        "seed; `vs stacked`: to all bands in one stream."
    ]
    report.mkdir(parents=True, exist_ok=True)
    base = json.loads((folder / "settings.json").read_text())["factors_of"]
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        of_dataset = [record for record in records if record["dataset"] == dataset]
        parts += [f"## {dataset}", *_dataset_tables(of_dataset, base)]
        (report / f"short-{dataset}.md").write_text(short_table(of_dataset) + "\n")
    text = "\n\n".join(parts)
    (report / "tables.md").write_text(text + "\n")
    return text


def _dataset_tables(records: list[Record], base: str) -> list[str]:
    names = variants_in_order(records)
    parts = [*_summary("probe", records, names), *_factors_table(records, names, base), *_masks_tables(records)]
    parts += _summary("finetune", records, names)
    fractions = _keys(records, "probe", "patches", "both")
    for kind, metrics in METRICS.items():
        for metric, title in metrics.items():
            for fraction in fractions:
                found = scores(records, "probe", kind, "both", fraction, metric)
                if found:
                    parts += [
                        f"### Probe of {kind}: {title}, {float(fraction):.0%} of the labels",
                        _probe_table(records, names, kind, fraction, metric, found),
                    ]
    parts += _finetuning_tables(records, names)
    parts += _robustness_tables(records, names)
    parts += _attention_tables(records)
    return [*parts, "### Pretraining", _compute_table(records, names)]


def _summary(stage: str, records: list[Record], names: list[str]) -> list[str]:
    """The scores that matter most of probes or of fine-tuning, in one table."""
    scenes = bool(scores(records, "probe", "scenes", "both", "1.0", "ap_macro"))
    kind = ("scenes" if scenes else "patches",) if stage == "probe" else ()
    metric, title, need_both = (
        ("ap_macro", "AP macro", "ap_need_both") if scenes else ("mean_iou", "mean IoU", "iou_need_both")
    )
    fractions = _keys(records, stage, *kind, "both")
    if not fractions:
        return []
    most = max(fractions, key=float)
    columns = {
        f"both, {float(fraction):.0%}": scores(records, stage, *kind, "both", fraction, metric)
        for fraction in fractions
    }
    all_labels = scores(records, stage, *kind, "both", most, metric)
    columns["need both"] = scores(records, stage, *kind, "both", most, need_both)
    columns["SAR alone"] = scores(records, stage, *kind, "sar", most, metric)
    columns["optical alone"] = scores(records, stage, *kind, "optical", most, metric)
    if stage == "probe" and scenes:
        columns["patches, mean IoU"] = scores(records, stage, "patches", "both", most, "mean_iou")
    columns = {column: found for column, found in columns.items() if found}
    rows = [
        [
            name,
            *(cell(list(found.get(name, {}).values())) for found in columns.values()),
            difference(all_labels, name, reference_of(name)),
        ]
        for name in names
        if name in all_labels
    ]
    what = "Linear probe" if stage == "probe" else "Fine-tuned"
    heading = f"### {what}, in short: {title}; columns without a share are of {float(most):.0%} of the labels"
    return [heading, markdown(["variant", *columns, f"vs none, {float(most):.0%}"], rows)]


def _factors_table(records: list[Record], names: list[str], base: str) -> list[str]:
    """What a change of a single field of the configuration does to the probes with all labels."""
    names = [name for name in names if name.startswith("factor-")]
    columns = {}
    for kind, metrics in METRICS.items():
        for metric, title in metrics.items():
            found = scores(records, "probe", kind, "both", "1.0", metric)
            if base in found:
                columns[f"{kind}: {title}"] = found
    if not names or not columns:
        return []
    rows = [[name, *(difference(found, name, base) for found in columns.values())] for name in names]
    return [f"### A single field changed, against {base}: probes, all labels", markdown(["variant", *columns], rows)]


def with_average(found: Scores, fusions: Sequence[str]) -> Scores:
    """Scores, and those of `average-<masks>`: the mean of some fusions in each seed that all of them have."""
    averaged = dict(found)
    for strategy in STRATEGIES:
        rows = [found[f"{fusion}-{strategy}"] for fusion in fusions]
        seeds = sorted(set.intersection(*(set(row) for row in rows)))
        averaged[f"average-{strategy}"] = {seed: sum(row[seed] for row in rows) / len(rows) for seed in seeds}
    return averaged


def _masks_tables(records: list[Record]) -> list[str]:
    """Probes with all labels by fusion and masks, where every fusion was pretrained under all masks."""
    parts = []
    for kind, metrics in METRICS.items():
        for metric, title in metrics.items():
            found = scores(records, "probe", kind, "both", "1.0", metric)
            fusions = [name for name in FUSIONS if all(f"{name}-{strategy}" in found for strategy in STRATEGIES)]
            if "none" not in fusions or len(fusions) < 2:
                continue
            of_all = with_average(found, fusions)
            rows = [
                [
                    name,
                    *(cell(list(of_all[f"{name}-{strategy}"].values())) for strategy in STRATEGIES),
                    *(difference(of_all, f"{name}-{other}", f"{name}-{STRATEGIES[0]}") for other in STRATEGIES[1:]),
                ]
                for name in (*fusions, "average")
            ]
            head = ["fusion", *STRATEGIES, *(f"{other} - {STRATEGIES[0]}" for other in STRATEGIES[1:])]
            parts += [f"### Masks, probe of {kind}: {title}, all labels", markdown(head, rows)]
            fusions.remove("none")
            of_all = with_average(found, fusions)
            rows = [
                [name, *(difference(of_all, f"{name}-{strategy}", f"none-{strategy}") for strategy in STRATEGIES)]
                for name in (*fusions, "average")
            ]
            heading = f"### Fusion - none under the same masks, probe of {kind}: {title}, all labels"
            parts += [heading, markdown(["fusion", *STRATEGIES], rows)]
    return parts


def _probe_table(records: list[Record], names: list[str], kind: str, fraction: str, metric: str, both: Scores) -> str:
    others = {
        title: scores(records, "probe", kind, shown, fraction, metric)
        for title, shown in (("both, apart", "both, apart"), ("SAR alone", "sar"), ("optical alone", "optical"))
    }
    others = {title: found for title, found in others.items() if found}
    head = ["variant", "both", "vs none", "vs stacked", *others]
    rows = [
        [
            name,
            cell(list(both[name].values())),
            difference(both, name, reference_of(name)),
            difference(both, name, "stacked"),
            *(cell(list(found.get(name, {}).values())) for found in others.values()),
        ]
        for name in names
        if name in both
    ]
    return markdown(head, rows)


def _finetuning_tables(records: list[Record], names: list[str]) -> list[str]:
    parts = []
    for metric, title in FINETUNED.items():
        for fraction in _keys(records, "finetune", "both"):
            found = {
                shown: scores(records, "finetune", shown, fraction, metric) for shown in ("both", "sar", "optical")
            }
            both = found["both"]
            if both:
                rows = [
                    [name, cell(list(both[name].values()))]
                    + [difference(both, name, other) for other in ("none-independent", "stacked", "random-early")]
                    + [cell(list(found[shown].get(name, {}).values())) for shown in ("sar", "optical")]
                    for name in names
                    if name in both
                ]
                head = ["variant", "both", "vs none", "vs stacked", "vs scratch", "SAR alone", "optical alone"]
                parts += [f"### Fine-tuned: {title}, {float(fraction):.0%} of the labels", markdown(head, rows)]
    return parts


def _robustness_tables(records: list[Record], names: list[str]) -> list[str]:
    parts = []
    for kind, metric, title in (("scenes", "ap_macro", "AP macro"), ("patches", "mean_iou", "mean IoU")):
        conditions = _keys(records, "probe", "robustness", kind)
        if conditions:
            found = {name: scores(records, "probe", "robustness", kind, name, metric) for name in conditions}
            rows = [
                [name, *(cell(list(of_condition.get(name, {}).values())) for of_condition in found.values())]
                for name in names
                if name in found["aligned"]
            ]
            heading = f"### Probe of {kind} fitted on aligned pairs, shown others: {title}"
            parts += [heading, markdown(["variant", *conditions], rows)]
    return parts


def _attention_tables(records: list[Record]) -> list[str]:
    measured = [record for record in records if record["stage"] == "attention"]
    layers = dict.fromkeys(layer for record in measured for layer in record["result"])
    rows = []
    for layer in sorted(layers):
        for name in variants_in_order(measured):
            of_layer = [r["result"][layer] for r in measured if r["variant"] == name and layer in r["result"]]
            for px in of_layer[0] if of_layer else ():
                shares = [found[px] for found in of_layer]
                columns = ("mass", "colocated", "colocated_best_head", "neighbours", "moved")
                values = [[100 * share[column] for share in shares if share[column] is not None] for column in columns]
                chance = (f"{100 * shares[0]['chance']:.1f}", f"{100 * shares[0]['chance_neighbours']:.1f}")
                rows.append([layer, name, px, *map(cell, values), *chance])
    head = ["layer", "variant", "moved by, px", "weight on the other sensor", "co-located", "in the best head"]
    head += ["neighbours", "where the ground went", "chance, co-located", "chance, neighbours"]
    return ["### Attention from one sensor to the other, % of the weight", markdown(head, rows)] if rows else []


def _compute_table(records: list[Record], names: list[str]) -> str:
    rows = []
    for name in names:
        runs = [record for record in records if record["variant"] == name and record["stage"] == "pretrain"]
        if runs:
            streams = runs[0]["result"]["streams"].values()
            seconds = sum(sum(s["seconds"] for s in run["result"]["streams"].values()) for run in runs) / len(runs)
            steps = " + ".join(str(of_stream["steps"]) for of_stream in streams)
            parameters = sum(of_stream["parameters"] for of_stream in streams) / 1e6
            flops = runs[0]["result"]["tflops"]
            rows.append([name, steps, f"{flops:.2f}", f"{parameters:.2f}", f"{seconds:.0f}", str(len(runs))])
    return markdown(["variant", "steps", "TFLOP", "million encoder weights", "seconds", "seeds"], rows)


def _keys(records: list[Record], stage: str, *path: str) -> list[str]:
    """Keys at a path into the results of a stage, in the order in which they first come."""
    found: dict[str, None] = {}
    for record in records:
        value: Any = record["result"] if record["stage"] == stage else {}
        for key in path:
            value = value.get(key, {})
        found |= dict.fromkeys(value)
    return list(found)
