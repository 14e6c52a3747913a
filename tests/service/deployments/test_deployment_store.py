"""Deployments in both databases: compare-and-set, versions without gaps, windows once, leases by counting."""

from __future__ import annotations

import threading
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.deployments.records import Cause, LoadPart, NewVersion, Phase, RefreshState
from service.errors import ConflictError, NotFoundError, PreconditionError
from service.state.artifacts import ArtifactStore
from service.state.audit import AuditLog
from service.state.database import Database
from service.state.deployments import DeploymentStore

FACTS = {"layers": 1, "experts": 2, "top_k": 1}
SPEC: dict[str, Any] = {"policy": {"mode": "manual"}, "facts": FACTS}


@pytest.fixture
def store(database: Database) -> DeploymentStore:
    """An empty store."""
    return DeploymentStore(database)


def digest(database: Database, number: int) -> str:
    """Return the id of a placement that is there."""
    name = f"sha256:{number:064x}"
    ArtifactStore(database).add(
        digest=name, kind="placement", size_bytes=1, format="native", summary={}, created_by="test"
    )
    return name


def new(of: str, **changes: Any) -> NewVersion:
    """Return something to promote."""
    return replace(NewVersion(digest=of, cause=Cause.MANUAL, by="me", why="test"), **changes)


def part(window: int, *, rank: int = 0, counts: tuple[int, int] = (1, 2), tokens: float = 3.0) -> LoadPart:
    """Return a part of a window."""
    load = zlib.compress(np.array(counts, dtype="<i8").tobytes())
    return LoadPart(window=window, rank=rank, version=None, tokens=tokens, load=load)


def test_a_spec_is_created_and_changed(store: DeploymentStore) -> None:
    """The first put creates, the next one counts the revision up; facts are what they were given."""
    made, created = store.put("one", SPEC, by="me")
    changed, again = store.put("one", {**SPEC, "policy": {"mode": "auto"}}, by="me")
    assert (created, again) == (True, False)
    assert (made.revision, changed.revision) == (1, 2)
    assert changed.spec["policy"] == {"mode": "auto"}
    assert store.heads(["one", "two"]) == {"one": 2}
    assert [found.name for found in store.page()] == ["one"]
    assert store.page(after="one") == []


def test_a_spec_changes_only_as_expected(store: DeploymentStore) -> None:
    """Compare-and-set on the revision, and on there being none yet."""
    with pytest.raises(PreconditionError, match="has no revision yet"):
        store.put("one", SPEC, by="me", expected=3)
    store.put("one", SPEC, by="me", expected=None)
    with pytest.raises(PreconditionError, match="has revision 1, the request was made for none"):
        store.put("one", SPEC, by="me", expected=None)
    with pytest.raises(PreconditionError, match="has revision 1, the request was made for revision 7"):
        store.put("one", SPEC, by="me", expected=7)
    assert store.put("one", SPEC, by="me", expected=1)[0].revision == 2
    with pytest.raises(PreconditionError):
        store.remove("one", by="me", expected=1)


def test_a_check_can_stop_a_change(store: DeploymentStore) -> None:
    """What the check raises leaves everything as it was."""

    def refuse(_: object) -> None:
        raise ConflictError("no")

    store.put("one", SPEC, by="me", check=refuse)
    with pytest.raises(ConflictError):
        store.put("one", SPEC, by="me", check=refuse)
    assert store.get("one").revision == 1


def test_versions_count_without_gaps(store: DeploymentStore, database: Database) -> None:
    """Each promotion appends a version; what runs already is no new one."""
    store.put("one", SPEC, by="me")
    assert store.current("one") == store.current("one")
    assert store.current("none") is None
    first, second = digest(database, 1), digest(database, 2)
    assert store.promote("one", new(first, job_id="s-1"), expected=None).version == 1
    assert store.promote("one", new(second), expected=1).version == 2
    assert store.promote("one", new(second), expected=2).version == 2
    assert store.promote("one", new(first, cause=Cause.ROLLBACK, of_version=1)).version == 3
    current = store.current("one")
    assert current is not None
    assert (current.revision, current.version, current.digest) == (4, 3, first)
    assert [found.version for found in store.versions("one")] == [3, 2, 1]
    assert [found.version for found in store.versions("one", before=3, limit=1)] == [2]
    with pytest.raises(PreconditionError, match="has version 3, the request was made for version 2"):
        store.promote("one", new(second), expected=2)
    with pytest.raises(NotFoundError):
        store.promote("none", new(first))


