"""How much of a full re-solve's gain a tenth of its moves buys, once traffic has drifted.

Run ``python -m benchmarks.migration [--quick] [--every N]``; writes ``benchmarks/results/migration.md`` and
appends to ``migration.jsonl``. Every case starts from a placement fitted to traffic before a drift:

- counts: DeepSeek-V3 expert counts of eight workloads, 288 slots on 32 devices, balance of each layer's
  counts, from EPLB's placement. Drifts: 15 % of the load mass handed to experts at random (``reassigned``),
  every expert's load times a log-normal factor of deviation 0.15 (``log-normal``), or the counts of the next
  workload (``workload``, which is real);
- traces: linear step cost, 1 per token-expert pair and 4 per distinct token on the fullest device, from
  what ``auto`` fitted to the first half of the trace (``half``) or of its domains (``domains``). Traffic is
  the rest: fitted on its even windows, scored on its odd ones.

The re-solve is from scratch: EPLB for counts, which is within a percent of even there, ``auto`` for traces.
Its moves are counted after exchanging alike devices to save moves, which is the harder measure; before that
they are more. The share is of the re-solve's gain, on the scored windows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.environment import RESULTS, data_folder, environment
from placement import (
    CostModel,
    LinearCalibration,
    Placement,
    PlacementProblem,
    diff,
    make_problem,
    optimize,
    parse_topology,
)
from placement.change.budget import best_within, make_ways
from placement.change.relabel import fewest_moves
from placement.profile import RoutingProfile
from traces.readers import read_trace
from traces.statistics import build_profile
from traces.trace import Trace

__all__ = ["main"]

SEED = 0
SAMPLES = Path(__file__).parents[1] / "placement" / "samples" / "traces"

DRIFT = 0.15
SHARES = (0.05, 0.1, 0.2)
"""Budgets, as shares of the re-solve's moves."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A drift: the placement fitted before it, traffic to fit to after it, and traffic to score on."""

    name: str
    drift: str
    start: Placement
    problem: PlacementProblem
    scored: PlacementProblem
    solver: str
    work_s: float


