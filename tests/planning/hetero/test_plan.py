"""Tests of `plan_hetero`: HeterMoE's figures, Algorithm 1, brute force, memory, placement."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning.hetero.zebra_reference import reference_makespan

from placement import CostModel, make_problem, optimize
from placement.devices import device_kind
from placement.errors import InfeasibleError, InputError
from placement.model import ModelShape
from placement.planning import plan_hetero
from placement.planning.hetero import (
    DeviceClass,
    HeteroJob,
    HeteroPlan,
    ZebraGroup,
    all_groups,
    class_from_sheet,
    ep_ideal_s,
    ep_s,
    group_topology,
    placement_of,
    topology_of,
)
from placement.planning.hetero.assignment import GroupTimes, contiguous_assignment
from placement.planning.hetero.search import algorithm_1, search
from placement.planning.transformer import TransformerShape
from placement.profile import RoutingProfile


def a_class(name: str, count: int, attention_s: float, expert_s: float, **more: Any) -> DeviceClass:
    """Return a class with given times; only its links and memory come from the kind."""
    return DeviceClass(
        name=name, kind=device_kind(name), count=count, attention_s=attention_s, expert_s=expert_s, **more
    )


def mixed(share: float, ratio: float, *, a40: int = 6, v100: int = 6) -> list[DeviceClass]:
    """Return A40 and V100: attention takes `share` of an A40's time; a V100 takes `ratio` times as long.

    On experts a V100 has 80 % of an A40's speed.
    """
    return [a_class("a40", a40, share, 1 - share), a_class("v100", v100, share * ratio, (1 - share) / 0.8)]


def even(layers: int = 4, experts: int = 24, **more: Any) -> HeteroJob:
    """Return a training step with even loads."""
    given: dict[str, Any] = {"tokens_per_step": 1.0, "micro_batches": (6,), "backward": 2.0, **more}
    return HeteroJob(load_LE=np.ones((layers, experts)), **given)


@pytest.mark.parametrize(("share", "ratio"), [(0.3, 2.0), (0.3, 3.7), (0.5, 3.7), (0.6, 2.0), (0.6, 3.7)])
def test_o1_lies_where_the_paper_puts_it(share: float, ratio: float) -> None:
    """HeterMoE (arXiv 2504.03871) on 6 A40 + 6 V100, compute only.

    The paper: 1.18 times EP(Ideal) on average, at worst -3 %; 1.67 to 2.29 times EP; DistEP at 55 %.
    """
    plan = plan_hetero(mixed(share, ratio), even(layers=8, micro_batches=(8,)))
    ideal, ep, apart = (plan.speed_up(name) for name in ("EP(Ideal)", "EP", "DistEP"))
    assert ideal is not None
    assert ep is not None
    assert apart is not None
    assert 1.05 <= ideal <= 1.20
    assert 1.31 <= ep <= 2.29
    assert 0.40 <= 1 / apart <= 0.60


def test_baselines_by_hand() -> None:
    """One layer of 12 experts, 6 A40 + 6 V100, share 0.6, ratio 3.7; seconds for one token."""
    classes, job = mixed(0.6, 3.7), even(layers=1, experts=12, backward=0.0)
    # The V100s gate: 0.6 x 3.7 / 12 + 0.4 / 0.8 / 12; perfect shares: 0.6 / (6 + 6/3.7) + 0.4 / (6 + 4.8).
    assert ep_s(classes, job) == pytest.approx(0.185 + 0.5 / 12)
    assert ep_ideal_s(classes, job) == pytest.approx(0.6 / (6 + 6 / 3.7) + 0.4 / 10.8)
    # With both sides' work equal to the rest, zebra would reach 0.6 / 6 = 0.1: 2.27 times EP.
    assert ep_s(classes, job) / 0.1 == pytest.approx(2.27, abs=0.005)


def test_half_the_a40_replaced_by_v100() -> None:
    """2 A40 + 2 V100 against 4 A40 under EP: compute alone allows (2 + 2 x 0.8) / 4 = 0.90.

    HeterMoE reports 0.95 on average; that needs the A40s to expose 5 % of their step in exchanges.
    """
    plan = plan_hetero(mixed(0.4, 3.0, a40=2, v100=2), even(micro_batches=(16,)))
    alone = [a_class("a40", 4, 0.4, 0.6)]
    compute = ep_s(alone, even())
    assert compute == pytest.approx(4 * 3 / 4)
    ratio = compute / plan.answer.makespan_s
    assert 0.87 <= ratio <= 0.90
    assert 0.90 <= ratio / (1 - 0.05) <= 0.95


def assert_never_slower(plan: HeteroPlan) -> None:
    """Fail where a published assignment is faster than the plan, or the bound above it."""
    for contender in plan.contenders:
        if contender.name.startswith(("Algorithm 1", "zebra")) and contender.step_s is not None:
            assert plan.answer.makespan_s <= contender.step_s * (1 + 1e-12)
    assert plan.answer.lower_bound_s <= plan.answer.makespan_s
    assert plan.cluster_bound_s <= plan.answer.makespan_s


@st.composite
def problems(draw: st.DrawFn) -> GroupTimes:
    """Draw a group of 1 to 4 devices a side, layers, uneven loads, memory and exchange."""
    M, N = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    L, n = draw(st.integers(1, 4)), draw(st.integers(4, 12))
    seconds = st.floats(0.2, 4.0)
    classes = (
        a_class("a40", M, draw(seconds), draw(seconds), memory_bytes=draw(st.integers(0, L * n)) + 1),
        a_class("v100", N, 9.0, draw(seconds), memory_bytes=draw(st.integers(1, L * n)) + 1),
    )
    load = draw(st.sampled_from([np.ones((L, n)), 1.0 + np.arange(L * n).reshape(L, n) % 5]))
    job = HeteroJob(
        load_LE=load,
        tokens_per_step=8.0,
        backward=draw(st.sampled_from([0.0, 2.0])),
        expert_bytes=1,
        attention_bytes=1,
        activation_bytes=1,
        dispatch_latency_s=draw(st.sampled_from([0.0, 0.3])),
        combine_latency_s=0.1,
    )
    group = ZebraGroup(classes=classes, attention=(M, 0), experts=(0, N))
    return GroupTimes(group=group, job=job, num_micro_batches=draw(st.integers(1, 4)))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_group_is_never_slower_than_algorithm_1_and_keeps_memory(times: GroupTimes) -> None:
    """The makespan is the reference's, below every fitting published assignment's, above the bound."""
    answer, room_G = search(times), times.group.room_G(times.job)
    if answer is None:
        assert room_G.sum() < times.job.load_LE.size
        return
    assert (np.bincount(answer.device_LE.ravel(), minlength=room_G.size) <= room_G).all()
    R, stages = times.num_micro_batches, times.stages(*times.side_times(answer.device_LE))
    assert answer.makespan_s == pytest.approx(reference_makespan(stages, R, answer.lag))
    assert answer.lower_bound_s <= answer.makespan_s
    for printed in (True, False):
        offload_L = algorithm_1(times, as_printed=printed).offload_L
        if offload_L is None:
            continue
        published = contiguous_assignment(times, offload_L)
        if (np.bincount(published.ravel(), minlength=room_G.size) <= room_G).all():
            stages = times.stages(*times.side_times(published))
            for lag in {0, R // 2}:
                assert answer.makespan_s <= reference_makespan(stages, R, lag) * (1 + 1e-9)


def brute_force(times: GroupTimes) -> float:
    """Return the least makespan over every assignment of experts that fits."""
    room_G, best = times.group.room_G(times.job), np.inf
    L, n = times.job.load_LE.shape
    for devices in itertools.product(range(times.group.num_devices), repeat=L * n):
        if (np.bincount(devices, minlength=room_G.size) <= room_G).all():
            stages = times.stages(*times.side_times(np.reshape(devices, (L, n))))
            R = times.num_micro_batches
            best = min(best, *(reference_makespan(stages, R, lag) for lag in {0, R // 2}))
    return float(best)


@pytest.mark.parametrize(("memory", "load"), [(4, [[1, 1, 1], [1, 1, 1]]), (3, [[3, 1, 1], [1, 2, 2]])])
def test_small_groups_are_solved_exactly(memory: int, load: list[list[int]]) -> None:
    """1 attention and 2 expert devices, 2 layers of 3 experts: nothing beats the answer, nor the bound it."""
    classes = (
        a_class("a40", 1, 1.0, 2.0, memory_bytes=memory),
        a_class("v100", 2, 9.0, 4.0, memory_bytes=memory),
    )
    group = ZebraGroup(classes=classes, attention=(1, 0), experts=(0, 2))
    job = HeteroJob(load_LE=np.array(load), tokens_per_step=2.0, expert_bytes=1)
    times = GroupTimes(group=group, job=job, num_micro_batches=2)
    answer = search(times)
    assert answer is not None
    assert answer.makespan_s == pytest.approx(brute_force(times))
    assert answer.lower_bound_s <= brute_force(times) + 1e-9


def test_four_attention_and_three_expert_devices() -> None:
    """HeterMoE loses 24 % at 4:3, where Algorithm 1 is undefined; here experts move all the same."""
    classes = mixed(0.3, 3.0, a40=4, v100=3)
    group = ZebraGroup(classes=tuple(classes), attention=(4, 0), experts=(0, 3))
    plan = plan_hetero(classes, even(), groups=[group])
    assert plan.asymmetric.offload_L is None
    assert plan.asymmetric.reason == "neither of 4 and 3 divides the other"
    without = next(its for its in plan.contenders if its.name == "zebra without offloading").step_s
    assert without is not None
    # Work is balanced at 4 x 3 / (4 + 3 x 0.8) = 1.875 s, without offloading 4 x 3 x 0.7 / 2.4 = 3.5 s.
    assert without > 3.5
    assert 1.875 <= plan.answer.makespan_s <= 1.875 * 1.15
    assert_never_slower(plan)


def test_role_search_mixes_a_class_where_that_pays() -> None:
    """Attention takes 60 %: a V100 attends as well; groups of every equal size were considered."""
    assert sum(1 for _ in all_groups(mixed(0.6, 2.0))) == 47 + 14 + 7 + 2
    plan = plan_hetero(mixed(0.6, 2.0), even())
    # All 6 A40 attend, and a V100 of each group as well.
    assert plan.group.experts[0] == 0
    assert plan.group.attention[1] == 1
    assert plan.num_candidates == 70
    assert_never_slower(plan)


def test_micro_batches_are_chosen() -> None:
    """More parts fill the pipeline better until latencies cost more than that."""
    for latency_s, wanted in ((0.0, 8), (0.5, 2)):
        job = even(
            layers=4, micro_batches=(2, 4, 8), dispatch_latency_s=latency_s, combine_latency_s=latency_s
        )
        plan = plan_hetero(mixed(0.5, 3.0, a40=1, v100=1), job)
        assert plan.answer.times.num_micro_batches == wanted


def test_slow_exchanges_are_warned_of() -> None:
    """An all-to-all slower than compute cannot be hidden."""
    assert plan_hetero(mixed(0.5, 3.0, a40=1, v100=1), even()).warnings == ()
    plan = plan_hetero(mixed(0.5, 3.0, a40=1, v100=1), even(dispatch_latency_s=9.0))
    assert len(plan.warnings) == 1
    assert "the dispatch is slower than compute" in plan.warnings[0]


def test_memory_that_fits_nowhere() -> None:
    """4 layers x 24 experts of 1 GB in 12 GB: bytes missing, and what would be enough."""
    classes = [
        a_class("a40", 1, 1.0, 1.0, memory_bytes=8 * 10**9),
        a_class("v100", 1, 3.0, 1.0, memory_bytes=4 * 10**9),
    ]
    with pytest.raises(
        InfeasibleError, match=r"84000000000 bytes .* missing .* more on each of its 2 devices"
    ) as info:
        plan_hetero(classes, even(expert_bytes=10**9))
    assert "or 11 more a40 for experts" in str(info.value)
    # 42 more of 1 GB on each are indeed enough.
    enough = [
        a_class(its.name, 1, its.attention_s, its.expert_s, memory_bytes=its.memory_bytes + 42 * 10**9)
        for its in classes
    ]
    plan = plan_hetero(enough, even(expert_bytes=10**9))
    assert plan.answer.own_count_L[0] <= 24


def test_attention_too_large_for_a_class_leaves_it_experts() -> None:
    """Only the A40 has room for attention, so the V100 never attends."""
    classes = [a_class("a40", 1, 1.0, 1.0), a_class("v100", 1, 1.0, 1.0)]
    plan = plan_hetero(classes, even(attention_bytes=30 * 2**30))
    assert plan.group.attention == (1, 0)
    assert plan.num_unfit == 1


def test_the_plan_is_json_and_repeats() -> None:
    """Strict JSON, the same twice, every expert on a device of the group."""
    classes, job = mixed(0.4, 3.0, a40=2, v100=2), even(layers=3)
    values = plan_hetero(classes, job, held_out_LE=np.ones((3, 24))).to_dict()
    assert json.dumps(values, allow_nan=False) == json.dumps(
        plan_hetero(classes, job, held_out_LE=np.ones((3, 24))).to_dict(), allow_nan=False
    )
    assert (values["format"], values["plan"]) == ("moe-placement-plan/1", "hetero")
    assert np.shape(values["device_of_expert"]) == (3, 24)
    assert values["held_out_step_s"] == pytest.approx(values["step_s"])
    assert values["lower_bound_s"] <= values["step_s"]


def test_wrong_input_is_named() -> None:
    """One clear sentence each."""
    with pytest.raises(InputError, match="class 'a40' has 0 devices"):
        a_class("a40", 0, 1.0, 1.0)
    with pytest.raises(InputError, match="needs two or more"):
        plan_hetero([a_class("a40", 1, 1.0, 1.0)], even())
    with pytest.raises(InputError, match="name of its own"):
        plan_hetero([a_class("a40", 1, 1.0, 1.0)] * 2, even())
    with pytest.raises(InputError, match="micro_batches"):
        even(micro_batches=(0,))
    with pytest.raises(InputError, match="loads of experts"):
        HeteroJob(load_LE=np.zeros((1, 4)), tokens_per_step=1.0)


MODEL = ModelShape(
    name="w1", num_layers=2, num_experts=12, top_k=2, hidden_size=2048, expert_hidden_size=8192
)


def sheet_classes(*, a40: int = 2, v100: int = 2) -> list[DeviceClass]:
    """Return classes from the data sheet."""
    shape = TransformerShape(moe=MODEL, num_attention_heads=16)
    return [
        class_from_sheet(
            device_kind(name), count=count, transformer=shape, sequence_length=65536, score_penalty=penalty
        )
        for name, count, penalty in (("a40", a40, 1.0), ("v100", v100, 3.3))
    ]


def test_times_from_the_data_sheet_are_those_of_the_paper() -> None:
    """HeterMoE: a V100 has 80 % of an A40's speed on experts and takes 3.7 times as long on 64K attention."""
    a40, v100 = sheet_classes()
    # The sheets' peaks give 125 / 149.7 = 0.835.
    assert a40.expert_s / v100.expert_s == pytest.approx(0.835, abs=0.001)
    assert v100.attention_s / a40.attention_s == pytest.approx(3.7, abs=0.1)