def test_promotions_are_in_the_audit_log(store: DeploymentStore, database: Database) -> None:
    """Who promoted what, and why, in the same transaction."""
    store.put("one", SPEC, by="me", request_id="r1")
    store.promote("one", new(digest(database, 1), why="better"), request_id="r2")
    entries = AuditLog(database).page(target="one")
    assert [(entry.action, entry.request_id) for entry in entries] == [
        ("deployment.promote", "r2"),
        ("deployment.create", "r1"),
    ]
    assert entries[0].detail is not None
    assert entries[0].detail["why"] == "better"


def test_one_of_many_promotions_wins(store: DeploymentStore, database: Database) -> None:
    """Of ten that expect the same version one is made."""
    store.put("one", SPEC, by="me")
    store.promote("one", new(digest(database, 99)))
    choices = [digest(database, number) for number in range(10)]
    won: list[int] = []
    lost: list[int] = []
    start = threading.Barrier(len(choices))

    def try_one(number: int) -> None:
        start.wait()
        try:
            store.promote("one", new(choices[number]), expected=1)
            won.append(number)
        except PreconditionError:
            lost.append(number)

    threads = [threading.Thread(target=try_one, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 9)
    assert store.versions("one")[0].placement_digest == choices[won[0]]


def test_removal_takes_history_and_windows(store: DeploymentStore, database: Database) -> None:
    """What is made again under the name starts from nothing."""
    store.put("one", SPEC, by="me")
    store.promote("one", new(digest(database, 1)))
    store.windows.add("one", [part(1)])
    store.remove("one", by="me")
    with pytest.raises(NotFoundError):
        store.get("one")
    with pytest.raises(NotFoundError):
        store.windows.add("one", [part(1)])
    store.put("one", SPEC, by="me")
    assert store.versions("one") == []
    assert store.windows.recent("one") == []


def test_a_part_is_stored_once(store: DeploymentStore) -> None:
    """The same part again is known; with other content it is a conflict, and nothing is stored."""
    store.put("one", SPEC, by="me")
    first = store.windows.add("one", [part(1), part(2)])
    again = store.windows.add("one", [part(2), part(3), part(2, rank=1)])
    assert (first.stored, first.known, again.stored, again.known) == (2, 0, 2, 1)
    for other in (part(3, counts=(9, 9)), part(3, tokens=4.0)):
        with pytest.raises(ConflictError, match="window 3 of rank 0"):
            store.windows.add("one", [part(4), other])
    assert [(found.window, found.rank) for found in store.windows.recent("one")] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (2, 1),
    ]


def test_a_part_packed_otherwise_is_the_same(store: DeploymentStore) -> None:
    """Content counts, not how it was compressed."""
    store.put("one", SPEC, by="me")
    counts = np.arange(2, dtype="<i8").tobytes()
    for level in (0, 9):
        part_ = LoadPart(window=1, rank=0, version=None, tokens=1.0, load=zlib.compress(counts, level))
        store.windows.add("one", [part_])
    assert len(store.windows.recent("one")) == 1


