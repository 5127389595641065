import importlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from PIL import Image

from fusmae_hf.cli.main import main
from fusmae_hf.preparation.inspection import contact_sheet, inspect_shards
from fusmae_hf.readers.archives import ARCHIVES
from fusmae_hf.shards.dataset_info import read_dataset_info
from tests.readers.bigearthnet_fixtures import V1_PAIRS, VV_DB, make_bigearthnet, make_reben

http = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])  # httpx or httpx2


GEOTIFFS = ["--sar", "{{id}}_a.tif", "--sar-bands", "VV", "--sar-units", "db"]
GEOTIFFS += ["--optical", "{{id}}_b.tif", "--optical-bands", "B02", "--optical-units", "dn"]


def refusal(status):
    return http.Response(status, request=http.Request("POST", "https://huggingface.co"))


@pytest.fixture(scope="module")
def bigearthnet(tmp_path_factory):
    return make_bigearthnet(tmp_path_factory.mktemp("bigearthnet"))


@pytest.fixture(scope="module")
def reben(tmp_path_factory):
    return make_reben(tmp_path_factory.mktemp("reben"))


@pytest.fixture(scope="module")
def shards(reben, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "reben"
    assert main(["prepare", "reben", str(reben), str(out)]) == 0
    return out


def rows(folder):
    dataset = read_dataset_info(folder)
    return {split: dataset.rows(split) for split in dataset.splits}


def test_bigearthnet_is_prepared_with_its_splits(bigearthnet, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["prepare", "bigearthnet", str(bigearthnet), str(out), "--splits", str(bigearthnet / "splits")]
    assert main(command) == 0
    assert rows(out) == {"train": 1, "validation": 1, "test": 1}
    printed = capsys.readouterr().out
    assert f"Found 3 of the 3 pairs that the split lists name in {bigearthnet}." in printed
    assert f"`fusmae inspect {out}`" in printed


def test_what_is_left_out_is_shown_in_the_summary(bigearthnet, tmp_path, capsys):
    command = ["prepare", "bigearthnet", str(bigearthnet), str(tmp_path), "--splits", str(bigearthnet / "splits")]
    assert main([*command, "--leave-out", "snow"]) == 0
    assert f"1  listed in patches_with_seasonal_snow, such as {V1_PAIRS[0][1]}" in capsys.readouterr().out


def test_reben_says_how_many_of_the_listed_pairs_were_found(reben, tmp_path, capsys):
    assert main(["prepare", "reben", str(reben), str(tmp_path)]) == 0
    assert "Found 3 of the 53 pairs" in capsys.readouterr().out
    assert rows(tmp_path) == {"train": 1, "validation": 1, "test": 1}


def test_the_six_example_pairs_are_prepared(tmp_path):
    if importlib.util.find_spec("bigearthnet_common") is None:
        pytest.skip("bigearthnet-common is not installed")
    assert main(["prepare", "example", str(tmp_path)]) == 0
    assert rows(tmp_path) == {"train": 5, "test": 1}


def test_simulated_pairs_are_prepared_and_declared_as_such(tmp_path):
    assert main(["prepare", "simulated", str(tmp_path), "--num-pairs", "4", "--seed", "1"]) == 0
    assert sum(rows(tmp_path).values()) == 4
    assert read_dataset_info(tmp_path).info.simulated


def test_a_share_is_held_out_for_validation(bigearthnet, tmp_path):
    assert main(["prepare", "bigearthnet", str(bigearthnet), str(tmp_path), "--hold-out", "0.3"]) == 0
    assert rows(tmp_path) == {"train": 2, "validation": 1}


def test_limit_and_offset_reach_the_shards(reben, tmp_path):
    assert main(["prepare", "reben", str(reben), str(tmp_path), "--limit", "2", "--optical-offset", "100"]) == 0
    assert sum(rows(tmp_path).values()) == 2
    assert read_dataset_info(tmp_path).info.optical_offset == 100


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prepare", "reben", "{here}", "{here}/out"], "looked for ['BigEarthNet-S2', 'BigEarthNet-S1'] in {here}"),
        (["prepare", "bigearthnet", "{here}/no", "{here}/out"], "{here}/no, but no such folder"),
        (["prepare", "reben", "{reben}", "{here}"], "{here} is not empty."),
        (["prepare", "reben", "{reben}", "{here}/out", "--limit", "0"], "limit is 0"),
        (["verify", "{here}/no"], "There is no folder {here}/no."),
        (["inspect", "{here}/no"], "There is no folder {here}/no."),
        (["prepare", "geotiffs", "{here}/no", "{here}/out", *GEOTIFFS], "in {here}/no, but there is no such folder."),
        (["protocol", "simulated", "--model", "{here}/no", "--output_dir", "{here}/out"], "no folder {here}/no"),
        (["inspect", "{here}"], "There is no {here}/dataset_info.json."),
        (["inspect", "{shards}", "--pairs", "0"], "num_pictured=0 must be at least 1"),
        (["inspect", "{shards}", "--picture", "{here}/no/a.png"], "There is no folder {here}/no to write a.png"),
        (["inspect", "{shards}", "--picture", "{here}"], "{here} is a folder: name a file in it"),
        (["show", "{shards}", "--output", "{here}"], "{here} is a folder: name a file in it"),
        (["verify", "{shards}", "--split", "no"], "There is no split 'no'"),
        (["stats", "{shards}", "--json", "{here}"], "{here}: Is a directory."),
        (["merge", "{here}/out", "{here}/no"], "{here}/no"),
        (["push", "{shards}", "nobody"], "lacks the user"),
        (["app", "--checkpoint", "{here}", "--port", "99999999"], "ports are 1 to 65535"),
        (["app", "--checkpoint", "{here}", "--host", "999.1.1.1"], "no address of this machine"),
    ],
)
def test_mistakes_end_with_one_paragraph_and_exit_code_2(command, message, reben, shards, tmp_path, capsys):
    (tmp_path / "something").write_text("")
    places = {"here": tmp_path, "reben": reben, "shards": shards}
    assert main([argument.format(**places) for argument in command]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("Error: ")
    assert "Traceback" not in captured
    assert message.format(**places) in re.sub(r"\s+", " ", captured)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["prepare", "geotiffs", "in", "out", "--edges", "fold"], "invalid choice: 'fold'"),
        (["prepare", "geotiffs", "in", "out", "--map-class-names", "@nowhere.txt"], "No such file or directory"),
        (["prepare", "geotiffs", "in", "out", "--map-class-names", '"a, b'], "cannot be read"),
        (["show", "simulated", "--patch", "x"], "not a row and a column"),
    ],
)
def test_arguments_that_are_none_end_in_two_lines(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command)
    captured = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in captured
    assert len(captured.splitlines()) == 2


