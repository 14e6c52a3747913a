"""Calls over a network that fails: what is tried again, what is not, and for how long."""

from __future__ import annotations

import json
import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from service.client import AnswerError, Client, UnreachableError
from service.client.retries import Backoff, pause_s, retry_after_s
from service.errors import (
    ConflictError,
    NotFoundError,
    ProblemError,
    QueueFullError,
    TooManyRequestsError,
    UnavailableError,
)
from tests.service.client.callers import KINDS, QUICK, perform
from tests.service.client.scripted_server import (
    ScriptedServer,
    answer,
    drip,
    drop,
    json_answer,
    problem,
    raw,
    stall,
)
from tests.service.server import free_port

SOLVE = {"id": "s-01", "status": "queued", "links": {}}
OK = json_answer(SOLVE)
TRACE = "sha256:" + "0" * 64

both = pytest.mark.parametrize("kind", KINDS)


@both
@pytest.mark.parametrize("status", [502, 503, 504])
def test_not_now_is_asked_again(kind: str, status: int) -> None:
    """An answer that means "not now" is followed by another attempt."""
    with ScriptedServer(problem(status, "unavailable"), problem(status, "unavailable"), OK) as server:
        assert perform(kind, server.url, "solve", "s-01").id == "s-01"
    assert len(server.requests) == 3


