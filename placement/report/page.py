"""The page of a comparison: sections in reading order."""

from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Iterator, Mapping
from html import escape

from placement.comparison import Comparison
from placement.io import write_text
from placement.report.answer import Answer, Verdict, answer
from placement.report.chart_numbers import ChartNumbers
from placement.report.document import Chart, document, omitted
from placement.report.figures import load_map
from placement.report.figures.comparison import gap_figure, layers_figure, phases_figure, windows_figure
from placement.report.numbers import capital, number, percent, plural
from placement.report.story import Story
from placement.report.tables import (
    default_title,
    definitions,
    facts,
    policy_table,
    provenance_of,
    skipped_list,
)

__all__ = ["PRIMER", "closing", "figure_sections", "render_report", "write_report"]

_VERDICT_CLASS = {
    Verdict.WORTH_IT: "good",
    Verdict.UNCERTAIN: "unsure",
    Verdict.NOT_WORTH_IT: "bad",
    Verdict.UNKNOWN: "unsure",
}

PRIMER = (
    "A Mixture-of-Experts model sends each token to a few of its experts, and the experts of a layer live on "
    "different devices (GPUs). A step waits for the device with the most work and for tokens to travel; so "
    "where experts live decides how long the MoE part of a step takes."
)

_COMPARED = (
    "Here, ways of placing experts are compared on recorded traffic that none of them was fitted to. Times "
    "are predictions of a cost model."
)

_WORDS = {
    "window": "A run of consecutive tokens, one scenario of load. A step is as slow as its fullest device in "
    "that step, so averages over many windows say little.",
    "held-out": "Policies are fitted on every other window and scored on the rest. Decide by held-out "
    "figures; fitted ones flatter.",
    "balance": "Load (token-expert pairs) of the fullest device over the mean device, in one window and "
    "layer. 1 is perfect; at 1.5 the fullest device does half as much again as the mean one, and all "
    "others wait for it.",
    "mean-traffic imbalance": "The same ratio of the summed load of all windows: what balancers of average "
    "load minimise. It hides that experts surge together.",
    "fanout": "Distinct devices that one token's experts sit on, per layer; every further device is another "
    "copy of the token to send. Node fanout counts nodes.",
    "step": "Predicted time of the parts that a placement changes, summed over layers: dispatch, the fullest "
    "device's experts, combine. Attention and everything else is left out.",
    "gap": "(objective \N{MINUS SIGN} lower bound) / objective on the fitted windows. The bound holds for "
    "every placement, so a small gap means that more search cannot help much; a large one may be the "
    "bound's weakness.",
    "interval": "Where the true gain lies with 95 % confidence, judged by how much the gain differs between "
    "held-out windows (Student's t on the ratio). Windows that resemble their neighbours count as fewer; "
    "traffic of a kind that the trace does not have is not covered.",
    "EPLB": "The balancer of experts that DeepSeek published and inference engines bring: it evens out "
    "average load. The figures are against it; “contiguous”, experts in order, is what engines do without.",
    "moving": "Moving experts costs transfer time, which is not in these figures; "
    "the command “moe-placement diff” says how many bytes move, and in how many seconds.",
}


