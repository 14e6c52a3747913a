"""The current placement for launchers: read by primary key each time, answered with bytes made before.

What does not change with the request is made once per version: the bytes, their compressed form, the headers.
"""

from __future__ import annotations

import asyncio
import gzip
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anyio.to_thread
from starlette.responses import Response
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from service.api.engine_files import EngineFile, EngineFiles
from service.artifacts import digest_of
from service.deployments.records import Current
from service.errors import InvalidError
from service.jobs.problem import for_callers
from service.state.deployments import DeploymentStore

__all__ = ["Ready", "ReadyPlacements", "ReadyResponse", "digest_of_etag", "names"]

MOST_BYTES = 64 << 20
LEAST_COMPRESSED = 1024
PACKED = b';gzip"'
CACHE_CONTROL = b"private, max-age=0, must-revalidate"

Header = tuple[bytes, bytes]
Key = tuple[str, int, str, str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """An answer that only has to be sent.

    Parameters
    ----------
    etag
        With quotes.
    headers, unchanged
        Of the 200 and of the 304.
    """

    etag: bytes
    content: bytes
    headers: list[Header]
    unchanged: list[Header]


class ReadyResponse(Response):
    """Sends what is ready: the placement, or that it has not changed."""

    def __init__(self, ready: Ready, *, changed: bool) -> None:
        # Nothing is to be rendered: the parent's own is left out on purpose.
        self.status_code = 200 if changed else 304
        self.raw_headers = ready.headers if changed else ready.unchanged
        self.body = ready.content if changed else b""
        self.background = None

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """Send it in two messages."""
        body = b"" if scope["method"] == "HEAD" else self.body
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": body})


class ReadyPlacements:
    """Answers by deployment, revision and form; the most recent ones are kept.

    Parameters
    ----------
    deployments
        Asked for the model where an engine's format needs it.
    files
        Encodes placements.
    """

    def __init__(self, deployments: DeploymentStore, files: EngineFiles) -> None:
        self._deployments = deployments
        self._files = files
        self._kept: OrderedDict[Key, Ready] = OrderedDict()
        self._making: dict[Key, asyncio.Task[Ready]] = {}
        self._size_bytes = 0

    def kept(self, name: str, current: Current, to: str, *, packed: bool) -> Ready | None:
        """Return an answer that is there already."""
        return self._kept.get((name, current.revision, current.digest or "", to, packed))

    async def get(self, name: str, current: Current, to: str, *, packed: bool) -> Ready:
        """Return the answer for a current placement, made once however many ask at the same time.

        Parameters
        ----------
        packed
            Whether the caller takes gzip.

        Raises
        ------
        InvalidError
            If there is no such format, or the engine cannot load this placement.
        """
        key = (name, current.revision, current.digest or "", to, packed)
        found = self._kept.get(key)
        if found is not None:
            return found
        task = self._making.get(key)
        if task is None:
            task = self._making[key] = asyncio.create_task(self._make(key, current))
            task.add_done_callback(lambda done: self._making.pop(key, None))
        return await asyncio.shield(task)

    async def _make(self, key: Key, current: Current) -> Ready:
        name, _, digest, to, packed = key
        file = await self._file(name, digest, to)
        content = file.content
        if packed and len(content) >= LEAST_COMPRESSED:
            content = await anyio.to_thread.run_sync(lambda: gzip.compress(file.content, 6, mtime=0))
        ready = _ready(file, content, current)
        self._kept[key] = ready
        self._size_bytes += len(ready.content)
        while self._size_bytes > MOST_BYTES and len(self._kept) > 1:
            self._size_bytes -= len(self._kept.popitem(last=False)[1].content)
        return ready

    async def _file(self, name: str, digest: str, to: str) -> EngineFile:
        if to == "native":
            return await self._files.get(digest)
        deployment = await anyio.to_thread.run_sync(self._deployments.get, name)
        model = deployment.spec["model"]
        if isinstance(model, str) or deployment.spec["facts"]["model_name"] is None:
            return await self._files.get(digest, to, model=model if isinstance(model, str) else None)
        native = await self._files.get(digest)
        return await anyio.to_thread.run_sync(_encoded, native, model, to)


def _encoded(native: EngineFile, model: Mapping[str, Any], to: str) -> EngineFile:
    """Return a placement in a format, for a model that is no preset."""
    from placement.errors import InputError
    from placement.formats.document import parse_document
    from placement.formats.files import encode_as, placement_from_document
    from placement.formats.layers import layers_of
    from placement.formats.protocol import FormatOptions
    from placement.model import model_from_fields

    try:
        shape = model_from_fields(model)
        placement = placement_from_document(parse_document(native.content.decode("utf-8-sig")))
        options = FormatOptions(layers=layers_of(placement, shape), num_devices=placement.num_devices)
        content = encode_as(placement, to, options).encode()
    except InputError as exc:
        raise InvalidError(f"format {to}: {for_callers(str(exc), {})}") from exc
    is_json = content.lstrip()[:1] in (b"{", b"[")
    return EngineFile(
        content=content,
        etag=f'{native.etag[:-1]};{to};{digest_of(content)[7:23]}"',
        media_type="application/json" if is_json else "application/yaml",
    )


def _ready(file: EngineFile, content: bytes, current: Current) -> Ready:
    is_packed = content is not file.content
    # Other bytes are another representation: a strong tag must differ.
    etag = file.etag.encode()
    if is_packed:
        etag = etag[:-1] + PACKED
    always: list[Header] = [
        (b"etag", etag),
        (b"cache-control", CACHE_CONTROL),
        (b"vary", b"accept-encoding"),
        (b"x-placement-version", str(current.version).encode()),
        (b"x-placement-id", (current.digest or "").encode()),
    ]
    if current.job_id is not None:
        always.append((b"x-placement-solve", current.job_id.encode()))
    headers = [
        (b"content-type", file.media_type.encode()),
        (b"content-length", str(len(content)).encode()),
        *always,
    ]
    if is_packed:
        headers.append((b"content-encoding", b"gzip"))
    return Ready(etag=etag, content=content, headers=headers, unchanged=always)


def names(header: bytes, etag: bytes) -> bool:
    """Tell whether If-None-Match names a tag; by weak comparison, so that compressed or not is the same."""
    if header == etag:
        return True
    tags = [_plain(tag.strip().removeprefix(b"W/")) for tag in header.split(b",")]
    return _plain(etag) in tags or tags == [b"*"]


def _plain(tag: bytes) -> bytes:
    return tag.removesuffix(PACKED) + b'"' if tag.endswith(PACKED) else tag


def digest_of_etag(tag: str) -> str:
    """Return the placement that one of our tags names, whatever the form of its bytes."""
    return tag.strip().strip('"').partition(";")[0]
