"""The tables: every policy's figures, held-out ones first, and what the problem was.

Everything that comes from outside is escaped here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

from placement.calibration import (
    Calibration,
    DataSheetCalibration,
    LinearCalibration,
    MeasuredCalibration,
)
from placement.comparison import PolicyResult
from placement.cost import CostBreakdown
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.report.numbers import NO_VALUE, capital, number, percent, plural
from placement.report.story import Story, relative_change

__all__ = ["default_title", "definitions", "facts", "policy_table", "provenance_of", "skipped_list"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One figure of every policy.

    Parameters
    ----------
    label, unit
        The head of the column.
    held_out
        Text of a policy's figure on held-out windows.
    fitted
        The same on the fitted windows; None where there is only one figure.
    """

    label: str
    unit: str
    held_out: Callable[[PolicyResult], str]
    fitted: Callable[[PolicyResult], str] | None = None


def _figure(label: str, unit: str, value: Callable[[CostBreakdown], float | None]) -> _Column:
    return _Column(
        label=label,
        unit=unit,
        held_out=lambda result: number(value(result.held_out)),
        fitted=lambda result: number(value(result.fitted)),
    )


def _columns(story: Story) -> list[_Column]:
    scale = story.objective_scale
    columns = [
        _figure(capital(story.objective_label), scale.unit, lambda b: b.objective / scale.factor),
        *_relative_columns(story),
        _Column(
            label="Gap to bound",
            unit="% of objective, fitted",
            held_out=lambda _: "",
            fitted=lambda result: percent(story.gap_of(result)),
        ),
    ]
    if not story.measures_step and story.step_known:
        step = story.step_scale
        columns.append(_figure(capital(story.step_label), step.unit, lambda b: b.step / step.factor))
    columns += [column for column in _metric_columns(story) if column.label != columns[0].label]
    return [column for column in columns if not _is_empty(column, story.comparison.policies)]


def _metric_columns(story: Story) -> list[_Column]:
    columns = [
        _figure("Balance", "fullest / mean device", lambda b: b.metrics.balance),
        _figure("p95 balance", "fullest / mean device", lambda b: b.metrics.balance_p95),
        _figure("Fanout", "devices / token", lambda b: b.metrics.fanout),
        _figure("Node fanout", "nodes / token", lambda b: b.metrics.node_fanout),
        _figure("Mean-traffic imbalance", "fullest / mean device", lambda b: b.metrics.mean_traffic_balance),
    ]
    if story.comparison.problem.semantics is Semantics.STAY_PUT:
        columns.append(_figure("Hops", "share of tokens", lambda b: b.metrics.hops))
    return columns


def _relative_columns(story: Story) -> list[_Column]:
    base = story.replaced
    if base is None:
        return []

    def change(result: PolicyResult, breakdown: str) -> str:
        mine, theirs = (getattr(r, breakdown).objective for r in (result, base))
        return NO_VALUE if result is base else percent(relative_change(mine, theirs), signed=True)

    def share(result: PolicyResult) -> str:
        better = story.comparison.better_share(result.name, base.name)
        return NO_VALUE if result is base else percent(better, digits=0)

    measure = "step" if story.measures_step else "balance"
    return [
        _Column(
            label=f"Against {base.name}",
            unit="% of objective",
            held_out=lambda result: change(result, "held_out"),
            fitted=lambda result: change(result, "fitted"),
        ),
        _Column(label="Windows won", unit=f"% with lower {measure} than {base.name}", held_out=share),
    ]


def _is_empty(column: _Column, policies: tuple[PolicyResult, ...]) -> bool:
    texts = [column.held_out(result) for result in policies]
    if column.fitted is not None:
        texts += [column.fitted(result) for result in policies]
    return set(texts) <= {"", NO_VALUE}


def policy_table(story: Story) -> str:
    """Return the HTML table of all policies: held-out figures, fitted ones beneath them."""
    columns = _columns(story)
    heads = "".join(
        f'<th scope="col">{escape(column.label)} <small>{escape(column.unit)}</small></th>'
        for column in columns
    )
    rows = "\n".join(_row(story, result, columns) for result in story.comparison.policies)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All policies"><table class="policies">\n'
        f'<thead><tr><th scope="col">Policy</th>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>"
    )


