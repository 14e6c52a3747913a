"""From a file that describes a training run to the plan of its parallelism."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from placement._fields import Fields
from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.tasks.problem import default_window

if TYPE_CHECKING:
    from placement.planning.parallelism import (
        ExpertTraffic,
        ParallelismPlan,
        ParallelismQuestion,
        SearchRanges,
        StateBytes,
    )
    from placement.profile import RoutingProfile
    from placement.tasks.plan_spec import PlanSpec

__all__ = ["PlannedParallelism", "plan_parallelism_of", "question_of"]

_log = logging.getLogger(__name__)

GIB = 2**30

_REQUIRED = ("model", "transformer", "topology", "sequence_length", "global_batch")
_OPTIONAL = (
    "state_bytes",
    "flash_attention",
    "shard_optimizer",
    "calibration",
    "attention_tflops",
    "memory_gib",
    "fast_domain",
    "message_us",
    "ranges",
    "placement",
)
_SIZES = ("pipeline", "expert", "tensor", "data", "micro_batch", "virtual_stages")
_PLACEMENT = ("trace", "window", "groups", "objective", "max_swaps", "interval_steps", "seed", "effort_s")

_Choice = TypeVar("_Choice", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedParallelism:
    """A plan, and the trace whose routing it is for.

    Parameters
    ----------
    plan
        The answer.
    trace
        Name of the trace; None without one.
    """

    plan: ParallelismPlan
    trace: str | None


def plan_parallelism_of(
    spec: PlanSpec, *, trace: str | None = None, source_format: str | None = None
) -> PlannedParallelism:
    """Plan what a file asks for.

    Parameters
    ----------
    trace
        Routing to plan for instead of the file's own.
    source_format
        Format of the trace; None to find out.

    Raises
    ------
    InputError
        If something in the file is wrong, with its place.
    InfeasibleError
        If nothing fits.
    """
    from placement.planning.parallelism import plan_parallelism

    own = spec.fields(known=(*_REQUIRED, *_OPTIONAL), required=_REQUIRED)
    named = _placement_fields(own).text("trace")
    used = trace if trace is not None else None if named is None else spec.found(named)
    question = question_of(spec, trace=used, source_format=source_format)
    return PlannedParallelism(plan=plan_parallelism(question), trace=used)


def question_of(
    spec: PlanSpec, *, trace: str | None = None, source_format: str | None = None
) -> ParallelismQuestion:
    """Read the question of a file, for the routing of a trace where one is given.

    Raises
    ------
    InputError
        If something in the file is wrong, with its place.
    """
    from placement.planning.parallelism import ParallelismQuestion, TrainingJob
    from placement.planning.parallelism.network import MESSAGE_S

    own = spec.fields(known=(*_REQUIRED, *_OPTIONAL), required=_REQUIRED)
    model = spec.model(own.raw("model"))
    job = TrainingJob(
        transformer=spec.transformer(own.raw("transformer"), model=model),
        sequence_length=_needed(own, "sequence_length"),
        global_batch=_needed(own, "global_batch"),
        state=_state(own),
        flash_attention=_flag(own, "flash_attention", default=True),
        shard_optimizer=_flag(own, "shard_optimizer", default=False),
    )
    memory_gib, tflops = own.number("memory_gib"), own.number("attention_tflops")
    message_us = own.number("message_us", zero=True)
    return ParallelismQuestion(
        job=job,
        topology=spec.topology(own.raw("topology")),
        calibration=spec.calibration(own.raw("calibration")),
        ranges=_ranges(own),
        memory_bytes=None if memory_gib is None else math.floor(memory_gib * GIB),
        fast_domain=own.integer("fast_domain"),
        attention_flops=None if tflops is None else tflops * 1e12,
        message_s=MESSAGE_S if message_us is None else message_us * 1e-6,
        traffic=_traffic(_placement_fields(own), trace, source_format),
    )


def _needed(own: Fields, key: str) -> int:
    value = own.integer(key)
    if value is None:
        raise own.wrong(key, "an integer from 1")
    return value


def _flag(own: Fields, key: str, *, default: bool) -> bool:
    value = own.raw(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise own.wrong(key, "true or false")
    return value


def _inner(own: Fields, key: str, known: tuple[str, ...]) -> Fields:
    return Fields(own.mapping(key), source=own.source, place=key, known=known)


def _state(own: Fields) -> StateBytes:
    from placement.planning.parallelism import StateBytes

    given = _inner(own, "state_bytes", ("weights", "gradients", "optimizer"))
    values = {name: given.number(name, zero=True) for name in ("weights", "gradients", "optimizer")}
    return StateBytes(**{name: value for name, value in values.items() if value is not None})


def _ranges(own: Fields) -> SearchRanges:
    from placement.planning.parallelism import Checkpointing, Exchange, SearchRanges

    given = _inner(own, "ranges", (*_SIZES, "checkpointing", "exchange"))
    values: dict[str, Any] = {name: tuple(given.integers(name)) for name in _SIZES if name in given}
    for name, kind in (("checkpointing", Checkpointing), ("exchange", Exchange)):
        if name in given:
            values[name] = _choices(given, name, kind)
    return SearchRanges(**values)


def _choices(given: Fields, name: str, kind: type[_Choice]) -> tuple[_Choice, ...]:
    known = [str(choice) for choice in kind]
    for value in given.items(name):
        if value not in known:
            raise InputError(
                f"{given.source}: {given.at(name)} has {value!r}; {did_you_mean(str(value), known)}"
            )
    return tuple(kind(value) for value in dict.fromkeys(given.items(name)))


def _placement_fields(own: Fields) -> Fields:
    return _inner(own, "placement", _PLACEMENT)


def _traffic(given: Fields, trace: str | None, source_format: str | None) -> ExpertTraffic | None:
    from placement.planning.parallelism import ExpertTraffic
    from placement.problem import Objective

    objective = given.text("objective") or str(Objective.BALANCE)
    if objective not in (Objective.BALANCE, Objective.STEP_TIME):
        raise given.wrong("objective", "balance or step-time")
    if trace is None:
        return None
    return ExpertTraffic(
        profile=_profile(trace, given.integer("window"), source_format),
        groups=given.integer("groups") or 4,
        objective=Objective(objective),
        max_swaps=given.integer("max_swaps"),
        interval_steps=given.integer("interval_steps"),
        seed=given.integer("seed", minimum=0) or 0,
        work_s=given.number("effort_s"),
    )


def _profile(trace: str, window: int | None, source_format: str | None) -> RoutingProfile:
    """Cut a trace, expert counts or statistics into windows."""
    from traces.counts import ExpertCounts
    from traces.readers import open_trace
    from traces.statistics import RoutingStatistics, build_profile

    traffic = open_trace(trace, format=source_format)
    if isinstance(traffic, ExpertCounts | RoutingStatistics):
        if window is not None:
            _log.warning("placement.window has no effect: the trace has windows of its own")
        return traffic.profile() if isinstance(traffic, ExpertCounts) else traffic.profile(1)
    return build_profile(traffic, window_tokens=window or default_window(traffic.num_tokens))
