"""Plans a mixed cluster: which devices compute attention and which experts, in how many micro-batches.

Every way to give the devices roles in equal groups is bounded; those whose bound beats the best answer so far
are searched, best bound first. What is left out is therefore better by a thousandth at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement._arrays import FloatArray
from placement.errors import InfeasibleError, InputError
from placement.planning.hetero.assignment import GroupTimes, contiguous_assignment
from placement.planning.hetero.asymmetric import AsymmetricOffload
from placement.planning.hetero.baselines import dist_ep_s, ep_ideal_s, ep_s
from placement.planning.hetero.device_class import DeviceClass
from placement.planning.hetero.group import ZebraGroup, all_groups
from placement.planning.hetero.job import HeteroJob
from placement.planning.hetero.program import fluid_bound_s
from placement.planning.hetero.search import NEAR, GroupAnswer, algorithm_1, search
from placement.planning.hetero.zebra import Schedule, fastest_schedule, makespan_s, simulate

__all__ = ["Contender", "HeteroPlan", "plan_hetero"]

GIB = 2.0**30

OURS = "plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to use the cluster, and the seconds of a step.

    Parameters
    ----------
    name
        What it is.
    step_s
        Seconds of a step; None where it is undefined on this cluster.
    attention_use, expert_use
        Share of the step in which the sides compute; None where there are no sides.
    note
        Roles that it takes, or why it is undefined.
    """

    name: str
    step_s: float | None
    attention_use: float | None = None
    expert_use: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the contender as plain values."""
        return {
            "name": self.name,
            "step_s": self.step_s,
            "attention_utilisation": self.attention_use,
            "expert_utilisation": self.expert_use,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeteroPlan:
    """What to do with a mixed cluster.

    Parameters
    ----------
    classes, job
        The question.
    answer
        Roles, micro-batches and assignment of experts.
    schedule
        Simulated step of one group.
    contenders
        This plan and what it was compared with.
    asymmetric
        What Algorithm 1 as printed says on the plan's own roles.
    num_candidates, num_searched, num_unfit
        Combinations of roles and micro-batches; how many of them were searched; how many do not fit memory.
    cluster_bound_s
        No roles, micro-batches and assignment among the candidates make a shorter step.
    held_out_s
        Simulated seconds of a step under loads that the plan has not seen; None where none were given.
    warnings
        What to beware of.
    """

    classes: tuple[DeviceClass, ...]
    job: HeteroJob
    answer: GroupAnswer
    schedule: Schedule
    contenders: tuple[Contender, ...]
    asymmetric: AsymmetricOffload
    num_candidates: int
    num_searched: int
    num_unfit: int
    cluster_bound_s: float
    held_out_s: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def group(self) -> ZebraGroup:
        """Roles of the devices."""
        return self.answer.times.group

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the cluster."""
        return self.job.tokens_per_step / self.answer.makespan_s

    def speed_up(self, name: str) -> float | None:
        """Return how many times faster the plan is than a contender; None where that is undefined."""
        step_s = next(its.step_s for its in self.contenders if its.name == name)
        return None if step_s is None else step_s / self.answer.makespan_s

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values: JSON-ready, the same for the same question."""
        from placement.planning.hetero.writing import plan_to_dict

        return plan_to_dict(self)


def plan_hetero(
    classes: Sequence[DeviceClass],
    job: HeteroJob,
    *,
    groups: Sequence[ZebraGroup] | None = None,
    held_out_LE: FloatArray | None = None,
) -> HeteroPlan:
    """Plan a mixed cluster.

    Parameters
    ----------
    classes
        The devices.
    job
        What a step computes.
    groups
        Roles to choose among; None for every way to give all devices roles in equal groups.
    held_out_LE
        Other loads, ``[layers, experts]``, under which the plan is priced as well.

    Raises
    ------
    InputError
        If two classes share a name, or there is no way to fill both roles.
    InfeasibleError
        If the experts fit under no roles, with the bytes that are missing and what would be enough.
    """
    classes = tuple(classes)
    if not classes or len({its.name for its in classes}) != len(classes):
        raise InputError("a mixed cluster needs classes of devices, each with a name of its own")
    chosen = list(all_groups(classes)) if groups is None else list(groups)
    if not chosen:
        raise InputError("one device cannot fill both roles; zebra parallelism needs two or more")
    fitting = [group for group in chosen if _missing_bytes(group, job) == 0]
    if not fitting:
        raise InfeasibleError(_why_unfit(chosen, job))
    times = [
        GroupTimes(group=group, job=job, num_micro_batches=number)
        for group in fitting
        for number in job.micro_batches
    ]
    answer, searched, bound_s = _best(times)
    stages = answer.times.stages(*answer.times.side_times(answer.device_LE))
    schedule = simulate(stages, num_micro_batches=answer.times.num_micro_batches, lag=answer.lag)
    return HeteroPlan(
        classes=classes,
        job=job,
        answer=answer,
        schedule=schedule,
        contenders=tuple(_contenders(classes, job, times, schedule, answer)),
        asymmetric=algorithm_1(answer.times, as_printed=True),
        num_candidates=len(chosen) * len(job.micro_batches),
        num_searched=searched,
        num_unfit=(len(chosen) - len(fitting)) * len(job.micro_batches),
        cluster_bound_s=bound_s,
        held_out_s=None if held_out_LE is None else _held_out_s(answer, held_out_LE),
        warnings=tuple(_warnings(schedule)),
    )


def _held_out_s(answer: GroupAnswer, held_out_LE: FloatArray) -> float:
    """Return the makespan of an assignment under other loads, the order of tasks kept."""
    job = replace(answer.times.job, load_LE=held_out_LE)
    times = replace(answer.times, job=job)
    stages = times.stages(*times.side_times(answer.device_LE))
    return makespan_s(stages, num_micro_batches=times.num_micro_batches, lag=answer.lag)


def _best(times: Sequence[GroupTimes]) -> tuple[GroupAnswer, int, float]:
    """Search the candidates that can still win; return the answer, their number, and the least bound."""
    bounded = sorted(((fluid_bound_s(its), at) for at, its in enumerate(times)))
    # The published assignments come first: they cost a simulation, and nothing may be slower than they.
    best: GroupAnswer | None = None
    started = _published(times)
    searched, left_s = 0, float("inf")
    order = [at for _, at in bounded]
    if started is not None:
        order.remove(started)
        order.insert(0, started)
    floor = {at: bound for bound, at in bounded}
    for at in order:
        if best is not None and floor[at] >= best.makespan_s * (1 - NEAR):
            left_s = min(left_s, floor[at])
            continue
        found = search(times[at])
        assert found is not None
        searched += 1
        left_s = min(left_s, found.lower_bound_s)
        if best is None or found.makespan_s < best.makespan_s:
            best = found
    assert best is not None
    return best, searched, min(left_s, best.makespan_s)


def _published(times: Sequence[GroupTimes]) -> int | None:
    """Return the index of the candidate on which HeterMoE's assignments are fastest; None where none fits."""
    priced = [
        (step, at)
        for at, its in enumerate(times)
        for offload_L in _offloads(its)
        if (step := _contiguous_s(its, offload_L)) is not None
    ]
    return min(priced)[1] if priced else None