def test_many_ranks_post_the_same_windows_at_once(store: DeploymentStore) -> None:
    """Retries that overlap store every part once."""
    store.put("one", SPEC, by="me")
    stored: list[int] = []

    def post(rank: int) -> None:
        stored.extend(store.windows.add("one", [part(window, rank=rank)]).stored for window in range(5))

    threads = [threading.Thread(target=post, args=(rank,)) for rank in (0, 0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(stored) == 10
    assert len(store.windows.recent("one")) == 10


def test_old_windows_go(store: DeploymentStore) -> None:
    """The latest windows by arrival are kept, whatever their numbers."""
    store.put("one", SPEC, by="me")
    for window in (50, 1, 2, 3):
        store.windows.add("one", [part(window), part(window, rank=1)], keep=2)
    assert {found.window for found in store.windows.recent("one")} == {2, 3}
    newest = store.windows.recent("one")[-1].number
    assert store.windows.newest_of_each() == {"one": newest}
    assert store.windows.newest() == newest


def test_windows_of_another_model_go(store: DeploymentStore) -> None:
    """A spec with other facts starts with no windows, and refuses parts checked against the old ones."""
    store.put("one", SPEC, by="me")
    store.windows.add("one", [part(1)], facts=FACTS)
    store.put("one", {**SPEC, "policy": {"mode": "auto"}}, by="me")
    assert len(store.windows.recent("one")) == 1
    store.put("one", {**SPEC, "facts": {**FACTS, "experts": 3}}, by="me")
    assert store.windows.recent("one") == []
    with pytest.raises(ConflictError, match="has just changed"):
        store.windows.add("one", [part(2)], facts=FACTS)


def test_a_lease_is_taken_as_seen_alone(store: DeploymentStore) -> None:
    """Who has seen another beat gets nothing; beats leave what is written alone."""
    store.put("one", SPEC, by="me")
    taken = store.take("one", "a", seen=(None, 0))
    assert taken is not None
    assert (taken.owner, taken.beat) == ("a", 1)
    assert store.take("one", "b", seen=(None, 0)) is None
    assert store.renew("one", "a")
    assert not store.renew("one", "b")
    assert store.take("one", "b", seen=("a", 1)) is None
    taken_over = store.take("one", "b", seen=("a", 2))
    assert taken_over is not None
    assert not store.renew("one", "a")
    store.release("one", "a")
    assert store.states()["one"].owner == "b"
    store.release("one", "b")
    assert store.states()["one"].owner is None
    assert store.get("one").revision == 1


def test_a_state_is_saved_by_its_owner_once(store: DeploymentStore) -> None:
    """Neither an outdated state nor that of another owner is written."""
    store.put("one", SPEC, by="me")
    state = store.take("one", "a", seen=(None, 0))
    assert state is not None
    store.renew("one", "a")
    solving = replace(state, phase=Phase.SOLVING, job_id="s-1")
    written = store.save("one", solving, drift={"excess": 0.5})
    assert written is not None
    assert written.serial == state.serial + 1
    assert store.save("one", solving) is None
    assert store.save("one", replace(written, owner="b")) is None
    found = store.get("one")
    assert (found.refresh.phase, found.refresh.job_id, found.drift) == (Phase.SOLVING, "s-1", {"excess": 0.5})
    assert found.revision == 1


def test_a_promotion_ends_what_a_controller_has_read(store: DeploymentStore, database: Database) -> None:
    """A promotion by hand makes the controller's own state outdated, and is watched from now on."""
    store.put("one", SPEC, by="me")
    store.windows.add("one", [part(1)])
    state = store.take("one", "a", seen=(None, 0))
    assert state is not None
    store.promote("one", new(digest(database, 1)))
    assert store.save("one", state) is None
    automatic = new(digest(database, 2), cause=Cause.AUTOMATIC)
    with pytest.raises(PreconditionError, match="has state 1"):
        store.promote("one", automatic, state=state)
    watch = store.get("one").refresh.watch
    assert watch is not None
    assert (watch["version"], watch["previous"]) == (1, None)
    assert watch["after"] == store.windows.newest()


def test_a_controllers_promotion_is_one_transaction(store: DeploymentStore, database: Database) -> None:
    """Version, state, what was observed before and counters come together."""
    store.put("one", SPEC, by="me")
    store.promote("one", new(digest(database, 1)))
    state = store.take("one", "a", seen=(None, 0))
    assert state is not None
    made = store.promote(
        "one",
        new(digest(database, 2), cause=Cause.AUTOMATIC),
        expected=1,
        state=replace(state, number=4).ended(),
        observed={1: {"gain": -0.5}},
    )
    found = store.get("one")
    assert (made.version, found.version, found.refresh.number) == (2, 2, 4)
    assert found.refresh.owner == "a"
    before = store.version("one", 1)
    assert before is not None
    assert before.observed == {"gain": -0.5}


def test_a_state_of_a_later_release_is_read() -> None:
    """Entries that are not known are left out."""
    state = RefreshState.of({"serial": 3, "phase": "solving", "something": 1})
    assert (state.serial, state.phase) == (3, Phase.SOLVING)
    assert RefreshState.of(state.to_dict()) == state
    assert RefreshState.of(None) == RefreshState()
