"""The application: every router, the failures, and what surrounds them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.types import ASGIApp

from placement import __version__
from service.api.context import Context
from service.api.describe import describe, operation_id
from service.api.envelope import Envelope
from service.api.inspection import Inspector
from service.api.limits import Rates
from service.api.problems import install_problems
from service.api.routes import (
    audit,
    dashboard,
    deployments,
    docs,
    evaluations,
    health,
    metrics,
    placements,
    solves,
    tokens,
    traces,
    views,
)
from service.api.shared_reads import SharedReads

__all__ = ["create_app"]

UPLOAD_THREADS = 8
"""Threads that write uploads, so that large ones leave the others to short requests."""

ROUTES = (
    deployments,
    solves,
    placements,
    traces,
    evaluations,
    views,
    tokens,
    audit,
    health,
    metrics,
    docs,
    dashboard,
)
"""In the order in which they are tried: what launchers ask for comes first."""


class _Application(FastAPI):
    """FastAPI within our envelope, which must be the outermost layer to see every answer."""

    def build_middleware_stack(self) -> ASGIApp:
        return Envelope(super().build_middleware_stack(), self.state.context.settings)


def create_app(context: Context) -> FastAPI:
    """Return the application of one server process.

    Parameters
    ----------
    context
        Its stores, which stay open until the caller closes them.
    """
    app = _Application(
        title="moe-placement",
        version=__version__,
        description="Decides on which GPU every expert of a Mixture-of-Experts model lives.",
        lifespan=_lifespan,
        # A redirect would name the host that the caller gave.
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=operation_id,
    )
    app.state.context = context
    app.state.shared_reads = SharedReads()
    app.state.rates = Rates(context.settings.requests_per_minute)
    app.state.inspector = Inspector(context.settings)
    app.state.upload_threads = CapacityLimiter(UPLOAD_THREADS)
    install_problems(app)
    for module in ROUTES:
        app.include_router(module.router)
    describe(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    try:
        yield
    finally:
        context.watcher.close()
        context.tokens.close()
