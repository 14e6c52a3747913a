"""HybridEP's model under even gating: the paper's tables, closed form and limits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.planning.cross_dc import (
    EvenLoad,
    Level,
    best_share,
    best_sizes,
    break_even_tokens,
    even_times,
    message_counts,
    plan_cross_dc,
    scale_curve,
    share_of_size,
    time_of_share,
)
from placement.planning.cross_dc.level import divisors

MB = 1e6


def one_level(
    size: int = 8, *, gbits: float = 128, data_mb: float = 8, expert_mb: float = 4.7, pre_ms: float = 0.49
) -> EvenLoad:
    """Return one level; the defaults are the paper's Mix-1."""
    return EvenLoad(
        levels=(Level(name="GPU", size=size, bandwidth=gbits * 1e9 / 8),),
        data_bytes=data_mb * MB,
        expert_bytes=expert_mb * MB,
        pre_expert_s=pre_ms * 1e-3,
    )


MIX_1, MIX_2 = one_level(), one_level(expert_mb=2.35)
GATHER_1 = one_level(data_mb=3, expert_mb=0.094, pre_ms=0.99)
GATHER_2 = one_level(data_mb=3, expert_mb=0.047, pre_ms=0.99)


def test_frequencies_of_table_7() -> None:
    """HybridEP (arXiv 2510.19470), table VII, 32 GPUs: exchanges and gathers for every domain size."""
    printed = {1: (992, 0), 2: (480, 32), 4: (224, 96), 8: (96, 224), 16: (32, 480), 32: (0, 992)}
    levels = one_level(32).levels
    found = {
        size: (count.exchange, count.gather)
        for size in divisors(32)
        for count in message_counts(levels, (size,))
    }
    assert found == printed


@pytest.mark.parametrize(("load", "size"), [(MIX_1, 2), (MIX_2, 4), (GATHER_1, 8), (GATHER_2, 8)])
def test_optima_of_table_4(load: EvenLoad, size: int) -> None:
    """Table IV, 8 GPUs over 128 Gb/s: domains of 2, 4, 8 and 8, with ten times the printed pre-expert time.

    The paper prints 0.049 and 0.099 ms; with 0.49 and 0.99 ms all four of its optima come out.
    """
    assert best_sizes(load).sizes == (size,)


@pytest.mark.parametrize(("load", "size"), [(MIX_1, 1), (MIX_2, 2)])
def test_table_4_as_printed_does_not_reproduce(load: EvenLoad, size: int) -> None:
    """With 0.049 ms as printed the same model gives domains of 1 and 2 for Mix-1 and Mix-2, not 2 and 4."""
    assert best_sizes(replace(load, pre_expert_s=0.049e-3)).sizes == (size,)


@pytest.mark.parametrize(
    ("load", "share", "case"),
    [(MIX_1, 0.76, "2.1"), (MIX_2, 0.52, "2.1"), (GATHER_1, 0.0, "1"), (GATHER_2, 0.0, "1")],
)
def test_best_shares_of_table_4(load: EvenLoad, share: float, case: str) -> None:
    """The closed form gives p = 0.76 and 0.52 (printed: .75, .5, the nearest whole domains), and 0."""
    best = best_share(load)
    assert (round(best.share, 2), best.case) == (share, case)


def test_gathering_all_pays_where_tokens_outweigh_experts() -> None:
    """Case 2.2: 2 x 8 MB of tokens against 8 x 1 MB of experts, nothing to hide behind: p = 0."""
    load = one_level(expert_mb=1, pre_ms=0)
    assert best_share(load).case == "2.2"
    # 7 MB over 16 GB/s.
    assert best_share(load).step_s == pytest.approx(7e6 / 16e9)
    assert best_sizes(load).sizes == (8,)


