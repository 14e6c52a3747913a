"""What several commands take: the options of a problem, and how they tell something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "CalibrationOption",
    "FillMemoryOption",
    "FromOption",
    "JsonOption",
    "MaxImbalanceOption",
    "ModelOption",
    "ObjectiveOption",
    "PhysicalMapOption",
    "ReplicaSplitOption",
    "RiskOption",
    "SampleOption",
    "SeedOption",
    "SemanticsOption",
    "SpareSlotsOption",
    "ThreadsOption",
    "TimeLimitOption",
    "TopologyOption",
    "TraceArgument",
    "WindowOption",
    "warn",
]

TraceArgument = Annotated[
    str,
    typer.Argument(
        help="Data set (folder or URL), .npz, saved statistics or a dump of an engine; found out by content.",
        show_default=False,
    ),
]
TopologyOption = Annotated[
    str,
    typer.Option(
        "-t",
        "--topology",
        help="KIND:NODESxDEVICES (h100:2x8, a40:1x2+v100:1x2) or a YAML file.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model sizes: a preset's name, a checkpoint folder, config.json or YAML. Default: the trace's.",
        show_default=False,
    ),
]
SemanticsOption = Annotated[
    str, typer.Option("--semantics", help="dispatch, dispatch-nodedup, stay-put or allgather.")
]
ObjectiveOption = Annotated[str, typer.Option("--objective", help="step-time, balance or traffic.")]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Tokens per window (one step). Default: 4096, less for short traces.",
        show_default=False,
    ),
]
SpareSlotsOption = Annotated[
    int, typer.Option("--spare-slots", help="Slots per layer beyond one per expert, over all devices.")
]
FillMemoryOption = Annotated[
    bool,
    typer.Option("--fill-memory", help="As many slots on each device as its memory holds experts."),
]
ReplicaSplitOption = Annotated[
    str,
    typer.Option(
        "--replica-split", help="How the engine spreads tokens over replicas: even, nearest, hash or lp."
    ),
]
MaxImbalanceOption = Annotated[
    float,
    typer.Option("--max-imbalance", help="For traffic: fullest / mean device of each layer's summed load."),
]
RiskOption = Annotated[str, typer.Option("--risk", help="Over windows: mean, p95 or cvar95.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="Measured curves or linear costs (JSON). Default: data sheet.",
        show_default=False,
    ),
]
SampleOption = Annotated[
    int | None,
    typer.Option(
        "--sample",
        help="Tokens whose expert sets are kept. Default: all, or what fits in memory.",
        show_default=False,
    ),
]
FromOption = Annotated[
    str | None, typer.Option("--from", help="Insist on a trace format.", show_default=False)
]
PhysicalMapOption = Annotated[
    Path | None,
    typer.Option(
        "--physical-map",
        help="Which logical expert each physical slot held, for dumps of physical ids.",
        show_default=False,
    ),
]
TimeLimitOption = Annotated[
    float | None,
    typer.Option("--time-limit", help="Seconds; longer searches deeper.", show_default=False),
]
ThreadsOption = Annotated[int, typer.Option("--threads", help="Threads; results repeat exactly with one.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def warn(message: str) -> None:
    """Tell the user something on stderr."""
    sys.stderr.write(f"moe-placement: {' '.join(message.split())}\n")
