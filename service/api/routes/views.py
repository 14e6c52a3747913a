"""Figures and grids of stored things, for the dashboard and for whoever wants to draw them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from service.api.answers import answer_response
from service.api.context import Context, context_of
from service.api.deployed import deployment_of
from service.api.describe import PLACEMENT_ID, TRACE_ID, json_answer, problems
from service.api.security import Caller, Scope, require
from service.api.stored import artifact_of, check_stored
from service.api.views import views_of
from service.api.waiting import job_of

__all__ = ["router"]

router = APIRouter()

Reader = Annotated[Caller, Depends(require(Scope.READ))]
Here = Annotated[Context, Depends(context_of)]

_FIGURE: dict[str, Any] = {"data": [{"type": "scatter", "x": [0.5, 2.0], "y": [1.4, 1.1]}], "layout": {}}
_KNOWN: dict[int | str, dict[str, Any]] = {304: {"description": "The caller has it already."}}


class FigureDocument(BaseModel):
    """A picture and its words."""

    title: str = Field(description="Plain text.")
    caption: str = Field(description="Plain text: what it shows; without a figure, what to do.")
    figure: dict[str, Any] | None = Field(description="Data and layout for plotly; null before there is any.")


class NamedFigure(FigureDocument):
    """One picture of several."""

    name: str


class TraceFigures(BaseModel):
    """A trace at a glance."""

    facts: dict[str, str] = Field(description="Plain text by label.")
    figures: list[NamedFigure]


class GridDocument(BaseModel):
    """A placement, layer by layer."""

    num_layers: int
    num_experts: int
    num_devices: int
    num_slots: int = Field(description="Slots of one layer, on all devices.")
    model_name: str | None
    moe_layer_ids: list[int] = Field(description="Decoder layer of each MoE layer.")
    device_of_slot: list[int]
    expert_LS: list[list[int]] = Field(description="Expert of each layer's slots; -1 is an empty one.")
    load_LE: list[list[float]] | None = Field(
        description="Load of each layer's experts over the mean load of a device there; null without a trace."
    )
    load_LD: list[list[float]] | None = Field(
        description="Load of each layer's devices over their mean; replicas of an expert share evenly."
    )
    balance_L: list[float] | None = Field(description="Fullest device over the mean, by layer.")


class CopyDocument(BaseModel):
    """A copy of an expert that a device must receive."""

    layer: int
    expert: int
    from_device: int | None = Field(description="The nearest by number of those that hold it.")
    to_device: int


class MovesDocument(BaseModel):
    """What must be copied to get from one placement to another."""

    num_moves: int
    moved_share: float = Field(description="Moves over experts held, replicas included.")
    moves: list[CopyDocument] = Field(description="In order of layers; the first 10,000.")


_CURVE = {"title": "Best objective and lower bound", "caption": "After 2 s ...", "figure": _FIGURE}
_GRID = {
    "num_layers": 1,
    "num_experts": 4,
    "num_devices": 2,
    "num_slots": 4,
    "model_name": None,
    "moe_layer_ids": [0],
    "device_of_slot": [0, 0, 1, 1],
    "expert_LS": [[0, 3, 1, 2]],
    "load_LE": [[0.8, 0.5, 0.4, 0.3]],
    "load_LD": [[1.1, 0.9]],
    "balance_L": [1.1],
}
_MOVES = {
    "num_moves": 1,
    "moved_share": 0.25,
    "moves": [{"layer": 0, "expert": 3, "from_device": 1, "to_device": 0}],
}


@router.get(
    "/v1/solves/{solve_id}/figure",
    tags=["solves"],
    summary="Draw the curve of a solve",
    response_class=Response,
    responses={200: json_answer("The figure.", {FigureDocument: _CURVE}), **_KNOWN, **problems(404)},
)
async def draw_solve(solve_id: str, request: Request, caller: Reader, context: Here) -> Response:
    """Return the best objective and the lower bound over time, as far as the solve has come."""
    job = await job_of(context, solve_id, "s")
    return answer_response(request, await views_of(request).solve(job))


@router.get(
    "/v1/traces/{trace_id}/figures",
    tags=["traces"],
    summary="Draw a trace at a glance",
    response_class=Response,
    responses={
        200: json_answer(
            "Facts and figures.",
            {
                TraceFigures: {
                    "facts": {"Experts never selected": "0 of 96"},
                    "figures": [{"name": "load", **_CURVE, "title": "Load by layer and expert"}],
                }
            },
        ),
        **_KNOWN,
        **problems(404),
    },
)
async def draw_trace(trace_id: str, request: Request, caller: Reader, context: Here) -> Response:
    """Return load by layer and expert, and by window; of a large trace evenly spaced stretches are read."""
    trace = await artifact_of(context, trace_id, "trace")
    return answer_response(request, await views_of(request).trace(trace))


@router.get(
    "/v1/deployments/{name}/figure",
    tags=["deployments"],
    summary="Draw the health of a deployment",
    response_class=Response,
    responses={200: json_answer("The figure.", {FigureDocument: _CURVE}), **_KNOWN, **problems(404, 409)},
)
async def draw_deployment(name: str, request: Request, caller: Reader, context: Here) -> Response:
    """Return the balance of posted windows under the versions that ran, against what was predicted.

    Before there is anything to draw `figure` is null, and `caption` says what to do.
    """
    deployment = await deployment_of(context, name)
    return answer_response(request, await views_of(request).deployment(deployment))


@router.get(
    "/v1/placements/{placement_id}/grid",
    tags=["placements"],
    summary="Look at a placement as a grid",
    response_class=Response,
    responses={200: json_answer("The grid.", {GridDocument: _GRID}), **_KNOWN, **problems(404, 409)},
)
async def get_grid(
    placement_id: str,
    request: Request,
    caller: Reader,
    context: Here,
    trace_id: Annotated[
        str | None, Query(max_length=80, description=f"Trace whose loads are shown, such as {TRACE_ID}.")
    ] = None,
) -> Response:
    """Return which expert sits where, and with a trace of the same model the load of experts and devices."""
    await check_stored(context, placement_id, "placement")
    trace = None if trace_id is None else await artifact_of(context, trace_id, "trace")
    return answer_response(request, await views_of(request).grid(placement_id, trace))


@router.get(
    "/v1/placements/{placement_id}/moves",
    tags=["placements"],
    summary="List what must be copied to get to a placement",
    response_class=Response,
    responses={200: json_answer("The moves.", {MovesDocument: _MOVES}), **_KNOWN, **problems(404, 409)},
)
async def get_moves(
    placement_id: str,
    request: Request,
    caller: Reader,
    context: Here,
    before: Annotated[
        str,
        Query(
            alias="from", max_length=80, description=f"Placement that runs before, such as {PLACEMENT_ID}."
        ),
    ],
) -> Response:
    """Return the copies of experts that devices must receive, as a deployment would make them.

    Devices keep their numbers: none is relabelled, since a new placement names the very devices that are to
    hold its experts.
    """
    for digest in (placement_id, before):
        await check_stored(context, digest, "placement")
    return answer_response(request, await views_of(request).moves(before, placement_id))
