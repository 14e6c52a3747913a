"""What callers ask for: the bodies of solves and evaluations, checked before anything is read or queued."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = [
    "Digest",
    "EvaluationRequest",
    "ProblemOptions",
    "SolveOptions",
    "SolveRequest",
    "TopologyDocument",
]

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""Id of a trace or a placement: the digest of its bytes."""

ShortText = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]

TopologyDocument = Annotated[str, StringConstraints(min_length=1, max_length=1000)] | dict[str, Any]
"""``KIND:NODESxDEVICES``, or the contents of a topology file as an object; never a path."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProblemOptions(_Strict):
    """Options that make the problem, named as on the command line."""

    semantics: Literal["dispatch", "dispatch-nodedup", "stay-put", "allgather"] = "dispatch"
    objective: Literal["step-time", "balance", "traffic"] = "step-time"
    window: int | None = Field(default=None, ge=1, le=1 << 31)
    risk: Literal["mean", "p95", "cvar95"] = "mean"
    max_imbalance: float = Field(default=1.05, ge=1, le=1e6)
    replica_split: Literal["even", "nearest", "hash", "lp"] = "even"
    calibration: dict[str, Any] | None = None
    """Contents of a calibration file."""
    sample: int | None = Field(default=None, ge=1, le=1 << 40)
    source_format: ShortText | None = None
    """Insist on a trace format (``--from``)."""


class SolveOptions(ProblemOptions):
    """Options of a solve, named as on the command line."""

    spare_slots: int = Field(default=0, ge=0, le=1_000_000)
    fill_memory: bool = False
    solver: ShortText = "auto"
    time_limit: float | None = Field(default=None, gt=0, le=1e7)
    threads: int = Field(default=1, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, le=(1 << 63) - 1)
    max_moves: int | None = Field(default=None, ge=0, le=1 << 31)


class SolveRequest(_Strict):
    """Body of ``POST /v1/solves``."""

    trace_id: Digest
    topology: TopologyDocument
    model: ShortText | dict[str, Any] | None = None
    """A preset's name, or the fields of a model file as an object; default: the trace's own."""
    start_placement_id: Annotated[str, StringConstraints(min_length=1, max_length=80)] | None = None
    """A placement's id, or that of a solve whose placement to start from."""
    options: SolveOptions = SolveOptions()
    priority: int = Field(default=0, ge=-100, le=100)
    validate_only: bool = False


class EvaluationRequest(_Strict):
    """Body of ``POST /v1/evaluations``."""

    placement_id: Annotated[str, StringConstraints(min_length=1, max_length=80)]
    """A placement's id, or that of a solve."""
    trace_id: Digest
    topology: TopologyDocument
    model: ShortText | dict[str, Any] | None = None
    options: ProblemOptions = ProblemOptions()
