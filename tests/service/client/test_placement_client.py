"""A job's client: nothing that befalls the service stalls or ends the job, and each change is said once."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError, ServiceError
from service.client import Client, PlacementClient
from service.client import link as link_module
from service.client.ranks import local_rank_of
from tests.service.client.scripted_server import (
    Request,
    ScriptedServer,
    Step,
    answer,
    json_answer,
    problem,
    stall,
)
from tests.service.client.test_launcher import GOOD, JOB, file_of, maps, nowhere, placement_of, serving
from tests.service.server import Server, eventually

ROOT = Path(__file__).parents[3]
LOAD_LE = np.arange(8).reshape(2, 4)
TAKEN = json_answer({"stored": 1, "known": 0, "version": 3}, 202)
UNCHANGED = answer(304, etag='"sha256:aa"')
SPEC = {"topology": "h100:1x2", "model": {"layers": 2, "experts": 4, "top_k": 2}}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pauses be short."""
    monkeypatch.setattr(link_module, "ATTEMPTS", link_module.Backoff(first_s=0.01, most_s=0.02, attempts=2))
    waits = link_module.Pauses.__init__.__kwdefaults__
    assert waits is not None
    monkeypatch.setitem(waits, "first_s", 0.02)
    monkeypatch.setitem(waits, "most_s", 0.05)


def client_of(url: str, **options: Any) -> PlacementClient:
    """Return the client of a lone process."""
    options = {"environment": {}, "timeout_s": 5.0, "poll_s": 0.2, **options}
    return PlacementClient("chat", url=url, **options)


def routed(*, get: Step = UNCHANGED, post: Step = TAKEN) -> Step:
    """Return a step that answers questions and windows each in their own way."""

    async def step(request: Request, writer: Any) -> None:
        await (post if request.method == "POST" else get)(request, writer)

    return step


def posts(server: ScriptedServer) -> list[dict[str, Any]]:
    """Return the windows that arrived."""
    bodies = [json.loads(request.body) for request in list(server.requests) if request.method == "POST"]
    return [
        {**window, "rank": body["rank"], "version": body.get("version")}
        for body in bodies
        for window in body["windows"]
    ]


