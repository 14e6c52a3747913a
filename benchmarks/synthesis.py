"""Synthetic traces against the real ones they imitate: how alike they are, and how policies fare on them.

Run ``python -m benchmarks.synthesis [--quick]``; writes ``benchmarks/results/synthesis.md`` and appends to
``synthesis.jsonl``. Every trace is cut into alternate windows: one half is imitated, the other is held out.
Imitated by

- real: the half itself, which shows the noise between two halves of a trace;
- fitted: a router fitted to its statistics (loads by window, co-activation, transitions; no token is kept);
- loads alone: a router fitted to its loads by window;
- knobs: `synthesize` at default strengths with the half's mean popularity.

Alike means: total variation distance to the held-out half of loads, of pairs selected together and of
transitions, mean over layers, and the mean total variation of a window's loads from their mean, over that of
the held-out half. To fare alike means: placements are solved for the imitation; `own` is their gain over
contiguous on another draw of it, which is what a user of the synthetic trace sees; `real` is their gain on
the held-out half.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import RESULTS, data_folder, environment
from placement import CostModel, LinearCalibration, PlacementProblem, make_problem, optimize, parse_topology
from traces.counts import ExpertCounts
from traces.readers import read_trace
from traces.source import MemorySource, read_all
from traces.statistics import build_profile
from traces.synthesize import fit_routing, synthesize
from traces.synthesize.moments import Moments
from traces.trace import Trace

__all__ = ["main"]

SEED = 0
SAMPLES = Path(__file__).parents[1] / "placement" / "samples" / "traces"
TOPOLOGY = "h100:1x4"
MAX_IMBALANCE = 1.1
OBJECTIVES = {"step-time": ("eplb", "auto"), "traffic": ("auto",)}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitation:
    """Something to solve a placement for, and what its user would score it on."""

    name: str
    fitted: Trace
    other: Trace
    seconds: float


def instances(*, quick: bool) -> Iterator[tuple[str, Trace, int]]:
    """Yield name, trace and window."""
    yield "byte16", read_trace(SAMPLES / "byte16.npz"), 4096
    for name, window in () if quick else (("gptoss20b_a", 2048), ("olmoe64", 4096)):
        file = data_folder() / "traces" / f"{name}.npz"
        if file.exists():
            yield name, read_trace(file), window


def imitations(half: Trace, held: Trace, window: int) -> Iterator[Imitation]:
    """Yield the half itself and what imitates it."""
    yield Imitation(name="real", fitted=half, other=held, seconds=0.0)
    profile = build_profile(half, window_tokens=window)
    counts = ExpertCounts(
        load_WLE=profile.load_WLE.astype(np.int64),
        top_k=half.top_k,
        model_name=half.model_name,
        moe_layer_ids=half.moe_layer_ids,
    )
    for name, traffic in (("fitted", MemorySource(half)), ("loads alone", counts)):
        began_s = time.process_time()
        router = fit_routing(Moments.of(traffic, window_tokens=window))
        seconds = time.process_time() - began_s
        draws = [read_all(router.source(half.num_tokens, seed=SEED + draw)) for draw in (1, 2)]
        yield Imitation(name=name, fitted=draws[0], other=draws[1], seconds=seconds)
    mean_LE = profile.load_WLE.sum(axis=0)
    made = [
        synthesize(
            num_tokens=half.num_tokens,
            num_layers=half.num_layers,
            num_experts=half.num_experts,
            top_k=half.top_k,
            popularity_LE=mean_LE,
            seed=SEED,
        )
    ]
    even, odd = made[0].split_alternate(window) if made[0].num_tokens >= 2 * window else (made[0], made[0])
    yield Imitation(name="knobs", fitted=even, other=odd, seconds=0.0)


def distances(one: Trace, held: Trace, window: int) -> Row:
    """Return how far two traces' moments are apart."""
    mine, theirs = (Moments.of(MemorySource(trace), window_tokens=window) for trace in (one, held))

    def apart(p: Any, q: Any) -> float:
        each = [0.5 * np.abs(a / a.sum() - b / b.sum()).sum() for a, b in zip(p, q, strict=True)]
        return float(np.mean(each))

    def spread(moments: Moments) -> float:
        share_WLE = moments.share_WLE
        deviation = np.abs(share_WLE - share_WLE.mean(axis=0)).sum(axis=2)
        return float(deviation.mean() / 2 / moments.header.top_k)

    return {
        "loads": apart(mine.share_WLE.mean(axis=0), theirs.share_WLE.mean(axis=0)),
        "pairs": apart(mine.pair_LEE, theirs.pair_LEE),
        "transitions": apart(mine.next_LEE, theirs.next_LEE),
        "spread": spread(mine) / spread(theirs),
    }


