"""``moe-placement serve``: runs the service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from placement.errors import InputError

__all__ = ["serve"]


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (127.0.0.1).", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on (8700); 0 for any free one.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for state and artifacts (./moe-placement-data).", show_default=False),
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(help="all, api (answers requests) or worker (solves).", show_default=False),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text or json, on stderr.", show_default=False)
    ] = None,
) -> None:
    """Run the service: HTTP API, dashboard and solves.

    Further settings come from MOE_PLACEMENT_* variables, the database from DATABASE_URL. SIGTERM or Ctrl-C
    ends it: running solves go back to the queue with what they have found.
    """
    try:
        from service.settings import read_settings
    except ImportError as exc:
        raise InputError(
            f"serve needs the service ({exc.name} is missing): pip install 'moe-placement[service]'"
        ) from exc
    settings = read_settings(host=host, port=port, data_dir=data_dir, role=role, log_format=log_format)
    module = "service.jobs.worker" if settings.role == "worker" else "service.serve"
    sys.stdout.flush()
    # The server takes this process over: it needs nothing of the command line's memory.
    arguments = [sys.executable, "-m", "service.lifeline", module]
    os.execve(sys.executable, arguments, settings.environment())
