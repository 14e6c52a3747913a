"""``moe-placement token``: makes, lists, rotates and revokes the service's bearer tokens."""

from __future__ import annotations

import getpass
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import JsonOption
from placement.errors import InputError

if TYPE_CHECKING:
    from service.state.tokens import Issued, Scope, Token, TokenStore

__all__ = ["token_app"]

token_app = typer.Typer(name="token", help="Make and revoke the service's tokens.", no_args_is_help=True)

DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="The service's folder (./moe-placement-data). DATABASE_URL names another database.",
        show_default=False,
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id of the token.", show_default=False)]

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


@token_app.command()
def create(
    name: Annotated[str, typer.Argument(help="What or whom it is for.", show_default=False)],
    scope: Annotated[
        list[str],
        typer.Option(help="read, submit (also read) or admin (everything); repeatable.", show_default=False),
    ],
    expires_in: Annotated[
        str | None, typer.Option(help="Life, like 12h or 90d. Default: for ever.", show_default=False)
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests in any minute.", show_default=False)
    ] = None,
    max_upload_bytes: Annotated[
        int | None, typer.Option(min=1, help="Size of one upload.", show_default=False)
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(min=1, help="Jobs that may wait at a time.", show_default=False)
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token and print it, this once.

    From the first token on the service answers nobody without one.
    """
    life_s = None if expires_in is None else _seconds(expires_in, "--expires-in")
    with _store(data_dir, may_create=True) as store:
        from service.state.tokens import Limits

        issued = store.create(
            name,
            _scopes(scope),
            limits=Limits(
                requests_per_minute=requests_per_minute,
                max_upload_bytes=max_upload_bytes,
                max_queued=max_queued,
            ),
            expires_at=None if life_s is None else time.time() + life_s,
            by=_who(),
        )
    _print_issued(issued, as_json=as_json)


@token_app.command("list")
def list_tokens(data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """List all tokens, without their secrets."""
    with _store(data_dir) as store:
        found = store.list()
    if as_json:
        typer.echo(json.dumps([token.as_dict() for token in found]))
        return
    for token in found:
        typer.echo(_line(token))


@token_app.command()
def rotate(
    token_id: IdArgument,
    grace: Annotated[
        str, typer.Option(help="How long the old secret is still taken, like 10m or 1h.")
    ] = "1h",
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a token a new secret and print it, this once."""
    grace_s = _seconds(grace, "--grace")
    with _store(data_dir) as store:
        issued = store.rotate(token_id, grace_s=grace_s, by=_who())
    if issued is None:
        raise _unknown(token_id)
    _print_issued(issued, as_json=as_json)


@token_app.command()
def revoke(token_id: IdArgument, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """End a token for good, at once."""
    with _store(data_dir) as store:
        found = store.revoke(token_id, by=_who())
    if found is None:
        raise _unknown(token_id)
    typer.echo(json.dumps(found.as_dict()) if as_json else _line(found))


@contextmanager
def _store(data_dir: Path | None, *, may_create: bool = False) -> Iterator[TokenStore]:
    """Open the tokens of a service, which may be running."""
    try:
        from service.artifacts import private_folder
        from service.settings import read_settings
        from service.state.database import open_database
        from service.state.tokens import TokenStore
    except ImportError as exc:
        raise InputError(
            f"token needs the service ({exc.name} is missing): pip install 'moe-placement[service]'"
        ) from exc
    settings = read_settings(data_dir=data_dir)
    if settings.database_url is None:
        if may_create:
            private_folder(settings.data_dir)
        elif not settings.data_dir.is_dir():
            raise InputError(f"{settings.data_dir} is no folder of a service: name it with --data-dir")
    database = open_database(settings.database, upgrade=may_create)
    store = TokenStore(database)
    try:
        yield store
    finally:
        store.close()
        database.close()


def _scopes(names: list[str]) -> list[Scope]:
    from placement._suggest import did_you_mean
    from service.state.tokens import Scope

    known = [str(scope) for scope in Scope]
    for name in names:
        if name not in known:
            raise InputError(f"--scope {name!r} is unknown; {did_you_mean(name, known)}")
    return [Scope(name) for name in names]


def _seconds(text: str, option: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InputError(f"{option} {text!r} is no duration; write a number and s, m, h or d, like 90d")
    return float(match[1]) * _SECONDS[match[2]]


def _who() -> str:
    """Who is at the keyboard, for the audit log."""
    try:
        return f"cli:{getpass.getuser()}"[:64]
    except (OSError, KeyError):
        return "cli"


def _unknown(token_id: str) -> InputError:
    return InputError(f"there is no token {token_id!r}; see moe-placement token list")


def _print_issued(issued: Issued, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**issued.token.as_dict(), "token": issued.text}))
        return
    typer.echo(issued.text)
    typer.echo(f"{_line(issued.token)}\nIt is shown this once: keep it now.", err=True)


def _line(token: Token) -> str:
    now = time.time()
    state = "revoked" if token.revoked_at is not None else "expired" if token.is_expired(now) else "valid"
    until = "" if token.expires_at is None else f", until {_date(token.expires_at)}"
    scopes = ",".join(sorted(token.scopes))
    return f"{token.id}  {state}{until}  {scopes}  made {_date(token.created_at)}  {token.name}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
