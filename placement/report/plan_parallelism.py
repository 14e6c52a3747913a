"""The page of a plan of parallelism: ranked strategies, what stages hold, what a step is made of."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from placement.planning.parallelism import ParallelismPlan, PlacedExperts, RankedStrategy, Reason
from placement.planning.parallelism.experts import CONTIGUOUS, EPLB, HILL_CLIMB, OURS
from placement.report.document import Chart
from placement.report.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    faint,
    hover_name,
    legend_above,
)
from placement.report.numbers import NO_VALUE, number, percent, plural
from placement.report.plan_page import PlanPage, PlanTable

__all__ = ["headline", "page_of", "paragraph", "policy_rows", "rejected_line", "strategy_rows"]

GIB = 2**30

Columns = tuple[str, ...]
Rows = list[tuple[str, ...]]

MEMORY_COLOURS = {
    "attention states": GREEN,
    "expert states": BLUE,
    "dense states": GREY,
    "activations": ORANGE,
    "recomputed layer": faint(ORANGE),
}
STEP_COLOURS = {
    "attention": GREEN,
    "experts": BLUE,
    "dense": faint(BLUE),
    "all-to-all": ORANGE,
    "tensor all-reduce": faint(ORANGE),
    "stage sends": faint(GREEN),
    "pipeline bubble": GREY,
    "gradients": faint(GREY),
}

MOST_BARS = 8
"""Strategies in the figure of the step."""

MOST_ROWS = 20
"""Strategies in the page's table."""

POLICY_NAMES = {
    CONTIGUOUS: "experts in order",
    EPLB: "EPLB",
    HILL_CLIMB: "Piper's hill climbing",
    OURS: "moe-placement",
}

AT_MOST, AT_LEAST = "\N{LESS-THAN OR EQUAL TO}", "\N{GREATER-THAN OR EQUAL TO}"
"""Before figures of strategies that no experts were placed for: balanced loads bound what they can reach."""

WORDS = {
    "PP, EP, TP, DP": "devices over which layers, experts and matrices are split, and replicas of all of it",
    "micro-batch": "sequences that pass the pipeline together, on each device with sequences of its own",
    "virtual stages": "parts of the model on each device, taken in turns (interleaved 1F1B)",
    "checkpointing": "selective drops attention scores, full keeps a layer's input alone and computes again",
    "hierarchical": "one packed message between each pair of nodes, then an exchange inside the node (HALO)",
    "MFU": "model FLOPs, nothing counted twice, over what the devices' peak would do in that time",
    "load factor": "tokens on the fullest device over the mean; 1 is balanced",
    f"{AT_MOST}, {AT_LEAST}": "what balanced loads would give; real loads can only be worse",
    "pipeline bubble": "time in which the slowest stage waits for the pipeline to fill and to drain",
}


def headline(plan: ParallelismPlan) -> str:
    """Return the answer in a sentence."""
    best, question = plan.best.best, plan.question
    return (
        f"{best.strategy.mesh} trains {question.job.transformer.moe.name} on "
        f"{plural(question.topology.num_devices, 'device')} at {percent(best.utilisation)} of their peak: "
        f"{number(best.step.total_s)} s a step."
    )


def paragraph(plan: ParallelismPlan) -> str:
    """Return what stands behind the answer."""
    best, question = plan.best.best, plan.question
    parts = best.step.parts()
    largest = max(parts, key=lambda name: parts[name])
    text = (
        f"The strategy is {best.strategy}. Its fullest stage holds {_gib(best.memory.peak_bytes)} of "
        f"{_gib(question.device_memory_bytes)}; most of the step is {largest} "
        f"({percent(parts[largest] / best.step.total_s, digits=0)}). "
        f"Of {plan.search.num_strategies:,} strategies looked at, {len(plan.ranked):,} fit."
    )
    if plan.best.placed is None:
        return text + " Loads are taken for balanced."
    placed = plan.best.placed
    ours, order = placed.experts.ours, placed.experts.policies[CONTIGUOUS]
    bound = plan.utilisation_bound
    text += (
        " What was not placed could not be better even with balanced loads."
        if bound <= best.utilisation
        else f" Strategies that no experts were placed for reach {percent(bound)} at most."
    )
    return (
        f"{text} On loads held out the fullest device has {number(ours.held_out_factor)} times the mean, "
        f"{number(order.held_out_factor)} with experts in order; balanced loads would take "
        f"{number(plan.best.lower_bound_s)} s a step."
    )


