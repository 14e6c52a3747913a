"""A full disk: what was acknowledged stays, what does not fit is refused plainly, and space heals it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.artifacts import ArtifactFiles, digest_of
from tests.service.server import LINEAR, Server, eventually, tiny_trace, upload

SMALL_MB, LARGE_MB = 8, 64


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        _mount("-t", "tmpfs", "-o", f"size={SMALL_MB}m", "tmpfs", str(folder))
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"no file system may be mounted here: {exc.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _problem(response: httpx.Response) -> str:
    """Return the code of a refusal, which must be a problem that a caller can act on."""
    assert response.headers["Content-Type"].startswith("application/problem+json"), response.text
    assert response.status_code in (503, 507), response.text
    assert "\n" not in response.json()["detail"]
    code: str = response.json()["code"]
    return code


def _until_full(client: httpx.Client, folder: Path) -> dict[str, bytes]:
    """Upload until it is refused; return what was acknowledged."""
    kept: dict[str, bytes] = {}
    for number in range(200):
        path = tiny_trace(folder / f"{number}.npz", tokens=8192, layers=2, seed=number)
        content = path.read_bytes()
        response = client.post("/v1/traces", content=content)
        if not response.is_success:
            assert _problem(response) == "unavailable"
            return kept
        assert response.json()["id"] == digest_of(content)
        kept[digest_of(content)] = content
    raise AssertionError("the disk never was full")


def test_a_full_disk_refuses_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    """Uploads are refused while there is no space; reads go on; with space everything goes on."""
    env = {"MOE_PLACEMENT_LEAST_FREE_BYTES": "65536"}
    with Server(small_disk / "data", env=env) as server, server.client() as client:
        trace_id = upload(client, tiny_trace(tmp_path / "first.npz"))
        kept = _until_full(client, tmp_path)
        (small_disk / "filler").write_bytes(b"")
        _fill(small_disk / "filler")
        for _ in range(3):
            refused = client.post(
                "/v1/traces", content=tiny_trace(tmp_path / "more.npz", tokens=8192, seed=999).read_bytes()
            )
            assert _problem(refused) == "unavailable"
        options = {"solver": "greedy", "window": 64, "calibration": LINEAR}
        body = {"trace_id": trace_id, "topology": "h100:1x2", "options": options}
        submitted = client.post("/v1/solves", json=body, headers={"Idempotency-Key": "full"})
        if not submitted.is_success:
            assert _problem(submitted) == "unavailable"
        assert client.get("/v1/solves").is_success
        assert client.get("/health/live").is_success

        _mount("-o", f"remount,size={LARGE_MB}m", str(small_disk))
        (small_disk / "filler").unlink()
        eventually(lambda: client.get("/health/ready").is_success, 20)
        again = client.post("/v1/solves", json=body, headers={"Idempotency-Key": "full"})
        assert again.status_code == 202, again.text
        if submitted.is_success:
            assert again.json()["id"] == submitted.json()["id"]
        job = f"/v1/solves/{again.json()['id']}"
        eventually(lambda: client.get(job).json()["status"] not in ("queued", "running"), 30)
        assert client.get(job).json()["status"] == "succeeded", client.get(job).text
        upload(client, tmp_path / "more.npz")

    files = ArtifactFiles(small_disk / "data")
    assert {digest: files.read(digest) for digest in kept} == kept
    assert not list((small_disk / "data" / "scratch").iterdir())


def _fill(path: Path) -> None:
    """Write until not a byte more fits."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
