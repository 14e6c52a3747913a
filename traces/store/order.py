"""In which order tokens were routed, where several ranks recorded at the same time.

The same order as `Trace.interleave_ranks`, found stretch by stretch: the i-th of a rank's n tokens was met at
progress ``(i + 0.5) / n``, and tokens are ordered by progress, equal ones by rank.
Shape letters: R ranks, T tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.trace import IntArray

__all__ = ["RankOrder"]


class RankOrder:
    """The merged order of ranks whose tokens are only counted.

    Parameters
    ----------
    tokens_R
        Tokens of each rank, ranks ascending; none is 0.
    """

    def __init__(self, tokens_R: npt.ArrayLike) -> None:
        self._tokens_R: IntArray = np.asarray(tokens_R, dtype=np.int64)
        self._num_tokens = int(self._tokens_R.sum())

    def before(self, position: int) -> IntArray:
        """Return how many of the first `position` tokens each rank has, ``[ranks]``.

        At progress v a rank of n tokens has met n v of them, give or take a half; with R ranks, v is known
        to R / 2 tokens of the whole. Only the tokens within that distance are compared.
        """
        tokens_R, ranks = self._tokens_R, len(self._tokens_R)
        share_R = tokens_R / self._num_tokens
        expected_R, reach_R = share_R * position, share_R * ranks / 2 + 2
        # A float of a large position is off by little: two tokens more take care of it.
        low_R = np.clip(np.floor(expected_R - reach_R).astype(np.int64), 0, tokens_R)
        high_R = np.clip(np.ceil(expected_R + reach_R).astype(np.int64), 0, tokens_R)
        chosen = self.order(low_R, high_R)[: position - int(low_R.sum())]
        rank_T = np.repeat(np.arange(ranks), high_R - low_R)
        return low_R + np.bincount(rank_T[chosen], minlength=ranks)

    def order(self, low_R: IntArray, high_R: IntArray) -> IntArray:
        """Return the order of each rank's tokens `low_R` to `high_R`, listed rank after rank."""
        count_R = high_R - low_R
        start_R = np.cumsum(count_R) - count_R
        place_T = np.arange(int(count_R.sum())) - np.repeat(start_R - low_R, count_R)
        progress_T = (place_T + 0.5) / np.repeat(self._tokens_R, count_R)
        order_T: IntArray = np.argsort(progress_T, kind="stable")
        return order_T
