"""What ranks use to migrate: groups of their own, so that nothing of it waits for the model's exchanges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from placement.errors import InputError, PlacementError
from placement.runtime.parallel.mesh import Mesh

__all__ = ["MigrationError", "MigrationLink", "first_line"]


class MigrationError(PlacementError):
    """A migration could not be carried out; the placement of the last switch is whole."""


class MigrationLink:
    """Process groups, stream and time limit of migrations; made once and used for all of them.

    Experts travel through a group of its own: with NCCL a communicator of its own on a side stream. What the
    ranks have to agree on outside of forward passes goes through a gloo group, which needs no GPU.

    Parameters
    ----------
    mesh
        The ranks; each of them has to make the link, at the same point. Groups of a mesh that is but a part
        of all ranks live until the process ends: make one link for all migrations.
    timeout_s
        Limit of one round's transfer, and of each agreement.
    max_ctas
        Thread blocks that NCCL may use for migrations, at most: fewer leave more of the GPU and of the
        links to the model. Default: as NCCL sees fit.

    Raises
    ------
    InputError
        If the time limit is not positive.
    """

    def __init__(self, mesh: Mesh, *, timeout_s: float | None = None, max_ctas: int | None = None) -> None:
        self.mesh = mesh
        self.timeout_s = mesh.timeout_s if timeout_s is None else timeout_s
        if not self.timeout_s > 0:
            raise InputError(f"a migration's time limit is {self.timeout_s} s; it must be positive")
        self.broken = ""
        self.is_busy = False
        self._kept: list[object] = []
        self._is_world = True
        self.stream, self.arrival_stream = _side_stream(mesh.device), _side_stream(mesh.device)
        self.group: dist.ProcessGroup | None = None
        self._host_group: dist.ProcessGroup | None = None
        self.peers: Sequence[int] = (0,)
        if mesh.group is not None:
            self.peers = dist.get_process_group_ranks(mesh.group)
            self._is_world = len(self.peers) == dist.get_world_size()
            self._host_group = self._new_group("gloo", None)
            self.group = self._new_group(self._backend(), _options(mesh, max_ctas))
            self._connect()

    def __enter__(self) -> MigrationLink:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the groups up; does nothing the second time."""
        groups, self.group, self._host_group = (self.group, self._host_group), None, None
        for group in groups:
            # The name of a group of some ranks would come again, and with it the old one's addresses.
            if group is not None and dist.is_initialized() and self._is_world:
                dist.destroy_process_group(group)

    @property
    def compute_stream(self) -> Any:
        """Stream that computes; None where there are no streams."""
        return None if self.stream is None else torch.cuda.current_stream(self.mesh.device)

    def vote(self, *numbers: int) -> list[list[int]]:
        """Return the numbers of every rank, by rank; waits for all of them, and is quicker than `gather`.

        Parameters
        ----------
        numbers
            Equally many on all ranks, each within 64 bits, signed.

        Raises
        ------
        MigrationError
            As of `gather`.
        """
        self.check()
        if self._host_group is None:
            return [list(numbers)]
        votes = torch.zeros(self.mesh.world_size, len(numbers), dtype=torch.int64)
        votes[self.mesh.rank] = torch.tensor(numbers)
        try:
            dist.all_reduce(votes, group=self._host_group)
        except RuntimeError as exc:
            raise self._lost(exc) from exc
        found: list[list[int]] = votes.tolist()
        return found

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has, by rank; waits for all of them.

        Raises
        ------
        MigrationError
            If a rank does not answer in time, or one did not earlier.
        """
        self.check()
        if self._host_group is None:
            return [value]
        values: list[Any] = [None] * self.mesh.world_size
        try:
            dist.all_gather_object(values, value, group=self._host_group)
        except RuntimeError as exc:
            raise self._lost(exc) from exc
        return values

    def _lost(self, exc: RuntimeError) -> MigrationError:
        self.broken = f"a rank is lost or did not answer within {self.timeout_s:g} s: {first_line(exc)}"
        return MigrationError(self.broken)

    def check(self) -> None:
        """Raise if the link cannot be used.

        Raises
        ------
        MigrationError
            If a rank was lost, or copies hang.
        """
        if self.broken:
            raise MigrationError(f"this link of migrations is broken ({self.broken}); make a new one")

    def give_up(self, reason: str, kept: object) -> None:
        """Use the link no more: copies are under way that nobody waits for, into memory that is kept."""
        self.broken = self.broken or reason
        self._kept.append(kept)
        if self.stream is not None and self.group is not None:
            # Else the GPU would wait on for the lost rank, and NCCL's watchdog end this process.
            self.group.abort()

    def _backend(self) -> str:
        return "nccl" if self.stream is not None else "gloo"

    def _new_group(self, backend: str, options: Any) -> dist.ProcessGroup:
        # A transfer that fails is seen by our own clock first; the group's only ends what hangs on.
        seconds = self.timeout_s if backend == "gloo" else 4 * self.timeout_s
        group: dist.ProcessGroup = dist.new_group(
            list(self.peers),
            backend=backend,
            timeout=timedelta(seconds=seconds),
            pg_options=options,
            use_local_synchronization=not self._is_world,
        )
        return group

    def _connect(self) -> None:
        """Let NCCL connect all pairs and load its kernels now; the first copies would wait for that."""
        if self.stream is None:
            return
        device, rank = self.mesh.device, self.mesh.rank
        others = [peer for index, peer in enumerate(self.peers) if index != rank]
        with torch.cuda.stream(self.stream):
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            operations = [
                dist.P2POp(way, torch.zeros(1, device=device), peer, self.group)
                for peer in others
                for way in (dist.isend, dist.irecv)
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        self.stream.synchronize()


def _side_stream(device: torch.device) -> Any:
    """Return a stream besides the one that computes; None where there are no streams."""
    cuda: Any = torch.cuda
    return cuda.Stream(device) if device.type == "cuda" else None


def _options(mesh: Mesh, max_ctas: int | None) -> Any:
    if max_ctas is None or mesh.device.type != "cuda":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = max_ctas
    return options


def first_line(exc: BaseException) -> str:
    """Return what an error of torch.distributed says, without the place in its sources."""
    line = next(iter(str(exc).splitlines()), "") or type(exc).__name__
    return re.sub(r"^\[[^\]]*\]\s*", "", line)