def test_one_layer_by_hand() -> None:
    """Domains of 2 in Mix-1: 4.7 MB gather in 0.294 ms under 0.49 ms; 6 of 8 MB travel twice."""
    times = even_times(MIX_1, (2,))
    assert times.gather_s == pytest.approx((4.7e6 / 16e9,))
    assert times.exchange_s == pytest.approx((6e6 / 16e9,))
    assert times.step_s == pytest.approx(0.49e-3 + 2 * 6e6 / 16e9)
    assert times.exposed_gather_s == 0.0


def test_share_one_is_plain_expert_parallelism() -> None:
    """At p = 1 nothing is gathered and (G - 1) / G of the tokens travel twice."""
    plain_s = 0.49e-3 + 2 * 8e6 * 7 / 8 / 16e9
    assert time_of_share(MIX_1, 1.0) == pytest.approx(plain_s)
    assert even_times(MIX_1, (1,)).step_s == pytest.approx(plain_s)


loads = st.builds(
    one_level,
    size=st.integers(2, 24),
    gbits=st.floats(1, 400),
    data_mb=st.floats(0.1, 50),
    expert_mb=st.floats(0.01, 20),
    pre_ms=st.floats(0, 5),
)


@settings(max_examples=50, deadline=None)
@given(load=loads)
def test_the_exact_sizes_agree_with_the_closed_form(load: EvenLoad) -> None:
    """Every size is its share's time, the parts add up as the paper has them, and no share beats p*."""
    size_l = load.levels[0].size
    best = best_share(load)
    for size in divisors(size_l):
        times = even_times(load, (size,))
        share = share_of_size(size_l, size)
        assert times.step_s == pytest.approx(time_of_share(load, share))
        # T = computation + AG + 2 A2A - overlap, with the experts' own computation (here 1 s) hidden whole.
        overlap_s = min(load.pre_expert_s, times.gather_s[0]) + 1.0
        latency_s = load.pre_expert_s + 1.0 + times.gather_s[0] + 2 * times.exchange_s[0]
        assert times.step_s == pytest.approx(latency_s - overlap_s)
        assert best.step_s <= times.step_s * (1 + 1e-9)
    assert best_sizes(load).step_s == min(even_times(load, (size,)).step_s for size in divisors(size_l))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3),
    data=st.floats(0.1, 50),
    expert=st.floats(0.01, 20),
    pre=st.floats(0, 5),
    memory=st.one_of(st.none(), st.floats(0, 100)),
    training=st.booleans(),
)
def test_several_levels_are_searched_whole(
    sizes: list[int], data: float, expert: float, pre: float, memory: float | None, training: bool
) -> None:
    """The pruned search finds what looking at every combination finds, within memory."""
    levels = tuple(
        Level(name=f"l{i}", size=size, bandwidth=1e9 * 8**i, latency_s=1e-5) for i, size in enumerate(sizes)
    )
    load = EvenLoad(
        levels=levels,
        data_bytes=data * MB,
        expert_bytes=expert * MB,
        pre_expert_s=pre * 1e-3,
        training=training,
        replica_bytes=None if memory is None else memory * MB,
    )
    every = [
        even_times(load, chosen).step_s
        for chosen in itertools.product(*(divisors(size) for size in sizes))
        if load.fits(math.prod(chosen))
    ]
    assert best_sizes(load).step_s == pytest.approx(min(every), rel=1e-12)


def test_two_levels_by_hand() -> None:
    """2 data centres of 4 GPUs: what crossed the slow link is passed on inside, and volumes add up.

    Domains (2, 4): one P over the slow link (1 MB at 1 GB/s: 1 ms), then own and fetched experts from three
    peers (6 MB at 10 GB/s: 0.6 ms): 7 MB in all, the experts of the other 7 devices. Domains (1, 2): 1 MB
    inside; half of 4 MB crosses (2 ms), half moves inside (0.2 ms).
    """
    load = EvenLoad(
        levels=(Level(name="dc", size=2, bandwidth=1e9), Level(name="gpu", size=4, bandwidth=1e10)),
        data_bytes=4 * MB,
        expert_bytes=1 * MB,
        pre_expert_s=1e-3,
    )
    assert even_times(load, (2, 4)).gather_s == pytest.approx((1e-3, 0.6e-3))
    assert even_times(load, (2, 4)).step_s == pytest.approx(1.6e-3)
    mixed = even_times(load, (1, 2))
    assert mixed.gather_s == pytest.approx((0.0, 1e-4))
    assert mixed.exchange_s == pytest.approx((2e-3, 2e-4))
    assert mixed.step_s == pytest.approx(1e-3 + 2 * 2.2e-3)


