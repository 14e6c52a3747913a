"""Counts a trace in one pass, block by block, in bounded memory; threads share the layers out.

Shape letters: T tokens, L MoE layers, K top-k, E experts, P pieces of windows, R ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.source import MemorySource, TraceHeader, TraceSource, check_token_range
from traces.statistics.crew import Crew
from traces.statistics.groups import Ranks, by_group
from traces.statistics.plan import DEFAULT_MEMORY_BYTES, PARTS, MemoryPlan, plan_memory
from traces.statistics.reservoir import Reservoir
from traces.statistics.routing import RoutingStatistics
from traces.statistics.segment import Segment
from traces.trace import Trace

if TYPE_CHECKING:
    from traces.store import ColumnBlock

__all__ = ["collect", "collect_planned", "columns"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_NO_ROW = -1


def collect(
    source: Trace | TraceSource,
    *,
    window_tokens: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    max_sampled_tokens: int | None = None,
    parts: Collection[str] = PARTS,
    start: int = 0,
    stop: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> RoutingStatistics:
    """Count a trace, or a range of its tokens, in one pass.

    Parts of a trace that are counted apart, with the same options, merge into what one pass gives
    (`traces.statistics.merge`).

    Parameters
    ----------
    source
        The trace.
    window_tokens
        Consecutive tokens per window.
    memory_bytes
        Memory that the pass may take, in bytes; `traces.statistics.plan` says what goes into it. What does
        not fit is thinned or estimated, and the result says so.
    max_sampled_tokens
        Tokens whose expert sets are kept, as many of every window; 0 for none. Default: 65,536, or one of
        every window if there are more windows.
    parts
        What to count beside loads, of `PARTS`.
    start, stop
        Tokens to count; `start` begins a window.
    seed
        Seed of the sample.
    threads
        Threads; all cores by default. The result does not depend on them.
    progress
        Is told how many tokens have been read, block by block.

    Raises
    ------
    InputError
        If the trace is damaged, a number is out of range, or the memory is too small for the loads.
    """
    source = MemorySource(source) if isinstance(source, Trace) else source
    plan = plan_memory(
        source.header,
        num_tokens=source.num_tokens,
        window_tokens=window_tokens,
        memory_bytes=memory_bytes,
        max_sampled_tokens=max_sampled_tokens,
        parts=parts,
    )
    return collect_planned(
        source,
        plan,
        window_tokens=window_tokens,
        start=start,
        stop=stop,
        seed=seed,
        threads=threads,
        digest=source.digest,
        progress=progress,
    )


def collect_planned(
    source: TraceSource,
    plan: MemoryPlan,
    *,
    window_tokens: int,
    digest: str,
    start: int = 0,
    stop: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> RoutingStatistics:
    """Count as `collect` does, with the memory shared out as `plan` says."""
    start, stop = check_token_range(start, stop, source.num_tokens)
    if start % window_tokens:
        raise InputError(f"token {start} begins no window of {window_tokens}; start at a multiple of it")
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads are impossible; use at least 1")
    windows, tail = divmod(stop - start, window_tokens)
    segment = Segment(
        digest=digest, first_window=start // window_tokens, num_windows=windows, tail_tokens=tail
    )
    counts = _Counts(source.header, plan, segment, window_tokens, seed)
    workers = min(threads or _num_cores(), plan.most_threads, source.header.num_layers)
    with Crew(workers, source.header.num_experts) as crew:
        token = start
        for block in columns(source, start, stop, max_tokens=plan.block_tokens):
            _check_ids(block, source.header)
            crew.start(len(block.ids_LTK), counts.layer_counter(block, token))
            counts.look_at(block, token)
            token += block.num_tokens
            if progress is not None:
                progress(token - start)
    if token != stop:
        raise InputError(f"the trace ends after {token} tokens of {stop}; it is damaged")
    return counts.statistics()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def columns(source: TraceSource, start: int, stop: int, *, max_tokens: int) -> Iterator[ColumnBlock]:
    """Yield the tokens of a source with each layer's ids in one piece."""
    from traces.store.columns import ColumnBlock, ColumnSource

    if isinstance(source, ColumnSource):
        yield from source.columns(start, stop, max_tokens=max_tokens)
        return
    for block in source.blocks(start, stop, max_tokens=max_tokens):
        yield ColumnBlock(
            ids_LTK=tuple(_turned(block.experts_TLK)),
            sequence_T=block.sequence_T,
            position_T=block.position_T,
            rank_T=block.rank_T,
            domain_T=block.domain_T,
        )


def _turned(ids_TLK: Array) -> Array:
    from traces.statistics.kernels import turn

    num_tokens, num_layers, top_k = ids_TLK.shape
    out_LTK = np.empty((num_layers, num_tokens, top_k), dtype=ids_TLK.dtype)
    ids_TLK = np.ascontiguousarray(ids_TLK)
    word = f"u{top_k * ids_TLK.itemsize}"
    if word in ("u1", "u2", "u4", "u8"):
        # All of a token's experts move at once.
        turn(ids_TLK.view(word), out_LTK.view(word))
    else:
        turn(ids_TLK, out_LTK)
    return out_LTK


def _check_ids(block: ColumnBlock, header: TraceHeader) -> None:
    """Refuse ids that are none of the model's: compiled code would write beside its tables."""
    if np.iinfo(header.dtype).max < header.num_experts:
        return
    for layer, ids_TK in enumerate(block.ids_LTK):
        highest = int(ids_TK.max())
        if highest >= header.num_experts:
            raise InputError(f"layer {layer} names expert {highest}, outside 0..{header.num_experts - 1}")


