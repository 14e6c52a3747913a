"""Quality on windows that no solver has seen: fit on every other window, score on the windows between.

Run ``python -m benchmarks.quality [--quick]``; writes ``benchmarks/results/quality.md`` and appends to
``quality.jsonl``. Every figure is a ratio to the greedy placement (longest first, equal counts) on the same
held-out windows, so that it means the same on every trace:

- cost: linear step cost, 1 per token-expert pair and 4 per distinct token on the fullest device;
- excess: mean over windows of fullest / mean device load, less its floor (the hottest expert alone);
- fanout: distinct devices per token, at a load limit of 1.05 for each layer's summed load.

Both splits are run (fit even, score odd; and the reverse): their difference is the noise of a figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import RESULTS, data_folder, environment
from placement import (
    CostModel,
    InfeasibleError,
    LinearCalibration,
    PlacementProblem,
    make_problem,
    optimize,
    parse_topology,
)
from placement.cost import CostBreakdown
from placement.profile import RoutingProfile
from traces.readers import read_trace
from traces.statistics import build_profile
from traces.synthesize import synthesize

__all__ = ["main"]

SEED = 0
SAMPLES = Path(__file__).parents[1] / "placement" / "samples" / "traces"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One trace on one cluster."""

    name: str
    profile: RoutingProfile
    window: int
    topology: str = "h100:1x8"


def instances() -> Iterator[Instance]:
    """Yield the bundled trace, a seeded synthetic one, and real ones where they are at hand."""
    byte16 = read_trace(SAMPLES / "byte16.npz")
    profile = build_profile(byte16, window_tokens=4096)
    yield Instance(name="byte16", profile=profile, window=4096, topology="h100:1x4")
    # Two experts on each device: the load limit of 1.05 cannot be kept there.
    yield Instance(name="byte16", profile=profile, window=4096)
    synthetic = synthesize(num_tokens=131_072, num_layers=4, num_experts=64, top_k=6, seed=SEED)
    yield Instance(name="synthetic64", profile=build_profile(synthetic, window_tokens=4096), window=4096)
    for name, window in (("gptoss20b_a", 2048), ("olmoe64", 4096)):
        file = data_folder() / "traces" / f"{name}.npz"
        if file.exists():
            trace = read_trace(file)
            yield Instance(name=name, profile=build_profile(trace, window_tokens=window), window=window)


def _problem(
    instance: Instance, profile: RoutingProfile, objective: str, spare_slots: int
) -> PlacementProblem:
    return make_problem(
        profile,
        parse_topology(instance.topology),
        calibration=LinearCalibration(pair_cost=1.0, token_cost=4.0),
        objective=objective,
        spare_slots=spare_slots,
    )


def _figure(objective: str, held_out: CostBreakdown) -> float:
    metrics = held_out.metrics
    if objective == "balance":
        return metrics.balance - metrics.balance_floor
    return held_out.objective


def measure(instance: Instance, *, objective: str, reverse: bool, spare_slots: int = 0) -> dict[str, object]:
    """Fit on half of the windows with the baselines and ``auto``, score on the other half."""
    even, odd = instance.profile.split_alternate()
    fit, held = (odd, even) if reverse else (even, odd)
    problem = _problem(instance, fit, objective, spare_slots)
    scorer = CostModel(problem.with_profile(held))
    baseline = "eplb" if spare_slots else "greedy"
    # The baselines know no load limit: they are solved for balance and scored on the objective.
    reference = optimize(_problem(instance, fit, "balance", spare_slots), solver=baseline)
    contiguous = optimize(_problem(instance, fit, "balance", spare_slots), solver="contiguous")
    case: dict[str, object] = {
        "instance": instance.name,
        "window": instance.window,
        "topology": instance.topology,
        "spare_slots": spare_slots,
        "objective": objective,
        "fit": "odd" if reverse else "even",
    }
    began_s = time.perf_counter()
    try:
        solution = optimize(problem, seed=SEED)
    except InfeasibleError as exc:
        return {**case, "infeasible": str(exc)}
    elapsed_s = time.perf_counter() - began_s
    base = _figure(objective, scorer.evaluate(reference.placement))
    held_out = scorer.evaluate(solution.placement)
    return {
        **case,
        "baseline": baseline,
        "ratio": _figure(objective, held_out) / base,
        "contiguous_ratio": _figure(objective, scorer.evaluate(contiguous.placement)) / base,
        "held_out": held_out.objective,
        "fitted": solution.objective,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "mean_load_imbalance": held_out.metrics.mean_traffic_balance,
        "seconds": elapsed_s,
        "windows": [fit.num_windows, held.num_windows],
    }


def _row(row: dict[str, object]) -> str:
    what = (
        f"| {row['instance']} | {row['topology']} | {row['window']} | {row['spare_slots']} "
        f"| {NAMES[str(row['objective'])]} | {row['fit']} "
    )
    if "infeasible" in row:
        return f"{what}| infeasible | | | |"
    return (
        f"{what}| **{row['ratio']:.4f}** | {row['contiguous_ratio']:.4f} | {row['gap']:.1%} "
        f"| {row['seconds']:.1f} |"
    )


NAMES = {"step-time": "linear cost", "balance": "balance excess", "traffic": "fanout"}


def _table(rows: list[dict[str, object]], where: dict[str, str]) -> str:
    lines = [
        "# Quality on held-out windows",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread, default effort. Made by `python -m benchmarks.quality`.",
        "",
        "Ratios to the baseline on the same held-out windows (below 1 is better). The baseline is greedy",
        "(longest first, equal counts) without spare slots and DeepSeek's EPLB with them. Gap: certified",
        "on the fitted windows.",
        "",
        "| trace | cluster | window | spare | figure | fit | ours | contiguous | gap | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all instances and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one split, no spare slots")
    parser.add_argument("--only", help="one instance's name")
    arguments = parser.parse_args()
    rows, where = [], environment()
    for instance in instances():
        if arguments.only not in (None, instance.name):
            continue
        for objective in NAMES:
            for reverse in (False,) if arguments.quick else (False, True):
                rows.append(measure(instance, objective=objective, reverse=reverse))
                print(_table(rows, where).splitlines()[-1], flush=True)
        if not arguments.quick:
            for objective in ("step-time", "balance"):
                rows.append(measure(instance, objective=objective, reverse=False, spare_slots=8))
                print(_table(rows, where).splitlines()[-1], flush=True)
    if arguments.only is None and not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "quality.md").write_text(_table(rows, where), encoding="utf-8")
        with (RESULTS / "quality.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
