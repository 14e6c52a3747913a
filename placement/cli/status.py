"""``moe-placement status``: what the service is doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.inputs import JsonOption
from placement.cli.remote import DEADLINE_S, SOON_S, AllowHttpOption, TokenFileOption, UrlOption, connect
from placement.errors import InputError

if TYPE_CHECKING:
    from service.client import Client, Event, Solve

__all__ = ["status"]


def status(
    solve_id: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="A solve. Default: the latest ones.", show_default=False),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="With ID: every event until the end.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="Without ID: how many solves to list.")] = 20,
    only: Annotated[
        str | None,
        typer.Option(
            "--status",
            help="Without ID: only queued, running, succeeded, stopped, failed or timed_out ones.",
            show_default=False,
        ),
    ] = None,
    url: UrlOption = None,
    token_file: TokenFileOption = None,
    allow_http: AllowHttpOption = False,
    json: JsonOption = False,
) -> None:
    """Show a solve of the service, or the latest ones.

    With --watch --json each event is one line.
    """
    if watch and solve_id is None:
        raise InputError("--watch needs the id of a solve")
    # Who watches outlives a restart of the service.
    deadline_s = DEADLINE_S if watch else SOON_S
    with connect(url, token_file=token_file, allow_http=allow_http, deadline_s=deadline_s) as client:
        if solve_id is None:
            _list(client, only, limit, json=json)
        elif watch:
            _watch(client, solve_id, json=json)
        else:
            _show(client.solve(solve_id), json=json)


def _list(client: Client, only: str | None, limit: int, *, json: bool) -> None:
    solves, following = client.solves(status=only, limit=limit)
    if json:
        _echo_json({"items": [dict(solve.document) for solve in solves], "next_cursor": following})
        return
    for solve in solves:
        typer.echo(_row(solve))
    if not solves:
        typer.echo("no solves")
    elif following is not None:
        typer.echo("...")


def _watch(client: Client, solve_id: str, *, json: bool) -> None:
    for event in client.events(solve_id):
        if json:
            _echo_json({"seq": event.seq, "event": event.kind, "data": dict(event.data)})
        else:
            typer.echo(_event(event))
    if not json:
        _show(client.solve(solve_id), json=False)


def _show(solve: Solve, *, json: bool) -> None:
    if json:
        _echo_json(dict(solve.document))
        return
    typer.echo(_row(solve))
    if solve.error is not None:
        typer.echo(f"  {solve.error.get('code')}: {solve.error.get('message')}")
    if solve.placement_id is not None:
        typer.echo(f"  placement {solve.placement_id}")


def _row(solve: Solve) -> str:
    about = solve.document
    parts = [f"{solve.id}  {solve.status:<9}"]
    if (elapsed_s := about.get("elapsed_s")) is not None:
        parts.append(f"{elapsed_s:.1f} s")
    if (objective := about.get("objective")) is not None:
        gap = about.get("gap")
        parts.append(f"objective {objective:.6g}" + (f", gap {gap:.1%}" if gap is not None else ""))
    return "  ".join(parts)


def _event(event: Event) -> str:
    told = ", ".join(f"{key} {_value(value)}" for key, value in event.data.items() if _is_plain(value))
    return f"{event.seq:>4}  {event.kind:<9}  {told}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _value(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _echo_json(values: Any) -> None:
    from placement.io import dump_json

    typer.echo(dump_json(values))
