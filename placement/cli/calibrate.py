"""``moe-placement calibrate``: measure this machine, or hold predictions against measured layers."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from placement.cli.inputs import JsonOption, warn
from placement.errors import InputError

__all__ = ["calibrate"]

_OUT = Path("calibration.json")

_LAUNCH = "torchrun --nproc-per-node GPUS --no-python moe-placement calibrate"


def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Calibration file to write. Default: calibration.json.", show_default=False
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", help="CSV of measured layers to predict; measures nothing.", show_default=False
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="With --check: calibration to predict from.", show_default=False),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            help="Models whose experts to measure, separated by commas; repeatable. Default: a usual choice.",
            show_default=False,
        ),
    ] = None,
    devices_per_node: Annotated[
        int | None,
        typer.Option(
            "--devices-per-node", help="GPUs of a node. Default: as the launcher says.", show_default=False
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points and repeats.")] = False,
    json: JsonOption = False,
) -> None:
    """Measure this machine's experts, exchanges and memory, started on every GPU by torchrun.

    With --check, compare predicted with measured layer times instead.
    """
    if check is not None:
        measuring = {"--out": out, "--models": models, "--devices-per-node": devices_per_node}
        given = [name for name, value in measuring.items() if value is not None]
        if given or quick:
            raise InputError(f"{(given or ['--quick'])[0]} is for measuring; leave it out beside --check")
        _check(check, calibration, json=json)
        return
    if calibration is not None:
        raise InputError("--calibration is what --check predicts from; give --check MEASURED.csv too")
    _measure(out or _OUT, models, devices_per_node=devices_per_node, quick=quick, json=json)


def _check(measured: Path, calibration: Path | None, *, json: bool) -> None:
    from placement.io import dump_json
    from placement.tasks.calibration_check import check_calibration

    if calibration is None:
        raise InputError("--check needs --calibration FILE, the curves to predict from")
    report = check_calibration(measured, calibration)
    typer.echo(dump_json(report) if json else _lines(report))


def _lines(report: dict[str, Any]) -> str:
    lines = [
        f"{report['layers']} layers: median error {report['median_error']:.1%}, "
        f"p95 {report['p95_error']:.1%} ({report['compared']})"
    ]
    for group in report["groups"]:
        name = " ".join(filter(None, (group["transport"], group["shape"])))
        rows = "tokens sent once to a rank" if group["dedup"] else "one row for each pair"
        lines.append(f"  {f'{name}, {rows}':<48} {_figures(group)}")
    lines += [f"  {name:<48} {_figures(phase)}" for name, phase in report["phases"].items()]
    return "\n".join(lines)


def _figures(errors: dict[str, Any]) -> str:
    return (
        f"{errors['measured_ms']:8.3f} ms measured, {errors['predicted_ms']:8.3f} predicted; "
        f"median error {errors['median_error']:.1%}, p95 {errors['p95_error']:.1%}"
    )


def _measure(
    out: Path, models: list[str] | None, *, devices_per_node: int | None, quick: bool, json: bool
) -> None:
    from placement.io import dump_json, write_json

    _check_launch()
    if _rank() == 0 and not out.absolute().parent.is_dir():
        raise InputError(f"{out}: its folder does not exist; make it before measuring")
    from placement.runtime.measure import calibrate as measure

    names = [name.strip() for entry in models or [] for name in entry.split(",") if name.strip()]
    content: dict[str, Any] | None = measure(
        models=names,
        devices_per_node=devices_per_node,
        quick=quick,
        progress=_progress,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if content is None:
        return
    write_json(out, content)
    known: dict[str, Any] = {
        key: content[key] for key in ("gpu", "world_size", "transport", "measured_at") if key in content
    }
    if json:
        typer.echo(dump_json({"calibration": str(out), **known}))
    else:
        typer.echo(f"measured {known.get('world_size', '?')} x {known.get('gpu', 'GPU')}\nwritten to {out}")


def _check_launch() -> None:
    if find_spec("torch") is None:
        raise InputError("measuring needs torch; install with: pip install 'moe-placement[torch]'")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise InputError(f"measuring runs on every GPU at once: start it with {_LAUNCH}")
    if os.environ["WORLD_SIZE"] == "1":
        raise InputError("an all-to-all is measured on 2 GPUs or more, the launcher started 1: give it more")


def _rank() -> int:
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _progress(message: str) -> None:
    if _rank() == 0:
        warn(message)
