"""``moe-placement trace statistics``: counts traces in one pass into a small file that stands in for them."""

from __future__ import annotations

import json as json_text
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.counting import counting_tokens
from placement.cli.inputs import FromOption, JsonOption, SeedOption, warn
from placement.cli.spread import CheckpointOption, OnErrorOption, RayOption, Spread, WorkersOption
from placement.errors import InputError
from placement.tasks.problem import default_window

if TYPE_CHECKING:
    from traces.source import TraceSource
    from traces.statistics import RoutingStatistics

__all__ = ["parse_bytes", "statistics"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", re.IGNORECASE)


def statistics(
    trace: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...",
            help="Traces in time order, of any format; statistics are merged as they are.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.", show_default=False)],
    add: Annotated[
        Path | None,
        typer.Option(
            "--add", help="Statistics of earlier traffic that come first; may be OUT.", show_default=False
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            help="Tokens per window (one step). Default: that of --add, else 4096, less for short traces.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Memory to stay within, e.g. 512MiB or 4GiB.")
    ] = "1GiB",
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            help="Tokens whose expert sets are kept. Default: 65536, or one of every window.",
            show_default=False,
        ),
    ] = None,
    no_sample: Annotated[
        bool, typer.Option("--no-sample", help="Keep counts alone and no token's experts, to share the file.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model, for formats that do not know their layers.", show_default=False),
    ] = None,
    source_format: FromOption = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Threads. Default: all cores.", show_default=False)
    ] = None,
    seed: SeedOption = 0,
    workers: WorkersOption = None,
    ray: RayOption = None,
    on_error: OnErrorOption = "fail",
    checkpoint: CheckpointOption = None,
    json: JsonOption = False,
) -> None:
    """Count traces in one pass: loads, transitions, co-activation, homes, domains, a sample of tokens.

    The file stands in for the trace in solve, compare, evaluate and advise, and can be added to day by day.
    """
    from traces.statistics import fitted, load, merge, save

    if no_sample and sample is not None:
        raise InputError("--sample and --no-sample contradict each other; give one of them")
    if window is not None and window < 1:
        raise InputError(f"--window is {window}; it must be 1 or more")
    memory_bytes = parse_bytes(memory, "--memory")
    options = {
        "memory_bytes": memory_bytes,
        "max_sampled_tokens": 0 if no_sample else sample,
        "seed": seed,
        "threads": threads,
    }
    whole = None if add is None else load(add)
    with Spread(
        workers=workers, ray=ray, on_error=on_error, checkpoint=checkpoint, format=source_format
    ) as spread:
        for path in trace:
            source = _opened(path, source_format, model)
            part = _counted(path, source, _window(window, whole, source), spread, options | {"model": model})
            whole = part if whole is None else fitted(merge([whole, part]), memory_bytes=memory_bytes)
    assert whole is not None  # the command takes at least one trace
    if no_sample:
        whole = replace(whole, sample=None)
    elif whole.sample is None:
        warn("no tokens are kept: one of the parts has none")
    save(whole, out)
    report = {**_plain(whole, out), "missing": spread.missing}
    typer.echo(json_text.dumps(report) if json else _lines(whole, out))


def _opened(path: str, source_format: str | None, model: str | None) -> TraceSource:
    from placement.model import resolve_model
    from traces.counts import ExpertCounts
    from traces.readers import ReadOptions, open_trace

    options = ReadOptions(model=None if model is None else resolve_model(model))
    traffic = open_trace(path, format=source_format, options=options)
    if isinstance(traffic, ExpertCounts):
        raise InputError(
            f"{path}: holds expert counts, which are statistics already; solve takes them as they are"
        )
    return traffic


def _window(window: int | None, earlier: RoutingStatistics | None, source: TraceSource) -> int:
    """Return the window to count by: as asked for, as already counted, or by the trace's length."""
    from traces.statistics import RoutingStatistics

    if earlier is not None:
        if window not in (None, earlier.window_tokens):
            raise InputError(
                f"--window is {window}, but earlier statistics have windows of {earlier.window_tokens}; "
                "leave it out or collect those again"
            )
        return earlier.window_tokens
    if isinstance(source, RoutingStatistics):
        return source.window_tokens if window is None else window
    return default_window(source.num_tokens) if window is None else window


def _counted(
    path: str, source: TraceSource, window: int, spread: Spread, options: dict[str, Any]
) -> RoutingStatistics:
    """Count a trace, in this process or spread over others; statistics are what they are."""
    from traces.statistics import RoutingStatistics, collect

    if isinstance(source, RoutingStatistics):
        if source.window_tokens != window:
            raise InputError(
                f"{path}: has windows of {source.window_tokens} tokens, not {window}; collect it again"
            )
        return source
    if spread.wanted:
        return spread.count(path, window, **options)
    own = {name: value for name, value in options.items() if name != "model"}
    with counting_tokens("counting", source.num_tokens) as progress:
        return collect(source, window_tokens=window, progress=progress, **own)


def parse_bytes(text: str, option: str) -> int:
    """Read a size such as ``512MiB``, ``4G`` or a number of bytes; units are powers of 1024.

    Raises
    ------
    InputError
        If it is none.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{option} {text!r} is no size; write it like 512MiB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _plain(statistics: RoutingStatistics, out: Path) -> dict[str, Any]:
    sample = statistics.sample
    return {
        "path": str(out),
        "bytes": out.stat().st_size,
        "digest": statistics.digest,
        "tokens": statistics.num_tokens,
        "window_tokens": statistics.window_tokens,
        "windows": statistics.num_windows,
        "windows_kept": len(statistics.load_WLE),
        "sampled_tokens": 0 if sample is None else sample.num_tokens,
        "exact": [
            name for name in ("transitions", "first_transitions", "coactivation")
            if getattr(statistics, f"{name}_LEE") is not None
        ],
        "errors": dict(statistics.errors),
        "ranks": None if statistics.rank_R is None else len(statistics.rank_R),
        "domains": list(statistics.header.domain_names),
    }  # fmt: skip


def _lines(statistics: RoutingStatistics, out: Path) -> str:
    header, plain = statistics.header, _plain(statistics, out)
    lines = [
        f"{out}: {statistics.num_tokens:,} tokens, {header.num_layers} layers, top-{header.top_k} of "
        f"{header.num_experts} experts; {plain['bytes'] / 1e6:,.1f} MB",
        f"windows of {statistics.window_tokens} tokens: {plain['windows_kept']:,} of {plain['windows']:,}",
        f"sampled tokens: {plain['sampled_tokens']:,}",
    ]
    estimated = [
        f"{name.replace('_', ' ')} +-{error:.2%} of the tokens" for name, error in statistics.errors.items()
    ]
    if estimated:
        lines.append(f"estimated from the sample, at 95 %: {', '.join(estimated)}")
    return "\n".join(lines)