class _Counts:
    """Everything that one pass adds up."""

    def __init__(
        self, header: TraceHeader, plan: MemoryPlan, segment: Segment, window_tokens: int, seed: int
    ) -> None:
        self._header, self._plan, self._segment = header, plan, segment
        self._window_tokens = window_tokens
        layers, experts = header.num_layers, header.num_experts
        loads, pairs = (layers, experts), (experts, experts)
        windows, stretches = (
            segment.num_multiples(plan.window_stride),
            segment.num_groups(plan.time_windows),
        )
        # Zeroed memory is not touched before it is used, so generous room for ranks costs nothing.
        self._rest_LE = np.zeros(loads, dtype=plan.count_dtype)
        self._load_WLE = np.zeros((windows, *loads), dtype=plan.window_dtype)
        self._time_load_BLE = np.zeros((stretches, *loads), dtype=plan.count_dtype)

        def zeros(part: str, *shape: int) -> Array | None:
            return np.zeros(shape, dtype=plan.count_dtype) if part in plan.parts else None

        self._transitions = zeros("transitions", layers - 1, *pairs)
        self._first_transitions = zeros("first-transitions", layers - 1, *pairs)
        self._coactivation = zeros("coactivation", layers, *pairs)
        self._home_load = zeros("homes", plan.most_ranks, *loads)
        domains = len(header.domain_names)
        self._domain_load = zeros("domains", domains, *loads) if domains else None
        self._domain_tokens = np.zeros(domains, dtype=np.int64) if domains else None
        self._ranks = Ranks()
        self._reservoir = Reservoir(header, plan, segment, window_tokens=window_tokens, seed=seed)

    def look_at(self, block: ColumnBlock, first_token: int) -> None:
        """Take from a block what is known token by token: the sample, ranks, domains."""
        self._reservoir.take(block, first_token)
        if self._domain_tokens is not None and block.domain_T is not None:
            known = block.domain_T[block.domain_T >= 0]
            self._domain_tokens += np.bincount(known, minlength=len(self._domain_tokens))

    def layer_counter(self, block: ColumnBlock, first_token: int) -> Callable[[int, Array], None]:
        """Return what adds one layer of a block to the counts, with a table to use."""
        from traces.statistics import kernels

        stop_P, window_P, time_P = self._pieces(first_token, block.num_tokens)
        ids_LTK, last = block.ids_LTK, len(block.ids_LTK) - 1
        rank_row_T = None if block.rank_T is None else self._ranks.rows(block.rank_T)
        if self._ranks.num_ranks > self._plan.most_ranks:
            self._home_load = None
        groups = [
            (load_GLE, *by_group(group_T, len(load_GLE)))
            for load_GLE, group_T in (
                (self._home_load, rank_row_T),
                (self._domain_load, block.domain_T),
            )
            if load_GLE is not None and group_T is not None
        ]

        def count_layer(layer: int, table_EE: Array) -> None:
            ids_TK = ids_LTK[layer]
            kernels.count_loads(
                ids_TK,
                layer,
                stop_P,
                window_P,
                time_P,
                self._load_WLE,
                self._time_load_BLE,
                self._rest_LE,
            )
            for load_GLE, order_T, stop_G in groups:
                kernels.count_groups(ids_TK, layer, order_T, stop_G, load_GLE)
            if self._coactivation is not None:
                kernels.count_coactivation(ids_TK, table_EE, self._coactivation[layer])
            if layer < last and self._transitions is not None:
                kernels.count_transitions(ids_TK, ids_LTK[layer + 1], table_EE, self._transitions[layer])
            if layer < last and self._first_transitions is not None:
                kernels.count_first_transitions(ids_TK, ids_LTK[layer + 1], self._first_transitions[layer])

        return count_layer

    def _pieces(self, first_token: int, num_tokens: int) -> tuple[IntArray, IntArray, IntArray]:
        """Cut a block at the ends of windows: where pieces end, and the rows that they add to."""
        window_tokens, segment = self._window_tokens, self._segment
        first = first_token // window_tokens
        last = (first_token + num_tokens - 1) // window_tokens
        number_P = np.arange(first, last + 1)
        stop_P = np.minimum((number_P + 1) * window_tokens - first_token, num_tokens)
        whole_P = number_P < segment.first_window + segment.num_windows
        stride, size = self._plan.window_stride, self._plan.time_windows
        window_P = number_P // stride - -(-segment.first_window // stride)
        time_P = number_P // size - segment.first_window // size
        window_P[~whole_P | (number_P % stride != 0)] = _NO_ROW
        time_P[~whole_P] = _NO_ROW
        return stop_P, window_P, time_P

    def statistics(self) -> RoutingStatistics:
        """Return what was counted; the counts are handed over, not copied."""
        if self._coactivation is not None:
            for count_EE in self._coactivation:
                count_EE += count_EE.T.copy()
        load_LE = self._time_load_BLE.sum(axis=0, dtype=np.uint64) + self._rest_LE
        rank_R, rank_tokens_R, home_load = self._ranks.sorted(self._home_load)
        return RoutingStatistics(
            header=self._header,
            window_tokens=self._window_tokens,
            segments=(self._segment,),
            window_stride=self._plan.window_stride,
            load_LE=load_LE,
            load_WLE=self._load_WLE,
            time_windows=self._plan.time_windows,
            time_load_BLE=self._time_load_BLE,
            sample=self._reservoir.sample(),
            transitions_LEE=self._transitions,
            first_transitions_LEE=self._first_transitions,
            coactivation_LEE=self._coactivation,
            rank_R=rank_R,
            rank_tokens_R=rank_tokens_R,
            home_load_RLE=home_load,
            most_ranks=self._plan.most_ranks,
            domain_tokens_C=self._domain_tokens,
            domain_load_CLE=self._domain_load,
        )
