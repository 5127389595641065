"""How much do frozen features hold, with few labels and many? One table: statistics of bands, checkpoints, peers.

    python benchmarks/features.py --model checkpoints/fusmae-tiny --model checkpoints/fusmae-tiny@0,3,5 \
        --maps reben_maps/patches.npz --peer "Galileo nano=reben_maps/galileo_nano_features.npz"

`--model CHECKPOINT` reads features as its configuration says, `--model CHECKPOINT@0,3,5` at the depths 0, 3 and 5.

`--maps FILE` is a `.npz` of real patches: `sar` (N, 2, height, width) float32 dB VV VH; `optical` (N, 4, height,
width) digital numbers without offset, B02 B03 B04 B08, or the bands that `optical_bands` in the file names; `labels`
(N, classes) bool; `clc` (N, height, width), codes of a map; `patch_id`. `--peer NAME=FILE` adds features that another
encoder gave for the same `patch_id`: `scene` (N, size) and `cells` (N, 25, size), row by row, of both sensors;
`scene_sar`, `cells_sar`, `scene_optical` and `cells_optical` of one, where there are any. Each patch is scored by
probes that never saw it: five folds, drawn anew `--repeats` times; a probe is fitted on 8, 16 or all patches of the
other four.

Simulated pairs (`--simulated N`, seed 2024; 0 for none) have fixed parts: probes learn from 1, 10 or 100 % of the
pairs at three places of five, and are scored on the others.

Scores: mean average precision of the classes of scenes; mean F1 of the classes of cells, 5 x 5 to a patch, each of
the code that most of its pixels have. A class counts if at least 5 of the scored patches have it. Probes are ridge
regressions on standardised features (scikit-learn's `RidgeCV`, whose strength is chosen by leave-one-out on what it
is fitted on). Intervals are of patches drawn again (simulated pairs by place, of four pairs each), the same for all
methods; they cover neither pretraining again nor other regions.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from fusmae_hf import FusMAEImageProcessor, FusMAEModel
from fusmae_hf.evaluation.label_fractions import draw_label_fraction
from fusmae_hf.simulation.pairs import SimulatedPairs

SENSORS = ("both", "optical", "sar")
BANDS = ("B02", "B03", "B04", "B08")
CELLS = 5
"""To the side of a patch."""
FEWEST = 5
"""Scored patches that have a class, for it to count."""
FEW_PATCHES, FRACTIONS = (8, 16, None), (0.01, 0.1, 1.0)
FOLDS = 5
STRENGTHS = np.logspace(-1, 5, 13)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
STATISTICS = "statistics of bands"
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Split:
    """What a probe is fitted on, and what it is scored on: rows."""

    fitted: np.ndarray
    scored: np.ndarray


@dataclasses.dataclass(frozen=True)
class Patches:
    """Labelled patches, and how probes are fitted and scored on them.

    Attributes:
        name: of the data.
        sar: `(N, 2, height, width)` float32 dB.
        optical: `(N, bands, height, width)` digital numbers without offset.
        bands: names of the optical bands.
        scenes: `(N, classes)` bool.
        cells: `(N, CELLS ** 2)` int, numbers of classes; None: not measured.
        groups: `(N,)` int, patches that are drawn together.
        splits: by share of the labels, for each repeat.
    """

    name: str
    sar: np.ndarray
    optical: np.ndarray
    bands: tuple[str, ...]
    scenes: np.ndarray
    cells: np.ndarray | None
    groups: np.ndarray
    splits: dict[str, list[list[Split]]]


@dataclasses.dataclass(frozen=True)
class Described:
    """Features: `scenes` `(N, size)`, and `cells` `(N, CELLS ** 2, size)`, None where cells have no classes."""

    scenes: np.ndarray
    cells: np.ndarray | None


Encoder = Callable[[Patches, str], Described | None]
"""Features of the sensors asked for, or None where there are none of them."""


def real_patches(file: Path, repeats: int) -> Patches:
    """Patches of a file; see the top of the script."""
    kept = np.load(file)
    codes = cells_of(kept["clc"]).transpose(0, 2, 1)
    known = np.unique(kept["clc"])
    counts = (codes[..., None] == known).sum(axis=1)
    everything = np.arange(len(codes))
    splits: dict[str, list[list[Split]]] = {}
    for few in FEW_PATCHES:
        repeated = []
        for repeat in range(repeats):
            folds = KFold(FOLDS, shuffle=True, random_state=repeat).split(everything)
            orders = [
                (np.random.default_rng([repeat, fold]).permutation(fit), scored)
                for fold, (fit, scored) in enumerate(folds)
            ]
            repeated.append([Split(order[:few], scored) for order, scored in orders])
        splits[f"{few} patches" if few else "all"] = repeated
    return Patches(
        file.parent.name or file.stem,
        kept["sar"],
        kept["optical"],
        tuple(kept["optical_bands"].tolist()) if "optical_bands" in kept else BANDS,
        kept["labels"],
        counts.argmax(axis=-1),
        everything,
        splits,
    )


def simulated_patches(number: int, repeats: int) -> Patches:
    """Simulated pairs, of which three places of five are to learn from."""
    pairs = SimulatedPairs(number, seed=2024)
    read = [pairs.read(row) for row in range(number)]
    scenes = np.array([[name in pair.labels for name in pairs.info.class_names] for pair in read])
    fit = np.array([row for row, pair in enumerate(read) if pair.split == "train"])
    scored = np.setdiff1d(np.arange(number), fit)
    ids = [read[row].id for row in fit]
    row_of = dict(zip(ids, fit, strict=True))
    splits = {}
    for fraction in FRACTIONS:
        drawn = [draw_label_fraction(ids, scenes[fit], fraction, seed, scenes.shape[1]) for seed in range(repeats)]
        rows = [np.array([row_of[id] for id in of_seed]) for of_seed in drawn]
        splits[f"{100 * fraction:g} %"] = [[Split(of_seed, scored)] for of_seed in rows]
    return Patches(
        "simulated",
        np.stack([pair.sar for pair in read]),
        np.stack([pair.optical for pair in read]),
        pairs.info.optical_bands,
        scenes,
        None,
        np.array([pair.extra["place"] for pair in read]),
        splits,
    )


def cells_of(images: np.ndarray) -> np.ndarray:
    """Pixels of each cell: `(N, ..., height, width)` to `(N, ..., CELLS ** 2, pixels)`."""
    *rest, height, width = images.shape
    tiles = images.reshape(*rest, CELLS, height // CELLS, CELLS, width // CELLS).swapaxes(-3, -2)
    return tiles.reshape(*rest, CELLS**2, -1)


def statistics_of_bands(patches: Patches, sensors: str) -> Described:
    """Mean, deviation and quantiles of each band, over the patch and over each cell."""

    def summary(values: np.ndarray) -> np.ndarray:  # (..., pixels) to (..., 7)
        parts = [values.mean(axis=-1), values.std(axis=-1), *np.quantile(values, QUANTILES, axis=-1)]
        return np.stack(parts, axis=-1).astype(np.float32)

    given = [patches.optical] * (sensors != "sar") + [patches.sar] * (sensors != "optical")
    bands = [band.astype(np.float32) for images in given for band in images.swapaxes(0, 1)]
    scenes = [summary(band.reshape(len(band), -1)) for band in bands]
    cells = None if patches.cells is None else np.concatenate([summary(cells_of(band)) for band in bands], axis=-1)
    return Described(np.concatenate(scenes, axis=-1), cells)


@torch.no_grad()
def encoded(checkpoint: str, depths: list[int] | None, patches: Patches, sensors: str) -> Described:
    """Features of a checkpoint at its own depths or others, with the optical bands that it shares with the patches."""
    fields = {} if depths is None else {"feature_layers": depths}
    config = FusMAEModel.config_class.from_pretrained(checkpoint)
    bands = [band for band in config.optical_bands if band in patches.bands]
    model = FusMAEModel.from_pretrained(checkpoint, optical_bands=bands, **fields).eval()
    processor = FusMAEImageProcessor.from_pretrained(
        checkpoint, optical_bands=bands, do_pad=True, size_divisor=model.config.patch_size
    )
    optical = patches.optical[:, [patches.bands.index(band) for band in bands]]
    scenes, cells = [], []
    for start in range(0, len(optical), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        images = {"optical": optical[rows]} if sensors != "sar" else {}
        images |= {"sar": patches.sar[rows]} if sensors != "optical" else {}
        inputs = {"pixel_values": None, "pixel_values_sar": None} | dict(processor(**images))
        outputs = model(**inputs, output_hidden_states=True)
        pooled = outputs.pooler_output if outputs.feature_output is None else outputs.feature_output
        masks = [inputs.get(name) for name in ("pixel_mask", "pixel_mask_sar")]
        given = (inputs["pixel_values"], inputs["pixel_values_sar"], *masks)
        maps = torch.cat(model.feature_maps(model.config.feature_stages, outputs.hidden_states, *given, None, None), 1)
        scenes.append(pooled.numpy())
        cells.append(functional.adaptive_avg_pool2d(maps, CELLS).flatten(2).transpose(1, 2).numpy())
    return Described(np.concatenate(scenes), None if patches.cells is None else np.concatenate(cells))


def precomputed(file: Path, ids: np.ndarray, patches: Patches, sensors: str) -> Described | None:
    """Features of a file for the patches `ids`."""
    if patches.name == "simulated":
        return None
    kept, suffix = np.load(file), "" if sensors == "both" else f"_{sensors}"
    if f"scene{suffix}" not in kept:
        return None
    row_of = {name: row for row, name in enumerate(kept["patch_id"].tolist())}
    if missing := [name for name in ids.tolist() if name not in row_of]:
        raise SystemExit(f"{file} has no features of {len(missing)} of {len(ids)} patches, such as {missing[0]!r}.")
    rows = [row_of[name] for name in ids.tolist()]
    return Described(kept[f"scene{suffix}"][rows], kept[f"cells{suffix}"][rows])


def probe(known: np.ndarray, targets: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Scores `(unknown samples, classes)` of ridge regressions on `targets` `(known samples, classes)`, 0 and 1."""
    scaler = StandardScaler().fit(known)
    model = RidgeCV(STRENGTHS).fit(scaler.transform(known), targets.astype(known.dtype))
    return model.predict(scaler.transform(unknown)).reshape(len(unknown), -1)


