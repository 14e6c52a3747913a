"""Optical circuits: ours against MixNet's greedy, and placement and circuits together.

Run ``python -m benchmarks.planning.fabric [--only PART]``; writes ``benchmarks/results/plan-fabric.md``.
Parts:

- draws: 30 log-normal demands per skew and size, 6 optical and 2 packet ports per server;
- dollars: performance per dollar with the iteration times that MixNet's project page publishes;
- joint: placement and circuits together against one after the other, on held-out windows of real routing;

"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.environment import RESULTS, data_folder, environment
from placement import make_problem, parse_topology
from placement.model import ModelShape
from placement.planning.fabric import (
    PRICES,
    Effort,
    FabricKind,
    FabricRegion,
    OpticalSwitch,
    PlacedTraffic,
    allocate_circuits,
    fabric_cost,
    paired_demand,
    plan_fabric,
    synthetic_demand,
)
from placement.planning.fabric.statics import fat_tree_time
from traces.readers import read_trace
from traces.statistics import build_profile

__all__ = ["main"]

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = REPOSITORY / "tests" / "planning" / "fabric" / "mixnet_iteration_times.csv"
SAMPLES = REPOSITORY / "placement" / "samples" / "traces"

DRAWS = 30
SKEWS = (0.3, 0.6, 1.0)
NODES = 500
ROUNDING = 1e-12
SAMPLED_TOKENS, BATCH_TOKENS, LAYERS = 4096, 65536, 4
METHODS = ("published", "published code", "published, split", "balanced", "search")

# Name, tokens per window, topology, width of a token and inner width of an expert.
TRACES = (
    ("byte16", 16384, "h100:8x2", 4096, 2048),
    ("gptoss20b_a", 4096, "h100:8x1", 2880, 2880),
    ("olmoe64", 8192, "h100:8x1", 2048, 1024),
)


def draws() -> Iterator[str]:
    """Yield the table of synthetic demands: times to that of a fat-tree that never blocks."""
    yield "## Synthetic demand"
    yield ""
    yield f"{DRAWS} draws (seeds 0 to {DRAWS - 1}), paired, 6 + 2 ports; all-to-all time / fat-tree that"
    yield "never blocks: mean (worst). The first two columns are MixNet's own, which split no pair's bytes."
    yield ""
    yield (
        "| servers | skew | Alg. 1 | its code | Alg. 1, split | D/(C+1), split | search | plan | gap "
        "| CPU s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for servers in (8, 16):
        for skew in SKEWS:
            yield _draw_row(servers, skew)


def _draw_row(servers: int, skew: float) -> str:
    region = FabricRegion(num_servers=servers)
    ratios, gaps, began_s = [], [], time.process_time()
    for seed in range(DRAWS):
        demand = paired_demand(synthetic_demand(servers, skew=skew, seed=seed)[0])
        answer = allocate_circuits(demand, region, effort=Effort(nodes=NODES))
        if answer.time_s > min(answer.time_of_method_s.values()) * (1 + ROUNDING):
            raise RuntimeError(f"a method beats the plan on {servers} servers, skew {skew}, seed {seed}")
        times = [*(answer.time_of_method_s[name] for name in METHODS), answer.time_s]
        ratios.append(np.array(times) / fat_tree_time(demand, region))
        gaps.append(answer.gap)
    cells = " | ".join(
        f"{mean:.3f} ({worst:.3f})"
        for mean, worst in zip(np.mean(ratios, axis=0), np.max(ratios, axis=0), strict=True)
    )
    seconds = (time.process_time() - began_s) / DRAWS
    return f"| {servers} | {skew} | {cells} | {100 * max(gaps):.4f} % | {seconds:.2f} |"


def dollars() -> Iterator[str]:
    """Yield performance per dollar against a fat-tree, with published iteration times."""
    yield "## Performance per dollar, published iteration times"
    yield ""
    yield "128 servers; fat-tree / MixNet of time x price; packet ports of MixNet billed."
    yield ""
    yield "| Gb/s | cost ratio | against fat-tree | against rail-optimised |"
    yield "|---|---|---|---|"
    switch = OpticalSwitch(name="several", ports=1024, reconfiguration_s=25e-3)
    region = FabricRegion(num_servers=128, switch=switch)
    with PUBLISHED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for generation, prices in PRICES.items():
        ratio = fabric_cost(FabricKind.FAT_TREE, region, prices) / fabric_cost(
            FabricKind.MIXNET, region, prices
        )
        kept = [row for row in rows if float(row["Bandwidth"]) == generation]
        spans = [
            sorted(float(row[tree]) / float(row["mixnet"]) * ratio for row in kept)
            for tree in ("fattree", "rail-optimized")
        ]
        cells = " | ".join(f"{span[0]:.2f} to {span[-1]:.2f}" for span in spans)
        yield f"| {generation} | {ratio:.2f} | {cells} |"


def joint() -> Iterator[str]:
    """Yield placement and circuits together against one after the other, and the predictions."""
    yield "## Placement and circuits together"
    yield ""
    yield f"First {LAYERS} MoE layers, 8 servers at 100 Gb/s, 6 + 2 ports, training, {BATCH_TOKENS} tokens"
    yield f"per all-to-all, {SAMPLED_TOKENS} tokens sampled; even windows fitted, odd ones held out."
    yield "Milliseconds of all-to-alls and fullest devices of a step; homes dealt in contiguous blocks."
    yield ""
    yield (
        "| trace | windows | together | best apart | contiguous | held out: together | best apart | change "
        "| wrong share: transition | last window | mean | CPU s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, window, topology, hidden, inner in TRACES:
        folder = SAMPLES if name == "byte16" else data_folder() / "traces"
        if (folder / f"{name}.npz").exists():
            yield _joint_row(folder / f"{name}.npz", window, topology, hidden, inner)


def _joint_row(file: Path, window: int, topology: str, hidden: int, inner: int) -> str:
    whole = build_profile(read_trace(file), window_tokens=window, max_sampled_tokens=SAMPLED_TOKENS)
    assert whole.experts_TLK is not None
    profile = replace(whole, load_WLE=whole.load_WLE[:, :LAYERS], experts_TLK=whole.experts_TLK[:, :LAYERS])
    model = ModelShape(
        name=file.stem,
        num_layers=LAYERS,
        num_experts=profile.num_experts,
        top_k=profile.top_k,
        hidden_size=hidden,
        expert_hidden_size=inner,
    )
    problem = make_problem(profile, parse_topology(topology), model=model)
    region = FabricRegion(num_servers=problem.topology.num_nodes, link_gbits=100.0)
    traffic = PlacedTraffic(problem=problem, batch_tokens=BATCH_TOKENS, placement_work_s=2.0)
    began_s = time.process_time()
    plan = plan_fabric(region, traffic=traffic, effort=Effort(nodes=NODES))
    seconds = time.process_time() - began_s
    placed, prediction = plan.placement, plan.prediction
    assert placed is not None
    assert prediction is not None
    best = placed.best_separate
    held_out = placed.separate_held_out_s[best]
    times = (
        placed.time_s,
        placed.separate_s[best],
        placed.separate_s["contiguous"],
        placed.held_out_s,
        held_out,
    )
    cells = " | ".join(f"{1e3 * value:.2f}" for value in times)
    wrong = " | ".join(f"{100 * error:.1f} %" for error in prediction.error.values())
    change = 100 * (placed.held_out_s / held_out - 1)
    return f"| {file.stem} | {profile.num_windows} | {cells} | {change:+.1f} % | {wrong} | {seconds:.0f} |"


PARTS = {"draws": draws, "dollars": dollars, "joint": joint}


def main() -> None:
    """Run all parts and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    where = environment()
    lines = [
        "# Fabric planning",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numpy {where['numpy']}; "
        f"one thread, at most {NODES} nodes per program, no time limit. Made by "
        "`python -m benchmarks.planning.fabric`.",
        "",
    ]
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            for line in part():
                lines.append(line)
                print(line, flush=True)
            lines.append("")
    if arguments.only is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "plan-fabric.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
