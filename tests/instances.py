"""Small random instances of everything that the core takes, and all placements of the tiniest ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from placement.calibration import Calibration, LinearCalibration, calibration_from_dict
from placement.cost import CostModel
from placement.devices import DeviceKind
from placement.model import ModelShape
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.profile import RoutingProfile
from placement.tier import Tier
from placement.topology import Topology

Rng = np.random.Generator

LINEAR = LinearCalibration(pair_cost=1.0, token_cost=4.0)

MEASURED_CURVES: dict[str, Any] = {
    "gpu": "test GPU",
    "world_size": 2,
    # 50 us up to 1 MiB sent, then 100 GB/s; the second point is noise that a larger size shows up.
    "all_to_all_ms_by_MiB_sent_per_rank": [[0.0625, 0.05], [0.25, 0.06], [1, 0.05], [64, 0.38]],
    "expert_ffn_ms": {
        "mixtral-8x7b": [
            {"tokens_per_expert": 1, "local_experts": 4, "ms": 0.6},
            {"tokens_per_expert": 256, "local_experts": 4, "ms": 0.68},
            {"tokens_per_expert": 512, "local_experts": 4, "ms": 1.16},
        ],
        "olmoe": [
            {"tokens_per_expert": 1, "local_experts": 32, "ms": 0.22},
            {"tokens_per_expert": 512, "local_experts": 32, "ms": 0.48},
            {"tokens_per_expert": 1024, "local_experts": 32, "ms": 0.84},
        ],
    },
}


def measured() -> Calibration:
    """Return the calibration of `MEASURED_CURVES`."""
    return calibration_from_dict(MEASURED_CURVES)


def model_for(profile: RoutingProfile, **sizes: Any) -> ModelShape:
    """Return a model of a profile's shape with small experts, so that exchanges and experts both count."""
    given = {"hidden_size": 1024, "expert_hidden_size": 512, **sizes}
    return ModelShape(
        name="test-moe",
        num_layers=profile.num_layers,
        num_experts=profile.num_experts,
        top_k=profile.top_k,
        **given,
    )


def device_kind_of(name: str, *, tflops: float = 100.0, memory_gib: int = 80) -> DeviceKind:
    """Return a device kind whose figures are easy to reckon with."""
    return DeviceKind(
        name=name,
        peak_flops=tflops * 2e12,
        measured_flops=tflops * 1e12,
        memory_bytes=memory_gib * 2**30,
        memory_bandwidth=tflops * 1e10,
        scale_up_bandwidth=100e9,
        nic_bandwidth=10e9,
    )


def cluster(
    node_D: Sequence[int],
    *,
    kind_D: Sequence[int] | None = None,
    tflops: Sequence[float] = (100.0,),
    inside_gbps: Sequence[float] | float = 100.0,
    across_gbps: Sequence[float] | float = 10.0,
    slots_D: Sequence[int] | None = None,
    latency_s: tuple[float, float] = (5e-6, 2e-5),
) -> Topology:
    """Return nodes of any sizes: tier "node" inside them and, for several, tier "cluster" across."""
    size = len(node_D)

    def bandwidth(gbps: Sequence[float] | float) -> np.ndarray:
        return np.broadcast_to(np.asarray(gbps, dtype=np.float64) * 1e9, (size,))

    tiers = [Tier(name="node", group_D=node_D, bandwidth_D=bandwidth(inside_gbps), latency_s=latency_s[0])]
    if max(node_D) > 0:
        tiers.append(
            Tier(
                name="cluster", group_D=[0] * size, bandwidth_D=bandwidth(across_gbps), latency_s=latency_s[1]
            )
        )
    return Topology(
        name="test",
        kinds=tuple(device_kind_of(f"kind-{i}", tflops=speed) for i, speed in enumerate(tflops)),
        kind_of_device_D=[0] * size if kind_D is None else kind_D,
        tiers=tuple(tiers),
        slots_D=slots_D,
    )


def random_profile(
    rng: Rng,
    *,
    tokens: int = 60,
    layers: int = 2,
    experts: int = 6,
    top_k: int = 2,
    windows: int = 3,
    tail: int = 0,
    homes: int = 0,
    keep: float = 1.0,
    scale: float = 1.0,
) -> RoutingProfile:
    """Return skewed, correlated routing in windows of uneven size.

    Parameters
    ----------
    tail
        Tokens after the last window.
    homes
        Devices on which tokens live; 0 where homes are unknown.
    keep
        Share of the tokens whose expert sets are kept, at least one per window.
    scale
        Factor on loads and windows: how many tokens each drawn one counts for.
    """
    inside = tokens - tail
    window_T = np.sort(np.concatenate([np.arange(windows), rng.integers(0, windows, inside - windows)]))
    topic_T = (window_T + rng.integers(0, 2, inside)) % 3
    topic_T = np.concatenate([topic_T, rng.integers(0, 3, tail)])
    window_T = np.concatenate([window_T, np.full(tail, windows)])
    popularity = rng.gumbel(size=(3, layers, experts)) * 1.2
    score_TLE = popularity[topic_T] + rng.gumbel(size=(tokens, layers, experts))
    experts_TLK = np.argsort(-score_TLE, axis=2)[:, :, :top_k].astype(np.uint8)
    load_WLE = np.zeros((windows + 1, layers, experts))
    for layer in range(layers):
        np.add.at(load_WLE[:, layer], (window_T[:, None], experts_TLK[:, layer]), scale)
    kept = rng.random(tokens) < keep
    kept[np.unique(window_T, return_index=True)[1]] = True
    return RoutingProfile(
        load_WLE=load_WLE[:windows],
        window_tokens_W=scale * np.bincount(window_T, minlength=windows + 1)[:windows],
        top_k=top_k,
        experts_TLK=experts_TLK[kept],
        window_of_token_T=window_T[kept],
        home_T=rng.integers(-1, homes, tokens)[kept] if homes else None,
        tail_tokens=int(scale * tail),
    )


