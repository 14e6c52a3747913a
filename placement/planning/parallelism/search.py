"""Enumerates strategies: which meshes there are, which fit, and how fast each is.

Every mesh of the devices is looked at. What is impossible or does not fit is kept with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.calibration import Calibration
from placement.devices import DeviceKind
from placement.errors import InputError
from placement.planning.parallelism.compute import DeviceSpeed, device_speed
from placement.planning.parallelism.job import TrainingJob
from placement.planning.parallelism.layers import StageLayers, stage_layers
from placement.planning.parallelism.memory import StageMemory, stage_memory
from placement.planning.parallelism.network import Network
from placement.planning.parallelism.step import StepTime, step_time
from placement.planning.parallelism.strategy import Checkpointing, Exchange, Mesh, Strategy

__all__ = [
    "Candidate",
    "Machine",
    "Reason",
    "Rejection",
    "SearchRanges",
    "SearchResult",
    "closest_to_fitting",
    "least_memory",
    "search_strategies",
    "timed",
]

FloatArray = npt.NDArray[np.float64]


class Reason(StrEnum):
    """Why a mesh is not taken."""

    RANGE = "outside the ranges that were asked for"
    LAYERS = "more stages than layers"
    EXPERTS = "expert parallelism does not divide the experts"
    TENSOR = "tensor parallelism does not divide heads and experts' width, or leaves the node"
    DOMAIN = "expert parallelism leaves the fast domain"
    BATCH = "the global batch does not divide over the devices with sequences of their own"
    SCHEDULE = "no schedule of the ranges suits its stages and micro-batches"
    MEMORY = "too little memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRanges:
    """What may be chosen; an empty range allows whatever divides.

    Parameters
    ----------
    pipeline, expert, tensor, data
        Sizes of the mesh.
    micro_batch
        Sequences of a micro-batch.
    virtual_stages
        Parts of the model on each device.
    checkpointing, exchange
        What is kept for the backward pass, and how tokens travel.

    Raises
    ------
    InputError
        If a number is below 1, or a range that must not be empty is.
    """

    pipeline: tuple[int, ...] = ()
    expert: tuple[int, ...] = ()
    tensor: tuple[int, ...] = (1,)
    data: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = (1, 2, 4)
    virtual_stages: tuple[int, ...] = (1, 2)
    checkpointing: tuple[Checkpointing, ...] = tuple(Checkpointing)
    exchange: tuple[Exchange, ...] = tuple(Exchange)

    def __post_init__(self) -> None:
        for name in ("pipeline", "expert", "tensor", "data", "micro_batch", "virtual_stages"):
            values = getattr(self, name)
            if any(value < 1 for value in values):
                raise InputError(f"range {name} is {list(values)}; every number must be 1 or more")
        for name in ("micro_batch", "virtual_stages", "checkpointing", "exchange"):
            if not getattr(self, name):
                raise InputError(f"range {name} is empty; it needs one choice or more")

    def admits(self, mesh: Mesh) -> bool:
        """Return whether a mesh's sizes lie within the ranges."""
        return all(
            not allowed or size in allowed
            for size, allowed in (
                (mesh.pipeline, self.pipeline),
                (mesh.expert, self.expert),
                (mesh.tensor, self.tensor),
                (mesh.data, self.data),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidate:
    """A strategy that fits.

    Parameters
    ----------
    strategy, layers, memory, step
        The strategy, its stages, what they hold, and what a step takes.
    utilisation
        Model FLOPs over what the devices' peak would do in that time (MFU).
    """

    strategy: Strategy
    layers: StageLayers
    memory: StageMemory
    step: StepTime
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A mesh that is not taken.

    Parameters
    ----------
    mesh, reason
        The mesh and why.
    strategy
        For memory: the strategy on that mesh that comes closest.
    peak_bytes, missing_bytes
        For memory: what its fullest stage needs, and how much more than there is.
    """

    mesh: Mesh
    reason: Reason
    strategy: Strategy | None = None
    peak_bytes: float = 0.0
    missing_bytes: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        values: dict[str, Any] = {"mesh": self.mesh.to_dict(), "reason": str(self.reason)}
        if self.strategy is not None:
            values["strategy"] = self.strategy.to_dict()
            values["peak_bytes"], values["missing_bytes"] = self.peak_bytes, self.missing_bytes
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All strategies that fit, best first, and all meshes that are not taken.

    Parameters
    ----------
    candidates, rejections
        What fits and what does not.
    num_meshes, num_strategies
        Meshes and strategies that were looked at.
    """

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    num_meshes: int
    num_strategies: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Machine:
    """The devices that a search is for.

    Parameters
    ----------
    kind, calibration, network
        The devices, their curves, and what joins them.
    memory_bytes
        What a device may hold.
    fast_domain
        Devices of a fast single-hop domain, which expert parallelism must not leave.
    attention_flops
        Measured FLOP/s in attention; None for the kind's achieved FLOP/s.
    """

    kind: DeviceKind
    calibration: Calibration
    network: Network
    memory_bytes: int
    fast_domain: int
    attention_flops: float | None = None

    def speed(self, job: TrainingJob, tensor: int) -> DeviceSpeed:
        """Return a device's speed on experts that are split over `tensor` devices."""
        return device_speed(
            self.kind, self.calibration, job, tensor=tensor, attention_flops=self.attention_flops
        )


def search_strategies(
    job: TrainingJob, machine: Machine, ranges: SearchRanges, *, num_devices: int
) -> SearchResult:
    """Look at all strategies on a number of devices; the fastest come first, simpler ones among equals."""
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    speeds: dict[int, DeviceSpeed] = {}
    num_meshes = num_strategies = 0
    for mesh in _meshes(num_devices):
        num_meshes += 1
        reason = _impossible(job, mesh, ranges, node=machine.network.node_size, domain=machine.fast_domain)
        if reason is not None:
            rejections.append(Rejection(mesh=mesh, reason=reason))
            continue
        if mesh.tensor not in speeds:
            speeds[mesh.tensor] = machine.speed(job, mesh.tensor)
        fitting, nearest, looked_at = _on_mesh(job, mesh, machine, ranges, speeds[mesh.tensor])
        num_strategies += looked_at
        candidates += fitting
        if not fitting:
            rejections.append(nearest)
    # Sorting keeps the order of enumeration among equals: less checkpointing, flat exchange first.
    candidates.sort(key=lambda candidate: -candidate.utilisation)
    return SearchResult(
        candidates=tuple(candidates),
        rejections=tuple(rejections),
        num_meshes=num_meshes,
        num_strategies=num_strategies,
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _meshes(num_devices: int) -> Iterator[Mesh]:
    for pipeline in _divisors(num_devices):
        for tensor in _divisors(num_devices // pipeline):
            for expert in _divisors(num_devices // pipeline // tensor):
                data = num_devices // (pipeline * tensor * expert)
                yield Mesh(pipeline=pipeline, expert=expert, tensor=tensor, data=data)


def _impossible(
    job: TrainingJob, mesh: Mesh, ranges: SearchRanges, *, node: int, domain: int
) -> Reason | None:
    """Return why a mesh is impossible, None where it is not."""
    shape, moe = job.transformer, job.transformer.moe
    if not ranges.admits(mesh):
        return Reason.RANGE
    if mesh.pipeline > shape.num_layers:
        return Reason.LAYERS
    if moe.num_experts % mesh.expert:
        return Reason.EXPERTS
    if shape.num_attention_heads % mesh.tensor or moe.expert_hidden_size % mesh.tensor or node % mesh.tensor:
        return Reason.TENSOR
    if mesh.expert * mesh.tensor > domain:
        return Reason.DOMAIN
    if not _micro_batches(job, mesh, ranges.micro_batch):
        return Reason.BATCH
    return None


def _micro_batches(job: TrainingJob, mesh: Mesh, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return sizes and numbers of micro-batches into which the global batch divides."""
    return [
        (size, job.global_batch // (mesh.num_sources * size))
        for size in sizes
        if job.global_batch % (mesh.num_sources * size) == 0
    ]


def _strategies(job: TrainingJob, mesh: Mesh, ranges: SearchRanges) -> Iterator[Strategy]:
    """Yield what can be chosen on a mesh; how tokens travel is left open."""
    choices = list(ranges.checkpointing)
    if job.flash_attention and Checkpointing.NONE in choices:
        # FlashAttention keeps no scores that could be dropped.
        choices = [choice for choice in choices if choice is not Checkpointing.SELECTIVE]
    sizes = _micro_batches(job, mesh, ranges.micro_batch)
    for (size, count), parts in itertools.product(sizes, ranges.virtual_stages):
        whole_rounds = mesh.pipeline > 1 and count % mesh.pipeline == 0
        if parts > 1 and not (whole_rounds and parts * mesh.pipeline <= job.transformer.num_layers):
            continue
        for checkpointing in choices:
            yield Strategy(
                mesh=mesh,
                micro_batch=size,
                num_micro_batches=count,
                virtual_stages=parts,
                checkpointing=checkpointing,
            )


def _on_mesh(
    job: TrainingJob, mesh: Mesh, machine: Machine, ranges: SearchRanges, speed: DeviceSpeed
) -> tuple[list[Candidate], Rejection, int]:
    """Return what fits on a mesh, what comes closest to fitting, and how many strategies there were."""
    fitting: list[Candidate] = []
    nearest: tuple[float, Strategy] | None = None
    layers: dict[int, StageLayers] = {}
    looked_at = 0
    for strategy in _strategies(job, mesh, ranges):
        parts = strategy.virtual_stages
        if parts not in layers:
            layers[parts] = stage_layers(job.transformer.moe, pipeline=mesh.pipeline, virtual_stages=parts)
        looked_at += 1
        memory = stage_memory(job, strategy, layers[parts])
        if memory.peak_bytes <= machine.memory_bytes:
            for exchange in _exchanges(mesh, machine.network, ranges):
                chosen = replace(strategy, exchange=exchange)
                fitting.append(timed(job, chosen, layers[parts], memory, machine=machine, speed=speed))
        elif nearest is None or memory.peak_bytes < nearest[0]:
            nearest = memory.peak_bytes, strategy
    return fitting, _too_large(mesh, nearest, machine.memory_bytes), looked_at


def _exchanges(mesh: Mesh, network: Network, ranges: SearchRanges) -> tuple[Exchange, ...]:
    """Return how tokens may travel; within one node both ways are the same."""
    in_node = network.members(count=mesh.expert, stride=mesh.tensor)[0] == mesh.expert
    return ranges.exchange[:1] if in_node else ranges.exchange


def _too_large(mesh: Mesh, nearest: tuple[float, Strategy] | None, memory_bytes: int) -> Rejection:
    if nearest is None:
        return Rejection(mesh=mesh, reason=Reason.SCHEDULE)
    peak_bytes, strategy = nearest
    return Rejection(
        mesh=mesh,
        reason=Reason.MEMORY,
        strategy=strategy,
        peak_bytes=peak_bytes,
        missing_bytes=peak_bytes - memory_bytes,
    )


def timed(
    job: TrainingJob,
    strategy: Strategy,
    layers: StageLayers,
    memory: StageMemory,
    *,
    machine: Machine,
    speed: DeviceSpeed,
    factor_L: FloatArray | float = 1.0,
) -> Candidate:
    """Return a strategy with the time of its step, for balanced loads or given factors of the layers."""
    step = step_time(job, strategy, layers, speed=speed, network=machine.network, factor_L=factor_L)
    peak = strategy.mesh.num_devices * speed.peak_flops
    return Candidate(
        strategy=strategy,
        layers=layers,
        memory=memory,
        step=step,
        utilisation=job.model_flops_per_step / (peak * step.total_s),
    )


def least_memory(
    job: TrainingJob, machine: Machine, ranges: SearchRanges, *, num_devices: int, fast_domain: int
) -> Strategy | None:
    """Return the strategy that fits a number of devices with the most memory to spare; None for none."""
    best: tuple[float, Strategy] | None = None
    for mesh in _meshes(num_devices):
        if _impossible(job, mesh, ranges, node=machine.network.node_size, domain=fast_domain) is not None:
            continue
        for strategy in _strategies(job, mesh, ranges):
            layers = stage_layers(
                job.transformer.moe, pipeline=mesh.pipeline, virtual_stages=strategy.virtual_stages
            )
            peak_bytes = stage_memory(job, strategy, layers).peak_bytes
            if peak_bytes <= machine.memory_bytes and (best is None or peak_bytes < best[0]):
                best = peak_bytes, strategy
    return None if best is None else best[1]


def closest_to_fitting(result: SearchResult) -> Rejection | None:
    """Return the mesh that misses the least memory; None where none failed for memory."""
    short = [rejection for rejection in result.rejections if rejection.reason is Reason.MEMORY]
    return min(short, key=lambda rejection: rejection.missing_bytes, default=None)
