"""Ids, class names and licences of others: in names of files, in cards, in pictures."""

import os
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fusmae_hf.files.plain_text import code, file_stem, inline
from fusmae_hf.hub.push_shards import dataset_card
from fusmae_hf.plots.scores import plot_confusion
from fusmae_hf.preparation.inspection import contact_sheet
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.training.finetuning.results import class_table
from tests.small_shards import INFO, make_pair, write_shards

HOSTILE = [
    "<script>alert(1)</script>",
    "[click](https://example.org)",
    "![picture](https://example.org/pixel.png)",
    "a | b | c",
    "`code` **bold** ~~gone~~",
    "# heading",
    "--- license: mit",
    "https://example.org/?a=1&lt;b",
    "$\\frac{1}{$",
    "name: {x}: !!python/object/apply:os.system ['true']",
]


@pytest.mark.parametrize("id", ["S2A_MSIL2A_20170613T101031_0_45", "pair-0007", "a.b", "_"])
def test_plain_ids_are_names_of_files_as_they_are(id):
    assert file_stem(id) == id


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.text(alphabet=st.characters(codec="utf-8"), min_size=1)
    | st.sampled_from(["..", ".", "/", "a/../../b", "\0", "con\n", "x" * 10_000])
)
def test_any_id_gives_a_name_within_the_folder(id):
    name = f"{file_stem(id)}.png"
    assert os.path.basename(name) == name
    assert len(name.encode()) < 150
    assert name.isascii()
    assert not name.startswith((".", "-"))
    assert name.isprintable()


def test_different_ids_have_different_names():
    ids = ["a/b", "a_b", "a\\b", "a b", "../a", "/a", "a", "a" * 200, "a" * 201]
    assert len({file_stem(id) for id in ids}) == len(ids)


def rendered(markdown: str) -> str:
    """HTML as a viewer that allows HTML and tables makes it."""
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text(alphabet="<>[]()!`*_~#|&;\\$ab \n", max_size=20))
def test_words_in_a_line_become_no_markup(text):
    html = rendered(f"Before {inline(text)} after\n\n| {inline(text)} | cell |\n|---|---|\n")
    for tag in ("<script", "<a ", "<img", "<strong", "<code", "<h1", "<s>", "<del"):
        assert tag not in html
    assert html.count("<th>") == 2


@pytest.mark.parametrize("text", ["plain", "`", "a `` b", "`quoted`", "<b> & | *"])
def test_code_holds_any_backticks(text):
    html = rendered(f"See {code(text)}.")
    assert html.count("<code>") == 1
    assert "<b>" not in html


def test_the_card_of_a_dataset_shows_hostile_words_as_words(tmp_path):
    words = "; ".join(HOSTILE)
    names = tuple(f"{number} {word}" for number, word in enumerate(HOSTILE))
    info = replace(INFO, name=HOSTILE[0], source=words, license=words, class_names=names, statistics=None)
    folder = write_shards(tmp_path, info, train=[make_pair(number, info) for number in range(4)])
    card = dataset_card(read_dataset_info(folder), "user/name")
    content = str(card)
    _, front, body = content.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "other"
    assert metadata["pretty_name"].startswith(HOSTILE[0])
    ours = "pretty_name license license_name license_link size_categories task_categories tags configs"
    assert set(metadata) <= set(ours.split())
    html = rendered(body)
    assert "<script" not in html
    assert "<img" not in html
    assert "click</a>" not in html
    assert "<h1>heading" not in html


def test_tables_by_class_hold_hostile_names(tmp_path):
    scores = {"iou_per_class": dict.fromkeys(HOSTILE, 0.5)}
    html = rendered(class_table(scores))
    assert html.count("<tr>") == 1 + len(HOSTILE)
    assert "<script" not in html


def test_pictures_show_dollar_signs_and_odd_names_as_they_are(tmp_path):
    names = ("$\\frac{1}{$", "a$b$c", "\\undefined")
    info = replace(INFO, name="costs $5 and $\\6$", class_names=names)
    pairs = [make_pair(0, info, id="$\\nonsense{$" + "x" * 5000), make_pair(1, info, id="a$^$b")]
    contact_sheet(pairs, info).savefig(tmp_path / "pairs.png", dpi=30)
    plot_confusion(np.eye(3), names, "$\\title$").savefig(tmp_path / "confusion.png", dpi=30)
    assert (tmp_path / "confusion.png").stat().st_size > 1000