def threads() -> list[threading.Thread]:
    """Return the threads of clients that live."""
    return [thread for thread in threading.enumerate() if thread.name in ("watch-placement", "post-windows")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    eventually(lambda: not threads(), 10, what="the threads ended")


# The environment


def test_the_environment_says_all(tmp_path: Path) -> None:
    """Whatever a launcher hands on is found; what is given goes before it."""
    environment = {
        "MOE_PLACEMENT_DEPLOYMENT": "chat",
        "MOE_PLACEMENT_URL": nowhere(),
        "MOE_PLACEMENT_CACHE_DIR": str(tmp_path),
        "MOE_PLACEMENT_TOPOLOGY": "h100:1x4",
        "MOE_PLACEMENT_MODEL": "olmoe-1b-7b",
        "MOE_PLACEMENT_TIMEOUT": "0.3",
        "MOE_PLACEMENT_WAIT": "0",
        "MOE_PLACEMENT_STRICT": "0",
        "MOE_PLACEMENT_TOKEN": "",
        # What Kubernetes sets for a Service of our name.
        "MOE_PLACEMENT_PORT": "tcp://10.0.0.1:8700",
        "MOE_PLACEMENT_SERVICE_PORT": "8700",
        "MOE_PLACEMENT_SERVICE_HOST": "10.0.0.1",
    }
    with PlacementClient.from_env(environment) as client:
        found = client.fetch()
    assert (client.deployment, client.rank) == ("chat", 0)
    assert (found.source, found.placement.num_experts, found.placement.num_devices) == ("contiguous", 64, 4)
    with (
        PlacementClient.from_env({**environment, "MOE_PLACEMENT_STRICT": "yes"}) as strict,
        pytest.raises(ServiceError),
    ):
        strict.fetch()
    with PlacementClient.from_env({**environment, "RANK": "3"}, deployment="code", fallback=JOB) as other:
        assert (other.deployment, other.rank) == ("code", 3)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MOE_PLACEMENT_DEPLOYMENT": ""}, "MOE_PLACEMENT_DEPLOYMENT is not set"),
        ({"MOE_PLACEMENT_TIMEOUT": "soon"}, "MOE_PLACEMENT_TIMEOUT is 'soon'"),
        ({"MOE_PLACEMENT_TIMEOUT": "0"}, "timeout_s is 0"),
        ({"MOE_PLACEMENT_WAIT": "-1"}, "MOE_PLACEMENT_WAIT is '-1'"),
        ({"MOE_PLACEMENT_WAIT": "inf"}, "MOE_PLACEMENT_WAIT is 'inf'"),
        ({"MOE_PLACEMENT_STRICT": "maybe"}, "MOE_PLACEMENT_STRICT is 'maybe'"),
        ({"MOE_PLACEMENT_TOPOLOGY": "h100:1x4"}, "MOE_PLACEMENT_TOPOLOGY needs MOE_PLACEMENT_MODEL"),
        ({"MOE_PLACEMENT_MODEL": "deepseek-v3"}, "MOE_PLACEMENT_MODEL needs MOE_PLACEMENT_TOPOLOGY"),
        (
            {"MOE_PLACEMENT_MODEL": "deepseek-v3", "MOE_PLACEMENT_TOPOLOGY": "x"},
            "MOE_PLACEMENT_TOPOLOGY or MOE_PLACEMENT_MODEL: ",
        ),
        ({"RANK": "first"}, "RANK is 'first'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(variables: Mapping[str, str], said: str) -> None:
    """One line says which variable, before anything else happens."""
    with pytest.raises(InputError, match=said):
        PlacementClient.from_env({"MOE_PLACEMENT_DEPLOYMENT": "chat", **variables})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"RANK": "9"}, 9),
        ({"RANK": "9", "LOCAL_RANK": "1"}, 1),
        ({"SLURM_PROCID": "9", "SLURM_LOCALID": "0"}, 0),
    ],
)
def test_local_ranks(environment: Mapping[str, str], expected: int) -> None:
    """Launchers number the processes of a machine; else a rank is all there is."""
    assert local_rank_of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, 3),
        ({"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 1),
        ({"RAY_JOB_ID": "01000000", "RANK": "1", "WORLD_SIZE": "2"}, 1),
    ],
)
def test_launchers_number_the_ranks(environment: Mapping[str, str], rank: int) -> None:
    """torchrun, SLURM, an indexed Kubernetes job, Ray Train."""
    with PlacementClient.from_env({**environment, "MOE_PLACEMENT_DEPLOYMENT": "chat"}) as client:
        assert client.rank == rank


def test_parameters_are_checked() -> None:
    """Nonsense is refused at once."""
    with pytest.raises(InputError, match="queue_windows"):
        client_of(nowhere(), queue_windows=0)
    with pytest.raises(InputError, match="poll_s"):
        client_of(nowhere(), poll_s=0)
    with client_of(nowhere()) as client, pytest.raises(InputError, match="a window's load"):
        client.post(0, [1, 2, 3])


# The placement


def test_rank_zero_asks_and_the_others_receive() -> None:
    """One request for all ranks; only rank 0 watches."""
    barrier, box = threading.Barrier(2), [b""]

    def broadcast(payload: bytes | None) -> bytes:
        if payload is not None:
            box[0] = payload
        barrier.wait(10)
        return box[0]

    found: list[Any] = [None, None]

    def work(rank: int) -> None:
        environment = {"RANK": str(rank), "WORLD_SIZE": "2"}
        with client_of(server.url, environment=environment) as client:
            found[rank] = client.fetch(broadcast=broadcast)
            assert rank == 0 or client.poll() is None

    with ScriptedServer(serving()) as server:
        ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(20)
    assert [one.version for one in found] == [3, 3]
    assert len(server.requests) == 1


