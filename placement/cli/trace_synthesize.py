"""``moe-placement trace synthesize``: traces of a router made up, or fitted to real traffic's statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.counting import counting_tokens
from placement.cli.inputs import FromOption, JsonOption, SeedOption, warn
from placement.cli.trace_import import report_written
from placement.errors import InputError

if TYPE_CHECKING:
    from traces.source import TraceSource
    from traces.synthesize import FittedRouting

__all__ = ["synthesize"]


def synthesize(
    out: Annotated[
        str, typer.Option("-o", "--out", help="Data set (folder or URL) or .npz.", show_default=False)
    ],
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            help="Trace, statistics or fitted router whose traffic to imitate.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", help="Tokens. Default: 1048576, or as many as --like.", show_default=False),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", help="MoE layers. Default: 4.", show_default=False)
    ] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", help="Experts per layer. Default: 64.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Experts per token. Default: 8.", show_default=False)
    ] = None,
    domains: Annotated[
        int | None, typer.Option("--domains", help="Kinds of traffic. Default: 4.", show_default=False)
    ] = None,
    skew: Annotated[
        float | None,
        typer.Option("--skew", help="Zipf exponent of popularity. Default: 0.5.", show_default=False),
    ] = None,
    domain_strength: Annotated[
        float | None,
        typer.Option("--domain-strength", help="How much domains differ. Default: 0.8.", show_default=False),
    ] = None,
    drift: Annotated[
        float | None,
        typer.Option("--drift", help="Change from first to last token. Default: 0.4.", show_default=False),
    ] = None,
    coactivation: Annotated[
        float | None,
        typer.Option(
            "--coactivation",
            help="How much experts are selected together. Default: 2.",
            show_default=False,
        ),
    ] = None,
    affinity: Annotated[
        float | None,
        typer.Option(
            "--affinity",
            help="How much a layer predicts the next, 0 to 1. Default: 0.6.",
            show_default=False,
        ),
    ] = None,
    sequence: Annotated[
        int | None, typer.Option("--sequence", help="Tokens per sequence. Default: 512.", show_default=False)
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option("--groups", help="Groups of group-limited routing. Default: none.", show_default=False),
    ] = None,
    top_groups: Annotated[
        int | None,
        typer.Option("--top-groups", help="Groups that a token may use of them.", show_default=False),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            help="With --like TRACE: tokens over which loads are taken as constant. Default: 4096, less for "
            "short traces.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            "--classes",
            help="With --like: hidden classes of tokens per layer. Default: as experts, up to 64.",
            show_default=False,
        ),
    ] = None,
    save_fit: Annotated[
        Path | None,
        typer.Option("--save-fit", help="With --like: write the fitted router too.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="With --like: model of a trace that does not say it.", show_default=False
        ),
    ] = None,
    source_format: FromOption = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Go on in a data set that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Draw a trace of any length: from knobs, or imitating the traffic of a trace or of its statistics.

    With --like, loads by window, drift, and how experts follow and accompany each other are imitated. What a
    synthetic trace or a fitted router reveals is that much and no token's choices: it can be shared where
    the trace cannot. Ctrl-C ends it early and keeps what was written.
    """
    from traces.conversion import write_source

    knobs = {
        "num_layers": layers,
        "num_experts": experts,
        "top_k": top_k,
        "num_domains": domains,
        "skew": skew,
        "domain_strength": domain_strength,
        "drift": drift,
        "coactivation": coactivation,
        "layer_affinity": affinity,
        "sequence_tokens": sequence,
        "num_groups": groups,
        "top_groups": top_groups,
    }
    given = {name: value for name, value in knobs.items() if value is not None}
    if like is None:
        _refuse(
            {"--window": window, "--classes": classes, "--save-fit": save_fit, "--model": model}, "--like"
        )
        source = _made_up(tokens, given, seed)
    else:
        if given:
            raise InputError(
                f"--{next(iter(given)).removeprefix('num_').replace('_', '-')} has no meaning beside --like, "
                "whose traffic says it"
            )
        fitted = _fitted(like, source_format, model, window, classes)
        if save_fit is not None:
            fitted.save(save_fit)
        source = fitted.source(tokens, seed=seed)
    with counting_tokens("drawing", source.num_tokens) as progress:
        report = write_source(source, out, overwrite=overwrite, append=append, progress=progress)
    if report.interrupted:
        warn(f"interrupted after {report.num_tokens} of {source.num_tokens} tokens; what is written is valid")
    report_written(report, json=json, seed=seed, like=like)


def _refuse(options: dict[str, object], needed: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} needs {needed}")


def _made_up(tokens: int | None, knobs: dict[str, Any], seed: int) -> TraceSource:
    from traces.synthesize import SyntheticSource

    sizes = {"num_layers": 4, "num_experts": 64, "top_k": 8}
    wanted = {**sizes, **knobs}
    return SyntheticSource(num_tokens=1 << 20 if tokens is None else tokens, seed=seed, **wanted)


def _fitted(
    like: str, source_format: str | None, model: str | None, window: int | None, classes: int | None
) -> FittedRouting:
    """Fit a router to a trace or its statistics, or read one that was fitted."""
    from placement.model import resolve_model
    from traces.counts import ExpertCounts
    from traces.readers import ReadOptions, open_trace
    from traces.statistics import RoutingStatistics
    from traces.synthesize import FittedRouting, fit_routing
    from traces.synthesize.moments import Moments

    if source_format is None and FittedRouting.sniff(like):
        _refuse({"--window": window, "--classes": classes, "--model": model}, "a trace to fit")
        return FittedRouting.load(like)
    options = ReadOptions(model=None if model is None else resolve_model(model))
    traffic = open_trace(like, format=source_format, options=options)
    if window is not None and isinstance(traffic, (ExpertCounts, RoutingStatistics)):
        raise InputError(f"{like}: has windows of its own; --window has no meaning")
    moments = Moments.of(traffic, window_tokens=window)
    if moments.pair_LEE is None and moments.header.top_k > 1:
        warn(f"{like}: knows loads alone; what experts are selected together is not imitated")
    return fit_routing(moments, num_classes=classes)
