"""Floods mapped by simple methods and by Fus-MAE, in the same CPU seconds, on events that no method has seen.

    python benchmarks/wins.py --train OMBRIA --seconds 60 --seeds 5 --out outputs/wins

OMBRIA is a folder in the layout of that data set (`fusmae prepare ombria --help`). Without `--test` whole events are
held out by blocks of numbers: `EVENTS` of its reader. All methods train on the same tiles, on one thread, for the same
seconds of process CPU time. Those that train in steps keep the weights after two thirds of the time, or the last ones,
whichever map the validation events better.

Each method tries its `TRIALS`, as many as any other, with a seed that the table does not use, and keeps the settings
that map the validation events best; Fus-MAE, one model for all sensors, those with the best mean over both sensors and
each alone. One setting is whether each tile is normalised by its own mean and deviation, or all by those of the
training tiles: the SAR tiles of OMBRIA were stretched one by one. Nothing is chosen on the test events.

One table, `wins.md`: pooled IoU of the flood, and the mean over images of the two classes' mean IoU; mean over seeds
with a 95 % interval (t), and paired differences. Every finished row is kept in `rows.jsonl`: the same command goes on
where it was.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from fusmae_hf import FusMAEConfig, FusMAEForSemanticSegmentation
from fusmae_hf.readers.ombria import OMBRIA

SENSORS = {"both": (True, True), "sar": (False, True), "optical": (True, False)}
RATE, DECAY = 1e-3, 0.05
TRIAL_SEED = 1000
EVALUATED = 8
TRIALS: dict[str, list[dict[str, int]]] = {
    "otsu": [{"by_tile": 0}],  # its threshold does not depend on it
    "pixels": [{"by_tile": by_tile, "pixels": pixels} for by_tile in (0, 1) for pixels in (50, 200)],
    "steps": [{"by_tile": by_tile, "batch": batch} for by_tile in (0, 1) for batch in (2, 8)],
}
"""Settings that are tried: pixels drawn from each training tile, or tiles of a step."""

Predict = Callable[[torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class Tiles:
    """Tiles of a split, normalised by the statistics of the training tiles."""

    def __init__(self, optical: torch.Tensor, sar: torch.Tensor, labels: torch.Tensor):
        self.optical, self.sar, self.labels = optical, sar, labels

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, share: float, seed: int) -> "Tiles":
        """A random share of the tiles, at least two."""
        rows = np.random.default_rng(seed).permutation(len(self))[: max(2, round(share * len(self)))]
        return Tiles(self.optical[rows], self.sar[rows], self.labels[rows])

    def shown(self, rows: Any, sensors: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Optical and SAR images of some tiles, None for a sensor that is not shown."""
        optical, sar = SENSORS[sensors]
        return self.optical[rows] if optical else None, self.sar[rows] if sar else None


