"""Our own pages and the files they load: all from this machine, under a policy that allows nothing else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from starlette.responses import FileResponse, HTMLResponse, Response

from service.errors import NotFoundError

__all__ = ["asset", "page"]

STATIC = Path(__file__).parent / "static"

_TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png", ".svg": "image/svg+xml"}
_OFFLINE_DOCS = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
_OWN = ("dashboard.js", "dashboard.css", "docs.js", "redoc.js", "icon.svg")


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


def asset(name: str) -> Response:
    """Answer with a file that a page loads; only known names are files.

    Raises
    ------
    NotFoundError
        If no page loads it.
    """
    if name in _OWN:
        folder = STATIC
    elif name in _OFFLINE_DOCS:
        folder = _offline_docs()
    else:
        raise NotFoundError(f"no page loads {name[:80]!r}")
    headers = {"cache-control": "no-cache"}
    return FileResponse(folder / name, media_type=_TYPES[Path(name).suffix], headers=headers)


def _offline_docs() -> Path:
    """Return the folder of Swagger UI and ReDoc, as fastapi-offline brings them along."""
    found = find_spec("fastapi_offline")
    if found is None or found.origin is None:
        raise NotFoundError("the pages of the documentation are not installed: pip install fastapi-offline")
    return Path(found.origin).parent / "static"
