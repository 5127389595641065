"""Results of a study in one file, a line each, to be kept in the repository and taken up again elsewhere."""

import json
from pathlib import Path

from fusmae_hf.files.atomic import write_atomically

SETTINGS = "settings.json"


def save_results(folder: Path, file: Path) -> int:
    """Write settings and results of a study's folder into a file of JSON lines, in a fixed order.

    Returns:
        How many results.
    """
    results = sorted((folder / "results").glob("*/*/*.json"))
    lines = [(folder / SETTINGS).read_text(), *(path.read_text() for path in results)]
    file.parent.mkdir(parents=True, exist_ok=True)
    compact = (json.dumps(json.loads(line), separators=(",", ":")) for line in lines)
    write_atomically(file, "".join(f"{line}\n" for line in compact).encode())
    return len(results)


def restore_results(file: Path, folder: Path) -> int:
    """Put saved results into a study's folder, where `run` finds them. Those that are there stay as they are.

    Returns:
        How many were put there.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    settings, *records = map(json.loads, file.read_text().splitlines())
    kept = folder / SETTINGS
    if kept.is_file() and json.loads(kept.read_text()) != settings:
        raise ValueError(f"{folder} holds results of other settings than {file}: name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(settings, indent=1).encode())
    put = 0
    for record in records:
        path = (
            folder / "results" / record["dataset"] / record["stage"] / f"{record['variant']}-seed{record['seed']}.json"
        )
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record, indent=1).encode())
            put += 1
    return put
