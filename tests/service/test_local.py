"""A service of one's own: there when asked for, cut off from other services, gone without a trace."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from placement.errors import ServiceError
from service.client import Client
from service.local import LocalService
from tests.service.server import eventually, tiny_trace

pytestmark = pytest.mark.slow

ORPHAN = """
import sys, time
from service.local import LocalService
service = LocalService(sys.argv[1]).start()
print(service.pid, flush=True)
time.sleep(60)
"""


def scratch_of(pid: int) -> Path:
    """Return the folder that holds a service's state."""
    return Path(psutil.Process(pid).environ()["MOE_PLACEMENT_DATA_DIR"])


def test_it_serves_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, whatever the caller's environment says of other services, and takes its files with it."""
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    monkeypatch.setenv("MOE_PLACEMENT_LISTEN_PORT", "no port")
    with LocalService() as service:
        assert service.is_running
        data_dir, children = scratch_of(service.pid), psutil.Process(service.pid).children(recursive=True)
        assert data_dir.is_dir()
        with Client(service.url) as client:
            trace = client.upload_trace(tiny_trace(tmp_path / "trace.npz"))
            assert trace.id.startswith("sha256:")
        with pytest.raises(ServiceError, match="runs already on http://127"):
            service.start()
    assert not service.is_running
    assert not data_dir.parent.exists()
    assert [child for child in children if child.is_running()] == []
    with pytest.raises(ServiceError, match="not running"):
        _ = service.url
    service.stop()  # does nothing


def test_a_folder_that_was_given_stays(tmp_path: Path) -> None:
    """What was uploaded is there in the next service on the same folder."""
    folder = tmp_path / "state"
    path = tiny_trace(tmp_path / "trace.npz")
    service = LocalService(folder).start()
    with Client(service.url) as client:
        trace = client.upload_trace(path)
    service.stop()
    with LocalService(folder) as again, Client(again.url) as client:
        assert client.upload_trace(path).id == trace.id
        assert client.upload_trace(path).document["num_experts"] == 8
    assert (folder / "state.db").is_file()


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Others may write its folder: the error is the service's own, and nothing runs."""
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    service = LocalService(folder)
    with pytest.raises(ServiceError, match=r"(?s)ended with code 2 .*can be written by others"):
        service.start()
    assert not service.is_running


def test_one_that_died_is_told_of() -> None:
    """Stopping a service that was killed meanwhile is an error, and its files are removed."""
    service = LocalService().start()
    data_dir = scratch_of(service.pid)
    children = psutil.Process(service.pid).children(recursive=True)
    process = psutil.Process(service.pid)
    process.kill()
    eventually(lambda: not service.is_running, what="the service is gone")
    with pytest.raises(ServiceError, match="code -9"):
        service.stop()
    assert not data_dir.parent.exists()
    psutil.wait_procs(children, timeout=20)
    assert [child for child in children if child.is_running()] == []


def test_one_that_is_forgotten_ends() -> None:
    """An interpreter that ends, or drops it, takes it and its files along."""
    service = LocalService().start()
    data_dir, process = scratch_of(service.pid), psutil.Process(service.pid)
    del service
    gc.collect()
    assert not process.is_running()
    assert not data_dir.parent.exists()


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    """A kernel that is killed leaves no service behind."""
    owner = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "state")],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    with owner:
        service = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    psutil.wait_procs([service], timeout=20)
    assert not service.is_running()
