"""axe-core's rules on a page: those of WCAG 2.2 A and AA, and what it calls best practice.

``from tests.browser.accessibility import violations``. In the dark scheme only colours differ, so only rules
on colours are asked there.
"""

from __future__ import annotations

from typing import Any

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Page

__all__ = ["violations"]

RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
COLOURS = ("color-contrast", "link-in-text-block")
"""Rules of those that look at colours."""
MOST_NODES = 4
"""Elements that are named per rule."""


def violations(page: Page, *, colours_alone: bool = False) -> list[str]:
    """Return what axe-core finds wrong on a page as it stands: a line for each rule, with some elements."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    options = {
        "runOnly": {"type": "rule", "values": COLOURS} if colours_alone else {"type": "tag", "values": RULES},
        "resultTypes": ["violations"],
    }
    found: dict[str, Any] = page.evaluate("(options) => axe.run(document, options)", options)
    return [_line(rule) for rule in found["violations"]]


def _line(rule: dict[str, Any]) -> str:
    nodes = " | ".join(map(_named, rule["nodes"][:MOST_NODES]))
    return f"{rule['id']}, {len(rule['nodes'])} elements: {nodes}"


def _named(node: dict[str, Any]) -> str:
    checks = [check["message"] for kind in ("any", "all", "none") for check in node[kind]]
    return f"{' '.join(map(str, node['target']))} ({'; '.join(checks)})"
