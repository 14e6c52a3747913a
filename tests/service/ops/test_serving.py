"""``moe-placement serve`` as a process: what it says, what it refuses, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import httpx
import psutil
import pytest

from service.state.database import open_database
from service.state.jobs import JobStore
from service.state.records import JobKind, NewJob
from tests.service.postgres import Cluster
from tests.service.server import BYTE16, Server, eventually, listen, upload


def serve(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to refuse."""
    return subprocess.run(
        [sys.executable, "-m", "placement.cli", "serve", "--data-dir", str(tmp_path / "data"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(ended: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line that says why."""
    assert ended.returncode == code, ended.stderr
    *_, line = ended.stderr.splitlines()
    assert line.startswith("moe-placement: error: ")
    assert "Traceback" not in ended.stderr
    return line


def queue_job(data_dir: Path) -> str:
    """Queue a job that nobody will take."""
    database = open_database(f"sqlite:///{data_dir / 'state.db'}")
    try:
        new = NewJob(kind=JobKind.SOLVE, caller="local", spec={}, request_hash="0" * 64)
        (submitted,) = JobStore(database).submit([new])
        return submitted.job.id
    finally:
        database.close()


def test_the_port_is_told(tmp_path: Path) -> None:
    """With port 0 the line on stderr is the only way to know; the server answers there."""
    server = Server(tmp_path / "data", role="api", port=0)
    server.launch()
    try:
        found = eventually(lambda: re.search(r"^serving on (http://127\.0\.0\.1:\d+)$", server.log, re.M))
        assert httpx.get(f"{found[1]}/health/live", trust_env=False).json() == {"status": "live"}
        server.stop()
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--port", "70000"], "--port"),
        (["--role", "boss"], "--role"),
        (["--log-format", "xml"], "--log-format"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, arguments: list[str], names: str) -> None:
    """One line that names the option; nothing is made."""
    assert names in refusal(serve(tmp_path, *arguments), 2)
    assert not (tmp_path / "data").exists()


def test_bad_settings_of_the_environment_are_refused(tmp_path: Path) -> None:
    """The line names the variable."""
    line = refusal(serve(tmp_path, MOE_PLACEMENT_LEASE_SECONDS="soon"), 2)
    assert "MOE_PLACEMENT_LEASE_SECONDS" in line


def test_a_server_for_others_needs_a_token(tmp_path: Path) -> None:
    """Without one it serves this machine alone."""
    assert "token" in refusal(serve(tmp_path, "--host", "0.0.0.0", "--port", "0"), 2)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """One line that names it; the file is left alone."""
    (tmp_path / "taken").write_text("mine")
    line = refusal(serve(tmp_path, "--port", "0", "--data-dir", str(tmp_path / "taken")), 2)
    assert str(tmp_path / "taken") in line
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """Whoever writes the state decides what is served."""
    (tmp_path / "data").mkdir(mode=0o777)
    (tmp_path / "data").chmod(0o777)
    assert "chmod" in refusal(serve(tmp_path, "--port", "0"), 2)


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """Exit code 5: the network's fault, and which address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refusal(serve(tmp_path, "--port", port), 5)
    assert f"127.0.0.1:{port}" in line


def test_a_database_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    """Exit code 5, and no password in the line."""
    url = "postgresql+psycopg://someone:verysecret@127.0.0.1:1/nothing"
    ended = serve(tmp_path, "--port", "0", DATABASE_URL=url)
    refusal(ended, 5)
    assert "verysecret" not in ended.stderr + ended.stdout


def test_it_ends_with_streams_and_idle_connections_open(tmp_path: Path) -> None:
    """SIGTERM: listeners are let go, exit code 0 soon, no process left."""
    with Server(tmp_path / "data", role="api") as server:
        job_id = queue_job(tmp_path / "data")
        with server.client() as idle, server.client(timeout_s=60) as listener:
            idle.get("/health/live")
            with listener.stream("GET", f"/v1/solves/{job_id}/events") as stream:
                lines = stream.iter_lines()
                assert next(lines).startswith("retry:")
                began_s = time.monotonic()
                server.signal(signal.SIGTERM)
                # Ended by the server, in order: a connection that broke would be an error here.
                assert [line for line in lines if line.startswith("data:")] == []
            server.stop(within_s=10)
            assert time.monotonic() - began_s < 10


def test_it_stops_accepting_but_answers_what_is_under_way(tmp_path: Path) -> None:
    """A long poll that waits when the end comes gets its answer."""
    with Server(tmp_path / "data", role="api") as server:
        with server.client() as client:
            trace = b"not a trace, sent slowly"
            answers: list[httpx.Response] = []
            sent, told = threading.Event(), threading.Event()

            def body() -> object:
                yield trace
                sent.set()
                told.wait(20)
                yield trace

            def upload() -> None:
                answers.append(client.post("/v1/traces", content=body()))

            thread = threading.Thread(target=upload)
            thread.start()
            assert sent.wait(20)
            server.signal(signal.SIGTERM)
            eventually(lambda: refuses_connections(server.port), what="no new connection is accepted")
            told.set()
            thread.join(20)
            assert answers[0].status_code in (415, 422)
        server.stop(within_s=10)


def refuses_connections(port: int) -> bool:
    """Tell whether nobody listens any more."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_it_ends_though_the_database_hangs(tmp_path: Path, postgresql_url: str, cluster: Cluster) -> None:
    """A request that waits for the database does not hold the end up for longer than its bound."""
    name = postgresql_url.rpartition("/")[2]
    with (
        Server(tmp_path / "data", role="api", database_url=postgresql_url) as server,
        cluster.connect(name) as holder,
        holder.transaction(),
    ):
        holder.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        asking = threading.Thread(target=ask_in_vain, args=(server,))
        asking.start()
        eventually(lambda: is_waiting(cluster), what="the request waits for the lock")
        server.stop(within_s=20)
        asking.join()


def ask_in_vain(server: Server) -> None:
    """Ask for what the server will not come to answer, or only that it cannot."""
    with server.client(timeout_s=60) as client, suppress(httpx.TransportError):
        assert client.get("/v1/solves").status_code >= 500


def is_waiting(cluster: Cluster) -> bool:
    """Tell whether a statement waits for a lock."""
    with cluster.connect() as connection:
        found = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return bool(found.fetchone() != (0,))


def test_losing_the_terminal_does_not_end_it(tmp_path: Path) -> None:
    """SIGHUP does nothing."""
    with Server(tmp_path / "data", role="api") as server:
        server.signal(signal.SIGHUP)
        with server.client() as client:
            assert client.get("/health/ready").status_code == 200


def test_ctrl_c_ends_it_in_order(tmp_path: Path) -> None:
    """Like SIGTERM."""
    with Server(tmp_path / "data", role="api") as server:
        server.signal(signal.SIGINT)
        server.stop()


def test_a_running_solve_goes_on_after_a_restart(tmp_path: Path) -> None:
    """SIGTERM puts it back into the queue with its incumbent; the next server goes on from there."""
    server = Server(tmp_path / "data")
    with server, server.client() as client:
        options = {"objective": "balance", "time_limit": 8.0, "spare_slots": 16}
        body = {"trace_id": upload(client, BYTE16), "topology": "h100:1x8", "options": options}
        job_id = client.post("/v1/solves", json=body).json()["id"]
        seen = list(until_incumbent(client, job_id))
        server.stop()
    with Server(tmp_path / "data") as again, again.client(timeout_s=60) as client:
        news = list(listen(client, job_id, after=seen[-1]))
        assert [event.id for event in news] == list(range(seen[-1] + 1, seen[-1] + 1 + len(news)))
        assert news[-1].kind == "done"
        found = client.get(f"/v1/solves/{job_id}").json()
        assert found["status"] == "succeeded"
        assert found["attempt"] == 2


def until_incumbent(client: httpx.Client, job_id: str) -> Iterator[int]:
    """Yield the numbers of a solve's events up to its first incumbent."""
    for event in listen(client, job_id):
        yield event.id
        if event.kind == "incumbent":
            return


def test_a_killed_worker_comes_back(tmp_path: Path) -> None:
    """The server says that it is not ready meanwhile, and then is again."""
    with Server(tmp_path / "data") as server, server.client() as client:
        (first,) = eventually(lambda: server.worker_pids)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: [pid for pid in server.worker_pids if pid != first])
        eventually(lambda: client.get("/health/ready").status_code == 200)
        assert "the worker process ended" in server.log


def test_the_worker_goes_when_the_server_is_killed(tmp_path: Path) -> None:
    """No orphan computes for nobody."""
    server = Server(tmp_path / "data").start()
    try:
        eventually(lambda: server.worker_pids)
        server.crash()
        server.assert_nothing_left()
    finally:
        server.kill()


@pytest.mark.parametrize("role", ["api", "worker", "all"])
def test_it_can_be_ended_from_its_first_moment(tmp_path: Path, role: Literal["api", "worker", "all"]) -> None:
    """Exit code 0 however early SIGTERM comes once its own code runs, whatever it is doing by then."""
    for moment_s in (0.0, 0.5):
        server = Server(tmp_path / "data", role=role)
        server.launch()
        try:
            eventually(partial(heeds_sigterm, server.pid), what="it heeds SIGTERM")
            time.sleep(moment_s)
            server.stop()
        finally:
            server.kill()


def heeds_sigterm(pid: int) -> bool:
    """Tell whether a process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) & 1 << (signal.SIGTERM - 1))


def test_a_worker_alone_ends_in_order(tmp_path: Path) -> None:
    """Role worker: the same process, no port."""
    with Server(tmp_path / "data", role="worker") as server:
        eventually(lambda: "takes jobs" in server.log)
        listening = [found.laddr for found in psutil.Process(server.pid).net_connections("tcp")]
        assert listening == []


def test_idle_memory_is_small(tmp_path: Path) -> None:
    """Server and worker together, counting shared pages in full."""
    with Server(tmp_path / "data") as server:
        eventually(lambda: server.worker_pids)
        with server.client() as client:
            client.get("/v1/status")
        total = sum(process.memory_info().rss for process in server.processes())
        assert total < 250e6
