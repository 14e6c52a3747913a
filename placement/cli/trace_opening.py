"""What the ``trace`` commands share: how any TRACE is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.inputs import PhysicalMapOption
from placement.errors import InputError

if TYPE_CHECKING:
    from traces.counts import ExpertCounts
    from traces.source import TraceSource

__all__ = ["LayersOption", "OverwriteOption", "PhysicalMapOption", "open_tokens", "open_traffic"]

LayersOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model, for formats that do not know which layers are MoE: a preset, folder or config.json.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]


def open_traffic(
    trace: str, *, source_format: str | None, model: str | None, physical_map: Path | None
) -> TraceSource | ExpertCounts:
    """Open a trace of any format with what the command line says about it.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    from placement.model import resolve_model
    from traces.readers import ReadOptions, open_trace

    options = ReadOptions(model=None if model is None else resolve_model(model), physical_map=physical_map)
    return open_trace(trace, format=source_format, options=options)


def open_tokens(
    trace: str, *, source_format: str | None, model: str | None, physical_map: Path | None
) -> TraceSource:
    """Open a trace whose tokens are known one by one.

    Raises
    ------
    InputError
        If it cannot be read, or holds counts alone.
    """
    from traces.counts import ExpertCounts
    from traces.statistics import RoutingStatistics

    source = open_traffic(trace, source_format=source_format, model=model, physical_map=physical_map)
    if isinstance(source, (ExpertCounts, RoutingStatistics)):
        raise InputError(
            f"{trace}: counts experts and knows no tokens, so there is nothing to cut or to join; "
            "'moe-placement trace statistics' adds counts up"
        )
    return source
