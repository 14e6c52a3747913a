"""``/v1/placements``: placement files in and out, in our form and in those of engines."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from service.api.context import Context, context_of
from service.api.describe import problems
from service.api.engine_files import engine_files_of, file_response
from service.api.logs import REQUEST_ID
from service.api.routes.traces import ModelName, inspector_of
from service.api.security import Caller, Scope, require
from service.api.stored import (
    artifact_document,
    artifact_of,
    artifact_page,
    check_stored,
    in_thread,
    location_of,
    remove_artifact,
)
from service.api.uploads import PLACEMENT_TYPES, check_content_type, encoding_of, limit_of, receive_upload
from service.artifacts import Draft
from service.errors import UnsupportedMediaError
from service.state.records import Artifact

__all__ = ["router"]

PLACEMENT_ID = "sha256:" + "c4" * 32

router = APIRouter(prefix="/v1/placements", tags=["placements"])

_EXAMPLE = {
    "id": PLACEMENT_ID,
    "kind": "placement",
    "format": "native",
    "size_bytes": 201344,
    "num_layers": 58,
    "num_experts": 256,
    "num_devices": 32,
    "num_slots": 288,
    "model_name": "deepseek-v3",
    "received_as": "sglang",
    "created_at": 1767225600.0,
    "created_by": "local",
    "links": {"self": f"/v1/placements/{PLACEMENT_ID}"},
}
_ANSWER = {"content": {"application/json": {"example": _EXAMPLE}}}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "A placement file, ours or that of an engine; Content-Encoding may be gzip.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

Submitter = Annotated[Caller, Depends(require(Scope.SUBMIT))]
Reader = Annotated[Caller, Depends(require(Scope.READ))]
Administrator = Annotated[Caller, Depends(require(Scope.ADMIN))]
Process = Annotated[Context, Depends(context_of)]


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
async def upload_placement(
    request: Request,
    response: Response,
    caller: Submitter,
    context: Process,
    devices: Annotated[
        int | None, Query(ge=1, le=1 << 20, description="Devices, for files that list slots alone.")
    ] = None,
    model: ModelName = None,
) -> dict[str, Any]:
    """Store a placement: read by the rules of its format, and kept in our own form.

    The id is the digest of the stored file; a file in our form is stored byte for byte.
    """
    check_content_type(request, PLACEMENT_TYPES)
    if encoding_of(request) == "zstd":
        raise UnsupportedMediaError("Content-Encoding zstd is taken for traces alone; use gzip or none")
    most_bytes = min(limit_of(context.settings, caller), context.settings.max_body_bytes)
    with ExitStack() as stack:
        draft = stack.enter_context(context.files.draft())
        await receive_upload(request, draft, most_bytes=most_bytes)
        known = None
        if devices is None and model is None:
            known = await in_thread(context.artifacts.get, draft.digest)
        if known is None or known.kind != "placement":
            draft, found = await _inspect(request, stack, draft, devices=devices, model=model)
            known = await in_thread(context.artifacts.get, draft.digest)
        if known is not None and known.kind == "placement":
            await in_thread(context.files.keep, draft)
            await in_thread(context.artifacts.touch, [draft.digest])
            response.status_code = 200
            return artifact_document(known)
        kept = await in_thread(_keep, context, caller, draft, found)
    response.headers["Location"] = location_of(kept)
    return artifact_document(kept)


async def _inspect(
    request: Request, stack: ExitStack, draft: Draft, *, devices: int | None, model: str | None
) -> tuple[Draft, dict[str, Any]]:
    """Have a file read; return a draft with it in our form, and what is known of it."""
    context: Context = request.app.state.context
    folder = stack.enter_context(TemporaryDirectory(dir=context.files.scratch, suffix=".unpacked"))
    out = Path(folder, "placement.json")
    found = await inspector_of(request).ask(
        "placement", draft.path, model=model, devices=devices, out=str(out)
    )
    if not found["is_ours"]:
        draft = stack.enter_context(context.files.draft())
        draft.write(await in_thread(out.read_bytes))
    return draft, found


def _keep(context: Context, caller: Caller, draft: Draft, found: dict[str, Any]) -> Artifact:
    digest = context.files.keep(draft)
    kept = context.artifacts.add(
        digest=digest,
        kind="placement",
        size_bytes=draft.size_bytes,
        format="native",
        summary=found["summary"],
        created_by=caller.id,
    )
    context.audit.record(
        who=caller.id,
        action="placement.upload",
        target=digest,
        request_id=REQUEST_ID.get(),
        detail={"size_bytes": draft.size_bytes, "received_as": found["format"]},
    )
    return kept


@router.get("", responses=problems())
async def list_placements(
    caller: Reader,
    context: Process,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> dict[str, Any]:
    """List stored placements, newest first."""
    return await artifact_page(context, "placement", limit=limit, cursor=cursor)


@router.get(
    "/{placement_id}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": {"application/json": {}, "application/yaml": {}}},
        304: {"description": "The caller has it."},
        **problems(404),
    },
)
async def get_placement(
    placement_id: str,
    request: Request,
    caller: Reader,
    format: Annotated[str, Query(max_length=40, description="native, or an engine's format.")] = "native",
    model: ModelName = None,
) -> Response:
    """Return a placement file, in our form or an engine's."""
    context: Context = request.app.state.context
    await check_stored(context, placement_id, "placement")
    file = await engine_files_of(request).get(placement_id, format, model=model)
    return file_response(request, file)


@router.delete("/{placement_id}", status_code=204, responses=problems(404, 409))
async def delete_placement(placement_id: str, caller: Administrator, context: Process) -> Response:
    """Remove a placement that no solve and no deployment names."""
    await remove_artifact(context, await artifact_of(context, placement_id, "placement"), caller)
    return Response(status_code=204)
