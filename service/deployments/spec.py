"""What a deployment is: cluster, model, options, and the policy by which its placement may change."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.schemas import ProblemOptions, ShortText, TopologyDocument

__all__ = ["DeploymentName", "DeploymentOptions", "DeploymentSpec", "Policy", "RefreshSolve"]

DeploymentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DeploymentOptions(ProblemOptions):
    """Options of the deployment's problem, named as on the command line."""

    spare_slots: int = Field(default=0, ge=0, le=1_000_000)
    fill_memory: bool = False


class RefreshSolve(_Strict):
    """How an automatic refresh solves."""

    time_limit: float = Field(default=30.0, gt=0, le=1e6)
    """Seconds."""
    solver: ShortText = "auto"
    seed: int = Field(default=0, ge=0, le=(1 << 63) - 1)
    threads: int = Field(default=1, ge=1, le=1024)


class Policy(_Strict):
    """When a placement is computed anew, and when the new one is promoted."""

    mode: Literal["manual", "auto"] = "manual"
    """``manual``: drift is tracked, and nothing else happens by itself."""
    drift_threshold: float = Field(default=0.1, gt=0, le=1e6)
    """A refresh starts where the balance is worse than promised by this share."""
    max_pay_back_steps: float | None = Field(default=None, gt=0, le=1e15)
    """Steps after which saved time must have made up for the transfer."""
    max_pay_back_seconds: float | None = Field(default=None, gt=0, le=1e15)
    """The same as time: steps times the predicted time of a step."""
    cool_down_seconds: float = Field(default=600.0, ge=0, le=1e9)
    """Time between the end of one refresh, however it ended, and the start of the next one."""
    max_moves: int | None = Field(default=None, ge=1, le=1 << 31)
    """Expert copies that devices may receive in one refresh, over all layers."""
    min_gain: float = Field(default=0.02, ge=0, lt=1)
    """Least gain in balance, on windows not fitted, that is worth a change."""
    min_windows: int = Field(default=8, ge=2, le=256)
    """Complete windows since the last change that a refresh needs; half of them are fitted."""
    judge_windows: int = Field(default=8, ge=1, le=256)
    """Windows after a promotion on which it is compared with the placement before it."""
    rollback: bool = True
    """Whether an automatic promotion that turns out worse is taken back."""
    window_steps: int = Field(default=1, ge=1, le=1 << 31)
    """Steps of the engine that one window sums up: what turns loads into the time of a step."""
    solve: RefreshSolve = RefreshSolve()


class DeploymentSpec(_Strict):
    """Body of ``PUT /v1/deployments/{name}``."""

    topology: TopologyDocument
    model: ShortText | dict[str, Any]
    """A preset's name, the fields of a model file, or ``{"layers", "experts", "top_k"}`` without sizes."""
    options: DeploymentOptions = DeploymentOptions()
    num_ranks: int = Field(default=1, ge=1, le=65536)
    """Ranks that post load windows: a window is complete once it has a part of each."""
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _check(self) -> DeploymentSpec:
        if self.options.fill_memory and self.options.spare_slots:
            raise ValueError("options.fill_memory fills the memory already; leave out options.spare_slots")
        return self
