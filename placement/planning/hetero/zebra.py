"""Zebra parallelism: attention of one micro-batch beside experts of another, task by task.

After HeterMoE (arXiv 2504.03871, section 4). A group has an attention side and an expert side, each with one
compute stream; tokens travel to the experts on one stream (dispatch) and back on another (combine). A step
is a chain of stages: attention work, dispatch, expert work on both sides, combine. Forward stages are the
layers; then the head, whose forward and backward pass follow each other at once (``A^F_L A^B_L`` in
Theorem 1, where the last attention task follows the last experts); then the layers backwards. On every
stream the stages run in this order and micro-batches in theirs, which is Theorem 1's order.

Shape letters: S stages with experts, R micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from placement.errors import InputError

__all__ = ["Event", "Schedule", "Stages", "fastest_schedule", "layer_stages", "makespan_s", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Durations of one micro-batch's tasks, seconds, ``[stages]`` each.

    Parameters
    ----------
    attention_S
        Work of attention devices before the dispatch.
    own_experts_S
        Work of attention devices on the experts that they hold.
    experts_S
        Work of expert devices.
    dispatch_S, combine_S
        Exchanges to the experts and back.
    label_S
        Pass ("forward" or "backward") and layer, from 0, of the expert work.
    final_s
        Attention work after the last combine.

    Raises
    ------
    InputError
        If lengths differ or a duration is negative.
    """

    attention_S: tuple[float, ...]
    own_experts_S: tuple[float, ...]
    experts_S: tuple[float, ...]
    dispatch_S: tuple[float, ...]
    combine_S: tuple[float, ...]
    label_S: tuple[tuple[str, int], ...]
    final_s: float = 0.0

    def __post_init__(self) -> None:
        durations = (self.attention_S, self.own_experts_S, self.experts_S, self.dispatch_S, self.combine_S)
        if not self.attention_S or len({len(part) for part in (*durations, self.label_S)}) != 1:
            raise InputError("a zebra schedule needs one duration of every task for each stage")
        if min(self.final_s, *(min(part) for part in durations)) < 0:
            raise InputError("a task of a zebra schedule has a negative duration")

    @property
    def attention_work_s(self) -> float:
        """Work of the attention side for one micro-batch."""
        return sum(self.attention_S) + sum(self.own_experts_S) + self.final_s

    def lower_bound_s(self, num_micro_batches: int) -> float:
        """Return what no schedule of these tasks can beat.

        The largest of: all work of the attention side; the work of the expert side and of each exchange, with
        what must come before its first and after its last task; the chain of the last micro-batch.
        """
        R = num_micro_batches
        fill = self.attention_S[0]
        drain = self.combine_S[-1] + self.final_s
        both = [max(pair) for pair in zip(self.experts_S, self.own_experts_S, strict=True)]
        chain = sum(self.attention_S) + sum(self.dispatch_S) + sum(both) + sum(self.combine_S) + self.final_s
        return max(
            R * self.attention_work_s,
            fill + self.dispatch_S[0] + R * sum(self.experts_S) + drain,
            fill + R * sum(self.dispatch_S) + both[-1] + drain,
            fill + self.dispatch_S[0] + both[0] + R * sum(self.combine_S) + self.final_s,
            (R - 1) * fill + chain,
        )


