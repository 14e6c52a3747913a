"""Tests of the spool: a recording that is killed loses no batch that was spooled, and says what it lost."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.errors import InputError
from traces.store import DatasetWriter, clear_dataset, read_dataset, write_dataset
from traces.store.spool import Spool, read_spool
from traces.trace import Trace

SPOOL = "rank00000.spool.arrow"
BATCH = 3


def ids(first: int, tokens: int) -> np.ndarray[Any, Any]:
    """Return ids that tell which of the first 2500 tokens they are of."""
    token_T = np.arange(first, first + tokens) % 2500
    return np.repeat(np.stack([token_T % 50, 50 + token_T // 50], axis=1)[:, None, :], 2, axis=1)


def writer(path: Path, **changes: Any) -> DatasetWriter:
    return DatasetWriter(path, **{"num_layers": 2, "num_experts": 100, "top_k": 2, **changes})


def crashed(path: Path, batches: int, **changes: Any) -> None:
    """Leave a folder as a recording does that is killed after some batches."""
    out = writer(path, **changes)
    for batch in range(batches):
        out.append(ids(batch * BATCH, BATCH))
    spool = out._spool
    assert spool is not None
    spool.close()


RECORDER = """
import sys
from traces.store import DatasetWriter
sys.path.insert(0, sys.argv[2])
from test_spool import BATCH, ids, writer
from pathlib import Path
out = writer(Path(sys.argv[1]), fragment_tokens=20)
for batch in range(10**6):
    out.append(ids(batch * BATCH, BATCH))
    print(batch, flush=True)
"""


def test_a_killed_recording_is_recovered(tmp_path: Path) -> None:
    """SIGKILL in the middle of recording: every batch that was reported is there after resuming."""
    process = subprocess.Popen(
        [sys.executable, "-c", RECORDER, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 15:
            os.kill(process.pid, signal.SIGKILL)
            break
    reported = 16 + len(process.stdout.readlines())
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    out = writer(tmp_path, resume=True, fragment_tokens=20)
    recovered = out.recovered
    assert recovered is None or recovered.stored_tokens + recovered.tokens == out.num_tokens
    assert out.num_tokens >= reported * BATCH
    assert out.num_tokens <= (reported + 1) * BATCH
    known = out.num_tokens
    out.append(ids(known, 5))
    out.close()
    back = read_dataset(tmp_path)
    np.testing.assert_array_equal(back.experts_TLK[:known], ids(0, known))
    assert back.num_tokens == known + 5
    assert not (tmp_path / SPOOL).exists()


def test_spooled_tokens_are_recovered_and_counted(tmp_path: Path) -> None:
    """After a crash between two fragments the rest comes from the spool, and the report says so."""
    crashed(tmp_path, 7, fragment_tokens=10)
    assert read_dataset(tmp_path).num_tokens == 20
    out = writer(tmp_path, resume=True, fragment_tokens=10)
    assert str(out.recovered) == ("resumed after 20 stored tokens: 1 more recovered from 1 spooled batches")
    assert read_dataset(tmp_path).num_tokens == 21
    out.close()
    np.testing.assert_array_equal(read_dataset(tmp_path).experts_TLK, ids(0, 21))


@pytest.mark.parametrize("lost_bytes", [1, 40, 200])
def test_a_torn_last_batch_is_dropped_and_said(tmp_path: Path, lost_bytes: int) -> None:
    """A batch of which some bytes are missing is lost, those before are not."""
    crashed(tmp_path, 4)
    spool = tmp_path / SPOOL
    spool.write_bytes(spool.read_bytes()[:-lost_bytes])
    with writer(tmp_path, resume=True) as out:
        assert out.recovered is not None
        assert (out.recovered.tokens, out.recovered.batches) == (9, 3)
        assert out.recovered.dropped_bytes > 0
        assert f"a torn batch of {out.recovered.dropped_bytes} bytes at the end was dropped" in str(
            out.recovered
        )
    np.testing.assert_array_equal(read_dataset(tmp_path).experts_TLK, ids(0, 9))


def test_any_torn_end_is_survived(tmp_path: Path) -> None:
    """Wherever a crash of the machine cut the spool off, or left zeros, whole batches come back in order."""
    crashed(tmp_path, 3)
    content = (tmp_path / SPOOL).read_bytes()
    found = set()
    for length in range(0, len(content), 37):
        for tail in (b"", b"\x00" * 64):
            (tmp_path / SPOOL).write_bytes(content[:length] + tail)
            spooled = read_spool(tmp_path / SPOOL, None)
            assert spooled.num_tokens % BATCH == 0
            found.add(spooled.num_tokens)
    assert found == {0, 3, 6}


def test_a_spool_without_a_whole_batch_is_resumed(tmp_path: Path) -> None:
    """A crash during the very first batch leaves nothing to recover, which is said."""
    crashed(tmp_path, 1)
    (tmp_path / SPOOL).write_bytes((tmp_path / SPOOL).read_bytes()[:20])
    with writer(tmp_path, resume=True) as out:
        assert str(out.recovered) == (
            "resumed after 0 stored tokens: 0 more recovered from 0 spooled batches; "
            "a torn batch of 20 bytes at the end was dropped"
        )
        out.append(ids(0, 2))
    assert read_dataset(tmp_path).num_tokens == 2


def test_a_spool_is_never_overlooked(tmp_path: Path) -> None:
    """Without resume a crash's spool is reported with what it holds, and stays; overwriting removes it."""
    crashed(tmp_path, 3)
    spool = (tmp_path / SPOOL).read_bytes()
    for changes in ({"append": True}, {}):
        (tmp_path / "manifest.rank00000.json").unlink(missing_ok=True)
        with pytest.raises(
            InputError, match=r"spool\.arrow: holds 9 tokens of a recording that ended abruptly"
        ):
            writer(tmp_path, **changes)
    with pytest.raises(InputError, match="ended abruptly; resume it, or overwrite"):
        write_dataset(Trace(experts_TLK=ids(0, 3), num_experts=100), tmp_path)
    assert (tmp_path / SPOOL).read_bytes() == spool
    with writer(tmp_path, overwrite=True) as out:
        out.append(ids(0, 4))
    assert read_dataset(tmp_path).num_tokens == 4