def read(root: Path, splits: str, time: str = "after") -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Optical, SAR and labels of each split of a folder."""
    reader = OMBRIA(root, splits=splits, time=time)  # type: ignore[arg-type]
    found: dict[str, list[Any]] = {}
    for number in tqdm(range(len(reader)), f"reading {root.name}", leave=False):
        pair = reader.read(number)
        found.setdefault(str(pair.split), []).append((pair.optical, pair.sar, pair.label_map))
    return {name: tuple(map(np.stack, zip(*pairs, strict=True))) for name, pairs in found.items()}  # type: ignore[misc]


def load(train: Path, test: Path | None) -> list[dict[str, Tiles]]:
    """Training, validation and test tiles, normalised by the training tiles, and again each by itself."""
    arrays = read(train, "events")
    if test is not None:  # all events of the training folder but those of validation are trained on
        both = zip(arrays["train"], arrays["test"], strict=True)
        arrays["train"] = tuple(np.concatenate(each) for each in both)  # type: ignore[assignment]
        every = read(test, "official").values()
        arrays["test"] = tuple(np.concatenate(each) for each in zip(*every, strict=True))  # type: ignore[assignment]
    scale = [(values.mean((0, 2, 3)), values.std((0, 2, 3))) for values in arrays["train"][:2]]
    found: list[dict[str, Tiles]] = [{}, {}]
    for name, (*images, labels) in arrays.items():
        for by_tile in (0, 1):
            normed = []
            for values, (mean, std) in zip(images, scale, strict=True):
                if by_tile:
                    mean, std = (f(values, axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
                else:
                    mean, std = mean[:, None, None], std[:, None, None]
                normed.append(torch.from_numpy(((values - mean) / np.maximum(std, 1e-3)).astype(np.float32)))
            found[by_tile][name] = Tiles(*normed, torch.from_numpy(labels).long())
    return found


def flood_iou(predict: Predict, tiles: Tiles, sensors: str) -> tuple[float, float]:
    """Pooled IoU of the flood, and mean over images of the mean IoU of the classes that an image has, in percent."""
    pooled, images = np.zeros(2), []
    for first in range(0, len(tiles), EVALUATED):
        rows = slice(first, first + EVALUATED)
        found, truth = predict(*tiles.shown(rows, sensors)), tiles.labels[rows]
        scores = []
        for kind in (1, 0):
            both = ((found == kind) & (truth == kind)).sum((1, 2)).double()
            either = ((found == kind) | (truth == kind)).sum((1, 2)).double()
            scores.append(both / either)  # NaN where an image has none of the class
            pooled += (both.sum().item(), either.sum().item()) if kind == 1 else (0, 0)
        images.append(torch.stack(scores).nanmean(0))
    return 100 * pooled[0] / max(pooled[1], 1), 100 * float(torch.cat(images).mean())


def score_on(predict: Predict, tiles: Tiles, sensors: list[str]) -> float:
    """Mean over choices of sensors of the IoU of the flood."""
    return float(np.mean([flood_iou(predict, tiles, each)[0] for each in sensors]))


# --- simple methods --------------------------------------------------------------------------------------------------


def otsu(tiles: dict[str, Tiles], sensors: str, seed: int, seconds: float) -> Predict:
    """Water is what lies below the threshold of each SAR tile that parts its values best (Otsu, 1979)."""

    def predict(optical: torch.Tensor | None, sar: torch.Tensor | None) -> torch.Tensor:
        assert sar is not None
        found = []
        for tile in sar[:, 0]:
            values, edges = np.histogram(tile.numpy(), 256)
            middles = (edges[1:] + edges[:-1]) / 2
            below, mass = values.cumsum(), (values * middles).cumsum()
            above = below[-1] - below
            gap = mass / np.maximum(below, 1) - (mass[-1] - mass) / np.maximum(above, 1)
            found.append(tile < middles[np.argmax(below * above * gap**2)])
        return torch.stack(found).long()

    return predict


def of_pixels(make: Callable[[int], Any]) -> Callable[..., Predict]:
    """A classifier of scikit-learn on the values of single pixels."""

    def fit(tiles: dict[str, Tiles], sensors: str, seed: int, seconds: float, pixels: int) -> Predict:
        train = tiles["train"]

        def rows_of(images: tuple[torch.Tensor | None, torch.Tensor | None]) -> np.ndarray:
            return (
                torch.cat([each for each in images if each is not None], 1).permute(0, 2, 3, 1).flatten(1, 2).numpy()
            )

        rng, model = np.random.default_rng(seed), make(seed)
        values, labels = rows_of(train.shown(slice(None), sensors)), train.labels.flatten(1).numpy()
        chosen = rng.integers(values.shape[1], size=(len(values), pixels))
        rows = np.arange(len(values))[:, None]
        model.fit(values[rows, chosen].reshape(-1, values.shape[2]), labels[rows, chosen].ravel())

        def predict(*images: torch.Tensor | None) -> torch.Tensor:
            given = rows_of(images)  # type: ignore[arg-type]
            side = next(each for each in images if each is not None).shape[-2:]
            return torch.from_numpy(model.predict(given.reshape(-1, given.shape[2]))).view(len(given), *side)

        return predict

    return fit


def regression(seed: int) -> Any:
    """Logistic regression."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=200)