def counts_only(profile: RoutingProfile) -> RoutingProfile:
    """Return a profile's loads without its tokens."""
    return replace(profile, experts_TLK=None, window_of_token_T=None, home_T=None, tail_tokens=0)


def random_row(rng: Rng, experts: int, slots_D: Sequence[int], *, fill: float = 0.7) -> list[list[int]]:
    """Return the experts of each device: every expert somewhere, spare slots replicas or empty."""
    held: list[list[int]] = [[] for _ in slots_D]
    for expert in rng.permutation(experts).tolist():
        free = [d for d, slots in enumerate(slots_D) if len(held[d]) < slots]
        held[int(rng.choice(free))].append(expert)
    for device, slots in enumerate(slots_D):
        others = [e for e in rng.permutation(experts).tolist() if e not in held[device]]
        spare = slots - len(held[device])
        held[device] += [e for e in others[:spare] if rng.random() < fill]
    return held


def random_placement(
    rng: Rng, problem: PlacementProblem, *, fill: float = 0.7, shuffle: bool = False
) -> Placement:
    """Return any placement that fits a problem; `shuffle` mixes the order of the slots as well."""
    rows = []
    for _ in range(problem.num_layers):
        row: list[int] = []
        for held, slots in zip(
            random_row(rng, problem.num_experts, problem.slots_D.tolist(), fill=fill),
            problem.slots_D.tolist(),
            strict=True,
        ):
            row += rng.permutation([*held, *[-1] * (slots - len(held))]).tolist()
        rows.append(row)
    order = rng.permutation(problem.num_slots) if shuffle else np.arange(problem.num_slots)
    return Placement(
        physical_to_logical_map_LS=np.array(rows, dtype=np.int64)[:, order],
        device_of_slot_S=problem.device_of_slot_S[order],
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


def every_row(experts: int, slots_D: Sequence[int]) -> Iterator[list[int]]:
    """Yield every layer that holds each expert at least once, as the experts of the slots in device order."""
    choices = [
        [held for size in range(slots + 1) for held in itertools.combinations(range(experts), size)]
        for slots in slots_D
    ]
    for held_D in itertools.product(*choices):
        if len(set().union(*held_D)) == experts:
            row: list[int] = []
            for held, slots in zip(held_D, slots_D, strict=True):
                row += [*held, *[-1] * (slots - len(held))]
            yield row


def placement_of(problem: PlacementProblem, rows: Sequence[Sequence[int]]) -> Placement:
    """Return the placement of some rows on a problem's slots."""
    return Placement(
        physical_to_logical_map_LS=np.array(rows, dtype=np.int64),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


def least_objective(problem: PlacementProblem) -> float:
    """Return the optimum over all placements, infinite where none keeps the load limit; by brute force."""
    rows = list(every_row(problem.num_experts, problem.slots_D.tolist()))
    traffic = problem.objective is Objective.TRAFFIC
    if problem.semantics is Semantics.STAY_PUT and problem.objective is not Objective.BALANCE:
        return min(_objectives(problem, itertools.product(rows, repeat=problem.num_layers)), default=np.inf)
    if traffic:
        one = [_one_layer(problem, layer) for layer in range(problem.num_layers)]
        best = [min(_objectives(part, ([row] for row in rows)), default=np.inf) for part in one]
        return float(np.mean(best))
    cost_LWR = [_costs_of_rows(problem, layer, rows) for layer in range(problem.num_layers)]
    if problem.risk is Risk.MEAN:
        best_L = [cost_WR.mean(axis=0).min() for cost_WR in cost_LWR]
        return float(np.mean(best_L) if problem.objective is Objective.BALANCE else np.sum(best_L))
    found = []
    for choice in itertools.product(range(len(rows)), repeat=problem.num_layers):
        cost_LW = np.stack([cost[:, row] for cost, row in zip(cost_LWR, choice, strict=True)])
        by_window = cost_LW.ravel() if problem.objective is Objective.BALANCE else cost_LW.sum(axis=0)
        found.append(problem.risk.summarise(by_window))
    return min(found)


def _objectives(problem: PlacementProblem, placements: Any) -> Iterator[float]:
    model = CostModel(problem)
    for rows in placements:
        breakdown = model.evaluate(placement_of(problem, rows))
        limited = problem.objective is Objective.TRAFFIC
        if limited and breakdown.metrics.worst_layer_balance > problem.max_imbalance * (1 + 1e-9):
            continue
        yield breakdown.objective


def _one_layer(problem: PlacementProblem, layer: int, *, times: int = 1) -> PlacementProblem:
    """Return the problem of one layer alone, repeated some times."""
    profile, model = problem.profile, problem.model
    tokens = None if profile.experts_TLK is None else profile.experts_TLK[:, [layer] * times]
    alone = replace(profile, load_WLE=profile.load_WLE[:, [layer] * times], experts_TLK=tokens)
    if model is not None:
        model = replace(model, num_layers=times, moe_layer_ids=(), num_decoder_layers=0)
    return replace(problem, profile=alone, model=model)


def _costs_of_rows(problem: PlacementProblem, layer: int, rows: list[list[int]]) -> np.ndarray:
    """Cost of one layer in each window under every row, ``[windows, rows]``: the rows become layers."""
    tiled = _one_layer(problem, layer, times=len(rows))
    breakdown = CostModel(tiled).evaluate(placement_of(tiled, rows))
    if problem.objective is Objective.BALANCE:
        return breakdown.balance_WL
    return breakdown.experts_WL + breakdown.dispatch_WL + breakdown.combine_WL