def test_a_crash_between_fragment_and_spool_doubles_nothing(tmp_path: Path) -> None:
    """A spool whose tokens a fragment holds already is let go."""
    crashed(tmp_path, 2)
    spool = (tmp_path / SPOOL).read_bytes()
    with writer(tmp_path, resume=True):
        pass
    (tmp_path / SPOOL).write_bytes(spool)
    with writer(tmp_path, resume=True) as out:
        assert out.recovered is not None
        assert out.recovered.tokens == 0
    assert read_dataset(tmp_path).num_tokens == 6
    assert not (tmp_path / SPOOL).exists()


def test_resuming_where_nothing_happened_starts_anew(tmp_path: Path) -> None:
    """A launcher may always say resume."""
    with writer(tmp_path, resume=True) as out:
        assert out.recovered is None
        out.append(ids(0, 2))
    with writer(tmp_path, resume=True) as out:
        assert out.recovered is None
        out.append(ids(2, 2))
    np.testing.assert_array_equal(read_dataset(tmp_path).experts_TLK, ids(0, 4))


def test_spools_of_other_recordings_are_refused(tmp_path: Path) -> None:
    """Resuming with another model mixes nothing."""
    crashed(tmp_path, 2, model_name="a")
    (tmp_path / "manifest.rank00000.json").unlink()
    with pytest.raises(InputError, match="was spooled by another recording"):
        writer(tmp_path, model_name="b", resume=True)


def test_a_foreign_arrow_file_is_no_spool(tmp_path: Path) -> None:
    """Some other stream under the spool's name is left alone."""
    import pyarrow as pa

    with pa.OSFile(str(tmp_path / SPOOL), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"x": "int8"})):
        pass
    with pytest.raises(InputError, match="is no spool of a recording"):
        writer(tmp_path, resume=True)


