"""``/v1/traces``: uploads of routing traces, named by the digest of their bytes."""

from __future__ import annotations

from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from service.api.context import Context, context_of
from service.api.describe import problems
from service.api.examples import TRACE_ID
from service.api.inspection import Inspector
from service.api.logs import REQUEST_ID
from service.api.security import Caller, Scope, require
from service.api.stored import (
    artifact_document,
    artifact_of,
    artifact_page,
    in_thread,
    location_of,
    remove_artifact,
)
from service.api.uploads import TRACE_TYPES, check_content_type, encoding_of, limit_of, receive_upload
from service.artifacts import Draft
from service.errors import InvalidError, UnsupportedMediaError
from service.state.records import Artifact

__all__ = ["router"]

router = APIRouter(prefix="/v1/traces", tags=["traces"])

_EXAMPLE = {
    "id": TRACE_ID,
    "kind": "trace",
    "format": "npz",
    "size_bytes": 48213004,
    "num_layers": 58,
    "num_experts": 256,
    "top_k": 8,
    "num_tokens": 65536,
    "model_name": "deepseek-v3",
    "created_at": 1767225600.0,
    "created_by": "local",
    "links": {"self": f"/v1/traces/{TRACE_ID}"},
}
_ANSWER = {"content": {"application/json": {"example": _EXAMPLE}}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The file itself: any trace format that the command line reads, or a data set "
        "as one .tar, .tar.gz or .zip. Content-Encoding may be gzip or zstd.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

Submitter = Annotated[Caller, Depends(require(Scope.SUBMIT))]
Reader = Annotated[Caller, Depends(require(Scope.READ))]
Administrator = Annotated[Caller, Depends(require(Scope.ADMIN))]
Process = Annotated[Context, Depends(context_of)]
ModelName = Annotated[
    str | None,
    Query(min_length=1, max_length=100, description="Preset of the model, for formats that lack its layers."),
]


@router.post(
    "",
    status_code=201,
    responses={
        201: {"description": "It was new.", **_ANSWER},
        200: {"description": "It was known.", **_ANSWER},
        **problems(408, 413, 415),
    },
    openapi_extra=_BODY,
)
async def upload_trace(
    request: Request, response: Response, caller: Submitter, context: Process, model: ModelName = None
) -> dict[str, Any]:
    """Store a trace; the same bytes are stored once.

    Its kind is found out from its content, and it is opened once before it is taken. Of PyTorch files tensors
    and plain values are read; a pickle that holds anything else is refused, and never run.
    """
    check_content_type(request, TRACE_TYPES)
    most_bytes = limit_of(context.settings, caller)
    with ExitStack() as stack:
        draft = stack.enter_context(context.files.draft())
        await receive_upload(request, draft, most_bytes=most_bytes)
        if encoding_of(request) == "zstd":
            draft = await _unpacked(request, stack, draft, most_bytes)
        await in_thread(_check_json, request, draft)
        known = await in_thread(context.artifacts.get, draft.digest)
        if known is not None and known.kind == "trace":
            await in_thread(context.files.keep, draft)
            await in_thread(context.artifacts.touch, [draft.digest])
            response.status_code = 200
            return artifact_document(known)
        found = await _inspect(request, stack, draft, model)
        kept = await in_thread(_keep, context, caller, draft, found)
    response.headers["Location"] = location_of(kept)
    return artifact_document(kept)


async def _unpacked(request: Request, stack: ExitStack, packed: Draft, most_bytes: int) -> Draft:
    """Return a draft with what a zstd draft unpacks to."""
    context: Context = request.app.state.context
    folder = stack.enter_context(TemporaryDirectory(dir=context.files.scratch, suffix=".unpacked"))
    out = f"{folder}/plain"
    await inspector_of(request).ask("zstd", packed.path, limits={"unpacked_bytes": most_bytes}, out=out)
    draft = stack.enter_context(context.files.draft())
    await in_thread(_copy, out, draft)
    if not draft.size_bytes:
        raise InvalidError("the body is empty; it must be the file itself")
    return draft


def _copy(path: str, draft: Draft) -> None:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            draft.write(chunk)


def _check_json(request: Request, draft: Draft) -> None:
    """Refuse what says that it is JSON and is not."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "text/json"):
        return
    with draft.path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] not in (b"{", b"["):
        raise UnsupportedMediaError(
            f"the body is no JSON as its Content-Type says: it begins with {head[:16]!r}"
        )


async def _inspect(request: Request, stack: ExitStack, draft: Draft, model: str | None) -> dict[str, Any]:
    context: Context = request.app.state.context
    folder = stack.enter_context(TemporaryDirectory(dir=context.files.scratch, suffix=".unpacked"))
    found: dict[str, Any] = await inspector_of(request).ask("trace", draft.path, model=model, folder=folder)
    return found


def _keep(context: Context, caller: Caller, draft: Draft, found: dict[str, Any]) -> Artifact:
    digest = context.files.keep(draft)
    kept = context.artifacts.add(
        digest=digest,
        kind="trace",
        size_bytes=draft.size_bytes,
        format=found["format"],
        summary=found["summary"],
        created_by=caller.id,
    )
    context.audit.record(
        who=caller.id,
        action="trace.upload",
        target=digest,
        request_id=REQUEST_ID.get(),
        detail={"size_bytes": draft.size_bytes, "format": found["format"]},
    )
    return kept


def inspector_of(request: Request) -> Inspector:
    """Return the inspector of the process that serves a request."""
    inspector: Inspector = request.app.state.inspector
    return inspector


@router.get("", responses=problems())
async def list_traces(
    caller: Reader,
    context: Process,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> dict[str, Any]:
    """List stored traces, newest first."""
    return await artifact_page(context, "trace", limit=limit, cursor=cursor)


@router.get("/{trace_id}", responses={200: {"description": "The trace.", **_ANSWER}, **problems(404)})
async def get_trace(trace_id: str, caller: Reader, context: Process) -> dict[str, Any]:
    """Return what is known of a trace."""
    return artifact_document(await artifact_of(context, trace_id, "trace"))


@router.delete("/{trace_id}", status_code=204, responses=problems(404, 409))
async def delete_trace(trace_id: str, caller: Administrator, context: Process) -> Response:
    """Remove a trace that no solve names."""
    await remove_artifact(context, await artifact_of(context, trace_id, "trace"), caller)
    return Response(status_code=204)