def rejected_line(plan: ParallelismPlan) -> str:
    """Return how many meshes are not taken, and why."""
    counts = plan.rejected_by_reason
    if not counts:
        return f"All {plan.search.num_meshes} meshes are possible."
    listed = "; ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{sum(counts.values())} of {plan.search.num_meshes} meshes are not taken: {listed}."


def strategy_rows(plan: ParallelismPlan, top: int) -> tuple[Columns, Rows]:
    """Return the ranked table."""
    columns: Columns = (
        "mesh", "micro-batches", "virtual", "checkpointing", "all-to-all", "MFU", "step, s", "peak, GiB",
        "load factor",
    )  # fmt: skip
    rows: Rows = []
    for ranked in plan.ranked[:top]:
        best = ranked.best
        strategy, placed = best.strategy, ranked.placed
        rows.append(
            (
                str(strategy.mesh),
                f"{strategy.num_micro_batches} x {strategy.micro_batch}",
                str(strategy.virtual_stages),
                str(strategy.checkpointing),
                str(strategy.exchange),
                ("" if ranked.evaluated else AT_MOST) + percent(best.utilisation),
                ("" if ranked.evaluated else AT_LEAST) + number(best.step.total_s),
                number(best.memory.peak_bytes / GIB, digits=3),
                NO_VALUE if placed is None else number(placed.experts.ours.held_out_factor),
            )
        )
    return columns, rows


def policy_rows(placed: PlacedExperts) -> tuple[Columns, Rows]:
    """Return the table of placements."""
    columns: Columns = ("experts placed by", "fitted", "load factor held out", "worst layer", "step, s")
    rows: Rows = [
        (
            POLICY_NAMES[name],
            number(score.fitted),
            number(score.held_out_factor),
            number(float(score.held_out_factor_L.max())),
            number(placed.skewed[name].step.total_s),
        )
        for name, score in placed.experts.policies.items()
    ]
    return columns, rows


def page_of(plan: ParallelismPlan, *, trace: str | None = None) -> PlanPage:
    """Return the page of a plan; `trace` names the routing that it is for."""
    question = plan.question
    sections: list[Chart | PlanTable] = [
        Chart(
            name="step",
            title="What a step is made of",
            caption="The slowest stage's time in the best strategies; nothing is taken to overlap.",
            figure=_step_figure(plan.ranked[:MOST_BARS]),
        ),
        Chart(
            name="memory",
            title="What each stage holds",
            caption="Peak of one device in every stage of the best strategy, against the device's memory.",
            figure=_memory_figure(plan),
        ),
        _strategies_table(plan),
    ]
    sections += _placement_tables(plan)
    sections.append(_rejected_table(plan))
    return PlanPage(
        title="Plan of parallelism",
        facts={
            "model": question.job.transformer.moe.name,
            "weights": f"{number(question.job.num_params / 1e9)} billion",
            "cluster": f"{question.topology.name} ({plural(question.topology.num_devices, 'device')})",
            "step": f"{question.job.global_batch:,} sequences of {question.job.sequence_length:,} tokens",
        },
        headline=headline(plan),
        paragraph=paragraph(plan),
        sections=tuple(sections),
        words=WORDS,
        provenance={
            "method": "Piper's model of memory, compute and communication (arXiv 2605.05049)",
            "routing": "balanced loads" if trace is None else trace,
            "looked at": f"{plan.search.num_meshes} meshes, {plan.search.num_strategies} strategies",
        },
    )


def _gib(num_bytes: float) -> str:
    return f"{number(num_bytes / GIB, digits=3)} GiB"


def _strategies_table(plan: ParallelismPlan) -> PlanTable:
    columns, rows = strategy_rows(plan, MOST_ROWS)
    return PlanTable(
        title="Strategies that fit",
        caption=f"The best {len(rows)} of {len(plan.ranked)}, by predicted utilisation.",
        columns=columns,
        rows=tuple(rows),
        marked=0,
    )