def test_newer_placements_come_by_themselves(tmp_path: Path) -> None:
    """A poll never waits; the newest wins, goes to disk, and is returned once."""
    contents = [file_of(placement_of()) + b" " * size for size in range(3)]
    new = [serving(contents[i], version=3 + i, etag=f'"{i}"') for i in range(3)]
    with (
        ScriptedServer(*new, answer(304, etag='"2"')) as server,
        client_of(server.url, cache_dir=tmp_path, fallback=JOB) as client,
    ):
        first = client.fetch()
        assert (first.version, client.poll()) == (3, None)
        eventually(lambda: len(server.requests) > 4, what="the service was asked again")
        found = client.poll()
        assert found is not None
        assert (found.source, found.version, found.content) == ("service", 5, contents[2])
        assert client.poll() is None
    tags = [request.headers.get("if-none-match") for request in server.requests[:4]]
    assert tags == [None, '"0"', '"1"', '"2"']
    assert "wait=0.2" in server.requests[1].path
    assert (tmp_path / "chat.placement").read_bytes().endswith(contents[2])


def test_what_does_not_fit_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    """A placement for another job is passed over, and said once."""
    wrong = serving(file_of(placement_of(num_experts=8)), version=4, etag='"b"')
    right = serving(version=5, etag='"c"')
    steps = (serving(), answer(200, b"<html>"), wrong, wrong, right, UNCHANGED)
    with ScriptedServer(*steps) as server, client_of(server.url, fallback=JOB) as client:
        client.fetch()
        found = eventually(client.poll)
    assert found.version == 5
    assert server.requests[2].headers["if-none-match"] == '"sha256:aa"'
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "what the service sent is not used: the placement that was sent is not JSON" in lines[0]
    assert "version 4 is not used: num_experts of the placement is 8" in lines[1]


def test_a_first_placement_is_no_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first promotion nothing is wrong."""
    none_yet = problem(404, "not-found", "chat has no placement yet")
    there = json_answer({"name": "chat", "version": None})
    with (
        ScriptedServer(none_yet, there, none_yet, there, serving(), UNCHANGED) as server,
        client_of(server.url) as client,
    ):
        assert eventually(client.poll).version == 3
    assert capsys.readouterr().err == ""


# The windows


def test_windows_are_posted() -> None:
    """Each with its number, its rank and the version that ran; the caller's array is free at once."""
    load_LE = LOAD_LE.copy()
    with (
        ScriptedServer(routed()) as server,
        client_of(server.url, environment={"RANK": "1", "WORLD_SIZE": "2"}) as client,
    ):
        client.post(7, load_LE, 3, version=3)
        load_LE[:] = -1
        client.post(8, LOAD_LE.tolist())
        client.close()
    assert posts(server) == [
        {"window": 7, "load": LOAD_LE.tolist(), "tokens": 3.0, "rank": 1, "version": 3},
        {"window": 8, "load": LOAD_LE.tolist(), "rank": 1, "version": None},
    ]
    assert (client.posted, client.dropped) == (2, 0)
    client.post(9, LOAD_LE)
    assert threads() == [] or client.posted == 2


def test_the_oldest_windows_go(capsys: pytest.CaptureFixture[str]) -> None:
    """While the service is away windows wait; beyond a few the oldest are dropped, with a count."""
    away, back = problem(503, "unavailable"), TAKEN
    state = {"post": away}

    async def step(request: Request, writer: Any) -> None:
        await state["post"](request, writer)

    with ScriptedServer(step) as server, client_of(server.url, queue_windows=3) as client:
        client.post(0, LOAD_LE)
        eventually(lambda: len(server.requests) > 2, what="it was tried again")
        for window in range(1, 10):
            client.post(window, LOAD_LE)
        eventually(lambda: client.dropped == 7)
        state["post"] = back
        eventually(lambda: client.posted == 3)
        assert client.dropped == 7
    assert [window["window"] for window in posts(server)][-3:] == [7, 8, 9]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[0] for line in lines] == ["moe-placement"] * 2
    assert "WARNING: chat: the service is away" in lines[0]
    assert "the service answers again; 7 windows were dropped meanwhile" in lines[1]


