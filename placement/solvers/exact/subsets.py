"""Sets of experts as bit masks, ranked within their size.

Experts are renumbered by falling load, so that a search which places the lowest first decides on the hottest
first.

Shape letters: E experts, M masks, R masks of one size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["Subsets"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Subsets:
    """All subsets of some experts.

    Parameters
    ----------
    num_experts
        Experts, at most `MOST_EXPERTS` of `exact.size`.
    """

    num_experts: int

    @cached_property
    def rank_M(self) -> npt.NDArray[np.int32]:
        """Rank of every mask among those of its size, ``[2 ** experts]``."""
        rank_M = np.empty(1 << self.num_experts, dtype=np.int32)
        for size in range(self.num_experts + 1):
            rank_M[self.of_size(size)] = np.arange(self.of_size(size).size)
        return rank_M

    @cached_property
    def _by_size(self) -> tuple[IntArray, ...]:
        masks = np.arange(1 << self.num_experts, dtype=np.int64)
        size_M = np.bitwise_count(masks)
        # Ordered by lowest expert: those that hold the lowest expert left are a run.
        order = np.lexsort((masks, masks & -masks, size_M))
        bounds = np.searchsorted(size_M[order], np.arange(self.num_experts + 2))
        return tuple(masks[order[a:b]] for a, b in itertools.pairwise(bounds))

    def of_size(self, size: int) -> IntArray:
        """Return the masks of a size by rank, ``[masks of that size]``."""
        return self._by_size[size]

    def first_with_lowest(self, size: int) -> IntArray:
        """Return where the masks whose lowest expert is e begin among those of a size, ``[experts + 1]``."""
        masks = self.of_size(size)
        return np.searchsorted(masks & -masks, np.int64(1) << np.arange(self.num_experts + 1))

    def members(self, size: int) -> npt.NDArray[np.float64]:
        """Return which experts the masks of a size hold, as 0 and 1, ``[masks of that size, experts]``."""
        return np.asarray((self.of_size(size)[:, None] >> np.arange(self.num_experts)) & 1, dtype=np.float64)
