"""Which windows of which trace were counted, and how they fall into groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Segment"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of one trace that was counted.

    Parameters
    ----------
    digest
        Digest of the trace.
    first_window, num_windows
        Its whole windows, numbered as in the trace.
    tail_tokens
        Tokens after the last whole window.
    """

    digest: str
    first_window: int
    num_windows: int
    tail_tokens: int = 0

    def continued_by(self, other: Segment) -> bool:
        """Tell whether `other` begins where this one ends, in the same trace."""
        return (
            self.digest == other.digest
            and not self.tail_tokens
            and self.first_window + self.num_windows == other.first_window
        )

    def num_multiples(self, stride: int) -> int:
        """How many `multiples` there are."""
        return -(-(self.first_window + self.num_windows) // stride) - -(-self.first_window // stride)

    def num_groups(self, stride: int) -> int:
        """How many `groups` there are."""
        if not self.num_windows:
            return 0
        return (self.first_window + self.num_windows - 1) // stride - self.first_window // stride + 1

    def multiples(self, stride: int) -> IntArray:
        """Numbers of the segment's windows that are multiples of `stride`."""
        first = -(-self.first_window // stride) * stride
        return np.arange(first, self.first_window + self.num_windows, stride)

    def groups(self, stride: int) -> IntArray:
        """Numbers of the groups of `stride` windows, counted from the trace's first, that it touches."""
        if not self.num_windows:
            return np.arange(0)
        last = self.first_window + self.num_windows - 1
        return np.arange(self.first_window // stride, last // stride + 1)

    def group_windows(self, stride: int) -> IntArray:
        """Windows of the segment in each of `groups`."""
        group = self.groups(stride)
        first = np.maximum(group * stride, self.first_window)
        last = np.minimum((group + 1) * stride, self.first_window + self.num_windows)
        return last - first