def _problem(trace: Trace, window: int, objective: str) -> PlacementProblem:
    return make_problem(
        build_profile(trace, window_tokens=window),
        parse_topology(TOPOLOGY),
        calibration=LinearCalibration(pair_cost=1.0, token_cost=4.0),
        objective=objective,
        max_imbalance=MAX_IMBALANCE,
    )


def gains(imitation: Imitation, held: Trace, window: int) -> Iterator[Row]:
    """Yield each policy's gain over contiguous, on the imitation's other draw and on real windows."""
    for objective, policies in OBJECTIVES.items():
        problem = _problem(imitation.fitted, window, objective)
        scorers = {
            "own": CostModel(_problem(imitation.other, window, objective)),
            "real": CostModel(_problem(held, window, objective)),
        }
        plain = _problem(imitation.fitted, window, "balance")
        contiguous = optimize(plain, solver="contiguous").placement
        base = {on: scorer.evaluate(contiguous).objective for on, scorer in scorers.items()}
        for policy in policies:
            chosen = problem if policy == "auto" else plain
            placement = optimize(chosen, solver=policy, seed=SEED).placement
            gain = {on: 1 - scorer.evaluate(placement).objective / base[on] for on, scorer in scorers.items()}
            yield {"policy": f"{policy}, {objective}", **gain}


def measure(name: str, trace: Trace, window: int) -> Iterator[tuple[Row, list[Row]]]:
    """Yield distances and gains of every imitation of one half of a trace."""
    half, held = trace.split_alternate(window)
    for imitation in imitations(half, held, window):
        case = {"trace": name, "window": window, "imitation": imitation.name, "fit_s": imitation.seconds}
        rows = [{**case, **row} for row in gains(imitation, held, window)]
        yield {**case, **distances(imitation.fitted, held, window)}, rows


def _table(distance_rows: list[Row], gain_rows: list[Row], where: dict[str, str]) -> str:
    lines = [
        "# Synthetic traces fitted to real ones",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread. Made by `python -m benchmarks.synthesis`.",
        "",
        "Total variation distance to the held-out half, mean over layers; the row `real` is the noise",
        "between the two halves. Spread: a window's loads around their mean, over the held-out half's.",
        "",
        "| trace | window | imitation | loads | pairs | transitions | spread | CPU s to fit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['trace']} | {r['window']} | {r['imitation']} | {r['loads']:.4f} | {r['pairs']:.4f} "
        f"| {r['transitions']:.4f} | {r['spread']:.3f} | {r['fit_s']:.1f} |"
        for r in distance_rows
    ]
    lines += [
        "",
        f"Gain over contiguous on {TOPOLOGY} (linear cost, 1 per pair and 4 per distinct token on the",
        "fullest device; traffic: fanout, loads within 1.1). Solved for the imitation; scored on another",
        "draw of it (own), and on the real held-out half (real).",
        "",
        "| trace | policy | imitation | own | real |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['trace']} | {r['policy']} | {r['imitation']} | {r['own']:.2%} | {r['real']:.2%} |"
        for r in gain_rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all instances and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the bundled trace alone; writes nothing")
    arguments = parser.parse_args()
    where = environment()
    distance_rows: list[Row] = []
    gain_rows: list[Row] = []
    for name, trace, window in instances(quick=arguments.quick):
        for distance_row, rows in measure(name, trace, window):
            distance_rows.append(distance_row)
            gain_rows += rows
            print(json.dumps(distance_row), *map(json.dumps, rows), sep="\n", flush=True)
    gain_rows.sort(key=lambda row: (row["trace"], row["policy"]))
    print(_table(distance_rows, gain_rows, where))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "synthesis.md").write_text(_table(distance_rows, gain_rows, where), encoding="utf-8")
        with (RESULTS / "synthesis.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **row}) + "\n" for row in [*distance_rows, *gain_rows])


if __name__ == "__main__":
    main()
