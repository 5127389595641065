"""Does pretraining pay where labels are few, and do two sensors beat one? Pretrains, fine-tunes, prints tables.

    python benchmarks/few_labels.py simulated --output_dir outputs/few-labels
    python benchmarks/few_labels.py ombria --data shards/ombria --output_dir outputs/few-labels

`simulated` pretrains on 3,600 simulated pairs without their labels, then learns from the labels of 1 % of them, drawn
anew by each seed: the classes of whole scenes, and maps of land cover. `ombria` maps floods in real imagery that
`fusmae prepare ombria <archive> shards/ombria --splits events` has prepared: no event is in two splits, and
pretraining sees the training part alone. Each is fine-tuned from the checkpoint and from scratch, with both sensors
and with each alone, three seeds each, and measured on the test split.

Run it from the root of a checkout. It runs one command after another, and records all of them. A step that is
finished is kept when the command is repeated. Ends with `<study>-<task>.json` and `<study>-<task>.md` beside the runs.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fusmae_hf.evaluation.intervals import mean_and_interval

SENSORS = {"both": "both", "sar": "SAR", "optical": "optical"}
STARTS = ("pretrained", "scratch")
TUNING_SEED = "100"

Recipe = tuple[str, str]
"""Learning rate, and layer-wise decay of it."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt from labels.

    Attributes:
        fine_tuning: arguments of `run_finetune.py`.
        metrics: columns of the table by title: a metric of a run, or a metric by class and the classes to take
            the mean of.
        recipes: by start. Of several, the one that is best on the validation split with both sensors and a seed of
            its own is taken.
        tuning: further arguments of the runs that choose.
        measuring: further arguments of the runs that are measured.
        head: fields of the configuration of the head.
    """

    fine_tuning: tuple[str, ...]
    metrics: dict[str, tuple[str, ...]]
    recipes: dict[str, tuple[Recipe, ...]]
    tuning: tuple[str, ...] = ()
    measuring: tuple[str, ...] = ()
    head: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """One data set and what is done with it.

    Attributes:
        config: fields of the configuration, of the model that is pretrained and of that from scratch.
        pretraining: arguments of `run_pretrain.py`.
        tasks: by name.
    """

    config: dict[str, Any]
    pretraining: tuple[str, ...]
    tasks: dict[str, Task]


LAST_ONLY = ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
THREE_CHECKPOINTS = (
    *("--eval_strategy", "steps", "--eval_steps", "0.3334", "--save_strategy", "steps", "--save_steps", "0.3334"),
)
FEW_SCENES = ("--label_fraction", "0.01", "--per_device_train_batch_size", "12")

NEED_BOTH = ("broad-leaved forest", "flooded forest")
"""In the simulation these need both sensors: optically they are the same, and to radar the one looks like coniferous
forest and the other like urban fabric (`fusmae_hf.simulation.land_cover.LAND_COVER`)."""

STUDIES = {
    "simulated": Study(
        config={"num_hidden_layers": 3, "patch_size": 12, "decoder_context": "all"},
        pretraining=("--max_steps", "1800", "--per_device_eval_batch_size", "64"),
        tasks={
            "scenes": Task(
                fine_tuning=("--task", "multi_label_classification", "--max_steps", "100", *FEW_SCENES),
                tuning=(
                    "--eval_strategy",
                    "steps",
                    "--eval_steps",
                    "100",
                    "--save_strategy",
                    "steps",
                    "--save_steps",
                    "100",
                ),
                measuring=LAST_ONLY,
                metrics={
                    "AP micro": ("average_precision_micro",),
                    "AP macro": ("average_precision_macro",),
                    "broad-leaved forest": ("average_precision_per_class", "broad-leaved forest"),
                    "flooded forest": ("average_precision_per_class", "flooded forest"),
                    "mean of these two": ("average_precision_per_class", *NEED_BOTH),
                },
                recipes={
                    "pretrained": (("1e-3", "0.75"), ("3e-3", "0.75")),
                    "scratch": (("1e-3", "1.0"), ("3e-3", "1.0")),
                },
            ),
            "maps": Task(
                fine_tuning=("--task", "semantic_segmentation", "--max_steps", "120", *FEW_SCENES),
                measuring=LAST_ONLY,
                metrics={
                    "mean IoU": ("mean_iou",),
                    "broad-leaved forest": ("iou_per_class", "broad-leaved forest"),
                    "flooded forest": ("iou_per_class", "flooded forest"),
                    "mean of these two": ("iou_per_class", *NEED_BOTH),
                },
                recipes={"pretrained": (("1e-3", "1.0"),), "scratch": (("1e-3", "1.0"),)},
            ),
        },
    ),
    "ombria": Study(
        config={"num_hidden_layers": 3, "patch_size": 16, "decoder_context": "all"},
        pretraining=("--max_steps", "900", "--flips", "true", "--rotations", "true"),
        tasks={
            "maps": Task(
                fine_tuning=(
                    *("--task", "semantic_segmentation", "--max_steps", "120", "--per_device_train_batch_size", "16"),
                    *THREE_CHECKPOINTS,
                ),
                metrics={"mean IoU": ("mean_iou",), "flooded": ("iou_per_class", "flooded")},
                recipes={"pretrained": (("1e-3", "0.75"),), "scratch": (("1e-3", "1.0"),)},
                head={"segmentation_hidden_size": 64},
            )
        },
    ),
}


class Steps:
    """Runs commands one after another, shows which, and keeps what is finished.

    Attributes:
        commands: all so far, as one types them.
    """

    def __init__(self, log: Path):
        self.log, self.commands = log, list[str]()
        self.bar = tqdm(unit="step")

    def run(self, command: Sequence[str], finished: Path) -> None:
        """Run a script of this checkout, or a console script, unless the file `finished` is there.

        Raises:
            SystemExit: it failed; shows the end of its output.
        """
        program, *arguments = command
        script = program.endswith(".py")
        shown = shlex.join(["python", *command] if script else command)
        self.commands.append(shown)
        if not finished.is_file():
            tqdm.write(shown)
            start = [sys.executable, program] if script else [str(Path(sys.executable).with_name(program))]
            with self.log.open("ab") as output:
                code = subprocess.run([*start, *arguments], stdout=output, stderr=output).returncode
            if code:
                raise SystemExit(f"Failed: {shown}\n{self.log.read_text(errors='replace')[-2000:]}")
        self.bar.update()


@dataclasses.dataclass
class FineTuning:
    """Fine-tunes for one task of a study; every run in a folder of its own."""

    steps: Steps
    study: Study
    task: Task
    data: str
    checkpoint: Path
    folder: Path

    def run(self, start: str, recipe: Recipe, folder: Path, *options: str) -> None:
        """Fine-tune from a start."""
        if start == "pretrained":
            of_start, config = ("--model", str(self.checkpoint)), self.task.head
        else:
            of_start = ("--from_scratch", "true", "--preset", "tiny", "--statistics", str(self.checkpoint))
            config = self.study.config | self.task.head
        of_start += ("--config", json.dumps(config)) if config else ()
        rate, decay = recipe
        common = ("--per_device_eval_batch_size", "24", "--bf16", "true", "--attn_implementation", "eager")
        command = ("training/run_finetune.py", "--data", self.data, "--output_dir", str(folder), *of_start, *common)
        learning = ("--learning_rate", rate, "--layer_decay", decay)
        finished = "summary.json" if "--seeds" in options else "metrics.json"
        self.steps.run([*command, *self.task.fine_tuning, *learning, *options], folder / finished)

    def best_recipe(self, start: str) -> tuple[Recipe, dict[str, float]]:
        """The recipe to take, and what each one tried gives on the validation split."""
        recipes, tried = self.task.recipes[start], dict[Recipe, float]()
        for recipe in recipes if len(recipes) > 1 else ():
            folder = self.folder / "tuning" / f"{start}-{recipe[0]}-{recipe[1]}"
            self.run(start, recipe, folder, *self.task.tuning, "--seed", TUNING_SEED, "--eval_sensors", "both")
            tried[recipe] = json.loads((folder / "run.json").read_text())["best"]["value"]
        best = max(tried, key=lambda recipe: tried[recipe]) if tried else recipes[0]
        return best, {f"rate {rate}, decay {decay}": value for (rate, decay), value in tried.items()}

    def measure(self, start: str, recipe: Recipe, sensors: str, seeds: int) -> dict[int, dict[str, Any]]:
        """Metrics by seed, then by the sensors shown to the model."""
        folder = self.folder / start / sensors
        self.run(start, recipe, folder, *self.task.measuring, "--sensors", sensors, "--seeds", str(seeds))
        found = (json.loads(path.read_text()) for path in sorted(folder.glob("seed-*/metrics.json")))
        return {content["seed"]: content["sensors"] for content in found}


def score(metrics: dict[str, Any], path: Sequence[str]) -> float:
    """One metric of a run, in per cent."""
    name, *classes = path
    if not classes:
        return 100 * metrics[name]
    return 100 * sum(metrics[name][of_class] for of_class in classes) / len(classes)


def cell(values: Sequence[float]) -> str:
    """Mean and 95 % interval over seeds."""
    interval = mean_and_interval(values)
    return f"{interval.estimate:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def tables(task: Task, results: dict[str, dict[str, dict[int, dict[str, Any]]]]) -> str:
    """Markdown: every start and choice of sensors, differences, and one checkpoint with a sensor missing."""

    def scores(start: str, trained_on: str, shown: str) -> list[list[float]]:
        of_seeds = results[start][trained_on].values()
        return [[score(of_seed[shown], path) for of_seed in of_seeds] for path in task.metrics.values()]

    head = " | ".join(task.metrics)
    rule = "---|" * len(task.metrics)
    lines = [f"| trained and tested on | start | {head} |", f"|---|---|{rule}"]
    for sensors, title in SENSORS.items():
        for start in STARTS:
            lines.append(f"| {title} | {start} | {' | '.join(map(cell, scores(start, sensors, sensors)))} |")
    lines += ["", f"| difference, seed by seed | {head} |", f"|---|{rule}"]
    differences = [
        (f"pretrained - scratch, {SENSORS[name]}", *((start, name) for start in STARTS)) for name in SENSORS
    ]
    differences += [
        (f"both - {SENSORS[name]}, {start}", (start, "both"), (start, name))
        for start in STARTS
        for name in ("sar", "optical")
    ]
    for title, (start, sensors), (other_start, other_sensors) in differences:
        columns = zip(scores(start, sensors, sensors), scores(other_start, other_sensors, other_sensors), strict=True)
        cells = (cell([a - b for a, b in zip(one, other, strict=True)]) for one, other in columns)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", f"| one checkpoint, trained on both, shown | {head} |", f"|---|{rule}"]
    for sensors, title in SENSORS.items():
        lines.append(f"| {title} | {' | '.join(map(cell, scores('pretrained', 'both', sensors)))} |")
    return "\n".join(lines)


def main() -> None:
    """Run a study; see the module's docstring and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", help="folder of shards; simulated pairs are made where it is left out")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/few-labels"), help="where runs are kept")
    parser.add_argument("--tasks", nargs="+", help="tasks of the study (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning runs of each kind (default 3)")
    arguments = parser.parse_args()
    study, folder = STUDIES[arguments.study], arguments.output_dir / arguments.study
    if arguments.data is None and arguments.study != "simulated":
        parser.error(f"--data: name the shards that `fusmae prepare {arguments.study}` has written.")
    if unknown := set(arguments.tasks or ()) - study.tasks.keys():
        parser.error(f"--tasks: {arguments.study} has {list(study.tasks)}, not {sorted(unknown)}.")
    folder.mkdir(parents=True, exist_ok=True)

    data = arguments.data or "shards/simulated-6000"
    processor, checkpoint = folder / "processor", folder / "checkpoint"
    for name in arguments.tasks or study.tasks:
        steps = Steps(folder / f"{name}.log")
        if arguments.data is None:
            prepared = Path(data, "dataset_info.json")
            steps.run(["fusmae", "prepare", "simulated", data, "--num-pairs", "6000"], prepared)
        stats = ["fusmae", "stats", data, "--processor", str(processor)]
        steps.run(stats, processor / "preprocessor_config.json")
        pretrain = ["training/run_pretrain.py", "training/configs/smoke.yaml", "--data", data]
        pretrain += ["--statistics", str(processor), "--output_dir", str(checkpoint)]
        pretrain += ["--config", json.dumps(study.config), *study.pretraining, "--resume_from_checkpoint", "auto"]
        steps.run(pretrain, checkpoint / "run.json")
        task = FineTuning(steps, study, study.tasks[name], data, checkpoint, folder / name)
        recipes = {start: task.best_recipe(start) for start in STARTS}
        results = {
            start: {sensors: task.measure(start, recipe, sensors, arguments.seeds) for sensors in SENSORS}
            for start, (recipe, _) in recipes.items()
        }
        record = {
            "study": arguments.study,
            "task": name,
            "pretraining": json.loads((checkpoint / "run.json").read_text()),
            "recipes": {
                start: {"rate": recipe[0], "decay": recipe[1], "validation": tried}
                for start, (recipe, tried) in recipes.items()
            },
            "results": results,
            "commands": steps.commands,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        path = folder.parent / f"{arguments.study}-{name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        text = tables(task.task, results)
        path.with_suffix(".md").write_text(text + "\n")
        print(f"\n{arguments.study}, {name}:\n\n{text}\n")


if __name__ == "__main__":
    main()
