"""``moe-placement batch``: many traces, topologies and options, crossed and solved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.inputs import JsonOption, warn
from placement.cli.spread import OnErrorOption, RayOption, WorkersOption

if TYPE_CHECKING:
    from rich.table import Table

    from traces.distributed.batch import BatchReport

__all__ = ["batch"]


def batch(
    spec: Annotated[Path, typer.Argument(help="YAML file of the batch.", show_default=False)],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for placements and results.", show_default=False)
    ],
    workers: WorkersOption = None,
    ray: RayOption = None,
    on_error: OnErrorOption = "fail",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an earlier run left in the folder.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Solve every combination of the traces, topologies and options of SPEC, in parallel.

    SPEC is a YAML file with the keys traces, topologies, solve (options of every cell), grid (lists of
    options to cross), exclude, held_out (alternate or none) and split_layers; options are named as those of
    solve, with underscores. Paths in it are relative to it.

    OUT gets cells/TRACE/TOPOLOGY/.../placement.json and results.jsonl, a row for each cell. What is done
    stays when the run is stopped, and --resume goes on from there; cells whose options or inputs have changed
    are solved again. Cells without a feasible placement are rows too. The exit code is 0 when any cell has a
    placement, else that of the first one that has none; 130 after Ctrl-C.
    """
    from placement.cli.batch_cell import CELL_WORK
    from placement.cli.counting import showing_count
    from placement.io import dump_json
    from traces.distributed.batch import RESULTS, run_batch
    from traces.distributed.executor import make_executor
    from traces.distributed.spec import read_spec

    plan = read_spec(spec)
    try:
        with make_executor(workers=workers, ray=ray) as executor, showing_count("solving") as progress:
            report = run_batch(
                plan,
                out,
                work=CELL_WORK,
                executor=executor,
                on_error=on_error,
                resume=resume,
                progress=progress,
            )
    except KeyboardInterrupt:
        warn(f"what is done is in {out}; go on with --resume")
        raise
    for row in report.rows:
        if row["status"] != "done":
            warn(f"{row['status']}: {row['cell']}: {row['error']}")
    for row in report.set_aside:
        warn(f"set aside: {row['error']}")
    if report.num_changed:
        warn(f"{report.num_changed} cells were solved again: their options or inputs have changed")
    best = best_cells(report)
    if json:
        summary = {
            "name": plan.name,
            "cells": len(plan.cells),
            "excluded": plan.num_excluded,
            "done": len(report.done),
            "set_aside": len(report.set_aside),
            "resumed": report.num_resumed,
            "results": str(out / RESULTS),
            "best": best,
            "rows": [*report.rows, *report.set_aside],
        }
        typer.echo(dump_json(summary))
    else:
        _print_summary(report, best, out / RESULTS)
    if not report.done:
        raise typer.Exit(_code([*report.set_aside, *report.rows]))


def _code(rows: list[dict[str, Any]]) -> int:
    """Return the exit code of a batch without any placement: that of its first cell."""
    codes = {"infeasible": 3, "no-placement": 4}
    return int(codes.get(rows[0]["status"], rows[0].get("exit_code", 1)))


def score(row: dict[str, Any]) -> float:
    """Return the objective that cells are compared by: on the windows held out where there are some."""
    held_out = row["held_out"]
    return float(row["objective"]["value"] if held_out is None else held_out["objective"])


def best_cells(report: BatchReport) -> list[dict[str, Any]]:
    """Return, for each trace and objective, the best cell on every topology, best topology first.

    ``cheapest`` marks the topology on which a token costs least: money where all have prices, else device
    seconds.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in report.done:
        group = groups.setdefault((row["trace"], row["objective"]["name"]), {})
        known = group.get(row["topology"])
        if known is None or score(row) < score(known):
            group[row["topology"]] = row
    best: list[dict[str, Any]] = []
    for (trace, objective), group in groups.items():
        rows = sorted(group.values(), key=score)
        cheapest = _cheapest(rows)
        best.append(
            {
                "trace": trace,
                "objective": objective,
                "unit": rows[0]["objective"]["unit"],
                "topologies": [_entry(row, row is cheapest) for row in rows],
            }
        )
    return best


def _cheapest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    for name in ("price_per_million_tokens", "device_seconds_per_million_tokens"):
        if all(row["cost"] is not None and row["cost"][name] is not None for row in rows):
            return min(rows, key=lambda row: float(row["cost"][name]))
    return None


def _entry(row: dict[str, Any], cheapest: bool) -> dict[str, Any]:
    held_out = row["held_out"] or {}
    return {
        "topology": row["topology"],
        "cell": row["cell"],
        "value": score(row),
        "fitted": row["objective"]["value"],
        "lower_bound": row["objective"]["lower_bound"],
        "gap": row["objective"]["gap"],
        **{f"vs_{name}": _change(score(row), held_out.get(name)) for name in ("contiguous", "eplb")},
        "cost": row["cost"],
        "cheapest": cheapest,
    }


def _change(value: float, other: float | None) -> float | None:
    return value / other - 1 if other else None


def _print_summary(report: BatchReport, best: list[dict[str, Any]], results: Path) -> None:
    import shutil
    import sys

    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    console = Console(width=width)
    for entry in best:
        console.print(_table(entry))
    counts = [f"{len(report.done)} cells solved"]
    if report.num_resumed:
        counts.append(f"{report.num_resumed} of them before")
    answers = Counter(row["status"] for row in report.rows)
    counts += [f"{answers[name]} {name}" for name in ("infeasible", "no-placement") if answers[name]]
    if report.set_aside:
        counts.append(f"{len(report.set_aside)} set aside")
    console.print(f"{', '.join(counts)}; rows in {results}", highlight=False, markup=False, soft_wrap=True)


def _table(entry: dict[str, Any]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{entry['trace']}: {entry['objective']}, best first"), title_justify="left")
    table.add_column("topology")
    names = (entry["unit"], "vs contiguous", "vs eplb", "gap", "device s / M tokens", "price / M tokens")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("options", overflow="fold")
    for index, row in enumerate(entry["topologies"]):
        cost = row["cost"] or {}
        cells = (
            row["topology"] + (" (cheapest)" if row["cheapest"] else ""),
            f"{row['value']:.6g}",
            _percent(row["vs_contiguous"]),
            _percent(row["vs_eplb"]),
            f"{row['gap']:.1%}",
            _figure(cost.get("device_seconds_per_million_tokens")),
            _figure(cost.get("price_per_million_tokens")),
            row["cell"].partition(f"/{row['topology']}/")[2].replace(",", " ") or "-",
        )
        table.add_row(*(escape(cell) for cell in cells), style="bold" if index == 0 else None)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
