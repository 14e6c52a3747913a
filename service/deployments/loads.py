"""Load windows put together: the parts of all ranks added up, complete windows alone.

Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.deployments.records import StoredPart

__all__ = ["Windows", "merge_parts", "unpacked"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Complete windows in order of their arrival.

    Parameters
    ----------
    load_WLE
        Token-expert pairs of all ranks together.
    window_W
        The caller's numbers of the windows.
    first_W, last_W
        Numbers of the first and the last part of each window.
    tokens_W
        Tokens as the ranks gave them.
    num_incomplete
        Windows that lack the part of a rank.
    """

    load_WLE: IntArray
    window_W: IntArray
    first_W: IntArray
    last_W: IntArray
    tokens_W: npt.NDArray[np.float64]
    num_incomplete: int

    def __len__(self) -> int:
        return len(self.window_W)

    def select(self, chosen: npt.ArrayLike) -> Windows:
        """Return some of the windows, by mask or index."""
        index = np.asarray(chosen)
        return Windows(
            load_WLE=self.load_WLE[index],
            window_W=self.window_W[index],
            first_W=self.first_W[index],
            last_W=self.last_W[index],
            tokens_W=self.tokens_W[index],
            num_incomplete=self.num_incomplete,
        )

    def latest(self, count: int) -> Windows:
        """Return the latest windows, at most `count`."""
        return self.select(np.arange(max(0, len(self) - count), len(self)))

    def behind(self, number: int) -> Windows:
        """Return the windows of which every part came after a number."""
        return self.select(self.first_W > number)


def unpacked(load: bytes, *, num_layers: int, num_experts: int) -> IntArray:
    """Return the counts of a part, ``[layers, experts]``."""
    flat = np.frombuffer(zlib.decompress(load), dtype="<i8")
    return flat.reshape(num_layers, num_experts)


def merge_parts(parts: Sequence[StoredPart], *, num_ranks: int, num_layers: int, num_experts: int) -> Windows:
    """Add up the parts of each window; windows without a part of every rank are left out.

    A window without any pair says nothing and is left out too.
    """
    by_window: dict[int, list[StoredPart]] = {}
    for part in parts:
        by_window.setdefault(part.window, []).append(part)
    complete = sorted(
        (some for some in by_window.values() if len(some) >= num_ranks),
        key=lambda some: max(part.number for part in some),
    )
    load_WLE = np.zeros((len(complete), num_layers, num_experts), dtype=np.int64)
    for row_LE, some in zip(load_WLE, complete, strict=True):
        for part in some:
            row_LE += unpacked(part.load, num_layers=num_layers, num_experts=num_experts)
    windows = Windows(
        load_WLE=load_WLE,
        window_W=_integers([some[0].window for some in complete]),
        first_W=_integers([min(part.number for part in some) for some in complete]),
        last_W=_integers([max(part.number for part in some) for some in complete]),
        tokens_W=np.array([sum(part.tokens for part in some) for some in complete], dtype=np.float64),
        num_incomplete=len(by_window) - len(complete),
    )
    return windows.select(load_WLE.any(axis=(1, 2)))


def _integers(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