def _offloads(times: GroupTimes) -> Iterator[tuple[int, ...]]:
    """Yield what HeterMoE offloads: by Algorithm 1, as printed and as meant, and nothing."""
    for as_printed in (True, False):
        offload_L = algorithm_1(times, as_printed=as_printed).offload_L
        if offload_L is not None:
            yield offload_L
    if times.job.num_experts % times.group.num_expert_devices == 0:
        yield (0,) * times.job.num_layers


def _contiguous_s(times: GroupTimes, offload_L: Sequence[int]) -> float | None:
    """Return the makespan of HeterMoE's assignment; None where a device cannot hold it."""
    device_LE = contiguous_assignment(times, offload_L)
    held_G = np.bincount(device_LE.ravel(), minlength=times.group.num_devices)
    if (held_G > times.group.room_G(times.job)).any():
        return None
    stages = times.stages(*times.side_times(device_LE))
    return fastest_schedule(stages, num_micro_batches=times.num_micro_batches)[0]


def _contenders(
    classes: Sequence[DeviceClass],
    job: HeteroJob,
    times: Sequence[GroupTimes],
    schedule: Schedule,
    answer: GroupAnswer,
) -> list[Contender]:
    whole = [its for its in times if its.group.whole_classes]
    nothing = [its for its in whole if job.num_experts % its.group.num_expert_devices == 0]
    groups = {id(its.group): its.group for its in whole}.values()
    apart = [(dist_ep_s(group, job), group.text()) for group in groups]
    ours = Contender(
        name=OURS,
        step_s=answer.makespan_s,
        attention_use=schedule.utilisation("attention"),
        expert_use=schedule.utilisation("experts"),
        note=f"{answer.times.group.text()}; {answer.times.num_micro_batches} micro-batches",
    )
    return [
        ours,
        _fastest("Algorithm 1", whole, lambda its: algorithm_1(its, as_printed=True).offload_L),
        _fastest("Algorithm 1 as meant", whole, lambda its: algorithm_1(its, as_printed=False).offload_L),
        _fastest("zebra without offloading", nothing, lambda its: (0,) * job.num_layers),
        Contender(name="DistEP", step_s=min(apart)[0], note=min(apart)[1])
        if apart
        else Contender(name="DistEP", step_s=None, note="no class can take a role whole"),
        Contender(name="EP", step_s=ep_s(classes, job), note="every device both roles, equal shares"),
        Contender(name="EP(Ideal)", step_s=ep_ideal_s(classes, job), note="perfect shares by speed"),
    ]


