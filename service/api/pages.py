"""Our own pages and the files they load: all from this machine, under a policy that allows nothing else."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from fastapi import Request
from starlette.responses import HTMLResponse, Response

import placement
from service.api.answers import Answer, answer_of, answer_response
from service.errors import NotFoundError

__all__ = ["asset", "page"]

STATIC = Path(__file__).parent / "static"
REPORT = Path(placement.__file__).parent / "report"

_TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png", ".svg": "image/svg+xml"}
_OFFLINE_DOCS = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
_OWN = (
    *("dashboard.js", "dashboard.css", "plotly.css", "docs.js", "redoc.js", "icon.svg"),
    # What dashboard.js imports.
    *("api.js", "dialogs.js", "dom.js", "events.js", "figures.js", "grid.js", "placing.js", "words.js"),
    *("view_overview.js", "view_submit.js", "view_solve.js", "view_deployment.js"),
    *("view_traces.js", "view_trace.js", "view_placements.js", "view_placement.js"),
)
_DRAWING = {"plotly.js": "vendor/plotly-cartesian.min.js", "charts.js": "charts.js"}
"""What draws figures, here as in reports."""


def page(name: str, *, policy: str) -> Response:
    """Answer with one of our pages.

    Parameters
    ----------
    policy
        What the page may do beyond loading scripts and styles of this server and speaking with it.
    """
    content = (STATIC / name).read_text(encoding="utf-8")
    base = (
        "default-src 'none'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {"content-security-policy": f"{base}; {policy}", "cache-control": "no-cache"}
    return HTMLResponse(content, headers=headers)


def asset(name: str, request: Request) -> Response:
    """Answer with a file that a page loads, or that the caller has it; only known names are files.

    Raises
    ------
    NotFoundError
        If no page loads it.
    """
    path = _file_of(name)
    about = path.stat()
    return answer_response(request, _read(path, about.st_mtime_ns, about.st_size), _TYPES[path.suffix])


def _file_of(name: str) -> Path:
    if name in _OWN:
        return STATIC / name
    if name in _DRAWING:
        return REPORT / _DRAWING[name]
    if name in _OFFLINE_DOCS:
        return _offline_docs() / name
    raise NotFoundError(f"no page loads {name[:80]!r}")


@lru_cache(maxsize=64)
def _read(path: Path, changed_at_ns: int, size_bytes: int) -> Answer:
    """Read and pack a file once, until it changes."""
    return answer_of(path.read_bytes())


def _offline_docs() -> Path:
    """Return the folder of Swagger UI and ReDoc, as fastapi-offline brings them along."""
    found = find_spec("fastapi_offline")
    if found is None or found.origin is None:
        raise NotFoundError("the pages of the documentation are not installed: pip install fastapi-offline")
    return Path(found.origin).parent / "static"
