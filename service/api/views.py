"""Has the dashboard's figures and grids made: in threads, or of traces in a process of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastapi import Request

from placement.errors import InputError
from service.api.answers import Answer, KeptAnswers
from service.api.context import Context
from service.api.engine_files import stored_placement
from service.api.inspection import Inspector
from service.api.stored import in_thread
from service.errors import ConflictError, TooLargeError
from service.state.records import Artifact, Job

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from placement.plan import Placement
    from service.deployments.records import Deployment

__all__ = ["Views", "views_of"]

MOST_FIGURES_BYTES = 8 << 20
MOST_EVENTS = 20_000
EVENTS_AT_ONCE = 1000


class Views:
    """Makes what the dashboard shows.

    Parameters
    ----------
    context
        The stores.
    inspector
        Opens traces.
    """

    def __init__(self, context: Context, inspector: Inspector) -> None:
        self._context = context
        self._inspector = inspector
        self._kept = KeptAnswers()

    async def solve(self, job: Job) -> Answer:
        """Return the curve of a solve as it stands."""
        return await self._kept.compute(
            ("solve", job.id, job.event_seq, job.status), partial(self._solve, job)
        )

    async def deployment(self, deployment: Deployment) -> Answer:
        """Return the health of a deployment as it stands."""
        newest = await in_thread(self._context.deployments.windows.newest)
        key = ("deployment", deployment.name, deployment.created_at, deployment.revision, deployment.version)
        return await self._kept.compute(
            (*key, newest, repr(deployment.drift)), partial(self._deployment, deployment)
        )

    async def trace(self, trace: Artifact) -> Answer:
        """Return facts and figures of a trace.

        Raises
        ------
        InvalidError
            If it cannot be read within bounds.
        """
        return await self._kept.get(("trace", trace.digest), partial(self._figures, trace))

    async def grid(self, digest: str, trace: Artifact | None) -> Answer:
        """Return a placement as a grid, with the loads of a trace.

        Raises
        ------
        ConflictError
            If they do not fit together.
        InvalidError
            If the trace cannot be read within bounds.
        """
        if trace is None:
            return await self._kept.compute(("grid", digest, None), partial(self._grid, digest, None))

        async def make() -> bytes:
            await in_thread(self._check_shape, digest, trace)
            return await in_thread(self._grid, digest, await self._loads(trace))

        return await self._kept.get(("grid", digest, trace.digest), make)

    async def moves(self, before: str, after: str) -> Answer:
        """Return what must be copied to get from one placement to another.

        Raises
        ------
        ConflictError
            If they are of different shapes.
        """
        return await self._kept.compute(("moves", before, after), partial(self._moves, before, after))

    # -- in threads ------------------------------------------------------------------------------------------

    def _solve(self, job: Job) -> bytes:
        from service.views.figures import json_of
        from service.views.solves import solve_figure

        events: list[Any] = []
        while len(events) < min(job.event_seq, MOST_EVENTS):
            after = events[-1].seq if events else 0
            more = self._context.jobs.events(job.id, after=after, limit=EVENTS_AT_ONCE)
            if not more:
                break
            events += more
        return json_of(solve_figure(job, events))

    def _deployment(self, deployment: Deployment) -> bytes:
        from service.views.figures import json_of
        from service.views.health import History, health_entry

        store = self._context.deployments
        history = History(
            deployment=deployment,
            versions=store.versions(deployment.name),
            parts=store.windows.recent(deployment.name),
            arrived_at=store.windows.arrivals(deployment.name),
        )
        try:
            return json_of(health_entry(history, self._placement))
        except InputError as exc:
            raise ConflictError(f"deployment {deployment.name}: {exc}") from exc

    def _grid(self, digest: str, load_LE: npt.NDArray[np.float64] | None) -> bytes:
        from service.views.figures import json_of
        from service.views.grid import grid_document

        try:
            return json_of(grid_document(self._placement(digest), load_LE))
        except InputError as exc:
            raise ConflictError(str(exc)) from exc

    def _check_shape(self, digest: str, trace: Artifact) -> None:
        """Refuse what cannot fit before the trace is read."""
        from service.views.grid import check_shape

        shape = [trace.summary.get(name) for name in ("num_layers", "num_experts")]
        if None in shape:
            return
        try:
            check_shape(self._placement(digest), *shape)
        except InputError as exc:
            raise ConflictError(str(exc)) from exc

    def _moves(self, before: str, after: str) -> bytes:
        from service.views.figures import json_of
        from service.views.grid import moves_document

        try:
            return json_of(moves_document(self._placement(before), self._placement(after)))
        except InputError as exc:
            raise ConflictError(str(exc)) from exc

    def _placement(self, digest: str) -> Placement:
        return stored_placement(self._context.files, digest)

    # -- in a process of their own ---------------------------------------------------------------------------

    async def _figures(self, trace: Artifact) -> bytes:
        with self._folder() as folder:
            out = Path(folder, "figures.json")
            await self._ask("figures", trace, folder, out)
            if (await in_thread(out.stat)).st_size > MOST_FIGURES_BYTES:
                raise TooLargeError("the figures of this trace are more than can be shown")
            return await in_thread(out.read_bytes)

    async def _loads(self, trace: Artifact) -> npt.NDArray[np.float64]:
        with self._folder() as folder:
            out = Path(folder, "loads.npy")
            await self._ask("loads", trace, folder, out)
            return await in_thread(_loads_in, out)

    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(dir=self._context.files.scratch, suffix=".unpacked")

    async def _ask(self, task: str, trace: Artifact, folder: str, out: Path) -> None:
        path = await in_thread(self._context.files.local, trace.digest)
        model = trace.summary.get("model_name")
        await self._inspector.ask(task, path, model=model, folder=folder, out=str(out))


def _loads_in(path: Path) -> npt.NDArray[np.float64]:
    import numpy as np

    return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)


def views_of(request: Request) -> Views:
    """Return the views of the process that serves a request."""
    state = request.app.state
    found: Views | None = getattr(state, "views", None)
    if found is None:
        # An inspector of its own: who looks at traces must not keep uploads waiting.
        found = state.views = Views(state.context, Inspector(state.context.settings))
    return found
