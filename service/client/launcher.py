"""One call that gives a job its placement, whatever state the service is in.

From the service; else the last good one on disk; else experts in order: each said on stderr where it is not
the first. With `strict` nothing but the service's own answer will do.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from placement.errors import InputError, PlacementError, ServiceError
from service.client.cache import Kept, PlacementCache
from service.client.fallback import Fallback
from service.client.ranks import rank_of, run_id, world_size_of
from service.client.results import DeploymentPlacement
from service.client.shelf import Fetched, Shelf, Source
from service.errors import NotFoundError

__all__ = ["TIMEOUT_S", "Fallback", "Fetched", "Source", "fetch_on_rank_zero", "fetch_placement"]

T = TypeVar("T")

TIMEOUT_S = 30.0
JOIN_S = 2.0
"""The client keeps its deadline by itself; this is for what it cannot interrupt."""
POLL_S = 0.1
GRACE_S = 30.0


def fetch_placement(
    deployment: str,
    *,
    url: str | None = None,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    allow_http: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    fallback: Fallback | None = None,
    strict: bool = False,
    wait_s: float = 0.0,
    timeout_s: float = TIMEOUT_S,
) -> Fetched:
    """Return the placement that a deployment should run.

    Parameters
    ----------
    url, token, token_file, allow_http
        As for `Client`.
    cache_dir
        Folder in which the last good placement is kept, and found when the service is down.
    fallback
        What the job is. A placement that does not fit it is not used, and without any other one experts lie
        in order.
    strict
        Raise instead of falling back.
    wait_s
        How long to wait for the first placement of a deployment that has none.
    timeout_s
        Seconds after which the service counts as down, beyond `wait_s`.

    Raises
    ------
    ServiceError
        If there is no placement: with `strict`, none from the service; else none from anywhere.
    """
    shelf = Shelf(deployment, cache_dir=cache_dir, fallback=fallback)
    kept = shelf.kept()
    connection = {"url": url, "token": token, "token_file": token_file, "allow_http": allow_http}
    try:
        answer = _in_time(
            lambda: _ask(
                deployment,
                connection,
                None if kept is None else kept.etag,
                wait_s=wait_s,
                timeout_s=timeout_s,
            ),
            timeout_s + wait_s,
        )
        return shelf.current(kept) if answer is None and kept is not None else shelf.taken(answer)
    except PlacementError as exc:
        why = f"no placement of {deployment} from the service: {exc}"
        if strict:
            raise ServiceError(why) from exc
    shelf.say(why)
    return shelf.last_resort(kept)


def _ask(
    deployment: str, connection: Mapping[str, Any], etag: str | None, *, wait_s: float, timeout_s: float
) -> DeploymentPlacement | None:
    """Return the service's answer, None where it is the one that is known."""
    try:
        from service.client.client import Client

        client = Client(**connection, deadline_s=timeout_s, timeout_s=timeout_s)
    except ImportError as exc:
        raise ServiceError(f"{exc.name} is missing: pip install 'moe-placement[client]'") from exc
    with client:
        try:
            return client.deployment_placement(deployment, etag=etag)
        except NotFoundError:
            found = next(client.watch_placement(deployment, timeout_s=wait_s), None) if wait_s > 0 else None
            if found is None:
                raise
            return found


def _in_time(ask: Callable[[], T], seconds: float) -> T:
    """Return what a function returns, if it does in time: resolving a name may hang for minutes.

    Raises
    ------
    ServiceError
        If it does not.
    """
    answers: list[T | PlacementError] = []

    def work() -> None:
        try:
            answers.append(ask())
        except PlacementError as exc:
            answers.append(exc)

    # One that hangs must not keep the job from ending.
    thread = threading.Thread(target=work, name="fetch-placement", daemon=True)
    thread.start()
    thread.join(seconds + JOIN_S)
    if not answers:
        raise ServiceError(f"no answer within {seconds:g} s")
    if isinstance(answers[0], PlacementError):
        raise answers[0]
    return answers[0]


def fetch_on_rank_zero(
    deployment: str,
    *,
    broadcast: Callable[[bytes | None], bytes] | None = None,
    shared_dir: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] = os.environ,
    timeout_s: float = TIMEOUT_S,
    wait_s: float = 0.0,
    grace_s: float = GRACE_S,
    **options: Any,
) -> Fetched:
    """Call `fetch_placement` on rank 0 alone, and return what it got on every rank.

    All ranks run the same placement or none: where rank 0 fails, all raise its error.

    Parameters
    ----------
    broadcast
        Called on every rank, with the bytes to send on rank 0 and None elsewhere; returns them everywhere.
    shared_dir
        Without `broadcast`: a folder that all ranks see, through which the placement goes. The launcher must
        give the run an id, a new one for each run.
    environment
        Where the launcher's variables are.
    grace_s
        How much longer than rank 0 may take the others wait for its file.
    options
        As for `fetch_placement`.

    Raises
    ------
    InputError
        If there are several ranks and no way from one to the other.
    ServiceError
        If rank 0 found no placement, or does not say so in time.
    """
    rank, size = rank_of(environment), world_size_of(environment)

    def fetched() -> Fetched:
        return fetch_placement(deployment, timeout_s=timeout_s, wait_s=wait_s, **options)

    if size == 1:
        return fetched()
    if broadcast is not None:
        payload = _payload(fetched) if rank == 0 else None
        return Fetched.decode(broadcast(payload))
    mail = _Mailbox(deployment, shared_dir, environment)
    if rank == 0:
        mail.put(_payload(fetched))
    return Fetched.decode(mail.get(timeout_s + wait_s + grace_s))


def _payload(fetch: Callable[[], Fetched]) -> bytes:
    """Return what rank 0 sends: the placement, or why there is none."""
    try:
        return fetch().encode()
    except PlacementError as exc:
        return json.dumps({"error": str(exc), "exit_code": exc.exit_code}).encode()


class _Mailbox:
    """A file of this start of this run, through which rank 0 tells the others."""

    def __init__(
        self,
        deployment: str,
        shared_dir: str | os.PathLike[str] | None,
        environment: Mapping[str, str],
    ) -> None:
        if shared_dir is None:
            raise InputError("several ranks need broadcast= or shared_dir= to share one placement")
        run = run_id(environment, attempt=True)
        if run is None:
            raise InputError(
                "the ranks cannot share a file without a run id: give torchrun --rdzv-id, or pass broadcast="
            )
        self._name = f"{deployment}.{run}"
        self._cache = PlacementCache(shared_dir)

    def put(self, content: bytes) -> None:
        """Leave a message."""
        self._cache.write(self._name, Kept(label=self._name, content=content))

    def get(self, within_s: float) -> bytes:
        """Return the message once it is there.

        Raises
        ------
        ServiceError
            If it does not come in time.
        """
        end_s = time.monotonic() + within_s
        while (kept := self._cache.read(self._name)) is None:
            if time.monotonic() > end_s:
                raise ServiceError(f"rank 0 left no placement in {self._cache.path(self._name)}")
            time.sleep(POLL_S)
        return kept.content
