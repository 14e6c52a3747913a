"""A tree of merges whose shape depends on the number of leaves alone, so that results do not depend on luck.

Sums of floating-point numbers change with the order of the summands. Here results are merged as soon as those
beside them are there, yet always with the same ones and in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAN_IN", "Merge", "Node", "TreeReduction"]

FAN_IN = 8
"""Results that one merge takes: wide enough for few levels, narrow enough for many merges at a time."""


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A place in the tree: leaves have level 0."""

    level: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What is to be merged now, in this order, for a node."""

    node: Node
    parts: tuple[Any, ...]


@dataclass(eq=False)
class TreeReduction:
    """Says which results to merge next.

    A leaf may have no result (None): it was set aside. The merges around it keep their place.

    Parameters
    ----------
    num_leaves
        Results to reduce, 1 or more.
    fan_in
        Results that one merge takes.
    """

    num_leaves: int
    fan_in: int = FAN_IN
    root: Any = None
    done: bool = False
    _level_sizes: list[int] = field(init=False)
    _results: dict[Node, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._level_sizes = [self.num_leaves]
        while self._level_sizes[-1] > 1:
            self._level_sizes.append(-(-self._level_sizes[-1] // self.fan_in))

    @property
    def depth(self) -> int:
        """Merges between a leaf and the root."""
        return len(self._level_sizes) - 1

    def put(self, node: Node, result: Any) -> Merge | None:
        """Take the result of a leaf or a merge; return the merge that it was the last part of, if any."""
        if node.level == self.depth:
            self.root, self.done = result, True
            return None
        self._results[node] = result
        above = Node(node.level + 1, node.index // self.fan_in)
        first = above.index * self.fan_in
        last = min(first + self.fan_in, self._level_sizes[node.level])
        beside = [Node(node.level, index) for index in range(first, last)]
        if not all(other in self._results for other in beside):
            return None
        found = (self._results.pop(other) for other in beside)
        parts = tuple(part for part in found if part is not None)
        if len(parts) > 1:
            return Merge(node=above, parts=parts)
        # One part, or none, needs no merge: it moves up.
        return self.put(above, parts[0] if parts else None)
