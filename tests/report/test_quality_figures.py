"""Figures of quality carry the comparison's own numbers, and their sentences say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from placement.comparison import Comparison
from placement.cost.timeline import Timeline
from placement.errors import InputError
from placement.problem import Semantics
from placement.replication import Replication
from placement.report.figures import quality
from placement.report.story import Story, gain_interval
from placement.tradeoff import Tradeoff, TradeoffPoint, Way

MakeComparison = Callable[..., Comparison]

ALLOWED = {"scatter", "bar", "box", "heatmap"}
"""Kinds of traces that the embedded plotly draws."""

HOSTILE = "<b>%{x}"


def timelines(*, layers: int = 2, devices: int = 3) -> dict[str, Timeline]:
    """Return two made-up timelines."""
    rng = np.random.default_rng(8)
    return {
        name: Timeline(busy_LPD=rng.uniform(1e-3, 2e-3, size=(layers, 3, devices)), window=4, unit="s")
        for name in ("eplb", HOSTILE)
    }


def sweep(comparison: Comparison, places: list[tuple[float, float]]) -> Tradeoff:
    """Return points at some balances and fanouts."""
    points = []
    for index, (balance, fanout) in enumerate(places):
        result = comparison.policies[0]
        metrics = replace(result.held_out.metrics, balance=balance, fanout=fanout)
        points.append(
            TradeoffPoint(
                way=Way.LIMIT if index == 0 else Way.PRICE,
                value=1.5,
                placement=result.placement,
                fitted=result.fitted,
                held_out=replace(result.held_out, metrics=metrics),
            )
        )
    return Tradeoff(points=tuple(points), skipped={}, semantics=Semantics.DISPATCH)


def test_gains_are_paired_by_window(make_comparison: MakeComparison) -> None:
    """Each mark is the share saved against the reference; its bar is the paired interval."""
    story = Story(comparison=make_comparison())
    figure = quality.gains_figure(story)
    marks = {trace.y[0]: trace for trace in figure.data}
    assert list(marks) == ["contiguous", "greedy", "auto"]
    mine, theirs = (story.comparison.policy(name).held_out for name in ("auto", "eplb"))
    interval = gain_interval(mine.step_W, theirs.step_W)
    assert interval is not None
    share = 1 - mine.objective / theirs.objective
    mark = marks["auto"]
    assert mark.x[0] == pytest.approx(100 * share)
    assert mark.x[0] + mark.error_x.array[0] == pytest.approx(100 * interval[1])
    assert mark.x[0] - mark.error_x.arrayminus[0] == pytest.approx(100 * interval[0])
    assert mark.marker.symbol == "circle"
    assert quality.gains_sentence(story).startswith(
        f"Auto lowers predicted step cost by {100 * share:.1f}\N{NO-BREAK SPACE}% against eplb on 12 "
        "held-out windows"
    )


def test_noise_is_drawn_hollow_and_said(make_comparison: MakeComparison) -> None:
    """Where the interval holds zero, the mark is hollow and the sentence doubts."""
    story = Story(comparison=make_comparison(scale={"eplb": 1.0, "auto": 1.0}))
    marks = {trace.y[0]: trace for trace in quality.gains_figure(story).data}
    assert marks["auto"].marker.symbol == "circle-open"
    assert quality.gains_sentence(story).endswith("which may be nothing.")


def test_gains_need_somebody_to_be_held_against(make_comparison: MakeComparison) -> None:
    """A comparison of one policy, and an unknown name, are input errors."""
    with pytest.raises(InputError, match="no other policy"):
        quality.gains_figure(Story(comparison=make_comparison(names=("auto",))))
    with pytest.raises(InputError, match="'nobody' is not among"):
        quality.gains_figure(Story(comparison=make_comparison()), against="nobody")


def test_balance_and_traffic_share_an_edge(make_comparison: MakeComparison) -> None:
    """What is beaten in both is off the edge; policies at one place share a mark."""
    comparison = make_comparison(names=("contiguous", "auto"), scale={"contiguous": 1.0, "auto": 1.0})
    balances = [result.held_out.metrics.balance for result in comparison.policies]
    fanout = comparison.policies[0].held_out.metrics.fanout
    assert balances[0] == balances[1]
    assert fanout == 2.0
    found = sweep(comparison, [(balances[0] + 1, 1.0), (balances[0] - 0.1, 1.9), (balances[0] + 1, 3.0)])
    figure = quality.tradeoff_figure(found, comparison)
    edge, limits, prices, policies = figure.data
    assert list(zip(edge.x, edge.y, strict=True)) == [(balances[0] - 0.1, 1.9), (balances[0] + 1, 1.0)]
    assert list(limits.y) == [1.0]
    assert list(prices.y) == [1.9, 3.0]
    assert list(policies.text) == ["contiguous, auto", ""]
    assert list(policies.customdata) == ["contiguous", "auto"]
    sentence = quality.tradeoff_sentence(found, comparison)
    assert sentence.endswith("contiguous, auto are beaten in both at once.")
    best = sweep(comparison, [(1.0, 1.0)])
    assert quality.tradeoff_sentence(best, comparison) == (
        "Balance 1.000 and fanout 1.000 come together; contiguous, auto are beaten in both at once."
    )
    alone = sweep(comparison, [(balances[0] + 1, 1.0)])
    assert quality.tradeoff_sentence(alone, comparison).endswith("no policy is beaten in both.")


def test_bounds_lie_below_every_layer(make_comparison: MakeComparison) -> None:
    """A line per layer at the bound, marks at the fitted means of both policies."""
    story = Story(comparison=make_comparison())
    figure = quality.bounds_figure(story)
    assert [trace.name for trace in figure.data] == ["no placement is below this", "eplb", "auto"]
    np.testing.assert_allclose(figure.data[0].y, 0.5)
    fitted = story.proposed.fitted
    mean_L = (fitted.experts_WL + fitted.dispatch_WL + fitted.combine_WL).mean(axis=0)
    np.testing.assert_allclose(figure.data[2].y, mean_L)
    np.testing.assert_allclose(figure.data[2].customdata, 100 * (1 - 0.5 / mean_L))
    gap = story.gap_of(story.proposed)
    assert f"more than {100 * gap:.1f}\N{NO-BREAK SPACE}% below auto" in quality.bound_sentence(story)


def test_bounds_of_balance_and_of_a_proof(make_comparison: MakeComparison) -> None:
    """Balance has layers too; traffic has none; a met bound is called a proof."""
    balance = make_comparison(objective="balance")
    figure = quality.bounds_figure(Story(comparison=balance))
    np.testing.assert_allclose(figure.data[2].y, balance.policy("auto").fitted.balance_WL.mean(axis=0))
    proved = make_comparison(lower_bound=1e9)
    assert "Auto is proved optimal" in quality.bound_sentence(Story(comparison=proved))
    with pytest.raises(InputError, match="no gaps of single layers"):
        quality.bounds_figure(Story(comparison=make_comparison(objective="traffic")))


def test_replicas_are_compared_at_the_same_slots(make_comparison: MakeComparison) -> None:
    """A line per policy; labels are changes against the first policy without spare slots."""
    pair = tuple(make_comparison(names=("eplb", "auto"), scale={"auto": scale}) for scale in (0.8, 0.6))
    replication = Replication(spare_slots=(0, 4), comparisons=pair)
    figure = quality.replicas_figure(replication)
    assert [trace.name for trace in figure.data] == ["eplb", "auto"]
    for trace in figure.data:
        assert list(trace.x) == [0, 4]
        assert list(trace.y) == [each.policy(trace.name).held_out.objective for each in pair]
    assert figure.data[0].text[0] == "0.0\N{NO-BREAK SPACE}%"
    gain = 1 - pair[1].policy("auto").held_out.objective / pair[0].policy("auto").held_out.objective
    sentence = quality.replicas_sentence(replication)
    assert "more slots save nothing with eplb" in sentence
    assert f"4 more slots save {100 * gain:.1f}\N{NO-BREAK SPACE}% with auto" in sentence


def test_timelines_are_drawn_on_one_clock() -> None:
    """Each device's bars fill the step: busy, then waiting, phase after phase; names are escaped."""
    given = timelines()
    figure = quality.timelines_figure(given)
    assert {trace.type for trace in figure.data} == {"bar"}
    for number, each in enumerate(given.values()):
        bars = [trace for trace in figure.data if trace.xaxis == ("x", "x2")[number]]
        assert [bar.name for bar in bars][:3] == ["dispatch", "experts", "combine"]
        for device in range(3):
            spent = sum(float(np.asarray(bar.x)[np.array(bar.y) == str(device)].sum()) for bar in bars)
            assert spent == pytest.approx(1e3 * each.step)
        experts = bars[1]
        np.testing.assert_allclose(np.array(experts.base, dtype=np.float64)[:3], 1e3 * each.length_LP[0, 0])
    assert "&lt;b&gt;" in figure.layout.annotations[1].text
    assert figure.layout.xaxis2.title.text.endswith("(ms)")


