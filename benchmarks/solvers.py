"""Every solver on named instances: how good, how far proved, how soon near the best.

Run ``python -m benchmarks.solvers [--only NAME] [--solver NAME] [--limit SECONDS]``; writes
``benchmarks/results/solvers.md`` and appends to ``solvers.jsonl``. Solvers are fitted on the even windows and
scored on the odd ones where an instance has several; *best* is the best fitted objective of all solvers in
the table, and the times are those after which a solver was within 5 % and 1 % of it. Solvers that refuse an
instance or fail stay in the table with the reason.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, data_folder, environment
from placement import (
    CostModel,
    Deadline,
    LinearCalibration,
    PlacementError,
    PlacementProblem,
    RoutingProfile,
    make_problem,
    optimize,
    parse_topology,
)
from placement.solvers.registry import solver_names
from traces.readers import read_trace
from traces.statistics import build_profile
from traces.synthesize import synthesize

__all__ = ["main"]

SEED = 0
LIMIT_S = 60.0
SAMPLES = Path(__file__).parents[1] / "placement" / "samples" / "traces"
LINEAR = LinearCalibration(pair_cost=1.0, token_cost=4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One problem, all of its windows."""

    name: str
    what: str
    make: Callable[[], PlacementProblem]


def _token_problem(file: Path, window: int, topology: str, **options: Any) -> PlacementProblem:
    profile = build_profile(read_trace(file), window_tokens=window)
    return make_problem(profile, parse_topology(topology), calibration=LINEAR, **options)


def _synthetic(
    layers: int, experts: int, top_k: int, devices: int, *, tokens: int, window: int, **options: Any
) -> PlacementProblem:
    trace = synthesize(num_tokens=tokens, num_layers=layers, num_experts=experts, top_k=top_k, seed=SEED)
    profile = build_profile(trace, window_tokens=window, max_sampled_tokens=65_536)
    return make_problem(profile, parse_topology(f"h100:1x{devices}"), calibration=LINEAR, **options)


def counts_problem(
    count_LE: np.ndarray, devices: int, spare_slots: int, *, top_k: int = 8
) -> PlacementProblem:
    """Return the balance problem of one window of expert counts."""
    tokens = np.array([count_LE.sum(axis=1).max() / top_k])
    profile = RoutingProfile(load_WLE=count_LE[None], window_tokens_W=tokens, top_k=top_k)
    return make_problem(
        profile, parse_topology(f"h100:{devices // 8}x8"), objective="balance", spare_slots=spare_slots
    )


def _zipf_counts(layers: int, experts: int, devices: int, spare_slots: int) -> PlacementProblem:
    rng = np.random.default_rng(SEED)
    share_E = 1.0 / np.arange(1, experts + 1) ** 0.5
    count_LE = np.stack([rng.permutation(share_E) * rng.lognormal(0, 0.3, experts) for _ in range(layers)])
    return counts_problem(np.round(1e6 * count_LE), devices, spare_slots)


def _deepseek(file: Path) -> PlacementProblem:
    count_LE = np.array(json.loads(file.read_text())["logical_count"], dtype=np.float64)
    return counts_problem(count_LE[count_LE.sum(axis=1) > 0], 32, 32)


def instances() -> Iterator[Instance]:
    """Yield the named instances; real ones where they are at hand."""
    byte16 = SAMPLES / "byte16.npz"
    for name, options in {
        "byte16-4": {},
        "byte16-4-balance": {"objective": "balance"},
        "byte16-4-fanout": {"objective": "traffic"},
        "byte16-4-hops": {"objective": "traffic", "semantics": "stay-put"},
    }.items():
        yield Instance(
            name=name,
            what="6 layers x 16 experts, 4 GPUs",
            make=partial(_token_problem, byte16, 4096, "h100:1x4", **options),
        )
    mixtral = partial(_synthetic, 32, 8, 2, 4, tokens=65_536, window=4096)
    yield Instance(name="mixtral-4", what="synthetic, 32 layers x 8 experts, 4 GPUs", make=mixtral)
    yield Instance(
        name="mixtral-4-step-stay-put",
        what="the same, stay-put",
        make=partial(mixtral, semantics="stay-put"),
    )
    yield Instance(
        name="synthetic64-8",
        what="synthetic, 4 layers x 64 experts, 8 GPUs",
        make=partial(_synthetic, 4, 64, 6, 8, tokens=131_072, window=4096),
    )
    yield Instance(
        name="zipf384-64-balance",
        what="synthetic counts, 61 layers x 384 experts, 448 slots, 64 GPUs",
        make=partial(_zipf_counts, 61, 384, 64, 64),
    )
    yield Instance(
        name="zipf384-512-balance",
        what="synthetic counts, 61 layers x 384 experts, 1024 slots, 512 GPUs",
        make=partial(_zipf_counts, 61, 384, 512, 640),
    )
    for name, window in (("gptoss20b_a", 2048), ("olmoe64", 4096)):
        file = data_folder() / "traces" / f"{name}.npz"
        if file.exists():
            yield Instance(
                name=f"{name}-8",
                what=f"real, window {window}, 8 GPUs",
                make=partial(_token_problem, file, window, "h100:1x8"),
            )
            yield Instance(
                name=f"{name}-4-hops",
                what="the same, stay-put hops, 4 GPUs",
                make=partial(
                    _token_problem, file, window, "h100:1x4", semantics="stay-put", objective="traffic"
                ),
            )
    counts = sorted((data_folder() / "traces" / "deepseek_v3_counts").glob("*.json"))
    if counts:
        yield Instance(
            name="deepseek-v3-32-balance",
            what=f"real counts ({counts[0].stem}), 58 layers x 256 experts, 288 slots, 32 GPUs",
            make=partial(_deepseek, counts[0]),
        )


