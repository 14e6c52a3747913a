"""Uploads: streamed and bounded, told apart by content, opened out of harm's way, and nothing left behind."""

from __future__ import annotations

import gzip
import io
import pickle
import socket
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

from service.artifacts import digest_of
from service.state.tokens import Limits, Scope
from tests.service.api.guarded import (
    Guarded,
    assert_problem,
    issue,
    read_raw,
    scratch_of,
    send_raw,
    state_url,
)
from tests.service.server import Server, eventually, tiny_trace
from traces.counts import ExpertCounts
from traces.readers import open_trace
from traces.store.copy import write_stream

MIB = 1 << 20


@pytest.fixture
def trace(tmp_path: Path) -> bytes:
    """A trace of the test's own."""
    seed = int(sha256(str(tmp_path).encode()).hexdigest()[:8], 16)
    return tiny_trace(tmp_path / "trace.npz", seed=seed).read_bytes()


def stored_in(server: Server) -> set[str]:
    """Return the names of the stored files."""
    return {path.name for path in (server.data_dir / "artifacts").rglob("*") if path.is_file()}


def test_a_trace_is_stored_once(client: httpx.Client, trace: bytes) -> None:
    """New bytes are 201 with their place, the same bytes are 200; the header is told."""
    first = client.post("/v1/traces", content=trace)
    again = client.post("/v1/traces", content=trace)

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.json()["id"] == digest_of(trace)
    told = {
        name: first.json()[name] for name in ("format", "num_layers", "num_experts", "top_k", "num_tokens")
    }
    assert told == {"format": "npz", "num_layers": 2, "num_experts": 8, "top_k": 2, "num_tokens": 512}
    assert client.get(first.headers["location"]).json() == first.json()
    assert client.get("/v1/traces").json()["items"][0] == first.json()


def test_pages_hold_every_trace_once(client: httpx.Client, tmp_path: Path) -> None:
    """The cursor leads from the newest to the oldest."""
    ids = []
    for seed in range(3):
        content = tiny_trace(tmp_path / f"{seed}.npz", seed=1000 + seed).read_bytes()
        ids.append(client.post("/v1/traces", content=content).json()["id"])
    found: list[str] = []
    cursor: str | None = None
    while cursor is not None or not found:
        page = client.get("/v1/traces", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        found += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert len(found) == len(set(found))
    assert [one for one in found if one in ids] == ids[::-1]
    assert_problem(client.get("/v1/traces?cursor=x~y"), 422, "invalid")


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, "zstd", asbytes=True)
    return packed


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstd)])
def test_encodings_change_nothing(client: httpx.Client, trace: bytes, encoding: str, pack: Any) -> None:
    """The id is that of the bytes themselves, however they travelled."""
    response = client.post("/v1/traces", content=pack(trace), headers={"Content-Encoding": encoding})
    assert response.status_code == 201
    assert response.json()["id"] == digest_of(trace)


def test_gzip_may_come_in_several_members(client: httpx.Client, trace: bytes) -> None:
    """As parallel compressors write it."""
    packed = gzip.compress(trace[:1000]) + gzip.compress(trace[1000:])
    response = client.post("/v1/traces", content=packed, headers={"Content-Encoding": "gzip"})
    assert response.json()["id"] == digest_of(trace)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(b"x" * 1000)[:-9]),
        ("gzip", gzip.compress(b"x" * 1000) + b"trailing"),
        ("zstd", b"no zstd"),
        ("zstd", zstd(b"x" * 100_000)[:-3]),
        ("gzip", b""),
    ],
    ids=["no gzip", "short gzip", "more than gzip", "no zstd", "short zstd", "empty"],
)
def test_broken_encodings_are_refused(client: httpx.Client, encoding: str, body: bytes) -> None:
    """What is not encoded as it says is 422."""
    response = client.post("/v1/traces", content=body, headers={"Content-Encoding": encoding})
    assert_problem(response, 422, "invalid")


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "\x7f"])
def test_other_encodings_are_not_taken(open_server: Server, encoding: str) -> None:
    """Nor are several at once."""
    head = f"POST /v1/traces HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: {encoding}\r\n"
    answer = send_raw(open_server, f"{head}Content-Length: 1\r\n\r\nx".encode())
    assert answer.status in (400, 415)


@pytest.mark.parametrize(
    "kind", ["text/html", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "image/png"]
)
@pytest.mark.parametrize("path", ["/v1/traces", "/v1/placements"])
def test_wrong_content_types_are_not_taken(client: httpx.Client, path: str, kind: str) -> None:
    """The type must be one that a file may have."""
    assert_problem(
        client.post(path, content=b"x", headers={"Content-Type": kind}), 415, "unsupported-media-type"
    )


def test_what_says_json_must_be_json(client: httpx.Client, trace: bytes) -> None:
    """An archive under the name of JSON is not taken."""
    response = client.post("/v1/traces", content=trace, headers={"Content-Type": "application/json"})
    assert_problem(response, 415, "unsupported-media-type")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"PK\x03\x04 truncated", b"{", b"[1]"])
