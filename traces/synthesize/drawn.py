"""A synthetic trace as a source: block by block, any block without those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np

from placement.errors import InputError
from traces.source import BLOCK_TOKENS, TraceHeader, check_token_range
from traces.trace import Trace, joined

__all__ = ["DrawnSource", "block_generator"]


class DrawnSource:
    """A trace whose blocks are drawn when they are read; the same block is the same every time.

    Parameters
    ----------
    header
        What all tokens have in common.
    num_tokens
        Tokens in all.
    drawn_tokens
        Tokens drawn at once; the last block may be shorter.
    draw
        Draws a block by its number and size.

    Raises
    ------
    InputError
        If there is no token.
    """

    def __init__(
        self, header: TraceHeader, num_tokens: int, drawn_tokens: int, draw: Callable[[int, int], Trace]
    ) -> None:
        if num_tokens < 1:
            raise InputError(f"num_tokens is {num_tokens}; use at least 1")
        self.header = header
        self.num_tokens = num_tokens
        self._drawn_tokens = drawn_tokens
        self._draw = draw

    @cached_property
    def digest(self) -> str:
        """``"sha256:..."`` of the content; draws everything once."""
        from traces.importers.records import content_digest

        return content_digest(self)

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield tokens in blocks, drawing only those that the range touches; see `TraceSource.blocks`."""
        start, stop = check_token_range(start, stop, self.num_tokens)
        waiting: list[Trace] = []
        room = max_tokens
        for trace in self._parts(start, stop):
            taken = 0
            while taken < trace.num_tokens:
                end = min(trace.num_tokens, taken + room)
                waiting.append(trace.select_tokens(slice(taken, end)))
                room -= end - taken
                taken = end
                if not room:
                    yield joined(waiting)
                    waiting, room = [], max_tokens
        if waiting:
            yield joined(waiting)

    def _parts(self, start: int, stop: int) -> Iterator[Trace]:
        size = self._drawn_tokens
        if start == stop:
            return
        for block in range(start // size, -(-stop // size)):
            first = block * size
            tokens = min(size, self.num_tokens - first)
            trace = self._draw(block, tokens)
            yield trace.select_tokens(slice(max(start - first, 0), min(stop - first, tokens)))


def block_generator(seed: int, block: int, *, stream: int = 1) -> np.random.Generator:
    """Return the generator of one block, independent of every other block's."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, block)))
