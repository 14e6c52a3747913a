"""Comparisons of any size, made without a solver, and a page taken apart."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from placement import LinearCalibration, make_problem, parse_topology
from placement.bounds import LowerBound
from placement.comparison import Comparison, PolicyResult
from placement.cost import CostBreakdown
from placement.cost.breakdown import Metrics, ratio_to_mean
from placement.plan import Placement, equal_slots
from placement.problem import PlacementProblem
from placement.profile import RoutingProfile
from placement.solution import Incumbent, Solution, Termination

MakeComparison = Callable[..., Comparison]


@pytest.fixture(name="make_comparison")
def _make_comparison() -> MakeComparison:
    return make_comparison


def make_comparison(
    *,
    names: tuple[str, ...] = ("contiguous", "greedy", "eplb", "auto"),
    scale: dict[str, float] | None = None,
    num_windows: int = 12,
    num_layers: int = 3,
    num_devices: int = 4,
    objective: str = "step-time",
    steps_known: bool = True,
    with_fanout: bool = True,
    incumbents: tuple[Incumbent, ...] | None = None,
    skipped: dict[str, str] | None = None,
    lower_bound: float = 50.0,
    **problem_options: Any,
) -> Comparison:
    """Build a comparison with made-up costs; `scale` multiplies a policy's step costs."""
    problem = _problem(num_windows, num_layers, num_devices, objective, steps_known, problem_options)
    results = []
    for index, name in enumerate(names):
        factor = (scale or {}).get(name, 1.0 - 0.1 * index)
        fitted, held_out = (
            _breakdown(
                problem,
                num_windows,
                seed=2 * index + part,
                factor=factor,
                fanout=with_fanout,
                steps=steps_known,
            )
            for part in (0, 1)
        )
        results.append(_result(problem, name, fitted, held_out, incumbents))
    return Comparison(
        problem=problem,
        policies=tuple(results),
        skipped=skipped or {},
        lower_bound=lower_bound,
        num_held_out_windows=num_windows,
    )


def _problem(
    num_windows: int,
    num_layers: int,
    num_devices: int,
    objective: str,
    steps_known: bool,
    options: dict[str, Any],
) -> PlacementProblem:
    rng = np.random.default_rng(3)
    tokens_T = np.repeat(np.arange(num_windows), 2)
    profile = RoutingProfile(
        load_WLE=rng.integers(1, 100, size=(num_windows, num_layers, 2 * num_devices)).astype(float),
        window_tokens_W=np.full(num_windows, 64.0),
        top_k=1,
        experts_TLK=np.zeros((tokens_T.size, num_layers, 1), dtype=np.uint8),
        window_of_token_T=tokens_T,
    )
    calibration = LinearCalibration(pair_cost=1, token_cost=2) if steps_known else None
    topology = parse_topology(f"h100:1x{num_devices}")
    return make_problem(profile, topology, objective=objective, calibration=calibration, **options)


def _breakdown(
    problem: PlacementProblem, num_windows: int, *, seed: int, factor: float, fanout: bool, steps: bool
) -> CostBreakdown:
    # All policies see the same windows: costs differ by their factor and by a little noise.
    shape = (num_windows, problem.num_layers)
    common, own = np.random.default_rng(seed % 2), np.random.default_rng(100 + seed)
    load_WLD = common.uniform(10.0, 20.0, size=(*shape, problem.num_devices))
    load_WLD[:, :, 0] += 20.0 * factor
    parts = (
        common.uniform(10.0, 12.0, size=(3, *shape)) * factor * own.uniform(0.999, 1.001, size=(3, *shape))
    )
    parts = parts if steps else np.full((3, *shape), np.nan)
    balance_WL, summed_L = ratio_to_mean(load_WLD), ratio_to_mean(load_WLD.sum(axis=0))
    metrics = Metrics(
        balance=float(balance_WL.mean()),
        balance_p95=float(np.quantile(balance_WL, 0.95)),
        balance_floor=1.0,
        mean_traffic_balance=float(summed_L.mean()),
        worst_layer_balance=float(summed_L.max()),
        fanout=1.0 + factor if fanout else None,
        node_fanout=None,
        hops=0.5 * factor if fanout else None,
    )
    values = {
        "step-time": parts.sum(axis=(0, 2)).mean(),
        "balance": metrics.balance,
        "traffic": metrics.fanout,
    }
    objective = values[str(problem.objective)]
    assert objective is not None
    return CostBreakdown(
        objective=float(objective),
        unit=problem.unit,
        step_unit=problem.calibration.unit,
        experts_WL=parts[0],
        dispatch_WL=parts[1],
        combine_WL=parts[2],
        load_WLD=load_WLD,
        experts_LD=load_WLD.mean(axis=0),
        received_LD=load_WLD.mean(axis=0),
        fullest_device_L=np.zeros(problem.num_layers, dtype=np.int64),
        bottleneck_tier_L=("node",) * problem.num_layers,
        metrics=metrics,
    )


