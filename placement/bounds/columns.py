"""Every group that a partition of experts could have, and what each group costs, where they can be listed.

A group of experts knows exactly what it costs: the load of its device in each window, and the tokens that
enter it, each once. Tokens are counted by inclusion and exclusion over the parts of a group, whose counts
serve all groups that they are in.

Shape letters: S sets of experts, M members of a set, P parts of one size, W windows, E experts, T tokens,
K top-k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from placement.bounds.partition import Groups
from placement.bounds.terms import Touches

__all__ = ["GroupColumns", "count_columns", "group_columns", "touching"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupColumns:
    """All sets of experts that can be a group.

    Parameters
    ----------
    groups
        Equal groups, without places for replicas.
    members_SM
        Experts of each set, ascending; places that stay empty hold a dummy, which comes after all experts.
    """

    groups: Groups
    members_SM: IntArray

    @property
    def num_dummies(self) -> int:
        """Places of all groups that stay empty."""
        return self.groups.num_places - self.groups.num_experts

    @cached_property
    def demand_E(self) -> FloatArray:
        """How often a partition holds each expert, and dummies: ``[experts + 1]``."""
        demand_E = np.ones(self.groups.num_experts + 1)
        demand_E[-1] = self.num_dummies
        return demand_E

    @cached_property
    def any_partition(self) -> IntArray:
        """Sets of some partition: experts in their order, as many in each group as fit."""
        size, slots = self.groups.num_experts, self.groups.slots
        rows = np.minimum(np.arange(self.groups.num_places), size).reshape(-1, slots)
        return np.array([np.nonzero((self.members_SM == row).all(axis=1))[0][0] for row in rows])

    def sums(self, value_E: FloatArray) -> FloatArray:
        """Return each set's sum of a value of experts and of the dummy, ``[sets]``."""
        return np.asarray(value_E[self.members_SM].sum(axis=1))


def count_columns(groups: Groups) -> int:
    """Return how many sets of experts can be a group."""
    fewest = groups.slots if groups.num_places == groups.num_experts else 0
    return sum(math.comb(groups.num_experts, size) for size in range(fewest, groups.slots + 1))


@lru_cache(maxsize=2)
def group_columns(groups: Groups) -> GroupColumns:
    """List all sets of experts that can be a group; sets that leave places empty only where some must be."""
    size, slots = groups.num_experts, groups.slots
    fewest = slots if groups.num_places == size else 0
    parts = []
    for count in range(slots, fewest - 1, -1):
        members_SM = np.full((math.comb(size, count), slots), size)
        members_SM[:, :count] = _subsets(range(size), count)
        parts.append(members_SM)
    return GroupColumns(groups=groups, members_SM=np.concatenate(parts))


def _subsets(items: Iterable[int], count: int) -> IntArray:
    flat = itertools.chain.from_iterable(itertools.combinations(items, count))
    return np.fromiter(flat, dtype=np.int64).reshape(-1, count) if count else np.zeros((1, 0), dtype=np.int64)


def touching(tokens: Touches, columns: GroupColumns, *, num_windows: int) -> FloatArray:
    """Return the weight of the tokens that touch each set in each window, ``[sets, windows]``.

    Parameters
    ----------
    tokens
        Tokens of windows below `num_windows`; those of others are left out.
    """
    inside_T = tokens.window_T < num_windows
    experts_TK = np.sort(tokens.experts_TK[inside_T].astype(np.int64), axis=1)
    window_T, weight_T = tokens.window_T[inside_T], tokens.weight_T[inside_T]
    size, slots = columns.groups.num_experts, columns.groups.slots
    touching_SW = np.zeros((len(columns.members_SM), num_windows))
    for count in range(1, min(slots, experts_TK.shape[1]) + 1):
        # The last row, of no tokens, is that of sets with the dummy.
        together_PW = np.zeros((math.comb(size, count) + 1, num_windows))
        for places in _subsets(range(experts_TK.shape[1]), count):
            cell_T = _position(experts_TK[:, places], size) * num_windows + window_T
            together_PW += np.bincount(cell_T, weights=weight_T, minlength=together_PW.size).reshape(
                together_PW.shape
            )
        sign = 1.0 if count % 2 else -1.0
        for places in _subsets(range(slots), count):
            touching_SW += sign * together_PW[_position(columns.members_SM[:, places], size)]
    return touching_SW


def _position(subset_XM: IntArray, size: int) -> IntArray:
    """Return where ascending subsets of experts stand among all of their size; those with a dummy, last."""
    count = subset_XM.shape[1]
    binomial_EM = np.array([[math.comb(e, m + 1) for m in range(count)] for e in range(size + 1)])
    position_X = binomial_EM[subset_XM, np.arange(count)].sum(axis=1)
    return np.where(subset_XM[:, -1] == size, math.comb(size, count), position_X)
