"""Every entry of the table of archives is sound: whoever adds one is told here what is wrong with it."""

import argparse
import gc
import inspect
import re

import pytest

from fusmae_hf.cli.main import build_parser
from fusmae_hf.readers.archives import ARCHIVES, example_pairs, names, open_archive

TAKEN = {
    "root",
    "out",
    "limit",
    "max_no_data",
    "hold_out",
    "seed",
    "keep_order",
    "num_proc",
    "part",
    "rows_per_shard",
} | {
    "row_group_rows",
    "on_error",
    "overwrite",
    "debug",
    "help",
}
"""Names of arguments of `fusmae prepare` itself."""


def of_each_archive(test):
    return pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.command)(test)


def test_commands_are_unique_and_easily_typed():
    commands = [archive.command for archive in ARCHIVES]
    assert len(set(commands)) == len(commands)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", command) for command in commands)


@of_each_archive
def test_options_are_keywords_of_the_reader(archive):
    parameters = inspect.signature(archive.imported_reader()).parameters
    given = {*archive.options, *archive.shared, *archive.fixed}
    assert given <= parameters.keys()
    assert not TAKEN & archive.options.keys()
    assert set(archive.shared) <= TAKEN
    positional = bool(archive.layout)
    required = {name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    have_default = {name for name, option in archive.options.items() if "default" in option or option.get("required")}
    assert required - ({"root"} if positional else set()) <= have_default | set(archive.shared) | set(archive.fixed)


@of_each_archive
def test_options_say_what_they_do(archive):
    for keyword, option in archive.options.items():
        assert option.get("help"), keyword
        assert not option["help"].endswith("."), keyword


@of_each_archive
def test_choices_are_those_of_the_reader(archive):
    parameters = inspect.signature(archive.imported_reader()).parameters
    for keyword, option in archive.options.items():
        default = parameters[keyword].default
        if "choices" in option and isinstance(default, str):
            assert default in option["choices"], keyword
        if isinstance(default, bool):
            assert option.get("action") in ("store_true", argparse.BooleanOptionalAction), keyword


@of_each_archive
def test_the_example_is_a_command(archive):
    program, *command = archive.example.split()
    assert program == "fusmae"
    assert build_parser().parse_args(command).archive is archive


@of_each_archive
def test_options_that_are_not_given_are_left_to_the_reader(archive):
    places = ["archive", "out"] if archive.layout else ["out"]
    given = vars(build_parser().parse_args(["prepare", archive.command, *places]))
    assert {keyword for keyword in archive.options if keyword in given} == {
        keyword for keyword, option in archive.options.items() if "default" in option
    }


def test_several_names_are_separated_by_commas():
    assert names("VV, VH,") == ["VV", "VH"]


def test_an_unknown_dataset_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no dataset 'bigearth'; known: bigearthnet, reben, sen12ms, .*simulated, example"
    ):
        open_archive("bigearth", "somewhere")


def test_a_folder_is_asked_for_where_one_is_needed_and_nowhere_else(tmp_path):
    with pytest.raises(ValueError, match=r"'reben' needs root, its folder: ROOT holds BigEarthNet-S1/"):
        open_archive("reben")
    with pytest.raises(ValueError, match="'simulated' has no root"):
        open_archive("simulated", tmp_path)


def test_options_are_keywords_and_have_the_defaults_of_the_command():
    assert len(open_archive("simulated")) == 256
    assert len(open_archive("simulated", num_pairs=3, seed=1)) == 3


def test_the_six_real_pairs_lie_in_a_folder_of_their_own_or_one_that_goes_with_the_reader(tmp_path):
    pytest.importorskip("bigearthnet_common")
    assert len(example_pairs(tmp_path / "six")) == len(open_archive("example")) == 6
    reader = example_pairs()
    root, pair = reader.root, reader.read(0)
    assert (pair.sar.shape, pair.optical.shape) == ((2, 120, 120), (12, 120, 120))
    del reader
    gc.collect()
    assert not root.exists()
    assert (tmp_path / "six").exists()
