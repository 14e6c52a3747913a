"""``/v1/deployments``: named running models, their current placement, their load, their history."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request, Response

from placement.errors import InfeasibleError, InputError
from service.api.bodies import read_body
from service.api.deployed import (
    BUSY,
    MOST_SPEC_BYTES,
    Here,
    IfMatch,
    Reader,
    Writer,
    check_name,
    deployment_of,
    revision_expected,
)
from service.api.describe import json_answer, json_body, problems
from service.api.documents import json_response
from service.api.logs import REQUEST_ID
from service.api.routes.deployment_placement import router
from service.api.stored import in_thread
from service.deployments import documents as docs
from service.deployments.posting import WindowsPosted, parse_windows
from service.deployments.records import Deployment
from service.deployments.spec import DeploymentSpec
from service.errors import ConflictError, InvalidError
from service.state.windows import KEPT_WINDOWS

__all__ = ["router"]

# -- the spec ------------------------------------------------------------------------------------------------


@router.put(
    "/{name}",
    summary="Create a deployment, or change its spec",
    response_class=Response,
    openapi_extra=json_body(DeploymentSpec, deployment=docs.DEPLOYMENT_REQUEST),
    responses={
        200: json_answer("Changed.", {docs.DeploymentDocument: docs.DEPLOYMENT}),
        201: json_answer("Created.", {docs.DeploymentDocument: docs.DEPLOYMENT}),
        **problems(409, 412, 413, 415),
    },
)
async def put_deployment(
    name: str, request: Request, caller: Writer, context: Here, if_match: IfMatch = None
) -> Response:
    """Say which model runs where, and by which policy its placement may change."""
    check_name(name)
    body = await read_body(request, DeploymentSpec, most_bytes=MOST_SPEC_BYTES)
    spec = body.model_dump(mode="json")
    spec["facts"] = await in_thread(_facts_of, spec)
    expected = revision_expected(if_match, request.headers.get("if-none-match"))

    def put() -> tuple[Deployment, bool]:
        return context.deployments.put(
            name,
            spec,
            by=caller.id,
            expected=expected,
            check=lambda found: _check_change(found, spec),
            request_id=REQUEST_ID.get(),
        )

    found, created = await in_thread(put)
    context.watcher.nudge("deployment", name)
    return _deployment_response(found, 201 if created else 200)


def _facts_of(spec: dict[str, Any]) -> dict[str, Any]:
    from service.deployments.resolve import facts_of

    try:
        return facts_of(spec)
    except (InputError, InfeasibleError) as exc:
        raise InvalidError(str(exc)) from exc


def _check_change(found: Deployment, spec: dict[str, Any]) -> None:
    """Refuse a spec that the placement which runs would not fit."""
    if found.version is None:
        return
    old, new = found.spec["facts"], spec["facts"]
    for key in ("layers", "experts", "devices"):
        if old[key] != new[key]:
            raise ConflictError(
                f"deployment {found.name} runs a placement of {old[key]} {key}, the new spec has {new[key]}; "
                "make another deployment, or delete this one first"
            )
    if new["slots"] < old["slots"]:
        raise ConflictError(
            f"deployment {found.name} runs a placement in {old['slots']} slots, the new spec has "
            f"{new['slots']}; make another deployment, or delete this one first"
        )


@router.get(
    "",
    summary="List deployments",
    response_class=Response,
    responses={
        200: json_answer("A page.", {docs.DeploymentPage: {"items": [docs.DEPLOYMENT], "next_cursor": None}}),
        **problems(),
    },
)
async def list_deployments(
    caller: Reader,
    context: Here,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Annotated[
        str | None, Query(max_length=64, pattern=r"^[A-Za-z0-9._-]*$", description="`next_cursor`.")
    ] = None,
) -> Response:
    """List deployments in order of their names."""
    found = await in_thread(context.deployments.page, after=cursor or "", limit=limit + 1)
    following = found[limit - 1].name if len(found) > limit else None
    items = [docs.deployment_document(one) for one in found[:limit]]
    return json_response({"items": items, "next_cursor": following})


@router.get(
    "/{name}",
    summary="Look at a deployment",
    response_class=Response,
    responses={
        200: json_answer("The deployment.", {docs.DeploymentDocument: docs.DEPLOYMENT}),
        **problems(404),
    },
)
async def get_deployment(name: str, caller: Reader, context: Here) -> Response:
    """Return spec, current version, drift, and where its refresh is."""
    return _deployment_response(await deployment_of(context, name))


@router.get(
    "/{name}/drift",
    summary="Look at the drift of a deployment",
    response_class=Response,
    responses={
        200: json_answer("What recent windows say.", {docs.DriftDocument: docs.DRIFT}),
        **problems(404),
    },
)
async def get_drift(name: str, caller: Reader, context: Here) -> Response:
    """Return what recent load windows say of the current placement; null before there are any."""
    found = docs.deployment_document(await deployment_of(context, name))
    return json_response({key: found[key] for key in ("name", "version", "drift", "refresh")})


@router.delete("/{name}", summary="Remove a deployment", status_code=204, responses=problems(404, 412))
async def delete_deployment(name: str, caller: Writer, context: Here, if_match: IfMatch = None) -> Response:
    """Remove a deployment with its history and its windows; placements stay."""
    check_name(name)
    expected = revision_expected(if_match, None)
    await in_thread(
        context.deployments.remove, name, by=caller.id, expected=expected, request_id=REQUEST_ID.get()
    )
    context.watcher.nudge("deployment", name)
    return Response(status_code=204)


# -- the load ------------------------------------------------------------------------------------------------


@router.post(
    "/{name}/windows",
    summary="Post load windows",
    status_code=202,
    response_class=Response,
    openapi_extra=json_body(WindowsPosted, windows=docs.WINDOWS_REQUEST),
    responses={202: json_answer("Stored.", {docs.WindowsTaken: docs.WINDOWS_TAKEN}), **BUSY},
)
async def post_windows(name: str, request: Request, caller: Writer, context: Here) -> Response:
    """Take what one rank counted: token-expert pairs of logical experts, window by window.

    The answer names the current version of the placement, so that ranks learn of changes as they post. The
    same part again changes nothing; with other content it is a conflict.
    """
    found = await deployment_of(context, name)
    body = await request.body()

    def take() -> dict[str, Any]:
        facts, policy = found.spec["facts"], found.spec["policy"]
        parts = parse_windows(body, facts=facts, num_ranks=found.spec["num_ranks"])
        keep = max(KEPT_WINDOWS, 2 * (policy["min_windows"] + policy["judge_windows"]))
        added = context.deployments.windows.add(name, parts, facts=facts, keep=keep)
        return {
            "stored": added.stored,
            "known": added.known,
            "version": added.version,
            "revision": added.revision,
        }

    return json_response(await in_thread(take), 202)


def _deployment_response(found: Deployment, status: int = 200) -> Response:
    headers = {"ETag": f'"r{found.revision}"', "Cache-Control": "no-store"}
    if status == 201:
        headers["Location"] = f"/v1/deployments/{found.name}"
    return json_response(docs.deployment_document(found), status, headers=headers)
