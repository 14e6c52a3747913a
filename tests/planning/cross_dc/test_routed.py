"""Real routing: the cost by hand and by a plain reference, optima by brute force, never worse."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InfeasibleError, InputError
from placement.planning.cross_dc import (
    CrossTraffic,
    Decision,
    Effort,
    EvenLoad,
    Level,
    best_sizes,
    best_uniform,
    choose_homes,
    contiguous_homes,
    distinct_use,
    even_times,
    link_use,
    plan_routed,
    simulated_even,
    simulated_layer,
    solve_cross,
    stay_home,
    step_time,
    time_LC,
    uniform_decision,
)
from placement.planning.cross_dc.bound import own_side_bound_L
from placement.planning.cross_dc.homes import most_local_homes, relieved_homes
from placement.planning.cross_dc.search import improved
from placement.planning.cross_dc.uniform import uniform_choices

QUICK = Effort(node_limit=0)


def traffic_of(tokens: object, **changes: object) -> CrossTraffic:
    """Return traffic with round figures: a token takes 1 ms one way, an expert 4 ms, 5 ms are hidden."""
    tokens_LCE = np.asarray(tokens, dtype=float)
    layers, centres, experts = tokens_LCE.shape
    values = {
        "home_LE": contiguous_homes(num_layers=layers, num_centres=centres, num_experts=experts),
        "bandwidth_C": np.full(centres, 1e6),
        "token_bytes": 1e3,
        "expert_bytes": 4e3,
        "pre_expert_s_L": np.full(layers, 5e-3),
    }
    return CrossTraffic(tokens_LCE=tokens_LCE, **{**values, **changes})  # type: ignore[arg-type]


def decided(serve: list[list[int]], copy: list[list[int]]) -> Decision:
    """Return a decision for one layer."""
    return Decision(serve_LCE=np.array([serve]), copy_LCE=np.array([copy], dtype=bool))


def drawn(
    seed: int, *, layers: int = 1, centres: int = 4, experts: int = 6, **changes: object
) -> CrossTraffic:
    """Return skewed routing."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(experts, 0.4), size=(layers, centres))
    return traffic_of(np.floor(40 * share), **changes)


def plain_reference(traffic: CrossTraffic, decision: Decision) -> float:
    """Return the step time expert by expert, as the definition reads."""
    passes = (1.0, 2.0) if traffic.training else (1.0,)
    total = 0.0
    for layer in range(traffic.num_layers):
        slowest = 0.0
        for c in range(traffic.num_centres):
            moved = {"copy in": 0.0, "copy out": 0.0, "out": 0.0, "in": 0.0}
            peers: dict[str, set[int]] = {side: set() for side in moved}
            for asker, expert in itertools.product(range(traffic.num_centres), range(traffic.num_experts)):
                home = int(traffic.home_LE[layer, expert])
                server = int(decision.serve_LCE[layer, asker, expert])
                tokens = float(traffic.tokens_LCE[layer, asker, expert])
                if decision.copy_LCE[layer, asker, expert]:
                    for side, end, other in (("copy in", asker, home), ("copy out", home, asker)):
                        if end == c:
                            moved[side] += traffic.expert_bytes / traffic.compression
                            peers[side].add(other)
                if server != asker and tokens:
                    for side, end, other in (("out", asker, server), ("in", server, asker)):
                        if end == c:
                            moved[side] += tokens * traffic.token_bytes
                            peers[side].add(other)
            side_s = {
                side: moved[side] / float(traffic.bandwidth_C[c]) + traffic.latency_s * len(peers[side])
                for side in moved
            }
            gather, exchange = max(side_s["copy in"], side_s["copy out"]), max(side_s["out"], side_s["in"])
            pre = float(traffic.pre_expert_s_L[layer])
            slowest = max(slowest, sum(max(w * pre, gather) + 2 * exchange for w in passes))
        total += slowest
    return total


