"""Load and losses for minutes, and whether the service kept what it had acknowledged.

Run ``python -m benchmarks.chaos [--minutes M] [--database NAME] [--seed N] [--keep FOLDER]``; exits with 1
where something was lost, done twice or left behind. The same program runs for seconds in the tests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import environment
from tests.service.chaos.engine import Run, run_on_postgres, run_on_sqlite
from tests.service.postgres import Cluster, find_binaries

__all__ = ["main"]

DATABASES = ("SQLite", "PostgreSQL")


def _run(database: str, folder: Path, *, seconds: float, seed: int) -> Run:
    def tell(text: str) -> None:
        print(f"{database}: {text}", file=sys.stderr, flush=True)

    if database == "SQLite":
        return run_on_sqlite(folder, seconds=seconds, seed=seed, tell=tell)
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed: no initdb; take --database SQLite")
    with Cluster(binaries, durable=True) as cluster:
        return run_on_postgres(folder, cluster, seconds=seconds, seed=seed, tell=tell)


def main() -> None:
    """Run, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="time under losses, on each database")
    parser.add_argument("--database", action="append", choices=DATABASES, help="this database alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for data and logs, kept (default: a temporary one)")
    options = parser.parse_args()
    where = environment()
    print(f"Commit {where['commit']}; {where['machine']}; seed {options.seed}")
    violations = 0
    for database in options.database or DATABASES:
        with tempfile.TemporaryDirectory(prefix="moe-placement-chaos-") as scratch:
            folder = (options.keep or Path(scratch)) / database
            folder.mkdir(parents=True)
            run = _run(database, folder, seconds=60 * options.minutes, seed=options.seed)
        print(f"{database}: {run.report()}", flush=True)
        violations += len(run.ledger.violations)
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
