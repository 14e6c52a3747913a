"""The spool: what a rank recorded since its last fragment, safe from a crash of the process.

An Arrow IPC stream ``rankNNNNN.spool.arrow`` to which every batch is appended, compressed, as one message.
What was written is in the operating system's hands: it outlives the process, and after an fsync the machine.
A recording that ended abruptly leaves its spool behind; its last message may be torn. Readers never look into
spools. The process that writes one holds a lock on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from placement.errors import InputError
from traces.source import TraceHeader
from traces.store.arrow import TOKEN_COLUMNS, ids_array, numbers_of, token_arrays
from traces.trace import Trace

__all__ = ["Recovery", "Spool", "SpoolContent", "read_spool"]

_KEY = b"moe-trace-spool"
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What was found when a recording was resumed.

    Parameters
    ----------
    tokens
        Tokens taken over from the spool.
    batches
        Batches in which they had been appended.
    dropped_bytes
        Bytes at the end of the spool that hold no whole batch.
    stored_tokens
        Tokens that the data set's fragments hold already.
    """

    tokens: int
    batches: int
    dropped_bytes: int
    stored_tokens: int

    def __str__(self) -> str:
        """Say it in one line."""
        text = (
            f"resumed after {self.stored_tokens} stored tokens: {self.tokens} more recovered from "
            f"{self.batches} spooled batches"
        )
        if self.dropped_bytes:
            text += f"; a torn batch of {self.dropped_bytes} bytes at the end was dropped"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolContent:
    """What a spool holds.

    Parameters
    ----------
    fragment
        Number of the fragment that it was to become; `None` where not even that was written.
    batches
        Its batches, checked; empty if only counted.
    num_tokens
        Tokens of all whole batches.
    torn_bytes
        Bytes behind the last whole batch.
    """

    fragment: int | None
    batches: tuple[Trace, ...]
    num_tokens: int
    torn_bytes: int


class Spool:
    """Appends batches to a rank's spool.

    Parameters
    ----------
    path
        The file; replaced when the first batch is written.
    header
        What the data set holds.
    fsync_s
        Seconds after which what was written is forced to the disk, with the next batch; 0 for every batch,
        `None` for never.
    """

    def __init__(self, path: Path, header: TraceHeader, *, fsync_s: float | None) -> None:
        self._path, self._header, self._fsync_s = path, header, fsync_s
        self._file: BinaryIO | None = None
        self._sink = _Pieces()
        self._writer: Any = None
        self._synced_at_s = 0.0
        self._good_bytes = 0

    def begin(self, fragment: int) -> None:
        """Start an empty spool for a fragment.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        if self._file is None:
            self._file = _locked(self._path)
        about = {"fragment": fragment, **dataclasses.asdict(self._header)}
        schema = _schema(self._header).with_metadata({_KEY: json.dumps(about)})
        self._file.seek(0)
        self._file.truncate()
        self._good_bytes = 0
        self._sink.pieces.clear()
        self._writer = pa.ipc.new_stream(pa.PythonFile(self._sink, mode="w"), schema, options=_OPTIONS)
        self._synced_at_s = time.monotonic()

    @property
    def begun(self) -> bool:
        """Tell whether a fragment's spool is there."""
        return self._writer is not None

    def append(self, traces: Sequence[Trace]) -> None:
        """Write batches; when this returns, a crash of the process does not lose it.

        Raises
        ------
        OSError
            If there is no room; what was written before stays whole.
        """
        if self._file is None or self._writer is None:
            raise ValueError("the spool was not begun")
        for trace in traces:
            self._writer.write_batch(_batch_of(self._header, trace))
        self._write(self._file, b"".join(self._sink.pieces))
        self._sink.pieces.clear()
        now_s = time.monotonic()
        if (
            self._file is not None
            and self._fsync_s is not None
            and now_s - self._synced_at_s >= self._fsync_s
        ):
            os.fsync(self._file.fileno())
            self._synced_at_s = now_s

    def _write(self, file: BinaryIO, message: bytes) -> None:
        rest = memoryview(message)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            # Half a message at the end would hide what is appended once there is room again.
            with contextlib.suppress(OSError):
                file.seek(self._good_bytes)
                file.truncate()
            self._sink.pieces.clear()
            if not self._good_bytes:
                # The schema was lost with the batch; begin again.
                self._writer = None
            raise
        self._good_bytes += len(message)

    def remove(self) -> None:
        """Forget what was spooled: it lies in a fragment now."""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            self.close()

    def close(self) -> None:
        """Let go of the file, leaving it where it is."""
        if self._file is not None:
            self._file.close()
        self._file, self._writer, self._good_bytes = None, None, 0