def _row(story: Story, result: PolicyResult, columns: list[_Column]) -> str:
    marked = ' class="proposed"' if result is story.proposed else ""
    cells = "".join(_cell(column, result) for column in columns)
    head = f"{escape(result.name)}<small>{escape(result.description)}</small>"
    return f'<tr{marked}><th scope="row">{head}</th>{cells}</tr>'


def _cell(column: _Column, result: PolicyResult) -> str:
    fitted = "" if column.fitted is None else f"<small>{escape(column.fitted(result))}</small>"
    return f"<td><b>{escape(column.held_out(result))}</b>{fitted}</td>"


def skipped_list(skipped: Mapping[str, str]) -> str:
    """Return the HTML list of policies without an answer, with the reasons; empty without any."""
    if not skipped:
        return ""
    entries = "".join(f"<li><b>{escape(name)}</b> {escape(reason)}</li>" for name, reason in skipped.items())
    return f'<p class="skipped">Policies without an answer here:</p><ul class="skipped">{entries}</ul>'


def definitions(entries: Mapping[str, str], *, css_class: str) -> str:
    """Return an HTML list of names and values."""
    items = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in entries.items()
    )
    return f'<dl class="{escape(css_class)}">{items}</dl>'


def facts(story: Story) -> dict[str, str]:
    """Return what the reader must know of the problem at a glance."""
    comparison, problem = story.comparison, story.comparison.problem
    profile = problem.profile
    tokens = float(profile.window_tokens_W.mean())
    name = _model_name(story)
    shape = (
        plural(problem.num_layers, "MoE layer"),
        plural(problem.num_experts, "expert"),
        f"top-{profile.top_k}",
    )
    return {
        "Model": ", ".join((name, *shape) if name else shape),
        "Devices": f"{plural(problem.num_devices, 'device')} on {plural(problem.topology.num_nodes, 'node')}",
        "Slots": f"{plural(problem.num_slots, 'slot')} per layer, {_spare(problem)}",
        "Windows": f"{profile.num_windows:,} fitted, {comparison.num_held_out_windows:,} held out, "
        f"{number(tokens)} tokens each",
        "Objective": f"{_objective(problem)}, {problem.semantics}",
    }


def _spare(problem: PlacementProblem) -> str:
    spare = problem.num_slots - problem.num_experts
    return f"{spare:,} spare" if spare else "none spare"


def _objective(problem: PlacementProblem) -> str:
    risk = "" if problem.risk is Risk.MEAN else f" ({problem.risk})"
    limit = f" at imbalance up to {problem.max_imbalance:g}"
    return f"{problem.objective}{risk}{limit if problem.objective is Objective.TRAFFIC else ''}"


def default_title(story: Story) -> str:
    """Return the head of a page that nobody named."""
    name = _model_name(story)
    return f"Expert placement{f' of {name}' if name else ''} on {story.comparison.problem.topology.name}"


def _model_name(story: Story) -> str | None:
    model = story.comparison.problem.model
    return story.proposed.placement.model_name or (None if model is None else model.name)


def _calibration(calibration: Calibration) -> str:
    if isinstance(calibration, LinearCalibration):
        return f"linear, pair cost {calibration.pair_cost:g}, token cost {calibration.token_cost:g}"
    if isinstance(calibration, MeasuredCalibration):
        return f"measured on {calibration.gpu}"
    return "data sheet" if isinstance(calibration, DataSheetCalibration) else type(calibration).__name__


def provenance_of(story: Story) -> dict[str, str]:
    """Return what the comparison itself knows of where its numbers come from."""
    from placement import __version__

    problem = story.comparison.problem
    solution = story.proposed.solution
    return {
        "model": _model_name(story) or "not named",
        "topology": f"{problem.topology.name} ({', '.join(kind.name for kind in problem.topology.kinds)})",
        "calibration": _calibration(problem.calibration),
        "options": f"objective {_objective(problem)}, semantics {problem.semantics}, "
        f"spare slots {problem.num_slots - problem.num_experts}",
        "solve": f"{story.proposed.name}: found by {solution.solver}, {solution.termination}",
        "version": f"moe-placement {__version__}",
    }
