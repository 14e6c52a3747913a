"""``moe-placement export --checkpoint``: the model itself with its experts in the order of a placement."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.inputs import warn
from placement.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from placement.checkpoint.permute import CheckpointReport
    from placement.checkpoint.writer import Progress
    from placement.model import ModelShape
    from placement.plan import Placement

__all__ = [
    "TARGETS",
    "CheckpointOption",
    "ExpertGroupsOption",
    "OverwriteOption",
    "StackOption",
    "export_checkpoint",
]

TARGETS = ("megatron", "deepspeed", "vllm")
"""Engines that give each device a contiguous shard of the experts."""

CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Rearrange this checkpoint (safetensors) into the folder -o; megatron, deepspeed and vllm only.",
        show_default=False,
    ),
]
ExpertGroupsOption = Annotated[
    int | None,
    typer.Option(
        "--expert-groups",
        help="With --checkpoint: groups that the router chooses among, if no config.json tells (1: none).",
        show_default=False,
    ),
]
StackOption = Annotated[
    str | None,
    typer.Option(
        "--stack",
        help="With --checkpoint: the layers meant (thinker.model.layers), if several stacks have experts.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="With --checkpoint: replace a folder that this command wrote.")
]


def export_checkpoint(
    placement: Placement,
    checkpoint: Path,
    out: Path,
    *,
    to: str,
    model: ModelShape | None = None,
    num_groups: int | None = None,
    stack: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write the checkpoint, and say what was done.

    Raises
    ------
    InputError
        If the engine takes no such checkpoint, the placement is none of contiguous shards, or as for
        `permute_checkpoint`.
    """
    from placement.checkpoint import permute_checkpoint
    from placement.formats.permutation import Permutation
    from placement.io import dump_json

    if to not in TARGETS:
        raise InputError(
            f"--checkpoint goes with --to {', '.join(TARGETS)}; {to} loads a placement file and the "
            "checkpoint as it is"
        )
    permutation = Permutation.from_placement(
        placement, moe_layer_ids=None if model is None else model.moe_layer_ids
    )
    with _showing_bytes() as progress:
        report = permute_checkpoint(
            checkpoint,
            out,
            permutation,
            num_groups=num_groups,
            stack=stack,
            progress=progress,
            overwrite=overwrite,
        )
    if report.was_permuted:
        warn(
            f"{checkpoint} had been permuted before; the placement was taken for its present expert numbers, "
            "not the original ones"
        )
    load = _how_to_load(to, permutation.num_devices)
    typer.echo(dump_json(_to_dict(report, to, load)) if json else "\n".join(_lines(report, load)))


def _how_to_load(to: str, num_devices: int) -> str:
    """Say what gives each device its contiguous shard; vLLM can also deal experts out in turn."""
    return {
        "megatron": f"--expert-model-parallel-size {num_devices}",
        "deepspeed": f"deepspeed.moe.layer.MoE(ep_size={num_devices})",
        "vllm": f"--enable-expert-parallel --expert-placement-strategy linear on {num_devices} devices",
    }[to]


def _to_dict(report: CheckpointReport, to: str, load: str) -> dict[str, Any]:
    return {
        "folder": str(report.folder),
        "format": to,
        "files": report.num_files,
        "bytes": report.num_bytes,
        "tensors": report.num_tensors,
        "renamed": report.num_renamed,
        "reordered": report.num_reordered,
        "moe_layer_ids": list(report.moe_layer_ids),
        "layouts": list(report.layouts),
        "untouched": list(report.untouched),
        "left_out": list(report.left_out),
        "was_permuted": report.was_permuted,
        "load_with": load,
    }


def _lines(report: CheckpointReport, load: str) -> list[str]:
    kept = report.num_tensors - report.num_renamed - report.num_reordered
    lines = [
        f"checkpoint of {report.num_bytes / 2**30:.2f} GiB in {report.num_files} files written to "
        f"{report.folder}",
        f"  {len(report.moe_layer_ids)} MoE layers; {report.num_renamed} tensors renamed, "
        f"{report.num_reordered} reordered, {kept} as they were",
    ]
    if report.untouched:
        lines.append(f"  experts left in their order: {', '.join(report.untouched)}")
    if report.left_out:
        lines.append(f"  not copied: {', '.join(report.left_out)}")
    lines.append(f"  load with {load}")
    return lines


@contextmanager
def _showing_bytes() -> Iterator[Progress | None]:
    """Show a bar on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("checkpoint", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
