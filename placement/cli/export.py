"""``moe-placement export``: a placement as the file that an engine loads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placement.cli.export_checkpoint import (
    CheckpointOption,
    ExpertGroupsOption,
    OverwriteOption,
    StackOption,
    export_checkpoint,
)
from placement.cli.inputs import JsonOption, ModelOption, warn
from placement.cli.placements import DevicesOption, export_options, load_placement
from placement.errors import InputError

if TYPE_CHECKING:
    from placement.formats.protocol import FormatOptions, Usage
    from placement.plan import Placement

__all__ = ["export"]


def export(
    placement: Annotated[
        Path, typer.Argument(help="Placement file, ours or that of an engine.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="sglang, tensorrt-llm, vllm, vllm-ranks, vllm-ascend, megatron, deepspeed or native.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.", show_default=False)],
    model: ModelOption = None,
    devices: DevicesOption = None,
    mtp_layers: Annotated[
        int | None,
        typer.Option(
            "--mtp-layers",
            help="Multi-token-prediction layers that the engine runs. Default: the model's.",
            show_default=False,
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    expert_groups: ExpertGroupsOption = None,
    stack: StackOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Write PLACEMENT for an engine, checked by its rules, and say how the engine is told to load it."""
    from placement.formats.files import FORMATS, check_name, encode_as
    from placement.formats.fill import full
    from placement.io import dump_json, write_text
    from placement.model import resolve_model

    if mtp_layers is not None and mtp_layers < 0:
        raise InputError(f"--mtp-layers is {mtp_layers}; it must be 0 or more")
    if mtp_layers is not None and to != "tensorrt-llm":
        warn(f"--mtp-layers has no effect: {to} has no entry for them")
    if checkpoint is None:
        if overwrite or expert_groups is not None or stack is not None:
            raise InputError("--overwrite, --expert-groups and --stack go with --checkpoint; name it")
        check_name(out, to)
    shape = None if model is None else resolve_model(model)
    chosen = load_placement(placement, model=shape, num_devices=devices)
    if checkpoint is not None:
        export_checkpoint(
            chosen,
            checkpoint,
            out,
            to=to,
            model=shape,
            num_groups=expert_groups,
            stack=stack,
            overwrite=overwrite,
            json=json,
        )
        return
    try:
        options = export_options(chosen, shape, num_mtp_layers=mtp_layers)
        text = encode_as(chosen, to, options)
        loaded = chosen if to == "native" else full(chosen)
    except InputError as exc:
        raise InputError(f"{placement}: {exc}") from exc
    write_text(out, text)
    usage = FORMATS[to].usage(loaded, options, out)
    report = _report(loaded, to, out, options, usage, filled=_num_copies(loaded) - _num_copies(chosen))
    typer.echo(dump_json(report) if json else _lines(report, usage))


def _num_copies(placement: Placement) -> int:
    return int(placement.replicas_LE.sum())


def _report(
    placement: Placement, to: str, out: Path, options: FormatOptions, usage: Usage, *, filled: int
) -> dict[str, Any]:
    layers = options.layers
    return {
        "file": str(out),
        "format": to,
        "model": placement.model_name if layers is None else layers.model_name,
        "layers": placement.num_layers,
        "moe_layer_ids": None if layers is None else list(layers.moe_layer_ids),
        "experts": placement.num_experts,
        "devices": placement.num_devices,
        "slots": int(placement.replicas_LE[0].sum()),
        "filled_slots": filled,
        "arguments": list(usage.arguments),
        "settings": dict(usage.settings),
        "notes": list(usage.notes),
    }


def _lines(report: dict[str, Any], usage: Usage) -> str:
    lines = [
        f"{report['layers']} MoE layers of {report['experts']} experts in {report['slots']} slots on "
        f"{report['devices']} devices, written to {report['file']}"
    ]
    if usage.arguments:
        lines.append(f"  pass  {shlex.join(usage.arguments)}")
    lines += [f"  set   {key}: {value}" for key, value in usage.settings]
    if report["filled_slots"]:
        lines.append(f"  note  {report['filled_slots']} slots that the solve left empty hold a replica each")
    lines += [f"  note  {note}" for note in usage.notes]
    return "\n".join(lines)