@pytest.mark.parametrize("kind", ["model", "shards"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http.ConnectError("Name or service not known"), "cannot be reached: Name or service not known"),
        (http.ReadTimeout("timed out"), "cannot be reached: timed out"),
        (ConnectionRefusedError(111, "Connection refused"), "cannot be reached"),
        (HfHubHTTPError("401 Unauthorized.", response=refusal(401)), "`hf auth login`"),
        (HfHubHTTPError("403 Forbidden.", response=refusal(403)), "a token that may write"),
        (LocalTokenNotFoundError("Token is required, but no token found."), "no token found"),
    ],
)
def test_pushing_without_network_or_token_ends_in_a_sentence(kind, error, said, shards, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    monkeypatch.setattr("huggingface_hub.RepoCard.validate", lambda *_, **__: None)
    folder = Path(__file__).parents[2] / "checkpoints/fusmae-tiny" if kind == "model" else shards
    assert main(["push", str(folder), "somebody/something"]) == 2
    captured = " ".join(capsys.readouterr().err.split())
    assert captured.startswith("Error: ")
    assert said in captured
    assert len(captured) < 400


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["inspect", str(tmp_path), "--debug"])


def test_an_interrupt_ends_with_a_word_and_code_130(reben, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusmae_hf.preparation.prepare.read_pair", interrupt)
    assert main(["prepare", "reben", str(reben), str(tmp_path)]) == 130
    assert "Interrupted. Finished files are kept: run the same command again" in capsys.readouterr().err


def test_an_interrupt_while_the_command_is_looked_up_ends_alike(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("fusmae_hf.cli.main.build_parser", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_what_was_written_can_be_gone_on_with_merged_and_done_again(tmp_path, capsys):
    command = ["prepare", "simulated", "--num-pairs", "20", "--rows-per-shard", "4", "--max-no-data", "0.5"]
    for part in ("1", "2"):
        assert main([*command, str(tmp_path / part), "--part", f"{part}/2"]) == 0
    assert "files are missing: data/train-00000" in capsys.readouterr().out
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "1"), str(tmp_path / "2")]) == 0
    assert "Prepared simulated: 20 pairs" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "out")]) == 0
    assert f"Nothing to do: {tmp_path / 'out'} is complete." in capsys.readouterr().out
    assert main([*command, str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "`seed` was 0 and is 1 now" in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert main([*command, str(tmp_path / "out"), "--seed", "1", "--overwrite"]) == 0


def test_options_of_a_reader_are_noted_but_not_the_places_of_its_files(bigearthnet, tmp_path):
    command = ["prepare", "bigearthnet", str(bigearthnet), str(tmp_path), "--splits", str(bigearthnet / "splits")]
    assert main([*command, "--leave-out", "snow", "--optical-offset", "5"]) == 0
    arguments = read_dataset_info(tmp_path).preparation["arguments"]
    assert {name: value for name, value in arguments.items() if name.startswith("reader.")} == {
        "reader.leave_out": ["snow"],
        "reader.optical_offset": 5.0,
    }
    assert str(bigearthnet) not in (tmp_path / "dataset_info.json").read_text()


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "1/0", "-1/2", "a/b"])
def test_a_part_that_there_cannot_be_is_refused(tmp_path, part, capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "simulated", str(tmp_path), f"--part={part}"])
    assert f"'{part}' is not i/n with i from 1 to n" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_is_a_paragraph_and_not_a_line_of_code(reben, tmp_path, capsys):
    root = Path(shutil.copytree(reben, tmp_path / "swapped"))
    for vv in root.glob("BigEarthNet-S1/*/*/*_VV.tif"):
        vh = vv.with_name(vv.name.replace("_VV", "_VH"))
        shutil.move(vv, tmp_path / "vv")
        shutil.move(vh, vv)
        shutil.move(tmp_path / "vv", vh)
    assert main(["prepare", "reben", str(root), str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert error.startswith("Warning: reben, over 3 pairs: SAR: mean VH")
    assert "warnings.warn" not in error


@pytest.mark.parametrize(
    "command",
    [[], ["prepare"], ["merge"], ["inspect"], *(["prepare", archive.command] for archive in ARCHIVES)],
    ids=lambda command: " ".join(command) or "fusmae",
)
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert f"usage: fusmae {' '.join(command)}".rstrip() in capsys.readouterr().out


def test_inspect_prints_a_table_and_draws_a_picture(shards, tmp_path, capsys):
    picture = tmp_path / "pairs.png"
    assert main(["inspect", str(shards), "--picture", str(picture), "--pairs", "2"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        r"licence +CDLA-Permissive-1.0",
        r"SAR +VV VH: 120x120 float32, db",
        r"optical .*uint16, dn, offset 0",
    ):
        assert re.search(expected, printed)
    assert re.search(r"train +1 +1 +1 ", printed)
    assert re.search(rf"VV +{VV_DB:.2f} ", printed)
    with Image.open(picture) as image:
        assert image.width > 500


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_named(shards, tmp_path, damage, capsys):
    folder = Path(shutil.copytree(shards, tmp_path / "damaged"))
    shard = next(folder.glob("data/train-*.parquet"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        shard.unlink()
    assert main(["inspect", str(folder)]) == 2
    assert shard.name in capsys.readouterr().err


def test_a_contact_sheet_has_a_row_for_each_pair(shards):
    found = inspect_shards(str(shards))
    figure = contact_sheet(found.pairs, found.dataset.info)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["true colour", "false colour, near infrared as red", "VV", "VH"] * 3
    with pytest.raises(ValueError, match="no pair to draw"):
        contact_sheet([], found.dataset.info)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("dataset", "folder", "expected"),
    [
        ("bigearthnet", "bigearthnet_v1", {"train": 6}),
        ("reben", "reben", {"train": 8, "validation": 2, "test": 2}),
    ],
)
def test_real_archives_are_prepared_whole_and_without_a_warning(dataset, folder, expected, tmp_path):
    root = os.environ.get("FUSMAE_REAL_DATA")
    if not root:
        pytest.skip("FUSMAE_REAL_DATA is not set")
    assert main(["prepare", dataset, str(Path(root, folder)), str(tmp_path)]) == 0
    assert rows(tmp_path) == expected
