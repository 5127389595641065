"""Pushing folders of shards to the Hub, as dataset repositories with a card."""

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from fusmae_hf.hub.cards import card_text, render
from fusmae_hf.hub.push_model import pushable, reaching_the_hub, repository
from fusmae_hf.preparation.statistics import DatasetStatistics, dataset_title, scale_in_words
from fusmae_hf.preparation.verification import verify_shards
from fusmae_hf.shards.dataset_info import LEFT_OUT_NAME, DatasetInfo, read_dataset_info
from fusmae_hf.shards.format import FILE_NAME

HUB_LICENSES = frozenset(
    (
        "apache-2.0", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-3.0",
        "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
        "cc-by-sa-4.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "etalab-2.0", "mit", "odbl",
        "odc-by", "pddl", "unlicense",
    )
)  # fmt: skip
"""Licences of data by the Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses)."""

TAGS = ("remote-sensing", "earth-observation", "sentinel-1", "sentinel-2", "sar", "multispectral", "fus-mae")

_UNITS = {
    "db": "backscatter in dB",
    "linear": "backscatter as linear power",
    "dn": "digital numbers (reflectance x 10,000)",
    "reflectance": "reflectance",
    "raw": "raw values",
}


@dataclass(frozen=True)
class PushReport:
    """What `push_shards` did; prints as a sentence.

    Attributes:
        url: page of the repository.
        commit: the commit that made the dataset complete, to pin it: `hf://datasets/<user>/<name>@<commit>`.
        pairs: number of pairs in it.
        files: number of shards.
        bytes: size of the shards.
        deleted: files of an earlier preparation that were deleted from it.
    """

    url: str
    commit: str
    pairs: int
    files: int
    bytes: int
    deleted: tuple[str, ...]

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        gone = f" {len(self.deleted):,} files of an earlier preparation were deleted." if self.deleted else ""
        return (
            f"Pushed {self.pairs:,} pairs in {files} ({self.bytes / 1e6:,.1f} MB) to {self.url}, "
            f"commit {self.commit}.{gone}"
        )


@reaching_the_hub()
def push_shards(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    statistics: DatasetStatistics | None = None,
) -> PushReport:
    """Push a prepared folder to the Hub, made if need be, with a card written from its `dataset_info.json`.

    The shards go first and `dataset_info.json` last, with the card and the deletion of shards of an earlier
    preparation in one commit: until then readers see what was there before, or an error, never half a dataset.
    `huggingface_hub` uploads them, in as many commits as the Hub likes, with its own progress bars, threads and token
    (`hf auth login`, or `HF_TOKEN`). After an interruption the same call goes on where it stopped.

    Args:
        folder: a folder of shards on this machine, whole: its footers are checked first.
        repo_id: `<user>/<name>`.
        private: make the repository private.
        revision: branch to push to, made if need be; the main one by default.
        statistics: band statistics for the card.

    Raises:
        FileNotFoundError: there is no such folder or no `dataset_info.json` in it.
        ValueError: the name is none, the folder is not whole, the statistics are of another dataset, the Hub refuses
            the card, or the repository exists and is public although it should be private.
        OSError: the Hub cannot be reached or refuses, such as without a token.
    """
    folder = pushable(folder, repo_id)
    dataset = read_dataset_info(folder)
    found = verify_shards(folder, quick=True)
    if not found.sound:
        raise ValueError(
            f"{folder} is not whole, so nothing was pushed: {found.errors[0]} ({len(found.errors):,} errors in all; "
            f"`fusmae verify {folder} --quick` names them.)"
        )
    if statistics is not None and statistics.name != dataset_title(dataset.info):
        raise ValueError(f"The statistics are of {statistics.name}, but {folder} holds {dataset_title(dataset.info)}.")
    card = dataset_card(dataset, repo_id, revision=revision, statistics=statistics)
    api = HfApi()
    card.validate()
    url = repository(api, repo_id, "dataset", private, revision)
    shards = [shard for of_split in dataset.splits.values() for shard in of_split]
    names = {shard.name for shard in shards}
    pairs = sum(shard.rows for shard in shards)
    try:
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            allow_patterns=sorted(names),
            commit_message=f"Upload {len(shards):,} shards of {dataset.info.name}",
        )
    except RuntimeError as error:  # huggingface_hub's, where an upload fails for good
        raise OSError(
            f"{error} ({error.__cause__}) What has arrived is kept there: run the same command again to go on."
        ) from error
    small = {FILE_NAME: (folder / FILE_NAME).read_bytes(), "README.md": str(card).encode()}
    if (folder / LEFT_OUT_NAME).exists():
        small[LEFT_OUT_NAME] = (folder / LEFT_OUT_NAME).read_bytes()
    stale = tuple(
        name
        for name in api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
        if name not in names | small.keys() and (name == LEFT_OUT_NAME or fnmatch(name, "data/*-*-of-*.parquet"))
    )
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in small.items()]
        + [CommitOperationDelete(name) for name in stale],
        repo_type="dataset",
        revision=revision,
        commit_message=f"Describe {pairs:,} pairs of {dataset.info.name}",
    )
    return PushReport(str(url), commit.oid, pairs, len(shards), sum(shard.bytes for shard in shards), stale)


