"""Reading prepared pairs, from the disk or as a stream, for torch's `DataLoader` and transformers' `Trainer`.

Both ways give map-style datasets and the same batches; they differ in what lies on the disk and in the training order:

- local (default): shards on the disk, where random access is free (`EpochSampler`);
- streaming: nothing is stored, row groups are read from a folder, the Hub or any other URL (`LaneSampler`).
"""

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fusmae_hf.shards.dataset import OnBadFiles, PairDataset
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.shards.local import LocalPairDataset
from fusmae_hf.shards.streamed import StreamedPairDataset


def load_pairs(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    streaming: bool = False,
    mix: int = 8,
    on_bad_files: OnBadFiles = "error",
    num_proc: int | None = None,
) -> PairDataset:
    """Open one split of a prepared folder.

    Args:
        path: a folder written by `fusmae prepare`, a dataset repository on the Hub (`<user>/<name>`), or a URL that
            fsspec knows (`hf://datasets/<user>/<name>`, also with `@<revision>`).
        split: `"train"`, `"validation"` or `"test"`.
        streaming: read row groups when they are needed instead of keeping shards on the disk. Without it shards of the
            Hub are downloaded, and of compressed or otherwise encoded ones HF Datasets makes an Arrow copy.
        mix: for streaming, the number of row groups whose rows are permuted together in training. From a URL a worker
            holds twice as many for each of its lanes (about 15 MB each as prepared by default).
        on_bad_files: what to do with what cannot be read. `"error"` raises, naming the file. `"warn"` and `"skip"`,
            with a warning and without, go on: files that cannot be opened are left out (`bad_files` of the dataset),
            a row found damaged later is replaced by the next sound one and marked in the batch as `replaced`.
        num_proc: processes that make the Arrow copy, where one is needed; one by default.

    Raises:
        FileNotFoundError: there is no such folder or repository, or no shards or no `dataset_info.json` in it.
        ValueError: there is no such split, a shard is damaged, its rows disagree with `dataset_info.json`, or
            `on_bad_files` is unknown.
    """
    if on_bad_files not in (known := ("error", "warn", "skip")):
        raise ValueError(f"on_bad_files is {on_bad_files!r}, but must be one of {known}.")
    root = _root(os.fspath(path))
    dataset_info = read_dataset_info(root)
    if streaming:
        return StreamedPairDataset(root, dataset_info, split, mix, on_bad_files)
    return LocalPairDataset(root, dataset_info, split, on_bad_files, num_proc)


def _root(path: str) -> str:
    """Absolute folder or URL for what the user gave."""
    if "://" in path:
        return path.rstrip("/")
    if Path(path).is_dir():
        if not any(Path(path).iterdir()):
            raise FileNotFoundError(f"The folder {path} is empty. Fill it with `fusmae prepare`, or give another one.")
        return os.path.abspath(path)
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise FileNotFoundError(f"There is no folder {path}. Write one with `fusmae prepare`.") from None
    if "/" not in path:
        raise FileNotFoundError(
            f"There is no folder {path}. Write one with `fusmae prepare`, or name a Hub repository as <user>/<name>."
        )
    return f"hf://datasets/{path}"
