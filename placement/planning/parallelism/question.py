"""What is asked: a job, a cluster, what may be chosen, and the routing that experts are placed for."""

from __future__ import annotations

from dataclasses import dataclass

from placement.calibration import Calibration, DataSheetCalibration
from placement.errors import InputError
from placement.planning.parallelism.job import TrainingJob
from placement.planning.parallelism.network import MESSAGE_S
from placement.planning.parallelism.search import SearchRanges
from placement.problem import Objective
from placement.profile import RoutingProfile
from placement.topology import Topology

__all__ = ["ExpertTraffic", "ParallelismQuestion"]

DATA_SHEET = DataSheetCalibration()
ALL_RANGES = SearchRanges()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertTraffic:
    """Routing that the experts of the best strategies are placed for.

    Parameters
    ----------
    profile
        Loads in windows: every other one is fitted, the rest held out.
    groups
        How many kinds of expert-parallel group get a placement; strategies with alike groups share it.
    objective
        ``balance`` or ``step-time``.
    max_swaps
        Limit of Piper's hill climbing for each layer; None for no limit.
    interval_steps
        Steps between migrations; None for the fewest that Piper's limit allows.
    seed, work_s
        Of our solver.

    Raises
    ------
    InputError
        If a number is out of range or the objective is ``traffic``.
    """

    profile: RoutingProfile
    groups: int = 4
    objective: Objective = Objective.BALANCE
    max_swaps: int | None = None
    interval_steps: int | None = None
    seed: int = 0
    work_s: float | None = None

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise InputError(f"placements are asked for {self.groups} groups; it must be 1 or more")
        if self.objective is Objective.TRAFFIC:
            raise InputError("experts are placed for balance or step-time, not for traffic")
        for name in ("max_swaps", "interval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParallelismQuestion:
    """What is asked of `plan_parallelism`.

    Parameters
    ----------
    job
        What is trained.
    topology
        Alike devices; every mesh takes all of them.
    calibration
        Curves of experts and exchanges, as placement uses them.
    ranges
        What may be chosen.
    memory_bytes
        What a device may hold; None for its kind's memory.
    fast_domain
        Devices that expert parallelism must not leave; None for a group of the second tier where there are
        three or more, else all devices.
    attention_flops
        Measured FLOP/s in attention and dense layers; None for the kind's achieved FLOP/s.
    message_s
        What one message over the network costs beside its bytes, seconds.
    traffic
        Routing for the experts; None to take loads for balanced.

    Raises
    ------
    InputError
        If a figure is out of range.
    """

    job: TrainingJob
    topology: Topology
    calibration: Calibration = DATA_SHEET
    ranges: SearchRanges = ALL_RANGES
    memory_bytes: int | None = None
    fast_domain: int | None = None
    attention_flops: float | None = None
    message_s: float = MESSAGE_S
    traffic: ExpertTraffic | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "fast_domain", "attention_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}; it must be positive")
        if not 0 <= self.message_s < float("inf"):
            raise InputError(f"message_s is {self.message_s}; it must be 0 or more")

        if self.traffic is not None:
            self._check_traffic(self.traffic.profile)

    def _check_traffic(self, profile: RoutingProfile) -> None:
        model = self.job.transformer.moe
        for what, its, seen in (
            ("MoE layers", model.num_layers, profile.num_layers),
            ("experts", model.num_experts, profile.num_experts),
            ("experts per token", model.top_k, profile.top_k),
        ):
            if its != seen:
                raise InputError(
                    f"the trace has {seen} {what}, model {model.name} has {its}; give routing of this model"
                )

    @property
    def device_memory_bytes(self) -> int:
        """What a device may hold."""
        return self.topology.kind_of(0).memory_bytes if self.memory_bytes is None else self.memory_bytes

    @property
    def fast_domain_devices(self) -> int:
        """Devices that expert parallelism must not leave."""
        if self.fast_domain is not None:
            return self.fast_domain
        tier = 1 if self.topology.num_tiers > 2 else -1
        return int(self.topology.group_sizes[tier][0])
