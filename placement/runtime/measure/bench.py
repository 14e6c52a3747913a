"""The bench on which one thing after the other is measured, on all ranks in step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from placement.runtime.measure.clock import Clock, HostClock, clock_of, finish
from placement.runtime.measure.sizes import Sizes
from placement.runtime.measure.timing import Samples, Stopwatch, Timing
from placement.runtime.parallel.mesh import Mesh

__all__ = ["Bench"]

DTYPE = torch.bfloat16

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """What every measurement needs: ranks, sizes, a stopwatch, a cold cache and random numbers.

    Parameters
    ----------
    mesh
        Ranks that measure together.
    sizes
        What is measured.
    progress
        Told in a line what comes next; on the first rank alone.
    notes
        What a reader of the figures has to know; measurements append to it.
    dtype
        Of weights and rows.
    """

    mesh: Mesh
    sizes: Sizes
    progress: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype = DTYPE
    _cache: torch.Tensor = field(init=False)
    _word: torch.Tensor = field(init=False)
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        device = self.mesh.device
        set_ = object.__setattr__
        set_(self, "_cache", torch.zeros(self.sizes.flush_bytes // 4, device=device))
        set_(self, "_word", torch.zeros(1, device=device))
        set_(self, "_generator", torch.Generator(device).manual_seed(1 + self.mesh.rank))

    def tell(self, what: str) -> None:
        """Say what comes next."""
        if self.mesh.rank == 0:
            self.progress(what)

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Return random numbers: zeros would be computed faster than real data."""
        made = torch.empty(shape, dtype=self.dtype, device=self.mesh.device)
        return made.normal_(0.0, scale, generator=self._generator)

    def alone(self, call: Callable[[], object]) -> Samples:
        """Time what every rank does by itself, with nothing in the cache."""
        return self._stopwatch(clock_of(self.mesh.device)).samples(call, before=self.flush)

    def alone_on_host(self, call: Callable[[], object]) -> Samples:
        """Time what the host is kept waiting for."""
        return self._stopwatch(self._host_clock()).samples(call)

    def together(
        self, call: Callable[[], object], group: dist.ProcessGroup, *, on_host: bool = False
    ) -> Samples:
        """Time what the ranks of a group do together, from when all are there."""

        def meet() -> None:
            self.flush()
            dist.all_reduce(self._word, group=group)

        clock: Clock = self._host_clock() if on_host else clock_of(self.mesh.device)
        return self._stopwatch(clock).samples(call, before=meet)

    def flush(self) -> None:
        """Fill the GPU's cache with something else by reading it.

        It is read, not written, so that nothing is left to write back; and the host gets ahead meanwhile, so
        that the GPU does not wait for launches in what is timed.
        """
        if self._cache.numel():
            torch.sum(self._cache, dim=0, out=self._word[0])

    def agree(self, number: int) -> int:
        """Return the first rank's number."""
        if self.mesh.group is None:
            return number
        sent = torch.tensor([number], device=self.mesh.device)
        dist.broadcast(sent, group=self.mesh.group, group_src=0)
        return int(sent.item())

    def sweep(
        self,
        items: Sequence[Item],
        *,
        what: str,
        amount: Callable[[Item], float],
        measure: Callable[[Item], Samples],
    ) -> list[tuple[Item, Samples]]:
        """Return the samples of each item, those left out that take too long and those of a larger amount.

        Parameters
        ----------
        what
            What the items are, for the note about those left out.
        """
        limit, done = math.inf, []
        for item in items:
            samples = measure(item) if amount(item) < limit else ()
            if samples:
                done.append((item, samples))
            else:
                limit = min(limit, amount(item))
        if len(done) < len(items):
            self.notes.append(
                f"{what}: {len(items) - len(done)} of {len(items)} took too long and were left out"
            )
        return done

    def over_ranks(
        self, done: Sequence[tuple[Item, Samples]], how: Callable[[Sequence[Samples]], Timing]
    ) -> list[tuple[Item, Timing]]:
        """Return each item with its timing over all ranks, given this rank's samples."""
        samples_D = self.mesh.gather([samples for _item, samples in done])
        timings = [how(samples_of_ranks) for samples_of_ranks in zip(*samples_D, strict=True)]
        return [(item, timing) for (item, _samples), timing in zip(done, timings, strict=True)]

    def _host_clock(self) -> HostClock:
        return HostClock(lambda: finish(self.mesh.device))

    def _stopwatch(self, clock: Clock) -> Stopwatch:
        return Stopwatch(clock=clock, pace=self.sizes.pace, agree=self.agree)
