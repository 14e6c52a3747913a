"""Cuts a trace: a stretch, every other window, some domains, some sequences; as a stream.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.source import BLOCK_TOKENS, TraceSource, check_token_range
from traces.trace import IntArray, Trace

__all__ = ["Cut"]

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which tokens of a trace to keep, in the order in which they were routed.

    Parameters
    ----------
    start, stop
        Stretch of tokens; to the end by default.
    window_tokens
        Consecutive tokens per window, counted from `start`. With `fold` or `every` whole windows alone are
        kept.
    fold
        ``even`` keeps windows 0, 2, 4, ... (to fit on), ``odd`` the others (to score on).
    every
        Keep the first of so many windows.
    domains
        Names of the domains to keep; all where there are none.
    sequence_share
        Share of the sequences to keep, whole ones, 0 to 1.
    seed
        Decides which sequences these are, the same in every process and every piece of the trace.

    Raises
    ------
    InputError
        If the choices make no sense.
    """

    start: int = 0
    stop: int | None = None
    window_tokens: int | None = None
    fold: Literal["even", "odd"] | None = None
    every: int | None = None
    domains: tuple[str, ...] = ()
    sequence_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fold is not None and self.every is not None:
            raise InputError("a fold and every n-th window are two different cuts; choose one")
        if self.fold not in (None, "even", "odd"):
            raise InputError(f"the fold {self.fold!r} is unknown; it is even or odd")
        if self.windows_matter and (self.window_tokens is None or self.window_tokens < 1):
            raise InputError("windows of how many tokens? give a number of 1 or more")
        if self.every is not None and self.every < 1:
            raise InputError(f"every {self.every}th window is impossible; use 1 or more")
        if self.sequence_share is not None and not 0 < self.sequence_share <= 1:
            raise InputError(f"a share of {self.sequence_share:g} of the sequences is impossible; use 0 to 1")

    @property
    def windows_matter(self) -> bool:
        """Tell whether the cut follows windows."""
        return self.fold is not None or self.every is not None

    def check(self, source: TraceSource) -> None:
        """Refuse a stretch or a domain that is not the trace's.

        Raises
        ------
        InputError
            If one is.
        """
        check_token_range(self.start, self.stop, source.num_tokens)
        self._domains(source)

    def blocks(self, source: TraceSource, *, max_tokens: int = BLOCK_TOKENS) -> Iterator[Trace]:
        """Yield what is kept.

        Raises
        ------
        InputError
            If the stretch, a domain or sequences are not the trace's, or it is damaged.
        """
        start, stop = check_token_range(self.start, self.stop, source.num_tokens)
        domains = self._domains(source)
        for first, last in self._stretches(start, stop):
            for block in source.blocks(first, last, max_tokens=max_tokens):
                kept_T = self._kept(block, domains)
                if kept_T is None or kept_T.all():
                    yield block
                elif kept_T.any():
                    yield block.select_tokens(kept_T)

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        if not self.windows_matter or self.window_tokens is None:
            yield start, stop
            return
        step = self.every or 2
        for window in range(1 if self.fold == "odd" else 0, (stop - start) // self.window_tokens, step):
            first = start + window * self.window_tokens
            yield first, first + self.window_tokens

    def _domains(self, source: TraceSource) -> IntArray | None:
        if not self.domains:
            return None
        names = source.header.domain_names
        for name in self.domains:
            if name not in names:
                raise InputError(
                    f"no domain is called {name!r}; "
                    + (f"there are {', '.join(map(repr, names))}" if names else "the trace has no domains")
                )
        return np.array([names.index(name) for name in self.domains])

    def _kept(self, block: Trace, domains: IntArray | None) -> Mask | None:
        masks: list[Mask] = []
        if domains is not None:
            none_T = np.zeros(block.num_tokens, dtype=bool)
            masks.append(none_T if block.domain_T is None else np.isin(block.domain_T, domains))
        if self.sequence_share is not None:
            if block.sequence_T is None:
                raise InputError("the trace does not say which tokens are one sequence")
            draw_T = _draw(block.sequence_T, block.rank_T, self.seed)
            masks.append(draw_T < self.sequence_share)
        return np.logical_and.reduce(masks) if masks else None


def _draw(sequence_T: IntArray, rank_T: IntArray | None, seed: int) -> npt.NDArray[np.float64]:
    """Return a number in 0..1 for every token, the same for all of a sequence, as if drawn at random."""
    mixed_T = _mix(sequence_T.astype(np.uint64) ^ _mix(np.array([seed & (2**64 - 1)], dtype=np.uint64)))
    if rank_T is not None:
        mixed_T = _mix(mixed_T ^ _mix(rank_T.astype(np.uint64)))
    return (mixed_T >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit numbers: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