def reassigned(count_LE: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Hand 15 % of every layer's load to its experts at random, in the proportions that others had."""
    shuffled = np.stack([row_E[rng.permutation(row_E.size)] for row_E in count_LE])
    return np.asarray((1 - DRIFT) * count_LE + DRIFT * shuffled)


def lognormal(count_LE: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Multiply every expert's load by a factor of deviation 0.15."""
    return np.asarray(count_LE * np.exp(DRIFT * rng.standard_normal(count_LE.shape)))


def _counts_profile(count_LE: FloatArray, *, top_k: int = 8) -> RoutingProfile:
    tokens = np.array([count_LE[0].sum() / top_k])
    return RoutingProfile(load_WLE=count_LE[None], window_tokens_W=tokens, top_k=top_k)


def _balance_problem(count_LE: FloatArray) -> PlacementProblem:
    return make_problem(
        _counts_profile(count_LE), parse_topology("h100:4x8"), objective="balance", spare_slots=32
    )


def counts_cases(every: int) -> Iterator[Case]:
    """Yield the drifts of every so many layers of DeepSeek-V3's counts, where they are at hand."""
    files = sorted((data_folder() / "traces" / "deepseek_v3_counts").glob("*.json"))
    counts = {}
    for file in files:
        count_LE = np.array(json.loads(file.read_text())["logical_count"], dtype=np.float64)
        counts[file.stem] = count_LE[count_LE.sum(axis=1) > 0][::every]
    names = list(counts)
    for index, name in enumerate(names):
        before = counts[name]
        rng = np.random.default_rng([SEED, index])
        after = {
            "reassigned": reassigned(before, rng),
            "log-normal": lognormal(before, rng),
            "workload": counts[names[(index + 1) % len(names)]],
        }
        start = optimize(_balance_problem(before), solver="eplb").placement
        for drift, count_LE in after.items():
            problem = _balance_problem(count_LE)
            yield Case(
                name=name,
                drift=drift,
                start=start,
                problem=problem,
                scored=problem,
                solver="eplb",
                work_s=0.6 * problem.num_layers,
            )


def _select(trace: Trace, keep_T: npt.NDArray[np.bool_]) -> Trace:
    columns = {}
    for name in ("experts_TLK", "sequence_T", "position_T", "rank_T", "domain_T"):
        values = getattr(trace, name)
        columns[name] = None if values is None else values[keep_T]
    return replace(trace, **columns)


def _linear_problem(trace: Trace, window: int, topology: str, spare_slots: int) -> PlacementProblem:
    return make_problem(
        build_profile(trace, window_tokens=window),
        parse_topology(topology),
        calibration=LinearCalibration(pair_cost=1.0, token_cost=4.0),
        spare_slots=spare_slots,
    )


def trace_cases() -> Iterator[Case]:
    """Yield the drifts of the bundled trace, and of real ones where they are at hand."""
    folder = data_folder() / "traces"
    for file, window, topology in (
        (SAMPLES / "byte16.npz", 2048, "h100:1x4"),
        (folder / "gptoss20b_a.npz", 1024, "h100:1x8"),
        (folder / "olmoe64.npz", 2048, "h100:1x8"),
    ):
        if not file.exists():
            continue
        trace = read_trace(file)
        halves = {"half": np.arange(trace.num_tokens) < trace.num_tokens // 2}
        if trace.domain_T is not None:
            halves["domains"] = trace.domain_T < len(trace.domain_names) // 2
        for drift, early_T in halves.items():
            if not early_T.any() or early_T.all():
                continue
            for spare_slots in (0, 8):
                early = _linear_problem(_select(trace, early_T), window, topology, spare_slots)
                late = _linear_problem(_select(trace, ~early_T), window, topology, spare_slots)
                fit, held = late.profile.split_alternate()
                yield Case(
                    name=f"{file.stem}, {spare_slots} spare",
                    drift=drift,
                    start=optimize(early, seed=SEED, work_s=8.0).placement,
                    problem=late.with_profile(fit),
                    scored=late.with_profile(held),
                    solver="auto",
                    work_s=8.0,
                )


def measure(case: Case) -> dict[str, object]:
    """Re-solve a case in full and within budgets."""
    scorer = CostModel(case.scored)
    base = scorer.objective(case.start)
    free = optimize(case.problem, solver=case.solver, seed=SEED, work_s=case.work_s)
    near = fewest_moves(case.problem, case.start, free.placement)
    raw_moves, moves = (len(diff(case.start, placement)) for placement in (free.placement, near))
    began_s = time.process_time()
    budgets = {share: int(share * moves) for share in SHARES}
    ways = make_ways(
        case.problem, case.start, most_moves=max(budgets.values()), seed=SEED, work_s=case.work_s
    )
    ways.search()
    ways.deepen(budgets[0.1])
    model = CostModel(case.problem)
    scored = {}
    for share, budget in budgets.items():
        found = best_within(model, case.start, [case.start, ways.within(budget)], budget)
        scored[share] = (scorer.objective(found), len(diff(case.start, found)))
    cpu_s = time.process_time() - began_s
    full = scorer.objective(free.placement)
    gain = base - full
    return {
        "case": case.name,
        "drift": case.drift,
        "start": base,
        "full": full,
        "full_solver": free.solver,
        "full_moves": raw_moves,
        "full_moves_relabelled": moves,
        "budgeted_cpu_s": cpu_s,
        "budgets": {
            str(share): {
                "moves": used,
                "value": value,
                "share_of_gain": (base - value) / gain if gain > 0 else None,
            }
            for share, (value, used) in scored.items()
        },
    }


def _row(row: dict[str, object], layers: int) -> str:
    budgets = row["budgets"]
    assert isinstance(budgets, dict)
    shares = " | ".join(
        "-" if cell["share_of_gain"] is None else f"{cell['share_of_gain']:.1%}" for cell in budgets.values()
    )
    middle = budgets["0.1"]
    return (
        f"| {row['case']} | {row['drift']} | {row['start']:.6g} | {row['full']:.6g} ({row['full_solver']}) "
        f"| {row['full_moves'] / layers:.1f} | {row['full_moves_relabelled'] / layers:.1f} "  # type: ignore[operator]
        f"| {middle['moves'] / layers:.1f} | {middle['value']:.6g} | {shares} | {row['budgeted_cpu_s']:.0f} |"
    )


HEADER = [
    "| case | drift | start | re-solve | moves | relabelled | within 10 % | value | gain at 5 % | "
    "**gain at 10 %** | gain at 20 % | CPU s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def _summary(rows: list[dict[str, object]]) -> str:
    shares = [
        float(row["budgets"]["0.1"]["share_of_gain"])  # type: ignore[index]
        for row in rows
        if row["budgets"]["0.1"]["share_of_gain"] is not None  # type: ignore[index]
    ]
    if not shares:
        return "No case."
    kept = sum(share >= 0.9 for share in shares)
    return (
        f"A tenth of the moves keeps at least 90 % of the re-solve's gain in {kept} of {len(shares)} cases; "
        f"least {min(shares):.1%}, median {np.median(shares):.1%}."
    )


def _table(rows: list[tuple[dict[str, object], int]], where: dict[str, str], every: int) -> str:
    lines = [
        "# Gain against moves after a drift",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread. Made by `python -m benchmarks.migration`.",
        "",
        "Moves are per layer. The re-solve is from scratch, by the solver in brackets; its moves are counted",
        "as they come and after exchanging alike devices (relabelled); budgets are shares of the latter. A",
        f"gain above 100 % beats the re-solve. Counts: one layer in {every}, at the effort of all.",
        "",
    ]
    for title, synthetic in (("Counts of DeepSeek-V3 (fitted)", True), ("Traces (held out)", False)):
        mine = [(row, layers) for row, layers in rows if (row["scored"] == "fitted") is synthetic]
        lines += [f"## {title}", "", _summary([row for row, _ in mine]), "", *HEADER]
        lines += [_row(row, layers) for row, layers in mine]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run all cases and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the bundled trace alone; nothing is written")
    parser.add_argument("--only", choices=("counts", "traces"), help="one kind of case; nothing is written")
    parser.add_argument("--every", type=int, default=1, help="take every N-th layer of the counts")
    arguments = parser.parse_args()
    rows, where = [], environment()
    for kind, cases in (("counts", partial(counts_cases, arguments.every)), ("traces", trace_cases)):
        if arguments.only not in (None, kind) or (arguments.quick and kind == "counts"):
            continue
        for case in cases():
            if arguments.quick and not case.name.startswith("byte16"):
                continue
            row = {**measure(case), "scored": "fitted" if case.scored is case.problem else "held out"}
            rows.append((row, case.problem.num_layers))
            print(_row(row, case.problem.num_layers), flush=True)
    if arguments.only is None and not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "migration.md").write_text(_table(rows, where, arguments.every), encoding="utf-8")
        with (RESULTS / "migration.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **row}) + "\n" for row, _ in rows)


if __name__ == "__main__":
    main()
