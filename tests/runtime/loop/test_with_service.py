"""Two ranks and the service itself: promoted, posted to, killed, and back again, while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loop_checks import EXPERTS, LAYERS, run_with_service, shifted
from ranks import Ranks

from placement.io import dump_json, placement_to_dict
from service.client import Client
from tests.service.server import Server, eventually, free_port

SPEC: dict[str, Any] = {
    "topology": "h100:1x2",
    "model": {"layers": LAYERS, "experts": EXPERTS, "top_k": 2},
    "num_ranks": 2,
}

LONG_S = 200.0
"""For all of a test; machines may be busy."""


def promote(server: Server, shift: int) -> None:
    """Promote another placement."""
    content = dump_json(placement_to_dict(shifted(shift))).encode()
    with Client(server.base_url) as client:
        client.promote("chat", placement=client.upload_placement(content))


def soon(condition: Callable[[], bool], *, what: str) -> None:
    """Wait until something holds."""
    eventually(condition, 60, what=what)


def judged(client: Client) -> int | None:
    """Return the version that complete windows have been compared with."""
    drift = client.deployment("chat").document["drift"] or {}
    return drift.get("version")


@contextmanager
def running(ranks: Ranks, url: str, folder: Path) -> Iterator[Future[list[dict[str, Any]]]]:
    """Have the ranks run until the block is left."""
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(ranks.run, run_with_service, url, str(folder), within_s=LONG_S)
        try:
            yield work
        finally:
            (folder / "enough").touch()


def progress(folder: Path, work: Future[Any]) -> tuple[int, int]:
    """Return steps so far, and the version that runs."""
    if work.done():
        work.result()
    text = (folder / "progress").read_text() if (folder / "progress").exists() else ""
    steps, _, version = text.partition(" ")
    return int(steps or 0), int(version or 0)


def reached(folder: Path, work: Future[Any], *, steps: int = 0, version: int = 0) -> Callable[[], bool]:
    """Return a condition: so many steps, this version."""

    def look() -> bool:
        now = progress(folder, work)
        return now[0] >= steps and now[1] >= version

    return look


@pytest.mark.slow
def test_a_job_outlives_its_service(two_ranks: Ranks, tmp_path: Path) -> None:
    """Both ranks change over after the same steps, their outputs stay right, and nothing ever waits."""
    folder = tmp_path / "run"
    with Server(tmp_path / "data") as server, Client(server.base_url) as admin:
        admin.put_deployment("chat", SPEC)
        promote(server, 1)
        with running(two_ranks, server.base_url, folder) as work:
            soon(reached(folder, work, steps=5), what="it runs")
            promote(server, 2)
            soon(reached(folder, work, version=2), what="it changed over")
            soon(lambda: judged(admin) == 2, what="windows of the new placement were judged")
            server.kill()
            steps, _ = progress(folder, work)
            soon(reached(folder, work, steps=steps + 30), what="it goes on without the service")
            server.start()
            promote(server, 3)
            soon(reached(folder, work, version=3), what="it changed over again")
        found = work.result()
    assert found[0]["versions"] == found[1]["versions"]
    assert sorted(set(found[0]["versions"])) == [1, 2, 3]
    assert max(one["worst"] for one in found) < 1e-5
    assert [one["source"] for one in found] == ["service"] * 2
    assert min(one["posted"] for one in found) > 0


@pytest.mark.slow
def test_a_job_starts_without_its_service(two_ranks: Ranks, tmp_path: Path) -> None:
    """With experts in order; once there is a service, it is heard."""
    folder, port = tmp_path / "run", free_port()
    with running(two_ranks, f"http://127.0.0.1:{port}", folder) as work:
        soon(reached(folder, work, steps=5), what="it runs")
        with Server(tmp_path / "data", port=port) as server, Client(server.base_url) as admin:
            admin.put_deployment("chat", SPEC)
            promote(server, 1)
            soon(reached(folder, work, version=1), what="it changed over")
    found = work.result()
    assert [one["source"] for one in found] == ["contiguous"] * 2
    assert found[0]["versions"] == found[1]["versions"]
    assert found[0]["versions"][-1] == 1
    assert max(one["worst"] for one in found) < 1e-5