@both
@pytest.mark.parametrize(
    "broken",
    [
        drop(),
        raw(b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\n{"),
        raw(b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"),
        raw(b"not http at all\r\n\r\n"),
    ],
)
def test_a_broken_answer_is_asked_again(kind: str, broken: object) -> None:
    """A connection that ends before or within the answer is made anew."""
    with ScriptedServer(broken, OK) as server:  # type: ignore[arg-type]
        assert perform(kind, server.url, "solve", "s-01").id == "s-01"
    assert len(server.requests) == 2


@both
def test_a_submission_is_repeated_with_its_key(kind: str) -> None:
    """Where the answer is lost, the same request goes again under the same key: no second solve is queued."""
    with ScriptedServer(drop(), problem(503, "unavailable"), json_answer(SOLVE, 202)) as server:
        found = perform(kind, server.url, "submit", TRACE, "h100:1x4", options=None, priority=3)
    keys = {request.headers["idempotency-key"] for request in server.requests}
    bodies = {request.body for request in server.requests}
    assert found.status == "queued"
    assert (len(server.requests), len(keys), len(bodies)) == (3, 1, 1)
    assert json.loads(bodies.pop()) == {"trace_id": TRACE, "topology": "h100:1x4", "priority": 3}


def test_every_submission_has_a_key_of_its_own() -> None:
    """Two submissions are two solves unless the caller says otherwise."""
    with ScriptedServer(json_answer(SOLVE, 202)) as server, Client(server.url) as client:
        client.submit(TRACE, "h100:1x4")
        client.submit(TRACE, "h100:1x4")
        client.submit(TRACE, "h100:1x4", idempotency_key="mine")
    first, second, third = (request.headers["idempotency-key"] for request in server.requests)
    assert first != second
    assert third == "mine"


@both
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("promote", {"solve": "s-01", "if_match": '"1"'}),
        ("rollback", {}),
        ("put_deployment", {"spec": {}, "if_match": '"r1"'}),
        ("delete_deployment", {}),
    ],
)
def test_what_may_have_had_an_effect_is_not_repeated(
    kind: str, method: str, arguments: dict[str, object]
) -> None:
    """A change whose answer is lost may have happened: it is not sent twice."""
    with ScriptedServer(drop(), OK) as server, pytest.raises(UnreachableError) as raised:
        perform(kind, server.url, method, "chat", **arguments)
    assert raised.value.sent
    assert len(server.requests) == 1


@both
def test_what_was_refused_is_repeated_whatever_it_is(kind: str) -> None:
    """429 says that nothing was done, so that even a return to another placement may come again."""
    again = problem(429, "too-many-requests", retry_after="0")
    with ScriptedServer(again, json_answer({"version": 2})) as server:
        assert perform(kind, server.url, "rollback", "chat", version=1).version == 2
    assert len(server.requests) == 2


@both
def test_nobody_listening_is_an_error_of_the_network(kind: str) -> None:
    """A refused connection has exit code 5 and names the URL."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UnreachableError, match=url) as raised:
        perform(kind, url, "solve", "s-01", options={"deadline_s": 0.3})
    assert raised.value.exit_code == 5
    assert not raised.value.sent


@both
@pytest.mark.parametrize("step", [problem(503, "unavailable", "the disk is full"), drop()])
def test_the_deadline_ends_attempts(kind: str, step: object) -> None:
    """A service that is never ready is given up with what it said last."""
    with ScriptedServer(step) as server, pytest.raises((UnavailableError, UnreachableError)):  # type: ignore[arg-type]
        perform(kind, server.url, "solve", "s-01", options={"deadline_s": 0.3})
    assert len(server.requests) > 1


@both
def test_the_number_of_attempts_is_bounded(kind: str) -> None:
    """Even without pauses no more than so many requests are made."""
    backoff = Backoff(first_s=0.0, attempts=4)
    with ScriptedServer(drop()) as server, pytest.raises(UnreachableError):
        perform(kind, server.url, "solve", "s-01", options={"backoff": backoff})
    assert len(server.requests) == 4


@both
def test_a_long_retry_after_is_not_waited_for(kind: str) -> None:
    """Whoever asks for more time than there is is believed at once."""
    with (
        ScriptedServer(problem(503, "unavailable", retry_after="3600")) as server,
        pytest.raises(UnavailableError),
    ):
        perform(kind, server.url, "solve", "s-01")
    assert len(server.requests) == 1


@both
@pytest.mark.parametrize("step", [stall(), stall(b"HTTP/1.1 200 X\r\n"), drip()])
def test_a_server_that_hangs_is_left(kind: str, step: object) -> None:
    """Silence, and an answer that never ends, are given up at the deadline."""
    began_s = time.monotonic()
    with ScriptedServer(step) as server, pytest.raises(UnreachableError):  # type: ignore[arg-type]
        perform(kind, server.url, "solve", "s-01", options={"deadline_s": 0.5, "timeout_s": 0.2})
    # Not how fast, but that it ends at all: the server would go on for an hour.
    assert time.monotonic() - began_s < 60


@both
@pytest.mark.parametrize(
    ("step", "error", "exit_code", "text"),
    [
        (problem(404, "not-found", "there is no solve"), NotFoundError, 2, "there is no solve"),
        (problem(409, "conflict"), ConflictError, 5, "that is so"),
        (problem(422, "invalid"), InputError, 2, "that is so"),
        (problem(404, "unheard-of"), NotFoundError, 2, "that is so"),
        (problem(418, "unheard-of"), ProblemError, 5, "that is so"),
        (answer(403, b"<html>"), ProblemError, 5, "answered with 403"),
        (answer(500, b""), ProblemError, 5, "answered with 500"),
        (answer(999, b"[]"), ProblemError, 5, "answered with 999"),
        (answer(302, b"", location="http://127.0.0.1:1/"), AnswerError, 5, "is this the service's URL"),
        (answer(200, b"<html>hello</html>"), AnswerError, 5, "not with JSON"),
        (answer(200, b"[" * 100_000), AnswerError, 5, "not with JSON"),
        (answer(200, b"[]"), AnswerError, 5, "not with an object"),
        (json_answer({"id": 7, "status": "queued"}), AnswerError, 5, "unexpected"),
        (json_answer({}), AnswerError, 5, "unexpected"),
        (json_answer({"id": "s-1", "status": "x", "incumbent": 3}), AnswerError, 5, "unexpected"),
    ],
)
def test_what_is_wrong_is_said_once(
    kind: str, step: object, error: type[Exception], exit_code: int, text: str
) -> None:
    """Every other answer is an error with a class, an exit code and one line, and is not asked for again."""
    with ScriptedServer(step) as server, pytest.raises(Exception, match=text) as raised:  # type: ignore[arg-type]
        perform(kind, server.url, "solve", "s-01")
    assert len(server.requests) == 1
    assert raised.value.exit_code == exit_code  # type: ignore[attr-defined]
    if error is not InputError:
        assert isinstance(raised.value, error)


def test_codes_are_more_than_statuses() -> None:
    """A full queue and a spent rate share a status, and are told apart."""
    quick = {"backoff": QUICK, "deadline_s": 0.2}
    full = problem(429, "queue-full", retry_after="9")
    with (
        ScriptedServer(full) as server,
        Client(server.url, **quick) as client,  # type: ignore[arg-type]
        pytest.raises(QueueFullError) as raised,
    ):
        client.solve("s-01")
    assert isinstance(raised.value, TooManyRequestsError)
    assert raised.value.extensions["retry_after"] == "9"


@pytest.mark.parametrize(
    "name", ["../tokens", "a/b", "", "a?b=1", "a b", "-x", "é", "s-1\r\nX: y", "x" * 300]
)
def test_names_lead_nowhere_else(name: str) -> None:
    """A name that would change the path of the request is refused before anything is sent."""
    with ScriptedServer(OK) as server, Client(server.url) as client:
        for call in (client.solve, client.deployment, client.placement, client.stop):
            with pytest.raises(InputError):
                call(name)
    assert server.requests == []


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "é", "x" * 256])
def test_keys_are_plain(key: str) -> None:
    """A key that is no header's value is refused; an empty one is none."""
    with ScriptedServer(json_answer(SOLVE, 202)) as server, Client(server.url) as client:
        if key:
            with pytest.raises(InputError):
                client.submit(TRACE, "h100:1x4", idempotency_key=key)
        else:
            assert client.submit(TRACE, "h100:1x4", idempotency_key=key).id == "s-01"


def test_what_json_does_not_have_is_refused() -> None:
    """NaN among the options is the caller's mistake."""
    with ScriptedServer(OK) as server, Client(server.url) as client, pytest.raises(InputError, match="JSON"):
        client.submit(TRACE, "h100:1x4", options={"max_imbalance": float("nan")})
    assert server.requests == []


def test_the_token_is_sent_and_never_told(caplog: pytest.LogCaptureFixture) -> None:
    """The header carries it; representations, errors and logs at their most talkative do not."""
    caplog.set_level(logging.DEBUG)
    token = "mp_abc_verysecretindeed"
    with (
        ScriptedServer(problem(401, "unauthorized", "the token is unknown")) as server,
        Client(server.url, token=token) as client,
    ):
        shown = repr(client) + repr(client._transport.connection)
        with pytest.raises(ProblemError) as raised:
            client.solve("s-01")
    assert server.requests[0].headers["authorization"] == f"Bearer {token}"
    assert "verysecret" not in shown + str(raised.value) + repr(raised.value) + caplog.text


def test_other_hosts_are_not_followed_to() -> None:
    """A redirection is an error: the token stays with the host that it is for."""
    with ScriptedServer(OK) as elsewhere:
        away = answer(307, b"", location=f"{elsewhere.url}/v1/solves/s-01")
        with (
            ScriptedServer(away) as server,
            Client(server.url, token="mp_a_b") as client,
            pytest.raises(AnswerError),
        ):
            client.solve("s-01")
    assert elsewhere.requests == []


@given(failures=st.integers(1, 200), first=st.floats(0, 10), most=st.floats(0, 100))
def test_pauses_are_bounded(failures: int, first: float, most: float) -> None:
    """A pause is drawn from 0 to a ceiling that doubles, and never exceeds the most."""
    backoff = Backoff(first_s=first, most_s=most)
    ceiling_s = backoff.ceiling_s(failures)
    assert 0 <= backoff.pause_s(failures) <= ceiling_s <= most
    assert ceiling_s <= backoff.ceiling_s(failures + 1)


def test_pauses_are_jittered() -> None:
    """Callers that failed together do not come back together: pauses fill the whole range."""
    backoff = Backoff(first_s=1.0)
    pauses = [backoff.pause_s(3) for _ in range(300)]
    assert min(pauses) < 1.0
    assert max(pauses) > 3.0


@given(told=st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.datetimes().map(str)))
def test_any_retry_after_is_a_number(told: object) -> None:
    """Whatever the header says, it comes to a number of seconds that is not negative."""
    error = UnavailableError("not now", retry_after=told)
    assert retry_after_s(error) >= 0
    assert pause_s(error, 1, Backoff()) >= retry_after_s(error)


def test_retry_after_may_be_a_date() -> None:
    """HTTP allows a date: one that is past asks for nothing, one to come for the time until then."""
    assert retry_after_s(UnavailableError("x", retry_after="Wed, 21 Oct 2015 07:28:00 GMT")) == 0
    assert retry_after_s(UnavailableError("x", retry_after="Wed, 21 Oct 2099 07:28:00 GMT")) > 1e6
