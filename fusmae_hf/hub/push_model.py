"""Pushing checkpoints to the Hub, as model repositories."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from fusmae_hf.files.retries import is_passing
from fusmae_hf.hub.cards import plain_card
from fusmae_hf.shards.format import FILE_NAME

MODEL_FILES = (
    "README.md", ".eval_results/*.yaml", "config.json", "preprocessor_config.json", "*.safetensors",
    "*.safetensors.index.json", "adapter_config.json", "*.py", "run.json", "metrics.json", "metrics.md", "*.png",
)  # fmt: skip
"""What is pushed of the folder of a checkpoint or a run. No pickles, logs or states of the optimiser: they are of no
use to others, and hold names of machines and all arguments of the run."""

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_OLD_FILES = (
    "model*.safetensors", "adapter_model*.safetensors", "model.safetensors.index.json", "training_args.bin", "runs/*",
)  # fmt: skip


@dataclass(frozen=True)
class ModelPushReport:
    """What `push_model` did; prints as a sentence.

    Attributes:
        url: page of the repository.
        commit: the commit with the model, to pin it: `from_pretrained(<user>/<name>, revision=<commit>)`.
        files: names of the files pushed.
    """

    url: str
    commit: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"Pushed a model of {len(self.files)} files to {self.url}, commit {self.commit}."


@contextmanager
def reaching_the_hub() -> Iterator[None]:
    """Say in a sentence what happens without network, token or permission; also a decorator.

    Raises:
        PermissionError: the Hub wants a token, or another one.
        ConnectionError: it cannot be reached.
    """
    try:
        yield
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise PermissionError(
                f"The Hub refuses: {first_line} Log in with `hf auth login`, or set HF_TOKEN to a token that may "
                "write there."
            ) from error
        if is_passing(error) and not isinstance(error, OfflineModeIsEnabled):
            raise ConnectionError(
                f"The Hub at {constants.ENDPOINT} cannot be reached: {first_line}. Check the network and HF_ENDPOINT; "
                "the same command goes on later."
            ) from error
        raise


def is_model(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is that of a checkpoint or a run, not of shards."""
    return (Path(folder) / "config.json").is_file()


@reaching_the_hub()
def push_model(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
) -> ModelPushReport:
    """Push a checkpoint to the Hub, in one commit: weights, configuration, processor, card and remote code.

    A card that shows how to load the folder shows how to load the repository there; a folder without a card gets one
    there of what its configuration and processor say. Weights of an earlier push that are
    not in the folder any more, and logs and pickles of the Trainer, are deleted from the repository.

    Args:
        folder: a checkpoint or the output folder of a run, on this machine.
        repo_id: `<user>/<name>`; made if need be.
        private: make the repository private.
        revision: branch to push to, made if need be; the main one by default.
        token: that of `huggingface_hub` by default (`hf auth login`, or `HF_TOKEN`).
        commit_message: first line of the commit.

    Raises:
        ValueError: the name is none, files are missing that a user would need, the Hub refuses the card, or the
            repository exists and is public although it should be private.
        OSError: the Hub cannot be reached or refuses, such as without a token.
    """
    folder = pushable(folder, repo_id)
    _check_whole(folder)
    card = _card(folder, repo_id)
    api = HfApi(token=token)
    card.validate()
    url = repository(api, repo_id, "model", private, revision)
    here = {path.relative_to(folder).as_posix() for pattern in MODEL_FILES for path in folder.glob(pattern)}
    if not _in_shards(folder):  # `save_pretrained` leaves the index of an earlier one there
        here.discard(_INDEX)
    files = tuple(sorted(here | {"README.md"}))
    there = api.list_repo_files(repo_id, revision=revision)
    old = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in _OLD_FILES)]
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, str(card).encode() if name == "README.md" else folder / name) for name in files]
        + [CommitOperationDelete(name) for name in old],
        revision=revision,
        commit_message=commit_message,
    )
    return ModelPushReport(str(url), commit.oid, files)


def _card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a folder for others, who load the checkpoint by the name of the repository; the folder's own stays
    as it is."""
    if not (folder / "README.md").is_file():
        return plain_card(folder, repo_id)
    text = (folder / "README.md").read_text(encoding="utf-8")
    name = re.escape(folder.resolve().name)
    return ModelCard(re.sub(rf'from_pretrained\("(?:[^"]*/)?{name}"', f'from_pretrained("{repo_id}"', text))


def _in_shards(folder: Path) -> bool:
    """Whether the weights are in several files; transformers prefers the single one where there are both."""
    return (folder / _INDEX).is_file() and not (folder / _WEIGHTS).is_file()


def _check_whole(folder: Path) -> None:
    """Raise a ValueError if files are missing without which a pushed checkpoint cannot be used."""
    if not is_model(folder):
        raise ValueError(f"{folder} is no checkpoint: it has no config.json.{_merge_first(folder)}")
    needed = {"preprocessor_config.json"}
    if (folder / "adapter_config.json").is_file():
        needed.add("adapter_model.safetensors")
    else:
        auto_map = json.loads((folder / "config.json").read_text()).get("auto_map", {})
        needed |= {f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
        index = folder / _INDEX
        shards = json.loads(index.read_text())["weight_map"].values() if _in_shards(folder) else [_WEIGHTS]
        needed |= set(shards)
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, so nothing was pushed. Save the model and its processor there with "
            "`save_pretrained`."
        )


def _merge_first(folder: Path) -> str:
    """What to do with a folder of peft that lacks the configuration of its model."""
    if not (folder / "adapter_config.json").is_file():
        return ""
    return (
        " It holds an adapter: merge it into its model first (`merge_and_unload`), and save that with its processor."
    )


def require_pushable(folder: str | os.PathLike[str]) -> None:
    """Raise an error that names what a folder lacks if it is neither of a model nor of shards.

    Raises:
        FileNotFoundError: it is none, or holds neither.
    """
    folder = Path(folder)
    if "://" in os.fspath(folder) or is_model(folder) or (folder / FILE_NAME).is_file():
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to push.")
    raise FileNotFoundError(
        f"{folder} holds neither a config.json (a checkpoint or run) nor a {FILE_NAME} (shards): there is nothing "
        f"to push.{_merge_first(folder)}"
    )


def pushable(folder: str | os.PathLike[str], repo_id: str) -> Path:
    """A folder on this machine, for a repository with a name that the Hub takes; a ValueError otherwise."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} lacks the user: give <user>/<name>.")
    if "://" in os.fspath(folder):
        raise ValueError(f"{folder} is a URL, but only a folder on this machine can be pushed.")
    return Path(folder)


def repository(api: HfApi, repo_id: str, kind: str, private: bool, revision: str | None) -> str:
    """Make a repository and a branch where there is none; gives its page."""
    url = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise ValueError(f"{repo_id} exists already and is public, so nothing was pushed. Make it private first.")
    if revision:
        api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
    return str(url)