def every_decision(traffic: CrossTraffic) -> list[Decision]:
    """Return all decisions of one layer in which copies serve their own data centre."""
    centres, experts = traffic.num_centres, traffic.num_experts
    cells = [(c, e) for c in range(centres) for e in range(experts) if traffic.home_LE[0, e] != c]
    found = []
    for servers in itertools.product(range(centres), repeat=len(cells)):
        serve = np.array(np.broadcast_to(traffic.home_LE[:, None, :], (1, centres, experts)))
        copy = np.zeros((1, centres, experts), dtype=bool)
        for (c, e), server in zip(cells, servers, strict=True):
            serve[0, c, e], copy[0, c, e] = server, server == c
        decision = Decision(serve_LCE=serve, copy_LCE=copy)
        try:
            decision.check(traffic)
        except InputError:
            continue
        if decision.fits(traffic):
            found.append(decision)
    return found


def test_two_data_centres_by_hand() -> None:
    """Each has one of two experts; 0 sends 10 tokens away, 1 sends 2.

    Plain: both links carry 10 one way: 5 ms hidden part + 2 x 10 ms. If 0 fetches expert 1: 4 ms under
    5 ms, then only 2 tokens travel: 5 + 2 x 2 ms. If both fetch, nothing travels but experts: 5 ms.
    """
    traffic = traffic_of([[[3, 10], [2, 7]]])
    home = stay_home(traffic)
    assert step_time(traffic, home) == pytest.approx(25e-3)
    one = decided([[0, 0], [0, 1]], [[0, 1], [0, 0]])
    assert step_time(traffic, one) == pytest.approx(9e-3)
    assert step_time(traffic, uniform_decision(traffic, 2, same_offset=True)) == pytest.approx(5e-3)
    solution = solve_cross(traffic)
    assert solution.step_s == pytest.approx(5e-3)
    assert solution.gap == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    training=st.booleans(),
    latency=st.sampled_from([0.0, 1e-3]),
    compression=st.sampled_from([1.0, 3.0]),
)
def test_the_cost_is_what_the_definition_says(
    seed: int, training: bool, latency: float, compression: float
) -> None:
    """Uniform domains and a searched decision, against a plain loop; bounds lie below; memory is kept."""
    bandwidth_C = np.random.default_rng(seed).uniform(5e5, 2e6, 4)
    traffic = drawn(
        seed,
        bandwidth_C=bandwidth_C,
        training=training,
        latency_s=latency,
        compression=compression,
        layer_copies=2,
    )
    solution = solve_cross(traffic, effort=QUICK)
    for decision in (solution.decision, *(choice.decision for choice in uniform_choices(traffic))):
        decision.check(traffic)
        assert decision.fits(traffic)
        assert step_time(traffic, decision) == pytest.approx(plain_reference(traffic, decision))
        assert own_side_bound_L(traffic).sum() <= step_time(traffic, decision)
    assert solution.lower_bound_s <= solution.step_s


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 2),
    layer_copies=st.sampled_from([None, 0, 1, 3]),
    total_copies=st.sampled_from([None, 0, 2, 5]),
)
def test_never_worse_than_the_best_uniform_domains(
    seed: int, layers: int, layer_copies: int | None, total_copies: int | None
) -> None:
    """Whatever the memory, also with room for every layer's sake only, and with homes chosen."""
    traffic = drawn(seed, layers=layers, layer_copies=layer_copies, total_copies=total_copies)
    uniform_s = min(
        plain_reference(traffic, uniform_decision(traffic, size, same_offset=same))
        for size in (1, 2, 4)
        for same in (True, False)
        if uniform_decision(traffic, size, same_offset=same).fits(traffic)
    )
    solution = solve_cross(traffic, effort=QUICK)
    assert solution.decision.fits(traffic)
    assert solution.step_s <= uniform_s * (1 + 1e-12)
    moved, better = choose_homes(traffic, effort=QUICK)
    assert better.step_s <= solution.step_s
    assert better.step_s == pytest.approx(plain_reference(moved, better.decision))


