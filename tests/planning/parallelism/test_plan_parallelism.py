"""The search, the placement of experts, and the plan: against slow references, bounds and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.calibration import DataSheetCalibration, LinearCalibration
from placement.errors import InfeasibleError, InputError
from placement.io import dump_json, placement_from_dict
from placement.model_shape import ModelShape
from placement.planning import plan_parallelism as top_level
from placement.planning.parallelism import (
    Checkpointing,
    Exchange,
    ExpertTraffic,
    Mesh,
    ParallelismQuestion,
    Reason,
    SearchRanges,
    TrainingJob,
    plan_parallelism,
)
from placement.planning.parallelism.experts import CONTIGUOUS, HILL_CLIMB, OURS, group_topology, place_experts
from placement.planning.transformer import TransformerShape
from placement.problem import Objective
from placement.profile import RoutingProfile
from placement.topology import parse_topology

MOE = ModelShape(name="m", num_layers=4, num_experts=8, top_k=2, hidden_size=1024, expert_hidden_size=2048)
JOB = TrainingJob(
    transformer=TransformerShape(moe=MOE, num_attention_heads=8), sequence_length=512, global_batch=32
)


def question(**changes: Any) -> ParallelismQuestion:
    """Return a small question on two nodes of four, with some parts changed."""
    given = {"job": JOB, "topology": parse_topology("a100:2x4"), "ranges": SearchRanges(micro_batch=(1, 2))}
    return ParallelismQuestion(**{**given, **changes})


def profile(*, seed: int = 0, layers: int = 4, windows: int = 6, skew: float = 1.0) -> RoutingProfile:
    """Return skewed loads of eight experts that drift a little from window to window."""
    rng = np.random.default_rng(seed)
    base_LE = np.exp(skew * rng.normal(size=(layers, 8)))
    load_WLE = np.round(200 * base_LE * np.exp(0.2 * rng.normal(size=(windows, layers, 8)))) + 1
    # Every layer routes the same pairs.
    load_WLE *= 1000 / load_WLE.sum(axis=2, keepdims=True)
    return RoutingProfile(load_WLE=load_WLE, window_tokens_W=np.full(windows, 500), top_k=2)


def test_every_mesh_is_looked_at_once() -> None:
    """Meshes of eight devices: taken or rejected, each once; taken ones are whole and possible."""
    plan = plan_parallelism(question())
    meshes = [
        Mesh(pipeline=p, expert=e, tensor=t, data=8 // (p * e * t))
        for p, e, t in itertools.product((1, 2, 4, 8), repeat=3)
        if 8 % (p * e * t) == 0
    ]
    taken = {ranked.balanced.strategy.mesh for ranked in plan.ranked}
    rejected = {rejection.mesh: rejection.reason for rejection in plan.search.rejections}
    assert taken | set(rejected) == set(meshes)
    assert not taken & set(rejected)
    assert plan.search.num_meshes == len(meshes) == 20
    assert rejected[Mesh(pipeline=8, expert=1)] is Reason.LAYERS
    assert rejected[Mesh(pipeline=1, expert=4, tensor=2)] is Reason.RANGE
    assert sum(plan.rejected_by_reason.values()) == len(rejected)


@pytest.mark.parametrize(
    ("changes", "mesh", "reason"),
    [
        ({"fast_domain": 4}, Mesh(pipeline=1, expert=8), Reason.DOMAIN),
        ({"job": replace(JOB, global_batch=12)}, Mesh(pipeline=1, expert=8), Reason.BATCH),
        ({"ranges": SearchRanges(tensor=())}, Mesh(pipeline=1, expert=1, tensor=8), Reason.TENSOR),
        ({"memory_bytes": 2 * 10**9}, Mesh(pipeline=1, expert=1, data=8), Reason.MEMORY),
        ({"ranges": SearchRanges(virtual_stages=(2,))}, Mesh(pipeline=1, expert=8), Reason.SCHEDULE),
        (
            {"topology": parse_topology("a100:3x4")},
            Mesh(pipeline=1, expert=3, data=4),
            Reason.EXPERTS,
        ),
    ],
)
def test_reasons(changes: dict[str, Any], mesh: Mesh, reason: Reason) -> None:
    """Each constraint is named where it bites."""
    if "topology" in changes:
        changes = {**changes, "job": replace(JOB, global_batch=24)}
    plan = plan_parallelism(question(**changes))
    assert {rejection.mesh: rejection.reason for rejection in plan.search.rejections}[mesh] is reason


def test_what_is_taken_fits_and_is_ranked() -> None:
    """Peaks stay within memory, utilisation falls along the ranks and is FLOPs over peak and time."""
    plan = plan_parallelism(question(memory_bytes=3 * 10**9))
    shares = [ranked.best.utilisation for ranked in plan.ranked]
    assert shares == sorted(shares, reverse=True)
    for ranked in plan.ranked:
        best = ranked.best
        assert best.memory.peak_bytes <= 3 * 10**9
        assert sum(best.step.parts().values()) == pytest.approx(best.step.total_s)
        flops = JOB.model_flops_per_step
        assert best.utilisation == pytest.approx(flops / (8 * 312e12 * best.step.total_s))
        strategy = best.strategy
        assert strategy.mesh.num_sources * strategy.micro_batch * strategy.num_micro_batches == 32
    for rejection in plan.search.rejections:
        assert (rejection.missing_bytes > 0) == (rejection.reason is Reason.MEMORY)


def test_one_step_by_hand() -> None:
    """Four experts' devices in one node, one stage: every part of the step followed by hand."""
    ranges = SearchRanges(pipeline=(1,), expert=(4,), data=(2,), micro_batch=(1,), virtual_stages=(1,))
    plan = plan_parallelism(question(ranges=ranges))
    parts = plan.best.best.step.parts()
    # 32 sequences over 8 devices: 4 micro-batches of 512 tokens. Attention: 4 * 2^20 weights and scores
    # 2 * 512 * 1024 FLOPs a token (causal); 271 TFLOP/s are achieved. Three passes, four layers.
    attention = 512 * (2 * 4 * 2**20 + 2 * 512 * 1024) / 271e12
    assert parts["attention"] == pytest.approx(4 * 3 * 4 * attention)
    # 1,024 pairs on two experts of 3 * 2^21 weights each: 512 tokens are above the knee of the roofline.
    expert = 512 * 2 * 3 * 2**21 / 271e12
    assert parts["experts"] == pytest.approx(4 * 3 * 4 * 2 * expert)
    # 768 of 1,024 pairs come from others, 2 KiB each, at 0.55 of 300 GB/s plus 50 us; four times a layer.
    exchange = 50e-6 + 768 * 2048 / (0.55 * 300e9)
    assert parts["all-to-all"] == pytest.approx(4 * 4 * 4 * exchange)
    # Gradients, 2 bytes: attention 4 * 2^22 weights over 8 devices (node, then a quarter over two nodes),
    # experts 4 * 2 * 3 * 2^21 weights over two nodes.
    node, across = 0.55 * 300e9, 0.45 * 25e9
    attention_bytes, expert_bytes = 2 * 4 * 2**22, 2 * 4 * 2 * 3 * 2**21
    gradients = (
        1.5 * attention_bytes / node + 100e-6 + attention_bytes / 4 / across + 200e-6
        + expert_bytes / across + 200e-6
    )  # fmt: skip
    assert parts["gradients"] == pytest.approx(gradients)
    assert parts["pipeline bubble"] == parts["stage sends"] == 0.0


