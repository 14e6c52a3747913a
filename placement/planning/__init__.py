"""Planning beyond one model on one cluster, on the same topology, profile and cost model as placement.

- `parallelism`: which mesh of pipeline, expert, data and tensor parallelism trains a model fastest;
- `cross_dc`: over slow links between data centres, whether experts or tokens travel;
- `hetero`: which devices of different age compute attention, and which experts;
- `fabric`: which optical circuits to switch for a placement's traffic, and both together.

The names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.planning.cross_dc import plan_cross_dc
    from placement.planning.fabric import plan_fabric
    from placement.planning.hetero import plan_hetero
    from placement.planning.parallelism import plan_parallelism

_HOME = {
    "plan_cross_dc": "cross_dc",
    "plan_fabric": "fabric",
    "plan_hetero": "hetero",
    "plan_parallelism": "parallelism",
}

__all__ = ["plan_cross_dc", "plan_fabric", "plan_hetero", "plan_parallelism"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"placement.planning.{_HOME[name]}"), name)
    raise AttributeError(f"module 'placement.planning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