def _result(
    problem: PlacementProblem,
    name: str,
    fitted: CostBreakdown,
    held_out: CostBreakdown,
    incumbents: tuple[Incumbent, ...] | None,
) -> PolicyResult:
    placement = Placement(
        physical_to_logical_map_LS=np.tile(np.arange(problem.num_experts), (problem.num_layers, 1)),
        device_of_slot_S=equal_slots(problem.num_experts, problem.num_devices),
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )
    if incumbents is None:
        incumbents = (
            Incumbent(
                elapsed_s=0.25,
                objective=2 * fitted.objective,
                lower_bound=0.4,
                solver="greedy",
                placement=placement,
            ),
            Incumbent(
                elapsed_s=1.5,
                objective=fitted.objective,
                lower_bound=0.4,
                solver="search",
                placement=placement,
            ),
        )
    solution = Solution(
        placement=placement,
        breakdown=fitted,
        bound=LowerBound(value=0.5, layer_L=np.full(problem.num_layers, 0.5)),
        termination=Termination.CONVERGED,
        solver="search",
        incumbents=incumbents,
        candidates={},
        skipped={},
    )
    return PolicyResult(
        name=name, description=f"what {name} does", solution=solution, fitted=fitted, held_out=held_out
    )


@dataclass(eq=False)
class Page:
    """A report taken apart.

    Parameters
    ----------
    text
        What a reader sees, scripts and styles left out.
    elements
        Tag and attributes of every element, in order.
    scripts
        Content of the executable scripts.
    figures
        Data and layout of each figure, by its name.
    rows
        Texts of the cells of the tables (those of numbers behind charts aside), row by row, heads first.
    """

    text: str = ""
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)

    def section(self, start: str, end: str) -> str:
        """Return the text between two headings."""
        return self.text.split(start, 1)[1].split(end, 1)[0]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page, self._words = Page(), [""]
        self._open, self._in_cell, self._in_numbers = "", False, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "table":
            self._in_numbers = dict(attrs).get("class") != "policies"
        if self._in_numbers and tag in ("tr", "td", "th"):
            self._in_cell = False
        elif tag == "tr":
            self.page.rows.append([])
        elif tag in ("td", "th"):
            self.page.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        attributes = self.page.elements[-1][1] if self.page.elements else {}
        if self._open == "script" and attributes.get("type") == "application/json":
            name = str(attributes["id"]).removesuffix("-data")
            self.page.figures[name] = _decoded(json.loads(data))
        elif self._open == "script":
            self.page.scripts.append(data)
        elif self._open != "style":
            self._words.append(data)
            if self._in_cell:
                self.page.rows[-1][-1] += f" {data.strip()}"

    def finish(self) -> Page:
        self.close()
        self.page.text = " ".join(" ".join(self._words).split())
        self.page.rows = [[" ".join(cell.split()) for cell in row] for row in self.page.rows]
        return self.page


def _decoded(value: Any) -> Any:
    """Turn plotly's base64 arrays back into numpy arrays."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]).newbyteorder("<"))
        shape = [int(n) for n in str(value.get("shape", array.size)).split(",")]
        return array.reshape(shape)
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(name="take_apart")
def _take_apart() -> Callable[[str], Page]:
    def take_apart(html: str) -> Page:
        reader = _Reader()
        reader.feed(html)
        return reader.finish()

    return take_apart
