import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from fusmae_hf.hub.push_shards import dataset_card, hub_license, push_shards, size_category
from fusmae_hf.preparation.statistics import band_statistics
from fusmae_hf.shards.dataset_info import read_dataset_info
from tests.hub_server import running_hub
from tests.small_shards import INFO, make_pair, run_command, write_shards

NAME = "user/small"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    info = INFO.__class__(**{**vars(INFO), "optical_factors": (1, 1, 1, 2), "optical_offset": 1000.0})
    return write_shards(tmp_path_factory.mktemp("shards"), info)


def card_of(folder, **options):
    text = str(dataset_card(read_dataset_info(folder), NAME, **options))
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def local_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The card


def test_the_card_tells_the_hub_what_it_can_filter_by(shards):
    metadata, _ = card_of(shards)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["pretty_name"] == "small"
    assert metadata["size_categories"] == ["n<1K"]
    assert metadata["task_categories"] == ["image-feature-extraction", "image-classification"]
    assert {"sentinel-1", "sentinel-2", "sar", "multispectral", "fus-mae"} <= set(metadata["tags"])
    (config,) = metadata["configs"]
    assert config["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "test", "path": "data/test-*.parquet"},
    ]


def test_the_card_tells_people_bands_units_offset_and_counts(shards):
    _, body = card_of(shards)
    for expected in (
        "16 pairs of one Sentinel-1 (SAR)",
        "**Source**: made by the tests (2024)",
        "**Licence of the imagery**: CC-BY-4.0",
        "| SAR | VV, VH | backscatter in dB | - |",
        "| optical | B02, B03, B04, B05 | digital numbers (reflectance x 10,000) | 1000 |",
        "B05 (1/2)",
        "| train | 12 | 2 |",
        "| test | 4 | 1 |",
        "No pair was left out",
        "Scene labels (3 classes): water; forest; town.",
        f'load_pairs("{NAME}", "train", streaming=True)',
    ):
        assert expected in body
    assert not re.search(r"\{\w*\}|TODO|More Information Needed|\bNone\b", body)


def test_pairs_left_out_are_counted_by_reason(shards):
    dataset = replace(read_dataset_info(shards), left_out_reasons={"snow | cloud": 3, "no partner": 1})
    body = str(dataset_card(dataset, NAME))
    assert "4 pairs were left out" in body
    assert r"| 3 | snow \| cloud |" in body


def test_simulated_imagery_is_called_so_everywhere(shards):
    dataset = read_dataset_info(shards)
    dataset = replace(dataset, info=replace(dataset.info, simulated=True))
    text = str(dataset_card(dataset, NAME))
    assert "pretty_name: small (simulated)" in text
    assert "- simulated\n" in text
    assert "**Simulated imagery, made up by a program" in text


def test_statistics_are_shown_where_given(shards):
    _, body = card_of(shards, statistics=band_statistics(shards))
    assert "Over 12 of 12 pairs of `train`; SAR in dB, optical in digital numbers after subtracting" in body
    assert re.search(r"\| VV \| -1\d\.\d\d \|", body)
    assert "Band statistics" not in card_of(shards)[1]


def test_label_maps_make_it_a_data_set_for_segmentation(tmp_path):
    info = replace(INFO, map_class_names=("sea", "land"), map_no_data=255, class_names=())
    metadata, body = card_of(write_shards(tmp_path, info, train=[make_pair(0, info)]))
    assert metadata["task_categories"] == ["image-feature-extraction", "image-segmentation"]
    assert "Label maps: 0 sea; 1 land; 255 means no class." in body


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("CDLA-Permissive-1.0", {"license": "cdla-permissive-1.0"}),
        ("CC BY 4.0", {"license": "cc-by-4.0"}),
        ("CC0-1.0", {"license": "cc0-1.0"}),
        ("none stated", {"license": "unknown"}),
        (
            "see https://example.org/terms; imagery: Copernicus",
            {"license": "other", "license_name": "see-the-card", "license_link": "https://example.org/terms"},
        ),
        ("Terms of my own", {"license": "other", "license_name": "see-the-card"}),
    ],
)
def test_licences_have_the_names_that_the_hub_knows(license, expected):
    assert hub_license(license) == expected


