"""Statistics of traces counted by several processes or machines, for ``moe-placement trace statistics``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.counting import showing_count
from placement.cli.inputs import warn

if TYPE_CHECKING:
    from traces.distributed.executor import Executor
    from traces.statistics import RoutingStatistics

__all__ = ["CheckpointOption", "OnErrorOption", "RayOption", "Spread", "WorkersOption"]

WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", help="Processes on this machine to spread the work over.", show_default=False),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Ray cluster instead: local (start one here), auto (the one of this machine) or HOST:PORT.",
        show_default=False,
    ),
]
OnErrorOption = Annotated[
    str, typer.Option("--on-error", help="What fails ends the run (fail), or is set aside and named (skip).")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Folder for partial results; the same command goes on from them when it was stopped.",
        show_default=False,
    ),
]


@dataclass(kw_only=True, eq=False)
class Spread:
    """Counts traces in parts; a context, at whose end the workers go.

    Parameters
    ----------
    workers, ray
        As for `traces.distributed.make_executor`; one process where neither is given.
    on_error, checkpoint
        As for `traces.distributed.collect_statistics`; several traces get a folder each under `checkpoint`.
    format
        As for `open_trace`.
    """

    workers: int | None = None
    ray: str | None = None
    on_error: str = "fail"
    checkpoint: Path | None = None
    format: str | None = None
    missing: list[dict[str, Any]] = field(default_factory=list)
    """What could not be counted, as plain data with the trace's path."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _executor: Executor | None = None
    _num_traces: int = 0

    @property
    def wanted(self) -> bool:
        """Whether anything was asked for that one pass in this process does not do."""
        return bool(self.workers is not None or self.ray or self.checkpoint or self.on_error != "fail")

    def __enter__(self) -> Spread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def count(
        self,
        path: str,
        window_tokens: int,
        *,
        model: str | None = None,
        threads: int | None = None,
        **collect_options: Any,
    ) -> RoutingStatistics:
        """Count a trace; what is set aside is told on stderr and kept in `missing`.

        Parameters
        ----------
        path
            The trace.
        window_tokens
            Tokens per window.
        model
            Model, for formats that do not know their layers.
        threads
            Threads of a worker; by default one, and all cores where there is one worker.
        collect_options
            Further options of `collect_statistics`.
        """
        from placement.model import resolve_model
        from traces.distributed.executor import SerialExecutor, make_executor
        from traces.distributed.statistics import collect_statistics
        from traces.readers import ReadOptions

        if self._executor is None:
            one = 1 if self.workers is None and self.ray is None else self.workers
            self._executor = self._stack.enter_context(make_executor(workers=one, ray=self.ray))
        if threads is None and not isinstance(self._executor, SerialExecutor):
            threads = 1
        folder = None if self.checkpoint is None else self.checkpoint / f"{self._num_traces:03d}"
        self._num_traces += 1
        try:
            with showing_count("counting") as progress:
                collected = collect_statistics(
                    path,
                    window_tokens=window_tokens,
                    format=self.format,
                    options=ReadOptions(model=None if model is None else resolve_model(model)),
                    threads=threads,
                    executor=self._executor,
                    on_error=self.on_error,
                    checkpoint=folder,
                    progress=progress,
                    **collect_options,
                )
        except KeyboardInterrupt:
            if folder is not None:
                warn(f"what is counted is in {self.checkpoint}; the same command goes on from there")
            raise
        if collected.num_resumed:
            warn(f"{path}: {collected.num_resumed} parts were counted before")
        for gap in collected.missing:
            self.missing.append({"trace": path, **gap.to_json()})
            warn(f"{path}: tokens {gap.start} to {gap.stop} are set aside: {gap.reason}")
        if collected.missing:
            windows, tokens = collected.missing_windows(), collected.missing_tokens
            warn(f"{path}: {windows} windows, {tokens} tokens in all, are not in the statistics")
        return collected.statistics
