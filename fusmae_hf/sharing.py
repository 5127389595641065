"""Pushing a folder of shards to the Hub as a dataset repository."""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id

from .data.dataset_info import FILE_NAME, read_dataset_info
from .data.left_out import FILE_NAME as LEFT_OUT_NAME
from .dataset_card import dataset_card
from .statistics import DatasetStatistics, dataset_title
from .verification import verify_shards


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
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} lacks the user: give <user>/<name>.")
    if "://" in os.fspath(folder):
        raise ValueError(f"{folder} is a URL, but only a folder on this machine can be pushed.")
    folder = Path(folder)
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
    url = api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(f"{repo_id} exists already and is public, so nothing was pushed. Make it private first.")
    if revision:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
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
