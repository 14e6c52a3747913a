"""``moe-placement diff``: what changes between two placements, and what moving costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placement.cli.inputs import JsonOption, ModelOption
from placement.cli.placements import DevicesOption, load_placement

__all__ = ["diff"]


def diff(
    before: Annotated[Path, typer.Argument(help="Placement now.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Placement to be.", show_default=False)],
    topology: Annotated[
        str | None,
        typer.Option("-t", "--topology", help="Cluster, to tell tiers and seconds.", show_default=False),
    ] = None,
    model: ModelOption = None,
    devices: DevicesOption = None,
    json: JsonOption = False,
) -> None:
    """List the expert copies to move from BEFORE to AFTER: how many, bytes, seconds.

    Either may be an engine's own file.
    """
    from placement.io import dump_json
    from placement.model import resolve_model
    from placement.moves import summarise_moves
    from placement.topology import parse_topology

    shape = None if model is None else resolve_model(model)
    old, new = (
        load_placement(path, model=shape, topology=topology, num_devices=devices) for path in (before, after)
    )
    summary = summarise_moves(
        old,
        new,
        topology=None if topology is None else parse_topology(topology),
        model=shape,
    )
    if json:
        typer.echo(dump_json(summary.to_dict()))
        return
    copies = int(new.replicas_LE.sum())
    lines = [f"{summary.num_moves} of {copies} expert copies move"]
    if summary.total_bytes is not None:
        lines.append(f"{summary.total_bytes / 2**30:.2f} GiB in all")
    for tier, count in summary.moves_by_tier.items():
        lines.append(f"  over {tier}: {count} moves")
    if summary.seconds is not None:
        lines.append(f"{summary.seconds:.3f} s at the links' bandwidth")
    typer.echo("\n".join(lines))
