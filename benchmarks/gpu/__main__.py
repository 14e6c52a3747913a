"""``python -m benchmarks.gpu prepare|run|table``; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.folder import DEFAULT_FOLDER

__all__ = ["main"]


def _prepare(arguments: argparse.Namespace) -> None:
    from benchmarks.gpu.instances import instances
    from benchmarks.gpu.prepare import default_calibrations, prepare

    given = dict(one.split("=", 1) for one in arguments.calibration)
    calibrations = {**default_calibrations(), **{name: Path(file) for name, file in given.items()}}
    work_s = 0.2 if arguments.tiny else arguments.work
    for instance in instances(arguments.only, tiny=arguments.tiny):
        print(f"{instance.name}: {instance.note}", file=sys.stderr)
        prepare(
            instance, arguments.folder, calibrations=calibrations, work_s=work_s, refit=not arguments.keep
        )


def _run(arguments: argparse.Namespace) -> None:
    from benchmarks.gpu.parts import parts_named
    from benchmarks.gpu.run import Run, run

    how = Run(
        folder=arguments.folder,
        out=arguments.out,
        tiny=arguments.tiny,
        total_s=arguments.total,
        commit=arguments.commit,
        repeats=arguments.repeats if not arguments.tiny else 3,
    )
    run(parts_named(arguments.only, tiny=arguments.tiny, quick=arguments.quick), how)


def _table(arguments: argparse.Namespace) -> None:
    from benchmarks.gpu.table import write_table

    print(write_table(arguments.results, prepared=arguments.folder, file=arguments.file))


def _parser() -> argparse.ArgumentParser:
    from benchmarks.environment import RESULTS
    from benchmarks.gpu.parts import PARTS

    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(required=True)
    prepare = commands.add_parser("prepare", help="fit placements and cut held-out routing (no GPU needed)")
    prepare.add_argument("--only", nargs="+", metavar="INSTANCE")
    prepare.add_argument("--calibration", nargs="+", default=[], metavar="TRANSPORT=FILE")
    prepare.add_argument("--work", type=float, help="effort of each solve, in seconds of one thread")
    prepare.add_argument("--keep", action="store_true", help="keep what was fitted before, cut the rest anew")
    prepare.set_defaults(command=_prepare)
    run = commands.add_parser("run", help="measure, on a machine with GPUs")
    run.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS])
    run.add_argument("--out", type=Path, default=Path("gpu-results"))
    run.add_argument("--quick", action="store_true", help="a third of each part's time")
    run.add_argument("--total", type=float, default=560.0, help="seconds for all parts")
    run.add_argument("--repeats", type=int, default=20)
    run.add_argument("--commit", help="what to call this version, where there is no git")
    run.set_defaults(command=_run)
    table = commands.add_parser("table", help="write the table from the results of one or more runs")
    table.add_argument("results", nargs="+", type=Path, help="output folders, later ones win")
    table.add_argument("--file", type=Path, default=RESULTS / "gpu.md")
    table.set_defaults(command=_table)
    for one in (prepare, run, table):
        one.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
        one.add_argument("--tiny", action="store_true", help="in miniature, on a CPU")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run a command."""
    arguments = _parser().parse_args(argv)
    arguments.command(arguments)


if __name__ == "__main__":
    main()
