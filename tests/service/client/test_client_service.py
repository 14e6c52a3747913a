"""The client, the launcher and the commands against a running service."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError
from placement.io import read_placement
from service.client import AsyncClient, Client, fetch_placement
from service.errors import ConflictError, InvalidError, NotFoundError, PreconditionError
from tests.service.server import Server, eventually, tiny_trace

ROOT = Path(__file__).parents[3]
LINEAR: dict[str, Any] = {"kind": "linear", "pair_cost": 1, "token_cost": 4}
OPTIONS: dict[str, Any] = {"calibration": LINEAR, "window": 64}
SPEC: dict[str, Any] = {
    "topology": "h100:1x4",
    "model": {"layers": 2, "experts": 8, "top_k": 2},
    "num_ranks": 2,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a running service."""
    with Server(tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small trace."""
    return tiny_trace(tmp_path_factory.mktemp("trace") / "tiny.npz")


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """Return a client."""
    with Client(server.base_url) as found:
        yield found


def command(
    server: Server, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of ours against the service."""
    return subprocess.run(
        [sys.executable, "-m", "placement.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "MOE_PLACEMENT_URL": server.base_url, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_from_trace_to_placement(client: Client, trace: Path) -> None:
    """Upload, check, submit, follow, fetch, score."""
    held = client.upload_trace(trace)
    assert held.id == f"sha256:{hashlib.sha256(trace.read_bytes()).hexdigest()}"
    assert client.upload_trace(trace).id == held.id
    checked = client.submit(held.id, "h100:1x4", options=OPTIONS, validate_only=True)
    assert checked.status == "succeeded"
    assert checked.result is not None
    queued = client.submit(held.id, "h100:1x4", options=OPTIONS)
    seen: list[Any] = []
    ended = client.wait(queued.id, on_event=seen.append)
    assert ended.failure() is None
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].kind == "done"
    assert [event.incumbent for event in seen if event.kind == "incumbent"][-1].objective > 0
    assert [event.seq for event in client.events(queued.id, after=2)] == [event.seq for event in seen[2:]]
    assert list(client.events(queued.id, after=len(seen))) == []
    file = client.placement(queued.id)
    assert ended.placement_id == f"sha256:{hashlib.sha256(file.content).hexdigest()}"
    assert client.placement(ended.placement_id).content == file.content
    assert file.placement().num_devices == 4
    scored = client.evaluate(queued.id, held.id, "h100:1x4", options=OPTIONS)
    assert scored.result is not None
    warm = client.submit(held.id, "h100:1x4", options=OPTIONS, start=queued.id)
    assert client.wait(warm.id).status == "succeeded"
    assert {queued.id, warm.id} <= {solve.id for solve in client.solves(limit=100)[0]}
    assert client.health()["status"] == "ready"


def test_pages_follow_each_other(client: Client, trace: Path) -> None:
    """Every solve is on one page."""
    trace_id = client.upload_trace(trace).id
    made = {client.submit(trace_id, "h100:1x2", options=OPTIONS).id for _ in range(3)}
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = client.solves(limit=2, cursor=cursor)
        seen += [solve.id for solve in page]
        if cursor is None:
            break
    assert len(seen) == len(set(seen))
    assert made <= set(seen)
    for solve_id in made:
        client.stop(solve_id)


def test_keys_make_one_solve(client: Client, trace: Path) -> None:
    """The same key is given the same solve; with another request it is a conflict."""
    trace_id = client.upload_trace(trace).id
    first = client.submit(trace_id, "h100:1x4", options=OPTIONS, idempotency_key="run-1")
    assert client.submit(trace_id, "h100:1x4", options=OPTIONS, idempotency_key="run-1").id == first.id
    with pytest.raises(ConflictError):
        client.submit(trace_id, "h100:1x2", options=OPTIONS, idempotency_key="run-1")


def test_refusals_are_typed(client: Client, trace: Path) -> None:
    """What the service refuses arrives as the error that it raised."""
    trace_id = client.upload_trace(trace).id
    with pytest.raises(NotFoundError):
        client.submit("sha256:" + "0" * 64, "h100:1x4")
    with pytest.raises(InvalidError, match="did you mean") as raised:
        client.submit(trace_id, "h100:1x4", options={"windw": 3})
    assert raised.value.exit_code == 2
    with pytest.raises(NotFoundError):
        client.solve("s-" + "0" * 26)
    infeasible = client.submit(trace_id, "h100:1x3", options=OPTIONS)
    failure = client.wait(infeasible.id).failure()
    assert failure is not None
    assert (failure.code, failure.exit_code) == ("infeasible", 3)
    with pytest.raises(InvalidError) as raised:
        client.submit(trace_id, "h100:1x3", options=OPTIONS, validate_only=True)
    assert raised.value.exit_code == 3


def test_a_folder_is_a_trace(client: Client, trace: Path, tmp_path: Path) -> None:
    """A data set is sent as one tar, once."""
    from traces.readers import read_trace
    from traces.store import write_dataset

    write_dataset(read_trace(str(trace)), str(tmp_path / "set"))
    held = client.upload_trace(tmp_path / "set")
    assert client.upload_trace(tmp_path / "set").id == held.id
    assert held.document["num_layers"] == 2
    assert client.submit(held.id, "h100:1x4", options=OPTIONS, validate_only=True).status == "succeeded"


def test_listening_outlives_the_server(tmp_path: Path, trace: Path) -> None:
    """A server that is stopped and started again costs a listener nothing."""
    seen: list[Any] = []
    server = Server(tmp_path / "data")
    with server, Client(server.base_url) as client:
        queued = client.submit(
            client.upload_trace(trace).id, "h100:1x4", options=OPTIONS | {"time_limit": 600}
        )
        listener = threading.Thread(target=lambda: seen.extend(client.events(queued.id)))
        listener.start()
        eventually(lambda: client.solve(queued.id).incumbent is not None, what="an incumbent")
        server.stop()
        server.start()
        client.stop(queued.id)
        listener.join(60)
        assert not listener.is_alive()
        assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].kind == "done"
        assert client.placement(queued.id).placement().num_experts == 8


def test_deployments(client: Client, trace: Path, tmp_path: Path) -> None:
    """Make one, promote, watch, report, return, look back."""
    trace_id = client.upload_trace(trace).id
    solves = [client.submit(trace_id, "h100:1x4", options=OPTIONS | {"seed": seed}).id for seed in (1, 2)]
    for solve_id in solves:
        assert client.wait(solve_id).failure() is None
    made = client.put_deployment("chat", SPEC)
    assert (made.version, made.etag) == (None, '"r1"')
    with pytest.raises(PreconditionError):
        client.put_deployment("chat", SPEC, if_match='"r99"')
    with pytest.raises(NotFoundError):
        client.deployment_placement("chat")
    promoted = client.promote("chat", solve=solves[0], why="first")
    assert (promoted.version, promoted.why) == (1, "first")
    found = client.deployment_placement("chat")
    assert found is not None
    assert (found.version, found.content) == (1, client.placement(solves[0]).content)
    assert client.deployment_placement("chat", etag=found.etag) is None
    other = client.upload_placement(_shifted(found.content))
    with pytest.raises(PreconditionError):
        client.promote("chat", placement=other, if_match='"7"')
    changes = client.watch_placement("chat", etag=found.etag, timeout_s=30)
    promotion = threading.Timer(0.2, client.promote, ["chat"], {"placement": other, "if_match": '"1"'})
    promotion.start()
    changed = next(changes)
    promotion.join()
    assert changed.version == 2
    assert client.rollback("chat", why="slower").of_version == 1
    history = client.versions("chat")
    assert [(one.version, one.cause) for one in history] == [(3, "rollback"), (2, "manual"), (1, "manual")]
    part = {"window": 5, "load": np.ones((2, 8), dtype=np.int64)}
    taken = client.post_windows("chat", [part], rank=1, version=3)
    assert (taken.stored, taken.known, taken.version) == (1, 0, 3)
    assert client.post_windows("chat", [part], rank=1, version=3).known == 1
    assert "chat" in [one.name for one in client.deployments()]
    fetched = fetch_placement("chat", url=client.url, cache_dir=tmp_path)
    assert (fetched.source, fetched.version) == ("service", 3)
    assert fetch_placement("chat", url=client.url, cache_dir=tmp_path).content == fetched.content
    client.delete_deployment("chat")
    with pytest.raises(NotFoundError):
        client.deployment("chat")


def _shifted(content: bytes) -> bytes:
    """Return another placement of the same kind."""
    document = json.loads(content)
    document["physical_to_logical_map"] = [row[1:] + row[:1] for row in document["physical_to_logical_map"]]
    return json.dumps(document).encode()


def test_in_an_event_loop(server: Server, trace: Path) -> None:
    """The same, awaited; many at once."""

    async def work() -> None:
        async with AsyncClient(server.base_url) as client:
            held = await client.upload_trace(trace)
            queued = await asyncio.gather(
                *(client.submit(held.id, "h100:1x4", options=OPTIONS | {"seed": seed}) for seed in range(3))
            )
            ended = await asyncio.gather(*(client.wait(solve.id) for solve in queued))
            assert [solve.status for solve in ended] == ["succeeded"] * 3
            assert (await client.placement(queued[0].id)).placement().num_layers == 2
            async with aclosing(client.events(queued[0].id)) as events:  # type: ignore[type-var]
                async for event in events:
                    assert event.seq == 1
                    break
            await client.put_deployment("loop", SPEC)
            await client.promote("loop", solve=queued[0].id)
            async with aclosing(client.watch_placement("loop")) as placements:  # type: ignore[type-var]
                async for found in placements:
                    assert found.version == 1
                    break
            assert [one.version for one in await client.versions("loop")] == [1]
            await client.delete_deployment("loop")

    asyncio.run(work())


# Commands


def test_submit_and_wait(server: Server, trace: Path, tmp_path: Path) -> None:
    """One command from a file to a placement; local files are sent as what they hold."""
    (tmp_path / "linear.json").write_text(json.dumps(LINEAR))
    (tmp_path / "cluster.yaml").write_text("nodes: [{kind: h100, devices: 4}]\n")
    out = tmp_path / "placement.json"
    files = ["-t", str(tmp_path / "cluster.yaml"), "--calibration", str(tmp_path / "linear.json")]
    done = command(server, "submit", str(trace), *files, "--window", "64", "--wait", "-o", str(out), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert read_placement(out).num_devices == 4
    assert report["status"] == "succeeded"
    assert report["placement_id"] == f"sha256:{hashlib.sha256(out.read_bytes()).hexdigest()}"
    again = command(
        server,
        *("submit", f"sha256:{hashlib.sha256(trace.read_bytes()).hexdigest()}", *files, "--window", "64"),
        *("--start", str(out), "--wait", "-o", str(tmp_path / "b.json")),
    )
    assert again.returncode == 0, again.stderr
    assert "written to" in again.stdout
    shown = command(server, "status", report["id"])
    assert "succeeded" in shown.stdout
    listed = json.loads(command(server, "status", "--json").stdout)
    assert report["id"] in [row["id"] for row in listed["items"]]
    watched = command(server, "status", report["id"], "--watch", "--json").stdout.splitlines()
    assert [json.loads(line)["seq"] for line in watched] == list(range(1, len(watched) + 1))
    fetched = command(server, "fetch", report["id"], "--wait", "5", "-o", str(tmp_path / "c.json"))
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "c.json").read_bytes() == out.read_bytes()


def test_ctrl_c_keeps_the_best(server: Server, trace: Path, tmp_path: Path) -> None:
    """Ctrl-C with --wait stops the solve, and what it had found is written."""
    (tmp_path / "linear.json").write_text(json.dumps(LINEAR))
    out = tmp_path / "placement.json"
    options = ["-t", "h100:1x4", "--window", "64", "--calibration", str(tmp_path / "linear.json")]
    options += ["--time-limit", "600", "--priority", "7", "--wait", "-o", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "placement.cli", "submit", str(trace), *options],
        cwd=ROOT,
        env={**os.environ, "MOE_PLACEMENT_URL": server.base_url},
        stderr=subprocess.PIPE,
        text=True,
    )

    def has_incumbent() -> bool:
        running, _ = client.solves(status="running")
        return any(one.document["priority"] == 7 and one.incumbent is not None for one in running)

    try:
        with Client(server.base_url) as client:
            eventually(has_incumbent, 60, what="an incumbent")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, error
    assert "stopping early" in error
    assert read_placement(out).num_experts == 8


