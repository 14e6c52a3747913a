"""Both clients behind one face: what one is asked is asked of the other."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing
from typing import Any

from service.client import AsyncClient, Client
from service.client.retries import Backoff

__all__ = ["KINDS", "QUICK", "collect", "perform"]

KINDS = ("sync", "async")

QUICK = Backoff(first_s=0.001, most_s=0.01)


def perform(kind: str, url: str, method: str, *arguments: Any, options: Any = None, **named: Any) -> Any:
    """Call a method of a fresh client and return what it returns."""
    settings = {"deadline_s": 5.0, "timeout_s": 2.0, "backoff": QUICK, **(options or {})}
    if kind == "sync":
        with Client(url, **settings) as client:
            return getattr(client, method)(*arguments, **named)

    async def work() -> Any:
        async with AsyncClient(url, **settings) as client:
            found = getattr(client, method)(*arguments, **named)
            return await found if inspect.isawaitable(found) else found

    return asyncio.run(work())


def collect(kind: str, url: str, method: str, *arguments: Any, most: int = 10_000, **named: Any) -> list[Any]:
    """Return what an iterator of a fresh client yields, at most so much."""
    settings: dict[str, Any] = {"deadline_s": 5.0, "timeout_s": 2.0, "backoff": QUICK}
    found: list[Any] = []
    if kind == "sync":
        with Client(url, **settings) as client:
            for item in getattr(client, method)(*arguments, **named):
                found.append(item)
                if len(found) == most:
                    break
        return found

    async def work() -> None:
        async with (
            AsyncClient(url, **settings) as client,
            aclosing(getattr(client, method)(*arguments, **named)) as items,
        ):
            async for item in items:
                found.append(item)
                if len(found) == most:
                    break

    asyncio.run(work())
    return found
