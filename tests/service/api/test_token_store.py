"""Tokens at rest: only hashes, rotation with grace, revocation, and no text that breaks the parser."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from service.state.audit import AuditLog
from service.state.database import Database, open_database
from service.state.tables import tokens
from service.state.tokens import Issued, Limits, Scope, TokenStore, parse_token


@pytest.fixture
def store(database: Database) -> Iterator[TokenStore]:
    """An empty store, on each kind of database."""
    opened = TokenStore(database)
    yield opened
    opened.close()


def is_valid(store: TokenStore, issued: Issued, *, now: float | None = None) -> bool:
    """Tell whether an issued text is taken."""
    parsed = parse_token(issued.text)
    assert parsed is not None
    found = store.get(parsed[0])
    assert found is not None
    return found.is_secret(parsed[1], now=time.time() if now is None else now)


def test_only_a_hash_is_kept(store: TokenStore, database: Database) -> None:
    """The row holds the SHA-256 of 256 random bits, and nothing that leads back to them."""
    issued = store.create("launchers", [Scope.SUBMIT], by="cli")

    with database.read() as connection:
        row = connection.execute(sa.select(tokens)).one()._mapping
    assert row["hash"] == hashlib.sha256(issued.secret.encode()).hexdigest()
    assert issued.secret not in str(dict(row))
    assert issued.secret not in repr(issued)
    assert len(issued.secret) == 43


def test_a_scope_implies_those_below(store: TokenStore) -> None:
    """Admin may do everything, submit may read."""
    made = {scope: store.create("x", [scope], by="cli").token.scopes for scope in Scope}

    assert made[Scope.READ] == {Scope.READ}
    assert made[Scope.SUBMIT] == {Scope.READ, Scope.SUBMIT}
    assert made[Scope.ADMIN] == set(Scope)


def test_what_is_stored_comes_back(store: TokenStore) -> None:
    """A token is read as it was made."""
    limits = Limits(requests_per_minute=60, max_upload_bytes=1 << 20, max_queued=3)
    assert not store.any()

    issued = store.create("ci", [Scope.READ], limits=limits, expires_at=4e9, by="cli")

    assert store.any()
    assert store.get(issued.token.id) == issued.token == store.list()[0]
    assert store.get("0" * 12) is None


def test_rotation_keeps_the_old_secret_for_its_grace(store: TokenStore) -> None:
    """After a rotation both secrets are taken, then the new one alone; before last is gone at once."""
    first = store.create("ci", [Scope.READ], by="cli")
    second = store.rotate(first.token.id, grace_s=600, by="cli")
    assert second is not None
    now = time.time()
    assert is_valid(store, first, now=now)
    assert is_valid(store, second, now=now)
    assert not is_valid(store, first, now=now + 601)

    third = store.rotate(first.token.id, grace_s=0, by="cli")
    assert third is not None
    assert [is_valid(store, one) for one in (first, second, third)] == [False, False, True]


def test_revocation_is_for_good(store: TokenStore) -> None:
    """A revoked token stays, shown as such; it cannot be rotated back to life, and none is not none."""
    issued = store.create("ci", [Scope.READ], by="cli")

    revoked = store.revoke(issued.token.id, by="cli")

    assert revoked is not None
    assert revoked.revoked_at is not None
    assert store.revoke(issued.token.id, by="cli") == revoked
    assert store.any()
    with pytest.raises(InputError, match="was revoked"):
        store.rotate(issued.token.id, grace_s=0, by="cli")


def test_another_process_sees_a_change_at_once(store: TokenStore, database_url: str) -> None:
    """Nothing is remembered between two look-ups."""
    issued = store.create("ci", [Scope.READ], by="cli")
    other_database = open_database(database_url)
    other = TokenStore(other_database)
    try:
        for _ in range(2):
            assert is_valid(other, issued)
        store.revoke(issued.token.id, by="cli")
        found = other.get(issued.token.id)
        assert found is not None
        assert found.revoked_at is not None
    finally:
        other.close()
        other_database.close()


def test_unknown_tokens_are_none(store: TokenStore) -> None:
    """Rotation and revocation of nothing say so."""
    assert store.rotate("0" * 12, grace_s=0, by="cli") is None
    assert store.revoke("0" * 12, by="cli") is None


def test_changes_are_on_record(store: TokenStore, database: Database) -> None:
    """Who made, rotated and revoked a token is in the audit log."""
    issued = store.create("ci", [Scope.READ], by="cli:ann", request_id="r1")
    store.rotate(issued.token.id, grace_s=0, by="cli:bob")
    store.revoke(issued.token.id, by="cli:eve")

    entries = AuditLog(database).page(target=issued.token.id)

    assert [(entry.action, entry.who) for entry in entries] == [
        ("token.revoke", "cli:eve"),
        ("token.rotate", "cli:bob"),
        ("token.create", "cli:ann"),
    ]
    assert issued.secret not in str(entries)


@pytest.mark.parametrize(
    ("name", "scopes", "expires_at", "said"),
    [
        ("", [Scope.READ], None, "name"),
        ("a\nb", [Scope.READ], None, "name"),
        ("a\x00b", [Scope.READ], None, "name"),
        ("n" * 65, [Scope.READ], None, "name"),
        ("ci", [], None, "needs a scope"),
        ("ci", [Scope.READ], 1.0, "expired before its first use"),
        ("ci", [Scope.READ], float("nan"), "expired before its first use"),
    ],
)
def test_senseless_tokens_are_refused(
    store: TokenStore, name: str, scopes: list[Scope], expires_at: float | None, said: str
) -> None:
    """What is wrong is said, and nothing is made."""
    with pytest.raises(InputError, match=said):
        store.create(name, scopes, expires_at=expires_at, by="cli")
    assert not store.any()


@pytest.mark.parametrize("grace_s", [-1.0, 31 * 86400.0, float("nan")])
def test_a_grace_has_bounds(store: TokenStore, grace_s: float) -> None:
    """A leaked secret must not live on for years."""
    issued = store.create("ci", [Scope.READ], by="cli")
    with pytest.raises(InputError, match="grace"):
        store.rotate(issued.token.id, grace_s=grace_s, by="cli")


def test_limits_are_positive() -> None:
    """Zero requests a minute is a revocation, not a limit."""
    with pytest.raises(InputError, match="requests_per_minute is 0"):
        Limits(requests_per_minute=0)


@given(st.text())
def test_any_text_is_parsed_or_none(text: str) -> None:
    """The parser takes every text; what it takes can be put together again."""
    parsed = parse_token(text)
    assert parsed is None or f"mp_{parsed[0]}_{parsed[1]}" == text


@given(
    st.text(alphabet="0123456789abcdefghjkmnpqrstvwxyz", min_size=12, max_size=12),
    st.text(
        alphabet="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-", min_size=43, max_size=43
    ),
    st.sampled_from(["", " ", "\n", "x", "\x00", "_"]),
)
def test_tokens_are_parsed_exactly(token_id: str, secret: str, more: str) -> None:
    """Id and secret come apart whatever the secret holds; anything around them is no token."""
    text = f"mp_{token_id}_{secret}"
    assert parse_token(text) == (token_id, secret)
    if more:
        assert parse_token(text + more) is None
        assert parse_token(more + text) is None
