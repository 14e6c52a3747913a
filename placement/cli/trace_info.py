"""``moe-placement trace info``: what a trace holds, as tables for people or one JSON object."""

from __future__ import annotations

import json as json_text
from typing import TYPE_CHECKING, Any

from placement.cli.inputs import FromOption, JsonOption, TraceArgument
from placement.cli.trace_opening import LayersOption, PhysicalMapOption, open_traffic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from traces.counts import ExpertCounts
    from traces.statistics import TraceSummary
    from traces.store.summary import DatasetSummary

__all__ = ["info"]

_SERVES: dict[str, list[str]] = {
    "balance": ["dispatch", "dispatch-nodedup", "allgather"],
    "step-time": ["dispatch-nodedup", "allgather"],
    "traffic": [],
}
"""Semantics under which counts alone serve each objective."""

_CANNOT_SERVE = "step-time under dispatch, all of stay-put, traffic: they ask which experts go together"


def info(
    trace: TraceArgument,
    as_json: JsonOption = False,
    source_format: FromOption = None,
    model: LayersOption = None,
    physical_map: PhysicalMapOption = None,
) -> None:
    """Say what a trace holds: sizes, domains, and per layer how uneven, drifting and co-active it is.

    Of a large data set manifests and footers are read: loads are exact, the rest says what it is from.
    """
    from traces.counts import ExpertCounts

    traffic = open_traffic(trace, source_format=source_format, model=model, physical_map=physical_map)
    if isinstance(traffic, ExpertCounts):
        if as_json:
            print(json_text.dumps(_counts_json(traffic)))
        else:
            _print(_counts_overview(traffic), _counts_layers(traffic))
        return
    from traces.store.summary import summarise

    summary = summarise(traffic)
    if as_json:
        print(json_text.dumps(summary.to_json()))
    else:
        _print(_overview(summary), _layers(summary.summary))


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)


def _rows(title: str, rows: Mapping[str, str | None]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        # Text, because a name from a file must not be read as markup.
        table.add_row(name, Text(value or "not recorded", style="" if value else "dim", overflow="fold"))
    return table


def _grid(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _overview(found: DatasetSummary) -> Table:
    summary, stored = found.summary, found.stored
    rows = {
        "model": summary.model_name,
        "tokens": f"{summary.num_tokens:,}",
        "sequences": _number(summary.num_sequences),
        "ranks": _number(summary.num_ranks),
        "routing": f"{summary.num_layers} MoE layers, top-{summary.top_k} of {summary.num_experts} experts",
        "domains": ", ".join(f"{name} {tokens:,}" for name, tokens in summary.domain_tokens.items()),
        "memory": f"{summary.size_bytes / 1e6:,.1f} MB",
    }
    if stored is not None:
        rows["stored"] = (
            f"{stored['bytes'] / 1e6:,.1f} MB in {stored['fragments']:,} fragments of {stored['shards']:,} "
            f"ranks, {stored['bytes_per_record']:.2f} bytes per token and layer"
        )
    rows["digest"] = summary.digest
    estimated = {name: how for name, how in found.found.items() if how != "exact"}
    if estimated:
        rows["found from"] = "; ".join(f"{name}: {how}" for name, how in estimated.items())
    return _rows("Trace", rows)


def _layers(summary: TraceSummary) -> Table:
    headings = ("layer", "busiest/mean", "variation", "active experts", "drift", "co-activation")
    decoder_layers = summary.moe_layer_ids or tuple(layer.layer for layer in summary.layers)
    rows = [
        (
            str(decoder_layer),
            f"{layer.busiest_over_mean:.2f}",
            f"{layer.coefficient_of_variation:.2f}",
            str(layer.active_experts),
            f"{layer.drift:.3f}",
            "-" if layer.coactivation is None else f"{layer.coactivation:.3f}",
        )
        for decoder_layer, layer in zip(decoder_layers, summary.layers, strict=True)
    ]
    return _grid("Layers", headings, rows)


def _counts_overview(counts: ExpertCounts) -> Table:
    mean_tokens = counts.num_tokens / counts.num_windows
    rows = {
        "model": counts.model_name,
        "holds": "expert counts, not which experts each token selected",
        "windows": f"{counts.num_windows:,}, of {mean_tokens:,.0f} tokens on average",
        "tokens": f"{counts.num_tokens:,}",
        "routing": f"{counts.num_layers} MoE layers, top-{counts.top_k} of {counts.num_experts} experts",
        "digest": counts.digest,
    }
    serves = {f"serves {name}": f"under {', '.join(given)}" for name, given in _SERVES.items() if given}
    return _rows("Expert counts", {**rows, **serves, "cannot serve": _CANNOT_SERVE})


def _counts_layers(counts: ExpertCounts) -> Table:
    rows = [
        (
            str(layer["decoder_layer"]),
            f"{layer['busiest_over_mean']:.2f}",
            f"{layer['coefficient_of_variation']:.2f}",
            str(layer["active_experts"]),
        )
        for layer in _counts_by_layer(counts)
    ]
    return _grid("Layers", ("layer", "busiest/mean", "variation", "active experts"), rows)


def _counts_by_layer(counts: ExpertCounts) -> list[dict[str, Any]]:
    load_LE = counts.load_WLE.sum(axis=0)
    return [
        {
            "layer": layer,
            "decoder_layer": counts.moe_layer_ids[layer] if counts.moe_layer_ids else layer,
            "busiest_over_mean": float(load_E.max() / load_E.mean()),
            "coefficient_of_variation": float(load_E.std() / load_E.mean()),
            "active_experts": int((load_E > 0).sum()),
        }
        for layer, load_E in enumerate(load_LE)
    ]


def _counts_json(counts: ExpertCounts) -> dict[str, Any]:
    return {
        "kind": "expert-counts",
        "num_windows": counts.num_windows,
        "num_tokens": counts.num_tokens,
        "num_layers": counts.num_layers,
        "num_experts": counts.num_experts,
        "top_k": counts.top_k,
        "model_name": counts.model_name,
        "moe_layer_ids": counts.moe_layer_ids,
        "digest": counts.digest,
        "serves": _SERVES,
        "layers": _counts_by_layer(counts),
    }


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"