@pytest.mark.parametrize("latency", [0.0, 2e-3])
@pytest.mark.parametrize("copies", [None, 1])
@pytest.mark.parametrize(
    ("centres", "experts", "seed"), [(2, 4, 0), (2, 4, 1), (3, 2, 2), (3, 3, 3), (3, 3, 4)]
)
def test_the_program_finds_the_optimum(
    centres: int, experts: int, seed: int, copies: int | None, latency: float
) -> None:
    """Brute force over all decisions of a tiny layer gives the same time, and the bound is below it."""
    traffic = drawn(seed, centres=centres, experts=experts, layer_copies=copies, latency_s=latency)
    best_s = min(step_time(traffic, decision) for decision in every_decision(traffic))
    solution = solve_cross(traffic, effort=Effort(node_limit=1000, relative_gap=0.0))
    assert solution.step_s == pytest.approx(best_s)
    assert solution.lower_bound_s <= best_s * (1 + 1e-9)
    assert solution.gap < 1e-5


def test_what_a_home_hands_out_counts() -> None:
    """One hot expert, 30 tokens from each of three: both others fetch it, 2 x 4 ms out of its home."""
    traffic = traffic_of([[[30, 0, 0], [30, 0, 0], [30, 0, 0]]])
    assert solve_cross(traffic).step_s == pytest.approx(8e-3)


def test_search_sends_tokens_to_a_faster_holder() -> None:
    """Centre 1 holds a copy on a fast link; centre 2's 10 tokens leave the slow home for it.

    Home 0 has 1/4 of the bandwidth: 10 tokens take 40 ms in; centre 1 and 2 take 10 ms. Fetching is made
    dear for centre 2 by memory: nobody may hold more than the one copy that centre 1 has for expert 0.
    """
    traffic = traffic_of(
        [[[0, 0, 0], [10, 0, 0], [10, 0, 0]]],
        bandwidth_C=np.array([2.5e5, 1e6, 1e6]),
        expert_bytes=1e5,
        pre_expert_s_L=np.array([1.0]),
        layer_copies=1,
    )
    start = decided([[0, 1, 2], [1, 1, 2], [0, 1, 2]], [[0, 0, 0], [1, 0, 0], [0, 0, 0]])
    found = improved(traffic, start, most_moves=1)
    assert step_time(traffic, start) == pytest.approx(1.0 + 2 * 0.04)
    assert step_time(traffic, found) <= 1.0 + 2 * 0.01 + 1e-12


def even_traffic(load: EvenLoad, *, layer_copies: int | None = None) -> CrossTraffic:
    """Return the same layer as routing: one expert per data centre, all equally in demand."""
    (level,) = load.levels
    centres = level.size
    return CrossTraffic(
        tokens_LCE=np.full((1, centres, centres), load.data_bytes / centres),
        home_LE=contiguous_homes(num_layers=1, num_centres=centres, num_experts=centres),
        bandwidth_C=np.full(centres, level.bandwidth),
        token_bytes=1.0,
        expert_bytes=load.expert_bytes,
        pre_expert_s_L=np.array([load.pre_expert_s]),
        latency_s=level.latency_s,
        layer_copies=layer_copies,
    )


def even_load(size: int, *, expert: float, pre: float = 4e-3, latency: float = 0.0) -> EvenLoad:
    """Return even gating over links of 1 MB/s with 4.8 kB of tokens."""
    level = Level(name="dc", size=size, bandwidth=1e6, latency_s=latency)
    return EvenLoad(levels=(level,), data_bytes=4.8e3, expert_bytes=expert, pre_expert_s=pre)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("latency", [0.0, 1e-3])
def test_uniform_domains_under_even_load_take_what_the_model_says(size: int, latency: float) -> None:
    """The routed cost of a uniform size is the paper's T(S), messages included."""
    load = even_load(6, expert=2e3, latency=latency)
    traffic = even_traffic(load)
    decision = uniform_decision(traffic, size, same_offset=True)
    assert step_time(traffic, decision) == pytest.approx(even_times(load, (size,)).step_s)


