"""The steady state of a zebra group as a mixed-integer program: how many experts attention devices hold.

Of each layer the program knows the number k of experts on attention devices, the share z of the load that
they carry, and the time of either side. The makespan is at least all work of the attention side, the expert
side's work with fill and drain, and the chain of one micro-batch. Its optimum bounds every assignment of
experts in Theorem 1's order, and in any other.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement._arrays import FloatArray, IntArray
from placement.planning.hetero.assignment import GroupTimes
from placement.solvers.milp import MilpBuilder, MilpProgram, MilpStatus, solve_milp

__all__ = ["SteadyState", "fluid_bound_s", "steady_state"]

NODES = 60
"""Nodes of the program's search; it is a start and a bound, so an early end costs little."""

LINES = 12
"""Tangents to the load of the k heaviest experts, per layer and side."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteadyState:
    """The program's answer.

    Parameters
    ----------
    own_count_L
        Experts on attention devices, ``[layers]``; None where no point was found.
    bound_s
        No assignment has a smaller makespan.
    """

    own_count_L: tuple[int, ...] | None
    bound_s: float


def _speeds(times: GroupTimes) -> tuple[float, float]:
    """Return the load per second of either side: attention devices, expert devices."""
    M, unit_G = times.group.num_attention, times.unit_G
    return float((1 / unit_G[:M]).sum()), float((1 / unit_G[M:]).sum())


def fluid_bound_s(times: GroupTimes) -> float:
    """Return the makespan that no assignment beats, if experts could be cut at will; in closed form."""
    job, R = times.job, times.num_micro_batches
    bare = times.stages([0.0] * job.num_layers, [0.0] * job.num_layers)
    total = R * job.passes * job.num_layers * job.num_experts
    own, experts = (total / speed for speed in _speeds(times))
    attention = R * bare.attention_work_s
    around = bare.attention_S[0] + bare.dispatch_S[0] + bare.combine_S[-1] + bare.final_s
    share = float(np.clip((around + experts - attention) / (own + experts), 0.0, 1.0))
    both = max(attention + share * own, around + (1 - share) * experts)
    return max(both, bare.lower_bound_s(R))


def steady_state(times: GroupTimes) -> SteadyState:
    """Solve the program."""
    program, count_L = _program(times)
    result = solve_milp(program, in_process=True, node_limit=NODES, relative_gap=1e-4)
    bound_s = max(result.bound, fluid_bound_s(times))
    if result.value_V is None or result.status is MilpStatus.INFEASIBLE:
        return SteadyState(own_count_L=None, bound_s=bound_s)
    counts = tuple(round(float(value)) for value in result.value_V[count_L])
    return SteadyState(own_count_L=counts, bound_s=bound_s)


def _program(times: GroupTimes) -> tuple[MilpProgram, IntArray]:
    job, R, M = times.job, times.num_micro_batches, times.group.num_attention
    L, n = job.num_layers, job.num_experts
    builder = MilpBuilder()
    makespan = builder.add_variables(1, objective=1.0)
    count_L = builder.add_variables(L, upper=n, integer=True)
    share_L = builder.add_variables(L, upper=1.0)
    own_L, experts_L = builder.add_variables(L), builder.add_variables(L)
    own_speed, expert_speed = _speeds(times)
    builder.add_rows((own_L[:, None], 1.0), (share_L[:, None], -n / own_speed), lower=0.0)
    builder.add_rows((experts_L[:, None], 1.0), (share_L[:, None], n / expert_speed), lower=n / expert_speed)
    room_G = times.group.room_G(job)
    builder.add_rows((count_L, 1.0), lower=L * n - int(room_G[M:].sum()), upper=int(room_G[:M].sum()))
    _add_loads(builder, times, count_L, share_L)
    _add_whole_experts(builder, times, count_L, own_L, experts_L)
    bare = times.stages([0.0] * L, [0.0] * L)
    around = bare.attention_S[0] + bare.dispatch_S[0] + bare.combine_S[-1] + bare.final_s
    passes = job.passes
    builder.add_rows((makespan, 1.0), (own_L, -R * passes), lower=R * bare.attention_work_s)
    builder.add_rows((makespan, 1.0), (experts_L, -R * passes), lower=around)
    chain = (R - 1) * bare.attention_S[0] + bare.lower_bound_s(1)
    builder.add_rows((makespan, 1.0), (experts_L, -passes), lower=chain)
    return builder.build(), count_L


def _add_loads(builder: MilpBuilder, times: GroupTimes, count_L: IntArray, share_L: IntArray) -> None:
    """Neither side carries more load than so many of the heaviest experts do."""
    n = times.job.num_experts
    for layer, load_E in enumerate(times.job.load_LE):
        heaviest: FloatArray = np.sort(load_E)[::-1]
        below = np.concatenate([[0.0], np.cumsum(heaviest)])
        at = np.unique(np.linspace(0, n - 1, LINES).round().astype(np.int64))
        # Lines of one slope are one line.
        at = at[np.concatenate([[True], np.diff(heaviest[at]) != 0])]
        columns = np.tile([count_L[layer], share_L[layer]], (at.size, 1))
        start = below[at] - heaviest[at] * at
        attention = np.stack([-heaviest[at], np.full(at.size, float(n))], axis=1)
        builder.add_rows((columns, attention), upper=start)
        # The same of the expert side: n - k experts carry 1 - z.
        expert_side = np.stack([heaviest[at], np.full(at.size, -float(n))], axis=1)
        builder.add_rows((columns, expert_side), upper=start + heaviest[at] * n - n)


def _add_whole_experts(
    builder: MilpBuilder, times: GroupTimes, count_L: IntArray, own_L: IntArray, experts_L: IntArray
) -> None:
    """The fullest device of a side holds its share of experts, rounded up, each of the least load."""
    n, M, unit_G = times.job.num_experts, times.group.num_attention, times.unit_G
    N, L = times.group.num_expert_devices, times.job.num_layers
    least_L = times.job.load_LE.min(axis=1)
    fullest = builder.add_variables((2, L), upper=n, integer=True)
    builder.add_rows((fullest[0][:, None], float(M)), (count_L[:, None], -1.0), lower=0.0)
    builder.add_rows((fullest[1][:, None], float(N)), (count_L[:, None], 1.0), lower=float(n))
    sides = ((own_L, float(unit_G[:M].min())), (experts_L, float(unit_G[M:].min())))
    for (time_L, fastest), full_L in zip(sides, fullest, strict=True):
        builder.add_rows((time_L[:, None], 1.0), (full_L[:, None], -(fastest * least_L)[:, None]), lower=0.0)
