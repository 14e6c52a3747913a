"""Counts a trace in many places at once: ranges of whole windows mapped, their statistics merged in a tree.

How the trace is cut follows from the trace and the options, and parts are counted by one plan, so the result
is the same whatever executes it: where all ranges can be read, that of one pass
(`traces.statistics.collect`). A range that cannot be read is cut in halves, so that what is lost is little
more than what is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from traces.distributed.counting import (
    Counting,
    Given,
    Range,
    SavedPart,
    SourceAt,
    count,
    count_into,
    cut_ranges,
    merge_parts,
    natural_cuts,
    table_cells,
)
from traces.distributed.executor import Executor, SerialExecutor
from traces.distributed.reduction import Merge, Node, TreeReduction
from traces.distributed.task import Failure, Outcome, Task, value_of
from traces.distributed.work import WorkFolder
from traces.source import TraceSource, check_token_range

if TYPE_CHECKING:
    from traces.readers import ReadOptions
    from traces.statistics import RoutingStatistics

__all__ = ["Collected", "MissingRange", "collect_statistics"]

SMALLEST_PART = 64
"""A range that cannot be read is cut down to this part of it, or to a window where that is more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRange:
    """Tokens that are not in the statistics, and why.

    Parameters
    ----------
    start, stop
        The tokens.
    fragment
        The damaged piece of the data set, where the error named one.
    reason
        What went wrong.
    """

    start: int
    stop: int
    fragment: str | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"start": self.start, "stop": self.stop, "fragment": self.fragment, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Collected:
    """Statistics of a trace, and what they lack.

    Parameters
    ----------
    statistics
        Of all that could be read.
    missing
        What could not, ascending.
    num_tasks, num_resumed
        Ranges counted, and how many of them an earlier run had left.
    num_lost
        Attempts that ended because their worker was lost.
    """

    statistics: RoutingStatistics
    missing: tuple[MissingRange, ...]
    num_tasks: int
    num_resumed: int
    num_lost: int

    @property
    def missing_tokens(self) -> int:
        """Tokens that are not in the statistics."""
        return sum(gap.stop - gap.start for gap in self.missing)

    def missing_windows(self) -> int:
        """Return how many whole windows are not in the statistics."""
        window = self.statistics.window_tokens
        return sum(gap.stop // window - gap.start // window for gap in self.missing)


def _ignore(done: int, total: int, text: str) -> None:
    """Take no notice."""


def collect_statistics(
    source: str | Path | TraceSource | Callable[[], TraceSource],
    *,
    window_tokens: int,
    memory_bytes: int | None = None,
    max_sampled_tokens: int | None = None,
    parts: Collection[str] | None = None,
    start: int = 0,
    stop: int | None = None,
    seed: int = 0,
    threads: int | None = 1,
    format: str | None = None,
    options: ReadOptions | None = None,
    executor: Executor | None = None,
    on_error: str = "fail",
    task_tokens: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int, str], None] = _ignore,
) -> Collected:
    """Collect a trace's statistics, range by range, wherever an executor runs tasks.

    Parameters
    ----------
    source
        The trace: a path or URL, or what opens it (called once by each worker). A source itself travels to
        the workers with every task, which suits those that are small.
    window_tokens, max_sampled_tokens, parts, start, stop, seed
        As for `traces.statistics.collect`.
    memory_bytes
        The same, for each worker.
    threads
        Threads of each worker.
    format, options
        As for `open_trace`, with a path.
    executor
        Who runs the tasks; this process by default. It is not closed.
    on_error
        What a range that cannot be read does: ``fail`` ends the run, ``skip`` sets it aside and names it.
    task_tokens
        Tokens that a task counts, about; chosen by size by default.
    checkpoint
        Folder for partial results: a run that was ended, in whatever way, goes on from them. Results of
        another trace or of other options are refused.
    progress
        Called with tokens done, tokens in all and what ended last.

    Raises
    ------
    InputError
        If the trace is damaged (unless it is skipped), nothing of it can be read, or an option is impossible.
    BackendError
        If a range takes down every worker that tries it (unless it is skipped).
    """
    from traces.statistics.plan import DEFAULT_MEMORY_BYTES, PARTS, plan_memory

    if on_error not in ("fail", "skip"):
        raise InputError(f"--on-error is {on_error!r}; it must be fail or skip")
    if task_tokens is not None and task_tokens < 1:
        raise InputError(f"tasks of {task_tokens} tokens are impossible; use at least 1")
    factory = _factory(source, format, options)
    opened = factory()
    begin, end = check_token_range(start, stop, opened.num_tokens)
    if begin == end:
        raise InputError(f"tokens {begin} to {end} are none; there is nothing to collect")
    chosen: dict[str, Any] = {
        "window_tokens": window_tokens,
        "memory_bytes": DEFAULT_MEMORY_BYTES if memory_bytes is None else memory_bytes,
        "max_sampled_tokens": max_sampled_tokens,
        "parts": sorted(PARTS if parts is None else parts),
    }
    plan = plan_memory(opened.header, num_tokens=opened.num_tokens, **chosen)
    ranges = cut_ranges(
        begin,
        end,
        window_tokens=window_tokens,
        num_layers=opened.header.num_layers,
        cells=table_cells(opened.header, plan),
        task_tokens=task_tokens,
        natural=natural_cuts(opened),
    )
    counting = Counting(
        factory=factory,
        header=opened.header,
        num_tokens=opened.num_tokens,
        plan=plan,
        window_tokens=window_tokens,
        digest=opened.digest,
        seed=seed,
        threads=threads,
    )
    identity = {
        "trace": opened.digest,
        **chosen,
        "start": begin,
        "stop": end,
        "seed": seed,
        "ranges": len(ranges),
    }
    work = None if checkpoint is None else WorkFolder(Path(checkpoint), kind="statistics", identity=identity)
    executor = SerialExecutor() if executor is None else executor
    run = _Run(
        counting=counting,
        ranges=ranges,
        executor=executor,
        work=work,
        skip=on_error == "skip",
        progress=progress,
    )
    try:
        return run.result()
    finally:
        executor.cancel()
        if work is not None:
            work.close()


