"""A routing trace as a stream: blocks of consecutive tokens, so that no trace has to fit in memory.

Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from placement.errors import InputError
from traces.trace import MAX_EXPERTS, Trace, joined

__all__ = [
    "BLOCK_TOKENS",
    "MAX_LAYERS",
    "MemorySource",
    "TraceHeader",
    "TraceSource",
    "check_token_range",
    "read_all",
]

BLOCK_TOKENS = 1 << 16
"""Tokens of a block unless told otherwise."""

MAX_LAYERS = 1 << 14
"""MoE layers that a trace may have at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What all tokens of a trace have in common.

    Parameters
    ----------
    num_layers, num_experts, top_k
        Shape of the routing: MoE layers, logical experts per layer, experts per token and layer.
    model_name, moe_layer_ids, domain_names
        As in `Trace`.

    Raises
    ------
    InputError
        If a size is out of range.
    """

    num_layers: int
    num_experts: int
    top_k: int
    model_name: str | None = None
    moe_layer_ids: tuple[int, ...] | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise InputError(f"gives {self.num_layers!r} layers; 1 to {MAX_LAYERS} are possible")
        if not 1 <= self.top_k <= self.num_experts <= MAX_EXPERTS:
            raise InputError(
                f"gives top-{self.top_k} of {self.num_experts} experts; up to {MAX_EXPERTS} are possible"
            )

    @classmethod
    def of(cls, trace: Trace) -> TraceHeader:
        """Return the header of a trace in memory."""
        return cls(
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            model_name=trace.model_name,
            moe_layer_ids=trace.moe_layer_ids,
            domain_names=trace.domain_names,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an expert id, little-endian: one byte, or two above 256 experts."""
        return np.dtype("u1" if self.num_experts <= 256 else "<u2")

    def difference(self, other: TraceHeader) -> str | None:
        """Name the first field in which two headers differ, with both values."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} {theirs!r} against {mine!r}"
        return None


class TraceSource(Protocol):
    """A trace that is read in blocks, as often as wanted and from wherever wanted."""

    @property
    def header(self) -> TraceHeader:
        """What all tokens have in common."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        ...

    @property
    def digest(self) -> str:
        """``"sha256:..."`` of the content."""
        ...

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield tokens `start` to `stop` in blocks of at most `max_tokens`.

        Tokens come in the order in which they were routed: where several ranks recorded at the same time,
        each rank's share of a stretch of time lies together (`Trace.interleave_ranks`), so that windows of
        consecutive tokens hold what the cluster routed together.

        Raises
        ------
        InputError
            If the range is none of the trace's, or what is read is damaged.
        """
        ...


def check_token_range(start: int, stop: int | None, num_tokens: int) -> tuple[int, int]:
    """Return a token range with its end filled in.

    Raises
    ------
    InputError
        If it is not within the trace.
    """
    stop = num_tokens if stop is None else stop
    if not 0 <= start <= stop <= num_tokens:
        raise InputError(f"tokens {start} to {stop} are asked for of a trace of {num_tokens}")
    return start, stop


class MemorySource:
    """A trace in memory as a source.

    Parameters
    ----------
    trace
        The trace; its ranks are interleaved when first read.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.header = TraceHeader.of(trace)
        self.num_tokens = trace.num_tokens

    @cached_property
    def digest(self) -> str:
        """Digest of the trace."""
        return self.trace.digest

    @cached_property
    def _in_order(self) -> Trace:
        return self.trace.interleave_ranks()

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Yield slices of the trace; see `TraceSource.blocks`."""
        start, stop = check_token_range(start, stop, self.num_tokens)
        for first in range(start, stop, max_tokens):
            yield self._in_order.select_tokens(slice(first, min(first + max_tokens, stop)))


def read_all(source: TraceSource) -> Trace:
    """Return a whole source as a trace in memory, tokens in the source's order.

    Raises
    ------
    InputError
        If the source is damaged or empty.
    """
    return joined(list(source.blocks()))
