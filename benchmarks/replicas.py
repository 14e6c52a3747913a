"""Replicas under the split that an engine realises, on windows that no solver has seen.

Run ``python -m benchmarks.replicas [--only NAME]``; writes ``benchmarks/results/replicas.md`` and appends to
``replicas.jsonl``. Every placement has 8 spare slots on 8 devices, is fitted on every other window and scored
on the windows between, under the replica split of its row:

- eplb: DeepSeek's balancer on average loads;
- search: our search, which prices replicas as shared evenly;
- split: the same placement refined under the split itself.

The cost is linear, 1 per token-expert pair and 4 per distinct token on the fullest device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.environment import RESULTS, data_folder, environment
from placement import CostModel, LinearCalibration, make_problem, optimize, parse_topology
from placement.plan import Placement
from placement.problem import PlacementProblem, ReplicaSplit
from placement.profile import RoutingProfile
from traces.readers import read_trace
from traces.statistics import build_profile

__all__ = ["main"]

SEED = 0
SPARE_SLOTS = 8
SPLITS = (ReplicaSplit.EVEN, ReplicaSplit.HASH, ReplicaSplit.LP)
SAMPLES = Path(__file__).parents[1] / "placement" / "samples" / "traces"
WINDOWS = {"byte16": 4096, "gptoss20b_a": 2048, "olmoe64": 4096}


def profiles(only: str | None) -> Iterator[tuple[str, RoutingProfile]]:
    """Yield the bundled trace, and real ones where they are at hand."""
    for name, window in WINDOWS.items():
        folder = SAMPLES if name == "byte16" else data_folder() / "traces"
        file = folder / f"{name}.npz"
        if only in (None, name) and file.exists():
            yield name, build_profile(read_trace(file), window_tokens=window)


def _placements(even: PlacementProblem) -> dict[str, tuple[Placement, float]]:
    """What does not depend on the split: EPLB and the even search, with their seconds."""
    found = {}
    for solver in ("eplb", "search"):
        began_s = time.process_time()
        placement = optimize(even, solver=solver, seed=SEED).placement
        found[solver] = placement, time.process_time() - began_s
    return found


def measure(name: str, profile: RoutingProfile) -> Iterator[dict[str, object]]:
    """Score every placement of one trace under every split."""
    fit, held_out = profile.split_alternate()
    even = make_problem(
        fit,
        parse_topology("h100:1x8"),
        calibration=LinearCalibration(pair_cost=1.0, token_cost=4.0),
        spare_slots=SPARE_SLOTS,
    )
    placements = _placements(even)
    for split in SPLITS:
        problem = replace(even, replica_split=split)
        candidates = dict(placements)
        if split is not ReplicaSplit.EVEN:
            began_s = time.process_time()
            solution = optimize(problem, solver="split", start=placements["search"][0], seed=SEED)
            candidates["split"] = solution.placement, time.process_time() - began_s
        yield from _rows(name, problem, held_out, candidates)


def _rows(
    name: str,
    problem: PlacementProblem,
    held_out: RoutingProfile,
    candidates: dict[str, tuple[Placement, float]],
) -> Iterator[dict[str, object]]:
    scorer = CostModel(problem.with_profile(held_out))
    base = scorer.objective(candidates["eplb"][0])
    for policy, (placement, seconds) in candidates.items():
        breakdown = scorer.evaluate(placement)
        yield {
            "instance": name,
            "split": str(problem.replica_split),
            "policy": policy,
            "fitted": CostModel(problem).objective(placement),
            "held_out": breakdown.objective,
            "ratio": breakdown.objective / base,
            "balance": breakdown.metrics.balance,
            "fanout": breakdown.metrics.fanout,
            "cpu_seconds": seconds,
            "windows": [problem.profile.num_windows, held_out.num_windows],
        }


def _table(rows: list[dict[str, object]], where: dict[str, str]) -> str:
    lines = [
        "# Replicas under the engine's own split",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread, default effort. Made by `python -m benchmarks.replicas`.",
        "",
        f"{SPARE_SLOTS} spare slots on 8 devices; linear cost on held-out windows, and as a ratio to EPLB",
        "under the same split. `search` prices replicas as shared evenly; `split` refines its placement",
        "under the split of the row.",
        "",
        "| trace | split | policy | cost | ratio | balance | fanout | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['instance']} | {row['split']} | {row['policy']} | {row['held_out']:.0f} | "
        f"**{row['ratio']:.4f}** | {row['balance']:.3f} | {row['fanout']:.3f} | {row['cpu_seconds']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all instances and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="one instance's name")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    where = environment()
    for name, profile in profiles(arguments.only):
        for row in measure(name, profile):
            rows.append(row)
            print(_table(rows, where).splitlines()[-1], flush=True)
    if arguments.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "replicas.md").write_text(_table(rows, where), encoding="utf-8")
        with (RESULTS / "replicas.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
