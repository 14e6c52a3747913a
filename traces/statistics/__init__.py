"""What traces say about traffic: counted in one pass, merged, kept in files, summed up."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.statistics.collector import collect
    from traces.statistics.file import load, save
    from traces.statistics.merger import fitted, merge
    from traces.statistics.plan import DEFAULT_MEMORY_BYTES, PARTS, MemoryPlan, plan_memory
    from traces.statistics.profiles import build_profile, load_only_profile
    from traces.statistics.routing import RoutingStatistics
    from traces.statistics.sample import TokenSample
    from traces.statistics.segment import Segment
    from traces.statistics.summary import LayerSummary, TraceSummary, describe

_HOME = {
    "DEFAULT_MEMORY_BYTES": "plan",
    "LayerSummary": "summary",
    "MemoryPlan": "plan",
    "PARTS": "plan",
    "RoutingStatistics": "routing",
    "Segment": "segment",
    "TokenSample": "sample",
    "TraceSummary": "summary",
    "build_profile": "profiles",
    "collect": "collector",
    "describe": "summary",
    "fitted": "merger",
    "load": "file",
    "load_only_profile": "profiles",
    "merge": "merger",
    "plan_memory": "plan",
    "save": "file",
}

__all__ = [
    "DEFAULT_MEMORY_BYTES",
    "PARTS",
    "LayerSummary",
    "MemoryPlan",
    "RoutingStatistics",
    "Segment",
    "TokenSample",
    "TraceSummary",
    "build_profile",
    "collect",
    "describe",
    "fitted",
    "load",
    "load_only_profile",
    "merge",
    "plan_memory",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"traces.statistics.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
