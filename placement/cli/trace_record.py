"""`moe-placement trace record`: run a real model over text and write down its routing."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.errors import InputError
from placement.runtime.requirement import require_torch
from placement.runtime.samples import resolve_model

if TYPE_CHECKING:
    from traces.record import GenericFamily, RecordReport

__all__ = ["record"]


def record(
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Checkpoint folder, or byte16 for the bundled sample.", show_default=False
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option("--text", help="Text file, one domain each; more may follow it.", show_default=False),
    ],
    more_text: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="More text files.")
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Data set folder, or a file whose name ends in .npz.")
    ] = Path("trace"),
    context: Annotated[
        int | None,
        typer.Option(
            "--context", help="Tokens per sequence. Default: the model's context.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per forward pass.")] = 8,
    generate: Annotated[
        int, typer.Option("--generate", help="Tokens to generate after each sequence: decode traffic.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the generated tokens.")] = 0,
    sample_every: Annotated[int, typer.Option("--sample-every", help="Record one token in so many.")] = 1,
    sample_sequences: Annotated[
        float, typer.Option("--sample-sequences", help="Share of sequences to record, each whole.")
    ] = 1.0,
    router: Annotated[
        list[str] | None,
        typer.Option(
            "--router",
            help="Module name pattern of the routers, for a model type without an adapter "
            "('layers.*.mlp.gate').",
            show_default=False,
        ),
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option("--num-experts", help="With --router: experts per layer.", show_default=False),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            help="With --router: experts per token; takes the largest where a router returns scores.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Torch device that runs the model.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add to a data set that is there.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this recording after it was interrupted or crashed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Record which experts a model selects for every token of text files.

    Ctrl-C ends the recording early and keeps what was recorded.
    """
    require_torch()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from traces.record import record_text

    console = Console(stderr=True)
    columns = (
        TextColumn("recording"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("recording", total=None)
        report = record_text(
            resolve_model(model),
            [*text, *(more_text or [])],
            out,
            context=context,
            batch_size=batch_size,
            generate=generate,
            seed=seed,
            sample_every=sample_every,
            sample_sequences=sample_sequences,
            family=_family(router, num_experts, top_k),
            device=device,
            overwrite=overwrite,
            append=append,
            resume=resume,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(json_text.dumps(_plain(report)) if json else _lines(report))


def _family(router: list[str] | None, num_experts: int | None, top_k: int | None) -> GenericFamily | None:
    """Return what finds routers by name, where that is asked for."""
    if not router:
        if num_experts is not None or top_k is not None:
            raise InputError("--num-experts and --top-k describe routers found by --router; give it too")
        return None
    from traces.record import GenericFamily

    return GenericFamily(router=tuple(router), num_experts=num_experts, top_k=top_k)


def _plain(report: RecordReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "tokens": report.num_tokens,
        "sequences": report.num_sequences,
        "num_layers": report.num_layers,
        "num_experts": report.num_experts,
        "top_k": report.top_k,
        "domain_names": list(report.domain_names),
        "interrupted": report.interrupted,
    }


def _lines(report: RecordReport) -> str:
    recorded = (
        f"{report.path}: {report.num_tokens} tokens of {report.num_sequences} sequences, "
        f"{report.num_layers} layers, top-{report.top_k} of {report.num_experts} experts"
    )
    if report.interrupted:
        return f"{recorded}\ninterrupted: the rest of the text was not run, what is written is valid"
    return recorded