def dataset_card(
    dataset: DatasetInfo, repo_id: str, *, revision: str | None = None, statistics: DatasetStatistics | None = None
) -> DatasetCard:
    """The card of a folder of shards.

    Args:
        dataset: what the folder holds.
        repo_id: `<user>/<name>`, for the examples.
        revision: branch for the examples; the main one by default.
        statistics: band statistics to show, if any.

    Returns:
        The card; `str(card)` is the README.md, whose YAML the Hub can read.
    """
    info, pairs = dataset.info, sum(map(dataset.rows, dataset.splits))
    factors = info.optical_factors or (1,) * len(info.optical_bands)
    body = render(
        "dataset.md",
        title=dataset_title(info),
        dataset=dataset,
        info=info,
        pairs=pairs,
        units=_UNITS,
        coarse=[f"{band} (1/{n})" for band, n in zip(info.optical_bands, factors, strict=True) if n > 1],
        statistics=statistics,
        scale=scale_in_words(info),
        repo_id=repo_id,
        revision=revision,
        split="train" if "train" in dataset.splits else next(iter(dataset.splits)),
    )
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in dataset.splits]
    license_fields: dict[str, Any] = dict(hub_license(info.license))
    data = DatasetCardData(
        pretty_name=dataset_title(info),
        size_categories=[size_category(pairs)],
        task_categories=[
            "image-feature-extraction",
            *(["image-classification"] if info.class_names else []),
            *(["image-segmentation"] if info.map_class_names else []),
        ],
        **license_fields,
        tags=[*TAGS, *(["simulated"] if info.simulated else [])],
        configs=[{"config_name": "default", "data_files": files}],
    )
    return DatasetCard(card_text(data, body))


def hub_license(license: str) -> dict[str, str]:
    """The YAML fields with which the Hub names a licence.

    Args:
        license: licence as a dataset states it, such as `"CC BY 4.0"`.

    Returns:
        `license`, an identifier of the Hub; `"unknown"` where none is stated. For a licence without an identifier
        `"other"`, with the link in its text as `license_link` and `license_name`.
    """
    identifier = re.sub(r"[\s_]+", "-", license.strip().lower())
    if identifier in HUB_LICENSES:
        return {"license": identifier}
    if identifier in ("", "none", "none-stated", "unknown"):
        return {"license": "unknown"}
    link = re.search(r"https?://[^\s;,)]+", license)
    named = {"license": "other", "license_name": "see-the-card"}
    return named | ({"license_link": link.group().rstrip(".")} if link else {})


def size_category(pairs: int) -> str:
    """The Hub's size category of so many pairs."""
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    step = min(max(len(str(pairs)) - 3, 0), len(bounds) - 1)
    return f"{bounds[step - 1]}<n<{bounds[step]}" if step else f"n<{bounds[0]}"
