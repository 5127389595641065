"""Label fractions are stratified, nested, repeatable, kept, and refused for another dataset."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusmae_hf.evaluation.label_fractions import draw_label_fraction, kept_label_fraction, split_content_hash
from fusmae_hf.shards.dataset_info import read_dataset_info
from tests.small_shards import make_pair, write_shards

FREQUENCIES = np.array([0.5, 0.3, 0.1, 0.05, 0.01])
CLASSES = len(FREQUENCIES)


def labelled(samples: int, kind: str, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ids in no particular order, and labels of classes that are more or less frequent."""
    generator = np.random.default_rng(seed)
    ids = [f"patch-{number}" for number in generator.permutation(samples)]
    if kind == "single":
        return ids, generator.choice(CLASSES, samples, p=FREQUENCIES / FREQUENCIES.sum())
    # Labels that occur together, as land cover does.
    return ids, generator.random((samples, CLASSES)) < FREQUENCIES * generator.exponential(1, (samples, 1))


def counts_of(drawn: list[str], ids: list[str], labels: np.ndarray) -> np.ndarray:
    held = labels if labels.ndim == 2 else labels[:, None] == np.arange(CLASSES)
    return held[np.isin(ids, drawn)].sum(axis=0)


kinds = pytest.mark.parametrize("kind", ["single", "multi"])


@kinds
@pytest.mark.parametrize("fraction", [0.003, 0.01, 0.1, 0.37, 0.5, 0.9])
def test_classes_are_as_frequent_as_in_the_whole(kind, fraction):
    ids, labels = labelled(5000, kind)
    drawn = draw_label_fraction(ids, labels, fraction, seed=3, num_classes=CLASSES)
    assert len(drawn) == len(set(drawn)) == round(fraction * 5000)
    wanted = fraction * counts_of(ids, ids, labels)
    assert np.abs(counts_of(drawn, ids, labels) - wanted).max() <= (1.5 if kind == "single" else 6)


@kinds
def test_everything_is_drawn_once_by_a_fraction_of_one(kind):
    ids, labels = labelled(200, kind)
    assert draw_label_fraction(ids, labels, 1.0, seed=0, num_classes=CLASSES) == ids


@kinds
@given(
    seed=st.integers(0, 1000),
    samples=st.integers(2, 300),
    fractions=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
)
def test_smaller_fractions_are_part_of_larger_ones(kind, seed, samples, fractions):
    ids, labels = labelled(samples, kind, seed)
    small, large = (max(fraction, 1 / samples) for fraction in fractions)
    of_small, of_large = (draw_label_fraction(ids, labels, share, seed, CLASSES) for share in (small, large))
    assert set(of_small) <= set(of_large)
    assert len(of_small) == len(set(of_small)) == round(small * samples)


@kinds
@given(seed=st.integers(0, 1000), samples=st.integers(CLASSES, 300), fraction=st.floats(0.02, 1))
def test_every_class_that_any_sample_has_is_drawn_where_enough_are(kind, seed, samples, fraction):
    ids, labels = labelled(samples, kind, seed)
    wanted = round(max(fraction, CLASSES / samples) * samples)
    drawn = draw_label_fraction(ids, labels, wanted / samples, seed, CLASSES)
    assert ((counts_of(drawn, ids, labels) > 0) == (counts_of(ids, ids, labels) > 0)).all()


@kinds
def test_the_draw_is_a_function_of_the_seed_and_not_of_the_order_of_the_ids(kind):
    ids, labels = labelled(500, kind)
    first, again, other = (draw_label_fraction(ids, labels, 0.1, seed, CLASSES) for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)
    turned = draw_label_fraction(ids[::-1], labels[::-1], 0.1, 0, CLASSES)
    assert turned == first[::-1]


def test_seeds_draw_samples_equally_often():
    ids, labels = labelled(40, "multi")
    times = dict.fromkeys(ids, 0)
    for seed in range(400):
        for drawn in draw_label_fraction(ids, labels, 0.5, seed, CLASSES):
            times[drawn] += 1
    plain = [times[name] for name, held in zip(ids, labels, strict=True) if not held[2:].any()]
    assert 140 < min(plain) <= max(plain) < 260  # rare classes are forced in, so others are drawn a little less


