"""The answer in words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.comparison import Comparison
from placement.errors import InputError
from placement.report.answer import Verdict, answer
from placement.report.numbers import number, percent
from placement.report.story import Story, effective_windows, gain_interval

MakeComparison = Callable[..., Comparison]


def test_the_paragraph_holds_the_comparisons_own_numbers(make_comparison: MakeComparison) -> None:
    """Gains over all three baselines, shares of windows, balance, fanout and gap are recomputed here."""
    comparison = make_comparison()
    story = Story(comparison=comparison)
    auto, text = comparison.policy("auto"), answer(Story(comparison=comparison)).paragraph
    for rival in ("contiguous", "greedy", "eplb"):
        gain = 1 - auto.held_out.objective / comparison.policy(rival).held_out.objective
        assert f"{percent(gain)} lower than with {rival}" in text
        assert comparison.better_share("auto", rival) == 1.0
    assert "the lower one in 100\u00a0% of windows against each of eplb, contiguous and greedy" in text
    before = comparison.policy("eplb").held_out.metrics
    after = auto.held_out.metrics
    assert f"goes from {number(before.balance)} to {number(after.balance)}" in text
    assert f"fanout goes from {number(before.fanout)} to {number(after.fanout)} devices per token" in text
    gap = (auto.fitted.objective - comparison.lower_bound) / auto.fitted.objective
    assert f"more than {percent(gap)} below auto" in text
    assert story.gap_of(auto) == pytest.approx(gap)


def test_a_clear_gain_on_many_windows_is_worth_it(make_comparison: MakeComparison) -> None:
    """The verdict follows the held-out gain over EPLB; the headline names it."""
    said = answer(Story(comparison=make_comparison(scale={"eplb": 1.0, "auto": 0.8})))
    assert said.verdict is Verdict.WORTH_IT
    assert said.headline.startswith("This placement is expected to cut MoE step cost by 2")
    assert " against EPLB, interval " in said.headline
    assert "on the traffic that it was fitted to, it is at most" in said.headline
    assert said.warnings == ()


@pytest.mark.parametrize(("factor", "words"), [(0.995, "cuts"), (1.05, "raises"), (0.8, None)])
def test_less_than_one_per_cent_is_not_worth_it(
    make_comparison: MakeComparison, factor: float, words: str | None
) -> None:
    """A gain below 1 %, or a loss, is called not worth it in the first line."""
    said = answer(Story(comparison=make_comparison(names=("contiguous", "auto"), scale={"auto": factor})))
    assert (said.verdict is Verdict.NOT_WORTH_IT) == (words is not None)
    assert said.headline.startswith("Not worth it") == (words is not None)
    assert words is None or words in said.headline


def test_few_windows_make_it_uncertain(make_comparison: MakeComparison) -> None:
    """Below ten held-out windows a gain is no promise, and no interval is claimed."""
    said = answer(Story(comparison=make_comparison(num_windows=4)))
    assert said.verdict is Verdict.UNCERTAIN
    assert "Only 4 held-out windows, fewer than 10" in said.warnings[0]
    assert "interval" not in said.paragraph


def test_a_gain_within_the_noise_is_uncertain(make_comparison: MakeComparison) -> None:
    """An interval that includes zero is said, whatever the mean gain is."""
    comparison = make_comparison(names=("contiguous", "auto"), scale={"contiguous": 1.0, "auto": 0.97})
    auto = comparison.policy("auto").held_out
    # One window in twelve carries the whole gain.
    auto.experts_WL[:] = comparison.policy("contiguous").held_out.experts_WL
    auto.dispatch_WL[:] = comparison.policy("contiguous").held_out.dispatch_WL
    auto.combine_WL[:] = comparison.policy("contiguous").held_out.combine_WL
    auto.experts_WL[5] *= 0.1
    said = answer(Story(comparison=comparison))
    assert said.verdict is Verdict.UNCERTAIN
    assert any("cannot be told from noise" in warning for warning in said.warnings)


def test_a_single_policy_has_nothing_to_compare(make_comparison: MakeComparison) -> None:
    """Without a rival no gain is claimed; the gap to the bound still stands."""
    said = answer(Story(comparison=make_comparison(names=("auto",))))
    assert said.verdict is Verdict.UNKNOWN
    assert "nothing to compare it to" in said.headline
    assert "certified lower bound" in said.paragraph


def test_a_comparison_without_policies_is_refused(make_comparison: MakeComparison) -> None:
    """There is nothing to report, and that is said."""
    with pytest.raises(InputError, match="no policy"):
        Story(comparison=make_comparison(names=()))


def test_a_met_bound_is_called_optimal(make_comparison: MakeComparison) -> None:
    """At gap 0 the placement is proved optimal on the fitted windows."""
    bound = make_comparison().policy("auto").fitted.objective
    assert "proved optimal" in answer(Story(comparison=make_comparison(lower_bound=bound))).paragraph


def test_balance_alone_says_what_it_does_not_know(make_comparison: MakeComparison) -> None:
    """Without costs a better balance promises no faster step, and the reader learns how to find out."""
    comparison = make_comparison(objective="balance", steps_known=False, lower_bound=1.0)
    said = answer(Story(comparison=comparison))
    assert "step" not in said.paragraph
    assert any("step time is not known" in warning and "--model" in warning for warning in said.warnings)


def test_a_slower_step_behind_a_better_balance_is_said(make_comparison: MakeComparison) -> None:
    """A balance objective may lengthen the step; then that is a warning."""
    comparison = make_comparison(names=("contiguous", "auto"), objective="balance", lower_bound=1.0)
    comparison.policy("auto").held_out.dispatch_WL[:] *= 3.0
    said = answer(Story(comparison=comparison))
    assert any("higher than with contiguous" in warning for warning in said.warnings)


def test_traffic_is_compared_by_fanout(make_comparison: MakeComparison) -> None:
    """The traffic objective is named by what it counts, without an interval: it is no mean over windows."""
    said = answer(Story(comparison=make_comparison(objective="traffic", lower_bound=1.0)))
    assert "cut the devices that a token visits (fanout) by" in said.headline
    assert "interval" not in said.paragraph


@given(st.integers(2, 60), st.floats(0.3, 1.5), st.integers(0, 2**31))
def test_interval_surrounds_the_gain(num_windows: int, factor: float, seed: int) -> None:
    """The interval is centred on the gain of the means, and is a point where windows agree exactly."""
    rng = np.random.default_rng(seed)
    theirs_W = rng.uniform(1, 3, size=num_windows)
    noisy = gain_interval(factor * theirs_W * rng.uniform(0.9, 1.1, size=num_windows), theirs_W)
    exact = gain_interval(factor * theirs_W, theirs_W)
    assert noisy is not None
    assert exact is not None
    assert noisy[0] <= noisy[1]
    assert exact == pytest.approx((1 - factor, 1 - factor), abs=1e-9)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 400 draws with a true gain of 10 %, 95 % intervals hold it in about 95 %."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        theirs_W = rng.gamma(9.0, size=20)
        low, high = gain_interval(0.9 * theirs_W + rng.normal(0, 0.5, size=20), theirs_W) or (0.0, 0.0)
        held += low <= 0.1 <= high
    assert 365 <= held <= 393


def test_windows_that_resemble_each_other_widen_the_interval() -> None:
    """Of 200 draws with lasting noise (0.7 from window to window), 95 % intervals hold the truth in most."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        noise_W = rng.normal(size=200)
        for window in range(1, 200):
            noise_W[window] += 0.7 * noise_W[window - 1]
        theirs_W = rng.gamma(9.0, size=200)
        low, high = gain_interval(0.9 * theirs_W + 0.3 * noise_W, theirs_W) or (0.0, 0.0)
        held += low <= 0.1 <= high
    assert held >= 180


def test_effective_windows() -> None:
    """Independent values count in full, about; each value ten times over counts about once."""
    values = np.random.default_rng(0).normal(size=400)
    assert effective_windows(values) > 250
    assert 15 < effective_windows(np.repeat(values[:40], 10)) < 80
    assert effective_windows(np.ones(50)) == 50.0


def test_a_baseline_as_good_decides_the_verdict(make_comparison: MakeComparison) -> None:
    """A gain over EPLB is none where experts in order do as well, and the headline says so."""
    comparison = make_comparison(scale={"contiguous": 0.8, "eplb": 1.0, "auto": 0.8})
    said = answer(Story(comparison=comparison))
    assert said.verdict is Verdict.NOT_WORTH_IT
    assert "against experts in order (contiguous)" in said.headline


def test_interval_needs_two_windows() -> None:
    """One window says nothing of how windows differ."""
    assert gain_interval(np.array([1.0]), np.array([2.0])) is None
