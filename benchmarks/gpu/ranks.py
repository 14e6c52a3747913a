"""One process of several: starts and ends the process group of a measurement, on GPUs or on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from placement.runtime.parallel.mesh import Mesh

__all__ = ["Budget", "started_mesh"]


@contextmanager
def started_mesh(*, timeout_s: float = 120.0) -> Iterator[Mesh]:
    """Join the ranks that torchrun started; NCCL where there are GPUs for all of them, else gloo."""
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield Mesh.create(timeout_s=timeout_s)
    finally:
        dist.destroy_process_group()


class Budget:
    """Seconds that a part may take; all ranks agree on when they are over."""

    def __init__(self, seconds: float, mesh: Mesh) -> None:
        import time

        self._clock, self._mesh = time.monotonic, mesh
        self._ends_s = self._clock() + seconds

    def is_over(self) -> bool:
        """Whether any rank's time is up; every rank has to ask."""
        return any(self._mesh.gather(self._clock() > self._ends_s))