def test_no_trace_is_no_trace(client: httpx.Client, open_server: Server, content: bytes) -> None:
    """Bytes of no format are refused by their content, in one line without our paths."""
    before = stored_in(open_server)
    problem = assert_problem(client.post("/v1/traces", content=content), 422, "invalid")
    assert str(open_server.data_dir) not in problem["detail"]
    assert stored_in(open_server) == before


class Sneaky:
    """Its pickle leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_pickles_do_not_run(client: httpx.Client, tmp_path: Path) -> None:
    """Bare pickles, those in PyTorch files and those in arrays of objects: refused, and nothing ran."""
    mark = tmp_path / "ran"
    files = {"bare": pickle.dumps(Sneaky(mark))}
    torch.save({"topk_ids_of_layer": Sneaky(mark)}, tmp_path / "new.pt")
    torch.save({"logical_count": Sneaky(mark)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "objects.npz", topk=np.array([Sneaky(mark)], dtype=object), num_experts=8)
    files |= {name: (tmp_path / name).read_bytes() for name in ("new.pt", "old.pt", "objects.npz")}
    for content in files.values():
        assert_problem(client.post("/v1/traces", content=content), 422, "invalid")
    assert_problem(client.post("/v1/placements", content=files["new.pt"]), 422, "invalid")
    assert not mark.exists()


def dataset(folder: Path) -> Path:
    """Write a small recorded data set."""
    source = open_trace(tiny_trace(folder / "source.npz", seed=77))
    assert not isinstance(source, ExpertCounts)
    write_stream(source.blocks(), source.header, folder / "set")
    return folder / "set"


def archived(folder: Path, kind: str) -> bytes:
    """Return a folder as one archive."""
    out = io.BytesIO()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as packed:
            for path in files:
                packed.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for path in files:
                tar.add(path, path.relative_to(folder.parent))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_data_set_comes_as_an_archive(client: httpx.Client, tmp_path: Path, kind: str) -> None:
    """Its header is that of the data set inside."""
    content = archived(dataset(tmp_path), kind)
    response = client.post("/v1/traces", content=content)
    assert response.status_code == 201, response.text
    found = response.json()
    assert (found["format"], found["archive"], found["num_tokens"]) == ("dataset", kind, 512)


def tar_with(*entries: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return out.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize(
    "content",
    [
        tar_with(entry("set/manifest.rank00000.json", tarfile.SYMTYPE, "/etc/passwd")),
        tar_with(entry("set/manifest.rank00000.json", tarfile.LNKTYPE, "../../etc/passwd")),
        tar_with(entry("../escaped", size=3)),
        tar_with(entry("/tmp/escaped", size=3)),
        tar_with(entry("set/fifo", tarfile.FIFOTYPE)),
        tar_with(entry("set/null", tarfile.CHRTYPE)),
    ],
    ids=["symlink", "hard link", "upwards", "absolute", "fifo", "device"],
)
def test_archives_hold_plain_files_alone(client: httpx.Client, open_server: Server, content: bytes) -> None:
    """Links, devices and names that lead elsewhere are refused, and nothing came out."""
    assert_problem(client.post("/v1/traces", content=content), 422, "invalid")
    assert not list(open_server.data_dir.parent.rglob("escaped"))
    assert not Path("/tmp/escaped").exists()


def bomb(members: int, member_bytes: int) -> bytes:
    """Return a zip that unpacks to much more."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("set/manifest.rank00000.json", b"{}")
        for number in range(members):
            packed.writestr(f"set/{number}", b"\x00" * member_bytes)
    return out.getvalue()


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits and little patience."""
    env = {
        "MOE_PLACEMENT_MAX_UPLOAD_BYTES": str(2 * MIB),
        "MOE_PLACEMENT_MAX_UNPACKED_BYTES": str(8 * MIB),
        "MOE_PLACEMENT_MAX_BODY_BYTES": str(MIB),
        "MOE_PLACEMENT_BODY_IDLE_SECONDS": "0.5",
    }
    with Server(tmp_path_factory.mktemp("small") / "data", role="api", env=env) as server:
        yield server
        assert not scratch_of(server)
        assert not stored_in(server)


def test_zip_bombs_do_not_go_off(small_server: Server) -> None:
    """An archive that unpacks to more than allowed is refused."""
    content = bomb(10, 4 * MIB)
    assert len(content) < MIB
    with small_server.client() as client:
        problem = assert_problem(client.post("/v1/traces", content=content), 422, "invalid")
    assert "archive" in problem["detail"]


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_deflate_bombs_do_not_go_off(small_server: Server, encoding: str) -> None:
    """A kilobyte that becomes a gigabyte is 413 once the limit is reached."""
    if encoding == "gzip":
        pack = zlib.compressobj(9, wbits=31)
        content = b"".join(pack.compress(b"\x00" * MIB) for _ in range(256)) + pack.flush()
    else:
        content = zstd(b"\x00" * (256 * MIB))
    assert len(content) < MIB
    with small_server.client() as client:
        response = client.post("/v1/traces", content=content, headers={"Content-Encoding": encoding})
    assert_problem(response, 413, "too-large")


@pytest.mark.parametrize(
    ("path", "most"), [("/v1/traces", 2 * MIB), ("/v1/placements", MIB), ("/v1/tokens", 1 << 14)]
)
def test_oversized_bodies_are_refused(small_server: Server, path: str, most: int) -> None:
    """By what they declare before a byte is read, and by what comes where they declare nothing."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    declared = send_raw(small_server, f"{head}Content-Length: {most + 1}\r\n\r\n".encode())
    assert (declared.status, declared.document["code"]) == (413, "too-large")
    with small_server.client() as client:
        chunks = (b"x" * (1 << 14) for _ in range(most // (1 << 14) + 1))
        streamed = client.post(path, content=chunks, headers={"Content-Type": "application/json"})
    assert_problem(streamed, 413, "too-large")


def test_a_token_has_limits_of_its_own(guarded: Guarded) -> None:
    """An upload above the token's limit is 413, below it is taken as far as its content goes."""
    limits = Limits(max_upload_bytes=1000)
    token = guarded.keys.note(issue(state_url(guarded.server), Scope.SUBMIT, limits=limits).text)
    with guarded.client(token) as client:
        assert_problem(client.post("/v1/traces", content=b"x" * 1001), 413, "too-large")
        assert_problem(client.post("/v1/traces", content=b"x" * 1000), 422, "invalid")


def test_a_body_that_stops_is_given_up(small_server: Server) -> None:
    """Who sends half of what was promised gets 408 after a while, and leaves nothing."""
    with socket.create_connection((small_server.host, small_server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/traces HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
        answer = read_raw(connection)
    assert (answer.status, answer.document["code"]) == (408, "request-timeout")


def test_a_caller_that_goes_away_leaves_nothing(open_server: Server) -> None:
    """The connection breaks in the middle of an upload: the bytes so far are removed."""
    before = stored_in(open_server)
    with socket.create_connection((open_server.host, open_server.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/traces HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
            + b"x" * 3_000_000
        )
        eventually(
            lambda: sum(path.stat().st_size for path in scratch_of(open_server)) > 0,
            10.0,
            what="some bytes arrived",
        )
    eventually(lambda: not scratch_of(open_server), 10.0, what="they were removed")
    eventually(lambda: "status=499" in open_server.log, 10.0, what="the log says so")
    assert stored_in(open_server) == before
    assert "Traceback" not in open_server.log


TRAVERSAL = [
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e%2fstate.db",
    "sha256:..%2f..%2fstate.db",
    "sha256:" + "0" * 64,
    "SHA256:" + "A" * 64,
    "%00",
    "sha256:" + "0" * 63 + "%0a",
    "%ff%fe",
    "a" * 4000,
    "'; DROP TABLE tokens; --",
    "\u0661" * 64,
]


@pytest.mark.parametrize("given", TRAVERSAL)
@pytest.mark.parametrize(
    "path", ["/v1/traces/{}", "/v1/placements/{}", "/v1/tokens/{}", "/v1/solves/{}", "/v1/deployments/{}"]
)
def test_no_path_comes_from_a_caller(client: httpx.Client, path: str, given: str) -> None:
    """Whatever stands in a path parameter, it is looked up and nothing else."""
    response = client.get(httpx.URL(f"{client.base_url}{path.format(given)}"))
    assert response.status_code in (404, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert client.delete(httpx.URL(f"{client.base_url}{path.format(given)}")).status_code in (404, 405, 422)


def test_artifacts_can_be_removed(client: httpx.Client, open_server: Server, trace: bytes) -> None:
    """What nothing names goes with its bytes, and the audit log keeps who did it."""
    made = client.post("/v1/traces", content=trace)
    trace_id = made.json()["id"]
    assert client.delete(f"/v1/traces/{trace_id}").status_code == 204
    assert_problem(client.get(f"/v1/traces/{trace_id}"), 404, "not-found")
    assert trace_id.removeprefix("sha256:") not in stored_in(open_server)
    entries = client.get("/v1/audit", params={"target": trace_id}).json()["items"]
    assert [entry["action"] for entry in entries] == ["trace.delete", "trace.upload"]
    assert client.post("/v1/traces", content=trace).status_code == 201


def test_what_a_job_names_stays(client: httpx.Client, trace: bytes) -> None:
    """A trace that a solve names is not removed under it."""
    trace_id = client.post("/v1/traces", content=trace).json()["id"]
    queued = client.post("/v1/solves", json={"trace_id": trace_id, "topology": "h100:1x2"})
    assert queued.status_code == 202, queued.text
    assert_problem(client.delete(f"/v1/traces/{trace_id}"), 409, "conflict")
    assert client.get(f"/v1/traces/{trace_id}").status_code == 200