def test_refused_windows_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    """Windows of another shape never do: they are not sent again, and said once."""
    with (
        ScriptedServer(routed(post=problem(422, "invalid", "has 3 layers"))) as server,
        client_of(server.url) as client,
    ):
        for window in range(5):
            client.post(window, LOAD_LE)
        eventually(lambda: client.dropped == 5)
    assert len(posts(server)) == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "windows are not taken, and dropped: has 3 layers" in lines[0]


# Trouble


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (problem(503, "unavailable"), "the service is away"),
        (problem(401, "unauthorized"), "the service refuses this job's token"),
        (problem(403, "forbidden"), "the service refuses this job's token"),
        (problem(404, "not-found", "there is no deployment"), "the deployment is gone"),
        (json_answer(["another", "program"], 201), "the service is away"),
        (answer(301, location="http://example.org"), "the service is away"),
    ],
)
def test_trouble_is_said_once(failing: Step, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both threads meet it again and again: one line when it begins, one when it is over."""
    state = {"now": failing}

    async def step(request: Request, writer: Any) -> None:
        await state["now"](request, writer)

    with ScriptedServer(step) as server, client_of(server.url) as client:
        client.poll()
        client.post(0, LOAD_LE)
        eventually(lambda: len(posts(server)) > 4, what="it was tried again")
        state["now"] = routed(get=serving())
        assert eventually(client.poll).version == 3
        eventually(lambda: client.posted == 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, lines
    assert f"WARNING: chat: {said}" in lines[0]
    assert "the service answers again" in lines[1]


def test_one_process_of_a_machine_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand ranks do not say the same."""
    quiet = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8"}
    with client_of(nowhere(), environment=quiet, queue_windows=1) as client:
        client.post(0, LOAD_LE)
        client.post(1, LOAD_LE)
        eventually(lambda: client.dropped)
    assert capsys.readouterr().err == ""


def test_a_new_token_is_found(tmp_path: Path) -> None:
    """Tokens expire while jobs run: what lies in the file is read again."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("mp_old")

    async def step(request: Request, writer: Any) -> None:
        good = request.headers["authorization"] == "Bearer mp_new"
        await (routed(get=serving()) if good else problem(401, "unauthorized"))(request, writer)

    with ScriptedServer(step) as server, client_of(server.url, token_file=token) as client:
        client.poll()
        client.post(0, LOAD_LE)
        eventually(lambda: len(posts(server)) > 1, what="it was tried again")
        token.write_text("mp_new")
        eventually(lambda: client.posted == 1)
        assert eventually(client.poll).version == 3


def test_a_service_that_hangs_holds_up_nothing() -> None:
    """Polls, posts and the end return while the network stands still."""
    with ScriptedServer(stall()) as server, client_of(server.url, timeout_s=1.0, poll_s=0.1) as client:
        for window in range(100):
            assert client.poll() is None
            client.post(window, LOAD_LE)
        assert client.dropped >= 100 - 64 - 1
    assert client.posted == 0


# Ends and forks


def test_threads_end_with_the_client() -> None:
    """Also where nobody closed it."""
    with ScriptedServer(routed()) as server:
        clients = [client_of(server.url)]
        clients[0].poll()
        clients[0].post(0, LOAD_LE)
        assert len(threads()) == 2
        eventually(lambda: clients[0].posted == 1)
        clients.clear()
        gc.collect()
        eventually(lambda: not threads())


def test_a_closed_client_does_nothing() -> None:
    """No thread comes back to life."""
    with ScriptedServer(routed()) as server:
        client = client_of(server.url)
        client.close()
        client.close()
        client.post(0, LOAD_LE)
        assert client.poll() is None
        assert (threads(), server.requests) == ([], [])


# Newer Pythons warn of forks beside threads, which is what is tried here.
QUIET = ("-W", "ignore::DeprecationWarning")
PROGRAM = """
import sys, os, time
import numpy as np
from service.client import PlacementClient

client = PlacementClient("chat", url=sys.argv[1], environment={}, timeout_s=60.0)
client.poll()
client.post(0, np.ones((2, 4), int))
if sys.argv[2] == "raise":
    raise SystemExit(3)
if sys.argv[2] == "fork":
    while client.posted < 1:
        time.sleep(0.01)
    child = os.fork()
    client.post(1 if child else 2, np.ones((2, 4), int))
    if child:
        os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    ("way", "code", "windows"), [("end", 0, [0]), ("raise", 3, [0]), ("fork", 0, [0, 1, 2])]
)
def test_processes_end(way: str, code: int, windows: list[int]) -> None:
    """Whatever waits is posted at the end; forked processes post their own, and nothing twice."""

    async def step(request: Request, writer: Any) -> None:
        await (TAKEN if request.method == "POST" else stall())(request, writer)

    with ScriptedServer(step) as server:
        done = subprocess.run(
            [sys.executable, *QUIET, "-c", PROGRAM, server.url, way],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (code, "")
    assert sorted(window["window"] for window in posts(server)) == windows


@pytest.mark.parametrize("way", ["end", "raise"])
def test_processes_end_without_the_service(way: str) -> None:
    """Nobody is waited for that is not there."""
    with ScriptedServer(stall()) as server:
        done = subprocess.run(
            [sys.executable, *QUIET, "-c", PROGRAM, server.url, way],
            cwd=ROOT,
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == (3 if way == "raise" else 0)


def test_many_threads_may_call_it() -> None:
    """No window is lost or sent twice."""
    with ScriptedServer(routed()) as server, client_of(server.url, queue_windows=1000) as client:

        def work(first: int) -> None:
            for window in range(first, first + 10):
                client.post(window, LOAD_LE)
                client.poll()

        callers = [threading.Thread(target=work, args=(10 * i,)) for i in range(8)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
        eventually(lambda: client.posted == 80)
        assert len([t for t in threads() if t.name == "watch-placement"]) == 1
    assert sorted(window["window"] for window in posts(server)) == list(range(80))


# The service itself


def test_with_the_service_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Promoted, posted, killed, started again, deleted: the job goes on, and each is said once."""

    def promote(num_spaces: int) -> None:
        admin.promote("chat", placement=admin.upload_placement(GOOD + b" " * num_spaces))

    def said(what: str) -> Callable[[], bool]:
        def look() -> bool:
            heard.extend(capsys.readouterr().err.splitlines())
            return any(what in line for line in heard)

        return look

    heard: list[str] = []
    with Server(tmp_path / "data") as server, Client(server.base_url) as admin:
        admin.put_deployment("chat", SPEC)
        promote(0)
        options = {"cache_dir": tmp_path / "cache", "fallback": JOB, "poll_s": 1.0}
        with client_of(server.base_url, **options) as client:
            assert client.fetch().version == 1
            client.poll()
            promote(1)
            assert eventually(client.poll).version == 2
            client.post(0, LOAD_LE, 6, version=2)
            eventually(lambda: client.posted == 1)
            server.kill()
            client.post(1, LOAD_LE, 6, version=2)
            eventually(said("the service is away"))
            server.start()
            eventually(lambda: client.posted == 2)
            eventually(said("answers again"))
            promote(2)
            assert eventually(client.poll).version == 3
            admin.delete_deployment("chat")
            client.post(2, LOAD_LE, 6, version=2)
            eventually(said("the deployment is gone"))
    assert maps(placement_of()) == [[3, 2, 1, 0]] * 2
    heard.extend(capsys.readouterr().err.splitlines())
    assert len(heard) == 3, heard


def test_a_forked_loader_says_and_does_nothing() -> None:
    """A data loader's worker that is forked in the middle of it all ends as ever."""
    with ScriptedServer(routed()) as server, client_of(server.url) as client:
        client.poll()
        client.post(0, LOAD_LE)
        eventually(lambda: client.posted == 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(0 if client.poll() is None and client.posted == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        client.post(1, LOAD_LE)
        eventually(lambda: client.posted == 2)
