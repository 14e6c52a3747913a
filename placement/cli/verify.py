"""`moe-placement verify`: apply a placement to a real model and compare its outputs."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from placement.cli.placements import DevicesOption
from placement.runtime.requirement import require_torch
from placement.runtime.samples import resolve_model

if TYPE_CHECKING:
    from placement.runtime.verify import VerifyReport

__all__ = ["verify"]


def verify(
    placement: Annotated[
        Path, typer.Argument(help="Placement file to apply, ours or that of an engine.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Checkpoint folder, or byte16 for the bundled sample.", show_default=False
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", help="Text file to run; repeatable. Default: bundled samples.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", help="Tokens per sequence. Default: the model's context.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to compare, at most.")] = 8192,
    devices: DevicesOption = None,
    device: Annotated[str, typer.Option("--device", help="Torch device that runs the model.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Apply PLACEMENT to a model and check that its outputs stay the same.

    Runs text before, with and after the placement in float32. Fails (exit code 1) if any logit differs by
    more than 0.0001 of the largest logit, or if the model is not restored bit for bit.
    """
    require_torch()
    from placement.cli.placements import load_placement
    from placement.runtime.verify import verify_placement

    checkpoint = resolve_model(model)
    report = verify_placement(
        checkpoint,
        load_placement(placement, model=str(checkpoint), num_devices=devices),
        text_files=text or None,
        max_tokens=max_tokens,
        context=context,
        device=device,
    )
    typer.echo(json_text.dumps(report.to_json()) if json else _lines(report))
    report.check()


def _lines(report: VerifyReport) -> str:
    verdict = "outputs unchanged" if report.ok else "OUTPUTS CHANGED"
    return "\n".join(
        (
            f"{verdict} on {report.tokens} tokens ({report.dtype})",
            f"  largest difference of a logit  {report.max_abs_diff:.3g} (allowed {report.tolerance:.3g}, "
            f"logits up to {report.logit_scale:.3g})",
            f"  mean difference of a logit     {report.mean_abs_diff:.3g}",
            f"  same most likely next token    {report.top1_agreement:.4%}",
            f"  same experts selected          {report.routing_agreement:.4%}",
            f"  restored bit for bit           {'yes' if report.restored else 'NO'}",
        )
    )