def _factory(
    source: str | Path | TraceSource | Callable[[], TraceSource],
    format: str | None,
    options: ReadOptions | None,
) -> Callable[[], TraceSource]:
    if isinstance(source, str | Path):
        # Workers may have another working directory.
        path = str(source) if "://" in str(source) else str(Path(source).absolute())
        return SourceAt(path=path, format=format, options=options)
    return source if callable(source) else Given(source)


@dataclass(slots=True, eq=False)
class _Leaf:
    """A range on its way: what of it is counted, and how many of its pieces are still out."""

    parts: dict[Range, Any] = field(default_factory=dict)
    pending: int = 0


@dataclass(kw_only=True, eq=False)
class _Run:
    counting: Counting
    ranges: list[Range]
    executor: Executor
    work: WorkFolder | None
    skip: bool
    progress: Callable[[int, int, str], None]
    leaves: list[_Leaf] = field(init=False)
    tree: TreeReduction = field(init=False)
    missing: list[MissingRange] = field(default_factory=list)
    merging: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    tokens_done: int = 0
    num_resumed: int = 0
    num_lost: int = 0

    def result(self) -> Collected:
        """Run everything."""
        self.leaves = [_Leaf() for _ in self.ranges]
        self.tree = TreeReduction(len(self.ranges))
        for index, piece in enumerate(self.ranges):
            self._begin(index, piece)
        for index, leaf in enumerate(self.leaves):
            if not leaf.pending:
                self._leaf_done(index)
        for outcome in self.executor.outcomes():
            self.num_lost += outcome.attempts - 1
            if outcome.key[0] == "count":
                self._take_count(outcome)
            else:
                self._take_merge(outcome)
        if self.tree.root is None:
            gap = self.missing[0]
            raise InputError(f"no token could be read; tokens {gap.start} to {gap.stop}: {gap.reason}")
        statistics: RoutingStatistics = value_of(self.executor.fetch(self.tree.root))
        return Collected(
            statistics=statistics,
            missing=_joined(self.missing),
            num_tasks=len(self.ranges),
            num_resumed=self.num_resumed,
            num_lost=self.num_lost,
        )

    def _begin(self, index: int, piece: Range) -> None:
        """Count a range, or take it, or its halves, from an earlier run."""
        saved = self._saved(piece)
        if saved is not None:
            self.num_resumed += 1
            self.leaves[index].parts[piece] = saved
            self._advance(piece)
            return
        start, stop = piece
        name = f"tokens {start} to {stop}"
        key = ("count", index, start, stop)
        self.leaves[index].pending += 1
        arguments = (self.counting, start, stop)
        if self.work is not None and self.executor.shares_files:
            task = Task(key=key, name=name, function=count_into, arguments=(self._file(piece), *arguments))
        else:
            task = Task(key=key, name=name, function=count, arguments=arguments, keep=True)
        self.executor.submit(task)

    def _file(self, piece: Range) -> Path:
        assert self.work is not None
        return self.work.folder / f"tokens-{piece[0]}-{piece[1]}.statistics"

    def _saved(self, piece: Range) -> Any:
        """Return the statistics that an earlier run has left of a range; None where it has not."""
        if self.work is None or self.work.entry(_key(piece)) is None:
            return None
        saved = SavedPart(self._file(piece))
        return saved if self.executor.shares_files else saved.load_kept()

    def _take_count(self, outcome: Outcome) -> None:
        index = int(outcome.key[1])
        piece = int(outcome.key[2]), int(outcome.key[3])
        leaf = self.leaves[index]
        leaf.pending -= 1
        if outcome.failure is not None:
            self._fail(index, piece, outcome.failure)
        else:
            leaf.parts[piece] = self._keep(piece, outcome.value)
            self._advance(piece)
        if not leaf.pending:
            self._leaf_done(index)

    def _keep(self, piece: Range, value: Any) -> Any:
        """Note a part that is done; return what refers to it."""
        if self.work is None:
            return value
        path = self._file(piece)
        if self.executor.shares_files:
            self.work.record(_key(piece), file=path, content=value)
            return SavedPart(path)
        from traces.statistics import save

        save(self.executor.fetch(value), path)
        self.work.record(_key(piece), file=path)
        return value

    def _fail(self, index: int, piece: Range, failure: Failure) -> None:
        """Set a range aside, the sound parts of it not included, or end the run."""
        start, stop = piece
        if not self.skip:
            raise failure.error(f"tokens {start} to {stop}")
        window = self.counting.window_tokens
        first, last = self.ranges[index]
        windows = (stop - start) // window
        if windows > max(1, (last - first) // window // SMALLEST_PART):
            middle = start + windows // 2 * window
            for half in ((start, middle), (middle, stop)):
                self._begin(index, half)
            return
        self.missing.append(
            MissingRange(start=start, stop=stop, fragment=failure.fragment, reason=failure.message)
        )
        self._advance(piece)

    def _advance(self, piece: Range) -> None:
        self.tokens_done += piece[1] - piece[0]
        total = self.ranges[-1][1] - self.ranges[0][0]
        self.progress(self.tokens_done, total, f"tokens {piece[0]} to {piece[1]}")

    def _leaf_done(self, index: int) -> None:
        """Merge the pieces of a range, in order, and hand it to the tree."""
        parts = tuple(part for _, part in sorted(self.leaves[index].parts.items(), key=lambda item: item[0]))
        node = Node(0, index)
        if len(parts) > 1:
            self._merge(Merge(node=node, parts=parts))
        else:
            self._put(node, parts[0] if parts else None)

    def _put(self, node: Node, result: Any) -> None:
        merge = self.tree.put(node, result)
        if merge is not None:
            self._merge(merge)

    def _merge(self, merge: Merge) -> None:
        node = merge.node
        self.merging[node] = merge.parts
        key = ("merge", node.level, node.index)
        name = f"merging {len(merge.parts)} parts"
        self.executor.submit(Task(key=key, name=name, function=merge_parts, arguments=merge.parts, keep=True))

    def _take_merge(self, outcome: Outcome) -> None:
        node = Node(int(outcome.key[1]), int(outcome.key[2]))
        if outcome.failure is not None:
            raise outcome.failure.error("merging partial statistics")
        for part in self.merging.pop(node):
            self.executor.discard(part)
        self._put(node, outcome.value)


def _key(piece: Range) -> str:
    return f"{piece[0]}-{piece[1]}"


def _joined(missing: list[MissingRange]) -> tuple[MissingRange, ...]:
    """Return the gaps in order, those that meet and have the same cause as one."""
    joined: list[MissingRange] = []
    for gap in sorted(missing, key=lambda gap: gap.start):
        last = joined[-1] if joined else None
        if last is not None and last.stop == gap.start and _cause(last) == _cause(gap):
            joined[-1] = MissingRange(
                start=last.start, stop=gap.stop, fragment=last.fragment, reason=last.reason
            )
        else:
            joined.append(gap)
    return tuple(joined)


def _cause(gap: MissingRange) -> str:
    return gap.reason if gap.fragment is None else gap.fragment
