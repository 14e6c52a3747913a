"""A plan for a mixed cluster as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from placement.planning.hetero.zebra import Event, Schedule

if TYPE_CHECKING:
    from placement.planning.hetero.plan import HeteroPlan

__all__ = ["MOST_EVENTS", "plan_to_dict"]

MOST_EVENTS = 4000
"""Tasks that are written out; of a longer schedule the first and the last halves of this number."""


def plan_to_dict(plan: HeteroPlan) -> dict[str, Any]:
    """Return the plan as plain values, units in the names."""
    answer, group, schedule = plan.answer, plan.group, plan.schedule
    M, job = group.num_attention, plan.job
    return {
        "format": "moe-placement-plan/1",
        "plan": "hetero",
        "step_s": answer.makespan_s,
        "tokens_per_s": plan.tokens_per_s,
        "lower_bound_s": answer.lower_bound_s,
        "gap": 1 - answer.lower_bound_s / answer.makespan_s,
        "cluster_lower_bound_s": plan.cluster_bound_s,
        "held_out_step_s": plan.held_out_s,
        "found_by": answer.source,
        "candidates": plan.num_candidates,
        "candidates_searched": plan.num_searched,
        "candidates_out_of_memory": plan.num_unfit,
        "groups": group.num_groups,
        "roles": [
            {
                "class": its.name,
                "attention": a,
                "experts": e,
                "unused": its.count - group.num_groups * (a + e),
            }
            for its, a, e in zip(group.classes, group.attention, group.experts, strict=True)
        ],
        "micro_batches": answer.times.num_micro_batches,
        "tokens_per_micro_batch": answer.times.tokens,
        "lag": answer.lag,
        "class_of_device": [group.classes[c].name for c in group.class_of_device_G],
        "role_of_device": ["attention" if g < M else "experts" for g in range(group.num_devices)],
        "device_of_expert": answer.device_LE.tolist(),
        "experts_on_attention_devices": list(answer.own_count_L),
        "algorithm_1": {
            "offload_per_expert_device": None
            if plan.asymmetric.offload_L is None
            else list(plan.asymmetric.offload_L),
            "undefined_because": plan.asymmetric.reason or None,
        },
        "attention_s": answer.times.attention_s,
        "dispatch_s": answer.times.dispatch_s,
        "combine_s": answer.times.combine_s,
        "tokens_per_step": job.tokens_per_step,
        "utilisation": {
            stream: schedule.utilisation(stream) for stream in ("attention", "experts", "dispatch", "combine")
        },
        "contenders": [contender.to_dict() for contender in plan.contenders],
        "warnings": list(plan.warnings),
        "schedule": _schedule(schedule),
    }


def _schedule(schedule: Schedule) -> dict[str, Any]:
    events = sorted(schedule.events, key=lambda event: (event.start_s, event.stream, event.stage))
    left_out = max(0, len(events) - MOST_EVENTS)
    if left_out:
        events = [*events[: MOST_EVENTS // 2], *events[-(MOST_EVENTS // 2) :]]
    return {
        "columns": list(Event._fields),
        "events": [list(event) for event in events],
        "events_left_out": left_out,
    }
