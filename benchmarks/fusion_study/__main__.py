"""Does the cross-attention fusion help? A study at equal pretraining compute, on made-up pairs and on real floods.

    python -m benchmarks.fusion_study run --config benchmarks/fusion_study/cpu.yaml --output_dir outputs/fusion-study
    python -m benchmarks.fusion_study status --config ... --output_dir ...
    python -m benchmarks.fusion_study tables --output_dir ... --report_dir ...
    python -m benchmarks.fusion_study plots --output_dir ... --report_dir ...
    python -m benchmarks.fusion_study save --output_dir ... --file benchmarks/results/fusion-study.jsonl
    python -m benchmarks.fusion_study restore --output_dir ... --file benchmarks/results/fusion-study.jsonl

Run it from the root of a checkout. Units of work (`units.py`) that are done are skipped when `run` is repeated, so it
can be stopped at any time. OMBRIA is read from `FUSMAE_REAL_DATA/ombria`, or from the `root` of its settings.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from .archive import restore_results, save_results
from .plots import write_plots
from .report import write_tables
from .settings import read_settings
from .units import all_units, run_study


def main(arguments: list[str] | None = None) -> int:
    """Run a command; see the module's docstring and `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fusion_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("run", "do all units that are not done yet"),
        ("status", "count the units that are done"),
        ("tables", "write the tables of all results so far"),
        ("plots", "draw the plots of all results so far"),
        ("save", "write all results so far into one file"),
        ("restore", "take up the results in such a file"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("--output_dir", type=Path, default=Path("outputs/fusion-study"), help="where results are")
        if name in ("run", "status"):
            command.add_argument("--config", type=Path, required=True, help="YAML file of the study")
        elif name in ("save", "restore"):
            command.add_argument("--file", type=Path, required=True, help="JSON lines")
        else:
            command.add_argument("--report_dir", type=Path, required=True, help="where to write")
        if name == "run":
            command.add_argument("--workers", type=int, default=1, help="processes of one thread (0: this one alone)")
            command.add_argument(
                "--only",
                nargs="+",
                default=["*"],
                metavar="PATTERN",
                help="units to do, such as 'simulated/*-seed0'; those of an earlier pattern come first",
            )
    given = parser.parse_args(arguments)
    if given.command == "tables":
        print(write_tables(given.output_dir, given.report_dir))
    elif given.command == "plots":
        for path in write_plots(given.output_dir, given.report_dir):
            print(path)
    elif given.command == "save":
        print(f"{save_results(given.output_dir, given.file)} results in {given.file}")
    elif given.command == "restore":
        print(f"{restore_results(given.file, given.output_dir)} results put into {given.output_dir}")
    elif given.command == "status":
        units = all_units(read_settings(given.config))
        done = Counter((unit.dataset, unit.stage) for unit in units if unit.result(given.output_dir).is_file())
        for (dataset, stage), count in Counter((unit.dataset, unit.stage) for unit in units).items():
            print(f"{dataset:12} {stage:10} {done[dataset, stage]:4} of {count}")
    else:
        settings = read_settings(given.config)
        failed = run_study(settings, given.output_dir, given.workers, given.only)
        for unit in failed:
            print(f"not done: {unit}", file=sys.stderr)
        return 1 if failed else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