def measure(problem: PlacementProblem, solver: str, *, limit_s: float) -> dict[str, Any]:
    """Solve the even windows (or all of one) and score the odd ones."""
    fit, held = problem, None
    if problem.profile.num_windows > 1:
        even, odd = problem.profile.split_alternate()
        fit, held = problem.with_profile(even), problem.with_profile(odd)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    try:
        solution = optimize(fit, solver=solver, seed=SEED, stop=Deadline(limit_s))
    except PlacementError as exc:
        return {"solver": solver, "refused": str(exc), "seconds": time.perf_counter() - began_s}
    return {
        "solver": solver,
        "fitted": solution.objective,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "held_out": None if held is None else CostModel(held).objective(solution.placement),
        "termination": str(solution.termination),
        "by": solution.solver,
        "seconds": time.perf_counter() - began_s,
        "cpu_seconds": time.process_time() - began_cpu_s,
        "incumbents": [(i.elapsed_s, i.objective) for i in solution.incumbents],
    }


def _time_within(row: dict[str, Any], best: float, share: float) -> str:
    for elapsed_s, objective in row["incumbents"]:
        if objective <= best * (1 + share):
            return f"{elapsed_s:.1f}"
    return "-"


def _rows(instance: str, rows: list[dict[str, Any]]) -> list[str]:
    solved = [row for row in rows if "fitted" in row]
    best = min(row["fitted"] for row in solved)
    bound = max(row["lower_bound"] for row in solved)
    lines = []
    for row in rows:
        if "refused" in row:
            lines.append(f"| {instance} | {row['solver']} | {row['refused'][:90]} | | | | | | | |")
            continue
        held = "" if row["held_out"] is None else f"{row['held_out']:.6g}"
        gap = max(0.0, 1 - bound / row["fitted"]) if row["fitted"] else 0.0
        lines.append(
            f"| {instance} | {row['solver']} | {row['fitted']:.6g} | {row['fitted'] / best - 1:.2%} "
            f"| {row['gap']:.2%} | {gap:.2%} | {held} | {row['seconds']:.1f} "
            f"| {_time_within(row, best, 0.05)} | {_time_within(row, best, 0.01)} |"
        )
    return lines


def _table(results: dict[str, list[dict[str, Any]]], what: dict[str, str], where: dict[str, str]) -> str:
    lines = [
        "# All solvers on named instances",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread, default effort. Made by `python -m benchmarks.solvers`.",
        "",
        "Fitted on even windows. *Above best*: against the best fitted objective of the instance. *Own gap*:",
        "what the solve itself proved. *Gap*: against the best bound of all solves. *Held out*: on the odd",
        "windows. Last columns: seconds until within 5 % and 1 % of the best (- never).",
        "",
    ]
    lines += [f"- **{name}**: {text}" for name, text in what.items() if name in results]
    lines += [
        "",
        "| instance | solver | fitted | above best | own gap | gap | held out | seconds | to 5 % | to 1 % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        lines += _rows(name, rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all solvers on all instances and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="one instance's name")
    parser.add_argument("--solver", help="one solver's name")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each solve")
    arguments = parser.parse_args()
    where, results, what = environment(), {}, {}
    for instance in instances():
        if arguments.only not in (None, instance.name):
            continue
        problem = instance.make()
        what[instance.name] = instance.what
        rows = results.setdefault(instance.name, [])
        for solver in ("auto", *solver_names()):
            if arguments.solver in (None, solver):
                rows.append(measure(problem, solver, limit_s=arguments.limit))
                print(instance.name, {k: v for k, v in rows[-1].items() if k != "incumbents"}, flush=True)
    if arguments.only is None and arguments.solver is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "solvers.md").write_text(_table(results, what, where), encoding="utf-8")
        with (RESULTS / "solvers.jsonl").open("a", encoding="utf-8") as stream:
            for name, rows in results.items():
                stream.writelines(json.dumps({**where, "instance": name, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