def test_checkpointing_costs_a_forward_pass() -> None:
    """Full checkpointing computes four passes for three, and exchanges six times for four."""
    given = {"pipeline": (2,), "expert": (4,), "micro_batch": (1,), "virtual_stages": (1,)}
    none, full = (
        plan_parallelism(
            question(ranges=SearchRanges(**given, checkpointing=(choice,)))  # type: ignore[arg-type]
        ).best.best
        for choice in (Checkpointing.NONE, Checkpointing.FULL)
    )
    assert full.step.experts_P == pytest.approx(4 / 3 * none.step.experts_P)
    assert full.step.attention_P == pytest.approx(4 / 3 * none.step.attention_P)
    assert full.step.exchange_P == pytest.approx(3 / 2 * none.step.exchange_P)
    assert full.memory.peak_bytes < none.memory.peak_bytes


def test_nothing_fits() -> None:
    """The error names the nearest strategy, what it lacks, and how many devices would do."""
    with pytest.raises(InfeasibleError, match=r"nearest is PP4 x EP2.*GiB too much.*16 devices would do"):
        plan_parallelism(question(memory_bytes=45 * 10**7))
    with pytest.raises(InfeasibleError, match="128 devices would not do either"):
        plan_parallelism(question(memory_bytes=10**6))


def test_no_mesh_is_possible() -> None:
    """Where nothing divides, the reasons are counted."""
    with pytest.raises(InfeasibleError, match=r"no mesh of 8 devices is possible.*does not divide over"):
        plan_parallelism(
            question(job=replace(JOB, global_batch=3), ranges=SearchRanges(pipeline=(1,), expert=(8,)))
        )