@pytest.mark.parametrize(
    ("pairs", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (590_326, "100K<n<1M"), (10**9, "100M<n<1B")]
)
def test_sizes_have_the_categories_of_the_hub(pairs, category):
    assert size_category(pairs) == category


# Pushing


def test_everything_is_pushed_with_the_description_last(hub, shards):
    report = push_shards(shards, NAME)
    pushed = hub.files(NAME)
    local = local_files(shards)
    assert {name: pushed[name] for name in local} == local
    assert pushed.keys() - local.keys() == {"README.md", ".gitattributes"}
    commits = [hub.files(NAME, commit) for commit in hub.commits[NAME]]
    assert ["dataset_info.json" in files for files in commits] == [False, False, True]
    assert report.commit == hub.branches[NAME]["main"]
    assert str(report).startswith("Pushed 16 pairs in 3 files (")
    assert f"to {hub.url}/datasets/{NAME}" in str(report)
    assert NAME not in hub.private


def test_an_interrupted_push_goes_on_with_what_is_missing(hub, shards):
    hub.upload_failures = 1
    with pytest.raises(OSError, match=r"(?s)Error while uploading.*What has arrived is kept there"):
        push_shards(shards, NAME)
    assert "dataset_info.json" not in hub.files(NAME)
    done = len(hub.objects)
    hub.log.clear()
    push_shards(shards, NAME)
    assert sum(request.startswith("PUT /lfs/") for request in hub.log) == 3 - done
    assert "dataset_info.json" in hub.files(NAME)


def test_shards_of_an_earlier_preparation_are_deleted_and_other_files_kept(hub, shards):
    hub.create(NAME)
    before = {"data/train-00007-of-00008.parquet": b"old", "left_out.csv": b"old", "notes/mine.txt": b"kept"}
    hub.commit(NAME, "main", hub.files(NAME) | before)
    report = push_shards(shards, NAME)
    assert report.deleted == ("data/train-00007-of-00008.parquet", "left_out.csv")
    assert hub.files(NAME).keys() & before.keys() == {"notes/mine.txt"}


def test_a_branch_is_made_and_named_in_the_card(hub, shards):
    push_shards(shards, NAME, revision="v2")
    assert "dataset_info.json" not in hub.files(NAME, "main")
    readme = hub.files(NAME, "v2")["README.md"].decode()
    assert f'load_pairs("hf://datasets/{NAME}@v2", "train"' in readme
    assert 'revision="v2"' in readme


def test_a_private_push_never_ends_in_a_public_repository(hub, shards):
    push_shards(shards, "user/secret", private=True)
    assert hub.private == {"user/secret"}
    hub.create("user/open")
    with pytest.raises(ValueError, match="user/open exists already and is public, so nothing was pushed"):
        push_shards(shards, "user/open", private=True)
    assert hub.files("user/open").keys() == {".gitattributes"}


def test_a_folder_that_is_not_whole_is_not_pushed(hub, tmp_path):
    folder = write_shards(tmp_path)
    next(folder.glob("data/test-*")).unlink()
    with pytest.raises(ValueError, match=r"not whole, so nothing was pushed: data/test-.*: is missing"):
        push_shards(folder, NAME)
    assert not hub.log


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [("{shards}", "small", "lacks the user"), ("memory://x", NAME, "is a URL"), ("{shards}", "a/b/c", "a/b/c")],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_sent(hub, shards, folder, name, message):
    with pytest.raises(ValueError, match=message):
        push_shards(folder.format(shards=shards), name)
    assert not hub.log


def test_statistics_of_another_dataset_are_refused(hub, shards):
    other = replace(band_statistics(shards), name="other")
    with pytest.raises(ValueError, match="The statistics are of other"):
        push_shards(shards, NAME, statistics=other)