class _Pieces(io.RawIOBase):
    """A sink that keeps what it is given until it is written for good."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(self.pieces[-1])

    def tell(self) -> int:
        return 0


def _locked(path: Path) -> BinaryIO:
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
    if not _lock(file):
        file.close()
        raise InputError(f"{path}: is written by another process; give every process a rank of its own")
    return file


def _lock(file: Any) -> bool:
    """Lock a file against other processes until it is closed; `True` where locks do not exist."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems know no locks.
        return True
    return True


def read_spool(path: Path, header: TraceHeader | None) -> SpoolContent:
    """Read every whole batch of a spool that nobody is writing.

    Parameters
    ----------
    path
        The file.
    header
        What the data set holds; batches are checked against it. `None` only counts them.

    Raises
    ------
    InputError
        If a process is writing it, or it belongs to another recording.
    OSError
        If it cannot be read.
    """
    with path.open("rb") as file:
        if not _lock(file):
            raise InputError(
                f"{path}: is being written by another process; wait for it, or give each a rank of its own"
            )
        content = file.read()
    stream = pa.BufferReader(content)
    with _damage() as whole:
        schema = pa.ipc.read_schema(stream)
    if not whole:
        return SpoolContent(fragment=None, batches=(), num_tokens=0, torn_bytes=len(content))
    about = _about(path, schema)
    fragment = about.pop("fragment")
    if header is not None and about != _plain(header):
        raise InputError(f"{path}: was spooled by another recording; move it away or overwrite the data set")
    batches, num_tokens, good_bytes = [], 0, stream.tell()
    while good_bytes < len(content):
        with _damage() as whole:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(stream), schema)
            if header is not None:
                batches.append(_trace_of(header, batch))
        if not whole:
            break
        num_tokens += batch.num_rows
        good_bytes = stream.tell()
    return SpoolContent(
        fragment=fragment,
        batches=tuple(batches),
        num_tokens=num_tokens,
        torn_bytes=len(content) - good_bytes,
    )


def _schema(header: TraceHeader) -> pa.Schema:
    """Tokens as they come, all layers of one together: turning them is left to the fragment."""
    ids = pa.binary(header.num_layers * header.top_k * header.dtype.itemsize)
    fields = [pa.field(name, kind) for name, kind in TOKEN_COLUMNS.items()]
    return pa.schema([*fields, pa.field("ids", ids, nullable=False)])


def _batch_of(header: TraceHeader, trace: Trace) -> pa.RecordBatch:
    ids = ids_array(trace.experts_TLK.astype(header.dtype, copy=False))
    return pa.RecordBatch.from_arrays([*token_arrays(trace), ids], schema=_schema(header))


def _trace_of(header: TraceHeader, batch: Any) -> Trace:
    table = pa.Table.from_batches([batch])
    content = np.frombuffer(batch.column("ids").buffers()[1], dtype=header.dtype)
    shape = batch.num_rows, header.num_layers, header.top_k
    return Trace(
        experts_TLK=content[: batch.num_rows * header.num_layers * header.top_k].reshape(shape),
        num_experts=header.num_experts,
        domain_names=header.domain_names,
        model_name=header.model_name,
        moe_layer_ids=header.moe_layer_ids,
        **{f"{name}_T": numbers_of(name, table, header) for name in TOKEN_COLUMNS},
    )


@contextlib.contextmanager
def _damage() -> Iterator[list[bool]]:
    """Yield a list that is empty afterwards if what was read inside is torn or holds no valid tokens."""
    whole = [True]
    try:
        yield whole
    except (pa.ArrowException, OSError, EOFError, ValueError):
        whole.clear()


def _about(path: Path, schema: Any) -> dict[str, Any]:
    try:
        about = json.loads((schema.metadata or {})[_KEY])
        return {**about, "fragment": int(about["fragment"])}
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{path}: is no spool of a recording; move it away") from exc


def _plain(header: TraceHeader) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(header)))
    return plain
