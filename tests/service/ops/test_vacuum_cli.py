"""``moe-placement vacuum``: removes what is old while a server runs, and says what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from service.artifacts import ArtifactFiles
from service.state.artifacts import ArtifactStore
from service.state.database import open_database
from service.state.tables import artifacts
from tests.service.server import Server


def vacuum(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "placement.cli", "vacuum", "--data-dir", str(data_dir), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def add_old_artifact(data_dir: Path, content: bytes) -> str:
    """Store some bytes that nobody has used for a year."""
    files, database = ArtifactFiles(data_dir), open_database(f"sqlite:///{data_dir / 'state.db'}")
    digest, then = files.put(content), time.time() - 365 * 86400
    ArtifactStore(database).add(
        digest=digest, kind="trace", size_bytes=len(content), format="npz", summary={}, created_by="local"
    )
    with database.write() as connection:
        connection.execute(artifacts.update().where(artifacts.c.digest == digest).values(used_at=then))
    os.utime(files.local(digest), (then, then))
    database.close()
    return digest


def test_it_removes_what_is_old_while_the_server_runs(tmp_path: Path) -> None:
    """First telling what it would do, then doing it."""
    data_dir = tmp_path / "data"
    with Server(data_dir, role="api") as server, server.client() as client:
        digest = add_old_artifact(data_dir, b"an old trace")
        told = vacuum(data_dir, "--dry-run")
        assert told.returncode == 0, told.stderr
        assert "would remove 0 jobs, 0 load windows, 1 artifacts" in told.stdout
        assert client.get(f"/v1/traces/{digest}").status_code == 200
        assert vacuum(data_dir, "--older-than", "400").stdout.startswith("removed 0 jobs")
        assert client.get(f"/v1/traces/{digest}").status_code == 200


def test_it_prints_json(tmp_path: Path) -> None:
    """One object."""
    data_dir = tmp_path / "data"
    open_database(f"sqlite:///{ArtifactFiles(data_dir).scratch.parent / 'state.db'}").close()
    digest = add_old_artifact(data_dir, b"an old trace")
    done = vacuum(data_dir, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifacts"] == [digest]
    assert list(ArtifactFiles(data_dir).digests()) == []


def test_a_folder_without_a_service_is_refused(tmp_path: Path) -> None:
    """Nothing is made there."""
    done = vacuum(tmp_path / "nothing")
    assert done.returncode == 2
    assert "--data-dir" in done.stderr
    assert not (tmp_path / "nothing").exists()
    empty = vacuum(tmp_path)
    assert empty.returncode == 5
    assert list(tmp_path.iterdir()) == []
