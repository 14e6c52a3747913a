"""The pictures of a plan between data centres."""

from __future__ import annotations

from placement.planning import plan_cross_dc
from placement.planning.cross_dc import EvenLoad, Level
from placement.report.document import Chart
from placement.report.plan_cross_dc import page_of


def test_the_least_bar_is_marked() -> None:
    """Sizes 1, 2, 4, 8 are bars 0 to 3: the mark stands at a bar's place, which its size is not."""
    load = EvenLoad(
        levels=(Level(name="dc", size=8, bandwidth=1e9),), data_bytes=8e9, expert_bytes=1e9, pre_expert_s=1.5
    )
    plan = plan_cross_dc(load, break_even_tokens=10.0)
    (chart,) = (
        part for part in page_of(plan).sections if isinstance(part, Chart) and part.title.startswith("Domain")
    )
    (mark,) = chart.figure.layout.annotations
    times = [times.step_s for times in plan.curves[0]]
    assert list(chart.figure.data[0].x) == ["1", "2", "4", "8"]
    assert (
        mark.x == times.index(min(times)) == [times.sizes for times in plan.curves[0]].index(plan.best.sizes)
    )
