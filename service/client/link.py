"""What a thread needs that talks to the service for as long as a job runs: connections, and pauses."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

from placement.errors import ServiceError
from service.client.client import Client
from service.client.retries import Backoff

__all__ = ["Address", "Link", "Pauses"]

ATTEMPTS = Backoff(first_s=0.2, most_s=1.0, attempts=3)
"""Hiccups are passed over; whatever lasts longer is for the thread, which can be told to stop meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the service is, and how long it may take; as for `Client`."""

    url: str | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | os.PathLike[str] | None = None
    allow_http: bool = False
    timeout_s: float = 30.0


class Link:
    """Connections of one thread.

    Parameters
    ----------
    address
        Read again whenever connections are made: a token file may have another content by then.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client: Client | None = None

    def client(self) -> Client:
        """Return the client.

        Raises
        ------
        InputError
            If URL or token do not do.
        ServiceError
            If a package of the client is missing.
        """
        if self._client is None:
            at = self._address
            try:
                self._client = Client(
                    at.url,
                    token=at.token,
                    token_file=at.token_file,
                    allow_http=at.allow_http,
                    deadline_s=at.timeout_s,
                    timeout_s=at.timeout_s,
                    backoff=ATTEMPTS,
                )
            except ImportError as exc:
                raise ServiceError(f"{exc.name} is missing: pip install 'moe-placement[client]'") from exc
        return self._client

    def drop(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


class Pauses:
    """Pauses between attempts that fail; they grow, and end at once when there is no more to wait for."""

    def __init__(self, *, first_s: float = 1.0, most_s: float = 30.0) -> None:
        self._backoff = Backoff(first_s=first_s, most_s=most_s)
        self._failures = 0
        self._over = threading.Event()

    @property
    def over(self) -> bool:
        """Whether `end` was called."""
        return self._over.is_set()

    def end(self) -> None:
        """Let nobody wait any longer."""
        self._over.set()

    def succeeded(self) -> None:
        """Let the next pause be the first again."""
        self._failures = 0

    def rest(self, seconds: float) -> None:
        """Wait so long, if that is any time at all."""
        if seconds > 0:
            self._over.wait(seconds)

    def wait(self) -> None:
        """Wait after a failure."""
        self._failures += 1
        ceiling_s = self._backoff.ceiling_s(self._failures)
        # Never none at all: others fail at the same time.
        self._over.wait(ceiling_s / 2 + self._backoff.pause_s(self._failures) / 2)
