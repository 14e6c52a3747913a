"""Large-neighbourhood search: free items of a few devices of a layer, let an integer program place them best.

Swaps cannot leave a placement that no exchange of two experts improves; re-dividing the experts of several
devices at once can. Each neighbourhood is an integer program of the true objective with everything else held
fixed (`layer_program`), small enough to be solved to the end or to a few hundred nodes. Layers take turns;
one rests after its devices have been tried without success.

Shape letters: D devices, L layers, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.errors import InputError
from placement.plan import Placement
from placement.solvers.ilp.layer import LayerItems
from placement.solvers.ilp.program import LayerProgram, layer_program
from placement.solvers.ilp.solver import check_separable, joined, starting_placement
from placement.solvers.milp import solve_milp
from placement.solvers.protocol import SolveRequest

__all__ = ["LnsSolver"]

IntArray = npt.NDArray[np.int64]

WORK_PER_NEIGHBOURHOOD_S = 0.25
"""Effort that one neighbourhood counts as: about what it takes on one thread."""

DEFAULT_WORK_S = 20.0

NODES = 200
RELATIVE_GAP = 1e-4

MOST_DEVICES = 4
LEAST_ITEMS, MOST_ITEMS = 4, 24
"""Items that a neighbourhood frees; fewer where tokens select them in many combinations."""

MOST_PATTERN_VARIABLES = 1_500
"""Size of a neighbourhood's program beyond which it takes seconds to solve."""

REST_AFTER = 12
"""Neighbourhoods without success after which a layer rests."""


@dataclass(slots=True, kw_only=True, eq=False)
class _LayerTurn:
    """A layer's state in the search."""

    model: CostModel
    items: LayerItems
    value: float
    failures: int = 0
    most_items: int = MOST_ITEMS
    random: np.random.Generator = field(repr=False)


class LnsSolver:
    """Large-neighbourhood search by integer programs.

    Parameters
    ----------
    backend
        Who solves the programs; a name of `placement.solvers.milp.BACKENDS`.
    """

    name = "lns"

    def __init__(self, *, backend: str = "highs") -> None:
        self.backend = backend

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best placement found.

        Raises
        ------
        InputError
            If the programs cannot express the problem: stay-put semantics, a risk measure, or distinct tokens
            with replicas.
        InfeasibleError
            If `search` finds no placement within a load limit.
        BackendError
            If the backend fails.
        """
        check_separable(request.problem, self.name)
        placement = starting_placement(request)
        if request.problem.num_devices < 2:
            return placement
        work_s = DEFAULT_WORK_S if request.work_s is None else request.work_s
        turns = [self._turn(request, placement, layer) for layer in range(request.problem.num_layers)]
        for layer in _schedule(turns, int(work_s / WORK_PER_NEIGHBOURHOOD_S)):
            if request.stop():
                break
            if self._improve(request, turns[layer]):
                placement = joined(placement, layer, turns[layer].items)
                request.report(placement)
        return placement

    def _turn(self, request: SolveRequest, placement: Placement, layer: int) -> _LayerTurn:
        model = CostModel(request.problem.one_layer(layer))
        items = LayerItems.of(placement, layer)
        return _LayerTurn(
            model=model,
            items=items,
            value=model.objective(items.placement(model.problem)),
            random=np.random.default_rng([request.seed, layer]),
        )

    def _improve(self, request: SolveRequest, turn: _LayerTurn) -> bool:
        """Solve one neighbourhood of a layer; return whether the layer got better."""
        program = _program(turn, *_choose(turn))
        result = solve_milp(
            program.program,
            backend=self.backend,
            relative_gap=RELATIVE_GAP,
            node_limit=NODES,
            seed=request.seed % 2**31,
            stop=request.stop,
            in_process=True,
        )
        turn.failures += 1
        if result.value_V is None:
            return False
        found = program.decode(result.value_V)
        value = turn.model.objective(found.placement(turn.model.problem))
        if value >= turn.value * (1 - 1e-9):
            return False
        turn.items, turn.value, turn.failures = found, value, 0
        return True


def _schedule(turns: list[_LayerTurn], neighbourhoods: int) -> Iterator[int]:
    """Yield the layer whose turn it is: round and round, without those that rest."""
    done = 0
    while done < neighbourhoods:
        awake = [layer for layer, turn in enumerate(turns) if turn.failures < REST_AFTER]
        if not awake:
            return
        for layer in awake:
            if done >= neighbourhoods:
                return
            done += 1
            yield layer


def _choose(turn: _LayerTurn) -> tuple[IntArray, IntArray]:
    """Choose devices to free, one that is often fullest and others at random, and items on them."""
    problem, random = turn.model.problem, turn.random
    often_D = _often_fullest(turn) + 0.1 / problem.num_devices
    first = int(random.choice(problem.num_devices, p=often_D / often_D.sum()))
    others = random.permutation(np.delete(np.arange(problem.num_devices), first))
    devices = np.sort(np.append(others[: int(random.integers(1, MOST_DEVICES))], first))
    on_them = np.nonzero(np.isin(turn.items.device_I, devices))[0]
    items = random.permutation(on_them)[: turn.most_items]
    return devices, np.sort(items)


def _often_fullest(turn: _LayerTurn) -> npt.NDArray[np.float64]:
    """Share of windows in which each device is the fullest, ``[devices]``."""
    breakdown = turn.model.evaluate(turn.items.placement(turn.model.problem))
    fullest_W = breakdown.load_WLD[:, 0].argmax(axis=1)
    count_D = np.bincount(fullest_W, minlength=turn.model.problem.num_devices)
    return np.asarray(count_D / fullest_W.size)


def _program(turn: _LayerTurn, devices: IntArray, items: IntArray) -> LayerProgram:
    """Write the neighbourhood's program, with fewer items while they have too many patterns of tokens."""
    while True:
        try:
            return layer_program(
                turn.model,
                turn.items,
                devices,
                free_items=items,
                most_pattern_variables=MOST_PATTERN_VARIABLES,
            )
        except InputError:
            if items.size <= LEAST_ITEMS:
                raise
            turn.most_items = max(LEAST_ITEMS, items.size - 2)
            items = items[turn.random.permutation(items.size) < turn.most_items]
