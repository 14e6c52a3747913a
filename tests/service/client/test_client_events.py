"""Listening over a network that fails: every event once and in order, whatever breaks where."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from service.client import AnswerError, UnreachableError
from service.errors import NotFoundError
from tests.service.client.callers import KINDS, collect, perform
from tests.service.client.scripted_server import (
    Request,
    ScriptedServer,
    answer,
    drop,
    event,
    json_answer,
    problem,
    stall,
    stream,
)

SOLVE = "s-01"
DONE = event(4, "done", status="succeeded")
ALL = [event(1), event(2, "incumbent", objective=1.5, lower_bound=1.0, gap=0.25, solver="x"), event(3), DONE]

both = pytest.mark.parametrize("kind", KINDS)


def numbers(events: list[object]) -> list[int]:
    """Return the numbers of events."""
    return [found.seq for found in events]  # type: ignore[attr-defined]


@both
def test_events_come_as_they_are(kind: str) -> None:
    """An unbroken stream is told as it is, and ends with the last event."""
    with ScriptedServer(stream(*ALL)) as server:
        found = collect(kind, server.url, "events", SOLVE)
    assert [(one.seq, one.kind) for one in found] == [
        (1, "progress"),
        (2, "incumbent"),
        (3, "progress"),
        (4, "done"),
    ]
    assert found[1].incumbent.objective == 1.5
    assert found[0].incumbent is None
    assert found[3].data == {"status": "succeeded"}
    assert "last-event-id" not in server.requests[0].headers


@both
def test_half_an_event_is_asked_for_again(kind: str) -> None:
    """A connection that breaks within an event goes on after the last whole one."""
    with ScriptedServer(stream(ALL[0], ALL[1][:25]), drop(), stream(*ALL[1:])) as server:
        assert numbers(collect(kind, server.url, "events", SOLVE)) == [1, 2, 3, 4]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "1", "1"]


@both
@pytest.mark.parametrize(
    "between",
    [drop(), problem(503, "unavailable"), stream(), stream(b": keep-alive\n\n"), stream(b"retry: 1\n\n")],
)
def test_whatever_comes_between_is_passed_over(kind: str, between: object) -> None:
    """A restart of the server, seen in any way, costs no event."""
    with ScriptedServer(stream(*ALL[:2]), between, stream(*ALL[2:])) as server:  # type: ignore[arg-type]
        assert numbers(collect(kind, server.url, "events", SOLVE)) == [1, 2, 3, 4]


@both
def test_signs_of_life_are_no_events(kind: str) -> None:
    """Comments and hints between events of one stream are passed over."""
    with ScriptedServer(stream(b"retry: 10\n\n", ALL[0], b": keep-alive\n\n", b":\n\n", *ALL[1:])) as server:
        assert numbers(collect(kind, server.url, "events", SOLVE)) == [1, 2, 3, 4]
    assert len(server.requests) == 1


@both
def test_repeats_and_gaps_are_mended(kind: str) -> None:
    """Events that were seen are left out; a stream that skips one is left and asked again."""
    with ScriptedServer(stream(ALL[0], ALL[2]), stream(*ALL)) as server:
        assert numbers(collect(kind, server.url, "events", SOLVE)) == [1, 2, 3, 4]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "1"]


@both
def test_listening_begins_where_it_is_told(kind: str) -> None:
    """After a known event the first request already says so."""
    with ScriptedServer(stream(*ALL[2:])) as server:
        assert numbers(collect(kind, server.url, "events", SOLVE, after=2)) == [3, 4]
    assert server.requests[0].headers["last-event-id"] == "2"


@both
def test_nothing_more_is_the_end(kind: str) -> None:
    """A listener that has seen the last event is told so."""
    with ScriptedServer(answer(204)) as server:
        assert collect(kind, server.url, "events", SOLVE, after=4) == []
    assert len(server.requests) == 1


@both
def test_silence_within_a_limit_is_no_failure(kind: str) -> None:
    """Whoever listens for a while gets what there is by then."""
    quiet = stream(ALL[0], then=stall())
    with ScriptedServer(quiet) as server:
        assert numbers(collect(kind, server.url, "events", SOLVE, timeout_s=0.3)) == [1]


@both
@pytest.mark.parametrize(
    ("step", "error"),
    [
        (problem(404, "not-found"), NotFoundError),
        (json_answer({}), AnswerError),
        (stream(b"id: 1\ndata: {\n\n"), AnswerError),
        (stream(b"id: 1\ndata: 7\n\n"), AnswerError),
    ],
)
def test_what_will_not_mend_itself_is_raised(kind: str, step: object, error: type[Exception]) -> None:
    """An unknown solve, and what is no stream of events, are not asked for again."""
    with ScriptedServer(step) as server, pytest.raises(error):  # type: ignore[arg-type]
        collect(kind, server.url, "events", SOLVE)
    assert len(server.requests) == 1


@both
def test_a_stream_that_always_breaks_is_given_up(kind: str) -> None:
    """Without any progress the deadline holds."""
    with ScriptedServer(stream()) as server, pytest.raises(UnreachableError, match="ended before"):
        perform_events(kind, server.url, deadline_s=0.3)
    assert len(server.requests) > 1


def perform_events(kind: str, url: str, *, deadline_s: float) -> None:
    """Wait for a solve's end."""
    perform(kind, url, "wait", SOLVE, options={"deadline_s": deadline_s})


