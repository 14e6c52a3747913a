"""Tests of the zebra schedule: by hand, against a plain reference, and what must always hold."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning.hetero.zebra_reference import reference_makespan

from placement.errors import InputError
from placement.planning.hetero import Schedule, Stages, layer_stages, simulate
from placement.planning.hetero.zebra import makespan_s

TIMES = st.integers(0, 6).map(lambda tenths: tenths / 2)


def fig_6(own: list[float], experts: list[float]) -> Stages:
    """Return Figure 6 of HeterMoE: three layers, attention 1, experts 4/3, exchanges free."""
    return layer_stages(attention_L=[1.0] * 3, own_experts_L=own, experts_L=experts)


def test_figure_6_before_offloading() -> None:
    """HeterMoE (arXiv 2504.03871) Figure 6, R = 3: experts never wait after the first attention task."""
    schedule = simulate(fig_6([0.0] * 3, [4 / 3] * 3), num_micro_batches=3)
    # 1 + 9 x 4/3; in the steady state attention works 1 of every 4/3.
    assert schedule.makespan_s == pytest.approx(13.0)
    assert schedule.busy_s("attention") / schedule.busy_s("experts") == pytest.approx(0.75)
    assert schedule.lower_bound_s == pytest.approx(13.0)


def test_figure_6_after_offloading() -> None:
    """One of six experts less in layers 2 and 3: 10 % faster, 40 % and more of the idle time gone."""
    before = simulate(fig_6([0.0] * 3, [4 / 3] * 3), num_micro_batches=3)
    after = simulate(fig_6([0, 2 / 9, 2 / 9], [4 / 3, 10 / 9, 10 / 9]), num_micro_batches=3)
    # 1 + 3 x (4/3 + 10/9 + 10/9) = 35/3
    assert after.makespan_s == pytest.approx(35 / 3)
    assert 1 - after.makespan_s / before.makespan_s == pytest.approx(0.10, abs=0.02)
    idle = [schedule.makespan_s - schedule.busy_s("attention") for schedule in (before, after)]
    # The paper says 60 % fewer bubbles: 4.00 idle before, 1.33 after, start-up included.
    assert 1 - idle[1] / idle[0] == pytest.approx(2 / 3)


def test_exchanges_by_hand() -> None:
    """One layer, two micro-batches: the second combine ends at 1 + 1 + 3 + 3 + 1, the head follows."""
    stages = layer_stages(
        attention_L=[1.0], own_experts_L=[0.0], experts_L=[3.0], dispatch_s=1, combine_s=1, head_s=0.5
    )
    schedule = simulate(stages, num_micro_batches=2)
    assert schedule.makespan_s == 9.5
    starts = {(e.task, e.micro_batch): e.start_s for e in schedule.events if e.layer == 0}
    assert starts["dispatch", 1] == 2.0
    assert starts["experts", 1] == 5.0
    assert starts["combine", 1] == 8.0


def test_backward_runs_the_layers_in_reverse() -> None:
    """Forward 2 layers, head, backward 2 layers; one micro-batch is a chain of all tasks."""
    stages = layer_stages(
        attention_L=[1.0, 2.0], own_experts_L=[0, 0], experts_L=[3.0, 4.0], head_s=0.5, backward=2.0
    )
    assert stages.attention_S == (1.0, 2.0, 1.5, 4.0)
    assert stages.experts_S == (3.0, 4.0, 8.0, 6.0)
    assert stages.final_s == 2.0
    assert stages.label_S == (("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0))
    # (1 + 2) x 3 passes + (3 + 4) x 3 passes + head 1.5
    assert simulate(stages, num_micro_batches=1).makespan_s == 31.5


def test_running_ahead_hides_the_dispatch_of_own_experts() -> None:
    """At once an attention device waits 2 for its own tokens; one task ahead it works meanwhile."""
    stages = layer_stages(attention_L=[1.0], own_experts_L=[1.0], experts_L=[1.0], dispatch_s=2)
    # At once: A 0-1, X 3-4, A 4-5, X 7-8. Ahead: A 0-1, A 1-2, X 3-4, X 5-6 (second dispatch 3-5).
    assert simulate(stages, num_micro_batches=2).makespan_s == 8.0
    assert simulate(stages, num_micro_batches=2, lag=1).makespan_s == 6.0


def test_numbers_out_of_range_are_refused() -> None:
    """No micro-batch, a lag of R, lengths that differ, negative times."""
    stages = fig_6([0.0] * 3, [1.0] * 3)
    for R, lag in ((0, 0), (2, 2), (2, -1)):
        with pytest.raises(InputError, match="micro-batches"):
            simulate(stages, num_micro_batches=R, lag=lag)
    with pytest.raises(InputError, match="one duration"):
        layer_stages(attention_L=[1.0], own_experts_L=[0.0, 0.0], experts_L=[1.0])
    with pytest.raises(InputError, match="negative"):
        layer_stages(attention_L=[1.0], own_experts_L=[0.0], experts_L=[-1.0])


@st.composite
def steps(draw: st.DrawFn) -> tuple[Stages, int, int]:
    """Draw layers of any times, micro-batches and a lag."""
    L, R = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    three = [draw(st.lists(TIMES, min_size=L, max_size=L)) for _ in range(3)]
    stages = layer_stages(
        attention_L=three[0],
        own_experts_L=three[1],
        experts_L=three[2],
        dispatch_s=draw(TIMES),
        combine_s=draw(TIMES),
        head_s=draw(TIMES),
        backward=draw(st.sampled_from([0.0, 2.0, 3.0])),
    )
    return stages, R, draw(st.integers(0, R - 1))


@settings(max_examples=40, deadline=None)
@given(steps())
def test_any_step_matches_the_reference_and_its_bound(step: tuple[Stages, int, int]) -> None:
    """The same makespan as the longest path, and no less than the bound."""
    stages, R, lag = step
    schedule = simulate(stages, num_micro_batches=R, lag=lag)
    assert schedule.makespan_s == pytest.approx(reference_makespan(stages, R, lag))
    assert makespan_s(stages, num_micro_batches=R, lag=lag) == pytest.approx(schedule.makespan_s, abs=1e-12)
    assert stages.lower_bound_s(R) <= schedule.makespan_s + 1e-9


def check_streams(schedule: Schedule) -> None:
    """Fail where tasks of one stream overlap."""
    of_stream = defaultdict(list)
    for event in schedule.events:
        of_stream[event.stream].append((event.start_s, event.end_s))
    for tasks in of_stream.values():
        tasks.sort()
        assert all(first[1] <= then[0] + 1e-9 for first, then in itertools.pairwise(tasks))


@settings(max_examples=40, deadline=None)
@given(steps())
def test_streams_do_one_thing_at_a_time_and_inputs_come_first(step: tuple[Stages, int, int]) -> None:
    """No overlap on a stream; t(A_i,j) >= t(C_i-1,j) + T_C, and each task follows what feeds it."""
    stages, R, lag = step
    schedule = simulate(stages, num_micro_batches=R, lag=lag)
    check_streams(schedule)
    at = {(e.task, e.stage, e.micro_batch): e for e in schedule.events}
    feeds = {
        "dispatch": [("attention", 0)],
        "experts": [("dispatch", 0)],
        "own experts": [("dispatch", 0)],
        "combine": [("experts", 0), ("own experts", 0)],
        "attention": [("combine", -1)],
    }
    for (task, stage, j), event in at.items():
        for feed, shift in feeds[task]:
            if (feed, stage + shift, j) in at:
                assert at[feed, stage + shift, j].end_s <= event.start_s + 1e-9
    work = R * (stages.attention_work_s + sum(stages.experts_S))
    assert schedule.busy_s("attention") + schedule.busy_s("experts") == pytest.approx(work)
