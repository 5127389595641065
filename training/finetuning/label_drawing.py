"""Which training pairs keep their labels where few are asked for: the same for probes and for fine-tuning."""

from pathlib import Path

from fusmae_hf.data.tasks import FineTuningTask
from fusmae_hf.evaluation.label_fractions import (
    LabelFraction,
    draw_label_fraction,
    read_label_fraction,
    split_content_hash,
    write_label_fraction,
)
from fusmae_hf.shards.loading import PairDataset
from fusmae_hf.training.finetuning.labels import PairSubset, class_matrix, read_columns


def drawn_ids(
    train: PairDataset, task: FineTuningTask, fraction: float, seed: int, folder: str | Path
) -> tuple[str, ...] | None:
    """Ids of the training pairs to learn from, in their order; None for all of them.

    They depend on data, task, fraction and seed alone. They are written to `label_fraction.json` of the folder, and
    read from there where that file is there already.

    Raises:
        ValueError: the file is of another draw, or the fraction gives no pair.
    """
    path = Path(folder, "label_fraction.json")
    if fraction == 1 and not path.is_file():
        return None
    if path.is_file():
        drawn = read_label_fraction(path, train.dataset_info, "train")
        if (drawn.fraction, drawn.seed) != (fraction, seed):
            raise ValueError(
                f"{path} holds a fraction of {drawn.fraction} drawn with seed {drawn.seed}, but {fraction} and seed "
                f"{seed} are asked for. Give another `--output_dir`, or delete the folder."
            )
    else:
        ids = read_columns(train, ["id"])["id"]
        chosen = draw_label_fraction(ids, class_matrix(train, task), fraction, seed, len(task.outputs))
        content = split_content_hash(train.dataset_info, "train")
        drawn = LabelFraction(tuple(chosen), fraction, seed, train.info.name, "train", content)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label_fraction(path, drawn)
    print(f"Training on {len(drawn.ids):,} of {len(train):,} labelled pairs, listed in {path}.")
    return drawn.ids


def few_labels(
    train: PairDataset, task: FineTuningTask, fraction: float, seed: int, folder: str | Path
) -> PairDataset | PairSubset:
    """The training pairs, or those of `drawn_ids` among them."""
    ids = drawn_ids(train, task, fraction, seed, folder)
    if ids is None:
        return train
    wanted = set(ids)
    return PairSubset(train, [row for row, id in enumerate(read_columns(train, ["id"])["id"]) if id in wanted])
