"""The server process, put together: settings, database, stores, the API, and the worker beside it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import uvicorn
import uvloop

from placement.errors import PlacementError, ServiceError
from service.api.context import Context
from service.api.health import health_of
from service.settings import Settings, read_settings
from service.supervisor import Supervisor

__all__ = ["Server", "main", "make_context", "run_server"]

_log = logging.getLogger(__name__)

DRAIN_S = 8.0
"""How long requests that are under way may take once the server is told to end."""
WORKER_END_S = 12.0
"""What a worker may take to end beside the time that it gives its solves."""
BACKLOG = 2048
KEEP_ALIVE_S = 75


def run_server(settings: Settings) -> int:
    """Serve, in role api or all, until told to end (SIGTERM or SIGINT); return the exit code.

    Raises
    ------
    InputError
        If the settings are not safe together.
    ServiceError
        If the address is taken or the database cannot be opened.
    """
    listener = _bind(settings)
    try:
        context = make_context(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(context, listener))
        context.database.close()
    finally:
        listener.close()
    return 0


def make_context(settings: Settings) -> Context:
    """Open everything that a server process needs, and check that it is safe to serve."""
    from service.api.security import check_exposure
    from service.api.watch import Watcher, job_heads
    from service.artifacts import ArtifactFiles
    from service.state.artifacts import ArtifactStore
    from service.state.audit import AuditLog
    from service.state.database import open_database
    from service.state.deployments import DeploymentStore
    from service.state.jobs import JobStore
    from service.state.tokens import TokenStore

    files = ArtifactFiles(settings.data_dir, url=settings.artifact_url)
    database = open_database(settings.database)
    jobs, deployments = JobStore(database), DeploymentStore(database)
    tokens = TokenStore(database)
    check_exposure(settings, tokens)
    topics = {"job": job_heads(jobs), "deployment": deployments.heads}
    return Context(
        settings=settings,
        database=database,
        files=files,
        artifacts=ArtifactStore(database),
        jobs=jobs,
        deployments=deployments,
        tokens=tokens,
        audit=AuditLog(database),
        watcher=Watcher(topics, poll_s=settings.poll_seconds),
    )


class Server(uvicorn.Server):
    """uvicorn, ending as we want it: streams are let go first, and the exit code is ours.

    Parameters
    ----------
    config
        As for uvicorn.
    context
        The process; its watcher is closed when the end begins.
    """

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        address, port = (sockets or [])[0].getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
        sys.stderr.write(f"serving on http://{host}:{port}\n")
        sys.stderr.flush()
        # Nothing that is there now will be garbage: keep the collector from looking at it again.
        gc.collect()
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let waiting requests go, and wait for those under way."""
        self._context.watcher.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on SIGTERM and SIGINT, at once on the second; a lost terminal does not matter."""
        loop = asyncio.get_running_loop()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # the end is under way, and has a bound

    def _told_to_end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


async def _serve(context: Context, listener: socket.socket) -> None:
    async with _worker(context.settings) as supervisor, _housekeeping(context):
        # The worker starts while the API is put together.
        server = _server(context, supervisor)
        ending = asyncio.create_task(_end_with(server, supervisor, context.settings), name="worker-end")
        try:
            await server.serve(sockets=[listener])
        finally:
            server.should_exit = True
            await ending


def _server(context: Context, supervisor: Supervisor | None) -> Server:
    from service.api.app import create_app
    from service.api.protocol import BoundedProtocol

    app = create_app(context)
    health_of(app).supervisor = supervisor
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(DRAIN_S),
    )
    return Server(config, context)


@contextlib.asynccontextmanager
async def _worker(settings: Settings) -> AsyncIterator[Supervisor | None]:
    """Keep a worker beside the server in role all."""
    if settings.role != "all":
        yield None
        return
    supervisor = Supervisor(settings.environment())
    keeping = asyncio.create_task(supervisor.run(), name="supervisor")
    await asyncio.sleep(0)  # it begins now
    try:
        yield supervisor
    finally:
        await supervisor.stop(within_s=settings.stop_grace_seconds + WORKER_END_S)
        await keeping


async def _end_with(server: Server, supervisor: Supervisor | None, settings: Settings) -> None:
    """End the worker while the server still waits for its last requests."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    if supervisor is not None:
        await supervisor.stop(within_s=settings.stop_grace_seconds + WORKER_END_S)


@contextlib.asynccontextmanager
async def _housekeeping(context: Context) -> AsyncIterator[None]:
    from service.state.retention import keep_house

    task = asyncio.create_task(keep_house(context.database, context.files, context.settings.retention_days))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _bind(settings: Settings) -> socket.socket:
    """Take the address before anything else is opened."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise ServiceError(f"cannot listen on {where}: {exc.strerror}") from exc
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise ServiceError(f"cannot listen on {where}: {exc.strerror}; choose another --port") from exc
    return listener


def main() -> int:
    """Run ``python -m service.lifeline service.serve`` with the settings of the environment."""
    from service.api.logs import configure_logs

    try:
        settings = read_settings()
        configure_logs(settings)
        return run_server(settings)
    except PlacementError as exc:
        sys.stderr.write(f"moe-placement: error: {' '.join(str(exc).split())}\n")
        return exc.exit_code


def _leave(code: int) -> None:
    """End the process, even where a thread still waits for a database that does not answer."""
    left = [thread for thread in threading.enumerate() if not thread.daemon]
    if left != [threading.main_thread()]:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