def test_bad_questions() -> None:
    """Figures out of range, unlike devices and abstract costs are refused."""
    with pytest.raises(InputError, match="memory_bytes is 0"):
        question(memory_bytes=0)
    with pytest.raises(InputError, match=r"range expert is \[0\]"):
        SearchRanges(expert=(0,))
    with pytest.raises(InputError, match="range exchange is empty"):
        SearchRanges(exchange=())
    with pytest.raises(InputError, match="not for traffic"):
        ExpertTraffic(profile=profile(), objective=Objective.TRAFFIC)
    with pytest.raises(InputError, match="use plan hetero"):
        plan_parallelism(question(topology=parse_topology("a40:1x4+v100:1x4")))
    with pytest.raises(InputError, match="not in seconds"):
        plan_parallelism(question(calibration=LinearCalibration()))
    with pytest.raises(InputError, match="the trace has 8 MoE layers, model m has 4"):
        question(traffic=ExpertTraffic(profile=profile(layers=8)))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), skew=st.floats(0.2, 1.5))
def test_ours_is_never_worse_than_hill_climbing(seed: int, skew: float) -> None:
    """On fitted windows ours is the best of all policies, and of all placements of one layer."""
    loads = profile(seed=seed, layers=1, windows=4, skew=skew)
    plan = place_experts(
        loads,
        parse_topology("a100:2x4"),
        replace(MOE, num_layers=1, num_decoder_layers=0, moe_layer_ids=()),
        Mesh(pipeline=1, expert=2),
        calibration=DataSheetCalibration(),
        work_s=0.05,
    )
    fitted = {name: score.fitted for name, score in plan.policies.items()}
    assert fitted[OURS] <= min(fitted.values())
    assert plan.lower_bound <= fitted[OURS] * (1 + 1e-12)
    # Every way to give four of eight experts to the first device.
    fit = loads.load_WLE[::2, 0]
    best = min(
        float(np.mean([max(w[list(half)].sum(), w.sum() - w[list(half)].sum()) / (w.sum() / 2) for w in fit]))
        for half in itertools.combinations(range(8), 4)
    )
    assert plan.lower_bound <= best * (1 + 1e-9)
    assert fitted[OURS] >= best * (1 - 1e-9)
    held = loads.load_WLE[1::2, 0]
    device_E = plan.ours.placement.first_device_LE[0]
    factor = np.mean([np.bincount(device_E, weights=w).max() / (w.sum() / 2) for w in held])
    assert plan.ours.held_out_factor == pytest.approx(factor)


def test_step_time_may_be_the_objective() -> None:
    """Under step-time ours is no slower than any policy on fitted windows, nor below its bound."""
    plan = place_experts(
        profile(skew=1.2),
        parse_topology("a100:4x2"),
        MOE,
        Mesh(pipeline=2, expert=2, tensor=2),
        calibration=DataSheetCalibration(),
        objective=Objective.STEP_TIME,
        work_s=0.05,
    )
    assert plan.lower_bound <= plan.ours.fitted <= min(score.fitted for score in plan.policies.values())


@settings(max_examples=8, deadline=None)
@given(memory=st.integers(6, 40), batch=st.sampled_from([16, 32, 64]), flash=st.booleans())
def test_never_worse_than_piper(memory: int, batch: int, flash: bool) -> None:
    """The best of all strategies is no worse than the best of Piper's: PP x EP = devices, plain 1F1B."""
    job = replace(JOB, global_batch=batch, flash_attention=flash)
    piper = SearchRanges(data=(1,), tensor=(1,), virtual_stages=(1,), micro_batch=(1,))
    shares = []
    for ranges in (SearchRanges(tensor=()), piper):
        try:
            plan = plan_parallelism(question(job=job, ranges=ranges, memory_bytes=memory * 10**8))
        except InfeasibleError:
            shares.append(0.0)
            continue
        assert all(ranked.best.memory.peak_bytes <= memory * 10**8 for ranked in plan.ranked)
        shares.append(plan.best.best.utilisation)
    assert shares[0] >= shares[1]


def test_groups_keep_their_tiers() -> None:
    """A group of eight on nodes of four spans two of them; one of four lies in a node."""
    topology = parse_topology("a100:4x4")
    wide = group_topology(topology, Mesh(pipeline=1, expert=8, data=2), bytes_per_device=1)
    assert [tier.group_D.tolist() for tier in wide.tiers] == [[0] * 4 + [1] * 4, [0] * 8]
    narrow = group_topology(topology, Mesh(pipeline=4, expert=4), bytes_per_device=1)
    assert [tier.group_D.tolist() for tier in narrow.tiers] == [[0] * 4]
    split = group_topology(topology, Mesh(pipeline=2, expert=4, tensor=2), bytes_per_device=1)
    assert [tier.group_D.tolist() for tier in split.tiers] == [[0, 0, 1, 1], [0] * 4]


def placed_question() -> ParallelismQuestion:
    """Return a question with traffic, whose experts are spread over two devices or more."""
    ranges = SearchRanges(expert=(2, 4, 8), micro_batch=(1, 2))
    return question(ranges=ranges, traffic=ExpertTraffic(profile=profile(), work_s=0.1))


