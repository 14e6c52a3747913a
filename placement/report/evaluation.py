"""The page of an evaluation: what one placement costs on one trace, beside experts in order and beside what
was predicted for it.

Shape letters: W windows, L layers, E experts, D devices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import numpy as np

from placement.bounds import LowerBound
from placement.comparison import Comparison, PolicyResult
from placement.cost import CostBreakdown, CostModel
from placement.io import write_text
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.report.answer import LEAST_GAIN
from placement.report.document import document
from placement.report.numbers import number, percent, plural
from placement.report.page import PRIMER, closing, figure_sections
from placement.report.plan_page import PlanTable
from placement.report.story import Story
from placement.report.tables import definitions, facts, provenance_of
from placement.solution import Solution, Termination
from placement.solvers.contiguous import contiguous_placement

__all__ = ["render_evaluation", "write_evaluation"]

THIS, IN_ORDER = "this placement", "contiguous"

MOST_ROWS = 20
"""Devices or experts in a table."""

WORDS = {
    "window": "A run of consecutive tokens, one scenario of load. A step is as slow as its fullest device in "
    "that step, so averages over many windows say little.",
    "contiguous": "Experts in order, in equal parts: what engines do when nobody decides. It fills the same "
    "slots here and leaves spare ones empty.",
    "balance": "Load (token-expert pairs) of the fullest device over the mean device, in one window and "
    "layer. 1 is perfect; at 1.5 the fullest device does half as much again as the mean one.",
    "fanout": "Distinct devices that one token's experts sit on, per layer; every further device is another "
    "copy of the token to send.",
    "step": "Predicted time of the parts that a placement changes, summed over layers: dispatch, the fullest "
    "device's experts, combine. Attention and everything else is left out.",
    "interval": "Where the true difference lies with 95 % confidence, for traffic like this. Windows that "
    "resemble their neighbours count as fewer.",
    "predicted": "What the placement's file says that it would reach on the traffic that it was fitted to. "
    "What is fitted flatters, so a little more here is no cause for alarm.",
}


def write_evaluation(
    problem: PlacementProblem,
    placement: Placement,
    path: str | os.PathLike[str],
    *,
    trace: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write an evaluation as one self-contained HTML file, whole or not at all.

    Parameters
    ----------
    problem
        The traffic and what it runs on, with the placement's own slots.
    placement
        What is judged; the entries of its file, where it has them, say what was predicted.
    path
        Where to write; an existing file is replaced.
    trace
        Digest of the traffic.
    provenance
        Where the numbers come from, shown at the end.

    Raises
    ------
    InputError
        If the placement does not belong to the problem, or the file cannot be written.
    """
    write_text(path, render_evaluation(problem, placement, trace=trace, provenance=provenance))


