"""Tiny problems with spare slots: every way to fill the slots of a layer is listed and priced.

Which replica serves a token depends on the replicas' order and on the engine's split, so no symmetry is used
and nothing is tabulated; the cost model prices every placement. To price many at once, rows of one layer
become the layers of a problem in which that layer is repeated.

Shape letters: L layers, E experts, S slots, D devices, W windows, B rows of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placement.bounds import LowerBound
from placement.cost import CostModel
from placement.errors import InfeasibleError, NoPlacementFoundError
from placement.plan import EMPTY, Placement
from placement.problem import Objective, PlacementProblem, Risk
from placement.profile import RoutingProfile
from placement.solvers.exact.proof import LIMIT_SLACK, PROOF_STEP
from placement.solvers.protocol import SolveRequest

__all__ = ["repeat_layer", "solve_replicated"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

BATCH_CELLS = 200_000
"""Rows times sampled tokens priced in one call, about: some milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BestRow:
    """The best row of a layer: its contents, its term of the objective, the least balance of any row."""

    row_S: IntArray | None
    value: float
    least_balance: float


def solve_replicated(request: SolveRequest) -> Placement:
    """Return the best placement with replicas, proved unless stopped early.

    Raises
    ------
    InfeasibleError
        If no placement of a layer keeps the load limit; proved.
    NoPlacementFoundError
        If stopped before every layer was placed and without a start.
    """
    problem = request.problem
    found = []
    for layer in range(problem.num_layers):
        best = _best_row(request, layer)
        if best is None:
            return _stopped(request)
        if best.row_S is None:
            raise InfeasibleError(
                f"layer {layer}: every placement loads its fullest device with {best.least_balance:.6f} of "
                f"the mean or more (proved), {best.least_balance - problem.max_imbalance:.6f} above "
                f"--max-imbalance {problem.max_imbalance}"
            )
        found.append(best)
    placement = Placement(
        physical_to_logical_map_LS=np.stack([best.row_S for best in found if best.row_S is not None]),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )
    request.report(placement)
    layer_L = np.full(problem.num_layers, -np.inf)
    if problem.risk is Risk.MEAN:
        layer_L = np.array([best.value for best in found]) * PROOF_STEP
    value = request.model.objective(placement) * PROOF_STEP
    request.prove(LowerBound(value=value, layer_L=layer_L))
    return placement


def _stopped(request: SolveRequest) -> Placement:
    if request.start is None:
        raise NoPlacementFoundError("stopped before all placements were listed; allow more time or use auto")
    return request.start


def _best_row(request: SolveRequest, layer: int) -> _BestRow | None:
    """Price all rows of a layer; None when stopped."""
    problem = request.problem
    best, row_S, least_balance = np.inf, None, np.inf
    tokens = max(1, problem.profile.num_sampled_tokens)
    # The fanout of a problem is one number: priced row by row.
    batch = 1 if problem.objective is Objective.TRAFFIC else max(1, BATCH_CELLS // tokens)
    rows = every_row(problem)
    while chunk := list(itertools.islice(rows, batch)):
        if request.stop():
            return None
        value_B, balance_B = _price(problem, layer, np.array(chunk))
        least_balance = min(least_balance, float(balance_B.min()))
        if problem.objective is Objective.TRAFFIC:
            value_B = np.where(balance_B > problem.max_imbalance * LIMIT_SLACK, np.inf, value_B)
        if value_B.min() < best:
            best, row_S = float(value_B.min()), np.array(chunk[int(value_B.argmin())])
    return _BestRow(row_S=row_S, value=best, least_balance=least_balance)


def every_row(problem: PlacementProblem) -> Iterator[list[int]]:
    """Yield every way to fill the slots of a layer with all experts, none twice on a device."""
    choices = [
        [
            held
            for size in range(slots + 1)
            for held in itertools.combinations(range(problem.num_experts), size)
        ]
        for slots in problem.slots_D.tolist()
    ]
    for held_D in itertools.product(*choices):
        if len(set().union(*held_D)) == problem.num_experts:
            padded = (
                [*held, *[EMPTY] * (slots - len(held))]
                for held, slots in zip(held_D, problem.slots_D.tolist(), strict=True)
            )
            yield list(itertools.chain(*padded))


def repeat_layer(profile: RoutingProfile, layer: int, times: int) -> RoutingProfile:
    """Return the profile of one layer alone, as often as wanted."""
    tokens = None if profile.experts_TLK is None else profile.experts_TLK[:, [layer] * times]
    return replace(profile, load_WLE=profile.load_WLE[:, [layer] * times], experts_TLK=tokens)


def _price(problem: PlacementProblem, layer: int, row_BS: IntArray) -> tuple[FloatArray, FloatArray]:
    """Term of the objective and balance of the summed load of some rows, ``[rows]`` each."""
    model = problem.model
    if model is not None:
        model = replace(model, num_layers=len(row_BS), moe_layer_ids=(), num_decoder_layers=0)
    tiled = replace(problem, profile=repeat_layer(problem.profile, layer, len(row_BS)), model=model)
    breakdown = CostModel(tiled).evaluate(
        Placement(
            physical_to_logical_map_LS=row_BS,
            device_of_slot_S=problem.device_of_slot_S,
            num_experts=problem.num_experts,
            num_devices=problem.num_devices,
        )
    )
    load_BD = breakdown.load_WLD.sum(axis=0)
    balance_B = load_BD.max(axis=1) / load_BD.mean(axis=1)
    if problem.objective is Objective.TRAFFIC:
        return np.array([breakdown.objective]), balance_B
    cost_WB = breakdown.balance_WL
    if problem.objective is Objective.STEP_TIME:
        cost_WB = breakdown.experts_WL + breakdown.dispatch_WL + breakdown.combine_WL
    return np.array([problem.risk.summarise(cost_W) for cost_W in cost_WB.T]), balance_B