def forest(seed: int) -> Any:
    """A random forest of 50 trees."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(50, min_samples_leaf=20, random_state=seed, n_jobs=1)


class UNet(nn.Module):
    """A plain U-Net of five levels, 8 to 128 channels, with batch normalisation."""

    def __init__(self, bands: int):
        super().__init__()
        widths = [8, 16, 32, 64, 128]

        def twice(before: int, after: int) -> nn.Sequential:
            parts: list[nn.Module] = []
            for channels in (before, after):
                parts += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            return nn.Sequential(*parts)

        self.down = nn.ModuleList(map(twice, [bands, *widths[:-1]], widths))
        self.up = nn.ModuleList(
            twice(low + high, low) for low, high in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.predict = nn.Conv2d(widths[0], 2, 1)

    def forward(self, optical: torch.Tensor | None, sar: torch.Tensor | None) -> torch.Tensor:
        """Logits `(batch, 2, height, width)`."""
        values, kept = torch.cat([each for each in (optical, sar) if each is not None], 1), []
        for step, block in enumerate(self.down):
            values = block(functional.max_pool2d(values, 2) if step else values)
            kept.append(values)
        for block, beside in zip(self.up, kept[-2::-1], strict=True):
            values = block(torch.cat([functional.interpolate(values, scale_factor=2.0), beside], 1))
        return self.predict(values)


# --- what is trained in steps ----------------------------------------------------------------------------------------


def trained(
    model: nn.Module,
    forward: Callable[..., torch.Tensor],
    tiles: dict[str, Tiles],
    sensors: list[str],
    seed: int,
    seconds: float,
    batch: int,
) -> Predict:
    """Train a model for some seconds of CPU time; each step shows one choice of `sensors`, half of them the first."""
    train, validation = tiles["train"], tiles["validation"]
    shares = [0.5, *[0.5 / (len(sensors) - 1)] * (len(sensors) - 1)] if len(sensors) > 1 else [1.0]

    def predict(*images: torch.Tensor | None) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return forward(model, *images).argmax(1)

    rng, order = np.random.default_rng(seed), list[int]()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
    spent, best, kept, due = 0.0, -1.0, model.state_dict(), 2
    while spent < seconds:
        started = time.process_time()
        share = spent / seconds
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, share / 0.05 + 0.02) * 0.5 * (1 + np.cos(np.pi * share))
        while len(order) < batch:
            order += rng.permutation(len(train)).tolist()
        rows, order = order[:batch], order[batch:]
        shown = rng.choice(sensors, p=shares)
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))

        def view(values: torch.Tensor | None, turns: int = turns, flip: bool = flip) -> torch.Tensor | None:
            if values is None:
                return None
            values = torch.rot90(values, turns, (-2, -1))
            return (values.flip(-1) if flip else values).contiguous()

        optical, sar = map(view, train.shown(rows, str(shown)))
        model.train()
        loss = functional.cross_entropy(forward(model, optical, sar), view(train.labels[rows]))  # type: ignore[arg-type]
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        spent += time.process_time() - started
        if spent >= due * seconds / 3:
            due = int(3 * spent / seconds) + 1
            score = score_on(predict, validation, sensors)
            if score > best:
                best, kept = score, {name: values.clone() for name, values in model.state_dict().items()}
    model.load_state_dict(kept)
    return predict


def unet(tiles: dict[str, Tiles], sensors: str, seed: int, seconds: float, batch: int) -> Predict:
    """A U-Net for one choice of sensors."""
    torch.manual_seed(seed)
    model = UNet(3 * SENSORS[sensors][0] + SENSORS[sensors][1])

    def forward(model: nn.Module, *images: torch.Tensor | None) -> torch.Tensor:
        return model(*images)

    return trained(model, forward, tiles, [sensors], seed, seconds, batch)


def fusmae(
    checkpoint: str | None, preset: str, tiles: dict[str, Tiles], sensors: str, seed: int, seconds: float, batch: int
) -> Predict:
    """One model for both sensors and each alone: the recipe of `fusmae finetune`."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"num_labels": 2}
    if checkpoint is None:
        bands = {"optical_bands": ["SWIR", "NIR", "visible"], "sar_bands": ["backscatter"]}
        model = FusMAEForSemanticSegmentation(FusMAEConfig.from_preset(preset, image_size=256, **bands, **fields))
    else:
        model = FusMAEForSemanticSegmentation.from_pretrained(checkpoint, **fields)

    def forward(model: nn.Module, optical: torch.Tensor | None, sar: torch.Tensor | None) -> torch.Tensor:
        return model(pixel_values=optical, pixel_values_sar=sar).logits

    return trained(model, forward, tiles, [*SENSORS], seed, seconds, batch)


# --- the table -------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {half:.1f}"


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """Lines that compare Fus-MAE with the other methods, and both sensors with each alone, seed by seed."""
    by_seed: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        by_seed.setdefault((row["method"], row["sensors"]), {})[row["seed"]] = row["flood"]

    def line(ours: tuple[str, str], theirs: tuple[str, str]) -> str:
        other = by_seed[theirs]
        # a method that draws nothing has one row, which stands for every seed
        pairs = [
            (value, next(iter(other.values())) if len(other) == 1 else other.get(seed))
            for seed, value in by_seed[ours].items()
        ]
        gaps = [value - against for value, against in pairs if against is not None]
        return f"| {ours[0]}, {ours[1]} | {theirs[0]}, {theirs[1]} | {len(gaps)} | {interval(gaps)} |"

    known = list(by_seed)
    ours = [key for key in known if key[0].startswith("fusmae")]
    found = []
    for number, key in enumerate(known):
        others = [other for place, other in enumerate(known) if other not in ours or place < number]
        found += [line(key, other) for other in others if key in ours and other[1] == key[1] and other != key]
    return found + [line(key, (key[0], each)) for key in ours if key[1] == "both" for each in ("sar", "optical")]