def weighted_average_precision(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision of one class for each row of `weights` `(draws, samples)`, as scikit-learn's."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores count at once
    drawn = weights[:, order]
    found = np.cumsum(drawn * truth[order], axis=1)[:, ends]
    shown = np.cumsum(drawn, axis=1)[:, ends]
    gained = np.diff(found, axis=1, prepend=0.0)
    with np.errstate(invalid="ignore"):
        return (gained * found / np.maximum(shown, 1e-12)).sum(axis=1) / found[:, -1]


def scene_scores(
    features: np.ndarray, patches: Patches, repeats: list[list[Split]], weights: np.ndarray
) -> np.ndarray:
    """Mean average precision for each draw, over classes and repeats."""
    scored = np.concatenate([split.scored for split in repeats[0]])
    counted = np.flatnonzero(patches.scenes[scored].sum(axis=0) >= FEWEST)
    values = []
    for splits in repeats:
        scores = np.full(patches.scenes.shape, np.nan)
        for split in splits:
            scores[split.scored] = probe(features[split.fitted], patches.scenes[split.fitted], features[split.scored])
        rows = np.flatnonzero(np.isfinite(scores[:, 0]))
        of_classes = [
            weighted_average_precision(scores[rows, number], patches.scenes[rows, number], weights[:, rows])
            for number in counted
        ]
        values.append(np.nanmean(of_classes, axis=0))
    return np.mean(values, axis=0)


def cell_scores(features: np.ndarray, patches: Patches, repeats: list[list[Split]], weights: np.ndarray) -> np.ndarray:
    """Mean F1 for each draw, over classes and repeats."""
    truth, number = patches.cells, int(patches.cells.max()) + 1
    one_hot = np.eye(number, dtype=bool)
    counted = np.flatnonzero(one_hot[truth].any(axis=1).sum(axis=0) >= FEWEST)
    values = []
    for splits in repeats:
        predicted = np.zeros_like(truth)
        for split in splits:
            known, targets = np.concatenate(features[split.fitted]), np.concatenate(one_hot[truth[split.fitted]])
            scores = probe(known, targets, np.concatenate(features[split.scored]))
            predicted[split.scored] = scores.argmax(axis=1).reshape(len(split.scored), -1)
        given, right = one_hot[predicted], one_hot[truth]
        hits = weights @ (given & right).sum(axis=1)[:, counted].astype(float)
        both = weights @ (given.sum(axis=1) + right.sum(axis=1))[:, counted].astype(float)
        there = weights @ right.sum(axis=1)[:, counted].astype(float) > 0
        values.append(np.nanmean(np.where(there, 2 * hits / np.maximum(both, 1e-12), np.nan), axis=1))
    return np.mean(values, axis=0)


def draws(groups: np.ndarray, resamples: int) -> np.ndarray:
    """How often each sample is drawn, `(1 + resamples, samples)`; the first row is the sample as it is."""
    known, number = np.unique(groups, return_inverse=True)
    often = np.random.default_rng(0).multinomial(len(known), np.full(len(known), 1 / len(known)), resamples)
    return np.concatenate([np.ones((1, len(groups))), often[:, number]])


def measure(patches: Patches, encoders: dict[str, Encoder], resamples: int) -> list[dict]:
    """Scores of all methods on some patches: by sensors, share of the labels and method, for each draw."""
    weights, rows = draws(patches.groups, resamples), []
    for sensors in SENSORS:
        for method, encoder in encoders.items():
            if (features := encoder(patches, sensors)) is None:
                continue
            for labels, repeats in patches.splits.items():
                found = {"AP of scenes": scene_scores(features.scenes, patches, repeats, weights)}
                if features.cells is not None:
                    found["F1 of cells"] = cell_scores(features.cells, patches, repeats, weights)
                place = {"data": patches.name, "sensors": sensors, "labels": labels, "method": method}
                rows += [{**place, "score": score, "draws": 100 * values} for score, values in found.items()]
                print(
                    json.dumps({**place, **{score: round(100 * float(v[0]), 1) for score, v in found.items()}}),
                    flush=True,
                )
    return rows


def interval(values: np.ndarray, sign: str = "") -> str:
    """An estimate with its interval of 95 %."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def table(rows: list[dict], against: list[str]) -> str:
    """Markdown: a line for each score, choice of sensors, share of the labels and method; differences are paired."""
    head = ["data", "score", "sensors", "labels", "method", "value", *(f"minus {other}" for other in against)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    keys = ("data", "score", "sensors", "labels")
    for row in sorted(rows, key=lambda row: (row["data"] != "simulated", row["score"], SENSORS.index(row["sensors"]))):
        cells = [str(row[key]) for key in (*keys, "method")] + [interval(row["draws"])]
        for other in against:
            same = [it for it in rows if it["method"] == other and all(it[key] == row[key] for key in keys)]
            cells.append(interval(row["draws"] - same[0]["draws"], "+") if same and other != row["method"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark; see the top of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="CHECKPOINT or CHECKPOINT@0,3,5; any number")
    parser.add_argument("--maps", type=Path, help="real patches")
    parser.add_argument("--peer", action="append", default=[], help="NAME=FILE of features for the patches of --maps")
    parser.add_argument("--simulated", type=int, default=1200, help="simulated pairs; 0 for none")
    parser.add_argument("--repeats", type=int, default=3, help="draws of folds and labels")
    parser.add_argument("--resamples", type=int, default=1000, help="for the intervals")
    parser.add_argument(
        "--against", action="append", help="methods to give paired differences to; default: statistics"
    )
    parser.add_argument("--output", type=Path, help="JSON file of the table's rows")
    arguments = parser.parse_args()
    encoders: dict[str, Encoder] = {STATISTICS: statistics_of_bands}
    for name in arguments.model:
        checkpoint, _, depths = name.partition("@")
        numbers = [int(depth) for depth in depths.split(",")] if depths else None
        encoders[name] = functools.partial(encoded, checkpoint, numbers)
    for text in arguments.peer:
        name, _, file = text.partition("=")
        if not file or arguments.maps is None:
            parser.error(f"--peer {text}: give NAME=FILE, and --maps, the patches that its features are of.")
        encoders[name] = functools.partial(precomputed, Path(file), np.load(arguments.maps)["patch_id"])
    rows = []
    if arguments.simulated:
        rows += measure(simulated_patches(arguments.simulated, arguments.repeats), encoders, arguments.resamples)
    if arguments.maps:
        rows += measure(real_patches(arguments.maps, arguments.repeats), encoders, arguments.resamples)
    print(table(rows, arguments.against or [STATISTICS]))
    if arguments.output:
        kept = [{**row, "draws": np.round(row["draws"], 3).tolist()} for row in rows]
        arguments.output.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
