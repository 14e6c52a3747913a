"""``/docs`` and ``/redoc``: the API's description to read and to try, without a network."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.pages import asset, page

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

# Both set styles from their scripts, and draw icons from data URLs.
_SWAGGER = "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:"
_REDOC = f"{_SWAGGER}; worker-src blob:; child-src blob:"


@router.get("/docs")
async def docs() -> Response:
    """Return Swagger UI."""
    return page("docs.html", policy=_SWAGGER)


@router.get("/redoc")
async def redoc() -> Response:
    """Return ReDoc."""
    return page("redoc.html", policy=_REDOC)


@router.get("/assets/{name}")
def assets(name: str, request: Request) -> Response:
    """Return a file that one of the pages loads; in a thread, since large ones are packed when first read."""
    return asset(name, request)