def test_training_adds_a_backward_pass() -> None:
    """Twice the pre-expert work to hide behind, and four exchanges: 0.49 + 0.98 ms + 4 x 0.375 ms."""
    times = even_times(replace(MIX_1, training=True), (2,))
    assert times.step_s == pytest.approx(1.47e-3 + 4 * 0.375e-3)


def test_messages_cost_their_latency() -> None:
    """Domains of 2 of 8: one message per gather and three per exchange."""
    level = replace(MIX_1.levels[0], latency_s=1e-4)
    times = even_times(replace(MIX_1, levels=(level,)), (2,))
    assert times.gather_s[0] == pytest.approx(4.7e6 / 16e9 + 1e-4)
    assert times.exchange_s[0] == pytest.approx(6e6 / 16e9 + 3e-4)


def test_memory_limits_the_domain() -> None:
    """Room for two experts of 0.094 MB beside one's own: no domain of 4 or 8."""
    assert best_sizes(replace(GATHER_1, replica_bytes=0.2 * MB)).sizes == (2,)


@pytest.mark.parametrize("training", [False, True])
def test_break_even_is_one_and_a_half_inner_widths(training: bool) -> None:
    """Gated bf16 experts: 6 d f / CR bytes against 4 d n, so n = 1.5 f / CR; training doubles both."""
    d, f, ratio = 2048, 1024, 4.0
    passes = 2 if training else 1
    tokens = break_even_tokens(expert_bytes=passes * 6 * d * f, token_bytes=passes * 2 * d, compression=ratio)
    assert tokens == 1.5 * f / ratio == 384.0


def test_compression_acts_like_smaller_experts_on_the_way() -> None:
    """Experts of 47 MB compressed ten-fold travel like those of 4.7 MB, but fill memory uncompressed."""
    large = replace(MIX_1, expert_bytes=47 * MB, compression=10.0)
    assert even_times(large, (2,)) == even_times(MIX_1, (2,))
    assert best_sizes(replace(large, replica_bytes=40 * MB)).sizes == (1,)


def test_gain_falls_with_more_data_centres_at_a_fixed_size() -> None:
    """Domains of 2 save a share that shrinks as data centres are added, up to the paper's 1,000."""
    points = [point.fixed_size for point in scale_curve(MIX_1, size=2, share=0.75)]
    known = [point for point in points if point is not None]
    assert len(known) == len(points)
    assert all(a > b for a, b in itertools.pairwise(known))
    assert known[-1] > 1.0


def test_the_curve_has_points_for_whole_domains() -> None:
    """Domains of 3 fill 3, 6, 12, .. data centres, and 600 of the usual numbers."""
    load = replace(MIX_1, levels=(replace(MIX_1.levels[0], size=9),))
    plan = plan_cross_dc(load, break_even_tokens=1.0)
    assert plan.best.sizes == (3,)
    known = [point.centres for point in plan.scale if point.fixed_size is not None]
    assert known == [3, 6, 12, 24, 48, 96, 192, 384, 600, 768]


def test_gain_at_a_fixed_share_approaches_its_limit() -> None:
    """With half the chunks as experts, the gain lasts only while what is gathered stays hidden.

    To 1,000 data centres with experts of 1 kB: 0.5 MB of them travel in 0.4 ms under 5 ms, tokens are halved.
    """
    load = one_level(gbits=10, expert_mb=0.001, pre_ms=5)
    last = scale_curve(load, size=2, share=0.5, centres=(1000,))[0]
    exchange_s = 2 * 8e6 * 0.999 / 1.25e9
    assert last.fixed_share == pytest.approx((5e-3 + exchange_s) / (5e-3 + exchange_s / 2))


