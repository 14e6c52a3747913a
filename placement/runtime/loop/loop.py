"""A plain hook for any loop: after each step it records, posts, learns of placements and changes over."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from placement.errors import BackendError, InputError, PlacementError
from placement.plan import Placement
from placement.runtime.hook import AppliedPlacement
from placement.runtime.loop.announcement import Announcement
from placement.runtime.loop.channel import TIMEOUT_S, Channel
from placement.runtime.loop.hooked import HookedModel
from placement.runtime.loop.seams import Change, Counter, PlacementSource, Target
from placement.runtime.loop.spread import SpreadModel
from placement.runtime.migration.setup import Options
from placement.runtime.parallel.model import ParallelModel

__all__ = ["PlacementLoop"]

_log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a change to a version is begun that fails."""


class PlacementLoop:
    """Keeps the placement of a running model up to date; a context manager.

    Every rank makes one, with the same numbers, and calls `step` after each step. Rank 0 asks the source;
    what it gets reaches all ranks within three times `every_steps`, and all change over after the same step.
    Nothing of this waits for a network, and nothing that befalls it ends the loop: the old placement runs on,
    which is logged.

    Parameters
    ----------
    model
        An expert-parallel model, a model with an applied placement that every rank holds whole, or any other
        `Target`.
    source
        Where placements come from and windows go to; closed with the loop.
    every_steps
        Steps between two looks for a newer placement.
    counter
        Counts windows; without one none are posted. Closed with the loop.
    optimizer
        What trains the model: its state moves along with the experts.
    migration
        How experts of an expert-parallel model are moved.
    version
        Version of the placement that runs, as `fetch` returned it.
    first_window
        Number of the counter's first window; default: milliseconds of rank 0's clock, so that no number comes
        twice when the job is started again.
    group
        The ranks; default: all.
    timeout_s
        Seconds after which a rank counts as lost; long enough for whatever rank 0 does alone.

    Raises
    ------
    InputError
        If the model is none of these, or `every_steps` is not positive.
    """

    def __init__(
        self,
        model: ParallelModel | AppliedPlacement | Target,
        source: PlacementSource,
        *,
        every_steps: int = 10,
        counter: Counter | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        migration: Options | None = None,
        version: int | None = None,
        first_window: int | None = None,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if every_steps < 1:
            raise InputError(f"every_steps is {every_steps}; it must be at least 1")
        self._target = _target_of(model, optimizer, migration)
        self._source, self._counter = source, counter
        self._every_steps = every_steps
        self._channel: Channel | None = Channel(group=group, timeout_s=timeout_s)
        self._is_first = self._channel.rank == 0
        self._first_window = self._channel.share(
            int(time.time() * 1000) if first_window is None else first_window
        )
        self._steps = 0
        self._version = version
        self._coming: Announcement | None = None
        self._change: Change | None = None
        self._failed: Announcement | None = None
        self._failing: int | None = None
        self._failures = 0

    @property
    def version(self) -> int | None:
        """Version of the placement that runs."""
        return self._version

    @property
    def placement(self) -> Placement:
        """What runs."""
        return self._target.placement

    @property
    def changing(self) -> bool:
        """Whether a change of placement is under way."""
        return self._change is not None

    def step(self) -> None:
        """Do what is to be done between two steps."""
        self._steps += 1
        self._record()
        if self._coming is not None and self._change is not None:
            self._go_on(self._coming, self._change)
        if self._channel is not None and self._steps % self._every_steps == 0:
            self._look(self._channel)

    def close(self) -> None:
        """End: what was counted is posted, a change that is under way is left."""
        counter, channel = self._counter, self._channel
        self._counter = self._channel = self._coming = self._change = None
        try:
            if counter is not None:
                counter.close()
                self._post(counter)
            if channel is not None:
                channel.close()
            self._target.close()
        finally:
            self._source.close()

    def __enter__(self) -> PlacementLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self) -> None:
        if self._counter is not None:
            self._counter.step()
            self._post(self._counter)

    def _post(self, counter: Counter) -> None:
        for found in counter.windows():
            number = self._first_window + found.window
            self._source.post(number, found.load_LE, found.tokens, version=self._version)

    def _look(self, channel: Channel) -> None:
        try:
            message = channel.beat(self._offer)
        except BackendError as exc:
            self._channel = None
            _log.warning("no other placement will be learnt of, the one that runs stays: %s", exc)
            return
        if message is not None:
            self._begin(Announcement.decode(message))

    def _offer(self) -> bytes | None:
        """Return what rank 0 has to tell: a placement that all can change over to."""
        if self._change is not None:
            return None
        found = self._source.poll()
        again, self._failed = self._failed, None
        if found is None and self._failures < ATTEMPTS:
            found = again
        if found is None:
            return None
        try:
            self._target.check(found.placement)
        except InputError as exc:
            _log.warning("version %s is not used: %s", found.version, exc)
            return None
        return Announcement(placement=found.placement, version=found.version).encode()

    def _begin(self, coming: Announcement) -> None:
        if _same(coming.placement, self.placement):
            self._version = coming.version
            return
        try:
            change = self._target.start(coming.placement, version=coming.version)
        except PlacementError as exc:
            self._tell("version %s is not used: %s", coming.version, exc)
            return
        self._coming, self._change = coming, change
        self._settle(coming, change)

    def _go_on(self, coming: Announcement, change: Change) -> None:
        try:
            change.advance()
        except PlacementError as exc:
            self._fail(coming, str(exc))
            return
        self._settle(coming, change)

    def _settle(self, coming: Announcement, change: Change) -> None:
        """Note how a change stands."""
        if change.failed:
            self._fail(coming, change.failure)
        elif change.done:
            self._coming = self._change = self._failed = None
            self._failures = 0
            self._version = coming.version
            if self._is_first:
                _log.info("changed over to version %s after step %d", coming.version, self._steps)

    def _fail(self, coming: Announcement, why: str) -> None:
        self._coming = self._change = None
        self._failures = self._failures + 1 if coming.version == self._failing else 1
        self._failed, self._failing = coming, coming.version
        self._tell("version %s could not be changed over to, what runs goes on: %s", coming.version, why)

    def _tell(self, text: str, *values: Any) -> None:
        if self._is_first:
            _log.warning(text, *values)


def _target_of(model: Any, optimizer: torch.optim.Optimizer | None, migration: Options | None) -> Target:
    if isinstance(model, ParallelModel):
        return SpreadModel(model, optimizer=optimizer, options=migration)
    if isinstance(model, AppliedPlacement):
        return HookedModel(model, optimizer=optimizer)
    if all(hasattr(model, name) for name in ("placement", "check", "start", "close")):
        found: Target = model
        return found
    raise InputError(
        f"a {type(model).__name__} has no placement: pass what expert_parallel or apply_placement returned"
    )


def _same(one: Placement, other: Placement) -> bool:
    """Whether every device holds the same experts, in whichever of its slots."""
    return np.array_equal(one.count_LED, other.count_LED)