def test_even_load_gives_the_best_uniform_domains() -> None:
    """Two experts of 2 ms fit under 4 ms, a domain of 3 of 6: nothing is better, and that is proved."""
    load = even_load(6, expert=2e3)
    solution = solve_cross(even_traffic(load))
    assert best_sizes(load).sizes == (3,)
    assert solution.step_s == pytest.approx(best_sizes(load).step_s)
    assert solution.gap == pytest.approx(0.0, abs=1e-9)


def test_even_load_gains_only_where_no_size_divides() -> None:
    """Of 5 data centres only 1 or 5 form domains: 4 + 2 x 4.8 x 4/5 ms, or 8 ms for four experts each.

    Two copies each fit under 4 ms: 4 + 2 x 4.8 x 2/5 ms.
    """
    load = even_load(5, expert=2e3)
    traffic = even_traffic(load)
    assert best_uniform(traffic).step_s == pytest.approx(best_sizes(load).step_s) == pytest.approx(8e-3)
    assert solve_cross(traffic).step_s == pytest.approx(7.84e-3)


def test_skewed_load_gains_strictly() -> None:
    """On skewed draws the program beats the best uniform size on most, and homes gain once more."""
    uniform_s, program_s, homes_s = [], [], []
    for seed in range(8):
        traffic = drawn(seed, experts=8, layer_copies=2)
        uniform_s.append(best_uniform(traffic).step_s)
        program_s.append(solve_cross(traffic, effort=QUICK).step_s)
        homes_s.append(choose_homes(traffic, effort=QUICK)[1].step_s)
    assert sum(a < b * (1 - 1e-9) for a, b in zip(program_s, uniform_s, strict=True)) >= 6
    assert sum(homes_s) < sum(program_s) < sum(uniform_s)


def test_the_same_input_gives_the_same_answer() -> None:
    """Twice the same decision, byte for byte."""
    first, second = (solve_cross(drawn(5, layers=2), effort=Effort(node_limit=5)) for _ in range(2))
    assert first.decision.serve_LCE.tobytes() == second.decision.serve_LCE.tobytes()
    assert first.bound_s_L.tobytes() == second.bound_s_L.tobytes()


def test_memory_over_all_layers_goes_where_it_helps() -> None:
    """Room for one copy per data centre over two layers: layer 1 has 30 tokens to spare, layer 0 only 2."""
    traffic = traffic_of([[[0, 2], [2, 0]], [[0, 30], [30, 0]]], total_copies=1)
    solution = solve_cross(traffic)
    assert solution.decision.copy_LCE.sum(axis=(1, 2)).tolist() == [0, 2]
    assert solution.step_s == pytest.approx(5e-3 + 2 * 2e-3 + 5e-3)


def test_homes_go_to_those_who_ask() -> None:
    """The assignment keeps 9 + 8 of 20 tokens; swaps relieve a link that hosts both hot experts.

    Experts 0 and 1 (10 tokens each from the other two) at data centre 0: 40 tokens in. One swap leaves
    at most 20 in anywhere.
    """
    assert most_local_homes(np.array([[1.0, 9.0], [8.0, 2.0]]), np.array([1, 1])).tolist() == [1, 0]
    tokens_CE = np.array([[0, 0, 0, 0, 0, 0], [10, 10, 0, 0, 0, 0], [10, 10, 0, 0, 0, 0]], dtype=float)
    home_E = relieved_homes(tokens_CE, np.array([0, 0, 1, 1, 2, 2]), np.full(3, 1e-3))
    assert np.bincount(home_E).tolist() == [2, 2, 2]
    assert home_E[0] != home_E[1]