def render_evaluation(
    problem: PlacementProblem,
    placement: Placement,
    *,
    trace: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> str:
    """Return an evaluation as one self-contained HTML page; parameters as for `write_evaluation`.

    Raises
    ------
    InputError
        If the placement does not belong to the problem.
    """
    story = _story(problem, placement)
    name = placement.model_name or (None if problem.model is None else problem.model.name)
    title = f"Evaluation of a placement{f' of {name}' if name else ''} on {problem.topology.name}"
    return document(title, "\n".join(_sections(story, title, trace, provenance or {})))


def _story(problem: PlacementProblem, placement: Placement) -> Story:
    """Return both placements, scored on all windows, in the form of a comparison."""
    model = CostModel(problem)
    results = (
        _scored(model, IN_ORDER, contiguous_placement(problem)),
        _scored(model, THIS, placement),
    )
    comparison = Comparison(
        problem=problem,
        policies=results,
        skipped={},
        lower_bound=0.0,
        num_held_out_windows=problem.profile.num_windows,
    )
    return Story(comparison=comparison, windows="windows", solved=False)


def _scored(model: CostModel, name: str, placement: Placement) -> PolicyResult:
    cost = model.evaluate(placement)
    solution = Solution(
        placement=placement,
        breakdown=cost,
        bound=LowerBound(value=0.0, layer_L=np.zeros(placement.num_layers)),
        termination=Termination.CONVERGED,
        solver=name,
        incumbents=(),
        candidates={},
        skipped={},
    )
    return PolicyResult(name=name, description=name, solution=solution, fitted=cost, held_out=cost)


def _sections(story: Story, title: str, trace: str | None, provenance: Mapping[str, str]) -> Iterator[str]:
    windows = story.comparison.num_held_out_windows
    known = {
        **facts(story),
        "Windows": f"{windows:,}, {number(float(story.comparison.problem.profile.window_tokens_W.mean()))} "
        "tokens each",
    }
    yield f"<header><h1>{escape(title)}</h1>\n{definitions(known, css_class='facts')}</header>"
    gain = _gain(story)
    tone = "unsure" if gain is None or abs(gain) < LEAST_GAIN else "good" if gain > 0 else "bad"
    warning = (
        f'<p class="warning">Only {plural(windows, "window")}: a few per cent may be noise.</p>'
        if story.comparison.few_windows
        else ""
    )
    yield (
        f'<section class="answer {tone}"><h2 class="headline">{escape(_headline(story))}</h2>'
        f'<p class="numbers">{escape(_paragraph(story, trace))}</p>{warning}</section>'
    )
    yield f'<p class="primer">{escape(PRIMER)} Times are predictions of a cost model.</p>'
    yield from figure_sections(story)
    yield _devices_table(story).html()
    yield _experts_table(story).html()
    own = {key: text for key, text in provenance_of(story).items() if key != "solve"}
    yield from closing(WORDS, {**own, **provenance})


def _gain(story: Story) -> float | None:
    return None if story.replaced is None else story.gain_over(story.replaced)


def _headline(story: Story) -> str:
    scale, gain = story.objective_scale, _gain(story)
    label = story.objective_label.replace("predicted step", "MoE step")
    value = f"{scale.text(story.proposed.held_out.objective)} {scale.unit}"
    text = f"On this traffic the placement's {label} is {value}"
    if gain is None or story.replaced is None:
        return text
    interval = story.interval_over(story.replaced)
    if round(abs(gain), 3) == 0:
        return f"{text}, the same as with experts in order"
    # Of a loss the ends change places.
    ends = None if interval is None else [percent(end) for end in sorted(map(abs, interval))]
    crosses = interval is not None and interval[0] <= 0 <= interval[1]
    doubt = ", which cannot be told from noise" if crosses else "" if ends is None else (
        f", interval {ends[0]} to {ends[1]}"
    )  # fmt: skip
    direction = "below" if gain > 0 else "above"
    return f"{text}, {percent(abs(gain))} {direction} that of experts in order{doubt}"


def _paragraph(story: Story, trace: str | None) -> str:
    before, after = (result.held_out.metrics for result in story.contrast)
    parts = [
        f"Balance (fullest / mean device load) is {number(after.balance)}, {number(before.balance)} with "
        f"experts in order; no placement of these replicas comes below {number(after.balance_floor)}."
    ]
    if after.fanout is not None and before.fanout is not None:
        parts.append(
            f"A token visits {number(after.fanout)} devices in a layer, {number(before.fanout)} with experts "
            "in order."
        )
    if story.step_known and not story.measures_step:
        scale = story.step_scale
        parts.append(f"The {story.step_label} is {scale.text(story.proposed.held_out.step)} {scale.unit}.")
    parts.append(_against_prediction(story, trace))
    return " ".join(parts)


def _against_prediction(story: Story, trace: str | None) -> str:
    """Say what the placement's file promised, and whether that can be compared."""
    entries = story.proposed.placement.extra
    objective, provenance = (_mapping(entries.get(key)) for key in ("objective", "provenance"))
    value = objective.get("value")
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        return "The placement's file tells no prediction to compare with."
    differing = _differing(story, objective, _mapping(provenance.get("options")))
    if differing:
        return f"What its file predicts is not compared, since it is for {'; '.join(differing)}."
    scale, here = story.objective_scale, story.proposed.held_out.objective
    change = percent(here / value - 1, signed=True)
    same = trace is not None and provenance.get("trace") == trace
    where = "on this very trace" if same else "on the traffic that it was fitted to"
    text = f"Its file predicts {scale.text(float(value))} {scale.unit} {where}: here it is {change}."
    bound = objective.get("lower_bound")
    if same and isinstance(bound, (int, float)) and 0 < bound <= here:
        text += (
            f" The certified lower bound of its solve is {scale.text(float(bound))} {scale.unit}, so it "
            f"is at most {percent(1 - bound / here)} from the best possible."
        )
    return text


def _differing(story: Story, objective: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """List what the prediction was made for that is not so here."""
    problem = story.comparison.problem
    here = {
        "objective": str(problem.objective),
        "unit": problem.unit,
        "semantics": str(problem.semantics),
        "risk": str(problem.risk),
        "replica_split": str(problem.replica_split),
        "window": int(problem.profile.window_tokens_W[0]),
        "topology": problem.topology.name,
    }
    told = {**options, "objective": objective.get("name"), "unit": objective.get("unit")}
    return [
        f"{name.replace('_', ' ')} {told[name]}, not {value}"
        for name, value in here.items()
        if told.get(name) not in (None, value)
    ]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _devices_table(story: Story) -> PlanTable:
    cost: CostBreakdown = story.proposed.held_out
    load_LD = cost.load_WLD.mean(axis=0)
    mean_L = load_LD.mean(axis=1, keepdims=True)
    relative_LD = np.divide(load_LD, mean_L, out=np.ones_like(load_LD), where=mean_L > 0)
    fullest_WL = cost.load_WLD.argmax(axis=2)
    order = np.argsort(-relative_LD, axis=None, kind="stable")[:MOST_ROWS]
    rows = []
    for layer, device in zip(*np.unravel_index(order, relative_LD.shape), strict=True):
        share = float((fullest_WL[:, layer] == device).mean())
        rows.append(
            (
                f"device {device}, {story.layer_label(int(layer))}",
                number(float(relative_LD[layer, device])),
                percent(share, digits=0),
                number(float(load_LD[layer, device])),
            )
        )
    return PlanTable(
        title="Fullest devices",
        caption=f"The first {len(rows)} of {relative_LD.size:,} pairs of layer and device, by mean load.",
        columns=(
            "where",
            "load / mean device",
            "windows in which it is fullest",
            "token-expert pairs a window",
        ),
        rows=tuple(rows),
    )


def _experts_table(story: Story) -> PlanTable:
    placement = story.proposed.placement
    load_LE = story.comparison.problem.profile.load_WLE.mean(axis=0)
    mean_L = load_LE.mean(axis=1, keepdims=True)
    relative_LE = np.divide(load_LE, mean_L, out=np.ones_like(load_LE), where=mean_L > 0)
    order = np.argsort(-relative_LE, axis=None, kind="stable")[:MOST_ROWS]
    rows = []
    for layer, expert in zip(*np.unravel_index(order, relative_LE.shape), strict=True):
        devices = np.flatnonzero(placement.count_LED[layer, expert])
        rows.append(
            (
                f"expert {expert}, {story.layer_label(int(layer))}",
                number(float(relative_LE[layer, expert])),
                f"{devices.size}",
                ", ".join(map(str, devices.tolist())),
            )
        )
    return PlanTable(
        title="Heaviest experts",
        caption=f"The first {len(rows)} of {relative_LE.size:,} pairs of layer and expert, by mean load; an "
        "expert on several devices shares its load among them.",
        columns=("which", "load / mean expert", "replicas", "devices"),
        rows=tuple(rows),
    )