def test_samples_without_labels_are_drawn_too():
    ids, labels = [f"{number:03d}" for number in range(100)], np.zeros((100, 2), dtype=int)
    labels[:10, 0] = 1
    drawn = draw_label_fraction(ids, labels, 0.2, 0, 2)
    assert sum(name < "010" for name in drawn) == 2
    assert len(drawn) == 20


def test_fewer_samples_than_classes_take_rare_classes_first():
    ids, labels = labelled(1000, "single")
    drawn = draw_label_fraction(ids, labels, 0.002, 0, CLASSES)
    assert counts_of(drawn, ids, labels).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("ids", "labels", "fraction", "message"),
    [
        (["a", "b"], [0, 1], 0.1, "A fraction of 0.1 of 2 samples gives none"),
        (["a", "b"], [0, 1], 0.0, "above 0, at most 1"),
        (["a", "b"], [0, 1], 1.5, "above 0, at most 1"),
        (["a", "b"], [0, 1], float("nan"), "above 0, at most 1"),
        (["a", "a"], [0, 1], 1.0, "'a' comes more than once"),
        (["a", "b"], [0, 2], 1.0, "from 0 to 2, but 2 classes"),
        (["a", "b"], [0, -1], 1.0, "from -1 to 0, but 2 classes"),
        (["a", "b"], [0], 1.0, r"shape \(1,\)"),
        (["a", "b"], [[0, 1, 1], [0, 1, 1]], 1.0, r"shape \(2, 3\)"),
        (["a", "b"], [[0, 2], [0, 1]], 1.0, "other values than 1"),
        (["a", "b"], ["water", "forest"], 1.0, "must be class indices"),
        ([], [], 1.0, "0 samples gives none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(ids, labels, fraction, message):
    with pytest.raises(ValueError, match=message):
        draw_label_fraction(ids, labels, fraction, seed=0, num_classes=2)


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards")


def kept(path, folder, ids=("pair-001", "pair-004"), fraction=0.2, seed=7, split="train"):
    return kept_label_fraction(path, lambda: ids, fraction, seed, read_dataset_info(folder), split)


def test_what_was_drawn_is_read_as_it_was_written_and_not_drawn_again(tmp_path, folder):
    path = tmp_path / "new" / "label_fraction.json"
    drawn = kept(path, folder)
    content = split_content_hash(read_dataset_info(folder), "train")
    assert json.loads(path.read_text()) == {
        "ids": ["pair-001", "pair-004"],
        "fraction": 0.2,
        "seed": 7,
        "dataset": "small",
        "split": "train",
        "content_hash": content,
    }
    assert kept(path, folder, ids=("pair-002",)) == drawn == ["pair-001", "pair-004"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fraction": 0.1}, "fraction 0.2 instead of 0.1"),
        ({"seed": 8}, "seed 7 instead of 8"),
        ({"split": "test"}, "split 'train' instead of 'test'"),
    ],
)
def test_what_was_drawn_otherwise_is_refused(tmp_path, folder, asked, message):
    kept(tmp_path / "fraction.json", folder)
    with pytest.raises(ValueError, match=message):
        kept(tmp_path / "fraction.json", folder, **asked)


def test_other_pixels_make_another_dataset(tmp_path, folder):
    kept(tmp_path / "fraction.json", folder)
    other = write_shards(tmp_path / "other", train=[make_pair(number + 100) for number in range(12)])
    with pytest.raises(ValueError, match=r"of other settings or data: content_hash '\w+' instead of '\w+'\."):
        kept(tmp_path / "fraction.json", other)


@pytest.mark.parametrize("content", ["", "[1]", json.dumps({"ids": ["a"]})])
def test_a_damaged_file_is_refused(tmp_path, folder, content):
    (tmp_path / "fraction.json").write_text(content)
    with pytest.raises(ValueError, match=r"is damaged|of other settings"):
        kept(tmp_path / "fraction.json", folder)