def test_too_little_room_for_homes_is_infeasible() -> None:
    """Four experts in two data centres with room for one each."""
    with pytest.raises(InfeasibleError, match="house 2 of 4; give each room for 2"):
        choose_homes(traffic_of(np.ones((1, 2, 4))), room=1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("latency", [0.0, 1e-3])
def test_the_simulation_agrees_with_the_model(size: int, latency: float) -> None:
    """Message by message, 12 data centres take what the closed form says for every domain size."""
    load = even_load(12, expert=1e3, latency=latency)
    assert simulated_even(load, size) == pytest.approx(even_times(load, (size,)).step_s)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_simulation_never_beats_the_cost(seed: int) -> None:
    """Ports that wait for each other can only take longer than each port's own work."""
    traffic = drawn(seed, latency_s=1e-3)
    for decision in (stay_home(traffic), solve_cross(traffic, effort=QUICK).decision):
        use = link_use(traffic, decision)
        assert simulated_layer(traffic, use) >= float(time_LC(traffic, use).max()) * (1 - 1e-12)


def test_many_data_centres_are_searched() -> None:
    """One layer of 120 by 120, skewed, far beyond the integer program: better than any uniform size."""
    random = np.random.default_rng(0)
    popular = 1.0 / np.arange(1, 121)
    tokens = np.array([random.permutation(popular) for _ in range(120)])[None] * 100
    traffic = traffic_of(tokens, layer_copies=8)
    solution = solve_cross(traffic, effort=Effort(starts=1, node_limit=0, most_moves=50))
    assert solution.step_s < best_uniform(traffic).step_s
    assert solution.lower_bound_s <= solution.step_s


def test_a_token_for_two_experts_of_one_place_travels_once() -> None:
    """Three tokens of data centre 0, top-2: (2, 3), (2, 0), (0, 1): 2 distinct tokens go to 1, not 3."""
    traffic = traffic_of([[[2, 1, 2, 1], [0, 0, 0, 0]]])
    experts = np.array([[[2, 3]], [[2, 0]], [[0, 1]]])
    centre = np.zeros(3, dtype=np.int64)
    use = distinct_use(
        traffic, stay_home(traffic), experts_TLK=experts, centre_T=centre, scale_C=np.array([1.0, 0.0])
    )
    assert use.tokens_LCC[0].tolist() == [[0.0, 2.0], [0.0, 0.0]]
    assert link_use(traffic, stay_home(traffic)).tokens_LCC[0].tolist() == [[0.0, 3.0], [0.0, 0.0]]


def test_the_plan_judges_every_policy_on_held_out_windows() -> None:
    """The mean over windows of each policy's own decision, recomputed."""
    traffic = drawn(3, layers=2)
    held_out = np.stack([drawn(seed, layers=2).tokens_LCE for seed in (11, 12, 13)])
    plan = plan_routed(traffic, held_out_WLCE=held_out, effort=QUICK)
    assert plan.windows == 3
    for policy in plan.policies:
        expected = np.mean(
            [
                plain_reference(replace(policy.traffic, tokens_LCE=tokens), policy.decision)
                for tokens in held_out
            ]
        )
        assert policy.held_out_s == pytest.approx(expected)
    assert plan.chosen.fitted_s == min(policy.fitted_s for policy in plan.policies)


def test_bad_traffic_is_named() -> None:
    """Shapes, homes out of range, links without bandwidth, and servers without the expert."""
    good = traffic_of(np.ones((1, 2, 2)))
    with pytest.raises(InputError, match=r"data centre 1 has a link of 0\.0 bytes/s: it is disconnected"):
        replace(good, bandwidth_C=np.array([1.0, 0.0]))
    with pytest.raises(InputError, match=r"home_LE has shape \(1, 1\), not \(1, 2\)"):
        replace(good, home_LE=np.zeros((1, 1), dtype=np.int64))
    with pytest.raises(InputError, match=r"homes must lie within 0\.\.1"):
        replace(good, home_LE=np.array([[0, 2]]))
    bad = decided([[0, 0], [0, 1]], [[0, 0], [0, 0]])
    with pytest.raises(InputError, match="data centre 0 serves expert 1 to 0 without holding it"):
        bad.check(good)
    with pytest.raises(InputError, match="domains of 3 do not fill 2"):
        uniform_decision(good, 3, same_offset=True)
