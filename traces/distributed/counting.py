"""What workers do for statistics: open the trace, count ranges of it, merge what was counted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from traces.distributed.task import value_of
from traces.distributed.work import Checked, checked
from traces.source import TraceHeader, TraceSource

if TYPE_CHECKING:
    from traces.readers import ReadOptions
    from traces.statistics import RoutingStatistics
    from traces.statistics.plan import MemoryPlan

__all__ = [
    "Counting",
    "Given",
    "Range",
    "SavedPart",
    "SourceAt",
    "count",
    "count_into",
    "cut_ranges",
    "merge_parts",
    "natural_cuts",
    "table_cells",
]

RECORDS_PER_CELL = 8
"""Records that a task counts for each cell of its tables of pairs: merging them must be cheap beside it."""

LEAST_RECORDS, MOST_RECORDS = 1 << 22, 1 << 28
"""Bounds on the records (a token in a layer) of a task: some tenths of a second, and half a minute."""

ENOUGH_TASKS = 8
"""So many tasks keep a few workers busy to the end; more only where tasks would get too long."""

MOST_TASKS = 1 << 13

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAt:
    """Where a trace is, to be opened by every worker for itself.

    Parameters
    ----------
    path, format, options
        As for `traces.readers.open_trace`.
    """

    path: str
    format: str | None = None
    options: ReadOptions | None = None

    def __call__(self) -> TraceSource:
        """Open it.

        Raises
        ------
        InputError
            If it cannot be opened, or holds expert counts alone.
        """
        from traces.counts import ExpertCounts
        from traces.readers import open_trace

        source = open_trace(self.path, format=self.format, options=self.options)
        if isinstance(source, ExpertCounts):
            raise InputError(f"{self.path}: holds expert counts alone; there is nothing more to collect")
        return source


@dataclass(frozen=True, eq=False)
class Given:
    """A source that is there already."""

    source: TraceSource

    def __call__(self) -> TraceSource:
        """Return it."""
        return self.source


def table_cells(header: TraceHeader, plan: MemoryPlan) -> int:
    """Return the cells of the tables of pairs that every part has."""
    pairs = sum(name in plan.parts for name in ("transitions", "coactivation", "first-transitions"))
    return pairs * header.num_layers * header.num_experts**2


def cut_ranges(
    start: int,
    stop: int,
    *,
    window_tokens: int,
    num_layers: int,
    cells: int,
    task_tokens: int | None = None,
    natural: Sequence[int] = (),
) -> list[Range]:
    """Cut tokens into ranges of whole windows, alike in length; the last one takes what fills no window.

    Parameters
    ----------
    start, stop
        The tokens.
    window_tokens
        Tokens per window.
    num_layers
        MoE layers.
    cells
        Cells of the tables that merging two parts adds up.
    task_tokens
        Tokens of a range, about; by default as many as make merging cheap and keep workers busy.
    natural
        Where the trace is best cut, ascending: a cut moves there if that is near and begins a window.
    """
    records = (stop - start) * num_layers
    most = min(max(RECORDS_PER_CELL * cells, LEAST_RECORDS), MOST_RECORDS)
    tasks = max(-(-records // most), min(ENOUGH_TASKS, records // LEAST_RECORDS), 1)
    if task_tokens is not None:
        tasks = -(-(stop - start) // task_tokens)
    windows = (stop - start) // window_tokens
    tasks = max(1, min(tasks, windows, MOST_TASKS))
    even = [start + index * windows // tasks * window_tokens for index in range(1, tasks)]
    near = (stop - start) // tasks // 4
    places = [place for place in natural if place % window_tokens == 0]
    edges = [start, *(_nearest(places, edge, near) for edge in even), stop]
    return list(pairwise(edges))


def _nearest(places: Sequence[int], edge: int, near: int) -> int:
    """Return the place next to an edge, or the edge itself if none is near."""
    after = bisect_left(places, edge)
    best = min(places[max(0, after - 1) : after + 1], key=lambda place: abs(place - edge), default=edge)
    return best if abs(best - edge) <= near else edge


def natural_cuts(source: TraceSource) -> list[int]:
    """Return where the fragments of a data set meet; nothing where ranks are interleaved.

    A fragment that two ranges share is opened twice.
    """
    from traces.store import DatasetSource

    if not isinstance(source, DatasetSource):
        return []
    owners = {share.shown for fragment in source.fragments for share in fragment.ranks or ()}
    if len(owners) > 1 or any(fragment.ranks is None for fragment in source.fragments):
        return []
    return list(accumulate(fragment.tokens for fragment in source.fragments))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counting:
    """What all ranges have in common."""

    factory: Callable[[], TraceSource]
    header: TraceHeader
    num_tokens: int
    plan: MemoryPlan
    window_tokens: int
    digest: str
    seed: int
    threads: int | None


@lru_cache(maxsize=1)
def _opened(factory: Callable[[], TraceSource]) -> TraceSource:
    return factory()


def count(counting: Counting, start: int, stop: int) -> RoutingStatistics:
    """Count one range."""
    from traces.statistics.collector import collect_planned

    source = _opened(counting.factory)
    if source.num_tokens != counting.num_tokens or source.header != counting.header:
        raise InputError(
            f"the trace has {source.num_tokens} tokens here and {counting.num_tokens} where the run began; "
            "give every machine the same files, and let nobody write to them meanwhile"
        )
    return collect_planned(
        source,
        counting.plan,
        window_tokens=counting.window_tokens,
        digest=counting.digest,
        start=start,
        stop=stop,
        seed=counting.seed,
        threads=counting.threads,
    )


@dataclass(frozen=True, slots=True)
class SavedPart:
    """Statistics in a file that all workers see."""

    path: Path

    def load_kept(self) -> RoutingStatistics:
        """Read it."""
        from traces.statistics import load

        return load(self.path)


def count_into(path: Path, counting: Counting, start: int, stop: int) -> Checked:
    """Count one range into a file; return its checksum."""
    from traces.statistics import save

    save(count(counting, start, stop), path)
    return checked(path)


def merge_parts(*parts: Any) -> RoutingStatistics:
    """Merge consecutive parts, no more than two in memory at a time."""
    from traces.statistics import merge

    whole: RoutingStatistics = value_of(parts[0])
    for part in parts[1:]:
        whole = merge([whole, value_of(part)])
    return whole
