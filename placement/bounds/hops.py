"""How many stay-put tokens hop between groups of devices, from one layer to the next, at least.

The experts of a chain of layers, taken together, are a partition too: each group holds `slots` experts of
every layer. Tokens stay where their first experts of two consecutive layers share a group, so the transitions
kept inside groups are linear in the togetherness of all of the chain's experts. As each layer fills the same
number of a group's places, ``v X v = 0`` for v = 1 on one layer and -1 on the next: any multiple of it can be
added.

Shape letters: C layers of a chain, E experts of each, B experts of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.bounds.loads import max_replicas
from placement.bounds.partition import Groups, relax
from placement.bounds.terms import Line
from placement.bounds.touched import WIDEST
from placement.problem import PlacementProblem

__all__ = ["least_chain_hops", "least_hops"]

FloatArray = npt.NDArray[np.float64]

CHAIN_PLACES = 192
"""Places of all layers of a chain of three layers or more: longer chains are cut."""

PAIR_PLACES = 640
"""Places of two layers beyond which a relaxation takes too long."""

ROUNDING = 1e-12
"""What sums of transitions are stepped back by."""

LEVEL = np.array([[1.0, -1.0], [-1.0, 1.0]])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Hops:
    """Share of tokens that hop at each boundary of a chain, added up.

    Parameters
    ----------
    line
        The term itself: it is linear.
    """

    line: Line
    samples: bool = False

    def below(self, together_EE: FloatArray, *, sampled: bool) -> Line:
        """Return the term."""
        return self.line


def least_hops(
    problem: PlacementProblem, layer: int, groups: Groups, *, inside_only: bool, steps: int
) -> float:
    """Bound the share of tokens that hop between groups into a layer, from the layer before.

    With replicas only the strongest transitions bound them.

    Parameters
    ----------
    layer
        Layer hopped into, 1 or later.
    groups
        Groups of devices, with places for the experts of one layer.
    inside_only
        Leave out the tail of the trace, which belongs to no window.
    steps
        Eigenvalue decompositions to spend.
    """
    if groups.num_groups == 1:
        return 0.0
    share_EE = _transitions(problem, layer, inside_only=inside_only)
    single = max_replicas(problem) == 1
    spare_slots = 0 if single else problem.num_slots - problem.num_experts
    least = max(0.0, 1.0 - _strongest(share_EE, groups.slots, spare_slots) * (1.0 + ROUNDING))
    if not single or 2 * groups.num_places > PAIR_PLACES:
        return least
    return max(least, _relax_chain([share_EE], groups, steps=steps))


def least_chain_hops(problem: PlacementProblem, groups: Groups, *, steps: int) -> float:
    """Bound the hops of a token over all layers, in chains of as many layers as are worth it."""
    layers_of_chain = CHAIN_PLACES // groups.num_places
    if max_replicas(problem) > 1 or groups.num_groups == 1 or layers_of_chain < 3:
        return 0.0
    total = 0.0
    for first in range(1, problem.num_layers, layers_of_chain - 1):
        layers = range(first, min(first + layers_of_chain - 1, problem.num_layers))
        shares = [_transitions(problem, layer, inside_only=False) for layer in layers]
        total += max(0.0, _relax_chain(shares, groups, steps=steps))
    return total


def _relax_chain(shares: Sequence[FloatArray], groups: Groups, *, steps: int) -> float:
    """Bound the hops over consecutive boundaries, given each one's transitions as shares of tokens."""
    num_layers = len(shares) + 1
    if groups.num_places > WIDEST * groups.num_experts:
        return 0.0
    chain = Groups(
        num_groups=groups.num_groups,
        slots=num_layers * groups.slots,
        num_experts=num_layers * groups.num_experts,
    )
    line = _line(shares, level=groups.num_places == groups.num_experts)
    return relax([_Hops(line=line)], chain, steps=steps)


def _transitions(problem: PlacementProblem, layer: int, *, inside_only: bool) -> FloatArray:
    """Return the share of tokens by first expert in the layer before and in a layer."""
    profile = problem.profile
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    first_TL = profile.experts_TLK[:, layer - 1 : layer + 1, 0].astype(np.int64)
    inside_T = profile.window_of_token_T < (profile.num_windows if inside_only else profile.num_windows + 1)
    cell_T = first_TL[inside_T, 0] * profile.num_experts + first_TL[inside_T, 1]
    count = np.bincount(cell_T, weights=profile.token_weight_T[inside_T], minlength=profile.num_experts**2)
    return np.asarray(count.reshape(profile.num_experts, profile.num_experts) / count.sum())


def _strongest(share_EE: FloatArray, slots: int, spare_slots: int) -> float:
    """Bound what is kept by every expert's strongest transitions, out or in: `slots` for each replica.

    The spare slots go to the experts whose next `slots` transitions are the strongest.
    """
    return min(_strongest_rows(rows_EE, slots, spare_slots) for rows_EE in (share_EE, share_EE.T))


def _strongest_rows(share_EE: FloatArray, slots: int, spare_slots: int) -> float:
    num_experts = len(share_EE)
    sorted_EE = -np.sort(-share_EE, axis=1)
    # One block of `slots` transitions for each replica of an expert, the first block for its only one.
    kept_EB = np.add.reduceat(sorted_EE, np.arange(0, num_experts, slots), axis=1)
    further = -np.sort(-kept_EB[:, 1:], axis=None)[:spare_slots]
    return float(kept_EB[:, 0].sum() + further.sum())


def _line(shares: Sequence[FloatArray], *, level: bool) -> Line:
    """Return the hops of a chain as a line; `level` says that every layer fills every group alike."""
    num_experts, num_layers = len(shares[0]), len(shares) + 1
    matrix_BB = np.zeros((num_layers * num_experts, num_layers * num_experts))
    for boundary, share_EE in enumerate(shares):
        start, middle, end = (num_experts * (boundary + i) for i in range(3))
        matrix_BB[start:middle, middle:end] -= share_EE / 2
        matrix_BB[middle:end, start:middle] -= share_EE.T / 2
        if level:
            weight = 4.0 * float(np.linalg.norm(share_EE)) / num_experts
            matrix_BB[start:end, start:end] += weight * np.kron(LEVEL, np.ones_like(share_EE))
    return Line(constant=float(len(shares)), share_E=np.zeros(len(matrix_BB)), matrix_EE=matrix_BB)
