"""Runs jobs one after the other on a thread of its own, and tells of a failure at the next chance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["BackgroundWriter"]


class BackgroundWriter:
    """One thread that works through a queue; it starts with the first job.

    What a job raises is raised again by the next call of `check`, `wait_for_one` or `wait_for_all`, once.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        """Put a job at the end of the queue."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trace-writer")
        self._jobs.append(self._thread.submit(job))

    def check(self) -> None:
        """Raise what jobs raised that are done; waits for none."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait_for_one(self) -> bool:
        """Wait for the oldest job; `False` if there is none."""
        if not self._jobs:
            return False
        self._jobs.popleft().result()
        return True

    def wait_for_all(self) -> None:
        """Wait for all jobs; those after one that failed are still run, and the first failure is raised."""
        first: BaseException | None = None
        while self._jobs:
            failure = self._jobs.popleft().exception()
            first = first or failure
        if first is not None:
            raise first

    def drop(self) -> None:
        """Forget the jobs that wait, and let the one that runs end."""
        self._jobs.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
