"""Ranks wait for each other while they read or write files, and fail together if one of them fails.

Exchanges have short time limits; disks are slower, and not equally slow for every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from placement.errors import InputError
from placement.runtime.parallel.mesh import Mesh

__all__ = ["FILES_S", "Patience"]

FILES_S = 1800.0
"""Seconds that a rank waits for the slowest one."""


class Patience:
    """A way for all ranks of a mesh to tell each other how it went; every rank has to make one.

    Parameters
    ----------
    timeout_s
        Seconds to wait for the slowest rank.
    """

    def __init__(self, mesh: Mesh, *, timeout_s: float = FILES_S) -> None:
        self._world_size = mesh.world_size
        self._group: dist.ProcessGroup | None = None
        if mesh.group is not None:
            # On CPUs it costs next to nothing, so it stays: torch would give its name away a second time.
            self._group = dist.new_group(
                dist.get_process_group_ranks(mesh.group),
                timeout=timedelta(seconds=timeout_s),
                backend="gloo",
                use_local_synchronization=True,
            )

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has, by rank."""
        values = [value] * self._world_size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks do something; those that could are told of the first that could not.

        Raises
        ------
        InputError
            On every rank, if one raises it inside.
        """
        try:
            yield
        except InputError as exc:
            # The others are told first: they would wait for this rank in their next exchange.
            self.gather(str(exc))
            raise
        for rank, problem in enumerate(self.gather("")):
            if problem:
                raise InputError(f"rank {rank}: {problem}")
