"""What a measuring process runs: one part, on one rank; started by `run`, by torchrun where ranks are needed.

``python -m benchmarks.gpu.worker PART --out FILE ...`` writes the part's result as JSON, by rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.folder import Prepared, read_prepared
from benchmarks.gpu.ranks import started_mesh
from placement.runtime.parallel.mesh import Mesh

__all__ = ["main"]

Result = dict[str, Any]

CALIBRATED = ("olmoe-1b-7b", "deepseek-v3", "gpt-oss-20b", "qwen3-30b-a3b", "mixtral-8x7b")


def _prepared(arguments: argparse.Namespace) -> list[Prepared]:
    return [read_prepared(arguments.folder, name) for name in arguments.instances]


def _about(prepared: list[Prepared]) -> dict[str, Any]:
    return {
        one.instance.name: {
            "instance": one.instance.to_dict(),
            "about": one.about,
            "policies": {name: fitted.about for name, fitted in one.policies.items()},
        }
        for one in prepared
    }


def _options(arguments: argparse.Namespace, *, budget_s: float) -> Any:
    from benchmarks.gpu.replay import Options

    return Options(
        transport=arguments.transport,
        exchanges=tuple(arguments.exchanges),
        training=arguments.training,
        repeats=arguments.repeats,
        tile=arguments.tile,
        with_lp=not arguments.without_lp,
        budget_s=budget_s,
    )


def _shares(prepared: list[Prepared], budget_s: float) -> Iterator[tuple[Prepared, float]]:
    """Yield instances and the seconds of each: an equal share of what those before have left."""
    ends_s = time.monotonic() + budget_s
    for number, one in enumerate(prepared):
        yield one, max(0.0, ends_s - time.monotonic()) / (len(prepared) - number)


def _smoke(arguments: argparse.Namespace, mesh: Mesh) -> Result:
    from benchmarks.gpu.smoke import FAMILIES, smoke

    return {"checks": smoke(mesh, families=FAMILIES[:2] if arguments.tiny else FAMILIES)}


def _replay(arguments: argparse.Namespace, mesh: Mesh) -> Result:
    from benchmarks.gpu.replay import replay, write_layers

    prepared = _prepared(arguments)
    result: Result = {"instances": _about(prepared), "cases": []}
    for one, budget_s in _shares(prepared, arguments.budget):
        cases, layers = replay(one, mesh, _options(arguments, budget_s=budget_s))
        result["cases"].extend(cases)
        if mesh.rank == 0:
            # Written as it comes: what runs out of time keeps what it has.
            if arguments.layers:
                write_layers(arguments.layers, layers)
            _write(arguments.out, result)
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def _whole(arguments: argparse.Namespace, mesh: Mesh) -> Result:
    from benchmarks.gpu.whole import whole

    prepared = _prepared(arguments)
    steps: list[Result] = []
    for one, budget_s in _shares(prepared, arguments.budget):
        steps.extend(whole(one, mesh, _options(arguments, budget_s=budget_s)))
    return {"instances": _about(prepared), "steps": steps}


def _migration(arguments: argparse.Namespace, mesh: Mesh) -> Result:
    from benchmarks.gpu.migration import migration

    prepared = _prepared(arguments)
    count = {"repeats": 2, "steps": 4} if arguments.tiny else {}
    return {
        "instances": _about(prepared),
        "migrations": [row for one in prepared for row in migration(one, mesh, **count)],
    }


def _emulate(arguments: argparse.Namespace) -> Result:
    from benchmarks.gpu.emulate import emulate

    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
    prepared = _prepared(arguments)
    cases: list[Result] = []
    for one, budget_s in _shares(prepared, arguments.budget):
        cases.extend(emulate(one, device, budget_s=budget_s))
        _write(arguments.out, {"instances": _about(prepared), "cases": cases})
    return {"instances": _about(prepared), "cases": cases}


def _calibrate(arguments: argparse.Namespace) -> Result:
    from placement.runtime.measure import calibrate

    models = ("olmoe-1b-7b",) if arguments.tiny else CALIBRATED
    contents = calibrate(
        models=models, devices_per_node=None, quick=True, progress=lambda line: print(line, flush=True)
    )
    if contents is not None:
        _write(arguments.calibration, contents)
    return {"calibration": contents}


_OVER_RANKS: dict[str, Callable[[argparse.Namespace, Mesh], Result]] = {
    "smoke": _smoke,
    "replay": _replay,
    "whole": _whole,
    "migration": _migration,
}
_ALONE: dict[str, Callable[[argparse.Namespace], Result]] = {"calibrate": _calibrate, "emulate": _emulate}


def _write(file: Path, result: Result) -> None:
    part = file.with_suffix(".partial")
    part.write_text(json.dumps(result), encoding="utf-8")
    os.replace(part, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker")
    parser.add_argument("part", choices=[*_OVER_RANKS, *_ALONE])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(".gpu"))
    parser.add_argument("--layers", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--instances", nargs="*", default=[])
    parser.add_argument("--transport", default="nvlink")
    parser.add_argument("--exchanges", nargs="+", default=["dedup", "pairs"])
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--tile", type=int, default=1)
    parser.add_argument("--without-lp", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one part."""
    arguments = _parser().parse_args(argv)
    if arguments.part in _ALONE:
        result = _ALONE[arguments.part](arguments)
        if os.environ.get("RANK", "0") == "0":
            _write(arguments.out, result)
        return
    with started_mesh() as mesh:
        result = _OVER_RANKS[arguments.part](arguments, mesh)
        if mesh.rank == 0:
            _write(arguments.out, result)


if __name__ == "__main__":
    main()
