"""Make the checkpoint of this repository, `checkpoints/fusmae-tiny`, from nothing: data, pretraining, probes, card.

    python checkpoints/make_fusmae_tiny.py --reben <root of a reBEN archive> --output_dir outputs/fusmae-tiny

Trains on simulated pairs and the training pairs of the reBEN archive at hand; reBEN pairs of the official validation
and test splits and the six BigEarthNet v1 pairs of the package bigearthnet-common are held out. Then linear probes on
labelled simulated pairs of places that pretraining never saw say what the features know, beside those of a model that
was not trained and of plain band statistics. Run it from the root of a checkout; what is finished is kept when the
command is repeated.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor
from fusmae_hf.data.pairs import Pair, PairReader, PairsInfo
from fusmae_hf.evaluation.intervals import mean_and_interval
from fusmae_hf.hub.cards import ProbeScore, write_model_card
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.readers.bigearthnet import BigEarthNet, example_pairs_root
from fusmae_hf.readers.reben import ReBEN
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.format import FILE_NAME
from fusmae_hf.simulation.pairs import SimulatedPairs
from fusmae_hf.training.sources import EMBEDDED_DEFAULT

HERE = Path(__file__).parent
NAME = "fusmae-tiny"
SIMULATED, SIMULATION_SEED = 6000, 1
LABELLED, LABELLED_SEED = 2400, 2
REPEATS = 45
"""How often each real training pair stands in the mixture, so that about one training pair in eleven is real."""

FRACTIONS, SEEDS = ("0.01", "0.1", "1"), 3
ENCODERS = {
    "this checkpoint": None,
    "the same model, not trained": ("--from_scratch", "true", "--preset", "tiny"),
    "mean and deviation of each band": ("--features", "bands"),
}
STUDY = HERE.parent / "benchmarks" / "results" / "fusion-study"
STUDIED = """\
Ways to join both sensors, compared at equal pretraining compute and equal depth (`docs/study.md`): linear probes of
frozen features, mean [95 % interval] over three seeds. These are encoders of a smaller size (96 wide, 4 layers),
trained for the comparison, **not this checkpoint**. It shares `norm_pix_loss`, mask ratio and strategy, both
fusions and the decoder's depth with the first row. Its modality dropout of 0.15 is not
that row's.

Simulated pairs:

{simulated}

OMBRIA, real floods, one polarisation and three optical bands (Drakonakis et al. 2022):

{ombria}"""

SENSORS = {"both": "both", "sar": "SAR", "optical": "optical"}
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "run.json", "README.md")


@dataclass
class Selection:
    """Some pairs of a reader, each as often as asked; pixels as the reader gives them on the 10 m grid.

    Attributes:
        reader: the dataset.
        indices: which pairs of it, in order.
        info: what holds for them.
    """

    reader: PairReader
    indices: Sequence[int]
    info: PairsInfo

    def __post_init__(self) -> None:
        self.summary = self.reader.summary
        self.ids: list[str] = []
        for position, index in enumerate(self.indices):
            repeat = self.indices[:position].count(index)
            self.ids.append(self.reader.ids[index] + (f"-{repeat}" if repeat else ""))

    def __len__(self) -> int:
        """Number of pairs, repetitions included."""
        return len(self.indices)

    def split_of(self, index: int) -> str | None:
        """Split of the pair at `index`."""
        return self.reader.split_of(self.indices[index])

    def read(self, index: int) -> Pair:
        """The pair at `index`, without labels and columns of its dataset."""
        pair = self.reader.read(self.indices[index])
        return replace(pair, id=self.ids[index], labels=None, label_map=None, extra={})

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Nothing."""
        return iter(())


