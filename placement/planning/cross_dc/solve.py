"""Decides who prefetches what: starts, local search, the integer program, and memory over all layers.

Every answer is compared with every uniform domain size under the same cost and memory, and the better one is
returned, so that none is worse.

Shape letters: L MoE layers, C data centres, E experts, B budgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from placement.errors import InputError
from placement.planning.cross_dc.bound import own_side_bound_L, own_side_copies_C
from placement.planning.cross_dc.closed_form import break_even_tokens
from placement.planning.cross_dc.program import solve_layer_program
from placement.planning.cross_dc.search import MOST_MOVES, improved
from placement.planning.cross_dc.traffic import BoolArray, CrossTraffic, Decision, FloatArray, step_time
from placement.planning.cross_dc.uniform import best_uniform, uniform_choices

__all__ = ["CrossSolution", "Effort", "solve_cross"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to look; counted in work, not in seconds, so that the answer is the same anywhere.

    Parameters
    ----------
    starts
        Starts per layer from which the local search descends.
    most_moves
        Moves of one descent.
    program_cells
        Largest integer program, in data centres squared times experts, three-fold where messages have a
        latency; above it the search stands alone.
    node_limit
        Nodes of one layer's program; 0 for no program.
    relative_gap
        A proof within this ends a layer.

    Raises
    ------
    InputError
        If a figure is out of range.
    """

    starts: int = 3
    most_moves: int = MOST_MOVES
    program_cells: int = 2000
    node_limit: int = 20
    relative_gap: float = 5e-3

    def __post_init__(self) -> None:
        if self.starts < 1 or self.most_moves < 0 or self.program_cells < 0 or self.node_limit < 0:
            raise InputError(f"{self}: starts must be 1 or more, the other counts 0 or more")
        if not self.relative_gap >= 0:
            raise InputError(f"relative_gap is {self.relative_gap}; it must be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossSolution:
    """Who prefetches what, and how good that is.

    Parameters
    ----------
    decision
        Who serves whom.
    step_s
        Time of all layers, seconds.
    bound_s_L
        Lower bound of each layer's time, seconds, ``[layers]``.
    """

    decision: Decision
    step_s: float
    bound_s_L: FloatArray

    @property
    def lower_bound_s(self) -> float:
        """Lower bound of the time of all layers, seconds."""
        return min(float(self.bound_s_L.sum()), self.step_s)

    @property
    def gap(self) -> float:
        """Relative distance to the bound."""
        return 0.0 if self.step_s == 0 else 1.0 - self.lower_bound_s / self.step_s


def solve_cross(traffic: CrossTraffic, *, effort: Effort | None = None) -> CrossSolution:
    """Decide for every layer, data centre and expert whether the expert or the tokens travel."""
    effort = Effort() if effort is None else effort
    layers = [_solve_layer(traffic.layer(index), effort) for index in range(traffic.num_layers)]
    bound_s_L = np.array([bound_s for _, bound_s in layers])
    candidates = [Decision.stacked([decision for decision, _ in layers]), best_uniform(traffic).decision]
    if not candidates[0].fits(traffic):
        candidates[0] = _within_total(traffic, effort)
    decision = min(candidates, key=lambda candidate: step_time(traffic, candidate))
    decision.check(traffic)
    return CrossSolution(decision=decision, step_s=step_time(traffic, decision), bound_s_L=bound_s_L)


def _solve_layer(layer: CrossTraffic, effort: Effort) -> tuple[Decision, float]:
    """Return one layer's decision and a lower bound of its time."""
    decision = _searched(layer, effort)
    time_s = step_time(layer, decision)
    bound_s = float(own_side_bound_L(layer)[0])
    cells = layer.num_centres**2 * layer.num_experts * (3 if layer.latency_s else 1)
    if (
        effort.node_limit == 0
        or cells > effort.program_cells
        or bound_s >= time_s * (1 - effort.relative_gap)
    ):
        return decision, min(bound_s, time_s)
    program = solve_layer_program(
        layer, start=decision, node_limit=effort.node_limit, relative_gap=effort.relative_gap
    )
    if program.decision is not None:
        polished = improved(layer, program.decision, most_moves=effort.most_moves)
        decision = min(decision, polished, key=lambda candidate: step_time(layer, candidate))
    return decision, min(max(bound_s, program.bound_s), step_time(layer, decision))


def _searched(layer: CrossTraffic, effort: Effort) -> Decision:
    """Return the best descent; the best start is among the descents, so no uniform size is better."""
    starts = sorted(_starts(layer), key=lambda decision: step_time(layer, decision))
    descents = [improved(layer, start, most_moves=effort.most_moves) for start in starts[: effort.starts]]
    return min([starts[0], *descents], key=lambda decision: step_time(layer, decision))


def _starts(layer: CrossTraffic) -> Iterator[Decision]:
    for choice in uniform_choices(layer):
        yield choice.decision
    tokens_CE, home_E = layer.tokens_LCE[0], layer.home_LE[0]
    remote_CE = np.where(np.arange(layer.num_centres)[:, None] == home_E, -1.0, tokens_CE)
    rank_CE = np.argsort(np.argsort(-remote_CE, axis=1, kind="stable"), axis=1)
    yield _copies_of_most_used(layer, remote_CE, rank_CE < own_side_copies_C(layer, 0)[:, None])
    if layer.token_bytes > 0 and layer.expert_bytes > 0:
        even = break_even_tokens(
            expert_bytes=layer.expert_bytes, token_bytes=layer.token_bytes, compression=layer.compression
        )
        # Prefetches that the pre-expert computation hides pay below the break-even, full links above it.
        for factor in (0.25, 0.5, 1.0, 2.0):
            yield _copies_of_most_used(
                layer, remote_CE, (remote_CE >= factor * even) & (rank_CE < layer.most_copies)
            )


def _copies_of_most_used(layer: CrossTraffic, remote_CE: FloatArray, wanted_CE: BoolArray) -> Decision:
    copy_CE = wanted_CE & (remote_CE >= 0)
    here_C = np.arange(layer.num_centres)[:, None]
    serve_CE = np.where(copy_CE, here_C, layer.home_LE[0])
    return Decision(serve_LCE=serve_CE[None], copy_LCE=copy_CE[None])


MOST_BUDGETS = 9
"""Budgets per layer that memory over all layers is divided into."""


def _within_total(traffic: CrossTraffic, effort: Effort) -> Decision:
    """Share the copies that fit over all layers among them: the best split over a grid of budgets.

    Each layer is solved with at most b copies per data centre for some b; a dynamic program chooses one b
    for each layer so that their sum fits.
    """
    assert traffic.total_copies is not None
    total = min(traffic.total_copies, traffic.most_copies * traffic.num_layers)
    budget_B = np.unique(np.linspace(0, min(total, traffic.most_copies), MOST_BUDGETS).astype(np.int64))
    quick = replace(effort, node_limit=0, starts=1)
    best: dict[int, tuple[float, list[Decision]]] = {0: (0.0, [])}
    for index in range(traffic.num_layers):
        options = [_searched(traffic.layer(index, most_copies=int(budget)), quick) for budget in budget_B]
        best = _extended(
            best,
            [(int(o.copy_LCE.sum(axis=2).max()), step_time(traffic.layer(index), o), o) for o in options],
            total,
        )
    return Decision.stacked(min(best.values(), key=lambda entry: entry[0])[1])


def _extended(
    best: dict[int, tuple[float, list[Decision]]], options: list[tuple[int, float, Decision]], total: int
) -> dict[int, tuple[float, list[Decision]]]:
    """Return the fastest way to use each number of copies, one more layer included."""
    found: dict[int, tuple[float, list[Decision]]] = {}
    for used, (time_s, decisions) in best.items():
        for copies, more_s, decision in options:
            copies_used = used + copies
            if copies_used > total:
                continue
            if copies_used not in found or time_s + more_s < found[copies_used][0]:
                found[copies_used] = (time_s + more_s, [*decisions, decision])
    return found
