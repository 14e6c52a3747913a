"""Who calls, and may they: bearer tokens, or without any token this machine alone.

Without a single token in the database the service is one person's tool: it listens on loopback, and every
caller is ``local`` with all scopes. What a browser might be talked into is refused then: requests for another
host name (DNS rebinding) and requests that another site's page makes. From the first token on, a token is
required.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from fastapi import Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase
from starlette.types import Scope as Connection

from service.api.exposure import check_exposure, is_loopback
from service.api.shared_reads import SharedReads
from service.errors import ForbiddenError, UnauthorizedError
from service.state.tokens import Limits, Scope, Token, TokenStore, parse_token

if TYPE_CHECKING:
    from service.api.context import Context

__all__ = ["LOCAL", "Caller", "Limits", "Scope", "authenticate", "check_exposure", "require"]

_PROXY_HEADERS = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")
_OWN_SITES = (b"same-origin", b"none")
_NO_TOKEN = Token(id="", name="", scopes=frozenset(), limits=Limits(), created_at=0.0, hash="0" * 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sent a request.

    Parameters
    ----------
    id
        Id of the token, ``local`` without any.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    limits: Limits


LOCAL = Caller(id="local", name="local", scopes=frozenset(Scope), limits=Limits())
"""Everyone, as long as there is no token."""


class _Requirement(SecurityBase):
    """The dependency of a route on a scope; OpenAPI shows it as bearer authentication."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.scheme_name = "bearer"
        self.model = HTTPBearerModel(
            bearerFormat="mp_<id>_<secret>",
            description="Token made with `moe-placement token create`. Without any token the service "
            "answers this machine alone and asks for none.",
        )

    async def __call__(self, request: Request) -> Caller:
        caller = await authenticate(request.scope)
        if self.scope not in caller.scopes:
            raise ForbiddenError(f"this needs the scope {self.scope}; the token has {_named(caller.scopes)}")
        return caller


@cache
def require(scope: Scope) -> _Requirement:
    """Return the dependency that gives the caller, and refuses those without a scope.

    Raises
    ------
    UnauthorizedError, ForbiddenError, TooManyRequestsError
        When a request comes that may not pass.
    """
    return _Requirement(scope)


async def authenticate(connection: Connection) -> Caller:
    """Return who sent a request; it is found out once per request and kept in its scope.

    Raises
    ------
    UnauthorizedError
        If a token is missing, malformed, unknown, expired or revoked.
    ForbiddenError
        If there are no tokens, and the request does not come from this machine's own programs.
    TooManyRequestsError
        If the caller's rate is spent.
    """
    known: Caller | None = connection.get("caller")
    if known is not None:
        return known
    context: Context = connection["app"].state.context
    if context.tokens.is_fast:
        caller = identify(connection, context.tokens)
    else:
        caller = await _identify_shared(connection, context.tokens)
    connection["app"].state.rates.count(caller)
    connection["caller"] = caller
    return caller


async def _identify_shared(connection: Connection, tokens: TokenStore) -> Caller:
    """Look the caller up in a read that is shared with others who send the same at this moment."""
    shared: SharedReads[Any] = connection["app"].state.shared_reads
    given = tuple(value for name, value in connection["headers"] if name == b"authorization")
    if given:
        return cast(Caller, await shared.get(("token", given), lambda: _bearer(list(given), tokens)))
    if await shared.get("any token", tokens.any):
        raise UnauthorizedError("this needs a token: send the header Authorization: Bearer mp_...")
    _check_local(connection)
    return LOCAL


def identify(connection: Connection, tokens: TokenStore) -> Caller:
    """Look the caller up; see `authenticate`."""
    given = [value for name, value in connection["headers"] if name == b"authorization"]
    if given:
        return _bearer(given, tokens)
    if tokens.any():
        raise UnauthorizedError("this needs a token: send the header Authorization: Bearer mp_...")
    _check_local(connection)
    return LOCAL


def _bearer(given: list[bytes], tokens: TokenStore) -> Caller:
    scheme, _, text = given[0].decode("latin-1").partition(" ")
    parsed = parse_token(text.strip())
    if len(given) > 1 or scheme.lower() != "bearer" or parsed is None:
        raise UnauthorizedError("the Authorization header is malformed: it must read Bearer mp_<id>_<secret>")
    token_id, secret = parsed
    now = time.time()
    found = tokens.get(token_id)
    # An unknown id takes as long as a wrong secret.
    is_right = (found or _NO_TOKEN).is_secret(secret, now=now)
    if found is None or not is_right:
        raise UnauthorizedError("the token is unknown, or its secret is not the present one")
    if found.revoked_at is not None:
        raise UnauthorizedError(f"token {token_id} was revoked")
    if found.is_expired(now):
        raise UnauthorizedError(f"token {token_id} has expired")
    return Caller(id=found.id, name=found.name, scopes=found.scopes, limits=found.limits)


def _check_local(connection: Connection) -> None:
    """Refuse what is not a program of this machine speaking to it by its own name."""
    headers = dict(connection["headers"])
    hosts = [value for name, value in connection["headers"] if name == b"host"]
    host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
    client = connection.get("client")
    if client is not None and not is_loopback(client[0]):
        raise ForbiddenError("without tokens this machine alone is served; see moe-placement token create")
    if not is_loopback(_without_port(host)):
        raise ForbiddenError("without tokens the Host header must be a loopback name (127.0.0.1, localhost)")
    if any(name in headers for name in _PROXY_HEADERS):
        raise ForbiddenError(
            "the request came through a proxy, which needs a token; see moe-placement token create"
        )
    if headers.get(b"sec-fetch-site", b"none") not in _OWN_SITES:
        raise ForbiddenError("without tokens requests of other sites' pages are refused")
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1").lower() != f"{connection['scheme']}://{host}".lower():
        raise ForbiddenError("without tokens requests of other sites' pages are refused")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _named(scopes: frozenset[Scope]) -> str:
    return ", ".join(scope for scope in Scope if scope in scopes) or "none"
