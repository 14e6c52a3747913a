"""``moe-placement trace window``: cuts a trace into a smaller one."""

from __future__ import annotations

import json as json_text
from typing import Annotated, Any

import typer

from placement.cli.inputs import FromOption, JsonOption, SeedOption, TraceArgument
from placement.cli.trace_opening import LayersOption, OverwriteOption, PhysicalMapOption, open_tokens
from placement.errors import InputError

__all__ = ["window"]


def window(
    trace: TraceArgument,
    out: Annotated[
        str,
        typer.Option(
            "-o",
            "--out",
            help="Data set folder or URL, or a file whose name ends in .npz.",
            show_default=False,
        ),
    ],
    start: Annotated[int, typer.Option("--start", help="First token to keep.")] = 0,
    stop: Annotated[
        int | None, typer.Option("--stop", help="Token to stop before. Default: the end.", show_default=False)
    ] = None,
    window_tokens: Annotated[
        int | None,
        typer.Option("--window", help="Tokens per window, for --fold and --every.", show_default=False),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            "--fold", help="even: windows 0, 2, 4, ..., to fit on; odd: those between, to score on."
        ),
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", help="Keep the first of so many windows.", show_default=False)
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="Domain to keep; may be repeated.")
    ] = None,
    sample_sequences: Annotated[
        float | None,
        typer.Option(
            "--sample-sequences", help="Share of the sequences to keep, 0 to 1.", show_default=False
        ),
    ] = None,
    seed: SeedOption = 0,
    source_format: FromOption = None,
    model: LayersOption = None,
    physical_map: PhysicalMapOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Cut a stretch, every other window, domains or sequences out of a trace, and write them as one.

    Choices add up. Without any the whole trace is written: this converts formats, and old data sets.
    """
    from traces.files import reading
    from traces.store.copy import write_stream
    from traces.store.cut import Cut

    if (fold is not None or every is not None) and window_tokens is None:
        raise InputError("--fold and --every go by windows: say how many tokens with --window")
    if window_tokens is not None and fold is None and every is None:
        raise InputError("--window has no effect by itself; add --fold or --every")
    cut = Cut(
        start=start,
        stop=stop,
        window_tokens=window_tokens,
        fold=fold,  # type: ignore[arg-type]
        every=every,
        domains=tuple(domain or ()),
        sequence_share=sample_sequences,
        seed=seed,
    )
    source = open_tokens(trace, source_format=source_format, model=model, physical_map=physical_map)
    about = {"trace": trace, "digest": source.digest, "cut": _given(cut)}
    with reading(trace):
        cut.check(source)
    tokens = write_stream(cut.blocks(source), source.header, out, overwrite=overwrite, provenance=about)
    plain = {"path": out, "tokens": tokens, "of_tokens": source.num_tokens}
    typer.echo(json_text.dumps(plain) if json else f"{out}: {tokens:,} of {source.num_tokens:,} tokens")


def _given(cut: Any) -> dict[str, Any]:
    """Return what differs from keeping everything."""
    from dataclasses import fields

    values = {field.name: (getattr(cut, field.name), field.default) for field in fields(cut)}
    return {name: value for name, (value, default) in values.items() if value != default}
