"""The command `fusmae show`: one picture of a pair, of what a model makes of it, or of a run."""

import argparse
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusmae_hf.cli.command import add_command, require_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fusmae_hf.data.pairs import Pair, PairsInfo

KINDS = {
    "rgb": "optical bands in true colour",
    "false-colour": "near infrared as red, or the three bands of --bands, or what bands there are",
    "sar": "backscatter of each band in dB, and VV over VH",
    "reconstruction": "input, masked input, reconstruction and error of both sensors",
    "attention": "where a patch of each sensor looks in the other one (--patch)",
    "embedding": "patch tokens as colours, by their principal components",
    "loss": "loss curves of a pretraining run",
}
SIMULATED_PAIRS = 1000


def add_show(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae show`."""
    kinds = "\n".join(f"  {name:<16}{meaning}" for name, meaning in KINDS.items())
    command = add_command(
        commands,
        parents,
        "show",
        "draw a pair, what a model makes of it, or the losses of a run",
        "Draw one picture of a pair, of what a checkpoint makes of it, or of a pretraining run.\n\n"
        f"kinds of pictures (--what):\n{kinds}\n\n"
        "reconstruction, attention and embedding need a checkpoint; a run folder brings its own.",
        "fusmae show shards/reben --what false-colour --bands B11,B08,B04 --index 7",
        "fusmae show simulated --what attention --checkpoint outputs/pretrain --patch 4,5",
        "fusmae show outputs/pretrain --what reconstruction --data shards/reben --split test",
        "fusmae show outputs/pretrain --what loss --output loss.png",
    )
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="shards (a folder, a URL or <user>/<name> on the Hub), the word simulated, or the folder of a run",
    )
    command.add_argument(
        "--what",
        choices=KINDS,
        help="kind of picture (default rgb, false-colour where red, green or blue is missing; of a run folder loss)",
    )
    command.add_argument("--checkpoint", metavar="CHECKPOINT", help="the model: a folder or a Hub id")
    command.add_argument(
        "--data", metavar="SHARDS", help="for a run folder: shards to draw a pair of, or simulated (the default)"
    )
    command.add_argument("--split", help="split of the shards (default the first one)")
    command.add_argument("--index", type=int, default=0, metavar="N", help="number of the pair, from 0 (default 0)")
    command.add_argument("--bands", type=_bands, metavar="R,G,B", help="bands of --what false-colour")
    command.add_argument(
        "--patch", type=_patch, metavar="ROW,COLUMN", help="patch of --what attention (default that in the middle)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="draws the mask (default 0)")
    command.add_argument("--output", type=Path, metavar="FILE", help="the picture (default ./WHAT.png)")
    command.set_defaults(run=_show)


def _bands(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _patch(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a row and a column such as 4,5") from None
    return row, column


def _show(arguments: argparse.Namespace) -> int:
    from fusmae_hf.data.plausibility import PairSample
    from fusmae_hf.plots.pairs import TRUE_COLOUR
    from fusmae_hf.plots.scores import plot_losses

    folder = Path(arguments.source)
    is_run = (folder / "config.json").is_file() or any(folder.glob("checkpoint-*/"))
    what = arguments.what or ("loss" if is_run else "false-colour" if arguments.bands else "")
    for option, kind in (("bands", "false-colour"), ("patch", "attention")):
        if getattr(arguments, option) and what != kind:
            raise ValueError(f"--{option} is for --what {kind}, but --what is {what or 'rgb'}.")
    if arguments.data and not is_run:
        raise ValueError(f"--data goes with the folder of a run; {arguments.source} is where pairs are read already.")
    if arguments.output:
        require_writable(arguments.output)
    if what == "loss":
        figure = plot_losses(read_log_history(folder), f"Reconstruction losses of {folder}")
        shown = f"losses of {arguments.source}"
    else:
        data = (arguments.data or "simulated") if is_run else arguments.source
        checkpoint = arguments.checkpoint or (arguments.source if is_run else None)
        if what in ("reconstruction", "attention", "embedding") and not checkpoint:
            raise ValueError(f"--what {what} needs a model: name one with --checkpoint, such as outputs/pretrain.")
        pair, info = _read_pair(data, arguments.split, arguments.index)
        for finding in PairSample(info).add(pair):
            warnings.warn(f"{pair.id}: {finding.for_commands()}", stacklevel=1)
        what = what or ("rgb" if {*TRUE_COLOUR} <= {*info.optical_bands} else "false-colour")
        figure = _draw(what, pair, info, checkpoint, arguments)
        shown = f"{what} of {pair.id}, pair {arguments.index} of {data}"
    output = arguments.output or Path(f"{what}.png")
    figure.savefig(output, dpi=110)
    print(f"{output}: {shown}")
    return 0


def _draw(
    what: str, pair: "Pair", info: "PairsInfo", checkpoint: str | None, arguments: argparse.Namespace
) -> "Figure":
    import numpy as np
    import torch

    from fusmae_hf.data.inputs import PairInputs
    from fusmae_hf.hub.checkpoint_loading import load_checkpoint
    from fusmae_hf.plots import model as of_model
    from fusmae_hf.plots import pairs as of_pairs
    from fusmae_hf.vocabulary import Sensors

    if what in ("rgb", "false-colour"):
        there = of_pairs.channels_shown(info.optical_bands, of_pairs.FALSE_COLOUR)
        channels = of_pairs.TRUE_COLOUR if what == "rgb" else arguments.bands or there
        return of_pairs.plot_composite(pair, info, channels)
    if what == "sar":
        return of_pairs.plot_backscatter(pair, info)
    assert checkpoint is not None  # for the type checker: `_show` has refused it
    model, processor = load_checkpoint(checkpoint, decoders=what == "reconstruction")
    batch = {"sar": torch.from_numpy(pair.sar)[None], "optical": torch.from_numpy(pair.optical)[None]}
    side, size = model.config.patch_size, pair.optical.shape[1:]
    sensors: Sensors = (
        "optical" if np.isnan(pair.sar).all() else "both" if np.nan_to_num(pair.optical).any() else "sar"
    )
    if what == "attention" and sensors != "both":
        raise ValueError(
            f"--what attention is between the sensors, but {pair.id} has {sensors} alone: give another --index."
        )
    inputs = PairInputs(processor, info, patch_size=side)(batch, sensors=sensors)
    if what == "embedding":
        return of_model.plot_embedding(of_model.embedding_colours(model, inputs), pair, info, side)
    rows, columns = (-(-pixels // side) for pixels in size)
    if what == "attention":
        row, column = arguments.patch or (rows // 2, columns // 2)
        maps = of_model.cross_attention_maps(model, inputs, row, column)
        return of_model.plot_cross_attention(maps, pair, info, row, column, side)
    generator = torch.Generator().manual_seed(arguments.seed)
    noise = {name: torch.rand((1, rows * columns), generator=generator) for name in ("noise", "noise_sar")}
    if sensors != "both":
        del noise["noise" if sensors == "sar" else "noise_sar"]
    pictures = of_model.reconstruct_images(model, inputs | noise, processor, size)
    return of_model.plot_errors(pictures, processor, of_pairs.pair_title(pair, info))


def _read_pair(data: str, split: str | None, index: int) -> tuple["Pair", "PairsInfo"]:
    from fusmae_hf.data.pairs import Pair
    from fusmae_hf.shards.loading import load_pairs
    from fusmae_hf.simulation.pairs import SimulatedPairs

    if data == "simulated":
        if split:
            raise ValueError("--split is for shards: simulated pairs are numbered through.")
        simulated = SimulatedPairs(SIMULATED_PAIRS)
        _require_index(index, len(simulated), "simulated pairs")
        return simulated.read(index), simulated.info
    pairs = load_pairs(data, split or _first_split(data), streaming=True)
    _require_index(index, len(pairs), f"split {pairs.split!r} of {data}")
    item = pairs[index]
    return Pair(item["id"], item["sar"].numpy(), item["optical"].numpy(), split=pairs.split), pairs.info


def _first_split(data: str) -> str:
    from fusmae_hf.shards.dataset_info import read_dataset_info
    from fusmae_hf.shards.loading import _root

    return next(iter(read_dataset_info(_root(data)).splits))


def _require_index(index: int, number: int, place: str) -> None:
    if not 0 <= index < number:
        raise ValueError(f"There is no pair {index} in the {place}: --index is 0 to {number - 1}.")


def read_log_history(run: Path) -> list[dict[str, float]]:
    """What the Trainer logged in a run: of `trainer_state.json` in the folder, or in its last written checkpoint."""
    from fusmae_hf.hub.checkpoint_loading import checkpoints_in

    files = [folder / "trainer_state.json" for folder in (run, *(checkpoints_in(run) if run.is_dir() else []))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{run} holds no record of losses: no trainer_state.json in it or in a checkpoint-* folder. "
            "Give the output folder of a pretraining run that kept a checkpoint."
        )
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        keys = {key for entry in history for key in entry}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}).") from error
    if not keys & {"optical_loss", "sar_loss"}:
        raise ValueError(f"{file} holds no reconstruction losses: it is not of a pretraining run, or logged none yet.")
    return history
