"""``moe-placement trace info``: what a trace holds, as tables for people or one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from traces.statistics import TraceSummary

__all__ = ["info"]


def info(
    trace: Annotated[Path, typer.Argument(help="A recorded data set, an .npz or a dump of an engine.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    source_format: Annotated[
        str | None, typer.Option("--from", help="Insist on a format instead of finding it out.")
    ] = None,
) -> None:
    """Say what a trace holds: sizes, domains, and per layer how uneven, drifting and co-active it is."""
    from traces.readers import read_trace
    from traces.statistics import describe

    summary = describe(read_trace(trace, format=source_format))
    if as_json:
        print(json.dumps(summary.to_json()))
    else:
        _print_tables(summary)


def _print_tables(summary: TraceSummary) -> None:
    from rich.console import Console

    console = Console()
    for table in (_overview(summary), _layers(summary)):
        console.print(table)


def _overview(summary: TraceSummary) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Trace", show_header=False, title_justify="left")
    rows = {
        "model": summary.model_name,
        "tokens": f"{summary.num_tokens:,}",
        "sequences": _number(summary.num_sequences),
        "ranks": _number(summary.num_ranks),
        "routing": f"{summary.num_layers} MoE layers, top-{summary.top_k} of {summary.num_experts} experts",
        "domains": ", ".join(f"{name} {tokens:,}" for name, tokens in summary.domain_tokens.items()),
        "memory": f"{summary.size_bytes / 1e6:,.1f} MB",
        "digest": summary.digest,
    }
    for name, value in rows.items():
        # Text, because a name from a file must not be read as markup.
        table.add_row(name, Text(value or "not recorded", style="" if value else "dim", overflow="fold"))
    return table


def _layers(summary: TraceSummary) -> Table:
    from rich.table import Table

    table = Table(title="Layers", title_justify="left")
    for heading in ("layer", "busiest/mean", "variation", "active experts", "drift", "co-activation"):
        table.add_column(heading, justify="right")
    decoder_layers = summary.moe_layer_ids or tuple(layer.layer for layer in summary.layers)
    for decoder_layer, layer in zip(decoder_layers, summary.layers, strict=True):
        table.add_row(
            str(decoder_layer),
            f"{layer.busiest_over_mean:.2f}",
            f"{layer.coefficient_of_variation:.2f}",
            str(layer.active_experts),
            f"{layer.drift:.3f}",
            "-" if layer.coactivation is None else f"{layer.coactivation:.3f}",
        )
    return table


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
