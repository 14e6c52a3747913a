"""Whether a problem is small enough for a proof by enumeration.

Shape letters: L layers.
"""

from __future__ import annotations

import math

from placement.cost import CostModel
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.solvers.exact.layout import Layout, make_layout

__all__ = ["is_enumerable", "why_not"]

MOST_EXPERTS = 20
"""Experts of a layer whose subsets are tabulated."""

MOST_CLASSES = 1.0e8
"""Placements of one layer, up to symmetry, among which a branch and bound searches."""

MOST_PARTITION_STEPS = 2.0e8
"""Pairs of a subset and a part of it in the recursions over subsets of one layer."""

MOST_CELLS = 1.5e8
"""Numbers in the tables of one layer; 8 bytes each."""

MOST_CHAIN_STEPS = 4.0e10
"""Pairs of neighbouring layers' placements, times what pricing one takes, over the whole chain."""

MOST_PATH_STEPS = 4.0e8
"""Pairs of neighbouring layers' groups, over the whole chain: one pricing of paths."""

MOST_REPLICATED = 2.0e4
"""Ways to fill the slots of one layer with replicas, listed one by one."""

MOST_REPLICATED_TOKENS = 1.0e9
"""These ways, times layers and sampled tokens: what pricing them all takes."""


def is_enumerable(problem: PlacementProblem) -> bool:
    """Return whether the exact solver takes a problem on."""
    return why_not(problem) is None


def why_not(problem: PlacementProblem) -> str | None:
    """Return what makes a problem too large to enumerate; None if nothing does."""
    if problem.num_slots > problem.num_experts:
        return _why_not_replicated(problem)
    if problem.num_experts > MOST_EXPERTS:
        return f"{problem.num_experts} experts per layer, more than {MOST_EXPERTS}"
    if _why_not_risk(problem) is not None:
        return _why_not_risk(problem)
    layout = make_layout(CostModel(problem))
    coupled = is_chain(problem)
    if coupled:
        if chain_steps(problem, layout) <= MOST_CHAIN_STEPS:
            return None
        if problem.objective is Objective.TRAFFIC and path_steps(problem) <= MOST_PATH_STEPS:
            return None
    elif problem.objective is not Objective.TRAFFIC and layout.num_classes() > MOST_CLASSES:
        return f"{layout.num_classes():.3g} placements per layer, more than {MOST_CLASSES:.0e}"
    elif partition_steps(layout) > MOST_PARTITION_STEPS:
        return f"{partition_steps(layout):.3g} subsets of subsets, more than {MOST_PARTITION_STEPS:.0e}"
    elif table_cells(problem, layout) > MOST_CELLS:
        return f"{table_cells(problem, layout):.3g} costs per layer, more than {MOST_CELLS:.0e}"
    else:
        return None
    return f"a chain of {problem.num_layers} layers with {layout.num_classes():.3g} placements each"


def is_chain(problem: PlacementProblem) -> bool:
    """Whether there are several layers and they are coupled."""
    return problem.layers_are_coupled and problem.num_layers > 1


def _why_not_replicated(problem: PlacementProblem) -> str | None:
    ways = num_replicated(problem)
    if ways > MOST_REPLICATED:
        return f"{ways:.3g} ways per layer to fill slots with replicas, more than {MOST_REPLICATED:.0e}"
    if ways * problem.num_layers * problem.profile.num_sampled_tokens > MOST_REPLICATED_TOKENS:
        return f"{ways:.3g} ways per layer to fill slots with replicas on so many tokens"
    if problem.semantics is Semantics.STAY_PUT and problem.objective is not Objective.BALANCE:
        return "replicas under stay-put"
    return _why_not_risk(problem)


def _why_not_risk(problem: PlacementProblem) -> str | None:
    if problem.risk is not Risk.MEAN and problem.num_layers > 1:
        return f"the {problem.risk} of {problem.num_layers} layers together"
    return None


def num_replicated(problem: PlacementProblem) -> float:
    """Ways to fill the slots of one layer with any experts, each at most once on a device."""
    return math.prod(
        float(
            sum(math.comb(problem.num_experts, held) for held in range(min(slots, problem.num_experts) + 1))
        )
        for slots in problem.slots_D.tolist()
    )


def left_before(layout: Layout) -> list[int]:
    """Slots from each position on."""
    return [sum(part.slots for part in layout.devices[p:]) for p in range(len(layout.devices))]


def partition_steps(layout: Layout) -> float:
    """Steps of a recursion over the subsets that are left at each position."""
    experts = sum(part.slots for part in layout.devices)
    steps = 0
    for part, left, opens in zip(layout.devices, left_before(layout), layout.opens_P.tolist(), strict=True):
        fixed = 1 if opens and part.slots else 0
        steps += math.comb(experts, left) * math.comb(max(left - fixed, 0), part.slots - fixed)
    return float(steps)


def table_cells(problem: PlacementProblem, layout: Layout) -> float:
    """Numbers in the tables of one layer."""
    if problem.objective is Objective.TRAFFIC:
        return float(2**problem.num_experts)
    experts = problem.num_experts
    rows = sum(math.comb(experts, left) for left in left_before(layout)[1:])
    parts = {part.kind: part.slots for part in (*layout.devices, *layout.groups)}
    rows += sum(math.comb(experts, slots) for slots in parts.values())
    phases = 3 if problem.objective is Objective.STEP_TIME else 1
    return float(rows * phases * problem.profile.num_windows)


def chain_steps(problem: PlacementProblem, layout: Layout) -> float:
    """Steps of the recursion over placements of neighbouring layers."""
    pairs = layout.num_classes() * layout.num_labelled() * (problem.num_layers - 1)
    if problem.objective is Objective.TRAFFIC:
        return pairs * problem.num_experts
    links = max(1, 1 if problem.calibration.flat else problem.topology.num_tiers)
    return pairs * problem.num_devices * links * problem.profile.num_windows


def path_steps(problem: PlacementProblem) -> float:
    """Pairs of groups of neighbouring layers, over all sizes of devices."""
    sizes = set(problem.slots_D.tolist())
    groups = [math.comb(problem.num_experts, size) for size in sizes]
    return float(sum(n * n for n in groups) * max(problem.num_layers - 1, 1))
