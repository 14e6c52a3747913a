"""Placements as the files of engines: encoded once, kept by digest and format, never changed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import anyio
from anyio import CapacityLimiter
from fastapi import Request, Response

from placement import __version__
from placement._suggest import did_you_mean
from service.artifacts import ArtifactFiles
from service.errors import InvalidError
from service.jobs.problem import for_callers

if TYPE_CHECKING:
    from placement.plan import Placement

__all__ = [
    "EngineFile",
    "EngineFiles",
    "FormatName",
    "check_format",
    "engine_files_of",
    "file_response",
    "names_etag",
    "stored_placement",
]

FormatName = Literal[
    "native",
    "sglang",
    "tensorrt-llm",
    "vllm",
    "vllm-ranks",
    "vllm-ascend",
    "megatron",
    "deepspeed",
]
"""Keys of `placement.formats.files.FORMATS`, which needs numpy and is loaded when first used."""

MOST_BYTES = 64 << 20
IMMUTABLE = "private, max-age=0, must-revalidate"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFile:
    """A placement as bytes.

    Parameters
    ----------
    etag
        The digest for the bytes as stored, and what they were made from and by for others; with quotes.
    """

    content: bytes
    etag: str
    media_type: str


class EngineFiles:
    """Encodes placements, each once, with the most recent ones in memory."""

    def __init__(self, files: ArtifactFiles) -> None:
        self._files = files
        self._kept: OrderedDict[tuple[str, str, str | None], asyncio.Task[EngineFile]] = OrderedDict()
        self._size_bytes = 0
        # It is computing: two at a time, so that requests are served beside it.
        self._limiter = CapacityLimiter(2)

    async def get(self, digest: str, to: str = "native", *, model: str | None = None) -> EngineFile:
        """Return a stored placement in a format.

        Parameters
        ----------
        model
            Preset of the model, for engines that count other layers than the placement says.

        Raises
        ------
        InvalidError
            If there is no such format, or the engine cannot load this placement.
        ServiceError
            If its bytes are not there.
        """
        check_format(to)
        key = (digest, to, model)
        task = self._kept.get(key)
        if task is None:
            task = self._kept[key] = asyncio.create_task(self._make(digest, to, model))
            task.add_done_callback(lambda done: self._settle(key, done))
        else:
            self._kept.move_to_end(key)
        return await asyncio.shield(task)

    async def _make(self, digest: str, to: str, model: str | None) -> EngineFile:
        make = _native if to == "native" else _encoded
        return await anyio.to_thread.run_sync(make, self._files, digest, to, model, limiter=self._limiter)

    def _settle(self, key: tuple[str, str, str | None], task: asyncio.Task[EngineFile]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._kept.pop(key, None)
            return
        self._size_bytes += len(task.result().content)
        for old in list(self._kept):
            if self._size_bytes <= MOST_BYTES:
                break
            if self._kept[old].done():
                self._size_bytes -= len(self._kept.pop(old).result().content)


def check_format(to: str) -> None:
    """Refuse unknown formats.

    Raises
    ------
    InvalidError
        If there is no such format.
    """
    if to not in get_args(FormatName):
        named = to.replace("\x00", "")[:40]
        raise InvalidError(f"format {named!r} is unknown; {did_you_mean(named, get_args(FormatName))}")


def stored_placement(files: ArtifactFiles, digest: str) -> Placement:
    """Return a stored placement."""
    from placement.formats.document import parse_document
    from placement.formats.files import placement_from_document

    document = parse_document(files.read(digest).decode("utf-8-sig"))
    return placement_from_document(document, source=digest)


def _native(files: ArtifactFiles, digest: str, to: str, model: str | None) -> EngineFile:
    return EngineFile(content=files.read(digest), etag=f'"{digest}"', media_type="application/json")


def _encoded(files: ArtifactFiles, digest: str, to: str, model: str | None) -> EngineFile:
    from placement.errors import InputError
    from placement.formats.files import encode_as
    from placement.formats.layers import layers_of
    from placement.formats.protocol import FormatOptions
    from placement.model import preset_model

    placement = stored_placement(files, digest)
    try:
        layers = layers_of(placement, None if model is None else preset_model(model))
        text = encode_as(placement, to, FormatOptions(layers=layers, num_devices=placement.num_devices))
    except InputError as exc:
        raise InvalidError(f"format {to}: {for_callers(str(exc), {})}") from exc
    return EngineFile(
        content=text.encode(),
        etag=f'"{digest};{to};{model or ""};{__version__}"',
        media_type=_media_type(text),
    )


def _media_type(text: str) -> str:
    return "application/json" if text.lstrip()[:1] in ("{", "[") else "application/yaml"


def file_response(request: Request, file: EngineFile) -> Response:
    """Answer with a file, or with 304 if the caller has it."""
    headers = {"ETag": file.etag, "Cache-Control": IMMUTABLE}
    if names_etag(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def names_etag(header: str, etag: str) -> bool:
    """Tell whether an If-None-Match header names an entity tag; comparison is weak."""
    named = [one.strip().removeprefix("W/") for one in header.split(",")]
    return etag in named or named == ["*"]


def engine_files_of(request: Request) -> EngineFiles:
    """Return the encoder of the process that serves a request."""
    state = request.app.state
    found = getattr(state, "engine_files", None)
    if found is None:
        found = state.engine_files = EngineFiles(state.context.files)
    files: EngineFiles = found
    return files
