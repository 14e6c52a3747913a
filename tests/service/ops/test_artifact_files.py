"""Files under their digest: whole or not at all, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from placement.errors import ServiceError
from service.artifacts import ArtifactFiles, DiskFullError, digest_of

CONTENT = b"which expert lives where" * 1000
DIGEST = digest_of(CONTENT)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def files(data_dir: Path) -> ArtifactFiles:
    return ArtifactFiles(data_dir)


def stored_path(data_dir: Path, digest: str = DIGEST) -> Path:
    name = digest.removeprefix("sha256:")
    return data_dir / "artifacts" / name[:2] / name


def test_bytes_come_back(files: ArtifactFiles, data_dir: Path) -> None:
    """What was kept is found under its digest, in a folder named by its first digits."""
    assert files.put(CONTENT) == DIGEST
    assert files.read(DIGEST) == CONTENT
    assert files.local(DIGEST) == stored_path(data_dir)
    assert list(files.digests()) == [DIGEST]


def test_nobody_else_may_look(files: ArtifactFiles, data_dir: Path) -> None:
    """Folders and files are the owner's alone, whatever the umask."""
    files.put(CONTENT)
    for path in [data_dir, *data_dir.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_draft_can_be_looked_into_while_it_grows(files: ArtifactFiles) -> None:
    """Reading in the middle does not disturb what is written after it."""
    with files.draft() as draft:
        draft.write(CONTENT[:100])
        draft.stream.seek(0)
        assert draft.stream.read(5) == CONTENT[:5]
        draft.write(CONTENT[100:])
        assert draft.path.read_bytes() == CONTENT
        assert draft.size_bytes == len(CONTENT)
        assert files.keep(draft) == DIGEST
    assert files.read(DIGEST) == CONTENT


def test_a_draft_that_is_not_kept_leaves_nothing(files: ArtifactFiles, data_dir: Path) -> None:
    """An upload that breaks off is as if it never came."""
    with files.draft() as draft:
        draft.write(CONTENT)
    assert list((data_dir / "scratch").iterdir()) == []
    assert list(files.digests()) == []


@pytest.mark.parametrize("moment", ["before the rename", "before the sync"])
def test_a_crash_between_write_and_rename_leaves_nothing_half(data_dir: Path, moment: str) -> None:
    """A process that is killed with its draft written: no artifact, and the next start clears the draft."""
    code = f"""
        import os, signal
        from pathlib import Path
        from service import artifacts
        files = artifacts.ArtifactFiles(Path({str(data_dir)!r}))
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        if {moment == "before the sync"}:
            os.fsync = die
        else:
            Path.replace = die
        files.put({CONTENT[:50]!r})
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list((data_dir / "scratch").iterdir())) == 1
    files = ArtifactFiles(data_dir)
    assert list((data_dir / "scratch").iterdir()) == []
    assert list(files.digests()) == []
    assert files.put(CONTENT[:50]) == digest_of(CONTENT[:50])


def test_a_start_spares_the_drafts_of_those_who_live(files: ArtifactFiles, data_dir: Path) -> None:
    """Another process that starts must not take what is being uploaded for an orphan."""
    with files.draft() as draft:
        draft.write(CONTENT)
        ArtifactFiles(data_dir)
        assert files.keep(draft) == DIGEST
    assert files.read(DIGEST) == CONTENT


def test_a_damaged_file_is_noticed_and_can_be_stored_again(data_dir: Path) -> None:
    """Bits that rotted are told, never served; the same bytes, stored again, mend it."""
    ArtifactFiles(data_dir).put(CONTENT)
    stored_path(data_dir).write_bytes(b"X" + CONTENT[1:])
    later = ArtifactFiles(data_dir)
    with pytest.raises(ServiceError, match="damaged"):
        later.read(DIGEST)
    assert later.put(CONTENT) == DIGEST
    assert later.read(DIGEST) == CONTENT


def test_storing_again_mends_a_damaged_file(data_dir: Path) -> None:
    """Even where nobody has read it since."""
    ArtifactFiles(data_dir).put(CONTENT)
    stored_path(data_dir).write_bytes(CONTENT[:10])
    ArtifactFiles(data_dir).put(CONTENT)
    assert ArtifactFiles(data_dir).read(DIGEST) == CONTENT


def test_known_bytes_are_left_as_they_are(files: ArtifactFiles, data_dir: Path) -> None:
    """The second upload of the same bytes does not replace the file that others may be reading."""
    files.put(CONTENT)
    before = stored_path(data_dir).stat().st_ino
    files.put(CONTENT)
    assert stored_path(data_dir).stat().st_ino == before


def test_unknown_and_malformed_ids_are_told(files: ArtifactFiles) -> None:
    """An id is never taken for a path."""
    with pytest.raises(ServiceError, match="is not in"):
        files.read(DIGEST)
    for wrong in ("../../etc/passwd", "sha256:../../x", DIGEST.upper(), DIGEST + "\n", ""):
        with pytest.raises(ServiceError, match="not the id of an artifact"):
            files.read(wrong)


def test_removing_spares_what_was_just_kept_again(files: ArtifactFiles, data_dir: Path) -> None:
    """The race of a removal with an upload of the same bytes ends with the bytes."""
    files.put(CONTENT)
    os.utime(stored_path(data_dir), (0, 0))
    files.put(CONTENT)
    assert not files.remove_unused(DIGEST, unused_s=60)
    assert files.read(DIGEST) == CONTENT
    os.utime(stored_path(data_dir), (0, 0))
    assert files.remove_unused(DIGEST, unused_s=60)
    assert list(files.digests()) == []
    assert list((data_dir / "scratch").iterdir()) == []


def test_removing_what_is_not_there_is_done_already(files: ArtifactFiles) -> None:
    """Two vacuums at a time do not disturb each other."""
    files.remove(DIGEST)
    assert files.remove_unused(DIGEST, unused_s=0)


def test_a_full_disk_is_told_and_leaves_nothing(files: ArtifactFiles, data_dir: Path) -> None:
    """The system's limit on a file's size stands for the disk here: writing fails the same way."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from service.artifacts import ArtifactFiles, DiskFullError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        files = ArtifactFiles(Path({str(data_dir)!r}))
        try:
            files.put(b"x" * 20_000)
        except DiskFullError as exc:
            print(exc)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    assert "no room in" in ended.stdout
    assert list(files.digests()) == []
    assert list((data_dir / "scratch").iterdir()) == []
    assert DiskFullError.code == "unavailable"


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_remote_store_is_shared(tmp_path: Path, scheme: str) -> None:
    """What one machine keeps another one reads, and checks."""
    url = f"memory://{uuid.uuid4().hex}" if scheme == "memory" else f"file://{tmp_path}/shared"
    one, other = (ArtifactFiles(tmp_path / name, url=url) for name in ("one", "other"))
    one.check()
    assert one.put(CONTENT) == DIGEST
    assert other.read(DIGEST) == CONTENT
    assert list(other.digests()) == [DIGEST]
    other.remove(DIGEST)
    assert list(one.digests()) == []


def test_a_remote_artifact_is_fetched_once(tmp_path: Path) -> None:
    """The local copy serves from then on, until it was not used for a while."""
    url = f"file://{tmp_path}/shared"
    ArtifactFiles(tmp_path / "one", url=url).put(CONTENT)
    other = ArtifactFiles(tmp_path / "other", url=url)
    copy = other.local(DIGEST)
    remote = tmp_path / "shared" / DIGEST[7:9] / DIGEST[7:]
    remote.write_bytes(b"rotten")
    assert other.read(DIGEST) == CONTENT
    os.utime(copy, (0, 0))
    assert other.drop_copies(unused_s=60) == len(CONTENT)
    with pytest.raises(ServiceError, match="damaged"):
        other.read(DIGEST)


def test_a_remote_store_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    """One line, and no secret of the URL in it."""
    files = ArtifactFiles(tmp_path, url="nosuch://user:secret@host/x?key=secret")
    with pytest.raises(ServiceError, match="nosuch://host/x") as caught:
        files.put(CONTENT)
    assert "secret" not in str(caught.value)
