"""The service under load: what its figures are on this machine, on SQLite and on PostgreSQL.

Run ``python -m benchmarks.service [--quick] [--database NAME] [--only TEXT] [--seconds S] [--pairs N]``;
writes ``benchmarks/results/service.md`` and appends to ``service.jsonl``, of a whole run alone. Real servers
(``moe-placement serve``), real sockets; the load generator is a process of its own on the same machine and
takes its share of it. PostgreSQL is a private cluster that waits for the disk at every commit.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from uuid import uuid4

from benchmarks.environment import RESULTS, environment
from benchmarks.service_figures import FIGURES, Settings, solvers_of
from benchmarks.service_load import Measured, ceiling
from benchmarks.service_stage import Figure
from tests.service.postgres import Cluster, find_binaries

__all__ = ["main"]

DATABASES = ("SQLite", "PostgreSQL")
CEILING_BYTES = (0, 80_000)


@contextmanager
def _urls(database: str) -> Iterator[Iterator[str | None]]:
    """Give a new database for every stage."""
    if database == "SQLite":
        yield iter(lambda: None, "")
        return
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed: no initdb; take --database SQLite")
    with Cluster(binaries, durable=True) as cluster:
        yield iter(lambda: cluster.create(f"state_{uuid4().hex}"), "")


def _table(figures: list[Figure]) -> list[str]:
    lines = ["| what | database | target | measured | |", "|---|---|---|---|---|"]
    said = {True: "met", False: "**missed**", None: ""}
    return lines + [
        f"| {figure.what} | {figure.database} | {figure.target} | {figure.measured} | {said[figure.met]} |"
        for figure in figures
    ]


def _page(figures: list[Figure], ceilings: dict[int, Measured], where: dict[str, str], command: str) -> str:
    limits = "; ".join(f"{size:,} bytes: {found.line()}" for size, found in ceilings.items())
    missed = sum(figure.met is False for figure in figures)
    return "\n".join(
        [
            "# Service",
            "",
            f"Commit {where['commit']}; {where['machine']}; Python {where['python']}; load average "
            f"{os.getloadavg()[1]:.1f} at the end. Made by `{command}`.",
            "",
            "Server, worker, database and load generator share this machine. The generator against a server",
            f"that answers the same bytes to everything, 16 callers: {limits}.",
            "",
            f"{sum(figure.met is True for figure in figures)} targets met, {missed} missed.",
            "",
            *_table(figures),
            "",
        ]
    )


def _measure(options: argparse.Namespace) -> Iterator[Figure]:
    for database in options.database or DATABASES:
        with _urls(database) as urls:
            settings = Settings(
                seconds=options.seconds or (3.0 if options.quick else 10.0),
                pairs=options.pairs or (3 if options.quick else 11),
                history=1000 if options.quick else 10_000,
                solvers=solvers_of(options.quick),
                database=database,
                urls=urls,
            )
            for name, figures in FIGURES.items():
                if options.only is None or options.only in name:
                    yield from figures(settings)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short: three solvers, 1,000 solves in history")
    parser.add_argument("--database", action="append", choices=DATABASES, help="this database alone")
    parser.add_argument("--only", help=f"figures whose name has this in it: {', '.join(FIGURES)}")
    parser.add_argument("--seconds", type=float, help="time of each load")
    parser.add_argument("--pairs", type=int, help="solves through the service and on the command line")
    options = parser.parse_args()
    where = environment()
    ceilings = {size: ceiling(size, connections=16, seconds=2.0) for size in CEILING_BYTES}
    figures = []
    for figure in _measure(options):
        figures.append(figure)
        print(
            f"{figure.database}: {figure.what}: {figure.measured} [{figure.target}: {figure.met}]", flush=True
        )
    command = "python -m benchmarks.service" + (" --quick" if options.quick else "")
    page = _page(figures, ceilings, where, command)
    print(page)
    if options.only is None and options.database is None:
        (RESULTS / "service.md").write_text(page, encoding="utf-8")
        with (RESULTS / "service.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **asdict(figure)}) + "\n" for figure in figures)


if __name__ == "__main__":
    main()
