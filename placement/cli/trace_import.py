"""``moe-placement trace import``: traces of any engine into a recorded data set, several at once."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.counting import counting_tokens
from placement.cli.inputs import FromOption, JsonOption, warn
from placement.errors import InputError

if TYPE_CHECKING:
    from placement.model import ModelShape
    from traces.conversion import WriteReport
    from traces.counts import ExpertCounts
    from traces.source import TraceSource

__all__ = ["import_traces", "report_written"]


def import_traces(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Traces of one model, in time order: files, folders or URLs of any format.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            help="Data set (folder or URL) or .npz; .json for sources that only count experts.",
            show_default=False,
        ),
    ],
    source_format: FromOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Model the traces are of, for what they do not say: layers, experts, top-k.",
            show_default=False,
        ),
    ] = None,
    physical_map: Annotated[
        Path | None,
        typer.Option(
            "--physical-map",
            help="File that says which expert each slot held, for dumps of slots.",
            show_default=False,
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            help="Kind of traffic: once for all sources, or once for each in their order.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Go on in a data set that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Write traces of any engine as a recorded data set, in bounded memory.

    Ctrl-C ends it early and keeps what was written.
    """
    from placement.model import resolve_model
    from traces.counts import ExpertCounts

    shape = None if model is None else resolve_model(model)
    domains = _domains(domain, sources)
    opened = [_opened(source, source_format, shape, physical_map) for source in sources]
    counts = [each for each in opened if isinstance(each, ExpertCounts)]
    tokens = [each for each in opened if not isinstance(each, ExpertCounts)]
    if counts and tokens:
        named = next(
            name for name, each in zip(sources, opened, strict=True) if isinstance(each, ExpertCounts)
        )
        raise InputError(f"{named}: only counts experts, while other sources know tokens; import them apart")
    if counts:
        _import_counts(sources[0], counts, out, shape, overwrite=overwrite, append=append, json=json)
        return
    _import_tokens(list(zip(sources, tokens, strict=True)), domains, out, overwrite, append, json)


def _domains(domain: list[str] | None, sources: list[str]) -> list[str | None]:
    if not domain:
        return [None] * len(sources)
    if len(domain) not in (1, len(sources)):
        raise InputError(
            f"--domain is given {len(domain)} times for {len(sources)} sources; give it once or for each"
        )
    return [*(domain * len(sources) if len(domain) == 1 else domain)]


def _opened(
    path: str, source_format: str | None, model: ModelShape | None, physical_map: Path | None
) -> TraceSource | ExpertCounts:
    from traces.readers import ReadOptions, open_trace
    from traces.statistics import RoutingStatistics

    options = ReadOptions(model=model, physical_map=physical_map)
    opened = open_trace(path, format=source_format, options=options)
    if isinstance(opened, RoutingStatistics):
        raise InputError(
            f"{path}: holds statistics, which commands take as they are; to draw a trace from them use trace "
            "synthesize --like"
        )
    return opened


def _import_counts(
    source: str,
    counts: list[ExpertCounts],
    out: str,
    model: ModelShape | None,
    *,
    overwrite: bool,
    append: bool,
    json: bool,
) -> None:
    from traces.conversion import write_counts

    if not out.endswith(".json"):
        raise InputError(
            f"{source}: only counts experts; commands take it as TRACE as it is, and an output that ends in "
            ".json stores it"
        )
    if append:
        raise InputError(f"{out}: nothing can be appended to counts; name all sources at once")
    layers = None if model is None else model.num_decoder_layers
    whole = write_counts(counts, Path(out), overwrite=overwrite, num_decoder_layers=layers)
    plain = {
        "path": out,
        "windows": whole.num_windows,
        "num_layers": whole.num_layers,
        "num_experts": whole.num_experts,
        "top_k": whole.top_k,
        "counts_only": True,
    }
    line = (
        f"{out}: {whole.num_windows} windows, {whole.num_layers} layers, {whole.num_experts} experts, counted"
    )
    typer.echo(json_text.dumps(plain) if json else line)


def _import_tokens(
    sources: list[tuple[str, TraceSource]],
    domains: list[str | None],
    out: str,
    overwrite: bool,
    append: bool,
    json: bool,
) -> None:
    from traces.conversion import JoinedSource, write_source

    if out.endswith(".json"):
        raise InputError(f"{out}: tokens are stored in a folder or an .npz, not in .json")
    source = JoinedSource(sources, domains=domains)
    with counting_tokens("importing", source.num_tokens) as progress:
        report = write_source(source, out, overwrite=overwrite, append=append, progress=progress)
    if report.interrupted:
        warn(f"interrupted after {report.num_tokens} of {source.num_tokens} tokens; what is written is valid")
    report_written(report, json=json)


def report_written(report: WriteReport, *, json: bool, **more: Any) -> None:
    """Print what was written, as one JSON object or a line."""
    header = report.header
    plain = {
        "path": report.path,
        "tokens": report.num_tokens,
        "num_layers": header.num_layers,
        "num_experts": header.num_experts,
        "top_k": header.top_k,
        "model": header.model_name,
        "domain_names": list(header.domain_names),
        "interrupted": report.interrupted,
        **more,
    }
    line = (
        f"{report.path}: {report.num_tokens:,} tokens, {header.num_layers} layers, top-{header.top_k} of "
        f"{header.num_experts} experts"
    )
    typer.echo(json_text.dumps(plain) if json else line)
