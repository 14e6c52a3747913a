"""``/``: a page that shows what the service does, from its own API."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from service.api.pages import page

__all__ = ["router"]

router = APIRouter(include_in_schema=False)


@router.get("/")
async def dashboard() -> Response:
    """Return the page; what it shows it asks for itself, with the token that its reader gives it."""
    # Heat maps are pictures that plotly makes in the page.
    return page("dashboard.html", policy="style-src 'self'; img-src 'self' data:")
