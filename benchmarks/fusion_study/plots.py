"""Plots of the results: bars, curves over compute and labels, gains by class, wrong pairs, attention."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusmae_hf.evaluation.intervals import mean_and_interval
from fusmae_hf.plots.pairs import new_figure

from .report import Record, Scores, read_results, reference_of, scores, variants_in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"fusion": "#2166ac", "factor": "#67a9cf", "baseline": "#b2182b", "untrained": "#999999"}
COMPARED = (
    "both-independent", "early-independent", "query-independent", "none-independent", "stacked", "two-streams",
    "contrastive", "combined", "random-early",
)  # fmt: skip
MARKERS = "osD^vP*X<"
MISSING_COLOURS = ("#444444", "#2166ac", "#92c5de", "#b2182b", "#f4a582")
DOTS_PER_INCH = 120


def write_plots(folder: Path, report: Path) -> list[Path]:
    """Draw what there are results for, as PNG files.

    Raises:
        ImportError: matplotlib is not installed; names the pip command.
    """
    records, written = read_results(folder), list[Path]()
    report.mkdir(parents=True, exist_ok=True)
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        of_dataset = [record for record in records if record["dataset"] == dataset]
        for name, draw in (
            ("bars", draw_bars),
            ("pretraining", draw_pretraining),
            ("label-fractions", draw_fractions),
            ("gains-by-class", draw_gains),
            ("misregistration", draw_misregistration),
            ("missing-sensor", draw_missing_sensor),
            ("attention", draw_attention),
        ):
            figure = draw(of_dataset)
            if figure is not None:
                path = report / f"{dataset}-{name}.png"
                figure.suptitle(dataset)
                figure.savefig(path, dpi=DOTS_PER_INCH, bbox_inches="tight")
                written.append(path)
    return written


def _point(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval; 0 for one seed."""
    if len(values) < 2:
        return values[0], 0.0
    interval = mean_and_interval(values)
    return interval.estimate, interval.high - interval.estimate


def _panels(records: list[Record]) -> list[tuple[str, str, str]]:
    """Kind, metric and title of what was probed, whichever there are."""
    panels = [("scenes", "ap_macro", "scenes, AP macro (%)"), ("scenes", "ap_need_both", "scenes, AP need both (%)")]
    panels += [
        ("patches", "mean_iou", "patches, mean IoU (%)"),
        ("patches", "iou_need_both", "patches, IoU need both (%)"),
    ]
    return [panel for panel in panels if scores(records, "probe", panel[0], "both", "1.0", panel[1])]


def draw_bars(records: list[Record]) -> "Figure | None":
    """Probes with all labels, a bar for each variant."""
    panels, group = _panels(records), {record["variant"]: record["group"] for record in records}
    if not panels:
        return None
    figure = new_figure(4.2 * len(panels), 0.22 * len(group) + 1.5)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (kind, metric, title) in zip(axes, panels, strict=True):
        found = scores(records, "probe", kind, "both", "1.0", metric)
        names = [name for name in variants_in_order(records) if name in found][::-1]
        points = [_point(list(found[name].values())) for name in names]
        means, halves = zip(*points, strict=True)
        axis.barh(names, means, xerr=halves, color=[COLOURS[group[name]] for name in names], ecolor="black")
        axis.set_xlim(left=max(0, min(means) - 8))
        axis.set_xlabel(title)
        axis.tick_params(labelsize=7)
    return figure


def _curves(axis: "Axes", found: dict[float, Scores]) -> None:
    """A line for each compared variant, over what the keys are."""
    for name, marker in zip(COMPARED, MARKERS, strict=True):
        places = [place for place, of_place in found.items() if name in of_place]
        if places:
            means, halves = zip(*(_point(list(found[place][name].values())) for place in places), strict=True)
            axis.errorbar(places, means, halves, marker=marker, markersize=4, linewidth=1, capsize=2, label=name)


def draw_pretraining(records: list[Record]) -> "Figure | None":
    """Reconstruction loss over the operations spent, of masked autoencoders that see a pair in one encoder."""
    found: dict[str, list[tuple[float, list[float]]]] = {}
    for record in records:
        alike = record["stage"] == "pretrain" and record["group"] == "fusion"
        if alike and record["variant"].endswith("-independent"):
            of_stream = record["result"]["streams"]["pair"]
            found.setdefault(record["variant"], []).append((of_stream["tflops"], of_stream["loss_curve"]))
    if not found:
        return None
    figure = new_figure(5, 3.4)
    axis = figure.subplots()
    for name, runs in found.items():
        losses = np.mean([curve for _, curve in runs], axis=0)
        axis.plot((np.arange(len(losses)) + 0.5) / len(losses) * runs[0][0], losses, linewidth=1, label=name)
    axis.set_xlabel("operations (TFLOP)")
    axis.set_ylabel("training loss, mean over seeds")
    axis.legend(fontsize=6)
    return figure


