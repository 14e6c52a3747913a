"""Synthetic traces: of a router made up from a few knobs, or of one fitted to a real trace's statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traces.synthesize.fit import fit_routing
    from traces.synthesize.fitted import FittedRouting, FittedSource
    from traces.synthesize.parametric import synthesize
    from traces.synthesize.source import SyntheticSource

_HOME = {
    "FittedRouting": "fitted",
    "FittedSource": "fitted",
    "SyntheticSource": "source",
    "fit_routing": "fit",
    "synthesize": "parametric",
}

__all__ = ["FittedRouting", "FittedSource", "SyntheticSource", "fit_routing", "synthesize"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"traces.synthesize.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
