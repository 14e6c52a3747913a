"""``moe-placement plan``: the commands of planning."""

from __future__ import annotations

from importlib import import_module

import typer

__all__ = ["plan_app"]

plan_app = typer.Typer(
    name="plan",
    help="Plan beyond one model on one cluster: meshes, data centres, mixed devices, optical fabrics.",
    no_args_is_help=True,
)

for _name in ("parallelism", "cross_dc", "hetero", "fabric"):
    _module = import_module(f"placement.cli.plan_{_name}")
    plan_app.command(_name.replace("_", "-"))(getattr(_module, f"plan_{_name}"))