def _placement_tables(plan: ParallelismPlan) -> list[PlanTable]:
    placed = plan.best.placed
    if placed is None:
        return []
    columns, rows = policy_rows(placed)
    migration = placed.migration
    trigger, even = migration.trigger_factor, migration.break_even_steps
    return [
        PlanTable(
            title="Experts of the best strategy",
            caption=(
                f"Objective {placed.experts.objective} on the fitted windows: lower bound "
                f"{number(placed.experts.lower_bound)}, ours at most "
                f"{percent(placed.experts.gap)} above the best. The load factor is on the windows held out."
            ),
            columns=columns,
            rows=tuple(rows),
            marked=len(rows) - 1,
        ),
        PlanTable(
            title="Moving experts",
            caption="Weights, gradients and optimizer state move; from experts in order to our placement.",
            columns=("what", "value"),
            rows=(
                ("expert copies that move", f"{len(migration.moves):,}"),
                ("received by the busiest device", _gib(migration.busiest_device_bytes)),
                ("time, s", number(migration.seconds)),
                ("a whole layer changing places, per device", _gib(migration.worst_layer_bytes)),
                ("time of that, s", number(migration.worst_layer_s)),
                ("steps between migrations", f"{migration.interval_steps:,}"),
                ("share of the training time", percent(migration.share_of_time, digits=2)),
                ("steps until it has paid", NO_VALUE if even is None else f"{even:,}"),
                ("move above a load factor of", NO_VALUE if trigger is None else number(trigger)),
            ),
        ),
    ]


def _rejected_table(plan: ParallelismPlan) -> PlanTable:
    short = [rejection for rejection in plan.search.rejections if rejection.reason is Reason.MEMORY]
    nearest = min(short, key=lambda rejection: rejection.missing_bytes, default=None)
    caption = rejected_line(plan)
    if nearest is not None:
        missing = _gib(nearest.missing_bytes)
        caption += f" The nearest for want of memory is {nearest.strategy}: {missing} are missing."
    return PlanTable(
        title="Meshes that are not taken",
        caption=caption,
        columns=("reason", "meshes"),
        rows=tuple((str(reason), str(count)) for reason, count in plan.rejected_by_reason.items()),
    )


def _step_figure(ranked: tuple[RankedStrategy, ...]) -> go.Figure:
    """Draw the parts of the step, one bar per strategy."""
    # Strategies on one mesh are told apart by their rank; the rest of the name is shown on hovering.
    labels = [escape(f"{rank}. {strategy.best.strategy.mesh}") for rank, strategy in enumerate(ranked, 1)]
    names = [hover_name(str(strategy.best.strategy)) for strategy in ranked]
    parts = [strategy.best.step.parts() for strategy in ranked]
    bars = [
        go.Bar(
            name=name,
            orientation="h",
            y=labels,
            x=[part[name] for part in parts],
            customdata=names,
            marker={"color": colour},
            hovertemplate=f"%{{customdata}}: {hover_name(name)} %{{x:,.4~g}} s<extra></extra>",
        )
        for name, colour in STEP_COLOURS.items()
        if any(part[name] > 0 for part in parts)
    ]
    figure = empty_figure(
        *bars,
        height=120 + 42 * len(labels),
        barmode="stack",
        bargap=0.35,
        showlegend=True,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 56, "b": 8},
    )
    figure.update_xaxes(title=axis_title("predicted time of a step (s)"))
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def _memory_figure(plan: ParallelismPlan) -> go.Figure:
    """Draw what a device of each stage holds, and the line of its memory."""
    memory = plan.best.best.memory
    stages = list(range(memory.total_P.size))
    bars = [
        go.Bar(
            name=name,
            x=stages,
            y=part_P / GIB,
            marker={"color": MEMORY_COLOURS[name]},
            hovertemplate=f"stage %{{x}}: {hover_name(name)} %{{y:,.4~g}} GiB<extra></extra>",
        )
        for name, part_P in memory.parts().items()
        if part_P.any()
    ]
    limit = plan.question.device_memory_bytes / GIB
    figure = empty_figure(
        *bars,
        height=380,
        barmode="stack",
        showlegend=True,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 56, "b": 8},
    )
    figure.add_hline(
        y=limit,
        line={"color": GREY, "dash": "dash", "width": 2},
        annotation_text=f"memory of a device, {number(limit, digits=3)} GiB",
        annotation_position="top right",
    )
    figure.update_xaxes(title=axis_title("stage"), dtick=max(1, len(stages) // 16), showgrid=False)
    figure.update_yaxes(title=axis_title("peak of one device (GiB)"), range=[0, 1.12 * limit])
    return figure