def write_report(
    comparison: Comparison,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a comparison as one self-contained HTML file, whole or not at all.

    Parameters
    ----------
    comparison
        All policies on one problem.
    path
        Where to write; an existing file is replaced.
    title, provenance
        As for `render_report`.

    Raises
    ------
    InputError
        If the comparison holds no policy, or the file cannot be written.
    """
    write_text(path, render_report(comparison, title=title, provenance=provenance))


def render_report(
    comparison: Comparison, *, title: str | None = None, provenance: Mapping[str, str] | None = None
) -> str:
    """Return a comparison as one self-contained HTML page; the same comparison gives the same page.

    Parameters
    ----------
    title
        Head of the page; the model and topology by default.
    provenance
        Where the numbers come from (trace digest, options, ...), shown at the end. Entries add to, or
        replace, what the comparison itself knows: model, topology, calibration, options, solve, version.

    Raises
    ------
    InputError
        If the comparison holds no policy.
    """
    story = Story(comparison=comparison)
    known = provenance_of(story)
    head = default_title(story) if title is None else title
    entries = {**known, **(provenance or {})}
    sections = (
        *_introduction(story, head),
        *figure_sections(story),
        _policies_section(story),
        *closing(_WORDS, entries),
    )
    return document(head, "\n".join(sections))


def _introduction(story: Story, title: str) -> Iterator[str]:
    said = answer(story)
    yield f"<header><h1>{escape(title)}</h1>\n{definitions(facts(story), css_class='facts')}</header>"
    yield _answer_section(said)
    yield f'<p class="primer">{escape(PRIMER)} {escape(_COMPARED)}</p>'


def _policies_section(story: Story) -> str:
    return (
        "<section><h2>All policies</h2>"
        '<p class="note">Held-out windows in bold, <small>the fitted windows beneath</small>. '
        f"{'' if story.replaced is None else 'Lower is better, except for “Windows won”.'}</p>\n"
        f"{policy_table(story)}\n{skipped_list(story.comparison.skipped)}</section>"
    )


def _answer_section(said: Answer) -> str:
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in said.warnings)
    return (
        f'<section class="answer {_VERDICT_CLASS[said.verdict]}">'
        f'<p class="verdict">{escape(capital(said.verdict))}</p>'
        f'<h2 class="headline">{escape(said.headline)}</h2>'
        f'<p class="numbers">{escape(said.paragraph)}</p>{warnings}</section>'
    )


def figure_sections(story: Story) -> Iterator[str]:
    """Yield the pictures of a story, those that cannot be drawn with the reason."""
    yield _heat_chart(story).html()
    if story.step_known:
        yield _phases_chart(story).html()
        yield _layers_chart(story).html()
    else:
        yield omitted("What a step is made of", story.why_step_unknown)
    if story.proposed.solution.incumbents:
        yield _gap_chart(story).html()
    elif story.solved:
        yield omitted("How the solve went", "the solve recorded no incumbents")
    yield _windows_chart(story).html()


def _heat_chart(story: Story) -> Chart:
    before = "" if story.replaced is None else f"{story.replaced.name} (left) and "
    caption = (
        f"Load of each device relative to the mean device, in every {story.window}, under {before}"
        f"{story.proposed.name}. Even is pale; a red cell is a device that all others wait for. "
        f"{load_map.grid_of(story).caption}"
    ).strip()
    cells, step = load_map.packed_maps(story)
    caption += "" if step <= 0.01 else f" Loads are to the nearest {percent(step, digits=0)} of the mean."
    choices = {
        "step": step,
        "shape": list(cells.shape),
        "bytes": b64encode(cells.tobytes()).decode(),
    }
    return Chart(
        name="load-map",
        title="Where the load sits",
        caption=caption,
        figure=load_map.heat_figure(story),
        controls=_layer_selector(story),
        numbers=_balance_numbers(story),
        choices=json.dumps(choices, separators=(",", ":")),
    )


def _balance_numbers(story: Story) -> ChartNumbers:
    """Return the balance of every layer: what the maps show, in a number each."""
    balance_PL = [result.held_out.balance_WL.mean(axis=0).tolist() for result in story.contrast]
    return ChartNumbers(
        columns=("layer", *(f"balance, {result.name}" for result in story.contrast)),
        rows=tuple(
            (story.layer_label(layer), *map(number, balances))
            for layer, balances in enumerate(zip(*balance_PL, strict=True))
        ),
    )


def _layer_selector(story: Story) -> str:
    choices = load_map.layer_choices(story)
    if len(choices) == 1:
        return f'<p class="control">{escape(choices[0].label)}</p>'
    shown = load_map.improved_most(story)
    options = "".join(
        f'<option value="{choice.layer}"{" selected" if choice.layer == shown else ""}>'
        f"{escape(choice.label)}{' (largest improvement)' if choice.layer == shown else ''}</option>"
        for choice in choices
    )
    return (
        '<p class="control"><label for="load-map-layer">Layer</label> '
        f'<select id="load-map-layer" data-chart="load-map" autocomplete="off">{options}</select></p>'
    )


def _phases_chart(story: Story) -> Chart:
    return Chart(
        name="phases",
        title="What a step is made of",
        caption=f"Mean over {story.windows}, summed over layers: each phase takes as long as its fullest "
        "device (experts) or link (dispatch, combine).",
        figure=phases_figure(story),
    )


def _layers_chart(story: Story) -> Chart:
    replaced, proposed = story.replaced, story.proposed
    against = "" if replaced is None else f": {replaced.name} (faint, left) against {proposed.name} (right)"
    return Chart(
        name="layers",
        title="Layer by layer",
        caption=f"The same parts in each MoE layer{against}.",
        figure=layers_figure(story),
        numbers=_layer_numbers(story),
    )


def _layer_numbers(story: Story) -> ChartNumbers:
    scale = story.step_scale
    parts = {
        f"{phase}, {result.name} ({scale.unit})": getattr(result.held_out, f"{phase}_WL").mean(axis=0)
        for result in story.contrast
        for phase in ("experts", "dispatch", "combine")
    }
    return ChartNumbers(
        columns=("layer", *parts),
        rows=tuple(
            (story.layer_label(layer), *(scale.text(float(part_L[layer])) for part_L in parts.values()))
            for layer in range(story.comparison.problem.num_layers)
        ),
    )


def _gap_chart(story: Story) -> Chart:
    solution = story.proposed.solution
    return Chart(
        name="gap",
        title="How the solve went",
        caption=f"{plural(len(solution.incumbents), 'improvement')} of {story.proposed.name} on the fitted "
        f"windows, the last by {solution.incumbents[-1].solver}. At the end the best possible was proved to "
        f"be at most {percent(story.gap_of(story.proposed))} lower.",
        figure=gap_figure(story),
    )


def _windows_chart(story: Story) -> Chart:
    return Chart(
        name="windows",
        title="How windows differ",
        caption=f"Box: median and quartiles over {story.windows}; whiskers: within 1.5 times the box; "
        "dots: single windows.",
        figure=windows_figure(story),
    )


def closing(words: Mapping[str, str], provenance: Mapping[str, str]) -> Iterator[str]:
    """Yield the sections at a page's end: what words mean, where numbers come from."""
    yield f"<section><h2>How to read this</h2>{definitions(words, css_class='words')}</section>"
    yield f"<section><h2>Provenance</h2>{definitions(provenance, css_class='provenance')}</section>"
