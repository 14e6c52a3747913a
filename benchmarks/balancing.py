"""Balance from counts alone, and on nodes: ours against greedy packing and DeepSeek's EPLB.

Run ``python -m benchmarks.balancing``; writes ``benchmarks/results/balancing.md`` and appends to
``balancing.jsonl``. Balance is the load of the fullest / the mean device, mean over layers, on the counts
that were given. Time is CPU time of one thread with compiled code at hand, without imports; EPLB is this
project's vectorised one, several times faster than the published code.

Counts do not tell which experts share a token. For the second table, tokens are drawn with group-limited
gating (8 groups, 4 per token, 8 experts) whose popularity is fitted until the loads are those of the counts.

Shape letters: L MoE layers, E experts, S slots, D devices.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.environment import RESULTS, data_folder, environment
from placement import CostModel, Objective, Placement, PlacementProblem, make_problem, parse_topology
from placement.model import preset_model
from placement.plan import equal_slots
from placement.rebalance import rebalance_experts
from placement.solvers import eplb
from placement.solvers.greedy import even_room, greedy_devices
from placement.solvers.protocol import SolveRequest
from placement.solvers.registry import make_solver
from placement.solvers.replicas import without_duplicates
from traces.statistics import build_profile
from traces.synthesize import synthesize
from traces.trace import Trace

__all__ = ["group_limited_trace", "main"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Row = dict[str, object]

SEED = 0
SYNTHETIC_CLUSTERS = ((448, 64), (512, 64), (1152, 128), (1536, 256), (1024, 512), (2048, 512))
NODE_TOKENS, NODE_LAYERS = 16_384, 8

COACTIVATION = 1.0
"""How much random sets of experts are selected together, within what the gate allows."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instance:
    """Loads of all layers, slots and devices."""

    name: str
    load_LE: FloatArray
    num_slots: int
    num_devices: int


def recorded_counts() -> Iterator[tuple[str, FloatArray]]:
    """Yield the recorded expert counts of DeepSeek-V3 workloads that are at hand, dense layers left out."""
    for file in sorted((data_folder() / "traces" / "deepseek_v3_counts").glob("*.json")):
        load_LE = np.array(json.loads(file.read_text())["logical_count"], dtype=np.float64)
        yield file.stem, load_LE[load_LE.any(axis=1)]


def synthetic_counts(num_layers: int, num_experts: int) -> FloatArray:
    """Draw skewed loads: gamma of shape 0.5, so that the hottest of 384 experts has 10 times the mean."""
    return np.random.default_rng(SEED).gamma(0.5, 1000.0, size=(num_layers, num_experts))


def instances() -> Iterator[Instance]:
    """Yield recorded workloads on 32 devices and synthetic ones of 61 layers on up to 512."""
    first = None
    for name, load_LE in recorded_counts():
        first = load_LE if first is None else first
        yield Instance(name=name, load_LE=load_LE, num_slots=288, num_devices=32)
    if first is not None:
        layer_L = np.arange(61)
        tiled = np.concatenate(
            [first[layer_L % len(first)], first[(7 * layer_L + 3) % len(first), :128]], axis=1
        )
        yield Instance(name="recorded, tiled to 61 x 384", load_LE=tiled, num_slots=448, num_devices=64)
    load_LE = synthetic_counts(61, 384)
    for num_slots, num_devices in SYNTHETIC_CLUSTERS:
        yield Instance(
            name="synthetic 61 x 384", load_LE=load_LE, num_slots=num_slots, num_devices=num_devices
        )


def balance(map_LS: IntArray, load_LE: FloatArray, num_devices: int) -> FloatArray:
    """Fullest / mean device of each layer; empty slots are -1."""
    balance_L = np.empty(len(map_LS))
    for layer, row_S in enumerate(map_LS):
        held_S = row_S >= 0
        count_E = np.bincount(row_S[held_S], minlength=load_LE.shape[1])
        share_S = np.where(held_S, (load_LE[layer] / count_E)[row_S], 0.0)
        load_D = share_S.reshape(num_devices, -1).sum(axis=1)
        balance_L[layer] = load_D.max() / load_D.mean()
    return balance_L