@pytest.fixture(scope="module")
def placed_plan() -> Any:
    """Return a plan with experts placed."""
    return plan_parallelism(placed_question())


def test_real_loads_only_slow_down(placed_plan: Any) -> None:
    """Steps with real loads are no faster than balanced ones, ours no slower than the others, best first."""
    evaluated = [ranked for ranked in placed_plan.ranked if ranked.evaluated]
    shares = [ranked.best.utilisation for ranked in evaluated]
    assert shares == sorted(shares, reverse=True)
    for ranked in evaluated:
        assert ranked.best.step.total_s >= ranked.lower_bound_s
        fitted = {name: score.fitted for name, score in ranked.placed.experts.policies.items()}
        assert fitted[OURS] <= fitted[HILL_CLIMB]
        assert ranked.placed.experts.lower_bound <= fitted[OURS]
    left = [ranked.balanced.utilisation for ranked in placed_plan.ranked if not ranked.evaluated]
    assert placed_plan.utilisation_bound == max([shares[0], *left])


def test_fewer_groups_leave_a_bound() -> None:
    """With one group placed, strategies on others are told as bounds."""
    ranges = SearchRanges(expert=(2, 4, 8), micro_batch=(1,), virtual_stages=(1,))
    plan = plan_parallelism(
        question(ranges=ranges, traffic=ExpertTraffic(profile=profile(skew=1.5), groups=1, work_s=0.05))
    )
    experts = {r.balanced.strategy.mesh.expert for r in plan.ranked if r.evaluated}
    assert len(experts) == 1
    assert plan.utilisation_bound >= plan.best.best.utilisation


def test_migration(placed_plan: Any) -> None:
    """Migration takes 5 % of the time at most; its figures follow from the placements."""
    ranked = next(ranked for ranked in placed_plan.ranked if ranked.placed is not None)
    migration, placed = ranked.placed.migration, ranked.placed
    assert migration.share_of_time <= 0.05 + 1e-12
    before, after = placed.experts.policies[CONTIGUOUS].placement, placed.experts.ours.placement
    new = (after.count_LED > 0) & (before.count_LED == 0)
    assert len(migration.moves) == new.sum()
    received_PD = [new[list(layers)].sum(axis=(0, 1)) for layers in ranked.balanced.layers.moe_layers]
    assert migration.busiest_device_bytes == np.max(received_PD) * 16 * 3 * 1024 * 2048
    expert = ranked.balanced.strategy.mesh.expert
    # 48 E d f / G.
    assert migration.worst_layer_bytes == 48 * 8 * 1024 * 2048 / expert
    saved_s = migration.step_before_s - migration.step_after_s
    assert migration.break_even_steps == int(np.ceil(migration.seconds / saved_s))
    # At the trigger, what is saved in an interval is what moving costs.
    per_factor = saved_s / (migration.factor_before - migration.factor_after)
    saved_s = (migration.trigger_factor - migration.factor_after) * per_factor * migration.interval_steps
    assert saved_s == pytest.approx(migration.seconds)
    assert replace(migration, step_after_s=migration.step_before_s).trigger_factor is None
    assert replace(migration, step_after_s=migration.step_before_s).break_even_steps is None


def test_the_json_form(placed_plan: Any) -> None:
    """The plan is strict JSON, the same each time, with the placements of each stage's layers."""
    values = placed_plan.to_dict()
    assert (values["format"], values["plan"]) == ("moe-placement-plan/1", "parallelism")
    again = plan_parallelism(placed_question())
    assert dump_json(again.to_dict()) == dump_json(values)
    best = placed_plan.best
    stages = [stage for stage in best.balanced.layers.moe_layers if stage]
    assert len(values["placement"]) == len(stages)
    whole = best.placed.experts.ours.placement
    for entry, held in zip(values["placement"], stages, strict=True):
        placement = placement_from_dict(entry["placement"])
        assert placement.moe_layer_ids == held
        assert placement.count_LED.tolist() == whole.count_LED[list(held)].tolist()


def test_without_traffic_there_is_no_placement() -> None:
    """Balanced loads give a plan without placements, whose bound is its own utilisation."""
    plan = top_level(question(ranges=SearchRanges(exchange=(Exchange.HIERARCHICAL,))))
    values = plan.to_dict()
    assert values["placement"] is None
    assert values["utilisation_bound"] == plan.best.best.utilisation
    assert dump_json(values) == dump_json(plan.to_dict())


def test_one_device_per_group_needs_no_placement() -> None:
    """Where each device holds all experts, loads are balanced as they come and nothing is placed."""
    ranges = SearchRanges(expert=(1,), micro_batch=(1,))
    plan = plan_parallelism(question(ranges=ranges, traffic=ExpertTraffic(profile=profile())))
    assert plan.best.evaluated
    assert plan.best.placed is None
    assert plan.best.best.step.exchange_P.max() == 0.0