def _fastest(
    name: str, times: Sequence[GroupTimes], offload: Callable[[GroupTimes], tuple[int, ...] | None]
) -> Contender:
    """Return the best of HeterMoE's assignments with one rule of offloading over whole-class roles."""
    best: tuple[float, GroupTimes, tuple[int, ...]] | None = None
    for its in times:
        offload_L = offload(its)
        if offload_L is None:
            continue
        step_s = _contiguous_s(its, offload_L)
        if step_s is not None and (best is None or step_s < best[0]):
            best = (step_s, its, offload_L)
    if best is None:
        return Contender(name=name, step_s=None, note="undefined, or out of memory, under all roles")
    step_s, its, offload_L = best
    stages = its.stages(*its.side_times(contiguous_assignment(its, offload_L)))
    R = its.num_micro_batches
    busy = R * stages.attention_work_s, R * sum(stages.experts_S)
    return Contender(
        name=name,
        step_s=step_s,
        attention_use=busy[0] / step_s,
        expert_use=busy[1] / step_s,
        note=f"{its.group.text()}; {R} micro-batches",
    )


def _warnings(schedule: Schedule) -> list[str]:
    stages, R = schedule.stages, schedule.num_micro_batches
    compute = max(R * stages.attention_work_s, R * sum(stages.experts_S))
    found = []
    for name, exchange_S in (("dispatch", stages.dispatch_S), ("combine", stages.combine_S)):
        if R * sum(exchange_S) > compute:
            found.append(
                f"the {name} is slower than compute: {R * sum(exchange_S):.4g} s of a step against "
                f"{compute:.4g} s on the busier side; zebra parallelism cannot hide it"
            )
    return found


def _missing_bytes(group: ZebraGroup, job: HeteroJob) -> int:
    """Return the bytes by which one group's devices are too small; 0 where they fit."""
    used = np.where(group.attends_G, job.attention_bytes, job.activation_bytes)
    memory = np.array([its.memory_bytes for its in group.classes])[group.class_of_device_G]
    over = int(np.maximum(used - memory, 0).sum())
    lacking = job.num_layers * job.num_experts - int(group.room_G(job).sum())
    return over + max(0, lacking) * int(job.expert_bytes)


def _why_unfit(groups: Sequence[ZebraGroup], job: HeteroJob) -> str:
    group = min(groups, key=lambda its: (_missing_bytes(its, job), its.num_groups))
    missing, devices = _missing_bytes(group, job), group.num_devices
    copies = -(-missing // devices // max(job.expert_bytes, 1)) * max(job.expert_bytes, 1)
    text = (
        f"the model fits under no roles. Nearest is {group.text()}: of {job.num_layers * job.num_experts} "
        f"experts of {job.expert_bytes / GIB:.3f} GiB over all layers, and what the roles need beside, "
        f"{missing} bytes ({missing / GIB:.2f} GiB) are missing in each group; it would fit with "
        f"{max(copies, 1) / GIB:.2f} GiB more on each of its {devices} devices"
    )
    best = max(group.classes, key=lambda its: its.memory_bytes)
    room = (best.memory_bytes - job.activation_bytes) // max(job.expert_bytes, 1)
    if room > 0 and group.attention_fits(job):
        more = -(-missing // (room * max(job.expert_bytes, 1)))
        text += f", or {more} more {best.name} for experts in each group"
    return text
