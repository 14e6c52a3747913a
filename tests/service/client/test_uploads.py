"""What is sent as a trace: the same bytes for the same content, and never twice."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from service.client import AnswerError
from service.client.uploads import Upload
from tests.service.client.callers import KINDS, perform
from tests.service.client.scripted_server import ScriptedServer, drop, json_answer, problem

both = pytest.mark.parametrize("kind", KINDS)


def content_of(upload: Upload) -> bytes:
    """Return all bytes of an upload."""
    return b"".join(upload)


def folder_with(path: Path, files: dict[str, bytes]) -> Path:
    """Make a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_a_file_is_sent_as_it_is(tmp_path: Path) -> None:
    """The id is the digest of the file."""
    path = tmp_path / "trace.npz"
    path.write_bytes(b"x" * 3_000_000)
    upload = Upload(path)
    assert content_of(upload) == path.read_bytes()
    assert upload.size_bytes == 3_000_000
    assert upload.digest() == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z]{1,20}(/[a-zé]{1,120}){0,2}\.parquet", fullmatch=True),
        st.binary(max_size=2000),
        min_size=1,
        max_size=6,
    )
)
def test_a_folder_is_one_tar(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every tar reader gets the files back; the size is known beforehand."""
    upload = Upload(folder_with(tmp_path_factory.mktemp("set"), files))
    content = content_of(upload)
    assert len(content) == upload.size_bytes
    assert len(content) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    assert found == files
    assert list(found) == sorted(files)


def test_only_names_and_contents_count(tmp_path: Path) -> None:
    """Times, modes, order of creation and what is nobody's data change no digest."""
    files = {"manifest.rank00000.json": b"{}", "rank00000-000000.parquet": b"PAR1" * 300}
    first = folder_with(tmp_path / "a", files)
    second = folder_with(tmp_path / "b", dict(reversed(list(files.items()))))
    os.utime(second / "manifest.rank00000.json", (1, 1))
    (second / "manifest.rank00000.json").chmod(0o600)
    folder_with(second, {".hidden": b"1", "rank00000.spool.arrow": b"2", ".git/x": b"3"})
    assert Upload(first).digest() == Upload(second).digest()
    (second / "manifest.rank00000.json").write_bytes(b"{ }")
    assert Upload(first).digest() != Upload(second).digest()


@pytest.mark.parametrize("change", [b"shorter", b"much longer than it was before"])
def test_a_file_that_changes_is_not_sent(tmp_path: Path, change: bytes) -> None:
    """What grows or shrinks while it is read is refused: the digest would be of nothing that ever was."""
    path = tmp_path / "trace.npz"
    path.write_bytes(b"as it was first")
    upload = Upload(path)
    path.write_bytes(change)
    with pytest.raises(InputError, match="changed"):
        content_of(upload)


def test_what_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    """Nothing, an empty file, an empty folder, a pipe, a broken link: one line each."""
    empty = tmp_path / "empty.npz"
    empty.touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, why in [
        ("missing", "cannot be read"),
        ("empty.npz", "is empty"),
        ("folder", "empty folder"),
        ("pipe", "neither a file nor a folder"),
        ("linked", "no plain file"),
    ]:
        with pytest.raises(InputError, match=why):
            Upload(tmp_path / name)


@both
def test_known_content_is_not_sent(kind: str, tmp_path: Path) -> None:
    """The service is asked first."""
    path = tmp_path / "trace.npz"
    path.write_bytes(b"content")
    digest = Upload(path).digest()
    with ScriptedServer(json_answer({"id": digest, "format": "npz"})) as server:
        assert perform(kind, server.url, "upload_trace", path).id == digest
    assert [(request.method, request.body) for request in server.requests] == [("GET", b"")]
    assert server.requests[0].path == f"/v1/traces/{digest}"


@both
def test_an_upload_is_repeated_whole(kind: str, tmp_path: Path) -> None:
    """Where a connection breaks the next attempt sends everything again."""
    folder = folder_with(tmp_path / "set", {"a.parquet": b"1" * 700_000, "b.parquet": b"2" * 9})
    digest = Upload(folder).digest()
    unknown = problem(404, "not-found")
    with ScriptedServer(unknown, drop(), problem(503, "x"), json_answer({"id": digest}, 201)) as server:
        assert perform(kind, server.url, "upload_trace", folder, model="olmoe").id == digest
    bodies = [request.body for request in server.requests[1:]]
    assert [hashlib.sha256(body).hexdigest() for body in bodies] == [digest.removeprefix("sha256:")] * 3
    assert {request.path for request in server.requests[1:]} == {"/v1/traces?model=olmoe"}


@both
def test_another_digest_is_an_error(kind: str, tmp_path: Path) -> None:
    """What arrived differently must not be solved for."""
    path = tmp_path / "trace.npz"
    path.write_bytes(b"content")
    other = "sha256:" + "1" * 64
    with (
        ScriptedServer(problem(404, "not-found"), json_answer({"id": other}, 201)) as server,
        pytest.raises(AnswerError, match="arrived as"),
    ):
        perform(kind, server.url, "upload_trace", path)


@both
def test_a_refusal_is_told(kind: str, tmp_path: Path) -> None:
    """Too large is too large: exit code 2, no second attempt."""
    path = tmp_path / "trace.npz"
    path.write_bytes(b"content")
    with (
        ScriptedServer(problem(404, "not-found"), problem(413, "too-large", "at most 3 bytes")) as server,
        pytest.raises(Exception, match="at most 3 bytes") as raised,
    ):
        perform(kind, server.url, "upload_trace", path)
    assert raised.value.exit_code == 2  # type: ignore[attr-defined]
    assert len(server.requests) == 2