def table(rows: list[dict[str, Any]], seconds: float) -> str:
    """Markdown of all rows."""
    lines = [f"{seconds:g} CPU seconds on one thread; torch {torch.__version__}; test events.", ""]
    lines += ["| method | sensors | seeds | CPU s | settings | IoU of flood | mean IoU of images |"]
    lines += ["|---|---|---|---|---|---|---|"]
    kinds = dict.fromkeys((row["method"], row["sensors"]) for row in rows)
    for sensors in SENSORS:
        for method, of in kinds:
            if of != sensors:
                continue
            found = [row for row in rows if (row["method"], row["sensors"]) == (method, sensors)]
            spent = np.mean([row["seconds"] for row in found])
            settings = ", ".join(f"{name} {value}" for name, value in found[0]["settings"].items())
            scores = " | ".join(interval([row[name] for row in found]) for name in ("flood", "images"))
            lines.append(f"| {method} | {sensors} | {len(found)} | {spent:.0f} | {settings} | {scores} |")
    lines += ["", "| IoU of flood of | minus that of | seeds | difference |", "|---|---|---|---|", *differences(rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="FOLDER", help="in OMBRIA's layout")
    parser.add_argument("--test", type=Path, metavar="FOLDER", help="other events; left out: blocks of --train")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training (default 60)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--label_shares", type=float, nargs="+", default=[1.0], help="shares of the training tiles")
    parser.add_argument("--model", metavar="CHECKPOINT", help="pretrained on the same bands; adds its rows")
    parser.add_argument("--preset", default="nano", help="of the fresh model (default nano)")
    parser.add_argument("--methods", default="otsu,regression,forest,unet,fusmae", help="separated by commas")
    parser.add_argument("--out", type=Path, default=Path("outputs/wins"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = load(arguments.train, arguments.test)
    print({name: len(split) for name, split in images[0].items()})
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []

    methods: list[tuple[str, str, Callable[..., Predict], list[str]]] = []
    for name in arguments.methods.split(","):
        if name == "fusmae":
            for checkpoint in dict.fromkeys([None, arguments.model]):
                title = f"fusmae, {Path(checkpoint).name if checkpoint else 'from scratch'} (one model)"
                methods.append((title, "steps", partial(fusmae, checkpoint, arguments.preset), [*SENSORS]))
        elif name == "otsu":
            methods.append(("otsu", "otsu", otsu, ["sar"]))
        else:
            kind = "steps" if name == "unet" else "pixels"
            fit = {"unet": unet, "regression": of_pixels(regression), "forest": of_pixels(forest)}[name]
            methods += [(name, kind, fit, [sensors]) for sensors in SENSORS]

    def run(method: Any, seed: int, settings: dict[str, int], share: float) -> None:
        title, _, fit, shown = method
        tiles = dict(images[settings["by_tile"]])
        tiles["train"] = tiles["train"].part(share, seed)
        started = time.process_time()
        predict = fit(
            tiles, shown[0], seed, arguments.seconds, **{k: v for k, v in settings.items() if k != "by_tile"}
        )
        spent = time.process_time() - started
        found = [
            {"method": title, "seed": seed, "settings": settings, "share": share, "seconds": spent} for _ in shown
        ]
        for row, sensors in zip(found, shown, strict=True):
            validation, _ = flood_iou(predict, tiles["validation"], sensors)
            row |= {"sensors": sensors, "validation": validation}
            if seed != TRIAL_SEED:
                row["flood"], row["images"] = flood_iou(predict, tiles["test"], sensors)
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows.extend(found)

    def done(method: Any, seed: int, share: float, settings: dict[str, int] | None = None) -> list[float]:
        """Scores on validation events of rows that are there."""
        return [
            row["validation"]
            for row in rows
            if (row["method"], row["seed"], row["share"]) == (method[0], seed, share) and row["sensors"] in method[3]
            if settings is None or row["settings"] == settings
        ]

    chosen = []
    for method in tqdm(methods, "trials"):
        trials = TRIALS[method[1]]
        for settings in trials:
            if len(trials) > 1 and not done(method, TRIAL_SEED, 1.0, settings):
                run(method, TRIAL_SEED, settings, 1.0)
        chosen.append(max(trials, key=lambda each: np.mean(done(method, TRIAL_SEED, 1.0, each) or 0)))
    for seed in tqdm(range(arguments.first_seed, arguments.first_seed + arguments.seeds), "seeds"):
        for share in arguments.label_shares:
            for method, settings in zip(methods, chosen, strict=True):
                draws = method[0] not in ("otsu", "regression") or share < 1
                if not done(method, seed, share) and (draws or seed == arguments.first_seed):
                    run(method, seed, settings, share)
        final = [row for row in rows if row["seed"] != TRIAL_SEED]
        shares = sorted({row["share"] for row in final}, reverse=True)
        tables = [
            f"{100 * share:g} % of the training tiles.\n\n"
            + table([row for row in final if row["share"] == share], arguments.seconds)
            for share in shares
        ]
        (arguments.out / "wins.md").write_text("\n".join(tables))
    print((arguments.out / "wins.md").read_text())


if __name__ == "__main__":
    main()