def draw_fractions(records: list[Record]) -> "Figure | None":
    """Scores over the share of the labels, of probes and of fine-tuning."""
    panels = [("probe", (kind, "both"), metric, f"probe of {title}") for kind, metric, title in _panels(records)]
    for metric, title in (("ap_macro", "AP macro (%)"), ("mean_iou", "mean IoU (%)")):
        panels.append(("finetune", ("both",), metric, f"fine-tuned, {title}"))
    drawn = []
    for stage, path, metric, title in panels:
        found = {share: scores(records, stage, *path, str(share), metric) for share in (0.01, 0.1, 1.0)}
        if any(found.values()):
            drawn.append((title, found))
    if not drawn:
        return None
    figure = new_figure(3.8 * len(drawn), 3.4)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, (title, found) in zip(axes, drawn, strict=True):
        _curves(axis, found)
        low, high = axis.get_ylim()
        axis.set_ylim(max(0, low), min(100, high))  # intervals of few seeds reach beyond what a score can be
        axis.set_xscale("log")
        axis.set_xticks([0.01, 0.1, 1.0], ["1 %", "10 %", "100 %"])
        axis.minorticks_off()
        axis.set_xlabel("share of the labels")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
    axis.legend(*axes[0].get_legend_handles_labels(), fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_gains(records: list[Record]) -> "Figure | None":
    """What each fusion gains in each class over none, seed by seed."""
    panels = _panels(records)
    kind, metric = ("scenes", "ap_per_class") if panels and panels[0][0] == "scenes" else ("patches", "iou_per_class")
    runs = {(r["variant"], r["seed"]): r["result"] for r in records if r["stage"] == "probe"}
    of_class = {
        key: result[kind]["both"]["1.0"][metric]
        for key, result in runs.items()
        if "1.0" in result[kind].get("both", {})
    }
    names = [name for name in variants_in_order(records) if name.endswith("-independent") and name[:4] != "none"]
    gains: dict[str, dict[str, list[float]]] = {}
    for (name, seed), values in of_class.items():
        reference = of_class.get((reference_of(name), seed))
        if name in names and reference is not None:
            for label, value in values.items():
                if value is not None and reference[label] is not None:
                    gains.setdefault(name, {}).setdefault(label, []).append(100 * (value - reference[label]))
    if not gains:
        return None
    labels = list(next(iter(gains.values())))
    figure = new_figure(3.2 * len(gains), 0.22 * len(labels) + 1.5)
    for axis, name in zip(figure.subplots(1, len(gains), sharey=True, squeeze=False)[0], gains, strict=True):
        means, halves = zip(*(_point(gains[name][label]) for label in labels), strict=True)
        axis.barh(labels, means, xerr=halves, color=COLOURS["fusion"], ecolor="black")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{name} - none", fontsize=8)
        axis.tick_params(labelsize=7)
    return figure


def draw_misregistration(records: list[Record]) -> "Figure | None":
    """Scores of probes fitted on aligned pairs, over the misregistration of the test pairs."""
    panels = _panels(records)
    if not panels:
        return None
    figure = new_figure(3.8 * len(panels), 3.4)
    for axis, (kind, metric, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = {0.0: scores(records, "probe", "robustness", kind, "aligned", metric)}
        for px in (1, 2, 4, 8):
            found[px] = scores(records, "probe", "robustness", kind, f"moved {px} px", metric)
        _curves(axis, found)
        axis.set_xlabel("SAR moved by (px)")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_missing_sensor(records: list[Record]) -> "Figure | None":
    """Scores of pairs without a sensor, beside those of complete pairs.

    Either the probe was fitted on complete pairs, and the sensor is missing in the test alone, or one was fitted
    without it.
    """
    panels = _panels(records)
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = new_figure(12, 3.6 * rows)
    axes = figure.subplots(rows, -(-len(panels) // rows), sharex=True, squeeze=False).flat
    for axis, (kind, metric, title) in zip(axes, panels, strict=True):
        found = {"both": scores(records, "probe", kind, "both", "1.0", metric)}
        for sensor, name in (("optical", "optical"), ("sar", "SAR")):
            found[f"{name}, fitted on both"] = scores(records, "probe", "robustness", kind, f"{sensor} alone", metric)
            found[f"{name}, fitted on it"] = scores(records, "probe", kind, sensor, "1.0", metric)
        names = [name for name in COMPARED if name in found["both"]]
        for number, (label, of_label) in enumerate(found.items()):
            places = [place for place, name in enumerate(names) if name in of_label]
            if places:
                means, halves = zip(*(_point(list(of_label[names[place]].values())) for place in places), strict=True)
                left = [place + (number - len(found) / 2) / (len(found) + 1) for place in places]
                colour = MISSING_COLOURS[number]
                axis.bar(left, means, 1 / (len(found) + 1), yerr=halves, color=colour, ecolor="black", label=label)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axis.set_ylabel(title, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_attention(records: list[Record]) -> "Figure | None":
    """Share of the early fusion's attention on the place itself, its neighbours, and where the ground went."""
    measured = [r["result"] for r in records if r["stage"] == "attention" and r["variant"] == "both-independent"]
    layers = [layer for layer in (measured[0] if measured else ()) if layer.startswith("early fusion")]
    if not layers:
        return None
    figure = new_figure(4.2 * len(layers), 3.4)
    for axis, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for column in ("colocated", "colocated_best_head", "neighbours", "moved"):
            places = [px for px in measured[0][layer] if measured[0][layer][px][column] is not None]
            if not places:
                continue
            points = [_point([100 * run[layer][px][column] for run in measured]) for px in places]
            means, halves = np.array(points).T
            label = column.replace("_", ", ").replace("moved", "where the ground went")
            axis.errorbar([int(px) for px in places], means, halves, marker="o", markersize=4, capsize=2, label=label)
        shares = measured[0][layer]["0"]
        for name, style in (("chance", ":"), ("chance_neighbours", "--")):
            axis.axhline(100 * shares[name], color="grey", linestyle=style, linewidth=1, label=name.replace("_", ", "))
        axis.set_xlabel("SAR moved by (px)")
        axis.set_ylabel("share of the attention (%)")
        axis.set_title(layer, fontsize=9)
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
