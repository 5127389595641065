"""Inject faults into real training programs, and print what became of each run as one table.

Promised is that no sample is lost and that each run ends with the weights of one that was left alone, bit for bit.
The exit code is 1 where that, or a message, was missing, or where something hung.
"""

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tests.training.conftest import write_shards
from tests.training.started_programs import NotPossibleHere

from . import faults
from .faults import FAULTS, SETTINGS, Result

HEADER = ("fault", "times tried", "outcome", "samples lost", "weights equal")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = {fault.__name__: fault for fault in FAULTS}
    listed = "\n".join(f"  {name:<20} {fault.__doc__}" for name, fault in names.items())
    parser = argparse.ArgumentParser(
        "python -m tests.chaos",
        description=__doc__,
        epilog=f"faults:\n{listed}\n\nA trial takes 20 to 30 seconds on two cores; at most two programs run at once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--times", type=int, default=5, help="trials of each fault (5)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="FAULT", default=list(names), help="faults to try")
    parser.add_argument(
        "--seed", type=int, help="of the first trial, then one more each; left out: a new one, printed"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to a file, too")
    options = parser.parse_args(argv)
    if options.times < 1:
        parser.error(f"--times must be 1 or more, not {options.times}")
    options.only = [names[name] for name in options.only]
    options.seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    return options


def tried(fault, folder: Path, seed: int) -> Result | NotPossibleHere:
    """What became of a trial; whatever goes wrong in it is a problem of its own."""
    try:
        result = fault(folder, seed)
    except NotPossibleHere as error:
        result = error
    except Exception as error:
        result = Result("", problem=str(error) if isinstance(error, AssertionError) else repr(error))
    if isinstance(result, NotPossibleHere) or result.as_promised:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def tried_all(chosen: Sequence, seeds: Sequence[int], folder: Path) -> dict:
    """Results of each fault by seed. Runs of two processes go alone, others two at a time: there are two cores."""
    results: dict = {fault: {} for fault in chosen}
    runs = len(set().union(*(FAULTS[fault] for fault in chosen))) + len(chosen) * len(seeds)
    with tqdm(total=runs, unit="run") as progress:

        def leave_alone(settings: str) -> None:
            faults.uncut(folder, settings)
            progress.update()

        def try_once(fault, seed: int) -> None:
            results[fault][seed] = tried(fault, folder / f"{fault.__name__}-{seed}", seed)
            progress.update()

        for at_once in (2, 1):
            of_these = {name for name, (processes, _) in SETTINGS.items() if bool(processes) == (at_once == 1)}
            alike = [fault for fault in chosen if FAULTS[fault][0] in of_these]
            trials = [(fault, seed) for fault in alike for seed in seeds]
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(leave_alone, sorted(set().union(*(FAULTS[fault] for fault in alike)))))
                list(pool.map(try_once, *zip(*trials, strict=True)) if trials else ())
    return results


def row(fault, results: dict[int, Result | NotPossibleHere], folder: Path) -> tuple[str, ...]:
    """A line of the table."""
    done = {seed: result for seed, result in results.items() if isinstance(result, Result)}
    if not done:
        return fault.__doc__, "0", f"skipped: {next(iter(results.values()))}", "-", "-"
    kept = Counter(result.outcome for result in done.values() if result.as_promised)
    outcomes = [outcome if number == len(done) else f"{number} x {outcome}" for outcome, number in kept.items()]
    outcomes += [
        f"FAILED with seed {seed}: {result.problem or 'not as uncut'}; kept in {folder / fault.__name__}-{seed}"
        for seed, result in done.items()
        if not result.as_promised
    ]
    unknown = sum(result.lost is None for result in done.values())
    equal = sum(result.equal is True for result in done.values())
    lost = f"{sum(result.lost or 0 for result in done.values())}{f' ({unknown} unknown)' if unknown else ''}"
    return fault.__doc__, str(len(done)), "; ".join(outcomes), lost, "yes" if equal == len(done) else f"{equal} times"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as Markdown, aligned."""
    lines = [HEADER, *(tuple(cell.replace("|", "/").replace("\n", " ") for cell in each) for each in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; the exit code."""
    options = parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="fusmae-chaos-"))
    seeds = range(options.seed, options.seed + options.times)
    print(f"Seeds {seeds[0]} to {seeds[-1]}, folder {folder}", file=sys.stderr)
    write_shards(folder / "shards")
    results = tried_all(options.only, seeds, folder)
    text = table([row(fault, results[fault], folder) for fault in options.only])
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    failed = [
        f"{fault.__name__} --seed {seed} --times 1"
        for fault, of_fault in results.items()
        for seed, result in of_fault.items()
        if isinstance(result, Result) and not result.as_promised
    ]
    for trial in failed:
        print(f"Again: python -m tests.chaos --only {trial}")
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(failed))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
