"""Bearer tokens: who may call, what they may do, and how much of it.

A token reads ``mp_<id>_<secret>``: the id names the row, the secret is 256 random bits of which only the
SHA-256 is kept. Rows are never removed: once the first token was made, callers need one for good.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import orjson
import sqlalchemy as sa

from placement.errors import InputError
from service.errors import UnavailableError
from service.state.audit import AuditLog
from service.state.database import Database
from service.state.tables import tokens

__all__ = ["Issued", "Limits", "Scope", "Token", "TokenStore", "parse_token"]

ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
ID_LENGTH = 12
SECRET_BYTES = 32
MOST_NAME = 64
MOST_GRACE_S = 30 * 86400.0

_TOKEN = re.compile(rf"mp_([{ID_ALPHABET}]{{{ID_LENGTH}}})_([A-Za-z0-9_-]{{43}})", re.ASCII)
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
_ONE = "SELECT * FROM tokens WHERE id = ?"
_ANY = "SELECT 1 FROM tokens LIMIT 1"


class Scope(StrEnum):
    """What a token may do; each implies the ones before."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    @property
    def implied(self) -> frozenset[Scope]:
        """The scope and those below it."""
        ladder = list(Scope)
        return frozenset(ladder[: ladder.index(self) + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one token may use; None leaves it to the settings of the service.

    Parameters
    ----------
    requests_per_minute
        Requests in any minute, counted by each server process on its own.
    max_upload_bytes
        Size of an upload, as sent and once decompressed.
    max_queued
        Jobs of this token that may wait at a time.
    """

    requests_per_minute: int | None = None
    max_upload_bytes: int | None = None
    max_queued: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 1 <= value < 1 << 53:
                raise InputError(f"{name} is {value}; it must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token as it stands; the hashes are not shown.

    Parameters
    ----------
    scopes
        Everything it may do, implied scopes among it.
    previous_until
        Until when the secret before the last rotation is taken too.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    limits: Limits
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    previous_until: float | None = None
    hash: str = field(repr=False)
    previous_hash: str | None = field(default=None, repr=False)

    def is_secret(self, secret: str, *, now: float) -> bool:
        """Tell, in a time that does not depend on how much is right, whether a secret is this token's."""
        given = _hash(secret)
        is_present = hmac.compare_digest(given, self.hash)
        is_previous = hmac.compare_digest(given, self.previous_hash or "0" * len(given))
        return is_present or (is_previous and now < (self.previous_until or 0.0))

    def is_expired(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and now >= self.expires_at

    def as_dict(self) -> dict[str, Any]:
        """Return what an administrator may see."""
        return {
            "id": self.id,
            "name": self.name,
            "scopes": [scope for scope in Scope if scope in self.scopes],
            "limits": asdict(self.limits),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "revoked_at": self.revoked_at,
            "previous_until": self.previous_until,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A token with its secret, which is shown this once."""

    token: Token
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        """What the caller sends."""
        return f"mp_{self.token.id}_{self.secret}"


def parse_token(text: str) -> tuple[str, str] | None:
    """Return id and secret of a token's text, None if it is none."""
    match = _TOKEN.fullmatch(text)
    return None if match is None else (match[1], match[2])


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class TokenStore:
    """The tokens.

    Every look-up reads the row, so that a revocation counts at once in every process that shares the state.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._audit = AuditLog(database)
        self._lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None

    @property
    def is_fast(self) -> bool:
        """Whether `find` and `any` take microseconds, and may run in the event loop."""
        return self._database.is_sqlite

    def any(self) -> bool:
        """Tell whether there ever was a token: then callers need one.

        Raises
        ------
        UnavailableError
            If the database cannot be reached.
        """
        if self.is_fast:
            return self._read(_ANY) is not None
        with self._database.read() as connection:
            return connection.execute(sa.select(tokens.c.id).limit(1)).first() is not None

    def get(self, token_id: str) -> Token | None:
        """Return a token, revoked and expired ones too.

        Raises
        ------
        UnavailableError
            If the database cannot be reached.
        """
        if self.is_fast:
            row = self._read(_ONE, token_id)
            return None if row is None else _token(row)
        with self._database.read() as connection:
            found = connection.execute(sa.select(tokens).where(tokens.c.id == token_id)).one_or_none()
        return None if found is None else _token(found._mapping)

    def list(self) -> list[Token]:
        """Return all tokens, oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(tokens).order_by(tokens.c.created_at, tokens.c.id))
            return [_token(row._mapping) for row in rows]

    def create(
        self,
        name: str,
        scopes: Iterable[Scope],
        *,
        limits: Limits | None = None,
        expires_at: float | None = None,
        by: str,
        request_id: str | None = None,
    ) -> Issued:
        """Make a token.

        Parameters
        ----------
        name
            What or whom it is for.
        expires_at
            Seconds since the epoch; None for never.
        by
            Id of the caller, for the audit log.

        Raises
        ------
        InputError
            If the name, the scopes or the time make no sense.
        """
        given = frozenset(scopes)
        _check(name, given, expires_at)
        secret = secrets.token_urlsafe(SECRET_BYTES)
        token = Token(
            id="".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH)),
            name=name,
            scopes=_with_implied(given),
            limits=limits or Limits(),
            created_at=time.time(),
            expires_at=expires_at,
            hash=_hash(secret),
        )
        with self._database.write() as connection:
            connection.execute(sa.insert(tokens).values(_row(token)))
            self._note("token.create", token, by, request_id, connection)
        return Issued(token=token, secret=secret)

    def rotate(
        self, token_id: str, *, grace_s: float, by: str, request_id: str | None = None
    ) -> Issued | None:
        """Give a token a new secret; the old one is taken for some more seconds.

        Returns None if there is no such token.

        Raises
        ------
        InputError
            If it was revoked, or the grace is not between 0 and 30 days.
        """
        if not 0 <= grace_s <= MOST_GRACE_S:
            raise InputError(f"the grace of {grace_s:g} s is not between 0 and {MOST_GRACE_S:g} s (30 days)")
        secret = secrets.token_urlsafe(SECRET_BYTES)
        with self._database.write() as connection:
            found = _locked(connection, token_id)
            if found is None:
                return None
            if found.revoked_at is not None:
                raise InputError(f"token {token_id} was revoked; create a new one instead")
            changed = _update(
                connection,
                token_id,
                hash=_hash(secret),
                previous_hash=found.hash,
                previous_until=time.time() + grace_s,
            )
            self._note("token.rotate", changed, by, request_id, connection)
        return Issued(token=changed, secret=secret)

    def revoke(self, token_id: str, *, by: str, request_id: str | None = None) -> Token | None:
        """End a token for good, in every process at once; None if there is no such token."""
        with self._database.write() as connection:
            found = _locked(connection, token_id)
            if found is None or found.revoked_at is not None:
                return found
            changed = _update(connection, token_id, revoked_at=time.time())
            self._note("token.revoke", changed, by, request_id, connection)
        return changed

    def close(self) -> None:
        """Close the connection that `get` and `any` keep."""
        with self._lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    def _read(self, statement: str, *parameters: str) -> sqlite3.Row | None:
        """Read one row on a connection that is kept for this: every request does it."""
        try:
            with self._lock:
                if self._reader is None:
                    self._reader = _reader(self._database)
                row: sqlite3.Row | None = self._reader.execute(statement, parameters).fetchone()
        except sqlite3.Error as exc:
            raise UnavailableError(f"the database cannot be used now: {exc}", retry_after=1) from exc
        return row

    def _note(
        self, action: str, token: Token, by: str, request_id: str | None, connection: sa.Connection
    ) -> None:
        self._audit.record(
            who=by,
            action=action,
            target=token.id,
            request_id=request_id,
            detail={"name": token.name, "scopes": sorted(token.scopes), "expires_at": token.expires_at},
            connection=connection,
        )


def _reader(database: Database) -> sqlite3.Connection:
    connection = sqlite3.connect(
        str(database.engine.url.database), isolation_level=None, check_same_thread=False, timeout=5.0
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA query_only = ON").close()
    return connection


def _locked(connection: sa.Connection, token_id: str) -> Token | None:
    row = connection.execute(sa.select(tokens).where(tokens.c.id == token_id).with_for_update()).one_or_none()
    return None if row is None else _token(row._mapping)


def _update(connection: sa.Connection, token_id: str, **values: Any) -> Token:
    statement = sa.update(tokens).where(tokens.c.id == token_id).values(values).returning(*tokens.c)
    return _token(connection.execute(statement).one()._mapping)


def _token(row: Mapping[str, Any] | sa.RowMapping | sqlite3.Row) -> Token:
    return Token(
        id=row["id"],
        name=row["name"],
        scopes=frozenset(Scope(scope) for scope in _parsed(row["scopes"])),
        limits=Limits(**_parsed(row["limits"])),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        previous_until=row["previous_until"],
        hash=row["hash"],
        previous_hash=row["previous_hash"],
    )


def _parsed(value: Any) -> Any:
    """Return a JSON column's value, which SQLite's own driver gives as text."""
    return orjson.loads(value) if isinstance(value, (str, bytes)) else value


def _row(token: Token) -> dict[str, Any]:
    return {**token.as_dict(), "hash": token.hash}


def _with_implied(scopes: frozenset[Scope]) -> frozenset[Scope]:
    return frozenset().union(*(scope.implied for scope in scopes))


def _check(name: str, scopes: frozenset[Scope], expires_at: float | None) -> None:
    if _NAME.fullmatch(name) is None:
        raise InputError(f"the name {name!r} is empty, longer than {MOST_NAME} characters or not printable")
    if not scopes:
        raise InputError(f"a token needs a scope; choose from {', '.join(Scope)}")
    if expires_at is not None and not expires_at > time.time():
        raise InputError("the token would be expired before its first use; choose a later time")
