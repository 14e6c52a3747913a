"""Puts statistics together: yesterday's and today's, or those of several processes.

Shape letters: W windows kept, L MoE layers, E experts, T sampled tokens, S strata, R ranks, C domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.statistics.routing import RoutingStatistics
from traces.statistics.sample import TOKEN_FIELDS, TokenSample, lowest
from traces.statistics.segment import Segment
from traces.trace import UNKNOWN_DOMAIN

__all__ = ["fitted", "merge", "thinned"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_MOST_STRETCHES = 128
_PAIRS = ("transitions_LEE", "first_transitions_LEE", "coactivation_LEE")


def merge(parts: Iterable[RoutingStatistics]) -> RoutingStatistics:
    """Return the statistics of everything that was counted, in the order given.

    Consecutive parts of one trace give what one pass over it gives. The order of merging does not matter,
    only that of the parts. Where parts keep every window, or every second, the result keeps every second;
    of samples of different sizes the smaller is kept of both, so that all tokens weigh what they should.
    What one part has not counted the result does not have, but for ranks and domains, which not every trace
    knows.

    Parameters
    ----------
    parts
        Statistics with the same shape, model and window size. Domains go by their names.

    Raises
    ------
    InputError
        If there is no part, or parts do not fit together.
    """
    parts = list(parts)
    if not parts:
        raise InputError("there are no statistics to merge")
    return reduce(_merged, parts)


def _merged(first: RoutingStatistics, second: RoutingStatistics) -> RoutingStatistics:
    first, second = _with_same_domains(first, second)
    stride = max(first.window_stride, second.window_stride)
    size = max(first.time_windows, second.time_windows)
    first, second = (thinned(part, stride=stride, time_windows=size) for part in (first, second))
    joined = bool(first.segments) and first.segments[-1].continued_by(second.segments[0])
    segments = _joined_segments(first.segments, second.segments, joined)
    num_tokens = first.num_tokens + second.num_tokens
    counts = np.dtype(np.uint32 if num_tokens < 1 << 32 else np.uint64)

    changed: dict[str, Any] = {
        **{name: _added(first, second, name, counts) for name in _PAIRS},
        **_merged_ranks(first, second, counts),
        **_merged_domains(first, second, counts),
    }
    return replace(
        first,
        segments=segments,
        load_LE=np.add(first.load_LE, second.load_LE, dtype=np.uint64),
        load_WLE=np.concatenate([first.load_WLE, second.load_WLE]),
        time_load_BLE=_joined_rows(
            first.time_load_BLE.astype(counts), second.time_load_BLE, joined and _shares(first, second, size)
        ),
        sample=_merged_sample(first, second, joined and _shares(first, second, stride)),
        **changed,
    )


def _added(
    first: RoutingStatistics, second: RoutingStatistics, name: str, dtype: npt.DTypeLike
) -> Array | None:
    """Add up a count that both parts have."""
    mine, theirs = getattr(first, name), getattr(second, name)
    return None if mine is None or theirs is None else np.add(mine, theirs, dtype=dtype)


def _shares(first: RoutingStatistics, second: RoutingStatistics, size: int) -> bool:
    """Tell whether a group of `size` windows begins in one part and goes on in the next."""
    mine, theirs = first.segments[-1].groups(size), second.segments[0].groups(size)
    return bool(mine.size and theirs.size and mine[-1] == theirs[0])


def _joined_segments(
    first: Sequence[Segment], second: Sequence[Segment], joined: bool
) -> tuple[Segment, ...]:
    if not joined:
        return (*first, *second)
    last, following = first[-1], second[0]
    whole = replace(
        last, num_windows=last.num_windows + following.num_windows, tail_tokens=following.tail_tokens
    )
    return (*first[:-1], whole, *second[1:])


def _joined_rows(first: Array, second: Array, shared: bool) -> Array:
    """Concatenate rows; a row that lies in both parts is added up."""
    if not shared:
        return np.concatenate([first, second], dtype=first.dtype)
    both = first[-1:] + second[:1]
    return np.concatenate([first[:-1], both, second[1:]], dtype=first.dtype)


# -- coarser parts -------------------------------------------------------------------------------------------


def thinned(statistics: RoutingStatistics, *, stride: int, time_windows: int) -> RoutingStatistics:
    """Keep fewer windows, fewer stretches of time and a smaller sample, as if collected so.

    Parameters
    ----------
    statistics
        The statistics.
    stride, time_windows
        New `window_stride` and `time_windows`, powers of two and not less than the old ones.
    """
    if stride > statistics.window_stride:
        kept_W = statistics.window_index_W % stride == 0
        sample = statistics.sample
        if sample is not None:
            row_S = _group_rows(statistics.segments, statistics.window_stride, stride)
            strata = int(row_S[-1]) + 1 if row_S.size else 0
            stratum_T = np.append(row_S, strata)[sample.stratum_T]
            sample = _cut(replace(sample, stratum_T=stratum_T), sample.most_per_stratum, strata)
            if sample.most_per_stratum < stride * statistics.window_tokens:
                sample = _without_tail(sample, strata)
        statistics = replace(
            statistics, window_stride=stride, load_WLE=statistics.load_WLE[kept_W], sample=sample
        )
    if time_windows > statistics.time_windows:
        row_B = _group_rows(statistics.segments, statistics.time_windows, time_windows)
        first_B = np.flatnonzero(np.diff(row_B, prepend=-1))
        load = statistics.time_load_BLE
        if row_B.size:
            load = np.add.reduceat(load, first_B, axis=0, dtype=np.uint64)
        statistics = replace(statistics, time_windows=time_windows, time_load_BLE=load)
    return statistics


def fitted(statistics: RoutingStatistics, *, memory_bytes: int) -> RoutingStatistics:
    """Keep fewer windows, stretches of time and sampled tokens, until all fits into memory.

    Statistics that are added to day by day grow by each day's windows and sample; this halves both as often
    as needed. Exact totals and pair counts stay.

    Parameters
    ----------
    statistics
        The statistics.
    memory_bytes
        Size that the arrays should have at most, in bytes. Totals, pair counts and a window of each segment
        are kept in any case.
    """
    while len(statistics.time_load_BLE) > max(_MOST_STRETCHES, len(statistics.segments)):
        statistics = thinned(
            statistics, stride=statistics.window_stride, time_windows=2 * statistics.time_windows
        )
    while statistics.size_bytes > memory_bytes and statistics.num_strata > len(statistics.segments):
        statistics = thinned(
            statistics, stride=2 * statistics.window_stride, time_windows=statistics.time_windows
        )
    return statistics


def _group_rows(segments: Sequence[Segment], size: int, larger: int) -> IntArray:
    """Row among groups of `larger` windows of each group of `size`; no group reaches over two segments."""
    rows, first = [np.zeros(0, dtype=np.int64)], 0
    for segment in segments:
        group = segment.groups(size) * size // larger
        if group.size:
            rows.append(group - group[0] + first)
            first = int(rows[-1][-1]) + 1
    return np.concatenate(rows)


# -- samples -------------------------------------------------------------------------------------------------


def _merged_sample(first: RoutingStatistics, second: RoutingStatistics, shared: bool) -> TokenSample | None:
    mine, theirs = first.sample, second.sample
    if mine is None or theirs is None:
        return None
    strata = first.num_strata + second.num_strata - shared
    tails = first.num_strata, second.num_strata
    stratum = [mine.stratum_T, theirs.stratum_T + first.num_strata - shared]
    stratum = [
        np.where(sample.stratum_T == tail, strata, stratum_T)
        for sample, tail, stratum_T in zip((mine, theirs), tails, stratum, strict=True)
    ]
    stratum_T = np.concatenate(stratum)
    order_T = np.argsort(stratum_T, kind="stable")
    most = min(mine.most_per_stratum, theirs.most_per_stratum)
    both = TokenSample(
        experts_TLK=np.concatenate([mine.experts_TLK, theirs.experts_TLK]),
        token_T=np.concatenate([mine.token_T, theirs.token_T]),
        stratum_T=stratum_T,
        priority_T=np.concatenate([mine.priority_T, theirs.priority_T]),
        most_per_stratum=most,
        **{name: _joined_field(mine, theirs, name) for name in TOKEN_FIELDS},
    )
    if (np.diff(order_T) < 0).any():
        both = both.select(order_T)
    both = _cut(both, most, strata)
    return both if most >= first.window_stride * first.window_tokens else _without_tail(both, strata)


def _joined_field(mine: TokenSample, theirs: TokenSample, name: str) -> IntArray | None:
    if not (mine.num_tokens and theirs.num_tokens):
        return getattr(mine if mine.num_tokens else theirs, name)  # type: ignore[no-any-return]
    both = [getattr(sample, name) for sample in (mine, theirs)]
    if name == "domain_T" and any(field is not None for field in both):
        both = [
            np.full(sample.num_tokens, UNKNOWN_DOMAIN) if field is None else field
            for sample, field in zip((mine, theirs), both, strict=True)
        ]
    # Known of some tokens alone is as good as unknown.
    return None if any(field is None for field in both) else np.concatenate(both)


def _cut(sample: TokenSample, most: int, strata: int) -> TokenSample:
    """Keep the tokens of lowest priority of every stratum; the tail, which is whole or absent, stays."""
    count_S = np.bincount(sample.stratum_T, minlength=strata + 1)[:strata]
    if not (count_S > most).any():
        return replace(sample, most_per_stratum=most)
    stop_S = np.cumsum(count_S)
    kept = [
        lowest(sample.priority_T[stop - count : stop], most) + stop - count
        for stop, count in zip(stop_S.tolist(), count_S.tolist(), strict=True)
    ]
    tail = np.arange(stop_S[-1], sample.num_tokens)
    return sample.select(np.concatenate([*kept, tail]), most_per_stratum=most)


def _without_tail(sample: TokenSample, strata: int) -> TokenSample:
    inside = sample.stratum_T < strata
    return sample if inside.all() else sample.select(inside)


# -- ranks and domains ---------------------------------------------------------------------------------------


def _merged_ranks(
    first: RoutingStatistics, second: RoutingStatistics, counts: np.dtype[Any]
) -> dict[str, Any]:
    most = min(first.most_ranks, second.most_ranks)
    known = [
        (part.rank_R, part.rank_tokens_R, part.home_load_RLE)
        for part in (first, second)
        if part.rank_R is not None
    ]
    if not known:
        return {"most_ranks": most}
    rank_R = np.unique(np.concatenate([part_R for part_R, _, _ in known]))
    tokens_R = np.zeros(len(rank_R), dtype=np.int64)
    counted = len(rank_R) <= most and all(load is not None for _, _, load in known)
    load_RLE = np.zeros((len(rank_R), *first.load_LE.shape), dtype=counts) if counted else None
    for part_R, part_tokens_R, part_load in known:
        row_R = np.searchsorted(rank_R, part_R)
        tokens_R[row_R] += 0 if part_tokens_R is None else part_tokens_R
        if load_RLE is not None and part_load is not None:
            load_RLE[row_R] += part_load.astype(counts)
    return {"rank_R": rank_R, "rank_tokens_R": tokens_R, "home_load_RLE": load_RLE, "most_ranks": most}


def _merged_domains(
    first: RoutingStatistics, second: RoutingStatistics, counts: np.dtype[Any]
) -> dict[str, Array | None]:
    return {
        "domain_tokens_C": _added(first, second, "domain_tokens_C", np.int64),
        "domain_load_CLE": _added(first, second, "domain_load_CLE", counts),
    }


def _with_same_domains(
    first: RoutingStatistics, second: RoutingStatistics
) -> tuple[RoutingStatistics, RoutingStatistics]:
    """Give both parts the domains of either, or say why they do not fit together."""
    mine, theirs = first.header.domain_names, second.header.domain_names
    names = (*mine, *(name for name in theirs if name not in mine))
    both = tuple(replace(part.header, domain_names=names) for part in (first, second))
    difference = both[0].difference(both[1])
    if difference is not None:
        raise InputError(f"statistics of different models do not merge: one has {difference}")
    if first.window_tokens != second.window_tokens:
        raise InputError(
            f"statistics with windows of {first.window_tokens} and of {second.window_tokens} tokens do not "
            "merge; collect one of them again"
        )
    return _renamed(first, names), _renamed(second, names)


def _renamed(statistics: RoutingStatistics, names: tuple[str, ...]) -> RoutingStatistics:
    """Return statistics with more domains, perhaps in another order."""
    mine = statistics.header.domain_names
    if mine == names:
        return statistics
    row_C = np.array([names.index(name) for name in mine], dtype=np.int64)

    def spread(count: Array | None, dtype: Callable[[], np.dtype[Any]]) -> Array | None:
        if count is None and mine:
            return None
        shape = () if count is None else count.shape[1:]
        out = np.zeros((len(names), *shape), dtype=dtype())
        if count is not None:
            out[row_C] = count
        return out

    tokens_C = spread(statistics.domain_tokens_C, lambda: np.dtype(np.int64))
    load = statistics.domain_load_CLE
    if load is None and not mine:
        load = np.zeros((0, *statistics.load_LE.shape), dtype=statistics.time_load_BLE.dtype)
    load = spread(load, lambda: statistics.time_load_BLE.dtype)
    sample = statistics.sample
    if sample is not None and sample.domain_T is not None:
        known = sample.domain_T != UNKNOWN_DOMAIN
        domain_T = np.where(known, row_C[np.where(known, sample.domain_T, 0)], UNKNOWN_DOMAIN)
        sample = replace(sample, domain_T=domain_T)
    header = replace(statistics.header, domain_names=names)
    return replace(statistics, header=header, domain_tokens_C=tokens_C, domain_load_CLE=load, sample=sample)
