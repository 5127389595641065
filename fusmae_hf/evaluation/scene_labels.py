"""Labels of the scenes of prepared pairs, read without the pixels, as numbers that metrics and probes take."""

from collections.abc import Sequence

import numpy as np

from fusmae_hf.shards.dataset import PairDataset


def read_scene_labels(pairs: PairDataset) -> tuple[list[str], list[list[str]] | None]:
    """Ids and class names of all pairs of an open split, in the order of its rows. No pixels are read.

    Args:
        pairs: what `load_pairs` opened.

    Returns:
        Ids, and a list of class names for each; None instead of these where no pair has labels.

    Raises:
        DamagedShardError: a file cannot be read.
        ValueError: only some pairs have labels.
    """
    ids: list[str] = []
    labels: list[list[str] | None] = []
    for rows in pairs.read_columns(["id", "labels"]):
        ids += rows.column("id").to_pylist()
        labels += rows.column("labels").to_pylist()
    of_pairs = [names for names in labels if names is not None]
    if of_pairs and len(of_pairs) < len(labels):
        without = next(id for id, names in zip(ids, labels, strict=True) if names is None)
        raise ValueError(
            f"{len(labels) - len(of_pairs)} of {len(labels)} pairs in split {pairs.split!r} of {pairs.root} have no "
            f"labels, such as {without!r}. Prepare it from a source that labels every pair, or none."
        )
    return ids, of_pairs or None


def label_matrix(labels: Sequence[Sequence[str]], class_names: Sequence[str]) -> np.ndarray:
    """Which classes hold, `(samples, classes)` bool.

    Args:
        labels: class names of each sample.
        class_names: of the dataset, in the order of the columns: `PairsInfo.class_names`.

    Raises:
        ValueError: a label is none of the classes.
    """
    number = {name: index for index, name in enumerate(class_names)}
    unknown = sorted({label for of_sample in labels for label in of_sample} - set(number))
    if unknown:
        raise ValueError(f"labels {unknown[:5]} are none of the {len(number)} classes {list(class_names)}.")
    matrix = np.zeros((len(labels), len(number)), dtype=bool)
    for row, of_sample in enumerate(labels):
        matrix[row, [number[label] for label in of_sample]] = True
    return matrix


def class_indices(matrix: np.ndarray) -> np.ndarray:
    """The one class of each sample, `(samples,)` int64, of which classes hold, `(samples, classes)`.

    Raises:
        ValueError: a sample has no class or several.
    """
    counts = np.asarray(matrix).sum(axis=1)
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(counts)} samples do not have exactly one class, the first, number {wrong[0]}, has "
            f"{counts[wrong[0]]}: these are data for multi_label_classification."
        )
    return np.asarray(matrix).argmax(axis=1)
