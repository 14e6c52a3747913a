"""From a question to a plan: search, place experts for the best strategies, rank again."""

from __future__ import annotations

from dataclasses import replace

from placement.errors import InfeasibleError
from placement.planning.parallelism.experts import CONTIGUOUS, OURS, ExpertPlan, place_experts
from placement.planning.parallelism.migration import plan_migration
from placement.planning.parallelism.network import network_of
from placement.planning.parallelism.plan import ParallelismPlan, PlacedExperts, RankedStrategy
from placement.planning.parallelism.question import ExpertTraffic, ParallelismQuestion
from placement.planning.parallelism.search import (
    Candidate,
    Machine,
    Reason,
    Rejection,
    SearchResult,
    closest_to_fitting,
    least_memory,
    search_strategies,
    timed,
)
from placement.planning.parallelism.strategy import Mesh
from placement.problem import Objective

__all__ = ["plan_parallelism"]

GIB = 2**30

DEVICE_MULTIPLES = (2, 4, 8, 16)
"""How many times the devices are multiplied to find how many would do."""


def plan_parallelism(question: ParallelismQuestion) -> ParallelismPlan:
    """Rank all strategies that fit by predicted model FLOPs utilisation.

    With traffic, experts are placed on the groups of the best strategies, and these are ranked again by the
    step predicted for the loads held out.

    Raises
    ------
    InputError
        If devices differ, curves are missing, or traffic and model do not belong together.
    InfeasibleError
        If nothing fits: the nearest strategy, what it lacks, and how many devices would do.
    """
    machine = machine_of(question)
    search = search_strategies(
        question.job, machine, question.ranges, num_devices=question.topology.num_devices
    )
    if not search.candidates:
        raise InfeasibleError(_nothing_fits(question, machine, search))
    exact = question.traffic is None
    ranked = [RankedStrategy(balanced=candidate, evaluated=exact) for candidate in search.candidates]
    if question.traffic is not None:
        ranked = _with_traffic(question, machine, question.traffic, ranked)
    return ParallelismPlan(question=question, ranked=tuple(ranked), search=search)


def machine_of(question: ParallelismQuestion) -> Machine:
    """Return the devices of a question.

    Raises
    ------
    InputError
        If they differ, or the calibration has no seconds.
    """
    network = network_of(
        question.topology,
        question.calibration,
        question.job.transformer.moe,
        message_s=question.message_s,
    )
    return Machine(
        kind=question.topology.kind_of(0),
        calibration=question.calibration,
        network=network,
        memory_bytes=question.device_memory_bytes,
        fast_domain=question.fast_domain_devices,
        attention_flops=question.attention_flops,
    )


def _with_traffic(
    question: ParallelismQuestion, machine: Machine, traffic: ExpertTraffic, ranked: list[RankedStrategy]
) -> list[RankedStrategy]:
    """Place experts and rank again: strategies with real loads first, then those that none was placed for.

    Balanced loads bound what a strategy can reach, so the first one that they make no better than the best so
    far ends it.
    """
    found: dict[tuple[int, int], ExpertPlan] = {}
    evaluated: list[RankedStrategy] = []
    left: list[RankedStrategy] = []
    for position, strategy in enumerate(ranked):
        mesh = strategy.balanced.strategy.mesh
        best = max((other.best.utilisation for other in evaluated), default=0.0)
        if strategy.balanced.utilisation <= best:
            left += ranked[position:]
            break
        if mesh.expert == 1:
            evaluated.append(replace(strategy, evaluated=True))
            continue
        # Strategies with alike groups share placements; splitting experts does not change what is balanced.
        key = mesh.expert, 1 if traffic.objective is Objective.BALANCE else mesh.tensor
        if key not in found and len(found) == traffic.groups:
            left.append(strategy)
            continue
        if key not in found:
            found[key] = _placed_experts(question, traffic, mesh)
        placed = _evaluated(question, machine, traffic, strategy.balanced, found[key])
        evaluated.append(replace(strategy, placed=placed, evaluated=True))
    evaluated.sort(key=lambda strategy: -strategy.best.utilisation)
    return evaluated + left


def _placed_experts(question: ParallelismQuestion, traffic: ExpertTraffic, mesh: Mesh) -> ExpertPlan:
    return place_experts(
        traffic.profile,
        question.topology,
        question.job.transformer.moe,
        mesh,
        calibration=question.calibration,
        objective=traffic.objective,
        max_swaps=traffic.max_swaps,
        seed=traffic.seed,
        work_s=traffic.work_s,
    )


def _evaluated(
    question: ParallelismQuestion,
    machine: Machine,
    traffic: ExpertTraffic,
    balanced: Candidate,
    experts: ExpertPlan,
) -> PlacedExperts:
    """Return the steps of a strategy under every placement of its experts, for the loads held out."""
    job, strategy = question.job, balanced.strategy
    speed = machine.speed(job, strategy.mesh.tensor)
    skewed = {
        name: timed(
            job,
            strategy,
            balanced.layers,
            balanced.memory,
            machine=machine,
            speed=speed,
            factor_L=score.held_out_factor_L,
        )
        for name, score in experts.policies.items()
    }
    migration = plan_migration(
        job,
        strategy.mesh,
        balanced.layers,
        experts,
        network=machine.network,
        step_before_s=skewed[CONTIGUOUS].step.total_s,
        step_after_s=skewed[OURS].step.total_s,
        interval_steps=traffic.interval_steps,
    )
    return PlacedExperts(experts=experts, skewed=skewed, migration=migration)


def _nothing_fits(question: ParallelismQuestion, machine: Machine, search: SearchResult) -> str:
    """Say why nothing fits, and what would."""
    num_devices, nearest = question.topology.num_devices, closest_to_fitting(search)
    if nearest is None:
        counts = {
            reason: sum(rejection.reason is reason for rejection in search.rejections) for reason in Reason
        }
        listed = "; ".join(f"{reason} ({count})" for reason, count in counts.items() if count)
        return (
            f"no mesh of {num_devices} devices is possible: {listed}; widen the ranges or change the number "
            "of devices or sequences"
        )
    return f"{_missing(question, nearest)}; {_would_do(question, machine)}"


def _missing(question: ParallelismQuestion, nearest: Rejection) -> str:
    return (
        f"nothing fits in {question.device_memory_bytes / GIB:.1f} GiB on "
        f"{question.topology.num_devices} devices; nearest is {nearest.strategy}, whose fullest stage needs "
        f"{nearest.peak_bytes / GIB:.2f} GiB: {nearest.missing_bytes / GIB:.2f} GiB too much on each device"
    )


def _would_do(question: ParallelismQuestion, machine: Machine) -> str:
    """Say how many times the devices would do, with the same model, batch and ranges."""
    num_devices = question.topology.num_devices
    whole = machine.fast_domain >= num_devices
    for times in DEVICE_MULTIPLES:
        strategy = least_memory(
            question.job,
            machine,
            question.ranges,
            num_devices=times * num_devices,
            fast_domain=times * num_devices if whole else machine.fast_domain,
        )
        if strategy is not None:
            return f"{times * num_devices} devices would do ({strategy})"
    return (
        f"{DEVICE_MULTIPLES[-1] * num_devices} devices would not do either with these ranges and this batch"
    )
