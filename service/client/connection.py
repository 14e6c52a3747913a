"""How a client reaches the service, checked once: URL, token, patience."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from placement import __version__
from placement.errors import InputError
from service.client.call import Budget, Call
from service.client.errors import UnreachableError
from service.client.retries import Backoff
from service.client.token import checked_url, find_token, is_loopback

if TYPE_CHECKING:
    import httpx

__all__ = ["Connection", "translated"]

CONNECT_S = 10.0
SMALLEST_S = 0.001
IDLE_S = 60.0
"""The service sends a sign of life on every open stream far more often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How a client reaches the service.

    Parameters
    ----------
    deadline_s
        Seconds that one call may take, all of its attempts together; uploads have none.
    timeout_s
        Seconds without any byte after which one attempt is given up.
    """

    url: str
    token: str | None = field(repr=False)
    deadline_s: float
    timeout_s: float
    backoff: Backoff

    @classmethod
    def of(
        cls,
        url: str | None,
        *,
        token: str | None,
        token_file: str | os.PathLike[str] | None,
        allow_http: bool,
        deadline_s: float,
        timeout_s: float,
        backoff: Backoff | None,
    ) -> Connection:
        """Check what a caller gave.

        Raises
        ------
        InputError
            If it does not do, or would show the token to the network.
        """
        for name, seconds in (("deadline_s", deadline_s), ("timeout_s", timeout_s)):
            if not seconds > 0:
                raise InputError(f"{name} is {seconds}; it must be above 0")
        found = find_token(token, file=token_file)
        return cls(
            url=checked_url(url, has_token=found is not None, allow_http=allow_http),
            token=found,
            deadline_s=deadline_s,
            timeout_s=timeout_s,
            backoff=backoff or Backoff(),
        )

    def options(self) -> dict[str, Any]:
        """Return what httpx is told; proxies are never asked for this machine, which they would not find.

        Raises
        ------
        ImportError
            If a package of the client is missing: now rather than in the middle of something.
        """
        for package in ("httpx", "httpx_sse", "tenacity"):
            import_module(package)
        headers = {"User-Agent": f"moe-placement/{__version__}", "Accept": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        return {
            "base_url": self.url,
            "headers": headers,
            "follow_redirects": False,
            "trust_env": not is_loopback(urlsplit(self.url).hostname or ""),
        }

    def budget(self, call: Call[Any]) -> Budget:
        """Return how long a call may take."""
        return Budget(self.deadline_s + call.patience_s if call.bounded else None)

    def timeout(self, call: Call[Any], budget: Budget) -> httpx.Timeout:
        """Return how long each step of one attempt may take."""
        import httpx

        read_s = max(SMALLEST_S, budget.left_s(self.timeout_s + call.patience_s))
        step_s = max(SMALLEST_S, budget.left_s(self.timeout_s))
        return httpx.Timeout(step_s, connect=min(CONNECT_S, step_s), read=read_s)

    def stream_timeout(self, read_s: float) -> httpx.Timeout:
        """Return how long each step of listening may take."""
        import httpx

        return httpx.Timeout(min(IDLE_S, self.timeout_s), connect=CONNECT_S, read=max(SMALLEST_S, read_s))


@contextmanager
def translated(where: str, url: str) -> Iterator[None]:
    """Turn what httpx raises into errors of ours.

    Raises
    ------
    UnreachableError
        For anything that befell the connection.
    """
    import httpx

    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise UnreachableError(f"{url} cannot be reached: {_reason(exc)}", sent=False) from exc
    except httpx.TimeoutException as exc:
        silent = isinstance(exc, httpx.ReadTimeout)
        raise UnreachableError(f"{url} did not answer {where} in time", sent=True, silent=silent) from exc
    except (httpx.HTTPError, httpx.StreamError) as exc:
        raise UnreachableError(f"{url} broke off during {where}: {_reason(exc)}", sent=True) from exc


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