@settings(max_examples=30, deadline=None)
@given(load=loads, factor=st.floats(1.01, 4))
def test_gain_grows_as_links_get_slower_while_the_prefetch_is_hidden(load: EvenLoad, factor: float) -> None:
    """At any size: a slower link raises the gain as long as the gather fits under the computation."""

    def gain(bandwidth: float, size: int) -> float:
        slower = replace(load, levels=(replace(load.levels[0], bandwidth=bandwidth),))
        return even_times(slower, (1,)).step_s / even_times(slower, (size,)).step_s

    for size in divisors(load.levels[0].size):
        slow = load.levels[0].bandwidth / factor
        if load.expert_bytes * (size - 1) / slow <= load.pre_expert_s:
            assert gain(slow, size) >= gain(load.levels[0].bandwidth, size) * (1 - 1e-12)


def test_gain_stops_growing_once_links_are_full_of_experts() -> None:
    """Our own finding: beyond that point slower links only dilute the hidden computation.

    Domains of 2 in Mix-1: hidden down to 4.7 MB / 0.49 ms = 9.6 GB/s; from there the gain falls.
    """

    def gain(gbytes: float) -> float:
        load = one_level(gbits=8 * gbytes)
        return even_times(load, (1,)).step_s / even_times(load, (2,)).step_s

    edge = 4.7e6 / 0.49e-3 / 1e9
    assert gain(2 * edge) < gain(edge) > gain(edge / 2)


@pytest.mark.parametrize("centres", [2, 4])
def test_gain_grows_with_the_data_as_in_table_5(centres: int) -> None:
    """Table V, shape only (pre-expert times are not printed): 0.36 MB experts, 6 to 192 MB of tokens.

    The paper's gain grows from 1.03 to 5.47 on two and from 1.09 to 5.60 on four data centres.
    """
    gains = []
    for data in (6, 12, 24, 48, 96, 192):
        load = one_level(8 * centres, gbits=10, data_mb=data, expert_mb=0.36, pre_ms=10)
        gains.append(even_times(load, (1,)).step_s / best_sizes(load).step_s)
    assert all(a < b for a, b in itertools.pairwise(gains))


@pytest.mark.parametrize(("data", "expert"), [(24, 8), (48, 2)])
def test_compression_gains_more_on_larger_clusters_as_in_table_6(data: float, expert: float) -> None:
    """Table VI, shape only (its pre-expert times and message costs are not printed).

    The paper's clusters: 8 GPUs over 128 Gb/s, then two and four data centres of them over 10 Gb/s; what
    50-fold compression gains grows from each to the next (in print from 1.25 and 1.43 to 1.76 and 2.82).
    """
    inside = MIX_1.levels[0]
    gains = []
    for centres in (1, 2, 4):
        load = EvenLoad(
            levels=(Level(name="data centre", size=centres, bandwidth=10e9 / 8), inside),
            data_bytes=data * MB,
            expert_bytes=expert * MB,
            pre_expert_s=1e-3,
        )
        gains.append(best_sizes(load).step_s / best_sizes(replace(load, compression=50.0)).step_s)
    assert gains[0] >= 1.0
    assert all(a < b for a, b in itertools.pairwise(gains))


def test_bad_figures_are_named() -> None:
    """A link without bandwidth, a size that does not divide, a share beyond 1."""
    with pytest.raises(InputError, match="disconnected"):
        Level(name="dc", size=2, bandwidth=0.0)
    with pytest.raises(InputError, match="domains of 3 do not fill 8 members; choose one of 1, 2, 4, 8"):
        even_times(MIX_1, (3,))
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        time_of_share(MIX_1, 1.5)
    with pytest.raises(InputError, match=r"compression is 0\.5"):
        replace(MIX_1, compression=0.5)
    with pytest.raises(InputError, match="closed form is for one level"):
        best_share(replace(MIX_1, levels=MIX_1.levels * 2))