def test_numbers_begin_at_one() -> None:
    """A negative number is the caller's mistake."""
    with ScriptedServer(stream()) as server, pytest.raises(InputError):
        collect("sync", server.url, "events", SOLVE, after=-1)


@both
def test_waiting_ends_with_the_solve(kind: str) -> None:
    """All events are handed on, and the solve as it ended is returned."""
    ended = {
        "id": SOLVE,
        "status": "failed",
        "error": {"code": "infeasible", "message": "9 experts, 8 slots"},
    }
    seen: list[int] = []
    with ScriptedServer(stream(*ALL[:2]), stream(*ALL[2:]), json_answer(ended)) as server:
        found = perform(kind, server.url, "wait", SOLVE, on_event=lambda one: seen.append(one.seq))
    assert seen == [1, 2, 3, 4]
    failure = found.failure()
    assert failure.exit_code == 3
    assert "9 experts, 8 slots" in str(failure)


def test_on_event_may_be_awaited() -> None:
    """In an event loop, what is told may be awaited."""
    seen: list[int] = []

    async def note(one: object) -> None:
        await asyncio.sleep(0)
        seen.append(one.seq)  # type: ignore[attr-defined]

    with ScriptedServer(stream(*ALL), json_answer({"id": SOLVE, "status": "succeeded"})) as server:
        perform("async", server.url, "wait", SOLVE, on_event=note)
    assert seen == [1, 2, 3, 4]


@both
def test_leaving_early_closes_the_connection(kind: str) -> None:
    """Whoever has seen enough leaves nothing behind (an open socket would be an error here)."""
    with ScriptedServer(stream(*ALL[:2], then=stall())) as server:
        assert numbers(collect(kind, server.url, "events", SOLVE, most=2)) == [1, 2]


def resuming(events: list[bytes], cuts: list[int]) -> object:
    """Return a step that sends what follows on the last known event, cut off after some bytes."""
    left = list(cuts)

    async def step(request: Request, writer: asyncio.StreamWriter) -> None:
        known = int(request.headers.get("last-event-id", "0"))
        content = b"".join(events[known:])
        with contextlib.suppress(IndexError):
            content = content[: left.pop(0)]
        await stream(content)(request, writer)

    return step


@given(
    count=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    text=st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@both
def test_any_cut_costs_nothing(kind: str, count: int, cuts: list[int], text: str) -> None:
    """Wherever connections break, the listener sees every event once, in order, with its data."""
    events = [event(seq, text=text) for seq in range(1, count)] + [event(count, "done", text=text)]
    with ScriptedServer(resuming(events, cuts)) as server:  # type: ignore[arg-type]
        found = collect(kind, server.url, "events", SOLVE)
    assert numbers(found) == list(range(1, count + 1))
    assert all(one.data == {"text": text} for one in found)
