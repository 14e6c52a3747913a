"""The comparison as one HTML page that opens anywhere, offline: the answer first, then its evidence.

The names below are imported on first use: plotly is loaded for a report and for nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("placement.report.page"), name)
    raise AttributeError(f"module 'placement.report' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
