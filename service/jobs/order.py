"""What a worker gives the process that computes a job: a file of JSON in the process's own folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.state.records import JobKind

__all__ = ["Order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job for one process.

    Parameters
    ----------
    kind, spec
        As in `service.state.records.Job`.
    trace
        Local file of the trace.
    start
        Local file of the placement to start from, or to score.
    incumbent
        Local file of the best placement of an earlier attempt.
    folder
        The process's own folder: where it runs, and where it leaves placements.
    parent
        Process id of the worker; without it the job ends.
    threads
        Most threads, whatever the spec says.
    memory_bytes, max_unpacked_bytes
        Bounds on memory and on what an archive may hold.
    niceness
        How far the job steps back behind who answers requests.
    """

    kind: JobKind
    spec: dict[str, Any]
    trace: str
    folder: str
    parent: int
    threads: int
    memory_bytes: int
    max_unpacked_bytes: int
    start: str | None = None
    incumbent: str | None = None
    niceness: int = 5

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Order:
        """Read what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"kind": JobKind(values["kind"])})
