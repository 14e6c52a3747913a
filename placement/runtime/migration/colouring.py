"""Edge colouring of a bipartite multigraph: sends and receives dealt out so that a rank has one at a time.

By König's theorem as many colours as the largest degree are enough; they are found by alternating paths,
one edge after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.errors import InputError

__all__ = ["Edge", "colour_edges"]

Edge = tuple[int | None, int | None]
"""Left and right end; None is an end of its own, which no other edge shares."""


def colour_edges(edges: Sequence[Edge], *, num_colours: int) -> list[int]:
    """Colour edges so that no two of one colour meet at either end.

    Parameters
    ----------
    edges
        Ends of each edge; either side numbers its nodes from 0.
    num_colours
        At least the largest number of edges at any node.

    Raises
    ------
    InputError
        If a node has more edges than there are colours.
    """
    colouring = _Colouring(edges, num_colours)
    for edge in range(len(edges)):
        colouring.add(edge)
    return colouring.colour


class _Colouring:
    """Colours of the edges added so far, and which edge has a colour at a node."""

    def __init__(self, edges: Sequence[Edge], num_colours: int) -> None:
        self.edges = edges
        self.colour = [-1] * len(edges)
        self._num_colours = num_colours
        self._edge_at: dict[tuple[int, int | None, int], int] = {}
        self._used: dict[tuple[int, int | None], int] = {}

    def add(self, edge: int) -> None:
        left, right = self._free(edge, 0), self._free(edge, 1)
        if not (left and right):
            raise InputError(f"{self._num_colours} colours are too few at an end of edge {self.edges[edge]}")
        if not left & right:
            self._swap(self.edges[edge][1], _lowest(left), _lowest(right))
            right = self._free(edge, 1)
        self._set(edge, _lowest(left & right))

    def _free(self, edge: int, side: int) -> int:
        """Colours that no edge has at one end of this edge, as bits."""
        return ((1 << self._num_colours) - 1) & ~self._used.get((side, self.edges[edge][side]), 0)

    def _swap(self, right: int | None, first: int, second: int) -> None:
        """Exchange two colours along the path that leaves a right node with the first of them.

        The path cannot end at the new edge's left end, where the first colour is free: it arrives at left
        nodes by that colour.
        """
        path = self._path(right, first, second)
        for edge in path:
            self._unset(edge)
        for edge in path:
            self._set(edge, first + second - self.colour[edge])

    def _path(self, right: int | None, colour: int, other: int) -> list[int]:
        path: list[int] = []
        side, node = 1, right
        while (edge := self._edge_at.get((side, node, colour))) is not None:
            path.append(edge)
            side, colour, other = 1 - side, other, colour
            node = self.edges[edge][side]
        return path

    def _set(self, edge: int, colour: int) -> None:
        self.colour[edge] = colour
        for side, node in enumerate(self.edges[edge]):
            if node is not None:
                self._edge_at[side, node, colour] = edge
                self._used[side, node] = self._used.get((side, node), 0) | 1 << colour

    def _unset(self, edge: int) -> None:
        for side, node in enumerate(self.edges[edge]):
            if node is not None:
                del self._edge_at[side, node, self.colour[edge]]
                self._used[side, node] &= ~(1 << self.colour[edge])


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