def routing(rng: np.random.Generator, *, tokens: int = 256) -> RoutingProfile:
    """Return tokens that like some experts better."""
    liking = 1.0 + np.arange(MODEL.num_experts) % 3
    experts = np.stack(
        [
            np.stack(
                [rng.choice(MODEL.num_experts, 2, replace=False, p=liking / liking.sum()) for _ in range(2)]
            )
            for _ in range(tokens)
        ]
    ).astype(np.uint8)
    load = np.stack([np.bincount(experts[:, layer].ravel(), minlength=12) for layer in range(2)])
    return RoutingProfile(
        load_WLE=load[None].astype(float), window_tokens_W=np.array([float(tokens)]), top_k=2,
        experts_TLK=experts, window_of_token_T=np.zeros(tokens, dtype=np.int64),
    )  # fmt: skip


def test_the_placement_is_priced_with_class_speeds() -> None:
    """The cost model's time of the plan's experts: the slowest device's load x its class's time."""
    profile = routing(np.random.default_rng(0))
    classes = sheet_classes()
    # Enough tokens that no expert is bound by reading its weights.
    many = RoutingProfile(
        load_WLE=profile.load_WLE * 1e4, window_tokens_W=profile.window_tokens_W * 1e4, top_k=2
    )
    job = HeteroJob(load_LE=profile.load_WLE[0], tokens_per_step=256e4)
    plan = plan_hetero(classes, job)
    topology = group_topology(plan.group, job, model=MODEL)
    placement = placement_of(plan.answer.device_LE, num_devices=plan.group.num_devices, model=MODEL)
    problem = make_problem(
        many, topology, model=MODEL, semantics="dispatch-nodedup", device_of_slot_S=placement.device_of_slot_S
    )
    breakdown = CostModel(problem).evaluate(placement)
    expert_s_D = plan.group.expert_s_G / MODEL.top_k
    load_LD = np.stack(
        [
            np.bincount(device_E, weights=load_E, minlength=topology.num_devices)
            for device_E, load_E in zip(plan.answer.device_LE, many.load_WLE[0], strict=True)
        ]
    )
    assert breakdown.experts_WL[0] == pytest.approx((load_LD * expert_s_D).max(axis=1))


def test_ordinary_placement_loads_devices_by_speed() -> None:
    """`optimize` on 6 A40 + 6 V100 with slots from memory: A40 carry as much more as they are faster.

    At most one expert of mean load (1/12 of a layer) lies between a device's load and its share of speed.
    """
    classes = sheet_classes(a40=3, v100=3)
    topology = topology_of(classes, model=MODEL)
    profile = routing(np.random.default_rng(1))
    many = RoutingProfile(
        load_WLE=profile.load_WLE * 1e4, window_tokens_W=profile.window_tokens_W * 1e4, top_k=2
    )
    problem = make_problem(many, topology, model=MODEL, semantics="dispatch-nodedup", slots_from_memory=True)
    assert problem.slots_D.min() > 2
    placement = optimize(problem, solver="search", seed=0, work_s=0.1).placement
    share_LED = placement.count_LED / placement.replicas_LE[:, :, None]
    load_D = (many.load_WLE[0][:, :, None] * share_LED).sum(axis=(0, 1))
    load_D /= load_D.sum()
    speed_D = topology.achieved_flops_D / topology.achieved_flops_D.sum()
    assert load_D[:3].mean() > load_D[3:].mean()
    assert np.abs(load_D - speed_D).max() < 1 / 24