def test_push_shows_figures_from_a_file_and_no_token(hub, shards, tmp_path, capsys):
    assert run_command("stats", shards, "--json", tmp_path / "s.json") == 0
    assert run_command("push", shards, NAME, "--statistics", tmp_path / "s.json") == 0
    assert "## Band statistics" in hub.files(NAME)["README.md"].decode()
    printed = capsys.readouterr()
    assert "hf_secret" not in printed.out + printed.err
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no statistics"):
        run_command("push", shards, NAME, "--statistics", tmp_path / "s.json")


# Reading what was pushed, in a process of its own because huggingface_hub takes HF_ENDPOINT when it is imported

READ_BACK = """
import sys
import torch
from fusmae_hf import load_pairs
from fusmae_hf.hub.push_shards import push_shards
from fusmae_hf.preparation.statistics import band_statistics
from fusmae_hf.preparation.verification import verify_shards

folder, name = sys.argv[1:]
first = push_shards(folder, name)
expected = load_pairs(folder, streaming=True)
places = [name, f"hf://datasets/{name}", f"hf://datasets/{name}@{first.commit}"]
for place in places:
    for streaming in (True, False):
        pairs = load_pairs(place, streaming=streaming)
        assert len(pairs) == len(expected) == 12
        got, wanted = pairs.__getitems__(list(range(12))), expected.__getitems__(list(range(12)))
        assert got["id"] == wanted["id"] and got["labels"] == wanted["labels"]
        for sensor in ("sar", "optical"):
            assert got[sensor].dtype == wanted[sensor].dtype
            assert torch.equal(got[sensor].view(torch.uint8), wanted[sensor].view(torch.uint8))
assert verify_shards(places[1]).problems == []
assert band_statistics(name) == band_statistics(folder)

from huggingface_hub import DatasetCard
plain = DatasetCard.load(name).text.split("```python")[2].split("```")[0]
found = {}
exec(plain, found)
assert (found["sar"] == expected[0]["sar"].numpy()).all()
assert all((band == whole).all() for band, whole in zip(found["optical"], expected[0]["optical"].numpy(), strict=True))

import datasets
from fusmae_hf import decode_row, stream_pairs
expected = load_pairs(folder, streaming=True)
for pair, wanted in zip(stream_pairs(name, revision=first.commit, token="hf_secret"), expected, strict=True):
    assert (pair["optical"] == wanted["optical"].numpy()).all()
rows = stream_pairs(name, decode=False).filter(lambda row: int(decode_row(row, name)["id"][-1]) % 2 == 0)
rows.push_to_hub("user/filtered", split="train")
for pairs in (load_pairs("user/filtered", like=name), load_pairs("user/filtered", like=name, streaming=True)):
    assert [pair["id"] for pair in pairs.__getitems__(range(len(pairs)))] == [f"pair-{n:03d}" for n in range(0, 12, 2)]
assert len(list(stream_pairs("user/filtered", like=name))) == 6
print("all the same")
"""


@pytest.fixture(scope="module")
def read_back(shards, tmp_path_factory):
    """What a process that pushes and reads says, and the requests that it made."""
    with running_hub() as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", READ_BACK, str(shards), NAME], env=environment, text=True, capture_output=True
        )
        return done, list(server.log)


def test_pushed_pairs_are_the_same_streamed_or_copied_by_name_url_and_commit(read_back):
    done, _ = read_back
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all the same" in done.stdout


def test_what_is_streamed_is_asked_for_by_range(read_back):
    _, log = read_back
    shard = f"/datasets/{NAME}/resolve/main/data/train-00000-of-00002.parquet"
    assert any(request.startswith(f"GET {shard} bytes=") for request in log)


def test_large_files_are_uploaded_apart_from_the_commit(read_back):
    _, log = read_back
    sent = [
        log.index(f"POST /datasets/{NAME}.git/info/lfs/objects/batch"),
        log.index(f"POST /api/datasets/{NAME}/commit/main"),
    ]
    assert sent == sorted(sent)
