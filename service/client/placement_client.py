"""What a job talks to for as long as it runs: its placement at the start, every later one, and its windows.

Only `fetch` waits for the network. `poll` and `post` return at once, whatever state the service is in:
threads of their own do the work, and say what they meet in one line each on stderr.

Shape letters: L MoE layers, E logical experts.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from placement.errors import InputError
from service.client.environment import options_of
from service.client.fallback import Fallback
from service.client.launcher import TIMEOUT_S, Fetched, fetch_on_rank_zero
from service.client.link import Address
from service.client.poster import QUEUE_WINDOWS, Poster, Posting
from service.client.ranks import local_rank_of, rank_of
from service.client.results import DeploymentPlacement
from service.client.shelf import Shelf
from service.client.voice import Voice
from service.client.watcher import WAIT_S, Watcher

__all__ = ["PlacementClient"]

CLOSE_S = 2.0
"""Seconds in which windows that wait may still be posted at the end."""

_clients: weakref.WeakSet[PlacementClient] = weakref.WeakSet()


class PlacementClient:
    """The placements of a deployment for one rank of a job; a context manager.

    It may be used from several threads. Processes that are forked begin with threads and a queue of their
    own, and nothing of what their parent has in hand is done twice.

    Parameters
    ----------
    deployment
        Name of the deployment that this job is.
    url, token, token_file, allow_http
        As for `Client`.
    cache_dir
        Folder in which the last good placement is kept, and found when the service is down.
    shared_dir
        Folder that all ranks see, through which they share a placement where `fetch` is given no broadcast.
    fallback
        What the job is: no placement that does not fit it is used, and one can always be made.
    strict
        Raise in `fetch` rather than fall back.
    wait_s
        How long `fetch` waits for the first placement of a deployment that has none.
    timeout_s
        Seconds after which the service counts as down.
    queue_windows
        Windows that may wait to be posted; beyond that the oldest are dropped.
    poll_s
        Seconds for which the service may hold back its answer that nothing is new.
    environment
        Where the launcher's variables are: rank, number of ranks, id of the run. Processes that no launcher
        numbers (Ray actors) add their own ``RANK`` and ``WORLD_SIZE``.
    """

    def __init__(
        self,
        deployment: str,
        *,
        url: str | None = None,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        allow_http: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        shared_dir: str | os.PathLike[str] | None = None,
        fallback: Fallback | None = None,
        strict: bool = False,
        wait_s: float = 0.0,
        timeout_s: float = TIMEOUT_S,
        queue_windows: int = QUEUE_WINDOWS,
        poll_s: float = WAIT_S,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        for name, number in (("timeout_s", timeout_s), ("poll_s", poll_s)):
            if not number > 0:
                raise InputError(f"{name} is {number}; it must be above 0")
        if queue_windows < 1:
            raise InputError(f"queue_windows is {queue_windows}; it must be at least 1")
        self._job = _Job(
            deployment=deployment,
            address=Address(
                url=url, token=token, token_file=token_file, allow_http=allow_http, timeout_s=timeout_s
            ),
            rank=rank_of(environment),
            speaks=local_rank_of(environment) == 0,
            cache_dir=cache_dir,
            fallback=fallback,
            queue_windows=queue_windows,
            poll_s=poll_s,
        )
        self._fetch: dict[str, Any] = {
            "shared_dir": shared_dir,
            "strict": strict,
            "wait_s": wait_s,
            "environment": environment,
        }
        self._known: str | None = None
        self._begin()
        _clients.add(self)

    @classmethod
    def from_env(cls, environment: Mapping[str, str] = os.environ, **given: Any) -> PlacementClient:
        """Return a client as the environment of a job describes it; `environment` lists the variables.

        Parameters
        ----------
        given
            As for `PlacementClient`; goes before the environment.

        Raises
        ------
        InputError
            If no deployment is named, or a variable makes no sense: which, and why.
        """
        return cls(**options_of(environment, given=given), environment=environment, **given)

    @property
    def deployment(self) -> str:
        """Name of the deployment."""
        return self._job.deployment

    @property
    def rank(self) -> int:
        """Rank of this process in the job."""
        return self._job.rank

    @property
    def dropped(self) -> int:
        """Windows of this process that were given up."""
        return self._workers.poster.dropped

    @property
    def posted(self) -> int:
        """Windows of this process that the service took."""
        return self._workers.poster.posted

    def fetch(self, *, broadcast: Callable[[bytes | None], bytes] | None = None) -> Fetched:
        """Return the placement to run, the same on all ranks: rank 0 asks, the others receive.

        From the service; else the last good one on disk; else experts in order: each said on stderr where it
        is not the first.

        Parameters
        ----------
        broadcast
            Called on every rank, with the bytes to send on rank 0 and None elsewhere; returns them
            everywhere. Needed where there are several ranks and no `shared_dir`.

        Raises
        ------
        InputError
            If there are several ranks and no way from one to the other.
        ServiceError
            If there is no placement: with `strict`, none from the service; else none from anywhere.
        """
        job, at = self._job, self._job.address
        found = fetch_on_rank_zero(
            job.deployment,
            broadcast=broadcast,
            url=at.url,
            token=at.token,
            token_file=at.token_file,
            allow_http=at.allow_http,
            cache_dir=job.cache_dir,
            fallback=job.fallback,
            timeout_s=at.timeout_s,
            **self._fetch,
        )
        self._known = found.etag
        return found

    def poll(self) -> Fetched | None:
        """Return a placement that is newer than the last one that was returned, None for none; at once.

        Rank 0 alone asks the service, in a thread that begins with the first call; the others always get
        None and learn from rank 0.
        """
        return None if self.rank else self._workers.newest(self._known)

    def post(
        self, window: int, load_LE: Any, tokens: float | None = None, *, version: int | None = None
    ) -> None:
        """Have a window posted; returns at once.

        Parameters
        ----------
        window
            Its number, the same on all ranks; none comes twice, also after a restart.
        load_LE
            Token-expert pairs of logical experts, ``[layers, experts]``; copied.
        tokens
            Tokens that it covers.
        version
            Version of the placement that ran.

        Raises
        ------
        InputError
            If `load_LE` is no table.
        """
        part = {"window": int(window), "load": _table(load_LE)}
        if tokens is not None:
            part["tokens"] = float(tokens)
        self._workers.poster.put(Posting(window=part, version=version))

    def close(self) -> None:
        """End the threads; windows that wait are posted, if the service takes them within 2 s."""
        self._finalizer()

    def __enter__(self) -> PlacementClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        """Begin without threads; they come as they are needed."""
        self._workers = _Workers(self._job)
        # Called by `close`, when nobody refers to the client any more, or at the end of the process.
        self._finalizer = weakref.finalize(self, self._workers.stop)

    def _begin_anew(self) -> None:
        """Leave a parent's threads, locks and connections alone after a fork."""
        self._finalizer.detach()
        self._begin()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What the threads need to know of the job."""

    deployment: str
    address: Address
    rank: int
    speaks: bool
    cache_dir: str | os.PathLike[str] | None
    fallback: Fallback | None
    queue_windows: int
    poll_s: float

    def take(self, answer: DeploymentPlacement) -> Fetched:
        """Check a placement, and keep it on disk."""
        return Shelf(self.deployment, cache_dir=self.cache_dir, fallback=self.fallback).taken(answer)


class _Workers:
    """The threads of one process; they do not keep the client alive."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._voice = Voice(job.deployment, speaks=job.speaks)
        self._lock = threading.Lock()
        self._watcher: Watcher | None = None
        self._stopped = False
        self.poster = Poster(
            job.deployment,
            job.address,
            rank=job.rank,
            voice=self._voice,
            queue_windows=job.queue_windows,
        )

    def newest(self, known: str | None) -> Fetched | None:
        """Return the newest placement that was not returned yet; begin to watch with the first call."""
        with self._lock:
            if self._watcher is None and not self._stopped:
                job = self._job
                self._watcher = Watcher(
                    job.deployment,
                    job.address,
                    known=known,
                    take=job.take,
                    voice=self._voice,
                    wait_s=job.poll_s,
                )
                self._watcher.start()
        return None if self._watcher is None else self._watcher.newest()

    def stop(self) -> None:
        """End the threads."""
        with self._lock:
            self._stopped = True
            if self._watcher is not None:
                self._watcher.stop()
        self.poster.stop(within_s=CLOSE_S)


def _table(load_LE: Any) -> Any:
    """Return a copy of counts, which the caller may use again for the next window."""
    import numpy as np

    table_LE = np.array(load_LE)
    if table_LE.ndim != 2 or table_LE.dtype.kind not in "iuf":
        raise InputError(
            f"a window's load is {table_LE.dtype} of shape {table_LE.shape}, not [layers, experts]"
        )
    return table_LE


def _begin_anew() -> None:
    for client in list(_clients):
        client._begin_anew()


os.register_at_fork(after_in_child=_begin_anew)
