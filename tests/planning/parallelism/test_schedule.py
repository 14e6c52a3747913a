"""The pipeline's formulas against a simulation of its tasks, one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.planning.parallelism.memory import in_flight_micro_batches
from placement.planning.parallelism.schedule import bubble_share, pipeline_s

Task = tuple[bool, int, int]  # forward or not, micro-batch, part of the model


def order_of(stage: int, *, pipeline: int, count: int, parts: int) -> list[Task]:
    """Return a stage's tasks in the order of Megatron's schedules (arXiv 2104.04473)."""
    total = count * parts
    warm_up = pipeline - stage - 1 if parts == 1 else 2 * (pipeline - stage - 1) + (parts - 1) * pipeline
    warm_up = min(warm_up, total)

    def task(forward: bool, index: int) -> Task:
        # Micro-batches go through in rounds of PP, part by part; backward in the parts' reverse order.
        round_, inside = divmod(index, pipeline * parts)
        chunk, micro_batch = divmod(inside, pipeline)
        own = chunk if forward else parts - 1 - chunk
        if parts == 1:
            return forward, index, stage
        return forward, round_ * pipeline + micro_batch, own * pipeline + stage

    tasks = [task(True, index) for index in range(warm_up)]
    for index in range(total - warm_up):
        tasks += [task(True, warm_up + index), task(False, index)]
    return tasks + [task(False, index) for index in range(total - warm_up, total)]


def simulate(
    forward: list[float], backward: list[float], *, pipeline: int, count: int, parts: int
) -> tuple[float, list[int]]:
    """Run all tasks as early as their order and inputs allow; return the end and each stage's peak."""
    last = pipeline * parts - 1
    orders = [order_of(stage, pipeline=pipeline, count=count, parts=parts) for stage in range(pipeline)]
    end: dict[Task, float] = {}
    free, done = [0.0] * pipeline, [0] * pipeline
    held, peak = [0] * pipeline, [0] * pipeline
    while any(done[stage] < len(orders[stage]) for stage in range(pipeline)):
        before = sum(done)
        for stage in range(pipeline):
            while done[stage] < len(orders[stage]):
                task = orders[stage][done[stage]]
                is_forward, micro_batch, part = task
                if is_forward:
                    needs = [] if part == 0 else [(True, micro_batch, part - 1)]
                else:
                    needs = [(True, micro_batch, part)]
                    needs += [] if part == last else [(False, micro_batch, part + 1)]
                if any(need not in end for need in needs):
                    break
                start = max([free[stage], *(end[need] for need in needs)])
                free[stage] = end[task] = start + (forward if is_forward else backward)[stage] / parts
                held[stage] += 1 if is_forward else -1
                peak[stage] = max(peak[stage], held[stage])
                done[stage] += 1
        assert sum(done) > before, "the order has a deadlock"
    return max(end.values()), peak


@settings(max_examples=40, deadline=None)
@given(
    pipeline=st.integers(2, 5),
    rounds=st.integers(1, 4),
    parts=st.integers(1, 3),
    ratio=st.sampled_from([1.0, 2.0]),
)
def test_equal_stages_take_the_formula(pipeline: int, rounds: int, parts: int, ratio: float) -> None:
    """With equal stages the simulated end is (M + (PP - 1) / v) times a stage, its peak what is in flight."""
    count = rounds * pipeline
    end, peak = simulate([1.0] * pipeline, [ratio] * pipeline, pipeline=pipeline, count=count, parts=parts)
    formula = pipeline_s(1.0 + ratio, pipeline=pipeline, num_micro_batches=count, virtual_stages=parts)
    assert end == pytest.approx(formula)
    share = bubble_share(pipeline=pipeline, num_micro_batches=count, virtual_stages=parts)
    assert end == pytest.approx(count * (1 + ratio) * (1 + share))
    in_flight_P = in_flight_micro_batches(pipeline=pipeline, num_micro_batches=count, virtual_stages=parts)
    assert [held / parts for held in peak] == pytest.approx(in_flight_P.tolist())


@settings(max_examples=40, deadline=None)
@given(times=st.lists(st.floats(0.1, 3.0), min_size=1, max_size=5), count=st.integers(1, 9))
def test_unequal_stages_take_no_longer(times: list[float], count: int) -> None:
    """1F1B's formula with the slowest stage is never below the simulation, and tight within its bubble."""
    pipeline = len(times)
    end, _ = simulate(times, [2 * t for t in times], pipeline=pipeline, count=count, parts=1)
    formula = pipeline_s(3 * max(times), pipeline=pipeline, num_micro_batches=count)
    assert end <= formula * (1 + 1e-9)
    assert end >= 3 * count * max(times) * (1 - 1e-9)


def test_by_hand() -> None:
    """Four stages of 3 s and eight micro-batches: 33 s, a bubble of 3/8; two parts each: 28.5 s and 3/16."""
    assert pipeline_s(3.0, pipeline=4, num_micro_batches=8) == 33.0
    assert bubble_share(pipeline=4, num_micro_batches=8) == 0.375
    assert pipeline_s(3.0, pipeline=4, num_micro_batches=8, virtual_stages=2) == 28.5
    assert bubble_share(pipeline=4, num_micro_batches=8, virtual_stages=2) == 0.1875


def test_interleaving_needs_whole_rounds() -> None:
    """Six micro-batches on four stages cannot be interleaved."""
    with pytest.raises(InputError, match="6 micro-batches are no multiple of 4 stages"):
        pipeline_s(1.0, pipeline=4, num_micro_batches=6, virtual_stages=2)