class Mixture:
    """Pairs of several readers one after another."""

    def __init__(self, parts: Sequence[Selection], info: PairsInfo) -> None:
        self.parts, self.info = parts, info
        self.ids = [id for part in parts for id in part.ids]
        self.places = [(part, index) for part in range(len(parts)) for index in range(len(parts[part]))]
        self.summary = " ".join(part.summary for part in parts)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.places)

    def split_of(self, index: int) -> str | None:
        """Split of the pair at `index`."""
        part, inner = self.places[index]
        return self.parts[part].split_of(inner)

    def read(self, index: int) -> Pair:
        """The pair at `index`."""
        part, inner = self.places[index]
        return self.parts[part].read(inner)

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Nothing."""
        return iter(())


def of_splits(reader: PairReader, *splits: str) -> list[int]:
    """Indices of the pairs of these splits."""
    return [index for index in range(len(reader)) if reader.split_of(index) in splits]


def mixture(reben: ReBEN) -> Mixture:
    """Training pairs, simulated and real, and the simulated validation pairs."""
    simulated = SimulatedPairs(SIMULATED, SIMULATION_SEED, EMBEDDED_DEFAULT)
    real = of_splits(reben, "train")
    info = PairsInfo(
        name="simulated-and-reben",
        source=f"{SIMULATED:,} pairs simulated by fusmae_hf.simulation.pairs (splits train and validation of them), "
        f"and {len(real)} training pairs of {reben.info.source}, each {REPEATS} times",
        license=f"{simulated.info.license} (simulated), {reben.info.license} (reBEN)",
        sar_bands=simulated.info.sar_bands,
        optical_bands=simulated.info.optical_bands,
        statistics="bigearthnet",
    )
    return Mixture(
        [
            Selection(simulated, of_splits(simulated, "train", "validation"), info),
            Selection(reben, real * REPEATS, info),
        ],
        info,
    )


def shards_of(reader: PairReader, folder: Path) -> Path:
    """The folder, with the shards of a reader in it."""
    if not (folder / FILE_NAME).is_file():
        print(prepare(reader, folder, num_proc=2))
    return folder


def run(command: Sequence[str], finished: Path) -> None:
    """Run a script of this checkout, unless the file that it ends with is there."""
    if finished.is_file():
        return
    print("python " + shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def probe(checkpoint: Path, shards: Path, folder: Path) -> list[ProbeScore]:
    """Linear probes of all encoders with each share of the labels, three seeds each."""
    scores = []
    for fraction in FRACTIONS:
        for number, (encoder, options) in enumerate(ENCODERS.items()):
            out = folder / f"probe-{fraction}-{number}"
            command = ["training/run_probe.py", "--data", str(shards), "--output_dir", str(out)]
            command += ["--task", "multi_label_classification", "--label_fraction", fraction]
            command += ["--probes", "linear", "--seeds", str(SEEDS)]
            command += ["--statistics", str(checkpoint)] if options else ["--model", str(checkpoint)]
            if options and "--preset" in options:
                fields = FusMAEConfig.from_pretrained(checkpoint)
                kept = {name: getattr(fields, name) for name in ("num_hidden_layers", "patch_size")}
                command += ["--config", json.dumps(kept)]
            run([*command, *(options or ())], out / "summary.json")
            measured = [json.loads(path.read_text()) for path in sorted(out.glob("seed-*/metrics.json"))]
            for sensors, title in SENSORS.items():
                values = [
                    of_seed["probes"][f"linear/{sensors}/mean"]["metrics"]["average_precision_macro"]
                    for of_seed in measured
                ]
                scores.append(
                    ProbeScore(encoder, title, f"{float(fraction):.0%}", "AP macro", mean_and_interval(values), SEEDS)
                )
    return scores


def write_card(run_folder: Path, mixture_info: PairsInfo, labelled: Path, scores: list[ProbeScore]) -> None:
    """The card of the checkpoint in its folder, and as the page of the project."""
    record: dict[str, Any] = json.loads((run_folder / "run.json").read_text())
    test = read_dataset_info(labelled).splits["test"]
    write_model_card(
        run_folder,
        config=FusMAEConfig.from_pretrained(run_folder),
        processor=FusMAEImageProcessor.from_pretrained(run_folder),
        info=mixture_info,
        record=record,
        metrics=record["metrics"],
        name=NAME,
        shown_as=f"checkpoints/{NAME}",
        probe_scores=scores,
        probed_on=f"{sum(shard.rows for shard in test):,} simulated test pairs (seed {LABELLED_SEED}) of places that "
        "pretraining never saw",
        more={
            "The fusion, compared": STUDIED.format(
                **{name: (STUDY / f"short-{name}.md").read_text().strip() for name in ("simulated", "ombria")}
            )
        },
    )


def renew_code(place: Path) -> None:
    """Put the Python files of this checkout beside the weights."""
    for path in place.glob("*.py"):
        path.unlink()
    for path in HERE.parent.glob("modeling/*_fusmae.py"):
        shutil.copy(path, place)


def main() -> None:
    """Run the program; see the module's docstring and `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reben",
        type=Path,
        default=Path(os.environ.get("FUSMAE_REAL_DATA", ".")) / "reben",
        help="root of a reBEN archive, or of part of one (default reben/ in the folder FUSMAE_REAL_DATA)",
    )
    parser.add_argument(
        "--code",
        action="store_true",
        help="only renew the Python files beside the weights, after a change of modeling/",
    )
    parser.add_argument("--output_dir", type=Path, default=Path(f"outputs/{NAME}"), help="where everything is made")
    arguments = parser.parse_args()
    place = HERE / NAME
    if arguments.code:
        renew_code(place)
        return
    out = arguments.output_dir
    reben = ReBEN(arguments.reben)
    mixed = mixture(reben)
    train = shards_of(mixed, out / "shards" / "mixture")
    held = Selection(
        reben, of_splits(reben, "validation", "test"), replace(reben.info, extra_columns={}, optical_factors=())
    )
    extra = [
        str(shards_of(held, out / "shards" / "reben")),
        str(shards_of(BigEarthNet(example_pairs_root(out / "archives")), out / "shards" / "bigearthnet")),
    ]
    labelled = shards_of(SimulatedPairs(LABELLED, LABELLED_SEED), out / "shards" / "labelled")
    checkpoint = out / "run"
    pretrain = ["training/run_pretrain.py", f"{HERE.name}/{NAME}.yaml", "--data", str(train), "--extra_eval", *extra]
    pretrain += ["--output_dir", str(checkpoint), "--resume_from_checkpoint", "auto"]
    run(pretrain, checkpoint / "run.json")
    scores = probe(checkpoint, labelled, out)
    write_card(checkpoint, mixed.info, labelled, scores)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for pattern in FILES:
        for path in checkpoint.glob(pattern):
            shutil.copy(path, place)
    shutil.copytree(checkpoint / ".eval_results", place / ".eval_results")
    renew_code(place)
    shutil.copy(checkpoint / "README.md", HERE.parent / "model_card.md")
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 1e6
    print(f"{place}: {size:.1f} MB")


if __name__ == "__main__":
    main()
