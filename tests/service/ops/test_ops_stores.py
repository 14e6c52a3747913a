"""Rows of artifacts, the audit log and the counters, on both databases."""

from __future__ import annotations

import threading

from service.artifacts import digest_of
from service.state.artifacts import ArtifactStore
from service.state.audit import AuditLog
from service.state.counters import add_counters, label_text, labels_of, read_counters
from service.state.database import Database
from service.state.records import Artifact
from service.state.tables import artifacts


def add(store: ArtifactStore, content: bytes, kind: str = "trace", by: str = "local") -> Artifact:
    """Name some bytes."""
    return store.add(
        digest=digest_of(content),
        kind=kind,
        size_bytes=len(content),
        format="npz",
        summary={"layers": 2},
        created_by=by,
    )


def test_adding_twice_keeps_the_first(database: Database) -> None:
    """The same bytes are one artifact, as it was first named."""
    store = ArtifactStore(database)
    first = add(store, b"abc", by="first")
    assert add(store, b"abc", by="second") == first
    assert store.get(first.digest) == first
    assert first.summary == {"layers": 2}
    assert store.get(digest_of(b"other")) is None


def test_pages_meet_without_gap_or_repeat(database: Database) -> None:
    """Newest first; a page goes on behind the last one of the page before."""
    store = ArtifactStore(database)
    made = [add(store, bytes([number])) for number in range(5)]
    add(store, b"a placement", kind="placement")
    first = store.page(kind="trace", limit=2)
    rest = store.page(kind="trace", before=(first[-1].created_at, first[-1].digest), limit=9)
    key = [(one.created_at, one.digest) for one in (*first, *rest)]
    assert key == sorted(((one.created_at, one.digest) for one in made), reverse=True)
    assert len(store.page()) == 6


def test_touching_tells_what_is_known_and_makes_it_young(database: Database) -> None:
    """Retention goes by the last use."""
    store = ArtifactStore(database)
    digest = add(store, b"abc").digest
    with database.write() as connection:
        connection.execute(artifacts.update().values(used_at=0.0))
    assert store.touch([digest, digest_of(b"unknown")]) == {digest}
    with database.read() as connection:
        assert connection.scalar(artifacts.select().with_only_columns(artifacts.c.used_at)) > 0
    assert store.touch([]) == frozenset()


def test_the_audit_log_shares_the_transaction_of_the_change(database: Database) -> None:
    """What was not changed was not done by anybody."""
    log = AuditLog(database)
    with database.engine.connect() as connection:
        log.record(who="admin", action="token.create", target="t1", connection=connection)
        connection.rollback()
    assert log.page() == []
    with database.write() as connection:
        log.record(who="admin", action="token.create", target="t1", connection=connection)
    log.record(who="admin", action="token.revoke", target="t2", request_id="r", detail={"why": "lost"})
    newest, oldest = log.page()
    assert (newest.action, newest.target, newest.detail) == ("token.revoke", "t2", {"why": "lost"})
    assert log.page(before=newest.number) == [oldest]
    assert log.page(target="t1") == [oldest]


def test_the_audit_log_takes_any_text(database: Database) -> None:
    """Too long for the column, or with what PostgreSQL refuses: cut, not lost."""
    log = AuditLog(database)
    log.record(who="w" * 99, action="a", target="nul\x00" + "t" * 300)
    (entry,) = log.page()
    assert entry.who == "w" * 61 + "..."
    assert entry.target.startswith("nult")
    assert len(entry.target) == 255


def test_counters_add_up_over_threads(database: Database) -> None:
    """Every amount counts exactly once."""
    key, other = ("jobs_finished", label_text(status="ok", kind="solve")), ("other", "")

    def count() -> None:
        for _ in range(10):
            with database.write() as connection:
                add_counters(connection, {other: 0.5, key: 1.0})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert read_counters(connection) == {key: 40.0, other: 20.0}


def test_labels_come_back() -> None:
    """In order of name."""
    assert label_text(b="2", a="1") == "a=1,b=2"
    assert labels_of("a=1,b=2") == {"a": "1", "b": "2"}
    assert labels_of("") == {}