def test_a_live_recording_is_not_resumed(tmp_path: Path) -> None:
    """While one process records a rank, another neither resumes nor overwrites the same one by accident."""
    with writer(tmp_path) as out:
        out.append(ids(0, 2))
        with pytest.raises(InputError, match="is being written by another process"):
            writer(tmp_path, resume=True)
        out.append(ids(2, 2))
    assert read_dataset(tmp_path).num_tokens == 4


def test_readers_see_fragments_alone(tmp_path: Path) -> None:
    """What lies in the spool becomes visible with the next flush."""
    with writer(tmp_path) as out:
        out.append(ids(0, 5))
        assert (tmp_path / SPOOL).stat().st_size > 0
        with pytest.raises(InputError, match="holds no tokens"):
            read_dataset(tmp_path)
        out.flush()
        assert not (tmp_path / SPOOL).exists()
        assert read_dataset(tmp_path).num_tokens == 5
        assert out.num_tokens == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_small_batches_may_be_spooled_together(tmp_path: Path) -> None:
    """With `spool_tokens` a crash loses as many tokens at most, and there are fewer messages."""
    crashed(tmp_path, 5, spool_tokens=6)
    spooled = read_spool(tmp_path / SPOOL, None)
    assert spooled.num_tokens == 12


def test_spools_can_be_done_without(tmp_path: Path) -> None:
    """Then a crash loses what was not flushed."""
    with writer(tmp_path, spool=False) as out:
        out.append(ids(0, 5))
        assert not (tmp_path / SPOOL).exists()


def test_fsync_comes_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every batch, after a while, or never."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(fd))
    for fsync_s, expected in ((0.0, 3), (1000.0, 0), (None, 0)):
        calls.clear()
        crashed(tmp_path, 3, fsync_s=fsync_s)
        # The manifest, written when the folder was opened, is forced to the disk either way.
        assert len(calls) - 1 == expected
        clear_dataset(tmp_path)


def test_a_full_disk_keeps_what_was_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a batch: one line; room again: nothing is lost and nothing doubled."""
    out = writer(tmp_path)
    out.append(ids(0, 3))
    good = (tmp_path / SPOOL).stat().st_size
    original = Spool._write

    def full(self: Spool, file: Any, message: bytes) -> None:
        class Full:
            def __init__(self) -> None:
                self.written = 0

            def write(self, data: Any) -> int:
                if self.written:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.written = 10
                return int(file.write(data[:10]))

            seek, truncate = file.seek, file.truncate

        original(self, Full(), message)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_write", full)
        with pytest.raises(InputError, match=r"spool\.arrow: cannot be written \(No space left on device\)"):
            out.append(ids(3, 3))
    assert (tmp_path / SPOOL).stat().st_size == good
    out.append(ids(6, 3))
    out.close()
    np.testing.assert_array_equal(read_dataset(tmp_path).experts_TLK, ids(0, 9))


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from placement.errors import InputError
from test_spool import ids, writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
out = writer(Path(sys.argv[1]), fragment_tokens=int(sys.argv[3]))
try:
    for batch in range(1000):
        out.append(ids(batch * 20, 20))
    out.close()
except InputError as exc:
    print(exc)
"""


@pytest.mark.parametrize("fragment_tokens", [100, 1000], ids=["fragments", "spool"])
def test_a_disk_that_fills_up_while_recording(tmp_path: Path, fragment_tokens: int) -> None:
    """A real limit on file sizes: one line, what was flushed is valid, what was spooled comes back."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parent), str(fragment_tokens)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "cannot be written (File too large)" in done.stdout
    with writer(tmp_path, resume=True, fragment_tokens=100) as out:
        tokens = out.num_tokens
    assert tokens > 0
    np.testing.assert_array_equal(read_dataset(tmp_path).experts_TLK, ids(0, tokens))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
