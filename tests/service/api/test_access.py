"""Who may call: tokens, scopes, rates; and without tokens this machine's own programs alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.state.tokens import Limits, Scope
from tests.service.api.guarded import Guarded, Keys, assert_problem, issue, make_keys, send_raw, state_url
from tests.service.server import Server, eventually

NO_TRACE = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer nonsense",
        "Bearer mp_0123456789ab_short",
        "Bearer mp_0123456789ab_" + "A" * 43,
        "Basic bXA6eA==",
        "Bearer mp_" + "0" * 2000,
        "Bearer mp_0123456789ab_" + "A" * 42 + "\u00e9",
    ],
)
def test_no_good_token_is_401(guarded: Guarded, header: str | None) -> None:
    """Missing, malformed and unknown tokens get the same status, and are told how to ask."""
    headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
    with guarded.client(None) as client:
        response = client.get("/v1/traces", headers=headers)
    assert_problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"].startswith("Bearer")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.binary(max_size=200).filter(lambda raw: not set(raw) & set(b"\r\n\x00")))
def test_any_header_is_answered(guarded: Guarded, value: bytes) -> None:
    """Whatever the header holds, the answer is 400 or 401 and the server goes on."""
    request = b"GET /v1/traces HTTP/1.1\r\nHost: x\r\nAuthorization: " + value + b"\r\n\r\n"
    assert send_raw(guarded.server, request).status in (400, 401)


def test_a_wrong_secret_is_401(guarded: Guarded) -> None:
    """The id alone opens nothing, and the answer does not tell whether it exists."""
    head, secret = guarded.keys.read[:16], guarded.keys.read[16:]
    wrong = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    with guarded.client(head + wrong) as client:
        known = assert_problem(client.get("/v1/traces"), 401, "unauthorized")
    with guarded.client("mp_000000000000_" + secret) as client:
        unknown = assert_problem(client.get("/v1/traces"), 401, "unauthorized")
    assert known["detail"] == unknown["detail"]


def test_two_authorizations_are_refused(guarded: Guarded) -> None:
    """A proxy and we must not pick different ones."""
    good = f"Authorization: Bearer {guarded.keys.read}\r\n"
    sent = f"GET /v1/traces HTTP/1.1\r\nHost: x\r\n{good}{good}\r\n"
    assert send_raw(guarded.server, sent.encode()).status == 401


def test_the_status_tells_what_a_token_may_do(guarded: Guarded) -> None:
    """A page need not offer what would be refused."""
    expected = {"read": ["read"], "submit": ["read", "submit"], "admin": ["read", "submit", "admin"]}
    found = {}
    for name in expected:
        with guarded.client(getattr(guarded.keys, name)) as client:
            found[name] = client.get("/v1/status").json()["scopes"]
    assert found == expected


def test_scopes_are_kept(guarded: Guarded) -> None:
    """Each scope does what it may and those below it may, and no more."""
    expected = {"read": [200, 403, 403], "submit": [200, 422, 403], "admin": [200, 422, 200]}
    found = {}
    for name in expected:
        with guarded.client(getattr(guarded.keys, name)) as client:
            read = client.get("/v1/traces")
            submit = client.post("/v1/traces", content=b"")
            admin = client.get("/v1/tokens")
        found[name] = [read.status_code, submit.status_code, admin.status_code]
    assert found == expected


def test_a_missing_scope_is_named(guarded: Guarded) -> None:
    """What is needed, and what there is."""
    with guarded.client(guarded.keys.read) as client:
        problem = assert_problem(client.get("/v1/audit"), 403, "forbidden")
    assert "admin" in problem["detail"]
    assert "read" in problem["detail"]


def test_tokens_live_over_http(guarded: Guarded) -> None:
    """Made, used, rotated, revoked: each step counts at once, and each is in the audit log."""
    with guarded.client(guarded.keys.admin) as admin:
        made = admin.post("/v1/tokens", json={"name": "ci", "scopes": ["submit"]})
        assert made.status_code == 201
        first = guarded.keys.note(made.json()["token"])
        path = made.headers["location"]
        assert admin.get(path).json() == {key: value for key, value in made.json().items() if key != "token"}
        with guarded.client(first) as caller:
            assert caller.get("/v1/traces").status_code == 200

            rotated = admin.post(f"{path}/rotate", json={"grace_s": 600})
            second = guarded.keys.note(rotated.json()["token"])
            assert caller.get("/v1/traces").status_code == 200
            with guarded.client(second) as renewed:
                assert renewed.get("/v1/traces").status_code == 200
                admin.post(f"{path}/rotate", json={"grace_s": 0})
                assert [one.get("/v1/traces").status_code for one in (caller, renewed)] == [401, 401]

            assert admin.delete(path).json()["revoked_at"] is not None
        third = issue(state_url(guarded.server), Scope.READ)
        guarded.keys.note(third.text)
        with guarded.client(third.text) as caller:
            assert caller.get("/v1/traces").status_code == 200
            admin.delete(f"/v1/tokens/{third.token.id}")
            problem = assert_problem(caller.get("/v1/traces"), 401, "unauthorized")
            assert "revoked" in problem["detail"]
        entries = admin.get("/v1/audit", params={"target": path.rpartition("/")[2]}).json()["items"]
    actions = [entry["action"] for entry in entries]
    assert actions == ["token.revoke", "token.rotate", "token.rotate", "token.create"]


def test_a_token_expires(guarded: Guarded) -> None:
    """Its last second over, it is refused, and says why to who knows the secret."""
    token = guarded.keys.note(issue(state_url(guarded.server), Scope.READ, expires_at=time.time() + 1.0).text)
    with guarded.client(token) as client:
        eventually(lambda: client.get("/v1/traces").status_code == 401, 10.0, what="the token expired")
        assert "expired" in assert_problem(client.get("/v1/traces"), 401, "unauthorized")["detail"]


def test_the_rate_of_a_token_is_kept(guarded: Guarded) -> None:
    """Beyond its requests per minute a token gets 429 and is told when to come back; others do not mind."""
    limited = guarded.keys.note(
        issue(state_url(guarded.server), Scope.READ, limits=Limits(requests_per_minute=3)).text
    )
    with guarded.client(limited) as client:
        answers = [client.get("/v1/traces") for _ in range(8)]
    # One more passes if a minute ends between them.
    assert [answer.status_code for answer in answers[:3]] == [200, 200, 200]
    assert {answer.status_code for answer in answers[4:]} == {429}
    problem = assert_problem(answers[-1], 429, "too-many-requests")
    assert 1 <= problem["retry_after"] <= 60
    assert answers[-1].headers["retry-after"] == str(problem["retry_after"])
    with guarded.client(guarded.keys.read) as client:
        assert client.get("/v1/traces").status_code == 200


def test_strangers_make_us_read_nothing(guarded: Guarded) -> None:
    """Without a token not one byte of a body is read: the answer comes before it was sent."""
    for path in ("/v1/traces", "/v1/placements", "/v1/tokens", "/v1/solves"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        assert send_raw(guarded.server, f"{head}Content-Length: 999\r\n\r\n".encode()).status == 401


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"name": "x"}', "scopes"),
        (b'{"name": "x", "scopes": ["root"]}', "scopes"),
        (b'{"name": "x", "scopes": ["read"], "extra": 1}', "extra"),
        (b'{"name": "a\\u0000b", "scopes": ["read"]}', "NUL"),
        (b'{"name": "x", "scopes": ["read"], "expires_in_s": -1}', "expires_in_s"),
        (b'{"name": "x", "scopes": ["read"], "limits": {"requests_per_minute": 0}}', "requests_per_minute"),
        (b'{"name": "\xff\xfe"}', "JSON"),
        (b"[", "JSON"),
        (b"", "empty"),
    ],
)
def test_senseless_tokens_are_refused(guarded: Guarded, body: bytes, said: str) -> None:
    """One line says what is wrong, and no token was made."""
    with guarded.client(guarded.keys.admin) as client:
        before = len(client.get("/v1/tokens").json()["items"])
        problem = assert_problem(client.post("/v1/tokens", content=body), 422, "invalid")
        assert said in problem["detail"]
        assert len(client.get("/v1/tokens").json()["items"]) == before


def test_lists_show_no_secret(guarded: Guarded) -> None:
    """An administrator sees which tokens there are, not what they are."""
    with guarded.client(guarded.keys.admin) as client:
        text = client.get("/v1/tokens").text + client.get("/v1/audit").text
    guarded.keys.assert_kept_secret(text)
    assert "hash" not in text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LOCALHOST", "[::1]", "127.8.9.10"])
def test_loopback_names_are_taken(open_server: Server, host: str) -> None:
    """Without tokens whoever names this machine by one of its own names is served."""
    sent = f"GET /v1/traces HTTP/1.1\r\nHost: {host}:{open_server.port}\r\n\r\n"
    assert send_raw(open_server, sent.encode()).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        "Host: evil.example",
        "Host: 127.0.0.1.evil.example",
        "Host: localhost.evil.example:80",
        "Host: 10.0.0.1",
        "Host: ",
        "Host: [::2]",
        "Host: localhost\r\nOrigin: http://evil.example",
        "Host: localhost\r\nOrigin: null",
        "Host: localhost:1\r\nOrigin: http://localhost:2",
        "Host: localhost\r\nSec-Fetch-Site: cross-site",
        "Host: localhost\r\nSec-Fetch-Site: same-site",
        "Host: localhost\r\nX-Forwarded-For: 1.2.3.4",
        "Host: localhost\r\nForwarded: for=1.2.3.4",
        "Host: localhost\r\nHost: evil.example",
        "Host: evil.example\r\nHost: localhost",
    ],
)
def test_what_a_browser_is_talked_into_is_refused(open_server: Server, headers: str) -> None:
    """Without tokens: rebound names, other sites' pages, and what came through a proxy."""
    answer = send_raw(open_server, f"GET /v1/traces HTTP/1.1\r\n{headers}\r\n\r\n".encode())
    assert answer.status == 403
    assert answer.document["code"] == "forbidden"