def _greedy(case: Instance) -> IntArray:
    slots_D = np.full(case.num_devices, case.num_slots // case.num_devices)
    map_LDS = np.full((len(case.load_LE), case.num_devices, slots_D[0]), -1, dtype=np.int64)
    for map_DS, load_E in zip(map_LDS, case.load_LE, strict=True):
        device_E = greedy_devices(load_E, even_room(load_E.size, slots_D))
        for device, row_S in enumerate(map_DS):
            experts = np.nonzero(device_E == device)[0]
            row_S[: experts.size] = experts
    return map_LDS.reshape(len(case.load_LE), -1)


def _eplb(case: Instance) -> IntArray:
    return eplb.rebalance_experts(case.load_LE, case.num_slots, 1, 1, case.num_devices)[0]


def _ours(case: Instance) -> IntArray:
    return rebalance_experts(case.load_LE, case.num_slots, 1, 1, case.num_devices, seed=SEED)[0]


POLICIES: dict[str, Callable[[Instance], IntArray]] = {
    "greedy (no replicas)": _greedy,
    "EPLB": _eplb,
    "rebalance_experts": _ours,
}


def measure(case: Instance) -> Iterator[Row]:
    """Yield balance and CPU time of every policy."""
    for policy, place in POLICIES.items():
        began_s = time.process_time()
        map_LS = place(case)
        cpu_s = time.process_time() - began_s
        balance_L = balance(map_LS, case.load_LE, case.num_devices)
        yield {
            "instance": case.name,
            "slots": case.num_slots,
            "devices": case.num_devices,
            "policy": policy,
            "balance": float(balance_L.mean()),
            "worst_layer": float(balance_L.max()),
            "cpu_s": cpu_s,
        }


# ------------------------------------------------------------------------------------------------- on nodes


def group_limited_trace(load_LE: FloatArray, *, num_tokens: int, seed: int) -> Trace:
    """Draw tokens whose experts lie in 4 of 8 groups and whose loads are about those given."""
    target_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    popularity_LE = target_LE.copy()

    def draw(tokens: int, draw_seed: int) -> Trace:
        return synthesize(
            num_tokens=tokens,
            num_layers=len(load_LE),
            num_experts=load_LE.shape[1],
            top_k=8,
            num_groups=8,
            top_groups=4,
            domain_strength=0.3,
            drift=0.0,
            coactivation=COACTIVATION,
            popularity_LE=popularity_LE,
            seed=draw_seed,
        )

    for attempt in range(5):
        pilot = draw(4096, seed + 1 + attempt)
        layers = np.arange(len(load_LE))[:, None]
        seen_LE = np.zeros_like(target_LE)
        np.add.at(seen_LE, (layers, pilot.experts_TLK.transpose(1, 0, 2).reshape(len(load_LE), -1)), 1.0)
        # A hundredth keeps rare experts, of which a pilot sees few tokens, from jumping about.
        ratio_LE = (target_LE + 0.01) / (seen_LE / seen_LE.mean(axis=1, keepdims=True) + 0.01)
        popularity_LE *= np.clip(ratio_LE, 0.2, 5.0) ** 0.7
    return draw(num_tokens, seed)


def node_problem(load_LE: FloatArray, objective: str) -> PlacementProblem:
    """Return DeepSeek-V3's layers on 4 nodes of 8 devices with 32 spare slots."""
    trace = group_limited_trace(load_LE, num_tokens=NODE_TOKENS, seed=SEED)
    model = replace(
        preset_model("deepseek-v3"), num_layers=trace.num_layers, moe_layer_ids=(), num_decoder_layers=0
    )
    return make_problem(
        build_profile(trace, window_tokens=NODE_TOKENS),
        parse_topology("h100:4x8"),
        model=model,
        objective=objective,
        spare_slots=32,
    )


def measure_nodes(name: str, load_LE: FloatArray) -> Iterator[Row]:
    """Yield node visits, balance and predicted step time of EPLB, flat and by groups, and of ours."""
    problem = node_problem(load_LE, "balance")
    timed = replace(problem, objective=Objective.STEP_TIME)
    load = problem.profile.load_WLE.sum(axis=0)
    flat = _repaired(problem, load, groups=1, nodes=1)
    whole = _repaired(problem, load, groups=8, nodes=4)
    flat_visits, whole_visits = _visits(problem, flat), _visits(problem, whole)
    began_s = time.process_time()
    relaxed = _hierarchy(problem)
    cpu_s = time.process_time() - began_s
    fastest = _hierarchy(timed)
    for policy, placement in (
        ("EPLB, flat", flat),
        ("EPLB, by groups", whole),
        ("hierarchy, balance", relaxed),
        ("hierarchy, step time", fastest),
    ):
        cost = CostModel(timed).evaluate(placement)
        visits = _visits(problem, placement)
        yield {
            "instance": name,
            "coactivation": COACTIVATION,
            "layers": problem.num_layers,
            "policy": policy,
            "node_visits": visits,
            "saving": (flat_visits - visits) / (flat_visits - whole_visits),
            "balance": cost.metrics.mean_traffic_balance,
            "worst_layer": cost.metrics.worst_layer_balance,
            "step_ms": 1e3 * cost.step,
            "cpu_s": cpu_s if policy == "hierarchy, balance" else None,
        }


def _hierarchy(problem: PlacementProblem) -> Placement:
    request = SolveRequest(problem=problem, model=CostModel(problem), seed=SEED)
    return make_solver("hierarchy").solve(request)


def _repaired(problem: PlacementProblem, load_LE: FloatArray, *, groups: int, nodes: int) -> Placement:
    slots, devices = problem.num_slots, problem.num_devices
    map_LS, _, _ = eplb.rebalance_experts(load_LE, slots, groups, nodes, devices)
    return Placement(
        physical_to_logical_map_LS=without_duplicates(map_LS, devices, load_LE, num_nodes=nodes),
        device_of_slot_S=equal_slots(slots, devices),
        num_experts=problem.num_experts,
        num_devices=devices,
    )


def _visits(problem: PlacementProblem, placement: Placement) -> float:
    visits = CostModel(problem).evaluate(placement).metrics.node_fanout
    assert visits is not None  # four nodes, and tokens
    return visits


def node_cases() -> Iterator[tuple[str, FloatArray]]:
    """Yield layers spread over every recorded workload, or synthetic ones."""
    cases = list(recorded_counts()) or [("synthetic 256", synthetic_counts(NODE_LAYERS, 256))]
    for name, load_LE in cases:
        chosen = np.linspace(0, len(load_LE) - 1, NODE_LAYERS).round().astype(np.int64)
        yield name, load_LE[chosen]


# ---------------------------------------------------------------------------------------------------- tables


def _table(rows: list[Row], node_rows: list[Row], where: dict[str, str]) -> str:
    lines = [
        "# Balance from counts",
        "",
        f"Commit {where['commit']}; {where['machine']}; Python {where['python']}, numba {where['numba']}; "
        f"seed {SEED}, one thread. Made by `python -m benchmarks.balancing`.",
        "",
        "Fullest / mean device load on the given counts, mean over layers (worst layer). CPU seconds for all",
        "layers, compiled code at hand. No device holds an expert twice, except where EPLB puts it there.",
        "",
        "| loads | slots | devices | policy | balance | worst layer | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['instance']} | {r['slots']} | {r['devices']} | {r['policy']} | {r['balance']:.5f} "
        f"| {r['worst_layer']:.5f} | {r['cpu_s']:.3f} |"
        for r in rows
    ]
    lines += [
        "",
        "# Node-limited routing: 8 groups, 4 per token, on 4 nodes of 8 devices, 288 slots",
        "",
        f"{NODE_TOKENS} drawn tokens, {NODE_LAYERS} layers of each workload. Saving: share of the node",
        "visits that EPLB saves by keeping groups whole on a node, against EPLB without groups. Both EPLB",
        "rows have their duplicates repaired. Step time is predicted for H100 nodes from data sheets.",
        "",
        "| loads | policy | nodes per token | saving | balance | worst layer | step ms | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in node_rows:
        cpu = "" if r["cpu_s"] is None else f"{r['cpu_s']:.2f}"
        lines.append(
            f"| {r['instance']} | {r['policy']} | {r['node_visits']:.3f} "
            f"| {r['saving']:.1%} | {r['balance']:.4f} | {r['worst_layer']:.3f} | {r['step_ms']:.3f} "
            f"| {cpu} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all instances and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two instances of each table; writes nothing")
    arguments = parser.parse_args()
    most = 2 if arguments.quick else None
    # Compile outside the measured time.
    _ours(Instance(name="", load_LE=synthetic_counts(1, 8), num_slots=12, num_devices=4))
    rows = [row for case in list(instances())[:most] for row in measure(case)]
    where = environment()
    node_rows: list[Row] = []
    for name, load_LE in list(node_cases())[:most]:
        node_rows += measure_nodes(name, load_LE)
    print(_table(rows, node_rows, where))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "balancing.md").write_text(_table(rows, node_rows, where), encoding="utf-8")
        with (RESULTS / "balancing.jsonl").open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({**where, **row}) + "\n" for row in [*rows, *node_rows])


if __name__ == "__main__":
    main()