def test_a_run_submits_once(server: Server, trace: Path) -> None:
    """A job that is started again is given the solve that it has; another job has its own."""
    arguments = ["submit", str(trace), "-t", "h100:1x4", "--objective", "balance", "--window", "64", "--json"]
    first, second, third = (
        json.loads(command(server, *arguments, environment={"SLURM_JOB_ID": job}).stdout)["id"]
        for job in ("12", "12", "13")
    )
    assert first == second != third


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["submit", "nowhere.npz", "-t", "h100:1x4"], 2, "cannot be read"),
        (["submit", "s3://bucket/trace", "-t", "h100:1x4"], 2, "is a URL"),
        (["submit", "{trace}", "-t", "h100"], 2, "h100"),
        (["submit", "{trace}", "-t", "h100:1x4", "-o", "x.json"], 2, "--wait"),
        (["submit", "{trace}", "-t", "h100:1x4", "--max-moves", "3"], 2, "--start"),
        (["submit", "{trace}", "-t", "h100:1x4", "--validate-only", "--semantics", "x"], 2, "semantics"),
        (["submit", "{trace}", "-t", "h100:1x3", "--objective", "balance", "--wait", "-o", "{out}"], 3, "8"),
        (["status", "s-00000000000000000000000000"], 2, "no solve"),
        (["status", "--watch"], 2, "--watch needs"),
        (["status", "--url", "http://127.0.0.1:9"], 5, "cannot be reached"),
        (["fetch", "-o", "{out}"], 2, "either"),
        (["fetch", "s-00000000000000000000000000", "-o", "{out}"], 2, "no solve"),
        (["fetch", "s-0", "--strict", "-o", "{out}"], 2, "--deployment"),
        (["fetch", "--deployment", "nobody", "-o", "{out}"], 5, "nobody"),
        (["fetch", "--deployment", "nobody", "-t", "h100:1x4", "-o", "{out}"], 2, "--model"),
        (["fetch", "--deployment", "nobody", "--format", "x", "-o", "{out}"], 2, "unknown placement format"),
    ],
)
def test_wrong_commands_take_one_line(
    server: Server, trace: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    """One line that says what is wrong, the documented exit code, and no file."""
    from placement.cli.app import run

    out = tmp_path / "out.json"
    given = [part.format(trace=trace, out=out) for part in arguments]
    done = _in_process(run, given, {"MOE_PLACEMENT_URL": server.base_url})
    assert done.code == code, done.error
    assert text in done.error.splitlines()[-1]
    assert done.error.splitlines()[-1].startswith("moe-placement: error: ")
    assert not out.exists()


class _Done:
    def __init__(self, code: int, error: str) -> None:
        self.code, self.error = code, error


def _in_process(run: Any, arguments: list[str], environment: dict[str, str]) -> _Done:
    """Run a command within this process, which is quicker than another one."""
    import contextlib
    import io

    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stream):
        patch.delenv("MOE_PLACEMENT_TOKEN", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        code = run(arguments)
    return _Done(code, stream.getvalue())


def test_fetching_without_the_service(server: Server, tmp_path: Path) -> None:
    """A deployment's placement is written though the service is down, and the exit code is 0."""
    from placement.cli.app import run

    out = tmp_path / "placement.json"
    options = ["--deployment", "chat", "-o", str(out), "--timeout", "0.3", "--url", "http://127.0.0.1:9"]
    done = _in_process(run, ["fetch", *options, "-t", "h100:1x4", "--model", "olmoe-1b-7b"], {})
    assert done.code == 0, done.error
    assert "WARNING" in done.error
    assert read_placement(out).num_experts == 64
    out.unlink()
    strict = _in_process(run, ["fetch", *options, "-t", "h100:1x4", "--model", "olmoe-1b-7b", "--strict"], {})
    assert strict.code == 5
    assert not out.exists()


def test_the_client_is_light() -> None:
    """Importing and making a client loads neither the server's packages nor numpy."""
    code = (
        "import sys; from service.client import Client, fetch_placement; Client().close(); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"numpy", "fastapi", "starlette", "sqlalchemy", "pydantic", "torch", "typer", "scipy", "numba"}
    assert set(done.stdout.split()) & heavy == set()


@pytest.mark.parametrize("missing", ["httpx", "tenacity", "httpx_sse"])
def test_a_missing_extra_is_one_line(missing: str, tmp_path: Path) -> None:
    """Without the client's packages commands say what to install; a launcher falls back."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom placement.cli.app import main\nmain(sys.argv[1:])"
    )
    environment = {**os.environ, "MOE_PLACEMENT_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code, "status", "s-1", "--watch"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "moe-placement[client]" in done.stderr
    out = tmp_path / "placement.json"
    fallback = ["fetch", "--deployment", "chat", "-o", str(out), "-t", "h100:1x4", "--model", "olmoe-1b-7b"]
    done = subprocess.run(
        [sys.executable, "-c", code, *fallback, "--timeout", "0.2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert read_placement(out).num_experts == 64


def test_only_promoting_one_thing_makes_sense(client: Client) -> None:
    """A solve or a placement, not both, not neither."""
    with pytest.raises(InputError, match="either"):
        client.promote("chat")
    with pytest.raises(InputError, match="either"):
        client.promote("chat", solve="s-1", placement="sha256:0")