def test_its_own_pages_may_ask(open_server: Server) -> None:
    """The dashboard's requests carry its own origin."""
    host = f"127.0.0.1:{open_server.port}"
    more = f"Origin: http://{host}\r\nSec-Fetch-Site: same-origin"
    sent = f"GET /v1/traces HTTP/1.1\r\nHost: {host}\r\n{more}\r\n\r\n"
    assert send_raw(open_server, sent.encode()).status == 200


def test_no_other_site_may_read(open_server: Server) -> None:
    """No answer ever allows another origin."""
    with open_server.client() as client:
        answer = client.options("/v1/traces", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_first_token_closes_the_door(lone_server: Server) -> None:
    """As soon as there is a token, one is required; a token where there is none is refused too."""
    server = lone_server
    with server.client() as client:
        assert client.get("/v1/traces").status_code == 200
        strange = client.get("/v1/traces", headers={"Authorization": "Bearer mp_0123456789ab_" + "A" * 43})
        assert_problem(strange, 401, "unauthorized")
        made = client.post("/v1/tokens", json={"name": "first", "scopes": ["admin"]})
        assert made.status_code == 201
        assert_problem(client.get("/v1/traces"), 401, "unauthorized")
    token = made.json()["token"]
    with server.client(token=token) as client:
        client.delete(made.headers["location"])
    with server.client() as client:
        # Without any valid token the door stays closed: the command line makes a new one.
        assert_problem(client.get("/v1/traces"), 401, "unauthorized")
    Keys(admin=token, submit=token, read=token).assert_kept_secret(server.log)


def test_it_is_the_same_on_postgresql(tmp_path_factory: pytest.TempPathFactory, postgresql_url: str) -> None:
    """Tokens are looked up in a thread there: two servers that share the state agree at once."""
    folder = tmp_path_factory.mktemp("shared")
    keys = make_keys(folder / "one", postgresql_url)
    with (
        Server(folder / "one", role="api", database_url=postgresql_url) as one,
        Server(folder / "two", role="api", database_url=postgresql_url) as two,
    ):
        with one.client(token=keys.admin) as admin, two.client() as stranger:
            assert_problem(stranger.get("/v1/traces"), 401, "unauthorized")
            made = admin.post("/v1/tokens", json={"name": "x", "scopes": ["read"]}).json()
            with two.client(token=keys.note(made["token"])) as caller:
                assert caller.get("/v1/traces").status_code == 200
                admin.delete(f"/v1/tokens/{made['id']}")
                assert_problem(caller.get("/v1/traces"), 401, "unauthorized")
        keys.assert_kept_secret(one.log + two.log)