class Event(NamedTuple):
    """One task of a schedule."""

    stream: str
    """``attention``, ``experts``, ``dispatch`` or ``combine``."""
    task: str
    """``attention``, ``own experts``, ``experts``, ``dispatch`` or ``combine``."""
    stage: int
    direction: str
    """``forward`` or ``backward``."""
    layer: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A simulated step of one group.

    Parameters
    ----------
    stages, num_micro_batches
        What was simulated.
    lag
        How many attention tasks an attention device starts ahead before it computes its own experts.
    events
        All tasks of positive duration, stream by stream as they were placed.
    makespan_s
        End of the last task.
    """

    stages: Stages
    num_micro_batches: int
    lag: int
    events: tuple[Event, ...]
    makespan_s: float

    @property
    def lower_bound_s(self) -> float:
        """What no order of these tasks can beat; see `Stages.lower_bound_s`."""
        return min(self.stages.lower_bound_s(self.num_micro_batches), self.makespan_s)

    def busy_s(self, stream: str) -> float:
        """Return the seconds in which a stream works."""
        return sum(event.end_s - event.start_s for event in self.events if event.stream == stream)

    def utilisation(self, stream: str) -> float:
        """Return the share of the makespan in which a stream works."""
        return self.busy_s(stream) / self.makespan_s if self.makespan_s else 0.0


def layer_stages(
    *,
    attention_L: Sequence[float],
    own_experts_L: Sequence[float],
    experts_L: Sequence[float],
    dispatch_s: float = 0.0,
    combine_s: float = 0.0,
    head_s: float = 0.0,
    backward: float = 0.0,
) -> Stages:
    """Return the stages of a forward pass, or of forward and backward pass.

    Parameters
    ----------
    attention_L, own_experts_L, experts_L
        Forward seconds of a micro-batch in each layer.
    backward
        Work of the backward pass over that of the forward pass; 0 for no backward pass. Exchanges take as
        long in either.
    """
    num = len(attention_L)
    forward = [("forward", layer) for layer in range(num)]
    attention, own, experts = list(attention_L), list(own_experts_L), list(experts_L)
    if not backward:
        labels, final = forward, head_s
    else:
        labels = [*forward, *(("backward", layer) for layer in reversed(range(num)))]
        back = [backward * value for value in reversed(attention)]
        attention += [head_s * (1 + backward), *back[:-1]]
        own += [backward * value for value in reversed(own)]
        experts += [backward * value for value in reversed(experts)]
        final = back[-1]
    return Stages(
        attention_S=tuple(attention),
        own_experts_S=tuple(own),
        experts_S=tuple(experts),
        dispatch_S=(dispatch_s,) * len(labels),
        combine_S=(combine_s,) * len(labels),
        label_S=tuple(labels),
        final_s=final,
    )


def makespan_s(stages: Stages, *, num_micro_batches: int, lag: int = 0) -> float:
    """Return the makespan alone; as `simulate`, without events and several times as fast."""
    R, total = num_micro_batches, len(stages.attention_S) * num_micro_batches
    attention, own, experts = stages.attention_S, stages.own_experts_S, stages.experts_S
    dispatch, combine = stages.dispatch_S, stages.combine_S
    attention_free = experts_free = dispatch_free = combine_free = 0.0
    dispatched, computed, returned = [0.0] * total, [0.0] * total, [0.0] * (total + R)
    # `returned[i]` is the combine of task i - R: the first R attention tasks wait for nothing.
    for i in range(total + R):
        stage = i // R
        ready = returned[i]
        work = attention[stage] if i < total else stages.final_s
        attention_free = (ready if ready > attention_free else attention_free) + work
        if i < total:
            start = attention_free if attention_free > dispatch_free else dispatch_free
            dispatched[i] = dispatch_free = start + dispatch[stage]
            start = dispatch_free if dispatch_free > experts_free else experts_free
            computed[i] = experts_free = start + experts[stage]
        h = i - lag
        if not 0 <= h < total:
            continue
        stage = h // R
        ready = computed[h]
        if own[stage]:
            start = dispatched[h]
            attention_free = (start if start > attention_free else attention_free) + own[stage]
            ready = ready if ready > attention_free else attention_free
        start = ready if ready > combine_free else combine_free
        returned[h + R] = combine_free = start + combine[stage]
    return attention_free


def simulate(stages: Stages, *, num_micro_batches: int, lag: int = 0) -> Schedule:
    """Simulate a step in Theorem 1's order: every task starts when its stream and its inputs are ready.

    Parameters
    ----------
    num_micro_batches
        Micro-batches R.
    lag
        The experts of an attention device wait for their dispatch; meanwhile it may start this many further
        attention tasks, fewer than R.

    Raises
    ------
    InputError
        If `num_micro_batches` or `lag` is out of range.
    """
    if num_micro_batches < 1 or not 0 <= lag < num_micro_batches:
        raise InputError(f"lag {lag} of {num_micro_batches} micro-batches; it must be 0 up to one fewer")
    events = []
    end_of_all = 0.0
    for stream, task, at, start, end in _tasks(stages, num_micro_batches, lag):
        end_of_all = max(end_of_all, end)
        if end > start:
            stage, micro_batch = divmod(at, num_micro_batches)
            direction, layer = _label(stages, stage, of_attention=task == "attention")
            events.append(Event(stream, task, stage, direction, layer, micro_batch, start, end))
    return Schedule(
        stages=stages,
        num_micro_batches=num_micro_batches,
        lag=lag,
        events=tuple(events),
        makespan_s=end_of_all,
    )


def _label(stages: Stages, stage: int, *, of_attention: bool) -> tuple[str, int]:
    """Return pass and layer of a task; attention before a backward expert task is the next layer's."""
    if stage == len(stages.label_S):
        direction, layer = stages.label_S[-1]
        return ("forward", layer + 1) if direction == "forward" else ("backward", 0)
    direction, layer = stages.label_S[stage]
    return (direction, layer + 1) if of_attention and direction == "backward" else (direction, layer)


def _tasks(stages: Stages, R: int, lag: int) -> Iterator[tuple[str, str, int, float, float]]:
    """Place all tasks; task number ``stage * R + micro_batch`` on every stream."""
    total = len(stages.attention_S) * R
    attention_free = experts_free = dispatch_free = combine_free = 0.0
    dispatched, computed, returned = [0.0] * total, [0.0] * total, [0.0] * total
    for i in range(total + R):
        stage = i // R
        start = max(attention_free, returned[i - R] if i >= R else 0.0)
        work = stages.attention_S[stage] if i < total else stages.final_s
        attention_free = start + work
        yield "attention", "attention", i, start, attention_free
        if i < total:
            start = max(attention_free, dispatch_free)
            dispatched[i] = dispatch_free = start + stages.dispatch_S[stage]
            yield "dispatch", "dispatch", i, start, dispatch_free
            start = max(dispatch_free, experts_free)
            computed[i] = experts_free = start + stages.experts_S[stage]
            yield "experts", "experts", i, start, experts_free
        own = i - lag
        if not 0 <= own < total:
            continue
        ready = computed[own]
        if stages.own_experts_S[own // R]:
            start = max(attention_free, dispatched[own])
            attention_free = start + stages.own_experts_S[own // R]
            ready = max(ready, attention_free)
            yield "attention", "own experts", own, start, attention_free
        start = max(ready, combine_free)
        returned[own] = combine_free = start + stages.combine_S[own // R]
        yield "combine", "combine", own, start, combine_free


def fastest_schedule(stages: Stages, *, num_micro_batches: int) -> tuple[float, int]:
    """Return the makespan and the lag of the better of two lags: 0, and half the micro-batches."""
    if not any(stages.own_experts_S):
        return makespan_s(stages, num_micro_batches=num_micro_batches), 0
    lags = sorted({0, num_micro_batches // 2})
    return min((makespan_s(stages, num_micro_batches=num_micro_batches, lag=lag), lag) for lag in lags)
