"""``moe-placement vacuum``: removes what the service no longer needs, and gives the room back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import JsonOption
from placement.errors import InputError

if TYPE_CHECKING:
    from service.state.retention import Removed

__all__ = ["vacuum"]

DAY_S = 86400.0


def vacuum(
    older_than: Annotated[
        float | None,
        typer.Option(min=0, help="Days to keep (MOE_PLACEMENT_RETENTION_DAYS, 90).", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The service's folder (./moe-placement-data).", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove finished solves, load windows and artifacts that are old and that nothing names.

    The server does so by itself once a day; this also compacts SQLite's file. Safe while a server runs.
    """
    try:
        from service.artifacts import ArtifactFiles
        from service.settings import read_settings
        from service.state.database import open_database
        from service.state.retention import compact, remove_old
    except ImportError as exc:
        raise InputError(
            f"vacuum needs the service ({exc.name} is missing): pip install 'moe-placement[service]'"
        ) from exc
    settings = read_settings(data_dir=data_dir)
    if not settings.data_dir.is_dir():
        raise InputError(f"{settings.data_dir} is no folder of a service: name it with --data-dir")
    database = open_database(settings.database, upgrade=False)
    try:
        files = ArtifactFiles(settings.data_dir, url=settings.artifact_url)
        days = settings.retention_days if older_than is None else older_than
        removed = remove_old(database, files, older_than_s=days * DAY_S, dry_run=dry_run)
        if not dry_run:
            compact(database)
    finally:
        database.close()
    typer.echo(json.dumps(asdict(removed)) if as_json else _line(removed, dry_run=dry_run))


def _line(removed: Removed, *, dry_run: bool) -> str:
    return (
        f"{'would remove' if dry_run else 'removed'} {removed.jobs} jobs, {removed.windows} load windows, "
        f"{len(removed.artifacts)} artifacts ({removed.artifact_bytes / 1e6:.1f} MB), "
        f"{removed.orphans} files without a name"
    )