def test_large_timelines_are_cut_and_say_so() -> None:
    """Of 94 layers and 64 devices a page shows what can be told apart: those waited for longest."""
    given = timelines(layers=94, devices=64)
    figure = quality.timelines_figure(given, first_layer=90)
    assert len(set(figure.data[0].y)) == quality.MAX_DEVICES
    assert set(figure.data[0].customdata) == {90, 91, 92, 93}
    first = given["eplb"]
    worst = str(int(first.waiting_DD.sum(axis=0).argmax()))
    assert worst in figure.data[0].y
    assert quality.timelines_sentence(given).endswith("Drawn are 8 layers and 32 devices at most.")
    assert figure.layout.xaxis2.range[0] == pytest.approx(
        1e3 * min(t.begin_LP[90, 0] for t in given.values())
    )


def test_waiting_is_by_device_and_by_whom() -> None:
    """One map a placement on one scale, rows who waits, columns for whom."""
    given = timelines()
    figure = quality.waiting_figure(given)
    for trace, each in zip(figure.data, given.values(), strict=True):
        np.testing.assert_allclose(trace.z, 1e3 * each.waiting_DD)
        assert trace.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmax == pytest.approx(
        1e3 * max(t.waiting_DD.max() for t in given.values())
    )
    share = given["eplb"].idle_share
    assert quality.timelines_sentence(given).startswith(
        f"Under eplb devices wait {100 * share:.0f}\N{NO-BREAK SPACE}% of the step"
    )


def test_figures_of_quality_have_units_and_no_theme(make_comparison: MakeComparison) -> None:
    """Axes have titles, and only traces are used that the embedded plotly can draw."""
    comparison = make_comparison()
    story = Story(comparison=comparison)
    found = sweep(comparison, [(1.2, 1.5)])
    replication = Replication(spare_slots=(0,), comparisons=(comparison,))
    figures = [
        quality.gains_figure(story),
        quality.tradeoff_figure(found, comparison),
        quality.bounds_figure(story),
        quality.replicas_figure(replication),
        quality.timelines_figure(timelines()),
        quality.waiting_figure(timelines()),
    ]
    for figure in figures:
        assert {trace.type for trace in figure.data} <= ALLOWED
        assert figure.layout.template.layout.to_plotly_json() == {}
        layout = figure.to_plotly_json()["layout"]
        assert any("title" in axis for name, axis in layout.items() if name.startswith("xaxis"))
